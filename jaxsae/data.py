"""Rows to train and measure on: activations on disk, or patches of two photographs."""

import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxsae import shards
from jaxsae.files import InputError

Rows = np.ndarray | shards.Rows  # `[n d]`, in memory or not

# What numpy lets out when a file is not what it says.
_UNREADABLE = (
    *(ValueError, TypeError, EOFError, OSError, LookupError, SyntaxError, NotImplementedError, MemoryError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


def open_rows(path: str | os.PathLike) -> Rows:
    """Open activations as rows `[n d]`: a `.npy` (memory-mapped) or `.npz` file, or a directory of shards.

    Leading axes are flattened into rows. An `.npz` must hold one array of activations. Of a directory that is still
    being written, the whole shards are opened.

    Args:
      path: the file, or the directory.

    Returns:
      `[n d]`, float16, float32 or float64.

    Raises:
      InputError: if the file is missing, truncated, not an array, empty, or not floating point; as `shards.read`.

    Example:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.save(f"{folder}/x.npy", np.zeros((2, 3, 4), np.float32))
      ...     open_rows(f"{folder}/x.npy").shape
      (6, 4)
    """
    path = Path(path)
    expected = "expected a .npy or .npz array of floating-point activations (rows, width)"
    if Path(path, shards.MANIFEST).is_file():
        rows = shards.open_rows(path)
        if not len(rows):
            raise InputError(f"{path}: has shape {rows.shape}; {expected}.")
        return rows
    if not path.is_file():
        what = f"a directory without {shards.MANIFEST}" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}; {expected}.")
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic[:2] != b"PK" and magic != b"\x93NUMPY":
        raise InputError(f"{path}: {'not an array file' if magic else 'the file is empty'}; {expected}.")
    try:
        if magic[:2] == b"PK":
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                array = _only_array(archive, path)
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except InputError:
        raise
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: is damaged or holds no plain array ({reason}); {expected}.") from error
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"{path}: holds {array.dtype}; {expected}: convert it with .astype('float32').")
    if array.ndim < 2 or array.size == 0:
        raise InputError(f"{path}: has shape {array.shape}; {expected}.")
    return array.reshape(-1, array.shape[-1])


def _only_array(archive, path: Path) -> np.ndarray:
    if len(archive.files) != 1:
        names = ", ".join(archive.files) or "nothing"
        raise InputError(f"{path}: holds {len(archive.files)} arrays ({names}); expected one: save it alone.")
    array = archive[archive.files[0]]
    if not isinstance(array, np.ndarray):
        raise TypeError(f"its only member is {archive.files[0]!r}")
    return array


def require_finite(rows: Rows, what: str) -> None:
    """Raise an `InputError` that counts the rows with NaN or Inf, if there are any.

    Example:
      >>> require_finite(np.array([[1.0], [np.nan]]), "x.npy")
      Traceback (most recent call last):
      jaxsae.files.InputError: x.npy: 1 of 2 rows hold NaN or Inf, the first is row 1; drop or mend them.
    """
    chunk = max(1, (64 << 20) // rows[0].nbytes)  # the rows may be a file larger than memory
    finite = [np.isfinite(rows[at : at + chunk]).all(axis=1) for at in range(0, len(rows), chunk)]
    bad = np.flatnonzero(~np.concatenate(finite))
    if bad.size:
        raise InputError(
            f"{what}: {bad.size} of {len(rows)} rows hold NaN or Inf, the first is row {bad[0]}; drop or mend them."
        )


def batches(rows: Rows, size: int, *, seed: int) -> Iterator[np.ndarray]:
    """Yield batches `[size d]` in float32 for ever, shuffled anew in every pass; a rest that fills no batch waits.

    Args:
      rows: `[n d]`, may be memory-mapped.
      size: rows a batch, at most `n`.
      seed: of the shuffles.

    Raises:
      InputError: if there are fewer rows than a batch holds.

    Example:
      >>> next(batches(np.arange(6.0).reshape(3, 2), 2, seed=0)).shape
      (2, 2)
    """
    if len(rows) < size:
        raise InputError(f"got {len(rows)} rows for batches of {size}; pass more rows or a smaller batch.")
    return _shuffled(rows, size, np.random.default_rng(seed))


def _shuffled(rows, size, generator):
    while True:
        order = generator.permutation(len(rows))
        for start in range(0, len(rows) - size + 1, size):
            # Sorted reads: a memory-mapped file is then read forwards.
            yield np.asarray(rows[np.sort(order[start : start + size])], np.float32)


def image_patches(rows: int, heldout: int, *, side: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Patches of natural images, for training and held out, from scikit-learn's two photographs.

    Each patch is `side × side` pixels of 3 colours, its own mean removed; then all are scaled by one number so that
    the mean squared norm of training patches is 1. Training patches come from the left three quarters of each
    picture and held-out ones from the rest: no pixel is in both.

    Args:
      rows: training patches.
      heldout: held-out patches.
      side: pixels along a side.
      seed: of the places they are cut from.

    Returns:
      `[rows d]` and `[heldout d]` float32, `d = 3 · side²`.

    Raises:
      InputError: if scikit-learn is not installed.

    Example:
      >>> train, heldout = image_patches(100, 10)
      >>> train.shape, heldout.shape
      ((100, 300), (10, 300))
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise InputError(
            "the photographs come with scikit-learn, which is missing; pip install 'jaxsae[study]'."
        ) from error
    generator = np.random.default_rng(seed)
    pictures = [np.asarray(image, np.float32) for image in load_sample_images().images]
    border = [3 * picture.shape[1] // 4 for picture in pictures]
    train = _cut([picture[:, :b] for picture, b in zip(pictures, border, strict=True)], rows, side, generator)
    rest = _cut([picture[:, b:] for picture, b in zip(pictures, border, strict=True)], heldout, side, generator)
    scale = 1 / np.sqrt(np.mean(np.sum(train**2, axis=1)))
    return train * scale, rest * scale


def _cut(pictures, count, side, generator):
    """Cut `count` patches at random places, as many from each picture, and remove the mean of each."""
    patches = []
    for picture, share in zip(pictures, np.array_split(np.arange(count), len(pictures)), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(picture, (side, side), axis=(0, 1))
        i = generator.integers(windows.shape[0], size=len(share))
        j = generator.integers(windows.shape[1], size=len(share))
        patches.append(windows[i, j].reshape(len(share), windows[0, 0].size))
    patches = generator.permutation(np.concatenate(patches))
    return patches - patches.mean(axis=1, keepdims=True)
