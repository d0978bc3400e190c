"""Training objectives: the reconstruction error plus terms, each a small pytree with its weight.

    objective = Objective((L1(0.1),))                                    # ReLU
    objective = Objective((AuxK(k_aux=512),), idle_after=10_000_000)     # TopK, BatchTopK
    objective = Objective((L0(1.0, target=32.0),))                       # JumpReLU
    objective = Objective((Gate(0.1),))                                  # Gated
    objective = Objective((MultiTopK(), AuxK(k_aux=512)))                # terms add up

A term is any callable pytree `term(p: ForwardPass) -> scalar`. Its numbers are leaves, so that a weight can change or
be swept without a retrace; a schedule is an optax schedule, from the step to a factor.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxsae import codes
from jaxsae._core import pytrees
from jaxsae._core.linalg import widen
from jaxsae.autoencoder.activations import Activation, TopK
from jaxsae.autoencoder.sae import SAE, encode, encode_dense, pre_activations, reconstruct, split_rows
from jaxsae.codes import SparseCode
from jaxsae.train import losses


class ForwardPass(NamedTuple):
    """The results of one forward pass, passed to each term.

    Attributes:
      sae: the autoencoder.
      x: the batch, `[b d]`.
      target: what to reconstruct, `[b d_out]`; `x` except in transcoders.
      code: its code, sparse if the activation fixes the number of slots, else dense.
      x_hat: its reconstruction, `[b d_out]`.
      idle: which latents fired on none of the last `idle_after` rows, `[m]`.
      step: steps taken.
    """

    sae: SAE
    x: Float[Array, "b d"]
    target: Float[Array, "b d_out"]
    code: SparseCode | Float[Array, "b m"]
    x_hat: Float[Array, "b d_out"]
    idle: Bool[Array, " m"]
    step: Int[Array, ""]


class Aux(NamedTuple):
    """What a loss returns besides its value.

    Attributes:
      active: which latents fired, `[m]`.
      metrics: named scalars.
      activation: the updated activation, if the pass estimated a part of it.
    """

    active: Bool[Array, " m"]
    metrics: dict[str, Array]
    activation: Activation | None = None

    @classmethod
    def of(cls, out: Any, m: int) -> tuple[Array, "Aux"]:
        """Validate what a loss returned for `m` latents: its value and an `Aux`."""
        expected = "expected (value, (active, metrics)): a scalar, which latents were active, and a dictionary"
        if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], tuple) and len(out[1]) in (2, 3)):
            raise TypeError(f"got a loss that returns {_shown(out)}, {expected}; return (value, (active, {{}})).")
        value, measured = jnp.asarray(out[0]), cls(*out[1])
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"got a loss whose value is {_shown(value)}, {expected}; take its mean over the batch.")
        if jnp.shape(measured.active) != (m,):
            raise TypeError(f"got a loss whose active is {_shown(measured.active)}, {expected}; return one per latent.")
        if not isinstance(measured.metrics, dict):
            raise TypeError(
                f"got a loss whose metrics are {_shown(measured.metrics)}, {expected}; return {{}} for none."
            )
        return value, measured


def _shown(x: Any) -> str:
    """The type of a value in words, also when traced."""
    if isinstance(x, tuple):
        return f"({', '.join(map(_shown, x))})"
    return f"an array {x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else f"a {type(x).__name__}"


@pytrees.dataclass
class Objective:
    """The reconstruction error `mean_b ‖target − x̂‖²`, plus terms.

    To be computed in parts of a batch, `make_step(..., accumulate=8)`, each term must say how these add up: by
    `is_mean = True` in its class if it is a mean over rows; if it is a function of such a mean, by two methods,
    `rows(p) -> [b]` and `of_mean(mean, step)`, as `L0` has.

    Attributes:
      terms: the terms to add.
      idle_after: number of rows (tokens, in a language model) without firing after which a latent is idle, and trained
        by `AuxK`; Gao et al. (2024) train on thousands of times as many. `jaxsae train` uses a fiftieth of its rows.
      keep: schedule of the number of latents per row that `TopK` keeps; static.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> from jaxsae.train import objectives
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> objective = objectives.Objective((objectives.L1(0.1),))
      >>> state = jaxsae.train.init_state(sae, jaxsae.train.default_optimizer(1e-3))
      >>> value, measured = objective(sae, jnp.ones((2, 4)), state)
      >>> sorted(measured.metrics)
      ['l0', 'nmse']
    """

    terms: tuple[Any, ...] = ()
    idle_after: int | Array = 10_000_000
    keep: optax.Schedule | None = pytrees.static(default=None)

    def __post_init__(self):
        for term in self.terms if isinstance(self.terms, tuple) else ():  # JAX may put placeholders in their place
            if callable(term) and jax.tree_util.all_leaves([term]):
                name = getattr(term, "__name__", type(term).__name__)
                raise TypeError(
                    f"`Objective` got a term that is not a pytree, {name}; decorate a class that has "
                    "__call__(self, p) with @pytrees.dataclass, and pass an instance of it."
                )

    def __call__(self, sae: SAE, batch: Any, state: Any) -> tuple[Float[Array, ""], Aux]:
        """The loss of a batch: rows `x [b d]`, a transcoder's `[b d + d_out]`, or a pair `(x, target)`."""
        p, after = self._forward(sae, batch, state)
        value = losses.mse(p.target, p.x_hat) + sum(term(p) for term in self.terms)
        metrics = {"nmse": losses.nmse(p.target, p.x_hat), "l0": jnp.mean(_l0(p.code))}
        return value, Aux(_active(p.code), metrics, after)

    def _forward(self, sae: SAE, batch: Any, state: Any, encode_fn: Any = None) -> tuple[ForwardPass, Any]:
        """The forward pass, and what `encode_fn(sae, x)` returned besides the code; by default as `_code`."""
        x, target = _rows(sae, batch)
        if sae.normalisation is not None and sae.normalisation.per_row and self.terms:
            raise ValueError(
                "got an SAE that normalises each row, and terms, which do not support that; train without terms, or on "
                "rows normalised beforehand."
            )
        if self.keep is not None:
            topk: TopK = _require(isinstance(sae.activation, TopK), sae, "keep", "TopK")
            sae = dataclasses.replace(sae, activation=dataclasses.replace(topk, keep=self.keep(state.step)))
        code, after = (encode_fn or _code)(sae, x)
        idle = state.rows_since_fired >= self.idle_after
        return ForwardPass(sae, x, target, code, reconstruct(sae, x, code), idle, state.step), after


