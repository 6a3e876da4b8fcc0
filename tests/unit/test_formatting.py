"""Nouns agree with their numbers."""

from __future__ import annotations

from seer_scale.data.sources.left_out import COMMENTS, KINDS, NO_SUFFIX, described
from seer_scale.formatting import counted


def test_nouns_are_counted():
    assert [counted(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert [counted(n, "class") for n in (1, 2)] == ["1 class", "2 classes"]


def test_what_is_left_out_is_counted():
    told = described({kind: 1 for kind in KINDS})
    assert (
        "1 file without a suffix (" in told
        and "1 line that begins with # (" in told
        and "1 link that leads nowhere" in told
    )
    assert described({NO_SUFFIX: 2}).startswith("2 files without a suffix") and described({COMMENTS: 2}).startswith(
        "2 lines that begin"
    )
    assert not any(words.split()[1].endswith("s") for words in told.split(", ") if words[:2] == "1 "), told
