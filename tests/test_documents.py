"""The Python code of docstrings, README and pages runs; notebooks, which `.ci/run` runs, are as they should be."""

import ast
import builtins
import doctest
import functools
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxsae
from benchmarks import table
from jaxsae import data
from jaxsae._core import buckets
from jaxsae.app import cli, study, summary
from jaxsae.ksvd import image_files

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]


def run(blocks: list[str]) -> None:
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "document", "exec"), namespace)


def examples():
    names = [module.name for module in pkgutil.walk_packages(jaxsae.__path__, "jaxsae.")]
    for name in (name for name in names if name != "jaxsae.__main__"):
        module = importlib.import_module(name)
        yield from (test for test in doctest.DocTestFinder().find(module) if test.examples)


HUB = "hf://organisation/repository/path"
GROUPS = ["autoencoders", "features", "pictures", "plans", "steering", "studies", "texts", "training"]  # of commands


# From the installed package: a checkout beside it would be another `jaxsae`.
@pytest.mark.parametrize("example", list(examples()), ids=lambda test: test.name)
def test_docstring_example_runs(example, unchecked):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False)
    said = []
    assert runner.run(example, out=said.append).failed == 0, "".join(said)


@pytest.mark.parametrize(
    "page",
    [
        "index",
        *(
            pytest.param(page, marks=pytest.mark.slow)
            for page in ("paper_to_code", "guides/composing", "tasks/dictionary")
        ),
    ],
)
def test_code_of_a_page_runs(page):
    run(re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), flags=re.DOTALL))


@pytest.mark.slow
def test_code_of_a_published_autoencoder_runs(tmp_path, monkeypatch, capsys):
    """On one from disk, without the hub."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32))
    jaxsae.pretrained.save(
        jaxsae.init(jax.random.key(0), d=16, m=64, activation=jaxsae.ReLU()), "sae", format="saelens"
    )
    text = (ROOT / "docs/tasks/published.md").read_text().replace(HUB, "sae")
    run(re.findall(r"```py\n(.*?)```", text, flags=re.DOTALL))
    assert "NMSE" in capsys.readouterr().out


@pytest.mark.slow
def test_readme_runs(capsys):
    run(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL))
    assert "NMSE" in capsys.readouterr().out


def commands(text: str) -> list[list[str]]:
    """The `jaxsae` commands of a page: in blocks of code, and among the words; not what only names one."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = re.findall(r"`(jaxsae\s[^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [re.search(r"jaxsae\s+([a-z]+(?:\s+[^\s\"#&`]+)*)", line) for line in lines + words]
    argvs = [match.group(1).split() for match in found if match]
    return [argv for argv in argvs if len(argv) > 1 and argv[-1] not in ("--help", "--mesh")]


WITH_COMMANDS = [path for path in PAGES if path.suffix == ".md" and commands(path.read_text())]


@pytest.mark.parametrize(
    "page",
    [*(str(path.relative_to(ROOT)) for path in WITH_COMMANDS), *(f"jaxsae/app/commands/{name}.py" for name in GROUPS)],
)
def test_commands_of_a_page_are_understood(page, tmp_path, monkeypatch):
    got = []
    for name, command in cli.COMMANDS.items():

        def note(*args, name=name, **kwargs):
            got.append(name)
            return 0

        monkeypatch.setitem(cli.COMMANDS, name, functools.wraps(command)(note))
    monkeypatch.setattr(buckets, "require_writable", lambda path: None)  # which there are none of
    monkeypatch.setattr(buckets, "path", Path)  # without the extra `cloud` too
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.json").write_text('{"activation": "topk", "k": 4, "latents": 64, "data": "x.npy"}')
    text = (ROOT / page).read_text()
    argvs = [line.split()[2:] for line in re.findall(r"Example: jaxsae .*", text)] or commands(text)
    for argv in argvs:
        assert cli.main(argv) == 0, argv
    assert got == [name for name, *_ in argvs]
    assert argvs


def _shortened(text: str) -> str:
    return text.replace(HUB, "run").replace("checkpoints/20000", "checkpoints/20")


