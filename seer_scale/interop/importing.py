"""`seer-scale import`: published weights become an artefact (artefact.py)."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seer_scale.config import FREE_MODELS
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.files import published
from seer_scale.formatting import counted, dtype_name
from seer_scale.interop.architecture import find_model
from seer_scale.interop.artefact import (
    FINETUNED_KEY,
    HEAD_KEY,
    INITIAL_KEY,
    OWN_FORMAT,
    About,
    TensorInfo,
    write_artefact,
)
from seer_scale.interop.formats import LIBRARIES
from seer_scale.interop.layouts import layouts_of
from seer_scale.interop.pieces import Piece
from seer_scale.interop.preprocessing import Prepared, find_preprocessing
from seer_scale.interop.published import Lazy, Published, open_published
from seer_scale.interop.write import MAX_SHARD_SIZE, check_replaceable, size_in_bytes
from seer_scale.models.registry import build_backbone, registered_names, spec_of
from seer_scale.models.timm_adaptor import STATISTICS, TIMM_PREFIX, Whole

COUNT = STATISTICS[2]
"""Of the updates of a BatchNorm's statistics: what a file need not have."""


@dataclass(frozen=True)
class Imported:
    """path: of the artefact. format: of what it was made of. model: the keys of a recipe's section `model`. taken: how
    many tensors of each part (backbone, head, prototypes). left: names that were not taken. anew: of the backbone's
    tensors that were not there and begin as before any training. size: of the images, in pixels. prepared: how images
    are, and what told it."""

    path: Path
    format: str
    model: dict[str, Any]
    taken: dict[str, int]
    left: list[str]
    anew: list[str]
    prepared: Prepared

    @property
    def size(self) -> int:
        """Of the images, in pixels."""
        return int(self.prepared.how["size"])

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "size": self.size}

    def __str__(self) -> str:
        parts = ", ".join(f"{counted(n, 'tensor')} of the {part}" for part, n in self.taken.items())
        model = " ".join(f"--model.{key} {shlex.quote(str(value))}" for key, value in self.model.items())
        library = LIBRARIES.get(self.format, self.format)
        lines = [f"{self.path} has {parts}, by names of {library}.", f"Its network: {model}"]
        source = self.prepared.source
        lines.append(f"Its images: {self.size} pixels, {_SOURCES.get(source, f'as {source} tells')}")
        if differs := self.prepared.differs:
            told = ", ".join(f"{key} {ours} (there {theirs})" for key, (theirs, ours) in differs.items())
            lines.append(f"They are prepared otherwise than there: {told}")
        for what, names in (("Not taken", self.left), ("Not there, so as before any training", self.anew)):
            if names:
                lines.append(f"{what} ({len(names)}): {', '.join(names[:5])}{', ...' * (len(names) > 5)}")
        lines.append(f"Go on from it: seer-scale train RECIPE {model} --checkpoint.init_from {self.path}")
        return "\n".join(lines)


_SOURCES = {
    "assumed": "which is assumed, as nothing beside the weights tells (--size N sets it)",
    "metadata": "as its metadata tell",
}
"""How each `Prepared.source` is told that is neither a file nor an option."""


def import_weights(
    path: Path, out: Path, *, format: str = "auto", model: str = "", size: int = 0, force: bool = False
) -> Imported:
    """Make an artefact at `out`, a folder, of the weights in a file or folder. force: replace an earlier one.

    format: vissl, timm, torchvision, transformers, dinov2, convnextv2, convnextv2_sparse or safetensors (ours); auto
    goes by the names. model: the backbone they must be of, as in `model.name`; of a plugin's, tensors have the names of
    its `state_dict`. size: of the images in pixels; 0: as metadata or a library's files tell, else 224. Tensors become
    fp32, one at a time. Raises UserError, with nothing left behind.
    """
    check_replaceable(out, force)
    found = open_published(path, format)
    prepared = find_preprocessing(found.folder, found.about, size)
    keys = _model(path, found, model)
    with torch.device("meta"):
        backbone = build_backbone(keys["name"], **{k: v for k, v in keys.items() if k != "name"})
    prefix = "net." if isinstance(backbone, Whole) and found.format != OWN_FORMAT else ""
    theirs = {prefix + name: tensor for name, tensor in found.tensors.items()}
    spec, initial = spec_of(keys), dict[str, Tensor]()
    if (layouts := layouts_of(spec)) and found.format in layouts.libraries:
        theirs, initial = _of_pieces(found, layouts.imported(found.format, spec)), layouts.initial(spec)
    wanted = {name: t for name, t in backbone.state_dict().items()}
    needed = {name for name, _ in backbone.named_parameters()} - initial.keys()
    needed |= {name for name in wanted if name.rpartition(".")[2] in STATISTICS[:2]}
    taken, anew = _taken(path, theirs, wanted, needed, keys["name"])
    anew = [name for name in anew if name in initial or name.endswith(COUNT)]  # others are computed
    others = {name: TensorInfo(torch.float32, tensor.shape) for name, tensor in found.others.items()}
    infos = {name: TensorInfo(wanted[name].dtype, wanted[name].shape) for name in (*taken, *anew)} | others
    sources = taken | found.others

    def read(name: str) -> Tensor:
        if name not in sources:
            return initial[name] if name in initial else torch.zeros(infos[name].shape, dtype=infos[name].dtype)
        tensor = sources[name].read().to(infos[name].dtype)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(Problem(str(path), NOTHING, f"holds values that are not finite, in {name}"))
        return tensor.view(infos[name].shape)

    origin = {"file": path.name, "format": found.format}
    for key in (INITIAL_KEY, FINETUNED_KEY, *[HEAD_KEY] * (found.format == OWN_FORMAT)):
        if found.about and key in found.about.origin:
            origin[key] = found.about.origin[key]
    about = About(OWN_FORMAT, keys, prepared.how, origin)
    try:
        with published(out, replace=force) as aside:
            aside.mkdir()
            write_artefact(aside, about, infos, read, max_shard_bytes=size_in_bytes(MAX_SHARD_SIZE))
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error})"
        raise UserError(Problem(str(out), NOTHING, rule, "give another --out")) from error
    parts = Counter("backbone" if "/" not in name else name.partition("/")[0] for name in sources)
    used = {prefix + source for lazy in taken.values() for source in (lazy.sources if isinstance(lazy, _Made) else ())}
    unused = {prefix + name for name in found.tensors} - taken.keys() - used
    left = sorted(found.left + [name.removeprefix(prefix) for name in unused])
    return Imported(out, found.format, keys, dict(parts), left, sorted(anew), prepared)


