"""The kernels, interpreted, against the reference and float64; compiled for TPUs and lowered for GPUs without one."""

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
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, PartitionSpec as P, use_abstract_mesh
from problems import f64, optimum

import jaxsae
from jaxsae import SparseCode, codes, kernels, sharding
from jaxsae._core import sparse
from jaxsae.least_squares import problems
from jaxsae.least_squares.kernels import choice, ops, tuning

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
SCATTERS = [(1, QUICK[0]), *((2, shape) for shape in QUICK)]
SCATTERS += [pytest.param(2, shape, marks=pytest.mark.slow) for shape in SLOW]
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
def interpreted(platform: str, checked: bool = True) -> SimpleNamespace:
    """The kernels of a platform on a CPU: for TPUs with the checks of races, of bounds, and NaN in fresh memory."""
    if platform == "gpu":
        from jaxsae.least_squares.kernels import gpu as module

        interpret = True
    else:
        from jax.experimental.pallas import tpu as pltpu

        from jaxsae.least_squares.kernels import tpu as module

        checks = {"detect_races": True, "out_of_bounds_reads": "raise", "uninitialized_memory": "nan"}
        interpret = pltpu.InterpretParams(**checks) if checked else True

    def call(f, *args, **options):
        return f(*args, **options, interpret=interpret)

    names = ("gather_gram", "gather_decode", "solve", "scatter_sorted")
    return SimpleNamespace(**{name: functools.partial(call, getattr(module, name)) for name in names})


@pytest.fixture
def on(monkeypatch):
    """Pretend to be on a platform, its kernels interpreted."""

    def pretend(platform, checked=True):
        device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform=platform)
        module = interpreted(platform, checked)
        monkeypatch.setattr(choice, "device", lambda: (platform, device.device_kind))
        monkeypatch.setattr(choice, "_module", lambda name: module)
        jax.clear_caches()

    yield pretend
    jax.clear_caches()


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
    answers = [kernels.gather_gram(*c[:3], implementation="xla")]
    try:
        answers.append(ops._masked(c.D, c.indices, interpreted(platform).gather_gram(*c[:3])))
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
    for found in (
        codes.decode(c.D, SparseCode(poisoned, c.indices, shape[2])),
        interpreted(platform).gather_decode(c.D, c.indices, poisoned),
    ):
        np.testing.assert_allclose(found, x, atol=2e-6 * np.abs(x).max())
    assert platform == "gpu" or no_races()


@both
@over_shapes
def test_the_fused_refit_is_that_of_the_reference(platform, shape):
    c = case(shape)
    checked = shape == QUICK[0]  # the checks take milliseconds an access to memory, of which a solver makes thousands
    ridge, tol, most = jnp.float32(0.01), jnp.float32(1e-5), jnp.int32(2000)
    wanted = ops.solve(c.D, c.indices, c.y, c.z0, ridge, tol, most, True, implementation="xla")
    _, scale, norm = problems.scaled(c.y)
    try:
        x, square, warm_started, kkt, steps = interpreted(platform, checked).solve(
            c.D, c.indices, c.y, scale, norm, c.z0, ridge, tol, most, nonnegative=True
        )
    except NotImplementedError:
        assert shape[3] > 128
        return
    _, unit, _, finite = problems.measure(square, sparse.used(c.indices, shape[2]), scale, norm, ridge)
    np.testing.assert_array_equal(finite, wanted.finite)
    good = np.asarray(wanted.finite)
    assert good.any()
    np.testing.assert_allclose(unit[good], wanted.unit[good], rtol=2e-5)
    np.testing.assert_array_equal(warm_started[good], wanted.warm_started[good])
    # Rounding may cost or save the last step, and where atoms depend on each other moves the answer along them.
    np.testing.assert_array_less(kkt[good], 1e-5)
    np.testing.assert_array_less(np.abs(steps - wanted.steps)[good], 5 + 0.2 * np.asarray(wanted.steps)[good])
    atoms = products64(c)[2]

    def fitted(x, unit):
        unit = f64(unit)
        z = np.where(unit > 0, f64(x) / np.where(unit > 0, unit, 1), 0)
        return np.einsum("nk,nkd->nd", z, atoms)[good]

    far = np.abs(fitted(x, unit) - fitted(wanted.x, wanted.unit)).max(1)
    assert (far <= 1e-3 * np.linalg.norm(f64(c.y), axis=1)[good]).all()
    assert not checked or platform == "gpu" or no_races()


