"""What FCMAE says of itself: its figures, and a name for each way in which a network stops to learn, of networks that
have come to it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from seer_scale.distributed import World
from seer_scale.methods.base import Baseline
from seer_scale.methods.fcmae.diagnostics import batch_metrics, figures
from tests.tiny import FCMAE, FCMAE_REGNETY, micro_batches, tiny

WORLD, STEPS = World(), 24
SMALL = {"optim.name": "adamw", "train.total_samples": 8 * STEPS}
CONVNEXT = {"model.drop_path": None, "views.crops": [{"num": 1, "size": 32}]}
REGNETY = {"views.crops": [{"num": 1, "size": 64}]}


def ramps(step: int, side: int) -> torch.Tensor:
    """Images that rise or fall in one of two directions, with noise: what is seen tells what is not."""
    generator = torch.Generator().manual_seed(step)
    rising = 1 - 2 * torch.randint(2, (8, 1, 1, 1), generator=generator)
    ramp = torch.linspace(-1, 1, side).expand(8, 3, side, side) * rising
    is_turned = torch.rand(8, 1, 1, 1, generator=generator) < 0.5
    return torch.where(is_turned, ramp.mT, ramp) + 0.02 * torch.randn(ramp.shape, generator=generator)


@torch.no_grad()
def change(method, kind: str) -> None:
    """The weights by which a channel of the last stage comes about, as one of these kinds has them."""
    stage = method.backbone.s4
    weights = [stage.down.conv.weight, stage.b1.fc2.weight], [stage.down.conv.bias, stage.b1.fc2.bias]
    for weight, bias in zip(*weights, strict=True):
        if kind == "dead":
            weight[20:], bias[20:] = 0, 0
        elif kind == "alike":
            weight[:], bias[:] = weight[:1] * torch.linspace(-2, 2, len(weight)).view(-1, *[1] * (weight.ndim - 1)), 0


def trained(kind: str, steps: int, lr: float):
    """(recipe, method, metric lines of the last four updates of a run that is trained for real)."""
    recipe, over = (FCMAE_REGNETY, REGNETY) if kind == "regnety" else (FCMAE, CONVNEXT)
    if kind == "patch 16":
        over = over | {"model.patch": 2, "views.crops": [{"num": 1, "size": 64}]}
    config, engine = tiny(WORLD, recipe, **SMALL | over)
    if kind in ("dead", "alike"):
        change(engine.method, kind)
    rows, side = [], config.views.crops[0].size
    for step in range(steps):
        seen = 8 * step
        out = engine.gradients([lambda s=step: [ramps(s, side)]], samples_seen=seen, with_metrics=step >= steps - 4)
        engine.update(lr, seen)
        row = {"samples_seen": 8 * STEPS, "loss": out.loss.item()}
        rows += [row | engine.method.metrics(out.metrics, row["loss"])] * bool(out.metrics)
    return config, engine.method, rows


@pytest.mark.parametrize(
    "kind,steps,lr,key,words",
    [
        ("", STEPS, 4e-3, "", ()),
        ("patch 16", STEPS, 4e-3, "", ()),
        ("", 4, 0.0, "loss", ("nothing is being learned", "higher optim.lr", "fcmae.mask_ratio")),
        ("", 16, 0.1, "fcmae/saturated_channels", ("one value wherever it looks", "lower optim.lr")),
        ("", 20, 0.3, "fcmae/feature_max", ("65,504", "infinite in fp16", "optim.weight_decay")),
        ("regnety", 12, 0.3, "loss", ("has diverged", "lower optim.lr")),
        ("dead", 4, 0.0, "fcmae/dead_channels", ("69 %", "Global Response Normalization")),
        ("alike", 4, 0.0, "fcmae/channel_overlap", ("the same map", "lower optim.lr")),
    ],
    ids=["healthy", "patch 16", "nothing", "saturated", "large", "diverged", "dead", "alike"],
)
def test_what_stops_learning_is_named_and_a_healthy_run_is_not(kind, steps, lr, key, words):
    config, method, rows = trained(kind, steps, lr)
    for row in rows:
        problem = method.health(row, config)
        assert (problem.key if problem else "") == key, row
        assert all(word in str(problem) for word in words), str(problem)
        if not key:  # and far from it
            assert row["fcmae/explained"] > 0.2 and row["fcmae/feature_max"] < 100, row
            assert row["fcmae/dead_channels"] == row["fcmae/saturated_channels"] == 0, row
    begins = config.warmup_samples + config.train.collapse_after * config.train.total_samples
    assert method.health(rows[-1] | {"samples_seen": begins - 1}, config) is None
    assert method.health({"samples_seen": begins, "loss": 0.5}, config) is None  # of a stop
    nothing = dict.fromkeys(rows[-1], math.nan) | {"samples_seen": begins}
    assert method.health(nothing, config) is None  # of a skipped update
    assert method.health(nothing | {"fcmae/beyond_half": 1e-9}, config).key == "fcmae/feature_max"


def test_figures_are_what_they_say():
    """Channel by channel and pair by pair, of two resolutions."""
    config, engine = tiny(WORLD, FCMAE, **{"model.drop_path": None})
    views, method = micro_batches(config, 0, WORLD)[0](), engine.method
    masks, places = method._masks(views, 8, (0, 1))
    with torch.no_grad():
        maps = [x.flatten(1, 3).double() for x in method.backbone.visible_stages(views, masks, places)[-1]]
    out = method.loss(views, samples_seen=8, with_metrics=True)
    shown = method.metrics(out.metrics, 0.5)
    cosines = [F.cosine_similarity(x[:, :, :, None], x[:, :, None], dim=1) for x in maps]  # [N_r, C, C]
    expected = {
        "channel_distance": [(1 - c).mean() / 2 for c in cosines],
        "channel_overlap": [c.square().mean() for c in cosines],
        "feature_norm": [x.square().sum(2).sqrt().mean() for x in maps],
        "feature_max": [x.abs().max() for x in maps],
        "beyond_half": [0 * x.sum() for x in maps],
    }
    for name, of_sizes in expected.items():
        assert shown[f"fcmae/{name}"] == pytest.approx(sum(of_sizes).item() / 2, rel=1e-4), name
    assert shown["fcmae/explained"] == pytest.approx(1 - 0.5 / (191 / 192)) and len(shown) == 8
    assert method.loss(views, samples_seen=8).metrics == {} and method.metrics({}, 0.5) == {}


def test_channels_are_counted_by_kind():
    """Of 10: two dead, three saturated, and one that is 0 in the mean."""
    x = torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(0)) + 3
    x[:, :, :2] = 1e-3 * x[:, :, :2]
    x[:, :, 2:5] = torch.tensor([-7.0, 5.0, 3.0]) + 0.2 * (x[:, :, 2:5] - 3)
    x[:, :, 5] -= 3
    shown = figures(batch_metrics([x, x]), 0.5, None)
    assert (shown["fcmae/dead_channels"], shown["fcmae/saturated_channels"]) == (0.2, 0.3)
    assert figures(batch_metrics([0 * x]), 0.5, None)["fcmae/dead_channels"] == 1
    x[0, 0, 5] = -1e5  # one of many: a mean of what is largest would hide it
    assert figures(batch_metrics([x, x]), 0.5, None)["fcmae/beyond_half"] == pytest.approx(1 / x.numel())
    batch_metrics([x.to("meta")])  # reads nothing of the device
    broken = figures(batch_metrics([math.nan * x]), math.nan, Baseline("", 1.0))
    assert all(math.isnan(value) for name, value in broken.items() if name != "fcmae/beyond_half")


def test_figures_of_micro_batches_are_those_of_the_batch_and_all_that_is_drawn_is_measured():
    shown = []
    for micro_batch in (0, 2):
        config, engine = tiny(WORLD, FCMAE, **{"train.micro_batch": micro_batch})
        out = engine.gradients(micro_batches(config, 0, WORLD), samples_seen=16, with_metrics=True)
        shown.append(engine.method.metrics(out.metrics, out.loss.item()))
    largest = [row.pop("fcmae/feature_max") for row in shown]
    assert (
        shown[0] == pytest.approx(shown[1], rel=1e-4, abs=1e-6) and largest[0] >= largest[1]
    )  # a mean of their largest
    plots = [*engine.method.plots, *(plot for section in engine.method.report_sections for plot in section.plots)]
    assert {plot.key for plot in plots} == {*shown[0], "fcmae/feature_max"}
