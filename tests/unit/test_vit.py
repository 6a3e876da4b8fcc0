"""Vision transformers: DINOv2's sizes, one matrix of all resolutions' tokens, dropped paths that are a function of the
image, masks, positions. What other libraries make of the same weights is in test_vit_names.py."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from timm.layers import RotaryEmbeddingDinoV3, apply_rot_embed_cat
from torch.nn import functional as F

from seer_scale.config import resolve
from seer_scale.distributed import World
from seer_scale.errors import UserError
from seer_scale.methods.draws import ViewDraws
from seer_scale.methods.registry import build_method
from seer_scale.models.classifier import layer_rates
from seer_scale.models.layers.transformer import drop_scales, rope_table, rotate
from seer_scale.models.registry import backbone_names, build_backbone, check_sizes, initialise
from seer_scale.models.vit import VITS, Tokens, ViT
from seer_scale.parallel.activation_checkpoint import apply_activation_checkpointing, find_segments
from seer_scale.training.start import resolve_given
from tests.tiny import RECIPE

SMALL = {"width": 24, "depth": 3, "heads": 2, "patch": 8, "image_size": 24, "registers": 2, "layer_scale": 0.5}
# parameters of DINOv2's (patch 14) with a table for 518 and for 224 pixels, without registers; mask token included
PUBLISHED = [
    ("small", {}, 22_056_576, 21_629_184), ("base", {}, 86_580_480, 85_725_696),
    ("large", {}, 304_368_640, 303_228_928), ("large", {"ffn": "swiglu"}, 304_794_880, 303_655_168),
    ("giant", {}, 1_136_480_768, 1_134_771_200),
]  # fmt: skip


def on_meta(name: str, **given) -> ViT:
    with torch.device("meta"):
        return build_backbone(name, **given)


def small(**given) -> ViT:
    model = build_backbone("vit", **SMALL | given)
    initialise(model, seed=0)
    return model


def spread(model: ViT) -> ViT:
    """With weights in which everything tells."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def images(*shapes: tuple[int, int, int]) -> list[torch.Tensor]:
    return [torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(h + w)) for n, h, w in shapes]


@pytest.mark.parametrize("size,more,at_518,at_224", PUBLISHED)
def test_parameters_are_as_many_as_published(size, more, at_518, at_224):
    for image_size, registers in itertools.product((518, 224), (0, 4)):
        model = on_meta(f"vit_{size}_patch14", image_size=image_size, registers=registers, **more)
        wanted = (at_518 if image_size == 518 else at_224) + registers * model.num_features
        assert sum(p.numel() for p in model.parameters()) == wanted
    assert on_meta(f"vit_{size}_patch16").refuses((112, 96)) == [] and len(model.stage_units()[0]) == model.spec.depth


@pytest.mark.parametrize("given", [{}, {"ffn": "swiglu", "registers": 0}, {"positions": "rope", "width": 32}])
def test_a_resolution_is_seen_as_alone(given):
    """Values and gradients: the tokens of others stand beside its own in one matrix, and nothing else."""
    model = spread(small(**given))
    xs = images((2, 24, 24), (3, 16, 32))
    together = model.tokens(xs)
    sum(t.patches.square().sum() + t.cls.sum() for t in together).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for x, of_list, (height, width) in zip(xs, together, [(3, 3), (2, 4)]):
        (alone,) = model.tokens([x])
        assert alone.patches.shape == (len(x), height * width, model.num_features)
        assert alone.registers.shape[1] == model.spec.registers and alone.cls.shape == (len(x), model.num_features)
        for a, b in zip(alone, of_list):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
        (alone.patches.square().sum() + alone.cls.sum()).backward()
    for name, p, g in zip(dict(model.named_parameters()), model.parameters(), gradients):
        torch.testing.assert_close(p.grad, g, atol=1e-4, rtol=1e-3, msg=name)
    torch.testing.assert_close(model(xs[0]), together[0].cls, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("given", [{}, {"registers": 0}, {"positions": "rope", "width": 32}])
def test_attention_is_what_the_last_block_computes(given, monkeypatch):
    """torch's own kernel gives its weights where the values are the identity."""
    model, x, calls = spread(small(**given)).double(), images((2, 16, 32))[0].double(), []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: calls.append(a) or plain(*a))
    tokens, attention = model.tokens_and_attention(x)
    queries, keys, _ = calls[-1]
    num, total = 1 + model.spec.registers, queries.shape[2]
    weights = plain(queries, keys, torch.eye(total, dtype=torch.float64).expand(2, model.spec.heads, -1, -1))
    assert attention.shape == (2, model.spec.heads, num, 8) and weights.std(3).min() > 1e-3  # far from uniform
    torch.testing.assert_close(attention, weights[:, :, :num, num:], rtol=1e-12, atol=1e-12)
    assert len(calls) == 3 and not attention.requires_grad
    for a, b in zip(tokens, model.tokens([x])[0], strict=True):
        assert torch.equal(a, b)


def test_a_linear_layer_runs_once_for_all_resolutions_and_attention_once_for_each(monkeypatch):
    model, calls, attention = small(), [], []
    for name, module in model.named_modules():
        if name.startswith("blocks") and isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.register_forward_hook(lambda _, args, y, name=name: calls.append((name, tuple(y.shape[:-1]))))
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: attention.append(a[0].shape) or plain(*a))
    model(images((2, 24, 24), (3, 16, 16)))
    tokens = 2 * (1 + 2 + 9) + 3 * (1 + 2 + 4)
    assert len(calls) == 3 * 6 and {shape for _, shape in calls} <= {(tokens,)}
    assert attention == [(2, 2, 12, 12), (3, 2, 7, 12)] * 3


# ------------------------------------------------------------------------------------------------ dropped paths


@pytest.mark.parametrize("rule,rates", [("constant", [0.4, 0.4, 0.4]), ("linear", [0.0, 0.2, 0.4])])
def test_branches_are_dropped_at_their_rates_and_kept_ones_make_up_for_it(rule, rates):
    scales = drop_scales(
        torch.rand(40_000, 6, generator=torch.Generator().manual_seed(0)), 0.4, linear=rule == "linear"
    )
    for column, rate in zip(scales.T, [r for r in rates for _ in range(2)]):
        assert {round(v, 5) for v in column.unique().tolist()} == ({0.0, round(1 / (1 - rate), 5)} if rate else {1.0})
        assert column.mean().item() == pytest.approx(1, abs=0.02) and (column == 0).float().mean() == pytest.approx(
            rate, abs=0.01
        )


def test_a_dropped_branch_leaves_its_image_alone_and_no_other():
    """Both branches of every block dropped: what is left is the embedding; in evaluation nothing is dropped."""
    model = spread(small(drop_path=0.5))
    x = images((3, 24, 24))
    draws = torch.full((3, model.num_draws), 0.9)
    draws[1] = 0.1
    kept = [torch.full((3, model.num_draws), 0.9)]
    with torch.no_grad():
        some, all_kept = model(x, [draws])[0], model(x, kept)[0]
        assert torch.equal(some[[0, 2]], all_kept[[0, 2]])
        torch.testing.assert_close(some[1], model.norm([model.embed(x)[0]])[0][1, 0])
        assert not torch.allclose(all_kept, model(x)[0])  # kept ones count double
        assert torch.equal(model.eval()(x, [draws])[0], model(x)[0])


def test_what_is_dropped_is_a_function_of_the_image_and_its_crop():
    """However the batch is spread over ranks and micro-batches, and wherever it begins."""
    over = {"model": {"name": "vit", **SMALL, "drop_path": 0.3}, "train": {"global_batch": 8, "total_samples": 16}}
    config = resolve({k: v for k, v in RECIPE.items() if k != "model"} | {"model": over["model"]}, [], world_size=1)

    def drawn(samples_seen: int, ranks: int, parts: int, seed: int = 0) -> torch.Tensor:
        """[images, views, width]"""
        out = []
        for rank, i in itertools.product(range(ranks), range(parts)):
            seeded = replace(config, run=replace(config.run, seed=seed))
            draws = ViewDraws(seeded, World(rank, ranks), 6)
            batch = config.train.global_batch // ranks // parts
            views = [torch.empty(2 * batch, 1), torch.empty(2 * batch, 1)]
            of_sizes = draws(views, samples_seen, (i, parts))
            out.append(torch.cat([d.unflatten(0, (2, batch)).transpose(0, 1) for d in of_sizes], 1))
        return torch.cat(out)

    whole = drawn(8, 1, 1)
    assert whole.shape == (8, 4, 6) and len(whole.unique()) > 0.99 * whole.numel()
    for ranks, parts in [(2, 1), (4, 2), (1, 8)]:
        assert torch.equal(drawn(8, ranks, parts), whole)
    assert torch.equal(drawn(4, 1, 1)[4:], whole[:4]), "an image's number counts, not its place in a batch"
    assert not torch.equal(drawn(8, 1, 1, seed=1), whole)
    assert ViewDraws(config, World(), 0)([], 0, (0, 1)) is None


def test_recomputed_blocks_drop_what_they_dropped():
    made = []
    for setting in ("none", "every 1", "every 2"):
        model = spread(small(drop_path=0.5))
        apply_activation_checkpointing(model, find_segments(setting, model.stage_units()))
        draws = [torch.rand(n, model.num_draws, generator=torch.Generator().manual_seed(n)) for n in (2, 3)]
        sum(y.square().sum() for y in model(images((2, 24, 24), (3, 16, 16)), draws)).backward()
        made.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for others in made[1:] for a, b in zip(made[0], others, strict=True))


# ------------------------------------------------------------------------------------------------ tokens, positions


def test_a_masked_patch_is_not_seen_and_an_unmasked_resolution_is_as_without():
    model = spread(small())
    xs = images((2, 24, 24), (3, 16, 16))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, [0, 4]] = True
    changed = [xs[0].clone(), xs[1]]
    changed[0][0, :, :8, :8] = 7.0
    changed[0][0, :, 8:16, 8:16] = -7.0
    with torch.no_grad():
        plain, masked, unseen = model.tokens(xs), model.tokens(xs, [mask, None]), model.tokens(changed, [mask, None])
        for a, b in zip(masked[0], unseen[0]):
            assert torch.equal(a, b)
        assert not torch.allclose(plain[0].cls[0], masked[0].cls[0])
        torch.testing.assert_close(plain[0].cls[1], masked[0].cls[1])
        torch.testing.assert_close(plain[1].patches, masked[1].patches)
    model.tokens(xs, [mask, None])[0].patches.sum().backward()
    assert model.embed.mask_token.grad.abs().sum() > 0
    model.zero_grad()
    model(xs)[0].sum().backward()
    assert not model.embed.mask_token.grad.any(), "a gradient, of zeros: some engines wait for one"


@pytest.mark.parametrize(
    "resize,wanted",
    [
        ("offset", [1.812153, 3.901161, 10.168186, 12.257192]),
        ("exact", [2.03125, 4.21875, 10.78125, 12.96875]),
        ("antialias", [2.933884, 4.760331, 10.239670, 12.066115]),
    ],
)
def test_the_table_of_positions_is_resized_as_published(resize, wanted):
    """A ramp of 4 x 4, to 2 x 2; the CLS token's own stays, and the table of its own size is taken as it is."""
    model = small(image_size=32, position_resize=resize)
    with torch.no_grad():
        model.embed.pos_embed.copy_(torch.arange(-1.0, 16)[:, None].expand(17, 24))
        places = model.embed.places(2, 2)
        torch.testing.assert_close(places[:, 5], torch.tensor([-1.0, *wanted]))
        assert torch.equal(model.embed.places(4, 4), model.embed.pos_embed)
        for height, width in [(3, 5), (1, 7), (13, 2), (40, 40)]:
            assert model.embed.places(height, width).shape == (1 + height * width, 24)
    assert (small(registers=4).spec.resize, small(registers=0).spec.resize) == ("antialias", "offset")


def test_rotary_positions_are_dinov3s():
    table = rope_table(3, 5, 64, torch.device("cpu"))
    theirs = RotaryEmbeddingDinoV3(64, feat_shape=[3, 5], temperature=100.0)
    sine, cosine = theirs.get_embed([3, 5]).chunk(2, -1)
    torch.testing.assert_close(table, torch.stack([sine, cosine]), atol=1e-5, rtol=1e-5)
    q = torch.randn(2, 3, 4 + 15, 64, generator=torch.Generator().manual_seed(0))
    turned = rotate(q, table)
    assert torch.equal(turned[:, :, :4], q[:, :, :4]), "CLS and registers have no place"
    wanted = apply_rot_embed_cat(q[:, :, 4:], torch.cat([sine, cosine], -1), half=True)
    torch.testing.assert_close(turned[:, :, 4:], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    assert not hasattr(small(positions="rope", width=32).embed, "pos_embed")


# ------------------------------------------------------------------------------------------------ what it declares


def test_initial_weights_are_dinov2s():
    model = build_backbone("vit", width=192, depth=2, heads=3, patch=14, registers=4)
    before = torch.get_rng_state()
    initialise(model, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    for name, p in model.named_parameters():
        leaf, std = name.rpartition(".")[2], p.std().item()
        if leaf in ("cls_token", "register_tokens"):
            assert 0.8e-6 < std < 1.2e-6, name
        elif name.startswith("embed.proj"):
            assert p.abs().max() <= (bound := (3 * 14**2) ** -0.5) and std == pytest.approx(bound / 3**0.5, rel=0.1)
        elif leaf == "pos_embed" or (leaf == "weight" and p.ndim == 2):
            assert std == pytest.approx(0.02, rel=0.05), name
        else:
            value = {"weight": 1.0, "gamma": 1e-5}.get(leaf, 0.0)
            assert torch.equal(p, torch.full_like(p, value)), name


def test_rates_of_layers_are_dinov2s():
    """Of a ViT-L with a decay of 0.9; and a backbone without decay has rates of one."""
    model = on_meta("vit_large_patch16", registers=4)
    rates = layer_rates(model, layer_decay=0.9, patch_lr=0.2)
    assert rates.keys() == dict(model.named_parameters()).keys()
    for name, rate in {
        "embed.proj.weight": 0.0143580, "embed.proj.bias": 0.0143580, "embed.cls_token": 0.0717898,
        "embed.pos_embed": 0.0717898, "embed.register_tokens": 0.0717898, "blocks.0.attn.qkv.weight": 0.0797664,
        "blocks.23.ls2.gamma": 0.9, "norm.weight": 1.0,
    }.items():  # fmt: skip
        assert rates[name] == pytest.approx(rate, rel=1e-5), name
    other = layer_rates(on_meta("regnety_200mf"), patch_lr=0.5)
    assert {name for name, rate in other.items() if rate != 1} == {"stem.conv.weight"}


def test_units_hold_all_and_attention_is_counted():
    model = on_meta("vit_small_patch16")
    inside = [p for unit in model.shard_units().values() for p in unit.parameters()]
    assert len(inside) == len({*map(id, inside)}) == len(list(model.parameters()))
    tokens, width = 197, 384
    per_block = tokens * 12 * width**2 + 2 * tokens**2 * width
    assert model.num_macs(224) == model.num_macs((112, 448)) == 12 * per_block + 196 * 3 * 16**2 * width
    parts = model.blocks[3].parts()
    assert list(parts) == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


@pytest.mark.parametrize(
    "name,given,said",
    [
        ("vit", {"width": 24}, "model.depth is missing, which model.name vit needs"),
        ("vit_small_patch14", {"depth": 9}, "use vit to choose freely"),
        ("vit_small_patch14", {"w0": 9}, "model.w0 is no key of vit"),
        ("vit_small_patch12", {}, "did you mean vit_small_patch1"),
        ("vit", SMALL | {"width": 25}, "model.width is 25, but of a vit it must be a multiple of 2 (model.heads)"),
        ("vit", SMALL | {"width": 26, "positions": "rope"}, "multiple of 8 (4 * model.heads, for rotary positions)"),
        ("vit", SMALL | {"image_size": 30}, "multiple of 8 (model.patch); nearest: 24 or 32"),
        ("vit", SMALL | {"ffn": "swish"}, "model.ffn is swish, but of a vit it must be one of mlp, swiglu"),
        ("vit", SMALL | {"drop_path": 1.0}, "model.drop_path is 1, but it must be at least 0 and below 1"),
        ("vit", SMALL | {"registers": 2.5}, "model.registers is 2.5, but must be int"),
    ],
)  # fmt: skip
def test_impossible_requests_name_the_fix(name, given, said):
    with pytest.raises(UserError) as caught:
        on_meta(name, **given)
    assert said in str(caught.value)


def test_a_recipe_takes_the_keys_of_its_network():
    recipe = RECIPE | {"knn": {"enabled": False, "size": 24}, "health": {"images": 0}}
    network = {"name": "vit", **SMALL, "registers": 4, "drop_path": 0.2}
    config = resolve_given(recipe | {"model": network}, [], 1, with_data=False)
    assert build_method(config, World()).backbone.spec.drop_path == 0.2
    with pytest.raises(UserError) as caught:
        resolve_given(recipe | {"model": {**network, "w0": 8}}, [], 1, with_data=False)
    assert "model.name is vit, but it takes no model.w0; give --model.w0 null" in str(caught.value)
    with pytest.raises(UserError, match=r"its shape is fixed, and model\.heads given; use model\.name vit"):
        resolve_given(recipe | {"model": {"name": "vit_small_patch14", "heads": 3}}, [], 1, with_data=False)
    with pytest.raises(UserError, match=r"views\.crops\[0\]\.size is 24.*14 pixels, as 14 or 28"):
        resolve_given(recipe | {"model": {"name": "vit_small_patch14"}}, [], 1, with_data=False)
    (problem,) = check_sizes(on_meta("vit_base_patch14"), {"views.crops[1].size": 96, "knn.size": 224})
    assert problem.key == "views.crops[1].size" and "98" in problem.rule
    of_sides = check_sizes(on_meta("vit_base_patch14"), {"views.crops[0].size": (160, 230)})
    assert [(p.key, p.value) for p in of_sides] == [("views.crops[0].size", (160, 230))] * 2
    assert "its height must be a multiple" in of_sides[0].rule and of_sides[0].rule.endswith("as 154 or 168")
    assert "its width must be a multiple" in of_sides[1].rule and of_sides[1].rule.endswith("as 224 or 238")
    assert {*VITS, "vit"} <= {*backbone_names()} and Tokens._fields == ("cls", "registers", "patches")
