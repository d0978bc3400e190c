"""The kernels, interpreted, against the reference and float64; compiled for TPUs and lowered for GPUs, without either."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, use_abstract_mesh
from jax.sharding import PartitionSpec as P
from problems import f64, optimum

import jaxsae
from jaxsae import codes, gram, kernels
from jaxsae.kernels import reference, tuning

# Shapes of every kind, small ones by default: (rows, d, m, k, dtype).
QUICK = [
    (5, 64, 40, 6, "float32"),  # padding on every side
    (3, 72, 40, 33, "bfloat16"),
]
SLOW = [
    (9, 64, 512, 1, "float32"),
    (130, 100, 300, 7, "float32"),  # more than one block
    (20, 200, 512, 16, "float32"),
    (9, 768, 512, 32, "float32"),
    (9, 768, 512, 32, "bfloat16"),
    (4, 1000, 600, 100, "float32"),
    (2, 4096, 512, 128, "bfloat16"),
    (2, 2304, 512, 64, "float32"),
    (2, 300, 1024, 257, "float32"),  # no kernel has room for its solver
    (1, 4096, 1024, 512, "float32"),
]
TABLE = [*QUICK, *(pytest.param(shape, marks=pytest.mark.slow) for shape in SLOW)]
over_shapes = pytest.mark.parametrize("shape", TABLE, ids=lambda shape: "-".join(map(str, shape)))
both = pytest.mark.parametrize("platform", ["tpu", "gpu"])


class Case(NamedTuple):
    D: jax.Array
    indices: jax.Array
    y: jax.Array
    z0: jax.Array


def case(shape, seed=0) -> Case:
    """Coherent atoms; a row with unused slots, one with an atom twice, one of NaN where there are enough rows."""
    n, d, m, k, dtype = shape
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(m, d)) + 0.5 * rng.normal(size=d)
    indices = np.argsort(rng.random((n, m)), axis=1)[:, :k].astype(np.int32)
    z = rng.exponential(size=(n, k))
    y = np.einsum("nk,nkd->nd", z, atoms[indices]) + rng.normal(size=(n, d))
    z = z * rng.uniform(0.5, 1.5, z.shape)
    indices[0, k // 2 :] = m
    if k > 1:
        indices[-1, -1] = indices[-1, 0]
    if n > 2:
        y[1] = np.nan
        y[2] = 0
    used = indices < m
    return Case(
        jnp.asarray(atoms, dtype), jnp.asarray(indices), jnp.asarray(y, jnp.float32), jnp.asarray(z * used, jnp.float32)
    )


@functools.cache
def interpreted(platform: str) -> SimpleNamespace:
    """The kernels of a platform on a CPU: on TPUs with the checks of races, of bounds, and NaN in fresh memory."""
    if platform == "gpu":
        from jaxsae.kernels import gpu as module

        interpret = True
    else:
        from jax.experimental.pallas import tpu as pltpu

        from jaxsae.kernels import tpu as module

        interpret = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")

    def call(f, *args, **options):
        # A program that failed leaves the interpreter's memory behind.
        return f(*args, **(options | {"interpret": interpret}))

    names = ("gather_gram", "gather_decode", "solve", "scatter_sorted")
    return SimpleNamespace(**{name: functools.partial(call, getattr(module, name)) for name in names})


@pytest.fixture
def on(monkeypatch):
    """Pretend to be on a platform, its kernels interpreted."""

    def pretend(platform):
        device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform=platform)
        module = interpreted(platform)
        monkeypatch.setattr(kernels, "_device", lambda: (platform, device.device_kind))
        monkeypatch.setattr(kernels.importlib, "import_module", lambda name: module)
        jax.clear_caches()
        for cached in (kernels._scatter,):
            cached.cache_clear()

    yield pretend
    jax.clear_caches()
    kernels._scatter.cache_clear()


def no_races():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    return not interpreter.races.races_found


def products64(c: Case):
    D = np.concatenate([f64(c.D), np.zeros((1, c.D.shape[1]))])
    atoms = D[np.asarray(c.indices)]
    return np.einsum("nid,njd->nij", atoms, atoms), np.einsum("nid,nd->ni", atoms, f64(c.y)), atoms


# --- The kernels themselves


@both
@over_shapes
def test_gram_matrices_are_those_of_float64(platform, shape):
    c = case(shape)
    G, correlation, _ = products64(c)
    answers = [reference.gather_gram(*c[:3])]
    try:
        answers.append(kernels._masked(c.D, c.indices, interpreted(platform).gather_gram(*c[:3])))
    except NotImplementedError:
        assert shape[3] > 256  # VMEM
    for got, got_c in answers:
        np.testing.assert_allclose(got, G, atol=1e-6 * np.nanmax(np.abs(G)))
        np.testing.assert_allclose(got_c, correlation, atol=1e-5 * np.nanmax(np.abs(correlation)))
    assert platform == "gpu" or no_races()


@both
@over_shapes
def test_decoded_rows_are_those_of_float64(platform, shape):
    c = case(shape)
    x = np.einsum("nk,nkd->nd", f64(c.z0), products64(c)[2])
    poisoned = jnp.where(c.indices < shape[2], c.z0, jnp.nan)  # what unused slots hold does not count
    for decode in (reference.gather_decode, interpreted(platform).gather_decode):
        np.testing.assert_allclose(decode(c.D, c.indices, poisoned), x, atol=2e-6 * np.abs(x).max())
    assert platform == "gpu" or no_races()


@both
@over_shapes
def test_the_fused_refit_is_that_of_the_reference(platform, shape):
    c = case(shape)
    ridge, tol, most = jnp.float32(0.01), jnp.float32(1e-5), jnp.int32(2000)
    wanted = reference.solve(c.D, c.indices, c.y, c.z0, ridge, tol, most, nonnegative=True)
    _, scale, norm = gram.scaled(c.y)
    try:
        x, square, usable, kkt, steps = interpreted(platform).solve(
            c.D, c.indices, c.y, scale, norm, c.z0, ridge, tol, most, nonnegative=True
        )
    except NotImplementedError:
        assert shape[3] > 128
        return
    _, units = gram.measure(square, gram.used(c.indices, shape[2]), scale, norm, ridge)
    np.testing.assert_array_equal(units.finite, wanted.finite)
    good = np.asarray(wanted.finite)
    assert good.any()
    np.testing.assert_allclose(units.unit[good], wanted.unit[good], rtol=2e-5)
    np.testing.assert_array_equal(usable[good], wanted.usable[good])
    # Rounding may cost or save the last step, and where atoms depend on each other moves the answer along them.
    np.testing.assert_array_less(kkt[good], 1e-5)
    np.testing.assert_array_less(np.abs(steps - wanted.steps)[good], 5 + 0.2 * wanted.steps[good])
    fitted = [
        np.einsum("nk,nkd->nd", f64(v.x), 1 / np.maximum(f64(v.unit), 1e-30)[:, :, None] * products64(c)[2])
        for v in (SimpleNamespace(x=x, unit=units.unit), wanted)
    ]
    size = np.linalg.norm(f64(c.y), axis=1, keepdims=True)
    np.testing.assert_array_less(np.abs(fitted[0] - fitted[1])[good], 1e-3 * np.maximum(size, 1e-30)[good])
    assert platform == "gpu" or no_races()


@both
@over_shapes
@pytest.mark.parametrize("rank", [1, 2])
def test_scattered_rows_are_those_of_float64(platform, shape, rank):
    n, d, m, k, _ = shape
    c = case(shape)
    rng = np.random.default_rng(1)
    left, right = rng.normal(size=(n, k, rank)).astype(np.float32), rng.normal(size=(n, rank, d)).astype(np.float32)
    wanted = np.zeros((m + 1, d))
    np.add.at(wanted, np.asarray(c.indices), np.einsum("nkr,nrd->nkd", f64(left), f64(right)))
    order = codes.by_latent(c.indices, m)
    places = c.indices.ravel()[order], order // k, left.reshape(n * k, rank)[order], jnp.asarray(right)
    for got in (
        reference.scatter_rows(c.indices, left, right, m=m),
        interpreted(platform).scatter_sorted(*places, m=m),
    ):
        np.testing.assert_allclose(got, wanted[:m], atol=1e-5)
    assert platform == "gpu" or no_races()
