"""Rows without a download: patches of the two photographs that ship with scikit-learn."""

import numpy as np

from jaxsae._core.files import InputError


def image_patches(rows: int, heldout: int, *, side: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out patches of natural images, from scikit-learn's two photographs.

    Each patch is `side × side` pixels of 3 colours, with its mean removed; all are then scaled by one number so that
    the mean squared norm of training patches is 1. Training patches come from the left three quarters of each
    picture and held-out ones from the rest: no pixel is in both.

    Args:
      rows: number of training patches.
      heldout: number of held-out patches.
      side: pixels along a side.
      seed: seed of the patches' positions.

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
    """Cut `count` patches at random places, equally many from each picture, and remove the mean of each."""
    patches = []
    for picture, share in zip(pictures, np.array_split(np.arange(count), len(pictures)), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(picture, (side, side), axis=(0, 1))
        i = generator.integers(windows.shape[0], size=len(share))
        j = generator.integers(windows.shape[1], size=len(share))
        patches.append(windows[i, j].reshape(len(share), windows[0, 0].size))
    patches = generator.permutation(np.concatenate(patches))
    return patches - patches.mean(axis=1, keepdims=True)
