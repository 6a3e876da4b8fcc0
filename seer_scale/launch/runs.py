"""Launched runs: their states and logs, how to cancel them and how to start them again. No torch is loaded."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from seer_scale import console
from seer_scale.errors import EXIT_DONE, NOTHING, Problem, UserError, nearest
from seer_scale.files import shown, to_json
from seer_scale.formatting import counted, rough_duration
from seer_scale.launch.job import LAUNCH_DIR, RECORD, START_LOCK, Job
from seer_scale.launch.job import is_alive as process_is_alive

FOLLOW_S = 0.5
SECOND_STOP_S = 1.5
"""Seconds between two stop requests, of which the second ends a local run at once: more than ECHO_S."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is four times as fast


# ------------------------------------------------------------------------------------------------ which


def find_all(names: Sequence[str]) -> list[Job]:
    """The runs of these names or patterns. Raises UserError."""
    return [job for name in names for job in _find_matching(name)]


def find_one(name: str) -> Job:
    """The one run of this name or pattern. Raises UserError."""
    jobs = _find_matching(name)
    if len(jobs) > 1:
        names = tuple(display_name(job) for job in jobs)
        raise UserError(Problem("NAME", name, f"it matches {len(jobs)} runs, and one is needed", names))
    return jobs[0]


def _find_matching(name: str) -> list[Job]:
    if not set("*?[") & set(name) or _read_record(name):
        return [_find_named(name)]
    patterns = (name, f"runs/{name}")  # which the shell has not expanded
    places = {p for q in patterns for p in (Path("/").glob(q[1:]) if q[0] == "/" else Path().glob(q))}
    jobs = [job for place in sorted(places) if (job := Job.read(place))]
    if not jobs:
        rule = "it matches no launched run, here or in runs/"
        raise UserError(Problem("NAME", name, rule, f"{command_here()} list shows all"))
    return jobs


def _read_record(name: str) -> Job | None:
    """The run that lies in a folder of this very name, here or in runs/."""
    return next((job for place in (Path(name), Path("runs") / name) if (job := Job.read(place))), None)


def _find_named(name: str) -> Job:
    if job := _read_record(name):
        return job
    for place in (Path(name), Path("runs") / name):
        if (place / "metrics.jsonl").is_file():
            fix = f"seer-scale inspect {place} describes it, and {console.file_of(place, 0)} has its output"
            raise UserError(Problem(str(place), NOTHING, "was started by train, not by launch", fix))
    names = [display_name(job) for job in _jobs_below(Path("runs")) if isinstance(job, Job)]
    of_array = [n for n in names if n.startswith(f"{name}-")]
    fix = f"each run of an array has its own name: {', '.join(of_array)}" if of_array else "none was launched here"
    fix = nearest(name, names) if names and not of_array else fix
    raise UserError(Problem("NAME", name, f"neither it nor runs/{name} is a launched run's folder", fix))


def _jobs_below(folder: Path) -> list[Job | UserError]:
    """All runs below a folder, linked ones too, in order; of one whose record cannot be read, the error."""
    jobs: list[Job | UserError] = []
    subfolders = (Path(at) / name for at, names, _ in os.walk(folder) for name in names)  # links are not followed
    for place in sorted(p for p in (folder, *subfolders) if os.path.exists(p / LAUNCH_DIR / RECORD)):
        try:
            if job := Job.read(place):
                jobs.append(job)
        except UserError as error:
            jobs.append(error)
    return jobs


def command_here() -> str:
    """How the commands of this package are given from here, as a shell reads them."""
    script = Path(sys.executable).parent / "seer-scale"
    known = shutil.which("seer-scale")
    if known and Path(known).absolute() == script:
        return "seer-scale"
    place = script if script.exists() else Path(sys.executable)
    short = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
    word = shlex.quote(str(short))
    return word if place is script else f"{word} -m seer_scale"


def display_name(job: Job) -> str:
    """The shortest word by which `find_one` finds it from here, safe to print."""
    place = Path(job.run_dir)
    if place.parent == Path("runs").absolute():
        return shown(place.name)
    return shown(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place)


# ------------------------------------------------------------------------------------------------ how they are


def is_running(job: Job) -> bool:
    """Whether the job is on its way, and this the folder it works in. Raises NoAnswer, a UserError, where SLURM does
    not say."""
    if _is_copy(job):
        return False
    if job.cluster == "local":
        return process_is_alive(job.launcher)
    from seer_scale.launch import slurm

    return slurm.is_alive(job)


