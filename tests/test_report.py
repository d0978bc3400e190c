"""The HTML page of a run or a study: what is in it, read as a browser reads it, and once by a browser."""

import copy
import html.parser
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import pytest
from browser import FOUND, browser
from problems import cli

from jaxsae._core.files import InputError
from jaxsae.app import html as pages, logs, plots, report
from jaxsae.app.options import Options
from jaxsae.app.summary import FAMILIES
from jaxsae.autoencoder.shrinkage import RATIO_EDGES

ROOT = Path(__file__).parent.parent
OPTIONS = Options("topk", 512, k=16)
HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(2)>" onload="alert(3)' & "</style>"""
BINS = len(RATIO_EDGES) - 1


def a_row(family, value, l0, **more):
    """A row of a study, as `study.measure` makes it."""
    bins = np.random.default_rng(int(l0)).integers(0, 50, (2, BINS))
    bins[0, 0] = 1000  # many values become 0: more than any other bin has
    numbers = {"nmse_before": 4 / l0, "nmse_after": 3 / l0, "mean_before": 0.05, "mean_after": 0.075}
    numbers |= {"nmse_rescaled": 3.5 / l0, "nmse_signed": 2.5 / l0, "nmse_omp_nonnegative": 2 / l0, "nmse_omp": 1 / l0}
    numbers |= {"mean_change": 0.5, "rising": 0.625, "gamma_before": 0.9, "gamma_after": 1.0, "certified": 1.0}
    return {
        "family": family,
        "k_or_l1": value,
        "l0_target": round(l0),
        "seed": 0,
        "steps": 75,
        "l0": l0,
        "l0_after": 0.75 * l0,
        "dead": 0.25,
        "dead_rows": 102_048,
        "worst_kkt": 1e-7 * l0,
        **numbers,
    } | {
        "change": bins[0].tolist(),
        "latent_change": bins[1].tolist(),
        "firing": [64, 20, 30, 40, 50, 30, 10, 8, 4, 0, 1],
        "worst_rows": [{"row": 1000 + n, "l0": 7 + n, "kkt": 1e-7 * (l0 - n)} for n in range(3)],
        "curve": {"step": [25, 50, 75], "nmse": [0.9, None, 5 / l0], "l0": [120.0, 80.0, l0]},
        **more,
    }


def a_study(**more):
    rows = [a_row("relu", 0.2, 12.0), a_row("relu", 0.05, 41.5), a_row("topk", 12, 11.0), a_row("topk", 42, 42.0)]
    return {
        "rows": rows,
        "complete": True,
        "data": {"source": "x.npy", "rows": 9000, "heldout": 2048, "width": 192},
        "config": {"latents": 256, "l0": [12, 42]},
        "versions": {"jaxsae": "0.1.0", "jax": "0.10.2"},
        "ratio_edges": RATIO_EDGES.tolist(),
    } | more


def with_losses(found):
    found |= {"ce_clean": 2.5, "ce_mean": 9.5, "ce_zero": 12.5}
    for row in found["rows"]:
        when = ("before", "after", "omp_nonnegative")
        row |= {f"{name}_{which}": 3.25 for name in ("ce", "kl", "recovered_mean") for which in when}
    return found


def a_run(**more):
    """What `runs.run` reports."""
    heldout = {"nmse": 0.0643, "explained_variance": 0.9357, "l0": 16.0, "rows": 2048, "nonfinite": 0}
    heldout |= {"dead": 0.125, "dead_rows": 9000}
    heldout |= {"nmse_at": {"1": 0.6587, "4": 0.2293, "16": 0.0643}, "firing": [64, 100, 200, 140, 8]}
    return {
        "options": OPTIONS._asdict(),
        "data": {"path": "x.npy", "rows": 9000, "passes": 22.75, "heldout": 2048, "width": 108},
        "steps": 2000,
        "skipped": 0,
        "nonfinite_rows": {},
        "heldout": heldout,
        "versions": {"jaxsae": "0.1.0"},
    } | more


