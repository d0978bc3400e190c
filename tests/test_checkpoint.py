import logging
import shutil
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from problems import activations, assert_same_bits, sae

import jaxsae
from jaxsae import train
from jaxsae._core import processes
from jaxsae._core.files import InputError
from jaxsae.train import checkpoint, echoes
from jaxsae.train.checkpoint import Checkpoints, fingerprint
from jaxsae.train.objectives import AuxK, Objective

TX = train.ema(train.default_optimizer(optax.linear_schedule(1e-2, 0.0, 100), clip=1.0), decay=0.9)


def state(steps=3):
    """A training's state in which nothing is zero, a PRNG key beside it."""
    model = sae(d=16, m=32, activation=jaxsae.JumpReLU(jnp.full(32, 0.1)))
    step = train.make_step(Objective((AuxK(4),), idle_after=10), TX)
    trained = train.init_state(model, TX)
    for _ in range(steps):
        trained, _ = step(trained, activations(batch=(8,)))
    return {"train": trained, "key": jax.random.key(7)}


STATE = state()
LIKE = jax.eval_shape(lambda: jax.tree.map(lambda x: x, STATE))


def fill(folder, numbers=(1, 2, 3), **options):
    with Checkpoints(folder, config={"k": 4}, **options) as checkpoints:
        for number in numbers:
            checkpoints.save(number, STATE, progress={"position": number}, loss=10.0 - number)


def same(a, b):
    def bits(tree):
        return [
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
        ]

    assert_same_bits(bits(a), bits(b))
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_every_leaf_comes_back_to_the_bit(tmp_path):
    fill(tmp_path)
    with Checkpoints(tmp_path, config={"k": 4}) as checkpoints:
        saved = checkpoints.restore(LIKE)
        assert (saved.step, saved.progress) == (3, {"position": 3})
        same(saved.state, STATE)
        assert checkpoints.restore(STATE).step == 3  # arrays serve as well


def test_what_is_saved_is_the_state_of_that_moment_though_its_buffers_are_given_away(tmp_path):
    step = train.make_step(Objective(), TX)
    model = jaxsae.init(jax.random.key(0), d=64, m=2048, activation=jaxsae.TopK(4))
    trained, x, kept = train.init_state(model, TX), activations(batch=(8,), d=64), {}
    with Checkpoints(tmp_path, config=None, keep=9) as checkpoints:
        for number in range(4):
            trained, _ = step(trained, x)
            kept[number] = jax.tree.map(np.array, trained)
            checkpoints.save(number, trained, progress=None)
        like = jax.eval_shape(lambda: trained)
    for number in (3, 2, 1, 0):
        assert_same_bits(Checkpoints(tmp_path, config=None).restore(like).state, kept[number])
        shutil.rmtree(tmp_path / str(number))


def test_the_last_steps_are_kept_and_the_best(tmp_path):
    with Checkpoints(tmp_path, config=None, keep=2) as checkpoints:
        for number, loss in enumerate([5.0, 1.0, None, 3.0, float("nan"), 4.0]):
            checkpoints.save(number, {"x": jnp.ones(3)}, progress=None, loss=loss)
        checkpoints.save(5, {"x": jnp.zeros(3)}, progress=None)  # is there already
    assert checkpoint.steps(tmp_path) == [5, 4, 1]
    assert Checkpoints(tmp_path, config=None).restore({"x": jnp.ones(3)}).state["x"].tolist() == [1, 1, 1]


ORDERS = {
    "Fortran": np.asfortranarray,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "backwards": lambda x: x[::-1].copy()[::-1],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "of JAX": jnp.asarray,
    "a scalar of numpy": lambda x: x[1, 2],
    "a number": lambda x: x[1, 2].item(),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "float16", "bool", "uint8"])
def test_leaves_may_lie_in_memory_in_any_order(dtype, tmp_path):
    x = (np.arange(12).reshape(3, 4) + (0.1 if dtype.startswith("float") else 0)).astype(dtype)
    state = {name: order(x) for name, order in ORDERS.items()}
    wanted = jax.tree.map(np.array, state)
    wanted["a number"] = np.asarray(jnp.asarray(state["a number"]))  # has no type in files
    with Checkpoints(tmp_path, config=None) as checkpoints:
        checkpoints.save(1, state, progress=None)
        for leaf in state.values():  # what is saved is the state of that moment
            if isinstance(leaf, np.ndarray) and leaf.flags.writeable:
                leaf[:] = 0
    found = Checkpoints(tmp_path, config=None).restore(wanted).state
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)
        assert leaf.dtype == wanted[name].dtype.newbyteorder("=")


