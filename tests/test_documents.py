"""The Python code of docstrings, README and pages runs; notebooks, which `.ci/run` runs, are as they should be."""

import ast
import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import jaxsae
from benchmarks import table
from jaxsae import model_files

ROOT = Path(__file__).parent.parent


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


# As the package is installed: a checkout beside it would be another `jaxsae`.
@pytest.mark.parametrize("example", list(examples()), ids=lambda test: test.name)
def test_docstring_example_runs(example, unchecked):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False)
    said = []
    assert runner.run(example, out=said.append).failed == 0, "".join(said)


@pytest.mark.parametrize("page", ["index", pytest.param("paper_to_code", marks=pytest.mark.slow)])
def test_code_of_a_page_runs(page):
    run(re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), flags=re.DOTALL))


def test_readme_runs(capsys):
    run(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL))
    assert "NMSE" in capsys.readouterr().out


@pytest.mark.lm
def test_readme_runs_on_a_language_model(tmp_path, monkeypatch, capsys):
    if not model_files.cached("smollm2").is_file():
        pytest.skip("SmolLM2 is not in the cache; run: jaxsae fetch smollm2")
    monkeypatch.chdir(tmp_path)
    sae = jaxsae.init(jax.random.key(0), d=576, m=1024, activation=jaxsae.ReLU())
    jaxsae.pretrained.save(sae, tmp_path / "jaxsae-study/sae/relu-0.1")  # where the study above it has one
    run(re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL))
    clean, *_ = map(float, capsys.readouterr().out.split())
    assert 0 < clean < 10


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
    assert path.stat().st_size < 500_000


def formatted(row: dict) -> str:
    """A line of a study's table in the README."""
    name = f"{'ReLU, L1' if row['family'] == 'relu' else 'TopK, k'} {row['k_or_l1']:g}"
    shown = [f"{row['l0']:.1f}", *(f"{row[key]:.4f}" for key in ("nmse_before", "nmse_after"))]
    shown += [f"{row['mean_before']:.3f}", f"{row['mean_after']:.3f}"]
    shown += [f"{row['mean_change']:+.1%}", f"{row['rising']:.0%}"]
    if "ce_before" in row:
        shown += [f"{row[f'{key}_{when}']:.3f}" for key in ("ce", "kl") for when in ("before", "after")]
        shown += [f"{row[f'recovered_mean_{when}']:.1%}" for when in ("before", "after")]
    else:
        shown += [f"{row[f'gamma_{when}']:.4f}" for when in ("before", "after")]
    return "| " + " | ".join([name, *shown, f"{row['worst_kkt']:.1e}"]) + " |"


@pytest.mark.parametrize("study, methods", [("study", 8), ("study-smollm2", 6)])
def test_readme_has_the_numbers_of_the_committed_reports(study, methods):
    lines = (ROOT / "README.md").read_text().splitlines()
    report = json.loads((ROOT / f"benchmarks/results/{study}/report.json").read_text())
    assert len(report["rows"]) == methods
    assert not {formatted(row) for row in report["rows"]} - set(lines)
    if "ce_clean" in report:
        numbers = [f"{report[f'ce_{name}']:.3f}" for name in ("clean", "mean", "zero")]
        assert [line for line in lines if all(number in line for number in numbers)]


def test_the_tables_of_benchmarks_are_those_of_the_committed_results():
    text = (ROOT / "benchmarks/README.md").read_text()
    names = ("refine", "train", "families", "harvest", "load", "jobs")
    names += ("pursuit", "transitions", "lasso", "ksvd", "pictures")
    results = [ROOT / f"benchmarks/results/{name}/paper-cpu.json" for name in names]
    results.append(ROOT / "benchmarks/results/kernels/small-cpu.json")
    assert table.insert(text, [json.loads(path.read_text()) for path in results]) == text
