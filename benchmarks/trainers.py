"""Autoencoders trained by our trainer, and by those of other libraries as their documentation recommends.

What it counts in steps (warm-up, decay, windows for dead latents) is scaled to the length of a run. Where a penalty
makes sparse, its weight is moved towards the L0 as it is for ours, by `tuned.Multiplier`.
"""

import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsae.app import tuned
from jaxsae.app.options import FAMILIES, Options, resolved
from jaxsae.autoencoder.sae import SAE
from jaxsae.formats import pretrained


class Job(NamedTuple):
    """A training on rows `[n d]` of unit mean square, to an L0 on the watched ones."""

    rows: np.ndarray
    watched: np.ndarray
    family: str
    l0: int
    latents: int
    steps: int
    batch: int
    rate: float
    seed: int

    @property
    def warmup(self) -> int:
        """Steps of a peer's warm-ups, a twentieth."""
        return self.steps // 20

    @property
    def widths(self) -> list[int]:
        """Widths of nested autoencoders, those of our `matryoshka`."""
        (nested,) = FAMILIES["matryoshka"].terms(Options("matryoshka", self.latents), lambda step: 1.0)
        return [*nested.prefixes, self.latents]


class Trainer(NamedTuple):
    """A library: its package, its learning rate for a family and numbers of latents and steps, and its training."""

    package: str
    rate: Callable[[str, int, int], float]
    train: Callable[[Job], SAE]


# --- Ours


def _our_rate(family: str, latents: int, steps: int) -> float:
    return resolved(Options(family, latents, steps=steps)).learning_rate or 0.0


def _ours(job: Job) -> SAE:
    options = Options(job.family, job.latents, batch=job.batch, steps=job.steps, learning_rate=job.rate)
    options = options._replace(heldout=len(job.watched), seed=job.seed)
    return tuned.train_to(job.rows, job.watched, options, job.l0, lambda text, steps: None).sae


# --- Shared by peers


class _Weight:
    """The weight of a penalty, as the multiplier that it is for ours, in other units."""

    def __init__(self, job: Job, unit: float, encode: Callable[[Any], Any], put: Callable[[float], None]):
        self._multiplier, self._job = tuned.Multiplier(job.l0, job.steps), job
        self._unit, self._encode, self._put = unit, encode, put
        put(unit * self._multiplier.weight)

    def move(self, step: int) -> None:
        """Move it after a step, if one is due, by the L0 that there is now."""
        import torch  # pyright: ignore[reportMissingImports]

        if step == 0 or step % tuned.EVERY:
            return
        with torch.no_grad():
            z = self._encode(torch.from_numpy(self._multiplier.rows(step, self._job.watched)))
        found = (z != 0).sum(dim=1).float().mean().item()
        self._put(self._unit * self._multiplier.move(step, found))


# --- SAELens: the schedules of its tutorial, and JumpReLU as its guide to training recommends it, like Anthropic's


def _saelens_config(job: Job) -> Any:
    import sae_lens  # pyright: ignore[reportMissingImports]

    size: dict[str, Any] = {"d_in": job.rows.shape[1], "d_sae": job.latents}
    size["normalize_activations"] = "expected_average_only_in"
    match job.family:
        case "relu":
            return sae_lens.StandardTrainingSAEConfig(**size, l1_warm_up_steps=job.warmup)
        case "gated":
            return sae_lens.GatedTrainingSAEConfig(**size, l1_warm_up_steps=job.warmup)
        case "jumprelu":
            return sae_lens.JumpReLUTrainingSAEConfig(
                **size,
                jumprelu_sparsity_loss_mode="tanh",
                jumprelu_bandwidth=2.0,
                jumprelu_init_threshold=0.1,
                jumprelu_ste_to_input=True,
                pre_act_loss_coefficient=3e-6,
                l0_warm_up_steps=job.warmup,
            )
        case "topk":
            return sae_lens.TopKTrainingSAEConfig(**size, k=job.l0)
        case "batchtopk":
            return sae_lens.BatchTopKTrainingSAEConfig(**size, k=job.l0)
    return sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(**size, k=job.l0, matryoshka_widths=job.widths)


