"""A linear probe learns the same from every engine on any number of ranks, by one all-reduce, and leaves no trace in
the network."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from seer_scale.config import Config, Data
from seer_scale.config import Probe as Section
from seer_scale.data.sources import Source
from seer_scale.distributed import World
from seer_scale.errors import UserError
from seer_scale.evaluate.features import FeatureTable
from seer_scale.training.probe import Probe, build_probe, moments
from tests.ranks import run_ranks
from tests.tiny import micro_batches, tiny, world_of

ENGINES = {
    "ddp": {}, "fsdp": {}, "zero1": {}, "zero3": {}, "fairscale": {}, "accumulated": {"train.micro_batch": 2},
}  # fmt: skip
UPDATES = 4


def table_of(features: torch.Tensor, labels: torch.Tensor) -> FeatureTable:
    return FeatureTable(features, features, labels, torch.arange(len(labels)), torch.empty(0))


class Images(Source):
    """Images of three classes; what lies in `folder` is numbered."""

    classes: tuple[str, ...] = ()

    def __init__(self, folder: str, num: int = 64, classes: tuple[str, ...] = ("a", "b", "c")):
        self.folder, self.num, self.classes = folder, num, classes

    def __len__(self) -> int:
        return self.num

    @property
    def labels(self) -> np.ndarray:
        return (np.arange(self.num) % len(self.classes)).astype(np.int32)

    def name(self, i: int) -> str:
        return f"{self.folder}/{i}"


def labelled(queries: Source, *indices: int) -> SimpleNamespace:
    return SimpleNamespace(queries=queries, query_indices=np.array(indices, np.int64))


def trained(case: str, world: World, *, with_probe: bool = True) -> dict[str, np.ndarray]:
    """The probe's tensors and the network's after some updates; image 3 is a query and teaches nothing."""
    name = "single" if world.size == 1 else "ddp" if case == "accumulated" else case
    config, engine = tiny(world, **{"parallel.engine": name} | ENGINES[case])
    source, batch = Images("train"), config.train.global_batch
    probe = Probe(0.01, source.classes, engine.method.feature_width, labelled(source, 3), world)
    own = batch // world.size
    for step in range(UPDATES):
        seen = step * batch
        out = engine.gradients(micro_batches(config, step, world), samples_seen=seen)
        engine.update(0.1, seen)
        if with_probe:
            indices = torch.arange(seen + world.rank * own, seen + (world.rank + 1) * own)
            calls: list[str] = []
            with counting(calls):
                probe.update(out.features, probe.labels(source, indices))
            assert len(calls) == (world.size > 1)
    found = {n: t.numpy().copy() for n, t in probe.state().items()} | probe.take_metrics()
    draw = torch.Generator().manual_seed(1)
    bank, asked = (3 + torch.randn(41, engine.method.feature_width, generator=draw) for _ in range(2))
    found |= probe.measure(table_of(asked, torch.arange(41) % 3), [moments(bank[world.rank :: world.size])])
    found |= {n: engine.whole(n).numpy().copy() for n in engine.shapes}
    engine.close()
    return found


class counting:  # noqa: N801 - a context
    """Collectives that a block starts."""

    def __init__(self, calls: list[str]):
        self.calls, self.original = calls, dist.all_reduce

    def __enter__(self) -> None:
        dist.all_reduce = lambda *a, **k: (self.calls.append("all_reduce"), self.original(*a, **k))[1]

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.original


def on_rank(rank: int, size: int) -> dict:
    return {case: trained(case, world_of(rank, size)) for case in ENGINES}


def test_the_same_from_every_engine_and_no_trace_in_the_network():
    torch.set_num_threads(1)
    expected, without = trained("ddp", World()), trained("ddp", World(), with_probe=False)
    for name, value in without.items():
        if not name.startswith("probe/"):
            np.testing.assert_array_equal(expected[name], value)
    assert np.abs(expected["probe/weight"]).max() > 0.01
    found = run_ranks(2, on_rank)
    for case in ENGINES:
        for name, value in expected.items():
            if name.startswith("probe/") and case != "accumulated":  # where BatchNorm sees a micro-batch
                np.testing.assert_allclose(found[0][case][name], value, rtol=2e-3, atol=2e-4, err_msg=f"{case} {name}")
            if name.startswith("probe/"):
                np.testing.assert_array_equal(found[0][case][name], found[1][case][name])


def made(width: int = 5, lr: float = 0.05, queries: Source | None = None) -> Probe:
    return Probe(
        lr, ("a", "b", "c"), width, labelled(queries or Images("test", classes=("c", "a")), 0, 1, 2, 3), World()
    )


def test_an_update_is_torch_s_adamw_of_the_cross_entropy_of_labelled_images():
    draw = torch.Generator().manual_seed(0)
    probe, reference = made(), torch.nn.Linear(5, 3)
    torch.nn.init.zeros_(reference.weight), torch.nn.init.zeros_(reference.bias)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.05, weight_decay=0.0)
    sums = torch.zeros(11, dtype=torch.float64)
    for step in range(6):
        x, y = 2 + 3 * torch.randn(8, 5, generator=draw), torch.randint(-1, 3, (8,), generator=draw)
        probe.update(torch.where(y[:, None] < 0, torch.inf, x), y)
        if step:  # the first gives moments alone
            mean, square = (sums[:10] / sums[10]).chunk(2)
            standard = ((x - mean) / (square - mean**2 + 1e-5 * square.mean()).sqrt()).float()
            loss = torch.nn.functional.cross_entropy(reference(standard), y, ignore_index=-1, reduction="sum")
            optimizer.zero_grad()
            (loss / (y >= 0).sum()).backward()
            optimizer.step()
        sums = 0.99 * sums + 0.01 * moments(x[y >= 0])
        probe.update(x, torch.full((8,), -1))  # nothing to learn
        probe.update(x * torch.inf, y)
    torch.testing.assert_close(probe.weight, reference.weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(probe.bias, reference.bias.detach(), atol=1e-5, rtol=1e-4)
    assert probe.take_metrics()["probe/loss"] > 0 and probe.take_metrics() == {}


def test_it_learns_and_is_measured_by_the_names_of_classes():
    """Queries number their classes otherwise."""
    probe, centres = made(), torch.eye(5)[:3]
    for _ in range(50):
        probe.update(centres.repeat(4, 1), torch.arange(3).repeat(4))
    own = torch.tensor([2, 0, 2, 1])  # c a c b, as c a c a
    table = table_of(centres[own], torch.tensor([0, 1, 0, 1]))
    assert probe.measure(table, [moments(centres)])["probe/top1"] == pytest.approx(75.0)


def test_other_means_and_scales_in_training_than_measured_change_no_figure():
    """As of a network that is trained on crops by the statistics of a batch, and measured whole by running ones."""
    draw = torch.Generator().manual_seed(0)
    classes = torch.arange(300) % 3
    images = torch.randn(300, 5, generator=draw) + 1.5 * torch.randn(3, 5, generator=draw)[classes]
    scale, shift = torch.rand(2, 5, generator=draw) * torch.tensor([[2.0], [8.0]]) + 0.5
    tops = []
    for given in (images, scale * images + shift):
        probe = made(queries=Images("test"))
        for part in torch.randperm(300, generator=torch.Generator().manual_seed(1)).split(10):
            probe.update(given[part], classes[part])
        for measured in (images, scale * images + shift):
            tops += [probe.measure(table_of(measured, classes), [moments(measured)])["probe/top1"]]
    assert tops == [tops[0]] * 4 and tops[0] > 80


def test_queries_teach_nothing_and_other_data_are_known_by_the_names_of_their_classes():
    held_out = made(queries=Images("train"))
    source = Images("train")
    assert held_out.labels(source, torch.arange(6)).tolist() == [-1, -1, -1, -1, 1, 2]
    refreshed = Images("new", classes=("z", "c", "a"))
    assert held_out.labels(refreshed, torch.arange(4)).tolist() == [-1, 2, 0, -1]


@pytest.mark.parametrize(
    ("width", "source", "queries", "key"),
    [
        (0, Images("a"), Images("b"), "probe.enabled"),  # a method without features
        (8, type("Stream", (Images,), {"is_stream": True})("a"), Images("b"), "probe.enabled"),
        (8, type("Unlabelled", (Images,), {"labels": None})("a", classes=()), Images("b"), "probe.enabled"),
        (8, Images("a"), Images("b", classes=("a", "x")), "knn.queries"),
    ],
)
def test_what_cannot_be_is_refused_before_work_begins(tmp_path, width, source, queries, key):
    config = Config(data=Data(path=str(tmp_path)), probe=Section(enabled=True))
    with pytest.raises(UserError) as caught:
        build_probe(config, width, source, labelled(queries, 0), World())
    assert caught.value.problems[0].key == key
    assert build_probe(Config(data=Data(path="x")), width, source, None, World()) is None
