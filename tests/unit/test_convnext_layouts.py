"""ConvNeXt V2 in the layouts of timm, transformers and the original: every tensor of theirs, the values they make of
the same weights, and the way back."""

from __future__ import annotations

from collections.abc import Callable

import onnxruntime
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models.convnext import checkpoint_filter_fn
from torch import Tensor, nn

import seer_scale
from seer_scale.data.transforms.views import eval_preprocessing
from seer_scale.errors import UserError
from seer_scale.interop.convnext_layouts import (
    exported,
    find_convnext,
    imported,
    timm_network,
    transformers_network,
)
from seer_scale.interop.layouts import layouts_matching, layouts_of
from seer_scale.models.convnextv2 import CONVNEXT, CONVNEXTV2, ConvNeXtV2, ConvNeXtV2Spec
from seer_scale.models.registry import build_backbone, initialise
from tests.unit import test_export
from tests.unit.test_export import close, images, problem_of, run_lines
from tests.unit.test_load import checkpoint

photo = test_export.photo
SIZE, SPECS = 64, CONVNEXTV2 | CONVNEXT
FREE = {"name": "convnextv2", "width": 8, "depths": [1, 1, 2, 1], "patch": 3}
FIRST = FREE | {"name": "convnext", "layer_scale": 0.5}


def trained(folder, model):
    """(network, checkpoint) in which every parameter does something."""
    net = build_backbone(**model)
    initialise(net, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.2 if ".grn." in name else 0.02))
    return checkpoint(folder, model=model, net=net.eval(), preprocessing=eval_preprocessing(SIZE))


@pytest.fixture(scope="module")
def atto(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("atto"), {"name": "convnextv2_atto"})


def given(library: str, model: ConvNeXtV2) -> dict[str, Tensor]:
    """The weights as `library` has them."""
    state = model.state_dict()
    return {name: make(*(state[s] for s in sources)) for name, (sources, make) in exported(library, model.spec).items()}


def of_timm(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=0)


def of_transformers(name: str) -> nn.Module:
    cls, config, _ = transformers_network(SPECS[name], {"size": 224})
    return getattr(transformers, cls)(getattr(transformers, cls.replace("Model", "Config"))(**config))


@pytest.mark.parametrize("library,make", [("timm", of_timm), ("transformers", of_transformers)])
@pytest.mark.parametrize("name", SPECS)
def test_every_tensor_of_a_published_size_is_theirs_and_tells_the_network(
    name, library: str, make: Callable[[str], nn.Module]
):
    with torch.device("meta"):
        ours, theirs = build_backbone(name), make(name)
    shapes = {key: tensor.shape for key, tensor in given(library, ours).items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert layouts_matching(shapes) is layouts_of(ours.spec) and find_convnext("a file", shapes) == {"name": name}
    pieces, held = imported(library, ours.spec), given(library, ours)
    back = {key: make(*(held[s] for s in sources)).shape for key, (sources, make) in pieces.items()}
    assert back == {key: tensor.shape for key, tensor in ours.state_dict().items()}


@pytest.mark.parametrize("format", ["timm", "transformers"])
@pytest.mark.parametrize("model", [{"name": "convnextv2_atto"}, FREE, FIRST], ids=["atto", "free", "first"])
def test_an_export_gives_our_features_and_is_read_again(format, model, atto, tmp_path, photo, monkeypatch):
    """By its metadata, and by names and shapes alone."""
    net, place = atto if model["name"] == "convnextv2_atto" else trained(tmp_path / "run", model)
    model = {key: value for key, value in model.items() if key != "layer_scale"}  # where training began
    out = seer_scale.export(place, tmp_path / "out", format)
    theirs, x = run_lines(out, monkeypatch, photo)["model"].eval(), images(size=SIZE)
    assert is_same(seer_scale.load(out), net)
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
            features, wanted = theirs.to(dtype)(x.to(dtype)), seer_scale.load(out).to(dtype)(x.to(dtype))
            close(features.pooler_output if format == "transformers" else features, wanted, tolerance)
    file = out / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    made = seer_scale.import_weights(out, tmp_path / "in")
    assert (made.format, made.model, made.left, made.anew, made.size) == (format, model, [], [], SIZE)
    assert is_same(seer_scale.load(tmp_path / "in"), net)


@pytest.mark.parametrize("model", [FREE | {"patch": 4}, FIRST | {"patch": 4}], ids=["free", "first"])
def test_originals_and_graphs_are_exported(model, tmp_path):
    """The original's to the tensor; a graph takes any number of images."""
    net, place = trained(tmp_path / "run", model)
    written = load_file(seer_scale.export(place, tmp_path / "out", "convnextv2") / "model.safetensors")
    expected = originals(net)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    session = onnxruntime.InferenceSession(seer_scale.export(place, tmp_path / "onnx", "onnx") / "model.onnx")
    for n in (1, 3):
        x = images(n, size=SIZE)
        with torch.no_grad():
            close(torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), net(x), 1e-5)


