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
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from problems import activations, compilations, f64, problem, sae, with_code

import jaxsae
from jaxsae import SparseCode
from jaxsae.train import losses

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
    # Why rounding may make the answer another one altogether, if so.
    chooses: str | None = None
    # Why rounding may change the number of steps, and with it the order of the slots, if so.
    stops: str | None = None
    # Why there is no answer of no rows, if so.
    needs_rows: str | None = None
    # Whether it takes seconds to compile.
    slow: bool = False


NO_SHARDED_TOP_K = "XLA does not partition top-k over rows on a CPU"
NO_SHARDED_CHOLESKY = "XLA does not partition LAPACK's Cholesky over rows on a CPU"
NO_SLOPE = "it has no derivative; that of `refit` on its support is the one to take"
BFLOAT16_EPS = float(jnp.finfo(jnp.bfloat16).eps)
EXACT = jaxsae.FISTA(tol=1e-13, max_steps=10_000)
ALL = {"whole": "it sums over the rows"}
MEAN = {"whole": "it averages over the rows", "needs_rows": "a mean of nothing is NaN"}
NO_ROWS = {"whole": "it changes an SAE and sees no rows"}
TOP_K = {"gathers": NO_SHARDED_TOP_K, "chooses": "which entries are largest"}
CERTIFICATE = {
    "smooth": "a bound to be read; its derivative would be that of whichever violation is largest",
    "gathers": NO_SHARDED_CHOLESKY,
}
LASSO = {"smooth": NO_SLOPE, "gathers": NO_SHARDED_TOP_K, "chooses": "which atoms have a value", "slow": True}
FAST = {"slow": False}
PURSUIT = {
    "smooth": "its values have the derivative of the refit: test_pursuit compares them",
    "chooses": "which atoms come next",
    "slow": True,
}
LEARNING = {
    "whole": "it learns from all rows",
    "smooth": "it is a step of learning, and not differentiated",
    "gathers": "the rows of an atom are wherever they are",
    "chooses": "the atoms are updated in turn, each by what the others left",
    "slow": True,
}


def _gram(sae: jaxsae.SAE, rows: Rows):
    return jaxsae.kernels.gather_gram(sae.W_dec, rows.code.indices, rows.x)


