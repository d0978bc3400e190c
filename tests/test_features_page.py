"""The page of latents: what is refused, and what a browser makes of the rest."""

import base64
import hashlib
import itertools
import json
import operator
import re
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from browser import FOUND, browser
from problems import cli, refused
from test_report import luminance

from jaxsae.app import features_page, html as pages, report

PROSE = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.
The river Seine flows through Paris, the capital of France, and reaches the sea at Le Havre; the Thames flows through
London. In 1859 a committee of the Royal Society measured the temperature of the water each morning.

\tdef area(radius):\n\t\treturn 3.14159 * radius ** 2   # of a circle\n
She didn't know whether the parliament had voted on the budget, nor why the letter of 12 March 2024 was late."""
HEBREW = "בראשית ברא אלהים את השמים ואת הארץ, בשנת 2024 אמר משה: New York היא עיר גדולה."
ARABIC = "ولد في القاهرة عام 1911 وكتب رواياته باللغة العربية."
CHINESE = "长江是亚洲第一长河,发源于青藏高原。它流经上海,注入东海。"
EDGES, RATIO_EDGES = np.geomspace(0.01, 100, 41), 2.0 ** np.linspace(-4, 6, 81)
ROWS = 1_000_000


def tokens_of(text: str) -> list[str]:
    """Pieces of a text, as a tokenizer cuts it: words with the space before them, long ones in two, single digits."""
    return [
        piece
        for found in re.findall(r" ?[^\W\d]+|\d|\s|[^\w\s]", text)
        for piece in ([found] if len(found) < 8 else [found[:5], found[5:]])
    ]


def rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def an_example(rng, tokens, scale, place, width=24) -> dict[str, Any]:
    """A window on tokens, around one where a latent is active, like on others of the same first letters."""
    first = max(0, place - width // 2)
    shown = tokens[first : place + width // 2]
    likeness = np.array([token.strip()[:2] == tokens[place].strip()[:2] for token in shown])
    values = scale * likeness * rng.uniform(0.2, 0.8, len(shown))
    values[place - first] = scale
    refined = values * rng.lognormal(0.15, 0.15, len(shown)) * (rng.random(len(shown)) < 0.95)
    return {
        "row": int(rng.integers(ROWS)),
        **{"value": rounded(values)[place - first], "refined": rounded(refined)[place - first]},
        **{"context": int(rng.integers(4000)), "position": place, "document": int(rng.integers(900)), "first": first},
        "tokens": shown,
        "values": [None if first + n == 0 else value for n, value in enumerate(rounded(values))],
        "refined_values": [None if first + n == 0 else value for n, value in enumerate(rounded(refined))],
        "pixels": None,
    }


def a_patch(rng, scale, patch) -> dict[str, Any]:
    pixels = 127 + 120 * np.sin(
        np.linspace(0, rng.uniform(3, 20), patch["height"])[:, None] + np.arange(patch["width"])
    )
    pixels = pixels[..., None] * rng.uniform(0.3, 1, patch["channels"])
    nothing = dict.fromkeys(("context", "position", "document", "first", "tokens", "values", "refined_values"))
    values = {"value": round(scale, 3), "refined": round(1.2 * scale, 3)}
    return {"row": int(rng.integers(ROWS)), **values, **nothing, "pixels": pixels.astype(int).ravel().tolist()}


def a_latent(
    rng, index: int, tokens: list[str], others: int, *, patch=None, top=5, bands=2, width=24
) -> dict[str, Any]:
    active = rng.lognormal(rng.normal(0, 1), 0.7, size := int(rng.lognormal(5, 1)))
    ratios = rng.lognormal(rng.normal(0.15, 0.1), 0.2, size) * (rng.random(size) < 0.97)
    refined, count = active * ratios, 10 * size

    def histogram(values, edges):
        return (10 * np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]).tolist()

    word = tokens[int(rng.integers(1, len(tokens)))]
    places = [n for n, token in enumerate(tokens) if token == word]

    def examples(scales):
        if patch:
            return [a_patch(rng, scale, patch) for scale in scales]
        return [an_example(rng, tokens, scale, int(rng.choice(places)), width) for scale in scales]

    def logits(sign):
        return [{"id": n, "token": str(rng.choice(tokens)), "logit": sign * round(3 - 0.2 * n, 3)} for n in range(8)]

    def some(names):
        return [
            {"index": int(j), **{name: round(rng.uniform(), 3) for name in names}} for j in rng.integers(0, others, 5)
        ]

    quantiles = np.quantile(active, np.linspace(1, 0, bands + 1))
    return {
        **{"index": index, "count": count, "density": count / ROWS},
        **{"mean": active.mean(), "mean_refined": refined.mean(), "max": active.max(), "max_refined": refined.max()},
        "shrinkage": refined.sum() / active.sum(),
        **{"values": histogram(active, EDGES), "refined_values": histogram(refined, EDGES)},
        "ratios": histogram(ratios, RATIO_EDGES),
        "top": examples(np.sort(active)[::-1][:top]),
        "bands": [
            {"low": low, "high": high, "examples": examples(rng.uniform(low, high, 3))}
            for high, low in itertools.pairwise(quantiles)
        ],
        **{"coactive": some(("given", "lift")), "nearest": some(("cosine",))},
        **{"promotes": None if patch else logits(1), "suppresses": None if patch else logits(-1)},
        "loss_effect": None if patch else round(rng.normal(0.01, 0.02), 5),
        "atom": a_patch(rng, 1.0, patch)["pixels"] if patch else None,
    }


def a_dead_latent(index: int) -> dict[str, Any]:
    nothing = dict.fromkeys(("mean", "mean_refined", "max", "max_refined", "shrinkage", "promotes", "suppresses"))
    empty = {"values": [0] * 40, "refined_values": [0] * 40, "ratios": [0] * 80, "top": [], "bands": []}
    more = {"coactive": [], "nearest": [], "loss_effect": None, "atom": None}
    return {"index": index, "count": 0, "density": 0.0, **nothing, **empty, **more}


def features(latents: list[dict[str, Any]], *, patch=None, rows_are=None, **more) -> dict[str, Any]:
    return {
        **{"format": "jaxsae-features", "version": 1},
        "sae": {"path": "run/sae", "activation": "topk", "latents": max(64, len(latents)), "width": 576},
        "origin": {} if patch else {"model": "smollm2", "layer": 12, "site": "resid_post", "context": 128},
        "data": {"path": "acts", "rows": ROWS, "nonfinite": 0, "contexts": 7812, "context": 128},
        **{"rows_are": rows_are or ("patches" if patch else "tokens"), "patch": patch},
        "model": None if patch else "smollm2",
        "ablation": None if patch else "mean increase of the next-token loss without this latent, where it is active.",
        **{"edges": EDGES.tolist(), "ratio_edges": RATIO_EDGES.tolist(), "latents": latents},
    } | more


def some_features(seed=0, number=50, text=PROSE, patch=None, **more):
    rng, tokens = np.random.default_rng(seed), tokens_of(text)
    latents = [a_latent(rng, n, tokens, number, patch=patch, **more) for n in range(number)]
    if not patch:
        latents[7] = a_dead_latent(7)
    return features(latents, patch=patch)


def write(folder, found):
    folder.mkdir(exist_ok=True)
    (folder / "features.json").write_text(json.dumps(found))
    features_page.write(folder)
    return folder / "report.html"


# --- What is written


def unpack(text):
    return json.loads(zlib.decompress(base64.b64decode(text)))


def data_of(page) -> dict[str, str]:
    """What a page holds for its script, by name."""
    return dict(re.findall(r'<script type="text/plain" id="([\w-]+)">([^<]*)</script>', page.read_text()))


def test_the_page_holds_every_number(tmp_path):
    found = json.loads(json.dumps(some_features()))
    data = data_of(write(tmp_path, found))
    index = unpack(data["index"])
    assert [unpack(text) for text in data["part-0"].split(" ")] == found["latents"]
    assert index["starts"] == [0]
    for name in ("index", "density", "max", "mean", "shrinkage", "loss_effect"):
        assert index["columns"][name] == [latent[name] for latent in found["latents"]]
    assert index["columns"]["promotes"][3] == [token["token"] for token in found["latents"][3]["promotes"][:5]]
    peaks = [example["tokens"][example["position"] - example["first"]] for example in found["latents"][3]["top"]]
    assert index["columns"]["words"][3] == list(dict.fromkeys(peaks))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["features.json", "report.html"]


def test_the_headline_numbers(tmp_path):
    found = some_features(number=8)
    facts = dict(re.findall(r"<div><dt>([^<]*)</dt><dd>([^<]*)</dd></div>", write(tmp_path, found).read_text()))
    alive = [latent for latent in found["latents"] if latent["count"]]
    before, after = (sum(latent["count"] * latent[name] for latent in alive) for name in ("mean", "mean_refined"))
    median = np.median([latent["count"] / ROWS for latent in found["latents"]])
    assert facts == {
        **{"latents": "8 of 64", "rows": "1,000,000", "dead on these rows": "12.5%"},
        **{"median density": f"{100 * median:.2g}%", "values, by refinement": f"{100 * (after / before - 1):+.1f}%"},
    }


def test_the_page_itself_is_small_and_the_same_each_time(tmp_path):
    page = write(tmp_path, some_features())
    text = page.read_text()
    assert len(text) - sum(map(len, data_of(page).values())) < 60_000
    features_page.write(tmp_path)
    assert page.read_text() == text


def test_its_policy_allows_its_script_and_no_network(tmp_path):
    text = write(tmp_path, some_features(number=8)).read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert set(policy.split("; ")) == {
        *("default-src 'none'", "style-src 'unsafe-inline'", "base-uri 'none'", "form-action 'none'"),
        f"script-src 'self' file: 'sha256-{digest}'",
    }
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|https?://(?!www.w3.org/2000/svg)", script
    )


@pytest.mark.parametrize("colours", [pages.LIGHT, pages.DARK], ids=["light", "dark"])
def test_both_shades_are_legible(colours):
    def contrast(one, other):
        dim, bright = sorted(luminance(colours[name]) for name in (one, other))
        return (bright + 0.05) / (dim + 0.05)

    assert contrast("ink", "encoder") >= 4.5  # text on it
    assert min(contrast("paper", "encoder"), contrast("paper", "refined")) >= 3  # WCAG: of what is no text


