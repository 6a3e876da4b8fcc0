"""ConvNeXt V2 against timm, by names and shapes to huge, by value to nano, also after a step of training."""

from __future__ import annotations

import itertools

import pytest
import torch

from seer_scale.interop.convnext_layouts import exported
from seer_scale.models.convnextv2 import CONVNEXT, CONVNEXTV2, ConvNeXtV2, GlobalResponseNorm
from seer_scale.models.layers.tiles import on_canvas
from seer_scale.models.registry import build_backbone, initialise
from tests.tiles import drawn

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


def test_the_first_convnext_is_timms_and_hides_tiles():
    """Outputs, gradients, and what is packed; sizes by parameters."""
    ours = build_backbone("convnext", width=8, depths=(1, 1, 2, 1), layer_scale=0.5)
    initialise(ours, 0)
    assert all((p == 0.5).all() for n, p in ours.named_parameters() if n.endswith(".gamma"))
    theirs = timm.create_model("convnext_tiny", num_classes=0, depths=[1, 1, 2, 1], dims=[8, 16, 32, 64]).double()
    ours, pieces = ours.double(), exported("timm", ours.spec)
    state = ours.state_dict()
    theirs.load_state_dict({name: make(*(state[s] for s in sources)) for name, (sources, make) in pieces.items()})
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    a, b = ours(images), theirs(images)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    (a.square().sum() + b.square().sum()).backward()
    of_ours, of_theirs = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for name, (sources, _) in pieces.items():
        torch.testing.assert_close(of_theirs[name].grad, of_ours[sources[0]].grad.view_as(of_theirs[name]))
    masks, places = drawn(2, (2, 3), 3)
    (tiles,), (dense,) = (ours.visible_stages([images], [masks], given)[-1] for given in ([places], []))
    torch.testing.assert_close(on_canvas(tiles, masks.shape[1:], places), dense, rtol=1e-12, atol=1e-12)
    for name in CONVNEXT:
        with torch.device("meta"):
            networks = build_backbone(name), timm.create_model(name, num_classes=0)
        assert len({sum(p.numel() for p in network.parameters()) for network in networks}) == 1


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


@pytest.mark.parametrize("half, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-5, 1.0])
@pytest.mark.parametrize("upstream", [1e-6, 1.0, 100.0])
def test_gradients_in_half_precision_are_those_in_fp64(half, tolerance, size, upstream):
    """Also of a channel that is nearly off, as GELU leaves one, at the loss scale's sizes; and of small ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 10, 4, 4, 8, generator=generator)
    x[..., 0] *= size
    grad = (upstream * torch.randn(x.shape, generator=generator)).to(half)
    results = []
    for dtype in (half, torch.float64):
        grn, given = GlobalResponseNorm(8).double(), x.to(half).to(dtype).requires_grad_()
        torch.nn.init.ones_(grn.weight)
        torch.nn.init.zeros_(grn.bias)
        grn = grn.float() if dtype == half else grn
        results.append(torch.autograd.grad(grn(given), (given, grn.weight, grn.bias), grad.to(dtype)))
    for ours, expected in zip(*results, strict=True):
        largest = expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=max(tolerance / 2 * largest, 6e-8))


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


@pytest.mark.parametrize("size, grid, keep", [("atto", (3, 4), 5), ("femto", (2, 3), 1), ("nano", (3, 3), 8)])
def test_what_is_packed_is_the_dense_network_with_zeros(size, grid, keep):
    """Values and gradients, of two resolutions at once."""
    model = pair(size)[0]
    images = [
        torch.randn(2, 3, 32 * grid[0], 32 * grid[1], dtype=torch.float64),
        torch.randn(3, 3, 64, 64, dtype=torch.float64),
    ]
    of_sizes = [drawn(2, grid, keep), drawn(3, (2, 2), 2, seed=1)]
    masks, places = [m for m, _ in of_sizes], [p for _, p in of_sizes]
    gradients = []
    for given in (places, []):
        model.zero_grad()
        maps = model.visible_stages(images, masks, given)[-1]
        if given:
            maps = [on_canvas(x, m.shape[1:], p) for x, m, p in zip(maps, masks, places, strict=True)]
        gradients.append((maps, {}))
        sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in maps).backward()
        gradients[-1][1].update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    (packed, of_packed), (dense, of_dense) = gradients
    for a, b in zip(packed, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert of_packed.keys() == of_dense.keys() and len(of_packed) > 20
    for name, g in of_packed.items():
        torch.testing.assert_close(
            g, of_dense[name], rtol=1e-11, atol=1e-11 * of_dense[name].abs().max().item(), msg=name
        )


@pytest.mark.parametrize("is_packed", [True, False])
def test_what_is_masked_changes_nothing(is_packed):
    model, (masks, places) = pair("atto")[0], drawn(2, (3, 3), 4)
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    pixels = masks.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    others = torch.where(pixels, torch.randn_like(images), images)
    given = [places] if is_packed else []
    (a,), (b,) = (model.visible_stages([x], [masks], given)[-1] for x in (images, others))
    assert torch.equal(a, b)
    (whole,) = model.visible_stages([images], [torch.zeros_like(masks)], [torch.arange(9).expand(2, 9)])[-1]
    torch.testing.assert_close(whole.view(2, 3, 3, -1).permute(0, 3, 1, 2), model.forward_stages([images])[-1][0])


def test_global_response_normalization_of_what_is_visible_has_the_published_figures():
    x = (torch.arange(12, dtype=torch.float64) / 10 - 0.3).view(1, 2, 2, 3)
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    mask[0, 1, 1] = True
    grn = GlobalResponseNorm(3).double()
    with torch.no_grad():
        grn.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        grn.bias.copy_(torch.tensor([0.1, 0.0, -0.2]))
    rows = [[-0.333487, -0.007757, -0.529774], [0.1, 0.003879, 0.459548], [0.533487, 0.015515, 1.448870]]
    torch.testing.assert_close(grn(x, mask).view(4, 3)[:3], torch.tensor(rows, dtype=torch.float64), atol=1e-6, rtol=0)
