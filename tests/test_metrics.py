import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import activations, f64, sae

import jaxsae
from jaxsae import SparseCode, metrics
from jaxsae.autoencoder.metrics import Activity, activity, moments, reconstruction
from jaxsae.autoencoder.shrinkage import RATIO_EDGES, shrinkage
from jaxsae.train import losses

ROWS, D, M, K = 64, 16, 32, 6
RELU = jaxsae.ReLU()
MIDDLE = len(RATIO_EDGES) // 2 - 8  # the first bin of ratios of at least 1

# Compiled, since op by op every shape costs dozens of small compilations.
moments = jax.jit(moments)
reconstruction = jax.jit(reconstruction)
activity = jax.jit(activity)
dense = jax.jit(SparseCode.dense)
decode = jax.jit(jaxsae.decode)


@functools.partial(jax.jit, static_argnames="capacity")
def codes_of(model, x, *, capacity):
    """The encoder's code and its refinement."""
    code = jaxsae.encode(model, x, capacity=capacity)
    return code, jaxsae.refine(model, x, code)[0]


@functools.cache
def case(activation=RELU, offset=0.0):
    """An SAE, rows about `offset`, their code and its refinement: never changed, so made once."""
    model, x = sae(m=M, activation=activation), activations(batch=(ROWS,)) + offset
    model = model.replace(b_dec=model.b_dec + offset)
    return model, x, *codes_of(model, x, capacity=M)


def slices(tree, *bounds):
    """The rows of a pytree, cut at `bounds`."""
    edges = (0, *bounds, len(jax.tree.leaves(tree)[0]))
    return [jax.tree.map(operator.itemgetter(slice(i, j)), tree) for i, j in itertools.pairwise(edges)]


def assert_same_numbers(a, b, **tolerance):
    """All numbers but `rest`, which is what rounding left out of them."""

    def check(path, a, b):
        if not any(getattr(key, "name", None) == "rest" for key in path):
            np.testing.assert_allclose(a, b, **tolerance)

    jax.tree.map_with_path(check, a, b)


# --- Moments and reconstruction


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_moments_are_numpys(offset):
    x = activations(d=5, batch=(7, 3)) + offset
    rows = f64(x).reshape(-1, 5)
    found = moments(x)
    assert found.rows == 21
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.spread, ((rows - rows.mean(0)) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.squares, (rows**2).sum(), rtol=1e-5)


def test_moments_of_the_rows_to_keep():
    x, keep = activations(batch=(10,)), np.arange(10) % 3 == 0
    # What is left out may be anything, NaN too.
    found = moments(jnp.where(keep[:, None], x, jnp.nan), jnp.asarray(keep))
    assert_same_numbers(found, moments(x[keep]), rtol=1e-5)


