"""What each library needs beside the tensors' values: its names of them, its network, its files, and how it is loaded.

A format is a function of `Weights` that gives a `Target`, or a clause on why the library cannot hold them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from seer_scale.errors import Problem, UserError, nearest
from seer_scale.extras import how_to_install
from seer_scale.interop.artefact import OWN_FORMAT
from seer_scale.interop.layouts import layouts_of
from seer_scale.interop.names import NAME_MAPS, TIMM_MODELS, TORCHVISION_MODELS
from seer_scale.interop.pieces import Network, Piece
from seer_scale.interop.weights import Weights
from seer_scale.models.registry import spec_of
from seer_scale.models.regnet import RegNetSpec, stage_plan
from seer_scale.models.timm_adaptor import TIMM_PREFIX, Whole

LIBRARIES = {OWN_FORMAT: "seer_scale", "timm": "timm", "torchvision": "torchvision", "transformers": "transformers",
             "dinov2": "dinov2", "convnextv2": "the original",
             "convnextv2_sparse": "the original's sparse pretraining", "onnx": "onnx"}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """names: of ours to theirs. network: what it is called there. loading: the lines of Python that give `features`
    [N, num_features] of the image file photo.jpg, also what a classifier sees in it; PATH stands for the folder, FILE
    for a file of weights. loading_alone: those of a lone file, where they are others. files: JSON beside the weights.
    made: its tensors, where they are others than ours by other names. in_shards: whether the library reads several
    files. needs_folder: whether it reads no lone file."""

    names: Callable[[str], str]
    network: str
    loading: str
    loading_alone: str = ""
    files: Mapping[str, Any] = field(default_factory=dict)
    made: dict[str, Piece] = field(default_factory=dict)
    in_shards: bool = False
    needs_folder: bool = False


def target_of(format: str, weights: Weights) -> Target:
    """Raises UserError where there is no such format, or it cannot hold these weights: with those that can."""
    if format not in FORMATS:
        raise UserError(Problem("--format", format, "that is no format", nearest(format, FORMATS)))
    target = FORMATS[format](weights)
    if isinstance(target, str):
        others = [other for other, make in FORMATS.items() if not isinstance(make(weights), str)]
        raise UserError(Problem("--format", format, target, tuple(others)))
    return target


def _regnety(weights: Weights) -> RegNetSpec | None:
    spec = spec_of(weights.about.model)
    return spec if isinstance(spec, RegNetSpec) else None


def _made(library: str, weights: Weights) -> tuple[Network, dict[str, Piece]] | str | None:
    """The network of `library` and its tensors, of a family that has layouts of its own there; or a clause on why there
    is none. None: of other families."""
    spec = spec_of(weights.about.model)
    layouts = layouts_of(spec)
    if layouts is None or library not in layouts.networks:
        return None
    network = layouts.networks[library](spec, weights.about.preprocessing)
    return network if isinstance(network, str) else (network, layouts.exported(library, spec))


def _transform(how: Mapping[str, Any]) -> str:
    """Lines of Python that prepare an image by torchvision."""
    return f"""transform = torchvision.transforms._presets.ImageClassification(
    crop_size={how["size"]}, resize_size={how["resize_short_side"]}, mean={how["mean"]}, std={how["std"]}
)"""


# ------------------------------------------------------------------------------------------------ formats


def _own(weights: Weights) -> Target:
    loading = """import seer_scale
model = seer_scale.load("PATH")
features = model(model.transform("photo.jpg")[None])"""
    if weights.head:
        probabilities, seen = (
            ("sigmoid()", "[name for name, p in zip(model.classes, probabilities) if p > 0.5]")
            if weights.head.multi_label
            else ("softmax(0)", "model.classes[probabilities.argmax()]")
        )
        loading = f"""import seer_scale