@pytest.fixture
def in_parts(monkeypatch):
    """A page of 50 latents is large."""
    monkeypatch.setattr(features_page, "_INLINE", 1000)
    monkeypatch.setattr(features_page, "_PART", 20_000)


def test_many_latents_are_in_scripts_beside_it(tmp_path, in_parts):
    found = some_features(number=40)
    index = unpack(data_of(write(tmp_path, found))["index"])
    texts = [(tmp_path / name).read_text() for name in index["files"]]
    parts = [re.fullmatch(rf'part\({n},"([\w+/= ]*)"\)', text)[1].split(" ") for n, text in enumerate(texts)]
    assert len(parts) > 2
    assert index["starts"] == [0, *itertools.accumulate(map(len, parts[:-1]))]
    assert [unpack(text)["index"] for part in parts for text in part] == list(range(40))
    assert max(map(len, texts)) < 25_000


def test_what_an_earlier_page_left_beside_it_is_removed_and_nothing_else(tmp_path, in_parts, monkeypatch):
    write(tmp_path, some_features(number=40))
    beside = tmp_path / "report_files"
    (beside / "mine.js").write_text("mine")
    old = {path.name for path in beside.iterdir()}
    index = unpack(data_of(write(tmp_path, some_features(seed=1, number=40)))["index"])
    new = {path.name for path in beside.iterdir()}
    assert new == {"mine.js", *(name.partition("/")[2] for name in index["files"])}
    assert old & new == {"mine.js"}
    (beside / "mine.js").unlink()
    monkeypatch.undo()
    features_page.write(tmp_path)
    assert not beside.exists()


# --- What is refused


def changed(change) -> str:
    found = some_features(number=8)
    change(found, found["latents"][3])
    return json.dumps(found)


DAMAGED = {
    "not JSON": ('{"format": "jaxsae-features", ', r"is not JSON \(.*\); make it again\."),
    "not UTF-8": (b"\xff\xfe", r"is not JSON \(.*\); make it again\."),
    "too deep": ("[" * 100_000, r"is not JSON \(.*\); make it again\."),
    "a list": ("[]", r"is not of jaxsae features; pass a directory that it wrote\."),
    "another file": ('{"rows": []}', r"is not of jaxsae features; pass a directory that it wrote\."),
    "a later version": (
        changed(lambda all, one: (all.update(version=2), one.pop("count"))),
        r"is of version 2, expected 1; make it again with this jaxsae\.",
    ),
    "a field lost": (
        changed(lambda all, one: one.pop("count")),
        r"is damaged \(latent 3: no 'count'\); make it again\.",
    ),
    "text for a number": (changed(lambda all, one: one.update(max="1")), r"\(latent 3: max is str\)"),
    "infinity": (
        changed(lambda all, one: one.update(max=1)).replace('"max": 1,', '"max": 1e999,'),
        r"\(latent 3: .*JSON",
    ),
    "a number for a token": (
        changed(lambda all, one: one["top"][1]["tokens"].append(3)),
        r"\(latent 3: tokens holds int",
    ),
    "a token too many": (
        changed(lambda all, one: one["top"][1]["tokens"].append("x")),
        r"\(latent 3: items of values: \d+, expected \d+\)",
    ),
    "no bands": (changed(lambda all, one: one.update(bands=None)), r"\(latent 3: bands is NoneType\)"),
    "a histogram cut short": (
        changed(lambda all, one: one["values"].pop()),
        r"\(latent 3: length by edges: \{40, 41\}, expected \{41\}\)",
    ),
    "pixels without a patch": (
        changed(lambda all, one: one["top"][0].update(pixels=[1])),
        r"\(latent 3: length by patch: \{0, 1\}, expected \{0\}\)",
    ),
    "a pixel out of range": (changed(lambda all, one: one.update(atom=[256])), r"\(latent 3: .*256"),
    "twice the same": (changed(lambda all, one: one.update(index=2)), r"\(different latents: 7, expected 8\)"),
    "outside the autoencoder": (changed(lambda all, one: one.update(index=64)), r"\(latent 64 of 64\)"),
    "latents of no kind": (changed(lambda all, one: all["latents"].append({})), r"\(latents holds _Latent, dict\)"),
    "rows of no kind": (changed(lambda all, one: all.update(rows_are="x")), r"\(rows_are is 'x', expected tokens"),
    "no patch": (changed(lambda all, one: all.update(rows_are="patches")), r"\(patch: False, expected True\)"),
    "edges that fall": (changed(lambda all, one: all["edges"].sort(reverse=True)), r"\(edges do not increase\)"),
    "a count beyond all floats": (changed(lambda all, one: one.update(count=10**400)), r"\(latent 3: "),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_refused_in_a_line(case, tmp_path, capsys):
    content, reason = DAMAGED[case]
    path = tmp_path / "features.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "report.html").write_text("old")
    assert cli("report", tmp_path) == 2
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1)
    assert line.startswith(f"jaxsae: {path}: ")
    assert re.search(reason, line), line
    assert (tmp_path / "report.html").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.json", "report.html"]


