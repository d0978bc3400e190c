"""The model card of a published SAE: where it belongs, what was measured, and how to load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsae._core.files import in_one_line, settled
from jaxsae.app import console
from jaxsae.autoencoder.sae import SAE, describe
from jaxsae.data.origin import Origin

_MEASURED = {"explained_variance": "explained variance", "nmse": "NMSE", "l0": "L0", "dead": "dead latents"}
_HEAD = """---
library_name: jaxsae
tags:
- sparse-autoencoder
- mechanistic-interpretability
---
"""


def measured(path: Path) -> dict[str, Any]:
    """The numbers that `jaxsae eval --json` printed to a file, or those of a run's `report.json`.

    Args:
      path: of the file.

    Raises:
      InputError: if it is neither.
    """
    with in_one_line(f"{path}: not what jaxsae eval --json prints", "redirect its output to a file"):
        found = json.loads(path.read_text())
        found = found.get("heldout", found)
        numbers = {name: found[name] for name in (*_MEASURED, "rows")}
        kinds = {name: (int | float | None) if name in _MEASURED else int for name in numbers}
        if wrong := [name for name, value in numbers.items() if not isinstance(value, kinds[name])]:
            raise ValueError(f"its {wrong[0]} is no number")
    return numbers


def of_run(path: str) -> dict[str, Any] | None:
    """The numbers of a run's report, if a path is a run.

    Args:
      path: of an SAE.
    """
    report = settled(path) / "report.json" if "://" not in path else None
    return measured(report) if report is not None and report.is_file() else None


def write(path: Path, address: str, sae: SAE, origin: Origin, format: str, numbers: Mapping[str, Any] | None) -> None:
    """Write the card of an SAE.

    Args:
      path: of the card.
      address: from which the SAE will be loaded.
      sae: the autoencoder.
      origin: where it belongs.
      format: in which it is written.
      numbers: what was measured, as from `measured`.
    """
    about = {name: value for name, value in origin.known().items() if name != "data"}
    facts = {"format": format, **describe(sae), **about}
    text = (
        f"{_HEAD}\n# {address.rpartition('/')[2]}\n\nA sparse autoencoder, published with jaxsae.\n\n{_table(facts)}\n"
    )
    if numbers is not None:
        rows = {_MEASURED[name]: console.number(numbers[name]) for name in _MEASURED}
        text += f"\n## Measured\n\nOn {numbers['rows']:,} held-out rows, before refinement.\n\n{_table(rows)}\n"
    text += f"\n## Use\n\n```python\nimport jaxsae\n\nsae = jaxsae.pretrained.load({address!r})\n"
    target, rows = (", target=y", "jnp.hstack([x, y])") if sae.transcoder else ("", "x")
    slots = "" if sae.activation.slots else f", capacity=jaxsae.stream.max_l0(sae, {rows})"
    what = "x [n d], y [n d_out]: its inputs and targets" if sae.transcoder else "x [n d]: activations of its site"
    text += f"code, info = jaxsae.refine(sae, x{target}{slots})  # {what}\n```\n"
    path.write_text(text)


def _table(facts: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
