"""Compiled programs on disk: kept, found again, and done without where that fails."""

import os
import subprocess
import sys
import warnings

import pytest

from jaxsae.app import compilation_cache

OURS = ("COMPILATION_CACHE_DIR", "ENABLE_COMPILATION_CACHE", "COMPILATION_CACHE_MAX_SIZE")
OURS += ("PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where a command would keep them; the environment is put back."""
    for name in OURS:
        monkeypatch.setenv(f"JAX_{name}", "")  # so that it is put back
        monkeypatch.delenv(f"JAX_{name}")
    monkeypatch.setenv("JAXSAE_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        yield tmp_path / "cache"


def compute():
    """A program compiled, or read, by a new process: a warning is an error, but for those that `keep` leaves out."""
    script = """
import warnings
warnings.simplefilter("error")
from jaxsae.app import compilation_cache
compilation_cache.keep()
import jax
assert jax.jit(lambda x: 3 * x + 1)(2.0) == 7.0
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def names(folder):
    return {file.name for file in folder.glob("*-cache")}


def test_a_second_run_finds_what_the_first_compiled(cache):
    assert compilation_cache.kept() is None
    compilation_cache.keep()
    folder = compilation_cache.kept()
    assert folder is not None
    assert folder.parent == cache / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    compute()
    first = names(folder)
    assert first
    assert compilation_cache.size(folder) == sum(file.stat().st_size for file in folder.glob("*-cache")) > 0
    compute()
    assert names(folder) == first


def test_garbage_is_compiled_again_without_a_word(cache):
    compute()
    (folder,) = (cache / "compiled").iterdir()
    assert names(folder)
    for file in folder.glob("*-cache"):
        file.write_bytes(b"garbage")
    compute()


@pytest.mark.parametrize("broken", ["a file", "somebody else's"])
def test_a_place_that_cannot_be_had_is_done_without(broken, cache, monkeypatch):
    if broken == "a file":
        cache.write_text("")
    else:

        def forbidden(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("pathlib.Path.chmod", forbidden)
    compilation_cache.keep()
    assert compilation_cache.kept() is None
    if broken == "a file":
        compute()


def test_the_users_own_settings_win(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    compilation_cache.keep()
    assert compilation_cache.kept() == tmp_path / "theirs"
    assert not cache.exists()
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
    compilation_cache.keep()
    assert compilation_cache.kept() is None