def _rows(sae: SAE, batch: Any) -> tuple[Array, Array]:
    pair = split_rows(sae, batch) if hasattr(batch, "shape") else batch if isinstance(batch, tuple | list) else (batch,)
    if len(pair) != 2 or not all(hasattr(x, "shape") for x in pair):
        got = f"{type(batch).__name__} of {len(pair)}"
        raise TypeError(f"got a batch that is a {got}; pass rows [b d], or a pair of input and target.")
    x, target = pair
    return x, target


def _code(sae: SAE, x) -> tuple[SparseCode | Array, Activation | None]:
    if sae.activation.slots is not None:
        return encode(sae, x), None
    if sae.activation.encoder_free:
        return encode_dense(sae, x), None
    z, after = sae.activation.train(pre_activations(sae, x))
    return z, None if after is sae.activation else after


def _l0(code) -> Array:
    l0 = code.l0 if isinstance(code, SparseCode) else jnp.sum(code != 0, axis=-1)
    return l0.astype(jnp.float32)


def _active(code) -> Array:
    if not isinstance(code, SparseCode):
        return (code != 0).any(0)
    return codes.sum_by_latent(dataclasses.replace(code, values=(code.values != 0).astype(jnp.float32))) > 0


def _dense(code) -> Array:
    return code.dense() if isinstance(code, SparseCode) else code


def _without_skip(p: ForwardPass) -> Array:
    """The target less the skip connection's output."""
    return p.target if p.sae.W_skip is None else p.target - p.x @ p.sae.W_skip


def _require(fits: bool, sae: SAE, what: str, name: str) -> Any:
    """The activation of an SAE; raise unless the term supports it."""
    if not fits:
        raise TypeError(f"`{what}` got an SAE of {type(sae.activation).__name__}; it is for {name}: leave it out.")
    return sae.activation


