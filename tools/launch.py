#!/usr/bin/env python
"""Start a recipe on several processes, here or on SLURM: the same door as `seer-scale launch`, and as `seer-scale
list`, status, logs, cancel and resubmit."""

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
    words = sys.argv[1:] or ["--help"]
    is_other = words[0] in ("list", "status", "logs", "cancel", "resubmit")
    sys.exit(main(words if is_other else ["launch", *words]))
