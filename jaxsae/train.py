"""Training: an objective, an optax transformation and a stream of batches make an SAE.

    tx = train.recipe(train.learning_rate(sae.m, steps))
    state = train.init_state(sae, tx)
    step = train.make_step(objective, tx)
    for x in batches:
        state, metrics = step(state, x)

An objective is any callable pytree `objective(sae, batch, state) -> (value, (fired, metrics))`, such as those of
`objectives.py`: `fired [m]` says which latents were active, `metrics` is a dictionary of scalars. A batch whose loss is
not finite, or whose update is not, changes nothing: it is skipped and counted.

The optimiser sees what `pytrees.partition` says is trained, and nothing else: an `SAE` with None in the place of the
rest, such as `TopK.keep`. It is given gradients in float32 or better, and keeps its state in that.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxsae import pytrees, rows, sharding
from jaxsae.linalg import divide, norms, power_of_two, widen
from jaxsae.metrics import DEAD_ROWS
from jaxsae.objectives import Measured
from jaxsae.sae import SAE, encode_dense, reconstruct

__all__ = [
    "Diverged",
    "TrainState",
    "average",
    "averaged",
    "fit",
    "geometric_median",
    "init_state",
    "learning_rate",
    "make_step",
    "member",
    "recipe",
    "resample",
    "stack",
    "sweep",
    "unit_norm_decoder",
]

PATIENCE = 10  # skipped batches in a row after which `fit` gives up


@pytrees.dataclass
class TrainState:
    """All that a training step reads and writes.

    Attributes:
      sae: the autoencoder.
      opt_state: the optax state.
      step: steps taken.
      idle: `[m]`, rows since each latent last fired.
      skipped: batches skipped, since their loss or their update was not finite.
      skipped_last: how many of them were the last ones, in a row.
    """

    sae: SAE
    opt_state: Any
    step: Int[Array, ""]
    idle: Int[Array, " m"]
    skipped: Int[Array, ""]
    skipped_last: Int[Array, ""]


Loss = Callable[[SAE, Any, TrainState], tuple[Array, Any]]


class Diverged(RuntimeError):
    """Too many batches in a row had a loss or an update that is not finite; `state` is the last good one."""

    def __init__(self, state: TrainState):
        """Tell what happened to a run.

        Args:
          state: the last good one.
        """
        super().__init__(
            f"training diverged: the loss or update of {np.min(state.skipped_last)} batches in a row was not finite, "
            f"{np.min(state.skipped)} in all, after {np.max(state.step)} steps; lower the learning rate or mend the "
            "data."
        )
        self.state = state


# --- optimisers


class _Sound(optax.GradientTransformation):
    """One that makes finite updates of finite gradients, if it makes any: Adam and what is built on it here.

    That it makes any, the arrays show that are not matrices: a rate of NaN is in all of them.
    """


def _around(tx: optax.GradientTransformation, init: Callable, update: Callable) -> optax.GradientTransformation:
    """A transformation made of another, and as sound as that."""
    return (_Sound if isinstance(tx, _Sound) else optax.GradientTransformation)(init, update)


def unit_norm_decoder(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep the atoms on the unit sphere: what `tx` sees of their gradient is tangent, and its update ends on it.

    All is computed in float32 or better, so that atoms of a narrower type are rounded once: their norms are then within
    half its epsilon of 1 (2⁻⁸ for bfloat16, 2⁻¹¹ for float16). An atom that is 0 after its update stays as it was.

    Args:
      tx: any transformation of gradients shaped like an `SAE`.

    Returns:
      A transformation that needs the parameters, as optax passes them.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> tx = jaxsae.train.unit_norm_decoder(optax.sgd(1.0))
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, sae), tx.init(sae), sae)
      >>> norms = jnp.linalg.norm(optax.apply_updates(sae, updates).W_dec, axis=1)
      >>> bool(jnp.allclose(norms, 1, atol=1e-6))
      True

    Source: Bricken et al. (2023), "Towards monosemanticity".
    """

    def init(params: Any) -> Any:
        return tx.init(widen(params))

    def update(updates: Any, state: Any, params: Any = None):
        if params is None:
            raise ValueError("`unit_norm_decoder` got no params; pass them, tx.update(grads, state, params).")
        updates, atoms = widen(updates), widen(params.W_dec)
        slope = updates.W_dec
        parallel = divide(jnp.sum(slope * atoms, axis=-1), jnp.sum(atoms**2, axis=-1))[:, None]
        updates, state = tx.update(updates.replace(W_dec=slope - parallel * atoms), state, params)
        moved = atoms + updates.W_dec
        norm = norms(moved)
        norm = jnp.where(jnp.isfinite(norm), norm, jnp.nan)  # else the atom would be 0, a number by infinity
        return updates.replace(W_dec=jnp.where(norm == 0, 0, divide(moved, norm) - atoms)), state

    return _around(tx, init, update)


