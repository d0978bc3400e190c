import operator
import os
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import compilations, f64, sae

import jaxsae
from jaxsae import RefitInfo, SparseCode, Status, stream
from jaxsae._core.files import InputError
from jaxsae.autoencoder.stream import RefineSummary, max_l0, refine_blocks, refine_file

ROWS, D, M, K = 768, 64, 128, 8
SOLVER = jaxsae.ConjugateGradient(tol=1e-6, max_steps=5000)
RELU, TOPK = jaxsae.ReLU(), jaxsae.TopK(K)
ACTIVATIONS = {"ReLU": RELU, "TopK": TOPK}

encode = jax.jit(jaxsae.encode, static_argnames="capacity")
dense = jax.jit(SparseCode.dense)
certified_kkt = jax.jit(lambda *args: jaxsae.certify(*args).kkt)  # the gap, not asked for, is not computed


@pytest.fixture(scope="module", autouse=True)
def several_chunks():
    """Encode 512 rows at a time, so that a few hundred go through all there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_PRE_ACTIVATIONS", 512 * 4 * M)
        yield


def model_of(activation):
    """Unit atoms, and a bias that makes L0 depend on the size of the row."""
    atoms = sae(d=D, m=M).W_dec
    atoms = atoms / jnp.linalg.norm(atoms, axis=1, keepdims=True)
    centre = jnp.linspace(-1, 1, D)
    return jaxsae.SAE(atoms.T, jnp.full(M, -1.5), atoms, centre, activation)


def some_rows(n=ROWS):
    """Rows of all sizes: the L0 of the ReLU goes from 0 to beyond 32, where blocks take more slots."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(n, D)) * rng.uniform(0, 3, (n, 1)) + np.linspace(-1, 1, D)).astype(np.float32)


def read(path) -> tuple[SparseCode, RefitInfo]:
    with np.load(path) as archive:
        saved = {name: jnp.asarray(archive[name]) for name in archive.files}
    assert sorted(saved) == ["indices", "kkt", "num_dropped", "status", "values"]
    code = SparseCode(saved["values"], saved["indices"], M, saved["num_dropped"])
    return code, RefitInfo(kkt=saved["kkt"], steps=jnp.zeros_like(saved["status"]), status=saved["status"])


class Refined(NamedTuple):
    x: np.ndarray
    model: jaxsae.SAE
    # through the file
    summary: RefineSummary
    done: list[int]
    code: SparseCode
    info: RefitInfo
    # in memory
    encoded: SparseCode
    expected: SparseCode
    expected_info: RefitInfo


@pytest.fixture(scope="module", params=list(ACTIVATIONS))
def refined(request, tmp_path_factory):
    x, model = some_rows(), model_of(ACTIVATIONS[request.param])
    out = tmp_path_factory.mktemp("stream") / "codes.npz"
    done = []
    summary = refine_file(model, x, out, SOLVER, progress=done.append)
    encoded = encode(model, x, capacity=summary.capacity)
    # In pieces of a size that is compiled already: a row's result does not depend on its batch.
    pieces = [slice(i, i + 256) for i in range(0, ROWS, 256)]
    parts = [
        jaxsae.refine(model, jnp.asarray(x[i]), jax.tree.map(operator.itemgetter(i), encoded), SOLVER) for i in pieces
    ]
    expected = jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)
    return Refined(x, model, summary, done, *read(out), encoded, *expected)


@pytest.mark.bits
def test_the_file_holds_what_refine_gives_in_the_order_of_the_rows(refined):
    np.testing.assert_array_equal(refined.info.status, refined.expected_info.status)
    np.testing.assert_allclose(dense(refined.code), dense(refined.expected), rtol=1e-4, atol=1e-5)
    # The support too, also where a refined value is 0.
    found, expected = (np.sort(np.asarray(code.indices), axis=1) for code in (refined.code, refined.expected))
    np.testing.assert_array_equal(found, expected)
    assert not refined.expected.num_dropped.any()


def test_the_file_is_certified_row_by_row(refined):
    assert (refined.info.kkt <= SOLVER.tol).all()
    kkt = certified_kkt(refined.model.W_dec, refined.x - refined.model.b_dec, refined.code)
    np.testing.assert_allclose(kkt, 0, atol=1e-5)
    np.testing.assert_allclose(refined.summary.worst_kkt, refined.info.kkt.max())


def test_the_slots_are_those_of_the_densest_row(refined):
    l0 = refined.encoded.l0
    expected = K if refined.model.activation.slots else int(l0.max())
    assert refined.summary.capacity == refined.code.indices.shape[1] == expected
    if refined.model.activation.slots is None:  # the problem is worth its name
        assert l0.min() == 0
        assert l0.max() > 32


