"""One run a directory: the lock that a run holds for as long as it lives."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from seer_scale.distributed import World
from seer_scale.errors import Problem, UserError
from seer_scale.files import to_json

LOCK_POLL_S = 1.0
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""How file systems say that they have no locks."""


@dataclass(frozen=True)
class LockOwner:
    """The process that holds a lock, or held it last. job: SLURM's, or nothing."""

    pid: int
    host: str
    job: str
    started: str

    def __str__(self) -> str:
        job = f" job {self.job}," if self.job else ""
        return f"pid {self.pid} on {self.host},{job} started {self.started}"

    @classmethod
    def read(cls, fd: int) -> LockOwner | None:
        """What a lock file says; None where it says nothing that can be read."""
        try:
            said = json.loads(os.pread(fd, 1000, 0))
            return cls(int(said["pid"]), str(said["host"]), str(said["job"]), str(said["started"]))
        except (OSError, ValueError, LookupError, TypeError):
            return None


class RunLock:
    """Keeps a second run out of `run_dir` for as long as rank 0 of this one lives, or until `release`.

    Collective where a world is given. Raises UserError, on all ranks, with the owner's pid, host, job and start. The
    lock is the kernel's, so it ends with the process however that dies; what stands in `.lock` only says whose it was.
    patience_s: how long to wait for another's: a file server may keep the lock of a node that lost its power for a
    while. note: what the user should know of it, on rank 0: where a file system has no locks the run goes on without.
    """

    note = ""

    def __init__(self, run_dir: Path, world: World = World(), *, patience_s: float = 0.0):
        self._fd: int | None = None
        refusal, until = None, time.monotonic() + patience_s
        while world.is_main and (refusal := self._take(run_dir)) and time.monotonic() < until:
            time.sleep(LOCK_POLL_S)
        refusal = world.broadcast_object(refusal)
        if refusal:
            raise refusal

    def _take(self, run_dir: Path) -> UserError | None:
        def refusal(rule: str) -> UserError:
            return UserError(Problem("run.dir", run_dir, rule, fix))

        fix = "choose another run.dir"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            fd = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            return refusal(f"it cannot hold a run ({e.strerror})")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            owner = LockOwner.read(fd)
            told = owner or "an unknown run"
            if e.errno not in UNSUPPORTED:
                os.close(fd)
                if isinstance(e, BlockingIOError):
                    fix = f"stop it or {fix}"
                    error = refusal(f"it is in use by {told}")
                    left_behind = owner is not None and owner.job == _job() != ""  # of an earlier start of this job
                    error.retryable = left_behind
                    return error
                return refusal(f"it cannot be locked ({e.strerror})")
            self.note = (
                f"The file system of {run_dir} has no locks ({e.strerror}; Lustre has them with the mount option "
                "flock), so nothing keeps a second run out: start none while this one lives. The last to begin here "
                f"was {told}."
            )
        self._fd = fd
        # A forked loader worker shares the lock, and would keep it past the death of its parent.
        os.register_at_fork(after_in_child=self.release)
        own = LockOwner(os.getpid(), socket.gethostname(), _job(), time.strftime("%F %T"))
        with suppress(OSError):  # a full disk takes the text, not the lock
            os.ftruncate(fd, 0)
            os.pwrite(fd, to_json(asdict(own)).encode(), 0)
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
    return os.environ.get("SLURM_JOB_ID", "")