def _require_count(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{what} {value}; pass a whole number of at least 1.")


class _Weighted:
    """A term with a weight: a finite number, or an array, which may be traced."""

    weight: Any
    schedule: optax.Schedule | None = None

    def __post_init__(self):
        if isinstance(self.weight, int | float) and not math.isfinite(self.weight):
            raise ValueError(f"`{type(self).__name__}` got weight {self.weight}; pass a finite number.")

    def _at(self, step) -> Array:
        return jnp.asarray(self.weight if self.schedule is None else self.weight * self.schedule(step))


@pytrees.dataclass
class L1(_Weighted):
    """Decoder-norm weighted L1 penalty, `losses.l1`.

    Attributes:
      weight: weight of the penalty.
      schedule: factor of the weight by step, for example `optax.linear_schedule(0, 1, 1000)`; static.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(2), jnp.zeros(2), jnp.eye(2), jnp.zeros(2), jaxsae.ReLU())
      >>> x = jnp.array([[1.0, 2.0]])
      >>> p = ForwardPass(sae, x, x, code=x, x_hat=x, idle=jnp.zeros(2, bool), step=jnp.int32(0))
      >>> round(float(L1(0.1)(p)), 5)
      0.3

    Source: Conerly et al. (2024), "Update on how we train SAEs".
    """

    weight: float | Array
    schedule: optax.Schedule | None = pytrees.static(default=None)
    is_mean = True

    def __call__(self, p: ForwardPass) -> Array:
        """The term."""
        return self._at(p.step) * losses.l1(_dense(p.code), p.sae.W_dec)


@pytrees.dataclass
class L0(_Weighted):
    """Hold `JumpReLU`'s L0 at a target, `losses.l0_target`.

    Attributes:
      weight: weight of the term.
      target: mean number of active latents per row, above 0.
      schedule: factor of the weight by step; static.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(2), jnp.zeros(2), jnp.eye(2), jnp.zeros(2), jaxsae.JumpReLU(jnp.zeros(2)))
      >>> x = jnp.array([[1.0, 2.0]])
      >>> p = ForwardPass(sae, x, x, code=x, x_hat=x, idle=jnp.zeros(2, bool), step=jnp.int32(0))
      >>> round(float(L0(1.0, target=1.0)(p)), 5)
      1.0

    Source: Rajamanoharan et al. (2024), "Jumping ahead: improving reconstruction fidelity with JumpReLU SAEs".
    """

    weight: float | Array
    target: float | Array
    schedule: optax.Schedule | None = pytrees.static(default=None)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.target, int | float) and not self.target > 0:
            raise ValueError(f"`L0` got target {self.target}; pass a number of latents above 0.")

    def __call__(self, p: ForwardPass) -> Array:
        """The term."""
        return self.of_mean(jnp.mean(self.rows(p)), p.step)

    def rows(self, p: ForwardPass) -> Float[Array, " b"]:
        """`‖z‖₀` of each row."""
        jumprelu = _require(hasattr(p.sae.activation, "l0"), p.sae, "L0", "JumpReLU")
        return widen(jumprelu.l0(pre_activations(p.sae, p.x)))

    def of_mean(self, mean: Float[Array, ""], step: Int[Array, ""]) -> Float[Array, ""]:
        """The term, given the mean of `rows` over the batch."""
        return self._at(step) * losses.l0_target(mean[None], self.target)


@pytrees.dataclass
class Gate(_Weighted):
    """Train `Gated`'s gate: an L1 penalty on the gate alone, plus `losses.gate`.

    Attributes:
      weight: weight of the penalty.
      schedule: factor of the weight by step; static.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(2), jnp.zeros(2), jnp.eye(2), jnp.zeros(2), jaxsae.Gated(*jnp.zeros((3, 2))))
      >>> x = jnp.array([[1.0, 2.0]])
      >>> p = ForwardPass(sae, x, x, code=x, x_hat=x, idle=jnp.zeros(2, bool), step=jnp.int32(0))
      >>> round(float(Gate(0.1)(p)), 5)
      0.3

    Source: Rajamanoharan et al. (2024), "Improving dictionary learning with gated sparse autoencoders", Section 3.2.
    """

    weight: float | Array
    schedule: optax.Schedule | None = pytrees.static(default=None)
    is_mean = True

    def __call__(self, p: ForwardPass) -> Array:
        """The term."""
        activation = _require(hasattr(p.sae.activation, "gate"), p.sae, "Gate", "Gated")
        gated = activation.gate(pre_activations(p.sae, p.x))
        penalty = losses.l1(jax.nn.relu(gated), p.sae.W_dec)
        return self._at(p.step) * penalty + losses.gate(p.sae, _without_skip(p), gated)