def learning_rate(m: int, steps: int | None = None) -> float:
    """The learning rate of Gao et al. (2024), for 10⁵ steps and more, and a larger one for fewer.

        2e-4 / √(m / 2¹⁴) · max(1, 10⁵ / steps)^¼,   raised to 4e-3 at most

    The power is that of the best rates from 250 to 1,000 steps, by `python -m benchmarks rates`, where latents die of
    more than 4e-3.

    Args:
      m: number of latents.
      steps: of the training; as many as theirs if None.

    Example:
      >>> learning_rate(2**14), learning_rate(2**16, steps=200_000), learning_rate(2**14, steps=6250)
      (0.0002, 0.0001, 0.0004)

    Source: Gao et al. (2024), Appendix A.
    """
    theirs = 2e-4 / (m / 2**14) ** 0.5
    shorter = 1.0 if steps is None else max(1.0, 1e5 / steps)
    return max(theirs, min(theirs * shorter**0.25, 4e-3))


def recipe(rate: optax.ScalarOrSchedule, *, clip: float | None = None) -> optax.GradientTransformation:
    """The optimiser of Gao et al. (2024): Adam with `β = (0.9, 0.999)` and `ε = 6.25e-10`, atoms on the unit sphere.

    Args:
      rate: learning rate, or any optax schedule of it; `learning_rate(m, steps)` is a good one.
      clip: largest norm of the whole gradient; none by default.

    Example:
      >>> import optax
      >>> schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate(4096), warmup_steps=100, decay_steps=1000)
      >>> tx = recipe(schedule, clip=1.0)

    Source: Gao et al. (2024), Appendix A.
    """
    adam = optax.adam(rate, b1=0.9, b2=0.999, eps=6.25e-10)
    tx = adam if clip is None else optax.chain(optax.clip_by_global_norm(clip), adam)
    return unit_norm_decoder(_Sound(*tx))


class AveragedState(NamedTuple):
    """The inner state, the mean of the parameters so far, in float32 or better, and its weight."""

    inner: Any
    mean: Any
    weight: Array


