"""Errors a user can act on, and what a process and those who started it say to each other: signals and exit statuses.

`Problem` is what cannot work as data: the key, its value, the rule and the nearest fix. `UserError` carries it, is one
sentence that says it, and is printed without a traceback, with exit status 2. `ConfigError` carries every problem of a
recipe at once.
Anything else that escapes is a defect of ours and keeps its traceback (exit status 1).
"""

from __future__ import annotations

import copy
import copyreg
import difflib
import os
import signal
import socket
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from seer_scale.files import shown
from seer_scale.formatting import counted, with_full_stop

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_HUNG = 0, 1, 2, 75, 76
"""Exit statuses: done, failed, bad input, stopped on request with its state saved (EX_TEMPFAIL: run it again), and
ended by its own watchdog."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What asks a run to save and stop: the last two as clusters send them before a time limit or a preemption, SIGHUP
where a terminal is closed or an ssh connection drops."""
QUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""Those by which a queue takes a job back that it will start again."""
ECHO_S = 1.0
"""A signal to a process group comes twice, from the group and from the launcher: within so many seconds it is one
request."""


class _Nothing:
    """The type of NOTHING, a Problem's value where none was given."""

    def __repr__(self) -> str:
        return "NOTHING"

    def __reduce__(self) -> str:
        return "NOTHING"  # the one there is, in another process, too


NOTHING = _Nothing()


@dataclass(frozen=True)
class Problem:
    """One thing that cannot work, as data; its text is made here and never read back.

    key: a recipe's key, an option, an environment variable, or what else is at fault: a file, a checkpoint.
    value: what was given for it; NOTHING where nothing was, or where the key says it all. rule: what holds of it, a
    clause: "KEY is VALUE, but RULE", or "KEY RULE" without a value (after a colon, a sentence of its own). nearest: the
    value that would do, or several; a string is a clause that says what to do instead.
    """

    key: str
    value: Any
    rule: str
    nearest: Any = ""

    def __str__(self) -> str:
        return with_full_stop(self.clause) if self.key else self.rule

    @property
    def clause(self) -> str:
        """Its text without a full stop, to stand in another sentence."""
        if not self.key:  # a sentence
            return self.rule.removesuffix(".")
        begin = f"{self.key}{' ' * (self.rule[:1] != ':')}{self.rule}"
        if self.value is not NOTHING:
            begin = f"{self.key} is {_as_text(self.value)}, but {self.rule}"
        if self.nearest == "" or self.nearest is None:
            return begin
        several = self.nearest if isinstance(self.nearest, (tuple, set)) else (self.nearest,)
        fix = self.nearest if isinstance(self.nearest, str) else f"nearest: {' or '.join(_as_text(n) for n in several)}"
        return f"{begin}; {fix.removesuffix('.')}"

    @classmethod
    def from_check(cls, key: str, error: UserError, known: Collection[str] = ()) -> list[Problem]:
        """What a check of `key` has raised, as problems of it, but those of other keys that are `known`."""
        found, below = [], tuple(f"{name}{mark}" for name in (key, *known) for mark in ".[")  # as views.crops[0].size
        for problem in error.problems:
            if problem.key in known or problem.key.startswith(below):
                found.append(problem)
            elif problem.key and problem.value is NOTHING:
                found.append(cls(key, problem.key, problem.rule, problem.nearest))
            else:
                found.append(cls(key, NOTHING, f": {problem.clause}"))
        return found

    @classmethod
    def of(cls, problem: str | Problem) -> Problem:
        """A sentence as a Problem without a key."""
        return problem if isinstance(problem, Problem) else cls("", NOTHING, problem)


