"""The kernels of pixels.c, once for each instruction set; data/transforms/native.py takes the best that runs here.

All else is in pyproject.toml. Without a compiler the installation succeeds, and a start says what it does without.
"""

import platform

from setuptools import Extension, setup

FLAGS = [
    "-O3", "-fstrict-overflow",  # Python's own -fwrapv makes the blur twice as slow
    "-ffp-contract=off", "-fno-math-errno", "-ffinite-math-only", "-fno-signed-zeros", "-fno-trapping-math",
]  # fmt: skip
"""What does not change a finite result: one set's bytes are those of the others."""
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=256"]
X86 = {"sse4": ["-msse4.1"], "avx2": ["-mavx2", "-mtune=icelake-server"], "avx512": [*AVX512, "-mtune=icelake-server"]}
SETS = X86 if platform.machine().lower() in ("x86_64", "amd64") else {"plain": []}


def kernels(name: str, flags: list[str]) -> Extension:
    source, place = "seer_scale/data/transforms/pixels.c", f"seer_scale.data.transforms._pixels_{name}"
    return Extension(place, [source], extra_compile_args=FLAGS + flags, libraries=["m"], optional=True)


setup(ext_modules=[kernels(name, flags) for name, flags in SETS.items()])
