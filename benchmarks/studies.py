"""Tables of a committed study: what `jaxsae study` measured, as means over seeds with their standard errors."""

import statistics
from typing import Any

from jaxsae.app.summary import FAMILIES, KNOWN, LOSSES, RECONSTRUCTIONS, VALUES, cell, means, method

_VALUES = [column for column in VALUES if column[1] not in ("mean_before", "mean_after", "worst_kkt")]


def values(report: dict[str, Any]) -> str:
    """What refinement does to the encoder's values."""
    return _table(report, _VALUES)


def reconstructions(report: dict[str, Any]) -> str:
    """The NMSE of several codes of as many atoms, and what two of them cost."""
    costs = {name: _milliseconds(report, name) for name in ("refit", "omp_nonnegative", "omp")}
    note = (
        f"Per row, without compilation, the median over all autoencoders: {costs['refit']:.2f} ms for the refit, "
        f"{costs['omp_nonnegative']:.2f} for OMP with z ≥ 0, {costs['omp']:.2f} for OMP."
    )
    return f"{_table(report, RECONSTRUCTIONS)}\n\n{note}"


def losses(report: dict[str, Any]) -> str:
    """What the codes cost a language model."""
    clean, mean, zero = (report[f"ce_{name}"] for name in ("clean", "mean", "zero"))
    note = (
        f"Cross-entropy is in nats per token: {clean:.3f} for the unchanged model, {mean:.3f} with the mean in place "
        f"of its residual, {zero:.3f} with zeros. KL is the divergence from the unchanged model's predictions; "
        "*recovered* is the loss recovered, relative to the mean."
    )
    return f"{_table(report, LOSSES)}\n\n{note}"


def known(report: dict[str, Any]) -> str:
    """How codes compare with the true ones."""
    return _table(report, KNOWN)


def lengths(report: dict[str, Any]) -> str:
    """What depends on the length of training: change of the mean activation, and NMSE before and after."""
    first = report["shorter"][0]
    whole = [row for row in report["rows"] if all(row.get(key) == first[key] for key in ("l0_target", "seed"))]
    by = {(row["family"], row["steps"]): row for row in [*report["shorter"], *whole] if "steps" in row}
    steps = sorted({step for _, step in by})
    keys = (("mean_change", "+.0%"), ("nmse_before", ".4f"), ("nmse_after", ".4f"))
    head = ["method", *(f"{name}, {step:,} steps" for name in ("change", "NMSE", "refined") for step in steps)]
    rows = []
    for family in dict.fromkeys(family for family, _ in by):
        cells = [format(by[family, step][key], how) for key, how in keys for step in steps]
        rows.append([f"{FAMILIES[family][0]}, L0 {first['l0_target']}", *cells])
    return markdown(head, rows)


def settings(report: dict[str, Any]) -> str:
    """How each family was trained: learning rate, weight or k, and time."""
    rows = []
    for family in dict.fromkeys(row["family"] for row in report["rows"] if "learning_rate" in row):
        members = [row for row in report["rows"] if row["family"] == family]
        sparsity = sorted({f"{row['k_or_l1']:.2g}" for row in members}, key=float)
        seconds = statistics.median(row["seconds"]["training"] for row in members)
        rate, name = members[0]["learning_rate"], FAMILIES[family][0]
        rows.append([name, f"{rate:.2g}", " to ".join(dict.fromkeys((sparsity[0], sparsity[-1]))), f"{seconds:.0f}"])
    total = sum(sum(row["seconds"].values()) for row in [*report["rows"], *report["shorter"]]) / 3600
    config, data = report["config"], report["data"]
    note = (
        f"{config['latents']:,} latents, {config['steps']:,} steps of {config['batch']} rows, {data['passes']:.1f} "
        f"passes over {data['rows']:,} rows of width {data['width']}; {data['heldout']:,} rows held out. {total:.1f} "
        "hours in all."
    )
    return f"{markdown(['family', 'learning rate', 'k, or weight of the penalty', 's a training'], rows)}\n\n{note}"


def _milliseconds(report: dict[str, Any], name: str) -> float:
    return statistics.median(row["milliseconds"][name] for row in report["rows"] if name in row["milliseconds"])


def _table(report: dict[str, Any], columns: Any) -> str:
    rows = means(report["rows"])
    columns = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    cells = [[method(row), *(cell(row, key, how) for _, key, how in columns)] for row in rows]
    return markdown(["method", *(name for name, *_ in columns)], cells)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is words, and the others numbers."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
