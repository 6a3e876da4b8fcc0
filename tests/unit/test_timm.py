"""timm's networks as backbones: values, names and initial weights are timm's; blocks are units, BatchNorm is ours."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import nn

from seer_scale.config import Config, Crop, Model, Views, resolve
from seer_scale.distributed import World
from seer_scale.errors import UserError
from seer_scale.models.execution import measure
from seer_scale.models.init import Played, initial_values
from seer_scale.models.layers.norm import BatchNorm
from seer_scale.models.registry import build_backbone, check_sizes, initialise
from seer_scale.parallel.activation_checkpoint import apply_activation_checkpointing, find_segments
from seer_scale.training.start import resolve_given
from tests.tiny import RECIPE

timm = pytest.importorskip("timm")
SIZES = {
    "test_resnet": (64, 32), "resnet10t": (64, 32), "resnext50_32x4d": (64,), "regnety_002": (64, 32),
    "test_convnext": (64, 32), "test_efficientnet": (64, 32), "test_vit": (64, 32),
    "deit_tiny_distilled_patch16_224": (96,),
    "test_nfnet": (64, 32), "swin_tiny_patch4_window7_224": (224,), "vit_small_patch16_dinov3": (64,),
}  # fmt: skip
"""Images that each is given; the last three are one unit."""


def built(name: str) -> nn.Module:
    """With initial weights, on the CPU."""
    backbone = build_backbone(f"timm/{name}").to_empty(device="cpu")
    for buffer in backbone.buffers():
        buffer.zero_()
    initialise(backbone, seed=0)
    return backbone


def timms(name: str, like: nn.Module) -> nn.Module:
    """timm's own, with the same weights and buffers, of images of any size, without stochastic depth."""
    vit, swin = {"dynamic_img_size": True}, {"drop_path_rate": 0.0}
    options = swin if name.startswith("swin") else vit if "it_" in name or name.endswith("vit") else {}
    net = timm.create_model(name, num_classes=0, **options)
    net.load_state_dict(state(like))
    return net


def state(backbone: nn.Module) -> dict[str, torch.Tensor]:
    return {k.removeprefix("net."): v for k, v in backbone.state_dict().items()}


@pytest.mark.parametrize("name", SIZES)
def test_values_gradients_and_statistics_are_timms(name):
    ours = built(name)
    theirs = timms(name, ours)
    xs = [torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size)) for size in SIZES[name]]
    for training in (True, False):
        got, want = ours.train(training)(xs), [theirs.train(training)(x) for x in xs]
        for a, b in zip(got, want, strict=True):
            assert a.shape == (2, ours.num_features) and torch.equal(a, b)
        sum(x.square().mean() for x in got).backward()
        sum(x.square().mean() for x in want).backward()
    wanted = dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[key.removeprefix("net.")].grad, msg=key)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in state(ours).items())
    norms = [m for m in ours.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(m, BatchNorm) for m in norms)
    macs = build_backbone(f"timm/{name}").num_macs(SIZES[name][0])
    assert macs == ours.num_macs(SIZES[name][0]) > 1e6


