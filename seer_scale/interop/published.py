"""Published weights as they lie: files of torch.save and safetensors, in the layouts of VISSL, timm, torchvision,
transformers and the originals, by names that are ours.

Files are hostile until shown otherwise (`pickles.py`). What is opened is read when it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from seer_scale.checkpoint.layout import SAFETENSORS_DTYPES
from seer_scale.errors import NOTHING, Problem, UserError, missing_path, nearest
from seer_scale.interop.artefact import (
    OWN_FORMAT,
    WEIGHTS,
    WEIGHTS_INDEX,
    About,
    about_of,
    indexed_files,
    open_safetensors,
)
from seer_scale.interop.names import NAME_MAPS, NameMap
from seer_scale.interop.pickles import StoredTensor, read_pickle
from seer_scale.interop.preprocessing import CONFIG, read_object


class Lazy(Protocol):
    """A tensor that is read when it is asked for."""

    @property
    def shape(self) -> torch.Size:
        """As it lies in the file."""

    @property
    def dtype(self) -> torch.dtype:
        """As it lies in the file."""

    def read(self) -> Tensor:
        """On the CPU. Raises UserError."""


@dataclass
class Published:
    """tensors: of a backbone, by the names of its `state_dict`. others: of what a method has beside it, in the
    artefact's words ("head/0.weight"). left: names of the file that nothing here has a use for. about: its metadata,
    where they are ours. folder: in which a library keeps what belongs to the weights, where it is one's."""

    format: str
    about: About | None = None
    folder: Path | None = None
    tensors: dict[str, Lazy] = field(default_factory=dict)
    others: dict[str, Lazy] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def open_published(path: Path, format: str = "auto") -> Published:
    """The weights in a file or folder. Raises UserError: for what is none, or of another format than asked."""
    known = ("auto", *SOURCE_LAYOUTS, OWN_FORMAT)
    if format not in known:
        raise UserError(Problem("--format", format, "that is no format", nearest(format, known)))
    if not path.exists():
        raise UserError(missing_path(path))
    files = _files(path)
    about = about_of(open_safetensors(files[0]), path) if _is_safetensors(files[0]) else None
    flat = {_clean(name): tensor for file in files for name, tensor in _tensors(file)}
    is_own = about is not None and about.format == OWN_FORMAT
    found = OWN_FORMAT if is_own else _layout_of(flat)
    if not found:
        some = ", ".join(sorted(flat)[:3]) or "none"
        rule = f"has tensors of no layout that is known ({some})"
        raise UserError(Problem(str(path), NOTHING, rule, f"known are {', '.join(SOURCE_LAYOUTS)}"))
    if format not in ("auto", found) and not {format, found} <= SAME_RESNETS:
        raise UserError(Problem("--format", format, f"{path} has names of {found}", f"give --format {found}"))
    out = Published(found, about, path if path.is_dir() else path.parent if path.name in LIBRARY_FILES else None)
    ours_of = str if is_own else SOURCE_LAYOUTS[found].ours
    for name, tensor in flat.items():
        if other := name if is_own and "/" in name else _other(name):
            out.others[other] = tensor
        elif ours := ours_of(name):
            out.tensors[ours] = tensor
        else:
            out.left.append(name)
    return out


# ------------------------------------------------------------------------------------------------ names


@dataclass(frozen=True)
class Layout:
    """marks: what some names, one for each, begin with, by which the layout is known. ours: a name to ours, or None; of
    a family that has `FamilyLayouts` to the library's own, of which these make ours."""

    marks: tuple[re.Pattern[str], ...]
    ours: Callable[[str], str | None]


def _of_map(names: NameMap, prefix: str, name: str) -> str | None:
    try:
        return names.ours(name.removeprefix(prefix))
    except KeyError:
        return None