model = seer_scale.load_classifier("PATH")
probabilities = model(model.transform("photo.jpg")[None])[0].{probabilities}
seen = {seen}
features = model.backbone(model.transform("photo.jpg")[None])"""
    return Target(str, weights.about.model["name"], loading, in_shards=True)


def _timm(weights: Weights) -> Target | str:
    name, how = weights.about.model["name"], weights.about.preprocessing
    arguments: dict[str, Any] = {}
    own: dict[str, Any] = {"pool_size": [7, 7], "first_conv": "stem.conv", "classifier": "head.fc"}
    made: dict[str, Piece] = {}
    names: Callable[[str], str] = str
    if name.startswith(TIMM_PREFIX):
        import timm  # without it, there is no such backbone

        network = name.removeprefix(TIMM_PREFIX)
        known = timm.get_pretrained_cfg(network, allow_unregistered=False)
        kept = ("pool_size", "first_conv", "classifier", "fixed_input_size")
        own = {k: v for k, v in (known.to_dict() if known else {}).items() if k in kept}
        if isinstance(weights.backbone, Whole):
            names = _without_net
        if getattr(getattr(weights.backbone, "net", weights.backbone), "dynamic_img_size", False):
            arguments["dynamic_img_size"] = True
    elif name in TIMM_MODELS:
        network = TIMM_MODELS[name]
    elif of_layouts := _made("timm", weights):
        if isinstance(of_layouts, str):
            return of_layouts
        (network, arguments, layers), made = of_layouts
        own = dict(layers)
    elif spec := _regnety(weights):
        network = next(iter(TIMM_MODELS.values()))
        arguments = {"depth": spec.depth, "w0": spec.w0, "wa": spec.wa, "wm": spec.wm,
                     "group_size": spec.group_width, "se_ratio": spec.se_ratio}  # fmt: skip
        if reason := _differs_in_timm(network, arguments, weights):
            return reason
    else:
        return f"timm has no {name}"
    size, short = how["size"], how["resize_short_side"]
    crop = size / short  # timm resizes to floor(size / crop_pct)
    config = {
        "architecture": network,
        "num_classes": 0,
        "num_features": weights.backbone.num_features,
        "pretrained_cfg": own
        | {
            "input_size": [3, size, size],
            "interpolation": how["interpolation"],
            "crop_pct": crop if math.floor(size / crop) == short else size / (short + 0.5),
            "crop_mode": "center",
            "mean": how["mean"],
            "std": how["std"],
            "num_classes": 0,
        },
    } | ({"model_args": arguments} if arguments else {})
    loading = """import timm, PIL.Image
model = timm.create_model("local-dir:PATH", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(PIL.Image.open("photo.jpg").convert("RGB"))[None])"""
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    transform = {key: config["pretrained_cfg"][key] for key in ("interpolation", "crop_pct", "mean", "std")}
    alone = f"""import timm, PIL.Image
model = timm.create_model("{network}", checkpoint_path="FILE", num_classes=0{given}).eval()
transform = timm.data.create_transform({size}, {", ".join(f"{key}={value!r}" for key, value in transform.items())})
features = model(transform(PIL.Image.open("photo.jpg").convert("RGB"))[None])"""
    return Target(names, network, loading, alone, {"config.json": config}, made)


def _without_net(name: str) -> str:
    return name.removeprefix("net.")


def _differs_in_timm(network: str, arguments: Mapping[str, Any], weights: Weights) -> str:
    """timm rounds widths in numbers of single precision. Raises UserError without timm."""
    try:
        import timm
    except ImportError as error:
        rule = "timm has to say whether it makes the same network of this generator, and is not installed"
        raise UserError(Problem("--format", "timm", rule, how_to_install("timm"))) from error
    with torch.device("meta"):
        theirs = timm.create_model(network, num_classes=0, **arguments).state_dict()
    same = {n: i.shape for n, i in weights.tensors.items()} == {n: t.shape for n, t in theirs.items()}
    return "" if same else "timm makes other widths of this generator"


def _torchvision(weights: Weights) -> Target | str:
    name, how = weights.about.model["name"], weights.about.preprocessing
    network = TORCHVISION_MODELS.get(name)
    if network is None:
        if name in ("regnety_800mf", "regnety_8gf"):
            return "torchvision's network of this name is another, with other widths"
        return "torchvision has no RegNetY of these widths" if name == "regnety" else f"torchvision has no {name}"
    loading = f"""import PIL.Image, safetensors.torch, torch, torchvision
