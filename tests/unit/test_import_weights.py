"""Published weights come in to the bit, from every layout, as the network that they are of, or not at all."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import seer_scale
from seer_scale.cli import main
from seer_scale.data.transforms.views import eval_preprocessing
from seer_scale.errors import NOTHING, UserError
from seer_scale.interop.architecture import Plan, find_generator
from seer_scale.interop.artefact import About, Artefact, TensorInfo, write_artefact
from seer_scale.interop.names import NAME_MAPS
from seer_scale.interop.preprocessing import Prepared
from seer_scale.models.registry import build_backbone, initialise
from seer_scale.models.regnet import REGNETY, RegNetSpec
from tests.vissl import classy, sharded, vissl

TINY = {"depth": 5, "w0": 8, "wa": 12.0, "wm": 2.0, "group_width": 8}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def ours() -> dict[str, torch.Tensor]:
    """A small RegNetY with statistics of its own."""
    backbone = build_backbone("regnety", **TINY)
    initialise(backbone, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in backbone.state_dict().items():
            if "running" in name or name.endswith("bias"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith("tracked"):
                tensor.fill_(7)
    return {name: tensor.clone() for name, tensor in backbone.state_dict().items()}


HEAD = {
    "0.weight": torch.randn(6, 40),
    "0.bias": torch.randn(6),
    "2.weight": torch.randn(4, 6),
    "2.bias": torch.ones(4),
}
PROTOTYPES = torch.randn(5, 4)


def heads() -> dict[str, torch.Tensor]:
    return {f"0.projection_head.{k}": v for k, v in HEAD.items()} | {"0.prototypes0.weight": PROTOTYPES}


def write(kind: str, folder, ours):
    """A file or folder of this kind with these weights."""
    path = folder / f"{kind.split()[0]}.torch"
    trunk = {vissl(name): tensor for name, tensor in ours.items()}
    if kind == "vissl":
        torch.save(classy(trunk, heads()), path)
    elif kind == "vissl of old":  # the stem without its own name, blocks in parts, the legacy format
        trunk = {vissl(n, "block{}-part0.").replace("conv1.stem", "conv1"): t for n, t in ours.items()}
        torch.save(classy(trunk, heads()), path, _use_new_zipfile_serialization=False)
    elif kind == "vissl sharded":
        shards = sharded(trunk, 3)
        for i, shard in enumerate(shards):
            torch.save(shard, folder / f"model_final_shard{i}.torch")
        torch.save({"type": "shard_list", "shards": [f"/cluster/model_final_shard{i}.torch" for i in range(3)]}, path)
    elif kind == "vissl sliced":
        (folder / "vissl_layers").mkdir()
        names = {}
        for i, (name, tensor) in enumerate(trunk.items()):
            torch.save({"type": "slice", "weight": tensor}, folder / "vissl_layers" / f"{i:x}.torch")
            names[name] = f"/cluster/vissl_layers/{i:x}.torch"
        torch.save({"type": "slice_list", "classy_state_dict": {"base_model": {"model": {"trunk": names}}}}, path)
    else:
        state = {NAME_MAPS[kind].theirs(name): t for name, t in ours.items()}
        torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}, "epoch": 3}, path)
    return path


KINDS = ("vissl", "vissl of old", "vissl sharded", "vissl sliced", *NAME_MAPS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_comes_in_to_the_bit(kind, ours, tmp_path):
    path = write(kind, tmp_path, ours)
    made = seer_scale.import_weights(path, tmp_path / "out")
    assert made.format == kind.split()[0] and made.model["name"] == "regnety" and not made.left and not made.anew
    found = seer_scale.load(tmp_path / "out").state_dict()
    assert found.keys() == ours.keys() and all(torch.equal(found[n], t) for n, t in ours.items())
    held = Artefact(tmp_path / "out")
    with_head = kind in ("vissl", "vissl of old")
    assert made.taken == {"backbone": len(ours)} | ({"head": 4, "prototypes": 1} if with_head else {})
    if with_head:
        assert all(torch.equal(held.read(f"head/{n}"), t) for n, t in HEAD.items())
        assert torch.equal(held.read("prototypes/0.weight"), PROTOTYPES)


def test_these_names_of_vissl_are_those_that_timm_knows(ours):
    """timm reads SEER's published files by names of its own (timm.models.regnet)."""
    from timm.models.regnet import _filter_fn

    trunk = {vissl(name): tensor for name, tensor in ours.items()}
    read = _filter_fn(classy(trunk, heads()))
    assert read.keys() == ours.keys() and all(torch.equal(read[n], t) for n, t in ours.items())


