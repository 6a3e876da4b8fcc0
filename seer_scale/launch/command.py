"""tools/launch.py's words: start a recipe here or on SLURM, and ask for, follow, end or restart what was started."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from seer_scale.config import recipe_names
from seer_scale.errors import EXIT_DONE, UserError, nearest
from seer_scale.launch.job import Job, snapshot
from seer_scale.launch.job import is_alive as process_is_alive
from seer_scale.launch.profile import Profile, load_profile, minutes

CLUSTERS = ("local", "slurm")
HELP = """Start a recipe on several processes, here or on SLURM; look after what was started.

  python tools/launch.py RECIPE --cluster local [--ranks N] [--key value ...]
  python tools/launch.py RECIPE --cluster slurm --profile slurm/NAME.yaml [--nodes N | MIN-MAX] [--key value ...]

  RECIPE             a shipped recipe's name or a YAML file
  --cluster local    processes on this machine; the command follows them
  --cluster slurm    a job; the command returns when it is in the queue
  --profile FILE     what the cluster wants to be told (slurm/example.yaml explains every key)
  --nodes N          nodes, or MIN-MAX for whatever is free (default: what parallel.ranks fill)
  --ranks N          processes a node (default: local: parallel.ranks; slurm: one a GPU)
  --time T           time limit of a job, instead of the profile's
  --name NAME        the run's name, and its folder runs/NAME (default: the recipe's)
  --array KEY=A,B,C  one run for each value; KEY is `recipe` or a key of the recipe; several make a grid
  --restarts N       starts of the ranks in a row without a new checkpoint, before the job goes back to the queue or ends
  --dry-run          print the batch script, and submit nothing
  --key value        any key of the recipe (seer-scale train --help shows them)

  python tools/launch.py list [FOLDER]                runs below a folder (runs), with their states
  python tools/launch.py status NAME... [--json]      of each run: its job, how far it is, how it was started
  python tools/launch.py logs NAME [--follow]         what its ranks said
  python tools/launch.py cancel NAME... [--now]       save and stop; --now: as scancel does, which leaves seconds to save
  python tools/launch.py resubmit NAME [--nodes ...] [--time ...]   the same again: it goes on from its newest checkpoint

