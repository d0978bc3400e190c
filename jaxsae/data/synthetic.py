"""Rows with known features: what an autoencoder should find, and so a measure of whether it does."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxsae._core import pytrees


@pytrees.dataclass
class Synthetic:
    """A distribution of rows `x = z D + noise`, with sparse `z ≥ 0`.

    A feature fires where a Gaussian exceeds its threshold *and* its parent, if any, fires. The Gaussians of a row are
    correlated through a few common factors. Values of those that fire are `|1 + deviation · ε|`.

    Attributes:
      dictionary: `D`, `[m d]`, atoms of norm 1; more of them than dimensions are in superposition.
      probability: `[m]`, how often each feature fires where its parent does.
      loadings: `[m r]`, of the common factors; their squared norms are the correlation of features that share them.
      parent: `[m]`, number of the feature without which each does not fire, or −1.
      depth: length of the longest chain of parents; static.
      deviation: standard deviation of values.
      noise: standard deviation of each coordinate of the noise.

    Example:
      >>> import jax, jaxsae
      >>> world = jaxsae.data.synthetic(jax.random.key(0), d=16, m=32, l0=3)
      >>> x, z = world.sample(jax.random.key(1), 100)
      >>> x.shape, z.shape, bool(jax.numpy.allclose(x, z @ world.dictionary, atol=1e-6))
      ((100, 16), (100, 32), True)
    """

    dictionary: Float[Array, "m d"]
    probability: Float[Array, " m"]
    loadings: Float[Array, "m r"]
    parent: Int[Array, " m"]
    deviation: float | Array
    noise: float | Array
    depth: int = pytrees.static()

    @functools.partial(jax.jit, static_argnames="rows")
    def sample(self, key: PRNGKeyArray, rows: int) -> tuple[Float[Array, "rows d"], Float[Array, "rows m"]]:
        """Draw rows: `x [rows d]` and its code `z [rows m]`, dense."""
        (m, d), factors = self.dictionary.shape, self.loadings.shape[1]
        common, own, size, noise = jax.random.split(key, 4)
        rest = jnp.sqrt(1 - jnp.sum(self.loadings**2, axis=1))
        gaussian = jax.random.normal(common, (rows, factors)) @ self.loadings.T
        gaussian += rest * jax.random.normal(own, (rows, m))
        above = gaussian > jax.scipy.special.ndtri(1 - self.probability)
        fires = above
        for _ in range(self.depth):  # a grandparent that is silent silences one generation each time
            fires = above & ((self.parent < 0) | fires[:, jnp.maximum(self.parent, 0)])
        z = jnp.where(fires, jnp.abs(1 + self.deviation * jax.random.normal(size, (rows, m))), 0)
        x = jnp.matmul(z, self.dictionary, precision=jax.lax.Precision.HIGHEST)
        return x + self.noise * jax.random.normal(noise, (rows, d)), z


def synthetic(
    key: PRNGKeyArray,
    *,
    d: int,
    m: int,
    l0: float,
    zipf: float = 0.5,
    correlation: float = 0.0,
    factors: int = 16,
    roots: int | None = None,
    children: int = 4,
    deviation: float = 0.3,
    noise: float = 0.0,
) -> Synthetic:
    """Make a distribution of rows whose features are known: Zipf frequencies, correlation, hierarchy, superposition.

        P(z_j ≠ 0) ∝ (j + 1)^−zipf, at most ½, of sum l0

    Args:
      key: of the dictionary and the factors.
      d: width of rows.
      m: number of features; atoms have cosines of about `1/√d`.
      l0: mean number of features per row.
      zipf: exponent of the frequencies; 0 for equal ones.
      correlation: of the Gaussians behind two features with the same loadings, in `[0, 1)`; 0 for independent ones.
      factors: number of common factors, if correlated.
      roots: number of features without a parent, in a forest: feature `j ≥ roots` has parent `(j − roots) // children`,
        and fires only where it does; all of them if None. Frequencies are as above, whatever the forest.
      children: of each parent.
      deviation: standard deviation of values, whose mean is about 1.
      noise: root mean square norm of the noise, relative to that of the features' part of the rows.

    Returns:
      `Synthetic`; its `sample` draws rows with their codes.

    Raises:
      ValueError: if an argument is out of range, or `l0` cannot be reached with frequencies of at most ½.

    Example:
      >>> import jax
      >>> world = synthetic(jax.random.key(0), d=32, m=128, l0=4.0, roots=16, correlation=0.3)
      >>> x, z = world.sample(jax.random.key(1), 20_000)
      >>> round(float((z > 0).sum(1).mean()), 1)
      4.0

    Source: after Chanin & Garriga-Alonso (2026), "SynthSAEBench: evaluating sparse autoencoders on scalable realistic
      synthetic data"; Elhage et al. (2022), "Toy models of superposition".
    """
    for name, value, low, high in (
        ("d", d, 1, math.inf),
        ("m", m, 1, math.inf),
        ("zipf", zipf, 0, 10),
        ("factors", factors, 1, math.inf),
        ("roots", m if roots is None else roots, 1, m),
        ("children", children, 1, math.inf),
        ("deviation", deviation, 0, math.inf),
        ("noise", noise, 0, math.inf),
    ):
        if not low <= value <= high:
            raise ValueError(f"`synthetic` got {name} = {value}; pass a number from {low} to {high}.")
    if not 0 <= correlation < 1:
        raise ValueError(f"`synthetic` got correlation = {correlation}; pass a number from 0 to below 1.")
    if not 0 < l0 <= m / 2:
        raise ValueError(f"`synthetic` got l0 = {l0} for {m} features; pass more than 0 and at most {m / 2}.")
    frequency = _frequencies(m, l0, zipf)
    parent = np.full(m, -1) if roots is None else (np.arange(m) - roots) // children
    parent[: m if roots is None else roots] = -1
    given = np.where(parent < 0, frequency, frequency / frequency[np.maximum(parent, 0)])
    atoms, loadings = jax.random.split(key)
    dictionary = jax.random.normal(atoms, (m, d))
    directions = jax.random.normal(loadings, (m, factors))
    squares = float(np.sum(frequency)) * (1 + deviation**2)  # of a row, if the atoms were orthogonal
    return Synthetic(
        dictionary / jnp.linalg.norm(dictionary, axis=1, keepdims=True),
        jnp.asarray(given, jnp.float32),
        math.sqrt(correlation) * directions / jnp.linalg.norm(directions, axis=1, keepdims=True),
        jnp.asarray(parent, jnp.int32),
        deviation=deviation,
        noise=noise * math.sqrt(squares / d),
        depth=_depth(parent),
    )


def _frequencies(m: int, l0: float, zipf: float) -> np.ndarray:
    """`min(½, c (j + 1)^−zipf)`, with `c` such that the sum is `l0`."""
    shape = (1.0 + np.arange(m)) ** -zipf
    low, high = 0.0, 1.0 / shape[-1]
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle * shape, 0.5).sum() < l0 else (low, middle)
    return np.minimum(high * shape, 0.5)


def _depth(parent: np.ndarray) -> int:
    """The length of the longest chain of parents."""
    number, depth = len(parent) - 1, 0  # the last is the deepest
    while parent[number] >= 0:
        number, depth = parent[number], depth + 1
    return depth
