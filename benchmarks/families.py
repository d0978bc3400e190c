"""Train each family of autoencoders on one file of activations and compare them at one sparsity."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clock import say
from jaxsae import runs

K, BATCH = 32, 512
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


def run(data: Path, out: Path, *, latents: int, steps: int) -> Iterator[dict[str, Any]]:
    """Train every setting with the same steps and batches; a row each."""
    for name, changes in SETTINGS:
        say(name)
        options = runs.Options(
            latents=latents, steps=steps, batch=BATCH, learning_rate=1e-3, dead_after=100 * BATCH, **changes
        )
        report = runs.run(out / name.replace(", ", "-").replace(" ", "-").lower(), data=data, options=options)
        yield {"name": name, **report, "data": {**report["data"], "path": data.name}}


def matched(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """NMSE of the families whose sparsity comes from a penalty, between their runs on both sides of one L0."""
    return {"l0": K, "nmse": {name: nmse for name in L1 if (nmse := _at(rows, name, K)) is not None}}


def _at(rows: list[dict[str, Any]], activation: str, l0: float) -> float | None:
    points = sorted(
        (row["heldout"]["l0"], row["heldout"]["nmse"]) for row in rows if row["options"]["activation"] == activation
    )
    if not points:
        return None
    x, y = np.array(points).T
    return float(np.interp(np.log(l0), np.log(x), y)) if x[0] <= l0 <= x[-1] else None
