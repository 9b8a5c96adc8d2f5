"""A hook of mkdocs: formulas as MathML, which browsers show without a script.

`pymdownx.arithmatex` marks the formulas of a page; this converts them while the site is built.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas of a page.

    Args:
        content: The page's HTML.
    """
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    mathml = convert(html.unescape(match["tex"]).strip(), display=display)
    return f'<div class="formula">{mathml}</div>' if display == "block" else mathml
