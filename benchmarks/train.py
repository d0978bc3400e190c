"""Time training steps of a TopK autoencoder, ours and others', from the same weights on the same batches.

A step is forward, backward, Adam and the normalisation of the decoder, as each library does them.
"""

import itertools
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxsae
from benchmarks.clock import clock, name_missing, say, timings
from jaxsae import train
from jaxsae.train import objectives


class Case(NamedTuple):
    """Shapes of a step."""

    d: int
    m: int
    k: int
    B: int


SIZES = {"tiny": Case(32, 256, 4, 64), "small": Case(256, 4096, 32, 512), "paper": Case(768, 16384, 32, 1024)}
SWEEPS = {
    "tiny": {"d": 32, "m": 256, "B": 64},
    "small": {"d": 128, "m": 1024, "B": 256},
    "paper": {"d": 256, "m": 2048, "B": 512},
}
MEMBERS, SWEPT = 8, 20  # members, and steps of each
RATE = 2e-4
STEPS = 5  # after which the losses are compared

Step = Callable[[], Any]  # takes one step and waits for it; returns NMSE


class Contestant(NamedTuple):
    """A library's training step, and its memory where known."""

    step: Step
    bytes: int | None = None


def _ours(loss, case: Case, weights: dict[str, np.ndarray], x: np.ndarray) -> Contestant:
    tx = train.default_optimizer(RATE)
    arrays: dict[str, Any] = {name: jnp.asarray(array) for name, array in weights.items()}
    sae = jaxsae.SAE(**arrays, activation=jaxsae.TopK(case.k))
    state, batch = train.init_state(sae, tx), jnp.asarray(x)
    step = train.make_step(loss, tx)
    memory = step.func.lower(*step.args, state, batch).compile().memory_analysis()  # pyright: ignore[reportFunctionMemberAccess]

    def once():
        nonlocal state
        state, shown = jax.block_until_ready(step(state, batch))
        return float(shown["nmse"])

    return Contestant(once, memory.argument_size_in_bytes + memory.temp_size_in_bytes)


def dense(sae: jaxsae.SAE, x, state):
    """The same objective by autodiff of the dense code."""
    z = jaxsae.encode_dense(sae, x)
    x_hat = jaxsae.decode(sae, z)
    return jaxsae.train.losses.mse(x, x_hat), ((z != 0).any(0), {"nmse": jaxsae.train.losses.nmse(x, x_hat)})


def _sparsify(case: Case, weights: dict[str, np.ndarray], x: np.ndarray) -> Contestant:
    import torch  # pyright: ignore[reportMissingImports]

    if not torch.cuda.is_available():
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    model = SparseCoder(case.d, SparseCoderConfig(num_latents=case.m, k=case.k))
    with torch.no_grad():
        model.encoder.weight.copy_(torch.tensor(weights["W_enc"].T.copy()))
        model.W_dec.copy_(torch.tensor(weights["W_dec"]))
        model.b_dec.copy_(torch.tensor(weights["b_dec"]))
    adam = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=6.25e-10, fused=True)
    batch = torch.tensor(x)

    def once():
        adam.zero_grad()
        out = model(batch)
        out.fvu.backward()
        model.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        model.set_decoder_norm_to_unit_norm()
        return float(out.fvu.detach())

    return Contestant(once)