@pytest.mark.slow
def test_commands_of_the_pages_run(tmp_path, monkeypatch):
    """On small files, with shorter trainings; except other machines, the network, and studies, which `.ci/run` runs."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name, rows in (("x", 4000), ("y", 300)):
        np.save(f"{name}.npy", generator.standard_normal((rows, 64)).astype(np.float32))
    for name in ("noisy", "scratched"):
        image_files.write(f"{name}.png", generator.uniform(0, 255, (40, 40)))
    image_files.write("scratches.png", 255.0 * (generator.uniform(size=(40, 40)) < 0.1))
    shutil.copytree(ROOT / "benchmarks/results/study", "study")
    done = set()
    for argv in (argv for path in WITH_COMMANDS for argv in commands(_shortened(path.read_text()))):
        elsewhere = {"smollm2", "--distributed", "--topology"} & set(argv)
        if not elsewhere and (argv[0] != "study" or "--sae" in argv):
            assert cli.main(argv + ["--steps", "20"] * (argv[0] == "train")) == 0, argv
            done.add(argv[0])
    assert done == set(cli.COMMANDS) - {"fetch", "harvest", "plan", "steer"}


def snippets(path: Path) -> dict[str, list[str]]:
    """Python code of a page or a notebook, by what runs it: each in one namespace, from top to end."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return {"cells": [re.sub(r"(?m)^( *)%.*", r"\1pass", "".join(cell["source"])) for cell in cells]}
    return {kind: re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL) for kind in ("python", "py")}


def missing(code: str) -> set[str]:
    """Names that code uses and binds nowhere, and of the library those that `import jaxsae` does not bring."""
    nodes = list(ast.walk(ast.parse(code)))
    bound = set(dir(builtins)) | {"get_ipython"}
    used = set()
    for node in nodes:
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.alias):
            bound |= {node.name, (node.asname or node.name).split(".")[0]}
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler):
            bound.add(str(node.name))
    inner = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    used |= {f"jaxsae.{node.attr}" for node in inner if node.value.id == "jaxsae"}
    return used - bound - {f"jaxsae.{name}" for name in brought()}


@functools.cache
def brought() -> list[str]:
    """What `import jaxsae` alone brings: in this process all is imported."""
    script = "import jaxsae; print(*dir(jaxsae))"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_of_a_snippet_is_imported(path):
    for kind, blocks in snippets(path).items():
        assert not missing("\n".join(blocks)), kind


def test_a_name_that_is_not_imported_is_seen():
    # Otherwise the test above could pass without finding anything.
    assert missing("import jaxsae\njaxsae.cli.main(argv)\nfor a in [b]:\n    a = jaxsae.init(a)") == {
        "jaxsae.cli",
        "argv",
        "b",
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_the_words_of_a_page_name_is_there(path):
    text = re.sub(r"(?m)^:::.*$|\]\[[\w.]+\]", "", path.read_text())  # references of mkdocs, which checks them
    for name in set(re.findall(r"(?<![\w/.-])jaxsae\.([a-z_]+(?:\.\w+)*)", text)):
        first, *inner = name.split(".")
        found = getattr(jaxsae, first) if first in dir(jaxsae) else importlib.import_module(f"jaxsae.{first}")
        functools.reduce(getattr, inner, found)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_of_a_page_outside_the_site_lead_somewhere(page):  # those of the site mkdocs checks
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]


LANGUAGE_MODELS = ROOT / "docs/guides/language_models.md"


