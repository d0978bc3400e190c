"""What every reader of language models returns: an architecture as data, and arrays by the names of our parameters."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from jaxsae._core import arguments
from jaxsae._core.files import InputError

SITES = arguments.SITE.names  # see `sites`


class Config(NamedTuple):
    """A decoder-only transformer: its sizes, and by what its blocks differ from a llama's.

    A family of models is a function from its own configuration to this.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int  # of the MLP
    context: int  # maximum number of tokens
    eps: float  # of the norms
    tied: bool  # the head is the embedding
    rope: tuple[float, ...] | None  # radians per position, for each rotated pair of a head; None: learned positions
    dtype: np.dtype = np.dtype("float32")  # of the weights, except those of norms, which are float32
    family: str = "llama"  # the `model_type` of transformers
    norm: Literal["rms", "layer"] = "rms"
    norms: Literal["before", "after", "around"] = "before"  # where they are, of attention and of the MLP
    qk_norm: Literal["head", "all"] | None = None  # of queries and keys: of each head, or of all heads together
    parallel: bool = False  # attention and MLP read the same residual
    gated: bool = True  # the MLP
    activation: str = "silu"  # of the MLP, in `blocks.ACTIVATIONS`
    biases: tuple[str, ...] = ()  # the maps that have one, of q, k, v, o, gate, up and down
    scale: float | None = None  # of attention's logits; 1/√head_width by default
    attention_cap: float | None = None  # attention's logits `x` become `cap · tanh(x / cap)`
    logits_cap: float | None = None  # likewise the model's
    embedding_scale: float = 1.0
    windows: tuple[int | None, ...] = ()  # by layer, how many tokens it attends to; () if each attends to all
    local_rope: tuple[float, ...] | None = None  # in layers with a window; `rope` by default


Arrays = dict[str, np.ndarray]  # by the names of `LanguageModel`'s parameters; those of blocks are stacked


def _import(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise InputError(f"language models need {name}, which is missing; pip install 'jaxsae[lm]'.") from error


def _stack(names: dict[str, str], config: Config, get: Callable[[str, str], np.ndarray], dtype) -> Arrays:
    """Arrays by parameter, as `get(parameter, name in the file)` reads them; those of blocks are stacked."""

    def one(parameter: str, pattern: str) -> np.ndarray:
        kept = np.float32 if "norm" in parameter else dtype
        if not parameter.startswith("blocks."):
            return get(parameter, pattern).astype(kept, copy=False)
        return np.stack([get(parameter, pattern.format(i)).astype(kept, copy=False) for i in range(config.layers)])

    return {parameter: one(parameter, pattern) for parameter, pattern in names.items()}


def _has(config: Config, parameter: str) -> bool:
    """Whether a model has a parameter that some of its family have."""
    part, _, kind = parameter.removeprefix("blocks.").partition(".")
    if kind != "bias":
        return parameter != "head.kernel" or not config.tied
    return config.norm == "layer" if "norm" in part else part in config.biases