@both
@pytest.mark.parametrize(("rank", "shape"), SCATTERS, ids=str)
def test_scattered_rows_are_those_of_float64(platform, shape, rank):
    n, d, m, k, _ = shape
    c = case(shape)
    rng = np.random.default_rng(1)
    left, right = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((n, k, rank), (n, rank, d)))
    wanted = np.zeros((m + 1, d))
    np.add.at(wanted, np.asarray(c.indices), np.einsum("nkr,nrd->nkd", f64(left), f64(right)))
    order = sparse.by_latent(c.indices, m)
    places = c.indices.ravel()[order], order // k, left.reshape(n * k, rank)[order], right
    by_xla = kernels.scatter_rows(c.indices, left, right, num_latents=m)
    for got in (by_xla, interpreted(platform).scatter_sorted(*places, m=m)):
        np.testing.assert_allclose(got, wanted[:m], atol=1e-5)
    assert platform == "gpu" or no_races()


# --- The operations


SHAPE = QUICK[0]


def sound(shape=SHAPE) -> Case:
    """Rows of which all are finite."""
    c = case(shape)
    return c._replace(y=jnp.where(jnp.isfinite(c.y), c.y, 1.0))


def test_the_refit_is_optimal():
    c = sound((6, 16, 32, 5, "float32"))
    z, kkt, steps = kernels.refit_fused(c.D, c.indices, c.y, c.z0, tol=1e-6)
    code = jaxsae.SparseCode(z, c.indices, 32)
    best = optimum(c.D, c.y, code)
    distinct = slice(0, 5)  # in the last row an atom stands twice
    np.testing.assert_allclose(z[distinct], best.values[distinct], atol=1e-4)
    np.testing.assert_array_less(kkt, 1e-6)
    assert (steps > 0).any() and np.all(z[np.asarray(c.indices) == 32] == 0)


def test_the_refit_is_that_of_the_library():
    c = case((6, 16, 32, 5, "float32"))
    z, kkt, steps = kernels.refit_fused(c.D, c.indices, c.y, c.z0)
    refitted, info = jaxsae.refit(c.D, c.y, jaxsae.SparseCode(c.z0, c.indices, 32), jaxsae.FISTA())
    np.testing.assert_allclose(z, refitted.values, atol=1e-5)
    np.testing.assert_array_equal(np.isnan(kkt), np.isnan(info.kkt))
    np.testing.assert_array_equal(steps[:-1], info.steps[:-1])  # the last row was refined


def everything(c: Case, implementation=None):
    """Each operation on the same rows."""
    how = {"implementation": implementation}
    return (
        kernels.gather_gram(c.D, c.indices, c.y, **how),
        kernels.gather_decode(c.D, c.indices, c.z0, **how),
        kernels.refit_fused(c.D, c.indices, c.y, c.z0, ridge=0.1, tol=1e-7, **how),
    )


def scattered(c: Case, implementation=None):
    return codes.scatter_add(SparseCode(c.z0, c.indices, len(c.D)), c.y, implementation=implementation)


def assert_close_to_largest(a, b, tolerance=1e-5):
    def compare(a, b):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, float(jnp.abs(b).max())))

    jax.tree.map(compare, a, b)


def without_steps(outputs):
    """Rounding may cost or save the last step: the residual then differs, the values hardly."""
    (gram_, c), x, (z, *_) = outputs
    return gram_, c, x, z


def test_vmap_and_any_leading_batch_are_the_batch():
    c = sound((6, 16, 32, 5, "float32"))
    folded = Case(c.D, *(x.reshape(2, 3, -1) for x in c[1:]))
    flat = jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), everything(folded))
    assert_close_to_largest(flat, everything(c))
    assert_close_to_largest(jax.vmap(everything, (Case(None, 0, 0, 0),))(c), everything(c))
    assert_close_to_largest(scattered(folded), scattered(c))
    empty = everything(Case(c.D, *(x[:0] for x in c[1:])))
    assert jax.tree.map(lambda x: x.shape[0], empty) == jax.tree.map(lambda x: 0, empty)


def weighted(c: Case, implementation=None):
    """One number that depends on everything."""
    (G, correlation), x, (z, *_) = everything(c, implementation)
    rng = np.random.default_rng(7)
    return sum(jnp.sum(x * rng.normal(size=x.shape).astype(x.dtype)) for x in (G, correlation, x, z))


def scattered_weighted(left, right, indices, implementation=None):
    out = codes.scatter_add(SparseCode(left, indices, 32), right, implementation=implementation)
    return jnp.sum(out * np.random.default_rng(8).normal(size=out.shape).astype(out.dtype))


