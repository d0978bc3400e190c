"""Every option of every command has a range, and no value of any ends in a traceback."""

import collections
import contextlib
import inspect
import io
import itertools
import os
import shutil
from pathlib import Path
from typing import Annotated, NamedTuple, get_args, get_origin, get_type_hints

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from problems import activations, sae

import jaxsae
from jaxsae import language_model, pretrained, sharding, stream, train
from jaxsae._core import arguments
from jaxsae._core.files import InputError
from jaxsae.app import evaluation, plan, plots, runs, sources, study
from jaxsae.app.cli import COMMANDS, main
from jaxsae.app.commands import autoencoders, texts, training
from jaxsae.app.options import FAMILIES, Options, resolved
from jaxsae.app.tuned import Trained
from jaxsae.formats import hub
from jaxsae.ksvd import image_files, images
from jaxsae.language_model import download, harvest, text as text_module
from jaxsae.least_squares.outcome import RefitInfo
from jaxsae.train import job

ROOT = Path(__file__).parent
D, M, K, ROWS = 16, 32, 4, 96


# --- What is declared


def undeclared(hint) -> bool:
    """Whether a type lets any number, string or path in."""
    if get_origin(hint) is Annotated:
        return not any(hasattr(each, "require") for each in hint.__metadata__)
    if hint in (int, float, str, Path) or hint is os.PathLike:
        return True
    return any(map(undeclared, get_args(hint)))


def jobs():
    """What has options: commands, and what they call."""
    yield from COMMANDS.items()
    yield from {"runs.Options": Options, "study.Plan": study.Plan}.items()


