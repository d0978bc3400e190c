"""SAEs wider than a device: each device holds its part, in evaluation, in files, and in what is converted."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from problems import activations, assert_same_bits, cli, every_activation

import jaxsae
from jaxsae import pretrained, sharding, train
from jaxsae._core import processes
from jaxsae._core.files import InputError
from jaxsae.app import evaluation, plan, runs
from jaxsae.app.options import Options
from jaxsae.app.units import Units
from jaxsae.autoencoder import calibration
from jaxsae.autoencoder.activations import top_k
from jaxsae.formats import tensors

D, M, K = 8, 64, 4
MESHES = pytest.mark.parametrize("shape", [(1, 8), (2, 4)], ids=str)


def under(shape):
    return jax.set_mesh(sharding.make_mesh(*shape))


def split(model):
    """The model, spread over the current mesh."""
    return jax.device_put(model, sharding.shardings(model, jax.sharding.get_mesh()))


def models():
    """One SAE of each activation, and transcoders with and without a skip connection."""
    found = {}
    for name, activation in every_activation(M, K).items():
        model = jaxsae.init(jax.random.key(0), d=D, m=M, activation=activation)
        found[name] = model.replace(b_enc=jnp.linspace(-0.1, 0.1, M), b_dec=jnp.linspace(-1, 1, D))
    transcoder = dataclasses.replace(found["TopK"], apply_b_dec_to_input=False, transcoder=True)
    skip = dataclasses.replace(transcoder, W_skip=jnp.arange(D * D, dtype=jnp.float32).reshape(D, D))
    return found | {"transcoder": transcoder, "skip connection": skip}


EVERY = models()
every_model = pytest.mark.parametrize("name", EVERY)
OTHERS = [name for name, model in EVERY.items() if not model.transcoder and name != "JumpReLU"]


# --- Pieces


def arrays():
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    return {
        "matrix": x,
        "transposed": x.T,
        "big-endian": x.astype(">f4"),
        "vector": x[:, 0],
        "number": np.array(-0.0, np.float32),
        "empty": np.zeros((0, 3), np.float16),
        "flags": np.array([True, False, True]),
        "bfloat16": np.array([1.5, -0.0, np.inf], ml_dtypes.bfloat16),
        "integers": np.arange(5),
    }


@pytest.mark.parametrize("bytes_", [1, 9, 16, 40, 1 << 20])
def test_pieces_are_the_array(bytes_, monkeypatch):
    monkeypatch.setattr(processes, "_PIECE", bytes_)
    for name, x in arrays().items():
        found = np.full(x.shape, 7, x.dtype)
        for place, piece in processes.pieces(x):
            assert piece.nbytes <= max(bytes_, x.itemsize)
            found[place] = piece
        np.testing.assert_array_equal(found, x, err_msg=name)


SPECS = [("latent", None), (None, "latent"), (("data", "latent"), None), (None, None)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_pieces_of_a_split_array_are_its_parts(spec, monkeypatch):
    monkeypatch.setattr(processes, "_PIECE", 64)
    x = np.arange(16 * 32, dtype=np.float32).reshape(16, 32)
    placed = jax.device_put(x, jax.NamedSharding(sharding.make_mesh(2, 4), jax.P(*spec)))
    found, seen = np.zeros_like(x), 0
    for place, piece in processes.pieces(placed):
        found[place] = piece
        seen += piece.size
    np.testing.assert_array_equal(found, x)
    assert seen == x.size  # parts that several devices hold are read once


@pytest.mark.parametrize("bytes_", [1, 40, 1 << 20])
def test_the_safetensors_library_reads_what_is_written_in_pieces(bytes_, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_PIECE", bytes_)
    ready = {name: tensors.ready(x, name) for name, x in arrays().items()}
    tensors.write_safetensors(tmp_path / "x.safetensors", ready)
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    for name, x in arrays().items():
        assert found[name].shape == x.shape
        assert_same_bits(found[name], np.ascontiguousarray(x.astype(x.dtype.newbyteorder("="))).reshape(x.shape))


# --- In files


@MESHES
@every_model
def test_what_a_mesh_saves_is_what_one_device_saves(name, shape, tmp_path):
    model = EVERY[name]
    pretrained.save(model, tmp_path / "whole")
    with under(shape):
        pretrained.save(split(model), tmp_path / "split")
        loaded = pretrained.load(tmp_path / "split")
        where = sharding.shardings(model, jax.sharding.get_mesh())
    for file in ("sae.json", "sae.safetensors"):
        assert (tmp_path / "split" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    for leaf, original, wanted in zip(*map(jax.tree.leaves, (loaded, model, where)), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        assert_same_bits(leaf, jnp.asarray(original))  # which may be a number


FORMATS = {
    "saelens": ["ReLU", "TopK", "JumpReLU", "BatchTopK", "Gated", "MatchingPursuit"],
    "gemma_scope": ["JumpReLU"],
    "gemma_scope_2": ["JumpReLU"],
    "sparsify": ["TopK", "skip connection"],
    "dictionary_learning": ["ReLU", "TopK", "Gated"],
    "openai": ["ReLU"],
    "llama_scope": ["ReLU"],
}


@pytest.mark.parametrize("format, name", [(format, name) for format, names in FORMATS.items() for name in names])
def test_what_a_mesh_converts_is_what_one_device_converts(format, name, tmp_path):
    pretrained.save(EVERY[name], tmp_path / "whole.pt", format=format)
    with under((2, 4)):
        pretrained.save(split(EVERY[name]), tmp_path / "split.pt", format=format)
    files = [sorted(path.rglob("*")) or [path] for path in (tmp_path / "whole.pt", tmp_path / "split.pt")]
    assert len(files[0]) == len(files[1])
    for a, b in zip(*files, strict=True):
        assert a.is_dir() or a.read_bytes() == b.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["split.pt", "whole.pt"]  # nothing is left beside them


def test_latents_that_a_mesh_does_not_divide_are_one_line(tmp_path):
    pretrained.save(jaxsae.init(jax.random.key(0), d=D, m=30, activation=jaxsae.TopK(K)), tmp_path / "sae")
    with under((2, 4)), pytest.raises(InputError, match=r"got 30 latents for a mesh that splits them 4 ways; pass"):
        pretrained.load(tmp_path / "sae")


# --- What is computed


@pytest.mark.parametrize("shape", [(2, 4), pytest.param((1, 8), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", ["JumpReLU", *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)])
def test_an_evaluation_has_the_same_numbers(name, shape):
    x = np.asarray(activations(batch=(300,), d=D))
    expected = evaluation.evaluate(EVERY[name], x)
    with under(shape):
        found = evaluation.evaluate(split(EVERY[name]), x)
    assert found.keys() == expected.keys()
    for number in ("nmse", "explained_variance", "l0", "dead"):
        np.testing.assert_allclose(found[number], expected[number], rtol=1e-4, atol=1e-6)
    assert (found["firing"], found["rows"]) == (expected["firing"], expected["rows"])


def test_refined_files_have_the_same_codes(tmp_path):
    np.save(tmp_path / "x.npy", activations(batch=(300,), d=D))
    pretrained.save(EVERY["TopK"], tmp_path / "sae")
    few = ["refine", "--sae", tmp_path / "sae", "--data", tmp_path / "x.npy", "--json"]
    assert cli(*few, "--out", tmp_path / "whole.npz") == 0
    assert cli(*few, "--out", tmp_path / "split.npz", "--mesh", 2, 4) == 0
    whole, found = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "split.npz")
    np.testing.assert_array_equal(found["indices"], whole["indices"])
    np.testing.assert_array_equal(found["status"], whole["status"])
    np.testing.assert_allclose(found["values"], whole["values"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["BatchTopK", "JumpReLU"])
def test_thresholds_are_calibrated_to_the_same_number(name):
    x = np.asarray(activations(batch=(296,), d=D))
    expected = calibration.calibrate(EVERY[name], [x], 3.0)
    with under((2, 4)):
        rows = sharding.make_global_batch(x, len(x), 0)
        found = calibration.calibrate(split(EVERY[name]), [rows], 3.0)
    assert_same_bits(found.activation.threshold, expected.activation.threshold)


# --- A run


@pytest.fixture
def largest(monkeypatch):
    """The size of the largest part of an array on any device, whenever something is saved, measured or written."""
    before, sizes = {id(x) for x in jax.live_arrays()}, []

    def look():
        new = [x for x in jax.live_arrays() if id(x) not in before and not x.is_deleted()]
        sizes.append(max(shard.data.nbytes for x in new for shard in x.addressable_shards))

    def watched(module, name):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            look()
            found = original(*args, **kwargs)
            look()
            return found

        monkeypatch.setattr(module, name, wrapped)

    watched(runs.checkpoint.Checkpoints, "save")
    watched(runs.pretrained, "save")
    watched(evaluation, "_measure")
    watched(tensors, "_write_at")
    return sizes


def test_no_device_ever_holds_more_than_its_part(tmp_path, largest):
    d, m = 32, 1 << 15
    x = np.random.default_rng(0).normal(size=(200, d)).astype(np.float32)
    options = Options("batchtopk", latents=m, k=K, batch=16, steps=2, heldout=100)
    with under((1, 8)):
        report = runs.run(tmp_path / "run", data={"x": x}, options=options)
        again = runs.load(tmp_path / "run/checkpoints/2")
        pretrained.save(again, tmp_path / "export", format="saelens")
    assert report["heldout"]["rows"] == 100
    assert len(largest) > 20
    assert max(largest) <= 1.1 * 4 * m * d / 8


def test_a_save_of_a_run_is_an_sae(tmp_path, capsys):
    np.save(tmp_path / "x.npy", 7 * np.asarray(activations(batch=(300,), d=D)))
    few = ["--data", tmp_path / "x.npy", "--activation", "topk", "--k", K, "--latents", M, "--batch", 32]
    assert cli("train", *few, "--heldout", 64, "--steps", 6, "--save-every", 0, "--out", tmp_path / "run") == 0
    save = tmp_path / "run/checkpoints/6"
    assert cli("convert", save, tmp_path / "sae", "--to", "jaxsae") == 0
    for file in ("sae.json", "sae.safetensors"):
        assert (tmp_path / "sae" / file).read_bytes() == (tmp_path / "run/sae" / file).read_bytes()
    assert cli("eval", "--sae", tmp_path / "run/checkpoints/5", "--data", tmp_path / "x.npy", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["l0"] == K
    with under((2, 4)):
        assert_same_bits(runs.load(save).W_dec, pretrained.load(tmp_path / "sae").W_dec)
    (save / "manifest/metadata").write_text("{}")
    assert cli("convert", save, tmp_path / "other", "--to", "jaxsae") == 2
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


# --- A training step


@pytest.mark.parametrize("shape", [(5, 8), (1, 64), (7, 24)], ids=str)
@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal", "few positive", "with NaN"])
def test_the_largest_of_a_batch_are_found_by_counting(kind, shape):
    rng, size = np.random.default_rng(0), shape[0] * shape[1]
    z = np.maximum(rng.normal(size=shape), 0).astype(np.float32)
    if kind == "ties":
        z = np.round(2 * z) / 2
    elif kind == "all equal":
        z[:] = 1.5
    elif kind == "few positive":
        z[rng.random(shape) < 0.9] = 0
    elif kind == "with NaN":
        z[0, :2] = np.nan
    find = jax.jit(top_k._beyond, static_argnums=1)
    for count in {1, 2, size // 3, size // 2, size - 1, size}:
        if count <= np.isnan(z).sum():  # then the batch is skipped
            assert np.isnan(np.where(find(z, count), 0, z)).sum() == 2
            continue
        expected = np.where(top_k.dropped(jnp.asarray(z.reshape(-1)), count), 0, z.reshape(-1)).reshape(shape)
        np.testing.assert_array_equal(np.where(find(z, count), 0, z), expected, err_msg=str(count))


@pytest.mark.parametrize("digits", [1, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_so_are_those_of_other_dtypes_and_on_accelerators(dtype, digits, monkeypatch):
    monkeypatch.setattr(sharding, "on_cpu", lambda: digits == 1)
    z = jnp.asarray(np.maximum(np.random.default_rng(1).normal(size=(6, 32)), 0), dtype)
    for count in (1, 50, 191):
        expected = jnp.where(top_k.dropped(z.reshape(-1), count), 0, z.reshape(-1)).reshape(z.shape)
        np.testing.assert_array_equal(jnp.where(top_k._beyond(z, count), 0, z), expected)


def test_counts_beyond_32_bits():
    by_row = np.array([2**31 - 1, 2**31 - 1, 5], np.int64)
    high, low = top_k._split_sum(jnp.asarray(by_row, jnp.int32))
    assert (int(high) << 12) + int(low) == by_row.sum()


FAMILIES = {"topk": {"k": K}, "jumprelu": {"k": K}, "relu": {"l1": 0.1}, "gated": {"l1": 0.1}, "groupmax": {"k": K}}
FAMILIES |= {"abstopk": {"k": K}, "matryoshka": {"k": K}, "matchingpursuit": {"k": K}, "alignedrelu": {"l1": 0.1}}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("shape", [(2, 4), pytest.param((1, 8), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("family", ["batchtopk", *SLOW])
def test_a_step_exchanges_neither_weights_nor_pre_activations(family, shape):
    d, m, b = 16, 4096, 256
    options = Options(family, latents=m, batch=b, steps=2, **FAMILIES.get(family, {"k": K}))
    program = plan.training_step(options, d, sharding.make_mesh(*shape))
    exchanged = [size for kind, size in program.collectives if kind != "all-reduce"]
    assert max(exchanged, default=0) < 4 * m * d // 8


def test_a_batch_top_k_has_the_same_numbers():
    options = Options("batchtopk", latents=M, k=K, batch=64, steps=5)
    objective, tx, init_fn = runs.recipe(options, Units(jnp.zeros(D)))
    step, x, found = train.make_step(objective, tx), np.asarray(activations(batch=(64,), d=D)), []
    for shape in ((1, 1), (2, 4)):
        with under(shape):
            state = sharding.create(init_fn)
            for _ in range(5):
                state, shown = step(state, sharding.make_global_batch(x, 64, 0))
        found.append((float(shown["loss"]), float(state.sae.activation.threshold), np.asarray(state.sae.W_dec)))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-5)
    np.testing.assert_allclose(found[1][2], found[0][2], atol=2e-5)