def test_report_knows_what_it_is_given(tmp_path, capsys):
    write(tmp_path / "a", some_features(number=8))
    whole = (tmp_path / "a/report.html").read_text()
    assert cli("report", tmp_path / "a", "--out", tmp_path / "deep/page.html") == 0
    assert capsys.readouterr().out == f"Written: {tmp_path / 'deep/page.html'}\n"
    assert (tmp_path / "deep/page.html").read_text() == whole
    refused(
        "features.json: holds the features themselves; write",
        report.write,
        tmp_path / "a",
        tmp_path / "a/features.json",
    )
    (tmp_path / "a/report.json").write_text("{}")
    refused(
        r"holds report.json and features.json, expected one of them; move", report.write, tmp_path / "a", tmp_path / "b"
    )
    refused("features.json: no such file; pass a directory that jaxsae features wrote", features_page.write, tmp_path)


# --- In a browser

chromium_only = pytest.mark.skipif(FOUND is None, reason="needs Chromium: apt-get install chromium, or the like")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "PageDown": 34, "End": 35, "Home": 36}
KEYS |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "/": 191}


class Reader:
    """Somebody who reads a page in a browser, and sees what it reports."""

    def __init__(self, chromium):
        self.chromium = chromium

    def open(self, page, *, width=1200, dark=False, latent=None):
        self.chromium.open(page.parent / "blank.html", width=width, dark=dark)  # for a page with another #, no load
        self.chromium.events.clear()
        self.chromium.open(Path(page), width=width, dark=dark)
        self.until("!document.getElementById('app').hidden")
        if latent is not None:
            self.latent(latent)

    def latent(self, index):
        self.see(f"location.hash = '{index}'")
        self.until(f"document.querySelector('#latent h2')?.textContent === 'Latent {index}'")

    def see(self, expression):
        return self.chromium.evaluate(
            f"(() => {{ const found = {expression}; return found === undefined ? null : found }})()"
        )

    def until(self, expression, seconds=30):
        end = time.monotonic() + seconds
        while self.see(expression) is not True:
            assert time.monotonic() < end, (expression, self.see("document.getElementById('problem').textContent"))
            time.sleep(0.01)

    def text(self, selector):
        return self.see(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector):
        return self.see(f"[...document.querySelectorAll({json.dumps(selector)})].map(each => each.textContent)")

    def press(self, *keys):
        for key in keys:
            what = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper()))}
            what |= {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            self.chromium.call("Input.dispatchKeyEvent", type="keyDown", **what)
            self.chromium.call("Input.dispatchKeyEvent", type="keyUp", **what)

    def mouse(self, selector, *, click):
        box = self.see(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        self.chromium.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for type in ("mousePressed", "mouseReleased") if click else ():
            self.chromium.call("Input.dispatchMouseEvent", type=type, button="left", clickCount=1, **at)

    def asked(self):
        """What was requested since the page was opened."""
        events = self.chromium.events
        return {params["request"]["url"] for name, params in events if name == "Network.requestWillBeSent"}

    def complaints(self):
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [params for name, params in self.chromium.events if name in bad]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as chromium:
        chromium.call("Emulation.setFocusEmulationEnabled", enabled=True)
        yield Reader(chromium)


@pytest.fixture(scope="module")
def pages_shown(tmp_path_factory):
    """Pages of tokens, patches and rows."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "blank.html").write_text("<!doctype html><title>blank</title>")
    found = {"tokens": some_features(), "patches": some_features(number=12, patch=PATCH)}
    rows = some_features(number=12)
    for latent in rows["latents"]:
        latent |= {"promotes": None, "suppresses": None, "loss_effect": None}
        for example in [*latent["top"], *(one for band in latent["bands"] for one in band["examples"])]:
            example |= dict.fromkeys(("context", "position", "document", "first", "tokens", "values", "refined_values"))
    found["rows"] = rows | {"rows_are": "rows", "ablation": None}
    for name, each in found.items():
        write(folder / name, each).rename(folder / f"{name}.html")
    return folder, found


@pytest.fixture
def tokens(reader, pages_shown):
    """The page of tokens, opened."""
    folder, found = pages_shown
    reader.open(folder / "tokens.html")
    yield found["tokens"]["latents"]
    assert reader.complaints() == []
    assert reader.asked() == {(folder / "tokens.html").as_uri()}


PATCH = {"height": 5, "width": 4, "channels": 3}
SHOWN = "#rows .row .number:first-child"


def in_order(reader):
    """Latents in the order in which the list shows them."""
    found = "[...document.querySelectorAll('#rows .row')].sort((a, b) => a.ariaRowIndex - b.ariaRowIndex)"
    return [int(index) for index in reader.see(f"{found}.map(row => row.firstChild.textContent)")]


@chromium_only
def test_the_list_is_sorted_by_each_column_with_what_is_missing_last(reader, tokens):
    keys = reader.see("[...document.querySelectorAll('#key option')].map(option => option.value)")
    assert keys == ["index", "density", "max", "mean", "shrinkage", "loss_effect"]
    assert in_order(reader)[:15] == list(range(15))
    for key in keys[1:]:
        reader.see(f"document.querySelector('#head [data-key={key}] button').click()")
        known = [latent for latent in tokens if latent[key] is not None]
        falling = [latent["index"] for latent in sorted(known, key=lambda latent: -latent[key])]
        assert in_order(reader)[:15] == falling[:15], key
        assert reader.see(f"document.querySelector('#head [data-key={key}]').ariaSort") == "descending"
        reader.see("document.getElementById('turn').click()")
        assert in_order(reader)[:15] == [latent["index"] for latent in sorted(known, key=operator.itemgetter(key))][:15]
    reader.see("scrollTo(0, 1e6)")
    reader.until("!!document.getElementById('row-49')")
    assert in_order(reader)[-1] == 7  # dead: it has no loss effect


@chromium_only
def test_the_list_shows_the_numbers(reader, tokens):
    latent = tokens[2]
    (density, largest, mean) = (float(f"{latent[name]:.3g}") for name in ("density", "max", "mean"))
    cells = reader.texts("#row-2 > *")
    assert cells[0] == "2"
    assert (float(cells[3].rstrip("%")), float(cells[4]), float(cells[5])) == (
        pytest.approx(100 * density),
        largest,
        mean,
    )
    assert cells[6] == f"×{latent['shrinkage']:#.3g}"
    assert cells[7] == f"{latent['loss_effect']:+#.3g}".replace("-", "−")
    assert reader.texts("#row-7 > *") == ["7", "dead", "", "0%", "–", "–", "–", "–"]
    assert reader.see("document.getElementById('grid').ariaRowCount") == "51"


@chromium_only
def test_it_is_searched_by_number_and_token(reader, tokens):
    reader.see("(search.value = 'LONDON', search.oninput())")
    hits = [
        latent["index"]
        for latent in tokens
        if any("london" in token["token"].lower() for token in (latent["promotes"] or [])[:5])
        or any(
            "london" in example["tokens"][example["position"] - example["first"]].lower() for example in latent["top"]
        )
    ]
    assert 0 < len(hits) < 20
    assert in_order(reader) == hits
    assert reader.text("#count") == f"{len(hits)} of 50 latents"
    reader.see("(search.value = '4', search.oninput())")
    assert set(in_order(reader)) >= {4, *range(40, 50)}
    reader.see("(search.value = 'no such token', search.oninput())")
    assert (in_order(reader), reader.text("#count")) == ([], "0 of 50 latents")
    assert reader.see("document.getElementById('grid').getAttribute('aria-activedescendant')") is None


@chromium_only
def test_a_latent_opens_by_mouse_and_its_links_lead_on(reader, tokens):
    reader.mouse("#row-3 .words", click=True)
    reader.until("document.querySelector('#latent h2')?.textContent === 'Latent 3'")
    assert reader.see("document.title").startswith("Latent 3: ")
    assert reader.texts("#rows [aria-selected=true] a") == ["3"]
    other = tokens[3]["nearest"][0]["index"]
    (link,) = {f"#{other}"} & set(
        reader.see("[...document.querySelectorAll('#latent td, #latent th a')].map(a => a.hash)")
    )
    reader.see(f"document.querySelector('#latent th a[href=\"{link}\"]').click()")
    reader.until(f"document.querySelector('#latent h2').textContent === 'Latent {other}'")
    reader.see("history.back()")
    reader.until("document.querySelector('#latent h2').textContent === 'Latent 3'")
    reader.see("document.querySelector('.bar a[href=\"#latents\"]').click()")
    reader.until("document.getElementById('latent').hidden")
    assert not reader.see("document.title").startswith("Latent")


@chromium_only
def test_a_latent_has_all_that_was_measured(reader, tokens):
    reader.latent(3)
    latent, text = tokens[3], reader.text("#latent")
    assert f"Active on {latent['count']:,} of 1,000,000 rows." in text
    assert f"Refinement raises the sum of its values by {100 * (latent['shrinkage'] - 1):.2g}%." in text
    assert f"the loss rises by {latent['loss_effect']:#.3g} nats per token." in text
    assert reader.texts("#latent details p") == [
        "mean increase of the next-token loss without this latent, where it is active."
    ]
    names = ["Largest activations", "Over its range", "Next token", "Active together", "Nearest atoms"]
    assert reader.texts("#latent h3") == names
    examples = [*latent["top"], *(one for band in latent["bands"] for one in band["examples"])]
    assert len(reader.texts("#latent .text")) == len(examples)
    assert [f"row {example['row']:,}" for example in examples] == [
        where.partition(" · ")[0] for where in reader.texts("#latent .about small")
    ]
    assert reader.texts("#latent .logits li span") == [
        f"{token['logit']:+#.3g}".replace("-", "−") for token in latent["promotes"] + latent["suppresses"]
    ]
    for chart, series in enumerate((["values", "refined_values"], ["ratios"])):
        titles = reader.see(
            f"[...document.querySelectorAll('#latent svg')[{chart}].querySelectorAll('title')].map(t => t.textContent)"
        )
        for line, name in enumerate(series, 1):
            counts = [int(title.split("\n")[line].split(" ")[-1].replace(",", "")) for title in titles]
            assert [n for n in counts if n] == [n for n in latent[name] if n]
    reader.latent(7)
    assert "Dead: it is active on none of the 1,000,000 rows." in reader.text("#latent")
    assert reader.texts("#latent dd") == ["0%", "–", "–", "–", "–"]
    reader.see("location.hash = '99'")
    reader.until("document.getElementById('problem').textContent === 'Latent 99 is not on this page.'")


SHADES = """[...document.querySelectorAll('#latent .text')[0].children].map(token =>
  [token.textContent, +token.style.getPropertyValue('--e'), +token.style.getPropertyValue('--r'), token.className])"""


@chromium_only
def test_tokens_are_shaded_by_both_values_and_show_them(reader, tokens):
    latent = next(
        each for each in tokens if each["top"] and None in each["top"][0]["values"] and each["top"][0]["refined"]
    )
    reader.latent(latent["index"])
    example, shades = latent["top"][0], reader.see(SHADES)
    numbers = [each[name] for each in latent["top"] for name in ("value", "refined")] + [
        latent["max"],
        latent["max_refined"],
    ]
    numbers += [one[name] for band in latent["bands"] for one in band["examples"] for name in ("value", "refined")]
    for values, column in ((example["values"], 1), (example["refined_values"], 2)):
        share = [max(0.08, min(1, (value or 0) / max(numbers))) if value else 0 for value in values]
        assert [shade[column] for shade in shades] == pytest.approx(share, abs=1e-6)
    assert ["gap" in shade[3] for shade in shades] == [value is None for value in example["values"]]
    peak = example["position"] - example["first"]
    assert [n for n, shade in enumerate(shades) if "peak" in shade[3]] == [peak]
    drawn = reader.see("getComputedStyle(document.querySelector('.text .peak')).backgroundSize").split(", ")
    assert float(drawn[0].split(" ")[1].removesuffix("px")) == pytest.approx(2 + 4 * shades[peak][2], abs=0.1)
    reader.see("document.querySelector('.text .peak').scrollIntoView({block: 'center'})")
    reader.mouse(".text .peak", click=False)
    encoder, refined = (f"{example[name]:#.4g}".rstrip(".") for name in ("value", "refined"))
    assert f"encoder {encoder}, refined {refined}" in reader.text("#tip")
    assert f"at {example['position']}" in reader.text("#tip")
    reader.mouse("#latent .about", click=False)
    assert reader.see("document.getElementById('tip').hidden")


@chromium_only
def test_all_of_it_is_reached_by_keys(reader, tokens):
    focus = "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
    reader.press("/")
    assert reader.see(focus) == "search"
    reader.press("t", "h", "e", "ArrowDown")
    assert reader.see(focus) == "grid"
    found = in_order(reader)
    reader.press("ArrowDown", "ArrowDown", "ArrowUp")
    active = reader.see(
        "document.getElementById(document.activeElement.getAttribute('aria-activedescendant')).className"
    )
    assert active == "row active"
    assert (
        reader.see("getComputedStyle(document.querySelector('.row.active')).outlineStyle") == "solid"
    )  # focus is seen
    reader.press("Enter")
    reader.until(f"document.querySelector('#latent h2')?.textContent === 'Latent {found[1]}'")
    assert reader.see("document.activeElement.tagName") == "H2"
    for _ in range(10):
        reader.press("Tab")
        if reader.see(focus) == "text":
            break
    assert reader.see(focus) == "text"
    reader.press("ArrowRight")
    assert reader.see("document.activeElement.classList.contains('peak')")
    before = reader.text("#tip")
    reader.press("ArrowLeft")
    assert reader.see("document.activeElement.nextElementSibling.classList.contains('peak')")
    assert reader.text("#tip") != before
    assert not reader.see("document.getElementById('tip').hidden")
    assert reader.see("document.activeElement.getAttribute('aria-describedby')") == "tip"
    reader.press("Escape")
    assert reader.see("document.getElementById('tip').hidden")
    reader.see("grid.focus()")
    reader.press("ArrowDown")  # while a latent is open, the next one opens
    reader.until(f"document.querySelector('#latent h2').textContent === 'Latent {found[2]}'")
    assert reader.see(focus) == "grid"
    reader.press("Escape")
    reader.until("document.getElementById('latent').hidden")
    assert reader.see(focus) == "grid"
    reader.press("/", "Escape", "ArrowDown", "End")
    assert in_order(reader)[-1] == 49
    assert reader.see("document.querySelector('.row.active').getBoundingClientRect().bottom <= innerHeight")
    reader.press("Home", "PageDown")
    assert reader.see("document.querySelector('.row.active').id") == "row-10"


SMALL = """[...document.querySelectorAll('body *')].filter(each => each.checkVisibility() && each.childNodes.length
  && [...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
  && parseFloat(getComputedStyle(each).fontSize) < 10).map(each => each.outerHTML)"""


@chromium_only
@pytest.mark.parametrize("name", ["tokens", "patches", "rows"])
def test_it_fits_every_width_in_light_and_dark(name, reader, pages_shown, tmp_path):
    folder, _ = pages_shown
    for width, dark in ((1200, False), (1200, True), (400, False), (400, True)):
        reader.open(folder / f"{name}.html", width=width, dark=dark)
        for latent in (None, 3):
            if latent is not None:
                reader.latent(latent)
            assert reader.see("document.documentElement.scrollWidth") == width, (width, latent)
            assert reader.see(SMALL) == []
            reader.chromium.screenshot(tmp_path / "a.png")
            with PIL.Image.open(tmp_path / "a.png") as image:
                brightness = np.asarray(image.convert("L")).mean()
            assert (brightness < 80) if dark else (brightness > 180), (width, latent)
        assert reader.see("!!document.getElementById('list').offsetParent") == (width == 1200)
        assert reader.complaints() == []
        assert reader.asked() == {(folder / f"{name}.html").as_uri()}


@chromium_only
def test_patches_are_pictures(reader, pages_shown):
    folder, found = pages_shown
    reader.open(folder / "patches.html", latent=3)
    latent = found["patches"]["latents"][3]

    def pixels(selector):
        return reader.see(
            f"[...document.querySelectorAll('{selector}')].map(each => [...each.getContext('2d')"
            ".getImageData(0, 0, each.width, each.height).data].filter((_, n) => n % 4 < 3))"
        )

    assert pixels("#latent .lead canvas") == [latent["atom"]]
    assert pixels("#latent ol canvas")[:5] == [example["pixels"] for example in latent["top"]]
    assert pixels("#row-3 canvas") == [latent["atom"]]
    assert reader.see("document.querySelector('#latent ol canvas').width") == PATCH["width"]


@chromium_only
def test_rows_of_no_kind_are_numbers(reader, pages_shown):
    folder, found = pages_shown
    reader.open(folder / "rows.html", latent=3)
    rows = [example["row"] for example in found["rows"]["latents"][3]["top"]]
    assert reader.texts("#latent .about small")[:5] == [f"row {row:,}" for row in rows]
    assert reader.texts("#latent h3") == ["Largest activations", "Over its range", "Active together", "Nearest atoms"]
    assert "loss effect" not in reader.text("#head") + reader.text("#latent")


# --- Text that is not what it seems


def shown_as(reader, folder, tokens, **more):
    """A page of one latent, with an example of these tokens."""
    latent = a_latent(np.random.default_rng(0), 0, tokens_of(PROSE), 1, top=1, bands=0)
    values = [1.0] * len(tokens)
    latent["top"][0] |= {"first": 5, "position": 5, "tokens": tokens, "values": values, "refined_values": values}
    latent["promotes"] = [{"id": n, "token": token, "logit": 1.0} for n, token in enumerate(tokens)]
    page = write(folder, features([latent]) | more)
    (folder / "blank.html").write_text("")
    reader.open(page, latent=0)
    return page


@chromium_only
def test_what_cannot_be_seen_is_marked(reader, tmp_path):
    given = [
        " the",
        "\n",
        "\t\t",
        "  ",
        "",
        "a\r\nb",
        "\x00",
        "\x1b[0m",
        "\u2028",
        "\u202e",
        "\u200d",
        "\xad",
        "<0x0A>",
        "\ufffd",
    ]
    marks = [
        " the",
        "⏎",
        "→→",
        "··",
        "∅",
        "a␍⏎b",
        "U+0000",
        "U+001B[0m",
        "U+2028",
        "U+202E",
        "U+200D",
        "U+00AD",
        "<0x0A>",
        "\ufffd",
    ]
    more, plain = (
        ["👩‍🔬", "می‌خواهم", "\ud83d", "\u0301", "\xa0\u3000\n  \t"],
        ["👩‍🔬", "می‌خواهم", "U+D83D", "\u0301", "··⏎··→"],
    )
    shown_as(reader, tmp_path, given + more)
    assert reader.texts("#latent .text .token") == marks + plain
    alone = reader.texts("#latent .logits .word")
    assert alone[0] == "·the"
    assert alone[len(marks) + 3] == "◌\u0301"
    assert alone[1:14] == marks[1:]


PLACES = (
    """[...document.querySelectorAll('#latent .text .token')].map(token => token.getBoundingClientRect().toJSON())"""
)


@chromium_only
def test_right_to_left_text_reads_right_to_left_and_what_is_in_it_left_to_right(reader, tmp_path):
    tokens = ["בראשית", " ברא", " ", "2", "0", "2", "4", " אמר", ":", " New", " York", " היא"]
    shown_as(reader, tmp_path / "a", tokens)
    left = [place["left"] for place in reader.see(PLACES)]
    assert reader.see("document.querySelector('#latent .text').dir") == "rtl"
    assert left[0] > left[1] > left[7] > left[8] > left[10] > left[9] > left[11]  # words of one language in its order
    assert left[1] > left[6] > left[5] > left[4] > left[3] > left[7]  # a number
    reader.press("Tab")
    reader.see("document.querySelector('#latent .text').focus()")
    reader.press("ArrowRight", "ArrowLeft")
    assert reader.see("[...document.activeElement.parentElement.children].indexOf(document.activeElement)") == 1
    shown_as(reader, tmp_path / "b", ["He", " said ", "של", "ום", " twice", "."])
    left = [place["left"] for place in reader.see(PLACES)]
    assert reader.see("document.querySelector('#latent .text').dir") == "ltr"
    assert left[0] < left[1] < left[3] < left[2] < left[4] < left[5]


@chromium_only
def test_arabic_letters_join_across_tokens_and_chinese_ones_stand_in_order(reader, tmp_path):
    shown_as(reader, tmp_path / "a", ["مح", "مد", " مح"])
    places = reader.see(PLACES)
    whole = "(() => { const all = document.querySelector('#latent .text'), range = document.createRange(); "
    whole += "all.textContent = 'محمد'; range.selectNodeContents(all); return range.getBoundingClientRect().width })()"
    assert places[0]["left"] > places[1]["left"]
    assert places[0]["width"] + places[1]["width"] == pytest.approx(reader.see(whole), abs=0.5)
    shown_as(reader, tmp_path / "b", list("长江是亚洲第一长河。"))
    left = [place["left"] for place in reader.see(PLACES)]
    assert left == sorted(left)
    assert len(set(left)) == len(left)


@chromium_only
def test_marks_that_turn_text_round_turn_nothing(reader, tmp_path):
    shown_as(reader, tmp_path, ["one", "\u202e two", " three\u2067", " four", "\u202b", " five"])
    left = [place["left"] for place in reader.see(PLACES)]
    assert left == sorted(left)


HOSTILE = [
    *(
        "</script><script>alert(1)</script>",
        "<img src=x onerror=alert(2)>",
        "<!--",
        "&lt;b&gt;&amp;",
        "\"'`",
        "\u2028\u2029",
    ),
    *(
        "]]>",
        "${alert(3)}",
        "javascript:alert(4)",
        "\x00<svg onload=alert(5)>",
        "\\u003cb>",
        "constructor",
        "__proto__",
    ),
]


@chromium_only
def test_hostile_text_is_text(reader, tmp_path):
    hostile = "".join(HOSTILE[:5])
    more = {"sae": {"path": hostile, "activation": hostile, "latents": 64, "width": 8, hostile: hostile}}
    more |= {"origin": {"model": hostile, hostile: hostile}, "ablation": hostile, "model": hostile}
    page = shown_as(reader, tmp_path, HOSTILE, **more)
    plain = [text.replace("\x00", "U+0000").replace("\u2028\u2029", "U+2028U+2029") for text in HOSTILE]
    assert reader.texts("#latent .text .token") == plain
    assert reader.texts("#latent .logits .word")[: len(plain)] == plain
    assert reader.texts("#latent details p") == [hostile]
    assert hostile in reader.text("header p")
    tags = set(reader.see("[...document.querySelectorAll('*')].map(each => each.localName)"))
    assert not tags & {"img", "b", "iframe", "object", "embed", "link", "base", "form"}
    assert reader.see("document.scripts.length") == 3  # the index, the latents, and its own
    names = reader.see("[...document.querySelectorAll('*')].flatMap(each => each.getAttributeNames())")
    assert not [name for name in names if name.startswith("on")]
    reader.see(f"(search.value = {json.dumps(HOSTILE[1])}, search.oninput())")
    assert in_order(reader) == [0]
    assert reader.complaints() == []
    assert reader.asked() == {page.as_uri()}


# --- Many


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A page of 16,384 latents, of which each has few examples."""
    folder, rng, tokens = tmp_path_factory.mktemp("many"), np.random.default_rng(0), tokens_of(PROSE)
    (folder / "blank.html").write_text("")
    some = [a_latent(rng, 0, tokens, 16_384, top=1, bands=0, width=12) for _ in range(64)]
    density = rng.uniform(0, 0.1, 16_384)
    latents = [some[n % 64] | {"index": n, "density": density[n]} for n in range(16_384)]
    return write(folder, features(latents)), density


@chromium_only
def test_sixteen_thousand_latents_are_quick(reader, many):
    page, density = many
    start = time.monotonic()
    reader.open(page)
    assert time.monotonic() - start < 10  # 0.3 s on an idle machine
    assert reader.text("#count") == "16,384 latents"
    assert reader.see("document.querySelectorAll('#rows .row').length") < 60
    reader.see("document.querySelector('#head [data-key=density] button').click()")
    assert in_order(reader)[:15] == np.argsort(-density)[:15].tolist()
    reader.see("document.getElementById('turn').click()")
    reader.see("scrollTo(0, document.body.scrollHeight)")
    reader.until("!!document.getElementById('row-16383')")
    assert reader.texts("#row-16383 a") == [str(density.argmax())]
    assert reader.asked() == {page.as_uri()}  # and no latent yet
    for index in (16_383, 9_000, 1):
        start = time.monotonic()
        reader.latent(index)
        assert time.monotonic() - start < 5  # 0.1 s on an idle machine
        place = reader.see("document.querySelector('#rows [aria-selected=true]').getBoundingClientRect().toJSON()")
        assert 0 < place["top"] < place["bottom"] <= 800  # in the list beside it
        assert reader.see("scrollY") == 0
    parts = reader.asked() - {page.as_uri()}
    assert 1 <= len(parts) <= 3
    assert all(part.startswith(page.with_name("report_files").as_uri()) for part in parts)
    assert reader.complaints() == []


@chromium_only
def test_a_folder_left_behind_is_missed_in_words(reader, many, tmp_path):
    page, _ = many
    (tmp_path / "blank.html").write_text("")
    alone = shutil.copy(page, tmp_path / "alone.html")
    reader.open(Path(alone))
    reader.see("location.hash = '5'")
    reader.until(
        "document.getElementById('problem').textContent.includes('is missing; keep that folder beside this page.')"
    )
    assert in_order(reader)[0] == 0