def test_gradients_are_those_of_finite_differences(x64):
    c = sound((4, 16, 32, 5, "float32"))
    c = c._replace(y=c.y.at[2].set(c.y[3] + 1))  # a target of 0 has no derivative
    # No atom twice, and targets for which the constraint does not change sides within a difference.
    indices = c.indices.at[-1, -1].set(31)
    point = [x.astype(jnp.float64) for x in (c.D, c.y, c.z0)]

    def loss(D, y, z0):
        (G, correlation), x, (z, *_) = everything(Case(D, indices, y, z0))
        rng = np.random.default_rng(7)
        total = sum(jnp.sum(x * rng.normal(size=x.shape)) for x in (G, correlation, x))
        z, _, _ = kernels.refit_fused(D, indices, y, jax.lax.stop_gradient(z0), ridge=0.1, tol=1e-13, max_steps=10_000)
        return total + jnp.sum(z * rng.normal(size=z.shape))

    rng, h = np.random.default_rng(3), 1e-6
    directions = [rng.normal(size=x.shape) for x in point]
    gradient = jax.grad(loss, (0, 1, 2))(*point)
    along = sum(jnp.sum(g * v) for g, v in zip(gradient, directions, strict=True))
    right, left = (loss(*(x + s * h * v for x, v in zip(point, directions, strict=True))) for s in (1, -1))
    np.testing.assert_allclose(along, (right - left) / (2 * h), rtol=1e-6)

    left, right = jnp.asarray(rng.normal(size=(4, 5))), jnp.asarray(rng.normal(size=(4, 16)))
    bars = jax.grad(scattered_weighted, (0, 1))(left, right, indices)
    # It is linear in each.
    for bar, x in zip(bars, (left, right), strict=True):
        np.testing.assert_allclose(jnp.sum(bar * x), scattered_weighted(left, right, indices), rtol=1e-12)


@pytest.mark.slow
@both
def test_operations_and_gradients_by_kernels_are_those_of_the_reference(platform, on):
    c = sound()
    wanted, wanted_sum = everything(c, "xla"), scattered(c, "xla")
    wanted_bar = jax.grad(lambda D, y: weighted(c._replace(D=D, y=y), "xla"), (0, 1))(c.D, c.y)
    on(platform, checked=False)  # the checks have effects, which the primitive of decoding does not declare
    got = jax.vmap(functools.partial(everything, implementation="pallas"), (Case(None, 0, 0, 0),))(c)
    assert_close_to_largest(without_steps(got), without_steps(wanted), 1e-4)
    assert_close_to_largest(scattered(c, "pallas"), wanted_sum)
    bar = jax.grad(lambda D, y: weighted(c._replace(D=D, y=y), "pallas"), (0, 1))(c.D, c.y)
    assert_close_to_largest(bar, wanted_bar, 1e-3)


@both
def test_a_kernel_that_does_not_apply_leaves_it_to_the_reference(platform, on, monkeypatch, x64):
    c = jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, sound())
    on(platform)
    monkeypatch.setattr(sharding, "is_divided", lambda: False)
    monkeypatch.setattr(tuning, "worth_it", lambda row, device: True)
    with pytest.raises(NotImplementedError, match="float64"):
        kernels.gather_gram(c.D, c.indices, c.y, implementation="pallas")
    G, _ = kernels.gather_gram(c.D, c.indices, c.y)
    assert G.dtype == jnp.float64
    np.testing.assert_allclose(G, products64(c)[0], rtol=1e-12)


def test_there_is_no_kernel_for_a_cpu():
    c = sound()
    with pytest.raises(NotImplementedError, match="cpu"):
        kernels.gather_gram(c.D, c.indices, c.y, implementation="pallas")
    with pytest.raises(ValueError, match="implementation 'fast'"):
        kernels.gather_gram(c.D, c.indices, c.y, implementation="fast")
    code = SparseCode(c.z0, c.indices, len(c.D))
    for call in (
        functools.partial(codes.decode, c.D, code),
        functools.partial(codes.scatter_add, code, c.y),
        functools.partial(kernels.gather_decode, c.D, c.indices, c.z0),
        functools.partial(kernels.scatter_rows, c.indices, c.z0[..., None], c.y[:, None], num_latents=32),
    ):
        with pytest.raises(NotImplementedError, match="cpu"):
            call(implementation="pallas")
        with pytest.raises(ValueError, match="implementation 'fast'"):
            call(implementation="fast")