def _saelens(job: Job) -> SAE:
    import torch  # pyright: ignore[reportMissingImports]
    from sae_lens import SAETrainer, TrainingSAE  # pyright: ignore[reportMissingImports]
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]

    torch.manual_seed(job.seed)
    schedule = SAETrainerConfig(
        total_training_samples=job.steps * job.batch,
        train_batch_size_samples=job.batch,
        lr=job.rate,
        lr_end=job.rate / 10,
        lr_warm_up_steps=job.warmup,
        lr_decay_steps=job.steps // 5,
        dead_feature_window=max(1, job.steps // 30),
        n_batches_for_norm_estimate=min(100, job.steps),
    )
    sae = TrainingSAE.from_dict(_saelens_config(job).to_dict())

    def batches() -> Iterator[Any]:
        for x in tuned.shuffled(job.rows, job.batch, job.seed):
            if weight is not None:
                weight.move(trainer.n_training_steps)
            yield torch.from_numpy(x)

    trainer = SAETrainer(schedule, sae, batches())
    weight = None
    if trainer.coefficient_schedulers:
        (penalty,) = trainer.coefficient_schedulers.values()
        weight = _Weight(
            job,
            job.rows.shape[1] ** 0.5,  # the norm that rows have there
            lambda x: sae.encode(trainer.activation_scaler(x)),
            lambda value: setattr(penalty, "final_value", value),
        )
    trainer.fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return pretrained.load(folder)


# --- dictionary_learning: the schedules of its demonstration, on rows scaled to unit mean square norm, as there


def _dictionary_learning(job: Job) -> SAE:
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(job.seed)  # its JumpReLU's does not
    norm = float(np.sqrt(np.mean(np.sum(job.rows[:10_000] ** 2, axis=1))))
    trainer = _dictionary_learning_trainer(job)
    weight = None
    if hasattr(trainer, "l1_penalty"):
        put = functools.partial(setattr, trainer, "l1_penalty")
        weight = _Weight(job, 1.0, lambda x: trainer.ae.encode(x / norm), put)
    batches = itertools.islice(tuned.shuffled(job.rows, job.batch, job.seed), job.steps)
    for step, x in enumerate(batches):
        if weight is not None:
            weight.move(step)
        trainer.update(step, torch.from_numpy(x / norm))
    trainer.ae.scale_biases(norm)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(trainer.ae.state_dict(), f"{folder}/ae.pt")
        Path(folder, "config.json").write_text(json.dumps({"trainer": trainer.config}))
        return pretrained.load(folder)


def _dictionary_learning_trainer(job: Job) -> Any:
    from dictionary_learning.trainers import (  # pyright: ignore[reportMissingImports]
        batch_top_k,
        gdm,
        jumprelu,
        matryoshka_batch_top_k,
        standard,
        top_k,
    )

    settings: dict[str, Any] = {"activation_dim": job.rows.shape[1], "dict_size": job.latents, "steps": job.steps}
    settings |= {"lr": job.rate, "seed": job.seed, "device": "cpu", "layer": 0, "lm_name": "none"}
    settings |= {"warmup_steps": job.warmup, "decay_start": job.steps * 4 // 5}
    penalised = settings | {"sparsity_warmup_steps": job.warmup}
    counted = settings | {"k": job.l0, "threshold_start_step": job.steps // 5}
    match job.family:
        case "relu":
            return standard.StandardTrainerAprilUpdate(**penalised)
        case "gated":
            return gdm.GatedSAETrainer(**penalised)
        case "jumprelu":
            return jumprelu.JumpReluTrainer(**penalised, target_l0=job.l0)
        case "topk":
            trainer = top_k.TopKTrainer(**counted)
        case "batchtopk":
            trainer = batch_top_k.BatchTopKTrainer(**counted)
        case _:
            fractions = (np.diff([0, *job.widths]) / job.latents).tolist()
            trainer = matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(**counted, group_fractions=fractions)
    trainer.dead_feature_threshold = job.steps * job.batch // 50  # rows; ten million in runs of 500 million
    return trainer


# --- All


COMPARED = ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")
OURS = "jaxsae"


def _dictionary_learning_rate(family: str, latents: int, steps: int) -> float:
    """Its power law for activations that count their latents, its demonstration's rate for others."""
    return 2e-4 * (2**14 / latents) ** 0.5 if family in ("topk", "batchtopk", "matryoshka") else 3e-4


TRAINERS = {
    OURS: Trainer("jaxsae", _our_rate, _ours),
    "SAELens": Trainer("sae_lens", lambda family, latents, steps: 3e-4, _saelens),
    "dictionary_learning": Trainer("dictionary_learning", _dictionary_learning_rate, _dictionary_learning),
}
