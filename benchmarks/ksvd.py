"""k-SVD at its authors' experiments: dictionaries found again, pictures denoised and filled in, ours and others'."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import name_missing, say
from jaxsae import images
from jaxsae import ksvd as learning

N, D, M, K = 1500, 20, 50, 3  # of the synthetic experiment of Aharon, Elad & Bruckstein (2006)
SIGMA, SIDE, ATOMS, MOST = 25.0, 8, 256, 16  # of the denoising; at most so many atoms a patch
PATCHES, STEPS = 1 << 15, 10
MISSING = 0.5
PICTURES = ("camera", "astronaut", "chelsea", "coffee")


class Size(NamedTuple):
    """How much of it to run."""

    runs: int
    steps: int
    snrs: tuple[float | None, ...]  # dB; None is without noise
    pictures: tuple[str, ...]
    peer_runs: int


SIZES = {
    "tiny": Size(2, 30, (20.0,), (), 1),
    "paper": Size(50, 80, (20.0, 10.0, 30.0, None), PICTURES, 10),
}

# --- Dictionaries found again


def synthetic(seed: int, snr: float | None) -> tuple[np.ndarray, np.ndarray]:
    """A dictionary `[m d]`, and signals `[n d]` of `k` of its atoms each, with white noise."""
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(M, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    chosen = np.argsort(rng.random((N, M)), axis=1)[:, :K]
    y = np.einsum("nk,nkd->nd", rng.normal(size=(N, K)), atoms[chosen])
    if snr is not None:
        noise = rng.normal(size=y.shape)
        y += noise * np.linalg.norm(y) / np.linalg.norm(noise) * 10 ** (-snr / 20)
    return atoms, y


def recovered(true: np.ndarray, found: np.ndarray) -> float:
    """The share of atoms that have one of theirs within `1 − |dᵀd̂| < 0.01`."""
    found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return float(np.mean(np.min(1 - np.abs(true @ found.T), axis=1) < 0.01))


Learner = Callable[[int, np.ndarray, int], np.ndarray]  # (seed, y, steps) -> D


def _ours(update) -> Learner:
    def learn(seed, y, steps):
        y = jnp.asarray(y, jnp.float32)
        return np.asarray(learning.fit(jax.random.key(seed), y, m=M, k=K, steps=steps, update=update)[0], np.float64)

    return learn


def _dictlearn(algorithm: str) -> Callable[[], Learner]:
    def load():
        from dictlearn import DictionaryLearning  # pyright: ignore[reportMissingImports]

        def learn(seed, y, steps):
            model = DictionaryLearning(M, fit_algorithm=algorithm, n_nonzero_coefs=K, max_iter=steps, random_state=seed)
            return np.asarray(model.fit(y).components_)

        return learn

    return load


def _ksvd_package() -> Learner:
    from ksvd import ApproximateKSVD  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    def learn(seed, y, steps):
        np.random.seed(seed)  # the package draws from the global generator
        return np.asarray(ApproximateKSVD(M, max_iter=steps, transform_n_nonzero_coefs=K).fit(y).components_)

    return learn


OURS: dict[str, Callable[[], Learner]] = {
    "jaxsae exact": lambda: _ours(learning.exact),
    "jaxsae approximate": lambda: _ours(learning.approximate),
    "jaxsae MOD": lambda: _ours(learning.mod),
}
PEERS: dict[str, Callable[[], Learner]] = {
    "dictlearn ksvd": _dictlearn("ksvd"),
    "dictlearn aksvd": _dictlearn("aksvd"),
    "dictlearn mod": _dictlearn("mod"),
    "ksvd": _ksvd_package,
}


def recovery(size: str, *, with_peers: bool) -> Iterator[dict[str, Any]]:
    """Share of atoms recovered, by learner and noise: mean and least of the runs, and seconds of a run, warm."""
    case = SIZES[size]
    for name, load in (OURS | PEERS if with_peers else OURS).items():
        row: dict[str, Any] = {"learner": name, "steps": case.steps, "note": None}
        try:
            learn = load()
        except ImportError as error:
            yield {**row, "snr": None, "runs": 0, "mean": None, "least": None, "s": None, "note": name_missing(error)}
            continue
        runs = case.runs if name in OURS else case.peer_runs
        for snr in case.snrs:
            say(f"{name}, SNR {snr or 'infinite'}")
            learn(0, synthetic(0, snr)[1], case.steps)
            shares, start = [], time.perf_counter()
            for seed in range(runs):
                true, y = synthetic(seed, snr)
                shares.append(recovered(true, learn(seed, y, case.steps)))
            seconds = (time.perf_counter() - start) / runs
            yield {
                **row,
                "snr": snr,
                "runs": runs,
                "mean": float(np.mean(shares)),
                "least": min(shares),
                "s": seconds,
            }


# --- Pictures


def picture(name: str) -> np.ndarray:
    """A photograph of scikit-image as grey levels `[h w]`, by the weights of its `rgb2gray`."""
    from skimage import color, data  # pyright: ignore[reportMissingImports]

    pixels = getattr(data, name)()
    return np.rint(255 * color.rgb2gray(pixels) if pixels.ndim == 3 else pixels).astype(np.float32)


def psnr(picture: np.ndarray, clean: np.ndarray) -> float:
    """Peak signal to noise in dB, of 8-bit levels."""
    return float(10 * np.log10(255**2 / np.mean((np.clip(picture, 0, 255) - clean) ** 2)))


def sklearn_denoise(noisy: np.ndarray, *, stop: str) -> np.ndarray:
    """scikit-learn's pipeline: `MiniBatchDictionaryLearning` on as many patches and passes, OMP, averaged overlaps.

    As its example "Image denoising using dictionary learning" has it, but with our rule to end the pursuit, which
    denoises better (`stop="tol"`), or with two atoms a patch, the example's choice (`stop="2 atoms"`).
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
    rule: dict[str, Any] = {"n_nonzero_coefs": 2}
    if stop == "tol":
        rule = {"tol": (1.15 * SIGMA * SIDE) ** 2, "norms_squared": np.sum(y**2, axis=1)}
    values: Any = orthogonal_mp_gram(atoms @ atoms.T, atoms @ y.T, **rule)
    return np.asarray(reconstruct_from_patches_2d((values.T @ atoms + mean).reshape(-1, SIDE, SIDE), noisy.shape))