def write(folder, found):
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(found))
    return folder


def log(folder, first=10, last=200, value=lambda step: 1 / step):
    """Event files, as a training writes them."""
    with logs.logs(folder, OPTIONS) as log:
        for step in range(first, last + 1, 10):
            log(
                step,
                {"nmse": value(step), "l0": 16.0, "dead": 0.0, "dead_rows": 0.0, "loss": value(step), "skipped": 0.0},
            )


class Page(html.parser.HTMLParser):
    """The elements of a page, and the text in each of them."""

    VOID = ("meta",)
    MAY_CLOSE_ITSELF = ("path",)

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.elements.append({"tag": tag, "text": "", "inside": list(self._open), **dict(attrs)})
        if tag not in self.VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        assert tag in self.MAY_CLOSE_ITSELF or tag == "circle"
        self.elements.append({"tag": tag, "text": "", "inside": list(self._open), **dict(attrs)})

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]

    @property
    def sections(self):
        return {element["text"]: element["inside"][-1] for element in self.all("h2")}

    def section(self, name):
        return self.sections[name]["text"]

    def drawings(self, name):
        """The charts of a section."""
        return [svg for svg in self.all("svg") if self.sections[name] in svg["inside"]]

    def cells(self, caption):
        """The table whose caption begins so, row by row."""
        (table,) = [c["inside"][-1] for c in self.all("caption") if c["text"].startswith(caption)]
        lines = [line for line in self.all("tr") if table in line["inside"]]
        cells = [element for element in self.elements if element["tag"] in ("th", "td")]
        return [[cell["text"] for cell in cells if line in cell["inside"]] for line in lines]


def page_of(folder, found=None):
    return Page(report.page(folder if found is None else write(folder, found)))


STUDY = [
    *("Findings", "Results", "Values and selection", "Error against sparsity", "Shrinkage of active values"),
    *("Shrinkage, latent by latent", "How often latents fire", "Training", "Rows furthest from optimal"),
    "Configuration and versions",
]
RUN = ["Training", "Error against sparsity", "How often latents fire", "Shrinkage", "Configuration and versions"]


@pytest.fixture
def a_run_folder(tmp_path):
    log(tmp_path)
    return write(tmp_path, a_run())


# --- What is in it


def test_a_study_has_every_section(tmp_path):
    page = page_of(tmp_path, with_losses(a_study()))
    assert list(page.sections) == STUDY
    drawn = {name: len(page.drawings(name)) for name in STUDY}
    assert drawn == dict(zip(STUDY, [0, 0, 0, 3, 4, 4, 4, 2, 0, 0], strict=True))
    found = "by +50%, the error by −25%, and sets 25% of the values to 0. Selecting as many atoms"
    assert found in page.section("Findings")
    assert "changes it by −50%." in page.section("Findings")
    assert "63% rise, mean +50.0%" not in page.section("Shrinkage, latent by latent")
    assert "64 of 257 dead" in page.section("How often latents fire")


def test_a_run_has_every_section(a_run_folder):
    page = page_of(a_run_folder)
    assert list(page.sections) == RUN
    assert [chart["aria-label"].partition(",")[0] for chart in page.drawings("Training")] == [
        *("NMSE of a batch", "L0: active latents per row", "dead latents", "loss")  # nothing was skipped
    ]
    assert page.cells("The same numbers") == [
        ["latents kept", "NMSE"],
        ["1", "0.6587"],
        ["4", "0.2293"],
        ["16", "0.0643"],
    ]
    assert "64 of 512 dead" in page.section("How often latents fire")
    assert f"jaxsae study --sae {a_run_folder} --data" in page.section("Shrinkage")
    facts = [(name["text"], value["text"]) for name, value in zip(page.all("dt"), page.all("dd"), strict=True)]
    assert facts == [
        *(("NMSE", "0.0643"), ("explained variance", "0.9357"), ("L0", "16.0"), ("dead latents", "12.5%")),
        *(("rows counted for these", "9,000"), ("held-out rows", "2,048"), ("steps", "2,000")),
        ("passes over the data", "22.8"),
    ]


