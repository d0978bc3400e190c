"""Measure an autoencoder: what refinement does to its values, and what other values or another selection would do."""

import contextlib
import dataclasses
import functools
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae import pursuit
from jaxsae._core.files import json_number
from jaxsae.app.sources import Truth
from jaxsae.autoencoder import calibration, metrics, stream
from jaxsae.autoencoder.refinement import to_fit
from jaxsae.autoencoder.sae import SAE, encode, reconstruct, split_rows
from jaxsae.autoencoder.shrinkage import RATIO_EDGES, shrinkage
from jaxsae.codes import SparseCode
from jaxsae.least_squares import certify, refit, solvers

CERTIFIED = 1e-5  # the KKT residual that certifies a row
TOL = 1e-6  # of the solver: tighter, so that the certificate does not depend on rounding
_WORST = 10  # rows with the largest KKT residuals in the report
_FITTED = 4096  # rows on which a factor for each latent is fitted
_CODES = 128 << 20  # bytes of the codes of these

# The reconstructions that are compared, besides the encoder's and the refined one, and what each is.
RIVALS = {
    "rescaled": "the encoder's values, each latent multiplied by one factor",
    "signed": "the encoder's support, values refitted with free signs",
    "omp": "as many atoms in each row, selected by orthogonal matching pursuit with free signs",
    "omp_nonnegative": "the same with values of at least 0",
    "omp_equal": "the same with the same number of atoms in every row, the mean L0",
}
_KNOWN = ("before", "after", "omp_nonnegative")  # codes that are compared with the truth, if there is one


def measure(
    sae: SAE,
    rows: np.ndarray,
    more: np.ndarray | None = None,
    *,
    rivals: Sequence[str] = tuple(RIVALS),
    truth: Truth | None = None,
    see: Callable[[str, np.ndarray, jax.Array], None] = lambda name, rows, x_hat: None,
) -> dict[str, Any]:
    """Refine the codes of rows and measure the shrinkage: one row of the report, without its name.

    Besides the numbers of `Shrinkage`, and the NMSE of each rival, such as `nmse_omp`: `change` and `latent_change`,
    histograms over `RATIO_EDGES` of refined/original, for active values and for latents' means; `firing`, how many
    latents fire on no row, on 1, on 2 or 3, on 4 to 7 …, and `dead`, the share of those on none, both over `dead_rows`
    rows, these and `more`; `worst_rows`, those with the largest KKT residuals; `milliseconds` per row, of the refit
    and of pursuits, without compilation.

    Args:
      sae: the autoencoder.
      rows: `[n d]`, finite, as `stream.chunks` takes them.
      more: other rows, such as those it was trained on: to count firing latents, and to fit factors to.
      rivals: which of `RIVALS` to compare with.
      truth: the features of `rows`; then also `mcc`, and what `metrics.Recovery` has, of several codes.
      see: called with the name of a reconstruction, the numbers of some rows, and these reconstructed.
    """
    compared = [name for name in _KNOWN if name in ("before", "after", *rivals)]
    equal = _mean_l0(sae, rows) if "omp_equal" in rivals else 1
    clock, norms = _Clock(), jnp.append(jnp.linalg.norm(sae.W_dec, axis=1), 1)
    rescaled = _rescaled(sae, rows if more is None else more) if "rescaled" in rivals else sae
    matching = None if truth is None else metrics.match(sae.W_dec, truth.dictionary)

    def measure_block(block: stream.Block) -> tuple[tuple, tuple]:
        y, _ = to_fit(sae, block.x, block.target)
        code, found = block.code, {"before": block.code, "after": block.refined}
        found |= {name: _rival(name, sae, y, code, equal, clock) for name in rivals}
        errors = []
        for name, each in found.items():
            x_hat = reconstruct(rescaled if name == "rescaled" else sae, block.x, each)
            see(name, block.rows, x_hat)
            errors.append(metrics.reconstruction(block.target, x_hat))
        known = []
        if truth is not None and matching is not None:  # whose atoms have norm 1
            z = jnp.asarray(truth.z[block.rows])
            for each in (found[name] for name in compared):
                values = each.values * norms[jnp.minimum(each.indices, sae.m)]
                known.append(metrics.recovery(matching, dataclasses.replace(each, values=values), z))
        kkt = _certified_kkt(sae.W_dec, y, block.refined, nonnegative=not sae.activation.signed)
        shrunk = shrinkage(sae, block.x, code, block.refined, target=block.target)
        sums = (shrunk, metrics.activity(code), *errors, *known)
        return sums, (block.rows, np.asarray(kkt), np.asarray(code.l0))

    sums, columns = zip(*map(measure_block, clock.timed(stream.refine_blocks(sae, rows, _solver))), strict=True)
    shrunk, active, *rest = (functools.reduce(operator.add, part) for part in zip(*sums, strict=True))
    errors, known = rest[: 2 + len(rivals)], rest[2 + len(rivals) :]
    if more is not None:
        active += calibration.activity(sae, (chunk.x for chunk in stream.chunks(sae, more[: metrics.DEAD_ROWS])))
    number, kkt, l0 = map(np.concatenate, zip(*columns, strict=True))
    worst = np.argsort(-np.nan_to_num(kkt, nan=np.inf), kind="stable")[:_WORST]
    ratio = np.asarray(shrunk.ratio)
    ratio = np.clip(ratio[np.isfinite(ratio)], RATIO_EDGES[0], RATIO_EDGES[-1])
    numbers = {**shrunk.numbers(), "worst_kkt": kkt.max(), "certified": np.mean(kkt <= CERTIFIED), "dead": active.dead}
    numbers |= {f"nmse_{name}": error.nmse for name, error in zip(rivals, errors[2:], strict=True)}
    if matching is not None:
        numbers |= {"mcc": matching.mcc, "exact": known[0].exact}
        for name, part in zip(compared, known, strict=True):
            each = {"f1": part.f1, "bias": part.bias, "value_error": part.value_error}
            numbers |= {f"{what}_{name}": value for what, value in each.items()}
    return {name: json_number(value) for name, value in numbers.items()} | {
        "change": np.asarray(shrunk.ratio_histogram).tolist(),
        "latent_change": np.histogram(ratio, RATIO_EDGES)[0].tolist(),
        "firing": active.log2_histogram,
        "dead_rows": int(active.rows),
        "worst_rows": [{"row": int(number[i]), "l0": int(l0[i]), "kkt": json_number(kkt[i])} for i in worst],
        "milliseconds": clock.milliseconds(),
    }


