"""Numbers, sizes and durations are written one way; nouns agree with their numbers."""

from __future__ import annotations

from seer_scale.data.sources.left_out import COMMENTS, LEFT_OUT_KINDS, NO_SUFFIX, described
from seer_scale.formatting import (
    compute,
    countdown,
    counted,
    duration,
    elapsed,
    file_size,
    memory_size,
    plus_minus,
    rate,
    rough_duration,
    short_number,
    with_full_stop,
)


def test_nouns_are_counted():
    assert [counted(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert [counted(n, "class") for n in (1, 2)] == ["1 class", "2 classes"]
    assert [counted(2, noun) for noun in ("epoch", "batch", "box")] == ["2 epochs", "2 batches", "2 boxes"]


def test_a_plus_minus_without_a_word_is_a_standard_error():
    assert [plus_minus(0.421), plus_minus(0.421, 3.0), plus_minus(None, 3.0), plus_minus(None, None)] == [
        " ± 0.42", " ± 0.42", " ± 3.00 (deviation)", "",
    ]  # fmt: skip


def test_arithmetic_has_the_unit_that_suits_it():
    assert [compute(n) for n in (5e5, 2.5e10, 999.6e12, 4.2e22)] == [
        "0.0005 GFLOP", "25 GFLOP", "1 PFLOP", "42 ZFLOP",
    ]  # fmt: skip


def test_what_is_left_out_is_counted():
    told = described({kind: 1 for kind in LEFT_OUT_KINDS})
    assert (
        "1 file without a suffix (" in told
        and "1 line that begins with # (" in told
        and "1 link that leads nowhere" in told
    )
    assert described({NO_SUFFIX: 2}).startswith("2 files without a suffix") and described({COMMENTS: 2}).startswith(
        "2 lines that begin"
    )
    assert not any(words.split()[1].endswith("s") for words in told.split(", ") if words[:2] == "1 "), told


def test_numbers_and_rates():
    assert [short_number(n) for n in (0, 0.05, 999, 1000, 1234567, 2e9, 999_900)] == [
        "0", "0.05", "999", "1k", "1.23M", "2B", "1M",
    ]  # fmt: skip
    assert [rate(n) for n in (0.0521, 9.94, 10, 12345.6)] == ["0.052", "9.9", "10", "12,346"]


def test_sizes():
    assert [memory_size(n) for n in (0, 512, 1536, 3 * 2**30, 5000 * 2**40)] == [
        "0 B", "512 B", "1.5 KiB", "3.0 GiB", "5000.0 TiB",
    ]  # fmt: skip
    assert [file_size(n) for n in (0, 512, 1500, 999_600, 2.5e15)] == ["0 B", "512 B", "1.5 kB", "1 MB", "2.5e+03 TB"]


def test_durations():
    seconds = (-1, 0.4, 59, 119, 185, 7100, 11_100, 190_000)
    assert [elapsed(s) for s in seconds] == [
        "0 s", "0 s", "59 s", "1 min 59 s", "3 min 5 s", "1:58 h", "3:05 h", "52:46 h",
    ]  # fmt: skip
    assert [rough_duration(s) for s in seconds] == [
        "0 s", "0 s", "59 s", "119 s", "3 minutes", "118 minutes", "3 hours", "2 days",
    ]  # fmt: skip
    assert [duration(s) for s in seconds[1:]] == [
        "0.4 s", "59.0 s", "119.0 s", "185.0 s", "1:58 h", "3:05 h", "2 d 04:47 h",
    ]  # fmt: skip
    assert [countdown(s) for s in (-5, 477.4, 100_000)] == ["0:00:00", "0:07:57", "1 day, 3:46:40"]


def test_a_question_ends_its_sentence():
    assert [with_full_stop(c) for c in ("did you mean x?", "give one")] == ["did you mean x?", "give one."]
