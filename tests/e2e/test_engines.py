"""A run as users start it, under the engines that are other people's libraries, and in fp16."""

from __future__ import annotations

import signal

from tests.e2e import runs
from tests.e2e.runs import assert_same_path, events, reaches, recipe, run, start, until


def test_a_run_changes_engine_and_number_of_ranks_as_it_goes_on(tmp_path, photos):
    """zero3 on 4 ranks, stopped; fsdp on 3; zero1 and fairscale on 2; ddp on 1, to the end: the path of the run never
    stopped."""
    # the samples after the last stop are for the updates of a loaded machine before its signal comes
    train, calm = {"global_batch": 12, "total_samples": 720}, {"lr": 0.002}  # rounding grows less in sixty updates
    given, place = recipe(tmp_path, photos, train=train, optim=calm), tmp_path / "run"
    run("train", given, "--run.dir", tmp_path / "straight", folder=tmp_path)
    for engine, ranks in (("zero3", 4), ("fsdp", 3), ("zero1", 2), ("fairscale", 2)):
        seen = (
            max(runs.steps(place), default=0) if place.exists() else 0
        )  # the part before may have gone far in a moment
        part = start("train", given, "--run.dir", place, "--parallel.engine", engine, ranks=ranks, folder=tmp_path)
        until(reaches(place, seen + 36), lambda: part.text)  # noqa: B023
        part.kill(signal.SIGTERM, rank=ranks - 1)
        assert part.wait() == [75] * ranks, part.text
        assert f"{ranks} ranks ({engine}, cpu)" in part.text and "Traceback" not in part.text
    text = run("train", given, "--run.dir", place, "--parallel.engine", "ddp", folder=tmp_path)
    assert 'parallel.engine "fairscale" -> "ddp"' in text
    assert [e["engine"] for e in events(place, "resume")] == ["fsdp", "zero1", "fairscale", "single"]
    assert_same_path(place, tmp_path / "straight")


def test_one_rank_can_offload(straight, tmp_path, photos):
    given, place = recipe(tmp_path, photos, parallel={"engine": "zero2", "offload": True}), tmp_path / "run"
    run("train", given, "--run.dir", place, folder=tmp_path)
    assert events(place, "start")[0]["engine"] == "zero2"
    assert_same_path(place, straight)


def test_what_the_engine_taken_does_not_read_is_said(tmp_path, photos):
    given, place = (
        recipe(
            tmp_path, photos, train={"total_samples": 16}, parallel={"engine": "auto", "reshard_after_forward": False}
        ),
        tmp_path / "run",
    )
    run("train", given, "--run.dir", place, ranks=2, folder=tmp_path)
    assert "parallel.reshard_after_forward is false, but has no effect" in events(place, "note")[0]["text"]


def test_micro_batches_and_auto_are_said_in_the_log(tmp_path, photos):
    given, place = (
        recipe(
            tmp_path,
            photos,
            train={"total_samples": 16, "micro_batch": 2, "memory_format": "auto"},
            parallel={"engine": "auto"},
        ),
        tmp_path / "run",
    )
    run("train", given, "--run.dir", place, ranks=2, folder=tmp_path)
    begun = events(place, "start")[0]
    assert (
        begun["engine"] == "ddp"
        and begun["accumulation"] == 2
        and begun["memory_format"] in ("contiguous_format", "channels_last")
    )


def test_a_loss_scale_that_falls_too_low_ends_the_run(tmp_path, photos):
    given = recipe(tmp_path, photos, train={"precision": "fp16", "min_loss_scale": 65537})
    text = run("train", given, "--run.dir", tmp_path / "run", folder=tmp_path, status=1)
    assert (
        "the loss scale has fallen to " in text
        and "train.min_loss_scale is 65537, but" in text
        and "Traceback" not in text
    )
    assert len(runs.steps(tmp_path / "run")) == 1
