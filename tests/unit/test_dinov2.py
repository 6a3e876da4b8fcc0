"""DINOv2: loss and gradients against a plain reference in float64; what it declares, schedules and refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm

from seer_scale.config import resolve
from seer_scale.distributed import World
from seer_scale.errors import UserError
from seer_scale.methods.registry import build_method
from seer_scale.models.registry import initialise
from tests.tiny import DINOV2, fake_views, losses_of, sections, tiny
from tests.unit.test_dino_losses import dino_reference, ibot_reference, koleo_reference
from tests.unit.test_sinkhorn import reference as sinkhorn_of

VIT_KEYS = ("width", "depth", "heads", "patch", "image_size", "registers", "drop_path", "layer_scale")
OF_REGNETY = {f"model.{key}": None for key in VIT_KEYS} | {
    "model.name": "regnety", "model.depth": 5, "model.w0": 8, "model.wa": 12.0, "model.wm": 2.0, "model.group_width": 8,
    "views.crops": [{"num": 2, "size": 96}, {"num": 2, "size": 40}],
}  # fmt: skip
OF_CONVNEXT = {f"model.{key}": None for key in VIT_KEYS} | {
    "model.name": "convnextv2", "model.width": 8, "model.depths": [1, 1, 1, 1], "model.patch": 2,
    "views.crops": [{"num": 2, "size": [32, 64]}, {"num": 2, "size": 32}], "dinov2.mask_exact": True,
}  # fmt: skip
SHARED = {"dinov2.shared_head": True, "dinov2.patch_bottleneck": 256, "dinov2.patch_prototypes": 65536}
ANCHORED = {
    "views.crops": [{"num": 2, "size": [48, 32]}, {"num": 2, "size": 16}],
    "dinov2.gram_weight": 2.0, "dinov2.gram_from_samples": 8, "dinov2.gram_every_samples": 8,
    "dinov2.gram_refreshes": 1,
}  # fmt: skip
"""Student and teacher see 24 x 16 pixels of 48 x 32."""
NO_IBOT = {
    "dinov2.ibot_weight": 0.0, "dinov2.patch_bottleneck": 256, "dinov2.patch_prototypes": 65536,
}  # fmt: skip


def make(**overrides):
    """(recipe, method in float64, its weights far from where they start)."""
    config = resolve(DINOV2, sections({"model.drop_path": None} | overrides), world_size=1)
    method = build_method(config, World())
    method.to_empty(device="cpu")
    for buffer in method.buffers():
        buffer.zero_()
    initialise(method, 0)
    method.double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    for name, group in method.parameter_groups().items():
        method.get_parameter(name).requires_grad_(not group.average_of)
    return config, method


def head_of(head, x):
    """DINOHead by torch's own parts."""
    for layer in head.mlp:
        x = F.gelu(x) if isinstance(layer, torch.nn.GELU) else F.linear(x, layer.weight, layer.bias)
    x = x / x.norm(dim=1, keepdim=True)
    last = torch.nn.Linear(x.shape[1], len(head.last_layer.scale), bias=False, dtype=x.dtype)
    own = "parametrizations.weight"
    given = {f"{own}.original0": head.last_layer.scale, f"{own}.original1": head.last_layer.direction}
    return torch.func.functional_call(weight_norm(last), given, (x,))


def crops_of(backbone, views, batch, mask=None):
    """(class token, patches) of each crop of a resolution. BatchNorm takes the crops of one resolution together."""
    if getattr(backbone, "patch_map", None) and mask is not None:
        tokens = backbone.tokens([views], [mask])[0]
        return list(zip(tokens.cls.split(batch), tokens.patches.split(batch), strict=True))
    return [(cls, None) for cls in backbone(views).split(batch)]


