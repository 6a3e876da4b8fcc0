"""What was launched, in the run's own folder: the record that the launcher, the job and its ranks share.

RUN/launch/ holds `job.json` (this record), `recipe.yaml` (the recipe with its overrides, as the ranks read it), one
`code-HASH/` for each state of the package that was ever launched, `attempts.jsonl` (each start of the ranks and how it
ended) and `outcome.json` (what the ranks say of their end).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seer_scale.errors import UserError
from seer_scale.files import to_json, write_whole

FOLDER, RECORD, CLAIM = "launch", "job.json", ".claim"
ATTEMPT = "SEER_SCALE_ATTEMPT"
"""The environment variable by which ranks know which start they are part of."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """fits: numbers of nodes the recipe can take, rising; a job that gets another number uses the next lower of these.

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
    fits: list[int]
    restarts: int
    requeues: int
    profile: dict[str, Any]
    submitted: float
    job_id: str = ""
    log_dir: str = ""
    launcher: str = ""
    launched_in: str = ""
    """The folder it was launched in, where it lies in another one now."""

    @property
    def place(self) -> Path:
        return Path(self.run_dir) / FOLDER

    @property
    def recipe(self) -> Path:
        return self.place / "recipe.yaml"

    @property
    def logs(self) -> Path:
        return Path(self.run_dir) / "logs"

    @property
    def record(self) -> Path:
        return self.place / RECORD

    def write(self) -> None:
        write_whole(self.record, to_json(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, run_dir: str | Path) -> Job | None:
        """The newest launch of the run in this folder, which may have been moved here since; None where none is
        recorded.
        Raises UserError where what is there is no record."""
        record = Path(run_dir) / FOLDER / RECORD
        try:
            given = json.loads(record.read_bytes())
            job = cls(**given)
            _must_be_typed(job)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(
                f"{record} cannot be read ({error.strerror}), so it is not known what was launched there."
            ) from error
        except (ValueError, TypeError) as error:
            what = (
                "is torn or was written by something else"
                if not _is_record(record)
                else "was written by another version of seer_scale"
            )
            raise UserError(
                f"{record} {what}, so it is not known what was launched there: if no job of that run is on its way, "
                "remove that file; the run goes on from its checkpoints when its first command is given again."
            ) from error
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
        raise UserError(f"{Path(run_dir) / FOLDER / RECORD} is missing: nothing was launched in {run_dir}.")

    # --- asked to stop for good

    def cancel(self) -> None:
        """Mark this submission: a later one of the same run is another."""
        write_whole(self.place / "cancelled", self.job_id)

    def is_cancelled(self) -> bool:
        try:
            return (self.place / "cancelled").read_text() == self.job_id
        except OSError:
            return False

    def cancelled_at(self) -> float:
        """Unix time of `cancel`. Raises OSError where there was none."""
        return (self.place / "cancelled").stat().st_mtime

    # --- its starts

    def attempts(self) -> list[dict[str, Any]]:
        """The lines of attempts.jsonl that say how a start began or ended; torn and foreign ones are passed over."""
        return list(_lines(self.place / "attempts.jsonl"))

    def tell(self, **line: Any) -> None:
        """Add a line to attempts.jsonl; a full disk costs it, and one that it has torn takes no other with it."""
        with suppress(OSError), (self.place / "attempts.jsonl").open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            begin = "" if file.read(1) in (b"", b"\n") else "\n"
            file.write(f"{begin}{to_json(line | {'time': time.time()})}\n".encode())

    def newest_checkpoint(self) -> int:
        """Samples seen by the newest checkpoint, by its name alone; -1 where there is none."""
        names = (p.name.split("-") for p in (Path(self.run_dir) / "checkpoints").glob("samples-*"))
        return max((int(words[1]) for words in names if words[1].isdecimal()), default=-1)


def _is_record(path: Path) -> bool:
    try:
        given = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(given, dict) and all(isinstance(given.get(key), str) for key in ("run_dir", "cluster"))


def _must_be_typed(job: Job) -> None:
    """launcher has been a number; whatever it is, `is_alive` answers. Raises TypeError."""
    kinds: dict[str, Any] = {
        "str": str,
        "int": int,
        "float": (int, float),
        "dict[str, Any]": dict,
        "list[str]": list,
        "list[int]": list,
    }
    for f in dataclasses.fields(job):
        if f.name != "launcher" and not isinstance(getattr(job, f.name), kinds[str(f.type)]):
            raise TypeError(f.name)
    if not all(isinstance(word, str) for word in job.command) or not all(isinstance(n, int) for n in job.fits):
        raise TypeError("command, fits")


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


def snapshot(place: Path, *, write: bool = True) -> str:
    """A copy of this package below `place`, named after its contents, so that edits reach no run on its way; its
    path."""
    package = Path(__file__).parents[1]
    files = sorted(p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(package.parent)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    final = place / f"code-{digest.hexdigest()[:12]}"
    if write and not final.is_dir():
        aside = place / f".code-{secrets.token_hex(4)}"
        try:
            for path in files:
                (copy := aside / path.relative_to(package.parent)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            os.rename(aside, final)
        except OSError:
            if not final.is_dir():  # else another launch was first
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return str(final)


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