def test_shards_are_put_together_as_fairscale_does(ours):
    from fairscale.nn import FullyShardedDataParallel

    trunk = {vissl(name): tensor for name, tensor in ours.items()}
    ranks = [shard["classy_state_dict"]["base_model"] for shard in sharded(trunk, 3)]
    whole = FullyShardedDataParallel.consolidate_shard_weights(
        [r["model"]["trunk"] for r in ranks], [r["meta"]["trunk"] for r in ranks]
    )
    assert whole.keys() == trunk.keys() and all(torch.equal(whole[n], t) for n, t in trunk.items())


@torch.no_grad()
def test_files_of_the_libraries_themselves_make_the_same_features(tmp_path):
    from transformers import RegNetConfig, RegNetForImageClassification

    theirs = timm.create_model("regnety_002").eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    config = RegNetConfig(hidden_sizes=[24, 56, 152, 368], depths=[1, 1, 4, 7], groups_width=8)
    folded = RegNetForImageClassification(config).eval()
    folded.save_pretrained(tmp_path / "transformers")
    seen = torchvision.models.resnet18().eval()
    torch.save(seen.state_dict(), tmp_path / "torchvision.pth")
    for name, module, head in (("timm.pth", theirs, "head.fc"), ("torchvision.pth", seen, "fc"),
                               ("transformers", folded, "classifier.1")):  # fmt: skip
        made = seer_scale.import_weights(tmp_path / name, tmp_path / "out", force=True)
        assert made.left == [f"{head}.bias", f"{head}.weight"]
        assert made.model == {"name": "timm/resnet18" if name == "torchvision.pth" else "regnety_200mf"}
        if isinstance(module, RegNetForImageClassification):
            wanted = module.regnet(X).pooler_output.flatten(1)
        else:
            module.set_submodule(head, nn.Identity())
            wanted = module(X)
        torch.testing.assert_close(seer_scale.load(tmp_path / "out")(X), wanted, rtol=0, atol=1e-6)


def test_the_swav_repositorys_resnet_keeps_its_head(tmp_path):
    state = timm.create_model("resnet50", num_classes=0).state_dict()
    state |= {f"projection_head.{n}": t for n, t in HEAD.items()} | {"prototypes.weight": PROTOTYPES}
    torch.save({f"module.{n}": t for n, t in state.items()}, tmp_path / "swav.pth.tar")
    made = seer_scale.import_weights(tmp_path / "swav.pth.tar", tmp_path / "out")
    assert made.model == {"name": "timm/resnet50"} and not made.left
    assert made.taken == {"backbone": 318, "head": 4, "prototypes": 1}
    assert torch.equal(Artefact(tmp_path / "out").read("prototypes/0.weight"), PROTOTYPES)


