"""The run-time checker that `conftest` puts on every annotated function of the library."""

import inspect
import typing

import beartype


def check(function):
    """`beartype`, except on the constructors of dataclasses.

    JAX rebuilds a pytree around whatever its leaves became: axes, specs, shapes, None, stacked members.
    Those are no violation of the annotations, which speak of one member's arrays.
    """
    if function.__name__ == "__init__":
        return function
    for parameter in inspect.signature(function).parameters.values():
        if getattr(parameter.annotation, "_is_protocol", False):
            typing.runtime_checkable(parameter.annotation)
    return beartype.beartype(function)