def average(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Keep an exponential moving average of the parameters beside them; `averaged` reads it.

        w ← decay·w + (1 − decay),   mean ← mean + (1 − decay)/w · (parameters − mean)

    This is the average free of the bias to 0 of its first steps; before them it is the parameters.

    Args:
      tx: any transformation.
      decay: share of the average that stays from step to step, for example 0.999.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> tx = average(optax.sgd(1.0), decay=0.9)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, sae), tx.init(sae), sae)
      >>> averaged(state).b_enc[0], optax.apply_updates(sae, updates).b_enc[0]
      (Array(-1., dtype=float32), Array(-1., dtype=float32))

    Source: Gao et al. (2024), Appendix A; Kingma & Ba (2015), "Adam", Section 3, for the correction of the bias.
    """

    def init(params: Any) -> AveragedState:
        return AveragedState(tx.init(params), jax.tree.map(jnp.array, widen(params)), jnp.zeros(()))

    def update(updates: Any, state: Any, params: Any = None):
        updates, inner = tx.update(updates, state.inner, params)
        moved = optax.apply_updates(params, updates)
        weight = decay * state.weight + (1 - decay)
        share = divide(1 - decay, weight)

        def follow(mean, p):  # what is not trained the mean has as well, and the optimiser does not see
            return mean if p is None else jnp.where(p == mean, mean, mean + share * (p.astype(mean.dtype) - mean))

        return updates, AveragedState(inner, jax.tree.map(follow, state.mean, moved), weight)

    return _around(tx, init, update)


def averaged(opt_state: Any) -> SAE:
    """The average of the parameters, in float32 or better; with what is not trained as it is now.

    Args:
      opt_state: of `average`, or any pytree that holds one, such as a `TrainState`.

    Raises:
      ValueError: if there is no average in it.

    Example:
      >>> import jax, optax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> tx = average(optax.sgd(1.0), decay=0.9)
      >>> bool((averaged(init_state(sae, tx)).W_dec == sae.W_dec).all())
      True

    Source: Gao et al. (2024), Appendix A.
    """
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_average) if _is_average(node)]
    if not found:
        raise ValueError("`averaged` got a state without an average; train with `tx = train.average(tx, decay)`.")
    return found[0].mean


def _is_average(node: Any) -> bool:
    return isinstance(node, AveragedState)


def _complete(opt_state: Any, sae: SAE) -> Any:
    """Averages with what is not trained as it is in `sae`."""
    rest = pytrees.partition(sae)[1]

    def complete(node):
        if not _is_average(node):
            return node
        return node._replace(mean=jax.tree.map(jnp.array, pytrees.merge(pytrees.partition(node.mean)[0], rest)))

    return jax.tree.map(complete, opt_state, is_leaf=_is_average)


# --- steps


def init_state(sae: SAE, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step; copies `sae`, since steps take over the buffers of the state they are given.

    Args:
      sae: the autoencoder to start from.
      tx: the optax transformation of `make_step`.

    Example:
      >>> import jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> int(init_state(sae, recipe(1e-3)).step)
      0
    """
    sae = jax.tree.map(lambda x: jnp.array(x, jnp.asarray(x).dtype), sae)
    params, rest = pytrees.partition(sae)
    sae = pytrees.merge(params, widen(rest))
    return TrainState(
        sae,
        _complete(tx.init(jax.tree.map(jnp.array, widen(params))), sae),
        step=jnp.zeros((), jnp.int32),
        idle=jnp.zeros(sae.m, jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_last=jnp.zeros((), jnp.int32),
    )


def make_step(
    loss: Loss, tx: optax.GradientTransformation
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """Make a training step `step(state, batch) -> (state, metrics)`: jitted, the old state donated.

    Two steps made with the same `tx` and objectives that differ in numbers alone share one compilation.

    Args:
      loss: see the module's docstring; a plain function will do.
      tx: optax transformation.

    Returns:
      The step. Its metrics are the objective's own, and `loss`; `dead`, the share of latents that fired on none of the
      last `dead_rows` rows: 100,000 in whole batches, or all so far; `skipped`, batches skipped so far.

    Example:
      >>> import jax, optax, jaxsae
      >>> from jaxsae import objectives, train
      >>> sae = jaxsae.init(jax.random.key(0), d=8, m=32, activation=jaxsae.ReLU())
      >>> tx = optax.adam(1e-3)
      >>> step = train.make_step(objectives.Objective((objectives.L1(0.1),)), tx)
      >>> state, metrics = step(train.init_state(sae, tx), jax.random.normal(jax.random.key(1), (16, 8)))
      >>> sorted(metrics)
      ['dead', 'dead_rows', 'l0', 'loss', 'nmse', 'skipped']
    """
    return functools.partial(_step, tx, _as_pytree(loss))


def _as_pytree(loss):
    if not callable(loss) or isinstance(loss, type):
        got = f"the class {loss.__name__}" if isinstance(loss, type) else f"a {type(loss).__name__}"
        raise TypeError(f"got a loss that is {got}; pass an objective, or a function (sae, batch, state).")
    leaves = jax.tree.leaves(loss)
    return jax.tree_util.Partial(loss) if len(leaves) == 1 and leaves[0] is loss else loss


def _advance(tx: Any, loss: Any, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
    params, rest = pytrees.partition(state.sae)

    def value_of(params):
        return Measured.of(loss(pytrees.merge(params, rest), batch, state), state.sae.m)

    (value, (fired, metrics, activation)), grads = jax.value_and_grad(value_of, has_aux=True)(params)
    grads, count = widen(grads), len(jax.tree.leaves(batch)[0])

    def learn(state: TrainState) -> TrainState:
        params, rest = pytrees.partition(state.sae)
        updates, opt_state = tx.update(grads, state.opt_state, params)
        if activation is not None:
            rest = pytrees.partition(dataclasses.replace(state.sae, activation=activation))[1]
        moved: Any = optax.apply_updates(params, updates)  # pyright: ignore[reportArgumentType]
        sae = pytrees.merge(moved, rest)
        most = jnp.iinfo(state.idle.dtype).max - count
        idle = jnp.where(fired, 0, jnp.minimum(state.idle, most) + count)
        skipped_last = jnp.zeros_like(state.skipped_last)
        return TrainState(sae, _complete(opt_state, sae), state.step + 1, idle, state.skipped, skipped_last)

    def skip(state: TrainState) -> TrainState:
        return dataclasses.replace(state, skipped=state.skipped + 1, skipped_last=state.skipped_last + 1)

    # Learnt twice, here only to be looked at: one that was kept until known to be good would be a second copy of all.
    # Matrices are looked at where they must be, since that is half of what the update itself costs.
    # Behind a barrier, without which XLA (jaxlib 0.12) makes another copy of a gradient for this sum.
    squares = sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.lax.optimization_barrier(grads)))  # Adam keeps each
    matrices = not isinstance(tx, _Sound)
    good = jnp.isfinite(value) & jnp.isfinite(squares) & _stays_finite(state, learn(state), matrices=matrices)
    state = jax.lax.cond(good, learn, skip, state)
    rows = count * jnp.minimum(state.step, -(-DEAD_ROWS // count))
    dead = jnp.mean(state.idle >= jnp.maximum(rows, 1))
    return state, {"loss": value, "dead": dead, "dead_rows": rows, "skipped": state.skipped, **metrics}


def _stays_finite(old: Any, new: Any, *, matrices: bool) -> Array:
    """Whether no number of a tree has become NaN or Inf; a threshold may have been Inf before."""
    wrong: dict[tuple[int, ...], Any] = collections.defaultdict(float)
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if jnp.issubdtype(after.dtype, jnp.inexact) and (matrices or after.ndim < 2):
            wrong[after.shape] += jnp.where(after == before, 0, 0 * widen(after))  # NaN where it is neither
    # One sum for all arrays of a shape, so that what they have in common is computed once.
    return sum(map(jnp.sum, wrong.values()), jnp.zeros(())) == 0


_step = jax.jit(_advance, static_argnums=0, donate_argnums=2)


def fit(
    sae: SAE | TrainState,
    batches: Iterable[Any],
    *,
    loss: Loss,
    tx: optax.GradientTransformation,
    steps: int,
    callback: Callable[[int, dict[str, Array]], None] | None = None,
) -> TrainState:
    """Train an SAE.

    Args:
      sae: the autoencoder to start from; left as it is. Or the state to go on from, which is taken over.
      batches: rows `[b d]`, or pairs of input and target, batch after batch, of one shape.
      loss: see the module's docstring.
      tx: optax transformation, for example `recipe(learning_rate(m, steps))`.
      steps: how many.
      callback: called as `callback(step, metrics)` after each; the metrics are still on the device.

    Returns:
      The last `TrainState`; its `sae` is the result.

    Raises:
      ValueError: if the batches end before the steps do.
      Diverged: if the loss or the update of ten batches in a row, or of all there were, was not finite; its `state`
        is the last good one.

    Example:
      >>> import itertools, jax, jaxsae
      >>> from jaxsae import objectives, train
      >>> sae = jaxsae.init(jax.random.key(0), d=8, m=32, activation=jaxsae.TopK(4))
      >>> x = jax.random.normal(jax.random.key(1), (256, 8))
      >>> objective = objectives.Objective((objectives.AuxK(k_aux=4),), idle_after=2560)
      >>> state = train.fit(sae, itertools.repeat(x), loss=objective, tx=train.recipe(1e-2), steps=20)
      >>> int(state.step)
      20
    """
    state = sae if isinstance(sae, TrainState) else init_state(sae, tx)
    return _run(make_step(loss, tx), state, batches, steps, callback)


def _run(step, state: TrainState, batches: Iterable[Any], steps: int, callback) -> TrainState:
    stream, look_at = iter(batches), PATIENCE - int(np.min(state.skipped_last))
    for number in range(1, steps + 1):
        try:
            batch = next(stream)
        except StopIteration:
            raise ValueError(f"`fit` got {number - 1} batches for {steps} steps; pass more batches.") from None
        state, metrics = step(state, batch)
        if callback is not None:
            callback(number, metrics)
        if number >= look_at or number == steps:  # no sooner can it be ten in a row, and to look is to wait
            skipped = int(np.min(state.skipped_last))
            if skipped >= min(PATIENCE, steps):
                raise Diverged(state)
            look_at = number + PATIENCE - skipped
    return state


def sweep(
    saes: SAE,
    batches: Iterable[Any],
    *,
    loss: Any,
    tx: Callable[[Any], optax.GradientTransformation],
    rates: Float[ArrayLike, " n"],
    steps: int,
    callback: Callable[[int, dict[str, Array]], None] | None = None,
) -> TrainState:
    """Train `n` autoencoders on one stream of batches, in one compilation.

    Members are independent: each equals a training of its own, and one that diverges disturbs no other. On an
    accelerator they are trained side by side; on a CPU, where that gains nothing, one after another in each step.

    Args:
      saes: autoencoders with a leading axis `n` on every array, as `stack` makes them; `TopK.keep` may differ.
      batches: as for `fit`.
      loss: an objective whose numbers may be arrays `[n]`, one for each member.
      tx: from a learning rate to an optax transformation, for example `recipe`; one function, one compilation.
      rates: learning rates `[n]`.
      steps: how many.
      callback: as for `fit`; the metrics are arrays `[n]`.

    Returns:
      The last `TrainState`, `n` in one; `member` takes one out.

    Raises:
      ValueError: as `fit` does, or if the axes do not fit together.
      Diverged: if ten batches in a row, or all there were, were skipped by all members.

    Example:
      >>> import itertools, jax, jax.numpy as jnp, jaxsae
      >>> from jaxsae import objectives, train
      >>> saes = train.stack(
      ...     [jaxsae.init(jax.random.key(seed), d=8, m=32, activation=jaxsae.ReLU()) for seed in range(3)]
      ... )
      >>> x = jax.random.normal(jax.random.key(9), (64, 8))
      >>> objective = objectives.Objective((objectives.L1(jnp.array([0.01, 0.1, 1.0])),))
      >>> state = train.sweep(
      ...     saes, itertools.repeat(x), loss=objective, tx=train.recipe, rates=jnp.full(3, 1e-2), steps=20
      ... )
      >>> train.member(state, 2).sae.W_dec.shape
      (32, 8)
    """
    rates, loss = jnp.asarray(rates), _as_pytree(loss)
    sizes = {len(leaf) for leaf in jax.tree.leaves(saes)} | {len(rates)}
    sizes |= {len(leaf) for leaf in jax.tree.leaves(loss) if jnp.ndim(leaf)}
    if len(sizes) > 1:
        raise ValueError(f"`sweep` got leading axes of lengths {sorted(sizes)}; give every array one row a member.")
    n = len(rates)
    numbers, structure = jax.tree.flatten(loss)
    loss = structure.unflatten([jnp.broadcast_to(jnp.asarray(number), (n,)) for number in numbers])
    step = functools.partial(_sweep_step, tx, loss, rates)
    return _run(step, _sweep_state(tx, saes, rates), batches, steps, callback)


@functools.partial(jax.jit, static_argnums=0)
def _sweep_state(tx: Any, saes: SAE, rates: Array) -> TrainState:
    return jax.vmap(lambda sae, rate: init_state(sae, tx(rate)))(saes, rates)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _sweep_step(tx: Any, loss: Any, rates: Array, state: TrainState, batch: Any):
    def one(loss, rate, state):
        return _advance(tx(rate), loss, state, batch)

    if not sharding.on_cpu():
        return jax.vmap(one)(loss, rates, state)

    def in_turn(state, each):  # in place, which `lax.map` is not
        number, loss, rate = each
        new, shown = one(loss, rate, member(state, number))
        return jax.tree.map(lambda leaf, new: leaf.at[number].set(new), state, new), shown

    return jax.lax.scan(in_turn, state, (jnp.arange(len(rates)), loss, rates))


def stack(members: Sequence[Any]) -> Any:
    """Put pytrees of one structure side by side, along a new leading axis.

    Args:
      members: pytrees of one structure, with arrays of the same shapes.

    Example:
      >>> import jax, jaxsae
      >>> saes = [jaxsae.init(jax.random.key(seed), d=4, m=8, activation=jaxsae.ReLU()) for seed in range(3)]
      >>> stack(saes).W_dec.shape
      (3, 8, 4)
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def member(stacked: Any, number: int | Int[Array, ""]) -> Any:
    """Take one pytree out of a stack.

    Args:
      stacked: as `stack` makes it, or `sweep`.
      number: which, from 0; may be traced.

    Example:
      >>> import jax.numpy as jnp
      >>> member({"x": jnp.arange(3)}, 2)
      {'x': Array(2, dtype=int32)}
    """
    return jax.tree.map(lambda leaf: leaf[number], stacked)


# --- starting points


def geometric_median(x: Float[Array, "n d"], *, iterations: int = 100) -> Float[Array, " d"]:
    """The point of least mean distance to the rows, by Weiszfeld's iteration: a centre that outliers hardly move.

        c ← Σᵢ xᵢ/‖xᵢ − c‖ / Σᵢ 1/‖xᵢ − c‖

    Rows at the centre itself hold it there as strongly as each of the others pulls (Vardi & Zhang).

    Args:
      x: `[n d]`, a sample.
      iterations: how many.

    Example:
      >>> import jax.numpy as jnp
      >>> geometric_median(jnp.array([[0.0], [1.0], [1000.0]])).round(3)
      Array([1.], dtype=float32)

    Source: Weiszfeld (1937); Vardi & Zhang (2000), "The multivariate L1-median and associated data depth"; as the start
    of b_dec, Bricken et al. (2023) and Gao et al. (2024), Appendix A.
    """
    wide = widen(x)
    lowest = jnp.min(wide, axis=0)  # which rows that are equal are to the bit
    scale = power_of_two(jnp.max(wide - lowest))
    scaled = (wide - lowest) / scale
    least = jnp.finfo(scaled.dtype).eps * jnp.sqrt(jnp.mean(jnp.var(scaled, axis=0)))

    def closer(_, centre):
        distance = norms(scaled - centre)[:, 0]
        at = distance <= least
        weight = jnp.where(at, 0, divide(1, distance))
        pull = weight @ (scaled - centre)
        free = jnp.maximum(1 - divide(jnp.sum(at), norms(pull)), 0)
        return centre + free * divide(pull, jnp.sum(weight))

    centre = jax.lax.fori_loop(0, iterations, closer, jnp.mean(scaled, axis=0))
    return (lowest + scale * centre).astype(x.dtype)


@jax.jit
def resample(key: PRNGKeyArray, state: TrainState, x: Float[Array, "n d"], *, idle_after: int | Array) -> TrainState:
    """Give idle latents a new start, at rows that the autoencoder reconstructs badly; for L1 models.

    A row is chosen with probability in proportion to the square of its loss `‖x − x̂‖²`; the atom becomes its error, of
    norm 1, and the encoder's column the same, of a fifth of the mean norm of the others; the bias and the optimiser's
    moments of the latent become 0.

    Rows with NaN or Inf are never chosen.

    Args:
      key: PRNG key.
      state: of the training.
      x: a sample of rows to choose from, `[n d]`.
      idle_after: a latent is idle once this many rows went by without it.

    Returns:
      The state to go on from; unchanged if no latent is idle, or no row has an error.

    Raises:
      ValueError: if it is a transcoder, whose errors are no directions of its input.

    Example:
      >>> import jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> state = init_state(sae, recipe(1e-3))
      >>> x = jax.random.normal(jax.random.key(1), (16, 4))
      >>> bool((resample(jax.random.key(2), state, x, idle_after=1).sae.W_dec == sae.W_dec).all())
      True

    Source: Bricken et al. (2023), "Towards monosemanticity", Appendix.
    """
    sae = state.sae
    if sae.transcoder:
        raise ValueError("`resample` got a transcoder; it is for autoencoders, whose errors are like their inputs.")
    errors, loss = _errors(sae, x)
    chosen = _draw(key, loss**2, sae.m)
    idle = (state.idle >= idle_after) & jnp.any(loss > 0)
    atoms = divide(errors[chosen], norms(errors[chosen]))
    encoder = jnp.linalg.norm(widen(sae.W_enc), axis=0)
    size = 0.2 * jnp.sum(jnp.where(idle, 0, encoder)) / jnp.maximum(jnp.sum(~idle), 1)
    size = jnp.where(idle.all(), jnp.mean(encoder), size)
    sae = dataclasses.replace(
        sae,
        W_enc=jnp.where(idle, (size * atoms.T).astype(sae.W_enc.dtype), sae.W_enc),
        b_enc=jnp.where(idle, 0, sae.b_enc),
        W_dec=jnp.where(idle[:, None], atoms.astype(sae.W_dec.dtype), sae.W_dec),
    )

    def forget(moments):
        if _is_average(moments):  # of weights, and no moment
            return moments._replace(inner=forget_all(moments.inner))
        if not isinstance(moments, SAE):
            return moments
        return dataclasses.replace(
            moments,
            W_enc=jnp.where(idle, 0, moments.W_enc),
            b_enc=jnp.where(idle, 0, moments.b_enc),
            W_dec=jnp.where(idle[:, None], 0, moments.W_dec),
        )

    def forget_all(opt_state):
        return jax.tree.map(forget, opt_state, is_leaf=lambda node: isinstance(node, SAE | AveragedState))

    opt_state = forget_all(state.opt_state)
    return dataclasses.replace(state, sae=sae, opt_state=opt_state, idle=jnp.where(idle, 0, state.idle))


def _errors(sae: SAE, x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    """What an autoencoder leaves of each row, in units of the largest such number, and its square; 0 if not finite."""

    def left(x):
        return x - reconstruct(sae, x, encode_dense(sae, x))

    errors = rows.map_chunks(left, widen(x), batch=x.shape[:1], row_bytes=8 * sae.m, cpu_rows=256)
    errors = jnp.where(jnp.isfinite(errors).all(axis=1, keepdims=True), errors, 0)
    errors = errors / power_of_two(jnp.max(jnp.abs(errors), initial=0))
    return errors, jnp.sum(errors**2, axis=1)


def _draw(key: PRNGKeyArray, weight: Float[Array, " n"], count: int) -> Int[Array, " count"]:
    """Numbers below `n` in proportion to a weight each, by the inverse of their distribution: in memory `n + count`."""
    total = jnp.cumsum(weight)
    chosen = jnp.searchsorted(total, total[-1] * jax.random.uniform(key, (count,), total.dtype), side="right")
    chosen = jnp.minimum(chosen, len(weight) - 1)
    return jnp.where(weight[chosen] > 0, chosen, jnp.argmax(weight))  # rounding may end at one that weighs nothing
