"""ConvNeXt V2 against timm, by names and shapes to huge, by value to nano, also after a step of training."""

from __future__ import annotations

import itertools

import pytest
import torch

from seer_scale.models.convnextv2 import CONVNEXTV2, ConvNeXtV2, GlobalResponseNorm
from seer_scale.models.registry import build_backbone, initialise

timm = pytest.importorskip("timm")
ENCODERS = {
    "atto": 3386760, "femto": 4847472, "pico": 8552256, "nano": 14981520, "tiny": 27864960, "base": 87690752,
    "large": 196416768, "huge": 657467008,
}  # fmt: skip
"""Published parameters without the last LayerNorm and the classifier."""
BY_VALUE = ("atto", "femto", "pico", "nano")
PARTS = {"dw": "conv_dw", "norm": "norm", "fc1": "mlp.fc1", "grn": "mlp.grn", "fc2": "mlp.fc2"}


def of_timm(spec) -> dict[str, str]:
    """Our name of a parameter to timm's."""
    out = {}
    for leaf in ("weight", "bias"):
        out |= {f"stem.conv.{leaf}": f"stem.0.{leaf}", f"stem.norm.{leaf}": f"stem.1.{leaf}"}
        out[f"norm.{leaf}"] = f"head.norm.{leaf}"
        for s, depth in enumerate(spec.depths):
            if s:
                out |= {f"s{s + 1}.down.{part}.{leaf}": f"stages.{s}.downsample.{i}.{leaf}"
                        for i, part in enumerate(("norm", "conv"))}  # fmt: skip
            for b, (part, theirs) in itertools.product(range(depth), PARTS.items()):
                out[f"s{s + 1}.b{b + 1}.{part}.{leaf}"] = f"stages.{s}.blocks.{b}.{theirs}.{leaf}"
    return out


def on_meta(size: str, **given) -> ConvNeXtV2:
    with torch.device("meta"):
        return build_backbone(f"convnextv2_{size}", **given)


@pytest.mark.parametrize("size", ENCODERS)
def test_parameters_are_timms(size):
    ours = dict(on_meta(size).named_parameters())
    with torch.device("meta"):
        theirs = dict(timm.create_model(f"convnextv2_{size}", num_classes=0).named_parameters())
    names = of_timm(CONVNEXTV2[f"convnextv2_{size}"])
    assert ours.keys() == names.keys() and set(names.values()) == theirs.keys()
    for name, p in ours.items():
        shape = theirs[names[name]].shape
        assert tuple(p.shape) == tuple(shape) or tuple(shape) == (*p.shape, 1, 1), name  # timm's small ones convolve
    assert sum(p.numel() for n, p in ours.items() if not n.startswith("norm.")) == ENCODERS[size]


def pair(size: str, dtype=torch.float64):
    ours = build_backbone(f"convnextv2_{size}")
    initialise(ours, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in ours.named_parameters():  # a Global Response Normalization that does something
            p.add_(torch.randn(p.shape, generator=generator) * (0.2 if ".grn." in name else 0.02))
    theirs = timm.create_model(f"convnextv2_{size}", num_classes=0).to(dtype)
    ours, names, held = ours.to(dtype), of_timm(ours.spec), theirs.state_dict()
    theirs.load_state_dict({names[n]: p.detach().view_as(held[names[n]]) for n, p in ours.named_parameters()})
    return ours, theirs, names


@pytest.mark.parametrize("size", BY_VALUE)
def test_outputs_are_timms_also_after_a_step(size):
    ours, theirs, names = pair(size)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for _ in range(2):
        a, b = ours(images), theirs(images)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        for loss in (a.square().sum(), b.square().sum()):
            loss.backward()
        gradients = dict(theirs.named_parameters())
        with torch.no_grad():
            for name, p in ours.named_parameters():
                torch.testing.assert_close(p.grad, gradients[names[name]].grad.view_as(p), rtol=1e-8, atol=1e-10)
                p -= 1e-3 * p.grad
            for p in theirs.parameters():
                p -= 1e-3 * p.grad
        ours.zero_grad()
        theirs.zero_grad()
    maps = ours.forward_stages([images])
    expected = theirs.forward_intermediates(images, intermediates_only=True)
    for (ours_of_stage,), x in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours_of_stage, x, rtol=1e-9, atol=1e-9)


def test_resolutions_go_together_as_they_do_apart():
    ours, _, _ = pair("atto")
    images = [torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.randn(3, 3, 32, 48, dtype=torch.float64)]
    for together, alone in zip(ours(images), map(ours, images), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    tokens = ours.tokens(images)
    assert [t.patches.shape for t in tokens] == [(2, 4, 320), (3, 1, 320)] and ours.patch_map.stride == 32


def test_global_response_normalization_has_the_published_figures():
    x = (torch.arange(12, dtype=torch.float64) / 10 - 0.3).view(1, 2, 2, 3)
    grn = GlobalResponseNorm(3).double()
    with torch.no_grad():
        grn.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        grn.bias.copy_(torch.tensor([0.1, 0.0, -0.2]))
    rows = [[-0.330136, -0.002445, -0.528930], [0.1, 0.001223, 0.457860], [0.530136, 0.004890, 1.444650],
            [0.960272, 0.008558, 2.431440]]  # fmt: skip
    torch.testing.assert_close(grn(x).view(4, 3), torch.tensor(rows, dtype=torch.float64), atol=1e-6, rtol=0)


def test_branches_are_dropped_by_image():
    """All of an image's, or none: rates of 0 in the first block and nearly 1 in the last."""
    model = build_backbone("convnextv2", width=8, depths=(1, 1, 1, 1), drop_path=0.5)
    initialise(model, 0)
    images = torch.randn(4, 3, 32, 32)
    draws = torch.full((4, model.num_draws), 0.99)
    draws[1] = 0.0
    kept, dropped = model([images], [draws])[0], model([images], [draws])[0]
    assert torch.equal(kept, dropped)
    alone = model([images[1:2]], [draws[1:2]])[0]
    torch.testing.assert_close(kept[1:2], alone)
    assert not torch.allclose(kept[0], model(images)[0]) and torch.equal(
        model.eval()([images], [draws])[0], model(images)
    )