def test_merging_with_the_moments_of_nothing_changes_nothing():
    some, none = moments(activations() + 7), moments(activations(1), jnp.zeros(8, bool))
    assert_same_numbers(some + none, some, rtol=1e-6)
    assert_same_numbers(none + some, some, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_reconstruction_is_numpys(offset):
    x = activations(batch=(500,)) + offset
    x_hat = x - 0.3 - 0.2 * activations(1, batch=(500,))  # a constant error and a random one
    error, spread = f64(x) - f64(x_hat), f64(x) - f64(x).mean(0)
    found = reconstruction(x, x_hat)
    np.testing.assert_allclose(found.nmse, (error**2).sum() / (spread**2).sum(), rtol=1e-3)
    np.testing.assert_allclose(
        found.explained_variance, 1 - ((error - error.mean(0)) ** 2).sum() / (spread**2).sum(), rtol=1e-3
    )


def test_predicting_the_mean_has_nmse_1_and_explains_nothing():
    x = activations(batch=(100,)) + 3
    found = reconstruction(x, jnp.broadcast_to(x.mean(0), x.shape))
    np.testing.assert_allclose(found.nmse, 1, rtol=1e-5)
    np.testing.assert_allclose(found.explained_variance, 0, atol=1e-5)


def test_a_constant_offset_costs_nmse_and_not_explained_variance():
    x = activations(batch=(100,))
    without, with_offset = (reconstruction(x, 0.9 * x + offset) for offset in (0.0, 1.0))
    np.testing.assert_allclose(with_offset.explained_variance, without.explained_variance, rtol=1e-5)
    # The offset is of norm² D a row; what it adds through the mean of the other error is small.
    added = 100 * D / f64(without.data.spread)
    np.testing.assert_allclose(with_offset.nmse - without.nmse, added, rtol=0.05)


def test_reconstruction_of_nothing_is_nan():
    found = reconstruction(jnp.full((3, D), jnp.nan), jnp.zeros((3, D)))
    assert np.isnan(found.nmse)
    assert np.isnan(found.explained_variance)


# --- Activity


def test_activity_is_numpys():
    code = case()[2]
    z = f64(dense(code))
    found = activity(code)
    np.testing.assert_allclose(found.density, (z != 0).mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.l0, (z != 0).sum(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(found.dead, (z == 0).all(0).mean(), rtol=1e-6)
    assert sum(found.log2_histogram) == z.shape[1]
    assert found.log2_histogram[0] == (z == 0).all(0).sum()


def test_octaves_count_latents_in_ranges_each_twice_as_long():
    fired = jnp.array([0, 0, 1, 2, 3, 4, 7, 8, 2**20], jnp.float32)
    assert Activity(jnp.float32(2**20), fired).log2_histogram == [2, 1, 2, 2, 1, *[0] * 16, 1]


def test_a_latent_on_the_support_with_value_0_does_not_fire():
    code = SparseCode(jnp.array([[2.0, 0.0, 0.0]]), jnp.array([[1, 0, 4]]), 4)
    np.testing.assert_array_equal(activity(code).fired, [0, 1, 0, 0])
    assert activity(code).dead == 0.75


# --- Shrinkage


def expected_shrinkage(model, x, code, refined):
    """Every number of `Shrinkage`, in float64."""
    dictionary, b = f64(model.W_dec), f64(model.b_dec)
    target = f64(x) - b
    spread = ((f64(x) - f64(x).mean(0)) ** 2).sum()
    before, after = f64(dense(code)), f64(dense(refined))
    fired = before != 0
    numbers = {}
    for when, z in (("before", before), ("after", after)):
        x_hat = z @ dictionary
        numbers[f"nmse_{when}"] = ((target - x_hat) ** 2).sum() / spread
        numbers[f"gamma_{when}"] = (x_hat**2).sum() / (target * x_hat).sum()
        numbers[f"mean_{when}"] = z[fired].mean()
    ratio = after[fired] / before[fired]
    ever = fired.any(0)
    ratio_of = np.full(model.m, np.nan)
    ratio_of[ever] = (after * fired).sum(0)[ever] / before.sum(0)[ever]
    last = np.nextafter(RATIO_EDGES[-1], 0)
    return numbers | {
        "l0": fired.sum(1).mean(),
        "mean_change": numbers["mean_after"] / numbers["mean_before"] - 1,
        "share_increased": (ratio > 1).mean(),
        "ratio": ratio_of,
        "count": fired.sum(0),
        "ratio_histogram": np.histogram(np.clip(ratio, RATIO_EDGES[0], last), RATIO_EDGES)[0],
    }


@pytest.mark.parametrize("activation", [RELU, jaxsae.TopK(K)], ids=["ReLU", "TopK"])
def test_shrinkage_is_numpys(activation):
    found = shrinkage(*case(activation))
    for name, number in expected_shrinkage(*case(activation)).items():
        np.testing.assert_allclose(getattr(found, name), number, rtol=2e-5, atol=1e-6, err_msg=name)


def test_shrinkage_of_any_leading_batch():
    model, *rest = case()
    folded = jax.tree.map(lambda a: a.reshape(4, ROWS // 4, *a.shape[1:]), rest)
    assert_same_numbers(shrinkage(model, *folded), shrinkage(model, *rest), rtol=1e-5)


def test_an_exact_refit_has_gamma_1_and_its_shrunken_values_less():
    model, x, _, refined = case()
    found = shrinkage(model, x, refined.replace(values=0.8 * refined.values), refined)
    np.testing.assert_allclose(found.gamma_after, 1, atol=1e-5)
    np.testing.assert_allclose(found.gamma_before, 0.8, atol=1e-5)
    np.testing.assert_allclose(found.mean_change, 0.25, atol=1e-5)
    assert found.share_increased == 1


def one_row(before, after):
    """The shrinkage of one row whose values go from `before` to `after`."""
    model = sae(m=M)
    code = SparseCode(jnp.asarray([before], jnp.float32), jnp.arange(len(before))[None], M)
    return shrinkage(model, activations(batch=(1,)), code, code.replace(values=jnp.asarray([after], jnp.float32)))


@pytest.mark.parametrize(
    ("after", "bins"),
    [
        (np.nextafter(np.float32(3), np.float32(0)), {MIDDLE - 1}),  # a fall, however small
        (3.0, {MIDDLE}),  # unchanged
        (np.nextafter(np.float32(3), np.float32(4)), {MIDDLE}),  # a rise, however small
        (3 * 1.1, {MIDDLE + 1}),
        (6.01, {MIDDLE + 8}),  # eight bins an octave
        (0.0, {0}),
        (3e-6, {0}),  # beyond the ends counts at the ends
        (3e6, {len(RATIO_EDGES) - 2}),
    ],
)
def test_the_histogram_of_changes(after, bins):
    change = one_row([3.0], [after]).ratio_histogram
    assert set(np.flatnonzero(change)) == bins
    assert change.sum() == 1


def test_the_middle_of_the_histogram_is_no_change():
    np.testing.assert_allclose(RATIO_EDGES[MIDDLE], 1, rtol=1e-12)


def test_the_histogram_counts_every_active_value_once():
    _, _, code, refined = case()
    found = jax.tree.map(np.asarray, shrinkage(*case()))
    assert found.ratio_histogram.sum() == found.count.sum() == f64(code.l0).sum()
    rising = f64(refined.values) > f64(code.values)
    assert found.num_increased == rising.sum()
    assert found.ratio_histogram[MIDDLE:].sum() == rising.sum()


def test_slots_with_no_value_before_do_not_count():
    found = one_row([2.0, 0.0], [3.0, 4.0])
    assert found.l0 == 1
    assert found.mean_after == 3
    assert found.ratio_histogram.sum() == 1


def test_shrinkage_with_a_mean_far_from_zero():
    far = case(offset=1e3)
    found = functools.reduce(operator.add, (shrinkage(far[0], *part) for part in slices(far[1:], 16, 32, 48)))
    expected = expected_shrinkage(*far)
    np.testing.assert_allclose(found.nmse_before, expected["nmse_before"], rtol=1e-3)
    np.testing.assert_allclose(found.nmse_after, expected["nmse_after"], rtol=1e-3)


def test_bfloat16_counts_beyond_256():
    # bfloat16 has 8 digits: counted in it, 256 + 1 is 256.
    rows = 301
    model = sae(m=M, dtype=jnp.bfloat16)
    code = SparseCode(jnp.ones((rows, 1), jnp.bfloat16), jnp.zeros((rows, 1), jnp.int32), M)
    x = activations(batch=(rows,), dtype=jnp.bfloat16)
    found = shrinkage(model, x, code, code)
    assert found.count[0] == rows
    assert found.ratio_histogram.sum() == rows
    assert (found + found).data.rows == 2 * rows
    halves = functools.reduce(operator.add, (reconstruction(row, row) for row in slices(x, *range(1, rows))))
    assert halves.data.rows == rows


def test_the_table():
    found = one_row([1.0, 2.0], [2.0, 1.0])
    head, *body, last = str(found).splitlines()
    assert head.split() == ["before", "after", "change"]
    assert [line[:16].strip() for line in body] == ["mean activation", "NMSE", "γ"]
    for line, (before, after) in zip(
        body,
        [
            (found.mean_before, found.mean_after),
            (found.nmse_before, found.nmse_after),
            (found.gamma_before, found.gamma_after),
        ],
        strict=True,
    ):
        assert len(line) == len(head)
        change = float(after) / float(before) - 1
        np.testing.assert_allclose([float(n) for n in line[16:36].split()], [before, after], atol=1e-4)
        np.testing.assert_allclose(float(line[36:].strip().rstrip("%")), 100 * change, atol=0.1)
    assert last == "50.0% of 2 active values rise, 0.0% become 0, 2.0 per row over 1 rows"


def test_codes_of_different_shapes_are_refused():
    code = SparseCode(jnp.ones((1, 2)), jnp.zeros((1, 2), jnp.int32), M)
    other = SparseCode(jnp.ones((1, 3)), jnp.zeros((1, 3), jnp.int32), M)
    with pytest.raises(ValueError, match=r"`shrinkage` got a code of shape \(1, 2\) and a refined one of \(1, 3\)"):
        shrinkage(sae(m=M), activations(batch=(1,)), code, other)


# --- Merging, and rows that are not finite: every metric


def measure(name, model, x, code, refined):
    return {
        "moments": lambda: moments(x),
        "reconstruction": lambda: reconstruction(x, decode(model, code)),
        "activity": lambda: activity(code),
        "shrinkage": lambda: shrinkage(model, x, code, refined),
    }[name]()


@pytest.mark.parametrize("bounds", [(ROWS // 2,), (1,), (16, 48)], ids=["halves", "unequal", "thirds"])
@pytest.mark.parametrize("name", ["moments", "reconstruction", "activity", "shrinkage"])
def test_the_parts_add_up_to_the_whole(name, bounds):
    model, *whole = case(offset=2.0)
    parts = [measure(name, model, *part) for part in slices(whole, *bounds)]
    merged = functools.reduce(operator.add, parts)
    assert type(merged) is type(parts[0])
    assert_same_numbers(merged, measure(name, model, *whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["reconstruction", "shrinkage"])
def test_rows_that_are_not_finite_are_left_out(name, bad):
    model, x, *_ = case()
    broken, good = x.at[jnp.array([0, 17])].set(bad), np.delete(np.arange(ROWS), [0, 17])
    whole = (broken, *codes_of(model, broken, capacity=M))
    expected = measure(name, model, *jax.tree.map(lambda a: a[good], whole))
    assert_same_numbers(measure(name, model, *whole), expected, rtol=1e-5, atol=1e-6)


# --- Ratios have no unit, sums no end: every metric


def numbers(metric):
    """All ratios of a metric, by name; the mean activation is in the units of the codes."""
    kinds = {name: each for name, each in vars(type(metric)).items() if isinstance(each, property)}
    values = {name: getattr(metric, name) for name in kinds if name not in ("squares", "_units", "log2_histogram")}
    return {name: np.asarray(value) for name, value in values.items()}


def scaled(tree, scale):
    return jax.tree.map(lambda leaf: leaf * scale if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


@jax.jit
def all_metrics(model, x, code, refined):
    x_hat = jaxsae.decode(model, code)
    return {
        "reconstruction": metrics.reconstruction(x, x_hat),
        "progressive": metrics.progressive(model, x, code, (1, 4)),
        "activity": metrics.activity(code),
        "shrinkage": shrinkage(model, x, code, refined),
        "nmse": losses.nmse(x, x_hat),
    }


def ratios(parts):
    """Of what `all_metrics` measured of each part of a batch, merged."""
    merged = {
        name: functools.reduce(operator.add, [part[name] for part in parts]) for name in parts[0] if name != "nmse"
    }
    found = {f"{name}.{number}": value for name, each in merged.items() for number, value in numbers(each).items()}
    return found | {"nmse": np.asarray(parts[0]["nmse"])}


@pytest.mark.parametrize("power", [-90, -40, 40, 90])
def test_ratios_do_not_depend_on_the_unit(power):
    model, *rows = case(offset=2.0)
    scale = np.float32(2.0**power)
    other = model.replace(b_dec=model.b_dec * scale, b_enc=model.b_enc * scale)
    plain = ratios([all_metrics(model, *part) for part in slices(rows, ROWS // 2)])
    found = ratios([all_metrics(other, *scaled(part, scale)) for part in slices(rows, ROWS // 2)])
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        unit = scale if name.startswith("shrinkage.mean_") and not name.endswith("change") else 1
        np.testing.assert_allclose(found[name] / unit, value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("power", [-90, 0, 90])
def test_of_rows_that_are_equal_what_is_relative_to_their_spread_is_nan(power):
    model, x, code, refined = case()
    same = [
        jax.tree.map(lambda leaf: jnp.tile(leaf[3:4], (ROWS, *[1] * (leaf.ndim - 1))), each)
        for each in (x, code, refined)
    ]
    same = scaled(same, np.float32(2.0**power))
    model = model.replace(b_dec=model.b_dec * np.float32(2.0**power))
    found = ratios([all_metrics(model, *part) for part in slices(same, ROWS // 2)])
    undefined = {name for name, value in found.items() if np.all(np.isnan(value))}
    wanted = {"nmse", "reconstruction.nmse", "reconstruction.explained_variance", "progressive.nmse"}
    assert undefined == wanted | {"shrinkage.nmse_before", "shrinkage.nmse_after"}


def test_of_no_rows_and_of_no_active_values_every_ratio_is_nan_or_0():
    model, x, code, _ = case()
    x, code = jax.tree.map(lambda leaf: leaf[: ROWS // 2], (x, code))
    silent = code.replace(values=jnp.zeros_like(code.values))
    found = ratios([all_metrics(model, x, silent, silent)])
    for name in ("mean_before", "mean_after", "mean_change", "share_increased", "gamma_before", "gamma_after", "ratio"):
        assert np.all(np.isnan(found[f"shrinkage.{name}"])), name
    nothing = ratios([all_metrics(model, x * jnp.nan, silent.replace(values=silent.values * jnp.nan), silent)])
    assert all(np.all(np.isnan(value)) for name, value in nothing.items() if name != "activity.dead")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_thousands_of_equal_batches_have_the_ratios_of_one(dtype):
    model, *rows = jax.tree.map(np.asarray, case())
    x, code, refined = jax.tree.map(lambda leaf: leaf[: ROWS // 2], rows)
    model, x, code, refined = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        (model, 20 * x, code.replace(values=20 * code.values), refined.replace(values=20 * refined.values)),
    )
    one = {name: each for name, each in all_metrics(model, x, code, refined).items() if name != "nmse"}
    kinds = {leaf.dtype for leaf in jax.tree.leaves(one)}
    assert kinds == {np.dtype(np.float32)}
    times = 20_001

    @jax.jit
    def merged(one):
        add = functools.partial(jax.tree.map, operator.add, is_leaf=lambda node: hasattr(node, "_plus"))
        return jax.lax.scan(lambda total, _: (add(total, one), None), one, length=times - 1)[0]

    many = merged(one)
    for name, each in one.items():
        for number, value in numbers(each).items():
            np.testing.assert_allclose(numbers(many[name])[number], value, rtol=1e-6, err_msg=f"{name}.{number}")
    shrunk = many["shrinkage"]
    for name in ("error_before", "sq_norm_after", "inner_product_before", "before", "count", "num_increased"):
        expected = times * f64(getattr(one["shrinkage"], name))
        np.testing.assert_allclose(getattr(shrunk, name), expected, rtol=1e-6, err_msg=name)
    # And the sums themselves are those of numpy, not of the narrow type.
    x_hat = f64(dense(code)) @ f64(model.W_dec)
    np.testing.assert_allclose(one["shrinkage"].sq_norm_before, (x_hat**2).sum(), rtol=1e-5)


def test_counts_go_on_beyond_what_float32_counts_to():
    one = activity(SparseCode(jnp.ones((1, 1)), jnp.zeros((1, 1), jnp.int32), M))

    @jax.jit
    def after(start, steps):
        return jax.lax.fori_loop(0, steps, lambda _, total: total + one, start)

    start = one
    for _ in range(24):
        start = start + start
    total = after(start, 1001)
    for name in ("rows", "fired"):
        high, low = np.max(getattr(total, name)), total.rest[name].ravel()[0]
        assert float(high) + float(low) == 2**24 + 1001, name
        assert float(high) == np.float32(2**24 + 1001), name
    assert total.density[0] == 1


def test_rows_that_are_not_finite_fire_nothing():
    _, _, code, _ = case()
    bad = code.replace(values=code.values.at[3].set(jnp.nan).at[5, 0].set(jnp.inf))
    found, good = activity(bad), np.delete(np.arange(ROWS), [3, 5])
    assert_same_numbers(found, activity(jax.tree.map(lambda leaf: leaf[good], code)))
    assert found.rows == ROWS - 2
