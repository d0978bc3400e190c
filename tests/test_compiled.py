"""Compiled programs on disk: kept, found again, and done without where that fails."""

import warnings

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as of_jax

from jaxsae.app import compilation_cache

OPTIONS = (
    *("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_compilation_cache_max_size"),
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where a command would keep them; JAX's settings are put back."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setenv("JAXSAE_CACHE", str(tmp_path / "cache"))
    of_jax.reset_cache()
    with warnings.catch_warnings():
        yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    of_jax.reset_cache()


def compute():
    """A program, compiled, or read, as by a new process."""
    jax.clear_caches()
    of_jax.reset_cache()
    assert jax.jit(lambda x: 3 * x + 1)(2.0) == 7.0


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
    compilation_cache.keep()
    compute()
    folder = compilation_cache.kept()
    assert folder is not None
    for file in folder.glob("*-cache"):
        file.write_bytes(b"garbage")
    compute()  # a warning would be an error


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
    compute()


def test_the_users_own_settings_win(cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    compilation_cache.keep()
    assert compilation_cache.kept() == tmp_path / "theirs"
    assert not cache.exists()
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.keep()
    assert compilation_cache.kept() is None
