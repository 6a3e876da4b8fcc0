"""Updates that wait for images: the share is measured, of the rank that waits most, and told with what to change."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from seer_scale.bench import data as bench
from seer_scale.config import recipe_names, resolve
from seer_scale.data.batch import Batch
from seer_scale.distributed import World
from seer_scale.models.execution import Execution
from seer_scale.training import loop
from seer_scale.training.metric_window import MetricWindow


def test_the_share_is_that_of_the_clock(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    window = MetricWindow(World(), Path())
    for _ in range(4):
        now += 0.05
        window.waited_s += 0.03
        window.add(Batch([], [], torch.arange(4), 0, []), torch.ones(()))
    window.reduce({})
    timing = window.timing(4)
    assert timing["time/data_wait_frac"] == pytest.approx(0.6) and timing["time/step_s"] == pytest.approx(0.05)


def trainer(workers: int, cores: int, contended: str = "") -> tuple[loop.Trainer, list[str]]:
    told: list[str] = []
    made = object.__new__(loop.Trainer)
    made.config = SimpleNamespace(data=SimpleNamespace(path="photos"))
    made.run_dir = Path("runs/a b")
    made.world, made.cores, made.workers, made._starved = World(), cores, workers, 0
    made.execution = Execution(1, torch.contiguous_format, contended)
    made._log_event = lambda kind, text, **_: told.append(f"{kind}: {text}")
    return made, told


def test_told_once_after_three_lines_in_a_row():
    made, told = trainer(2, 8)
    for share in (0.2, 0.2, 0.01, 0.2, 0.06):
        made._watch_for_starvation(share)
    assert not told
    for _ in range(5):
        made._watch_for_starvation(0.3)
    assert told == [
        (
            "starved: Updates wait for images 30 % of their time: raise data.workers from 2 to 8 (seer-scale bench "
            "data photos --recipe 'runs/a b/config.yaml' says how many a core makes)."
        )
    ]


def test_what_to_change_where_all_cores_load():
    made, told = trainer(8, 8)
    for _ in range(3):
        made._watch_for_starvation(0.3)
    assert "give each rank more cores, or store the images smaller" in told[0]
    made, told = trainer(2, 8, "others took 3.1 of 8 cores")  # more of it would only take from others
    for _ in range(3):
        made._watch_for_starvation(0.3)
    assert "free the cores of what else runs on them" in told[0] and "data.workers" not in told[0]
    made, told = trainer(0, 1)  # it has no core to spare for loading
    for _ in range(9):
        made._watch_for_starvation(0.9)
    assert not told


def test_the_tool_that_is_named_takes_the_crops_of_the_run(tmp_path):
    sections = {"views": {"crops": [{"num": 2, "size": 32}]}, "swav": {"prototypes": [8]}}
    config = resolve(sections | {"data": {"path": "x"}, "train": {"total_samples": 8}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert bench._views(str(tmp_path / "config.yaml")) == config.views
    assert all(bench._views(name).crops for name in recipe_names())
