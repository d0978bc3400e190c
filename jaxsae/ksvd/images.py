"""Denoising and inpainting of pictures by dictionaries learnt from the picture itself.

Every patch of `side × side` pixels is a signal. A dictionary is learnt from some of them by `ksvd`; all are coded with
as few atoms as reach the noise level, and each pixel becomes the mean over the patches that contain it. Pictures are
arrays `[h w]` or `[h w c]` in any units, which `sigma` shares: scaled and shifted pictures give scaled and shifted
results. Files hold levels from 0 to 255.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsae import codes, pursuit
from jaxsae._core.files import InputError
from jaxsae._core.linalg import divide
from jaxsae.codes import SparseCode
from jaxsae.ksvd import learning

_GAIN = 1.15  # target norm of a patch's residual, relative to the expected norm of the noise
_STRIP = 1 << 14  # patches coded at a time


def psnr(picture: np.ndarray, clean: np.ndarray, *, data_range: float = 255.0) -> float:
    """Peak signal-to-noise ratio, in dB: `10 log₁₀(R² / mean (picture − clean)²)`.

    Args:
      picture: of any shape; clipped to [0, `R`], as `write` does with levels.
      clean: reference picture, of the same shape.
      data_range: `R`, white less black: 255 for levels.

    Returns:
      The ratio; infinite for equal pictures.

    Raises:
      ValueError: if the shapes differ, or the range is not positive.

    Example:
      >>> round(psnr(np.full((8, 8), 110.0), np.full((8, 8), 100.0)), 2)
      28.13
    """
    if np.shape(picture) != np.shape(clean):
        raise ValueError(f"`psnr` got shapes {np.shape(picture)} and {np.shape(clean)}; pass equal shapes.")
    if not 0 < data_range < np.inf:
        raise ValueError(f"`psnr` got data_range {data_range}; pass white less black, 255 for levels.")
    error = np.mean((np.clip(np.float64(picture) / data_range, 0, 1) - np.float64(clean) / data_range) ** 2)
    return float(-10 * np.log10(error)) if error else float("inf")


def dct(m: int, side: int) -> np.ndarray:
    """The overcomplete discrete cosine transform: products of cosines of `⌈√m⌉` frequencies in each direction.

    All atoms except the first have mean 0.

    Args:
      m: number of atoms.
      side: pixels along a side of a patch.

    Returns:
      Atoms `[m side²]` of norm 1, float32.

    Example:
      >>> dct(256, 8).shape
      (256, 64)

    Source: Elad & Aharon (2006), "Image denoising via sparse and redundant representations over learned dictionaries".
    """
    frequencies = int(np.ceil(np.sqrt(m)))
    waves = np.cos(np.pi * np.outer(np.arange(frequencies), np.arange(side)) / frequencies)
    waves[1:] -= waves[1:].mean(axis=1, keepdims=True)
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    return np.kron(waves, waves)[:m].astype(np.float32)


def mosaic(D: np.ndarray, *, scale: int = 3) -> np.ndarray:
    """Tile the atoms of a dictionary into one picture, with contrast scaled per atom.

    Args:
      D: dictionary `[m side²]`.
      scale: pixels of the picture per pixel of an atom.

    Returns:
      `[h w]` in levels.

    Example:
      >>> mosaic(dct(256, 8), scale=1).shape
      (145, 145)
    """
    D = np.asarray(D)
    side, across = int(np.sqrt(D.shape[1])), int(np.ceil(np.sqrt(len(D))))
    largest = np.abs(D).max(axis=1, keepdims=True)
    tiles = np.full((across * across, side + 1, side + 1), 255.0)
    tiles[: len(D), :side, :side] = (128 + 127 * D / np.where(largest > 0, largest, 1)).reshape(-1, side, side)
    picture = tiles.reshape(across, across, side + 1, side + 1).swapaxes(1, 2).reshape(across * (side + 1), -1)
    return np.kron(np.pad(picture, ((1, 0), (1, 0)), constant_values=255.0), np.ones((scale, scale)))


def denoise(
    picture: np.ndarray,
    sigma: float,
    *,
    m: int = 256,
    k: int = 16,
    side: int = 8,
    steps: int = 10,
    patches: int = 1 << 15,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Remove white noise by k-SVD on the noisy picture itself.

    Patches, less their means, are coded by orthogonal matching pursuit up to a residual of `1.15 σ · side`; the result
    is the mean of all patches and of the noisy picture, which has the weight of `s/2σ` patches, where `s` is the
    standard deviation of the picture without its noise: about the `30/σ` of the source for photographs in levels.
    Colours are rotated into brightness and two differences, which keeps the noise white; all share one dictionary.
    In any units, `denoise(a·x + b, a·σ) = a·denoise(x, σ) + b`.

    Args:
      picture: `[h w]` or `[h w c]`, in any units.
      sigma: standard deviation of the noise, in the units of the picture: 25 in levels is 25/255 in [0, 1].
      m: number of atoms.
      k: most atoms per patch.
      side: pixels along a side of a patch.
      steps: steps of `ksvd.fit`, which starts from the overcomplete cosine transform.
      patches: number of patches to learn from.
      seed: seed of their positions.
      progress: called with the name of the stage and the number of pixel rows, times channels, just done.

    Returns:
      The picture, float32, and the dictionary `[m side²]`.

    Raises:
      InputError: if the picture is smaller than a patch or not a picture, or `sigma` is not positive.
      ValueError: if a size is out of range.

    Example:
      >>> clean = np.kron(np.array([[50.0, 200.0], [200.0, 50.0]]), np.ones((16, 16)))
      >>> noisy = clean + np.random.default_rng(0).normal(0, 25, clean.shape)
      >>> quiet, _ = denoise(noisy, 25, m=64, k=4, steps=2)
      >>> bool(np.mean((quiet - clean) ** 2) < 0.2 * np.mean((noisy - clean) ** 2))
      True

    Source: Elad & Aharon (2006), "Image denoising via sparse and redundant representations over learned dictionaries".
    """
    _require_sizes(m, k, side, steps, patches, seed)
    if not (np.isfinite(sigma) and sigma > 0):
        raise InputError(
            f"got sigma {sigma}; pass the standard deviation of the noise, in the picture's units, above 0."
        )
    picture = _require_picture(picture, side)
    units = _units(picture)
    planes, sigma = _planes(units.scaled(picture)), float(sigma) / units.size
    tol, start = _GAIN * sigma * side, jnp.asarray(dct(m, side))
    (y,) = _some_patches(side, patches, seed, planes)
    y = jnp.asarray(y - y.mean(axis=1, keepdims=True))
    if progress:
        progress("learning", 0)
    D, _ = learning.fit(
        jax.random.key(seed), y, m=m, k=k, steps=steps, tol=tol, start=start, update=learning.approximate
    )
    total, weight = _assemble(_denoised, k, side, D, tol, planes, progress=progress)
    own = _deviation(units.scaled(picture), sigma) / (2 * sigma)
    return units.restored(_from_planes((own * planes + total) / (own + weight), picture)), np.asarray(D)