def test_the_tables_have_the_numbers_of_the_report(tmp_path):
    page = page_of(tmp_path, with_losses(a_study()))
    over, names, *lines = page.cells("On the held-out rows")
    assert over == ["", "L0", "NMSE", "mean activation", "values", "γ", "latents", "rows"]
    assert names[:5] == ["method", "encoder", "refined", "encoder", "refined"]
    assert lines[0] == [
        *(
            "ReLU + L1, L0 12",
            "12.0",
            "9.0",
            "0.3333",
            "0.2500",
            "0.05000",
            "0.07500",
            "+50.0%",
            "62%",
            "0.9000",
            "1.0000",
            "25.0%",
            "102,048",
        ),
        *("100%", "1.2e-06"),
    ]
    assert page.cells("Next-token loss")[2] == ["ReLU + L1, L0 12", *["3.250"] * 5, *["325.0%"] * 2]
    reconstructions = ["0.3333", "0.2917", "0.2500", "0.2083", "0.1667", "0.0833"]
    assert page.cells("NMSE of several codes")[2] == ["ReLU + L1, L0 12", *reconstructions]
    assert "2.500 nats per token for the model itself, 9.500 with the mean" in page.section("Results")
    assert ["l0", "[12, 42]"] in page.cells("Options")
    assert ["source", "x.npy"] in page.cells("Data")
    assert ["jax", "0.10.2"] in page.cells("Versions")


def test_the_rows_furthest_from_optimal_are_those_of_all_autoencoders(tmp_path):
    found = a_study()
    found["rows"][2]["worst_rows"][1]["kkt"] = None  # NaN, in JSON
    assert page_of(tmp_path, found).cells("Largest KKT residuals") == [
        ["method", "row", "L0", "KKT residual"],
        ["TopK, L0 11", "1,001", "8", "–"],
        ["TopK, L0 42", "1,000", "7", "4.20e-06"],
        ["ReLU + L1, L0 42", "1,000", "7", "4.15e-06"],
    ]


@pytest.mark.parametrize("study, drawn", [("study", 2), ("study-smollm2", 3)])
def test_the_committed_studies_have_every_section_and_that_of_a_model_its_loss(study, drawn):
    page = page_of(ROOT / "benchmarks/results" / study)
    assert [name for name in page.sections if name != "Length of training"] == STUDY
    assert ("Length of training" in page.sections) == (study == "study")
    assert len(page.drawings("Error against sparsity")) == drawn


LACKS = {
    "change": "Shrinkage of active values",
    "latent_change": "Shrinkage, latent by latent",
    "firing": "How often latents fire",
    "curve": "Training",
    "worst_rows": "Rows furthest from optimal",
    "l0": "Error against sparsity",
    "nmse_omp_nonnegative": "Values and selection",
}


@pytest.mark.parametrize("key", LACKS)
def test_what_no_row_has_leaves_its_section_out(key, tmp_path):
    found = a_study()
    for row in found["rows"]:
        del row[key]
    assert list(page_of(tmp_path, found).sections) == [name for name in STUDY if name != LACKS[key]]


@pytest.mark.parametrize("rows", [[], [{"family": "relu", "l0_target": 8}]], ids=["none", "without numbers"])
def test_a_study_interrupted_at_the_start(rows, tmp_path):
    page = page_of(tmp_path, a_study(rows=rows, complete=False))
    assert list(page.sections) == ["Configuration and versions"]
    assert "This study is not complete" in page.all("p")[1]["text"]