@pytest.mark.parametrize("leaf", ["text", np.array([None]), object()])
def test_a_leaf_that_is_no_number_is_refused(leaf, tmp_path):
    with (
        Checkpoints(tmp_path, config=None) as checkpoints,
        pytest.raises(InputError, match=r"a leaf holds .*, expected one of"),
    ):
        checkpoints.save(1, {"x": leaf}, progress=None)


@pytest.mark.parametrize("leaf", [jnp.ones(3, jnp.complex64), jnp.ones((2, 0, 3)), jnp.ones(3, jnp.int4)], ids=str)
@pytest.mark.parametrize("of", [lambda leaf: leaf, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)])
def test_a_leaf_that_cannot_be_saved_is_refused_in_one_line_and_before_any_work(of, leaf, tmp_path):
    expected = rf"^a leaf is {leaf.dtype}\[.*\]; a checkpoint holds arrays of real numbers .* form\.$"
    with Checkpoints(tmp_path, config=None) as checkpoints:
        with pytest.raises(InputError, match=expected):
            checkpoints.restore({"x": of(leaf)})
        with pytest.raises(InputError, match=expected):
            checkpoints.save(1, {"x": of(leaf)}, progress=None)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", ">u4"])
def test_unsigned_leaves_come_back(dtype, tmp_path):
    x = np.arange(6).reshape(2, 3).astype(dtype)
    with Checkpoints(tmp_path, config=None) as checkpoints:
        checkpoints.save(1, {"x": x}, progress=None)
    found = Checkpoints(tmp_path, config=None).restore({"x": x}).state["x"]
    np.testing.assert_array_equal(found, x)
    assert found.dtype == x.dtype.newbyteorder("=")


def test_a_fingerprint_of_wide_numbers_changes_with_any_bit():
    x = np.arange(6.0).reshape(2, 3)
    assert fingerprint([np.nextafter(x, 9)])[0] != fingerprint([x])[0] == fingerprint([np.asfortranarray(x)])[0]
    with jax.enable_x64(True):
        assert fingerprint([jnp.asarray(x)])[0] == fingerprint([x])[0]


def test_an_empty_directory_holds_nothing(tmp_path):
    with Checkpoints(tmp_path / "none", config=None) as checkpoints:
        assert checkpoints.restore(LIKE) is None
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_state_comes_back_onto_another_number_of_devices(devices, tmp_path):
    def placed(x, n):
        mesh = Mesh(np.array(jax.devices()[:n]), ("latent",))
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec("latent")))

    x = jax.random.normal(jax.random.key(0), (16, 8))
    with Checkpoints(tmp_path, config=None) as checkpoints:
        checkpoints.save(1, placed(x, 4), progress=None)
    like = placed(jnp.zeros((16, 8)), devices)
    found = Checkpoints(tmp_path, config=None).restore(like).state
    assert found.sharding == like.sharding
    np.testing.assert_array_equal(found, x)
    assert fingerprint(found).tolist() == fingerprint(x).tolist()


def test_a_fingerprint_changes_with_any_bit_and_any_place():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8, bool):
        x = jnp.arange(24).reshape(2, 3, 4).astype(dtype)
        (one,) = fingerprint([x])
        others = [
            x.at[1, 2, 3].set(~x[1, 2, 3] if dtype is bool else x[1, 2, 3] - 1),
            x[::-1],
            x[:, ::-1],
            x[:, :, ::-1],
        ]
        if dtype is not bool:
            assert all(fingerprint([other])[0] != one for other in others)
        assert fingerprint([others[0]])[0] != one
    assert fingerprint({}).shape == (0,)


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": lambda content: b"".join([content[: len(content) // 2], *_flipped(content[len(content) // 2 :])]),
    "deleted": lambda content: None,
}


