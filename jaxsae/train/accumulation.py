"""The loss of a batch and its gradient, computed in parts: only one part's pre-activations are in memory at a time.

The gradients of the parts are summed in float32 or better. A mean over rows is the mean of those of the parts. Whatever
else depends on the whole batch is found before, by passes without gradients: the values that `BatchTopK` keeps, and the
means of which terms such as `L0` are functions. The tangent of such a term at that mean has the term's gradient, and is
a mean over rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxsae import sharding
from jaxsae._core import pytrees
from jaxsae._core.linalg import widen
from jaxsae.autoencoder import metrics
from jaxsae.autoencoder.activations import Activation
from jaxsae.autoencoder.sae import SAE, pre_activations
from jaxsae.train import losses
from jaxsae.train.objectives import Aux, ForwardPass, Objective, _active, _code, _l0, _rows


class _Sums(NamedTuple):
    """What is added up over the parts of a batch.

    Attributes:
      grads: of the value.
      value: of the loss.
      l0: number of active latents of all rows.
      fit: how well the rows are reconstructed.
      active: which latents fired.
    """

    grads: Any
    value: Float[Array, ""]
    l0: Float[Array, ""]
    fit: metrics.Reconstruction
    active: Bool[Array, " m"]

    def plus(self, other: "_Sums") -> "_Sums":
        """The sums of both."""
        grads, value, l0 = jax.tree.map(jnp.add, self[:3], other[:3])
        return _Sums(grads, value, l0, self.fit + other.fit, self.active | other.active)


def value_and_grad(loss: Any, state: Any, batch: Any, parts: int) -> tuple[tuple[Array, Aux], Any]:
    """The loss of a batch, an `Aux`, and the gradient by the trained parameters, computed in `parts` parts.

    Args:
      loss: an `Objective`.
      state: a `TrainState`.
      batch: as `Objective` takes it.
      parts: how many; they divide the number of rows, and each is spread over all devices that rows are split over.

    Raises:
      TypeError: if the loss is no `Objective`, or a term or the activation does not say how parts add up.
      ValueError: if the rows cannot be split so.
    """
    objective = _require_accumulable(loss, state.sae, parts)
    batches = jax.tree.map(functools.partial(_split, parts), batch)
    params, rest = pytrees.partition(state.sae)
    cut, after = _survey(state.sae, batches)
    means = _means(objective, state, batches, cut)

    def of_part(params, part, cut):
        p, cut = objective._forward(pytrees.merge(params, rest), part, state, _encoder(cut))
        value = losses.mse(p.target, p.x_hat) + sum(map(functools.partial(_term, p), objective.terms, means))
        fit = metrics.Reconstruction(metrics.moments(p.target), metrics.moments(widen(p.target) - widen(p.x_hat)))
        return value, (jnp.sum(_l0(p.code)), fit, _active(p.code), cut)

    def sums(part, cut) -> tuple[_Sums, Any]:
        (value, (*found, cut)), grads = jax.value_and_grad(of_part, has_aux=True)(params, part, cut)
        return _Sums(widen(grads), value, *found), cut

    def add(carry, part):
        total, cut = carry
        found, cut = sums(part, cut)
        return (total.plus(found), cut), None

    first = jax.tree.map(lambda x: x[0], batches)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(sums, first, cut)[0])
    nothing = metrics.moments(zero.fit.data.mean[None][:0])
    zero = zero._replace(fit=metrics.Reconstruction(nothing, nothing))
    (total, _), _ = jax.lax.scan(add, (zero, cut), batches)
    grads, value = jax.tree.map(lambda x: x / parts, total[:2])
    l0 = total.l0 / len(jax.tree.leaves(batch)[0])
    return (value, Aux(total.active, {"nmse": total.fit.nmse, "l0": l0}, after)), grads


def _require_accumulable(loss: Any, sae: SAE, parts: int) -> Objective:
    """The loss; raise unless it is known how those of parts add up."""
    got = f"got accumulate {parts}, which needs"
    if not isinstance(loss, Objective) or type(loss).__call__ is not Objective.__call__:
        raise TypeError(f"{got} an `Objective`, not a {type(loss).__name__}; pass one, or leave accumulate out.")
    for term in loss.terms:
        own = vars(type(term))
        if not (own.get("is_mean") is True or {"rows", "of_mean"} <= own.keys()):
            raise TypeError(
                f"{got} to know how the term {type(term).__name__} of parts adds up; if it is a mean over rows, "
                "say so in its class, is_mean = True."
            )
    activation = sae.activation
    if type(activation).train is not Activation.train and not hasattr(activation, "survey"):
        name = type(activation).__name__
        raise TypeError(f"{got} an activation that trains row by row, not {name}; leave accumulate out.")
    return loss


def _split(parts: int, x: Array) -> Array:
    """`[b …]` as `[parts b/parts …]`, where each part has rows of every device, which no row leaves."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = sharding.axis_size("data")
    if len(x) % (parts * devices):
        ways = f" on a mesh that splits rows {devices} ways" if devices > 1 else ""
        what = f"got accumulate {parts} for a batch of {len(x)} rows{ways}"
        raise ValueError(f"{what}; pass a batch that is a multiple of {parts * devices}.")
    shape = (parts, len(x) // parts, *x.shape[1:])
    if devices == 1:
        return x.reshape(shape)

    def split(x):
        return x.reshape(devices, parts, -1, *x.shape[1:]).swapaxes(0, 1).reshape(shape)

    places = PartitionSpec(None, sharding.axis("data"))
    if mesh.explicit_axes:
        place: Any = jax.sharding.auto_axes(split, out_sharding=places)
        return place(x)
    return jax.lax.with_sharding_constraint(split(x), places)


def _survey(sae: SAE, batches: Any) -> tuple[Any, Activation | None]:
    """What an activation that selects among a whole batch keeps of it, and that activation updated; or None."""
    activation: Any = sae.activation
    if not hasattr(activation, "survey"):
        return None, None
    x, _ = _rows(sae, batches)
    return activation.survey(functools.partial(pre_activations, sae), x)


def _encoder(cut: Any):
    """The encoder of a part, which also returns the cut of the parts that follow."""
    if cut is None:
        return lambda sae, x: (_code(sae, x)[0], None)
    return lambda sae, x: sae.activation.select(pre_activations(sae, x), cut)


def _means(objective: Objective, state: Any, batches: Any, cut: Any) -> list[Array | None]:
    """For each term that is a function of a mean over rows, that mean."""
    functions = [hasattr(term, "of_mean") for term in objective.terms]
    if not any(functions):
        return [None] * len(functions)

    def of_part(cut, part):
        p, cut = objective._forward(state.sae, part, state, _encoder(cut))
        return cut, [
            jnp.mean(term.rows(p)) if needed else None for term, needed in zip(objective.terms, functions, strict=True)
        ]

    _, found = jax.lax.scan(of_part, cut, batches)
    return [None if mean is None else jnp.mean(mean) for mean in found]


def _term(p: ForwardPass, term: Any, mean: Array | None) -> Array:
    """A term of a part; a function of a mean is replaced by its tangent at the mean of the batch."""
    if mean is None:
        return term(p)
    value, slope = jax.value_and_grad(lambda mean: term.of_mean(mean, p.step))(mean)
    return value + slope * (jnp.mean(term.rows(p)) - mean)
