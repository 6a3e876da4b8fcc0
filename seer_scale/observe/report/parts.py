"""Pieces of the page that its sections share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def section(title: str, text: str, *content: str) -> str:
    """A section with its heading and leading sentence; `text` and `content` are HTML."""
    return f"<section><h2>{escape(title)}</h2>\n<p class=lead>{text}</p>\n" + "\n".join(content) + "\n</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kinds: Iterable[str] = ()) -> str:
    """A table of texts, which a narrow screen shows a row below the other with the heading before each value.

    kinds: a class a row, if any.
    """
    rows, kinds = [list(r) for r in rows], list(kinds)
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f'<td data-head="{escape(h)}">{escape(text)}</td>' for h, text in zip(head, row, strict=True))
        lines.append(f'<tr class="{escape(kinds[i])}">{cells}</tr>' if kinds else f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