def _flipped(rest):
    return [bytes([rest[0] ^ 0x40]), rest[1:]] if rest else []


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_file_of_the_last_step_may_be_damaged(damage, tmp_path):
    fill(tmp_path / "whole", (1, 2))
    fell_back = 0
    for name in files_of(tmp_path / "whole/2"):
        folder, warned = tmp_path / "damaged", []
        shutil.copytree(tmp_path / "whole", folder)
        path = folder / "2" / name
        content = DAMAGES[damage](path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)
        with Checkpoints(folder, config={"k": 4}, warn=warned.append) as checkpoints:
            saved = checkpoints.restore(LIKE)
            same(saved.state, STATE)
            assert saved.progress == {"position": saved.step}
            if saved.step == 1:
                fell_back += 1
                assert warned[0].startswith(f"{folder / '2'}: is damaged (")
                assert warned[1] == f"{folder}: went back to step 1."
                assert checkpoint.steps(folder) == [1]
            else:  # a file that nothing depends on
                assert (saved.step, warned) == (2, [])
            checkpoints.save(3, saved.state, progress=None, wait=True)
        assert checkpoint.steps(folder)[0] == 3
        shutil.rmtree(folder)
    assert fell_back >= 4


def test_if_every_step_is_damaged_that_is_an_error_and_nothing_is_removed(tmp_path):
    fill(tmp_path, (1, 2))
    for number in (1, 2):
        (tmp_path / str(number) / "state/_METADATA").unlink()
    warned = []
    with (
        Checkpoints(tmp_path, config={"k": 4}, warn=warned.append) as checkpoints,
        pytest.raises(InputError, match="every step is damaged; remove it to start over"),
    ):
        checkpoints.restore(LIKE)
    assert len(warned) == 2
    assert checkpoint.steps(tmp_path) == [2, 1]


def test_another_configuration_is_refused(tmp_path):
    fill(tmp_path / "run/checkpoints", (1,))
    with pytest.raises(InputError, match=r"run: holds another run \(got k 5, expected 4\); choose another --out"):
        Checkpoints(tmp_path / "run/checkpoints", config={"k": 5})
    with pytest.raises(InputError, match=r"got new 1, expected nothing"):
        Checkpoints(tmp_path / "run/checkpoints", config={"k": 4, "new": 1})


def test_a_member_of_the_configuration_may_grow(tmp_path):
    def opened(steps, k=4):
        return Checkpoints(tmp_path / "run/checkpoints", config={"k": k, "steps": steps}, grows={"steps"})

    for steps in (10, 20, 20):
        with opened(steps) as checkpoints:
            checkpoints.save(steps, {"x": jnp.ones(3)}, progress=None)
    with pytest.raises(InputError, match=r"got steps 10, expected 20 or more\); choose another"):
        opened(10)
    with pytest.raises(InputError, match=r"got k 5, expected 4\)"):
        opened(30, k=5)


def test_only_one_at_a_time_may_save_and_anyone_may_read(tmp_path):
    fill(tmp_path, (1,))
    with Checkpoints(tmp_path, config={"k": 4}) as first:
        refused = pytest.raises(InputError, match="another process writes there")
        with refused, Checkpoints(tmp_path, config={"k": 4}):
            pass
        assert Checkpoints(tmp_path, config={"k": 4}).restore(LIKE).step == 1
        first.save(2, STATE, progress=None)
    with Checkpoints(tmp_path, config={"k": 4}) as second:
        assert second.restore(LIKE).step == 2


def test_a_run_begun_between_opening_and_owning_is_seen(tmp_path):
    checkpoints = Checkpoints(tmp_path, config={"k": 5})
    fill(tmp_path, (1,))
    with pytest.raises(InputError, match=r"holds another run \(got k 5, expected 4\)"), checkpoints:
        pass
    with Checkpoints(tmp_path, config={"k": 4}):
        pass


OTHERS = {  # of another process: its steps, and those it can read
    "it lacks the last": ([1], {1}, 1),
    "it cannot read the last": ([2, 1], {1}, 1),
    "it has one more": ([3, 2, 1], {1, 2, 3}, 2),
    "it has none": ([], set(), None),
}


@pytest.mark.parametrize("case", OTHERS)
def test_processes_agree_on_the_last_step_that_all_can_read(case, tmp_path, monkeypatch):
    fill(tmp_path, (1, 2))
    steps, readable, agreed = OTHERS[case]
    asked, warned = [], []

    def of_all(value):  # this one and another
        if value is True or value is False:
            return [value, asked[-1] in readable]
        below = [step for step in steps if not asked or step < asked[-1]]
        asked.append(max([value, *below]))
        return [value, max([-1, *below])]

    monkeypatch.setattr(processes, "of_all", of_all)
    checkpoints = Checkpoints(tmp_path, config={"k": 4}, warn=warned.append)
    if agreed is None:
        with pytest.raises(InputError, match="every step is damaged"):
            checkpoints.restore(LIKE)
        assert checkpoint.steps(tmp_path) == [2, 1]
    else:
        assert checkpoints.restore(LIKE).step == agreed
        assert checkpoint.steps(tmp_path) == [2, 1][-agreed:]
        assert warned[-1] == f"{tmp_path}: went back to step {agreed}."
    assert f"{tmp_path / '2'}: is damaged (for another process)." in warned or case == "it has one more"


