"""python -m seer_scale.cli, as torchrun starts it."""

import sys

from seer_scale.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
