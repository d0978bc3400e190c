"""Published SAEs for the tests: files that the libraries wrote, others written here to the facts, and plain numpy."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from jaxsae import pretrained

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
CASES = [
    *(f"dictionary_learning/{name}" for name in ("gated", "jumprelu", "standard", "topk")),
    *(f"saelens/{name}" for name in ("abstopk", "gated", "jumprelu", "skip_transcoder", "standard")),
    *(f"saelens/{name}" for name in ("standard_layernorm", "topk", "topk_rescale", "transcoder")),
    *(f"saelens/{name}" for name in ("train_batchtopk", "train_topk")),
    *(f"sparsify/{name}" for name in ("topk", "transcode")),
]

NAMED = {"dictionary_learning/topk": "dictionary_learning_topk"}


def fixture(case: str) -> Path:
    """The folder of a case; skips the test if it is not there."""
    if not FIXTURES.is_dir():
        pytest.skip("the files that other libraries wrote, ../shared/fixtures, are not there")
    return FIXTURES / case


def published(case: str, **options):
    """The SAE of a case, of one class where the files may be of two."""
    return pretrained.load(fixture(case), **({"format": NAMED[case]} if case in NAMED else {}), **options)


def recorded(case: str) -> dict[str, np.ndarray]:
    """What the library made of its inputs: `x`, `z`, and where recorded `xhat` and `forward`."""
    with np.load(fixture(case) / "io.npz") as arrays:
        renamed = {"decode": "xhat", "forward_sae_out": "forward"}
        return {renamed.get(name, name): arrays[name] for name in arrays}


def training_form(case: str, folder: Path) -> Path:
    """The files saved in training, under the names that they had."""
    folder.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        shutil.copy(fixture(case) / f"train__{name}", folder / name)
    return folder


D, M, K = 6, 12, 3
RNG = np.random.default_rng(8)
X = RNG.normal(size=(5, D)).astype(np.float32)
X[2] = 0


def arrays(d=D, m=M, d_out=None, seed=0) -> dict[str, np.ndarray]:
    """Canonical weights, of any norm."""
    rng, d_out = np.random.default_rng(seed), d_out or d
    shapes = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d_out), "b_dec": (d_out,), "W_skip": (d, d_out)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder: Path, weights: str, tensors: dict, config: dict | None = None, name: str = "cfg.json") -> Path:
    """A folder of safetensors and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: np.ascontiguousarray(value).reshape(np.shape(value)) for key, value in tensors.items()}
    safetensors.numpy.save_file(contiguous, folder / weights)
    if config is not None:
        (folder / name).write_text(json.dumps(config))
    return folder


def relu(pre):
    return np.maximum(pre, 0)


def top_k(pre, k):
    """The `k` largest of each row, others 0."""
    least = np.sort(pre, axis=-1)[:, -k:][:, :1]
    return np.where(pre >= least, pre, 0)


def pre(x, w, apply_b_dec_to_input=True):
    x = np.float64(x) - (w["b_dec"] if apply_b_dec_to_input else 0)
    return x @ np.float64(w["W_enc"]) + w["b_enc"]