model = torchvision.models.{network}(num_classes=1).eval()
model.fc = torch.nn.Identity()
model.load_state_dict(safetensors.torch.load_file("FILE"))
{_transform(how)}
features = model(transform(PIL.Image.open("photo.jpg").convert("RGB"))[None])"""
    return Target(NAME_MAPS["torchvision"].theirs, network, loading)


def _transformers(weights: Weights) -> Target | str:
    spec, how = _regnety(weights), weights.about.preprocessing
    if of_layouts := _made("transformers", weights):
        if isinstance(of_layouts, str):
            return of_layouts
        (model, config, _), made = of_layouts
        return _of_transformers(model, config, how, str, made)
    if spec is None:
        return f"transformers is given RegNetY, ViT and ConvNeXt V2 only, and this is {weights.about.model['name']}"
    if spec.se_ratio != 0.25:
        return f"a RegNet of transformers has se_ratio 0.25, and this one has {spec.se_ratio:g}"
    widths, depths = stage_plan(spec)
    config = {
        "architectures": ["RegNetModel"],
        "model_type": "regnet",
        "num_channels": 3,
        "embedding_size": spec.stem_width,
        "hidden_sizes": widths,
        "depths": depths,
        "groups_width": spec.group_width,
        "layer_type": "y",
        "hidden_act": "relu",
        "downsample_in_first_stage": True,
    }
    return _of_transformers("RegNetModel", config, how, NAME_MAPS["transformers"].theirs)


def _of_transformers(
    model: str, config: dict[str, Any], how: Mapping[str, Any], names: Callable[[str], str],
    made: dict[str, Piece] | None = None,
) -> Target:  # fmt: skip
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": how["resize_short_side"]},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": how["size"], "width": how["size"]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": how["mean"],
        "image_std": how["std"],
    }
    loading = f"""import PIL.Image, transformers
model = transformers.{model}.from_pretrained("PATH")
processor = transformers.AutoImageProcessor.from_pretrained("PATH")
images = processor(PIL.Image.open("photo.jpg"), return_tensors="pt")
features = model(**images).pooler_output.flatten(1)"""
    files = {"config.json": config, "preprocessor_config.json": processor}
    return Target(names, model, loading, files=files, made=made or {}, in_shards=True, needs_folder=True)


def _dinov2(weights: Weights) -> Target | str:
    """The original's own."""
    of_layouts, how = _made("dinov2", weights), weights.about.preprocessing
    if of_layouts is None:
        return f"is a layout of vision transformers, and this is {weights.about.model['name']}"
    if isinstance(of_layouts, str):
        return of_layouts
    (network, arguments, _), made = of_layouts
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    loading = f"""import PIL.Image, safetensors.torch, torch, torchvision
size = dict({given})
model = torch.hub.load("facebookresearch/dinov2", "{network}", pretrained=False, **size).eval()
model.load_state_dict(safetensors.torch.load_file("FILE"))
{_transform(how)}
features = model(transform(PIL.Image.open("photo.jpg").convert("RGB"))[None])"""
    return Target(str, network, loading, made=made)


def _convnextv2(weights: Weights) -> Target | str:
    """The original's own, V2's or the first one's."""
    of_layouts, how = _made("convnextv2", weights), weights.about.preprocessing
    if of_layouts is None:
        return f"is a layout of ConvNeXts, and this is {weights.about.model['name']}"
    if isinstance(of_layouts, str):
        return of_layouts
    (network, arguments, _), made = of_layouts
    repository = {"ConvNeXtV2": "ConvNeXt-V2"}.get(network, network)
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    loading = f"""import PIL.Image, safetensors.torch, torchvision
from models.{network.lower()} import {network}  # in a checkout of github.com/facebookresearch/{repository}
model = {network}({given}).eval()
model.load_state_dict(safetensors.torch.load_file("FILE"), strict=False)  # all but its classifier
{_transform(how)}
features = model.forward_features(transform(PIL.Image.open("photo.jpg").convert("RGB"))[None])"""
    return Target(str, network, loading, made=made)


def _onnx(weights: Weights) -> Target:
    how = weights.about.preprocessing
    loading = f"""import numpy, onnxruntime, PIL.Image, torchvision
{_transform(how)}
images = transform(PIL.Image.open("photo.jpg").convert("RGB"))[None].numpy()
(features,) = onnxruntime.InferenceSession("FILE").run(None, {{"images": images}})"""
    return Target(str, weights.about.model["name"], loading)


FORMATS: dict[str, Callable[[Weights], Target | str]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "dinov2": _dinov2,
    "convnextv2": _convnextv2,
    OWN_FORMAT: _own,
    "onnx": _onnx,
}
