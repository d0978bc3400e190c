"""What every reader of language models gives: the sizes, and the arrays by the names of our modules."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxsae._core.files import InputError


class Config(NamedTuple):
    """Sizes of a decoder-only transformer."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int  # of the MLP
    context: int  # most tokens in a row
    eps: float  # of the norms
    tied: bool  # the head is the embedding
    rope: tuple[float, ...] | None  # radians a position, for each pair of a head; None where positions are learned
    dtype: np.dtype = np.dtype("float32")  # of the weights
    family: str = "llama"  # in `models.BLOCKS`


Arrays = dict[str, np.ndarray]  # by the names of `LanguageModel`'s parameters; those of blocks are stacked


def _import(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise InputError(f"language models need {name}, which is missing; pip install 'jaxsae[lm]'.") from error


def _stack(names: dict[str, str], layers: int, get: Callable[[str, str], np.ndarray], dtype) -> Arrays:
    """Arrays by parameter: `get(parameter, name in the file)` of each, those of blocks stacked."""

    def one(parameter, pattern):
        if not parameter.startswith("blocks."):
            return get(parameter, pattern).astype(dtype, copy=False)
        return np.stack([get(parameter, pattern.format(i)).astype(dtype, copy=False) for i in range(layers)])

    return {parameter: one(parameter, pattern) for parameter, pattern in names.items()}