@dataclass(frozen=True)
class _Made:
    """A tensor of ours that is made of a library's own."""

    sources: tuple[str, ...]
    lazies: tuple[Lazy, ...]
    make: Callable[..., Tensor]

    @property
    def shape(self) -> torch.Size:
        try:
            return self.make(*(torch.empty(lazy.shape, device="meta") for lazy in self.lazies)).shape
        except (RuntimeError, IndexError):  # no such shapes go together
            return self.lazies[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.lazies[0].dtype

    def read(self) -> Tensor:
        return self.make(*(lazy.read() for lazy in self.lazies))


def _of_pieces(found: Published, pieces: Mapping[str, Piece]) -> dict[str, Lazy]:
    """Our tensors of those in the file, as far as they are there."""
    return {
        name: _Made(piece.sources, tuple(found.tensors[source] for source in piece.sources), piece.make)
        for name, piece in pieces.items()
        if all(source in found.tensors for source in piece.sources)
    }


def _model(where: Path, found: Published, asked: str) -> dict[str, Any]:
    """The keys of the network: by metadata of ours, else by shapes. Raises UserError where it is another than asked."""
    if asked.startswith(TIMM_PREFIX):
        return {"name": asked}
    if asked and asked not in FREE_MODELS:
        with torch.device("meta"):
            build_backbone(asked)  # there is one of this name
    if asked in registered_names() and not found.about:  # shapes do not tell a plugin's
        return {"name": asked}
    if found.about:
        keys = dict(found.about.model)
    else:
        keys = find_model(str(where), {name: tensor.shape for name, tensor in found.tensors.items()})
    if asked not in ("", keys["name"]):
        told = json.dumps(keys, allow_nan=False) if keys["name"] in FREE_MODELS else keys["name"]
        raise UserError(Problem("--model", asked, f"{where} holds another: {told}", f"give --model {keys['name']}"))
    return keys


def _taken(
    where: Path, theirs: Mapping[str, Lazy], wanted: Mapping[str, Tensor], needed: set[str], model: str
) -> tuple[dict[str, Lazy], list[str]]:
    """The tensors of the network, and names of those that are not there. Raises UserError where one that is needed is
    not, or where one has another shape."""
    taken, anew, wrong = {}, [], []
    for name, tensor in wanted.items():
        if name not in theirs:
            if name in needed:
                wrong.append(f"{name} is absent")
            else:
                anew.append(name)
        elif theirs[name].shape != tensor.shape and (tensor.numel() != 1 or theirs[name].shape.numel() != 1):
            wrong.append(f"{name} is {list(theirs[name].shape)} there and {list(tensor.shape)} in it")
        elif tensor.is_floating_point() and not theirs[name].dtype.is_floating_point:
            wrong.append(f"{name} is {dtype_name(theirs[name].dtype)} there (quantised weights want their scales)")
        else:
            taken[name] = theirs[name]
    if wrong:
        more = f" ({counted(len(wrong), 'tensor')} in all)" if len(wrong) > 1 else ""
        rule = f"does not hold a {model}: {wrong[0]}{more}"
        raise UserError(Problem(str(where), NOTHING, rule, "--model names another"))
    return taken, anew
