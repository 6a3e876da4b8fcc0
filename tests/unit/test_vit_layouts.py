"""Vision transformers in the layouts of DINOv2, timm and transformers: every tensor of theirs, the values they make of
the same weights, and the way back."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from torch import Tensor, nn

import seer_scale
from seer_scale.errors import UserError
from seer_scale.interop.vit_layouts import VIT_LIBRARIES, exported, find_vit, imported, is_vit
from seer_scale.models.registry import build_backbone, initialise
from seer_scale.models.vit import VITS, ViT, ViTSpec
from tests.unit import test_export
from tests.unit.test_export import close, run_lines
from tests.unit.test_load import checkpoint
from tests.unit.test_vit import SMALL, images, small, spread

SIZE = SMALL["image_size"]
photo = test_export.photo


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def given(library: str, model: ViT) -> dict[str, Tensor]:
    """The weights as `library` has them."""
    state = model.state_dict()
    return {name: make(*(state[s] for s in sources)) for name, (sources, make) in exported(library, model.spec).items()}


def taken(library: str, theirs: dict[str, Tensor], spec: ViTSpec) -> dict[str, Tensor]:
    return {name: make(*(theirs[s] for s in sources)) for name, (sources, make) in imported(library, spec).items()}


def of_timm(spec: ViTSpec, name: str = "") -> nn.Module:
    more = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 16 / 3} if spec.ffn == "swiglu" else {}
    name = name or f"vit_small_patch14{'_reg4' * bool(spec.registers)}_dinov2"
    more |= {"reg_tokens": spec.registers} if spec.registers else {}
    return timm.create_model(
        name, num_classes=0, img_size=spec.image_size, dynamic_img_size=True, patch_size=spec.patch,
        embed_dim=spec.width, depth=spec.depth, num_heads=spec.heads, **more,
    )  # fmt: skip


def of_transformers(spec: ViTSpec) -> nn.Module:
    kinds = {True: (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel),
             False: (transformers.Dinov2Config, transformers.Dinov2Model)}  # fmt: skip
    config, model = kinds[bool(spec.registers)]
    more = {"num_register_tokens": spec.registers} if spec.registers else {}
    return model(config(
        hidden_size=spec.width, num_hidden_layers=spec.depth, num_attention_heads=spec.heads, patch_size=spec.patch,
        image_size=spec.image_size, use_swiglu_ffn=spec.ffn == "swiglu", **more,
    ))  # fmt: skip


PUBLISHED = [("vit_small_patch14", "mlp"), ("vit_base_patch14", "mlp"), ("vit_large_patch14", "mlp"),
             ("vit_large_patch14", "swiglu"), ("vit_giant_patch14", "swiglu")]  # fmt: skip


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("name,ffn", PUBLISHED)
def test_every_tensor_of_a_published_size_is_theirs_and_tells_the_network(name, ffn, registers):
    model = on_meta(lambda: build_backbone(name, image_size=518, registers=registers, ffn=ffn))
    parameters = sum(p.numel() for p in model.parameters())
    for library in VIT_LIBRARIES:
        theirs = given(library, model)
        shapes = {key: t.shape for key, t in theirs.items()}
        assert is_vit(shapes)
        told = {"name": name, "image_size": 518} | ({"registers": 4} if registers else {})
        assert find_vit("a file", shapes) == told | ({"ffn": ffn} if ffn != VITS[name].ffn else {})
        back = taken(library, theirs, model.spec)
        wanted = {key: t.shape for key, t in model.state_dict().items()}
        assert {key: t.shape for key, t in back.items()} | {"embed.mask_token": wanted["embed.mask_token"]} == wanted
        if library == "dinov2":
            assert sum(t.numel() for t in theirs.values()) == parameters
    if ffn == VITS[name].ffn:  # timm has the published ones alone
        known = on_meta(lambda: timm.create_model(f"{name}{'_reg4' * bool(registers)}_dinov2", num_classes=0))
        assert {k: t.shape for k, t in given("timm", model).items()} == {
            k: t.shape for k, t in known.state_dict().items()
        }
        folded = (1 + bool(registers)) * model.num_features
        assert sum(p.numel() for p in known.parameters()) == parameters - folded


@pytest.mark.parametrize("ffn,registers", itertools.product(["mlp", "swiglu"], [0, 4]))
@pytest.mark.parametrize("library,make", [("timm", of_timm), ("transformers", of_transformers)])
@torch.no_grad()
def test_values_are_theirs_on_the_same_weights(library, make, ffn, registers):
    """At the table's size and at others, where each resizes it as its `position_resize` says."""
    resize = {"timm": "antialias", "transformers": "antialias" if registers else "exact"}[library]
    ours = spread(small(ffn=ffn, registers=registers, position_resize=resize)).eval()
    theirs, state = make(ours.spec), given(library, ours)
    if library == "transformers":  # whose modules have other names than its files
        theirs = type(theirs).from_pretrained(None, config=theirs.config, state_dict=state)
    else:
        theirs.load_state_dict(state)
    theirs.eval()
    for x in images((2, SIZE, SIZE), (2, 16, 40), (1, 48, 16)):
        tokens = ours.tokens([x])[0]
        if library == "timm":
            got = theirs.forward_features(x)
            torch.testing.assert_close(theirs(x), tokens.cls, atol=1e-5, rtol=1e-5)
        else:
            out = theirs(x)
            got = out.last_hidden_state
            torch.testing.assert_close(out.pooler_output, tokens.cls, atol=1e-5, rtol=1e-5)
        wanted = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("library", VIT_LIBRARIES)
