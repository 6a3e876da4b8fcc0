"""Updates that wait for images: the share is measured, of the rank that waits most, and told with what to change."""

import time
from pathlib import Path

import pytest
import torch
import yaml

from seer_scale.bench import data as bench
from seer_scale.config import Config, Data, recipe_names, resolve
from seer_scale.data.batch import Batch
from seer_scale.distributed import World
from seer_scale.training.metric_window import MetricWindow
from seer_scale.training.monitors import Monitors, monitors_of


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


def starved(shares: list[float], workers: int, cores: int, *, is_contended: bool = False) -> list[str]:
    """What is told of lines that waited so long, and of what a run then is advised."""
    told: list[str] = []
    fatal, by_event = monitors_of(
        Config(data=Data(path="photos")),
        Healthy(),
        run_dir=Path("runs/a b"),
        workers=workers,
        cores=cores,
        is_contended=is_contended,
    )
    monitors = Monitors(fatal, by_event, {}, lambda kind, text, **_: told.append(f"{kind}: {text}"))
    for share in shares:
        monitors.check({"time/data_wait_frac": share, "skipped_in_a_row": 0})
    return told


class Healthy:
    def health(self, row, config) -> None:
        return None


def test_told_once_after_three_lines_in_a_row():
    begin = [0.2, 0.2, 0.01, 0.2, 0.06]
    assert not starved(begin, 2, 8)
    assert starved(begin + 5 * [0.3], 2, 8) == [
        "starved: data.workers is 2, but updates wait for images 30 % of their time; raise it to 8 (seer-scale bench "
        "data photos --recipe 'runs/a b/config.yaml' says how many a core makes)."
    ]


def test_what_to_change_where_all_cores_load():
    (told,) = starved(3 * [0.3], 8, 8)
    assert "give each rank more cores, or store the images smaller" in told
    (told,) = starved(3 * [0.3], 2, 8, is_contended=True)  # more workers would only take from others
    assert "free the cores of what else runs on them" in told and "raise" not in told
    assert not starved(9 * [0.9], 0, 1)  # it has no core to spare for loading


def test_the_tool_that_is_named_takes_the_crops_of_the_run(tmp_path):
    sections = {"views": {"crops": [{"num": 2, "size": 32}]}, "swav": {"prototypes": [8]}}
    config = resolve(sections | {"data": {"path": "x"}, "train": {"total_samples": 8}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert bench._views(str(tmp_path / "config.yaml")) == config.views
    assert all(bench._views(name).crops for name in recipe_names())
