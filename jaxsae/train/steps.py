"""The training state, the training step, and the loops for one autoencoder or a sweep of several.

An objective is any callable pytree `objective(sae, batch, state) -> (value, (active, metrics))`, such as those of
`objectives.py`: `active [m]` marks the latents that fired, `metrics` is a dictionary of scalars. A batch whose loss or
update is not finite changes nothing: it is skipped and counted.

The optimiser sees only what `pytrees.partition` classifies as trained: an `SAE` with None in place of the rest, such as
`TopK.keep`. Its gradients and state are in float32 or better.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxsae import sharding
from jaxsae._core import pytrees
from jaxsae._core.linalg import widen
from jaxsae.autoencoder.metrics import DEAD_ROWS
from jaxsae.autoencoder.sae import SAE
from jaxsae.train import accumulation
from jaxsae.train.objectives import Aux
from jaxsae.train.optim import _complete, _Sound

PATIENCE = 10  # skipped batches in a row after which `fit` gives up


@pytrees.dataclass
class TrainState:
    """Everything a training step reads and writes.

    Attributes:
      sae: the autoencoder.
      opt_state: the optax state.
      step: steps taken.
      rows_since_fired: `[m]`, rows since each latent last fired.
      skipped: number of batches skipped because their loss or update was not finite.
      skipped_last: number of batches skipped in a row up to the last one.
    """

    sae: SAE
    opt_state: Any
    step: Int[Array, ""]
    rows_since_fired: Int[Array, " m"] = pytrees.sharded("latent")
    skipped: Int[Array, ""]
    skipped_last: Int[Array, ""]


Loss = Callable[[SAE, Any, TrainState], tuple[Array, Any]]


class Diverged(RuntimeError):
    """Too many batches in a row had a loss or an update that is not finite; `state` is the last good one."""

    def __init__(self, state: TrainState):
        """Describe how a run failed.

        Args:
          state: the last good one.
        """
        super().__init__(
            f"training diverged: the loss or update of {np.min(state.skipped_last)} batches in a row was not finite, "
            f"{np.min(state.skipped)} in all, after {np.max(state.step)} steps; lower the learning rate or check the "
            "data."
        )
        self.state = state


def init_state(sae: SAE, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step; copies `sae`, since steps donate the buffers of their state.

    Args:
      sae: the autoencoder to start from.
      tx: the optax transformation of `make_step`.

    Example:
      >>> import jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> int(init_state(sae, jaxsae.train.default_optimizer(1e-3)).step)
      0
    """
    sae = jax.tree.map(lambda x: jnp.array(x, jnp.asarray(x).dtype), sae)
    params, rest = pytrees.partition(sae)
    sae = pytrees.merge(params, widen(rest))
    return TrainState(
        sae,
        _complete(tx.init(jax.tree.map(jnp.array, widen(params))), sae),
        step=jnp.zeros((), jnp.int32),
        rows_since_fired=jnp.zeros(sae.m, jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_last=jnp.zeros((), jnp.int32),
    )


def make_step(
    loss: Loss, tx: optax.GradientTransformation, *, accumulate: int = 1
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """Make a training step `step(state, batch) -> (state, metrics)`, jitted, which donates the old state.

    Two steps made with the same `tx` and objectives that differ only in numbers share one compilation.

    Args:
      loss: see the module's docstring; a plain function will do.
      tx: optax transformation.
      accumulate: compute a batch in so many parts, whose gradients are added up, so that only one part's
        pre-activations are in memory; the same to rounding. The loss is then an `Objective`.

    Returns:
      The step. Its metrics are those of the objective, and `loss`; `gradient_norm`, over all parameters, before any
      clipping; `dead`, the share of latents that fired on none of the last `dead_rows` rows: 100,000 in whole batches,
      or all so far; `skipped`, batches skipped so far.

    Example:
      >>> import jax, optax, jaxsae
      >>> from jaxsae import train
      >>> from jaxsae.train import objectives
      >>> sae = jaxsae.init(jax.random.key(0), d=8, m=32, activation=jaxsae.ReLU())
      >>> tx = optax.adam(1e-3)
      >>> step = train.make_step(objectives.Objective((objectives.L1(0.1),)), tx)
      >>> state, metrics = step(train.init_state(sae, tx), jax.random.normal(jax.random.key(1), (16, 8)))
      >>> sorted(metrics)
      ['dead', 'dead_rows', 'gradient_norm', 'l0', 'loss', 'nmse', 'skipped']
    """
    return functools.partial(_step, tx, _as_pytree(loss), accumulate=accumulate)


def _as_pytree(loss):
    if not callable(loss) or isinstance(loss, type):
        got = f"the class {loss.__name__}" if isinstance(loss, type) else f"a {type(loss).__name__}"
        raise TypeError(f"got a loss that is {got}; pass an objective, or a function (sae, batch, state).")
    leaves = jax.tree.leaves(loss)
    return jax.tree_util.Partial(loss) if len(leaves) == 1 and leaves[0] is loss else loss


def _value_and_grad(loss: Any, state: TrainState, batch: Any) -> tuple[tuple[Array, Aux], Any]:
    """The loss, its `Aux`, and the gradient by the trained parameters, in float32 or better."""
    params, rest = pytrees.partition(state.sae)

    def value_of(params):
        return Aux.of(loss(pytrees.merge(params, rest), batch, state), state.sae.m)

    found, grads = jax.value_and_grad(value_of, has_aux=True)(params)
    return found, widen(grads)


def _update(
    tx: Any, loss: Any, state: TrainState, batch: Any, *, accumulate: int = 1
) -> tuple[TrainState, dict[str, Array]]:
    if accumulate == 1:
        found, grads = _value_and_grad(loss, state, batch)
    else:
        found, grads = accumulation.value_and_grad(loss, state, batch, accumulate)
    value, (active, metrics, activation) = found
    count = len(jax.tree.leaves(batch)[0])

    @jax.named_scope("optimiser")
    def learn(state: TrainState) -> TrainState:
        params, rest = pytrees.partition(state.sae)
        updates, opt_state = tx.update(grads, state.opt_state, jax.tree.map(_without_infinity, params))
        if activation is not None:
            rest = pytrees.partition(dataclasses.replace(state.sae, activation=activation))[1]
        moved: Any = optax.apply_updates(params, updates)  # pyright: ignore[reportArgumentType]
        sae = pytrees.merge(moved, rest)
        largest = jnp.iinfo(state.rows_since_fired.dtype).max - count
        rows_since_fired = jnp.where(active, 0, jnp.minimum(state.rows_since_fired, largest) + count)
        skipped_last = jnp.zeros_like(state.skipped_last)
        return TrainState(sae, _complete(opt_state, sae), state.step + 1, rows_since_fired, state.skipped, skipped_last)

    def skip(state: TrainState) -> TrainState:
        return dataclasses.replace(state, skipped=state.skipped + 1, skipped_last=state.skipped_last + 1)

    # The update is computed here only to be checked, and again in `cond`: keeping it would hold a second copy of all.
    # Matrices are checked only if necessary, since that costs half as much as the update itself.
    # Without the barrier, XLA (jaxlib 0.12) makes another copy of a gradient for this sum.
    squares = sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.lax.optimization_barrier(grads)))  # as Adam keeps them
    matrices = not isinstance(tx, _Sound)
    good = jnp.isfinite(value) & jnp.isfinite(squares) & _stays_finite(state, learn(state), matrices=matrices)
    state = jax.lax.cond(good, learn, skip, state)
    rows = count * jnp.minimum(state.step, -(-DEAD_ROWS // count))
    dead = jnp.mean(state.rows_since_fired >= jnp.maximum(rows, 1))
    shown = {"loss": value, "gradient_norm": jnp.sqrt(squares), "dead": dead, "dead_rows": rows}
    return state, {**metrics, **shown, "skipped": state.skipped}


def _without_infinity(param: Array) -> Array:
    """The parameter with 0 for a threshold or bias of ±∞, which weight decay would change, or make NaN."""
    return jnp.where(jnp.isinf(param), 0, param) if param.ndim < 2 else param


def _stays_finite(old: Any, new: Any, *, matrices: bool) -> Array:
    """Whether all values that changed are finite; a threshold may have been infinite before."""
    wrong: dict[tuple[int, ...], Any] = collections.defaultdict(float)
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if jnp.issubdtype(after.dtype, jnp.inexact) and (matrices or after.ndim < 2):
            wrong[after.shape] += jnp.where(after == before, 0, 0 * widen(after))  # NaN where it is neither
    # One sum for all arrays of a shape, so that common subexpressions are computed once.
    return sum(map(jnp.sum, wrong.values()), jnp.zeros(())) == 0


_step = jax.jit(_update, static_argnums=0, static_argnames="accumulate", donate_argnums=2)


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
      sae: the autoencoder to start from, left unchanged; or the state to continue from, whose buffers are donated.
      batches: an iterable of batches of one shape: rows `[b d]`, or pairs of input and target.
      loss: see the module's docstring.
      tx: optax transformation, for example `default_optimizer(learning_rate(m, steps))`.
      steps: number of steps.
      callback: called as `callback(step, metrics)` after each step; the metrics are still on the device.

    Returns:
      The last `TrainState`; its `sae` is the result.

    Raises:
      ValueError: if the batches end before the steps do.
      Diverged: if the loss or update of ten batches in a row (or of all, if fewer) was not finite; its `state` is the
        last good one.

    Example:
      >>> import itertools, jax, jaxsae
      >>> from jaxsae import train
      >>> from jaxsae.train import objectives
      >>> sae = jaxsae.init(jax.random.key(0), d=8, m=32, activation=jaxsae.TopK(4))
      >>> x = jax.random.normal(jax.random.key(1), (256, 8))
      >>> objective = objectives.Objective((objectives.AuxK(k_aux=4),), idle_after=2560)
      >>> state = train.fit(sae, itertools.repeat(x), loss=objective, tx=train.default_optimizer(1e-2), steps=20)
      >>> int(state.step)
      20
    """
    state = sae if isinstance(sae, TrainState) else init_state(sae, tx)
    return _run(make_step(loss, tx), state, batches, steps, callback)


def _run(step, state: TrainState, batches: Iterable[Any], steps: int, callback) -> TrainState:
    stream, watch = iter(batches), _Watch(state)
    for number in range(1, steps + 1):
        try:
            batch = next(stream)
        except StopIteration:
            raise ValueError(f"`fit` got {number - 1} batches for {steps} steps; pass more batches.") from None
        state, metrics = step(state, batch)
        if callback is not None:
            callback(number, metrics)
        watch.see(number, metrics)
        if number == steps:
            watch.flush()
        if watch.in_a_row >= PATIENCE or (number == steps and watch.in_a_row >= steps):
            raise Diverged(state)
    return state


class _Watch:
    """Counts consecutive skipped batches without blocking: up to nine batches late, but never missing ten in a row."""

    def __init__(self, state: TrainState, on_batch: Callable[[int, bool, Any], None] = lambda *batch: None):
        self._pending: collections.deque = collections.deque()
        self._on_batch = on_batch  # called for each in order: its number, whether it was skipped, its metrics
        self.restart(state)

    @property
    def in_a_row(self) -> int:
        """Batches skipped in a row up to the last one read; in a sweep, by all members."""
        return int(np.min(self._in_a_row))

    def restart(self, state: TrainState) -> None:
        """Start over from another state, with nothing pending."""
        self._skipped, self._in_a_row = np.array(state.skipped), np.array(state.skipped_last)

    def see(self, number: int, metrics: dict[str, Any]) -> None:
        """Record the metrics of a batch, which, unlike the state, are not donated to the next step."""
        self._pending.append((number, metrics))
        self._read(PATIENCE)

    def flush(self) -> None:
        """Wait for all pending batches."""
        self._read(0)

    def _read(self, patience: int) -> None:
        while self._pending and self.in_a_row + len(self._pending) >= patience:
            number, metrics = self._pending.popleft()
            before, self._skipped = self._skipped, np.asarray(metrics["skipped"])
            self._in_a_row = np.where(self._skipped > before, self._in_a_row + 1, 0)
            self._on_batch(number, self.in_a_row > 0, metrics)


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

    Members are independent: each equals a separate training, and one that diverges does not affect the others. On an
    accelerator they are trained in parallel; on a CPU, where that gains nothing, one after another in each step.

    Args:
      saes: autoencoders with a leading axis `n` on every array, as from `stack`; `TopK.keep` may differ.
      batches: as for `fit`.
      loss: an objective whose numbers may be arrays `[n]`, one for each member.
      tx: function from a learning rate to an optax transformation, such as `default_optimizer`; a new one recompiles.
      rates: learning rates `[n]`.
      steps: number of steps.
      callback: as for `fit`; the metrics are arrays `[n]`.

    Returns:
      The last `TrainState`, with a leading axis `n`; `member` extracts one.

    Raises:
      ValueError: as `fit` does, or if the axes do not fit together.
      Diverged: if all members skipped ten batches in a row (or all, if fewer).

    Example:
      >>> import itertools, jax, jax.numpy as jnp, jaxsae
      >>> from jaxsae import train
      >>> from jaxsae.train import objectives
      >>> saes = train.stack(
      ...     [jaxsae.init(jax.random.key(seed), d=8, m=32, activation=jaxsae.ReLU()) for seed in range(3)]
      ... )
      >>> x = jax.random.normal(jax.random.key(9), (64, 8))
      >>> objective = objectives.Objective((objectives.L1(jnp.array([0.01, 0.1, 1.0])),))
      >>> state = train.sweep(
      ...     saes, itertools.repeat(x), loss=objective, tx=train.default_optimizer, rates=jnp.full(3, 1e-2), steps=20
      ... )
      >>> train.member(state, 2).sae.W_dec.shape
      (32, 8)
    """
    rates, loss = jnp.asarray(rates), _as_pytree(loss)
    sizes = {len(leaf) for leaf in jax.tree.leaves(saes)} | {len(rates)}
    sizes |= {len(leaf) for leaf in jax.tree.leaves(loss) if jnp.ndim(leaf)}
    if len(sizes) > 1:
        raise ValueError(f"`sweep` got leading axes of lengths {sorted(sizes)}; give every array one row per member.")
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
        return _update(tx(rate), loss, state, batch)

    if not sharding.on_cpu():
        return jax.vmap(one)(loss, rates, state)

    def in_turn(state, each):  # in place, which `lax.map` is not
        index, loss, rate = each
        new, shown = one(loss, rate, member(state, index))
        return jax.tree.map(lambda leaf, new: leaf.at[index].set(new), state, new), shown

    return jax.lax.scan(in_turn, state, (jnp.arange(len(rates)), loss, rates))


def stack(members: Sequence[Any]) -> Any:
    """Stack pytrees of one structure along a new leading axis.

    Args:
      members: pytrees of one structure, with arrays of the same shapes.

    Example:
      >>> import jax, jaxsae
      >>> saes = [jaxsae.init(jax.random.key(seed), d=4, m=8, activation=jaxsae.ReLU()) for seed in range(3)]
      >>> stack(saes).W_dec.shape
      (3, 8, 4)
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def member(stacked: Any, index: int | Int[Array, ""]) -> Any:
    """Take one pytree out of a stack.

    Args:
      stacked: as from `stack` or `sweep`.
      index: which, from 0; may be traced.

    Example:
      >>> import jax.numpy as jnp
      >>> member({"x": jnp.arange(3)}, 2)
      {'x': Array(2, dtype=int32)}
    """
    return jax.tree.map(lambda leaf: leaf[index], stacked)
