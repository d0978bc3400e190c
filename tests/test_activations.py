import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    assert code_of(jaxsae.TopK(2), jnp.ones((3, 8)), 2).overflow.tolist() == [0, 0, 0]


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
    assert code.overflow.tolist() == [1, 0]


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
