"""An extension of griffe: the docstrings' roles of Sphinx, which editors show, as Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

MATH_BLOCK = re.compile(
    r"^( *)\.\. math::(?P<first>.*)\n(?P<rest>(?:\1 +\S.*\n?|\n(?=\1 ))*)", re.M
)
MATH = re.compile(r":math:`(?P<tex>[^`]*)`")
#: `:func:`text <fused_resnet.fuse>``, `:func:`fused_resnet.fuse`` or `:mod:`.functional``.
REFERENCE = re.compile(
    r":(?:func|class|mod|meth|data|attr):`(?:(?P<text>[^`<]*?)\s*<)?[~.]*(?P<target>[\w.]+)>?`"
)


class Roles(griffe.Extension):
    """Rewrites every docstring that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object.

        Args:
            obj: A module, a class, a function or an attribute.
        """
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """A docstring in Markdown.

    Args:
        text: With Sphinx's roles `math`, `func`, `class`, `mod`, `meth`, `data` and `attr`.
    """
    text = MATH_BLOCK.sub(_display, text + "\n")
    text = MATH.sub(lambda match: rf"\({match['tex']}\)", text)
    return REFERENCE.sub(lambda match: f"`{match['text'] or match['target']}`", text).rstrip()


def _display(match: re.Match[str]) -> str:
    indent = match[1]
    lines = [match["first"], *match["rest"].splitlines()]
    tex = " ".join(line.strip() for line in lines if line.strip())
    return f"{indent}\\[ {tex} \\]\n\n"