def test_what_does_not_fit_together_is_refused(unchecked):
    c = sound()
    with pytest.raises(ValueError, match="y of shape"):
        kernels.gather_gram(c.D, c.indices, c.y[:, 1:])
    with pytest.raises(ValueError, match="dictionary of shape"):
        kernels.gather_gram(c.D[0], c.indices, c.y)
    with pytest.raises(ValueError, match="values of shape"):
        kernels.gather_decode(c.D, c.indices, c.z0[:, 1:])
    with pytest.raises(ValueError, match=r"left .* and right .* for indices"):
        kernels.scatter_rows(c.indices, c.z0[..., None], c.y, num_latents=32)


def test_a_refit_by_the_kernel_is_that_of_the_library(on, monkeypatch):
    c = case((6, 16, 32, 5, "float32"))
    code = jaxsae.SparseCode(c.z0, c.indices, 32)
    wanted, info = jaxsae.refit(c.D, c.y, code)
    on("gpu")
    monkeypatch.setattr(sharding, "is_divided", lambda: False)
    monkeypatch.setattr(tuning, "worth_it", lambda row, device: True)
    assert ops.applies(c.D, c.indices, c.y, c.z0)
    wide = jnp.zeros((6, 200), jnp.int32)  # more slots than a kernel holds
    assert not ops.applies(c.D, wide, c.y, wide.astype(jnp.float32))
    refitted, by_kernel = jaxsae.refit(c.D, c.y, code)
    np.testing.assert_allclose(refitted.values[:5], wanted.values[:5], atol=1e-4)
    np.testing.assert_array_equal(by_kernel.status, info.status)
    assert float(jaxsae.certify(c.D, c.y, refitted).kkt[4]) < 1e-5
    assert not np.array_equal(by_kernel.steps, info.steps)  # FISTA takes more of them


def test_only_a_kernel_that_was_measured_is_the_default(on, monkeypatch):
    row = {"op": "gather_gram", "platform": "tpu", "dtype": "float32", "d": 64, "k": 8, "options": {"samples": 8}}
    rows = [row | {"device": "TPU v5 lite", "speedup": None}, row | {"device": "TPU v6 lite", "speedup": 3.0}]
    monkeypatch.setattr(tuning, "table", lambda: rows)
    monkeypatch.setattr(sharding, "is_divided", lambda: False)
    on("tpu")
    arguments = "gather_gram", None, 64, 6, jnp.float32
    assert choice.kernel(*arguments) is None
    monkeypatch.setattr(choice, "device", lambda: ("tpu", "TPU v6 lite"))
    assert choice.kernel(*arguments)[1] == {"samples": 8}
    monkeypatch.setattr(sharding, "is_divided", lambda: True)
    assert choice.kernel(*arguments) is None
    rows[1]["speedup"] = 1.9
    monkeypatch.setattr(sharding, "is_divided", lambda: False)
    assert choice.kernel(*arguments) is None
    assert choice.kernel("gather_gram", "pallas", 64, 6, jnp.float32)[1] == {"samples": 8}


def test_a_batch_of_another_size_meets_the_program_that_is_there(on, monkeypatch):
    c = sound((5, 16, 32, 4, "float32"))
    on("gpu")
    traces = []
    module = interpreted("gpu")

    def counted(D, indices, y, **options):
        traces.append(indices.shape)
        return module.gather_gram(D, indices, y, **options)

    fake = SimpleNamespace(gather_gram=counted)
    monkeypatch.setattr(choice, "_module", lambda name: fake)
    for n in (5, 3, 1):
        part = c._replace(indices=c.indices[:n], y=c.y[:n])
        G, _ = kernels.gather_gram(*part[:3], implementation="pallas")
        np.testing.assert_allclose(G, products64(part)[0], atol=1e-4)
    assert traces == [(128, 4)]
    assert ops._bucket(1000) == ops._bucket(1024) == 1024


def test_rows_divided_by_shard_map_give_the_same():
    c = sound((8, 16, 32, 4, "float32"))
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    specs = Case(P(), P("rows"), P("rows"), P("rows"))
    divided = jax.jit(jax.shard_map(everything, mesh=mesh, in_specs=(specs,), out_specs=P("rows")))
    assert_close_to_largest(divided(c), everything(c))


