"""The half that runs with jaxsae: write SAEs of every kind and what they compute; read what the peers wrote."""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxsae
from jaxsae import pretrained
from jaxsae.autoencoder import normalisation
from jaxsae.autoencoder.activations import MatchingPursuit

D, M, K, D_OUT, ROWS = 16, 64, 8, 12, 32
GATE = 1e-4  # largest difference of a code or a reconstruction, relative to the largest value where that exceeds 1


def rows() -> np.ndarray:
    """Ordinary rows, one of zeros, one large, one off centre."""
    x = np.random.default_rng(0).normal(size=(ROWS, D)).astype(np.float32)
    x[5], x[6], x[7] = 0, 30 * x[6], 5 + x[7]
    return x


def sae(activation, *, transcoder=False, skip=False, dtype=jnp.float32, d_out=D, **more) -> jaxsae.SAE:
    """Random weights, of any norm."""
    rng = np.random.default_rng(1)
    d_out = d_out if transcoder else D
    shapes = {"W_enc": (D, M), "b_enc": (M,), "W_dec": (M, d_out), "b_dec": (d_out,), "W_skip": (D, d_out)}
    arrays: dict[str, Any] = {name: jnp.asarray(rng.normal(size=shape) / 2, dtype) for name, shape in shapes.items()}
    if not skip:
        del arrays["W_skip"]
    if isinstance(activation, MatchingPursuit):  # whose atoms have norm 1, and whose encoder they are
        W_dec = arrays["W_dec"] / jnp.linalg.norm(arrays["W_dec"], axis=1, keepdims=True)
        arrays |= {"W_dec": W_dec, "W_enc": W_dec.T, "b_enc": jnp.zeros(M)}
    arrays |= {"apply_b_dec_to_input": not transcoder} | more
    return jaxsae.SAE(**arrays, activation=activation, transcoder=transcoder)


def cases() -> dict[str, tuple[str, jaxsae.SAE]]:
    """What to save: a format, and an SAE that it can hold."""
    rng = np.random.default_rng(2)
    threshold = jnp.asarray(rng.uniform(0, 1, M), jnp.float32)
    relu, topk, jump = jaxsae.ReLU(), jaxsae.TopK(K), jaxsae.JumpReLU(threshold)
    gated = jaxsae.Gated(*(jnp.asarray(rng.normal(size=M) / 2, jnp.float32) for _ in range(3)))
    batch = jaxsae.BatchTopK(K, jnp.float32(0.7))
    narrow = {"transcoder": True, "d_out": D_OUT}
    layer_norm = normalisation.LayerNorm()
    return {
        "saelens-standard": ("saelens", sae(relu)),
        "saelens-standard-uncentred": ("saelens", sae(relu, apply_b_dec_to_input=False)),
        "saelens-standard-layer-norm": ("saelens", sae(relu, normalisation=layer_norm)),
        "saelens-standard-constant-norm": ("saelens", sae(relu, normalisation=normalisation.ConstantNorm())),
        "saelens-topk": ("saelens", sae(topk)),
        "saelens-topk-layer-norm": ("saelens", sae(topk, normalisation=layer_norm)),
        "saelens-abstopk": ("saelens", sae(jaxsae.AbsTopK(K))),
        "saelens-jumprelu": ("saelens", sae(jump)),
        "saelens-batchtopk": ("saelens", sae(batch)),
        "saelens-gated": ("saelens", sae(gated)),
        "saelens-matching-pursuit": ("saelens", sae(MatchingPursuit(jnp.float32(0.3), 6))),
        "saelens-transcoder": ("saelens", sae(relu, **narrow)),
        "saelens-skip-transcoder": ("saelens", sae(relu, skip=True, **narrow)),
        "saelens-jumprelu-transcoder": ("saelens", sae(jump, **narrow)),
        "saelens-jumprelu-skip-transcoder": ("saelens", sae(jump, skip=True, **narrow)),
        "sparsify-topk": ("sparsify", sae(topk)),
        "sparsify-topk-uncentred": ("sparsify", sae(topk, apply_b_dec_to_input=False)),
        "sparsify-groupmax": ("sparsify", sae(jaxsae.GroupMax(K))),
        "sparsify-transcode": ("sparsify", sae(topk, transcoder=True)),
        "sparsify-skip": ("sparsify", sae(topk, transcoder=True, skip=True)),
        "dictionary_learning-AutoEncoder": ("dictionary_learning", sae(relu)),
        "dictionary_learning-AutoEncoderNew": ("dictionary_learning", sae(relu, apply_b_dec_to_input=False)),
        "dictionary_learning-GatedAutoEncoder": ("dictionary_learning", sae(gated)),
        "dictionary_learning-JumpReluAutoEncoder": ("dictionary_learning", sae(jump, apply_b_dec_to_input=False)),
    }


@jax.jit
def compute(model: jaxsae.SAE, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Code and reconstruction."""
    z = jaxsae.encode_dense(model, x)
    return z, jaxsae.autoencoder.reconstruct(model, x, z)


def write(folder: Path) -> None:
    """Save every case under `ours/`, with `x`, `z` and `forward` beside it."""
    x = rows()
    for name, (format, model) in cases().items():
        z, forward = compute(model, jnp.asarray(x))
        pretrained.save(model, folder / "ours" / name / "sae", format=format)
        np.savez(folder / "ours" / name / "io.npz", x=x, z=np.asarray(z), forward=np.asarray(forward))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest, relative to the largest value where that exceeds 1; a row with NaN must have some in both."""
    rows = ~np.isnan(expected).any(1)
    if not np.array_equal(rows, ~np.isnan(found).any(1)):
        return float("inf")
    return float(np.max(np.abs(found - expected)[rows]) / max(1, np.max(np.abs(expected[rows]))))


def read(folder: Path) -> dict[str, dict]:
    """Load what the peers saved under `theirs/` and compare."""
    found = {}
    for path in sorted((folder / "theirs").iterdir()):
        with np.load(path / "io.npz") as io:
            z, forward = compute(pretrained.load(path / "sae"), jnp.asarray(io["x"]))
            found[path.name] = {
                "z": difference(np.asarray(z), io["z"]),
                "forward": difference(np.asarray(forward), io["forward"]),
            }
    return found


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interop.ours", description=__doc__)
    parser.add_argument("what", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write how far each is from the other here")
    args = parser.parse_args()
    if args.what == "write":
        write(args.folder)
        return
    report = json.loads((args.folder / "peers.json").read_text())
    report["versions"] |= {"jaxsae": version("jaxsae"), "jax": version("jax"), "python": platform.python_version()}
    report |= {"gate": GATE, "we_read_them": read(args.folder)}
    for direction in ("they_read_us", "we_read_them"):
        for name, differences in report[direction].items():
            worst = max(differences.values())
            print(f"{direction:14}{name:44}{worst:.1e}{'' if worst <= GATE else '  GATE NOT MET'}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    differences = [d for way in ("they_read_us", "we_read_them") for row in report[way].values() for d in row.values()]
    if not max(differences) <= GATE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
