"""What other libraries make of the tensors of a ConvNeXt V2, and of the first ConvNeXt.

timm, transformers' ConvNextV2Model and ConvNextModel, and the originals (github.com/facebookresearch/ConvNeXt-V2 and
ConvNeXt): `convnextv2` as the published files of both have it, `convnextv2_sparse` as V2's sparse pretraining writes
it, whose kernels have the places of a convolution first, column by column.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.interop.pieces import FamilyLayouts, Network, Piece, Shapes, same
from seer_scale.models.convnextv2 import (
    CONVNEXT,
    CONVNEXT_EPS,
    CONVNEXT_SIZES,
    CONVNEXTV2,
    CONVNEXTV2_SIZES,
    STAGES,
    ConvNeXtSpec,
    ConvNeXtV2Spec,
)

_OUR_LAYERS = (
    "stem.conv", "stem.norm", "s{S}.down.norm", "s{S}.down.conv", "s{S}.b{B}.dw", "s{S}.b{B}.norm", "s{S}.b{B}.fc1",
    "s{S}.b{B}.grn", "s{S}.b{B}.fc2", "norm",
)  # fmt: skip
_ORIGINAL_LAYERS = (
    "downsample_layers.0.0", "downsample_layers.0.1", "downsample_layers.{s}.0", "downsample_layers.{s}.1",
    "stages.{s}.{b}.dwconv", "stages.{s}.{b}.norm", "stages.{s}.{b}.pwconv1", "stages.{s}.{b}.grn",
    "stages.{s}.{b}.pwconv2", "norm",
)  # fmt: skip
_LAYERS = {
    "timm": (
        "stem.0", "stem.1", "stages.{s}.downsample.0", "stages.{s}.downsample.1", "stages.{s}.blocks.{b}.conv_dw",
        "stages.{s}.blocks.{b}.norm", "stages.{s}.blocks.{b}.mlp.fc1", "stages.{s}.blocks.{b}.mlp.grn",
        "stages.{s}.blocks.{b}.mlp.fc2", "head.norm",
    ),
    "transformers": (
        "embeddings.patch_embeddings", "embeddings.layernorm", "encoder.stages.{s}.downsampling_layer.0",
        "encoder.stages.{s}.downsampling_layer.1", "encoder.stages.{s}.layers.{b}.dwconv",
        "encoder.stages.{s}.layers.{b}.layernorm", "encoder.stages.{s}.layers.{b}.pwconv1",
        "encoder.stages.{s}.layers.{b}.grn", "encoder.stages.{s}.layers.{b}.pwconv2", "layernorm",
    ),
    "convnextv2": _ORIGINAL_LAYERS,
    "convnextv2_sparse": tuple(
        name + {"s{S}.down.norm": ".ln", "s{S}.b{B}.norm": ".ln", "s{S}.b{B}.fc1": ".linear",
                "s{S}.b{B}.fc2": ".linear"}.get(layer, "")
        for layer, name in zip(_OUR_LAYERS, _ORIGINAL_LAYERS, strict=True)
    ),
}  # fmt: skip
"""Layers by the names of each library, in the order of ours: stage `s` and block `b` from 0, `S` and `B` from 1."""
_SCALES = {"timm": "stages.{s}.blocks.{b}.gamma", "transformers": "encoder.stages.{s}.layers.{b}.layer_scale_parameter",
           "convnextv2": "stages.{s}.{b}.gamma"}  # fmt: skip
"""LayerScale of the first ConvNeXt, which has it instead of `grn`; our s{S}.b{B}.gamma."""
TIMM_CONVOLVES = ("atto", "femto", "pico", "nano")
"""Whose linear layers are convolutions of 1 x 1 in timm."""


def imported(library: str, spec: ConvNeXtV2Spec) -> dict[str, Piece]:
    """Our parameters of tensors of `library`."""
    return {ours: Piece((theirs,), _to_ours(template, theirs)) for template, ours, theirs in _parameters(library, spec)}


def exported(library: str, spec: ConvNeXtV2Spec) -> dict[str, Piece]:
    """Tensors of `library`, timm, transformers or the original, of our parameters."""
    convolves = library == "timm" and not isinstance(spec, ConvNeXtSpec) and _size(spec) in TIMM_CONVOLVES
    out = {}
    for template, ours, theirs in _parameters(library, spec):
        make: Callable[[Tensor], Tensor] = same
        if library != "timm" and template.endswith("grn"):
            make = _of_map
        elif convolves and template.endswith(("fc1", "fc2")) and theirs.endswith(".weight"):
            make = _as_convolution
        out[theirs] = Piece((ours,), make)
    return out


def timm_network(spec: ConvNeXtV2Spec, how: Mapping[str, Any]) -> Network | str:
    """timm's stages halve a map until they have a stride of 32, and the first one too where the stem has 2."""
    if spec.patch == 2 or spec.patch >= 8:
        return f"timm's ConvNeXt with patches of {spec.patch} has other strides than this network"
    size = _size(spec)
    arguments: dict[str, Any] = {} if size else {"depths": list(spec.depths), "dims": list(spec.widths)}
    if spec.patch != ConvNeXtV2Spec.patch:
        arguments["patch_size"] = spec.patch
    layers = {"pool_size": [7, 7], "first_conv": "stem.0", "classifier": "head.fc"}
    family = "convnext" if isinstance(spec, ConvNeXtSpec) else "convnextv2"
    return Network(f"{family}_{size or 'tiny'}", arguments, layers)