@both
def test_a_kernel_inside_shard_map(platform, on):
    c = sound((8, 16, 32, 4, "float32"))
    on(platform, checked=False)
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    specs = Case(P(), P("rows"), P("rows"), P("rows"))

    def decode(c, implementation="pallas"):
        return codes.decode(c.D, SparseCode(c.z0, c.indices, len(c.D)), implementation=implementation)

    divided = jax.shard_map(decode, mesh=mesh, in_specs=(specs,), out_specs=P("rows"), check_vma=False)
    np.testing.assert_allclose(jax.jit(divided)(c), decode(c, "xla"), atol=1e-5)


# --- The benchmark and its table


def test_the_table_of_block_sizes_is_what_its_script_writes(monkeypatch, tmp_path):
    from benchmarks import kernels as benchmark

    measured = {"op": "gather_gram", "platform": "gpu", "device": "abacus", "d": 8, "k": 2, "dtype": "float32"}
    measured |= {"options": {"block": 64}, "speedup": 2.5}
    committed = tuning.table()
    (tmp_path / "blocks.json").write_text(json.dumps([*committed, measured]))
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "blocks.json")
    tuning.table.cache_clear()
    try:
        benchmark.tune("paper")
        written = tuning.table()
    finally:
        monkeypatch.undo()
        tuning.table.cache_clear()
    key = functools.partial(json.dumps, sort_keys=True)
    untuned = [row for row in committed if row["device"] is None]
    assert sorted(written, key=key) == sorted([*committed, measured], key=key)
    assert untuned and all(row["speedup"] is None for row in untuned)


@pytest.mark.slow
def test_the_benchmark_runs_where_there_is_no_kernel():
    from benchmarks import kernels as benchmark, table

    rows = list(benchmark.run("tiny", bandwidth=1e9, peak=1e9))
    assert all(tuple(row) == benchmark.COLUMNS for row in rows)
    by = {(row["op"], row["implementation"]): row for row in rows}
    assert "cpu" in by["refit_fused", "pallas"]["note"]
    assert by["refit_fused", "xla"]["worst_kkt"] <= 1e-5
    assert by["top_k, two stages", "xla"]["recall"] == 1
    machine = {"benchmark": "kernels", "device": "abacus", "cores": 1, "jax": "0", "commit": "0123456789abcdef"}
    text = table.markdown({**machine, "rows": rows, "copy_bandwidth": {"bytes_per_s": 1e9}, "matmul_peak": 1e9})
    assert "| scatter_add | xla |" in text


@pytest.mark.slow
def test_an_accelerator_checks_and_tunes_its_kernels_in_one_go(on, monkeypatch, tmp_path):
    from benchmarks import accelerator, kernels as benchmark

    monkeypatch.setattr(tuning, "TABLE", tuning.TABLE)  # is put back
    monkeypatch.setattr(sharding, "is_divided", lambda: False)
    on("gpu")
    case, device = accelerator.Case(32, 64, 4, 8), choice.default_device()[1]
    checked = [row for row in accelerator.checks(case) if "pallas" in row["what"]]
    assert len(checked) == len(benchmark.OPS) and all(row["ok"] for row in checked)
    try:
        rows = list(accelerator.operations(case, tmp_path, accelerator.Ceilings(1e9, 1e9)))
        tuned = [row for row in rows if row["what"].endswith("pallas") and "over_xla" in row]
        assert [row["what"] for row in tuned] == [f"{op}, pallas" for op in benchmark.OPS]
        for row, op in zip(tuned, benchmark.OPS, strict=True):
            assert row["tried"] == len(list(benchmark.one_at_a_time("gpu", op)))
            entry = tuning.nearest(op, "gpu", device, d=case.d, k=case.k, dtype="float32")
            assert entry is not None and (entry["options"], entry["speedup"]) == (row["options"], row["over_xla"])
        assert len(tuning.table()) == len(json.loads((tmp_path / "blocks.json").read_text()))
    finally:
        monkeypatch.undo()
        tuning.table.cache_clear()


# --- Lowered and compiled, without a device

ISSUE = [(768, 16384, 32), (2304, 131072, 64), (4096, 1048576, 128)]
ROWS = 512


