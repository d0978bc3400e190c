"""Qwen-Scope: `layer{n}.sae.pt`, a torch pickle of four arrays, in a directory whose name says `k`."""

import re
from pathlib import Path

from jaxsae._core.files import InputError
from jaxsae.autoencoder.activations import TopK
from jaxsae.autoencoder.sae import SAE
from jaxsae.formats import common
from jaxsae.formats.common import Raw, Tensors, Weights

_ARRAYS = {"W_enc", "W_dec", "b_enc", "b_dec"}
_K = re.compile(r".*-L0_(\d+)")  # of a repository, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50


def _found(path: Path) -> Path | None:
    return common.find_torch(path)


def detect(path: Path) -> bool:
    """A torch pickle of `W_enc [m d]`, `W_dec [d m]` and two biases, and of nothing else."""
    file = _found(path)
    if file is None:
        return False
    arrays, rest = common.read_state(file, check=False)
    return not rest and arrays.keys() == _ARRAYS and arrays["W_enc"].shape[:1] == arrays["b_enc"].shape


def read(path: Path) -> Raw:
    """The file, and `k` of the nearest directory above whose name has one."""
    file = common.require(path, _found(path), "layer0.sae.pt of Qwen-Scope")
    arrays, _ = common.read_state(file, check=True)
    named = next(filter(None, (_K.fullmatch(folder.name) for folder in file.absolute().parents)), None)
    if named is None:
        what = "its k is in no file, but in the name of its directory, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
        raise InputError(f"{file}: {what}; keep it in one of that name.")
    return Raw(file, {"k": int(named[1])}, Tensors(arrays))


def convert(raw: Raw) -> SAE:
    """TopK; the decoder's bias is not subtracted from the rows."""
    names = ("b_enc", "W_dec", "b_dec")
    b_enc, W_dec, b_dec = (raw.take(name) for name in names)
    weights = Weights(raw.take("W_enc").T, b_enc, W_dec.T, b_dec)
    return common.assemble(raw, TopK(raw.integer(raw.config["k"], "k")), weights, apply_b_dec_to_input=False)