def is_same(a: nn.Module, b: nn.Module, but: tuple[str, ...] = ()) -> bool:
    state = a.state_dict()
    return state.keys() == b.state_dict().keys() and all(
        torch.equal(state[n], t) for n, t in b.state_dict().items() if n not in but
    )


def originals(net: ConvNeXtV2) -> dict[str, Tensor]:
    """By names and shapes of the original's published files (models/convnextv2.py of its repository, convnext.py of the
    first one's)."""
    out = {}
    for name, tensor in net.state_dict().items():
        *layer, leaf = name.split(".")
        if layer[0] == "stem":
            out[f"downsample_layers.0.{('conv', 'norm').index(layer[1])}.{leaf}"] = tensor
        elif layer[0] == "norm":
            out[name] = tensor
        elif layer[1] == "down":
            out[f"downsample_layers.{int(layer[0][1:]) - 1}.{('norm', 'conv').index(layer[2])}.{leaf}"] = tensor
        elif leaf == "gamma":
            out[f"stages.{int(layer[0][1:]) - 1}.{int(layer[1][1:]) - 1}.gamma"] = tensor
        else:
            part = {"dw": "dwconv", "fc1": "pwconv1", "fc2": "pwconv2"}.get(layer[2], layer[2])
            if part == "grn":
                leaf, tensor = {"weight": "gamma", "bias": "beta"}[leaf], tensor[None, None, None]
            out[f"stages.{int(layer[0][1:]) - 1}.{int(layer[1][1:]) - 1}.{part}.{leaf}"] = tensor
    return out


