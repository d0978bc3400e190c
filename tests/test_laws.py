"""What holds for every public function, in one table: a function without a row in it fails the first test."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from problems import activations, problem, sae, with_code

import jaxsae
from jaxsae import SparseCode

D, M, K = 16, 32, 6  # with 64 rows, the shape that other tests have compiled already


class Rows(NamedTuple):
    """Data of every kind that a public function takes a batch of."""

    x: jax.Array
    code: SparseCode
    refined: SparseCode


@dataclasses.dataclass(frozen=True)
class Law:
    """How to call a public function on an SAE and rows of data, and which laws are not meant for it."""

    call: Callable[[jaxsae.SAE, Rows], Any]
    # What to differentiate, where it is not `call`; or why there is no derivative.
    smooth: Callable[[jaxsae.SAE, Rows], Any] | str | None = None
    # Why the result is not one row for each row of the input, if so.
    whole: str | None = None
    # Why each device needs every row of a sharded batch, if so.
    gathers: str | None = None


NO_SHARDED_TOP_K = "XLA does not partition top-k over rows on a CPU"
NO_SHARDED_CHOLESKY = "XLA does not partition LAPACK's Cholesky over rows on a CPU"
EXACT = jaxsae.FISTA(tol=1e-13, max_steps=10_000)

LAWS = {
    "certify": Law(
        lambda sae, rows: jaxsae.certify(sae.W_dec, rows.x, rows.code),
        smooth="a bound to be read; its derivative would be that of whichever violation is largest",
        gathers=NO_SHARDED_CHOLESKY,
    ),
    "decode": Law(lambda sae, rows: jaxsae.decode(sae, rows.code)),
    "encode": Law(lambda sae, rows: jaxsae.encode(sae, rows.x), gathers=NO_SHARDED_TOP_K),
    "encode_dense": Law(lambda sae, rows: jaxsae.encode_dense(sae, rows.x), gathers=NO_SHARDED_TOP_K),
    "init": Law(
        lambda sae, rows: jaxsae.init(jax.random.key(0), d=D, m=M, activation=sae.activation, b_dec=sae.b_dec),
        whole="it makes one SAE and sees no rows",
    ),
    "lasso.lasso": Law(
        lambda sae, rows: jaxsae.lasso.lasso(sae.W_dec, rows.x, 1.0),
        smooth="it has no derivative; that of `refit` on its support is the one to take",
        gathers=NO_SHARDED_TOP_K,
    ),
    "refine": Law(
        lambda sae, rows: jaxsae.refine(sae, rows.x),
        smooth=lambda sae, rows: jaxsae.refine(sae, rows.x, None, EXACT)[0],
        gathers=NO_SHARDED_TOP_K,
    ),
    "refit": Law(
        lambda sae, rows: jaxsae.refit(sae.W_dec, rows.x, rows.code),
        smooth="compared entry by entry in test_refit",
        gathers=f"{NO_SHARDED_CHOLESKY}, which answers for the rows that conjugate gradient leaves",
    ),
    "shrinkage": Law(
        lambda sae, rows: jaxsae.shrinkage(sae, rows.x, rows.code, rows.refined),
        whole="it sums over the rows",
    ),
    "codes.combine": Law(lambda sae, rows: jaxsae.codes.combine(sae.W_dec, rows.code)),
    "codes.from_dense": Law(lambda sae, rows: jaxsae.codes.from_dense(rows.x, 5), gathers=NO_SHARDED_TOP_K),
    "pursuit.iti": Law(
        lambda sae, rows: jaxsae.pursuit.iti(sae.W_dec, rows.x, k=K),
        smooth="its values have the derivative of the refit: test_pursuit compares them",
        gathers=NO_SHARDED_TOP_K,
    ),
    "pursuit.omp": Law(
        lambda sae, rows: jaxsae.pursuit.omp(sae.W_dec, rows.x, k=K),
        smooth="its values have the derivative of the refit: test_pursuit compares them",
        gathers=NO_SHARDED_CHOLESKY,
    ),
    "sae.pre_activations": Law(lambda sae, rows: jaxsae.sae.pre_activations(sae, rows.x)),
}

LAWLESS = {
    "check": "it runs on the host, raises, and returns nothing",
}


def test_every_public_function_has_a_row():
    public = {name: getattr(jaxsae, name) for name in jaxsae.__all__}
    functions = {name for name, value in public.items() if callable(value) and not inspect.isclass(value)}
    assert not functions - LAWS.keys() - LAWLESS.keys()
    assert not LAWS.keys() & LAWLESS.keys()


def data(seed=0, *, batch=(64,), dtype=np.float32) -> tuple[jaxsae.SAE, Rows]:
    _, _, code = problem(seed, batch=batch, d=D, m=M, k=K, dtype=dtype)
    refined = with_code(code, values=np.asarray(code.values) * 1.17)
    model = sae(seed, d=D, m=M, activation=jaxsae.TopK(K), dtype=dtype)
    return model, Rows(activations(seed, batch=batch, d=D, dtype=dtype), code, refined)


@functools.cache
def expected(name: str):
    return LAWS[name].call(*data())


def assert_close(a, b):
    """Equal: integers exactly, numbers to rounding."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for got, wanted in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        got, wanted = np.asarray(got), np.asarray(wanted)
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        if np.issubdtype(wanted.dtype, np.integer):
            np.testing.assert_array_equal(got, wanted)
        else:
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