def shapes(d, m, k, dtype, n=ROWS):
    def of(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    i32 = jnp.int32
    y, values, scalar = of((n, d), dtype), of((n, k), jnp.float32), of((), jnp.float32)
    column = of((n, 1), jnp.float32)
    return {
        "gather_gram": (of((m, d), dtype), of((n, k), i32), y),
        "gather_decode": (of((m, d), dtype), of((n, k), i32), values),
        "solve": (*(of((m, d), dtype), of((n, k), i32), y, column, column, values, scalar, scalar, of((), i32)),),
        "scatter_sorted": (of((n * k,), i32),) * 2 + (of((n * k, 2), jnp.float32), of((n, 2, d), jnp.float32)),
    }


def kernels_of(module, m):
    return {
        "gather_gram": module.gather_gram,
        "gather_decode": module.gather_decode,
        "solve": functools.partial(module.solve, nonnegative=True),
        "scatter_sorted": functools.partial(module.scatter_sorted, m=m),
    }


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from jax 0.11 on
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", ISSUE)
def test_kernels_lower_for_cuda(shape, dtype):
    from jaxsae.least_squares.kernels import gpu

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        for name, kernel in kernels_of(gpu, shape[1]).items():
            traced = jax.jit(kernel).trace(*shapes(*shape, dtype)[name])
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert "triton" in text, name


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from jax 0.11 on
@pytest.mark.parametrize(
    ("platform", "call"),
    [
        ("tpu", "tpu_custom_call"),
        pytest.param(
            *("cuda", "triton"),
            marks=pytest.mark.skipif(
                jax.__version_info__ >= (0, 11),
                reason="JAX lowers Triton for a GPU alone, real or abstract",
            ),
        ),
    ],
)
def test_the_kernel_is_that_of_the_platform_that_a_program_is_lowered_for(platform, call):
    c = sound()
    code, options = SparseCode(c.z0, c.indices, len(c.D)), {"implementation": "pallas"}
    for f in (
        lambda c: kernels.refit_fused(*c[:4], **options),
        lambda c: jax.value_and_grad(lambda D: kernels.gather_gram(D, c.indices, c.y, **options)[1].sum())(c.D),
        lambda c: jax.vmap(lambda z: codes.decode(c.D, SparseCode(z, c.indices, len(c.D)), **options))(c.z0[None]),
        lambda c: codes.scatter_add(code, c.y, **options),
    ):
        assert call in jax.jit(f).trace(c).lower(lowering_platforms=(platform,)).as_text()


AOT = [*ISSUE, (1000, 1002, 33)]
HBM = {"v5e": 14 << 30, "v5p": 90 << 30, "v6e": 28 << 30}  # bytes that a dictionary may take
TOPOLOGIES = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def compile_for_tpu(chip: str):
    """Compile every kernel for one chip; in a separate process, since libtpu is set up before jax starts."""
    from jax.experimental.layout import Format, Layout
    from jax.sharding import SingleDeviceSharding

    from jaxsae.app import plan
    from jaxsae.least_squares.kernels import tpu

    device = plan.topology_mesh(TOPOLOGIES[chip]).devices.flat[0]
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    out = []
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        for shape in AOT:
            for dtype in (jnp.float32, jnp.bfloat16):
                m = shape[1]
                if m * shape[0] * jnp.dtype(dtype).itemsize > HBM[chip]:
                    continue
                for name, kernel in kernels_of(tpu, min(m, 1 << 17)).items():
                    if name == "scatter_sorted" and dtype != jnp.float32:
                        continue

                    def placed(x):
                        # Row after row: left to itself XLA may choose another layout at the border of a program.
                        return Format(Layout(tuple(range(len(x.shape)))), SingleDeviceSharding(device))

                    def argument(x):
                        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(x))

                    arguments = shapes(*shape, dtype)[name]
                    outputs = jax.tree.map(placed, jax.eval_shape(kernel, *arguments))
                    arguments = jax.tree.map(argument, arguments)
                    compiled = jax.jit(kernel, out_shardings=outputs).lower(*arguments).compile()
                    workspace_bytes = compiled.memory_analysis().temp_size_in_bytes
                    out.append([name, *shape, str(jnp.dtype(dtype)), workspace_bytes])
    print(json.dumps(out))


@pytest.mark.tpu
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_kernels_compile_for_tpus_without_scratch(chip):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    script = f"import test_kernels; test_kernels.compile_for_tpu({chip!r})"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    kinds = {"gather_gram", "gather_decode", "solve", "scatter_sorted"}
    assert {(row[0], *row[1:4]) for row in rows} >= {(kind, *shape) for kind in kinds for shape in AOT[:2]}
    assert {row[0] for row in rows if tuple(row[1:4]) == ISSUE[2]} >= kinds - {"scatter_sorted"}
    for name, *shape, dtype, workspace_bytes in rows:
        assert workspace_bytes <= 1 << 20 or tuple(shape) not in ISSUE, (name, shape, dtype)
