"""Runs on SLURM: submitted by submitit, started by srun in the batch job, and requeued until done."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import submitit

from seer_scale import console
from seer_scale.errors import EXIT_HUNG, NOTHING, Problem, UserError, print_error
from seer_scale.launch.control import Control, Limits, log, signal_name
from seer_scale.launch.job import ATTEMPT, Job
from seer_scale.launch.profile import Profile
from seer_scale.rank_info import LAUNCHER, SLURM, without_rank_variables

ALIVE_STATES = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "STOPPED",
    "RESIZING",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "SIGNALING",
    "STAGE_OUT",
)
PASSED_OPTIONS = ("partition", "account", "qos", "constraint", "exclude", "reservation", "mem")
REQUEUE_FRACTION = 0.2
"""The part of the grace time in which a job that has not saved goes back to the queue without."""
SLURM_POLL_S, SLURM_ANSWER_TIMEOUT_S = 5.0, 600.0
"""Seconds between two questions to SLURM, and how long it may leave the question of going on without an answer."""
SRUN_START_TIMEOUT_S, KILL_TIMEOUT_S = 900.0, 120.0
"""Seconds in which srun starts the ranks, and in which those that are to end have ended."""
REQUEUE_TRAP = """trap 'c=$?; if [ $c -ge 128 ] && scontrol show job $SLURM_JOB_ID | grep -q JobState=RUNNING; then
scontrol requeue $SLURM_JOB_ID; fi' EXIT
trap : USR1 USR2"""
"""Of the batch script: where the process that looks after the ranks was killed, and the job has not been ended, it goes
back; and USR1 and USR2, which are for the ranks, do not end the script (scancel --full sends them there, too)."""
REQUEUE_TIMEOUT_S = 120.0
"""Seconds in which SLURM ends a job that it has put back into the queue."""


# ------------------------------------------------------------------------------------------------ submission


class _Executor(submitit.SlurmExecutor):
    """submitit's, which also writes a script where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _executor(job: Job, dependency: str = "") -> _Executor:
    profile, counts = Profile(**job.profile), job.node_counts
    more: dict[str, Any] = {
        "requeue": True,
        "nodes": f"{counts[0]}-{counts[-1]}" if len(counts) > 1 else str(counts[0]),
    }
    more |= {key: value for key in PASSED_OPTIONS if (value := getattr(profile, key))}
    # not tasks a node, which would fix the number of nodes at the first start
    more["mincpus"] = max(1, profile.cpus_per_rank) * job.ranks_per_node
    more |= {k.lstrip("-").replace("_", "-"): v for k, v in profile.sbatch.items()}
    if dependency:  # one that can never be met ends the job, which would wait for ever
        more["dependency"] = ",".join(filter(None, (dependency, more.get("dependency"))))
        more["kill-on-invalid-dep"] = "yes"
    variables = profile.environment | {"PYTHONSAFEPATH": "1"}
    setup = [*profile.before, *(f"export {k}={shlex.quote(v)}" for k, v in variables.items())]
    setup += [
        REQUEUE_TRAP,
        f'export PYTHONPATH={shlex.quote(job.code)}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"cd {shlex.quote(job.folder)}",
    ]
    executor = _Executor(folder=job.logs)
    executor.update_parameters(
        job_name=f"seer-{job.name}",
        time=profile.minutes,
        gpus_per_node=profile.gpus_per_node or None,
        signal_delay_s=profile.grace_s,
        use_srun=False,
        stderr_to_stdout=True,
        wckey=None,
        setup=setup,
        additional_parameters=more,
    )
    return executor