def transformers_network(spec: ConvNeXtV2Spec, how: Mapping[str, Any]) -> Network:
    """With the original's eps in the last LayerNorm too, where transformers has 1e-12 if none is given."""
    name, kind, own = "ConvNextV2Model", "convnextv2", {}
    if isinstance(spec, ConvNeXtSpec):
        name, kind, own = "ConvNextModel", "convnext", {"layer_scale_init_value": spec.layer_scale}
    config = {
        "architectures": [name],
        "model_type": kind,
        "num_channels": 3,
        "image_size": how["size"],
        "patch_size": spec.patch,
        "num_stages": STAGES,
        "hidden_sizes": list(spec.widths),
        "depths": list(spec.depths),
        "hidden_act": "gelu",
        "layer_norm_eps": CONVNEXT_EPS,
        "drop_path_rate": spec.drop_path,
        **own,
    }
    return Network(name, config)


def original_network(spec: ConvNeXtV2Spec, how: Mapping[str, Any]) -> Network | str:
    """The class of models/convnextv2.py, or of the first one's models/convnext.py, whose patches are 4 pixels."""
    if spec.patch != ConvNeXtV2Spec.patch:
        return f"the original's network has patches of {ConvNeXtV2Spec.patch}, and this one of {spec.patch}"
    name = "ConvNeXt" if isinstance(spec, ConvNeXtSpec) else "ConvNeXtV2"
    return Network(name, {"depths": list(spec.depths), "dims": list(spec.widths)})


def initial(spec: ConvNeXtV2Spec) -> dict[str, Tensor]:
    """The last LayerNorm, which masked pretraining has not."""
    return {"norm.weight": torch.ones(spec.widths[-1]), "norm.bias": torch.zeros(spec.widths[-1])}


def _size(spec: ConvNeXtV2Spec) -> str:
    """A published one's; empty for others."""
    sizes = CONVNEXT_SIZES if isinstance(spec, ConvNeXtSpec) else CONVNEXTV2_SIZES
    return next((size for size, shape in sizes.items() if shape == (spec.width, spec.depths)), "")


def _parameters(library: str, spec: ConvNeXtV2Spec) -> Iterator[tuple[str, str, str]]:
    """Of each: the template of our layer, our name and theirs."""
    is_first = isinstance(spec, ConvNeXtSpec)
    if is_first:
        for s, depth in enumerate(spec.depths):
            for b in range(depth):
                yield "s{S}.b{B}.gamma", f"s{s + 1}.b{b + 1}.gamma", _SCALES[library].format(s=s, b=b)
    for (template, theirs), leaf in itertools.product(
        zip(_OUR_LAYERS, _LAYERS[library], strict=True), ("weight", "bias")
    ):
        if is_first and template.endswith("grn"):
            continue
        if "{B}" in template:
            places = [(s, b) for s, depth in enumerate(spec.depths) for b in range(depth)]
        else:
            places = [(s, 0) for s in range(1, STAGES)] if "{S}" in template else [(0, 0)]
        for s, b in places:
            own = f"{template}.{leaf}".format(S=s + 1, B=b + 1)
            yield template, own, f"{theirs.format(s=s, b=b)}.{_leaf(library, template, leaf)}"


