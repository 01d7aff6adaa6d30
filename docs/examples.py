"""Fits docstrings to Markdown: examples as code, brackets as brackets."""

import re
from typing import Any

import griffe


def as_markdown(text: str) -> str:
    """A docstring of the package, ready for griffe's Google style and for Markdown.

    Google style as griffe reads it knows only `Examples:` and would set an `Example:`
    as prose; and `h[order][:, order]` in prose would be a link to ":, order".
    """
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
    lines = []
    for line in text.split("\n"):
        if not line.lstrip().startswith((">>>", "...")):
            prose = line.split("`")
            prose[::2] = [part.replace("][", "]\\[") for part in prose[::2]]
            line = "`".join(prose)
        lines.append(line)
    return "\n".join(lines)


class Examples(griffe.Extension):
    """Rewrites every docstring that was read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
