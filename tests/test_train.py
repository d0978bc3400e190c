import contextlib
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
import scipy.optimize
from flax import struct
from problems import activations, assert_same_bits, compilations, f64, sae, sparse_rows

import jaxsae
from jaxsae import train
from jaxsae._core import pytrees
from jaxsae.autoencoder.activations import Activation
from jaxsae.train import losses, startup, steps
from jaxsae.train.objectives import L0, L1, AuxK, Objective

B, D, M, K = 8, 16, 32, 4
RELU = jaxsae.ReLU()


RECIPES = {
    "TopK and AuxK": (jaxsae.TopK(3), Objective((AuxK(k_aux=8),), idle_after=2560)),
    "ReLU and L1": (jaxsae.ReLU(), Objective((L1(0.1, optax.linear_schedule(0.0, 1.0, 50)),))),
}
TX = train.unit_norm_decoder(optax.adam(1e-2))  # one object, one compilation


def learn(default_optimizer, *, steps=300, seed=0):
    """Train on `sparse_rows`; the final state, and the metrics of every step."""
    activation, loss = RECIPES[default_optimizer]
    start = jaxsae.init(jax.random.key(seed), d=32, m=64, activation=activation)
    stream = jaxsae.data.batches(sparse_rows()[0], 256, seed=seed)
    history = []
    state = train.fit(
        start, stream, loss=loss, tx=TX, steps=steps, callback=lambda step, shown: history.append((step, shown))
    )
    return state, history


@pytest.fixture(scope="module", params=list(RECIPES))
def trained(request):
    return request.param, *learn(request.param)


def test_training_lowers_the_loss(trained):
    _, _, history = trained
    assert [step for step, _ in history] == list(range(1, 301))
    first, last = history[0][1], history[-1][1]
    assert last["loss"] < 0.2 * first["loss"]
    assert last["nmse"] < 0.15


def test_training_recovers_the_atoms(trained):
    default_optimizer, state, _ = trained
    cosine = (sparse_rows()[1] @ f64(state.sae.W_dec).T).max(axis=1)
    assert cosine.mean() > 0.9, default_optimizer


def test_atoms_stay_on_the_unit_sphere(trained):
    np.testing.assert_allclose(np.linalg.norm(f64(trained[1].sae.W_dec), axis=1), 1, atol=1e-6)


def test_training_moves_every_parameter(trained):
    default_optimizer, state, _ = trained
    start = jaxsae.init(jax.random.key(0), d=32, m=64, activation=RECIPES[default_optimizer][0])
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert np.any(getattr(state.sae, name) != getattr(start, name)), name


def test_the_same_seed_gives_the_same_bits(trained):
    default_optimizer, state, history = trained
    again, repeated = learn(default_optimizer)
    assert_same_bits(again, state)
    assert_same_bits(repeated, history)


def test_another_seed_gives_others(trained):
    default_optimizer, _, history = trained
    assert learn(default_optimizer, seed=1, steps=2)[1][1][1]["loss"] != history[1][1]["loss"]


# --- unit_norm_decoder


def test_the_gradient_that_the_optimiser_sees_is_tangent_and_its_update_ends_on_the_sphere():
    seen = []

    def spy(updates, state, params=None):
        seen.append(updates)
        return updates, state

    model = sae(m=M)  # its atoms are not of unit norm
    grads = jax.tree.map(lambda p: jnp.sin(7 * p), model)
    updates, _ = train.unit_norm_decoder(optax.GradientTransformation(lambda _: (), spy)).update(grads, (), model)
    assert np.abs(np.sum(f64(grads.W_dec) * f64(model.W_dec), axis=1)).min() > 1e-2
    np.testing.assert_allclose(np.sum(f64(seen[0].W_dec) * f64(model.W_dec), axis=1), 0, atol=1e-5)
    # What is taken out is the radial part and nothing else; other parameters pass as they are.
    removed = f64(grads.W_dec) - f64(seen[0].W_dec)
    cosine = np.sum(removed * f64(model.W_dec), axis=1) / np.linalg.norm(f64(model.W_dec), axis=1)
    np.testing.assert_allclose(np.abs(cosine), np.linalg.norm(removed, axis=1), rtol=1e-4, atol=1e-6)
    assert_same_bits(seen[0].replace(W_dec=0), grads.replace(W_dec=0))
    moved = optax.apply_updates(model, updates).W_dec
    np.testing.assert_allclose(np.linalg.norm(f64(moved), axis=1), 1, atol=1e-6)


def test_unit_norm_decoder_needs_the_parameters():
    tx = train.unit_norm_decoder(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"`unit_norm_decoder` got no params"):
        tx.update(sae(), tx.init(sae()))


# --- aligned_encoder


def aligned(model):
    """The definition, one latent after another."""
    W_enc, W_dec = model.W_enc.T, model.W_dec
    moved = [w + (1 - w @ a) / (a @ a) * a for w, a in zip(W_enc, W_dec, strict=True)]
    return model.replace(W_enc=jnp.stack(moved).T)