def _saelens(case: Case, weights: dict[str, np.ndarray], x: np.ndarray) -> Contestant:
    import torch  # pyright: ignore[reportMissingImports]
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]

    model = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=case.d, d_sae=case.m, k=case.k, apply_b_dec_to_input=True))
    with torch.no_grad():
        for name, array in weights.items():
            getattr(model, name).copy_(torch.tensor(array))
    adam = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=6.25e-10, fused=True)
    batch = torch.tensor(x)
    spread = ((batch - batch.mean(0)) ** 2).sum()

    def once():
        adam.zero_grad()
        given = TrainStepInput(
            sae_in=batch, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
        out = model.training_forward_pass(given)
        out.loss.backward()
        adam.step()
        return float(((out.sae_out - batch) ** 2).sum().detach() / spread)

    return Contestant(once)


PEERS = {"eai-sparsify": _sparsify, "SAELens": _saelens}


def run(size: str, *, with_peers: bool) -> Iterator[dict[str, Any]]:
    """Measure every contestant: seconds a step (median, quartiles), NMSE after some steps, memory; a row each."""
    case, rng = SIZES[size], np.random.default_rng(0)
    atoms = rng.normal(size=(case.m, case.d)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    weights = {
        "W_enc": atoms.T.copy(),
        "b_enc": np.zeros(case.m, np.float32),
        "W_dec": atoms,
        "b_dec": np.zeros(case.d, np.float32),
    }
    x = rng.normal(size=(case.B, case.d)).astype(np.float32)
    makers: dict[str, Callable[[], Contestant]] = {
        "jaxsae": lambda: _ours(objectives.Objective(), case, weights, x),
        "jaxsae, dense autodiff": lambda: _ours(dense, case, weights, x),
    }
    if with_peers:
        makers |= {name: lambda make=make: make(case, weights, x) for name, make in PEERS.items()}
    ready, rows = {}, {}
    for name, make in makers.items():
        say(f"{name}: {STEPS} steps")
        try:
            contestant = make()
            nmse = [contestant.step() for _ in range(STEPS)][-1]
        except ImportError as error:
            rows[name] = {"nmse": None, "bytes": None, "note": name_missing(error)}
            continue
        ready[name] = contestant
        rows[name] = {"nmse": nmse, "bytes": contestant.bytes, "note": None}
    say("timing")
    times = dict(zip(ready, timings([each.step for each in ready.values()]), strict=True))
    for name, row in rows.items():
        quartiles = statistics.quantiles(times[name], n=4) if name in times else [None] * 3
        yield {"step": name, "case": case._asdict(), "seconds": quartiles[1], "quartiles": quartiles[::2], **row}


def sweep(size: str) -> dict[str, Any]:
    """Compare a sweep over L1 weights with as many separate trainings: seconds a step of all, and agreement."""
    case, rng = SWEEPS[size], np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(case["B"], case["d"])), jnp.float32)
    weights, rates = np.geomspace(0.001, 0.1, MEMBERS), np.geomspace(1e-4, 1e-3, MEMBERS)
    members = [
        jaxsae.init(jax.random.key(seed), d=case["d"], m=case["m"], activation=jaxsae.ReLU()) for seed in range(MEMBERS)
    ]
    stacked, recipes = train.stack(members), [train.default_optimizer(rate) for rate in rates]
    loss = objectives.Objective((objectives.L1(jnp.asarray(weights)),))

    def together():
        history = []
        train.sweep(
            stacked,
            itertools.repeat(x),
            loss=loss,
            tx=train.default_optimizer,
            rates=rates,
            steps=SWEPT,
            callback=lambda step, shown: history.append(shown["loss"]),
        )
        return history

    def in_turn():
        histories = []
        for member, weight, tx in zip(members, weights, recipes, strict=True):
            history, alone = [], objectives.Objective((objectives.L1(weight),))
            train.fit(
                member,
                itertools.repeat(x),
                loss=alone,
                tx=tx,
                steps=SWEPT,
                callback=lambda step, shown, history=history: history.append(shown["loss"]),
            )
            histories.append(history)
        return histories

    say(f"a sweep of {MEMBERS}")
    first, answers = clock(together), np.asarray(together())
    apart = np.asarray(in_turn()).T
    seconds = [statistics.median(times) / SWEPT for times in timings([together, in_turn])]
    return {
        "case": case,
        "members": MEMBERS,
        "steps": SWEPT,
        "seconds": seconds[0],
        "seconds_in_turn": seconds[1],
        "compile_s": first - SWEPT * seconds[0],
        "difference": float(np.max(np.abs(answers / apart - 1))),
    }