NAME is a run's folder, or its name below runs/; 'sweep-*' means those of an array.
Ctrl-C saves and stops a local run; the same command goes on. Exit status: 0 done (or submitted), 1 failed, 2 bad input, 75 stopped and saved.
"""
OPTIONS = ("--cluster", "--profile", "--nodes", "--ranks", "--time", "--name", "--array", "--restarts")
FLAGS = ("--dry-run", "--follow", "--now", "--json")
ASK = {"list": (), "status": ("--json",), "logs": ("--follow",), "cancel": ("--now",), "resubmit": ("--nodes", "--time", "--dry-run")}
"""What is asked of runs there are, with the options each takes."""
ASK_OF_SEVERAL = ("status", "cancel")
FOLLOW_S = 0.5
T = TypeVar("T")


def main(words: list[str]) -> int:
    """Raises UserError."""
    if not words or "-h" in words or "--help" in words:
        print(HELP)
        return EXIT_DONE
    plain, own, overrides = _split(words)
    if plain and plain[0] in ASK:
        return _ask(plain[0], plain[1:], own, overrides)
    if not plain:
        raise UserError("The recipe comes first: python tools/launch.py RECIPE --cluster local.")
    if len(plain) > 1 and not Path(plain[0]).is_file() and plain[0] not in recipe_names():
        raise UserError(f"{plain[0]!r} is neither a recipe nor a command; {nearest(plain[0], (*ASK, *recipe_names()))}")
    if len(plain) > 1:
        quote = " A pattern goes in quotes, as in --data.path 'DIR/*.tar'." if Path(plain[1]).exists() else ""
        raise UserError(f"{plain[1]!r} stands alone; overrides are written --section.key value.{quote}")
    _refuse(own, ("--follow", "--now", "--json"), "to start a run")
    cluster = own.get("--cluster")
    if cluster is None and not Path(plain[0]).is_file() and plain[0] not in recipe_names():
        raise UserError(f"{plain[0]!r} is neither a recipe nor a command; {nearest(plain[0], (*ASK, *recipe_names()))}")
    if cluster is None:
        raise UserError("--cluster is missing: say where to start, as in --cluster local or --cluster slurm.")
    if cluster not in CLUSTERS:
        raise UserError(f"--cluster is {cluster!r}, but must be local or slurm{'; ' + near if (near := nearest(cluster, CLUSTERS)).startswith('did') else '.'}")
    if cluster == "local":
        _refuse(own, ("--profile", "--nodes", "--time", "--dry-run"), "with --cluster local")
    return _start(plain[0], cluster, own, overrides)


def _words(ask, own: dict) -> list[str]:
    """The command that starts this one run."""
    options = {k: v for k, v in own.items() if k in OPTIONS and k != "--array"} | ({"--name": ask.name} if ask.name else {})
    return [ask.recipe, *(word for option in options.items() for word in option), *ask.overrides]


def _refuse(own: dict[str, list[str]], options: Sequence[str], where: str) -> None:
    for option in options:
        if option in own:
            raise UserError(f"{option} has no effect {where}; leave it out.")


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, str | list[str]], list[str]]:
    """Words that stand alone before any option, the launcher's own options, and the recipe's overrides."""
    plain, own, rest, words = [], {}, [], list(words)
    while words:
        word = words.pop(0)
        name, given, value = word.partition("=")
        if name in FLAGS:
            if given:
                raise UserError(f"{name} takes no value; write {name} alone.")
            own[name] = "yes"
        elif name in OPTIONS:
            if not given and (not words or words[0].startswith("--")):
                raise UserError(f"{name} has no value; write {name} VALUE.")
            value = value if given else words.pop(0)
            if name == "--array":
                own.setdefault(name, []).append(value)
            elif name in own:
                raise UserError(f"{name} is given twice; give it once.")
            else:
                own[name] = value
        elif name.startswith("--") and "." not in name:
            of_profile = name[2:].replace("-", "_") in {f.name for f in dataclasses.fields(Profile)}
            hint = f"{name[2:].replace('-', '_')} is a key of the profile." if of_profile else nearest(name, (*OPTIONS, *FLAGS))
            raise UserError(f"{name} is no option of the launcher, and keys of a recipe have a dot, as in --train.samples; {hint}")
        elif name.startswith("--"):
            rest.append(word)
            if not given and words and not words[0].startswith("--"):
                rest.append(words.pop(0))
        else:
            plain.append(word)
    return plain, own, rest


# ------------------------------------------------------------------------------------------------ start


def _start(recipe: str, cluster: str, own: dict, overrides: list[str]) -> int:
    from seer_scale.launch.prepare import Request, prepare, stow  # loads torch, which the other commands do without

    profile, problems = Profile(gpus_per_node=0), []
    if cluster == "slurm" and "--profile" not in own:
        problems.append("--profile is missing: say which cluster, as in --profile slurm/NAME.yaml (slurm/example.yaml explains every key).")

    def given(option: str, read: Callable[[str], T], otherwise: T) -> T:
        try:
            return read(own[option]) if option in own else otherwise
        except UserError as problem:
            problems.append(str(problem))
            return otherwise

    profile = given("--profile", load_profile, profile)
    nodes = given("--nodes", _nodes, None)
    ranks = given("--ranks", partial(_number, "--ranks", least=1), 0)
    knows_nodes = not problems
    profile = given("--time", lambda time: _within(profile, time), profile)
    profile = dataclasses.replace(profile, restarts=given("--restarts", partial(_number, "--restarts", least=0), profile.restarts))
    ask = Request(
        recipe=recipe, overrides=overrides, name=own.get("--name", ""), cluster=cluster if knows_nodes else "local",
        nodes=nodes if knows_nodes else None, ranks=ranks, profile=profile,
    )  # fmt: skip
    asked = _array(ask, own.get("--array", []))
    if ask.name and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,=+@ -]*", ask.name):
        problems.append(f"--name is {ask.name!r}, but must begin with a letter or digit, and hold nothing but those and _ . , = + @ - (the folder is run.dir).")
    made = []
    for one in asked:
        try:
            made.append(prepare(one, _words(one, own)))
        except UserError as problem:
            problems.append(f"{one.name}: {problem}" if len(asked) > 1 else str(problem))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    if percent := next((job.run_dir for job, _, _ in made if "%" in job.run_dir and cluster == "slurm"), None):
        raise UserError(f"run.dir is {percent}, but SLURM replaces what follows a %: choose another.")
    folders = [job.run_dir for job, _, _ in made]
    if len(set(folders)) < len(folders):
        raise UserError(f"--array makes {len(folders)} runs, but run.dir gives them one folder: leave it out, and each has runs/NAME (--name says how they are called).")
    for note in dict.fromkeys(note for _, _, notes in made for note in notes):
        print(note)
    if cluster == "local":
        from seer_scale.launch.local import run_here

        if len(made) > 1:
            raise UserError("--array needs a queue: with --cluster local start one run after the other.")
        with _claimed(made[0][0]):
            return run_here(stow(*made[0][:2]))
    from seer_scale.launch import slurm

    if "--dry-run" in own:
        for alike in _alike(made):
            first = alike[0][0]
            print(slurm.script(dataclasses.replace(first, code=snapshot(first.place, write=False)), len(alike)))
            if len(alike) > 1:
                print("\n".join(f"# {n}: {_called(job)}" for n, (job, _, _) in enumerate(alike)))
        return EXIT_DONE
    slurm.must_be_there()
    before = {job.run_dir for job, _, _ in made if Path(job.run_dir).exists()}
    claimed: list[Job] = []
    with ExitStack() as claims:
        try:
            for job, _, _ in made:
                claims.enter_context(_claimed(job))
                claimed.append(job)
            for alike in _alike(made):
                _tell_submitted(slurm.submit([stow(job, given) for job, given, _ in alike]))
        finally:
            for job in claimed:
                if job.run_dir not in before and not Job.read(job.run_dir):
                    shutil.rmtree(job.run_dir, ignore_errors=True)
    return EXIT_DONE


def _within(profile: Profile, time: str) -> Profile:
    """The profile with another time limit. Raises UserError."""
    if minutes(time) * 60 <= profile.grace_s:
        raise UserError(f"--time is {time}, but the profile's grace_s is {profile.grace_s} s, in which the run saves before the limit: give more time, or lower grace_s.")
    return dataclasses.replace(profile, time=time)


def _tell_submitted(jobs: list[Job]) -> None:
    for job in jobs:
        nodes = "-".join(map(str, dict.fromkeys((job.fits[0], job.fits[-1]))))
        print(f"Submitted {job.name} as job {job.job_id} on {nodes} node{'s' * (nodes != '1')} of {job.ranks_per_node} ranks: {_ourselves()} status {_called(job)}")


def _alike(made: list[tuple]) -> list[list[tuple]]:
    """Those that want the same nodes, which one array can hold."""
    groups: dict[tuple[int, ...], list[tuple]] = {}
    for one in made:
        groups.setdefault((one[0].fits[0], one[0].fits[-1], one[0].ranks_per_node), []).append(one)
    return list(groups.values())


@contextmanager
def _claimed(job: Job) -> Iterator[None]:
    """Nobody else starts this run meanwhile. Raises UserError where it is in use."""
    try:
        job.place.mkdir(parents=True, exist_ok=True)
        claim = os.open(job.place / ".claim", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{job.run_dir} cannot hold a run ({error.strerror}): choose another run.dir.") from error
    try:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _must_be_free(job)
            raise UserError(f"The run {job.name} is being started by another command: wait for that one, or give another --name.") from None
        except OSError as error:
            raise UserError(f"{job.run_dir} cannot be locked ({error.strerror}): choose a run.dir on a file system with locks.") from error
        _must_be_free(job)
        yield
    finally:
        os.close(claim)


def _must_be_free(job: Job) -> None:
    before = Job.read(job.run_dir)
    if before and _is_alive(before):
        raise UserError(f"The run {job.name} is in use by job {before.job_id}, submitted {_ago(before.submitted)} ago: cancel it ({_ourselves()} cancel {_called(job)}), or give another --name.")


def _is_alive(job: Job) -> bool:
    if job.cluster == "local":
        return process_is_alive(job.launcher)
    from seer_scale.launch import slurm

    return slurm.is_alive(job)


def _may_go_on(job: Job) -> bool:
    from seer_scale.launch import slurm

    try:
        return _is_alive(job)
    except slurm.NoAnswer:
        return True


def _number(option: str, value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"{option} is {value!r}, but must be a whole number of at least {least}, such as 2.")
    return int(value)


def _nodes(value: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", value)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UserError(f"--nodes is {value!r}, but must be a number of nodes or a range such as 32-64.")
    return low, high


def _array(ask, given: Sequence[str]) -> list:
    """One request for each element of the grid."""
    axes: list[list[tuple[str, str]]] = []
    for one in given:
        key, is_given, values = one.partition("=")
        values = _split_list(values) if is_given else []
        if len(values) < 2 or not all(values):
            raise UserError(f"--array is {one!r}, but must name a key and at least two values, such as optim.lr=0.1,0.2.")
        axes.append([(key, value) for value in values])
    if not axes:
        return [ask]
    out, base = [], ask.name or Path(ask.recipe).stem
    for point in itertools.product(*axes):
        recipe = next((value for key, value in point if key == "recipe"), ask.recipe)
        words = [word for key, value in point if key != "recipe" for word in (f"--{key}", value)]
        marks = [Path(value).stem if key == "recipe" else f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.+-]', '_', value)}" for key, value in point]
        out.append(dataclasses.replace(ask, recipe=recipe, overrides=[*ask.overrides, *words], name="-".join([base, *marks])))
    if len({one.name for one in out}) < len(out):
        raise UserError("--array gives two runs of one name: leave out what is given twice.")
    return out


def _split_list(values: str) -> list[str]:
    """At the commas outside of all brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for c in values:
        if c == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += c
        if quote or c in "'\"":
            quote = "" if c == quote else quote or c
        else:
            depth += (c in "[{(") - (c in ")}]")
    return parts