every_law = pytest.mark.parametrize("name", LAWS)
row_by_row = pytest.mark.parametrize("name", [name for name, law in LAWS.items() if law.whole is None])
differentiable = pytest.mark.parametrize(
    "name", [name for name, law in LAWS.items() if not isinstance(law.smooth, str)]
)


@every_law
def test_jit_is_eager_and_traces_once(name):
    compiled = jax.jit(chex.assert_max_traces(LAWS[name].call, 1))
    assert_close(compiled(*data()), expected(name))
    jax.block_until_ready(compiled(*data(1)))
    chex.clear_trace_counter()


@pytest.mark.parametrize(
    "name", ["certify", "refit", "lasso.lasso", "lasso.path", "lambda_max", "pursuit.omp", "pursuit.iti"]
)
def test_arrays_of_numpy_are_taken(name, unchecked):
    others = {
        "lasso.path": lambda sae, rows: jaxsae.lasso.path(sae.W_dec, rows.x, n_lambdas=3),
        "lambda_max": lambda sae, rows: jaxsae.lasso.lambda_max(sae.W_dec, rows.x),
    }
    call = others[name] if name in others else LAWS[name].call
    given = call(*data())
    assert_close(call(*jax.tree.map(np.asarray, data())), given)
    assert_close(call(*jax.tree.map(lambda x: np.asarray(x, float if x.dtype == np.float32 else None), data())), given)


@row_by_row
def test_vmap_is_the_batch(name):
    assert_close(jax.jit(jax.vmap(LAWS[name].call, in_axes=(None, 0)))(*data()), expected(name))


@every_law
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_is_kept(name, dtype, x64):
    # With float64 at hand: a constant or a default of the wider type would show.
    out = jax.eval_shape(LAWS[name].call, *data(dtype=dtype))
    kinds = {leaf.dtype for leaf in jax.tree.leaves(out)}
    assert kinds <= {np.dtype(dtype), np.dtype(np.int32)}
    assert np.dtype(dtype) in kinds


@every_law
def test_an_empty_batch_is_no_special_case(name):
    model, rows = data(batch=(0,))
    out = jax.jit(LAWS[name].call)(model, rows)
    shapes = jax.tree.map(lambda leaf: leaf.shape, expected(name))
    if LAWS[name].whole is None:
        shapes = jax.tree.map(lambda leaf: (0, *leaf.shape[1:]), expected(name))
    assert jax.tree.map(lambda leaf: leaf.shape, out) == shapes
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(out))
    nested = jax.eval_shape(LAWS[name].call, *data(batch=(3, 0)))
    if LAWS[name].whole is None:
        assert {leaf.shape[:2] for leaf in jax.tree.leaves(nested)} == {(3, 0)}