LAWS = {
    "autoencoder.fold_scale": Law(lambda sae, rows: jaxsae.autoencoder.fold_scale(sae, 0.3), **NO_ROWS),
    "autoencoder.pre_activations": Law(lambda sae, rows: jaxsae.autoencoder.pre_activations(sae, rows.x)),
    "autoencoder.rescale": Law(lambda sae, rows: jaxsae.autoencoder.rescale(sae, 0.3), **NO_ROWS),
    "autoencoder.to_fit": Law(lambda sae, rows: jaxsae.autoencoder.to_fit(sae, rows.x)),
    "autoencoder.steer": Law(lambda sae, rows: jaxsae.autoencoder.steer(sae, rows.x, 3, 0.7)),
    "certify": Law(lambda sae, rows: jaxsae.certify(sae, rows.x, rows.code), **CERTIFICATE),
    "least_squares.certify": Law(
        lambda sae, rows: jaxsae.least_squares.certify(sae.W_dec, rows.x, rows.code), **CERTIFICATE
    ),
    "certify_gram": Law(lambda sae, rows: jaxsae.certify_gram(*_gram(sae, rows), rows.code.values), **CERTIFICATE),
    "codes.decode": Law(lambda sae, rows: jaxsae.codes.decode(sae.W_dec, rows.code)),
    "codes.from_dense": Law(lambda sae, rows: jaxsae.codes.from_dense(rows.x, 5), **TOP_K),
    "codes.scatter_add": Law(
        lambda sae, rows: jaxsae.codes.scatter_add(rows.code, rows.x),
        gathers="the order of the sums is fixed, row by row",
        **ALL,
    ),
    "codes.sum_by_latent": Law(
        lambda sae, rows: jaxsae.codes.sum_by_latent(rows.code),
        gathers="the order of the sums is fixed, row by row",
        **ALL,
    ),
    "codes.top_k": Law(lambda sae, rows: jaxsae.codes.top_k(rows.x, 5), **TOP_K),
    "decode": Law(lambda sae, rows: jaxsae.decode(sae, rows.code)),
    "encode": Law(lambda sae, rows: jaxsae.encode(sae, rows.x), **TOP_K),
    "encode_dense": Law(lambda sae, rows: jaxsae.encode_dense(sae, rows.x), **TOP_K),
    "init": Law(
        lambda sae, rows: jaxsae.init(jax.random.key(0), d=D, m=M, activation=sae.activation, b_dec=sae.b_dec),
        whole="it makes one SAE and sees no rows",
    ),
    "kernels.gather_gram": Law(lambda sae, rows: jaxsae.kernels.gather_gram(sae.W_dec, rows.code.indices, rows.x)),
    "kernels.gather_decode": Law(
        lambda sae, rows: jaxsae.kernels.gather_decode(sae.W_dec, rows.code.indices, rows.code.values)
    ),
    "kernels.refit_fused": Law(
        lambda sae, rows: jaxsae.kernels.refit_fused(sae.W_dec, rows.code.indices, rows.x, rows.code.values, tol=1e-4),
        smooth="compared with that of `refit` in test_kernels",
    ),
    "kernels.scatter_rows": Law(
        lambda sae, rows: jaxsae.kernels.scatter_rows(
            rows.code.indices, rows.code.values[..., None], rows.x[..., None, :], num_latents=M
        ),
        gathers="the order of the sums is fixed, row by row",
        **ALL,
    ),
    "ksvd.approximate": Law(lambda sae, rows: jaxsae.ksvd.approximate(sae.W_dec, rows.x, rows.code), **LEARNING),
    "ksvd.exact": Law(lambda sae, rows: jaxsae.ksvd.exact(sae.W_dec, rows.x, rows.code), **LEARNING),
    "ksvd.fit": Law(
        lambda sae, rows: jaxsae.ksvd.fit(jax.random.key(0), rows.x, m=M, k=2, steps=2, start=sae.W_dec),
        needs_rows="it refuses to learn from nothing",
        **LEARNING,
    ),
    "ksvd.mod": Law(lambda sae, rows: jaxsae.ksvd.mod(sae.W_dec, rows.x, rows.code), **LEARNING),
    "ksvd.replace": Law(lambda sae, rows: jaxsae.ksvd.replace(sae.W_dec, rows.x, rows.code), **LEARNING),
    "lasso.blend": Law(lambda sae, rows: jaxsae.lasso.blend(sae.W_dec, rows.x, 4.0, 0.5), **LASSO),
    "lasso.cross_validate": Law(
        lambda sae, rows: jaxsae.lasso.cross_validate(
            *(jax.random.key(0), sae.W_dec, sae.b_dec), phis=(0.0, 1.0), folds=3, n_lambdas=3
        ),
        whole="it is of one row, whose entries are the samples",
        **LASSO,
    ),
    "lasso.lambda_max": Law(lambda sae, rows: jaxsae.lasso.lambda_max(sae.W_dec, rows.x)),
    "lasso.lasso": Law(lambda sae, rows: jaxsae.lasso.lasso(sae.W_dec, rows.x, 1.0), **LASSO | FAST),
    "lasso.path": Law(lambda sae, rows: jaxsae.lasso.path(sae.W_dec, rows.x, n_lambdas=3, eps=0.1), **LASSO),
    "lasso.relaxed": Law(lambda sae, rows: jaxsae.lasso.relaxed(sae.W_dec, rows.x, 4.0, 0.5), **LASSO),
    "metrics.activity": Law(
        lambda sae, rows: jaxsae.metrics.activity(rows.code),
        smooth="it counts",
        gathers="the order of the sums is fixed, row by row",
        **ALL,
    ),
    "metrics.moments": Law(lambda sae, rows: jaxsae.metrics.moments(rows.x), **ALL),
    "metrics.progressive": Law(
        lambda sae, rows: jaxsae.metrics.progressive(sae, rows.x, rows.code, (2, K)),
        gathers=NO_SHARDED_TOP_K,
        **ALL,
    ),
    "metrics.reconstruction": Law(
        lambda sae, rows: jaxsae.metrics.reconstruction(rows.x, jnp.sin(rows.x)),
        **ALL,
    ),
    "metrics.recovery": Law(
        lambda sae, rows: jaxsae.metrics.recovery(
            jaxsae.metrics.Matching(np.arange(M)[::-1].copy(), np.ones(M)), rows.code, rows.refined.dense()
        ),
        smooth="it counts, and sums over what is active in both",
        gathers="the order of the sums is fixed, row by row",
        **ALL,
    ),
    "nnls": Law(
        lambda sae, rows: jaxsae.nnls(*_gram(sae, rows)),
        smooth=lambda sae, rows: jaxsae.nnls(*_gram(sae, rows), None, EXACT)[0],
        gathers=NO_SHARDED_CHOLESKY,
        chooses="which values are 0, where rounding decides",
    ),
    "nnls_dense": Law(
        lambda sae, rows: jaxsae.nnls_dense(sae.W_dec[:K].T, rows.x),
        smooth=lambda sae, rows: jaxsae.nnls_dense(sae.W_dec[:K].T, rows.x, None, EXACT)[0],
        gathers=NO_SHARDED_CHOLESKY,
        chooses="which values are 0, where rounding decides",
    ),
    "pursuit.cosamp": Law(
        # Of rows that go on for longer, rounding decides how long.
        lambda sae, rows: jaxsae.pursuit.cosamp(sae.W_dec, rows.x, k=K, max_steps=10),
        gathers=f"{NO_SHARDED_TOP_K}; {NO_SHARDED_CHOLESKY}",
        **PURSUIT,
    ),
    "pursuit.gradient_pursuit": Law(
        lambda sae, rows: jaxsae.pursuit.gradient_pursuit(sae.W_dec, rows.x, k=K),
        gathers=NO_SHARDED_CHOLESKY,
        **PURSUIT,
    ),
    "pursuit.iht": Law(
        lambda sae, rows: jaxsae.pursuit.iht(sae.W_dec, rows.x, k=K), gathers=NO_SHARDED_TOP_K, **PURSUIT
    ),
    "pursuit.iti": Law(
        lambda sae, rows: jaxsae.pursuit.iti(sae.W_dec, rows.x, k=K),
        gathers=NO_SHARDED_TOP_K,
        stops="a row ends when a step changes nothing, to rounding",
        **PURSUIT | FAST,
    ),
    "pursuit.matching_pursuit": Law(
        lambda sae, rows: jaxsae.pursuit.matching_pursuit(sae.W_dec, rows.x, k=K),
        gathers=NO_SHARDED_CHOLESKY,
        **PURSUIT,
    ),
    "pursuit.niht": Law(
        lambda sae, rows: jaxsae.pursuit.niht(sae.W_dec, rows.x, k=K), gathers=NO_SHARDED_TOP_K, **PURSUIT
    ),
    "pursuit.omp": Law(
        lambda sae, rows: jaxsae.pursuit.omp(sae.W_dec, rows.x, k=K), gathers=NO_SHARDED_CHOLESKY, **PURSUIT | FAST
    ),
    "reconstruct": Law(lambda sae, rows: jaxsae.reconstruct(sae, rows.x, rows.code)),
    "refine": Law(
        lambda sae, rows: jaxsae.refine(sae, rows.x),
        smooth=lambda sae, rows: jaxsae.refine(sae, rows.x, None, EXACT)[0],
        **TOP_K,
    ),
    "refit": Law(
        lambda sae, rows: jaxsae.refit(sae.W_dec, rows.x, rows.code),
        smooth="compared entry by entry in test_refit",
        gathers=f"{NO_SHARDED_CHOLESKY}, which answers for the rows that conjugate gradient leaves",
        chooses="which values are 0, where rounding decides",
    ),
    "shrinkage": Law(lambda sae, rows: jaxsae.shrinkage(sae, rows.x, rows.code, rows.refined), **ALL),
    "train.geometric_median": Law(
        lambda sae, rows: jaxsae.train.geometric_median(rows.x, iterations=20),
        whole="it is one point for all rows",
        needs_rows="nothing has no centre",
    ),
    "train.init_state": Law(lambda sae, rows: jaxsae.train.init_state(sae, optax.sgd(0.1)), **NO_ROWS),
    "train.losses.auxk": Law(
        lambda sae, rows: losses.auxk(sae, rows.x, rows.x, jnp.arange(M) % 2 == 0, k_aux=4),
        smooth="it holds the residual, x and b_dec constant, on purpose; test_losses compares the rest",
        gathers=NO_SHARDED_TOP_K,
        **MEAN,
    ),
    "train.losses.gate": Law(
        lambda sae, rows: losses.gate(sae, rows.x, jaxsae.autoencoder.pre_activations(sae, rows.x)),
        smooth="it holds the decoder constant, on purpose; test_losses compares the rest",
        **MEAN,
    ),
    "train.losses.l0_target": Law(lambda sae, rows: losses.l0_target(rows.x[..., 0], 5.0), **MEAN),
    "train.losses.l1": Law(lambda sae, rows: losses.l1(rows.x @ sae.W_enc, sae.W_dec), **MEAN),
    "train.losses.matryoshka": Law(lambda sae, rows: losses.matryoshka(sae, rows.x, rows.code, (4, 16)), **MEAN),
    "train.losses.mse": Law(lambda sae, rows: losses.mse(rows.x, jnp.sin(rows.x)), **MEAN),
    "train.losses.nmse": Law(lambda sae, rows: losses.nmse(rows.x, jnp.sin(rows.x)), **MEAN),
    "train.resample": Law(
        lambda sae, rows: jaxsae.train.resample(
            *(jax.random.key(0), jaxsae.train.init_state(sae, optax.sgd(0.1)), rows.x), idle_after=0
        ),
        whole="it draws from all rows",
        needs_rows="there is none to draw",
        smooth="it draws at random",
        gathers="every device has all the atoms that are drawn",
        chooses="which rows are drawn",
    ),
}

