"""One run a directory: the lock that a run holds for as long as it lives."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from seer_scale.distributed import World
from seer_scale.errors import UserError

POLL_S = 1.0
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""How file systems say that they have no locks."""


class RunLock:
    """Keeps a second run out of `run_dir` for as long as rank 0 of this one lives, or until `release`.

    Collective where a world is given. Raises UserError, on all ranks, with the owner's pid, host, job and start. The
    lock is the kernel's, so it ends with the process however that dies; the text in `.lock` is only for people.
    patience_s: how long to wait for another's: a file server may keep the lock of a node that lost its power for a
    while. note: what the user should know of it, on rank 0: where a file system has no locks the run goes on without.
    """

    note = ""

    def __init__(self, run_dir: Path, world: World = World(), *, patience_s: float = 0.0):
        self._fd: int | None = None
        refusal, until = None, time.monotonic() + patience_s
        while world.is_main and (refusal := self._take(run_dir)) and time.monotonic() < until:
            time.sleep(POLL_S)
        refusal = world.broadcast_object(refusal)
        if refusal:
            error = UserError(refusal)
            error.retryable = _job() != "" and _job() in refusal  # what is left of an earlier start of this job
            raise error

    def _take(self, run_dir: Path) -> str | None:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            fd = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            return f"{run_dir} cannot hold a run ({e.strerror}): choose another run.dir."
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            owner = os.pread(fd, 1000, 0).decode(errors="replace") or "an unknown run"
            if e.errno not in UNSUPPORTED:
                os.close(fd)
                if isinstance(e, BlockingIOError):
                    return f"{run_dir} is in use by {owner}: stop it or choose another run.dir."
                return f"{run_dir} cannot be locked ({e.strerror}): choose another run.dir."
            self.note = (
                f"The file system of {run_dir} has no locks ({e.strerror}; Lustre has them with the mount option "
                "flock), so nothing keeps a second run out: start none while this one lives. The last to begin here "
                f"was {owner}."
            )
        self._fd = fd
        # A forked loader worker shares the lock, and would keep it past the death of its parent.
        os.register_at_fork(after_in_child=self.release)
        text = f"pid {os.getpid()} on {socket.gethostname()}" + (_job() or ",") + f" started {time.strftime('%F %T')}"
        with suppress(OSError):  # a full disk takes the text, not the lock
            os.ftruncate(fd, 0)
            os.pwrite(fd, text.encode(), 0)
        return None

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def _job() -> str:
    return f", job {os.environ['SLURM_JOB_ID']}," if "SLURM_JOB_ID" in os.environ else ""