def _denoise(noisy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return images.denoise(noisy, SIGMA, m=ATOMS, k=MOST, side=SIDE, steps=STEPS, patches=PATCHES)


DENOISERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "scikit-learn, OMP to 1.15 σ": lambda noisy: sklearn_denoise(noisy, stop="tol"),
    "scikit-learn, 2 atoms": lambda noisy: sklearn_denoise(noisy, stop="2 atoms"),
}


def denoising(clean: np.ndarray, name: str, *, with_peers: bool, out: Path | None) -> Iterator[dict[str, Any]]:
    """PSNR and seconds for one picture; ours with its compilation, and again without."""
    noisy = clean + np.random.default_rng(0).normal(0, SIGMA, clean.shape).astype(np.float32)
    row = {"picture": name, "height": clean.shape[0], "width": clean.shape[1], "noisy": psnr(noisy, clean)}
    say(f"{name}: denoising")
    (quiet, atoms), first = _timed(lambda: _denoise(noisy))
    _, seconds = _timed(lambda: _denoise(noisy))
    yield {**row, "method": "jaxsae", "psnr": psnr(quiet, clean), "s": seconds, "first_s": first, "note": None}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        images.write(out / f"{name}-denoised.png", _side_by_side(noisy, quiet))
        images.write(out / f"{name}-dictionary.png", images.mosaic(atoms, scale=2))
    for method, denoise in DENOISERS.items() if with_peers else ():
        say(f"{name}: {method}")
        try:
            result, seconds = _timed(lambda denoise=denoise: denoise(noisy))
        except ImportError as error:
            yield {**row, "method": method, "psnr": None, "s": None, "first_s": None, "note": name_missing(error)}
            continue
        yield {**row, "method": method, "psnr": psnr(result, clean), "s": seconds, "first_s": seconds, "note": None}


def inpainting(clean: np.ndarray, name: str, *, out: Path | None) -> Iterator[dict[str, Any]]:
    """PSNR of a picture of which half the pixels were missing, with the cosines alone and with what is learnt."""
    missing = np.random.default_rng(1).random(clean.shape) < MISSING
    holes = np.where(missing, 0, clean)
    for method, steps in (("cosines", 0), ("learnt", STEPS)):
        say(f"{name}: filled in, {method}")
        (filled, _), seconds = _timed(
            lambda steps=steps: images.inpaint(holes, missing, m=ATOMS, k=MOST, side=SIDE, steps=steps, patches=PATCHES)
        )
        yield {"picture": name, "method": method, "missing": MISSING, "psnr": psnr(filled, clean), "first_s": seconds}
    if out is not None:
        images.write(out / f"{name}-inpainted.png", _side_by_side(holes, filled))


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def _side_by_side(before: np.ndarray, after: np.ndarray, *, most: int = 256) -> np.ndarray:
    """The middle of a picture before and after."""
    top, left = (max(0, (size - most) // 2) for size in before.shape)
    return np.hstack([each[top : top + most, left : left + most] for each in (before, after)])


def run(size: str, *, with_peers: bool, out: Path | None) -> Iterator[dict[str, Any]]:
    """The report, as it grows: rows of `recovery`, `denoising` and `inpainting`; pictures go into `out`."""
    report: dict[str, Any] = {"size": size, "sigma": SIGMA, "atoms": ATOMS, "most": MOST}
    report |= {"recovery": [], "denoising": [], "inpainting": []}
    for row in recovery(size, with_peers=with_peers):
        report["recovery"].append(row)
        yield report
    for name in SIZES[size].pictures:
        clean = picture(name)
        for row in denoising(clean, name, with_peers=with_peers, out=out):
            report["denoising"].append(row)
            yield report
        for row in inpainting(clean, name, out=out):
            report["inpainting"].append(row)
            yield report
