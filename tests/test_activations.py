import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from problems import activations

import jaxsae

# Compiled, since op by op every shape costs dozens of small compilations.
apply = jax.jit(lambda activation, pre: activation(pre))
code_of = jax.jit(lambda activation, pre, capacity: activation.code(pre, capacity), static_argnums=2)
dense = jax.jit(jaxsae.SparseCode.dense)


def keep_largest(pre: np.ndarray, k: int) -> np.ndarray:
    """TopK by sorting, row by row; of equal values the first counts as the larger."""
    z = np.zeros_like(pre)
    for row in np.ndindex(pre.shape[:-1]):
        for i in np.argsort(-pre[row], kind="stable")[:k]:
            z[row][i] = max(pre[row][i], 0)
    return z


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("k", [1, 3, 12])
def test_topk_keeps_the_largest_that_are_positive(batch, k):
    pre = np.asarray(activations(batch=batch, d=12))
    z = keep_largest(pre, k)
    np.testing.assert_array_equal(apply(jaxsae.TopK(k), jnp.asarray(pre)), z)
    code = code_of(jaxsae.TopK(k), jnp.asarray(pre), k)
    np.testing.assert_array_equal(dense(code), z)
    assert code.values.shape == (*batch, k)


def test_topk_with_fewer_than_k_positive_leaves_slots_unused():
    pre = jnp.array([[-1.0, 2.0, -3.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    code = code_of(jaxsae.TopK(3), pre, 3)
    assert code.values.tolist() == [[2, 0, 0], [0, 0, 0]]
    assert code.indices.tolist() == [[1, 4, 4], [4, 4, 4]]


def test_topk_breaks_ties_by_index():
    pre = jnp.array([1.0, 2.0, 2.0, 2.0])
    assert code_of(jaxsae.TopK(2), pre, 2).indices.tolist() == [1, 2]
    assert apply(jaxsae.TopK(2), pre).tolist() == [0, 2, 2, 0]


def test_topk_never_overflows():
    # Leaving positive latents out is what TopK means: it is no loss to report.
    assert code_of(jaxsae.TopK(2), jnp.ones((3, 8)), 2).num_dropped.tolist() == [0, 0, 0]


def test_topk_fills_a_larger_capacity_with_unused_slots():
    pre = activations(d=8)
    own, wide = code_of(jaxsae.TopK(3), pre, 3), code_of(jaxsae.TopK(3), pre, 6)
    assert wide.values.shape == (8, 6)
    assert not np.any(np.asarray(wide.mask)[:, 3:])
    assert not np.any(np.asarray(wide.values)[:, 3:])
    assert np.array_equal(dense(wide), dense(own))


def test_topk_code_is_in_descending_order():
    code = code_of(jaxsae.TopK(5), activations(d=20), 5)
    assert np.all(np.diff(code.values) <= 0)


def test_the_gradient_of_topk_reaches_only_what_it_keeps():
    pre = jnp.array([3.0, -1.0, 2.0, 1.0])
    weights = jnp.array([10.0, 20.0, 30.0, 40.0])
    assert jax.grad(lambda pre: apply(jaxsae.TopK(2), pre) @ weights)(pre).tolist() == [10, 0, 30, 0]


@pytest.mark.parametrize("k", [0, -3])
def test_topk_refuses_no_latents(k):
    with pytest.raises(ValueError, match=f"TopK got k = {k}; pass k of at least 1"):
        jaxsae.TopK(k)


def test_topk_refuses_more_latents_than_there_are():
    with pytest.raises(ValueError, match="TopK got k = 9 for 8 latents; pass k of at most 8"):
        apply(jaxsae.TopK(9), jnp.ones(8))


def test_topk_refuses_a_capacity_below_k():
    with pytest.raises(ValueError, match="TopK fixes k = 3, but got capacity 2; leave capacity out"):
        code_of(jaxsae.TopK(3), jnp.ones(8), 2)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_relu_keeps_what_is_positive(batch):
    pre = activations(batch=batch, d=12)
    z = np.maximum(pre, 0)
    np.testing.assert_array_equal(apply(jaxsae.ReLU(), pre), z)
    np.testing.assert_array_equal(dense(code_of(jaxsae.ReLU(), pre, 12)), z)


def test_relu_counts_what_does_not_fit():
    code = code_of(jaxsae.ReLU(), jnp.array([[1.0, 4.0, -9.0, 2.0], [-1.0, -1.0, 3.0, -1.0]]), 2)
    assert code.values.tolist() == [[4, 2], [3, 0]]
    assert code.num_dropped.tolist() == [1, 0]


@pytest.mark.parametrize("activation", [jaxsae.ReLU(), jaxsae.TopK(2)], ids=lambda a: type(a).__name__)
def test_an_activation_has_no_leaves_and_can_be_compared(activation):
    assert jax.tree.leaves(activation) == []
    assert jax.tree.unflatten(jax.tree.structure(activation), []) == activation


@pytest.mark.parametrize("activation", [jaxsae.ReLU(), jaxsae.TopK(2)], ids=lambda a: type(a).__name__)
def test_nan_stays_visible(activation):
    z = apply(activation, jnp.array([[1.0, jnp.nan, 3.0], [1.0, 2.0, 3.0]]))
    assert np.isnan(z[0]).any()
    assert np.isfinite(z[1]).all()


def test_k_is_what_an_activation_fixes():
    assert jaxsae.ReLU().slots is None
    assert jaxsae.TopK(5).slots == 5


@pytest.mark.parametrize("k", [2.5, True, "3", None])
def test_k_is_a_whole_number(k, unchecked):
    for kind in (jaxsae.TopK, jaxsae.AbsTopK, jaxsae.BatchTopK, jaxsae.GroupMax):
        with pytest.raises(ValueError, match=rf"{kind.__name__} got k = {k}; pass k of at least 1, a whole number"):
            kind(k)


@pytest.mark.parametrize("keep", [-1, -0.5, 4.5, np.nan, np.inf, True, "3"])
def test_a_part_of_the_slots_is_from_none_to_all(keep, unchecked):
    with pytest.raises(ValueError, match=rf"TopK got keep = {keep}; pass a number from 0 to k = 4"):
        jaxsae.TopK(4, keep=keep)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, r"max_steps = 0; pass a whole number of at least 1, or None"),
        ({"max_steps": 2.5}, r"max_steps = 2\.5; pass a whole number of at least 1, or None"),
        ({"max_steps": True}, r"max_steps = True; pass a whole number of at least 1, or None"),
        ({"residual_threshold": -0.1}, r"residual_threshold = -0\.1; pass a finite norm of at least 0"),
        ({"residual_threshold": np.nan}, r"residual_threshold = nan; pass a finite norm of at least 0"),
    ],
)
def test_a_pursuit_refuses_options_that_make_no_sense(options, message, unchecked):
    with pytest.raises(ValueError, match=f"MatchingPursuit got {message}"):
        jaxsae.autoencoder.activations.MatchingPursuit(**options)