def test_other_libraries_are_told(tmp_path, monkeypatch):
    now = checkpoint.versions()
    monkeypatch.setattr(checkpoint, "versions", lambda: now | {"optax": "0.0.1"})
    fill(tmp_path, (1,))
    monkeypatch.undo()
    warned = []
    Checkpoints(tmp_path, config={"k": 4}, warn=warned.append).restore(LIKE)
    assert warned == [f"{tmp_path / '1'}: was saved by optax 0.0.1; results may differ in the last bits."]


def test_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_VERSION", 99)
    fill(tmp_path, (1,))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"1: is of version 99, expected 1; resume with the jaxsae that wrote it \(0"):
        Checkpoints(tmp_path, config={"k": 4})


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file/checkpoints", config=None)
    with pytest.raises(
        InputError, match=r"cannot write .*: no step was saved before|cannot write .*; no step was saved"
    ):
        checkpoints.save(1, STATE, progress=None, wait=True)


def test_echoes_of_a_failed_write_are_dropped_and_nothing_else(monkeypatch, caplog):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    echo = ValueError('OUT_OF_RANGE: Error writing "state.nu/0" in OCDBT database at local file "a": File too large')
    other = ValueError("Error writing a letter")
    with echoes.suppressed(), echoes.suppressed():
        for error in (echo, other):
            sys.unraisablehook(types.SimpleNamespace(exc_value=error))
            logging.getLogger("asyncio").error("Future exception was never retrieved", exc_info=error)
    assert [each.exc_value for each in heard] == [other]
    assert [record.exc_info[1] for record in caplog.records] == [other]


def process_settings():
    return sys.unraisablehook, list(logging.getLogger("asyncio").filters), list(warnings.filters)


def test_the_process_is_left_as_it_was(tmp_path):
    before = process_settings()
    fill(tmp_path, (1,))
    assert process_settings() == before
    Checkpoints(tmp_path, config={"k": 4}).restore(LIKE)
    assert process_settings() == before


def test_after_a_failure_echoes_alone_are_dropped(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    before = process_settings()
    for _ in range(2):
        with (
            echoes.suppressed(),
            pytest.raises(InputError, match="cannot write"),
            echoes.suppressed(),
            checkpoint._one_line(tmp_path),
        ):
            raise ValueError("a file")
    assert process_settings()[1:] == before[1:]
    late, other = RuntimeError("Event loop is closed"), ValueError("Error writing a letter")
    for error in (late, other):  # the first from a thread of TensorStore's
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert [each.exc_value for each in heard] == [other]


@pytest.mark.parametrize("then", ["", "error"], ids=["warned of", "a filter of the user's comes after ours"])
def test_a_reading_of_orbax_that_never_began_is_an_echo_and_no_other_coroutine(then, monkeypatch):
    async def _read_array_index_and_device_put():
        pass

    async def letter():
        pass

    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(unraisable.exc_value))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with echoes.suppressed():
            if then:
                warnings.simplefilter(then)
            for begin in (_read_array_index_and_device_put, letter):
                begin()  # and freed at once
    (only,) = heard + [each.message for each in caught]
    assert "letter' was never awaited" in str(only)


def test_a_step_opens_with_orbax_alone(tmp_path):
    """As docs/guides/training_jobs.md shows."""
    import orbax.checkpoint as ocp

    from jaxsae.app import runs
    from jaxsae.app.options import Options

    options = Options("topk", 16, k=2, batch=16, steps=3, heldout=16, auxk=False)
    runs.run(tmp_path / "run", data={"x": np.random.default_rng(0).standard_normal((64, 4))}, options=options)
    step = tmp_path / "run/checkpoints/3"
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(step / "state")["state"]
    saved = runs.load(step)
    np.testing.assert_array_equal(state["sae"]["W_dec"], saved.W_dec)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        manifest = reader.restore(step / "manifest")
    assert manifest["content"]["config"]["latents"] == 16
    np.testing.assert_allclose(state["sae"]["b_dec"] / manifest["content"]["extra"]["scale"], saved.b_dec, rtol=1e-6)