def test_the_optimiser_sees_the_gradient_of_the_aligned_loss_and_its_update_is_aligned():
    seen = []

    def spy(updates, state, params=None):
        seen.append(updates)
        return updates, state

    def loss(model):
        return jnp.sum(jnp.sin(3 * model.W_enc)) + jnp.sum(model.W_dec**3) + jnp.sum(model.b_enc**2)

    model = aligned(sae(m=M))
    tx = train.aligned_encoder(optax.GradientTransformation(lambda _: (), spy))
    updates, _ = tx.update(jax.grad(loss)(model), (), model)
    expected = jax.grad(lambda model: loss(aligned(model)))(model)
    for found, wanted in zip(*map(jax.tree.leaves, (seen[0], expected)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    moved = optax.apply_updates(model, updates)
    np.testing.assert_allclose(np.sum(f64(moved.W_enc).T * f64(moved.W_dec), axis=1), 1, atol=1e-4)
    # Only along its atom is a direction moved; other parameters pass as they are.
    off = f64(moved.W_enc).T - f64(model.W_enc + seen[0].W_enc).T
    np.testing.assert_allclose(off, np.sum(off * f64(moved.W_dec), 1)[:, None] * _unit(moved.W_dec), atol=1e-4)
    assert_same_bits(updates.replace(W_enc=0), seen[0].replace(W_enc=0))


def _unit(atoms):
    return f64(atoms) / np.sum(f64(atoms) ** 2, axis=1, keepdims=True)


def test_a_latent_without_an_atom_keeps_its_direction():
    model = sae(m=M)
    model = model.replace(W_dec=model.W_dec.at[3].set(0))
    tx = train.aligned_encoder(optax.sgd(0.1))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, model), tx.init(model), model)
    moved = optax.apply_updates(model, updates)
    assert_same_bits(moved.W_enc[:, 3], model.W_enc[:, 3])
    assert jnp.isfinite(moved.W_enc).all()


def test_aligned_encoder_needs_the_parameters():
    tx = train.aligned_encoder(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"`aligned_encoder` got no params"):
        tx.update(sae(), tx.init(sae()))


# --- The losses


def test_the_l1_weight_warms_up():
    model, x = sae(m=M, activation=jaxsae.ReLU()), activations(batch=(B,))
    z = jaxsae.encode_dense(model, x)
    mse, penalty = losses.mse(x, jaxsae.decode(model, z)), losses.l1(z, model.W_dec)
    state = train.init_state(model, TX)

    def weight_at(step, warmup):
        objective = Objective((L1(0.5, warmup),))
        value, _ = objective(model, x, state.replace(step=jnp.asarray(step)))
        return float((value - mse) / penalty)

    weights = [weight_at(step, optax.linear_schedule(0.0, 1.0, 4)) for step in (0, 1, 3, 4, 100)]
    np.testing.assert_allclose(weights, [0.0, 0.125, 0.375, 0.5, 0.5], atol=1e-4)
    np.testing.assert_allclose(weight_at(0, None), 0.5, rtol=1e-4)  # no schedule


def test_auxk_loss_is_the_error_and_a_share_of_auxk():
    model, x = sae(m=M), activations(batch=(B,))
    state = train.init_state(model, TX).replace(rows_since_fired=jnp.arange(M))
    value, (active, shown, _) = Objective((AuxK(3, weight=0.25),), idle_after=20)(model, x, state)
    z = jaxsae.encode_dense(model, x)
    residual = x - jaxsae.decode(model, z)
    auxiliary = losses.auxk(model, x, residual, jnp.arange(M) >= 20, k_aux=3)
    np.testing.assert_allclose(value, jnp.mean(jnp.sum(residual**2, axis=1)) + 0.25 * auxiliary, rtol=1e-5)
    np.testing.assert_array_equal(active, np.any(z != 0, axis=0))
    np.testing.assert_allclose(shown["l0"], np.mean(np.sum(z != 0, axis=1)), rtol=1e-6)
    np.testing.assert_allclose(shown["nmse"], losses.nmse(x, x - residual), rtol=1e-5)


# --- The step


def fires(*latents):
    """A plain function as a loss, under which just these latents fire."""

    def loss(model, x, state):
        return jnp.sum(model.b_dec**2), (jnp.isin(jnp.arange(M), jnp.array(latents)), {"seen": jnp.mean(x)})

    return loss


def test_idle_counts_rows_and_starts_again_when_a_latent_fires():
    tx, x = optax.sgd(0.1), activations(batch=(B,))
    state = train.init_state(sae(m=M), tx)
    for latents in ((0, 1), (1,), (1, 2)):
        state, shown = train.make_step(fires(*latents), tx)(state, x)
    np.testing.assert_array_equal(state.rows_since_fired, [2 * B, 0, 0] + [3 * B] * (M - 3))
    assert state.step == 3
    assert sorted(shown) == ["dead", "dead_rows", "gradient_norm", "loss", "seen", "skipped"]


def test_dead_is_the_share_of_latents_that_never_fired_on_the_last_100_000_rows_or_on_all(monkeypatch):
    tx, x = optax.sgd(0.0), activations(batch=(B,))
    monkeypatch.setattr(steps, "DEAD_ROWS", 3 * B - 1)  # whole batches: three
    state = train.init_state(sae(m=M), tx)
    dead, rows = [], []
    for latents in ((0, 1), (1,), (2,), (3,), (3,)):
        state, shown = train.make_step(fires(*latents), tx)(state, x)  # no idle_after: AuxK's is another number
        dead.append(round(M * float(shown["dead"])))
        rows.append(int(shown["dead_rows"]))
    assert dead == [M - 2, M - 2, M - 3, M - 3, M - 2]  # of the last three: 1, 2, 3, and then 2, 3
    assert rows == [B, 2 * B, 3 * B, 3 * B, 3 * B]


def test_the_learning_rate_of_short_trainings_is_larger_and_tends_to_the_papers():
    theirs = [2e-4 / (m / 2**14) ** 0.5 for m in (4, 1024, 2**20)]
    assert [train.learning_rate(m) for m in (4, 1024, 2**20)] == theirs
    for m, paper in zip((4, 1024, 2**20), theirs, strict=True):
        rates = [train.learning_rate(m, steps) for steps in (10, 250, 1000, 20_000, 100_000, 10**7)]
        assert rates == sorted(rates, reverse=True) and rates[-2:] == [paper, paper]
        assert rates[0] <= max(paper, 4e-3)
    assert 1e-3 < train.learning_rate(1024, 1000) < train.learning_rate(1024, 250) < 4e-3


