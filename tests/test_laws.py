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
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from problems import activations, problem, sae, with_code

import jaxsae
from jaxsae import SparseCode
from jaxsae._core import pytrees
from jaxsae.autoencoder import normalisation
from jaxsae.autoencoder.activations import Activation

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
    # Why there is no forward mode, if so.
    backwards_only: str | None = None


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
        backwards_only="the derivative of a refit is a rule for cotangents alone",
        gathers=NO_SHARDED_TOP_K,
    ),
    "reconstruct": Law(lambda sae, rows: jaxsae.reconstruct(sae, rows.x, rows.code)),
    "refit": Law(
        lambda sae, rows: jaxsae.refit(sae.W_dec, rows.x, rows.code),
        smooth="compared entry by entry in test_refit",
        gathers=f"{NO_SHARDED_CHOLESKY}, which answers for the rows that conjugate gradient leaves",
    ),
    "shrinkage": Law(
        lambda sae, rows: jaxsae.shrinkage(sae, rows.x, rows.code, rows.refined),
        whole="it sums over the rows",
    ),
    "codes.decode": Law(lambda sae, rows: jaxsae.codes.decode(sae.W_dec, rows.code)),
    "codes.scatter_add": Law(
        lambda sae, rows: jaxsae.codes.scatter_add(rows.code, rows.x),
        whole="it sums over the rows",
        gathers="the order of the sums is fixed, row by row",
    ),
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
    "sae.pre_activations": Law(lambda sae, rows: jaxsae.autoencoder.pre_activations(sae, rows.x)),
}

LAWLESS = {
    "check": "it runs on the host, raises, and returns nothing",
}


def test_every_public_function_has_a_row():
    public = {name: getattr(jaxsae, name) for name in dir(jaxsae)}
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

    # One program for the values, the gradient and the slopes: compiling is most of the time.
    @jax.jit
    def evaluate(points, directions):
        found = jax.lax.map(jax.value_and_grad(loss, has_aux=True), points)
        if law.backwards_only:
            return found, jnp.full(len(directions), jnp.nan)
        return found, jax.lax.map(lambda d: jax.jvp(lambda p: loss(p)[0], (points[-1],), (d,))[1], directions)

    directions, h = np.random.default_rng(5).normal(size=(4, point.size)), 1e-6
    points = np.concatenate([point + h * directions, point - h * directions, [point]])
    ((values, support), gradients), slopes = jax.tree.map(np.asarray, evaluate(points, directions))
    assert np.all(support == support[0])
    right, left = values[:-1].reshape(2, -1)
    gradient = gradients[-1]
    scale = np.linalg.norm(gradient) * np.linalg.norm(directions, axis=1)
    assert np.all(scale > 0)
    np.testing.assert_allclose((right - left) / (2 * h) / scale, directions @ gradient / scale, atol=1e-7)
    if not law.backwards_only:  # forward mode is backward mode transposed
        np.testing.assert_allclose(slopes / scale, directions @ gradient / scale, atol=1e-14)


def _takes_a_code(name: str) -> bool:
    read = set()

    class Watched(Rows):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    jax.eval_shape(lambda model, rows: LAWS[name].call(model, Watched(*rows)), *data())
    return "code" in read


# What else takes a code, and is not among the public functions above.
OF_A_CODE = {
    "dense": lambda sae, rows: (rows.code.dense(), rows.code.l0, rows.code.mask),
    "refine of a code": lambda sae, rows: jaxsae.refine(sae, rows.x, rows.code),
    "codes.sum_by_latent": lambda sae, rows: jaxsae.codes.sum_by_latent(rows.code),
    "gradients": lambda sae, rows: jax.grad(_quartic, (0, 1))(sae.W_dec, rows.code.values, rows.code, rows.x),
    "gradient of a refit": lambda sae, rows: jax.grad(_of_a_refit, (0, 1))(sae.W_dec, rows.x, rows.code),
    "kernels": lambda sae, rows: (
        jaxsae.kernels.gather_gram(sae.W_dec, rows.code.indices, rows.x),
        jaxsae.kernels.refit_fused(sae.W_dec, rows.code.indices, rows.x, rows.code.values, max_steps=3),
    ),
    "ksvd": lambda sae, rows: (
        jaxsae.ksvd.approximate(sae.W_dec, rows.x, rows.code),
        jaxsae.ksvd.replace(sae.W_dec, rows.x, rows.code),
    ),
    "losses.matryoshka": lambda sae, rows: jaxsae.train.losses.matryoshka(sae, rows.x, rows.code, (4, 16)),
    "metrics": lambda sae, rows: (
        jaxsae.metrics.activity(rows.code),
        jaxsae.metrics.progressive(sae, rows.x, rows.code, (2, K)),
    ),
}


