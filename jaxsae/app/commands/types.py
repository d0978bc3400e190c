"""Types of options that several commands have."""

from pathlib import Path
from typing import Annotated

from jaxsae._core import arguments

Autoencoder = Annotated[str, arguments.Input(scheme="hf")]
Model = Annotated[str, arguments.Input()]
OutputPlace = Annotated[Path, arguments.Output((Path.is_file, Path.is_dir))]
Revision = Annotated[str, arguments.Text(r"\S+", "a branch, a tag or a commit")]
Context = Annotated[int, arguments.Range(2, 2**31 - 1)]
Ways = Annotated[int, arguments.Range(1, 2**16)]
FORMAT = arguments.Choice(
    ("jaxsae", "saelens", "gemma_scope", "gemma_scope_2", "sparsify", "dictionary_learning", "openai", "llama_scope")
)
