"""An exported (or imported) backbone: safetensors files whose metadata say what they hold.

It is one file NAME.safetensors, or a folder with model.safetensors, or with model-00001-of-0000N.safetensors and
model.safetensors.index.json. Tensors have the names of the library whose format it is; in ours, "safetensors", names
are those of `Backbone.state_dict()`, and what belongs to no backbone has a "/" in its name ("head/0.weight"). Each
file's metadata have `About` as JSON under "seer_scale". Nothing in it is a program.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seer_scale.checkpoint.layout import SAFETENSORS_DTYPES, local_of, run_of
from seer_scale.errors import NOTHING, Problem, UserError, missing_path
from seer_scale.files import plain, shown
from seer_scale.interop.layouts import layouts_of
from seer_scale.interop.names import NAME_MAPS
from seer_scale.interop.pieces import FamilyLayouts, Piece
from seer_scale.models.registry import spec_of
from seer_scale.models.timm_adaptor import TIMM_PREFIX

ABOUT = "seer_scale"
"""The key of a file's metadata under which `About` lies."""
ARTEFACT_VERSION = 1
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ONNX_FILE = "model.onnx"
OWN_FORMAT = "safetensors"
WEIGHT_FILES = (".safetensors",)
"""How the names of files end in which a backbone is looked for."""
DESCRIPTORS = Path("/proc/self/fd")
"""Where Linux has the open files of a process by number."""
HEAD_KEY = "head"
"""Of `About.origin`: the `Head` of a classifier, whose tensors are head/weight [classes, D] and head/bias [classes]."""
FINETUNED_KEY = "finetuned"
"""Of `About.origin`: on what labels all weights were trained after the pretraining, one `Finetuned` after the other."""
INITIAL_KEY = "initial"
"""Of `About.origin`: by what the weights before any training were drawn: the run's `seed`, and the `prefix` of their
names in it."""
_WORDS = {dtype: word for word, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class About:
    """What an artefact holds. format: whose names its tensors have. model: its keys of a recipe's section `model`
    (name, and of regnety the generator's). preprocessing: as `eval_preprocessing` gives it. origin: what is known of
    where it comes from: method, samples_seen, recipe, results ..., as JSON has it."""

    format: str
    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    origin: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(plain({"version": ARTEFACT_VERSION} | asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: Path) -> About:
        """Raises UserError where `text` is none."""
        try:
            given = json.loads(text)
            version, kept = given.pop("version"), cls(**given)
            sections = (kept.model, kept.preprocessing, kept.origin)
            if not all(isinstance(s, dict) for s in sections) or not isinstance(kept.model["name"], str):
                raise TypeError("a section is none")
            int(kept.preprocessing["size"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(Problem(str(where), NOTHING, f"has damaged metadata ({error!r})")) from None
        if version != ARTEFACT_VERSION:
            rule = f"has metadata of version {version}, but this version reads version {ARTEFACT_VERSION}"
            raise UserError(Problem(str(where), NOTHING, rule))
        return kept


@dataclass(frozen=True)
class Head:
    """What a linear head tells apart. multi_label: an image may have several of the classes. protocol: how it was
    trained, a sentence or two."""

    classes: Sequence[str]
    multi_label: bool = False
    protocol: str = ""


@dataclass(frozen=True)
class Finetuned:
    """data: the last part of its path, or a data set's name. classes: how many. protocol: how it was trained and
    measured, a sentence or two. scores: by name, the first stands for it. options: of the command, without paths."""

    data: str
    classes: int
    protocol: str
    scores: Mapping[str, float]
    options: Mapping[str, Any]


class TensorInfo(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


# ------------------------------------------------------------------------------------------------ writing


def write_artefact(
    out: Path,
    about: About,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    *,
    max_shard_bytes: int = 0,
) -> None:
    """The weights, at `out`: a file, or a folder that exists. tensors: by the names they are to have; `read` gives each
    of them once, and one is held at a time. max_shard_bytes: of a file, of a folder (0: one file). Raises OSError."""
    metadata = {"format": "pt", ABOUT: about.to_json()}
    if not out.is_dir():
        write_file(out, tensors, read, metadata)
        return
    shards: list[dict[str, TensorInfo]] = [{}]
    held = 0
    for name, info in tensors.items():
        if shards[-1] and max_shard_bytes and held + info.nbytes > max_shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = info
        held += info.nbytes
    if len(shards) == 1:
        write_file(out / WEIGHTS, tensors, read, metadata)
        return
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(out / file, shard, read, metadata)
        where |= dict.fromkeys(shard, file)
    total = sum(info.nbytes for info in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / WEIGHTS_INDEX).write_text(json.dumps(index, indent=1, allow_nan=False))


def write_file(
    path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """A safetensors file, not whole before it ends. safetensors' own writer takes all tensors of a file at once. As
    there, wider types come first, so that each element lies at a multiple of its size. Raises OSError."""
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, info in tensors.items():
        offsets = [end, end + info.nbytes]
        header[name] = {"dtype": _WORDS[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in tensors.items():
            tensor = read(name)
            assert (tensor.dtype, tensor.shape) == info, f"{name} is not what was announced"
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------ reading


def is_artefact(path: Path) -> bool:
    """Whether it looks like one: a file NAME.safetensors, or a folder of such. A path that cannot be looked at is
    none."""
    if os.path.isdir(path):
        return any(os.path.isfile(path / name) for name in (WEIGHTS, WEIGHTS_INDEX))
    return path.suffix == ".safetensors" and os.path.isfile(path)


class Artefact:
    """One on the disk: `tensors` by our names, each read when asked for. Raises UserError for what is none."""

    def __init__(self, path: Path):
        self.path = path
        names = _files(path)
        self._files = {name: open_safetensors(name) for name in names}
        about = about_of(next(iter(self._files.values())), path)
        if about is None:
            rule = "has no metadata of ours, so what network it is of is not known"
            raise UserError(Problem(str(path), NOTHING, rule, "seer-scale import takes published weights"))
        self.about = about
        layouts = layouts_of(spec_of(about.model))
        is_made = layouts is not None and about.format in layouts.libraries
        ours = str if is_made else our_names(self.about, path)
        self._held: dict[str, tuple[Path, str]] = {}
        self._made: dict[str, Piece] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file, opened in self._files.items():
            for theirs in opened.keys():  # noqa: SIM118  # it is no mapping
                piece = opened.get_slice(theirs)
                if piece.get_dtype() not in SAFETENSORS_DTYPES:
                    raise UserError(Problem(str(file), NOTHING, f"holds {theirs} as {piece.get_dtype()}"))
                try:
                    name = theirs if "/" in theirs else ours(theirs)
                except KeyError:
                    rule = f"holds {theirs}, which is no name of the format {self.about.format}"
                    raise UserError(Problem(str(file), NOTHING, rule)) from None
                self._held[name] = file, theirs
                self.tensors[name] = TensorInfo(SAFETENSORS_DTYPES[piece.get_dtype()], torch.Size(piece.get_shape()))
        if layouts and is_made:
            self._made = self._pieces(layouts)

    def _pieces(self, layouts: FamilyLayouts) -> dict[str, Piece]:
        """Ours of those in a library's layout; `tensors` become ours. Raises UserError."""
        spec, theirs = spec_of(self.about.model), self.tensors
        dtype = next((info.dtype for info in theirs.values()), torch.float32)
        made = {name: Piece((), partial(tensor.to, dtype)) for name, tensor in layouts.initial(spec).items()}
        made |= layouts.imported(self.about.format, spec)
        self.tensors = {name: info for name, info in theirs.items() if "/" in name}
        for name, piece in made.items():
            if gone := [source for source in piece.sources if source not in theirs]:
                raise UserError(Problem(str(self.path), NOTHING, f"lacks {gone[0]} of the format {self.about.format}"))
            shape = piece.make(*(torch.empty(theirs[source].shape, device="meta") for source in piece.sources)).shape
            self.tensors[name] = TensorInfo(dtype, shape)
        return made

    def read(self, name: str) -> Tensor:
        """Of our name, on the CPU. Raises UserError."""
        if piece := self._made.get(name):
            return piece.make(*map(self._read_theirs, piece.sources))
        return self._read_theirs(name)

    def _read_theirs(self, name: str) -> Tensor:
        file, theirs = self._held[name]
        try:
            return self._files[file].get_tensor(theirs)
        except (SafetensorError, OSError) as error:
            raise UserError(Problem(str(file), NOTHING, f"could not be read ({error})")) from error

    @torch.no_grad()
    def fill(self, tensor: Tensor, name: str) -> int:
        """Copy our `name` into a tensor of its shape, or what a rank holds of one (`Shard`), of any precision; the
        bytes read: of the rows that are needed. Raises UserError."""
        local, (start, stop) = local_of(tensor), run_of(tensor)
        info = self.tensors[name]
        if start == stop:
            return 0
        if not info.shape or name in self._made:
            read = self.read(name)
        else:
            inner = info.shape[1:].numel()
            first, last = start // inner, -(-stop // inner)
            file, theirs = self._held[name]
            try:
                read = self._files[file].get_slice(theirs)[first:last]
            except (SafetensorError, OSError) as error:
                raise UserError(Problem(str(file), NOTHING, f"could not be read ({error})")) from error
            start, stop = start - first * inner, stop - first * inner
        local.copy_(read.reshape(-1)[start:stop].view_as(local))
        return read.nbytes


def about_of(opened: Any, where: Path) -> About | None:  # safetensors has no types for it
    """Of an open file's metadata; None where they are not ours. Raises UserError where they are damaged."""
    text = (opened.metadata() or {}).get(ABOUT)
    return None if text is None else About.from_json(text, where)


def our_names(about: About, where: Path) -> Callable[[str], str]:
    """From the names of `about`'s format. Raises UserError where there is none such."""
    name = about.model["name"]
    if about.format == OWN_FORMAT or name.startswith(TIMM_PREFIX):
        return str
    if about.format not in NAME_MAPS:
        rule = "is none that can be read"
        raise UserError(Problem(f"the format of {where}", about.format, rule, (OWN_FORMAT, *NAME_MAPS)))
    return NAME_MAPS[about.format].ours


def _files(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        if not path.exists():
            raise UserError(missing_path(path, WEIGHT_FILES))
        return [path]
    if not (path / WEIGHTS_INDEX).is_file():
        return [path / WEIGHTS]
    return indexed_files(path / WEIGHTS_INDEX)


def indexed_files(index: Path) -> list[Path]:
    """The files that a WEIGHTS_INDEX names, which lie beside it. Raises UserError."""
    try:
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not files or any(Path(file).name != file for file in files):
            raise ValueError("its files are to lie beside it")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(Problem(str(index), NOTHING, f"is damaged ({error!r})")) from None
    return [index.parent / file for file in files]


def open_safetensors(path: Path) -> Any:  # safetensors has no types for it
    """By its descriptor where its name is not UTF-8, which safetensors does not take. Raises UserError."""
    try:
        if shown(path) == os.fspath(path) or not DESCRIPTORS.is_dir():
            return safe_open(path, framework="pt")
        with open(path, "rb") as file:
            return safe_open(DESCRIPTORS / str(file.fileno()), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(Problem(str(path), NOTHING, f"is no whole safetensors file ({error})")) from None
