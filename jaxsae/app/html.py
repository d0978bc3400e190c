"""Self-contained HTML: tables, figures and a page around them, legible in light and dark, with all text escaped."""

import base64
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxsae.app.summary import FAMILIES

# Colours in light and dark, by name: backgrounds, text, lines, warnings, values of codes, and one for each family.
_COLOURS = {
    "paper": ("#ffffff", "#14171b"),
    "wash": ("#f5f6f8", "#1d2127"),
    "ink": ("#1c2026", "#e7eaee"),
    "soft": ("#59616e", "#a1a9b5"),
    "rule": ("#dfe3e8", "#30363e"),
    "bad": ("#b3261e", "#ff8f85"),
    "other": ("#555b66", "#aab1bc"),
    "encoder": ("#4b98e4", "#2a68ab"),  # as a ground below ink, or as a bar on paper
    "refined": ("#b84300", "#ffa657"),
} | {family: colours for family, (_, *colours) in FAMILIES.items()}
LIGHT, DARK = ({name: colours[side] for name, colours in _COLOURS.items()} for side in (0, 1))


def form(value: Any, how: str) -> str:
    """A number as text, with a true minus sign; a dash if it is missing.

    Args:
      value: a number, or None.
      how: as for `format`; `g%` at the end is a percentage with as many digits as it needs.

    Example:
      >>> form(-0.25, "+.0%"), form(1, ".4g%"), form(None, ".1f")
      ('−25%', '100%', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{100 * value:{how[:-1]}}%" if how.endswith("g%") else f"{value:{how}}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def colour(family: str) -> str:
    """The CSS class with the colour of a family."""
    return f"c-{family}" if family in FAMILIES else "c-other"


def label(family: str) -> str:
    """The displayed name of a family."""
    return FAMILIES[family][0] if family in FAMILIES else family


def note(text: str) -> str:
    """A paragraph of explanation."""
    return f'<p class="note">{escape(text)}</p>'


def legend(families: Iterable[str]) -> str:
    """Families beside their colours."""
    items = "".join(f'<li class="{colour(family)}">{escape(label(family))}</li>' for family in families)
    return f'<ul class="legend">{items}</ul>'


def figure(drawn: str, name: str = "", note: str = "") -> str:
    """A chart of `svg`, below its name and a note."""
    caption = f"<strong>{escape(name)}</strong> " if name else ""
    caption += f"<span>{escape(note)}</span>" if note else ""
    return f"<figure>{f'<figcaption>{caption}</figcaption>' if caption else ''}{drawn}</figure>"


def grid(figures: Iterable[str], size: str = "wide") -> str:
    """Figures side by side, as many as fit; `size` is wide or small."""
    text = "".join(figures)
    return f'<div class="{size}-grid">{text}</div>' if text else ""


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], groups: Sequence[tuple[str, int]] = ()
) -> str:
    """A table whose first column names its rows; it scrolls if it is wider than the window.

    Args:
      caption: above it.
      head: names of the columns.
      rows: cells.
      groups: names, and how many columns each spans, from the left.
    """
    over = "".join(
        f'<th scope="colgroup" colspan="{span}">{escape(name)}</th>' if name else f'<td colspan="{span}"></td>'
        for name, span in groups
    )
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    top = f'<tr class="groups">{over}</tr>' if groups else ""
    inner = f"<caption>{escape(caption)}</caption><thead>{top}<tr>{names}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>{inner}</table></div>'


def pairs(caption: str, values: dict[str, Any] | None) -> str:
    """A table of names and values; values that are not text are shown as JSON."""
    cells = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in (values or {}).items()]
    return f'<div class="pairs">{table(caption, ["name", "value"], cells)}</div>' if cells else ""


def document(
    title: str,
    subtitle: str,
    facts: dict[str, str],
    warnings: Sequence[str],
    sections: dict[str, str],
    *,
    style: str = "",
    script: str = "",
    data: str = "",
) -> str:
    """A whole page, whose policy forbids the network, and any script but its own.

    Args:
      title: not escaped, like the names of facts and sections.
      subtitle: what it is about.
      facts: headline numbers, by name; those that are a dash are left out.
      warnings: what the reader must know.
      sections: HTML by name; those that are empty are left out.
      style: more of it.
      script: of the page; it may load scripts from files beside the page.
      data: elements for the script, at the end.
    """
    shown = [(name, "-".join(name.lower().replace(",", "").split()), text) for name, text in sections.items() if text]
    links = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for name, anchor, _ in shown)
    tiles = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in facts.items() if text != "–")
    notes = "".join(f'<p class="warning" role="note">{escape(text)}</p>' for text in warnings)
    body = "".join(
        f'<section id="{anchor}" aria-labelledby="h-{anchor}"><h2 id="h-{anchor}">{name}</h2>{text}</section>\n'
        for name, anchor, text in shown
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">
<title>{escape(f"{title}: {subtitle}")}</title>
<style>
{_style()}{style}</style>
</head>
<body>
<header><h1>{title}</h1><p>{escape(subtitle)}</p></header>
<main>
{notes}{f'<dl class="facts">{tiles}</dl>' if tiles else ""}
<nav aria-label="Contents"><ul>{links}</ul></nav>
{body}</main>
<footer><p>Made by <code>jaxsae report</code>.</p></footer>
{data}{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def _policy(script: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    if not script:
        return policy
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"{policy}; script-src 'self' file: 'sha256-{digest}'"  # a page on disk may have no 'self'


@functools.cache
def _style() -> str:
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in side.items()) for side in (LIGHT, DARK))
    scheme = f":root{{color-scheme:light dark;{light}}}\n@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    families = "".join(f".c-{name}{{--c:var(--{name})}}\n" for name in (*FAMILIES, "other"))
    return scheme + families + (Path(__file__).parent / "html.css").read_text()