def test_nothing_is_dead_before_the_first_row():
    tx, x = optax.sgd(0.1), activations(batch=(B,)).at[0, 0].set(jnp.nan)
    _, shown = train.make_step(Objective(), tx)(train.init_state(sae(m=M), tx), x)
    assert (shown["skipped"], shown["dead"], shown["dead_rows"]) == (1, 0, 0)


def test_changing_a_weight_does_not_retrace():
    traces = []

    @struct.dataclass
    class Weighted:
        weight: float
        power: int = struct.field(pytree_node=False, default=2)

        def __call__(self, model, x, state):
            traces.append(self.power)
            return self.weight * jnp.sum(model.b_dec**self.power), (state.rows_since_fired < 0, {})

    tx, x = optax.sgd(0.1), activations(batch=(B,))

    def first_loss(loss):
        return train.make_step(loss, tx)(train.init_state(sae(m=M), tx), x)[1]["loss"]

    np.testing.assert_allclose(first_loss(Weighted(2.0)), 2 * first_loss(Weighted(1.0)), rtol=1e-6)
    assert traces == [2]
    first_loss(Weighted(1.0, power=4))  # what is static does retrace: the count above counts
    assert traces == [2, 4]


def test_the_l1_weight_does_not_retrace(monkeypatch):
    traces, l1 = [], losses.l1
    monkeypatch.setattr(losses, "l1", lambda *args: traces.append(1) or l1(*args))
    model, tx, x = sae(m=M, activation=jaxsae.ReLU()), optax.sgd(0.1), activations(batch=(B,))
    for weight in (0.1, 0.2):
        train.make_step(Objective((L1(weight),)), tx)(train.init_state(model, tx), x)
    assert len(traces) == 1


def test_a_loss_whose_only_leaf_is_an_array():
    @struct.dataclass
    class PerLatent:
        weights: np.ndarray

        def __call__(self, model, x, state):
            return jnp.sum(self.weights * model.b_enc**2), (state.rows_since_fired < 0, {})

    tx = optax.sgd(0.1)
    step = train.make_step(PerLatent(np.ones(M, np.float32)), tx)
    state, _ = step(train.init_state(sae(m=M), tx), activations(batch=(B,)))
    np.testing.assert_allclose(state.sae.b_enc, 0.8 * sae(m=M).b_enc, rtol=1e-5)


# --- fit


def test_fit_leaves_the_given_sae_as_it_is():
    model = sae(m=M)
    before = jax.tree.map(np.array, model)
    tx = optax.sgd(0.1)
    state = train.fit(model, itertools.repeat(activations(batch=(B,))), loss=fires(0), tx=tx, steps=2)
    assert_same_bits(model, before)
    assert np.any(state.sae.b_dec != model.b_dec)


def test_fit_of_no_steps_returns_the_given_sae():
    state = train.fit(sae(), [], loss=fires(0), tx=optax.sgd(0.1), steps=0)
    assert state.step == 0
    assert_same_bits(state.sae, sae())


def test_fit_says_that_the_batches_ran_out():
    with pytest.raises(ValueError, match=r"`fit` got 2 batches for 3 steps; pass more batches"):
        train.fit(sae(m=M), [activations(batch=(B,))] * 2, loss=fires(0), tx=optax.sgd(0.1), steps=3)


# --- batches whose loss is not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_batch_whose_loss_is_not_finite_changes_nothing_and_is_counted(bad):
    tx, x = train.default_optimizer(1e-2), activations(batch=(B,))
    step = train.make_step(Objective((AuxK(3),), idle_after=2 * B), tx)
    state, _ = step(train.init_state(sae(m=M), tx), x)
    before = jax.tree.map(np.array, state)
    state, shown = step(state, x.at[1, 2].set(bad))
    assert_same_bits(state.replace(skipped=0, skipped_last=0), before.replace(skipped=0, skipped_last=0))
    assert (int(state.skipped), int(state.skipped_last), int(shown["skipped"])) == (1, 1, 1)
    state, _ = step(state, x)
    assert (int(state.skipped), int(state.skipped_last), int(state.step)) == (1, 0, 2)


def test_fit_stops_after_ten_such_batches_in_a_row_and_keeps_the_last_good_state():
    x, tx = activations(batch=(B,)), train.default_optimizer(1e-2)
    stream = itertools.chain([x, x * jnp.nan, x], itertools.repeat(x * jnp.nan))
    with pytest.raises(
        train.Diverged, match=r"in a row was not finite.* after 2 steps; lower the learning rate"
    ) as raised:
        train.fit(sae(m=M), stream, loss=Objective(), tx=tx, steps=1000)
    expected = train.fit(sae(m=M), [x, x], loss=Objective(), tx=tx, steps=2)
    assert_same_bits(raised.value.state.sae, expected.sae)
    assert raised.value.state.skipped_last == 10


