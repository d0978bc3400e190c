"""The rows of a study by name, and their means over seeds with standard errors."""

import math
from collections.abc import Sequence
from typing import Any

# The displayed name of a family, and its colour on white and on black.
FAMILIES = {
    "relu": ("ReLU + L1", "#c93a4c", "#f0808c"),
    "alignedrelu": ("ReLU + L1, aligned", "#a8402a", "#f0a58c"),
    "gated": ("Gated", "#6a4c93", "#b79be0"),
    "jumprelu": ("JumpReLU", "#8f5d00", "#edae49"),
    "topk": ("TopK", "#00798c", "#4cc3d4"),
    "batchtopk": ("BatchTopK", "#30638e", "#7eb2e0"),
    "matryoshka": ("Matryoshka", "#1f7a4d", "#6fd0a0"),
    "matchingpursuit": ("matching pursuit", "#555555", "#b5b5b5"),
    "abstopk": ("AbsTopK", "#5f7d4f", "#a3c48f"),
    "groupmax": ("GroupMax", "#8d6346", "#d0a583"),
    "truth": ("true dictionary", "#000000", "#ffffff"),
}

# Columns of tables: name, key and format.
VALUES = (
    ("L0", "l0", ".1f"),
    ("refined", "l0_after", ".1f"),
    ("NMSE", "nmse_before", ".4f"),
    ("refined", "nmse_after", ".4f"),
    ("mean act.", "mean_before", ".3f"),
    ("refined", "mean_after", ".3f"),
    ("change", "mean_change", "+.1%"),
    ("rising", "rising", ".0%"),
    ("γ", "gamma_before", ".3f"),
    ("dead", "dead", ".1%"),
    ("worst KKT", "worst_kkt", ".1e"),
)
RECONSTRUCTIONS = (
    ("encoder", "nmse_before", ".4f"),
    ("a factor a latent", "nmse_rescaled", ".4f"),
    ("refined", "nmse_after", ".4f"),
    ("signed refit", "nmse_signed", ".4f"),
    ("OMP, z ≥ 0", "nmse_omp_nonnegative", ".4f"),
    ("OMP", "nmse_omp", ".4f"),
    ("OMP, z ≥ 0, as many in every row", "nmse_omp_equal", ".4f"),
)
LOSSES = (
    ("cross-entropy", "ce_before", ".3f"),
    ("refined", "ce_after", ".3f"),
    ("OMP, z ≥ 0", "ce_omp_nonnegative", ".3f"),
    ("recovered", "recovered_mean_before", ".1%"),
    ("refined", "recovered_mean_after", ".1%"),
    ("OMP, z ≥ 0", "recovered_mean_omp_nonnegative", ".1%"),
    ("KL", "kl_before", ".3f"),
    ("refined", "kl_after", ".3f"),
)
KNOWN = (
    ("MCC", "mcc", ".3f"),
    ("F1", "f1_before", ".3f"),
    ("refined", "f1_after", ".3f"),
    ("OMP, z ≥ 0", "f1_omp_nonnegative", ".3f"),
    ("bias of values", "bias_before", "+.1%"),
    ("refined", "bias_after", "+.1%"),
    ("OMP, z ≥ 0", "bias_omp_nonnegative", "+.1%"),
    ("error of values", "value_error_before", ".1%"),
    ("refined", "value_error_after", ".1%"),
)


def cell(row: dict[str, Any], key: str, form: str) -> str:
    """A number of one of `means` with its standard error, if there is one; "" if it is missing.

    Args:
      row: one of `means`.
      key: of the number.
      form: as for `format`.

    Example:
      >>> cell({"l0": 16.0, "errors": {"l0": 0.5}}, "l0", ".1f")
      '16.0 ± 0.5'
    """
    value, error = row.get(key), row["errors"].get(key)
    if value is None:
        return ""
    shown = format(value, form)
    return shown if error is None or key == "worst_kkt" else f"{shown} ± {format(error, form.lstrip('+'))}"


def method(row: dict[str, Any]) -> str:
    """The name of a row of a study.

    Args:
      row: of a study's report, or one of `means`.

    Example:
      >>> method({"family": "topk", "l0_target": 32}), method({"family": "topk", "l0_target": 32, "sae": "a.npz"})
      ('TopK, L0 32', 'a.npz')
    """
    if "sae" in row:
        return row["sae"]
    return f"{FAMILIES.get(row['family'], (row['family'],))[0]}, L0 {row['l0_target']:g}"


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of each family and L0 as one: means over seeds, and `errors`, the standard errors of the means.

    A number that is missing in one is missing in the mean. Histograms are added up. Without several seeds, there are no
    errors.

    Args:
      rows: of a study's report.

    Example:
      >>> rows = [{"family": "topk", "l0_target": 8, "seed": seed, "l0": 8.0 + seed} for seed in (0, 1)]
      >>> found = means(rows)[0]
      >>> found["l0"], found["seeds"], found["errors"]["l0"]
      (8.5, 2, 0.5)
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.get("sae") or (row["family"], row["l0_target"]), []).append(row)
    return [_mean(group) for group in groups.values()]


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found, errors, n = dict(rows[0]), {}, len(rows)
    for name, first in rows[0].items():
        if name in ("change", "latent_change"):
            found[name] = [sum(counts) for counts in zip(*(row[name] for row in rows), strict=True)]
        if not isinstance(first, float | None) or n == 1:
            continue
        values = [row[name] for row in rows if row.get(name) is not None]
        mean = math.fsum(values) / n if len(values) == n else None
        found[name] = mean
        if mean is not None:
            errors[name] = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return found | {"seeds": n, "errors": errors}