@pytrees.dataclass
class AuxK(_Weighted):
    """Let idle latents reconstruct the residual, `losses.auxk`.

    Attributes:
      k_aux: number of idle latents to use per row, a power of two near `d/2`; static.
      weight: weight of the term.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(2), jnp.zeros(2), jnp.eye(2), jnp.zeros(2), jaxsae.ReLU())
      >>> x = jnp.array([[1.0, 2.0]])
      >>> p = ForwardPass(sae, x, x, code=x, x_hat=jnp.ones((1, 2)), idle=jnp.array([False, True]), step=jnp.int32(0))
      >>> round(float(AuxK(k_aux=1)(p)), 5)
      0.03125

    Source: Gao et al. (2024), Appendix A.2.
    """

    k_aux: int = pytrees.static()
    weight: float | Array = 1 / 32
    is_mean = True

    def __post_init__(self):
        super().__post_init__()
        _require_count("`AuxK` got k_aux", self.k_aux)

    def __call__(self, p: ForwardPass) -> Array:
        """The term."""
        return self.weight * losses.auxk(p.sae, p.x, p.target - p.x_hat, p.idle, k_aux=self.k_aux)


@pytrees.dataclass
class MultiTopK(_Weighted):
    """Add the error of `TopK` with `factor · k` latents, so that it works at other sparsities: `L(k) + L(4k)/8`.

    Attributes:
      factor: multiple of `k`; static.
      weight: weight of the term.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(2), jnp.zeros(2), jnp.eye(2), jnp.zeros(2), jaxsae.TopK(1))
      >>> x = jnp.array([[1.0, 2.0]])
      >>> p = ForwardPass(sae, x, x, code=x, x_hat=jnp.array([[0.0, 2.0]]), idle=jnp.zeros(2, bool), step=jnp.int32(0))
      >>> round(float(MultiTopK()(p)), 5)
      0.0

    Source: Gao et al. (2024), Section 5.2 and Appendix A.
    """

    factor: int = pytrees.static(default=4)
    weight: float | Array = 1 / 8
    is_mean = True

    def __post_init__(self):
        super().__post_init__()
        _require_count("`MultiTopK` got factor", self.factor)

    def __call__(self, p: ForwardPass) -> Array:
        """The term."""
        topk = _require(isinstance(p.sae.activation, TopK), p.sae, "MultiTopK", "TopK")
        keep = None if topk.keep is None else self.factor * jnp.floor(topk.keep)
        sae = dataclasses.replace(p.sae, activation=TopK(min(self.factor * topk.k, p.sae.m), keep))
        return self.weight * losses.mse(p.target, reconstruct(sae, p.x, encode(sae, p.x)))


@pytrees.dataclass
class Matryoshka:
    """Add the errors of reconstruction from only the first latents, `losses.matryoshka`.

    Attributes:
      prefixes: numbers of latents, each less than `m`; static.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(2), jnp.zeros(2), jnp.eye(2), jnp.zeros(2), jaxsae.ReLU())
      >>> x = jnp.array([[1.0, 2.0]])
      >>> p = ForwardPass(sae, x, x, code=x, x_hat=x, idle=jnp.zeros(2, bool), step=jnp.int32(0))
      >>> round(float(Matryoshka(prefixes=(1,))(p)), 5)
      4.0

    Source: Bussmann et al. (2025), "Learning multi-level features with matryoshka sparse autoencoders".
    """

    prefixes: tuple[int, ...] = pytrees.static()
    is_mean = True

    def __post_init__(self):
        for prefix in self.prefixes:
            _require_count("`Matryoshka` got a prefix of", prefix)

    def __call__(self, p: ForwardPass) -> Array:
        """The term."""
        if max(self.prefixes, default=0) >= p.sae.m:
            raise ValueError(f"`Matryoshka` got prefixes {self.prefixes} for {p.sae.m} latents; pass smaller ones.")
        return losses.matryoshka(p.sae, _without_skip(p), p.code, self.prefixes)