@pytest.mark.parametrize("good", [0, 1, 7, 10, 13])
def test_fit_raises_at_the_tenth_and_waits_for_none_of_the_others(good):
    seen, early = [], []

    class Counted:
        """A count of skipped batches, on the device; to read it is to wait for its batch."""

        def __init__(self, value):
            self.value, self.number = value, len(seen) + 1

        def __array__(self, dtype=None, copy=None):
            if len(seen) - self.number < steps.PATIENCE - 1:
                early.append(len(seen))
            return np.asarray(self.value)

    def step(state, bad):  # as a step does, without the rest of it
        state = state.replace(skipped=int(state.skipped) + bad)
        return state, {"skipped": Counted(state.skipped)}

    state = train.init_state(sae(m=M), optax.sgd(0.1))
    stream = itertools.chain([False] * good, itertools.repeat(True))
    with pytest.raises(train.Diverged):
        steps._run(step, state, stream, 100, lambda number, metrics: seen.append(number))
    assert seen[-1] == good + 10
    assert set(early) <= {good + 10}
    seen.clear(), early.clear()
    steps._run(step, state, itertools.repeat(False), 100, lambda number, metrics: seen.append(number))
    assert set(early) == {100}


def test_fit_raises_if_there_was_nothing_but_bad_batches():
    x, tx = activations(batch=(B,)), train.default_optimizer(1e-2)
    bad = x * jnp.nan
    with pytest.raises(train.Diverged, match="of 3 batches in a row was not finite, 3 in all, after 0 steps"):
        train.fit(sae(m=M), [bad] * 3, loss=Objective(), tx=tx, steps=3)
    assert train.fit(sae(m=M), [x, bad, bad], loss=Objective(), tx=tx, steps=3).skipped == 2


# --- what may get past a loss that is finite


def zero_atom(activation):
    model = sae(m=M, activation=activation)
    return model.replace(W_dec=model.W_dec.at[0].set(0), W_enc=model.W_enc.at[:, 0].set(0))


@pytest.mark.parametrize("tx", [optax.adam(1e-2), train.default_optimizer(1e-2)], ids=["adam", "recipe"])
def test_an_atom_of_zero_is_an_ordinary_one(tx):
    x = activations(batch=(B,))
    state = train.fit(zero_atom(jaxsae.ReLU()), [x] * 2, loss=Objective((L1(0.1),)), tx=tx, steps=2)
    assert (int(state.step), int(state.skipped)) == (2, 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def poison(where):
    """A transformation that adds what is not finite to the update of an array, or to the state, and nothing else."""

    def update(updates, state, params=None):
        bad = getattr(updates, where, updates.b_enc).at[0].set(jnp.inf)
        return (updates, bad) if where == "state" else (updates.replace(**{where: bad}), state)

    return optax.GradientTransformation(lambda params: jnp.zeros(M), update)


def only(where):
    """A loss that is finite, and its gradient too but in one array."""

    def loss(model, x, state):
        zero = 0 * jnp.sum(getattr(model, where)[0])
        return jnp.sum(model.b_dec**2) + jnp.sqrt(zero), (state.rows_since_fired < 0, {})

    return loss


GAPS = {
    **{f"update of {name}": (poison(name), fires(0)) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "state")},
    **{f"gradient of {name}": (train.default_optimizer(1e-2), only(name)) for name in ("W_enc", "W_dec", "b_dec")},
    "average": (train.ema(poison("W_dec"), 0.9), fires(0)),
    "rate": (train.default_optimizer(jnp.nan), fires(0)),
    "schedule": (train.default_optimizer(lambda count: jnp.where(count < 0, 1.0, jnp.inf)), fires(0)),
    "second moment": (train.default_optimizer(1e-2), lambda *given: (1e25 * fires(0)(*given)[0], fires(0)(*given)[1])),
}


@pytest.mark.parametrize("gap", GAPS)
def test_what_is_not_finite_gets_in_nowhere(gap):
    tx, loss = GAPS[gap]
    state = train.init_state(sae(m=M), tx)
    before = jax.tree.map(np.array, state)
    state, shown = train.make_step(loss, tx)(state, activations(batch=(B,)))
    assert np.isfinite(shown["loss"])
    assert_same_bits(state, before.replace(skipped=1, skipped_last=1))


def test_a_latent_that_is_shut_off_by_a_threshold_of_infinity_does_not_stop_the_others():
    model = sae(m=M, activation=jaxsae.JumpReLU(jnp.full(M, 0.1).at[0].set(jnp.inf)))
    tx = train.ema(optax.sgd(0.1), 0.9)

    def loss(model, x, state):
        return jnp.sum(model.b_dec**2), (state.rows_since_fired < 0, {})

    state, _ = train.make_step(loss, tx)(train.init_state(model, tx), activations(batch=(B,)))
    assert (int(state.step), int(state.skipped)) == (1, 0)
    assert train.ema_params(state).activation.threshold[0] == jnp.inf


@pytest.mark.parametrize("tx", [optax.adamw(1e-2), train.ema(optax.adamw(1e-2), 0.9)], ids=["adamw", "its average"])
def test_weight_decay_leaves_what_is_infinite_as_it_is(tx):
    model = sae(m=M, activation=jaxsae.JumpReLU(jnp.full(M, 0.1).at[0].set(jnp.inf)))
    model = model.replace(b_enc=model.b_enc.at[1].set(-jnp.inf))
    state, step = train.init_state(model, tx), train.make_step(Objective((L0(1.0, 4.0),)), tx)
    for _ in range(2):
        state, _ = step(state, activations(batch=(B,)))
    assert (int(state.step), int(state.skipped)) == (2, 0)
    assert (state.sae.activation.threshold[0], state.sae.b_enc[1]) == (jnp.inf, -jnp.inf)
    assert np.all(state.sae.activation.threshold[1:] < 0.1)  # decayed


# --- what is trained


@pytrees.dataclass
class Bent(Activation):
    """With numbers of each kind: some learn, some are fixed, one is no number of floating point."""

    slope: jax.Array
    at_most: float | jax.Array = pytrees.fixed(default=3.0)
    shifts: Any = pytrees.fixed(default=None)
    power: int | jax.Array = 1

    def __call__(self, pre):
        return jnp.minimum(self.slope * jax.nn.relu(pre) ** jnp.float32(self.power), self.at_most)