@torch.no_grad()
def test_the_way_back_is_the_same_network(library):
    for registers, ffn in [(0, "mlp"), (3, "swiglu")]:
        model, other = spread(small(registers=registers, ffn=ffn)).eval(), small(registers=registers, ffn=ffn).eval()
        back = taken(library, given(library, model), model.spec)
        other.load_state_dict(back | ({} if library != "timm" else {"embed.mask_token": model.embed.mask_token}))
        x = images((2, SIZE, SIZE), (1, 16, 8))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model(x), other(x)))
        if library != "timm" or not registers:
            assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


# ------------------------------------------------------------------------------------------------ files


MIDDLING = {"name": "vit", "width": 128, "depth": 2, "heads": 2, "patch": 8, "image_size": 32, "registers": 4}


def trained(model: dict, folder) -> tuple[ViT, Path]:
    net = build_backbone(**model)
    initialise(net, seed=0)
    return checkpoint(folder, model=model, net=spread(net).eval())


@pytest.mark.parametrize("format", ["timm", "transformers", "safetensors", "onnx"])
@pytest.mark.parametrize("more", [{}, {"ffn": "swiglu", "registers": 0}])
def test_an_export_gives_our_features_and_is_read_again(format, more, tmp_path, photo, monkeypatch):
    """By its metadata, and by names and shapes alone."""
    model = MIDDLING | more
    net, place = trained(model, tmp_path / "run")
    out = seer_scale.export(place, tmp_path / "out", format)
    found = run_lines(out, monkeypatch, photo)
    x = images((2, 32, 32))[0]
    with torch.no_grad():
        wanted = net(x)
        if format == "onnx":
            torch.testing.assert_close(torch.from_numpy(found["features"]).shape, (1, 128))
            return
        theirs = found["model"].eval()(x)
        close(theirs.pooler_output if format == "transformers" else theirs, wanted)
        close(seer_scale.load(out)(x), wanted)
        file = out / "model.safetensors"
        save_file(load_file(file), file, {"format": "pt"})
        if format == "safetensors":
            return
        made = seer_scale.import_weights(out, tmp_path / "in")
        assert (made.format, made.left) == (format, [])
        assert made.model == {key: value for key, value in model.items() if value != 0}
        assert made.anew == (["embed.mask_token"] if format == "timm" else [])
        close(seer_scale.load(tmp_path / "in")(x), wanted)


def test_a_size_of_dinov2_leaves_and_comes_in_by_the_originals_names(tmp_path):
    """Also as a run of the original leaves it: the teacher, in chunks of blocks, beside its heads."""
    model = {"name": "vit_small_patch16", "image_size": 32}
    net, place = trained(model, tmp_path / "run")
    out = seer_scale.export(place, tmp_path / "out", "dinov2")
    state = load_file(out / "model.safetensors")
    assert state.keys() == given("dinov2", net).keys()
    chunked = {
        re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 4}.{m[1]}", name): t for name, t in state.items()
    }
    run = {f"backbone.{name}": t for name, t in chunked.items()} | {"dino_head.last_layer.weight_g": torch.ones(3, 1)}
    torch.save({"teacher": run}, tmp_path / "teacher_checkpoint.pth")
    for file, left in [
        (out / "model.safetensors", []),
        (tmp_path / "teacher_checkpoint.pth", ["dino_head.last_layer.weight_g"]),
    ]:
        made = seer_scale.import_weights(file, tmp_path / "in", force=True)
        assert made.left == left
        assert seer_scale.load(tmp_path / "in").state_dict().keys() == net.state_dict().keys()
        for name, tensor in seer_scale.load(tmp_path / "in").state_dict().items():
            assert torch.equal(tensor, net.state_dict()[name]), name
    assert (made.format, made.model) == ("dinov2", model)


def test_what_a_library_would_resize_otherwise_is_refused(tmp_path):
    """Features at the size of an evaluation are promised to be ours."""
    net, place = trained(MIDDLING | {"registers": 0, "image_size": 24}, tmp_path / "run")
    for format, resize in [("timm", "antialias"), ("transformers", "exact")]:
        with pytest.raises(
            UserError, match=rf"is for 24 pixels.*images of 32 otherwise \(model\.position_resize {resize}\)"
        ):
            seer_scale.export(place, tmp_path / "out", format)
    net, place = trained(MIDDLING | {"positions": "rope"}, tmp_path / "rope")
    with pytest.raises(UserError, match="timm has no such network with rotary positions"):
        seer_scale.export(place, tmp_path / "out", "timm")
    with pytest.raises(UserError, match="dinov2 builds small, base, large, giant only"):
        seer_scale.export(place, tmp_path / "out", "dinov2")