VISSL_NAMES = NameMap(
    "stem",
    "block{s}-{b}",
    {"conv": "0", "bn": "1"},
    {"conv1.conv": "f.a.0", "conv1.bn": "f.a.1", "conv2.conv": "f.b.0", "conv2.bn": "f.b.1", "conv3.conv": "f.c",
     "conv3.bn": "f.final_bn", "se.fc1": "f.se.excitation.0", "se.fc2": "f.se.excitation.2", "downsample.conv": "proj",
     "downsample.bn": "bn"},
    first_block=0,
)  # fmt: skip
"""ClassyVision's, of which VISSL's trunk is made, without the names of what is around a block."""
_AROUND = re.compile(r"^_feature_blocks\.(?:res\d+\.|conv1\.(?=stem\.))?(?:block\d+-part\d+\.)?")
_RESNET = re.compile(r"(?:conv1|bn1|layer[1-4]\.\d+)\..+")


def _of_vissl(name: str) -> str | None:
    inner = _AROUND.sub("", name)
    return _of_map(VISSL_NAMES, "", re.sub(r"^conv1\.([01])\.", r"stem.\1.", inner)) or _of_resnet(inner)


def _of_resnet(name: str) -> str | None:
    """timm has torchvision's names of a ResNet."""
    return name if _RESNET.fullmatch(name) else None


_CHUNKED = re.compile(r"^blocks\.\d+\.(?=\d+\.)")
_BASE_MODEL = re.compile(r"^(?:dinov2\w*\.|convnext(?:v2)?\.)?(?=(?:embeddings|encoder|layernorm)\.)")
"""What transformers puts before the names of a network within one for a task."""


def _of_dinov2(name: str) -> str | None:
    """Blocks lie in chunks where they were trained so, by numbers that count through them all."""
    inner = _CHUNKED.sub("blocks.", name.removeprefix("backbone."))
    return None if name.startswith(("dino_head.", "ibot_head.")) else inner


def _of_transformers(name: str) -> str | None:
    of_regnet = _of_map(NAME_MAPS["transformers"], "regnet.", name)
    return of_regnet or (_BASE_MODEL.sub("", name) if _BASE_MODEL.match(name) else None)


_CONVNEXTV2 = re.compile(r"(?:encoder\.)?((?:downsample_layers|stages|norm)\..+)")


def _of_convnextv2(name: str) -> str | None:
    """Without the decoder of masked pretraining, and the classifier."""
    match = _CONVNEXTV2.fullmatch(name)
    return match[1] if match else None


def _layout(ours: Callable[[str], str | None], *marks: str) -> Layout:
    return Layout(tuple(map(re.compile, marks)), ours)


SOURCE_LAYOUTS = {
    "vissl": _layout(_of_vissl, r"_feature_blocks\."),
    "transformers": _layout(
        _of_transformers,
        r"(?:regnet\.)?embedder\.embedder\.|(?:dinov2\w*\.|convnext(?:v2)?\.)?embeddings\.patch_embeddings\.",
    ),
    "torchvision": _layout(partial(_of_map, NAME_MAPS["torchvision"], ""), r"trunk_output\."),
    "dinov2": _layout(_of_dinov2, r"(?:backbone\.)?mask_token$", r"(?:backbone\.)?blocks\.(?:\d+\.)?\d+\.ls1\.gamma$"),
    "convnextv2_sparse": _layout(_of_convnextv2, r"(?:encoder\.)?stages\.0\.0\.dwconv\.kernel$"),
    "convnextv2": _layout(_of_convnextv2, r"(?:encoder\.)?downsample_layers\.0\.0\."),
    "timm": _layout(str, r"\w+(?:\.\w+)+"),
}


def _layout_of(names: Iterable[str]) -> str:
    """Empty where it is none that is known."""
    known = list(names)
    layouts = SOURCE_LAYOUTS.items()
    return next((name for name, found in layouts if all(any(map(mark.match, known)) for mark in found.marks)), "")


SAME_RESNETS = {"timm", "torchvision"}
"""Which have one name for a ResNet."""
_WRAPPERS = ("_fsdp_wrapped_module", "_fpw_module", "_orig_mod")


def _clean(name: str) -> str:
    """Without the words of what a module was wrapped in."""
    words = [word for word in name.removeprefix("module.").split(".") if word not in _WRAPPERS]
    return ".".join(words)