def state(job: Job) -> str:
    attempts, there = [line for line in job.attempts() if line["attempt"].startswith(f"{job.job_id}.")], True
    if _is_copy(job):
        if not attempts or attempts[-1]["event"] == "begin":
            return "a copy, made before that job had ended"
    elif job.cluster == "slurm":
        from seer_scale.launch import slurm

        try:
            found, there = slurm.details(job.job_id), slurm.is_installed()
        except slurm.NoAnswer:
            return "unknown, as SLURM does not answer"
        word, reason = found.get("JobState", ""), found.get("Reason", "None")
        if word in slurm.ALIVE_STATES and job.is_cancelled():
            return f"{word.lower()}, asked to stop {ago(job.cancelled_at())}"
        if word in slurm.ALIVE_STATES:
            return word.lower() + (f" ({reason})" if word == "PENDING" and reason != "None" else "")
        if not attempts and word:
            code = found.get("ExitCode", "unknown")
            hint = "; do all nodes see its folder?" if word in ("FAILED", "NODE_FAIL") else ""
            return f"never started: SLURM says {word}, {reason}, exit code {code}{hint}"
    elif is_running(job):
        return "running"
    if not attempts or attempts[-1]["event"] == "begin":
        return (
            "unknown, as there is no SLURM on the path"
            if not there
            else "ended from outside"
            if attempts
            else "never started"
        )
    cause = attempts[-1]["cause"]
    return "cancelled" if cause not in ("done", "stopped") and job.is_cancelled() else cause


def progress(job: Job) -> str:
    if job.is_evaluation:
        return f"evaluation of {job.measured_run.name}"
    seen, rate = _newest_line(job)
    total = _total_samples(Path(job.run_dir) / "config.yaml")
    return f"{seen:,}{f' of {total:,}' if total else ''} samples, {max(0, job.newest_checkpoint()):,} samples saved" + (
        f", {rate:.0f} images/s" if rate else ""
    )


