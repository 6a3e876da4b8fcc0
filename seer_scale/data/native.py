"""The kernels of pixels.c, compiled at first use by the machine's C compiler; whoever calls them has another way too."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from seer_scale.files import cache_folder

SOURCE = Path(__file__).with_name("pixels.c")
FLAGS = (
    "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-ffinite-math-only", "-fno-signed-zeros",
    "-fno-trapping-math", "-fassociative-math", "-freciprocal-math",
)  # fmt: skip
"""-ffast-math without the name: linked under that name, it would round small numbers of the whole process to zero."""


@lru_cache(maxsize=1)
def native() -> ctypes.CDLL | None:
    """The compiled kernels, from the user's cache or made now (a second); None without a working C compiler."""
    made_of = [SOURCE.read_text(), *FLAGS, platform.machine(), _cpu_flags()]  # home folders serve machines of all kinds
    name = f"pixels-{hashlib.blake2b(chr(0).join(made_of).encode(), digest_size=12).hexdigest()}.so"
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not (cache / name).exists():
            with tempfile.TemporaryDirectory(dir=cache) as aside:
                made = Path(aside) / name
                subprocess.run([os.environ.get("CC", "cc"), *FLAGS, "-o", made, SOURCE, "-lm"], check=True, capture_output=True)
                made.rename(cache / name)
        kernels = ctypes.CDLL(str(cache / name))
    except (OSError, subprocess.CalledProcessError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    kernels.resize.argtypes = (pointer, ctypes.c_long, number, number, number, pointer, pointer)
    kernels.photometric.argtypes = (pointer, number, number, number, pointer, pointer, pointer)
    kernels.blur.argtypes = (pointer, number, number, pointer, pointer)
    kernels.resize.restype = kernels.photometric.restype = kernels.blur.restype = None
    return kernels


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


_scratch = np.empty(0, np.float32)


def scratch(numel: int) -> np.ndarray:
    """At least so many floats where a kernel keeps what lies between its passes; kept, for fresh memory costs more than
    the work. One thread's."""
    global _scratch
    if _scratch.size < numel:
        _scratch = np.empty(numel, np.float32)
    return _scratch
