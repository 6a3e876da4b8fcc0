"""A console that is lost costs lines, never the run or its status."""

from __future__ import annotations

import re
import signal

from tests.e2e import runs
from tests.e2e.runs import checkpoints, events, reaches, recipe, start, steps, until


def test_a_run_goes_on_without_its_console(tmp_path, photos):
    """All kinds at once, to the end; and stopped in the middle, which saves."""
    given = recipe(tmp_path, photos, train={"total_samples": 48})
    places = {lost: tmp_path / lost.__name__ for lost in runs.lost_consoles}
    started = {
        place: start("train", given, "--run.dir", place, folder=tmp_path, console=lost)
        for lost, place in places.items()
    }
    for place, r in started.items():
        assert r.wait() == [0], (place, r.text)
        assert (
            list(steps(place)) == list(range(8, 49, 8)) and events(place, "done") and (place / "report.html").is_file()
        )
        assert r.text == ""
        assert "Done: 48 samples" in (place / "logs" / "console-0.txt").read_text()

    given = recipe(tmp_path, photos, train={"total_samples": 80_000})
    ways = (runs.lost_terminal, signal.SIGINT), (runs.full_pipe, signal.SIGTERM)
    stopped = [(tmp_path / number.name, number, console) for console, number in ways]
    running = [
        start("train", given, "--run.dir", place, folder=tmp_path, console=console) for place, _, console in stopped
    ]
    for r, (place, number, _) in zip(running, stopped, strict=True):
        until(reaches(place, 24), lambda r=r: r.text)
        r.kill(number)
    for r, (place, _, _) in zip(running, stopped, strict=True):
        assert r.wait() == [75]
        assert re.search(
            r"Stopped by SIG\w+ after [\d,]+ samples; saved as", (place / "logs" / "console-0.txt").read_text()
        )
        assert checkpoints(place)[-1] == f"samples-{max(steps(place)):012d}"


def test_what_is_said_of_the_length_is_what_is_done(tmp_path, photos):
    """Whole batches, in every line alike; given again, nothing has changed. In a folder that an ASCII console cannot
    spell."""
    given, place = (
        recipe(tmp_path, photos, train={"total_samples": 40, "global_batch": 32}, knn={"enabled": False}),
        tmp_path / "r\xe9sum\xe9",
    )
    first = start("train", given, "--run.dir", place, folder=tmp_path, console=runs.ascii_console)
    assert first.wait() == [0], first.text
    assert "train.total_samples is 40, and updates take 32 images each: the run ends at 64." in first.text
    assert "There are 24 images, fewer than train.global_batch (32): each update sees an image 1.3 times" in first.text
    assert re.findall(r"samples (\S+)", first.text)[-1] == "64/64" or "samples 64/64" in first.text
    assert "32/64" in first.text and "Done: 64 samples in 2 updates." in first.text and "/40" not in first.text
    assert list(steps(place)) == [32, 64] and events(place, "start")[0]["end"] == 64
    assert f"Report: {tmp_path}/r\\xe9sum\\xe9/report.html" in first.text

    words = (
        "train",
        given,
        "--run.dir",
        place,
        "--data.path",
        f"{photos}/../{photos.name}",
        "--checkpoint.resume",
        "auto",
    )
    again = start(*words, folder=tmp_path, console=runs.ascii_console)
    assert again.wait() == [0], again.text
    assert "is complete: all 64 samples were seen" in again.text and "Changed since" not in again.text