# ------------------------------------------------------------------------------------------------ ask


def _ask(what: str, plain: list[str], own: dict, overrides: list[str]) -> int:
    if overrides and what == "resubmit":
        raise UserError(f"{overrides[0]} has no effect with resubmit, which repeats the run as it was: to change a key, give the run's first command again with it (status NAME --json shows that command).")
    if overrides:
        raise UserError(f"{overrides[0]} has no effect with {what}; leave it out.")
    _refuse(own, [o for o in own if o not in ASK[what]], f"with {what}")
    if what == "list":
        if len(plain) > 1:
            raise UserError("list takes one folder: python tools/launch.py list [FOLDER].")
        if plain and not Path(plain[0]).is_dir():
            raise UserError(f"There is no folder {plain[0]}: give the one that holds the runs' folders.")
        return _list(Path(plain[0] if plain else "runs"))
    if not plain or len(plain) > 1 and what not in ASK_OF_SEVERAL:
        raise UserError(f"{what} takes {'runs' if what in ASK_OF_SEVERAL else 'one run'}: python tools/launch.py {what} NAME.")
    jobs = [job for name in plain for job in _matching(name)]
    if len(jobs) > 1 and what not in ASK_OF_SEVERAL:
        raise UserError(f"{what} takes one run, and {plain[0]} are {len(jobs)}.")
    if what in ASK_OF_SEVERAL:
        return {"status": _status, "cancel": _cancel}[what](jobs, own)
    return {"logs": _logs, "resubmit": _resubmit}[what](jobs[0], own)


