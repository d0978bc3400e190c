"""How the reference reads our docstrings: what mkdocstrings does not know of this library's habits."""

import re
from typing import Any

import griffe

_CONSTRUCTED = {"jaxsae._core.pytrees.dataclass", "typing.NamedTuple"}


class Habits(griffe.Extension):
    """`Example:` holds a session, as `Examples:` elsewhere; our dataclasses and named tuples have signatures."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        """Rename the section; a source is a paragraph, however its lines are indented."""
        if obj.docstring:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = re.sub(r"^Source: (.+(?:\n.+)*)", _paragraph, text, flags=re.MULTILINE)

    def on_class(self, *, cls: griffe.Class, **options: Any) -> None:
        """Make the constructor that the decorator, or the base, makes."""
        sources = [*(decorator.value for decorator in cls.decorators), *cls.bases]
        if "__init__" in cls.members or not _CONSTRUCTED & {
            getattr(source, "canonical_path", "") for source in sources
        }:
            return
        attributes = [member for member in cls.members.values() if member.is_attribute]
        fields = [member for member in attributes if member.annotation and "property" not in member.labels]
        parameters = [
            _parameter("self"),
            *(_parameter(field.name, field.annotation, _default(field)) for field in fields),
        ]
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=cls))


def _paragraph(source: re.Match) -> str:
    return f"**Source:** {' '.join(source[1].split())}"


def _parameter(name: str, annotation: Any = None, default: Any = None) -> griffe.Parameter:
    kind = griffe.ParameterKind.positional_or_keyword
    return griffe.Parameter(name, annotation=annotation, kind=kind, default=default)


def _default(field: griffe.Attribute) -> Any:
    """The default of `a: int = 1`, or of `a: int = pytrees.static(default=1)`."""
    ours = {f"jaxsae._core.pytrees.{name}" for name in ("static", "fixed", "sharded")}
    if not isinstance(field.value, griffe.ExprCall) or field.value.canonical_path not in ours:
        return field.value
    named = {getattr(argument, "name", None): argument for argument in field.value.arguments}
    return named["default"].value if "default" in named else None