FIXED = {
    "TopK": (jaxsae.TopK(K, keep=3.0), {"keep"}),
    "BatchTopK": (jaxsae.BatchTopK(K), {"threshold"}),
    "MatchingPursuit": (jaxsae.autoencoder.activations.MatchingPursuit(max_steps=2), {"residual_threshold"}),
    "custom": (Bent(jnp.ones(M), shifts={"a": [jnp.ones(2)]}), {"at_most", "shifts", "power"}),
    "JumpReLU": (jaxsae.JumpReLU(jnp.full(M, 0.1)), set()),
    "Gated": (jaxsae.Gated(*jnp.full((3, M), 0.1)), set()),
}


def named(tree):
    """The last names on the way to each leaf."""
    return [
        [str(getattr(key, "name", "")) for key in path if getattr(key, "name", "")]
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


@pytest.mark.parametrize("name", FIXED)
def test_what_is_no_parameter_is_not_trained(name):
    activation, fixed = FIXED[name]
    model, x = sae(m=M, activation=activation), activations(batch=(B,))
    trained, rest = pytrees.partition(model)
    assert {path[1] for path in named(rest)} == fixed
    assert not fixed & {part for path in named(trained) for part in path}
    assert_same_bits(pytrees.merge(trained, rest), model)
    seen = []

    def spy(updates, state, params=None):
        seen.append((updates, params))
        return updates, state

    decay = optax.chain(optax.GradientTransformation(lambda _: (), spy), optax.adamw(1e-2, weight_decay=1.0))
    tx = train.ema(decay, 0.9)
    state = train.fit(model, [x] * 3, loss=Objective(), tx=tx, steps=3)
    assert (int(state.step), int(state.skipped)) == (3, 0)
    for tree in (*seen[0], state.opt_state.inner):
        assert not fixed & {part for path in named(tree) for part in path}
    if name != "BatchTopK":  # which estimates its threshold
        assert_same_bits(pytrees.partition(state.sae)[1], jax.tree.map(jnp.asarray, rest))
    assert_same_bits(pytrees.partition(train.ema_params(state))[1], pytrees.partition(state.sae)[1])
    assert jax.tree.structure(train.ema_params(state)) == jax.tree.structure(state.sae)
    learns = [path[-1] for path in named(trained) if path[0] == "activation"]
    for each in learns:
        assert np.any(getattr(state.sae.activation, each) != getattr(activation, each)), each


# --- sums, whatever the type of the weights


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_long_sums_are_those_of_float32(dtype):
    length, x = 2000, activations(batch=(B,))
    with_threshold = sae(m=M, activation=jaxsae.BatchTopK(K)).replace(b_enc=jnp.full(M, 1.0))

    def run(model):
        tx = train.ema(optax.adam(0.0, b1=0.9, b2=0.999), 0.999)

        def loss(model, x, state):
            slopes = jax.tree.map(lambda p: jnp.sum(p * jnp.asarray(0.01, p.dtype), dtype=jnp.float32), model)
            estimate = model.activation.train(model.b_enc + jnp.ones((B, M), model.b_enc.dtype))[1]
            slopes = sum(jax.tree.leaves(pytrees.partition(slopes)[0]))
            return slopes, (state.rows_since_fired < 0, {}, estimate)

        step = jax.jit(lambda state, _: (steps._update(tx, jax.tree_util.Partial(loss), state, x)[0], None))
        return jax.lax.scan(step, train.init_state(model, tx), length=length)[0]

    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), with_threshold)
    found, expected = run(narrow), run(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow))
    assert found.skipped == 0
    tolerance = {"rtol": float(jnp.finfo(dtype).eps)}
    adam, expected_adam = found.opt_state.inner[0], expected.opt_state.inner[0]
    pairs = {
        "mean": (train.ema_params(found), train.ema_params(expected)),
        "mu": (adam.mu, expected_adam.mu),
        "nu": (adam.nu, expected_adam.nu),
        "threshold": (found.sae.activation, expected.sae.activation),
    }
    for name, pair in pairs.items():
        jax.tree.map(lambda a, b, name=name: np.testing.assert_allclose(f64(a), b, err_msg=name, **tolerance), *pair)
    assert found.sae.W_dec.dtype == dtype
    np.testing.assert_allclose(f64(train.ema_params(found).W_dec), f64(narrow.W_dec), **tolerance)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_atoms_of_a_narrow_type_stay_as_near_to_the_sphere_as_it_allows(dtype):
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), jaxsae.init(jax.random.key(0), d=D, m=M, activation=RELU))
    x = activations(batch=(B,), dtype=dtype)
    state = train.fit(model, [x] * 50, loss=Objective(), tx=train.default_optimizer(1e-2), steps=50)
    assert np.any(state.sae.W_dec != model.W_dec)
    assert state.sae.W_dec.dtype == dtype
    norms = np.linalg.norm(f64(state.sae.W_dec), axis=1)
    np.testing.assert_allclose(norms, 1, atol=float(jnp.finfo(dtype).eps) / 2)


def test_the_average_before_the_first_step_is_the_parameters():
    tx = optax.chain(train.ema(optax.sgd(0.1), 0.9))
    assert_same_bits(train.ema_params(tx.init(sae(m=M))), sae(m=M))
    assert_same_bits(train.ema_params(train.init_state(sae(m=M), tx)), sae(m=M))
    with pytest.raises(ValueError, match="`ema_params` got a state without an `EmaState`"):
        train.ema_params(optax.sgd(0.1).init(sae(m=M)))