@pytest.mark.lm
def test_page_runs_on_a_language_model(smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sae = jaxsae.init(jax.random.key(0), d=576, m=1024, activation=jaxsae.ReLU())
    jaxsae.pretrained.save(sae, tmp_path / "jaxsae-study/sae/relu-16")  # where the study above it has one
    run(re.findall(r"```py\n(.*?)```", LANGUAGE_MODELS.read_text(), flags=re.DOTALL))
    clean, *_ = map(float, capsys.readouterr().out.split())
    assert 0 < clean < 10


@pytest.mark.lm
def test_page_harvests(smollm2, tmp_path, monkeypatch):
    """With fewer tokens than on the page."""
    monkeypatch.chdir(tmp_path)
    (argv,) = (argv for argv in commands(LANGUAGE_MODELS.read_text()) if argv[0] == "harvest")
    argv[argv.index("--tokens") + 1] = "2000"
    assert cli.main(argv) == 0
    assert len(data.open_rows("activations")) == 8 * 255  # contexts, each without its first position


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_keeps_its_outputs_and_is_for_any_machine(path):
    title, *cells = json.loads(path.read_text())["cells"]
    assert title["cell_type"] == "markdown" and "".join(title["source"]).startswith(f"# {path.stem[0]}. ")
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert re.search(r'if "google.colab" in sys.modules:\n    %pip install .*jaxsae', sources[0])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))  # run in order, from new
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    code = ast.parse(re.sub(r"%pip.*", "pass", "\n".join(sources)))
    assert not [node.name for node in ast.walk(code) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for output in outputs:
        output.get("data", {}).pop("image/png", None)
    assert not re.findall(r"/(?:tmp|home|root|usr|var|opt|content|Users)/", json.dumps([sources, outputs]))
    assert path.stat().st_size < 400_000


def test_readme_has_the_least_rows_of_a_study():
    full, quick = (plan.batch + plan.heldout for plan in (study.FULL, study.QUICK))
    words = " ".join((ROOT / "README.md").read_text().split())
    assert f"with at least {full:,} rows ({quick:,} with `--quick`)" in words


def load_report(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}/report.json").read_text())


def test_readme_has_the_numbers_of_the_committed_studies():
    readme = (ROOT / "README.md").read_text()
    for name in ("study", "study-smollm2"):
        rows = summary.means(load_report(name)["rows"])
        (penalised, others) = (
            [r["mean_change"] for r in rows if (r["family"] == "relu") is it] for it in (True, False)
        )
        changes = (f"{min(some):+.1%} to {max(some):+.1%}" for some in (penalised, others))
        assert "| ReLU + L1 {}; others {} |".format(*changes) in readme
        gains = [
            (r["nmse_after"] / r["nmse_before"] - 1, r["nmse_omp_nonnegative"] / r["nmse_before"] - 1) for r in rows
        ]
        refined, again = (f"{min(some):+.0%} to {max(some):+.0%}" for some in zip(*gains, strict=True))
        assert f"| refined {refined}; selected again {again} |" in readme


@pytest.mark.parametrize("case", ["random, k 32", "trained ReLU"])
def test_readme_has_the_rates_of_the_committed_refits(case):
    report = json.loads((ROOT / "benchmarks/results/refine/paper-cpu.json").read_text())
    rates = {row["solver"]: row["rows_per_s"] for row in report["rows"] if row["case"].startswith(case)}
    ours = rates["jaxsae (default)"]
    (line,) = (
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if f"| {float(f'{ours:.3g}'):,.0f} rows/s: " in line
    )
    for name, solver in {
        "jaxnnls": "jaxnnls",
        "scipy": "scipy nnls",
        "optax": "optax nnls",
        "jaxopt": "jaxopt PG on G",
    }.items():
        times = f"{float(f'{ours / rates[solver]:.2g}'):g}"
        assert re.search(rf"{re.escape(times)}(\.0)? times [^,]*{name}", line), (solver, times)


def test_the_guide_says_how_our_trainers_compare():
    rows = json.loads((ROOT / "benchmarks/results/quality/paper-cpu.json").read_text())["rows"]
    text, dead = " ".join((ROOT / "docs/guides/studies.md").read_text().split()), []

    def mean(name, **these):
        found = [row[name] for row in rows if all(row[key] == value for key, value in these.items())]
        return np.mean(found), np.std(found) / np.sqrt(max(1, len(found) - 1)), len(found)

    for family in ("relu", "gated", "topk", "jumprelu", "batchtopk", "matryoshka"):
        own, best = {}, {}
        for library in ("jaxsae", "SAELens", "dictionary_learning"):
            these = {"library": library, "family": family}
            rates = {(row["rate"], row["own"]) for row in rows if all(row[key] == these[key] for key in these)}
            measured = {rate: mean("nmse", **these, rate=rate) for rate, _ in rates}
            measured = {rate: found for rate, found in measured.items() if found[2] == 3}
            own[library] = next(measured[rate] for rate, its_own in rates if its_own)
            rate = min(measured, key=measured.get)
            best[library] = measured[rate]
            if family in ("relu", "jumprelu") and library != "jaxsae":
                dead.append(mean("dead", **these, rate=rate)[0])
        assert min(own, key=own.get) == "jaxsae"
        close = max(best.values())[0] - min(best.values())[0] < 4e-3
        assert close == (family in ("batchtopk", "matryoshka"))
        assert close or min(best, key=best.get) == "jaxsae"
        if family == "matryoshka":
            theirs, ours = (f"{best[library][0]:.4f} ± {best[library][1]:.4f}" for library in ("SAELens", "jaxsae"))
            assert f"by {best['jaxsae'][0] - best['SAELens'][0]:.4f} to SAELens' favour ({theirs} and {ours})" in text
    assert f"{min(dead):.0%} to {max(dead):.0%} of the latents" in text


def test_the_tables_of_benchmarks_are_those_of_the_committed_results():
    text = (ROOT / "benchmarks/README.md").read_text()
    names = ("refine", "nnls", "first-call", "train", "harvest", "load", "jobs", "bucket")
    names += ("pursuit", "transitions", "lasso", "ksvd", "pictures", "quality")
    results = [ROOT / f"benchmarks/results/{name}/paper-cpu.json" for name in names]
    results += [ROOT / f"benchmarks/results/{name}/small-cpu.json" for name in ("kernels", "rates")]
    assert table.insert(text, [json.loads(path.read_text()) for path in results]) == text