_OTHERS = (
    (re.compile(r"(?:heads\.0\.)?projection_head\.(\d+\.\w+)"), "head/{}"),
    (re.compile(r"(?:heads\.0\.)?prototypes\.weight()"), "prototypes/0.weight"),
    (re.compile(r"(?:heads\.0\.)?(?:prototypes\.)?prototypes(\d+)\.weight"), "prototypes/{}.weight"),
)
"""VISSL's and the SwAV repository's words for what our method has beside the backbone."""


def _other(name: str) -> str:
    for pattern, word in _OTHERS:
        if match := pattern.fullmatch(name):
            return word.format(match[1])
    return ""


# ------------------------------------------------------------------------------------------------ files


LIBRARY_FILES = (WEIGHTS_INDEX, WEIGHTS, "pytorch_model.bin")
"""Of which a library's folder has one."""


def _files(path: Path) -> list[Path]:
    """Of tensors."""
    if path.is_dir():
        _check_config(path)
        found = next((file for name in LIBRARY_FILES if (file := path / name).is_file()), None)
        if found is None:
            inside = sorted(p for p in path.iterdir() if p.suffix in (".torch", ".pth", ".pt", ".bin", ".safetensors"))
            fix = f"did you mean {inside[0]}?" if inside else "give a file of weights, or its folder"
            raise UserError(Problem(str(path), NOTHING, f"has no {WEIGHTS} and no pytorch_model.bin", fix))
        path = found
    return indexed_files(path) if path.name == WEIGHTS_INDEX else [path]


def _tensors(file: Path) -> Iterator[tuple[str, Lazy]]:
    return _of_safetensors(file) if _is_safetensors(file) else _of_pickle(file)


