import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import activations, assert_same_bits

import jaxsae
from jaxsae import SparseCode, codes

# Compiled, since op by op every shape costs dozens of small compilations.
dense = jax.jit(SparseCode.dense)
decode = jax.jit(codes.decode)
from_dense = jax.jit(codes.from_dense, static_argnums=1)


def code_of(rows, indices, m):
    return SparseCode(jnp.array(rows, jnp.float32), jnp.array(indices, jnp.int32), m)


def test_an_unused_slot_adds_nothing():
    code = code_of([[2.0, 0.0], [0.0, 0.0]], [[1, 3], [3, 3]], 3)
    assert dense(code).tolist() == [[0, 2, 0], [0, 0, 0]]
    assert code.mask.tolist() == [[True, False], [False, False]]


def test_a_value_past_the_end_is_dropped():
    # A scatter must not wrap or clamp, whatever an unused slot holds by mistake.
    assert dense(code_of([7.0, 1.0], [3, 0], 3)).tolist() == [1, 0, 0]


def test_a_latent_of_value_0_stays_on_the_support():
    code = code_of([0.0, 5.0, 0.0], [2, 1, 4], 4)
    assert code.mask.tolist() == [True, True, False]
    assert code.l0 == 1


def test_an_index_that_stands_twice_adds_up():
    code = code_of([2.0, 3.0, 1.0], [1, 1, 0], 2)
    assert dense(code).tolist() == [1, 5]
    assert np.array_equal(decode(jnp.eye(2), code), dense(code))


def test_overflow_defaults_to_zeros():
    code = code_of(np.ones((2, 3, 4)), np.zeros((2, 3, 4)), 5)
    assert code.num_dropped.shape == (2, 3)
    assert code.num_dropped.dtype == jnp.int32
    assert not code.num_dropped.any()


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_from_dense_and_back(batch):
    z = np.maximum(activations(batch=batch, d=10), 0)
    code = from_dense(jnp.asarray(z), 10)
    assert code.values.shape == code.indices.shape == (*batch, 10)
    assert np.array_equal(dense(code), z)
    assert np.array_equal(code.l0, (z != 0).sum(-1))
    assert not code.num_dropped.any()


def test_from_dense_keeps_the_largest_by_magnitude_and_counts_the_others():
    z = jnp.array([[0.0, -5.0, 1.0, 3.0, -2.0], [0.0, 0.0, 4.0, 0.0, 0.0], [0.0] * 5])
    code = from_dense(z, 2)
    assert code.values.tolist() == [[-5, 3], [4, 0], [0, 0]]
    assert code.indices.tolist() == [[1, 3], [2, 5], [5, 5]]
    assert code.num_dropped.tolist() == [2, 0, 0]


def test_from_dense_breaks_ties_by_index():
    assert from_dense(jnp.ones(4), 2).indices.tolist() == [0, 1]


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_from_dense_keeps_what_is_not_finite(capacity):
    # NaN and Inf must reach the decoder, where they are seen; dropped, they would look like a good row.
    code = from_dense(jnp.array([[0.0, 1.0, jnp.nan, 2.0], [0.0, jnp.inf, 1.0, 2.0]]), capacity)
    assert np.isnan(code.values[0]).sum() == 1
    assert np.isposinf(code.values[1]).sum() == 1
    assert code.num_dropped.tolist() == [max(3 - capacity, 0)] * 2


@pytest.mark.parametrize("capacity", [0, -1, 6])
def test_from_dense_refuses_a_capacity_that_no_row_has(capacity):
    with pytest.raises(ValueError, match=f"got capacity {capacity} for 5 latents; pass a capacity from 1 to 5"):
        from_dense(jnp.ones(5), capacity)


def test_the_derivative_of_from_dense_is_that_of_a_gather():
    z = jnp.array([3.0, 0.0, -4.0, 1.0])
    gradient = jax.grad(lambda z: jnp.sum(from_dense(z, 2).values * jnp.array([10.0, 20.0])))(z)
    assert gradient.tolist() == [20, 0, 10, 0]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_dtypes_are_kept(dtype):
    code = from_dense(jnp.ones((2, 3), dtype), 2)
    assert (code.values.dtype, dense(code).dtype) == (dtype, dtype)
    assert (code.indices.dtype, code.num_dropped.dtype, code.l0.dtype) == (jnp.int32,) * 3
    assert decode(jnp.eye(3, dtype=dtype), code).dtype == dtype


