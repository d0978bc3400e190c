"""Photographs denoised by k-SVD, ours and scikit-learn's pipeline, and inpainted."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clock import name_missing, say
from jaxsae.ksvd import image_files, images

SIGMA, SIDE, ATOMS, MOST = 25.0, 8, 256, 16  # atoms per patch, at most
PATCHES, STEPS = 1 << 15, 10
MISSING = 0.5
PICTURES = ("camera", "astronaut", "chelsea", "coffee")


def run(*, with_peers: bool, out: Path | None) -> Iterator[dict[str, Any]]:
    """The report, as it grows: rows of `denoising` and `inpainting`; pictures go into `out`."""
    report: dict[str, Any] = {"sigma": SIGMA, "atoms": ATOMS, "most": MOST, "denoising": [], "inpainting": []}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        clean = photograph(name)
        for row in inpainting(clean, name, out=out):
            report["inpainting"].append(row)
            yield report
        for row in denoising(clean, name, with_peers=with_peers, out=out):
            report["denoising"].append(row)
            yield report


def photograph(name: str) -> np.ndarray:
    """A photograph of scikit-image as grey levels `[h w]`, by the weights of its `rgb2gray`."""
    try:
        from skimage import color, data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(f"{name_missing(error)}; it has the photographs: pip install '.[peers]'.") from error

    pixels = getattr(data, name)()
    return np.rint(255 * color.rgb2gray(pixels) if pixels.ndim == 3 else pixels).astype(np.float32)


def sklearn_denoise(noisy: np.ndarray) -> np.ndarray:
    """scikit-learn's pipeline: `MiniBatchDictionaryLearning` on as many patches and passes, OMP, averaged overlaps.

    As in its example "Image denoising using dictionary learning", but with our stopping rule for the pursuit, which
    denoises better than its two atoms a patch.
    """
    from sklearn.decomposition import MiniBatchDictionaryLearning
    from sklearn.feature_extraction.image import extract_patches_2d, reconstruct_from_patches_2d
    from sklearn.linear_model import orthogonal_mp_gram

    y = extract_patches_2d(noisy, (SIDE, SIDE)).reshape(-1, SIDE**2).astype(np.float64)
    mean = y.mean(axis=1, keepdims=True)
    y -= mean
    some = y[np.random.default_rng(0).choice(len(y), min(PATCHES, len(y)), replace=False)]
    forever: Any = None  # no stop before the last pass
    learner = MiniBatchDictionaryLearning(
        ATOMS, batch_size=256, max_iter=STEPS, tol=0, max_no_improvement=forever, random_state=0
    )
    atoms = learner.fit(some / some.std()).components_
    values: Any = orthogonal_mp_gram(
        atoms @ atoms.T, atoms @ y.T, tol=(1.15 * SIGMA * SIDE) ** 2, norms_squared=np.sum(y**2, axis=1)
    )
    return np.asarray(reconstruct_from_patches_2d((values.T @ atoms + mean).reshape(-1, SIDE, SIDE), noisy.shape))


def _denoise(noisy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return images.denoise(noisy, SIGMA, m=ATOMS, k=MOST, side=SIDE, steps=STEPS, patches=PATCHES)


def denoising(clean: np.ndarray, name: str, *, with_peers: bool, out: Path | None) -> Iterator[dict[str, Any]]:
    """PSNR and seconds for one picture; ours with and without compilation."""
    noisy = clean + np.random.default_rng(0).normal(0, SIGMA, clean.shape).astype(np.float32)
    row = {"picture": name, "height": clean.shape[0], "width": clean.shape[1], "noisy": images.psnr(noisy, clean)}
    say(f"{name}: denoising")
    (quiet, atoms), first = _timed(lambda: _denoise(noisy))
    _, seconds = _timed(lambda: _denoise(noisy))
    yield {**row, "method": "jaxsae", "psnr": images.psnr(quiet, clean), "s": seconds, "first_s": first}
    if out is not None:
        image_files.write(out / f"{name}-denoised.png", _side_by_side(noisy, quiet))
        image_files.write(out / f"{name}-dictionary.png", images.mosaic(atoms, scale=2))
    if with_peers:
        say(f"{name}: scikit-learn")
        row["method"] = "scikit-learn"
        result, seconds = _timed(lambda: sklearn_denoise(noisy))
        yield {**row, "psnr": images.psnr(result, clean), "s": seconds, "first_s": seconds}


def inpainting(clean: np.ndarray, name: str, *, out: Path | None) -> Iterator[dict[str, Any]]:
    """PSNR of a picture with half its pixels missing, with cosines and with learnt atoms."""
    missing = np.random.default_rng(1).random(clean.shape) < MISSING
    holes = np.where(missing, 0, clean)
    for method, steps in (("cosines", 0), ("learnt", STEPS)):
        say(f"{name}: filled in, {method}")
        (filled, _), seconds = _timed(
            lambda steps=steps: images.inpaint(holes, missing, m=ATOMS, k=MOST, side=SIDE, steps=steps, patches=PATCHES)
        )
        yield {
            "picture": name,
            "method": method,
            "missing": MISSING,
            "psnr": images.psnr(filled, clean),
            "first_s": seconds,
        }
    if out is not None:
        image_files.write(out / f"{name}-inpainted.png", _side_by_side(holes, filled))


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def _side_by_side(before: np.ndarray, after: np.ndarray, *, most: int = 256) -> np.ndarray:
    """The middle of a picture before and after."""
    top, left = (max(0, (size - most) // 2) for size in before.shape)
    return np.hstack([each[top : top + most, left : left + most] for each in (before, after)])