def _is_safetensors(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise UserError(Problem(str(path), NOTHING, f"cannot be read ({error.strerror})")) from None


@dataclass(frozen=True)
class _OfSafetensors:
    path: Path
    opened: Any  # safetensors has no types for it
    name: str
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        return self.opened.get_tensor(self.name)


def _of_safetensors(path: Path) -> Iterator[tuple[str, Lazy]]:
    opened = open_safetensors(path)
    try:
        for name in opened.keys():  # noqa: SIM118  # it is no mapping
            piece = opened.get_slice(name)
            word = piece.get_dtype()
            if word not in SAFETENSORS_DTYPES:
                rule, fix = f"is {word}, which no weights here are made of", "convert it to F32, F16 or BF16"
                raise UserError(Problem(f"{path}: {name}", NOTHING, rule, fix))
            yield name, _OfSafetensors(path, opened, name, torch.Size(piece.get_shape()), SAFETENSORS_DTYPES[word])
    except (SafetensorError, OSError) as error:
        raise UserError(Problem(str(path), NOTHING, f"is no whole safetensors file ({error})")) from None


_NEEDED: dict[str, tuple[str, dict[str, Any]]] = {
    "regnet": ("RegNetY", {"hidden_act": "relu", "downsample_in_first_stage": True, "layer_type": "y"}),
    "convnext": ("ConvNeXt", {"hidden_act": "gelu"}),
    "convnextv2": ("ConvNeXt V2", {"hidden_act": "gelu"}),
}
"""By transformers' word for a family: ours, and its configuration's values."""


def _check_config(folder: Path) -> None:
    """What shapes do not tell, where a transformers' config.json does. Raises UserError."""
    path = folder / CONFIG
    config = read_object(path)
    family, needed = _NEEDED.get(str(config.get("model_type")), ("", {}))
    for key, value in needed.items():
        if config.get(key, value) != value:
            raise UserError(Problem(f"{path}: {key}", config[key], f"it is no {family} then", (value,)))


# ------------------------------------------------------------------------------------------------ torch.save


def _of_pickle(path: Path) -> Iterator[tuple[str, Lazy]]:
    found = read_pickle(path)
    try:
        yield from _of_object(path, found)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        rule = f"is of a layout that is not known ({type(error).__name__}: {error})"
        raise UserError(Problem(str(path), NOTHING, rule)) from None


def _of_object(path: Path, found: Any) -> Iterator[tuple[str, Lazy]]:
    """Of VISSL's kinds of files (CheckpointItemType), else of a state dict or what holds one."""
    if not isinstance(found, dict):
        raise UserError(Problem(str(path), NOTHING, "holds no weights by name"))
    kind = found.get("type")
    if kind == "shard_list":
        yield from _of_shards([_beside(path, name) for name in found["shards"]])
        return
    if "classy_state_dict" in found or kind == "slice_list":
        held: dict[str, Any] = found
        if "classy_state_dict" in found:
            held = found["classy_state_dict"]["base_model"]["model"]
        trunk, heads = held["trunk" if "trunk" in held else "layers"], held.get("heads") or {}
        for prefix, tensors in (("", trunk), ("heads.", heads)):
            for name, tensor in tensors.items():
                is_slice = kind == "slice_list"
                yield prefix + name, read_pickle(_beside(path, tensor))["weight"] if is_slice else tensor
        return
    held = next((found[k] for k in ("state_dict", "model", "teacher") if isinstance(found.get(k), dict)), found)
    for name, tensor in held.items():
        if isinstance(name, str) and isinstance(tensor, StoredTensor):
            yield name, tensor


def _beside(path: Path, name: str) -> Path:
    """The file that a list names: beside it, or in the folder of its slices; wherever its writer had it."""
    own = Path(name).name
    folders = (path.parent, path.parent / f"{path.stem}_layers")
    found = next((folder / own for folder in folders if (folder / own).is_file()), None)
    if found is None:
        raise UserError(Problem(str(path), NOTHING, f"names {own}, which does not lie beside it"))
    return found


@dataclass(frozen=True)
class _OfShards:
    """Elements [start, stop) of vectors that ranks hold a piece of each."""

    pieces: tuple[StoredTensor, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    def read(self) -> Tensor:
        runs, begin = [], 0
        for piece, size in zip(self.pieces, self.sizes, strict=True):
            first, last = max(self.start - begin, 0), min(self.stop - begin, size)
            if first < last:
                runs.append(piece.read_run(first, last))
            begin += size
        return torch.cat(runs).view(self.shape) if runs else torch.empty(self.shape, dtype=self.dtype)


def _of_shards(paths: list[Path]) -> Iterator[tuple[str, Lazy]]:
    """fairscale's shards, a file a rank, put together as FullyShardedDataParallel.consolidate_shard_weights does, but
    without reading them."""
    shards = [read_pickle(path)["classy_state_dict"]["base_model"] for path in paths]
    yield from _whole([s["model"]["trunk"] for s in shards], [s["meta"]["trunk"] for s in shards])
    heads = shards[0]["meta"].get("heads") or []
    for i in range(len(heads)):
        of_head = [s["model"]["heads"][i] for s in shards], [s["meta"]["heads"][i] for s in shards]
        for name, tensor in _whole(*of_head):
            yield f"heads.{i}.{name}", tensor


def _whole(weights: list[Mapping[str, Any]], metas: list[Mapping[str, Any]]) -> Iterator[tuple[str, Lazy]]:
    for unit, about in enumerate(metas[0]["param_metadata"]):
        prefix = f"{about['fsdp_path']}." if about["fsdp_path"] else ""
        holders = range(1 if about["no_broadcast_optim_state"] else len(weights))
        for flat, rows in about["params"].items():
            pieces = tuple(weights[rank][prefix + flat] for rank in holders)
            padding = [metas[rank]["param_metadata"][unit]["params"][flat]["padding"] for rank in holders]
            sizes = tuple(piece.shape[0] - pad for piece, pad in zip(pieces, padding, strict=True))
            begin = 0
            for name, shape, numel in zip(rows["names"], rows["shapes"], rows["numels"], strict=True):
                if torch.Size(shape).numel() != numel or any(p.stride != (1,) for p in pieces):
                    raise ValueError(f"{name} is no run of a vector")
                yield prefix + name, _OfShards(pieces, sizes, begin, begin + numel, torch.Size(shape))
                begin += numel
            if begin != sum(sizes) or any(pad < 0 or size < 0 for pad, size in zip(padding, sizes)):
                raise ValueError(f"{prefix + flat} has {sum(sizes)} elements of {begin}")
    for name in metas[0]["buffer_names"]:
        yield name, weights[0][name]