def _matching(name: str) -> list[Job]:
    """The run called so, or those that a pattern means, which the shell has not expanded."""
    if not set("*?[") & set(name):
        return [_find(name)]
    places = sorted({p for pattern in (name, f"runs/{name}") for p in (Path("/").glob(pattern[1:]) if pattern[0] == "/" else Path().glob(pattern))})
    found = [job for place in places if (job := Job.read(place))]
    if not found:
        raise UserError(f"No launched run is called {name}, here or below runs/: {_ourselves()} list shows those there are.")
    return found


def _find(name: str) -> Job:
    for place in (Path(name), Path("runs") / name):
        if job := Job.read(place):
            return job
    there = [Job.read(p.parents[1]) for p in Path("runs").glob("*/launch/job.json")]
    names = [j.name for j in there if j]
    parts = [n for n in names if n.startswith(f"{name}-")]
    hint = f"an array's runs have names of their own: {', '.join(parts)}." if parts else nearest(name, names) if names else "none was launched here."
    raise UserError(f"There is no launched run {name}: neither {name} nor runs/{name} holds launch/job.json; {hint}")


def _ourselves() -> str:
    """How this command is given from here."""
    python = Path(sys.executable)
    known = shutil.which("python")
    short = "python" if known and Path(known).absolute() == python else python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return f"{short} {sys.argv[0] if sys.argv[0].endswith('launch.py') else 'tools/launch.py'}"


