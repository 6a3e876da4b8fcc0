"""`seer-scale bench plan`: what is planned beside what was measured."""

from __future__ import annotations

import argparse
import json
import re
import statistics
from functools import partial

import pytest
import torch
import yaml

from seer_scale.bench import plan as bench
from seer_scale.distributed import World
from seer_scale.errors import UserError
from seer_scale.plan.devices import load_device
from seer_scale.plan.plan import make_plan
from tests.tiny import RECIPE, tiny

LEARNS = ["--optim.name", "sgd", "--optim.lr", "0.1", "--optim.lr_batch", "0"]


@pytest.fixture
def asked(tmp_path):
    """What the command is given of a recipe that is small."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in RECIPE.items() if k != "data"}))

    def parse(*words: str, overrides: list[str] | None = None) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        args = parser.parse_args(["--recipe", str(path), "--batch", "8", *words])
        args.overrides = overrides or []
        return args

    return parse


def test_the_same_update_is_planned_and_measured(asked):
    words = ["--updates", "3", "--warm-up", "1", "--device", "cpu", "--micro-batch", "4", "--kinds"]
    args = asked(*words, "--json", overrides=LEARNS)
    found = json.loads(bench.run(args))
    real, time = found["rank_0"], make_plan(bench.configure(args), 1, load_device("cpu")).time
    assert found["update_s"] == {
        "planned": pytest.approx(time.seconds), "measured": statistics.median(real["seconds"]),
        "ratio": pytest.approx(time.seconds / statistics.median(real["seconds"])),
        "low": pytest.approx(time.low), "high": pytest.approx(time.high),
    }  # fmt: skip
    assert set(real["kinds"]) == set(time.busy)  # operations of the same kinds
    assert all(found[kind]["planned"] == pytest.approx(busy) for kind, busy in time.busy.items())
    assert 0 < sum(real["kinds"].values()) and "allocated" not in found
    losses = real["losses"]  # of a real update, which learns its one batch
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_weights_are_about_those_of_an_initialisation():
    """So that about as many activations are zero: what a GPU multiplies moves its clock."""
    _, real = tiny(World())
    _, drawn = tiny(World())
    for shard in drawn.shards.values():
        shard.local.fill_(torch.nan)
    bench.draw_weights(drawn)
    for name, shard in real.shards.items():
        own = drawn.shards[name].local
        if len(shard.shape) == 1:
            assert torch.equal(own, shard.local), name
        else:
            assert 0.2 < own.std() / shard.local.std() < 5, name


def test_operations_are_timed_by_the_kind_a_plan_has_them_under():
    """Of two convolutions, one four times the other's images: the same kind, and neither of another."""
    weight = torch.randn(64, 8, 3, 3)

    def convolve(images: int, groups: int) -> None:
        torch.conv2d(torch.ones(images, 8 * groups, 32, 32), weight, padding=1, groups=groups)

    few, many, grouped = (
        bench.time_kinds(partial(convolve, *case), torch.device("cpu"), 5) for case in ((2, 1), (32, 1), (2, 8))
    )
    assert set(few) == set(many) == {"elementwise", "convolutions"}
    assert set(grouped) == {"elementwise", "grouped convolutions"}
    assert many["convolutions"] > 4 * few["convolutions"]


def test_peaks_beside_what_was_counted(asked):
    """What a GPU's allocator counts, each beside its own part of the plan's total."""
    plan = make_plan(bench.configure(asked()), 1, load_device("h200"))
    rows = bench.compare(plan, bench.Measured([0.3, 0.1, 0.2], [], {}, 1, 2, 3))
    assert {kind: real for kind, (_, real) in rows.items()} == {
        "allocated": 1, "reserved": 2, "beside": 3, "update_s": 0.2,
    }  # fmt: skip
    assert rows["reserved"][0] + rows["beside"][0] == plan.memory.total
    assert plan.memory.peak.nbytes <= rows["allocated"][0] <= rows["reserved"][0]


@pytest.mark.long
def test_ranks_measure_together(asked):
    args = asked("--ranks", "2", "--updates", "1", "--warm-up", "1", overrides=["--parallel.engine", "fsdp"])
    title, head, row = bench.run(args).splitlines()
    assert "fsdp on 2, fp32, lars, batch 8 in 1 micro-batch," in title and head.split()[-1] == "ratio"
    assert re.fullmatch(r"time of an update +([\d,.]+ ms +){2}[\d.]+  planned [\d,.]+ to [\d,.]+ ms", row)


@pytest.mark.parametrize(
    "words,part",
    [
        (["--updates", "0"], "--updates is 0, but must be at least 1"),
        (["--ranks", "3"], "--batch is 8, but does not divide among 3 ranks"),
        (["--micro-batch", "3"], "--micro-batch is 3, but does not divide 8 images of a rank"),
        (["--device", "h2000"], "did you mean h200?"),
    ],
)
def test_bad_input_is_one_error(asked, words, part):
    with pytest.raises(UserError, match=re.escape(part)):
        bench.run(asked(*words))


def test_the_default_device_is_the_known_one_that_it_is_called_after(monkeypatch):
    for name, known in (
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("AMD Instinct MI300X", "mi300x"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert bench.find_device("").name == known
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    with pytest.raises(UserError, match="no plan knows nvidia l4; measure it"):
        bench.find_device("")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.find_device("").name == "cpu"
    with pytest.raises(UserError, match="is a GPU, and there is none here"):
        bench.find_device("h200")