@pytest.mark.parametrize("batch", [(), (5, 8)])
def test_decode_sums_the_atoms(batch):
    dictionary = activations(1, batch=(10,), d=6)
    code = from_dense(activations(batch=batch, d=10), 4)
    np.testing.assert_allclose(decode(dictionary, code), dense(code) @ dictionary, rtol=1e-5, atol=1e-6)


def test_decode_accumulates_in_float32():
    # 256 + 1 is 256 in bfloat16: a running sum in bfloat16 would lose all that follows the first atom.
    dictionary = jnp.ones((257, 1), jnp.bfloat16)
    code = SparseCode(jnp.array([256.0] + [1.0] * 256, jnp.bfloat16), jnp.arange(257, dtype=jnp.int32), 257)
    assert decode(dictionary, code).tolist() == [512]


def test_a_code_goes_through_jit_as_one_argument():
    code = from_dense(jnp.array([[0.0, 2.0, 1.0]]), 2)
    assert_same_bits(jax.jit(lambda code: code)(code), code)
    assert np.array_equal(dense(code), code.dense())


def test_a_code_is_vmapped_over_any_axis():
    code = from_dense(activations(batch=(3, 5), d=8), 4)
    expected = dense(code)
    assert np.array_equal(jax.vmap(dense)(code), expected)
    axes = SparseCode(values=1, indices=1, num_latents=8, num_dropped=1)
    turned = jax.vmap(dense, in_axes=(axes,))(code)
    assert np.array_equal(turned, jnp.moveaxis(expected, 1, 0))
    assert_same_bits(jax.vmap(lambda code: code, in_axes=1, out_axes=1)(code), code)


def test_vmap_can_leave_a_leaf_out():
    code = from_dense(jnp.array([1.0, 2.0]), 2)
    values = jnp.arange(6.0).reshape(3, 2)
    axes = SparseCode(values=0, indices=None, num_latents=2, num_dropped=None)
    out = jax.vmap(dense, in_axes=(axes,))(code.replace(values=values))
    assert np.array_equal(out, values[:, ::-1])


def test_a_code_is_a_tree_of_three_leaves():
    code = from_dense(jnp.array([[0.0, 2.0, 1.0]]), 2)
    assert len(jax.tree.leaves(code)) == 3
    assert jax.tree.map(lambda leaf: leaf.shape, code).values == (1, 2)
    assert jax.eval_shape(lambda code: code, code).values.shape == (1, 2)
    assert jax.tree.structure(code) != jax.tree.structure(code.replace(num_latents=4))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(code)]
    assert names == [".values", ".indices", ".num_dropped"]


def test_a_tree_rebuilt_around_none_keeps_its_structure():
    # optax masks and in_axes put None where arrays were; __post_init__ must not fill them in.
    code = from_dense(jnp.array([[0.0, 2.0, 1.0]]), 2)
    emptied = jax.tree.map(lambda _: None, code)
    assert jax.tree.leaves(emptied) == []
    is_none = {"is_leaf": lambda leaf: leaf is None}
    assert jax.tree.structure(emptied, **is_none) == jax.tree.structure(code)
    assert code.replace(num_dropped=None).num_dropped.tolist() == [0]


def test_codes_can_be_made_of_numpy_arrays(unchecked):
    code = SparseCode(np.array([[1.0, 2.0]], np.float32), np.array([[2, 0]], np.int32), 3)
    assert dense(code).tolist() == [[2, 0, 1]]
    assert jax.device_get(code).num_dropped.tolist() == [0]


def test_check_passes_a_code_that_holds_everything():
    assert jaxsae.check(from_dense(jnp.ones((2, 3)), 3)) is None


def test_check_names_the_row_that_overflowed_most():
    z = jnp.array([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    with pytest.raises(RuntimeError, match=r"2 of 3 rows .* row 1 lost 2\. Pass a capacity of at least 4\."):
        jaxsae.check(from_dense(z, 2))


def test_the_program_for_a_tpu_takes_its_own_top_k():
    def operations(platform):
        traced = jax.jit(lambda x: jaxsae.codes.top_k(x, 8)).trace(jnp.zeros((4, 4096)))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("chlo.top_k"), text.count("stablehlo.sort"), "stablehlo.gather" in text

    assert operations("tpu") == (1, 0, False)
    assert operations("cpu") == operations("cuda") == (2, 1, True)
