#!/usr/bin/env python
"""Start a recipe on several processes, here or on SLURM: python tools/launch.py --help"""

from __future__ import annotations

import os
import sys

try:
    from seer_scale.errors import EXIT_DONE, UserError, complain
    from seer_scale.launch.command import main
except ModuleNotFoundError as error:
    print(f"{sys.executable} has no {error.name}: give this command with the Python of the environment that seer_scale is installed in, such as .venv/bin/python.", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(status)
    except UserError as error:
        sys.exit(complain(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # | head has read enough; exit flushes once more
        sys.exit(EXIT_DONE)
