"""The reference holds every public name once, its docstring says what it must, and what the documents name exists."""

import ast
import enum
import functools
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from problems import every_activation

import jaxsae
from benchmarks import guide
from jaxsae._core.files import InputError
from jaxsae.autoencoder.normalisation import LayerNorm

DOCS = Path(__file__).parent.parent / "docs"
if not DOCS.is_dir():
    pytest.skip("the documents come with a checkout", allow_module_level=True)


def find(name: str):
    """What a dotted name of ours stands for."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[size:], found)
    raise AttributeError(name)


def index(module) -> list[str]:
    """What a package imports under its own name, `from x import y as y`, and what a module defines."""
    if hasattr(module, "__path__"):
        imports = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.ImportFrom)]
        return [alias.name for node in imports for alias in node.names if alias.asname == alias.name]
    own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__]
    return [name for name in own if not name.startswith("_")]


def public() -> dict[str, object]:
    """Every public function and class, by the shortest name that a user has for it.

    Public is what a package's index names, and what its public modules define without an underscore.
    """
    found, seen, modules = {}, set(), [("jaxsae", jaxsae)]
    for path, module in modules:  # which grows
        for name in getattr(module, "__all__", None) or index(module):
            thing = getattr(module, name)
            if inspect.ismodule(thing):
                modules.append((f"{path}.{name}", thing))
            elif callable(thing) and id(thing) not in seen:
                found[f"{path}.{name}"] = thing
                seen.add(id(thing))
    return found


PUBLIC = public()
# What would take long; and records and errors, whose example is that of what makes or raises them.
NO_EXAMPLE = {
    *("jaxsae.app.study.run", "jaxsae.app.measure.measure", "jaxsae.app.sources.from_model"),
    *("jaxsae.app.sources.Rows", "jaxsae.app.sources.Truth", "jaxsae.app.sources.Probe", "jaxsae.app.tuned.Trained"),
    *("jaxsae.app.sources.losses", "jaxsae.metrics.Matching"),
    *(
        "jaxsae.train.checkpoint.Saved",
        "jaxsae.data.Batches",
        "jaxsae.InputError",
        "jaxsae.language_model.text.Text",
    ),
    *(
        "jaxsae.formats.hub.Found",
        "jaxsae.train.job.TooManyRollbacks",
        "jaxsae.train.job.LoopState",
        "jaxsae.train.job.Preempted",
        "jaxsae.ksvd.History",
    ),
    *("jaxsae.language_model.LanguageModel", "jaxsae.language_model.NextToken", "jaxsae.lasso.CrossValidation"),
    *("jaxsae.lasso.LassoInfo", "jaxsae.metrics.Activity", "jaxsae.metrics.Moments", "jaxsae.metrics.Progressive"),
    *(
        "jaxsae.metrics.Reconstruction",
        "jaxsae.train.objectives.Aux",
        "jaxsae.train.objectives.ForwardPass",
        "jaxsae.app.chips.Chip",
    ),
    *(
        "jaxsae.app.plan.Program",
        "jaxsae.autoencoder.Fit",
        "jaxsae.data.shards.Manifest",
        "jaxsae.data.LazyRows",
        "jaxsae.stream.Block",
        "jaxsae.stream.Chunk",
        "jaxsae.app.loss.measure",
        "jaxsae.stream.Coded",
    ),
    *("jaxsae.stream.RefineSummary", "jaxsae.train.Diverged", "jaxsae.train.TrainState"),
}
# What has no mathematics, or nobody's.
NO_SOURCE = {
    *("jaxsae.Certificate", "jaxsae.ReLU"),
    *("jaxsae.autoencoder.activations.Activation", "jaxsae.lasso.LassoInfo", "jaxsae.lasso.CrossValidation"),
    *("jaxsae.ksvd.History", "jaxsae.lasso.lambda_max", "jaxsae.train.losses.mse", "jaxsae.train.losses.nmse"),
    *("jaxsae.train.objectives.Aux", "jaxsae.train.objectives.Objective", "jaxsae.train.objectives.ForwardPass"),
    *(
        "jaxsae.autoencoder.normalisation.Normalisation",
        "jaxsae.autoencoder.normalisation.Normalised",
        "jaxsae.solvers.Solver",
    ),
    *("jaxsae.solvers.default", "jaxsae.solvers.within"),
}
OF_PAPERS = {
    *(f"autoencoder.activations.{name}" for name in ("base", "matching_pursuit", "thresholds", "top_k")),
    *("autoencoder.normalisation", "ksvd.learning", "lasso.penalised", "train.losses"),
    *("least_squares.certificate", "least_squares.refit", "least_squares.solvers", "train.objectives"),
    *("pursuit.greedy", "pursuit.thresholding"),
}


def listed(text: str) -> list[str]:
    # A function that is named like its module has a heading of its own: the module would answer to the short name.
    text = re.sub(r"^::: \S+\n    options:\n      heading: ", "::: ", text, flags=re.MULTILINE)
    return re.findall(r"^::: (\S+)", text, flags=re.MULTILINE)


def docstring(thing) -> str:
    own = thing.__dict__.get("__init__") if inspect.isclass(thing) else None
    return "\n\n".join(filter(None, [inspect.getdoc(thing), inspect.getdoc(own)])) + "\n"


def section(thing, names: str) -> str:
    return "\n".join(re.findall(rf"^(?:{names}):\n((?: .*\n|\n)*)", docstring(thing), flags=re.MULTILINE))


def parameters(thing) -> set[str]:
    if inspect.isclass(thing) and (issubclass(thing, enum.Enum) or getattr(thing, "_is_protocol", False)):
        return set()
    try:
        return set(inspect.signature(thing).parameters) - {"self", "args", "kwargs"}
    except ValueError:  # of an exception that takes what `Exception` takes
        return set()


def told(thing) -> set[str]:
    """What the sections of arguments say something about: `a:`, `a, b:` or `*a:`."""
    entries = re.findall(r"^  ([\w*]+(?:, \w+)*): ", section(thing, "Args|Attributes"), flags=re.MULTILINE)
    return {word.lstrip("*") for entry in entries for word in entry.split(", ")}


def test_the_reference_has_every_public_name_once():
    names = [name for path in sorted(DOCS.rglob("*.md")) for name in listed(path.read_text())]
    assert not sorted(set(PUBLIC) - set(names)), "give these a place in docs/reference, or an underscore"
    assert not sorted(set(names) - set(PUBLIC)), "the reference has these, and the library does not"
    assert len(names) == len(set(names))


def test_docstrings_say_what_every_parameter_is():
    assert not {name: missing for name, thing in PUBLIC.items() if (missing := parameters(thing) - told(thing))}


def test_docstrings_have_examples():
    assert {name for name, thing in PUBLIC.items() if ">>> " not in section(thing, "Example")} == NO_EXAMPLE


def test_docstrings_of_mathematics_name_their_source():
    names = {name for name, thing in PUBLIC.items() if thing.__module__.removeprefix("jaxsae.") in OF_PAPERS}
    assert {name for name in names if "\nSource: " not in docstring(PUBLIC[name])} == NO_SOURCE


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.stem)
def test_what_a_page_names_exists(path):
    text = path.read_text()
    for name in re.findall(r"\bjaxsae(?:\.[A-Za-z]\w*)+", text):
        find(name)
    for module, name in re.findall(r"`(\w+)\.([A-Za-z]\w*)", text):  # `ksvd.exact`
        if importlib.util.find_spec(f"jaxsae.{module}"):
            find(f"jaxsae.{module}.{name}")


def test_code_of_every_page_is_run():
    with_code = {path.stem for path in DOCS.rglob("*.md") if "```python" in path.read_text()}
    assert with_code == {"composing", "dictionary", "index", "paper_to_code"}  # of tests/test_documents.py


def test_the_guide_has_the_numbers_of_the_committed_benchmarks():
    pages = [page.read_text() for page in guide.PAGES]
    assert [guide.insert(page) for page in pages] == pages
    assert {name for page in pages for name in guide.names(page)} == set(guide._TABLES)


def test_the_guide_says_what_each_format_can_write(tmp_path):
    m, one = 8, jnp.full(8, 0.1)
    activations = {
        **every_activation(m, 2),
        "JumpReLU of one threshold": jaxsae.JumpReLU(one),
        "TopK on `LayerNorm` rows": jaxsae.TopK(2),
    }

    def writes(format, name):
        sae = jaxsae.init(jax.random.key(0), d=4, m=m, activation=activations[name])
        if name.endswith("rows"):
            sae = sae.replace(normalisation=LayerNorm())
        try:
            jaxsae.pretrained.save(sae, tmp_path / f"{format}-{name.split()[-1]}.pt", format=format)
        except InputError:
            return False
        return True

    told = dict(re.findall(r"^\| [^|]* \| `(\w+)` \| (.*) \|$", (DOCS / "which.md").read_text(), flags=re.MULTILINE))
    for format in (name for name, row in jaxsae.pretrained.FORMATS.items() if row.write):
        can = {name for name in activations if writes(format, name)}
        plain = can & {name for name in activations if " " not in name}
        said = set(re.split("[,;] ", told[format]))
        assert said == ({"everything"} if len(plain) == len(every_activation()) else plain) | (said & can)


def test_the_example_of_contributing_is_what_the_files_have():
    root, blocks = (
        DOCS.parent,
        re.findall(r"```diff\n(.*?)```", (DOCS.parent / "CONTRIBUTING.md").read_text(), re.DOTALL),
    )
    sections = re.findall(r"^ # (\S+\.py).*\n((?:\+.*\n)+)", "".join(blocks), flags=re.MULTILINE)
    assert len(sections) == 8
    for path, added in sections:
        text = (root / path).read_text()
        assert not [line for line in added.splitlines() if line[1:].strip() not in text], path
