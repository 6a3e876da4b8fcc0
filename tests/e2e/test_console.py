"""A console that is lost costs lines, never the run or its status."""

from __future__ import annotations

import signal

from tests.e2e import runs
from tests.e2e.runs import checkpoints, events, reaches, recipe, start, steps, until


def test_a_run_goes_on_without_its_console(tmp_path, photos):
    """All kinds at once, to the end; and stopped in the middle, which saves."""
    given = recipe(tmp_path, photos, train={"samples": 48})
    places = {lost: tmp_path / lost.__name__ for lost in runs.lost_consoles}
    started = {
        place: start("train", given, "--run.dir", place, folder=tmp_path, console=lost) for lost, place in places.items()
    }
    for place, r in started.items():
        assert r.wait() == [0], (place, r.text)
        assert list(steps(place)) == list(range(8, 49, 8)) and events(place, "done") and (place / "report.html").is_file()
        assert r.text == ""

    given, place = recipe(tmp_path, photos, train={"samples": 80_000}), tmp_path / "stopped"
    r = start("train", given, "--run.dir", place, folder=tmp_path, console=runs.lost_terminal)
    until(reaches(place, 24), lambda: r.text)
    r.kill(signal.SIGINT)
    assert r.wait() == [75]
    assert checkpoints(place)[-1] == f"samples-{max(steps(place)):012d}"