def dependencies(job_ids: Sequence[str]) -> list[tuple[str, list[int]]]:
    """How jobs wait, each for the good end of one of these: (dependency, their positions) of each array of them.

    job_ids: of a job, N, or of a task of an array, N_TASK; empty where there is nothing to wait for. A job that is
    requeued is the same job. Only an array that begins like the one it waits for can wait task by task (aftercorr).
    """
    found: list[tuple[str, list[int]]] = []
    arrays: dict[str, list[int]] = {}
    for i, job_id in enumerate(job_ids):
        arrays.setdefault(job_id.partition("_")[0], []).append(i)
    for number, positions in arrays.items():
        if not number:
            found.append(("", positions))
        elif len(positions) > 1 and [job_ids[i] for i in positions] == [f"{number}_{n}" for n in range(len(positions))]:
            found.append((f"aftercorr:{number}", positions))
        else:
            found += [(f"afterok:{job_ids[i]}", [i]) for i in positions]
    return found


def script(job: Job, array_size: int = 1, dependency: str = "") -> str:
    """The batch script of a job, or of an array of such jobs, after what `dependency` names."""
    executor = _executor(job, dependency)
    if array_size > 1:
        executor.parameters["map_count"] = array_size  # as submitit itself does
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def is_installed() -> bool:
    return shutil.which("scontrol") is not None


def check_installed() -> None:
    """Raises UserError without SLURM's commands."""
    if missing := [c for c in ("sbatch", "srun", "scontrol", "squeue") if not shutil.which(c)]:
        fix = "give this command on a login node of the cluster, or start with --cluster local"
        raise UserError(Problem(missing[0], NOTHING, "is not on the path", fix))


def submit(jobs: Sequence[Job], dependency: str = "") -> list[Job]:
    """Submit jobs whose code and recipe are in place, several as one array; the jobs with their numbers."""
    executor = _executor(jobs[0], dependency)
    try:
        if len(jobs) == 1:
            submitted = [executor.submit(control_slurm, jobs[0].run_dir)]
        else:
            submitted = executor.map_array(control_slurm, [job.run_dir for job in jobs])
    except (
        submitit.core.utils.FailedJobError,
        submitit.core.utils.FailedSubmissionError,
        subprocess.CalledProcessError,
        OSError,
    ) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = [line for line in lines if "error:" in line] or lines[-1:] or ["it gives no reason"]
        raise UserError(Problem("SLURM", NOTHING, f"does not take the job: {' '.join(reason)}")) from error
    log_dir = str(jobs[0].logs)
    numbered = [dataclasses.replace(job, job_id=s.job_id, log_dir=log_dir) for job, s in zip(jobs, submitted)]
    for job in numbered:
        job.write()
    return numbered


# ------------------------------------------------------------------------------------------------ in the batch job


def control_slurm(run_dir: str) -> None:
    """What the batch job runs, on its first node: the ranks of all nodes. Ends the process with the run's exit
    status."""
    console.install()
    nodes_given = int(os.environ["SLURM_JOB_NUM_NODES"])
    try:
        for _ in range(600):  # the record is written just after sbatch has answered
            if (job := Job.read(run_dir)) and job.job_id == _own_id():
                break
            time.sleep(0.1)
        else:
            job = Job.of(run_dir)
    except UserError as error:
        sys.exit(print_error(error))
    nodes, ranks_per_node = max(n for n in job.node_counts if n <= nodes_given), job.ranks_per_node
    ident = f"{_own_id()}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    names = (_query("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]) or "").split()[:nodes]
    if nodes < nodes_given:
        log(f"This job has {nodes_given} nodes, of which the recipe can use {nodes}.")
    control = Control(
        job, lambda attempt: SrunRanks(job, attempt, nodes, ranks_per_node), ident=ident,
        ranks=nodes * ranks_per_node, nodes=names, requeue=_requeue, limits=SlurmLimits(job),
    )  # fmt: skip
    sys.exit(control.run())


