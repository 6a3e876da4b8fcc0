"""Numbers, sizes and durations as people read them: the one place that decides how."""

from __future__ import annotations

import math
import shutil
import textwrap
from datetime import timedelta


def counted(num: int, noun: str) -> str:
    """1, "image" -> "1 image"; 2000, "class" -> "2,000 classes"."""
    hisses = noun.endswith(("s", "x", "ch", "sh")) and not noun.endswith("epoch")
    plural = f"{noun}es" if hisses else f"{noun}s"
    return f"{num:,} {noun if num == 1 else plural}"


def dtype_name(dtype: object) -> str:
    """torch.float16 -> "float16"."""
    return str(dtype).removeprefix("torch.")


MAX_COLUMNS = 120


def paragraph(text: str, width: int = 0, indent: str = "") -> str:
    """In lines of at most `width` columns, those of the terminal otherwise and no more than MAX_COLUMNS. No path is
    broken."""
    columns = width or min(MAX_COLUMNS, shutil.get_terminal_size((MAX_COLUMNS, 24)).columns)
    return textwrap.fill(
        text, columns, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def untrained_with(images: int) -> str:
    """What is said of the figures of a network that nothing has trained; "" where BatchNorm has statistics of no
    images."""
    return f"Untrained, with BatchNorm statistics of {counted(images, 'image')}." if images else ""


def plus_minus(stderr: object, std: object = None) -> str:
    """What follows a figure: " ± 0.42" of its standard error, else " ± 0.42 (deviation)"; "" where neither is a
    number."""
    for value, word in ((stderr, ""), (std, " (deviation)")):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f" ± {value:.2f}{word}"
    return ""


def with_full_stop(clause: str) -> str:
    """A clause as the end of a sentence, which a question has already."""
    return clause if clause.endswith("?") else f"{clause}."


def short_number(number: float, _: object = None) -> str:
    """1234567 -> "1.23M": thousands, millions and billions. matplotlib's formatters give a position, too."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


FLOP_UNITS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))
"""Sizes of amounts of arithmetic, largest first."""


def compute(flops: float) -> str:
    """So many floating-point operations: "1.23 EFLOP"."""
    size, unit = next((u for u in FLOP_UNITS if flops >= 0.9995 * u[0]), FLOP_UNITS[-1])
    return f"{flops / size:.3g} {unit}"


def rate(per_s: float) -> str:
    """So many a second, with as many digits as mean something: "1,234", "0.52"."""
    return amount(per_s)


def amount(number: float) -> str:
    """Of what may be a part of one, with as many digits as mean something: "1,234", "0.52"."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def memory_size(nbytes: float) -> str:
    """Of memory, in powers of 1024: "512 B", "1.5 GiB"."""
    power = min(4, int(math.log(max(nbytes, 1), 1024)))
    return f"{nbytes / 1024**power:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def file_size(nbytes: float) -> str:
    """Of files, in powers of 1000, as disks are sold: "512 B", "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.3g} TB"


def duration(seconds: float) -> str:
    """For tables: "59.5 s" up to ten minutes, then "3:05 h", "2 d 03:05 h"."""
    if seconds < 600:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours // 24} d {hours % 24:02d}:{minutes:02d} h" if hours >= 24 else f"{hours}:{minutes:02d} h"


def elapsed(seconds: float) -> str:
    """Of what goes on, in whole seconds: "59 s", "3 min 5 s", "3:05 h"."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def rough_duration(seconds: float) -> str:
    """In the largest unit of which it is at least two: "90 s", "3 minutes", "30 hours"."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * size:
            return counted(round(seconds / size), unit)
    return f"{max(0, seconds):.0f} s"


def countdown(seconds: float) -> str:
    """As a clock shows it: "0:07:57", "1 day, 2:00:00"."""
    return str(timedelta(seconds=round(max(0, seconds))))
