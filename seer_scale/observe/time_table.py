"""The time account as a table for a terminal."""

from __future__ import annotations

from seer_scale.formatting import counted, duration
from seer_scale.observe.time_account import CATEGORIES, Attempt, TimeAccount

START, RUNNING, LOST = "s=x"
ON_WIDTH, BAR_WIDTH = 20, 40
"""Columns of the table of attempts: what each ran on, and its place in the run's time."""


def text(account: TimeAccount) -> str:
    """Categories and their shares, then a line an attempt."""
    now = (
        f"{account.now['text']}; the last sign of life was {duration(account.now['silent_s'])} ago."
        if account.now
        else ""
    )
    if not account.attempts:
        return " ".join(["Nothing was logged yet.", *([now] if now else [])])
    total = account.total_s or 1.0
    lines = [
        (
            f"{duration(account.total_s)} from the first start, {counted(len(account.attempts), 'attempt')}; "
            f"goodput {100 * account.goodput:.1f} % of the "
            f"{duration(account.total_s - account.seconds['down'])} it had machines"
        )
    ]
    lines += [f"  {'':28}{'':12}{'of it all':>10}"]
    lines += [
        f"  {words:28}{duration(account.seconds[cause]):>12}{100 * account.seconds[cause] / total:>8.1f} %"
        for cause, words in CATEGORIES.items()
        if account.seconds[cause] > 0
    ]
    if (mean := account.mean_time_to_recover_s) is not None:
        lines.append(f"  mean time to recover        {duration(mean):>12}")
    lines += [
        "",
        (
            f"  {'samples':>23}  {'lasted':>10}  {'lost':>9}  {'on':{ON_WIDTH}}  "
            f"{'0 to ' + duration(account.total_s):<{BAR_WIDTH}}  ended by"
        ),
    ]
    lines += [
        (
            f"  {attempt.seen[0]:>11,} {attempt.seen[1]:>11,}  {duration(attempt.ended - attempt.began):>10}  "
            f"{duration(attempt.lost_s):>9}  {attempt.on:{ON_WIDTH}}  {_bar(attempt, account)}  {attempt.cause}"
        )
        for attempt in account.attempts
    ]
    if now:
        lines.insert(1, now)
    return "\n".join([*lines, "", f"  {START} starting, {RUNNING} running, {LOST} lost at its end, blank not running"])


def _bar(attempt: Attempt, account: TimeAccount) -> str:
    """An attempt's place in the run's time, of BAR_WIDTH characters, at least one of which it takes."""
    first, each = account.attempts[0].began, (account.total_s or 1.0) / BAR_WIDTH

    def what(place: int) -> str:
        at = min(max(first + (place + 0.5) * each, attempt.began), attempt.ended)
        return (
            LOST if attempt.lost_s and at > attempt.ended - attempt.lost_s else START if at < attempt.ready else RUNNING
        )

    begin = min(round((attempt.began - first) / each), BAR_WIDTH - 1)
    end = min(max(round((attempt.ended - first) / each), begin + 1), BAR_WIDTH)
    return " " * begin + "".join(map(what, range(begin, end))) + " " * (BAR_WIDTH - end)
