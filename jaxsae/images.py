"""Pictures: denoising and inpainting by dictionaries that are learnt from the picture itself.

Every patch of `side × side` pixels is a signal. A dictionary is learnt from some of them by `ksvd`, all are coded
with as few atoms as come within what the noise explains, and each pixel becomes the mean of what its patches say.
Pictures are arrays `[h w]` or `[h w c]` in levels, 0 to 255.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsae import codes, ksvd, pursuit, pytrees, rows
from jaxsae.codes import SparseCode
from jaxsae.files import InputError, atomic_file, local_path
from jaxsae.linalg import divide, matmul
from jaxsae.refit import refit

_GAIN = 1.15  # a patch is explained when its residual is at most this times the noise's expected norm
_STRIP = 1 << 14  # patches coded at a time


def read(path: str | os.PathLike) -> np.ndarray:
    """Read a picture, in any 8-bit format that Pillow reads.

    Args:
      path: the file.

    Returns:
      `[h w]` if it is grey, `[h w 3]` if not, float32 from 0 to 255; transparency is dropped.

    Raises:
      InputError: if it is missing or no picture, has more than 8 bits a channel, or if Pillow is not installed.

    Example:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write(f"{folder}/grey.png", np.full((8, 9), 100.0))
      ...     read(f"{folder}/grey.png").shape
      (8, 9)
    """
    pillow = _pillow()
    if not local_path(path).is_file():
        raise InputError(f"{path}: no such file; expected a picture, such as a PNG or a JPEG.")
    try:
        with pillow.open(path) as picture:
            mode = picture.mode
            if mode[0] in "IF":
                raise InputError(f"{path}: has pixels of mode {mode}; expected 8 bits a channel: convert it first.")
            return np.asarray(picture.convert("L" if mode in ("1", "L", "LA") else "RGB"), np.float32)
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as a picture; expected a PNG, a JPEG or the like.") from error


def write(path: str | os.PathLike, picture: np.ndarray) -> None:
    """Write a picture, whole or not at all, in the format that its suffix names.

    Args:
      path: the file.
      picture: `[h w]` or `[h w 3]` in levels; rounded, and clipped to 0 to 255.

    Raises:
      InputError: if it cannot be written, if Pillow does not know the suffix, or if Pillow is not installed.

    Example:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write(f"{folder}/colour.png", np.zeros((8, 9, 3)))
    """
    pillow = _pillow()
    check_suffix(path)
    levels = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    with atomic_file(path) as temporary:
        pillow.fromarray(levels).save(temporary)


def check_suffix(*paths: str | os.PathLike | None) -> None:
    """Raise `InputError` if `write` would know no format for one of these paths, before there is something to write.

    Args:
      *paths: files to be written; None is passed over.

    Raises:
      InputError: naming the first one with a suffix that Pillow does not know.

    Example:
      >>> check_suffix("clean.png")
    """
    for path in paths:
        if path is not None and local_path(path).suffix.lower() not in _pillow().registered_extensions():
            raise InputError(f"{path}: a suffix that Pillow does not know; use .png or .jpg.")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("pictures need Pillow, which is missing; pip install 'jaxsae[study]'.") from error
    return Image


def psnr(picture: np.ndarray, clean: np.ndarray) -> float:
    """Peak signal-to-noise ratio, in dB: `10 log₁₀(255² / mean (picture − clean)²)`.

    Args:
      picture: in levels, of any shape; clipped to 0 to 255, as `write` does.
      clean: what it should be, of the same shape.

    Returns:
      The ratio; infinite for equal pictures.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> round(psnr(np.full((8, 8), 110.0), np.full((8, 8), 100.0)), 2)
      28.13
    """
    if np.shape(picture) != np.shape(clean):
        raise ValueError(f"`psnr` got shapes {np.shape(picture)} and {np.shape(clean)}; pass pictures of one shape.")
    error = np.mean((np.clip(np.float64(picture), 0, 255) - clean) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def dct(m: int, side: int) -> np.ndarray:
    """The overcomplete discrete cosine transform: products of cosines of `⌈√m⌉` frequencies in each direction.

    All but the first have mean 0.

    Args:
      m: atoms.
      side: pixels along a side.

    Returns:
      `[m side²]` float32, of norm 1.

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
    """The atoms of a dictionary as one picture, each with its own contrast.

    Args:
      D: dictionary `[m side²]`.
      scale: pixels of the picture for each of an atom's.

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
    """Remove white noise, by k-SVD on the noisy picture itself.

    Patches without their means are coded by orthogonal matching pursuit up to a residual of `1.15 σ · side`; the
    picture is the mean of them all, with the noisy one in it at a weight of `30/σ` patches. Colours are rotated into
    brightness and two differences, which keeps the noise white; all have one dictionary.

    Args:
      picture: `[h w]` or `[h w c]`, in levels.
      sigma: standard deviation of the noise, in levels.
      m: atoms.
      k: most atoms of a patch.
      side: pixels along the side of a patch.
      steps: of `ksvd.fit`, from the overcomplete cosine transform.
      patches: how many to learn from.
      seed: of their places.
      progress: called with what is going on and how many rows of pixels, times channels, are done.

    Returns:
      The picture, float32, and the dictionary `[m side²]`.

    Raises:
      InputError: if the picture is smaller than a patch, or not a picture, or `sigma` not positive.

    Example:
      >>> clean = np.kron(np.array([[50.0, 200.0], [200.0, 50.0]]), np.ones((16, 16)))
      >>> noisy = clean + np.random.default_rng(0).normal(0, 25, clean.shape)
      >>> quiet, _ = denoise(noisy, 25, m=64, k=4, steps=2)
      >>> bool(np.mean((quiet - clean) ** 2) < 0.2 * np.mean((noisy - clean) ** 2))
      True

    Source: Elad & Aharon (2006), "Image denoising via sparse and redundant representations over learned dictionaries".
    """
    planes = _planes(picture, side)
    if not (np.isfinite(sigma) and sigma > 0):
        raise InputError(f"got sigma {sigma}; pass the standard deviation of the noise, in levels, above 0.")
    tol, start = _GAIN * float(sigma) * side, jnp.asarray(dct(m, side))
    (y,) = _some_patches(side, patches, seed, planes)
    y = jnp.asarray(y - y.mean(axis=1, keepdims=True))
    if progress:
        progress("learning", 0)
    D, _ = ksvd.fit(jax.random.key(seed), y, m=m, k=k, steps=steps, tol=tol, start=start, update=ksvd.approximate)
    total, weight = _assemble(_Method(_denoised, k, side), D, tol, planes, progress=progress)
    own = 30 / sigma
    return _from_planes((own * planes + total) / (own + weight), picture), np.asarray(D)


def inpaint(
    picture: np.ndarray,
    missing: np.ndarray,
    *,
    sigma: float = 2.0,
    m: int = 256,
    k: int = 16,
    side: int = 8,
    steps: int = 10,
    patches: int = 1 << 15,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Fill in missing pixels, by k-SVD on what is known.

        code:     minimise ‖M(y − Dᵀz)‖ in each patch, by orthogonal matching pursuit among the masked atoms `M d`
        learn:    one sweep of k-SVD over the patches with what is missing filled in by their codes

    What a code fills in, it fits without error; and the error of all pixels is never less than that of the known ones.
    So a sweep over the filled patches, which lowers the one, lowers the other. Patches of which nothing is known have
    no say; a pixel that is in no other patch becomes the mean of the picture.

    Args:
      picture: `[h w]` or `[h w c]`, in levels; missing pixels may hold anything.
      missing: `[h w]`, which they are.
      sigma: noise that the codes leave unexplained, in levels.
      m: as for `denoise`, and so the rest.
      k: most atoms of a patch.
      side: pixels along the side of a patch.
      steps: codings, each with its sweep.
      patches: how many to learn from.
      seed: of their places.

    Returns:
      The picture, float32, known pixels as they were, and the dictionary `[m side²]`.

    Raises:
      InputError: if the picture is smaller than a patch or not a picture, if the mask does not fit it, or if no pixel
        is known.

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
    missing = np.asarray(missing, bool)
    if missing.all():
        raise InputError("got a picture of which every pixel is missing; pass one of which some are known.")
    planes = _planes(np.where(missing[..., None] if np.ndim(picture) == 3 else missing, 0, picture), side)
    known = np.broadcast_to(~missing, planes.shape).astype(np.float32)
    tol, start = _GAIN * float(sigma), jnp.asarray(dct(m, side))
    y, mask = map(jnp.asarray, _some_patches(side, patches, seed, planes, known))
    D = _learn_masked(k, steps, start, y, mask, tol)
    total, weight = _assemble(_Method(_inpainted, k, side), D, tol, planes, known)
    mean = planes.sum(axis=(1, 2), keepdims=True) / known.sum(axis=(1, 2), keepdims=True)
    estimate = np.where(weight > 0, total / np.maximum(weight, 1), mean)
    return _from_planes(np.where(known > 0, planes, estimate), picture), np.asarray(D)


# --- Pictures and their patches


def _planes(picture, side: int) -> np.ndarray:
    """A picture `[h w]` or `[h w c]` as `[c h w]` float32, colours rotated by an orthonormal cosine transform."""
    picture = np.asarray(picture, np.float32)
    if picture.ndim not in (2, 3) or min(picture.shape) < 1 or min(picture.shape[:2]) < side:
        raise InputError(
            f"got a picture of shape {picture.shape}; pass one of shape (h, w) or (h, w, c), at least {side} × {side}."
        )
    if not np.isfinite(picture).all():
        raise InputError("got a picture with NaN or Inf; pass them as missing to `inpaint`.")
    if picture.ndim == 2:
        return picture[None]
    return np.ascontiguousarray(np.moveaxis(picture @ _rotation(picture.shape[2]), 2, 0))


def _from_planes(planes, like) -> np.ndarray:
    if np.ndim(like) == 2:
        return planes[0].astype(np.float32)
    return (np.moveaxis(planes, 0, 2) @ _rotation(len(planes)).T).astype(np.float32)


def _rotation(channels: int) -> np.ndarray:
    """`[c c]` orthonormal, the first column their mean: the noise stays white, the colours are decorrelated."""
    waves = np.cos(np.pi * np.outer(np.arange(channels) + 0.5, np.arange(channels)) / channels)
    return (waves / np.linalg.norm(waves, axis=0)).astype(np.float32)


def _some_patches(side: int, count: int, seed: int, *stacks: np.ndarray) -> list[np.ndarray]:
    """Patches `[n side²]` at the same random places, each at most once, of each stack of planes."""
    windows = [np.lib.stride_tricks.sliding_window_view(stack, (side, side), axis=(1, 2)) for stack in stacks]
    shape = windows[0].shape[:3]
    total = int(np.prod(shape))
    places = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
    at = np.unravel_index(np.sort(places), shape)
    return [window[at].reshape(len(places), side * side) for window in windows]


class _Method(NamedTuple):
    """How patches are estimated: `estimate(D, tol, *patches [n d], k=k) -> (estimates [n d], weights [n])`."""

    estimate: Callable[..., tuple[Array, Array]]
    k: int
    side: int


def _assemble(method: _Method, D, tol, *stacks: np.ndarray, progress=None) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the estimates of all patches, and of their weights, at each pixel `[c h w]`, a strip at a time."""
    side, (planes, height, width) = method.side, stacks[0].shape
    depth = min(max(1, _STRIP // (width - side + 1)), height - side + 1)  # rows of patches in a strip
    total, weight = np.zeros_like(stacks[0]), np.zeros_like(stacks[0])
    for plane in range(planes):
        for top in range(0, height - side + 1, depth):
            here = slice(top, top + depth + side - 1)
            strips = [stack[plane, here] for stack in stacks]
            lacking = depth + side - 1 - len(strips[0])
            strips = [np.pad(strip, ((0, lacking), (0, 0)), mode="edge") for strip in strips]
            sums = _strip(method, D, tol, height - side + 1 - top, *strips)
            for into, part in zip((total, weight), sums, strict=True):
                into[plane, here] += np.asarray(part)[: depth + side - 1 - lacking]
            if progress:
                progress("denoising", min(depth, height - side + 1 - top))
    return total, weight


@functools.partial(jax.jit, static_argnums=0)
def _strip(method: _Method, D, tol, valid, *strips):
    """Sums at each pixel of a strip; rows of patches from `valid` on are padding."""
    side = method.side
    height, width = (size - side + 1 for size in strips[0].shape)

    def patches(strip):
        across = jnp.stack([strip[:, j : j + width] for j in range(side)], axis=-1)
        return jnp.stack([across[i : i + height] for i in range(side)], axis=-2).reshape(height * width, side * side)

    def sums(parts):
        """The sum at each pixel of patches' parts `[h w side side]`, along one axis and then the other."""
        across = [jnp.pad(parts[:, :, :, j], ((0, 0), (j, side - 1 - j), (0, 0))) for j in range(side)]
        across = functools.reduce(jnp.add, across)
        down = [jnp.pad(across[:, :, i], ((i, side - 1 - i), (0, 0))) for i in range(side)]
        return functools.reduce(jnp.add, down)

    estimates, weights = method.estimate(D, tol, *map(patches, strips), k=method.k)
    weights = weights.reshape(height, width) * (jnp.arange(height) < valid)[:, None]
    weights = jnp.broadcast_to(weights[:, :, None, None], (height, width, side, side))
    return sums(estimates.reshape(weights.shape) * weights), sums(weights)


def _denoised(D, tol, y, *, k: int):
    mean = jnp.mean(y, axis=1, keepdims=True)
    code, _ = pursuit.omp(D, y - mean, k=k, tol=jnp.broadcast_to(tol, y.shape[:1]))
    return codes.combine(D, code) + mean, jnp.ones(len(y), y.dtype)


# --- Patches of which not every pixel is known


@pytrees.dataclass
class _Masked:
    """The atoms as each row sees them: number `row · m + atom` is `known[row] * D[atom]`."""

    D: Float[Array, "m d"]
    known: Float[Array, "n d"]

    def take(self, indices):
        """Masked atoms."""
        return self.D[indices % len(self.D)] * self.known[indices // len(self.D)]


def _inpainted(D, tol, y, known, *, k: int):
    code, mean = _code_masked(D, tol, y, known, k=k)
    return codes.combine(D, code) + mean, jnp.any(known > 0, axis=1).astype(y.dtype)


def _code_masked(D, tol, y, known, *, k: int) -> tuple[SparseCode, Array]:
    """Codes of what is known of each patch less its mean, and that mean: selection, then the shared refit."""
    (n, _), m = y.shape, len(D)
    count = jnp.sum(known, axis=1, keepdims=True)
    mean = divide(jnp.sum(known * y, axis=1, keepdims=True), count)
    y = known * (y - mean)
    indices = rows.map_chunks(
        functools.partial(_select_masked, D, k),
        *(y, known, tol * jnp.sqrt(count[:, 0])),
        batch=(n,),
        row_bytes=(3 * m + 2 * k * y.shape[1]) * y.dtype.itemsize,
        cpu_rows=512,
    )
    numbers = jnp.where(indices < m, jnp.arange(n)[:, None] * m + indices, n * m)
    zeros = jnp.zeros(indices.shape, y.dtype)
    refitted, _ = refit(_Masked(D, known), y, SparseCode(zeros, numbers, n * m), nonnegative=False)
    return SparseCode(refitted.values, indices, m), mean


def _select_masked(D, k: int, y, known, tol):
    """Orthogonal matching pursuit among masked atoms; those chosen, made orthonormal, are the only factorisation."""
    n, m = len(y), len(D)
    norm = jnp.sqrt(matmul(known, (D**2).T))

    def choose(slot, carry):
        residual, basis, indices = carry
        best = jnp.argmax(jnp.abs(divide(matmul(residual, D.T), norm)), axis=1)
        new = D[best] * known
        for _ in range(2):  # twice is enough, for orthogonality to rounding
            new = new - jnp.einsum("nkd,nk->nd", basis, jnp.einsum("nkd,nd->nk", basis, new))
        left = jnp.linalg.norm(new, axis=1)
        independent = left > 1e-3 * norm[jnp.arange(n), best]
        chosen = independent & (jnp.linalg.norm(residual, axis=1) > tol)
        new = jnp.where(chosen[:, None], divide(new, left[:, None]), 0)
        residual = residual - jnp.sum(new * residual, axis=1, keepdims=True) * new
        return residual, basis.at[:, slot].set(new), indices.at[:, slot].set(jnp.where(chosen, best, m))

    start = y, jnp.zeros((n, k, y.shape[1]), y.dtype), jnp.full((n, k), m, jnp.int32)
    return jax.lax.fori_loop(0, k, choose, start)[2]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _learn_masked(k: int, steps: int, D, y, known, tol):
    def step(D, _):
        code, mean = _code_masked(D, tol, y, known, k=k)
        filled = jnp.where(known > 0, y - mean, codes.combine(D, code))
        return ksvd.approximate(D, filled, code)[0], None

    return jax.lax.scan(step, D, length=steps)[0]
