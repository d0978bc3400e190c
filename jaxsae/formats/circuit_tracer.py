"""Transcoder sets of circuit-tracer: `layer_{n}.safetensors`, and `config.yaml`, which names their hooks.

A set has a file for each layer; each is a transcoder.
"""

from pathlib import Path
from typing import Any

from jaxsae._core.files import InputError, in_one_line
from jaxsae.autoencoder.activations import JumpReLU, ReLU
from jaxsae.autoencoder.sae import SAE
from jaxsae.formats import common
from jaxsae.formats.common import Raw, Tensors, Weights
from jaxsae.formats.tensors import read_safetensors

_THRESHOLD = "activation_function.threshold"
_ARRAYS = {"W_enc", "W_dec", "b_enc", "b_dec"}
_CONFIG = "config.yaml"


def _found(path: Path) -> Path | None:
    file = common.find_file(path, (), ".safetensors")
    return file if file is not None and file.name.startswith("layer_") else None


def detect(path: Path) -> bool:
    """`layer_{n}.safetensors` with `W_enc` and `W_dec` of one shape, `[m d]`."""
    if path.is_dir() and len(list(path.glob("layer_*.safetensors"))) > 1:
        raise InputError(f"{path}: holds a transcoder for each of several layers; pass the file of one.")
    file = _found(path)
    if file is None or not common.array_names(file) >= _ARRAYS:
        return False
    arrays = read_safetensors(file)
    return arrays["W_enc"].shape == arrays["W_dec"].shape


def read(path: Path) -> Raw:
    """The file of a layer, and the set's configuration, if it has one."""
    file = common.require(path, _found(path), "layer_0.safetensors of a transcoder set")
    return Raw(file, _config(file), Tensors(read_safetensors(file)))


def _config(file: Path) -> dict[str, Any]:
    path = file.with_name(_CONFIG)
    if not path.is_file():
        return {}
    try:
        import yaml
    except ImportError as error:
        raise InputError(f"{path}: needs pyyaml, which is missing; pip install 'jaxsae[hub]'.") from error
    with in_one_line(f"{path}: is damaged", "get the file again"):
        return dict(yaml.safe_load(path.read_text()))


def convert(raw: Raw) -> SAE:
    """ReLU, or JumpReLU if there are thresholds; the decoder's bias is not subtracted from the rows."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    W_enc, b_enc, W_dec, b_dec = (raw.take(name) for name in names)
    if W_enc.shape[:1] != b_enc.shape or W_enc.shape[0] == W_enc.shape[1]:
        raise raw.error(f"W_enc has shape {W_enc.shape} for {b_enc.size} latents", "jaxsae cannot tell its axes apart")
    W_skip = raw.take("W_skip").T if "W_skip" in raw.arrays else None
    activation = ReLU()
    # circuit-tracer's TopK keeps negative values where fewer are positive, which ours does not.
    kind = raw.choice("activation", raw.config.get("activation"), [None, "relu", "jump_relu", "jumprelu"])
    if _THRESHOLD in raw.arrays and kind != "relu":
        activation = JumpReLU(raw.place_threshold(raw.take(_THRESHOLD)))
        if (activation.threshold < 0).any():
            raise raw.error("has negative thresholds, and keeps negative values", "jaxsae cannot compute it")
    elif kind not in (None, "relu"):
        raise raw.error(f"has no {_THRESHOLD}, as activation {kind!r} requires")
    weights = Weights(W_enc.T, b_enc, W_dec, b_dec, W_skip)
    return common.assemble(raw, activation, weights, apply_b_dec_to_input=False, transcoder=True)