def test_seeds_are_averaged_with_standard_errors(tmp_path):
    rows = [a_row("topk", 12, 12.0, seed=seed, nmse_before=0.3 + 0.1 * seed) for seed in range(3)]
    page = page_of(tmp_path, a_study(rows=rows))
    (line,) = page.cells("On the held-out rows")[2:]
    assert line[0] == "TopK, L0 12"
    assert line[3] == "0.4000 ± 0.0577"  # 0.1 / √3
    assert line[1] == "12.0 ± 0.0"


def test_lengths_of_training_are_drawn(tmp_path):
    shorter = [a_row(family, 0.2, 12.0, steps=steps) for family in ("relu", "topk") for steps in (30, 15)]
    page = page_of(tmp_path, a_study(shorter=shorter))
    assert len(page.drawings("Length of training")) == 3
    assert "to an L0 of 12" in page.section("Length of training")


def test_codes_beside_the_true_ones_are_tabulated(tmp_path):
    numbers = {"mcc": 0.9, "f1_before": 0.8, "f1_after": 0.85, "bias_before": -0.25, "bias_after": 0.01}
    page = page_of(tmp_path, a_study(rows=[a_row("relu", 0.2, 12.0, **numbers)]))
    assert page.cells("Latents are matched")[2] == ["ReLU + L1, L0 12", "0.900", "0.800", "0.850", "−25.0%", "+1.0%"]


def test_a_diverged_autoencoder_is_shown_with_dashes(tmp_path):
    found = a_study()
    lists = {"change": [0] * BINS, "latent_change": [0] * BINS, "firing": [256]}
    nothing = {name: None for name, value in found["rows"][0].items() if isinstance(value, float) and name != "k_or_l1"}
    found["rows"][0] |= nothing | lists | {"curve": {"step": [25], "nmse": [None], "l0": [None]}, "certified": 0.0}
    page = page_of(tmp_path, found)
    assert list(page.sections) == STUDY
    assert page.cells("On the held-out rows")[2][:4] == ["ReLU + L1, L0 12", "–", "–", "–"]
    (warning,) = [p["text"] for p in page.all("p") if p.get("class") == "warning"]
    assert warning == "ReLU + L1, L0 12: only 0% of the rows are certified to be optimal."


