"""What each process of a launched run does: python -P -m seer_scale.launch.rank RUN_DIR"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from typing import Any, TextIO

from seer_scale.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RankLost, UserError, complain
from seer_scale.launch.job import ATTEMPT, Job, write_whole

LABEL = re.compile(r"^\[rank \d+\] ")


def main(run_dir: str) -> int:
    """Train; returns 0 also for a stop that was asked for, as srun would end the other ranks on any other status."""
    job, attempt = Job.read(run_dir), os.environ[ATTEMPT]
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", 0))
    if rank:
        sys.stdout, sys.stderr = _Labelled(sys.stdout, rank), _Labelled(sys.stderr, rank)
    os.chdir(job.folder)
    if job.cluster == "local":
        threading.Thread(target=_stop_without, args=(os.getppid(),), daemon=True).start()
    try:
        from seer_scale.train.start import run_training

        status, tells = run_training(str(job.recipe), [], attempt), rank == 0
    except RankLost as error:  # the one that was lost knows why, or nobody does
        return complain(error)
    except UserError as error:
        status, tells = complain(error), rank == 0 or error.is_local
    except KeyboardInterrupt:  # a second Ctrl-C, of which the launcher tells
        return EXIT_FAILED
    if tells:
        write_whole(job.place / "outcome.json", json.dumps({"attempt": attempt, "status": status}))
    return EXIT_DONE if status == EXIT_STOPPED else status


def _stop_without(controller: int) -> None:
    """Save and stop when the process that started this one is gone."""
    while os.getppid() == controller:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


class _Labelled:
    """A text stream whose lines begin with the rank's number (torch's tracebacks do already), each written whole."""

    def __init__(self, to: TextIO, rank: int):
        self._to, self._label, self._torchs, self._line = to, f"[rank {rank}] ", f"[rank{rank}]: ", ""

    def write(self, text: str) -> int:
        self._line += text
        *whole, self._line = self._line.split("\n")
        if whole:
            self._to.write("".join(f"{self._label}{line.removeprefix(self._torchs)}\n" for line in whole))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._to, name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