def _rival(name: str, sae: SAE, y, code: SparseCode, equal: int, clock: "_Clock") -> SparseCode:
    """A code of `RIVALS` for the autoencoder's dictionary, with as many atoms in each row, or `equal` ones in all."""
    k, most = code.values.shape[-1], code.l0
    if name == "rescaled":
        return code  # of an autoencoder that has the factors in its decoder
    if name == "signed":
        return refit(sae.W_dec, y, code, _solver(k, y.shape[-1]), nonnegative=False)[0]
    if name == "omp_equal":
        k, most = equal, None
    with clock.time(name, k, len(y)):
        chosen, _ = pursuit.omp(sae.W_dec, y, k=k, max_atoms=most, nonnegative=name != "omp")
        return jax.block_until_ready(chosen)


def _mean_l0(sae: SAE, rows: np.ndarray) -> int:
    mean = calibration.activity(sae, (chunk.x for chunk in stream.chunks(sae, rows))).l0
    return max(1, round(float(jnp.nan_to_num(mean))))


def _rescaled(sae: SAE, rows: np.ndarray) -> SAE:
    """The autoencoder with a factor for each latent, fitted to some rows, in its decoder."""
    some = rows[:_FITTED]
    capacity = sae.activation.slots or stream.max_l0(sae, some)
    x, target = split_rows(sae, jnp.asarray(some[: max(256, _CODES // (8 * capacity))]))
    factors = calibration.latent_factors(sae, x, encode(sae, x, capacity=capacity), target=target)
    return dataclasses.replace(sae, W_dec=factors[:, None] * sae.W_dec)


def _solver(k: int, d: int) -> Any:
    return solvers.within(solvers.default(k, d), tol=TOL)


@functools.partial(jax.jit, static_argnames="nonnegative")
def _certified_kkt(dictionary, y, code, *, nonnegative: bool = True):
    return certify(dictionary, y, code, nonnegative=nonnegative).kkt  # the gap is not used, so not computed


class _Clock:
    """Seconds by name, of calls that compile nothing: not of the first one with each number of slots."""

    def __init__(self):
        self._seen: set[tuple[str, int]] = set()
        self._total: dict[str, np.ndarray] = {}

    @contextlib.contextmanager
    def time(self, name: str, slots: int, rows: int) -> Iterator[None]:
        """Time what is done inside, for so many rows."""
        start = time.perf_counter()
        yield
        self._add(name, slots, rows, time.perf_counter() - start)

    def timed(self, blocks: Iterator[stream.Block]) -> Iterator[stream.Block]:
        """The blocks; making each is a refit."""
        start = time.perf_counter()
        for block in blocks:
            jax.block_until_ready(block.refined.values)
            self._add("refit", block.code.values.shape[-1], len(block.rows), time.perf_counter() - start)
            yield block
            start = time.perf_counter()

    def _add(self, name: str, slots: int, rows: int, seconds: float) -> None:
        if (name, slots) in self._seen:
            self._total[name] = self._total.get(name, 0.0) + np.array([seconds, rows])
        self._seen.add((name, slots))

    def milliseconds(self) -> dict[str, float]:
        """Per row, by name."""
        return {name: float(1e3 * seconds / rows) for name, (seconds, rows) in self._total.items()}
