"""Names are bytes until they are shown, and what is shown is one line of printable text."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_scale.errors import ConfigError, DataError, UserError
from seer_scale.files import published, shown

names = st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))


@given(names)
def test_what_is_shown_is_one_printable_line_of_valid_text(name):
    text = shown(name)
    text.encode()
    assert text.isprintable() and shown(text) == text == shown(os.fsdecode(name))


@pytest.mark.parametrize(
    "name, text",
    [
        ("Größe 日本 🐈.jpg", "Größe 日本 🐈.jpg"),
        (b"caf\xe9.jpg", r"caf\xe9.jpg"),
        ("a\nb\r.jpg", r"a\nb\r.jpg"),
        ("\x1b[31mred.jpg", r"\x1b[31mred.jpg"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
        ("\u2028\x85\ufeff", r"\u2028\x85\ufeff"),
    ],
)
def test_how_names_are_shown(name, text):
    assert shown(name) == text


def test_errors_show_names_and_keep_their_lines():
    assert str(UserError("\udce9\x1b[0m\n", "two\n")) == "\\xe9\\x1b[0m\\n\ntwo\\n"
    assert str(ConfigError(["a\nb", "c"])) == "The recipe has 2 problems:\n  - a\\nb\n  - c"
    assert str(DataError("a\nb")) == r"a\nb"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def make(path, content):
        path.mkdir()
        (path / "file").write_text(content)

    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt):
        with published(out) as aside:
            make(aside, "half")
            raise KeyboardInterrupt
    assert not any(out.parent.iterdir())
    out.mkdir()  # an empty folder is no obstacle
    with published(out) as aside:
        make(aside, "one")
        assert not any(out.iterdir())
    with pytest.raises(FileExistsError):
        with published(out) as aside:
            make(aside, "two")
    assert (out / "file").read_text() == "one"
    with published(out, replace=True) as aside:
        aside.write_text("a file")
    assert out.read_text() == "a file" and list(out.parent.iterdir()) == [out]
