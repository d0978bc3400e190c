"""Language models in Hugging Face directories."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxsae._core.files import InputError
from jaxsae.language_model.config import Arrays, Config, _has, _stack
from jaxsae.language_model.download import _EXPECTED
from jaxsae.language_model.families import FAMILIES

# Masks and frequencies, which are computed instead; the head, where it is the embedding.
_WITHOUT_EFFECT = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)|lm_head\.weight")


def _directory_config(path: Path) -> Config:
    """Sizes, and the family: the `model_type` of its config.json."""
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: has no config.json; {_EXPECTED}.")
    options = json.loads((path / "config.json").read_text())
    kind = options.get("model_type")
    if kind not in FAMILIES:
        raise InputError(
            f"{path}: is of model type {kind!r}, expected one of: {', '.join(FAMILIES)}; pass one of those."
        )
    try:
        config = FAMILIES[kind].config(options, path)._replace(family=kind)
    except KeyError as error:
        raise InputError(f"{path}: its config.json has no {error}; save the model again.") from error
    return config


def _read_directory(path: Path, dtype) -> tuple[Config, Arrays]:
    config = _directory_config(path)
    family = FAMILIES[config.family]
    opened = _open_shards(path)
    files = {name.removeprefix(family.prefix): (file, name) for name, file in opened.items()}
    names = {ours: name for ours, name in family.names.items() if _has(config, ours)}
    unused = set(files)

    def get(parameter: str, name: str) -> np.ndarray:
        found = next((each for each in name.split("|") if each in files), None)
        if found is None:
            expected = ("" if parameter == "head.kernel" else family.prefix) + name.partition("|")[0]
            raise InputError(f"{path}: has no tensor {expected}; save the model again.")
        unused.discard(found)
        file, full = files[found]
        array = np.asarray(file.get_tensor(full))
        array = array.T if parameter.endswith(".kernel") and family.transposed else array
        if part := family.parts.get(parameter.split(".")[-2]):
            array = part(array, config)
        return array.astype(np.float32) + family.norm_offset if parameter.endswith("norm.scale") else array

    arrays = _stack(names, config, get, dtype)
    # Those of further blocks, for example.
    if unused := {files[name][1] for name in unused if not _WITHOUT_EFFECT.fullmatch(name)}:
        what = f"has tensors that a {config.family} of its config.json does not use: {min(unused)}"
        raise InputError(f"{path}: {what}; save it again.")
    return config, arrays


def _open_shards(path: Path) -> dict[str, Any]:
    """Open safetensors files, by the name of each tensor."""
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    if index.is_file():
        if (path / "model.safetensors").is_file():
            raise InputError(f"{path}: has model.safetensors and {index.name}; remove the outdated one.")
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    opened = {}
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise InputError(f"{path / name}: no such file; a model has model.safetensors, or the shards of its index.")
        file = safe_open(path / name, framework="flax")  # which supports bfloat16
        if twice := opened.keys() & set(file.keys()):
            raise InputError(f"{path}: has {min(twice)} in two of its files; get the files again.")
        opened |= dict.fromkeys(file.keys(), file)
    return opened