def unit_atoms(m, d, dtype=np.float64):
    atoms = np.random.default_rng(0).normal(size=(m, d))
    return jnp.asarray(atoms / np.linalg.norm(atoms, axis=1, keepdims=True), dtype)


@pytest.mark.parametrize("stops", [{"residual_threshold": 0.0, "stop_on_duplicate": False}, {}], ids=["never", "early"])
def test_a_pursuit_has_the_derivative_of_its_values(stops, x64):
    pursuit = jaxsae.autoencoder.activations.MatchingPursuit(max_steps=6, **stops)
    y, D = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8))), unit_atoms(24, 8)

    def value(y, D):
        return jnp.sum(jnp.sin(pursuit.pursue(jnp.asarray(y), jnp.asarray(D))))

    check_grads(value, (y, D), 1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)
    assert float(jnp.abs(jax.grad(value, 1)(y, D)).max()) > 0.1


def test_the_l0_of_a_pursuit_by_step_is_that_of_shorter_ones():
    stops = {"residual_threshold": 0.0, "stop_on_duplicate": False}
    y, D = jnp.asarray(np.random.default_rng(1).normal(size=(40, 8)), jnp.float32), unit_atoms(24, 8, jnp.float32)
    pursuits = [jaxsae.autoencoder.activations.MatchingPursuit(max_steps=steps, **stops) for steps in range(1, 21)]
    wanted = [float((each.pursue(y, D) != 0).sum(axis=1).mean()) for each in pursuits]
    assert wanted[-1] < 19  # atoms are taken again
    np.testing.assert_allclose(pursuits[-1].l0_by_step(y, D), wanted, rtol=1e-6)


@pytest.mark.parametrize("leaf", [True, -1, "activation.keep", None])
def test_what_jax_rebuilds_around_something_else_is_not_looked_at(leaf):
    assert jax.tree.map(lambda _: leaf, jaxsae.TopK(4, keep=2.0)).keep is leaf


KEPT = pytest.mark.parametrize("keep", [-1.0, 0.0, 0.9, 1.0, 2.5, 2.999, 3, 4.0, 7.5])


@KEPT
def test_keep_means_one_thing_and_is_rounded_down(keep):
    pre = jnp.array([[5.0, -1.0, 4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0, -1.0, 0.0], [-1.0] * 6])
    number = int(np.clip(np.floor(keep), 0, 4))
    z = keep_largest(np.asarray(pre), number)
    activation = jaxsae.TopK(4, keep=jnp.float32(keep))  # an array, which may be traced, is not looked at
    np.testing.assert_array_equal(apply(activation, pre), z)
    code = code_of(activation, pre, 4)
    np.testing.assert_array_equal(dense(code), z)
    np.testing.assert_array_equal(code.mask, np.asarray(code.values) > 0)