# --- what is no loss


NO_LOSS = {
    "a scalar alone": (
        lambda *_: jnp.ones(()),
        r"returns an array float32\[\], expected \(value, \(active, metrics\)\)",
    ),
    "no auxiliary": (lambda *_: (jnp.ones(()), {}), r"returns \(an array float32\[\], a dict\), expected"),
    "None": (lambda *_: None, "returns a NoneType, expected"),
    "a loss for each row": (lambda *_: (jnp.ones(B), (jnp.ones(M, bool), {})), r"value is an array float32\[8\], exp"),
    "an integer": (lambda *_: (jnp.int32(1), (jnp.ones(M, bool), {})), r"value is an array int32\[\], expected"),
    "active of another size": (
        lambda *_: (jnp.ones(()), (jnp.ones(3), {})),
        r"active is an array float32\[3\], expected",
    ),
    "metrics of another kind": (lambda *_: (jnp.ones(()), (jnp.ones(M), 1.0)), "metrics are a float, expected"),
    "one thing too many": (lambda *_: (jnp.ones(()), (jnp.ones(M), {}, None, 1)), "returns"),
    "an objective's class": (Objective, "got a loss that is the class Objective; pass an objective"),
}


@pytest.mark.parametrize("name", NO_LOSS)
def test_what_is_no_loss_is_refused_in_one_line(name):
    loss, message = NO_LOSS[name]
    model, x, said = sae(m=M), activations(batch=(B,)), []
    for context in (contextlib.nullcontext(), jax.disable_jit()):
        with context, pytest.raises(TypeError, match=message) as error:
            train.fit(model, [x], loss=loss, tx=optax.sgd(0.1), steps=1)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert "\n" not in said[0]


def test_a_batch_of_one_row_and_a_start_with_all_latents_dead():
    model, x = sae(m=M).replace(b_enc=jnp.full(M, -1e3)), activations(batch=(1,))
    state = train.init_state(model, tx := train.default_optimizer(1e-2)).replace(rows_since_fired=jnp.full(M, 100))
    state, shown = train.make_step(Objective((AuxK(8),), idle_after=50), tx)(state, x)
    assert shown["dead"] == 1
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.sae))


# --- the recipe


def test_a_recipe_written_in_the_call_compiles_once():
    def fit(seed):
        objective, tx = Objective((AuxK(8),), idle_after=50), train.ema(train.default_optimizer(1e-2, clip=1.0), 0.9)
        train.fit(sae(seed, m=M), itertools.repeat(activations(seed)), loss=objective, tx=tx, steps=2)

    fit(0)
    with compilations() as seen:
        fit(1)
    assert not seen


def test_the_recipe_is_adam_with_the_papers_constants_on_the_sphere():
    model, grads = sae(m=M), jax.tree.map(lambda p: jnp.sin(7 * p), sae(m=M))
    adam = optax.adam(0.1, b1=0.9, b2=0.999, eps=6.25e-10)
    found, _ = train.default_optimizer(0.1).update(grads, train.default_optimizer(0.1).init(model), model)
    expected, _ = train.unit_norm_decoder(adam).update(grads, adam.init(model), model)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("norm", [0.5, 1.2, 1e4])
def test_clipping_bounds_the_whole_gradient(norm):
    model, tx, atoms = sae(m=M), train.default_optimizer(0.1, clip=1.0), f64(sae(m=M).W_dec)
    grads = jax.tree.map(lambda p: jnp.sin(7 * p), model)
    # What is clipped is tangent to the atoms.
    tangent = jax.tree.map(f64, grads)
    radial = (tangent.W_dec * atoms).sum(1, keepdims=True) / (atoms**2).sum(1, keepdims=True) * atoms
    tangent = tangent.replace(W_dec=tangent.W_dec - radial)
    lengths = np.array([np.linalg.norm(leaf) for leaf in jax.tree.leaves(tangent)])
    scale = norm / np.linalg.norm(lengths)
    assert (norm > 2) == (scale * lengths.max() > 1)  # of 1.2, no array has more than 1 alone
    _, state = jax.jit(tx.update)(jax.tree.map(lambda g: scale * g, grads), tx.init(model), model)
    moment = optax.tree_utils.tree_get(state, "mu")  # a tenth of the gradient that Adam was given
    for found, leaf in zip(jax.tree.leaves(moment), jax.tree.leaves(tangent), strict=True):
        expected = 0.1 * leaf * scale / max(norm, 1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_the_average_of_parameters_is_free_of_its_start():
    x, tx = activations(batch=(B,)), train.ema(train.default_optimizer(1e-2), decay=0.9)
    state = train.init_state(sae(m=M), tx)
    step, total, weight = train.make_step(Objective(), tx), 0.0, 0.0
    for _ in range(5):
        state, _ = step(state, x)
        total, weight = 0.9 * total + 0.1 * f64(state.sae.W_dec), 0.9 * weight + 0.1
        np.testing.assert_allclose(train.ema_params(state.opt_state).W_dec, total / weight, rtol=1e-4, atol=1e-6)


def test_the_geometric_median_is_the_point_of_least_mean_distance():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(200, 4)), 1000 + rng.normal(size=(20, 4))])

    def distance(c):
        return np.linalg.norm(x - c, axis=1).mean()

    best = scipy.optimize.minimize(distance, np.median(x, axis=0), tol=1e-10).x
    found = f64(train.geometric_median(jnp.asarray(x, jnp.float32)))
    assert distance(found) < distance(best) * (1 + 1e-5)
    assert np.linalg.norm(found) < 1


