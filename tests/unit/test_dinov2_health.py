"""What DINOv2 says of itself: its figures, and a name for each form of collapse, of networks that collapse so."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from seer_scale.distributed import World
from tests.tiny import DINOV2, micro_batches, tiny

WORLD, STEPS, LR = World(), 40, 4e-3
SMALL = {
    "model.drop_path": None, "model.depth": 2, "model.image_size": 16, "model.layer_scale": 1.0,
    "views.crops": [{"num": 2, "size": 16}, {"num": 1, "size": 8}], "dinov2.koleo_group": 8,
    "dinov2.ibot_weight": 0.0, "dinov2.patch_bottleneck": 256, "dinov2.patch_prototypes": 65536,
    "dinov2.freeze_samples": 0, "dinov2.teacher_momentum": 0.9, "dinov2.teacher_momentum_end": 0.9,
    "optim.name": "adamw", "train.global_batch": 32, "train.total_samples": 32 * STEPS,
}  # fmt: skip
NO_KOLEO = {"dinov2.koleo_weight": 0.0, "dinov2.koleo_group": 16}
HOT = {"dinov2.teacher_temperature": 1.0, "dinov2.teacher_temperature_from": 1.0}
COLD = {"dinov2.teacher_temperature": 0.02, "dinov2.teacher_temperature_from": 0.02, "dinov2.centering": "softmax"}
FROZEN = {"train.freeze_backbone_samples": 32 * STEPS}


def jittered(config, step: int, images: str) -> list[torch.Tensor]:
    """Crops of coarse patterns in other brightness and noise. images: all differ; "two kinds", one bright and one dark;
    "duplicates", each there four times."""
    generator = torch.Generator().manual_seed(step)
    patterns, out = torch.randn(config.train.global_batch, 3, 3, 3, generator=generator), []
    for crop in config.views.crops:
        x = F.interpolate(patterns, (crop.size, crop.size), mode="bilinear").repeat(crop.num, 1, 1, 1)
        x = x * (0.8 + 0.4 * torch.rand(len(x), 3, 1, 1, generator=generator))
        x = x + 0.3 * torch.randn(x.shape, generator=generator)
        if images == "two kinds":
            x[::2] += 3
            x[1::2] -= 3
        if images == "duplicates":
            x = x.unflatten(0, (crop.num, -1, 4))[:, :, :1].expand(-1, -1, 4, -1, -1, -1).flatten(0, 2)
        out.append(x)
    return out


def trained(images: str, steps: int, **over):
    """(recipe, method, metric lines of the second half of a run that is trained for real)."""
    config, engine = tiny(WORLD, DINOV2, **SMALL | over)
    rows = []
    for step in range(steps):
        seen, is_due = 32 * step, step >= steps // 2
        out = engine.gradients([lambda s=step: jittered(config, s, images)], samples_seen=seen, with_metrics=is_due)
        engine.update(LR, seen)
        row = {"samples_seen": seen + 32, "loss": out.loss.item()}
        rows += [row | engine.method.metrics(out.metrics, row["loss"])] * is_due
    return config, engine.method, rows


@pytest.mark.parametrize(
    "images,steps,over,key,words",
    [
        ("all differ", STEPS, {}, "", ()),
        ("all differ", 16, HOT, "dinov2/teacher_entropy",
         ("ln K (2.996)", "uniform", "raise train.global_batch (32)", "dinov2.teacher_temperature")),
        ("all differ", 12, HOT | FROZEN, "dinov2/teacher_entropy", ("frozen", "train.freeze_backbone_samples")),
        ("all differ", 16, COLD | NO_KOLEO | {"dinov2.center_momentum": 0.9999}, "dinov2/teacher_entropy",
         ("constant", "of 1 of 20 prototypes", "dinov2.centering sinkhorn", "dinov2.koleo_weight")),
        ("duplicates", 12, {}, "dinov2/koleo", ("near-duplicates", "lower dinov2.koleo_weight")),
        ("two kinds", 16, COLD | NO_KOLEO | {"dinov2.prototypes": 200}, "dinov2/prototype_use",
         ("of 2 of 200 prototypes", "dinov2.centering sinkhorn")),
    ],
    ids=["healthy", "uniform", "frozen", "constant", "duplicates", "few"],
)  # fmt: skip
def test_a_collapse_is_named_and_a_healthy_run_is_not(images, steps, over, key, words):
    config, method, rows = trained(images, steps, **over)
    for row in rows:
        problem = method.health(row, config)
        assert (problem.key if problem else "") == key, row
        assert all(word in str(problem) for word in words), str(problem)
        if not key:  # and far from it
            assert row["dinov2/target_information"] > 0.06 * math.log(20) and row["dinov2/prototype_use"] > 0.9
            nearest = math.exp(-row["dinov2/koleo"] / 2) / (math.sqrt(2) * row["dinov2/feature_std"])
            assert nearest > 0.3 and row["dinov2/feature_std"] > 0.8
    begins = config.warmup_samples + config.train.collapse_after * config.train.total_samples
    assert method.health(rows[-1] | {"samples_seen": begins - 1}, config) is None
    assert method.health({"samples_seen": rows[-1]["samples_seen"], "loss": 1.0}, config) is None  # of a stop
    nothing = dict.fromkeys(rows[-1], math.nan)
    assert method.health(nothing | {"samples_seen": rows[-1]["samples_seen"]}, config) is None  # of a skipped update


@pytest.mark.parametrize("over", [{}, {"dinov2.centering": "softmax"}], ids=["sinkhorn", "softmax"])
def test_figures_are_what_they_say(over):
    """Entropies, of targets made apart; and cross-entropies as entropy and divergence, crop by crop."""
    config, engine = tiny(WORLD, DINOV2, **{"model.drop_path": None} | over)
    views, method, seen = micro_batches(config, 0, WORLD)[0](), engine.method, 16
    targets = method.targets([method.prepare_targets(views, samples_seen=seen, part=(0, 1))], seen)[0]
    for name, buffer in method.named_buffers(recurse=False):
        assert name.endswith("center") and buffer.abs().max() > 0
        buffer.zero_()  # as before the batch
    out = method.loss(views, samples_seen=seen, with_metrics=True)
    shown = method.metrics(out.metrics, out.loss.item())
    probabilities, patches = (p.double() for p in targets.sets)
    log = probabilities.log()
    assert shown["dinov2/teacher_entropy"] == pytest.approx(-(probabilities * log).sum(1).mean().item(), rel=1e-5)
    mean = probabilities.mean(0)
    use = (-(mean * mean.log()).sum()).exp().item() / 20
    assert shown["dinov2/prototype_use"] == pytest.approx(use, rel=1e-5)
    information = (probabilities * (log - mean.log())).sum(1).mean().item()
    assert shown["dinov2/target_information"] == pytest.approx(information, rel=1e-3)
    student = method.student.tokens(views, [targets.masks.masked, None])
    classes = torch.stack([c for t in student for c in method.student_head(t.cls).split(8)]).double()
    log_q = (classes / 0.1).log_softmax(2)  # [4, 8, 20]
    pairs = [(log[8 * i : 8 * i + 8], log_q[j]) for i in range(2) for j in range(4) if i != j]
    kl = torch.stack([(p.exp() * (p - q)).sum(1).mean() for p, q in pairs]).mean().item()
    assert shown["dinov2/kl"] == pytest.approx(kl, rel=1e-4)
    unit = F.normalize(student[0].cls.double(), dim=1)
    spread = (unit.std(0, correction=0).square().mean() * unit.shape[1]).sqrt().item()
    assert shown["dinov2/feature_std"] == pytest.approx(spread, rel=1e-4)
    total = shown["dinov2/dino"] + shown["dinov2/ibot"] + 0.1 * shown["dinov2/koleo"]
    assert total == pytest.approx(out.loss.item(), rel=1e-5)
    thirds = (shown["dinov2/dino_global"] + 2 * shown["dinov2/dino_local"]) / 3
    assert shown["dinov2/dino"] == pytest.approx(thirds, rel=1e-5)  # 2 pairs of globals, 4 of a local and a global
    counts = targets.masks.masked.sum(1)
    own = torch.special.entr(patches).sum(1)[: counts.sum()].split(counts[counts > 0].tolist())
    entropy = torch.stack([crop.mean() for crop in own]).mean().item()
    assert shown["dinov2/patch_teacher_entropy"] == pytest.approx(entropy, rel=1e-5)
    ibot = shown["dinov2/ibot"] * 16 / len(own)
    assert shown["dinov2/patch_kl"] == pytest.approx(ibot - entropy, rel=1e-4)
    assert shown["dinov2/masked_share"] == pytest.approx(counts.sum().item() / (16 * 36))
    assert shown["dinov2/teacher_temperature"] == pytest.approx(0.055, rel=1e-12)
    assert shown["dinov2/teacher_momentum"] == method.teacher_momentum(seen) > 0.8
    assert method.loss(views, samples_seen=seen).metrics == {} and method.metrics({}, 1.0) == {}


def test_figures_of_micro_batches_are_those_of_the_batch():
    shown = []
    for micro_batch in (0, 2):
        config, engine = tiny(WORLD, DINOV2, **{"train.micro_batch": micro_batch})
        out = engine.gradients(micro_batches(config, 0, WORLD), samples_seen=16, with_metrics=True)
        shown.append(engine.method.metrics(out.metrics, out.loss.item()))
    assert shown[0] == pytest.approx(shown[1], rel=1e-4) and len(shown[0]) == 15


def test_all_that_is_drawn_is_measured():
    config, engine = tiny(WORLD, DINOV2)
    out = engine.gradients(micro_batches(config, 0, WORLD), samples_seen=0, with_metrics=True)
    plots = [*engine.method.plots, *(plot for section in engine.method.report_sections for plot in section.plots)]
    broken = engine.method.metrics({name: math.nan * mean for name, mean in out.metrics.items()}, math.nan)
    assert all(math.isnan(value) for value in broken.values())
    assert {plot.key for plot in plots} <= set(engine.method.metrics(out.metrics, 1.0)) and len(plots) == 11
