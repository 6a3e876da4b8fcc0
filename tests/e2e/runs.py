"""Runs of a tiny recipe as processes of their own.

`start(...)` forks ranks from a server that has imported everything, so that a run costs its updates and not eight
seconds of imports; `command(...)` starts the real command. Nothing here sleeps for a fixed time: `until` polls.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import yaml

from seer_scale.observe.records import read_metrics
from tests.forks import fork

PYTHON, ROOT = sys.executable, Path(__file__).parents[2]
LAUNCH = [PYTHON, str(ROOT / "tools" / "launch.py")]
TRAIN = [PYTHON, "-m", "seer_scale.cli", "train"]
LIMIT_S = 120
MARK = f"SEER_SCALE_TEST_{uuid.uuid4().hex}"
"""An environment variable that all processes started by `command` inherit, by which strays are known."""

RECIPE = {
    "model": {"name": "regnety", "depth": 5, "w0": 16, "wa": 24.0, "wm": 2.0, "group_width": 8},
    "data": {"workers": 0},
    "views": {"crops": [{"num": 2, "size": 32, "scale": [0.3, 1.0]}, {"num": 1, "size": 24, "scale": [0.1, 0.3]}]},
    "swav": {"hidden": [32], "embedding_dim": 16, "prototypes": [12], "iterations": 3},
    # BatchNorm over so few images magnifies rounding: at this rate twenty updates keep it near 1e-6
    "optim": {"name": "lars", "lr": 0.02, "lr_batch": 0},
    "schedule": {"warmup_samples": 8, "warmup_from": 0.1},
    "train": {"total_samples": 160, "global_batch": 8, "log_every": 1, "threads": 1, "memory_format": "contiguous"},
    "parallel": {"engine": "fsdp"},
    "checkpoint": {"every_samples": 24, "keep_last": 3},
    "knn": {"size": 32, "k": 3, "batch": 8},
}


def recipe(folder: Path, photos: Path, **changes: dict) -> str:
    """A YAML file of RECIPE; changes are section={key: value}."""
    given = {k: RECIPE.get(k, {}) | changes.get(k, {}) for k in RECIPE | changes}
    given["data"] = {"path": str(photos)} | given["data"]
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(given))
    return str(path)


class Run:
    """Forked ranks whose output goes to one file each."""

    def __init__(
        self, words: list[str], ranks: int, folder: Path, limit_bytes: int | None, console: Callable[[], None] | None
    ):
        attempt = uuid.uuid4().hex[:8]
        self.outputs = [folder / f"output-{attempt}-{r}" for r in range(ranks)]
        self.processes = [
            fork(_rank, words, r, ranks, attempt, str(folder), limit_bytes, console) for r in range(ranks)
        ]
        for p in self.processes:
            p.start()

    @property
    def text(self) -> str:
        return "".join(p.read_text() for p in self.outputs if p.exists())

    def kill(self, number: int, rank: int = 0) -> None:
        os.kill(self.processes[rank].pid, number)

    def wait(self) -> list[int]:
        """The exit status of each rank, negative where a signal ended it."""
        until(lambda: all(p.exitcode is not None for p in self.processes), lambda: self.text)
        return [p.exitcode for p in self.processes]


def start(
    *words: object,
    ranks: int = 1,
    folder: Path,
    limit_bytes: int | None = None,
    console: Callable[[], None] | None = None,
) -> Run:
    """`seer-scale WORDS` on forked ranks; limit_bytes: no file may grow larger, as if the disk were full. console:
    display_name in each rank, it puts something else in the place of descriptors 1 and 2 (see `lost_consoles`)."""
    return Run([str(w) for w in words], ranks, folder, limit_bytes, console)


def run(*words: object, ranks: int = 1, folder: Path, status: int = 0, limit_bytes: int | None = None) -> str:
    """The output of a run that must end with `status` on every rank."""
    r = start(*words, ranks=ranks, folder=folder, limit_bytes=limit_bytes)
    found = r.wait()
    assert found == [status] * ranks, f"exit {found}, not {status}:\n{r.text}"
    return r.text


def _rank(
    words: list[str],
    rank: int,
    ranks: int,
    attempt: str,
    folder: str,
    limit_bytes: int | None,
    console: Callable[[], None] | None,
) -> None:
    out = os.open(Path(folder) / f"output-{attempt}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if console:
        console()
    from seer_scale import cli
    from seer_scale.errors import UserError, print_error
    from seer_scale.training.start import run_training

    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    if ranks == 1:
        sys.exit(cli.main(words))
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", ranks)):
        os.environ[name] = str(value)
    try:
        sys.exit(run_training(words[1], words[2:], attempt))
    except UserError as error:
        sys.exit(print_error(error))


# ------------------------------------------------------------------------------------------------ consoles that are
# lost


def lost_pipe() -> None:
    """As `| tee` after Ctrl-C: EPIPE."""
    ours, theirs = os.pipe()
    os.close(ours)
    _print_to(theirs)


def lost_terminal() -> None:
    """As a window that was closed: EIO."""
    ours, theirs = os.openpty()
    os.close(ours)
    _print_to(theirs)


def full_disk() -> None:
    """As `> file`: ENOSPC."""
    _print_to(os.open("/dev/full", os.O_WRONLY))


def ascii_console() -> None:
    """As PYTHONIOENCODING=ascii: not lost, but without most letters."""
    sys.stdout, sys.stderr = (open(fd, "w", encoding="ascii", closefd=False) for fd in (1, 2))


def closed() -> None:
    """As `>&- 2>&-`."""
    os.close(1)
    os.close(2)
    sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None


def full_pipe() -> None:
    """As a pager that is not scrolled, or a suspended tee."""
    _fill(*os.pipe())


def full_terminal() -> None:
    """As an ssh connection that hangs."""
    _fill(*os.openpty())


lost_consoles = (lost_pipe, lost_terminal, full_disk, closed, full_pipe, full_terminal)


def _fill(ours: int, theirs: int) -> None:
    os.set_blocking(theirs, False)
    with suppress(BlockingIOError):
        while True:
            os.write(theirs, b"x" * 512)
    os.set_blocking(theirs, True)
    _print_to(theirs)  # ours stays open, unread


def _print_to(fd: int) -> None:
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


# ------------------------------------------------------------------------------------------------ real commands


class Command:
    """A command of ours as a user starts it; output in one file, or into a pipe that is not read and can be broken."""

    def __init__(self, words: list[str], folder: Path, more: dict[str, str], pipe: bool):
        self.output, self.is_piped = folder / f"output-{uuid.uuid4().hex[:8]}", pipe
        env = os.environ | {MARK: "1", "OMP_NUM_THREADS": "1"} | more
        with self.output.open("w") as file:
            out = subprocess.PIPE if pipe else file
            self.process = subprocess.Popen(words, stdout=out, stderr=out, env=env, cwd=folder, start_new_session=True)

    def break_pipe(self) -> None:
        for end in (self.process.stdout, self.process.stderr) if self.is_piped else ():
            end.close()

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait(self) -> int:
        until(lambda: self.process.poll() is not None, lambda: self.text)
        return self.process.returncode


def command(*words: object, folder: Path, pipe: bool = False, **env: object) -> Command:
    return Command([str(w) for w in words], folder, {k: str(v) for k, v in env.items()}, pipe)


RAISES = """
import ctypes, os, threading, time
from pathlib import Path

