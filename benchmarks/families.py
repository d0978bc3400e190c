"""Train each family of autoencoders on one file of activations and compare them at one sparsity."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clock import say
from jaxsae import runs

K = 32
# Weights of the L1 penalty that bracket the sparsity compared at, for rows scaled to unit mean square.
L1 = {"relu": (0.05, 0.1, 0.2), "gated": (0.05, 0.1, 0.2)}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((f"ReLU, L1 {l1}", {"activation": "relu", "l1": l1}) for l1 in L1["relu"]),
    *((f"Gated, L1 {l1}", {"activation": "gated", "l1": l1}) for l1 in L1["gated"]),
    ("JumpReLU, L0 32", {"activation": "jumprelu", "k": K}),
    ("TopK 32", {"activation": "topk", "k": K}),
    ("TopK 32, without AuxK", {"activation": "topk", "k": K, "auxk": False}),
    ("TopK 32, Multi-TopK", {"activation": "topk", "k": K, "multi_topk": True}),
    ("BatchTopK 32", {"activation": "batchtopk", "k": K}),
]


def run(data: Path, out: Path, *, latents: int, steps: int, batch: int) -> Iterator[dict[str, Any]]:
    """Train every setting with the same steps and batches; a row each."""
    for name, changes in SETTINGS:
        say(name)
        options = runs.Options(
            latents=latents, steps=steps, batch=batch, learning_rate=1e-3, dead_after=100 * batch, **changes
        )
        report = runs.run(out / name.replace(", ", "-").replace(" ", "-").lower(), data=data, options=options)
        yield {"name": name, **report}


def at_sparsity(rows: list[dict[str, Any]], activation: str, l0: float) -> float | None:
    """NMSE of a family at an L0, interpolated in log L0 between the runs on both sides; None if it is outside them."""
    points = sorted(
        (row["heldout"]["l0"], row["heldout"]["nmse"]) for row in rows if row["options"]["activation"] == activation
    )
    x, y = np.array(points).T
    return float(np.interp(np.log(l0), np.log(x), y)) if x[0] <= l0 <= x[-1] else None