@pytest.mark.parametrize(
    ("keys", "odd", "rows"),
    [
        ([], None, 0),
        (["l0"], float("nan"), 1),
        (["nmse_before", "nmse_after"], 0.0, 1),
        (["nmse_after", "ce_clean"], None, 1),
        (["ce_mean", "ce_before"], None, 1),
    ],
)
def test_the_figure_of_odd_numbers_is_drawn(keys, odd, rows, tmp_path):
    found = with_losses(a_study())
    found["rows"] = found["rows"][:rows]
    for key in keys:
        for holds in (found, *found["rows"]):
            holds |= {key: odd} if key in holds else {}
    plots.shrinkage(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


ODD = [None, float("nan"), float("inf"), 0, -1, 1e308, 5e-324, 10**40, "x", [], {}, [None], True, [[1]]]


def damaged(found, generator):
    """A report of which up to three places hold something odd, or nothing."""
    for _ in range(generator.integers(1, 4)):
        place = found
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = keys[generator.integers(len(keys))]
            if isinstance(place[key], dict | list) and place[key] and generator.random() < 0.8:
                place = place[key]
            elif generator.random() < 0.2:
                del place[key]
                break
            else:
                place[key] = ODD[generator.integers(len(ODD))]
                break
    return found


@pytest.mark.parametrize("make", [a_run, lambda: with_losses(a_study())])
def test_a_damaged_report_is_a_page_or_one_line(make, tmp_path):
    for seed in range(30):
        write(tmp_path, damaged(make(), np.random.default_rng(seed)))
        try:
            text = report.page(tmp_path)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            drawn = [element for element in Page(text).elements if element["tag"] in ("path", "rect", "circle", "text")]
            assert not [value for e in drawn for key, value in e.items() if key in "d x y cx cy" and "nan" in value]


def test_autoencoders_of_others_go_by_their_names(tmp_path):
    rows = [a_row("jumprelu", None, 30.0, sae="hf://some/where", curve=None), a_row("other", None, 20.0, sae="x")]
    page = page_of(tmp_path, a_study(rows=rows))
    assert [line[0] for line in page.cells("On the held-out rows")[2:]] == ["hf://some/where", "x"]
    assert [item["text"] for item in page.all("li") if item.get("class")][:2] == [
        *(
            f"{name}. Refinement changes the mean activation by +50%, the error by −25%, and sets 25% of the values "
            "to 0. Selecting as many atoms by orthogonal matching pursuit, with values of at least 0, changes it by "
            "−50%."
            for name in ("JumpReLU", "other")
        )
    ]


def test_what_went_wrong_in_a_run_is_told(tmp_path):
    found = a_run(skipped=3, nonfinite_rows={"x.npy": [7, 9]})
    found["heldout"]["nonfinite"] = 2
    warned = [p["text"] for p in page_of(tmp_path, found).all("p") if p.get("class") == "warning"]
    assert warned == [
        "3 batches were skipped, since their loss was not finite. NaN or Inf: rows 7, 9 of x.npy.",
        "2 held-out rows hold NaN or Inf, and are left out.",
    ]


def test_a_run_that_goes_on_is_shown_so_far(tmp_path):
    log(tmp_path / "going on")
    page = page_of(tmp_path / "going on")
    assert list(page.sections) == ["Training"]
    assert page.all("title")[0]["text"] == "Training run: going on"
    assert "This training has not ended" in page.all("p")[1]["text"]


# --- Curves


def test_curves_are_what_was_logged_and_the_last_told_of_each_step(tmp_path):
    log(tmp_path, last=200)
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / "events.out.tfevents.0000000001.host")
    log(tmp_path, first=150, last=250, value=lambda step: 7.0)  # it went back, and on
    curves = logs.curves(tmp_path)
    assert sorted(curves) == ["dead", "dead_rows", "l0", "loss", "nmse", "skipped"]
    assert list(curves["nmse"]) == list(range(10, 251, 10))
    np.testing.assert_allclose(list(curves["nmse"].values()), [1 / s if s < 150 else 7 for s in range(10, 251, 10)])


@pytest.mark.parametrize("damage", [lambda content: content[:-30], lambda content: content[:400] + b"\xff" * 400])
def test_a_damaged_event_file_gives_what_is_before_the_damage(damage, tmp_path):
    log(tmp_path)
    whole = logs.curves(tmp_path)["nmse"]
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    found = logs.curves(tmp_path)["nmse"]
    assert 0 < len(found) <= len(whole)
    assert found.items() <= whole.items()


def test_a_long_curve_is_thinned_and_keeps_its_spikes():
    curve = {step: 1.0 + 0.01 * (step % 7) for step in range(10, 100_010, 10)} | {50_000: 99.0, 50_010: float("nan")}
    steps, values = report._thinned(curve)
    assert len(steps) <= 2 * report._BINS
    assert steps == sorted(steps)
    assert (max(values), steps[values.index(99.0)]) == (99.0, 50_000)


# --- The page as such


@pytest.fixture(params=["study", "run"])
def text(request, tmp_path):
    if request.param == "run":
        log(tmp_path)
    return report.page(write(tmp_path, with_losses(a_study()) if request.param == "study" else a_run()))


