"""Numbers with their nouns, as sentences want them."""

from __future__ import annotations


def counted(num: int, noun: str) -> str:
    """1, "image" -> "1 image"; 2000, "class" -> "2,000 classes"."""
    plural = f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"
    return f"{num:,} {noun if num == 1 else plural}"


def ended(clause: str) -> str:
    """A clause as the end of a sentence, which a question has already."""
    return clause if clause.endswith("?") else f"{clause}."