def wait(main=threading.get_ident()):
    while not Path(FOLDER, "raise").exists():
        time.sleep(0.05)
    Path(FOLDER, "raise").unlink()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(ArithmeticError))

if os.environ.get("RANK") == "1":
    threading.Thread(target=wait, daemon=True).start()
"""


def raises_on_rank_1(folder: Path) -> dict[str, object]:
    """Variables with which rank 1 raises ArithmeticError, wherever it is, when the file folder/raise is there, which it
    takes away."""
    (folder / "sitecustomize.py").write_text(RAISES.replace("FOLDER", repr(str(folder))))
    return {"PYTHONPATH": folder}


def processes(marked: str = MARK) -> dict[int, str]:
    """Live processes, zombies included, that `command` started, with their command lines."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if marked.encode() in (place / "environ").read_bytes():
                found[int(place.name)] = os.fsdecode((place / "cmdline").read_bytes().replace(b"\0", b" "))
        except OSError:
            continue
    return found


def ranks_of(launcher: Command) -> list[int]:
    """Process numbers of a launcher's ranks, in the order they were started."""
    return sorted(p for p, line in processes().items() if "seer_scale.launch.rank" in line)


def end_all() -> None:
    for pid in processes():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


# ------------------------------------------------------------------------------------------------ what a run left


def until(condition: Callable[[], object], tell: Callable[[], str] = lambda: "", limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s in vain:\n{tell()}"
        time.sleep(0.05)


def steps(run_dir: Path) -> dict[int, dict]:
    """Metric rows of the updates, by samples_seen."""
    return {r["samples_seen"]: r for r in read_metrics(run_dir)[0] if "step" in r}


def events(run_dir: Path, kind: str) -> list[dict]:
    return [e for e in read_metrics(run_dir)[1] if e["event"] == kind]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").glob("samples-*"))


def reaches(run_dir: Path, samples: int) -> Callable[[], bool]:
    """Whether the run has logged the update after `samples` and has a checkpoint."""
    return lambda: any(s > samples for s in steps(run_dir)) and bool(checkpoints(run_dir))


def assert_same_path(run_dir: Path, straight: Path, relative: float = 1e-4) -> None:
    """The same updates from the same images with the same losses."""
    a, b = steps(run_dir), steps(straight)
    assert list(a) == list(b)
    assert [r["data/fingerprint"] for r in a.values()] == [r["data/fingerprint"] for r in b.values()]
    for seen in a:
        assert abs(a[seen]["loss"] - b[seen]["loss"]) <= relative * b[seen]["loss"], (
            seen,
            a[seen]["loss"],
            b[seen]["loss"],
        )