def reference(method, views, samples_seen):
    """Pair by pair, crop by crop, masked patch by masked patch."""
    s, batch = method.config, len(views[0]) // 2
    mask = method.masking.draw(samples_seen, 0, batch).masked if method.masking else None
    unmasked = None if mask is None else torch.zeros_like(mask)
    rows = [] if mask is None else [(i // batch, i % batch, patch) for i, patch in mask.nonzero().tolist()]
    heads = {n: m for n, m in method.named_children() if n.endswith("_head")}

    def scores_of(who, crops):
        classes = [head_of(heads[f"{who}_head"], cls) for cls, _ in crops]
        own = heads.get(f"{who}_patch_head", heads[f"{who}_head"])
        chosen = [crops[crop][1][image, patch] for crop, image, patch in rows]
        return classes, head_of(own, torch.stack(chosen)) if rows else None

    whole = views[0]
    if s.gram_weight:
        views = [whole.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)), views[1]]
    with torch.no_grad():
        classes, patches = scores_of("teacher", crops_of(method.teacher, views[0], batch, unmasked))
        temperature = 0.04 + 0.03 * min(1, samples_seen / s.teacher_temperature_samples)
        sets = [torch.cat(classes), *([patches] if rows else [])]
        if s.centering == "sinkhorn":
            made = [sinkhorn_of(x, temperature, s.iterations) for x in sets]
        else:
            made = [(x / temperature).softmax(1) for x in sets]
    crops = crops_of(method.student, views[0], batch, mask) + crops_of(method.student, views[1], batch)
    classes, patches = scores_of("student", crops)
    logits = torch.stack(classes)
    total = s.dino_weight * dino_reference(logits[:2], logits[2:], made[0].view(2, batch, -1), s.temperature)
    if rows:
        ibot = ibot_reference(patches, made[1], [crop * batch + image for crop, image, _ in rows], s.temperature)
        total = total + s.ibot_weight * ibot / (2 * batch)
    koleo = koleo_reference(torch.stack([cls for cls, _ in crops[:2]]), s.koleo_group)
    if s.gram_weight:
        with torch.no_grad():
            side = method.student.patch_map.stride
            grid = method.gram.tokens([whole])[0].patches.mT.unflatten(2, [n // side for n in whole.shape[2:]])
            anchors = F.interpolate(grid, [n // side // 2 for n in whole.shape[2:]], mode="bicubic").flatten(2).mT
        for patches, anchor in zip(torch.cat([p for _, p in crops[:2]]), anchors, strict=True):
            ours, theirs = (x / x.norm(dim=1, keepdim=True) for x in (patches, anchor))
            total = total + s.gram_weight * (ours @ ours.T - theirs @ theirs.T).square().mean() / len(anchors)
    return total + s.koleo_weight * koleo


@pytest.mark.parametrize(
    "overrides",
    [{}, SHARED, NO_IBOT, ANCHORED, {"dinov2.centering": "softmax"},
     {"dinov2.mask_exact": True, "model.positions": "rope", "model.width": 32},
     OF_REGNETY | {"dinov2.mask_exact": True}, OF_CONVNEXT],
    ids=["vit", "shared head", "no iBOT", "anchored", "centred", "rotary, exact masks", "regnety", "convnext"],
)  # fmt: skip
def test_loss_and_gradients_are_those_of_a_plain_reference(overrides):
    config, method = make(**overrides)
    views, seen = [v.double() for v in fake_views(config, 3, World())], 16
    ours = method.loss(views, samples_seen=seen).loss
    theirs = reference(method, views, seen)
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
    gradients = [torch.autograd.grad(loss, trained.values(), allow_unused=True) for loss in (ours, theirs)]
    for name, a, b in zip(trained, *gradients, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b.expand_as(a) if not b.ndim else b, rtol=1e-9, atol=1e-9, msg=name)
        assert a.abs().max() > 0 or name == "student.embed.mask_token" or a.numel() == 1, name


def test_the_gram_teacher_is_the_teacher_of_certain_samples():
    """After 8 and after 16 samples, and between them as it was."""
    config, engine = tiny(World(), DINOV2, **ANCHORED)
    name = "embed.proj.weight"
    held = []
    for step in range(4):
        losses_of(engine, config, World(), range(step, step + 1), 0.1)
        held.append({who: engine.whole(f"{who}.{name}").clone() for who in ("gram", "teacher", "student")})
    same = [torch.equal(at["gram"], at["teacher"]) for at in held]
    assert same == [True, True, False, False]
    assert torch.equal(held[3]["gram"], held[1]["gram"]) and not torch.equal(held[1]["gram"], held[0]["gram"])
    assert not torch.equal(held[3]["teacher"], held[3]["student"])


REFUSED = {
    "dinov2.koleo_group": ({"dinov2.koleo_group": 3}, 1),
    "dinov2.koleo_group, one image a rank": ({"dinov2.koleo_group": 2, "parallel.ranks": 8}, 8),
    "views.crops[0].size": ({"views.crops": [{"num": 2, "size": 27}, {"num": 2, "size": 16}],
                             "dinov2.gram_weight": 1.0, "dinov2.gram_from_samples": 8}, 1),
    "views.crops[0].size, seen smaller": ({"views.crops": [{"num": 2, "size": 28}, {"num": 2, "size": 16}],
                                          "dinov2.gram_weight": 1.0, "dinov2.gram_from_samples": 8}, 1),
    "dinov2.gram_from_samples": ({"dinov2.gram_weight": 1.0}, 1),
    "dinov2.gram_every_samples": (ANCHORED | {"dinov2.gram_every_samples": 0}, 1),
    "dinov2.mask_ratio": ({"dinov2.mask_ratio": [0.01, 0.05]}, 1),
    "dinov2.mask_share": ({"dinov2.mask_share": 0.01}, 1),
    "dinov2.ibot_weight": ({"model.name": "timm/test_vit"} | {f"model.{key}": None for key in VIT_KEYS}, 1),
    "dinov2.dino_weight": ({"dinov2.dino_weight": 0.0} | NO_IBOT, 1),
    "views.crops": ({"views.crops": [{"num": 1, "size": 24}]}, 1),
    "dinov2.patch_prototypes": ({"dinov2.shared_head": True, "dinov2.patch_bottleneck": 256}, 1),
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_is_refused_before_ranks_start(key):
    over, ranks = REFUSED[key]
    with pytest.raises(UserError) as refused:
        build_method(resolve(DINOV2, sections(over), world_size=ranks), World())
    assert [problem.key for problem in refused.value.problems] == [key.partition(",")[0]]


def test_a_skipped_update_does_not_cost_the_gram_teacher():
    """Whose time comes once: after 8 samples, with an inf in that very update."""
    config, engine = tiny(World(), DINOV2, **ANCHORED, **{"train.precision": "bf16"})
    views = fake_views(config, 0, World())
    views[0][0] = torch.inf
    with torch.no_grad():
        engine.shards["teacher.embed.proj.weight"].local.add_(1.0)  # another than both began as
    engine.gradients([lambda: views], samples_seen=0)
    assert engine.update(0.1, 0)["skipped"] == 1
    assert torch.equal(engine.whole("gram.embed.proj.weight"), engine.whole("teacher.embed.proj.weight"))


def test_what_is_frozen_is_frozen_in_its_teacher():
    config, engine = tiny(World(), DINOV2, **{"train.freeze_backbone_samples": 8})
    with torch.no_grad():
        engine.shards["teacher.embed.proj.weight"].local.add_(1.0)
    before = engine.whole("teacher.embed.proj.weight").clone()
    for step, stays in ((0, True), (1, False)):
        losses_of(engine, config, World(), range(step, step + 1), 0.1)
        assert torch.equal(engine.whole("teacher.embed.proj.weight"), before) == stays


def test_a_gram_teacher_that_was_never_taken_is_not_anchored_to():
    later = resolve(DINOV2, sections(ANCHORED | {"dinov2.gram_from_samples": 48}), world_size=1).to_dict()
    method = build_method(resolve(DINOV2, sections(ANCHORED), world_size=1), World())
    assert method.load_state({}, later, 0) and method.load_state({}, later, 56)
    with pytest.raises(UserError, match=r"dinov2.gram_from_samples is 8, .*24 samples.* nearest: 32"):
        method.load_state({}, later, 24)