def test_any_network_of_timm_comes_in_by_its_name(tmp_path):
    theirs = timm.create_model("test_convnext").eval()
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        seer_scale.import_weights(tmp_path / "x.pth", tmp_path / "out")
    assert caught.value.problems[0].key == str(tmp_path / "x.pth") and not (tmp_path / "out").exists()
    made = seer_scale.import_weights(tmp_path / "x.pth", tmp_path / "out", model="timm/test_convnext")
    assert made.left == ["head.fc.bias", "head.fc.weight"]
    theirs.reset_classifier(0)
    torch.testing.assert_close(seer_scale.load(tmp_path / "out")(X), theirs(X), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", [*REGNETY.values(), RegNetSpec(**TINY), RegNetSpec(8, 24, 20.0, 1.8, 16, 0.5)])
def test_a_generator_is_found_for_every_regnety(spec):
    found = find_generator(Plan.of(spec))
    assert found is not None and Plan.of(found) == Plan.of(spec)


@pytest.mark.parametrize("format", ["timm", "torchvision", "transformers"])
def test_what_an_export_holds_comes_in_to_the_bit(format, tmp_path):
    """By names and shapes alone, as from whoever has the library: the header of the file is another's."""
    net = build_backbone("regnety_400mf")
    initialise(net, seed=3)
    infos = {name: TensorInfo(t.dtype, t.shape) for name, t in net.state_dict().items()}
    about = About("safetensors", {"name": "regnety_400mf"}, eval_preprocessing(64))
    write_artefact(tmp_path / "ours.safetensors", about, infos, net.state_dict().__getitem__)
    seer_scale.export(tmp_path / "ours.safetensors", tmp_path / "out", format)
    file = tmp_path / "out" / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    made = seer_scale.import_weights(tmp_path / "out", tmp_path / "in")
    assert (made.format, made.model, made.left, made.anew) == (format, {"name": "regnety_400mf"}, [], [])
    source = {"timm": "config.json", "transformers": "preprocessor_config.json"}.get(format, "assumed")
    assert made.prepared == Prepared(eval_preprocessing(224 if source == "assumed" else 64), source)
    assert source == "assumed" or f"64 pixels, as {source} tells" in str(made)
    found = seer_scale.load(tmp_path / "in").state_dict()
    assert all(torch.equal(found[n], t) for n, t in net.state_dict().items())


@pytest.mark.parametrize("model", [{"name": "regnety", **TINY}, {"name": "timm/test_convnext"}])
@pytest.mark.parametrize("format", ["safetensors", "timm"])
def test_what_our_metadata_tell_goes_before_what_names_do(model, format, tmp_path):
    net = build_backbone(**model)
    initialise(net.to_empty(device="cpu"), seed=3)
    state = net.state_dict() | {"head/weight": torch.ones(2, 3)}
    how = eval_preprocessing(40) | {"training_sizes": [48, 24]}
    about = About("safetensors", model, how, {"head": {"classes": ["cat", "dog"]}})
    infos = {name: TensorInfo(t.dtype, t.shape) for name, t in state.items()}
    write_artefact(tmp_path / "ours.safetensors", about, infos, state.__getitem__)
    seer_scale.export(tmp_path / "ours.safetensors", tmp_path / "out", format)
    made = seer_scale.import_weights(tmp_path / "out", tmp_path / "in")
    assert (made.format, made.model, made.left, made.size) == (format, model, [], 40)
    assert f"names of {'seer_scale' if format == 'safetensors' else format}" in str(made)
    held = Artefact(tmp_path / "in")
    assert held.about.preprocessing == how and held.about.model == model
    assert ("head" in held.about.origin) == ("head/weight" in held.tensors) == (format == "safetensors")
    found = seer_scale.load(tmp_path / "in").state_dict()
    assert all(torch.equal(found[n], t) for n, t in net.state_dict().items())
    sized = seer_scale.import_weights(tmp_path / "out", tmp_path / "in", size=48, force=True)
    assert sized.prepared == Prepared(how | eval_preprocessing(48), "--size")


def test_how_the_libraries_prepare_images_is_read_from_files_of_their_own(ours, tmp_path):
    from timm.models._hub import save_config_for_hf
    from transformers import BitImageProcessor, ConvNextImageProcessor, ViTImageProcessor

    torch.save(ours, tmp_path / "pytorch_model.bin")
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}

    def found():
        """From the folder and from the file in it alike."""
        both = [
            seer_scale.import_weights(path, tmp_path / "out", force=True).prepared
            for path in (tmp_path, tmp_path / "pytorch_model.bin")
        ]
        assert both[0] == both[1]
        return both[0].how["size"], both[0].source, both[0].differs

    name = "preprocessor_config.json"
    short, bicubic = "resize_short_side", {"interpolation": ("bicubic", "bilinear")}
    ConvNextImageProcessor(size={"shortest_edge": 96}, **imagenet).save_pretrained(tmp_path)
    assert found() == (96, name, {short: (109, 110), **bicubic})
    ConvNextImageProcessor(size={"shortest_edge": 384}, **imagenet).save_pretrained(tmp_path)
    assert found() == (384, name, {short: (384, 439), "crop": ("squash", "centre"), **bicubic})
    BitImageProcessor(size={"shortest_edge": 110}, crop_size=96, **imagenet).save_pretrained(tmp_path)
    assert found() == (96, name, bicubic)
    ViTImageProcessor(size={"height": 48, "width": 48}, **imagenet).save_pretrained(tmp_path)
    assert found() == (48, name, {short: (48, 55), "crop": ("squash", "centre")})
    for key, image_mean, image_std in (
        ("image_mean", [0.5] * 3, imagenet["image_std"]),
        ("image_std", imagenet["image_mean"], [0.5] * 3),
    ):
        ViTImageProcessor(image_mean=image_mean, image_std=image_std).save_pretrained(tmp_path)
        with pytest.raises(UserError) as caught:
            found()
        problem = caught.value.problems[0]
        assert problem.key == f"{tmp_path / name}: {key}" and problem.value == [0.5] * 3
        assert problem.nearest == (imagenet[key],)
    theirs = timm.create_model("regnety_002")
    theirs.pretrained_cfg |= {"input_size": (3, 96, 96), "crop_pct": 0.95, "interpolation": "bicubic"}
    save_config_for_hf(theirs, tmp_path / "config.json")
    assert found() == (96, "config.json", {short: (101, 110), **bicubic})


