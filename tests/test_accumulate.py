"""A batch computed in parts: the loss, gradient and state of the whole batch, in less memory."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import activations, assert_same_bits, sae, sparse_rows, train as cli_train

import jaxsae
from jaxsae import pytrees, sharding, train
from jaxsae.app import plan, runs
from jaxsae.app.options import FAMILIES, Options
from jaxsae.app.units import Units
from jaxsae.autoencoder.activations import Activation
from jaxsae.train import accumulation
from jaxsae.train.objectives import L1, AuxK, Objective

D, M, K, B = 8, 32, 4, 24
SGD = optax.sgd(1.0)  # with which the parameters show the gradient


def recipe(family):
    """The objective of `jaxsae train`, amid its warm-up, and a state with idle latents."""
    sparse = {"k": K} if FAMILIES[family].needs == "k" else {"l1": 0.3}
    options = Options(family, latents=M, **sparse, batch=B, steps=50, multi_topk=family == "topk", idle_after=100)
    objective, _, init_fn = runs.recipe(options, Units(jnp.linspace(-0.2, 0.2, D)))
    state = train.init_state(init_fn().sae, SGD)
    return objective, state.replace(step=state.step + 4, rows_since_fired=5 * jnp.arange(M, dtype=jnp.int32))


def in_parts(parts, objective, state, x, tx=SGD):
    """The state after one step, and its metrics."""
    return train.make_step(objective, tx, accumulate=parts)(jax.tree.map(jnp.array, state), x)


def close(found, expected, tolerance=1e-10):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.max(np.abs(b), initial=0), err_msg=where)


FAST = ("topk", "batchtopk", "jumprelu")


@pytest.mark.parametrize(
    "family", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_loss_metrics_and_gradient_are_those_of_the_whole_batch(x64, mixed, family):
    objective, state = recipe(family)
    revives = family != "matchingpursuit"
    assert any(isinstance(term, AuxK) for term in objective.terms) == revives
    x = activations(batch=(B,), d=D, dtype=np.float64)
    after, shown = in_parts(1, objective, state, x)
    again, told = in_parts(3, objective, state, x)
    close((again.sae, told), (after.sae, shown))
    np.testing.assert_array_equal(again.rows_since_fired, after.rows_since_fired)
    awake = state.replace(rows_since_fired=jnp.zeros_like(state.rows_since_fired))
    assert (in_parts(3, objective, awake, x)[1]["loss"] != told["loss"]) == revives  # AuxK had something to do


def test_the_largest_of_a_batch_are_found_in_parts_ties_by_order():
    rng = np.random.default_rng(0)
    activation = jaxsae.BatchTopK(K)
    # Many ties at the cut; fewer positive values than are wanted; and a value in each part that is past all others.
    for name, pre in {
        "ties": rng.integers(-3, 4, (B, M)).astype(np.float32),
        "few": rng.normal(size=(B, M)).astype(np.float32) - 2,
        "none": -np.ones((B, M), np.float32),
        "uneven": np.repeat(np.arange(4), B // 4)[:, None] + rng.normal(size=(B, M)).astype(np.float32),
    }.items():
        z, moved = jax.jit(activation.train)(pre.astype(np.float32))
        parts = pre.astype(np.float32).reshape(4, B // 4, M)
        cut, after = jax.jit(lambda parts: activation.survey(lambda x: x, parts))(parts)
        found = []
        for part in parts:
            found_here, cut = jax.jit(activation.select)(part, cut)
            found.append(found_here)
        np.testing.assert_array_equal(np.concatenate(found), z, err_msg=name)
        assert after.threshold == moved.threshold, name


@pytest.mark.parametrize("shape", [(2, 4), pytest.param((8, 1), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "activation", [jaxsae.BatchTopK(K), pytest.param(jaxsae.TopK(K), marks=pytest.mark.slow)], ids=["BatchTopK", "TopK"]
)
def test_parts_are_spread_over_a_mesh(activation, shape):
    objective, tx, x = (
        Objective((AuxK(4),), 100),
        train.default_optimizer(1e-2),
        np.asarray(activations(batch=(32,), d=D)),
    )
    told = {}
    for mesh, parts in (((1, 1), 1), (shape, 4)):
        with jax.set_mesh(sharding.make_mesh(*mesh)):
            model = functools.partial(jaxsae.init, jax.random.key(0), d=D, m=M, activation=activation)
            state = sharding.create(lambda: train.init_state(model(), tx))  # noqa: B023
            state = state.replace(rows_since_fired=state.rows_since_fired + 5 * jnp.arange(M, dtype=jnp.int32))
            step, told[parts] = train.make_step(objective, tx, accumulate=parts), []
            for _ in range(4):
                state, shown = step(state, sharding.make_global_batch(x, 32, 0))
                told[parts].append([float(shown[name]) for name in ("loss", "nmse", "l0", "dead", "gradient_norm")])
            if parts > 1:
                assert state.sae.W_enc.addressable_shards[0].data.size == D * M // shape[1]
                with pytest.raises(ValueError, match=rf"^got accumulate 5 .* rows {shape[0]} ways; pass a batch that"):
                    train.make_step(objective, tx, accumulate=5)(state, sharding.make_global_batch(x, 32, 0))
    np.testing.assert_allclose(told[4], told[1], rtol=2e-5)


def test_a_part_that_is_not_finite_skips_the_whole_batch():
    objective, state = Objective((L1(0.1),)), train.init_state(sae(d=D, m=M, activation=jaxsae.ReLU()), SGD)
    x = activations(batch=(B,), d=D)
    after, shown = in_parts(4, objective, state, x.at[B - 1, 0].set(jnp.nan))
    assert_same_bits((after.sae, after.step, after.rows_since_fired), (state.sae, state.step, state.rows_since_fired))
    assert shown["skipped"] == after.skipped_last == 1
    assert_same_bits(
        in_parts(4, objective, state, x),
        in_parts(4, objective, after.replace(skipped=0 * after.skipped, skipped_last=0 * after.skipped_last), x),
    )


def test_pairs_of_input_and_target():
    model = jaxsae.init(jax.random.key(0), d=D, m=M, activation=jaxsae.TopK(K), b_dec=jnp.ones(5), transcoder=True)
    state = train.init_state(model, SGD)
    pair = activations(batch=(B,), d=D), activations(1, batch=(B,), d=5)
    one, several = (in_parts(parts, Objective(), state, pair) for parts in (1, 2))
    close((several[0].sae, several[1]), (one[0].sae, one[1]), 1e-5)


def test_gradients_are_summed_in_float32():
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), sae(d=D, m=M, activation=jaxsae.ReLU()))
    state, x = train.init_state(model, SGD), jnp.ones((1024, D), jnp.bfloat16)
    found = jax.jit(accumulation.value_and_grad, static_argnums=3)(Objective(), state, x, 1024)
    one = jax.jit(accumulation.value_and_grad, static_argnums=3)(Objective(), state, x[:2], 2)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(one[1]), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-4)  # in bfloat16 the sum of 256 would not grow any more


@pytrees.dataclass
class Squares:
    """A mean over rows that says so."""

    is_mean = True

    def __call__(self, p):
        return jnp.mean(jnp.sum(p.x_hat**2, axis=1))


@pytrees.dataclass
class Spread(Squares):
    """A variance over rows, whose base class is a mean."""

    def __call__(self, p):
        return jnp.var(p.x_hat)


@pytrees.dataclass
class Square:
    """A function of a mean over rows."""

    def __call__(self, p):
        return self.of_mean(jnp.mean(self.rows(p)), p.step)

    def rows(self, p):
        return jnp.sum(p.x_hat, axis=1)

    def of_mean(self, mean, step):
        return mean**2


@pytrees.dataclass
class Centred(Activation):
    """An activation that sees the whole batch."""

    def train(self, pre):
        return jax.nn.relu(pre - pre.mean(0)), self


def test_terms_of_users_are_right_or_refused():
    relu, x = sae(d=D, m=M, activation=jaxsae.ReLU()), activations(batch=(B,), d=D)
    state = train.init_state(relu, SGD)
    objective = Objective((Squares(), Square()))
    one, several = (in_parts(parts, objective, state, x) for parts in (1, 4))
    close((several[0].sae, several[1]), (one[0].sae, one[1]), 1e-5)
    told = {
        r"^got accumulate 2, .* how the term Spread of parts adds up; .*, is_mean = True\.(\n|$)": Objective(
            (Spread(),)
        ),
        r"^got accumulate 2, which needs an `Objective`, not a Partial; pass one, or leave accumulate out\.(\n|$)": (
            lambda sae, batch, state: (jnp.mean(batch), (jnp.ones(M, bool), {}))
        ),
    }
    for message, loss in told.items():
        with pytest.raises(TypeError, match=message):
            in_parts(2, loss, state, x)
    with pytest.raises(TypeError, match=r"^got accumulate 2, which needs an activation .* not Centred; leave"):
        in_parts(2, Objective(), train.init_state(relu.replace(activation=Centred()), SGD), x)
    with pytest.raises(ValueError, match=r"^got accumulate 5 for a batch of 24 rows; pass a batch that is a multiple"):
        in_parts(5, Objective(), state, x)


@pytest.mark.parametrize(
    ("family", "ratio"),
    [
        ("topk", 2.5),
        pytest.param("relu", 3, marks=pytest.mark.slow),
        pytest.param("batchtopk", 3, marks=pytest.mark.slow),
    ],
)
def test_memory_falls(family, ratio):
    sparse = {"k": 32} if FAMILIES[family].needs == "k" else {"l1": 0.3}
    options = Options(family, latents=16384, **sparse, batch=8192)
    one, eight = (
        plan.training_step(options._replace(accumulate=parts), 768, sharding.make_mesh()).workspace_bytes
        for parts in (1, 8)
    )
    assert eight * ratio < one


def test_a_run_in_parts_resumes_with_the_same_bits_and_in_no_other_parts(tmp_path, capsys):
    np.save(tmp_path / "x.npy", sparse_rows(1200, d=16)[0])
    run = tmp_path / "run"
    command = (tmp_path / "x.npy", run, "batchtopk", "--save-every-steps", 30)
    command += ("--moments", "bfloat16", "--accumulate")
    assert cli_train(*command, 4) == 0
    whole = jaxsae.pretrained.load(run)
    assert json.loads((run / "report.json").read_text())["heldout"]["nmse"] < 0.9
    assert cli_train(*command, 2) == 2  # which rounds otherwise
    assert "accumulate" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints" / "60")
    assert cli_train(*command, 4) == 0
    assert "resuming from step 30" in capsys.readouterr().err
    assert_same_bits(jaxsae.pretrained.load(run), whole)
    assert cli_train(tmp_path / "x.npy", tmp_path / "new", "batchtopk", "--accumulate", 5) == 2
    assert "got accumulate 5 for a batch of 64; pass a batch that is a multiple of 5.\n" in capsys.readouterr().err