def test_it_can_be_read_by_those_who_do_not_see_it(text):
    page = Page(text)
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("title")[0]["text"]
    assert len(page.all("h1")) == 1
    assert all(chart["role"] == "img" and len(chart["aria-label"]) > 15 for chart in page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table")) > 0
    assert all(cell["scope"] in ("col", "row", "colgroup") for cell in page.all("th"))
    names = [element["id"] for element in page.elements if "id" in element]
    assert len(set(names)) == len(names)
    assert {link["href"] for link in page.all("a")} == {f"#{section['id']}" for section in page.sections.values()}


def test_it_asks_for_nothing_from_elsewhere(text):
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "form"} & {element["tag"] for element in page.elements}
    (style,) = page.all("style")
    assert "url(" not in style["text"]
    assert "@import" not in style["text"]
    assert not re.search(r"https?://", text)


def test_the_style_has_every_colour_and_class_it_needs(text):
    page = Page(text)
    style = page.all("style")[0]["text"]
    assert set(re.findall(r"var\(--([\w-]+)\)", style)) <= {*pages.LIGHT, "c", "gap"}
    assert pages.LIGHT.keys() == pages.DARK.keys()
    used = {name for element in page.elements for name in element.get("class", "").split()}
    assert {name for name in used if f".{name}" not in style} <= {"tick", "label"}  # as all text of a chart


