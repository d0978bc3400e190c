"""SAEs on the Hugging Face hub, by address or by SAELens' names for them, in the hub's own cache."""

import os
from pathlib import Path


def fetch(path: str | os.PathLike, *, revision: str | None = None) -> Path:
    return Path(path)