def sparse(dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the original's sparse pretraining writes them, in layers of MinkowskiEngine but for the stem: what its
    utils.remap_checkpoint_keys undoes. Beside them, of its decoder."""
    out = {}
    for name, tensor in dense.items():
        layer, _, leaf = name.rpartition(".")
        if layer.startswith("downsample_layers.0."):
            pass
        elif layer.endswith(("dwconv", ".1")):
            if leaf == "weight":
                of_places = tensor.transpose(2, 3).flatten(2)  # [C_out, C_in, k k], column by column
                leaf, tensor = "kernel", of_places[:, 0].T if "dwconv" in layer else of_places.permute(2, 1, 0)
            else:
                tensor = tensor[None]
        elif layer.endswith("grn"):
            tensor = tensor[0, 0]
        else:
            layer += ".linear" if "pwconv" in layer else ".ln"
        if not name.startswith("norm."):  # which fine-tuning adds
            out[f"encoder.{layer}.{leaf}"] = tensor.contiguous()
    return out | {"mask_token": torch.zeros(1, 512, 1, 1), "decoder.0.norm.weight": torch.ones(512)}


def test_files_of_the_first_convnext_come_in_to_the_bit(tmp_path):
    net = trained(tmp_path / "run", FIRST)[0]
    torch.save({"model": originals(net) | {"head.bias": torch.zeros(10)}}, tmp_path / "file.pth")
    made = seer_scale.import_weights(tmp_path / "file.pth", tmp_path / "out")
    assert made.model == {k: v for k, v in FIRST.items() if k != "layer_scale"} and made.left == ["head.bias"]
    assert made.anew == [] and is_same(seer_scale.load(tmp_path / "out"), net)


NORM = ("norm.weight", "norm.bias")


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("free"), FREE)[0]


def test_the_originals_names_are_those_that_timm_reads(free):
    network = timm.create_model("convnextv2_tiny", num_classes=0, depths=[1, 1, 2, 1], dims=[8, 16, 32, 64])
    read, wanted = checkpoint_filter_fn(originals(free), network), given("timm", free)
    assert read.keys() == wanted.keys() and all(torch.equal(read[n], t) for n, t in wanted.items())


@pytest.mark.parametrize("kind", ["convnextv2", "convnextv2_sparse", "timm", "transformers"])
def test_files_come_in_to_the_bit(kind, free, tmp_path):
    """Masked pretraining leaves no last LayerNorm: it begins as before any training. What is beside it is left."""
    state = {"convnextv2": originals, "convnextv2_sparse": lambda net: sparse(originals(net))}.get(
        kind, lambda net: given(kind, net)
    )(free)
    left = {"convnextv2": ["head.bias"], "convnextv2_sparse": ["decoder.0.norm.weight", "mask_token"],
            "timm": ["head.fc.bias"], "transformers": ["classifier.bias"]}[kind]  # fmt: skip
    if kind == "transformers":  # as with a classifier
        state = {f"convnextv2.{name}": tensor for name, tensor in state.items()}
    if kind == "timm":  # fcmae
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.norm.")}
    state |= {name: torch.zeros(10) for name in left if name not in state}
    torch.save({"model": state}, tmp_path / "file.pth")
    made = seer_scale.import_weights(tmp_path / "file.pth", tmp_path / "out")
    is_pretrained = kind in ("convnextv2_sparse", "timm")
    assert (made.format, made.model, made.left) == (kind, FREE, left)
    assert made.anew == (sorted(NORM) if is_pretrained else [])
    assert "--model.depths '[1, 1, 2, 1]' --model.patch 3" in str(made)  # as a shell takes it
    back = seer_scale.load(tmp_path / "out")
    assert is_same(back, free, NORM if is_pretrained else ())
    if is_pretrained:
        assert torch.equal(back.norm.weight, torch.ones(64)) and torch.equal(back.norm.bias, torch.zeros(64))


@pytest.mark.parametrize("patch", range(1, 10))
def test_timm_is_given_the_patches_that_it_has_the_same_strides_for(patch):
    with torch.device("meta"):
        theirs = timm.create_model("convnextv2_tiny", depths=[1] * 4, dims=[8, 16, 32, 64], patch_size=patch)
    strides = [info["reduction"] for info in theirs.feature_info]
    network = timm_network(ConvNeXtV2Spec(8, (1, 1, 1, 1), patch), {})
    assert isinstance(network, str) == (strides != [patch * 2**s for s in range(4)])


def test_what_is_another_network_is_refused(free, tmp_path):
    _, place = trained(tmp_path / "run", FREE | {"patch": 2})
    problem = problem_of(place, tmp_path / "out", "timm")
    assert "patches of 2 has other strides" in problem.rule and problem.nearest == (
        "transformers",
        "safetensors",
        "onnx",
    )
    state = originals(free)
    torch.save({n: t for n, t in state.items() if not n.startswith("stages.3.")}, tmp_path / "three.pth")
    with pytest.raises(UserError, match=r"no ConvNeXt of 4 stages: they have \[1, 1, 2, 0, 0\] blocks"):
        seer_scale.import_weights(tmp_path / "three.pth", tmp_path / "in")
    del state["stages.2.1.dwconv.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"does not hold a convnextv2: s3\.b2\.dw\.weight is absent"):
        seer_scale.import_weights(tmp_path / "less.pth", tmp_path / "in")