def _called(job: Job) -> str:
    """The shortest word by which `_find` finds it from here."""
    place = Path(job.run_dir)
    if place.parent == Path("runs").absolute():
        return place.name
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(place)


def _state(job: Job) -> str:
    attempts, there = [line for line in job.attempts() if line["attempt"].startswith(f"{job.job_id}.")], True
    if job.cluster == "slurm":
        from seer_scale.launch import slurm

        try:
            found, there = slurm.details(job.job_id), slurm.is_there()
        except slurm.NoAnswer:
            return "unknown, as SLURM does not answer"
        word, reason = found.get("JobState", ""), found.get("Reason", "None")
        if word in slurm.ALIVE and job.is_cancelled():
            return f"{word.lower()}, asked to stop {_ago(job.cancelled_at())} ago"
        if word in slurm.ALIVE:
            return word.lower() + (f" ({reason})" if word == "PENDING" and reason != "None" else "")
        if not attempts and word:
            code = found.get("ExitCode", "unknown")
            return f"never started: SLURM says {word}, {reason}, exit code {code}" + ("; do all nodes see its folder?" if word in ("FAILED", "NODE_FAIL") else "")
    elif _is_alive(job):
        return "running"
    if not attempts or attempts[-1]["event"] == "begin":
        return "unknown, as there is no SLURM on the path" if not there else "ended from outside" if attempts else "never started"
    cause = attempts[-1]["cause"]
    return "cancelled" if cause not in ("done", "stopped") and job.is_cancelled() else cause


def _list(folder: Path) -> int:
    jobs = [job for p in sorted(folder.glob("**/launch/job.json")) if (job := Job.read(p.parents[1]))]
    if not jobs:
        print(f"No run below {folder} was launched.")
    width = max((len(_called(job)) for job in jobs), default=0)
    for job in jobs:
        print(f"{_called(job):{width}}  {job.cluster:6} {job.job_id:18} {_progress(job):44} {_state(job)}")
    return EXIT_DONE


def _progress(job: Job) -> str:
    seen, rate = _newest_line(job)
    total = re.search(r"^train:.*?^  samples: (\d+)", _text(Path(job.run_dir) / "config.yaml"), re.M | re.S)
    of = f" of {int(total[1]):,}" if total else ""
    return f"{seen:,}{of} samples, {max(0, job.newest_checkpoint()):,} samples saved" + (f", {rate:.0f} images/s" if rate else "")


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
        if "step" in row and "event" not in row:
            return row["samples_seen"], row.get("throughput/img_per_s") or 0.0
    return 0, 0.0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _status(jobs: list[Job], own: dict) -> int:
    if "--json" in own:
        facts = [_facts(job) for job in jobs]
        print(json.dumps(facts[0] if len(jobs) == 1 else facts, indent=1))
        return EXIT_DONE
    for job in jobs:
        _show(job)
    return EXIT_DONE