@pytest.mark.parametrize(
    "name, strides",
    [
        ("test_resnet", [4, 8, 16, 32]), ("regnety_002", [4, 8, 16, 32]), ("test_convnext", [4, 8, 16, 32]),
        ("test_efficientnet", [2, 4, 8, 16, 32]), ("test_vit", []), ("test_nfnet", []),
    ],
)  # fmt: skip
def test_stage_maps_are_as_told(name, strides):
    backbone = built(name).eval()
    told = backbone.stage_maps()
    assert [of.stride for of in told] == strides and len({of.name for of in told}) == len(strides)
    if not told:
        return
    maps = backbone.forward_stages([torch.randn(1, 3, 64, 96), torch.randn(2, 3, 32, 32)])
    for of, (wide, small) in zip(told, maps, strict=True):
        assert wide.shape == (1, of.channels, 64 // of.stride, 96 // of.stride)
        assert small.shape == (2, of.channels, 32 // of.stride, 32 // of.stride)
    sum(x.sum() for xs in maps for x in xs).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == backbone.after_stages()


@pytest.mark.parametrize(
    "name", ["test_resnet", "resnet10t", "test_convnext", "test_efficientnet", "test_vit", "test_nfnet"]
)
def test_initial_weights_are_distributed_as_timms(name):
    """And are functions of (seed, name, index): a rank draws its own run alone."""
    torch.manual_seed(0)  # once in some million draws timm's truncated normal is at its bound, a hundred deviations out
    ours, theirs = built(name), timm.create_model(name, num_classes=0)
    wanted = dict(theirs.named_parameters())
    for key, init in ours.initialisers().items():
        p, q = ours.get_parameter(key), wanted[key.removeprefix("net.")]
        run = initial_values(init, p.shape, 0, key, p.numel() // 3, p.numel() // 2)
        assert torch.equal(run, p.detach().flatten()[p.numel() // 3 : p.numel() // 2])
        if not q.std(correction=0):
            assert torch.equal(p, q), key
            continue
        noise = q.std() / q.numel() ** 0.5
        assert abs(p.mean() - q.mean()) < 8 * noise and abs(p.std() - q.std()) < 8 * noise, key


def test_a_part_that_a_constructor_draws_otherwise():
    """The gate of a packed SwiGLU begins at one, beside weights and biases that do not."""
    inits = build_backbone("timm/vit_giant_patch14_dinov2").initialisers()
    bias = initial_values(inits["blocks.0.mlp.fc1.bias"], (8192,), 0, "b")
    weight = initial_values(inits["blocks.0.mlp.fc1.weight"], (8192, 16), 0, "w")
    whole = Played(((("normal_", None, 0.0, 1.0)), ("fill_", (3, 5), 2.0), ("mul_", (4, 8), 3.0)))
    drawn = initial_values(whole, (10,), 0, "x")
    assert drawn[3:5].tolist() == [2.0, 6.0]
    assert torch.equal(initial_values(whole, (10,), 0, "x", 4, 9), drawn[4:9])
    assert set(bias.tolist()) == {0.0, 1.0} or len(bias.unique()) > 2
    assert weight.isfinite().all()


@pytest.mark.parametrize("name,stages", [
    ("test_resnet", [1, 1, 1, 1]), ("resnet50", [3, 4, 6, 3]), ("resnext101_32x8d", [3, 4, 23, 3]),
    ("regnety_160", [2, 4, 11, 1]), ("convnext_tiny", [4, 4, 10, 4]), ("vit_base_patch16_224", [12]),
    ("efficientnet_b0", [1, 2, 2, 3, 3, 4, 1]), ("test_nfnet", [1]),
])  # fmt: skip
def test_blocks_are_units(name, stages):
    """Nearly all of a network lies in them, so that nearly all is sharded by them."""
    backbone = build_backbone(f"timm/{name}")
    assert [len(names) for names in backbone.stage_units()] == stages
    units = backbone.shard_units()
    assert set(units) >= {name for names in backbone.stage_units() for name in names}
    inside = {id(p) for unit in units.values() for p in unit.parameters()}
    assert sum(p.numel() for p in backbone.parameters() if id(p) in inside) > 0.89 * sum(
        p.numel() for p in backbone.parameters()
    )
    assert all(p.is_meta for p in backbone.parameters())


def test_a_recomputed_network_makes_the_same_gradients_and_moves_statistics_once():
    made = []
    for setting in ("none", "every 1"):
        backbone = built("resnet10t")
        apply_activation_checkpointing(backbone, find_segments(setting, backbone.stage_units()))
        backbone([torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))])[0].square().sum().backward()
        made.append([p.grad for p in backbone.parameters()] + [b.clone() for b in backbone.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("name,size", [("test_vit", 64), ("levit_128s", 224), ("swin_tiny_patch4_window7_224", 224)])
def test_threads_are_measured_on_blocks_of_any_family(name, size):
    """Also where a network is one unit, and has tables that its constructor computes."""
    config = dataclasses.replace(resolve(RECIPE, world_size=1), views=Views(crops=(Crop(num=1, size=size),)))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch=2))
    backbone = build_backbone(f"timm/{name}")
    for layout in (torch.contiguous_format, torch.channels_last):
        assert measure(backbone, config, World(), layout, rounds=1) > 0


def test_what_is_no_backbone_of_timm():
    with pytest.raises(UserError, match="model.name is timm/resnet5, but timm .*did you mean timm/resnet50"):
        build_backbone("timm/resnet5")
    with pytest.raises(UserError) as caught:
        build_backbone("timm/resnet50", depth=3)
    assert (caught.value.problems[0].key, caught.value.problems[0].value) == ("model.name", "timm/resnet50")
    with pytest.raises(UserError, match=r"its net.blocks.0.attn.v.weight starts in a way that cannot be followed"):
        build_backbone("timm/convit_tiny")
    (problem,) = check_sizes(build_backbone("timm/test_vit"), {"views.crops[1].size": 50, "knn.size": 64})
    assert (problem.key, problem.value) == ("views.crops[1].size", 50) and "Input height (50)" in problem.rule
    (problem,) = check_sizes(build_backbone("timm/test_vit"), {"views.crops[1].size": (64, 50), "knn.size": (64, 96)})
    assert problem.value == (64, 50) and "Input width (50)" in problem.rule
    given = RECIPE | {
        "model": {"name": "timm/test_vit"},
        "knn": {"enabled": False, "size": 50},
        "health": {"images": 0},
    }
    with pytest.raises(UserError) as caught:
        resolve_given(given, [], 1, with_data=False)
    told = [(p.key, p.value) for p in caught.value.problems]
    assert ("views.crops[0].size", 24) in told and ("knn.size", 50) in told, "pictures and exports are of that size"
    with pytest.raises(UserError) as caught:
        resolve_given(RECIPE | {"model": RECIPE["model"] | {"name": "timm/test_vit"}}, [], 1, with_data=False)
    assert ("model.name", "timm/test_vit") in [(p.key, p.value) for p in caught.value.problems]
    assert Config(model=Model(name="timm/test_vit")).model.explicit_keys() == {}


def test_without_timm_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"it needs timm, which is not installed; pip install '?timm"):
        build_backbone("timm/resnet50")