@pytest.mark.parametrize("power", [-90, 0, 90])
@pytest.mark.parametrize(
    ("rows", "median"),
    [
        ([[1.1, 0.7]] * 5, [1.1, 0.7]),  # of rows that are equal, that row
        ([[1.1, 0.7]] * 4 + [[3.0, -2.0], [9.0, 5.0], [-4.0, 1.0]], [1.1, 0.7]),  # more than half are
        ([[0.0], [1.0], [2.0], [3.0], [9.0]], [2.0]),  # the mean, where it starts, is a row
        ([[5.0, 1.0]], [5.0, 1.0]),
    ],
)
def test_the_geometric_median_where_rows_are(rows, median, power):
    scale = np.float32(2.0**power)
    found = train.geometric_median(jnp.asarray(rows, jnp.float32) * scale)
    np.testing.assert_allclose(found / scale, median, rtol=1e-3)
    if len(set(map(tuple, rows))) == 1:
        np.testing.assert_array_equal(found, np.float32(median) * scale)


def test_rows_that_are_not_finite_do_not_move_the_geometric_median():
    x = activations(batch=(60,))
    broken = jnp.concatenate([x, x.at[:, 0].set(jnp.nan)[:7], x.at[:, 1].set(-jnp.inf)[:7]])
    np.testing.assert_allclose(train.geometric_median(broken), train.geometric_median(x), rtol=1e-5)
    assert np.isnan(train.geometric_median(broken[60:])).all()


def test_resampling_gives_dead_latents_a_new_start_and_no_other():
    tx, x = train.ema(train.default_optimizer(1e-2), decay=0.9), activations(batch=(64,))
    state, _ = train.make_step(Objective((L1(0.1),)), tx)(train.init_state(sae(m=M, activation=jaxsae.ReLU()), tx), x)
    state = state.replace(rows_since_fired=jnp.where(jnp.arange(M) < 5, 1000, 0))
    new = train.resample(jax.random.key(0), state, x, idle_after=1000)
    assert_same_bits(new.opt_state.mean, state.opt_state.mean)
    adam, fresh = (s.opt_state.inner[0] for s in (state, new))
    for before, after in ((state.sae, new.sae), (adam.mu, fresh.mu), (adam.nu, fresh.nu)):
        assert_same_bits(
            (after.W_dec[5:], after.W_enc[:, 5:], after.b_enc[5:], after.b_dec),
            (before.W_dec[5:], before.W_enc[:, 5:], before.b_enc[5:], before.b_dec),
        )
    for moments in (fresh.mu, fresh.nu):
        assert not np.any(moments.W_dec[:5])
        assert not np.any(moments.W_enc[:, :5])
    np.testing.assert_allclose(np.linalg.norm(new.sae.W_dec[:5], axis=1), 1, rtol=1e-5)
    size = 0.2 * np.linalg.norm(state.sae.W_enc[:, 5:], axis=0).mean()
    np.testing.assert_allclose(np.linalg.norm(new.sae.W_enc[:, :5], axis=0), size, rtol=1e-5)
    error = f64(x - jaxsae.decode(state.sae, jaxsae.encode_dense(state.sae, x)))
    cosine = f64(new.sae.W_dec[:5]) @ (error / np.linalg.norm(error, axis=1, keepdims=True)).T
    np.testing.assert_allclose(cosine.max(1), 1, rtol=1e-5)
    assert not np.any(new.rows_since_fired[:5])


