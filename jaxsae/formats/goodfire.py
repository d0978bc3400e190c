"""Goodfire: one `.pt` or `.pth`, a torch pickle of two linear layers."""

from pathlib import Path

from jaxsae.autoencoder.activations import ReLU
from jaxsae.autoencoder.sae import SAE
from jaxsae.formats import common
from jaxsae.formats.common import Raw, Tensors, Weights


def _found(path: Path) -> Path | None:
    return common.find_torch(path)


def detect(path: Path) -> bool:
    """A torch pickle with `encoder_linear` and `decoder_linear`."""
    file = _found(path)
    names = set() if file is None else common.read_state(file, check=False)[0].keys()
    return {"encoder_linear.weight", "decoder_linear.weight"} <= names


def read(path: Path) -> Raw:
    """The file."""
    file = common.require(path, _found(path), "one .pt or .pth of Goodfire's")
    arrays, rest = common.read_state(file, check=True)
    return Raw(file, rest, Tensors(arrays))


def convert(raw: Raw) -> SAE:
    """ReLU; the decoder's bias is not subtracted from the rows."""
    if raw.config:
        raise raw.error(f"holds {', '.join(raw.config)}, expected two linear layers only", "save its state dict")
    encoder, decoder = (
        (raw.take(f"{part}_linear.weight").T, raw.take(f"{part}_linear.bias")) for part in ("encoder", "decoder")
    )
    return common.assemble(raw, ReLU(), Weights(*encoder, *decoder), apply_b_dec_to_input=False)
