#!/usr/bin/env python
"""Start a recipe on several processes, here or on SLURM: python tools/launch.py --help"""

from __future__ import annotations

import sys

from seer_scale.errors import UserError, complain
from seer_scale.launch.command import main

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(complain(error))
