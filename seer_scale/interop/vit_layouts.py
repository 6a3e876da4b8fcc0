"""What other libraries make of a vision transformer's tensors: some are joined, cut or of another shape there.

dinov2: the original's, timm, and transformers' Dinov2Model and Dinov2WithRegistersModel, by the names of published
files.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.interop.pieces import FamilyLayouts, Network, Piece, Shapes, same
from seer_scale.models.layers.transformer import NORM_EPS, swiglu_width
from seer_scale.models.vit import VIT_SHAPE, VIT_SIZES, VITS, ViTSpec

VIT_LIBRARIES = ("dinov2", "timm", "transformers")
HEAD_WIDTH = 64
"""Of every published size; no tensor tells it."""


def imported(library: str, spec: ViTSpec) -> dict[str, Piece]:
    """Our parameters of tensors of `library`; those that it has not are left out."""
    return {ours: piece for ours, piece, _ in _pairs(library, spec)} | _positions_in(library, spec)


def exported(library: str, spec: ViTSpec) -> dict[str, Piece]:
    """Tensors of `library` of our parameters."""
    out: dict[str, Piece] = {}
    for ours, (theirs, _), split in _pairs(library, spec):
        if len(theirs) == 1:
            out[theirs[0]] = Piece((ours,), split)
        else:
            out |= {name: Piece((ours,), _third(i)) for i, name in enumerate(theirs)}
    return out | _positions_out(library, spec)


def vit_of_timm(spec: ViTSpec) -> tuple[str, dict[str, Any]]:
    """timm's network, and what it is given beside its name. Its feed-forward networks are no numbers: a SwiGLU is that
    of its giant one."""
    size = "giant" if spec.ffn == "swiglu" else "small"
    for known, (width, depth, heads, ffn) in VIT_SIZES.items():
        if (width, depth, heads, ffn) == (spec.width, spec.depth, spec.heads, spec.ffn):
            size = known
    width, depth, heads, _ = VIT_SIZES[size]
    registers = 4 if spec.registers else 0
    usual = {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": 14, "reg_tokens": registers}
    given = {"embed_dim": spec.width, "depth": spec.depth, "num_heads": spec.heads, "patch_size": spec.patch,
             "reg_tokens": spec.registers}  # fmt: skip
    arguments: dict[str, Any] = {key: value for key, value in given.items() if usual[key] != value}
    if spec.ffn == "swiglu" and "embed_dim" in arguments:
        arguments["mlp_ratio"] = 2 * swiglu_width(spec.width) / spec.width
    network = f"vit_{size}_patch14{'_reg4' * bool(registers)}_dinov2"
    return network, arguments | {"img_size": spec.image_size, "dynamic_img_size": True}


def timm_network(spec: ViTSpec, how: Mapping[str, Any]) -> Network | str:
    layers = {"first_conv": "patch_embed.proj", "classifier": "head"}
    return _resizes_otherwise("timm", spec, how, "antialias") or Network(*vit_of_timm(spec), layers)


def transformers_network(spec: ViTSpec, how: Mapping[str, Any]) -> Network | str:
    if reason := _resizes_otherwise("transformers", spec, how, "antialias" if spec.registers else "exact"):
        return reason
    model = "Dinov2WithRegistersModel" if spec.registers else "Dinov2Model"
    config = {
        "architectures": [model],
        "model_type": "dinov2_with_registers" if spec.registers else "dinov2",
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "image_size": spec.image_size,
        "patch_size": spec.patch,
        "num_channels": 3,
        "qkv_bias": True,
        "layerscale_value": spec.layer_scale,
        "use_swiglu_ffn": spec.ffn == "swiglu",
    } | ({"num_register_tokens": spec.registers} if spec.registers else {})
    return Network(model, config)


def dinov2_network(spec: ViTSpec, how: Mapping[str, Any]) -> Network | str:
    """Of which torch.hub builds the published sizes."""
    sizes = {(width, depth, heads): name for name, (width, depth, heads, _) in VIT_SIZES.items()}
    size = sizes.get((spec.width, spec.depth, spec.heads))
    if size is None:
        return f"dinov2 builds {', '.join(VIT_SIZES)} only"
    if reason := _resizes_otherwise("dinov2", spec, how, "antialias" if spec.registers else "offset"):
        return reason
    arguments: dict[str, Any] = {
        "img_size": spec.image_size,
        "patch_size": spec.patch,
        "num_register_tokens": spec.registers,
    }
    if spec.ffn != ("swiglu" if size == "giant" else "mlp"):  # fused, tensors are the same; no xFormers
        arguments["ffn_layer"] = "swiglufused" if spec.ffn == "swiglu" else "mlp"
    return Network(f"dinov2_vit{size[0]}14{'_reg' * bool(spec.registers)}", arguments)


def initial(spec: ViTSpec) -> dict[str, Tensor]:
    """The mask token, which timm leaves out."""
    return {"embed.mask_token": torch.zeros(1, spec.width)}


def _resizes_otherwise(library: str, spec: ViTSpec, how: Mapping[str, Any], resize: str) -> str:
    """Why a library would give other features of images of the size that ours are evaluated at; empty: it does not."""
    if spec.positions != "table":
        return f"{library} has no such network with rotary positions"
    if how["size"] == spec.image_size or spec.resize == resize:
        return ""
    return (
        f"its table of positions is for {spec.image_size} pixels, and {library} resizes it to images of {how['size']} "
        f"otherwise (model.position_resize {resize}) than this network ({spec.resize})"
    )


def _with_batch(x: Tensor) -> Tensor:
    return x[None]


def _without_batch(x: Tensor) -> Tensor:
    return x[0]


def _below_zeros(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[0, :1]), x[0]])


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _third(i: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.chunk(3)[i]


def _pairs(library: str, spec: ViTSpec) -> Iterator[tuple[str, Piece, Callable[[Tensor], Tensor]]]:
    """Of all but CLS token and positions: our name, what makes it of theirs, and what makes theirs of it where theirs
    is one."""
    is_hf = library == "transformers"
    embed = "embeddings.patch_embeddings.projection" if is_hf else "patch_embed.proj"
    for leaf in ("weight", "bias"):
        yield f"embed.proj.{leaf}", Piece((f"{embed}.{leaf}",), same), same
        yield f"norm.{leaf}", Piece((f"layernorm.{leaf}" if is_hf else f"norm.{leaf}",), same), same
    if library != "timm":
        yield "embed.mask_token", Piece(("embeddings.mask_token" if is_hf else "mask_token",), same), same
    if spec.registers:
        name = {"timm": "reg_token", "dinov2": "register_tokens", "transformers": "embeddings.register_tokens"}[library]
        yield "embed.register_tokens", Piece((name,), _without_batch), _with_batch
    names = _block_names(library, spec)
    for i, leaf in itertools.product(range(spec.depth), ("weight", "bias")):
        for ours, theirs in names.items():
            if ours.startswith("ls"):
                if leaf == "bias":
                    continue
                yield f"blocks.{i}.{ours}", Piece((theirs[0].format(i=i),), same), same
            else:
                sources = tuple(f"{name.format(i=i)}.{leaf}" for name in theirs)
                yield f"blocks.{i}.{ours}.{leaf}", Piece(sources, _join if len(sources) > 1 else same), same


def _block_names(library: str, spec: ViTSpec) -> Mapping[str, tuple[str, ...]]:
    ffn = ("fc1", "fc2") if spec.ffn == "mlp" else ("w12", "w3")
    if library != "transformers":
        own = ("norm1", "norm2", "attn.qkv", "attn.proj", "ls1.gamma", "ls2.gamma")
        theirs = ("fc1", "fc2") if library == "timm" else ffn
        return {part: (f"blocks.{{i}}.{part}",) for part in own} | {
            f"mlp.{a}": (f"blocks.{{i}}.mlp.{b}",) for a, b in zip(ffn, theirs)
        }
    layer = "encoder.layer.{i}"
    theirs = ffn if spec.ffn == "mlp" else ("weights_in", "weights_out")
    return {
        "norm1": (f"{layer}.norm1",),
        "norm2": (f"{layer}.norm2",),
        "attn.qkv": tuple(f"{layer}.attention.attention.{part}" for part in ("query", "key", "value")),
        "attn.proj": (f"{layer}.attention.output.dense",),
        "ls1.gamma": (f"{layer}.layer_scale1.lambda1",),
        "ls2.gamma": (f"{layer}.layer_scale2.lambda1",),
    } | {f"mlp.{a}": (f"{layer}.mlp.{b}",) for a, b in zip(ffn, theirs)}


def _position_names(library: str) -> tuple[str, str]:
    prefix = "embeddings." if library == "transformers" else ""
    return f"{prefix}cls_token", f"{prefix}{'position_embeddings' if prefix else 'pos_embed'}"


def _positions_in(library: str, spec: ViTSpec) -> dict[str, Piece]:
    cls, places = _position_names(library)
    # there the CLS token has its place added, and the table is of patches
    make = _below_zeros if library == "timm" and spec.registers else _without_batch
    return {"embed.cls_token": Piece((cls,), _without_batch), "embed.pos_embed": Piece((places,), make)}


def _positions_out(library: str, spec: ViTSpec) -> dict[str, Piece]:
    cls, places = _position_names(library)
    if library == "timm" and spec.registers:
        both = ("embed.cls_token", "embed.pos_embed")
        return {cls: Piece(both, lambda c, x: (c + x[:1])[None]), places: Piece(both[1:], lambda x: x[1:][None])}
    return {cls: Piece(("embed.cls_token",), _with_batch), places: Piece(("embed.pos_embed",), _with_batch)}


# ------------------------------------------------------------------------------------------------ which one it is


_MARKS = {"patch_embed.proj.weight": "blocks.{}.norm1.weight",
          "embeddings.patch_embeddings.projection.weight": "encoder.layer.{}.norm1.weight"}  # fmt: skip
"""The patches' convolution, of a vision transformer with LayerScale, and its blocks."""


