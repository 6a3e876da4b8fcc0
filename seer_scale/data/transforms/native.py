"""The kernels of pixels.c, built at installation for several instruction sets, of which the best that runs here is
taken.

All give the same bytes; where none was built, what is done in torch instead is the same to one level of 255.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

INTERFACE = 2
"""Of pixels.c: kernels that were built from sources with another take other arguments, and are not called."""
SETS = ("avx512", "avx2", "sse4", "plain")
MISSING = (
    "The image kernels in C were not built when this version of seer_scale was installed: views are made in torch, the "
    "same to one level of 255 but ten times slower. Install a C compiler (gcc or clang), and then seer_scale again."
)


@lru_cache(maxsize=1)
def native() -> ctypes.CDLL | None:
    """The kernels; None where none was built."""
    return next((kernels for name in SETS if (kernels := load(name))), None)


def load(name: str) -> ctypes.CDLL | None:
    """Those of one instruction set; None where they were not built, or the machine does not have it."""
    for suffix in EXTENSION_SUFFIXES:
        place = Path(__file__).with_name(f"_pixels_{name}{suffix}")
        if not place.exists():
            continue
        try:
            kernels = ctypes.CDLL(str(place))
        except OSError:  # of another machine: folders are shared
            continue
        if hasattr(kernels, "interface") and kernels.interface() == INTERFACE and kernels.supported():
            return _typed(kernels)
    return None


def _typed(kernels: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    kernels.resize.argtypes = (pointer, ctypes.c_long, number, number, number, number, pointer, pointer)
    kernels.photometric.argtypes = (pointer, number, number, number, number, pointer, pointer, pointer)
    kernels.blur.argtypes = (pointer, number, number, number, pointer, pointer)
    kernels.resize.restype = kernels.photometric.restype = kernels.blur.restype = None
    return kernels


_scratch = np.empty(0, np.float32)


def scratch(numel: int) -> np.ndarray:
    """At least so many floats where a kernel keeps what lies between its passes; kept, for fresh memory costs more than
    the work. One thread's."""
    global _scratch
    if _scratch.size < numel:
        _scratch = np.empty(numel, np.float32)
    return _scratch
