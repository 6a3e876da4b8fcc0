#!/usr/bin/env python
"""Train and evaluate several sizes, here or on SLURM, and fit accuracy against size: the same door as `seer-scale
sweep`."""

from __future__ import annotations

import sys

try:
    from seer_scale.cli import main
except ModuleNotFoundError as error:
    print(
        f"{sys.executable} has no {error.name}: give this command with the Python of the environment that seer_scale "
        "is installed in, such as .venv/bin/python.",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main(["sweep", *(sys.argv[1:] or ["--help"])]))
