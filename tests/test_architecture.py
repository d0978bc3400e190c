"""The order of the modules, what importing the library costs, and rules that hold in every file."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxsae

PACKAGE = Path(jaxsae.__file__).parent

# Packages and files of the top level: each imports only from levels below its own.
LEVELS = [
    ["__init__", "__main__"],
    ["app"],
    ["train"],
    ["ksvd", "formats"],
    ["autoencoder", "pursuit", "lasso"],
    ["least_squares", "language_model"],
    ["codes", "data"],
    ["_core"],
    ["sharding"],
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}

FILES = sorted(PACKAGE.rglob("*.py"))
per_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def place(path: Path) -> str:
    """What of the top level a file belongs to: its package, or itself."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def places_imported(path: Path) -> set[str]:
    """The library's own modules that a file imports, at its top or inside a function."""
    here = ("jaxsae", *path.relative_to(PACKAGE).parts[:-1])
    dotted = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = here[: len(here) + 1 - node.level] if node.level else ()
            base = ".".join([*package, node.module or ""]).strip(".")
            dotted |= {f"{base}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in dotted if name.split(".")[0] == "jaxsae"]
    existing = {place(file) for file in FILES}
    return {name[1] if name[1:] and name[1] in existing else "__init__" for name in parts}


def test_everything_at_the_top_has_a_level():
    assert {place(path) for path in FILES} == set(LEVEL)


@per_file
def test_a_package_imports_only_from_those_below_it(path):
    own = place(path)
    if own != "__init__":
        assert not {other for other in places_imported(path) - {own} if LEVEL[other] <= LEVEL[own]}


def test_the_parser_of_imports_sees_them():
    # The test above would pass if nothing were found.
    assert {"_core", "codes", "sharding"} <= places_imported(PACKAGE / "least_squares" / "refit.py")


@per_file
def test_a_package_leaves_the_private_names_of_others_alone(path):
    strangers = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxsae"):
            other = [*node.module.split("."), ""][1]
            names = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "_core"]
            strangers += names if other != place(path) else []
    assert not strangers


@per_file
def test_modules_are_short(path):
    assert len(path.read_text().splitlines()) <= 500


def test_the_language_is_that_of_the_field():
    root = Path(__file__).parent.parent  # the library itself may be installed elsewhere
    texts = [*FILES, root / "README.md", *sorted(root.glob("docs/**/*.md"))]
    assert len(texts) > len(FILES) + 1
    found = {
        f"{path}:{number}": line
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\b(told|tells|gone on with)\b", line, re.IGNORECASE)
    }
    assert not found


@per_file
def test_functions_fit_a_screen(path):
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = {node.name: node.end_lineno - node.lineno + 1 - _docstring_lines(node) for node in functions}
    assert not {name: n for name, n in lines.items() if n > 60}


def _docstring_lines(node) -> int:
    return node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0


@per_file
def test_the_library_neither_prints_nor_asserts(path):
    nodes = list(ast.walk(tree(path)))
    assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)]
    if path.name != "console.py":
        calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        assert not [call.lineno for call in calls if call.func.id == "print"]


def run_python(script: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    ).stdout


HEAVY = ("orbax", "grain", "matplotlib", "jax.experimental.pallas", "sklearn", "rich", "flax", "optax")


@pytest.mark.parametrize(
    ("script", "never"),
    [
        ("import jaxsae; dir(jaxsae)", ("jax", "numpy")),
        ("from jaxsae.app import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass", ("jax", "numpy")),
        ("from jaxsae.app import cli\ntry: cli.main(['train', '--help'])\nexcept SystemExit: pass", ("jax", "numpy")),
        ("import jaxsae; jaxsae.SAE, jaxsae.refit, jaxsae.pursuit.omp, jaxsae.lasso.path, jaxsae.pretrained", HEAVY),
        ("import jaxsae; jaxsae.train.fit, jaxsae.data, jaxsae.formats", {*HEAVY} - {"flax", "optax"}),
    ],
    ids=["import", "help", "help of a command", "the core", "training"],
)
def test_what_is_not_used_is_not_imported(script, never):
    # JAX and optax may load some of them where these are installed: theirs to change.
    given = "import optax, flax" if "optax" not in never else "import jax" if "jax" not in never else ""
    found = run_python(
        f"import sys\n{given}\nbefore = set(sys.modules)\n{script}\nprint('loaded', sorted({{*sys.modules}} - before))"
    )
    loaded = ast.literal_eval(found.rpartition("loaded ")[2])
    assert "jaxsae" in loaded
    assert not {*never} & {*loaded}


def test_a_module_may_be_the_first_name_that_is_imported():
    assert run_python("from jaxsae import pytrees; print(pytrees.__name__)").strip() == "jaxsae._core.pytrees"


def test_flax_serialises_what_was_defined_before_it_was_imported():
    script = """
import jaxsae, numpy as np
code = jaxsae.SparseCode(np.ones((1, 2), "f4"), np.zeros((1, 2), "i4"), 3)
from flax import serialization
print(sorted(serialization.to_state_dict(code)))
"""
    assert run_python(script).strip() == "['indices', 'num_dropped', 'values']"


def test_importing_the_library_says_nothing():
    silent = [sys.executable, "-W", "error", "-c", "import jaxsae"]
    found = subprocess.run(silent, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
