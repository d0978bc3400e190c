"""Small linear algebra that others rest on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsae._core.linalg import max_or_nan, power_of_two

NAN = float("nan")
ROWS = [[1, -2, 3], [-1, -np.inf, -3], [np.inf, 0, -np.inf], [NAN, 1, np.inf], [-NAN, -1, 2], [-0.0, -1, -5]]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_largest_is_nan_if_any_is_whatever_its_sign(dtype):
    found = jax.jit(max_or_nan, static_argnums=1)(jnp.array(ROWS, dtype), 1)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), [3, 0, np.inf, NAN, NAN, 0])


def test_the_largest_has_its_derivative():
    x = jnp.array([[1.0, 4.0, 3.0], [-1.0, -2.0, -3.0]])
    slope = jax.grad(lambda x: jnp.sum(max_or_nan(x, 1)))(x)
    np.testing.assert_array_equal(slope, [[0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(jax.jvp(lambda x: max_or_nan(x, 1), (x,), (2 * x,))[1], [8, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_powers_of_two_keep_the_sign_and_what_is_not_finite(dtype):
    found = power_of_two(jnp.array([3, -5, 0, np.inf, NAN, 0.75], dtype))
    np.testing.assert_array_equal(np.asarray(found, np.float32), [2, -4, 0, np.inf, NAN, 0.5])