def _quartic(dictionary, values, code, x):
    return jnp.sum((x - jaxsae.codes.decode(dictionary, code.replace(values=values))) ** 2)


def _of_a_refit(dictionary, x, code):
    return jnp.sum(jaxsae.refit(dictionary, x, code)[0].values ** 2)


@pytest.mark.parametrize("name", [*OF_A_CODE, *LAWS])
def test_an_index_out_of_range_is_an_unused_slot(name):
    if name in LAWS and not _takes_a_code(name):
        pytest.skip("takes no code")
    model, rows = data()
    off = np.random.default_rng(0).random(rows.code.indices.shape) < 0.4
    call, on = jax.jit(OF_A_CODE[name] if name in OF_A_CODE else LAWS[name].call), jnp.asarray(~off)

    def with_unused(index):
        def unused(code):
            return with_code(code, indices=jnp.where(on, code.indices, index), values=jnp.where(on, code.values, 7.0))

        out = call(model, Rows(rows.x, unused(rows.code), unused(rows.refined)))
        same = {"is_leaf": lambda node: isinstance(node, SparseCode)}
        return jax.tree.map(
            lambda x: (x.dense(), x.mask, x.num_dropped) if isinstance(x, SparseCode) else x, out, **same
        )

    expected = with_unused(M)
    for index in (-1, -M, M + 7, np.iinfo(np.int32).min, np.iinfo(np.int32).max):
        assert_close(with_unused(index), expected)


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
    # A selection looks at every atom.
    for select in (jaxsae.pursuit.omp, jaxsae.pursuit.iti):
        np.testing.assert_array_equal(select(broken, y, k=K)[1].status, jaxsae.Status.NONFINITE)


EACH = np.full(M, 0.1)


@pytrees.dataclass
class Square(Activation):
    """Somebody's own: slots that it fixes, and values that are not the pre-activations."""

    k: int = struct.field(pytree_node=False)

    @property
    def slots(self):
        return self.k

    def __call__(self, pre):
        return jaxsae.TopK(self.k)(pre) ** 2


@pytrees.dataclass
class SquareOfTopK(jaxsae.TopK):
    """The same by inheritance: what it says of the dense code is true of the sparse one."""

    def __call__(self, pre):
        return super().__call__(pre) ** 2


# Every activation that there is; what has no row here fails the next test.
ACTIVATIONS = {
    "ReLU": jaxsae.ReLU(),
    "TopK": jaxsae.TopK(K),
    "AbsTopK": jaxsae.AbsTopK(K),
    "GroupMax": jaxsae.GroupMax(4),
    "BatchTopK": jaxsae.BatchTopK(K, 0.1),
    "JumpReLU": jaxsae.JumpReLU(EACH, bandwidth=0.5),
    "Gated": jaxsae.Gated(EACH, EACH, EACH),
    "MatchingPursuit": jaxsae.autoencoder.activations.MatchingPursuit(max_steps=K),
    "kept": jaxsae.TopK(K, keep=2.5),
    "Square": Square(K),
    "SquareOfTopK": SquareOfTopK(K),
}
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def test_every_activation_has_a_row():
    own = vars(jaxsae.autoencoder.activations)
    names = {name for name, thing in own.items() if inspect.isclass(thing) and name != "Activation"}
    assert names
    assert names <= ACTIVATIONS.keys()


@every_activation
def test_encode_has_the_values_and_the_derivatives_of_encode_dense(name, x64):
    model = sae(d=D, m=M, activation=ACTIVATIONS[name], dtype=np.float64)
    x = activations(batch=(8,), d=D, dtype=np.float64)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(8, M)))
    dots = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(jnp.size(leaf))).reshape(jnp.shape(leaf)), (model, x))

    def losses(model, x):
        code = jaxsae.encode(model, x, capacity=M if model.activation.slots is None else None)
        # On the support: what is off has no slot, and may yet have a straight-through derivative.
        return tuple(jnp.sum(jnp.where(z != 0, weights * z, 0)) for z in (code.dense(), jaxsae.encode_dense(model, x)))

    @jax.jit
    def all_of_it(model, x, dots):
        values, slopes = jax.jvp(losses, (model, x), dots)
        if model.activation.encoder_free:  # a loop that ends when it is done: forwards alone
            return values, slopes, None
        gradients = [jax.grad(lambda m, x, i=i: losses(m, x)[i], (0, 1))(model, x) for i in (0, 1)]
        return values, slopes, gradients

    (sparse, dense), slopes, gradients = all_of_it(model, x, dots)
    np.testing.assert_allclose(sparse, dense, rtol=1e-12)
    np.testing.assert_allclose(*slopes, rtol=1e-12)
    if gradients is not None:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), *gradients)
        products = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), gradients[0], dots))
        np.testing.assert_allclose(sum(products), slopes[0], rtol=1e-11)


@every_activation
def test_nan_stays_visible_in_its_row_alone(name):
    model = sae(d=D, m=M, activation=ACTIVATIONS[name])
    x = activations(batch=(8,), d=D).at[3, 0].set(jnp.nan)

    @jax.jit
    def both(model, x):
        slots = model.activation.slots
        return jaxsae.encode_dense(model, x), jaxsae.encode(model, x, capacity=slots or M).dense()

    for z in both(model, x):
        np.testing.assert_array_equal(np.isnan(z).any(1), np.arange(8) == 3)


NORMALISATIONS = {
    "none": None,
    "LayerNorm": normalisation.LayerNorm(),
    "ConstantNorm": normalisation.ConstantNorm(),
    "AverageNorm": normalisation.AverageNorm(),
}


@every_activation
def test_rescale_keeps_the_reconstruction_or_refuses(name):
    x, scale = activations(batch=(8,), d=D), 0.25
    before = jax.jit(lambda sae, x: jaxsae.reconstruct(sae, scale * x) / scale)
    after = jax.jit(lambda sae, x: jaxsae.reconstruct(sae, x))
    for way, normalise in NORMALISATIONS.items():
        model = sae(d=D, m=M, activation=ACTIVATIONS[name]).replace(normalisation=normalise)
        per_row = normalise is not None and normalise.per_row
        if name.startswith("Square") and not per_row:  # it has units, and does not say which
            with pytest.raises(ValueError, match=r"does not support a change of units; define"):
                jaxsae.autoencoder.rescale(model, scale)
            continue
        rescaled = jaxsae.autoencoder.rescale(model, scale)
        np.testing.assert_allclose(after(rescaled, x), before(model, x), rtol=1e-4, atol=1e-4, err_msg=way)
        with pytest.raises(ValueError, match="`rescale` got a transcoder"):
            jaxsae.autoencoder.rescale(model.replace(transcoder=True, apply_b_dec_to_input=False), scale)
        if per_row:
            with pytest.raises(ValueError, match=r"`fold_scale` got (an SAE that normalises each row|a pursuit)"):
                jaxsae.autoencoder.fold_scale(model, scale)
        elif not model.activation.encoder_free:
            folded = jaxsae.autoencoder.fold_scale(model, scale)
            np.testing.assert_allclose(after(folded, x), before(model, x), rtol=1e-4, atol=1e-4, err_msg=way)
