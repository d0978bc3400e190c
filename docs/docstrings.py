"""How the reference reads our docstrings: what mkdocstrings does not know of this library's habits."""

from typing import Any

import griffe

_CONSTRUCTED = {"flax.struct.dataclass", "typing.NamedTuple"}


class Habits(griffe.Extension):
    """`Example:` holds a session, as `Examples:` elsewhere; flax's dataclasses and named tuples have signatures."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        """Rename the section."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_class(self, *, cls: griffe.Class, **options: Any) -> None:
        """Make the constructor that the decorator, or the base, makes."""
        sources = [*(decorator.value for decorator in cls.decorators), *cls.bases]
        if "__init__" in cls.members or not _CONSTRUCTED & {
            getattr(source, "canonical_path", "") for source in sources
        }:
            return
        fields = [member for member in cls.members.values() if member.is_attribute and member.annotation]
        parameters = [
            _parameter("self"),
            *(_parameter(field.name, field.annotation, _default(field)) for field in fields),
        ]
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=cls))


def _parameter(name: str, annotation: Any = None, default: Any = None) -> griffe.Parameter:
    kind = griffe.ParameterKind.positional_or_keyword
    return griffe.Parameter(name, annotation=annotation, kind=kind, default=default)


def _default(field: griffe.Attribute) -> Any:
    """Of `a: int = 1`, or of `a: int = struct.field(pytree_node=False, default=1)`."""
    if not isinstance(field.value, griffe.ExprCall) or field.value.canonical_path != "flax.struct.field":
        return field.value
    named = {getattr(argument, "name", None): argument for argument in field.value.arguments}
    return named["default"].value if "default" in named else None
