"""The cluster of `cluster.sh` as tests see it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

SCRIPT = Path(__file__).with_name("cluster.sh")
LAB_DIR = Path(os.environ.get("LAB_DIR") or Path(tempfile.gettempdir()) / "seer-scale-slurm")
T = TypeVar("T")


class Cluster:
    """A running cluster of virtual nodes; `env` is what a process needs to be its client."""

    def __init__(self) -> None:
        self.env = os.environ | {
            "LAB_DIR": str(LAB_DIR),
            "SLURM_CONF": str(LAB_DIR / "slurm.conf"),
            "PATH": f"{LAB_DIR / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        self.nodes: list[str] = []
        self.cut: set[str] = set()
        """Nodes without power."""

    def up(self) -> None:
        self.run(SCRIPT, "up", limit_s=180)
        self.nodes = re.findall(r"NodeName=(\S+)", self.run("scontrol", "-o", "show", "node"))

    def clean(self) -> None:
        self.run(SCRIPT, "clean")

    def run(self, *words: object, check: bool = True, limit_s: float = 90) -> str:
        """The standard output of a command as this cluster's client; unless `check` is False it has to succeed."""
        done = subprocess.run([str(w) for w in words], env=self.env, capture_output=True, text=True, timeout=limit_s)
        assert not check or done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: object) -> dict[str, str]:
        """What `scontrol show job` tells of one job, or of one task of an array."""
        shown = self.run("scontrol", "-o", "show", "job", job_id).splitlines()
        assert len(shown) == 1, f"{job_id} is an array: name a task, as in 7_0"
        return dict(re.findall(r"(?:^| )([\w/:]+)=(.*?)(?= [\w/:]+=| *$)", shown[0]))

    def until(self, predicate: Callable[[], T], seconds: float, what: str, logs: Path | None = None) -> T:
        """The first true answer of `predicate`; without one in time the test fails and says what it waited for.

        `logs` is a file to quote then, or a folder whose *.out, *.err and *.log files, at any depth, are quoted.
        """
        deadline = time.monotonic() + seconds
        while not (found := predicate()):
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {seconds} s in vain until {what}\n{self._circumstances(logs)}")
            time.sleep(0.1)
        return found

    def kill_node(self, name: str, now: bool = True) -> None:
        """A power cut: no process of the node is left. Unless `now`, slurmctld finds out by itself, in 10 s or more."""
        self.run(SCRIPT, "kill-node", name, *["now"] * now)
        self.cut.add(name)

    def start_node(self, name: str) -> None:
        """Gives a node its power again, once slurmctld knows that it had none, and waits until it takes jobs."""
        self.run(SCRIPT, "start-node", name)
        self.cut.discard(name)

    def cancel_all(self) -> None:
        """Cancels every job; those that were running may take a while to end."""
        self.run("scancel", "--quiet", "--user", "root", check=False)

    def tidy(self) -> None:
        """An empty queue and all nodes there."""
        self.cancel_all()
        for name in sorted(self.cut):
            self.start_node(name)

        def empty() -> bool:
            if left := self.run("squeue", "--noheader"):
                self.cancel_all()  # again: one that was on its way back to the queue escapes
            return not left

        self.until(empty, 60, "the queue was empty")

    def _circumstances(self, logs: Path | None) -> str:
        jobs = self.run("scontrol", "show", "job", check=False).strip().split("\n\n")
        parts = [self.run("squeue", check=False), self.run("sinfo", check=False), *jobs[-3:]]
        files = [LAB_DIR / "log" / "slurmctld.log"]
        if logs and logs.is_dir():
            files += sorted(p for p in logs.rglob("*") if p.suffix in (".out", ".err", ".log"))
        elif logs:
            files.append(logs)
        for path in files:
            tail = path.read_text(errors="replace").splitlines()[-30:] if path.exists() else ["(is not there)"]
            parts.append("\n".join([f"--- {path}", *tail]))
        return "\n".join(parts)


def obstacle() -> str | None:
    """Why there can be no cluster on this machine; installs SLURM where that is all that lacks."""
    if sys.platform != "linux":
        return "a SLURM cluster of virtual nodes needs Linux"
    if os.geteuid() != 0:
        return "a SLURM cluster of virtual nodes needs root"
    try:
        _quietly("unshare", "--fork", "--pid", "--uts", "--mount", "mount", "-t", "proc", "proc", "/proc")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"a SLURM cluster of virtual nodes needs namespaces of its own: {_why(error)}"
    try:
        _quietly(str(SCRIPT), "install")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"SLURM is not there and cannot be installed: {_why(error)}"
    return None


def _quietly(*words: str) -> None:
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def _why(error: OSError | subprocess.CalledProcessError) -> str:
    return error.stderr.strip()[-500:] if isinstance(error, subprocess.CalledProcessError) else str(error)