def test_the_types_in_the_file(refined):
    assert refined.code.indices.dtype == refined.info.status.dtype == refined.code.num_dropped.dtype == np.int32
    assert refined.code.values.dtype == refined.info.kkt.dtype == np.float32


def test_the_summary(refined):
    summary = refined.summary
    assert (summary.rows, summary.overflowed, summary.nonfinite, summary.unconverged) == (ROWS, 0, 0, 0)
    assert sum(refined.done) == ROWS
    expected = jaxsae.shrinkage(refined.model, jnp.asarray(refined.x), refined.encoded, refined.expected)
    for name in ("l0", "nmse_before", "nmse_after", "mean_change", "share_increased", "gamma_before", "gamma_after"):
        np.testing.assert_allclose(getattr(summary.shrinkage, name), getattr(expected, name), rtol=1e-3, err_msg=name)


def test_a_mapped_file_gives_the_same_bytes(tmp_path):
    np.save(tmp_path / "x.npy", some_rows(256))
    mapped = jaxsae.data.open_rows(tmp_path / "x.npy")
    for name, rows in {"mapped": mapped, "array": some_rows(256)}.items():
        refine_file(model_of(TOPK), rows, tmp_path / f"{name}.npz", SOLVER)
    for a, b in zip(read(tmp_path / "mapped.npz"), read(tmp_path / "array.npz"), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_rows_of_other_types(dtype, tmp_path):
    # Rounded to float16 first, so that they are the same rows.
    rows = some_rows(256).astype(np.float16)
    for name, array in {"a": rows.astype(dtype), "b": rows.astype(np.float32)}.items():
        refine_file(model_of(TOPK), array, tmp_path / name, SOLVER)
    for a, b in zip(read(tmp_path / "a"), read(tmp_path / "b"), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


# --- What does not fit, and what is not finite


def test_a_capacity_too_small_is_counted(tmp_path):
    model, x = model_of(RELU), some_rows()
    l0, capacity = np.asarray(encode(model, x, capacity=M).l0), 32
    summary = refine_file(model, x, tmp_path / "codes.npz", SOLVER, capacity=capacity)
    code, _ = read(tmp_path / "codes.npz")
    np.testing.assert_array_equal(code.num_dropped, np.maximum(l0 - capacity, 0))
    assert summary.overflowed == (l0 > capacity).sum() > 0
    assert summary.capacity == code.indices.shape[1] == capacity


def test_a_capacity_larger_than_needed_leaves_slots_empty(tmp_path):
    refine_file(model_of(TOPK), some_rows(), tmp_path / "wide.npz", SOLVER, capacity=40)
    refine_file(model_of(TOPK), some_rows(), tmp_path / "narrow.npz", SOLVER)
    wide, narrow = (read(tmp_path / f"{name}.npz")[0] for name in ("wide", "narrow"))
    np.testing.assert_array_equal(wide.indices[:, K:], M)
    np.testing.assert_array_equal(wide.values[:, K:], 0)
    np.testing.assert_allclose(dense(wide), dense(narrow), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_touch_no_other(refined, bad, tmp_path):
    x, wrong = refined.x.copy(), np.array([3, 400])
    x[wrong, 5] = bad
    good = np.delete(np.arange(ROWS), wrong)
    summary = refine_file(refined.model, x, tmp_path / "codes.npz", SOLVER)
    code, info = read(tmp_path / "codes.npz")
    assert summary.nonfinite == len(wrong)
    np.testing.assert_array_equal(np.flatnonzero(info.status == Status.NONFINITE), wrong)
    assert not np.isfinite(code.values[wrong]).all(axis=1).any()
    # They are no reason for more slots, and not what more slots would help.
    assert summary.capacity == refined.summary.capacity
    assert summary.overflowed == 0
    np.testing.assert_allclose(dense(code)[good], dense(refined.code)[good], rtol=1e-4, atol=1e-5)
    assert summary.shrinkage.data.rows == len(good)
    assert np.isfinite(summary.shrinkage.nmse_after)
    assert np.isfinite(summary.worst_kkt)


def test_rows_that_stop_early_are_counted(tmp_path):
    summary = refine_file(model_of(TOPK), some_rows(), tmp_path / "codes.npz", jaxsae.FISTA(1e-6, 1))
    _, info = read(tmp_path / "codes.npz")
    assert summary.unconverged == (info.status == Status.MAX_STEPS).sum() > 0
    np.testing.assert_allclose(summary.worst_kkt, info.kkt.max())
    assert summary.worst_kkt > 1e-6


# --- Nothing is left behind


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there_and_no_other_file(error, tmp_path):
    (tmp_path / "codes.npz").write_text("old")

    def fail(rows):
        raise error

    with pytest.raises(error):
        refine_file(model_of(TOPK), some_rows(), tmp_path / "codes.npz", SOLVER, progress=fail)
    assert os.listdir(tmp_path) == ["codes.npz"]
    assert (tmp_path / "codes.npz").read_text() == "old"


def test_a_full_disk_is_said_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(stream, "refine", None)
    with pytest.raises(InputError, match="MiB of disk while they are written, 0 MiB are free"):
        refine_file(model_of(TOPK), some_rows(), tmp_path / "codes.npz")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (np.zeros((3, D + 1), np.float32), {}, f"got rows of width {D + 1}, but this SAE has d = {D}"),
        (np.zeros((3, D), np.float32), {"capacity": M + 1}, f"got capacity {M + 1} for {M} latents"),
        (np.zeros((0, D), np.float32), {}, "no rows"),
    ],
)
def test_what_does_not_fit_is_refused(rows, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        refine_file(model_of(RELU), rows, tmp_path / "codes.npz", **options)
    assert os.listdir(tmp_path) == []


# --- Blocks


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_blocks_cover_every_row_once_and_take_few_slots(array):
    x = array(some_rows())
    blocks = list(refine_blocks(model_of(RELU), x, SOLVER))
    np.testing.assert_array_equal(np.sort(np.concatenate([block.rows for block in blocks])), np.arange(ROWS))
    for block in blocks:
        np.testing.assert_array_equal(block.x, x[block.rows])
        # Enough slots, and no more than the next size up.
        assert block.code.l0.max() <= block.code.indices.shape[1]
        assert block.code.indices.shape[1] <= max(32, 4 * block.code.l0.max())
    assert len({block.code.indices.shape[1] for block in blocks}) == 2


def test_other_rows_compile_nothing():
    first, other = (np.random.default_rng(seed).normal(size=(37, D)).astype(np.float32) for seed in range(2))
    list(refine_blocks(model_of(TOPK), first, SOLVER))
    with compilations() as seen:
        list(refine_blocks(model_of(TOPK), other, SOLVER))
    assert not seen


def test_a_transcoder_is_refused(tmp_path):
    # Its target is not among the rows.
    atoms = model_of(TOPK).W_dec
    model = jaxsae.SAE(atoms.T, jnp.zeros(M), atoms, jnp.zeros(D), TOPK, transcoder=True, apply_b_dec_to_input=False)
    for call in (
        lambda: refine_file(model, some_rows(), tmp_path / "a"),
        lambda: next(refine_blocks(model, some_rows())),
    ):
        with pytest.raises(InputError, match="got a transcoder and no target"):
            call()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("d", [16, 64])
def test_nearly_parallel_atoms_are_solved_as_by_refine(d, tmp_path):
    """At a mean cosine of 0.99 conjugate gradient alone is not enough; empty slots make no row one of `k > d`."""
    rng = np.random.default_rng(0)
    atoms = 10 * rng.normal(size=d) / np.sqrt(d) + rng.normal(size=(M, d)) / np.sqrt(d)
    atoms = jnp.asarray(atoms / np.linalg.norm(atoms, axis=1, keepdims=True), jnp.float32)
    model = jaxsae.SAE(atoms.T, jnp.zeros(M), atoms, jnp.zeros(d), TOPK)
    x = (rng.exponential(size=(64, M)) * (rng.random((64, M)) < K / M) @ np.asarray(atoms)).astype(np.float32)
    (block,) = refine_blocks(model, x)
    refined, info = jaxsae.refine(model, jnp.asarray(x))
    assert (info.status == Status.CONVERGED).all()
    assert (block.info.status == Status.CONVERGED).all()
    np.testing.assert_allclose(block.info.kkt, 0, atol=1e-5)
    x_hat = np.asarray(jaxsae.decode(model, block.refined))[np.argsort(block.rows)]
    # What the KKT residuals allow depends on the kind of processor too.
    np.testing.assert_allclose(x_hat, jaxsae.decode(model, refined), atol=1e-5 * np.linalg.norm(x, axis=1).max())
    summary = refine_file(model, x, tmp_path / "codes.npz")
    assert summary.unconverged == 0


def test_max_l0():
    model, x = model_of(RELU), some_rows()
    expected = int((f64(jaxsae.encode_dense(model, jnp.asarray(x))) > 0).sum(1).max())
    assert max_l0(model, x) == max_l0(model, jnp.asarray(x)) == expected
    assert max_l0(model, np.asarray(model.b_dec)[None]) == 1  # none is active: at least 1
    assert max_l0(model_of(TOPK), x) == K


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_max_l0_ignores_rows_that_are_not_finite(bad):
    model, x = model_of(RELU), some_rows()
    expected = max_l0(model, x)
    x[x.shape[0] // 2, 0] = bad
    assert max_l0(model, x) == max_l0(model, jnp.asarray(x)) == expected
