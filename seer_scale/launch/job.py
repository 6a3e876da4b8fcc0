"""What was launched, in the run's own folder: the record that the launcher, the job and its ranks share.

RUN/launch/ holds `job.json` (this record), `recipe.yaml` (the recipe with its overrides, as the ranks read it), one
`code-HASH/` for each state of the package that was ever launched, `attempts.jsonl` (each start of the ranks and how it
ended) and `outcome.json` (what the ranks say of their end). RUN/eval/launch/ holds the same of a launched evaluation;
its `recipe.yaml` says what is measured.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.files import to_json, write_whole

LAUNCH_DIR, RECORD, START_LOCK = "launch", "job.json", ".start_lock"
PLUGINS_DIR = Path("plugins")
"""Of a copy of the code, where plugins are."""
ATTEMPT = "SEER_SCALE_ATTEMPT"
"""The environment variable by which ranks know which start they are part of."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """node_counts: numbers of nodes the recipe can take, rising; a job that gets another number uses the next lower of
    these.

    log_dir: where the job's own output goes (an array has one). launcher: what `process_mark` says of a local run's
    launcher. restarts, requeues: how often in a row the ranks are started again in the same job, and the job goes back
    to the queue, without a new checkpoint.
    """

    name: str
    run_dir: str
    cluster: str
    command: list[str]
    folder: str
    code: str
    ranks_per_node: int
    node_counts: list[int]
    restarts: int
    requeues: int
    profile: dict[str, Any]
    submitted: float
    job_id: str = ""
    log_dir: str = ""
    launcher: str = ""
    launched_in: str = ""
    """The folder it was launched in, where it lies in another one now."""
    is_evaluation: bool = False
    """Whether its ranks measure a run, and run_dir is the folder of results in that run's; else they train."""

    @property
    def launch_dir(self) -> Path:
        return Path(self.run_dir) / LAUNCH_DIR

    @property
    def measured_run(self) -> Path:
        """Of an evaluation."""
        return Path(self.run_dir).parent

    @property
    def code_place(self) -> Path:
        """Where the copy of the code lies that its ranks run; a run's evaluation shares that of its training."""
        return self.measured_run / LAUNCH_DIR if self.is_evaluation else self.launch_dir

    @property
    def recipe(self) -> Path:
        return self.launch_dir / "recipe.yaml"

    @property
    def logs(self) -> Path:
        return Path(self.run_dir) / "logs"

    @property
    def record(self) -> Path:
        return self.launch_dir / RECORD

    def write(self) -> None:
        write_whole(self.record, to_json(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, run_dir: str | Path) -> Job | None:
        """The newest launch of the run in this folder, which may have been moved here since; None where none is
        recorded.
        Raises UserError where what is there is no record."""
        record = Path(run_dir) / LAUNCH_DIR / RECORD
        try:
            given = json.loads(record.read_bytes())
            job = cls(**given)
            _check_types(job)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            rule = f"cannot be read ({error.strerror}), so it is not known what was launched there"
            raise UserError(Problem(str(record), NOTHING, rule)) from error
        except (ValueError, TypeError) as error:
            why = "was written by another version of seer_scale" if _is_record(record) else "is damaged, or is not ours"
            fix = (
                "if no job of that run is in the queue or running, remove that file and give the run's first command "
                "again: it resumes from its checkpoints"
            )
            rule = f"{why}, so it is not known what was launched there"
            raise UserError(Problem(str(record), NOTHING, rule, fix)) from error
        here = os.path.abspath(run_dir)
        if os.path.realpath(here) == os.path.realpath(job.run_dir):
            return job
        # moved, or copied: what lies in its folder is there; what lay elsewhere (an array's log) stays
        log_dir = os.path.join(here, "logs") if job.log_dir and Path(job.log_dir) == job.logs else job.log_dir
        return dataclasses.replace(job, run_dir=here, log_dir=log_dir, launched_in=job.launched_in or job.run_dir)

    @classmethod
    def of(cls, run_dir: str | Path) -> Job:
        """As `read`, of a run that was launched. Raises UserError."""
        if job := cls.read(run_dir):
            return job
        record = Path(run_dir) / LAUNCH_DIR / RECORD
        raise UserError(Problem(str(record), NOTHING, f"is missing: nothing was launched in {run_dir}"))

    # --- cancelled

    def cancel(self) -> None:
        """Mark this submission: a later one of the same run is another."""
        write_whole(self.launch_dir / "cancelled", self.job_id)

    def is_cancelled(self) -> bool:
        try:
            return (self.launch_dir / "cancelled").read_text() == self.job_id
        except OSError:
            return False

    def cancelled_at(self) -> float:
        """Unix time of `cancel`. Raises OSError where there was none."""
        return (self.launch_dir / "cancelled").stat().st_mtime

    # --- its attempts: starts of the ranks

    def attempts(self) -> list[dict[str, Any]]:
        """The lines of attempts.jsonl that say how a start began or ended; torn and foreign ones are passed over."""
        return list(_lines(self.launch_dir / "attempts.jsonl"))

    def log_event(self, **line: Any) -> None:
        """Add a line to attempts.jsonl; a full disk costs it, and one that it has torn takes no other with it."""
        with suppress(OSError), (self.launch_dir / "attempts.jsonl").open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            begin = "" if file.read(1) in (b"", b"\n") else "\n"
            file.write(f"{begin}{to_json(line | {'time': time.time()})}\n".encode())

    def newest_checkpoint(self) -> int:
        """Samples seen by the newest checkpoint, by its name alone; -1 where there is none."""
        names = (p.name.split("-") for p in (Path(self.run_dir) / "checkpoints").glob("samples-*"))
        return max((int(words[1]) for words in names if words[1].isdecimal()), default=-1)


def cannot_hold_run(run_dir: str, error: OSError) -> UserError:
    """What to raise where a run's folder cannot be written."""
    return UserError(Problem("run.dir", run_dir, f"cannot hold a run ({error.strerror})", "choose another"))


def _is_record(path: Path) -> bool:
    try:
        given = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(given, dict) and all(isinstance(given.get(key), str) for key in ("run_dir", "cluster"))


def _check_types(job: Job) -> None:
    """`launcher` was a number once; `is_alive` takes anything. Raises TypeError."""
    kinds: dict[str, Any] = {
        "str": str,
        "int": int,
        "bool": bool,
        "float": (int, float),
        "dict[str, Any]": dict,
        "list[str]": list,
        "list[int]": list,
    }
    for field in dataclasses.fields(job):
        if field.name != "launcher" and not isinstance(getattr(job, field.name), kinds[str(field.type)]):
            raise TypeError(field.name)
    if not all(isinstance(word, str) for word in job.command) or not all(isinstance(n, int) for n in job.node_counts):
        raise TypeError("command, node_counts")


LINES: dict[str, dict[str, Any]] = {
    "begin": {"attempt": str, "time": (int, float), "samples": int, "ranks": int, "nodes": list},
    "end": {"attempt": str, "time": (int, float), "samples": int, "cause": str},
}
"""What a line of attempts.jsonl holds, by its event."""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except OSError:
        return
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        event = record.get("event") if isinstance(record, dict) else None
        kinds = LINES.get(event) if isinstance(event, str) else None
        if kinds and all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
            yield record


def snapshot(place: Path, plugins: Sequence[Path] = (), *, write: bool = True) -> str:
    """A copy of this package below `place`, and of plugins (files, or folders) in its PLUGINS_DIR, named after their
    contents, so that edits reach no run on its way; its path."""
    package = Path(__file__).parents[1]
    copies = {path: path.relative_to(package.parent) for path in _files_of(package)}
    copies |= {path: PLUGINS_DIR / path.relative_to(plugin.parent) for plugin in plugins for path in _files_of(plugin)}
    digest = hashlib.sha256()
    for path, copy in copies.items():
        digest.update(f"{copy}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    final = place / f"code-{digest.hexdigest()[:12]}"
    if write and not final.is_dir():
        aside = place / f".code-{secrets.token_hex(4)}"
        try:
            for path, copy in copies.items():
                (aside / copy).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, aside / copy)
            os.rename(aside, final)
        except OSError:
            if not final.is_dir():  # else another launch was first
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return str(final)


def _files_of(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    return sorted(p for p in place.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def process_mark(pid: int) -> str:
    """Names one process for good: numbers come again. Empty where there is none (any more)."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return "" if state in "ZX" else f"{pid}:{rest[18]}:{boot}"


def is_alive(mark: str) -> bool:
    """Whether the process of a `process_mark` lives; one on another machine cannot be seen, and counts as gone."""
    pid = str(mark).partition(":")[0]
    return pid.isdecimal() and process_mark(int(pid)) == mark
