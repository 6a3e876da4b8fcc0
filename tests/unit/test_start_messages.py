"""What a start says follows from what it built, and names keys and numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from seer_scale.config import Config, resolve
from seer_scale.distributed import World
from seer_scale.models.execution import Execution
from seer_scale.training.clock import Clock
from seer_scale.training.components import Origin
from seer_scale.training.initial_weights import InitialWeights
from seer_scale.training.resume import Change
from seer_scale.training.start_messages import notes, start_event

LOADED = {"load_s": 1.0, "load_bytes": 2048, "load_bytes_most": 1024}


def config_of(*words: str) -> Config:
    recipe = {"train": {"total_samples": 4096}, "swav": {"prototypes": [8]}, "knn": {"enabled": False}}
    return resolve(recipe | {"data": {"path": "photos"}}, list(words))


def made(
    config: Config, *, num: int = 4096, threads: int = 1, workers: int = 0, cores: int = 2, seen: int = 0, **given
):
    source = type("Images", (), {"__len__": lambda _: num, "is_stream": False, "left_out": None})()
    method = SimpleNamespace(baseline=("ln K", 2.0), anchors="", plots=(), report_sections=())
    return SimpleNamespace(
        engine=SimpleNamespace(name="single", method=method, shapes={"w": torch.Size([1000, 1000])}, averages={}),
        execution=Execution(threads, torch.contiguous_format, given.get("contended", "")),
        clock=Clock(config.train.global_batch, config.end(seen), seen, 0),
        probe=None,
        history=SimpleNamespace(source=source, refreshes=given.get("refreshes", 0)),
        labelled=given.get("labelled"),
        origin=given.get("origin", Origin()),
        cores=cores,
        workers=workers,
    )


@pytest.fixture(autouse=True)
def nothing_left_out(monkeypatch):
    monkeypatch.setattr("seer_scale.training.start_messages.warning", lambda left_out: "")


def said(config: Config, **given) -> list[tuple[str, str]]:
    return list(notes(config, World(), made(config, **given)))


def test_a_start_as_it_should_be_has_no_notes():
    assert said(config_of()) == []


@pytest.mark.parametrize(
    "words, given, kind, named",
    [
        (["--train.total_samples", "1000", "--train.global_batch", "300"], {}, "note", ("1,000", "300", "1,200")),
        (["--train.global_batch", "256"], {"num": 64}, "few_images", ("train.global_batch", "64", "4.0 times")),
        ([], {"workers": 3}, "note", ("data.workers is 3", "2 cores")),
        ([], {"threads": 4}, "note", ("4 CPU threads", "train.threads")),
        ([], {"contended": "others took 3 of 4 cores"}, "contended", ("others took 3 of 4 cores",)),
        ([], {"labelled": SimpleNamespace(bank_indices=[1, 2])}, "note", ("knn.k is 20", "2 images")),
        (
            ["--schedule.warmup_samples", "900", "--schedule.warmup_share", "0.1", "--train.total_samples", "4096"],
            {},
            "note",
            ("410", "900", "0.1 of the run", "schedule.warmup_share"),
        ),
        (["--parallel.engine", "fsdp"], {}, "note", ("parallel.engine fsdp", "single")),
    ],
)
def test_a_note_names_the_key_and_what_it_meets(words, given, kind, named):
    (note,) = said(config_of(*words), **given)
    assert note.kind == kind and all(word in note.text for word in named)


def event(config: Config, run_dir: Path, **given):
    return start_event(config, World(), run_dir, made(config, **given), staging_bytes=4096, attempt="2")


def test_a_new_run_says_what_it_trains_and_of_whose_weights(tmp_path):
    config = config_of()
    kind, text, fields = event(config, tmp_path)
    assert kind == "start" and "1.0M parameters" in text and "4,096 images" in text and "begins anew" not in text
    assert fields["parameters"] == 1_000_000 and fields["staging_bytes"] == 4096 and fields["attempt"] == "2"
    (tmp_path / "metrics.jsonl").write_text('{"samples_seen": 8, "loss": 1.0}\n')
    assert "begins anew" in event(config, tmp_path)[1]
    for parts, whose in (
        ({"anew": ("head",)}, "Its backbone is that of there and all else drawn anew"),
        ({}, "Its weights are those of there"),
        ({"kept": ("head",), "anew": ("fc",)}, "Its backbone and head are those of there, and fc drawn anew"),
    ):
        weights = InitialWeights(Path("there"), {}, (), **parts)
        _, text, fields = event(config, tmp_path, origin=Origin(weights=weights, loaded=LOADED))
        assert f"{whose}" in text and "read 2.0 KiB in 1.0 s" in text and fields["load_bytes"] == 2048


def test_a_resume_says_what_has_changed(tmp_path):
    origin = Origin(
        Path("samples-8"),
        loaded=LOADED | {"verify_s": 2.0},
        changes=[Change("optim.lr", 0.1, 0.2), Change("train.compile", False, True)],
        rate_change="The learning rate goes up.",
    )
    kind, text, fields = event(config_of(), tmp_path, seen=8, origin=origin, refreshes=3)
    assert kind == "resume" and fields["verify_s"] == 2.0
    changed = "Changed since: optim.lr 0.1 -> 0.2, train.compile false -> true. The learning rate goes up."
    for part in ("from samples-8", changed, "0003.yaml"):
        assert part in text


def test_a_run_that_is_complete_says_so(tmp_path):
    config = config_of("--train.total_samples", "1024", "--train.global_batch", "256")
    for seen, fewer in ((1024, False), (2048, True)):
        kind, text, fields = event(config, tmp_path, seen=seen, origin=Origin(Path("samples"), loaded=LOADED))
        assert kind == "resume" and "is complete" in text and ("fewer than this run has seen" in text) == fewer
        assert "load_s" not in fields  # nothing is done with what was read