class SlurmLimits(Limits):
    """The job's time limit, as SLURM knows it now, and `seer-scale cancel`."""

    def __init__(self, job: Job):
        self._job, self._grace_s = job, Profile(**job.profile).grace_s
        self._end, self._asked_at = _end_of(_own_id()), time.monotonic()

    def is_cancelled(self) -> bool:
        return self._job.is_cancelled()

    def should_stop(self) -> bool:
        return self.is_cancelled() or self._is_within(self._grace_s)

    def is_over(self) -> bool:
        return self._is_within(REQUEUE_FRACTION * self._grace_s)

    def _is_within(self, seconds: float) -> bool:
        if time.time() < self._end - seconds:
            return False
        if time.monotonic() - self._asked_at > SLURM_POLL_S:  # the limit may have been moved
            self._end, self._asked_at = _end_of(_own_id(), self._end), time.monotonic()
        return time.time() >= self._end - seconds


class SrunRanks:
    """One step of srun: a rank a task."""

    def __init__(self, job: Job, attempt: str, nodes: int, ranks_per_node: int):
        profile = Profile(**job.profile)
        words = [
            "srun",
            f"--nodes={nodes}",
            f"--ntasks={nodes * ranks_per_node}",
            f"--ntasks-per-node={ranks_per_node}",
            "--kill-on-bad-exit=1",
            "--export=ALL",
        ]
        words += [f"--cpus-per-task={profile.cpus_per_rank}"] if profile.cpus_per_rank else ["--cpu-bind=none"]
        # until Python can note them, signals are passed over
        words += [
            "sh",
            "-c",
            'trap "" TERM USR1 USR2; exec "$@"',
            "sh",
            sys.executable,
            "-u",
            "-P",
            "-m",
            "seer_scale.launch.rank",
            job.run_dir,
        ]
        env = {k: v for k, v in without_rank_variables(os.environ).items() if k != "SLURM_CPUS_PER_TASK"}
        self._step = subprocess.Popen(words, env=env | {ATTEMPT: attempt, LAUNCHER: SLURM}, start_new_session=True)
        self.code, self._problem, self._began = 0, "", time.monotonic()
        self._looked_at, self._has_begun = self._began, False

    def poll(self) -> str | None:
        if (code := self._step.poll()) is None:
            self._must_begin()
            return None
        self.code = code
        if code and not _end_steps():
            self._problem = self._problem or "srun has ended, and its ranks cannot be ended"
        return self._problem or _describe_srun_end(code)

    def _must_begin(self) -> None:
        """An srun whose tasks never start, for what another step still holds, waits for ever."""
        if self._has_begun or time.monotonic() - self._looked_at < SLURM_POLL_S:
            return
        steps = _steps()
        self._looked_at, self._has_begun = time.monotonic(), bool(steps)
        if steps == [] and time.monotonic() - self._began > SRUN_START_TIMEOUT_S:
            self._problem = f"srun has started no rank within {SRUN_START_TIMEOUT_S:.0f} s"
            self._step.kill()

    def signal(self, number: int) -> None:
        """SLURM itself passes on what a job gets; this is for what is ours."""
        if number == signal.SIGKILL and self._step.poll() is None:
            _end_steps()
            self._step.kill()
        elif number == signal.SIGUSR2:
            _query("scancel", "--signal=USR2", _own_id())  # to the steps


def _describe_srun_end(code: int) -> str:
    """Why the step ended, of srun's status."""
    if code in (EXIT_HUNG, 128 + signal.SIGALRM):
        return "A rank hung and was ended by its watchdog"
    if code < 0:
        return f"srun was ended by {signal_name(-code)}"
    if code == 128 + signal.SIGTERM:  # srun's own, to the others
        return "A rank was killed or crashed (srun names it)"
    if code > 128 and code - 128 in set(signal.Signals):
        return f"A rank was ended by {signal.Signals(code - 128).name} (srun names it)"
    return f"A rank ended with status {code} (srun names it)" if code else ""


def _steps() -> list[str] | None:
    """The job's steps of ranks that SLURM knows to run; None where it does not answer."""
    found = _query("squeue", "--noheader", "--steps", "--jobs", _own_id(), "--format=%i")
    return None if found is None else [step for step in found.split() if step.rpartition(".")[2].isdecimal()]


