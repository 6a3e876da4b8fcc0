"""python -m seer_scale, and seer-scale: the same."""

import signal
import sys

from seer_scale.errors import stop_signals


def main() -> int:
    """As cli.main. What asks a run to stop is noted from here on: `train` lets SIGINT in, and StopRequest all."""
    if sys.argv[1:2] == ["train"]:
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    from seer_scale import cli  # takes a third of a second

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