def is_vit(shapes: Shapes) -> bool:
    """Whether these names are those of a vision transformer as DINOv2 has them, in any of the libraries."""
    last = r"(?:blocks|encoder\.layer)\.0\.(?:ls1\.gamma|layer_scale1\.lambda1)"
    return any(mark in shapes for mark in _MARKS) and any(re.fullmatch(last, name) for name in shapes)


def find_vit(where: str, shapes: Shapes) -> dict[str, Any]:
    """The keys of a recipe's section `model` for it. Raises UserError where its tensors do not tell them."""
    proj = next(mark for mark in _MARKS if mark in shapes)
    try:
        width, _, patch, _ = shapes[proj]
        depth = next(i for i in itertools.count() if _MARKS[proj].format(i) not in shapes)
        places = next(shapes[name][1] for name in map(_at(1), map(_position_names, VIT_LIBRARIES)) if name in shapes)
        registers = next((shape[1] for name, shape in shapes.items() if name.endswith(_REGISTERS)), 0)
        hidden = next((shape[0] for name, shape in shapes.items() if name.endswith(_FIRST_OF_FFN)), 0)
    except (ValueError, IndexError, StopIteration) as error:
        rule = f"holds no vision transformer with a table of positions ({error or 'it has none'})"
        raise UserError(Problem(where, NOTHING, rule)) from None
    side = math.isqrt(places)  # 1 + side^2 is no square
    given: dict[str, Any] = {
        "ffn": "mlp" if hidden == 4 * width else "swiglu",
        "registers": registers,
        "image_size": side * patch,
    }
    heads = next((h for w, d, h, _ in VIT_SIZES.values() if (w, d) == (width, depth)), width // HEAD_WIDTH)
    shape: dict[str, Any] = dict(zip(VIT_SHAPE, (width, depth, heads, patch)))
    if width % HEAD_WIDTH:
        rule = f"holds a vision transformer of width {width}, whose number of heads nothing tells"
        raise UserError(Problem(where, NOTHING, rule))
    for name, spec in VITS.items():
        if all(getattr(spec, key) == value for key, value in shape.items()):
            return {"name": name} | {key: value for key, value in given.items() if getattr(spec, key) != value}
    usual = asdict(ViTSpec(**shape))
    return {"name": "vit", **shape} | {key: value for key, value in given.items() if usual[key] != value}


def _at(i: int) -> Callable[[tuple[str, str]], str]:
    return lambda pair: pair[i]


_REGISTERS = ("register_tokens", "reg_token")
_FIRST_OF_FFN = ("0.mlp.fc1.weight", "0.mlp.w12.weight", "0.mlp.weights_in.weight")


VIT_LAYOUTS = FamilyLayouts(
    spec=ViTSpec,
    libraries=VIT_LIBRARIES,
    imported=imported,
    exported=exported,
    initial=initial,
    networks={"timm": timm_network, "transformers": transformers_network, "dinov2": dinov2_network},
    matches=is_vit,
    find=find_vit,
)