def _total_samples(recipe: Path) -> int:
    """At the end of a run, in whole batches; 0 where its recipe does not say, or cannot be read."""
    try:
        given = yaml.load(recipe.read_bytes(), LOADER)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return 0
    train = given.get("train") if isinstance(given, dict) else None
    total, batch = (train.get(key) if isinstance(train, dict) else None for key in ("total_samples", "global_batch"))
    if type(total) is not int or type(batch) is not int or batch < 1:
        return 0
    return max(0, -(-total // batch) * batch)


def _newest_line(job: Job) -> tuple[int, float]:
    """Samples seen and images/s of the newest metric line; of a log of weeks, only the end is read."""
    try:
        with (Path(job.run_dir) / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
            lines = file.read().splitlines()
    except OSError:
        return 0, 0.0
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # torn
            continue
        if not isinstance(row, dict) or "event" in row or not isinstance(row.get("samples_seen"), int):
            continue
        if "step" in row:
            rate = row.get("throughput/img_per_s")
            return row["samples_seen"], rate if isinstance(rate, int | float) else 0.0
    return 0, 0.0


def ago(then: float) -> str:
    return f"{rough_duration(time.time() - then)} ago"


# ------------------------------------------------------------------------------------------------ the commands


def list_runs(folder: Path, *, as_json: bool) -> int:
    """Print a line for each launched run below a folder, or a JSON array. Raises UserError."""
    if not folder.is_dir() and folder != Path("runs"):
        raise UserError(Problem("FOLDER", folder, "there is no such folder", "give the one that holds the runs"))
    runs = _jobs_below(folder)
    if as_json:
        print(to_json([_status_facts(run) if isinstance(run, Job) else {"error": str(run)} for run in runs], indent=1))
        return EXIT_DONE
    if not runs:
        print(f"No run below {shown(folder)} was launched (seer-scale inspect RUN describes one that train started).")
    width = max((len(display_name(run)) for run in runs if isinstance(run, Job)), default=0)
    for run in runs:
        if isinstance(run, Job):
            print(
                shown(f"{display_name(run):{width}}  {run.cluster:6} {run.job_id:18} {progress(run):44} {state(run)}")
            )
        else:
            print(run)
    return EXIT_DONE


def print_status(jobs: Sequence[Job], *, as_json: bool) -> int:
    if as_json:
        facts = [_status_facts(job) for job in jobs]
        print(to_json(facts[0] if len(jobs) == 1 else facts, indent=1))
        return EXIT_DONE
    for job in jobs:
        _print_status(job)
    return EXIT_DONE


def _status_facts(job: Job) -> dict[str, Any]:
    starts = [line for line in job.attempts() if line["event"] == "begin"]
    return {
        "name": job.name, "state": state(job), "cluster": job.cluster, "job": job.job_id, "run_dir": job.run_dir,
        "launched_in": job.launched_in or job.run_dir, "nodes": job.node_counts, "ranks_per_node": job.ranks_per_node,
        "samples_saved": max(0, job.newest_checkpoint()), "starts": len(starts), "now": starts[-1] if starts else None,
        "command": job.command,
    }  # fmt: skip


def _print_status(job: Job) -> None:
    lines = [f"{job.name}: {state(job)}, job {job.job_id} ({job.cluster}), submitted {ago(job.submitted)}"]
    lines.append(f"  {job.run_dir}, {progress(job)}")
    if job.launched_in:
        lines.append(f"  {'a copy of' if _is_copy(job) else 'moved from'} {job.launched_in}, where it was launched")
    for line in job.attempts()[-8:]:
        at = time.strftime("%F %T", time.localtime(line["time"]))
        if line["event"] == "begin":
            nodes = ", ".join(map(str, line["nodes"]))
            lines.append(f"  {at}  {line['attempt']} began on {counted(line['ranks'], 'rank')} ({nodes})")
        else:
            lines.append(f"  {at}  {line['attempt']} {line['cause']}")
    print("\n".join(map(shown, lines)))


def _is_copy(job: Job) -> bool:
    """Whether another folder is the one that was launched: that in which it was launched still holds that launch, or
    has been moved while the launcher of a local run holds its lock."""
    if not job.launched_in:
        return False
    try:
        there = Job.read(job.launched_in)
        if there and os.path.samefile(job.launched_in, job.run_dir):  # by another mount
            return False
    except (UserError, OSError):
        return False
    if there is not None:
        return there.job_id == job.job_id and there.submitted == job.submitted
    return job.cluster == "local" and process_is_alive(job.launcher) and not _holds_start_lock(job)


def _holds_start_lock(job: Job) -> bool:
    """Whether the launcher of a local run holds the lock of this very folder (submit.start_lock)."""
    open_files = Path("/proc") / job.launcher.partition(":")[0] / "fd"
    with suppress(OSError):
        own = (job.launch_dir / START_LOCK).stat()
        for file in open_files.iterdir():
            with suppress(OSError):  # closed meanwhile
                if os.path.samestat(own, file.stat()):
                    return True
    return False


def print_logs(job: Job, *, follow: bool) -> int:
    """The job's output, as SLURM or submitit keeps it."""
    read: dict[Path, int] = {}

    def show() -> None:
        for path in (
            p for kind in ("out", "err") for p in sorted(Path(job.log_dir or job.logs).glob(f"{job.job_id}_*.{kind}"))
        ):
            with path.open("rb") as file:
                file.seek(read.get(path, 0))
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            read[path] = read.get(path, 0) + len(new)
            lines = (line for line in new.decode(errors="replace").splitlines() if not line.startswith("submitit "))
            sys.stdout.write("".join(line + "\n" for line in lines))
            sys.stdout.flush()

    show()
    while follow and not console.lost(sys.stdout) and _may_still_run(job):
        time.sleep(FOLLOW_S)
        show()
    if not any(read.values()):
        print(shown(f"{job.name} has logged nothing yet: {state(job)}."))
    return EXIT_DONE


def _may_still_run(job: Job) -> bool:
    from seer_scale.launch import slurm

    try:
        return is_running(job)
    except slurm.NoAnswer:
        return True


def cancel(jobs: Sequence[Job], *, now: bool) -> int:
    errors = []
    for job in jobs:
        try:
            print(shown(_cancel_one(job, now=now)))
        except UserError as error:  # the others are cancelled all the same
            errors.append(error)
    if errors:
        raise UserError.joined(errors)
    return EXIT_DONE


def _cancel_one(job: Job, *, now: bool) -> str:
    if _is_copy(job):
        rule = f"is a copy of {job.launched_in}, whose job it names"
        raise UserError(Problem(display_name(job), NOTHING, rule, "cancel the original"))
    if job.cluster == "slurm":
        from seer_scale.launch import slurm

        return slurm.cancel(job, now=now or bool(job.launched_in))  # a job looks for the mark where it was launched
    if not is_running(job):
        raise UserError(Problem(job.name, NOTHING, f"is not running: {state(job)}"))
    if not now:
        _signal(job, signal.SIGUSR2)  # which, unlike SIGTERM, may come as often as one likes
        return f"{job.name} saves and stops; --now would end it at once."
    _signal(job, signal.SIGTERM)
    time.sleep(SECOND_STOP_S)
    _signal(job, signal.SIGTERM)
    return f"{job.name} ends at once."


def _signal(job: Job, number: int) -> None:
    """To the launcher of a local run, if it is there still."""
    if process_is_alive(job.launcher):
        with suppress(ProcessLookupError):
            os.kill(int(job.launcher.partition(":")[0]), number)


def relaunch_words(job: Job, *, nodes: str, time: str) -> list[str]:
    """The words after `seer-scale launch` that start this run again, where it lies now. Raises UserError."""
    if job.is_evaluation:
        rule = "is the evaluation of a run, which a sweep has submitted"
        raise UserError(Problem(job.name, NOTHING, rule, "give the sweep's command again"))
    if state(job) == "done":
        fix = "give its command again with more train.total_samples"
        raise UserError(Problem(job.name, NOTHING, "is done: it has seen all its samples", fix))
    words = list(job.command)
    changes = {"--nodes": nodes, "--time": time, "--run.dir": job.run_dir if job.launched_in else ""}
    for option, value in changes.items():
        if value:
            words = [*_drop_option(words, option), option, value]
    if not Path(job.folder).is_dir():
        rule = f"was launched from {job.folder}, which does not exist any more"
        command = f"{command_here()} launch {shlex.join(words)}"
        raise UserError(Problem(job.name, NOTHING, rule, f"give {command} from where its recipe and images are now"))
    return words


def _drop_option(words: Sequence[str], option: str) -> list[str]:
    kept, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word == option:
            del rest[:1]
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept
