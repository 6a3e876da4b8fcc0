"""RegNetY against the published table and against timm. A new row of REGNETY is tested by being listed."""

import copy
import re
import time

import pytest
import timm
import torch

from seer_scale.config import shape_of
from seer_scale.errors import UserError
from seer_scale.interop.names import TIMM_MODELS
from seer_scale.models.layers.norm import BatchNorm
from seer_scale.models.layers.tiles import on_canvas
from seer_scale.models.registry import backbone_names, build_backbone, initialise
from seer_scale.models.regnet import REGNETY, ConvNorm, RegNetY, stage_plan, widened
from tests.tiles import drawn

# widths, depths, trunk parameters, GMAC at 224: docs/facts, from arXiv 2003.13678 (to 32GF), 2103.01988 and 2202.08360
PUBLISHED = {
    "regnety_8gf": ([168, 448, 896, 2016], [2, 4, 10, 1], 37_163_068, 8.0),
    "regnety_16gf": ([224, 448, 1232, 3024], [2, 4, 11, 1], 80_565_140, 15.9),
    "regnety_32gf": ([232, 696, 1392, 3712], [2, 5, 12, 1], 141_333_770, 32.3),
    "regnety_64gf": ([328, 984, 1968, 4920], [2, 5, 12, 1], 276_457_786, 64.1),
    "regnety_128gf": ([528, 1056, 2904, 7392], [2, 7, 17, 1], 637_419_894, 127.5),
    "regnety_256gf": ([746, 1492, 4103, 10444], [2, 7, 17, 1], 1_272_156_138, 254.4),
    "regnety_10b": ([2020, 4040, 11110, 28280], [2, 7, 17, 1], 9_323_934_872, 1863),
}
# by the rule of `widened`: widths, trunk parameters, GMAC at 224
BEYOND = {
    "regnety_20b": ([2960, 5920, 16280, 41440], 20_018_886_086, 4000),
    "regnety_40b": ([4176, 8352, 22968, 58464], 39_843_588_078, 7961),
}
SMALL = ["200mf", "400mf", "600mf", "800mf", "1_6gf", "3_2gf", "4gf"]
TINY = {"depth": 5, "w0": 8, "wa": 12.0, "wm": 2.0, "group_width": 8}  # widths 8 16 32 64, depths 1 1 2 1


def on_meta(name: str) -> RegNetY:
    with torch.device("meta"):
        return build_backbone(name)


def tiny() -> RegNetY:
    model = build_backbone("regnety", **TINY)
    initialise(model, seed=0)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_table(name):
    widths, depths, parameters, gmac = PUBLISHED[name]
    model = on_meta(name)
    assert stage_plan(REGNETY[name]) == (widths, depths)
    assert model.num_features == widths[-1]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.num_macs(224) / 1e9 == pytest.approx(gmac, abs=0.5 if gmac > 1000 else 0.05)


def test_the_rule_leads_from_seers_256gf_to_its_10b():
    times = PUBLISHED["regnety_10b"][2] / PUBLISHED["regnety_256gf"][2]
    made, wanted = widened(REGNETY["regnety_256gf"], times), REGNETY["regnety_10b"]
    assert (made.w0, made.wa, made.group_width) == pytest.approx((wanted.w0, wanted.wa, wanted.group_width), rel=0.007)
    (widths, depths), published = stage_plan(made), PUBLISHED["regnety_10b"]
    assert widths == pytest.approx(published[0], rel=0.0025) and depths == published[1]


@pytest.mark.parametrize("name", BEYOND)
def test_larger_ones_have_the_parameters_they_are_named_for(name):
    widths, parameters, gmac = BEYOND[name]
    model = on_meta(name)
    assert stage_plan(REGNETY[name]) == (widths, PUBLISHED["regnety_10b"][1])
    assert REGNETY[name].w0 % 8 == REGNETY[name].group_width % 8 == 0
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert parameters == pytest.approx(1e9 * int(name.removeprefix("regnety_").removesuffix("b")), rel=0.03)
    assert model.num_macs(224) / 1e9 == pytest.approx(gmac, abs=0.5)


@pytest.mark.parametrize("name", REGNETY)
def test_every_row(name):
    """Each row is built on meta in under a second, and its units and initialisers cover every parameter once."""
    start = time.process_time()
    model = on_meta(name)
    assert time.process_time() - start < 1
    parameters = dict(model.named_parameters())
    assert model.initialisers().keys() == parameters.keys()
    assert [f"{unit}.{p}" for unit, m in model.shard_units().items() for p, _ in m.named_parameters()] == list(
        parameters
    )
    assert ["stem", *sum(model.stage_units(), [])] == list(model.shard_units())


@pytest.mark.parametrize("size", SMALL)
def test_outputs_are_timms(size):
    ours = build_backbone(f"regnety_{size}")
    initialise(ours, seed=1)
    theirs = timm.create_model(TIMM_MODELS[f"regnety_{size}"], num_classes=0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for training in (True, False):  # the eval pass runs on the statistics that the training pass left
            y, expected = ours.train(training)(x), theirs.train(training)(x)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


def test_multiply_accumulates_are_those_of_the_convolutions_run():
    model, counted = tiny(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, _, y: counted.append(m.weight.numel() * y[0, 0].numel()))
    for size in (64, 75, (64, 99)):
        counted.clear()
        model(torch.zeros(2, 3, *shape_of(size)))
        assert model.num_macs(size) == sum(counted)


@pytest.mark.parametrize("training", [True, False])
def test_a_list_is_one_call_an_entry_and_enters_each_unit_once(training):
    together, apart = tiny().train(training), tiny().train(training)
    calls = []
    for name, unit in together.shard_units().items():
        unit.register_forward_hook(lambda *_, name=name: calls.append(name))
    xs = [torch.randn(3, 3, 64, 64), torch.randn(5, 3, 40, 48)]
    for y, x in zip(together(xs), xs, strict=True):
        assert y.shape == (len(x), together.num_features)
        assert torch.equal(y, apart(x))
    assert calls == list(together.shard_units())
    assert all(torch.equal(a, b) for a, b in zip(together.buffers(), apart.buffers()))


def test_stage_maps_lead_to_the_pooled_features():
    model, x = tiny().eval(), torch.randn(2, 3, 64, 64)
    maps = model.forward_stages(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(w, 16 // 2**i, 16 // 2**i) for i, w in enumerate([8, 16, 32, 64])]
    assert [(m.shape[1], 64 // m.shape[2]) for m in maps] == [(of.channels, of.stride) for of in model.stage_maps()]
    assert torch.equal(maps[-1].mean((2, 3)), model(x))
    assert torch.equal(model.forward_stages([x])[1][0], maps[1])


def test_construction_draws_nothing_and_weights_follow_from_the_seed():
    before = torch.get_rng_state()
    first, second = tiny(), tiny()
    assert torch.equal(before, torch.get_rng_state())
    for layer in second.modules():
        if isinstance(layer, BatchNorm):
            layer.running_mean.fill_(3)
    initialise(second, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    initialise(second, seed=1)
    assert not torch.equal(first.stem.conv.weight, second.stem.conv.weight)


def test_grouped_convolutions_start_by_their_full_fan_out():
    model = build_backbone("regnety_800mf")
    initialise(model, seed=0)
    conv = model.s3.b2.conv2.conv
    assert conv.groups == 20 and conv.weight.std().item() == pytest.approx((2 / (9 * 320)) ** 0.5, rel=0.02)
    assert set(model.s3.b2.conv3.bn.weight.tolist()) == {1.0} and not model.s3.b2.se.fc1.bias.any()


def test_the_free_regnety_is_the_named_one_on_the_same_generator():
    with torch.device("meta"):
        free = build_backbone("regnety", depth=17, w0=192, wa=76.82, wm=2.19, group_width=56)
    named = on_meta("regnety_8gf")
    assert {k: v.shape for k, v in free.state_dict().items()} == {k: v.shape for k, v in named.state_dict().items()}


@pytest.mark.parametrize(
    "name, free, said",
    [
        ("regnety_256g", {}, "did you mean regnety_256gf?"),
        ("regnety_8gf", {"depth": 9}, "use regnety"),
        ("regnety", {}, "model.group_width is missing"),
        ("regnety", TINY | {"group_with": 8}, "did you mean group_width?"),
        ("regnety", TINY | {"depth": 4.5}, "must be int"),
        ("regnety", TINY | {"w0": 9}, "multiple of 8"),
        ("regnety", TINY | {"wm": 1.0}, "above 1"),
        ("regnety", TINY | {"group_width": 0}, "at least 1"),
        ("regnety", TINY | {"se_ratio": 0}, "model.se_ratio is 0,"),
        ("regnety", TINY | {"wa": 0.0}, "1 stage width "),
    ],
)
def test_impossible_requests_name_the_fix(name, free, said):
    with pytest.raises(UserError, match=re.escape(said)), torch.device("meta"):
        build_backbone(name, **free)


def test_names():
    names = backbone_names()  # plugins that another test has loaded stand between
    assert names[: len(REGNETY)] == [*REGNETY] and names[-4:] == ["regnety", "vit", "convnext", "convnextv2"]


def in_fp64() -> RegNetY:
    """With weights that are no identity, and running statistics of their own."""
    model, generator = tiny().double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in (*model.parameters(), *(b for n, b in model.named_buffers() if "running" in n)):
            t.add_(0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype).abs())
    return model


def of_visible(model: RegNetY, images, masks, places, is_packed: bool) -> tuple[list, dict, dict]:
    """(dense maps of every stage, gradients, buffers) of a copy."""
    model = copy.deepcopy(model)
    stages = model.visible_stages(images, masks, places if is_packed else [])
    if is_packed:
        stages = [[on_canvas(*of) for of in zip(maps, [m.shape[1:] for m in masks], places)] for maps in stages]
    maps = [x for maps in stages for x in maps]
    sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in maps).backward()
    return maps, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grid, keep", [((3, 4), 5), ((2, 3), 1), ((3, 3), 8)])
def test_what_is_packed_is_the_dense_network_with_zeros(grid, keep, training):
    """Maps of every stage, gradients and running statistics, of two resolutions at once."""
    model = in_fp64().train(training)
    of_sizes = [(2, grid, keep, 0), (3, (2, 2), 2, 1)]
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randn(num, 3, 32 * g[0], 32 * g[1], generator=generator, dtype=torch.float64) for num, g, *_ in of_sizes
    ]
    masks, places = map(list, zip(*(drawn(*of) for of in of_sizes)))
    ours, theirs = (of_visible(model, images, masks, places, is_packed) for is_packed in (True, False))
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * b.abs().max().item())
    for name, g in ours[1].items():
        within = 1e-11 * theirs[1][name].abs().max().item()
        torch.testing.assert_close(g, theirs[1][name], rtol=1e-11, atol=within, msg=name)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-12, atol=1e-12)
    assert training != torch.equal(ours[2]["s4.b1.conv3.bn.running_var"], model.s4.b1.conv3.bn.running_var)


@pytest.mark.parametrize("training", [True, False])
def test_what_is_masked_changes_nothing(training):
    """And where nothing is, the packed network is the whole one."""
    model, (masks, places) = in_fp64().train(training), drawn(2, (3, 3), 4)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pixels = masks.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    others = torch.where(pixels, torch.randn_like(images), images)
    for given in ([places], []):
        (a,), (b,) = (model.visible_stages([x], [masks], given)[-1] for x in (images, others))
        assert torch.equal(a, b)
    whole = model.visible_stages([images], [torch.zeros_like(masks)], [torch.arange(9).expand(2, 9)])[-1]
    (last,) = model.forward_stages([images])[-1]
    within = 1e-12 * last.abs().max().item()
    torch.testing.assert_close(whole[0].view(2, 3, 3, -1).permute(0, 3, 1, 2), last, rtol=1e-12, atol=within)
    torch.testing.assert_close(model.pooled_visible(whole), model([images]), rtol=1e-12, atol=within)


def test_statistics_are_of_visible_places():
    """1, 2, 3, 6 beside six zeros: a mean of 3 and a variance of 3.5, not of 1.2 and 3.56."""
    layer = ConvNorm(1, 1)
    for p, value in zip(layer.parameters(), (1.0, 1.0, 5.0), strict=True):
        torch.nn.init.constant_(p, value)
    layer.bn.reset_buffers()
    layer.bn.momentum = 1.0
    x = torch.tensor([[1.0, 0, 2, 0, 0], [0, 3, 0, 6, 0]]).view(1, 1, 2, 5)
    (y,) = layer([x, x[:, 0] == 0])
    assert layer.bn.running_mean.item() == pytest.approx(3) and layer.bn.running_var.item() == pytest.approx(14 / 3)
    expected = torch.where(x == 0, 0.0, (x - 3) / 3.5**0.5 + 5)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
