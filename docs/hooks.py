"""What the site has beside the pages of `docs/`: notebooks as tutorials, what was measured, and typeset formulas."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

_ROOT = Path(__file__).parent.parent


def on_files(files, *, config):
    """Add the notebooks, with their outputs, and the page of the benchmarks, with its pictures."""
    for path in sorted(_ROOT.glob("notebooks/*.ipynb")):
        text, resources = MarkdownExporter().from_filename(str(path), {"unique_key": path.stem})
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for path in (_ROOT / "benchmarks/README.md", *_ROOT.glob("benchmarks/results/**/*.*")):
        files.append(File.generated(config, str(path.relative_to(_ROOT)), abs_src_path=str(path)))
    return files


def on_page_content(content, **kwargs):
    """Make MathML, which browsers typeset by themselves, of the formulas that `arithmatex` has marked."""
    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _mathml, content, flags=re.DOTALL)


def _mathml(match):
    formula = html.unescape(match[2])
    mathml = convert(formula, display={"span": "inline", "div": "block"}[match[1]])
    if "\\" in mathml:
        raise PluginError(f"a command of TeX is unknown to latex2mathml: {formula}")
    # Of a norm, only the left bar would stretch: the right one carries the exponent.
    return re.sub(r"<mo>(&#x02016;|&#x0007C;)", r'<mo stretchy="false">\1', mathml)
