"""python -m seer_scale: the same as seer-scale."""

import sys

from seer_scale.cli import main

if __name__ == "__main__":
    sys.exit(main())