@differentiable
def test_the_gradient_is_that_of_finite_differences(name, x64):
    law = LAWS[name]
    arguments = data(batch=(8,), dtype=np.float64)
    floats, rest = [], []
    leaves, structure = jax.tree.flatten(arguments)
    for leaf in leaves:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        floats.append(leaf if is_float else None)
        rest.append(None if is_float else leaf)
    point, unravel = jax.flatten_util.ravel_pytree(floats)

    def outputs(point):
        merged = [b if a is None else a for a, b in zip(unravel(point), rest, strict=True)]
        out = jax.tree.leaves((law.smooth or law.call)(*jax.tree.unflatten(structure, merged)))
        numbers = [leaf.ravel() for leaf in out if jnp.issubdtype(leaf.dtype, jnp.floating)]
        others = [leaf.ravel() for leaf in out if not jnp.issubdtype(leaf.dtype, jnp.floating)]
        return jnp.concatenate(numbers), jnp.concatenate([jnp.zeros(0, jnp.int32), *others])

    weights = np.random.default_rng(4).normal(size=jax.eval_shape(outputs, point)[0].shape)

    def loss(point):
        numbers, discrete = outputs(point)
        # The support is held fixed: where a row changes it, a difference measures a jump.
        return weights @ numbers, jnp.append(discrete, numbers == 0)

    # One program for the values and the gradient: compiling is most of the time.
    evaluate = jax.jit(lambda points: jax.lax.map(jax.value_and_grad(loss, has_aux=True), points))
    directions, h = np.random.default_rng(5).normal(size=(4, point.size)), 1e-6
    points = np.concatenate([point + h * directions, point - h * directions, [point]])
    (values, support), gradients = jax.tree.map(np.asarray, evaluate(points))
    assert np.all(support == support[0])
    right, left = values[:-1].reshape(2, -1)
    gradient = gradients[-1]
    scale = np.linalg.norm(gradient) * np.linalg.norm(directions, axis=1)
    assert np.all(scale > 0)
    np.testing.assert_allclose((right - left) / (2 * h) / scale, directions @ gradient / scale, atol=1e-7)


@every_law
def test_rows_sharded_over_eight_devices_give_the_same_where_they_are(name):
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    assert mesh.size == 8
    model, rows = data()
    model = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    rows = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("rows")))
    compiled = jax.jit(LAWS[name].call).lower(model, rows).compile()
    assert_close(compiled(model, rows), expected(name))
    assert "all-gather" not in compiled.as_text() or LAWS[name].gathers


# XLA's maximum on a CPU passes over NaN in shapes like these, and only in programs as users have them.
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 64), (16, 768)], ids=str)
def test_a_row_of_nan_alone_is_named_by_all_whatever_the_shape(shape, optimised):
    n, d = shape
    rng = np.random.default_rng(0)
    D, y = (jnp.asarray(rng.normal(size=(rows, d)), jnp.float32) for rows in (M, n))
    y = y.at[3].set(jnp.nan).at[5, 0].set(jnp.nan)
    code = SparseCode(jnp.ones((n, K)), jnp.asarray(rng.integers(0, M, (n, K))), M)
    statuses = {
        "refit": jaxsae.refit(D, y, code)[1].status,
        "signed": jaxsae.refit(D, y, code, nonnegative=False)[1].status,
        "omp": jaxsae.pursuit.omp(D, y, k=K)[1].status,
        "iti": jaxsae.pursuit.iti(D, y, k=K)[1].status,
        "lasso": jaxsae.lasso.lasso(D, y, 1.0)[1].status,
    }
    bad = np.isin(np.arange(n), [3, 5])
    for name, status in statuses.items():
        np.testing.assert_array_equal(status == jaxsae.Status.NONFINITE, bad, err_msg=name)
    np.testing.assert_array_equal(np.isnan(jaxsae.certify(D, y, code).kkt), bad)
    np.testing.assert_array_equal(np.isnan(jaxsae.lasso.lambda_max(D, y)), bad)
    # The same of a dictionary: rows that have an atom of NaN.
    has = np.asarray((code.indices == 7).any(1))
    broken = D.at[7].set(jnp.nan)
    y = y.at[3].set(1.0).at[5, 0].set(1.0)
    np.testing.assert_array_equal(jaxsae.refit(broken, y, code)[1].status == jaxsae.Status.NONFINITE, has)
    np.testing.assert_array_equal(np.isnan(jaxsae.certify(broken, y, code).kkt), has)