@pytest.mark.parametrize(
    "content, key, value",
    [
        ('{"architecture": "x", "mean": [NaN, 0.456, 0.406]}', ": mean", ...),
        ('{"architecture": "x", "pretrained_cfg": {"std": [1, 1, 1]}}', ": pretrained_cfg.std", [1, 1, 1]),
        ('{"architecture": "x", "input_size": [3, 64, 32]}', ": input_size", [64, 32]),
        ('{"architecture": "x", "input_size": [3, 0, 0]}', ": input_size", [0, 0]),
        ('{"architecture": "x", "input_size": 3}', "", NOTHING),
        ('{"architecture": "x", "pretrained_cfg": null}', "", NOTHING),
        ('{"architecture": "x", "input_size": [3, Infinity, Infinity]}', "", NOTHING),
        ("[]", "", NOTHING),
        ("[" * 100_000, "", NOTHING),
    ],
)
def test_images_that_cannot_be_prepared_so_are_refused_with_the_key(content, key, value, ours, tmp_path):
    (tmp_path / "in").mkdir()
    torch.save(ours, tmp_path / "in" / "pytorch_model.bin")
    (tmp_path / "in" / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        seer_scale.import_weights(tmp_path / "in", tmp_path / "out")
    problem = caught.value.problems[0]
    assert problem.key == f"{tmp_path / 'in' / 'config.json'}{key}" and not (tmp_path / "out").exists()
    assert value is ... or problem.value == value
    if key == ": input_size":
        assert seer_scale.import_weights(tmp_path / "in", tmp_path / "out", size=32).size == 32
    with pytest.raises(UserError) as caught:
        seer_scale.import_weights(tmp_path / "in" / "pytorch_model.bin", tmp_path / "no", size=-1)
    assert (caught.value.problems[0].key, caught.value.problems[0].nearest) == ("--size", (8,))


def test_what_cannot_come_in_is_told_and_leaves_nothing(ours, tmp_path):
    names = NAME_MAPS["torchvision"]

    def refused(change, **options):
        state = {names.theirs(n): t for n, t in ours.items()}
        change(state)
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(UserError) as caught:
            seer_scale.import_weights(tmp_path / "x.pth", tmp_path / "out", **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pth"]
        return caught.value.problems[0]

    place, some = str(tmp_path / "x.pth"), "trunk_output.block4.block4-0.f.c.0.weight"
    assert refused(lambda s: s.pop(some)).key == place
    assert refused(lambda s: s.update({some: torch.zeros(3, 3)})).key == place
    assert refused(lambda s: s.update({"stem.0.weight": s["stem.0.weight"] * torch.nan})).key == place
    assert refused(lambda s: s.update({"stem.0.weight": torch.zeros(16, 3, 3, 3)})).key == place
    assert refused(dict.clear).key == place
    for dtype, said in (
        (torch.int8, "stem.0.weight is int8"),
        (torch.complex64, "type"),
        (torch.float8_e4m3fn, "type"),
    ):
        problem = refused(lambda s, dtype=dtype: s.update({"stem.0.weight": s["stem.0.weight"].to(dtype)}))
        assert problem.key == place and said.replace("stem.0", "stem.conv") in problem.rule
    problem = refused(lambda s: None, model="regnety_8gf")
    assert (problem.key, problem.value, problem.nearest) == ("--model", "regnety_8gf", "give --model regnety")
    problem = refused(lambda s: None, format="vissl")
    assert (problem.key, problem.value, problem.nearest) == ("--format", "vissl", "give --format torchvision")
    assert refused(lambda s: None, format="keras").key == "--format"
    assert refused(lambda s: None, model="regnety_9gf").key == "model.name"
    (tmp_path / "x.pth").unlink()
    torch.save(torchvision.models.regnet_y_800mf().state_dict(), tmp_path / "x.pth")  # of other widths than the paper's
    with pytest.raises(UserError):
        seer_scale.import_weights(tmp_path / "x.pth", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError) as caught:
        seer_scale.import_weights(tmp_path / "x.pth", tmp_path / "full", force=True)
    assert caught.value.problems[0].key == "--out" and (tmp_path / "full" / "mine.txt").exists()
    for missing in ("gone", "."):
        with pytest.raises(UserError):
            seer_scale.import_weights(tmp_path / missing, tmp_path / "out")


def test_a_type_that_is_not_read_is_named_with_its_tensor(ours, tmp_path):
    names, path = NAME_MAPS["timm"], tmp_path / "x.safetensors"
    state = {names.theirs(n): t.clone() for n, t in ours.items()}
    state["stem.conv.weight"] = state["stem.conv.weight"].to(torch.float8_e4m3fn)
    save_file(state, path)
    with pytest.raises(UserError) as caught:
        seer_scale.import_weights(path, tmp_path / "out")
    assert caught.value.problems[0].key == f"{path}: stem.conv.weight" and not (tmp_path / "out").exists()


def test_lists_of_files_lead_nowhere_else(ours, tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "model_final_shard0.torch"
    inside.mkdir()
    path = write("vissl sharded", inside, ours)
    (inside / outside.name).rename(outside)
    torch.save({"type": "shard_list", "shards": [f"../{outside.name}"]}, path)
    with pytest.raises(UserError) as caught:
        seer_scale.import_weights(path, tmp_path / "out")
    assert caught.value.problems[0].key == str(path)


def test_half_precision_and_an_absent_count_of_updates(ours, tmp_path):
    half = {n: t.half() if t.is_floating_point() else t for n, t in ours.items() if not n.endswith("tracked")}
    torch.save(half, tmp_path / "x.pth")
    made = seer_scale.import_weights(tmp_path / "x.pth", tmp_path / "out")
    found = seer_scale.load(tmp_path / "out").state_dict()
    assert len(made.anew) == len(ours) - len(half) and all(not found[name] for name in made.anew)
    assert all(torch.equal(found[n], t.to(found[n].dtype)) for n, t in half.items())


def test_the_command(ours, tmp_path, capsys):
    path, out = str(write("timm", tmp_path, ours)), str(tmp_path / "out")
    assert main(["import", path, "--out", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["taken"] == {"backbone": len(ours)} and told["format"] == "timm" and told["left"] == []
    assert told["size"] == 224 and told["prepared"]["source"] == "assumed"
    assert main(["import", path, "--out", out]) == 2
    assert "--force" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert main(["import", path, "--out", str(tmp_path / "mine"), "--force"]) == 2
    assert (tmp_path / "mine" / "thesis.txt").is_file() and "thesis.txt" in capsys.readouterr().err
    assert main(["import", path, "--out", out, "--force", "--model", "regnety"]) == 0
    printed = capsys.readouterr().out
    assert f"--checkpoint.init_from {out}" in printed and "224 pixels, which is assumed" in printed
    assert main(["import", path, "--out", out, "--force", "--size", "40"]) == 0
    assert "40 pixels" in capsys.readouterr().out and seer_scale.load(out).transform.size == 40
