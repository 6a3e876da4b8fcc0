"""What each process of a launched run does: python -P -m seer_scale.launch.rank RUN_DIR"""

from __future__ import annotations

import signal

from seer_scale.errors import STOP_SIGNALS
from seer_scale.files import to_json

if __name__ == "__main__":
    signal.pthread_sigmask(
        signal.SIG_BLOCK, STOP_SIGNALS
    )  # noted from now on; StopRequest lets them in, seconds of imports later

import os  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import yaml  # noqa: E402

from seer_scale import console  # noqa: E402
from seer_scale.config import plugins_of  # noqa: E402
from seer_scale.errors import (  # noqa: E402
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    QUEUE_SIGNALS,
    Problem,
    RankLostError,
    UserError,
    print_error,
)
from seer_scale.files import write_whole  # noqa: E402
from seer_scale.launch.job import ATTEMPT, Job  # noqa: E402
from seer_scale.plugins import load_plugins  # noqa: E402
from seer_scale.rank_info import detect  # noqa: E402


def main(run_dir: str) -> int:
    """Train, or evaluate; returns 0 also for a stop that was asked for, as srun would end the other ranks on any other
    status, unless a full disk keeps the outcome from being written."""
    try:
        job, attempt, rank = Job.of(run_dir), os.environ[ATTEMPT], detect().rank
    except UserError as error:
        return print_error(error)
    console.install(f"[rank {rank}] " if rank else "", drop=f"[rank{rank}]: ")  # torch's tracebacks begin with that
    os.chdir(job.folder)
    if job.cluster == "local":
        threading.Thread(target=_stop_without_controller, args=(os.getppid(),), daemon=True).start()
    try:
        _check_code_copy(job.code)
        status, is_outcome = _evaluate(job, rank) if job.is_evaluation else _train(job, attempt), rank == 0
    except RankLostError as error:  # the one that was lost knows why, or nobody does
        return print_error(error)
    except UserError as error:
        status, is_outcome = print_error(error), (rank == 0 or error.single_rank) and not error.retryable
    except KeyboardInterrupt:  # a second Ctrl-C, which the launcher reports
        return EXIT_FAILED
    return _end(job, status, is_outcome)


def _train(job: Job, attempt: str) -> int:
    from seer_scale.training.start import run_training

    return run_training(str(job.recipe), [], attempt)


def _evaluate(job: Job, rank: int) -> int:
    """Measure what the job's recipe says; what is done is not done again by the next start. Raises UserError."""
    for number in STOP_SIGNALS:  # the shell that started this process passes over some of them
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_at_signal, args=(job, rank), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, set(STOP_SIGNALS) - set(QUEUE_SIGNALS))
    from seer_scale.evaluate.suite import as_table, items_of, run_suite

    asked = yaml.safe_load(job.recipe.read_text())
    load_plugins(plugins_of(asked))
    summary = run_suite(
        job.measured_run, items_of(asked["tasks"], {}), which="last", initial=["trained"], out=None, device="auto"
    )
    if rank == 0:
        print(as_table(summary, Path(job.run_dir)), flush=True)
    return EXIT_FAILED if summary["problems"] else EXIT_DONE


def _end_at_signal(job: Job, rank: int) -> None:
    """A thread: one that waits in a collective would hear of no signal. All ranks get it."""
    signal.sigwait(QUEUE_SIGNALS)
    os._exit(_end(job, EXIT_STOPPED, rank == 0))


def _end(job: Job, status: int, is_outcome: bool) -> int:
    """Write down how it ended, where this rank is to; its exit status."""
    if is_outcome:
        try:
            write_whole(job.launch_dir / "outcome.json", to_json({"attempt": os.environ[ATTEMPT], "status": status}))
        except OSError:
            return status
    return EXIT_DONE if status == EXIT_STOPPED else status


def _check_code_copy(code: str) -> None:
    """What runs here is the copy of the code that travels with the job, which its contents name: the runs of an array
    share the first one's. Raises UserError."""
    package = Path(__file__).parents[1]
    if package.parent.name != Path(code).name:
        rule = f"the ranks must run the run's copy in {code}"
        raise UserError(Problem("seer_scale", package, rule, "remove what comes before that copy on PYTHONPATH"))


def _stop_without_controller(controller: int) -> None:
    """Save and stop when the process that started this one is gone."""
    while os.getppid() == controller:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
