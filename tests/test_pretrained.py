import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from problems import activations, assert_same_bits, full_disk, sae

import jaxsae
from jaxsae import pretrained
from jaxsae._core.files import InputError
from jaxsae.formats import tensors


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("activation", [jaxsae.ReLU(), jaxsae.TopK(4)], ids=["ReLU", "TopK"])
def test_the_round_trip_is_exact(activation, dtype, tmp_path):
    model = sae(activation=activation, dtype=dtype)
    pretrained.save(model, tmp_path / "sae")
    loaded = pretrained.load(tmp_path / "sae")
    assert_same_bits(loaded, model)
    assert jax.tree.structure(loaded) == jax.tree.structure(model)  # the activation and its k
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}
    x = activations(dtype=dtype)
    assert_same_bits(jaxsae.encode_dense(loaded, x), jaxsae.encode_dense(model, x))


def test_the_round_trip_of_float64(x64, tmp_path):
    model = sae(dtype=np.float64)
    pretrained.save(model, tmp_path / "sae")
    loaded = pretrained.load(tmp_path / "sae")
    assert_same_bits(loaded, model)
    assert loaded.W_dec.dtype == np.float64


def test_paths_may_be_strings_and_the_format_named(tmp_path):
    pretrained.save(sae(), str(tmp_path / "a" / "sae"), format="jaxsae")
    assert_same_bits(pretrained.load(str(tmp_path / "a" / "sae"), format="jaxsae"), sae())


def test_a_saved_sae_is_replaced(tmp_path):
    pretrained.save(sae(0), tmp_path / "sae")
    pretrained.save(sae(1, activation=jaxsae.ReLU()), tmp_path / "sae")
    assert_same_bits(pretrained.load(tmp_path / "sae"), sae(1, activation=jaxsae.ReLU()))
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("kind", ["file", "directory", "empty directory"])
def test_nothing_else_is_replaced(kind, tmp_path):
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        if kind == "directory":
            (path / "a.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="exists and is not a saved SAE; choose another place") as caught:
        pretrained.save(sae(), path)
    assert str(path) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*sae"):
        pretrained.save(sae(), tmp_path / "file" / "sae")


def test_an_sae_that_fails_to_save_leaves_the_old_one(tmp_path, monkeypatch):
    pretrained.save(sae(), tmp_path / "sae")

    monkeypatch.setattr(tensors, "_write_at", full_disk)
    with pytest.raises(OSError, match="No space"):
        pretrained.save(sae(1), tmp_path / "sae")
    assert_same_bits(pretrained.load(tmp_path / "sae"), sae())
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("call", [pretrained.load, lambda path, format: pretrained.save(sae(), path, format=format)])
def test_an_unknown_format(call, tmp_path):
    pretrained.save(sae(), tmp_path / "sae")
    with pytest.raises(InputError, match="got format 'numpy', expected one of: jaxsae"):
        call(tmp_path / "sae", format="numpy")


# --- Damage: each entry spoils a saved TopK SAE.


def config(**changes):
    """Change entries of `sae.json`; None removes one."""

    def spoil(path):
        saved = json.loads((path / "sae.json").read_text()) | changes
        (path / "sae.json").write_text(json.dumps({k: v for k, v in saved.items() if v is not None}))

    return spoil


def weights(**changes):
    """Change arrays of `sae.safetensors`; None removes one."""

    def spoil(path):
        saved = safetensors.numpy.load_file(path / "sae.safetensors") | changes
        safetensors.numpy.save_file({k: v for k, v in saved.items() if v is not None}, path / "sae.safetensors")

    return spoil


def rewrite(name, change):
    """Change the bytes of a file."""
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def remove(name):
    return lambda path: (path / name).unlink()


def file_instead(path):
    shutil.rmtree(path)
    path.write_text("not a directory")


def weights_are_a_directory(path):
    (path / "sae.safetensors").unlink()
    (path / "sae.safetensors").mkdir()


DAMAGE = {
    "nothing there": shutil.rmtree,
    "not a directory": file_instead,
    "no weights": remove("sae.safetensors"),
    "no config": remove("sae.json"),
    "weights are a directory": weights_are_a_directory,
    "empty weights": rewrite("sae.safetensors", lambda content: b""),
    "truncated weights": rewrite("sae.safetensors", lambda content: content[:-100]),
    "truncated header": rewrite("sae.safetensors", lambda content: content[:20]),
    "weights are garbage": rewrite("sae.safetensors", lambda content: b"\xff" * 1000),
    "empty config": rewrite("sae.json", lambda content: b""),
    "truncated config": rewrite("sae.json", lambda content: content[:40]),
    "config is binary": rewrite("sae.json", lambda content: b"\xff\xfe\x00"),
    "config is no object": rewrite("sae.json", lambda content: b"[1, 2]"),
    "newer version": config(version=99),
    "version is true": config(version=True),
    "no version": config(version=None),
    "another format": config(format="saelens"),
    "no format": config(format=None),
    "no width": config(d=None),
    "no size": config(m=None),
    "another size": config(m=33),
    "size is text": config(m="32"),
    "no activation": config(activation=None),
    "activation is text": config(activation="TopK"),
    "unknown activation": config(activation={"name": "Softmax"}),
    "activation without a name": config(activation={"k": 4}),
    "TopK without k": config(activation={"name": "TopK"}),
    "TopK of 0": config(activation={"name": "TopK", "k": 0}),
    "TopK of text": config(activation={"name": "TopK", "k": "4"}),
    "TopK of more than there are": config(activation={"name": "TopK", "k": 33}),
    "TopK with more options": config(activation={"name": "TopK", "k": 4, "threshold": 1}),
    "an array is missing": weights(b_enc=None),
    "an array of another shape": weights(W_dec=np.zeros((16, 32), np.float32)),
    "an array of integers": weights(W_dec=np.zeros((32, 16), np.int32)),
    "an unknown parameter": weights(**{"activation.threshold": np.zeros(32, np.float32)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_sae_is_refused_in_one_line_that_names_it(damage, tmp_path):
    path = tmp_path / "sae"
    pretrained.save(sae(m=32), path)
    DAMAGE[damage](path)
    with pytest.raises(InputError) as caught:
        pretrained.load(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert text.endswith(".")


@pytest.mark.parametrize("damage", ["nothing there", "not a directory", "no config"])
def test_the_format_when_named_must_be_there(damage, tmp_path):
    path = tmp_path / "sae"
    pretrained.save(sae(m=32), path)
    DAMAGE[damage](path)
    with pytest.raises(InputError, match="expected") as caught:
        pretrained.load(path, format="jaxsae")
    assert str(caught.value).startswith(str(path))


def test_what_is_said_about_the_common_ones(tmp_path):
    path = tmp_path / "sae"
    for damage, message in {
        "nothing there": "no such file or directory; expected a saved SAE",
        "newer version": "says 'jaxsae' version 99, expected 'jaxsae' version 1",
        "version is true": "says 'jaxsae' version True, expected 'jaxsae' version 1",
        "unknown activation": "activation 'Softmax' is unknown, expected one of ReLU, TopK",
        "no config": "not an SAE of a known format",
        "an array is missing": "holds shapes",
    }.items():
        shutil.rmtree(path, ignore_errors=True)
        pretrained.save(sae(m=32), path)
        DAMAGE[damage](path)
        with pytest.raises(InputError, match=message):
            pretrained.load(path)
