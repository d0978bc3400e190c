"""The `jaxsae` command: its subcommands, the checks of their arguments, and its exit codes."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Union

from jaxsae._core import arguments
from jaxsae._core.files import InputError
from jaxsae.app import allocator, compilation_cache, config, console
from jaxsae.app.commands import autoencoders, features, pictures, plans, steering, studies, texts, training

_NEEDS = "the command line needs the extra 'study'; pip install 'jaxsae[study]'."
_ABOUT = """Sparse autoencoders in JAX, and the refinement of their codes with a certificate per row.

For the options of a command and an example, see `jaxsae COMMAND --help`. With --json a command prints one JSON object
and nothing else to stdout; NaN becomes null. Progress and warnings go to stderr.

Exit codes: 0 done; 1 done, but a row is not certified, a plan does not fit,
or --strict met a warning; 2 bad input; 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    if os.environ.get("NO_COLOR"):
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")  # read when tyro is imported
    try:
        import tyro
    except ImportError:
        console.fail(_NEEDS)
        return 2
    as_command = argv is None  # not from a process with its own settings
    try:
        argv = config.expanded(sys.argv[1:] if argv is None else argv, COMMANDS)
    except InputError as error:
        console.fail(str(error))
        return 2
    if as_command:
        # Processes that work together must not load different programs: they would wait for each other.
        if not any(word.startswith("--distributed") for word in argv):
            compilation_cache.keep()
        if argv[:1] in (["train"], ["study"]):
            allocator.keep_freed()
    asked = argv[0] if argv else ""
    try:
        return tyro.cli(
            _commands(asked),
            prog="jaxsae",
            description=f"{_ABOUT}\n\n{_kept()}" if asked in ("-h", "--help") else _ABOUT,
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except InputError as error:
        console.fail(str(error))
        return 2
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        console.fail(f"{what}; no partial file was left.")
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # XLA's out-of-memory error
            raise
        console.fail("out of memory; use fewer latents, a smaller batch, or less data.")
        return 2
    except KeyboardInterrupt:
        console.fail("interrupted; finished results are kept.")
        return 130


def _commands(asked: str) -> Any:
    """The subcommands for tyro: the requested one with its whole docstring, the others with its first line."""
    import tyro

    each = []
    for name, command in COMMANDS.items():
        first = (command.__doc__ or "").partition("\n")[0]
        constructor = _checked(command)
        settings = tyro.conf.subcommand(name, constructor=constructor, description=None if name == asked else first)
        each.append(Annotated[Any, settings])
    return Union[tuple(each)]  # noqa: UP007


def _checked(command: Callable[..., int]) -> Callable[..., int]:
    """A command that validates its arguments before it begins."""
    parameters = inspect.signature(command).parameters

    def name(parameter: str) -> str:
        named = parameters[parameter].kind is inspect.Parameter.KEYWORD_ONLY
        return config.flag(parameter) if named else parameter.upper()

    @functools.wraps(command)
    def checked(*args: Any, **kwargs: Any) -> int:
        arguments.check(command, inspect.signature(command).bind(*args, **kwargs).arguments, name)
        return command(*args, **kwargs)

    return _with_flags(checked)


def _with_flags(command: Callable[..., int]) -> Callable[..., int]:
    """A command whose parameters that end with `_`, since Python keeps the word to itself, have flags without it."""
    import tyro

    signature = inspect.signature(command, eval_str=True)
    renamed = {
        name: each.replace(annotation=Annotated[each.annotation, tyro.conf.arg(name=name.rstrip("_"))])
        for name, each in signature.parameters.items()
        if name.endswith("_")
    }
    if renamed:
        changed = (signature.parameters | renamed).values()
        command.__signature__ = signature.replace(parameters=list(changed))  # pyright: ignore[reportFunctionMemberAccess]
        del command.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]  whose annotations tyro would read
        command.__annotations__ = {name: each.annotation for name, each in (signature.parameters | renamed).items()}
        command.__annotations__["return"] = int
    return command


def _kept() -> str:
    """Where the compilation cache is."""
    folder = compilation_cache.kept()
    if folder is None:
        return "Compiled programs are not kept."
    return (
        f"Compiled programs are kept in {folder} ({compilation_cache.size(folder) / 2**20:.1f} MiB); "
        "JAX_COMPILATION_CACHE_DIR sets another directory, JAX_ENABLE_COMPILATION_CACHE=0 disables this."
    )


# In the order of typical use.
COMMANDS = {
    "study": studies.study,
    "fetch": texts.fetch,
    "harvest": texts.harvest,
    "train": training.train,
    "eval": autoencoders.evaluate,
    "refine": autoencoders.refine,
    "steer": steering.steer,
    "features": features.features,
    "report": studies.report,
    "info": autoencoders.info,
    "convert": autoencoders.convert,
    "push": autoencoders.push,
    "plan": plans.plan,
    "denoise": pictures.denoise,
    "inpaint": pictures.inpaint,
}