INF = np.array([np.inf, 0.5, 0.0, -np.inf], np.float32)
FINITE = np.array([9.0, 0.5, 0.0, -9.0], np.float32)


def _extreme(thresholds, infinite):
    some, none = jnp.full(4, 0.3), thresholds[0]
    return {
        "JumpReLU": jaxsae.JumpReLU(thresholds, bandwidth=1.0),
        "JumpReLU of no bandwidth": jaxsae.JumpReLU(thresholds, bandwidth=0.0),
        "Gated by its gate": jaxsae.Gated(some, -thresholds, some),
        "Gated by its values": jaxsae.Gated(some, some, -jnp.abs(thresholds)),
        "BatchTopK closed": jaxsae.BatchTopK(2, none),
        "BatchTopK open": jaxsae.BatchTopK(2, -none),
    }[infinite]


@pytest.mark.parametrize("name", ["JumpReLU", "JumpReLU of no bandwidth", "Gated by its gate", "Gated by its values",
                                  "BatchTopK closed", "BatchTopK open"])  # fmt: skip
def test_an_infinite_threshold_or_bias_is_a_very_large_one(name):
    pre = jnp.array([[1.0, 0.7, 0.2, -0.1], [0.2, 0.4, -0.3, 2.0]])
    weights = jnp.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])

    @jax.jit
    def everything(activation, pre):
        def loss(activation, pre):
            z = activation(pre)
            l0 = activation.l0(pre) if isinstance(activation, jaxsae.JumpReLU) else 0.0
            return jnp.sum(weights * z) + jnp.sum(l0), z

        slopes, z = jax.grad(loss, (0, 1), has_aux=True)(activation, pre)
        return z, dense(activation.code(pre, 4)), slopes

    found, wanted = (everything(_extreme(jnp.asarray(each), name), pre) for each in (INF, FINITE))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    jax.tree.map(np.testing.assert_allclose, found, wanted)


@pytest.mark.parametrize("scale", [1.0, 89.0, np.inf])
def test_a_latent_that_its_gate_shuts_has_no_slope_whatever_its_scale(scale):
    activation = jaxsae.Gated(jnp.full(2, scale), jnp.array([-3.0, 3.0]), jnp.zeros(2))
    slopes = jax.grad(lambda activation, pre: activation(pre)[0] ** 2, (0, 1))(activation, jnp.array([1.0, 1.0]))
    assert all(np.all(leaf[0] == 0) for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize("bandwidth", [-1.0, np.nan, np.inf])
def test_a_bandwidth_of_no_sense_is_refused(bandwidth):
    with pytest.raises(ValueError, match=r"JumpReLU got a bandwidth of .*; pass a finite one, of at least 0"):
        jaxsae.JumpReLU(jnp.ones(2), bandwidth=bandwidth)


def test_what_is_no_activation_is_refused_in_a_line(unchecked):
    class Bare(jaxsae.autoencoder.activations.Activation):
        def __call__(self, pre):
            return pre

    class BareTopK(jaxsae.TopK):
        def __call__(self, pre):
            return pre

    def made(activation):
        return jaxsae.init(jax.random.key(0), d=4, m=8, activation=activation)

    def by_hand(activation):
        return jaxsae.SAE(jnp.ones((4, 8)), jnp.ones(8), jnp.ones((8, 4)), jnp.ones(4), activation)

    for make in (made, by_hand):
        for wrong, message in (
            (jax.nn.relu, r"got the function relu for an activation; pass one of jaxsae's, such as jaxsae.ReLU\(\)"),
            (jaxsae.ReLU, "got the class ReLU for an activation; call it"),
            (Bare(), "class Bare, which is not a pytree; decorate the class with @jaxsae.pytrees.dataclass"),
            (BareTopK(2), "class BareTopK, which is not a pytree; decorate the class with @jaxsae.pytrees.dataclass"),
        ):
            with pytest.raises(TypeError, match=message):
                make(wrong)
    with pytest.raises(TypeError, match="got a str for an activation"):
        made("relu")


@pytest.mark.parametrize(
    "activation",
    [
        jaxsae.JumpReLU(jnp.array([jnp.nan, 1.0])),
        jaxsae.Gated(jnp.zeros(2), jnp.array([jnp.nan, 0.0]), jnp.zeros(2)),
        jaxsae.BatchTopK(1, jnp.nan),
    ],
    ids=lambda activation: type(activation).__name__,
)
def test_a_parameter_that_is_nan_stays_visible(activation):
    z = np.asarray(activation(jnp.array([2.0, 3.0])))
    assert np.isnan(z[0])
    assert np.isnan(z[1]) == isinstance(activation, jaxsae.BatchTopK)
    assert np.isnan(activation.code(jnp.array([[2.0, 3.0]]), 2).values).any()