# What has no row, by the beginning of its name. Everything else that is public, and no class, has one.
LAWLESS = {
    "app.": "host side: files in, files out",
    "autoencoder.calibration.": "host side: it goes over batches one after another",
    "autoencoder.describe": "host side: it returns words",
    "autoencoder.rethreshold": "host side: it sorts all there is and raises if that is nothing; see test_sae",
    "autoencoder.row_width": "it is of structure: no arithmetic",
    "autoencoder.split_rows": "it is of structure: no arithmetic",
    "check": "host side: it raises, and returns nothing",
    "codes.used": "it is of indices, and there are no numbers in it",
    "data.": "host side: it reads and writes files",
    "formats.": "host side: it reads and writes files",
    "ksvd.image_files.": "host side: it reads and writes files",
    "ksvd.images.": "host side: a picture of numpy in, another out",
    "language_model.": "its first argument is a language model: test_language_model compares with other libraries",
    "metrics.co_activation": "host side: it sorts; test_features has its laws",
    "metrics.context_sample": "host side: it sorts; test_features has its laws",
    "metrics.match": "host side: the Hungarian algorithm, on two dictionaries",
    "metrics.top_contexts": "host side: it sorts; test_features has its laws",
    "pretrained.": "host side: it reads and writes files",
    "pytrees.": "it is of structure: no arithmetic",
    "sharding.": "it says where arrays are: no arithmetic",
    "solvers.": "it makes the options of a solver",
    "stream.": "host side: it goes over a file, block by block",
    "train.aligned_encoder": "it makes an optax transformation",
    "train.bfloat16_adam": "it makes an optax transformation",
    "train.checkpoint.": "host side: it reads and writes files",
    "train.default_optimizer": "it makes an optax transformation",
    "train.ema": "it makes an optax transformation, or reads its state",
    "train.fit": "host side: the loop around a step",
    "train.job.": "host side: the loop around a step",
    "train.learning_rate": "a number of numbers, on the host",
    "train.make_step": "it makes a function: test_train has its laws",
    "train.member": "it is of structure: no arithmetic",
    "train.stack": "it is of structure: no arithmetic",
    "train.sweep": "host side: the loop around a step",
    "train.unit_norm_decoder": "it makes an optax transformation",
}