@pytest.mark.parametrize("name, declaration", list(jobs()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_option_has_a_range(name, declaration):
    hints = get_type_hints(declaration, include_extras=True)
    hints.pop("return", None)
    assert hints
    assert not [option for option, hint in hints.items() if undeclared(hint)]


def test_an_option_without_a_range_is_seen():
    # The test above would pass if nothing were.
    def command(*, a: int, b: tuple[float, ...] = (), c: Path | None = None, d: Annotated[str, "d"], e: bool): ...

    hints = get_type_hints(command, include_extras=True)
    assert [name for name, hint in hints.items() if undeclared(hint)] == ["a", "b", "c", "d"]


def test_a_command_and_its_job_have_the_same_ranges():
    command, options = (get_type_hints(each, include_extras=True) for each in (training.train, Options))
    shared = set(command) & set(options)
    assert len(shared) > 8
    assert {name: command[name] for name in shared} == {name: options[name] for name in shared}


def test_the_names_declared_are_those_there_are():
    assert arguments.ACTIVATION.names == tuple(FAMILIES)
    assert autoencoders.FORMATS.names == tuple(name for name, row in pretrained.FORMATS.items() if row.write)
    (names,) = (hint.__metadata__[0].names for hint in [get_type_hints(texts.fetch, include_extras=True)["name"]])
    assert names == tuple(download.WHEELS)


MODEL, CONTEXTS = language_model.tiny(), np.ones((2, 6), np.int32)


class Some(NamedTuple):
    count: arguments.Count = 1
    weight: arguments.Weight = 0.0
    positive: arguments.Positive = 1.0
    several: tuple[arguments.Positive, ...] = ()
    two: tuple[arguments.Count, arguments.Count] | None = None
    name: Annotated[str, arguments.ACTIVATION] = "relu"


GOOD = {
    "count": [1, 2**31 - 1, np.int64(5)],
    "weight": [0.0, -0.0, 1e-300, 1e38, 5, np.float32(0.5)],
    "positive": [5e-324, 1.0],
    "several": [(), (1.0, 2.0)],
    "two": [None, (1, 2)],
    "name": ["gated"],
}
WRONG = {
    "count": [0, -1, 2**31, 10**30, 1.0, 1.5, True, np.nan, "1", None, np.array([1, 2])],
    "weight": [-1e-9, np.nan, np.inf, -np.inf, 1e39, np.float64(1e308), 10**400, True, "1", None, 1j],
    "positive": [0, 0.0, -1.0, np.nan],
    "several": [(1.0, 0.0), (np.nan,)],
    "two": [(0, 1), (1, -1)],
    "name": ["", "ReLU", "relu ", None, 3],
}


@pytest.mark.parametrize("name, value", [(name, value) for name in GOOD for value in GOOD[name]], ids=str)
def test_what_is_in_range(name, value):
    arguments.check(Some, {name: value})


@pytest.mark.parametrize("name, value", [(name, value) for name in WRONG for value in WRONG[name]], ids=str)
def test_what_is_not(name, value):
    with pytest.raises(InputError, match=rf"^got {name} .*(; pass|, expected one of: ).*\.$"):
        arguments.check(Some, {name: value})


@pytest.mark.parametrize("steps, batch", [(1, 1), (2**31 - 1, 2**31 - 1)])
def test_what_follows_from_options_is_in_range_too(steps, batch):
    found = resolved(Options("topk", 2**31 - 1, k=1, steps=steps, batch=batch))
    assert found.idle_after is not None and found.learning_rate is not None
    arguments.check(Options, found._asdict())


def test_the_jobs_check_their_own_options(tmp_path):
    rows = np.zeros((64, D), np.float32)
    options = Options("topk", M, k=K, batch=8, steps=2, heldout=8)

    def three_ways():
        with jax.set_mesh(sharding.make_mesh(1, 3)):
            runs.run(tmp_path / "x", data={"x": rows}, options=options)

    calls = {
        "learning_rate": lambda: runs.run(
            tmp_path / "run", data={"x": rows}, options=options._replace(learning_rate=-1.0)
        ),
        "save_every": lambda: runs.run(tmp_path / "run", data={"x": rows}, options=options, save_every=np.nan),
        "is a URL": lambda: runs.run("abfs://bucket/run", data={"x": rows}, options=options),
        "seed": lambda: study.run(tmp_path / "run", seed=-1),
        "steps": lambda: study.run(tmp_path / "run", plan=study.QUICK._replace(steps=0)),
        "batch": lambda: harvest.run(tmp_path / "x", MODEL, CONTEXTS, points=[(1, "resid_post")], source={}, batch=0),
        "dtype": lambda: harvest.run(
            tmp_path / "x", MODEL, CONTEXTS, points=[(1, "resid_post")], source={}, dtype="int8"
        ),
        "window": lambda: harvest.live(MODEL, CONTEXTS, points=[(1, "resid_post")], window=-1),
        "1 tokens": lambda: harvest.live(MODEL, CONTEXTS[:, :1], points=[(1, "resid_post")]),
        "2 latents": lambda: runs.run(tmp_path / "run", data={"x": rows}, options=options._replace(latents=2)),
        "3 ways": three_ways,
        "cannot write": lambda: study.run("/dev/null/run"),
    }
    for message, call in calls.items():
        with pytest.raises(InputError, match=message):
            call()
    assert not list(tmp_path.iterdir())


# --- Random values


def slice_of(topology, data=1, latent=8):
    """The devices of this machine, for a slice of TPUs."""
    try:
        return sharding.make_mesh(data, latent)
    except ValueError as error:
        raise InputError(str(error)) from error


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory of small inputs of each kind, good and bad."""
    folder = tmp_path_factory.mktemp("world")
    for name, options in {"topk": {}, "relu": {}, "transcoder": {"transcoder": True}}.items():
        activation = jaxsae.ReLU() if name == "relu" else jaxsae.TopK(K)
        model = jaxsae.init(jax.random.key(0), d=D, m=M, activation=activation, **options)
        pretrained.save(model, folder / name)
    pretrained.save(jaxsae.init(jax.random.key(0), d=24, m=M, activation=jaxsae.TopK(K)), folder / "of24")
    x = np.array(activations(batch=(ROWS,), d=D))
    np.save(folder / "x.npy", x)
    np.save(folder / "one.npy", x[:1])
    np.save(folder / "equal.npy", np.ones_like(x))
    np.save(folder / "nan.npy", np.full_like(x, np.nan))
    np.save(folder / "narrow.npy", x[:, :5])
    picture = np.random.default_rng(0).uniform(0, 255, (12, 14))
    image_files.write(folder / "picture.png", picture)
    image_files.write(folder / "missing.png", 255.0 * (picture > 200))
    image_files.write(folder / "small.png", picture[:3, :3])
    (folder / "text.txt").write_text("to be or not to be " * 40)
    (folder / "empty").write_bytes(b"")
    shutil.copytree(ROOT / "language_models/llama", folder / "llama")
    shutil.copytree(ROOT.parent / "benchmarks/results/study", folder / "study")
    return folder


def usual(world: Path, command: str) -> tuple[list[str], dict[str, list[str]]]:
    """Arguments and options with which a command does its work."""
    x, topk = str(world / "x.npy"), str(world / "topk")
    few = {"latents": [M], "batch": [8], "steps": [2], "heldout": [16], "activation": ["topk"], "k": [K]}
    positional, options = {
        "study": ([], {"data": [x], "out": ["out"]}),
        "fetch": (["smollm2"], {}),
        "harvest": (
            [],
            {"model": [world / "llama"], "layer": [1], "text": [world / "text.txt"], "out": ["out"]}
            | {"context": [16], "tokens": [64]},
        ),
        "train": ([], few | {"data": [x], "out": ["out"]}),
        "eval": ([], {"sae": [topk], "data": [x]}),
        "refine": ([], {"sae": [topk], "data": [x], "out": ["out.npz"]}),
        "steer": (
            [],
            {"sae": [world / "of24"], "model": [world / "llama"], "latent": [3], "scale": [2], "prompt": ["to be"]}
            | {"layer": [1], "tokens": [4]},
        ),
        "features": ([topk], {"data": [x], "latents": [3, 5], "out": ["out"]}),
        "report": ([world / "study"], {"out": ["out.html"]}),
        "info": ([topk], {}),
        "convert": ([topk, "out"], {"to": ["saelens"]}),
        "push": ([topk, "hf://org/repository"], {"to": ["saelens"]}),
        "plan": ([], {"latents": [M], "d": [D], "k": [K], "batch": [8], "topology": ["v5e:1x1"]}),
        "denoise": ([world / "picture.png"], {"sigma": [20], "out": ["out.png"]}),
        "inpaint": ([world / "picture.png"], {"missing": [world / "missing.png"], "out": ["out.png"]}),
    }[command]
    return list(map(str, positional)), {name: list(map(str, values)) for name, values in options.items()}


PLACES = ("x.npy", "one.npy", "equal.npy", "nan.npy", "narrow.npy", "topk", "relu", "transcoder", "picture.png")
PLACES += ("missing.png", "small.png", "text.txt", "empty", "llama", "study", "nothing", "x.npy/inside", ".")
NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "-0.0",
    "1",
    "2",
    "3",
    "5",
    "16",
    "1e308",
    "-1e308",
    "1e-308",
    "5e-324",
    "1e39",
)
NUMBERS += ("0.5", "1e-3", "1e400", "0x10", "1_0", "²", str(2**31 - 1), str(2**31), str(2**32), str(2**63), "9" * 400)
STRINGS = (
    "",
    " ",
    "None",
    "True",
    "x",
    "ü",
    "\U0001f600",
    "a\nb",
    "a\tb",
    "\udcff",
    "..",
    "--",
    "-",
    "{}",
    "%s",
    "a" * 300,
)
STRINGS += ("gs://", "s3:///x", "hf://", "hf://a", "hf://org/repository/x", "file:///tmp/x", "a/b/c")
STRINGS += ("/dev/null", "/dev/null/x", "/proc/x", "localhost:1", "v5e:4x4", "v5e:0x0", "v9:1x1", "float32", "int32")
STRINGS += (
    "relu",
    "topk",
    "jumprelu",
    "gated",
    "batchtopk",
    "groupmax",
    "saelens",
    "openai",
    "out.psd",
    "out.jpg",
    "out",
)


def wild(world: Path, written: bool):
    """Values of any kind; a place that is written to is none of the inputs."""
    places = [
        str(world / name) for name in (PLACES if not written else ("empty", "x.npy/inside", "new/place", "llama"))
    ]
    texts = st.text(max_size=8).filter(lambda text: not text.startswith(("/", "~", "..")))
    return st.one_of(
        st.integers(1, 9).map(str), st.sampled_from(NUMBERS), st.sampled_from(STRINGS), st.sampled_from(places), texts,
        st.integers(-300, 300).map(str), st.integers().map(str), st.floats().map(str),
    )  # fmt: skip


@st.composite
def command_lines(draw, world: Path, command: str):
    """A command that would do its work, with some values of its options replaced: `(argv, names of those)`."""
    positional, options = usual(world, command)
    parameters = inspect.signature(COMMANDS[command]).parameters
    names = draw(st.lists(st.sampled_from(sorted(parameters)), min_size=1, max_size=3, unique=True))
    for name in names:
        hint = get_type_hints(COMMANDS[command])[name]
        kind = parameters[name].kind
        value = wild(world, written=name in ("out", "dst", "dictionary"))
        if kind is not inspect.Parameter.KEYWORD_ONLY:
            positional[[*parameters].index(name)] = draw(value)
        elif hint is bool:
            options[name] = []
        else:
            many = 2 if name == "mesh" else 1
            options[name] = draw(st.lists(value, min_size=many, max_size=many + 1 if "tuple" in str(hint) else many))
    argv = list(positional)
    for name, values in options.items():
        argv += [f"--{name.replace('_', '-')}", *values]
        if draw(st.integers(0, 9)) == 0:
            argv += [f"--{name.replace('_', '-')}", *values]
    return [command, *argv], names


@pytest.fixture
def cut(monkeypatch):
    """The work cut off where it begins: what is left is what looks at the options."""

    def loop(step, init_fn, batches, checkpoints, **options):
        state = sharding.abstract(init_fn)
        if state.sae.m > 1000:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        next(batches)
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state), job.LoopState()

    measured = {"nmse": None, "l0": 0.0, "dead": 1.0, "rows": 1, "nmse_at": {}, "firing": [], "nonfinite": 0}
    measured["dead_rows"] = 1
    monkeypatch.setattr(job, "run", loop)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: measured | {"explained_variance": None})
    monkeypatch.setattr(train, "geometric_median", lambda rows: rows.mean(0))
    zeros = lambda model, ids, layer: jnp.zeros((*ids[:, 1:].shape, model.config.width))  # noqa: E731
    monkeypatch.setattr(harvest, "_after_first", zeros)
    ones = ("l0", "l0_after", "nmse_before", "mean_before", "mean_change", "rising", "certified")
    row = dict.fromkeys(ones, 1.0) | {"nmse_after": 0.5, "mean_after": 2.0, "gamma_before": 0.5}
    row |= {"gamma_after": None, "worst_kkt": 0.0}
    monkeypatch.setattr(study, "measure", lambda *_, **__: row)
    monkeypatch.setattr(study, "train_to", lambda rows, *_: Trained(sae(d=rows.shape[1], m=M), 2, {}))
    monkeypatch.setattr(plots, "shrinkage", lambda report, path: path.write_bytes(b""))
    program = plan.Program(1, 1, 1.0, 1.0, {})
    monkeypatch.setattr(plan, "_read", lambda lower: program)
    for name in ("denoise", "inpaint"):
        monkeypatch.setattr(images, name, lambda picture, *_, **__: (picture, np.ones((64, 4))))
    monkeypatch.setattr(stream, "refine", unchanged)


def unchanged(sae, x, code, solver, target=None):
    zeros = np.zeros(len(x), np.int32)
    return code, RefitInfo(kkt=np.zeros(len(x), np.float32), steps=zeros, status=zeros)


@pytest.fixture
def here(world, monkeypatch, tmp_path):
    """A place to work in, without a network and with small studies."""
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")

    def offline(*_):
        raise OSError("offline")

    monkeypatch.setattr(hub, "_fetch", offline)
    monkeypatch.setattr(hub, "push", lambda folder, address, **_: address)
    monkeypatch.setenv("HF_TOKEN", "none")
    monkeypatch.setattr(language_model, "fetch", lambda name: Path(name))
    monkeypatch.setattr(plan, "topology_mesh", slice_of)
    for name in ("FULL", "QUICK", "FULL_MODEL", "QUICK_MODEL", "FULL_SYNTHETIC", "QUICK_SYNTHETIC"):
        heldout = 15 if "MODEL" in name else 16
        monkeypatch.setattr(study, name, study.Plan(M, 2, 8, heldout, ("topk",), (2,), train_rows=64))
    jobs = study._jobs  # of which there may be billions
    monkeypatch.setattr(study, "_jobs", lambda plan, seed: itertools.islice(jobs(plan, seed), 4))
    monkeypatch.setattr(sources, "CONTEXT", 16)
    monkeypatch.setattr(text_module, "standard_library", lambda: [world / "text.txt"])
    return tmp_path / "a/b"


TRIED: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)


def ends_well(argv: list[str], names: list[str], here: Path) -> None:
    """Run a command: it says in one line what is wrong with it, or does what it is to do."""
    for path in here.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
            parsed = True
        except SystemExit as stopped:  # of the parser
            code, parsed = stopped.code or 0, False
    TRIED[argv[0]].update(values=len(names), **{f"exit {code}": 1})
    said = err.getvalue()
    assert code in (0, 1, 2, 130)
    assert "Traceback" not in said
    if parsed and code == 2:
        lines = [line for line in said.splitlines() if "%  " not in line and "warning: " not in line]
        assert len(lines) == 1 and lines[0].startswith("jaxsae: ") and lines[0].endswith("."), said
        assert out.getvalue() == ""
        assert not list(here.iterdir()), "something was made"


BOUNDED = hypothesis.settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)


@pytest.fixture
def short(monkeypatch):
    """The work done, but of any training some steps, and no state that is large."""
    whole, train_to = job.run, study.train_to

    def to_l0(rows, watched, options, *rest):
        if options.latents > 1000:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return train_to(rows, watched, options._replace(steps=min(options.steps, 3)), *rest)

    def loop(step, init_fn, batches, checkpoints, *, steps, **options):
        if sharding.abstract(init_fn).sae.m > 1000:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return whole(step, init_fn, batches, checkpoints, steps=min(steps, 3), **options)

    monkeypatch.setattr(job, "run", loop)
    monkeypatch.setattr(study, "train_to", to_l0)


def try_values(command: str, world: Path, here: Path, examples: int) -> None:
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(command_lines(world, command))
    def check(drawn):
        ends_well(*drawn, here)

    positional, options = usual(world, command)
    argv = [*positional, *(word for name, values in options.items() for word in (f"--{name}", *values))]
    ends_well([command, *argv], [], here)
    assert TRIED[command]["exit 0"]  # as it is, it works
    check()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_value_ends_in_a_traceback(command, world, here, cut):
    try_values(command, world, here, examples=40)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_no_value_of_many_ends_in_a_traceback(command, world, here, cut, capsys):
    try_values(command, world, here, examples=200)
    with capsys.disabled():
        print(f"\n{command}: {dict(TRIED[command])}")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_no_value_ends_in_a_traceback_when_the_work_is_done(command, world, here, short):
    few = {"train": 15, "study": 6, "denoise": 10, "inpaint": 10, "harvest": 30, "plan": 15}
    try_values(command, world, here, examples=few.get(command, 60))
