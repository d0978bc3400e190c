"""Follow-up errors of orbax: if one file cannot be read or written, it abandons the others, which fail uncaught."""

import contextlib
import gc
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

# Coroutines that are never awaited once an earlier file could not be read or written.
_UNBEGUN = r"coroutine '\S*(_read_array_index_and_device_put|write_fragment)' was never awaited"
_ECHOES = f"Event loop is closed|Encountered error while reading array index|in OCDBT database at|{_UNBEGUN}"


@contextlib.contextmanager
def suppressed() -> Iterator[None]:
    """Suppress follow-up errors: if one file fails, orbax abandons the others, which then raise uncaught.

    They do so when coroutines and asyncio's futures are freed, as by `free`, and when threads of TensorStore end. So
    after a failure the hook, which suppresses nothing else, stays installed.
    """
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
    ours = hook if isinstance(hook, _WithoutEchoes) else _WithoutEchoes(hook)

    def no_echo(record: logging.LogRecord) -> bool:
        return not (record.exc_info and _is_echo(record.exc_info[1]))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _UNBEGUN, RuntimeWarning)
        sys.unraisablehook = ours
        logger.addFilter(no_echo)
        try:
            yield
        finally:
            logger.removeFilter(no_echo)
            if not ours.stays:
                sys.unraisablehook = hook


class _WithoutEchoes:
    def __init__(self, hook: Callable[[Any], Any]):
        self._hook, self.stays = hook, False

    def __call__(self, unraisable: Any) -> None:
        if not _is_echo(unraisable.exc_value):
            self._hook(unraisable)


def free(error: BaseException | None) -> None:
    """Clear the frames kept alive by an error from orbax and by its context."""
    if isinstance(sys.unraisablehook, _WithoutEchoes):
        sys.unraisablehook.stays = True
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()


def _is_echo(error: object) -> bool:
    return re.search(_ECHOES, str(error)) is not None