def inpaint(
    picture: np.ndarray,
    missing: np.ndarray,
    *,
    sigma: float | None = None,
    m: int = 256,
    k: int = 16,
    side: int = 8,
    steps: int = 10,
    patches: int = 1 << 15,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Fill in missing pixels by k-SVD on the known ones.

        code:     minimise ‖M(y − Dᵀz)‖ in each patch, by orthogonal matching pursuit among the masked atoms `M d`
        learn:    one sweep of k-SVD over the patches, with missing pixels filled in by their codes

    A code fits the pixels that it fills in without error, and the error over all pixels bounds that over the known
    ones. So a sweep over the filled patches, which lowers the former, lowers the latter. Patches without known pixels
    are ignored; a pixel that is in no other patch becomes the mean of the picture. In any units,
    `inpaint(a·x + b) = a·inpaint(x) + b`.

    Args:
      picture: `[h w]` or `[h w c]`, in any units; the values of missing pixels are ignored.
      missing: `[h w]`, True or 1 where pixels are missing.
      sigma: noise that the codes leave unexplained, in the units of the picture; by default 2/255 of the range of the
        known pixels.
      m: number of atoms.
      k: most atoms per patch.
      side: pixels along a side of a patch.
      steps: number of codings, each followed by a sweep.
      patches: number of patches to learn from.
      seed: seed of their positions.

    Returns:
      The picture, float32, with known pixels unchanged, and the dictionary `[m side²]`.

    Raises:
      InputError: if the picture is smaller than a patch or not a picture, if the mask does not fit it, if no pixel is
        known or none is missing, or if `sigma` is negative.
      ValueError: if a size is out of range.

    Example:
      >>> clean = np.kron(np.array([[50.0, 200.0], [200.0, 50.0]]), np.ones((16, 16)))
      >>> missing = np.random.default_rng(0).random(clean.shape) < 0.5
      >>> filled, _ = inpaint(np.where(missing, 0, clean), missing, m=64, k=4, steps=2)
      >>> bool(np.mean((filled - clean)[missing] ** 2) < 0.1 * np.var(clean))
      True

    Source: Mairal, Elad & Sapiro (2008), "Sparse representation for color image restoration".
    """
    if np.shape(missing) != np.shape(picture)[:2]:
        raise InputError(
            f"got a mask of shape {np.shape(missing)} for a picture of shape {np.shape(picture)}; pass one of its "
            f"height and width."
        )
    if not np.isin(missing, (0, 1)).all():
        raise InputError(
            "got a mask with values other than 0 and 1; pass True where pixels are missing, as `mask > 127.5`."
        )
    missing = np.asarray(missing, bool)
    if missing.all():
        raise InputError("got a mask in which every pixel is missing; pass False where pixels are known.")
    if sigma is not None and not 0 <= sigma < np.inf:
        raise InputError(f"got sigma {sigma}; pass the noise to leave unexplained, in the picture's units, 0 or more.")
    _require_sizes(m, k, side, steps, patches, seed)
    holes = missing.reshape(missing.shape + (1,) * (np.ndim(picture) - 2))
    picture = _require_picture(np.where(holes, np.asarray(picture)[~missing].flat[0], picture), side)
    if not missing.any():
        raise InputError("got a mask in which no pixel is missing; pass True where pixels are missing.")
    units = _units(picture)
    planes = _planes(np.where(holes, 0, units.scaled(picture)))
    known = np.broadcast_to(~missing, planes.shape).astype(np.float32)
    sigma = 2 / 255 * float(np.ptp(picture)) if sigma is None else float(sigma)
    tol = _GAIN * sigma / units.size
    start = jnp.asarray(dct(m, side))
    y, mask = map(jnp.asarray, _some_patches(side, patches, seed, planes, known))
    D = _learn_masked(k, steps, start, y, mask, tol)
    total, weight = _assemble(_inpainted, k, side, D, tol, planes, known)
    mean = planes.sum(axis=(1, 2), keepdims=True) / known.sum(axis=(1, 2), keepdims=True)
    estimate = np.where(weight > 0, total / np.maximum(weight, 1), mean)
    filled = units.restored(_from_planes(estimate, picture))
    return np.where(holes, filled, picture.astype(np.float32)), np.asarray(D)


# --- Pictures and their patches


def _require_sizes(m: int, k: int, side: int, steps: int, patches: int, seed: int) -> None:
    if not (1 <= k <= min(m, side**2) and steps >= 0 and patches >= 1 and seed >= 0):
        raise ValueError(
            f"got m={m}, k={k}, side={side}, steps={steps}, patches={patches}, seed={seed}; pass k from 1 to m and "
            f"side², at least one patch, and steps and a seed of 0 or more."
        )


def _require_picture(picture, side: int) -> np.ndarray:
    """A picture as float64, which is precise enough for any units."""
    picture = np.asarray(picture)
    if picture.ndim not in (2, 3) or min(picture.shape) < 1 or min(picture.shape[:2]) < side:
        raise InputError(
            f"got a picture of shape {picture.shape}; pass one of shape (h, w) or (h, w, c), at least {side} × {side}."
        )
    if picture.dtype.kind not in "biuf":
        raise InputError(f"got a picture of {picture.dtype}; pass real numbers.")
    picture = picture.astype(np.float64)
    if not np.isfinite(picture).all():
        raise InputError("got a picture with NaN or Inf; mark those pixels as missing for `inpaint`.")
    return picture


class _Units(NamedTuple):
    """Units in which a picture is within ±1 and has median 0, so that float32 arithmetic is safe."""

    middle: float
    size: float

    def scaled(self, picture: np.ndarray) -> np.ndarray:
        return ((picture - self.middle) / self.size).astype(np.float32)

    def restored(self, picture: np.ndarray) -> np.ndarray:
        return (picture.astype(np.float64) * self.size + self.middle).astype(np.float32)


def _units(picture: np.ndarray) -> _Units:
    middle = float(np.median(picture))
    return _Units(middle, float(np.abs(picture - middle).max()) or 1.0)


def _deviation(picture: np.ndarray, sigma: float) -> float:
    """The standard deviation of a channel without its noise; the extreme percentiles are clipped."""
    clipped = np.clip(picture, *np.percentile(picture, (1, 99), axis=(0, 1)))
    return np.sqrt(max(np.mean(np.var(clipped, axis=(0, 1), dtype=np.float64)) - sigma**2, 0.0))


def _planes(picture: np.ndarray) -> np.ndarray:
    """A picture `[h w]` or `[h w c]` as `[c h w]` float32, colours rotated by an orthonormal cosine transform."""
    if picture.ndim == 2:
        return picture[None]
    return np.ascontiguousarray(np.moveaxis(picture @ _rotation(picture.shape[2]), 2, 0))


def _from_planes(planes, like) -> np.ndarray:
    if np.ndim(like) == 2:
        return planes[0].astype(np.float32)
    return (np.moveaxis(planes, 0, 2) @ _rotation(len(planes)).T).astype(np.float32)


def _rotation(channels: int) -> np.ndarray:
    """`[c c]`, orthonormal, whose first column is the mean: noise stays white, and colours are decorrelated."""
    waves = np.cos(np.pi * np.outer(np.arange(channels) + 0.5, np.arange(channels)) / channels)
    return (waves / np.linalg.norm(waves, axis=0)).astype(np.float32)


def _some_patches(side: int, count: int, seed: int, *stacks: np.ndarray) -> list[np.ndarray]:
    """Patches `[n side²]` of each stack of planes, at the same random positions without replacement."""
    windows = [np.lib.stride_tricks.sliding_window_view(stack, (side, side), axis=(1, 2)) for stack in stacks]
    shape = windows[0].shape[:3]
    total = int(np.prod(shape))
    places = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
    at = np.unravel_index(np.sort(places), shape)
    return [window[at].reshape(len(places), side * side) for window in windows]


def _assemble(estimate: Callable, k: int, side: int, D, tol, *stacks: np.ndarray, progress=None) -> tuple:
    """Sums of the weighted estimates of all patches, and of their weights, at each pixel `[c h w]`, a strip at a time.

    Patches `[n d]` are estimated by `estimate(k, D, tol, *patches) -> (estimates [n d], weights [n])`.
    """
    planes, height, width = stacks[0].shape
    depth = min(max(1, _STRIP // (width - side + 1)), height - side + 1)  # rows of patches in a strip
    total, weight = np.zeros_like(stacks[0]), np.zeros_like(stacks[0])
    for plane in range(planes):
        for top in range(0, height - side + 1, depth):
            here = slice(top, top + depth + side - 1)
            strips = [stack[plane, here] for stack in stacks]
            lacking = depth + side - 1 - len(strips[0])
            strips = [np.pad(strip, ((0, lacking), (0, 0)), mode="edge") for strip in strips]
            sums = _strip(estimate, k, side, D, tol, height - side + 1 - top, *strips)
            for into, part in zip((total, weight), sums, strict=True):
                into[plane, here] += np.asarray(part)[: depth + side - 1 - lacking]
            if progress:
                progress("denoising", min(depth, height - side + 1 - top))
    return total, weight


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _strip(estimate: Callable, k: int, side: int, D, tol, valid, *strips):
    """Sums at each pixel of a strip; rows of patches at `valid` and beyond are padding."""
    height, width = (size - side + 1 for size in strips[0].shape)

    def patches(strip):
        across = jnp.stack([strip[:, j : j + width] for j in range(side)], axis=-1)
        return jnp.stack([across[i : i + height] for i in range(side)], axis=-2).reshape(height * width, side * side)

    def sums(parts):
        """The sum at each pixel of patch values `[h w side side]`, over one axis and then the other."""
        across = [jnp.pad(parts[:, :, :, j], ((0, 0), (j, side - 1 - j), (0, 0))) for j in range(side)]
        across = functools.reduce(jnp.add, across)
        down = [jnp.pad(across[:, :, i], ((i, side - 1 - i), (0, 0))) for i in range(side)]
        return functools.reduce(jnp.add, down)

    estimates, weights = estimate(k, D, tol, *map(patches, strips))
    weights = jnp.where((jnp.arange(height) < valid)[:, None], weights.reshape(height, width), 0)
    weights = jnp.broadcast_to(weights[:, :, None, None], (height, width, side, side))
    return sums(estimates.reshape(weights.shape) * weights), sums(weights)


def _denoised(k: int, D, tol, y):
    mean = jnp.mean(y, axis=1, keepdims=True)
    code, _ = pursuit.omp(D, y - mean, k=k, tol=jnp.broadcast_to(tol, y.shape[:1]))
    return codes.decode(D, code) + mean, jnp.ones(len(y), y.dtype)


# --- Patches with missing pixels


def _inpainted(k: int, D, tol, y, known):
    code, mean = _code_masked(D, tol, y, known, k=k)
    return codes.decode(D, code) + mean, jnp.any(known > 0, axis=1).astype(y.dtype)


def _code_masked(D, tol, y, known, *, k: int) -> tuple[SparseCode, Array]:
    """Codes of the known pixels of each patch, less their mean, and that mean."""
    count = jnp.sum(known, axis=1, keepdims=True)
    mean = divide(jnp.sum(known * y, axis=1, keepdims=True), count)
    code, _ = pursuit.omp(D, y - mean, k=k, tol=tol * jnp.sqrt(count[:, 0]), mask=known > 0)
    return code, mean


@functools.partial(jax.jit, static_argnums=(0, 1))
def _learn_masked(k: int, steps: int, D, y, known, tol):
    def step(D, _):
        code, mean = _code_masked(D, tol, y, known, k=k)
        filled = jnp.where(known > 0, y - mean, codes.decode(D, code))
        return learning.approximate(D, filled, code)[0], None

    return jax.lax.scan(step, D, length=steps)[0]