def _end_steps() -> bool:
    """No rank is left; False where that could not be had in KILL_TIMEOUT_S."""
    until = time.monotonic() + KILL_TIMEOUT_S
    while (steps := _steps()) != []:
        if time.monotonic() > until:
            return False
        if steps:
            _query("scancel", "--signal=KILL", *steps)  # of the job, it would be the job's end
        time.sleep(1.0)
    return True


def _requeue() -> bool:
    """Put this job back into the queue, unless it is on its way out; never returns where SLURM then ends it."""
    until = time.monotonic() + SLURM_ANSWER_TIMEOUT_S
    while True:
        shown = _query("scontrol", "-o", "show", "job", _own_id()) or ""
        was, reason = (re.search(r"JobState=(\w+)", shown) or ["", ""])[1], "scontrol does not answer"
        if was and was != "RUNNING":  # cancelled, or preempted: SLURM has decided already
            log(f"SLURM has this job as {was}, so it is left to it.")
            return False
        if was:
            done = subprocess.run(["scontrol", "requeue", _own_id()], capture_output=True, text=True)
            if done.returncode == 0:
                log("Back to the queue.")
                time.sleep(REQUEUE_TIMEOUT_S)
                return True
            reason = done.stderr.strip()
        if time.monotonic() > until:
            log(f"SLURM does not put the job back into its queue ({reason}): start it again, and it goes on.")
            return False
        time.sleep(SLURM_POLL_S)


def _own_id() -> str:
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


# ------------------------------------------------------------------------------------------------ from outside


class NoAnswer(UserError):
    """SLURM does not answer."""


def _query(*words: str) -> str | None:
    """What a command of SLURM's prints: nothing of a job that SLURM does not know; None where it fails otherwise."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout
    return "" if "Invalid job id" in done.stderr else None


def details(job_id: str) -> dict[str, str]:
    """What SLURM still knows of a job, by scontrol's names; of one it has forgotten, the state from its accounting.
    Raises
    NoAnswer."""
    if not is_installed():
        return {}
    if (shown := _query("scontrol", "-o", "show", "job", job_id)) is None:
        raise NoAnswer(Problem("SLURM", NOTHING, f"does not answer about job {job_id}", "try again later"))
    if shown:
        return dict(re.findall(r"(?:^| )([\w/:]+)=(.*?)(?= [\w/:]+=| *$)", shown.splitlines()[0]))
    past = shutil.which("sacct") and _query("sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State") or ""
    return {"JobState": past.split()[0]} if past.strip() else {}


def _end_of(job_id: str, otherwise: float = math.inf) -> float:
    """The unix time at which SLURM ends a job; `otherwise` where it has no limit or SLURM does not answer."""
    try:
        return time.mktime(time.strptime(details(job_id).get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, NoAnswer):  # Unknown
        return otherwise


def state(job_id: str) -> str:
    """SLURM's word for a job's state; empty where it knows nothing of it."""
    return details(job_id).get("JobState", "")


def is_alive(job: Job) -> bool:
    return state(job.job_id) in ALIVE_STATES


def cancel(job: Job, *, now: bool) -> str:
    """Save and stop, or at once; a sentence that says what was done. Raises UserError."""
    check_installed()
    if (was := state(job.job_id)) not in ALIVE_STATES:
        now_is = was.lower() or "not known to SLURM any more"
        raise UserError(Problem(job.name, NOTHING, f"is not running: its job {job.job_id} is {now_is}"))
    try:
        job.cancel()
    except OSError as error:  # without the mark it would come back, but for scancel
        _run("scancel", job.job_id)
        return (
            f"Job {job.job_id} of {job.name} is cancelled by scancel, as its folder cannot be written "
            f"({error.strerror})."
        )
    if now or was != "RUNNING":
        _run("scancel", job.job_id)
        return f"Job {job.job_id} of {job.name} is cancelled."
    _run("scancel", "--signal=USR2", job.job_id)
    return f"Job {job.job_id} of {job.name} saves and stops; --now would end it at once."


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UserError(Problem(" ".join(words), NOTHING, f"failed: {done.stderr.strip()}"))
