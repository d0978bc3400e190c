"""The commands on files of autoencoders."""

from typing import Annotated

from jaxsae._core import arguments
from jaxsae.app import console
from jaxsae.app.commands.types import FORMAT, Autoencoder, OutputPlace, Revision


def convert(
    src: Autoencoder,
    dst: OutputPlace,
    /,
    *,
    to: Annotated[str, FORMAT],
    dtype: Annotated[str, arguments.Choice(("float32", "bfloat16", "float16", "float64"))] | None = None,
    revision: Revision | None = None,
    json: bool = False,
) -> int:
    """Write an SAE in the format of another library.

    Example: jaxsae convert run published --to saelens

    Args:
        src: a training run, or an SAE of any format, on disk or on the hub (hf://organisation/repository/path).
        dst: where to write; a directory, but a file for openai.
        to: jaxsae, saelens, gemma_scope, gemma_scope_2, sparsify, dictionary_learning, openai or llama_scope.
        dtype: of the weights, float32, bfloat16 or float16; as they are if left out.
        revision: branch, tag or commit, on the hub.
        json: print what was written as one JSON object.
    """
    from jaxsae.formats import pretrained

    pretrained.save(pretrained.load(src, dtype=dtype, revision=revision), dst, format=to)
    console.show({"out": dst, "format": to}, f"Written: {dst}, {to}", as_json=json)
    return 0


def info(path: Autoencoder, /, *, revision: Revision | None = None, json: bool = False) -> int:
    """Say what an SAE of any format computes.

    Its format, its sizes, and every convention that decides what it computes.

    Example: jaxsae info run

    Args:
        path: a training run, or an SAE of any format, on disk or on the hub (hf://organisation/repository/path).
        revision: branch, tag or commit, on the hub.
        json: print it as one JSON object.
    """
    from jaxsae.formats import pretrained

    said = pretrained.describe(path, revision=revision)
    console.show(said, "\n".join(f"{name:14}{value}" for name, value in said.items()), as_json=json)
    return 0
