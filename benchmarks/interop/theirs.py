"""The half that runs with the peers and without jaxsae: read what it wrote; write all that they have."""

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens  # pyright: ignore[reportMissingImports]
import sparsify  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]

D, M, K, D_OUT = 16, 64, 8, 12


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest, relative to the largest value where that exceeds 1; a row with NaN must have some in both."""
    rows = ~np.isnan(expected).any(1)
    if not np.array_equal(rows, ~np.isnan(found).any(1)):
        return float("inf")
    return float(np.max(np.abs(found - expected)[rows]) / max(1, np.max(np.abs(expected[rows]))))


def run_saelens(model: Any, x: Any) -> tuple[Any, Any]:
    """Code and output."""
    return model.encode(x), model(x)


def run_sparsify(model: Any, x: Any) -> tuple[Any, Any]:
    """Code and output."""
    top = model.encode(x)
    z = torch.zeros(len(x), model.num_latents).scatter_(1, top.top_indices, top.top_acts)
    # Autoencoders are given no target; only the output is wanted.
    return z, model(x, x).sae_out


def dictionary_class(name: str) -> Any:
    """A class of dictionary_learning, whose package imports more than is installed here."""
    package = importlib.util.find_spec("dictionary_learning")
    file = Path(package.submodule_search_locations[0], "dictionary.py")  # pyright: ignore
    spec = importlib.util.spec_from_file_location("dictionary", file)
    module = importlib.util.module_from_spec(spec)  # pyright: ignore
    spec.loader.exec_module(module)  # pyright: ignore
    return getattr(module, name)


def load(name: str, path: Path) -> tuple[Any, Any]:
    """What a library makes of files of ours, and how to run it."""
    library = name.split("-")[0]
    if library == "saelens":
        return sae_lens.SAE.load_from_disk(path), run_saelens
    if library == "sparsify":
        return sparsify.SparseCoder.load_from_disk(path), run_sparsify
    model = dictionary_class(name.split("-")[1])
    options = {"normalize_decoder": False} if name.endswith("-AutoEncoder") else {}
    return model.from_pretrained(path / "ae.pt", **options), run_saelens


def read(folder: Path) -> dict[str, dict]:
    """Compare what the libraries compute with what jaxsae did."""
    found = {}
    for path in sorted((folder / "ours").iterdir()):
        with np.load(path / "io.npz") as io:
            model, run = load(path.name, path / "sae")
            z, forward = (out.float().numpy() for out in run(model, torch.tensor(io["x"])))
            found[path.name] = {"z": difference(z, io["z"]), "forward": difference(forward, io["forward"])}
    return found


def randomise(model: Any) -> Any:
    """Random weights, of any norm; thresholds from 0 to 1."""
    torch.manual_seed(0)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name == "log_threshold":
            value.data = torch.log(torch.rand_like(value) + 0.01)
        elif "threshold" in name:
            value.data = torch.rand_like(value) if value.ndim else torch.full_like(value, 0.7)
        else:
            value.data = torch.randn_like(value) / 2
    return model


def their_saes() -> dict[str, tuple[Any, bool]]:
    """One of every architecture of sae-lens, and whether it is saved from training to infer."""
    s, base = sae_lens.saes, {"d_in": D, "d_sae": M}
    narrow = {**base, "d_out": D_OUT, "apply_b_dec_to_input": False}
    found = {
        "standard": (s.StandardSAE(s.StandardSAEConfig(**base)), False),
        "standard-uncentred": (s.StandardSAE(s.StandardSAEConfig(**base, apply_b_dec_to_input=False)), False),
        "standard-float64": (s.StandardSAE(s.StandardSAEConfig(**base, dtype="float64")), False),
        "topk": (s.TopKSAE(s.TopKSAEConfig(**base, k=K)), False),
        "topk-rescaled": (s.TopKSAE(s.TopKSAEConfig(**base, k=K, rescale_acts_by_decoder_norm=True)), False),
        "abstopk": (s.AbsTopKSAE(s.AbsTopKSAEConfig(**base, k=K)), False),
        "jumprelu": (s.JumpReLUSAE(s.JumpReLUSAEConfig(**base)), False),
        "gated": (s.GatedSAE(s.GatedSAEConfig(**base)), False),
        "matching-pursuit": (
            s.MatchingPursuitSAE(s.MatchingPursuitSAEConfig(**base, residual_threshold=0.3, max_iterations=6)),
            False,
        ),
        "transcoder": (s.Transcoder(s.TranscoderConfig(**narrow)), False),
        "skip-transcoder": (s.SkipTranscoder(s.SkipTranscoderConfig(**narrow)), False),
        "jumprelu-transcoder": (s.JumpReLUTranscoder(s.JumpReLUTranscoderConfig(**narrow)), False),
        "jumprelu-skip-transcoder": (s.JumpReLUSkipTranscoder(s.JumpReLUSkipTranscoderConfig(**narrow)), False),
        "train-standard": (s.StandardTrainingSAE(s.StandardTrainingSAEConfig(**base)), True),
        "train-topk": (s.TopKTrainingSAE(s.TopKTrainingSAEConfig(**base, k=K)), True),
        "train-batchtopk": (s.BatchTopKTrainingSAE(s.BatchTopKTrainingSAEConfig(**base, k=K)), True),
        "train-jumprelu": (s.JumpReLUTrainingSAE(s.JumpReLUTrainingSAEConfig(**base)), True),
        "train-gated": (s.GatedTrainingSAE(s.GatedTrainingSAEConfig(**base)), True),
        "train-matryoshka": (
            s.MatryoshkaBatchTopKTrainingSAE(
                s.MatryoshkaBatchTopKTrainingSAEConfig(**base, k=K, matryoshka_widths=[16, M])
            ),
            True,
        ),
    }
    for norm in ("layer_norm", "constant_norm_rescale", "expected_average_only_in"):
        found[f"standard-{norm}"] = s.StandardSAE(s.StandardSAEConfig(**base, normalize_activations=norm)), False
        found[f"topk-{norm}"] = s.TopKSAE(s.TopKSAEConfig(**base, k=K, normalize_activations=norm)), False
    return found


def write(folder: Path, x: Any) -> None:
    """Save every architecture under `theirs/`, those of training in both forms, with what it computes."""

    def keep(name: str, run: Any, model: Any, save: Any, infer: Any = None) -> None:
        place = folder / "theirs" / name
        place.mkdir(parents=True)
        save(place / "sae")
        model = model if infer is None else infer()
        dtype = next(iter(model.parameters())).dtype
        z, forward = (out.float().numpy() for out in run(model, x.to(dtype)))
        np.savez(place / "io.npz", x=x.numpy(), z=z, forward=forward)

    for name, (model, training) in their_saes().items():
        randomise(model)
        if not training:
            if "matching" in name:
                model.W_dec.data /= model.W_dec.norm(dim=1, keepdim=True)
            keep(f"saelens-{name}", run_saelens, model, model.save_model)
            continue
        inference = folder / "theirs" / f"saelens-{name}" / "sae"

        def infer(path: Path = inference) -> Any:
            return sae_lens.SAE.load_from_disk(path)

        keep(f"saelens-{name}", run_saelens, model, model.save_inference_model, infer)
        keep(f"saelens-{name}-midway", run_saelens, model, model.save_model, infer)
    config = sparsify.SparseCoderConfig
    for name, options in {
        "topk": {},
        "groupmax": {"activation": "groupmax"},
        "transcode": {"transcode": True},
        "skip": {"transcode": True, "skip_connection": True},
        "expansion": {"num_latents": 0, "expansion_factor": 4},
    }.items():
        model = randomise(sparsify.SparseCoder(D, config(**({"num_latents": M, "k": K} | options))))
        keep(f"sparsify-{name}", run_sparsify, model, model.save_to_disk)


def main() -> None:
    """Read, then write."""
    folder = Path(sys.argv[1])
    with torch.no_grad():
        report: dict[str, Any] = {"they_read_us": read(folder)}
        with np.load(next((folder / "ours").iterdir()) / "io.npz") as io:
            write(folder, torch.tensor(io["x"]))
    names = ("torch", "sae-lens", "eai-sparsify", "dictionary-learning")
    report["versions"] = {name: version(name) for name in names}
    (folder / "peers.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
