"""The Python code of the docstrings, of the README and of the notebooks runs."""

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

import jaxsae
from benchmarks import table

ROOT = Path(__file__).parent.parent


def run(blocks: list[str]) -> None:
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "document", "exec"), namespace)


def examples():
    names = [module.name for module in pkgutil.iter_modules(jaxsae.__path__) if module.name != "__main__"]
    for name in names:
        module = importlib.import_module(f"jaxsae.{name}")
        yield from (test for test in doctest.DocTestFinder().find(module) if test.examples)


# As the package is installed: a checkout beside it would be another `jaxsae`.
@pytest.mark.parametrize("example", list(examples()), ids=lambda test: test.name)
def test_docstring_example_runs(example, unchecked):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False)
    said = []
    assert runner.run(example, out=said.append).failed == 0, "".join(said)


def test_readme_runs(capsys):
    run(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL))
    assert "NMSE" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs_and_keeps_its_outputs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in cells)
    run(["".join(cell["source"]) for cell in cells])


def test_readme_has_the_numbers_of_the_committed_report():
    text = (ROOT / "README.md").read_text()
    rows = json.loads((ROOT / "benchmarks/results/study/report.json").read_text())["rows"]
    assert len(rows) == 8
    for row in rows:
        name = f"{'ReLU, L1' if row['family'] == 'relu' else 'TopK, k'} {row['k_or_l1']:g}"
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        shown = [f"{row['l0']:.1f}", *(f"{row[key]:.4f}" for key in ("nmse_before", "nmse_after", "gamma_before"))]
        assert all(
            f" {number} |" in line for number in (*shown, f"{row['mean_change']:+.1%}", f"{row['worst_kkt']:.1e}")
        )


def test_readme_has_the_tables_of_the_committed_benchmarks():
    text = (ROOT / "README.md").read_text()
    results = [ROOT / f"benchmarks/results/{name}/paper-cpu.json" for name in ("refine", "train", "families")]
    assert table.insert(text, [json.loads(path.read_text()) for path in results]) == text
