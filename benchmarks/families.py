"""Train each family of autoencoders on activations, at the defaults of `jaxsae train`, and compare them."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clock import say
from jaxsae import pretrained
from jaxsae.app import runs
from jaxsae.app.options import Options, resolved
from jaxsae.autoencoder import calibration
from jaxsae.autoencoder.activations import TopK
from jaxsae.autoencoder.metrics import DEAD_ROWS
from jaxsae.autoencoder.stream import chunks
from jaxsae.data.photographs import image_patches
from jaxsae.data.rows import open_rows

K, BATCH, HELDOUT = 20, 512, 2048
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    (f"TopK {K}", {"activation": "topk", "k": K}),
    (f"BatchTopK {K}", {"activation": "batchtopk", "k": K}),
    (f"JumpReLU {K}", {"activation": "jumprelu", "k": K}),
    ("ReLU, L1 0.1", {"activation": "relu", "l1": 0.1}),
    ("Gated, L1 0.2", {"activation": "gated", "l1": 0.2}),
    (f"TopK {K} without AuxK", {"activation": "topk", "k": K, "auxk": False}),
]


def run(data: Path | None, out: Path, *, latents: int, steps: int, before: Path | None = None) -> Iterator[dict]:
    """Train every setting with the same steps and batches; a row each. Results already in `out` are reused.

    `before` is the `out` of another version: its autoencoders are measured in the same way on the same rows.
    """
    data = photographs(out / "photographs.npy") if data is None else data
    for name, changes in SETTINGS:
        say(f"{data.stem}: {name}")
        place = Path(data.stem) / name.replace(", ", "-").replace(" ", "-").lower()
        options = Options(latents=latents, steps=steps, batch=BATCH, heldout=HELDOUT, **changes)
        done = out / place / "report.json"
        report = json.loads(done.read_text()) if done.exists() else {}
        if report.get("options") != resolved(options)._asdict():
            report = runs.run(out / place, data=data, options=options)
        row = {"name": name, **report, "data": {**report["data"], "path": data.stem}}
        row["nmse_at"] = _progressive(out / place, data, report)
        if before is not None and (before / place).exists():
            row["before"] = _measure(before / place, data)
        yield row


def photographs(path: Path) -> Path:
    """Patches of two photographs in a file; the last rows, and only these, come from their right quarters."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate(image_patches(100_000, HELDOUT, side=8, seed=0)))
    return path


def _measure(place: Path, data: Path) -> dict[str, Any]:
    sae, rows = pretrained.load(place), open_rows(data)
    some = rows[: min(len(rows) - HELDOUT, DEAD_ROWS)]
    return runs.evaluate(sae, rows[-HELDOUT:], calibration.activity(sae, (x for _, x in chunks(sae, some))))


def _progressive(place: Path, data: Path, report: dict[str, Any]) -> dict[str, float]:
    """NMSE of the largest latents alone; for TopK up to four times as many as it was trained with."""
    sae = pretrained.load(place)
    if not isinstance(sae.activation, TopK):
        return report["heldout"]["nmse_at"]
    wider = dataclasses.replace(sae, activation=TopK(4 * sae.activation.k))
    return runs.evaluate(wider, open_rows(data)[-HELDOUT:])["nmse_at"]