def _facts(job: Job) -> dict[str, Any]:
    starts = [line for line in job.attempts() if line["event"] == "begin"]
    return {
        "name": job.name, "state": _state(job), "cluster": job.cluster, "job": job.job_id, "run_dir": job.run_dir, "nodes": job.fits,
        "ranks_per_node": job.ranks_per_node, "samples_saved": max(0, job.newest_checkpoint()), "starts": len(starts),
        "now": starts[-1] if starts else None, "command": job.command,
    }  # fmt: skip


def _show(job: Job) -> None:
    print(f"{job.name}: {_state(job)}, job {job.job_id} ({job.cluster}), submitted {_ago(job.submitted)} ago")
    print(f"  {job.run_dir}, {_progress(job)}")
    for line in job.attempts()[-8:]:
        at = time.strftime("%F %T", time.localtime(line["time"]))
        if line["event"] == "begin":
            print(f"  {at}  {line['attempt']} began on {line['ranks']} rank{'s' * (line['ranks'] > 1)} ({', '.join(line['nodes'])})")
        else:
            print(f"  {at}  {line['attempt']} {line['cause']}")


def _logs(job: Job, own: dict) -> int:
    """The job's output, as SLURM or submitit keeps it."""
    read: dict[Path, int] = {}

    def show() -> None:
        for path in (p for kind in ("out", "err") for p in sorted(Path(job.log_dir or job.logs).glob(f"{job.job_id}_*.{kind}"))):
            with path.open("rb") as file:
                file.seek(read.get(path, 0))
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            read[path] = read.get(path, 0) + len(new)
            sys.stdout.write("".join(line + "\n" for line in new.decode(errors="replace").splitlines() if not line.startswith("submitit ")))
            sys.stdout.flush()

    show()
    while "--follow" in own and _may_go_on(job):
        time.sleep(FOLLOW_S)
        show()
    if not any(read.values()):
        print(f"{job.name} has said nothing yet: {_state(job)}.")
    return EXIT_DONE


def _cancel(jobs: list[Job], own: dict) -> int:
    problems = []
    for job in jobs:
        try:
            print(_end(job, now="--now" in own))
        except UserError as problem:  # the others are cancelled all the same
            problems.append(str(problem))
    if problems:
        raise UserError("\n".join(problems))
    return EXIT_DONE


def _end(job: Job, *, now: bool) -> str:
    if job.cluster == "slurm":
        from seer_scale.launch import slurm

        return slurm.cancel(job, now=now)
    if not _is_alive(job):
        raise UserError(f"{job.name} is not running: {_state(job)}.")
    launcher = int(job.launcher.partition(":")[0])
    os.kill(launcher, signal.SIGTERM)
    if now:
        time.sleep(1.5)
        os.kill(launcher, signal.SIGTERM)
    return f"{job.name} {'ends at once' if now else 'saves and stops'}."


def _resubmit(job: Job, own: dict) -> int:
    """The command it was started with, again; other nodes or another time limit may be given."""
    if _state(job) == "done":
        raise UserError(f"{job.name} is done: it has seen all its samples. Start it with more train.samples to go on.")
    words = list(job.command)
    for option in ("--nodes", "--time"):
        if option in own:
            if option in words:
                del words[words.index(option) : words.index(option) + 2]
            words += [option, own[option]]
    return _in_folder(job.folder, lambda: main([*words, *(["--dry-run"] if "--dry-run" in own else [])]))


def _in_folder(folder: str, call: Callable[[], int]) -> int:
    before = os.getcwd()
    os.chdir(folder)
    try:
        return call()
    finally:
        os.chdir(before)


def _ago(then: float) -> str:
    seconds = max(0, time.time() - then)
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}{'s' * (round(seconds / size) > 1)}"
    return f"{seconds:.0f} s"