def test_every_public_function_has_a_row():
    from test_reference import public  # skips this test alone where there are no documents

    # Classes are states and options, but for the activations: these have laws in test_activation_laws.
    functions = {name.removeprefix("jaxsae.") for name, thing in public().items() if not inspect.isclass(thing)}
    excused = {name for name in functions if name.startswith(tuple(LAWLESS))}
    assert functions - excused == LAWS.keys()
    assert not [start for start in LAWLESS if not any(name.startswith(start) for name in excused)]


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


def assert_expected(name: str, found):
    """What the function returned by itself; in any order of slots, where rounding may change the number of steps."""
    wanted = expected(name)
    assert_close(*(map(_settled, (found, wanted)) if LAWS[name].stops else (found, wanted)))


def _settled(out):
    """What does not depend on the number of steps: codes as their entries, and how each row ended."""

    def settle(node):
        if isinstance(node, SparseCode):
            return node.dense(), node.l0, node.num_dropped
        return node.status if isinstance(node, jaxsae.RefitInfo) else node

    return jax.tree.map(settle, out, is_leaf=lambda node: isinstance(node, SparseCode | jaxsae.RefitInfo))


def cast(tree, dtype):
    """The numbers of a tree in another precision."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def rows_of_the_table(holds: Callable[[Law], bool], *others: str):
    """The functions for which a law is meant, as the parameter `name`; those that take long marked slow."""
    marks = {name: [pytest.mark.slow] * law.slow for name, law in LAWS.items() if holds(law)}
    return pytest.mark.parametrize("name", [*others, *(pytest.param(name, marks=marks[name]) for name in marks)])


every_law = rows_of_the_table(lambda law: True)
row_by_row = rows_of_the_table(lambda law: law.whole is None)
differentiable = rows_of_the_table(lambda law: not isinstance(law.smooth, str))


@every_law
def test_jit_is_eager_and_traces_once(name):
    compiled = jax.jit(chex.assert_max_traces(LAWS[name].call, 1))
    assert_expected(name, compiled(*data()))
    jax.block_until_ready(compiled(*data(1)))
    chex.clear_trace_counter()


@every_law
def test_a_second_call_compiles_nothing(name):
    expected(name)
    model, rows = data(1)
    with compilations() as seen:
        jax.block_until_ready(LAWS[name].call(model, rows))
    assert not seen


@pytest.mark.parametrize(
    "name",
    [
        "lasso.lambda_max",
        "lasso.lasso",
        "lasso.path",
        "lasso.relaxed",
        "least_squares.certify",
        "pursuit.iti",
        "pursuit.omp",
        "refit",
    ],
)
def test_another_number_of_rows_compiles_nothing(name):
    model, rows = data(batch=(62,))  # 64 with padding
    expected(name)
    with compilations() as seen:
        jax.block_until_ready(LAWS[name].call(model, rows))
    assert not seen


@pytest.mark.parametrize("name", ["decode", "pursuit.omp", "refine"])
def test_a_program_for_any_number_of_rows_is_exported(name):
    model, rows = data()
    (b,) = jax.export.symbolic_shape("b")
    symbolic = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), rows)
    exported = jax.export.export(jax.jit(functools.partial(LAWS[name].call, model)))(symbolic)
    assert_close(exported.call(rows), expected(name))


@pytest.mark.parametrize(
    "name", ["certify", "refit", "lasso.lasso", "lasso.path", "lasso.lambda_max", "pursuit.omp", "pursuit.iti"]
)
def test_arrays_of_numpy_are_taken(name, unchecked):
    call, given = LAWS[name].call, expected(name)
    assert_close(call(*jax.tree.map(np.asarray, data())), given)
    assert_close(call(*jax.tree.map(lambda x: np.asarray(x, float if x.dtype == np.float32 else None), data())), given)


@row_by_row
def test_vmap_is_the_batch(name):
    assert_expected(name, jax.jit(jax.vmap(LAWS[name].call, in_axes=(None, 0)))(*data()))


@every_law
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_is_kept(name, dtype, x64):
    # With float64 at hand: a constant or a default of the wider type would show.
    out = jax.eval_shape(LAWS[name].call, *data(dtype=dtype))
    kinds = {leaf.dtype for leaf in jax.tree.leaves(out)}
    assert kinds <= {np.dtype(dtype), np.dtype(np.int32)}
    assert np.dtype(dtype) in kinds


@rows_of_the_table(lambda law: law.needs_rows is None)
def test_an_empty_batch_is_no_special_case(name):
    model, rows = data(batch=(0,))
    out = jax.jit(LAWS[name].call)(model, rows)
    # A whole may return its rows too, as k-SVD does the code.
    n = len(data()[1].x)
    shapes = jax.tree.map(lambda leaf: (0, *leaf.shape[1:]) if leaf.shape[:1] == (n,) else leaf.shape, expected(name))
    if LAWS[name].whole is None:
        shapes = jax.tree.map(lambda leaf: (0, *leaf.shape[1:]), expected(name))
        nested = jax.eval_shape(LAWS[name].call, *data(batch=(3, 0)))
        assert {leaf.shape[:2] for leaf in jax.tree.leaves(nested)} == {(3, 0)}
    assert jax.tree.map(lambda leaf: leaf.shape, out) == shapes
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(out))


def _numbers(out):
    """What rounding must not change much: not how a solve ended, and a code in whatever order its slots are."""
    ours = (SparseCode, jaxsae.RefitInfo)
    parts = jax.tree.leaves(out, is_leaf=lambda node: isinstance(node, ours))
    parts = [part.dense() if isinstance(part, SparseCode) else part for part in parts]
    parts = [part for part in parts if not isinstance(part, jaxsae.RefitInfo)]
    return [f64(part) for part in parts if jnp.issubdtype(part.dtype, jnp.floating)]


@every_law
def test_bfloat16_is_float32_rounded(name):
    law, given = LAWS[name], cast(data(), jnp.bfloat16)
    found, wanted = (jax.jit(law.call)(*each) for each in (given, cast(given, jnp.float32)))
    kinds = {leaf.dtype for leaf in jax.tree.leaves(found)}
    assert kinds <= {jnp.dtype(kind) for kind in (jnp.bfloat16, jnp.float32, jnp.int32)}
    assert all(np.isfinite(f64(leaf)).all() for leaf in jax.tree.leaves(found))
    if law.chooses and law.whole:
        return
    for got, want in zip(_numbers(found), _numbers(wanted), strict=True):
        axes = None if law.whole else tuple(range(1, want.ndim))
        off = np.sqrt(np.sum((got - want) ** 2, axes)) > 8 * BFLOAT16_EPS * np.sqrt(np.sum(want**2, axes))
        assert np.mean(off) <= (0.2 if law.chooses else 0)


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
        return weights @ numbers, jnp.append(discrete, (numbers == 0).astype(jnp.int32))

    # One program for the values, the gradient and the slopes: compiling is most of the time.
    @jax.jit
    def evaluate(points, directions):
        found = jax.lax.map(jax.value_and_grad(loss, has_aux=True), points)
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
    # Forward mode is backward mode transposed.
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
    "gradients": lambda sae, rows: jax.grad(_quartic, (0, 1))(sae.W_dec, rows.code.values, rows.code, rows.x),
    "gradient of a refit": lambda sae, rows: jax.grad(_of_a_refit, (0, 1))(sae.W_dec, rows.x, rows.code),
}


def _quartic(dictionary, values, code, x):
    return jnp.sum((x - jaxsae.codes.decode(dictionary, code.replace(values=values))) ** 2)


def _of_a_refit(dictionary, x, code):
    return jnp.sum(jaxsae.refit(dictionary, x, code)[0].values ** 2)


@rows_of_the_table(lambda law: True, *OF_A_CODE)
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
    assert_expected(name, compiled(model, rows))
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
