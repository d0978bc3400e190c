"""Autoencoders trained by ours and by other libraries' trainers: the same rows, batches, steps, latents and L0.

Each trainer's learning rate is its own one, and the best of several on the held-out rows. The thresholds of all are set
to the L0, and what is compared is measured here.
"""

import importlib.util
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks import trainers
from benchmarks.clock import say
from jaxsae import language_model
from jaxsae._core.files import json_number
from jaxsae.app import sources
from jaxsae.app.summary import cell, means
from jaxsae.autoencoder import calibration, metrics, stream
from jaxsae.autoencoder.activations import BatchTopK, JumpReLU
from jaxsae.autoencoder.sae import SAE, reconstruct


class Case(NamedTuple):
    """Sizes of the trainings; `model` is None for patches of photographs."""

    model: str | None
    train_rows: int
    heldout: int
    latents: int
    steps: int
    batch: int
    l0: int
    seeds: int
    rates: tuple[float, ...]  # rising


_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SIZES = {
    "tiny": Case(None, 4000, 256, 64, 20, 64, 4, 1, ()),
    "small": Case(None, 200_000, 2048, 512, 1000, 256, 16, 1, _RATES),
    "paper": Case("smollm2", 200_000, 4080, 1024, 1500, 256, 16, 3, _RATES),
}

_WARM = 20  # steps
_KEY = ("library", "family", "seed", "rate")


