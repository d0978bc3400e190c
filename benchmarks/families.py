"""Train each family of autoencoders on one file of activations and compare them at one sparsity."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clock import say
from jaxsae import pretrained, runs
from jaxsae.activations import TopK
from jaxsae.data import open_rows

K, BATCH = 32, 512
# Settings on both sides of the sparsity compared at; rows held out are less sparse than those trained on.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((f"ReLU, L1 {l1}", {"activation": "relu", "l1": l1}) for l1 in (0.04, 0.055)),
    *((f"Gated, L1 {l1}", {"activation": "gated", "l1": l1}) for l1 in (0.1, 0.12)),
    *((f"JumpReLU, L0 {l0}", {"activation": "jumprelu", "k": l0}) for l0 in (24, 32)),
    ("TopK 32", {"activation": "topk", "k": K}),
    ("TopK 32 without AuxK", {"activation": "topk", "k": K, "auxk": False}),
    ("TopK 32 with Multi-TopK", {"activation": "topk", "k": K, "multi_topk": True}),
    ("BatchTopK 32", {"activation": "batchtopk", "k": K}),
]


def run(data: Path, out: Path, *, latents: int, steps: int) -> Iterator[dict[str, Any]]:
    """Train every setting with the same steps and batches; a row each. What is in `out` already is not made again."""
    for name, changes in SETTINGS:
        say(name)
        place = out / name.replace(", ", "-").replace(" ", "-").lower()
        options = runs.Options(
            latents=latents, steps=steps, batch=BATCH, learning_rate=3e-3, idle_after=50 * BATCH, **changes
        )
        done = place / "report.json"
        report = json.loads(done.read_text()) if done.exists() else {}
        if report.get("options") != options._asdict():
            report = runs.run(place, data=data, options=options)
        yield {
            "name": name,
            **report,
            "data": {**report["data"], "path": data.name},
            "nmse_at": _progressive(place, data, report),
        }


def _progressive(place: Path, data: Path, report: dict[str, Any]) -> dict[str, float]:
    """NMSE of the largest latents alone, of TopK's up to four times as many as it was trained with."""
    sae = pretrained.load(place)
    if not isinstance(sae.activation, TopK):
        return report["heldout"]["nmse_at"]
    wider = dataclasses.replace(sae, activation=TopK(4 * sae.activation.k))
    return runs.evaluate(wider, open_rows(data)[-report["data"]["heldout"] :])["nmse_at"]


def matched(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """NMSE of the families that do not fix L0, interpolated in log L0 between their runs on both sides of one."""
    names = {row["name"].split(",")[0]: row["options"]["activation"] for row in rows if "," in row["name"]}
    found = {name: _at(rows, activation, K) for name, activation in names.items()}
    return {"l0": K, "nmse": {name: nmse for name, nmse in found.items() if nmse is not None}}


def _at(rows: list[dict[str, Any]], activation: str, l0: float) -> float | None:
    points = sorted(
        (row["heldout"]["l0"], row["heldout"]["nmse"]) for row in rows if row["options"]["activation"] == activation
    )
    x, y = np.array(points).T
    return float(np.interp(np.log(l0), np.log(x), y)) if x[0] <= l0 <= x[-1] else None