def luminance(colour):
    channels = np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("colours", [pages.LIGHT, pages.DARK], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(colours):
    for name in ("ink", "soft", "bad", "other", *FAMILIES):
        dim, bright = sorted(luminance(colours[side]) for side in ("paper", name))
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, name


def spoil(value):
    """Hostile text in the place of every text, and of every name that is shown."""
    if isinstance(value, dict):
        return {key: spoil(item) for key, item in value.items()}
    if isinstance(value, list):
        return [spoil(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize("kind", ["study", "run"])
def test_hostile_text_is_text(kind, tmp_path):
    folder = tmp_path / "<b>&"
    clean = with_losses(a_study()) if kind == "study" else a_run()
    for row in clean.get("rows", []):
        row["sae"] = "x"
    found = spoil(copy.deepcopy(clean))
    found |= {"versions": {HOSTILE: HOSTILE}}
    log(folder, value=lambda step: 1.0)
    with logs.logs(folder, OPTIONS) as write:
        write(300, {"<i>": 1.0})
    expected, page = page_of(tmp_path / "clean", clean), page_of(folder, found)
    allowed = {element["tag"] for element in expected.elements}
    assert {element["tag"] for element in page.elements} <= allowed | {"svg", "path", "text", "figure"}
    assert not [name for element in page.elements for name in element if name.startswith("on")]
    assert HOSTILE in page.all("title")[0]["text"]
    assert [HOSTILE, HOSTILE] in page.cells("Versions")


# --- The command


def test_the_page_is_written_beside_the_report_and_replaced(tmp_path, capsys):
    write(tmp_path, a_study())
    (tmp_path / "report.html").write_text("old")
    assert cli("report", tmp_path) == 0
    assert capsys.readouterr().out == f"Written: {tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.page(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_the_page_is_written_where_it_is_asked_for(tmp_path):
    write(tmp_path / "study", a_study())
    assert cli("report", tmp_path / "study", "--out", tmp_path / "deep" / "page.html") == 0
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["report.json"]


def spoiled_row(**more):
    found = a_study()
    found["rows"][0] |= more
    return json.dumps(found)


BAD = {
    "nothing there": (
        "nothing",
        "",
        [],
        "nothing: no such directory; pass one that jaxsae train, study or features wrote.",
    ),
    "a file": ("x/report.json", "{}", [], "report.json: not a directory; pass one"),
    "an empty directory": (".", "", [], "holds no report.json, features.json or curves; pass what"),
    "not JSON": ("x", '{"rows": [', [], "report.json: is not JSON ("),
    "not UTF-8": ("x", b"\xff\xfe\xff", [], "report.json: is not JSON ("),
    "a list": ("x", "[1]", [], "report.json: holds list, expected a JSON object; make it again."),
    "of another program": ("x", '{"a": 1}', [], "report.json: is not of jaxsae train or jaxsae study; pass"),
    "rows of no kind": ("x", '{"rows": 3}', [], "report.json: is damaged (TypeError: "),
    "a row of text": ("x", '{"rows": ["x"]}', [], "report.json: is damaged (AttributeError: "),
    "a number that is text": ("x", spoiled_row(l0="12"), [], "report.json: is damaged (TypeError: "),
    "a histogram cut short": ("x", spoiled_row(change=[1, 2]), [], "report.json: is damaged (ValueError: "),
    "out is the report": (
        "x",
        '{"rows": []}',
        ["x/report.json"],
        "report.json: is the report itself; write the page to",
    ),
    "out in a file": ("x", '{"rows": []}', ["x/report.json/page.html"], "cannot write"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_exit_code_2_and_one_line(case, tmp_path, capsys, unchecked):
    folder, content, out, message = BAD[case]
    if content:
        (tmp_path / "x").mkdir()
        (tmp_path / "x/report.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(tmp_path.rglob("*"))
    assert cli("report", tmp_path / folder, *(part for name in out for part in ("--out", tmp_path / name))) == 2
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1)
    assert line.startswith("jaxsae: ")
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    log(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX.proto.event_pb2", None)
    assert cli("report", tmp_path) == 2
    assert capsys.readouterr().err.endswith("missing; pip install 'jaxsae[study]'.\n")


# --- In a browser

# Texts of one chart that overlap, and texts that leave the window or are smaller than one can read.
ILLEGIBLE = """
[...document.querySelectorAll("svg")].flatMap(svg => {
  const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom - 2 <= b.top || b.bottom - 2 <= a.top;
  const out = texts.filter(([, r]) => r.left < 0 || r.right > innerWidth).map(([t]) => "outside: " + t);
  const small = scale * parseFloat(getComputedStyle(svg).fontSize) < 9 ? ["small: " + svg.ariaLabel] : [];
  const met = texts.flatMap(([t, a], n) =>
    texts.slice(n + 1).filter(([, b]) => !apart(a, b)).map(([u]) => "overlap: " + t + ", " + u));
  return [...out, ...small, ...met];
})
"""


class View(NamedTuple):
    page: str
    width: int
    dark: bool


VIEWS = [
    View(page, width, dark) for page in ("study", "run") for width, dark in ((1200, False), (400, True), (400, False))
]


@pytest.mark.skipif(FOUND is None, reason="needs Chromium: apt-get install chromium, or the like")
def test_a_browser_shows_it_at_every_width_in_light_and_dark(tmp_path):
    rows = [a_row("relu", 0.05, 41.5, sae="hf://" + "a-very-long-name/" * 12), *a_study()["rows"]]
    write(tmp_path / "study", with_losses(a_study(rows=rows, complete=False)))
    log(tmp_path / "run", last=2000)
    write(tmp_path / "run", a_run(skipped=3))
    for name in ("study", "run"):
        report.write(tmp_path / name, tmp_path / f"{name}.html")
    with browser(tmp_path / "profile") as chromium:
        for view in VIEWS:
            chromium.open(tmp_path / f"{view.page}.html", width=view.width, dark=view.dark)
            assert chromium.evaluate("document.documentElement.scrollWidth") == view.width, view
            assert chromium.evaluate(ILLEGIBLE) == [], view
            picture = tmp_path / f"{view.page}-{view.width}-{'dark' if view.dark else 'light'}.png"
            chromium.screenshot(picture)
            with PIL.Image.open(picture) as image:
                assert image.width == view.width
                assert image.height > 1000
                brightness = np.asarray(image.convert("L")).mean()
            assert (brightness < 60) if view.dark else (brightness > 200), view
    methods = {name for name, _ in chromium.events}
    assert not methods & {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
    asked = {params["request"]["url"] for name, params in chromium.events if name == "Network.requestWillBeSent"}
    assert asked == {(tmp_path / f"{name}.html").as_uri() for name in ("study", "run")}
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)
