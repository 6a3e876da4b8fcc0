"""A rank maps the features of a split: it holds a few blocks of them, whatever the task, and figures are those of the
whole matrix at once."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from seer_scale.evaluate import context, nearest, table
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.layers import mean_and_variance
from seer_scale.evaluate.registry import task_class
from seer_scale.evaluate.run import read_settings
from seer_scale.evaluate.subject import Subject
from seer_scale.evaluate.table import Rows, as_float64, blocks, by_blocks
from seer_scale.observe.progress import Progress
from tests.ranks import run_ranks
from tests.tiny import world_of

SIZE = 32
NUM, NARROW, WIDE = 300, 64, 1 << 16
"""Training images, and numbers of features."""
STATUS = Path("/proc/self/status")
HELD = 0.5
"""Of the bytes of the training images' features: what a process may hold besides what it does of narrow ones."""
SGD = {"lr": "0.1,0.01", "weight_decay": "0", "epochs": "1", "global_batch": "16", "normalize": "standardize"}
TASKS: dict[str, tuple[str, dict[str, str]]] = {
    "knn": ("knn", {}),
    "by Faiss": ("knn", {"faiss_from": "1"}),
    "linear": ("linear", {**SGD, "held_out": "0.3"}),
    "of unit length": ("linear", {**SGD, "normalize": "l2"}),
    "few labels": ("lowshot", {**SGD, "solver": "sgd", "shots": "90%", "draws": "1"}),
    "few by scikit-learn": ("lowshot", {"shots": "1", "draws": "1", "c": "1"}),
    "retrieval": ("retrieval", {}),
    "among themselves": ("retrieval", {"gallery": "test"}),
    "corrupted": ("robustness", {"corruptions": "contrast", "severities": "1"}),
}


class Wide(nn.Module):
    """[N, 3, S, S] to so many features."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width
        self.weight = torch.randn(12, width, generator=torch.Generator().manual_seed(0))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) @ self.weight


def figures_of(name: str, folder: Path, width: int) -> dict[str, float]:
    task, given = TASKS[name]
    settings = read_settings(task, {"workers": "0", "batch": "4", "data": str(folder), **given})
    subject = Subject(path=folder, model=Wide(width), fingerprint=str(width), weights="trained", size=SIZE)
    evaluation = Evaluation(
        task=task, subject=subject, options=settings, world=world_of(0, 1), progress=Progress(active=False),
        folder=folder / "eval",
    )  # fmt: skip
    return dict(task_class(task)(settings).measure(evaluation).scores)


class MostHeld:
    """The most memory of this process alone (not of files that are mapped) within the body, in bytes."""

    def __enter__(self) -> MostHeld:
        self.bytes, self.ended = self.now(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    @staticmethod
    def now() -> int:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", STATUS.read_text())[1])

    def watch(self) -> None:
        while not self.ended.wait(0.002):
            self.bytes = max(self.bytes, self.now())

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.bytes = max(self.bytes, self.now())


def watched(rank: int, size: int, folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """By small blocks: of each task the figures of narrow features; and what was held at most of wide ones, as a share
    of all of the training images'."""
    context.SHARD, table.MAX_ROWS, nearest.BLOCK_BYTES = 8, 7, 1 << 21
    figures = {name: figures_of(name, folder, NARROW) for name in TASKS}  # loads what is loaded once, too
    before, whole, held = MostHeld.now(), 4 * NUM * WIDE, {}
    for name in TASKS:
        with MostHeld() as most:
            figures_of(name, folder, WIDE)
        held[name] = (most.bytes - before) / whole
    with MostHeld() as most:
        copy = torch.ones(NUM, WIDE)
    held["a copy"] = (most.bytes - before) / copy.nbytes
    return figures, held


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root, draw = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    for part, each in (("train", NUM // 2), ("test", 30)):
        for c in range(2):
            (root / part / str(c)).mkdir(parents=True)
            for i in range(each):
                patches = draw.integers(0, 200, (2, 2, 3)) + 40 * c
                image = Image.fromarray(patches.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.NEAREST)
                image.save(root / part / str(c) / f"{i}.png")
    return root


@pytest.mark.skipif(not STATUS.is_file(), reason="memory is counted as Linux does it")
def test_a_rank_holds_no_copy_of_the_features(pictures, monkeypatch):
    """79 MB, of which it may hold half for its blocks; and the figures are those of few large blocks."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # blocks go back to the system, as those of 64 MB do
    ((figures, held),) = run_ranks(1, watched, pictures, fresh=True)
    assert held.pop("a copy") > 0.9
    assert max(held.values()) < HELD, held
    for name in TASKS:
        assert figures[name] == pytest.approx(figures_of(name, pictures, NARROW), rel=1e-6), name


def test_what_goes_by_blocks_is_what_goes_at_once(monkeypatch):
    draw = np.random.default_rng(0)
    whole = torch.from_numpy(draw.normal(100, np.arange(1, 6), (50, 5))).float()
    index = draw.permutation(50)[:23]
    rows, taken = Rows(whole, index), whole[torch.from_numpy(index)]
    monkeypatch.setattr(table, "MAX_ROWS", 4)
    for given, expected in ((whole, whole), (rows, taken)):
        assert torch.equal(torch.cat(list(blocks(given))), expected) and max(map(len, blocks(given))) == 4
        assert torch.equal(by_blocks(torch.neg, given), -expected)
        assert torch.equal(as_float64(torch.neg, given), -expected.double())
        mean, variance = mean_and_variance(given)
        torch.testing.assert_close(mean, expected.double().mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(variance, expected.double().var(0, correction=0), rtol=1e-12, atol=0)
    assert [len(block) for block in blocks(whole[:0])] == [0]
    wide = torch.empty(3, table.MAX_BLOCK_BYTES // 8 + 1)
    assert [len(block) for block in blocks(wide)] == [1, 1, 1]