def run(
    size: str, *, with_peers: bool, families: Sequence[str], folder: Path, there: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A row for each training that is not among those `there`; `folder` keeps a model's activations.

    Each trainer has its own rate and, at the first seed, rising ones until the error rises; the other seeds its own one
    and the best.
    """
    case = SIZES[size]
    rows = _load(case, folder)
    ablated = _ablated(rows)
    compared = _compared(with_peers)
    found = {tuple(row[name] for name in _KEY): row for row in there}
    for seed, family, library in itertools.product(range(case.seeds), families, compared):
        trainer = compared[library]
        own = trainer.rate(family, case.latents, case.steps)
        rates = [own, *case.rates]
        if seed:
            tried = {key[-1]: _error(row) for key, row in found.items() if key[:3] == (library, family, 0)}
            rates = list(dict.fromkeys([own, min(tried, key=tried.__getitem__)]))
        least = math.inf
        for rate in rates:
            key = (library, family, seed, rate)
            if key not in found:
                say(f"{library}: {family}, seed {seed}, rate {rate:.2g}")
                sae, seconds = _train(trainer, _job(case, rows, family, rate, seed))
                row = dict(zip(_KEY, key, strict=True)) | {"own": rate == own, "seconds": seconds}
                found[key] = row | _measure(rows.units.for_data(sae), rows, ablated)
                yield found[key]
            if seed == 0 and rate != own:
                if _error(found[key]) > least:
                    break  # larger ones are worse still
                least = _error(found[key])


def _error(row: dict[str, Any]) -> float:
    """The NMSE; infinite where a training diverged."""
    return math.inf if row["nmse"] is None else row["nmse"]


def _compared(with_peers: bool) -> dict[str, trainers.Trainer]:
    """The trainers that are installed."""
    compared = {}
    for library, trainer in trainers.TRAINERS.items():
        if importlib.util.find_spec(trainer.package) is None:
            say(f"{library}: not installed")
        elif with_peers or library == trainers.OURS:
            compared[library] = trainer
    return compared


def _load(case: Case, folder: Path) -> sources.Rows:
    if case.model is None:
        return sources.photographs(case.train_rows, case.heldout, 0)
    site = sources.HookPoint(case.model)
    return sources.from_model(site, folder, case.train_rows, case.heldout, case.batch, lambda text, steps: None)


def _job(case: Case, rows: sources.Rows, family: str, rate: float, seed: int) -> trainers.Job:
    watched = rows.units.scaled(rows.heldout)
    return trainers.Job(rows.train, watched, family, case.l0, case.latents, case.steps, case.batch, rate, seed)


def _train(trainer: trainers.Trainer, job: trainers.Job) -> tuple[SAE, float]:
    """The autoencoder, its thresholds set to the L0, and the seconds of its training: with compilation, not imports."""
    trainer.train(job._replace(steps=_WARM))
    start = time.perf_counter()
    sae = trainer.train(job)
    seconds = time.perf_counter() - start
    if isinstance(sae.activation, JumpReLU | BatchTopK):
        sae = calibration.calibrate(sae, [jnp.asarray(job.watched)], float(job.l0))
    return sae, seconds


def _ablated(rows: sources.Rows) -> language_model.NextToken | None:
    """Losses of the model with the mean in place of its residual."""
    if rows.probe is None:
        return None
    mean = np.broadcast_to(rows.units.unscaled(rows.train.mean(axis=0)), rows.heldout.shape)
    return sources.losses(rows.probe, {"mean": np.ascontiguousarray(mean)})["mean"]


def _measure(sae: SAE, rows: sources.Rows, ablated: language_model.NextToken | None) -> dict[str, Any]:
    """Error, L0 and losses on the held-out rows; latents that fire on none of many training rows."""
    x_hat = np.concatenate([reconstruct(sae, chunk.x) for chunk in stream.chunks(sae, rows.heldout)])
    more = rows.units.unscaled(rows.train[: metrics.DEAD_ROWS])
    numbers = {
        "nmse": metrics.reconstruction(jnp.asarray(rows.heldout), jnp.asarray(x_hat)).nmse,
        "l0": calibration.activity(sae, (chunk.x for chunk in stream.chunks(sae, rows.heldout))).l0,
        "dead": calibration.activity(sae, (chunk.x for chunk in stream.chunks(sae, more))).dead,
    }
    if rows.probe is not None and ablated is not None:
        found = sources.losses(rows.probe, {"sae": x_hat})
        recovered = language_model.loss_recovered(found["clean"], found["sae"], ablated)
        numbers |= {"ce": found["sae"].cross_entropy, "ce_clean": found["clean"].cross_entropy, "recovered": recovered}
    return {name: json_number(value) for name, value in numbers.items()}


def markdown(report: dict[str, Any], machine: str) -> list[str]:
    """A line for each family and trainer, as means over seeds with standard errors; the least NMSE in bold."""
    head = ("family", "trainer", "seeds", "own rate", "NMSE", "best rate", "NMSE", "L0", "dead", "loss recovered", "s")
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
    for family in dict.fromkeys(row["family"] for row in report["rows"]):
        of_family = [row for row in report["rows"] if row["family"] == family]
        each = {library: _means(of_family, library) for library in dict.fromkeys(row["library"] for row in of_family)}
        least = [min(map(_error, column)) for column in zip(*each.values(), strict=True)]
        for library, (own, best) in each.items():
            numbers = []
            for mean, lowest in zip((own, best), least, strict=True):
                nmse = cell(mean, "nmse", ".4f")
                numbers += [f"{mean['rate']:.2g}", f"**{nmse}**" if _error(mean) == lowest else nmse]
            numbers += [cell(best, "l0", ".1f"), cell(best, "dead", ".1%"), cell(best, "recovered", ".1%")]
            lines.append(f"| {family} | {library} | {best['seeds']} | {' | '.join(numbers)} | {best['seconds']:.0f} |")
    case = SIZES[report["size"]]
    data = f"residual of {case.model}" if case.model else "patches of photographs"
    sizes = f"{case.latents:,} latents, L0 {case.l0}, {case.steps:,} steps of {case.batch} rows"
    return [f"{machine}; {data}; {sizes}.", "\n".join(lines)]


def _means(rows: list[dict[str, Any]], library: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Means over seeds of a library's rows of a family, at its own learning rate, and at the best of the first seed."""
    mine = [row for row in rows if row["library"] == library]
    own = next(row["rate"] for row in mine if row["own"])
    best = min((row for row in mine if row["seed"] == 0), key=_error)["rate"]
    found = (means([row | {"l0_target": None} for row in mine if row["rate"] == rate]) for rate in (own, best))
    return tuple(mean for (mean,) in found)  # pyright: ignore[reportReturnType]