def _leaf(library: str, template: str, leaf: str) -> str:
    if library.startswith("convnextv2") and template.endswith("grn"):
        return {"weight": "gamma", "bias": "beta"}[leaf]
    is_kernel = library == "convnextv2_sparse" and template.endswith(("down.conv", "dw")) and leaf == "weight"
    return "kernel" if is_kernel else leaf


def _to_ours(template: str, theirs: str) -> Callable[[Tensor], Tensor]:
    """Libraries differ in axes of size 1."""
    if theirs.endswith(".kernel"):
        return _of_kernel
    if template.endswith("grn") or theirs.endswith(".bias"):
        return torch.flatten
    return _without_places if template.endswith(("fc1", "fc2")) else same


def _of_kernel(x: Tensor) -> Tensor:
    """[k k, C_in, C_out], or depthwise [k k, C] -> [C_out, C_in, k, k]; places lie column by column."""
    x = x[:, None] if x.ndim == 2 else x
    side = math.isqrt(len(x))
    return x.transpose(0, 2).unflatten(2, (side, side)).transpose(2, 3)


def _without_places(x: Tensor) -> Tensor:
    return x.flatten(1)


def _as_convolution(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def _of_map(x: Tensor) -> Tensor:
    return x[None, None, None]


# ------------------------------------------------------------------------------------------------ which one it is


def _marks() -> Iterator[tuple[type[ConvNeXtV2Spec], str, str]]:
    """Of each family in each library: the stem's kernel, and what every block has one of."""
    for library, names in _LAYERS.items():
        grn, stem = _OUR_LAYERS.index("s{S}.b{B}.grn"), f"{names[0]}.weight"
        yield ConvNeXtV2Spec, stem, f"{names[grn]}.{_leaf(library, _OUR_LAYERS[grn], 'weight')}"
        if library in _SCALES:
            yield ConvNeXtSpec, stem, _SCALES[library]


def _mark_of(shapes: Shapes) -> tuple[type[ConvNeXtV2Spec], str, str] | None:
    return next((m for m in _marks() if m[1] in shapes and m[2].format(s=0, b=0) in shapes), None)


def is_convnext(shapes: Shapes) -> bool:
    """Whether these names are those of a ConvNeXt V2, with Global Response Normalization, in any of the libraries."""
    found = _mark_of(shapes)
    return found is not None and found[0] is ConvNeXtV2Spec


def is_first_convnext(shapes: Shapes) -> bool:
    """Whether they are those of a ConvNeXt with LayerScale."""
    found = _mark_of(shapes)
    return found is not None and found[0] is ConvNeXtSpec


def find_convnext(where: str, shapes: Shapes) -> dict[str, Any]:
    """The keys of a recipe's section `model` for it, whichever it is. Raises UserError where its tensors do not tell
    them."""
    marks = _mark_of(shapes)
    if marks is None:
        raise ValueError(f"{where} is no ConvNeXt: ask is_convnext first")
    kind, stem, block = marks
    depths = [next(b for b in itertools.count() if block.format(s=s, b=b) not in shapes) for s in range(STAGES + 1)]
    if len(shapes[stem]) != 4 or not all(depths[:STAGES]) or depths[STAGES]:
        rule = f"holds no ConvNeXt of {STAGES} stages: they have {depths} blocks, the stem is {list(shapes[stem])}"
        raise UserError(Problem(where, NOTHING, rule))
    found = kind(shapes[stem][0], tuple(depths[:STAGES]), shapes[stem][2])
    if name := next((name for name, spec in (CONVNEXTV2 | CONVNEXT).items() if spec == found), ""):
        return {"name": name}
    keys = {"name": "convnext" if kind is ConvNeXtSpec else "convnextv2", "width": found.width,
            "depths": list(found.depths)}  # fmt: skip
    return keys | ({} if found.patch == ConvNeXtV2Spec.patch else {"patch": found.patch})


CONVNEXT_LAYOUTS = FamilyLayouts(
    spec=ConvNeXtV2Spec,
    libraries=tuple(_LAYERS),
    imported=imported,
    exported=exported,
    initial=initial,
    networks={"timm": timm_network, "transformers": transformers_network, "convnextv2": original_network},
    matches=is_convnext,
    find=find_convnext,
)
FIRST_CONVNEXT_LAYOUTS = replace(
    CONVNEXT_LAYOUTS, spec=ConvNeXtSpec, libraries=tuple(_SCALES), matches=is_first_convnext
)