def dead_state(model):
    state = train.init_state(model, train.default_optimizer(1e-2))
    return state.replace(rows_since_fired=jnp.where(jnp.arange(M) < 5, 1000, 0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("power", [-60, 60])
def test_resampling_never_chooses_a_row_that_is_not_finite(dtype, power, mixed):
    state = dead_state(sae(m=M, activation=RELU, dtype=dtype))
    x = activations(batch=(64,), dtype=dtype) * 2.0**power
    x = x.at[0].set(jnp.nan).at[1, 3].set(jnp.inf)
    new = train.resample(jax.random.key(0), state, x, idle_after=1000).sae
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new))
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state.sae)
    np.testing.assert_allclose(np.linalg.norm(f64(new.W_dec[:5]), axis=1), 1, atol=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("x", [np.full((64, D), np.nan, np.float32), np.zeros((64, D), np.float32)], ids=["NaN", "0"])
def test_resampling_changes_nothing_where_no_row_has_an_error(x):
    state = dead_state(sae(m=M, activation=RELU).replace(b_dec=jnp.zeros(D), b_enc=jnp.full(M, -1.0)))
    assert_same_bits(train.resample(jax.random.key(0), state, jnp.asarray(x), idle_after=1000), state)


def test_resampling_draws_in_proportion_and_in_little_memory():
    weight = np.random.default_rng(0).exponential(size=50) * (np.arange(50) % 3 > 0)
    drawn = np.bincount(startup._draw(jax.random.key(0), jnp.asarray(weight, jnp.float32), 100_000), minlength=50)
    expected = 100_000 * weight / weight.sum()
    assert not drawn[weight == 0].any()
    assert (np.abs(drawn - expected) < 5 * np.sqrt(expected) + 1).all()
    m, n = 2048, 8192
    state = jax.eval_shape(lambda: train.init_state(sae(m=m, activation=RELU), optax.sgd(0.1)))
    x = jax.ShapeDtypeStruct((n, D), jnp.float32)
    program = train.resample.lower(jax.random.key(0), state, x, idle_after=jnp.int32(10)).compile()
    assert program.memory_analysis().temp_size_in_bytes < m * n * 4 / 4


@pytest.mark.parametrize("activation", [jaxsae.JumpReLU(jnp.ones(M)), jaxsae.Gated(*jnp.zeros((3, M)))])
def test_resampling_refuses_activations_that_may_keep_a_latent_closed(activation):
    state = train.init_state(sae(m=M, activation=activation), optax.sgd(0.1))
    with pytest.raises(
        ValueError, match=r"^`resample` got \w+, whose own parameters may .*; train with AuxK instead\.(\n|$)"
    ):
        train.resample(jax.random.key(0), state, activations(batch=(B,)), idle_after=1)


def test_resampling_changes_nothing_while_all_live():
    tx = train.default_optimizer(1e-2)
    state = train.init_state(sae(m=M, activation=jaxsae.ReLU()), tx)
    assert_same_bits(train.resample(jax.random.key(0), state, activations(batch=(64,)), idle_after=1), state)


# --- sweeps


def test_a_sweep_equals_its_members_one_by_one():
    rows, _ = sparse_rows(512, d=D)
    weights, rates, keeps = (0.01, 0.02, 0.05), (1e-2, 5e-3, 2e-2), (2.0, 3.0, 4.0)
    members = [sae(seed, m=M, activation=jaxsae.TopK(K, jnp.float32(keep))) for seed, keep in enumerate(keeps)]
    history = []
    state = train.sweep(
        train.stack(members),
        jaxsae.data.batches(rows, 64, seed=0),
        loss=Objective((L1(jnp.array(weights)), AuxK(4)), idle_after=128),
        tx=train.default_optimizer,
        rates=jnp.array(rates),
        steps=20,
        callback=lambda step, shown: history.append(shown),
    )
    for number, (model, weight, rate) in enumerate(zip(members, weights, rates, strict=True)):
        alone = []
        train.fit(
            model,
            jaxsae.data.batches(rows, 64, seed=0),
            loss=Objective((L1(weight), AuxK(4)), idle_after=128),
            tx=train.default_optimizer(rate),
            steps=20,
            callback=lambda step, shown, alone=alone: alone.append(shown),
        )
        for together, single in zip(history, alone, strict=True):
            for name in single:
                np.testing.assert_allclose(together[name][number], single[name], rtol=1e-4, err_msg=name)
        assert alone[-1]["l0"] <= keeps[number]
    assert train.member(state, 1).sae.W_dec.shape == (M, D)


def test_a_sweep_compiles_once_whatever_its_numbers(monkeypatch):
    rows, _ = sparse_rows(512, d=D)
    traces, mse = [], losses.mse
    monkeypatch.setattr(losses, "mse", lambda *args: traces.append(1) or mse(*args))
    counts = []
    for number, weight, rate in ((1, 0.1, 1e-2), (5, 0.2, 1e-3)):
        train.sweep(
            train.stack([sae(seed, m=M) for seed in range(3)]),
            jaxsae.data.batches(rows, 32, seed=0),
            loss=Objective((L1(weight * jnp.arange(3.0)),)),
            tx=train.default_optimizer,
            rates=jnp.full(3, rate),
            steps=number,
        )
        counts.append(len(traces))
    assert counts[0] == counts[1] > 0


def test_a_sweep_is_one_checkpoint(tmp_path):
    rows, _ = sparse_rows(512, d=D)
    saes, rates = train.stack([sae(seed, m=M) for seed in range(3)]), jnp.full(3, 1e-2)
    options = {"loss": Objective(), "tx": train.default_optimizer, "rates": rates, "steps": 2}
    state = train.sweep(saes, jaxsae.data.batches(rows, 32, seed=0), **options)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_member_that_diverges_disturbs_no_other():
    rows, _ = sparse_rows(512, d=D)

    def trained(rates):
        return train.sweep(
            train.stack([sae(seed, m=M) for seed in range(3)]),
            jaxsae.data.batches(rows, 64, seed=0),
            loss=Objective(),
            tx=train.default_optimizer,
            rates=jnp.array(rates),
            steps=30,
        )

    good, bad = trained([1e-3, 1e-3, 1e-3]), trained([1e-3, np.nan, 1e-3])
    assert_same_bits(*(jax.tree.map(lambda leaf: leaf[::2], state) for state in (good, bad)))
    assert bad.skipped.tolist() == [0, 30, 0]
    assert_same_bits(train.member(bad, 1).sae, sae(1, m=M))


def test_a_sweep_stops_once_all_its_members_have_diverged():
    batches = itertools.repeat(jnp.full((4, D), jnp.nan))
    saes = train.stack([sae(seed, m=M) for seed in range(3)])
    with pytest.raises(train.Diverged, match="of 10 batches in a row was not finite, 10 in all, after 0"):
        train.sweep(saes, batches, loss=Objective(), tx=train.default_optimizer, rates=jnp.full(3, 1e-2), steps=40)


def test_a_sweep_wants_one_number_a_member():
    with pytest.raises(ValueError, match=r"`sweep` got leading axes of lengths \[2, 3\]; give every array one row"):
        train.sweep(
            train.stack([sae(), sae()]), [], loss=Objective(), tx=train.default_optimizer, rates=jnp.ones(3), steps=0
        )


def test_a_step_needs_little_more_than_adam_does():
    d, m, b = 256, 4096, 256
    start = jaxsae.init(jax.random.key(0), d=d, m=m, activation=jaxsae.TopK(8))
    tx = train.default_optimizer(1e-3)
    step = train.make_step(Objective(), tx)
    state = train.init_state(start, tx)
    memory = step.func.lower(*step.args, state, jnp.zeros((b, d))).compile().memory_analysis()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(start))
    # Weights, their gradient and two moments; outputs take the place of the state that is given away.
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes <= 1.25 * 4 * weights
    assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes
