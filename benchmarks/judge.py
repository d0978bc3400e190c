"""Accuracy of solvers, in float64 numpy, from the residual in the space of the data."""

import math
from typing import NamedTuple

import numpy as np

from benchmarks.cases import Problem, evenly

KKT = 1e-4  # the gate: at most this, on the worst row
ADDED_NMSE = 1e-6
_CHUNK = 64  # rows gathered at a time
_REFERENCE_ROWS = 1024


class Verdict(NamedTuple):
    """How good a solver's values are; `added_nmse` is None without scipy, which computes the optimum."""

    worst_kkt: float
    kkt_999: float
    added_nmse: float | None
    added_nmse_rows: int

    @property
    def objective_gap(self) -> float:
        """The worst row relative to the gate: at most 1 if the gate is met, infinite if a row is not finite."""
        over = [self.worst_kkt / KKT, (self.added_nmse or 0) / ADDED_NMSE]
        return max(over) if all(map(math.isfinite, over)) else math.inf

    @property
    def met(self) -> bool:
        """Whether the gate is met."""
        return self.objective_gap <= 1


class Judge:
    """A problem in float64, and the least squared error of a sample of its rows."""

    def __init__(self, problem: Problem):
        """Copy the problem, and solve `rows` of it with `scipy.optimize.nnls` if that can be imported."""
        self.dictionary = padded(np.asarray(problem.sae.W_dec, np.float64))
        self.y = np.asarray(problem.y, np.float64)
        self.indices = np.asarray(problem.code.indices)
        self.rows = evenly(len(self.y), _REFERENCE_ROWS)  # the optimum of these is known
        self.best = np.full(len(self.y), np.nan)
        self.missing = None  # the package that is missing to compute the optimum
        try:
            from scipy.optimize import nnls
        except ImportError:
            self.missing = "scipy: not installed"
            return
        for row in self.rows:
            atoms = self.dictionary[self.indices[row]]
            self.best[row] = nnls(atoms.T, self.y[row], maxiter=30 * len(atoms))[1] ** 2

    @np.errstate(invalid="ignore", over="ignore")  # a solver may have diverged
    def measure(self, values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The relative KKT residual and the squared error of each of some rows.

        `max_i v_i / (max_i‖a_i‖ ‖y‖)`, with `v_i = |g_i|` where `z_i > 0`, `max(−g_i, 0)` where it is 0, and infinite
        where it is neither.
        """
        kkt, error = np.empty(len(rows)), np.empty(len(rows))
        for start in range(0, len(rows), _CHUNK):
            part = slice(start, start + _CHUNK)
            z = values[part].astype(np.float64)
            y = self.y[rows[part]]
            atoms = self.dictionary[self.indices[rows[part]]]
            r = y - (z[:, None, :] @ atoms)[:, 0]
            g = -(atoms @ r[:, :, None])[:, :, 0]
            violation = np.where(z > 0, np.abs(g), np.where(z == 0, np.maximum(-g, 0), np.inf))
            size = np.linalg.norm(atoms, axis=2).max(axis=1) * np.linalg.norm(y, axis=1)
            kkt[part] = violation.max(axis=1) / np.where(size > 0, size, 1)
            error[part] = np.sum(r**2, axis=1)
        return kkt, error

    def __call__(self, values: np.ndarray, rows: np.ndarray) -> Verdict:
        """Judge a solver's values `[n k]` for some rows."""
        kkt, error = self.measure(values, rows)
        kkt = np.where(np.isnan(kkt), np.inf, kkt)
        squared = np.sum(self.y[rows] ** 2, axis=1)
        added = (error - self.best[rows]) / np.where(squared > 0, squared, 1)
        known = ~np.isnan(self.best[rows])
        worst = float(np.max(added[known])) if known.any() else None
        return Verdict(float(kkt.max()), float(np.quantile(kkt, 0.999, method="higher")), worst, int(known.sum()))


def padded(dictionary: np.ndarray) -> np.ndarray:
    """The dictionary with a final row of zeros, the atom of unused slots."""
    return np.concatenate([dictionary, np.zeros_like(dictionary[:1])])