def _as_text(value: Any) -> str:
    """As a recipe writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if abs(value) < 1e6 else f"{value}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_as_text, value))}]"
    is_plain = not isinstance(value, str) or value and not any(c.isspace() for c in value)
    return f"{value}" if is_plain else repr(value)


class UserError(Exception):
    """Something given by the user cannot work; the message says what to do instead. args: its lines. problems: the
    same as data; a plain sentence is one without a key."""

    single_rank = False
    """Raised on this rank alone, which therefore has to tell it."""
    retryable = False
    """Not the input's fault as far as one can see (it was read before): a launched run is started again, a bounded
    number of times."""

    def __init__(self, *problems: str | Problem):
        self.problems: list[Problem] = [Problem.of(problem) for problem in problems]
        super().__init__(*(shown(str(problem)) for problem in problems))  # a line each, whatever the names in it

    def __str__(self) -> str:
        return "\n".join(self.args)

    @classmethod
    def joined(cls, errors: Iterable[UserError]) -> UserError:
        """Several as one: the lines of each, and the problems of all; what comes twice is told once."""
        several = list({error.args: error for error in errors}.values())
        whole = cls()
        whole.args = tuple(line for error in several for line in error.args)
        whole.problems = [problem for error in several for problem in error.problems]
        return whole

    def prefixed(self, where: str) -> Self:
        """The same, told of one of several."""
        error = copy.copy(self)
        error.args, error.problems = (f"{shown(where)}: {self.args[0]}", *self.args[1:]), self.problems
        return error

    def __reduce__(self) -> tuple:
        return (
            copyreg.__newobj__,  # type: ignore[attr-defined]  # typeshed lacks it; pickle goes by it
            (type(self), *self.args),
            self.__dict__,
        )  # the text is made: another process takes it as it is


class ConfigError(UserError):
    """All problems of one recipe (or of `what` else)."""

    def __init__(self, problems: Sequence[str | Problem], what: str = "The recipe"):
        super().__init__(f"{what} has {counted(len(problems), 'problem')}:", *(f"  - {p}" for p in problems))
        self.problems = [Problem.of(problem) for problem in problems]


class RankError(UserError):
    """Who this process is among the ranks is unclear, or the others do not come: whoever finds it tells it."""

    single_rank = True


class DataError(UserError):
    """The images cannot be read as given."""


class Unreadable(DataError):
    """An image, or another file, cannot be read. name: its name, empty where whoever raises does not know it. reason: a
    clause."""

    def __init__(self, reason: str, name: str = ""):
        super().__init__(Problem(name or "the image", NOTHING, f"cannot be read ({reason})"))
        self.reason, self.name = reason, name


class SourceEnded(DataError):
    """A source cannot go on: no other image stands in for what is missing."""


class CheckpointError(UserError):
    """A checkpoint cannot be used as asked."""


class TrainingError(UserError):
    """The run cannot go on (the loss is not finite any more, say). Exit status 1: the recipe itself was valid."""


class RankLostError(TrainingError):
    """Another rank is gone; started again, the run goes on."""


class StartStopped(UserError):
    """A stop was asked for before there was anything to save."""


@contextmanager
def nothing_begun() -> Iterator[None]:
    """What a start does before it notes signals: SIGINT ends that and costs nothing."""
    try:
        yield
    except KeyboardInterrupt:
        raise StartStopped("Stopped by SIGINT before anything was begun. Start it again and it goes on.") from None


def stop_signals() -> tuple[signal.Signals, ...]:
    """STOP_SIGNALS but those that this process was started to ignore: SIGHUP by nohup, SIGINT by a script's `&`. To be
    asked before any of them is given a handler. The others srun's ranks ignore until they can save
    (launch/slurm.py)."""
    kept = (signal.SIGHUP, signal.SIGINT)
    return tuple(s for s in STOP_SIGNALS if s not in kept or signal.getsignal(s) != signal.SIG_IGN)


def ends_at_once(number: int) -> bool:
    """Whether a launcher that is sent this stop signal a second time ends the ranks at once: a terminal that goes may
    send its own more than once, and so may a queue."""
    return number in (signal.SIGINT, signal.SIGTERM)


def closest(word: str, known: Iterable[str], alike: float = 0.5) -> str | None:
    """The known word that is most like this one; None where none is. alike: the least likeness, 1 = the same."""
    return next(iter(difflib.get_close_matches(word, sorted(known), n=1, cutoff=alike)), None)


def nearest(word: str, known: Iterable[str]) -> str:
    """A Problem's clause that names the closest known word, or all of them where none is close."""
    known = sorted(known)
    found = closest(word, known)
    return f"did you mean {found}?" if found else f"known: {', '.join(known)}."


def print_error(error: UserError) -> int:
    """Print a user's error, once a machine, and return the exit status it deserves."""
    rank, place = (
        next((os.environ[name] for name in names if name in os.environ), "0")
        for names in (
            ("RANK", "SLURM_PROCID"),
            ("LOCAL_RANK", "SLURM_LOCALID"),
        )
    )
    if rank == "0" or place == "0" or error.single_rank:
        where = "" if rank == "0" else f" (rank {rank} on {socket.gethostname()})"
        print(f"seer-scale{where}: {error}", file=sys.stderr, flush=True)
    if isinstance(error, StartStopped):
        exec("")  # else python -m ends by SIGINT where KeyboardInterrupt has passed through one, as a dataclass has
        return EXIT_STOPPED
    return EXIT_FAILED if isinstance(error, TrainingError) else EXIT_BAD_INPUT


ALIKE = 0.65
"""Names of a folder are of anything, and more alike by chance than words that are known."""
ABSENT, LEADS_NOWHERE = "does not exist", "is a link that leads nowhere"


def missing_path(path: str | os.PathLike, suffixes: tuple[str, ...] | None = None) -> Problem:
    """Of a path of which os.path.exists says no, why, and what is nearest. suffixes: with which names of files end that
    may have been meant, beside folders; None: any may."""
    cause, missing = _cause(path), Path(path)
    if os.path.islink(path):  # another name would be no nearer to what it leads to
        return Problem(os.fspath(path), NOTHING, cause)
    while not os.path.isdir(missing.parent) and missing.parent != missing:
        missing = missing.parent
    if cause == ABSENT and os.path.lexists(missing):  # on the way, and no folder
        fix = f"{missing} {LEADS_NOWHERE if os.path.islink(missing) else 'is no folder'}"
        return Problem(os.fspath(path), NOTHING, cause, fix)
    try:
        with os.scandir(missing.parent) as there:
            meant = [e.name for e in there if suffixes is None or e.name.endswith(suffixes) or e.is_dir()]
        found = closest(missing.name, meant, ALIKE)
    except OSError:
        found = None
    if found and cause == ABSENT:
        fix = f"did you mean {missing.parent / found}?"
    else:
        fix = f"the nearest folder there is: {missing.parent.absolute()}"
    return Problem(os.fspath(path), NOTHING, cause, fix)


def _cause(path: str | os.PathLike) -> str:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return LEADS_NOWHERE if os.path.islink(path) else ABSENT
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return "did not exist a moment ago"
