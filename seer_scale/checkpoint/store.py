"""Checkpoints on disk: written aside, checked, published by one rename; found again whole or passed over.

The state is one flat dict, name -> full-precision Tensor, whole on every rank, or Shard
("model/backbone.stem.conv.weight", "optim/backbone.stem.conv.weight/momentum"), plus `meta`, a JSON-able dict that
holds at least samples_seen. A rank writes state-RANK.safetensors; tensors.json says where each element lies (`Layout`),
so that a state saved by any number of ranks loads on any other. A folder is a checkpoint if its name is
samples-NNNNNNNNNNNN (a state saved again at the same count gets
-2, -3, ...) and its manifest.json, written last, agrees with every file in size and crc32. Names that begin with .tmp-
are work in progress or waste; as one run owns the folder (`RunLock`), the next save removes those it finds. Nothing in
it is a program: no pickle is written or read.

All coordination goes through the `World` given: a background save needs no more than a world with its own control
group."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import secrets
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from seer_scale.checkpoint.layout import Layout, Part, local_of, run_of
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, CheckpointError, Problem, UserError, missing_path
from seer_scale.files import sync_folder
from seer_scale.formatting import dtype_name, memory_size

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CHECKPOINT_FORMAT = 4
MANIFEST, TENSORS, BEST = "manifest.json", "tensors.json", "best"
_NAME = re.compile(r"samples-(\d{12,})(?:-(\d+))?")

State = Mapping[str, torch.Tensor]
T = TypeVar("T")


# ------------------------------------------------------------------------------------------------ writing


def save(folder: Path, state: State, meta: dict[str, Any], world: World, layout: Layout | None = None) -> Path:
    """Publish `state` and rank 0's `meta` as a new checkpoint in `folder`; its path.

    layout: made once for states whose ranks hold the same runs; `state` then needs no more than what this rank writes.
    What was published before stays untouched until the new one is safe on disk; then one of the same samples_seen is
    replaced.
    Collective. Raises CheckpointError on all ranks, with nothing left behind, if any rank cannot write.
    """
    layout = layout or Layout.plan(state, world)
    aside = folder / world.broadcast_object(f".tmp-{meta['samples_seen']}-{secrets.token_hex(4)}")
    written: dict[str, dict[str, int]] = {}
    name = None
    try:
        with agreement(world):
            if world.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                for stale in folder.glob(".tmp-*"):
                    _remove(stale)
                aside.mkdir()
        with agreement(world):
            if mine := layout.written_by(world.rank):
                runs = (_bytes_of(state[name], part) for name, part in mine.items())
                _write(aside / _file_of(world.rank), itertools.chain([layout.header(world.rank)], runs), written)
            if world.is_main:
                _write(aside / TENSORS, [layout.to_json()], written)
        files = {name: facts for rank in world.gather_objects(written) for name, facts in rank.items()}
        with agreement(world):
            if world.is_main:
                name = _publish(aside, meta, files)
    except CheckpointError as problem:
        if world.is_main:
            _remove(aside)
        key = f"The checkpoint at {meta['samples_seen']} samples"
        rule = f"could not be written to {folder} ({problem.problems[0].clause}); {_space(folder, layout)}"
        earlier = "earlier checkpoints are untouched" if _published(folder) else "there is no earlier checkpoint"
        told = Problem(key, NOTHING, rule, f"{earlier} and training can go on")
        raise CheckpointError(world.broadcast_object(told)) from problem
    return folder / world.broadcast_object(name)


def _publish(aside: Path, meta: dict[str, Any], files: dict[str, dict[str, int]]) -> str:
    for name, expected in files.items():
        path = aside / name
        if not path.exists():
            raise OSError(f"{name}, written by another rank, is not there: do all nodes share this file system?")
        if path.stat().st_size != expected["size"]:
            raise OSError(f"{name} has {path.stat().st_size} bytes on disk of {expected['size']} written")
    # Through text once, so that what is sealed is exactly what will be read.
    content = json.loads(json.dumps({"format": CHECKPOINT_FORMAT, "meta": meta, "files": files}, allow_nan=False))
    with (aside / MANIFEST).open("w") as f:
        json.dump({"crc32": _seal(content)} | content, f, indent=1, allow_nan=False)
        f.flush()
        os.fsync(f.fileno())
    sync_folder(aside)
    same = [p for p in _published(aside.parent) if _samples(p) == meta["samples_seen"]]
    again = f"-{_order(same[0])[1] + 1}" if same else ""
    final = aside.with_name(f"samples-{meta['samples_seen']:012d}{again}")
    os.rename(aside, final)
    sync_folder(final.parent)
    for replaced in same:
        with suppress(OSError):  # what is left of it is older than `final`, and falls to `prune`
            _discard(replaced)
    return final.name


def publish_files(aside: Path, meta: dict[str, Any], files: dict[str, dict[str, int]], layout: Layout) -> Path:
    """Publish a checkpoint whose state files another way than `save` has made, in `aside`, a folder beside those that
    are published. files: name -> size and crc32. Raises OSError."""
    _write(aside / TENSORS, [layout.to_json()], files)
    return aside.with_name(_publish(aside, meta, files))


class _Checksummed(io.FileIO):
    """A raw file that keeps size and crc32 of what is written to it: of what was meant, not of what arrived."""

    size = crc32 = 0

    def write(self, data: ReadableBuffer) -> int:
        count = super().write(data)
        self.size += count
        self.crc32 = zlib.crc32(memoryview(data).cast("B")[:count], self.crc32)
        return count


def _write(path: Path, pieces: Iterable[bytes | memoryview], written: dict[str, dict[str, int]]) -> None:
    """A file of these bytes, on the disk when this returns; its size and checksum go to `written`."""
    with _Checksummed(path, "w") as raw:
        with io.BufferedWriter(raw, 2**20) as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(raw.fileno())
        written[path.name] = {"size": raw.size, "crc32": raw.crc32}


def _file_of(rank: int) -> str:
    return f"state-{rank:05d}.safetensors"


def _bytes_of(tensor: torch.Tensor, part: Part) -> memoryview:
    """The elements of `part`, which this rank holds; no copy where they lie together on the host."""
    first = run_of(tensor)[0]
    run = local_of(tensor).contiguous().view(-1)[part.start - first : part.stop - first].cpu()
    return run.view(torch.uint8).numpy().data


# ------------------------------------------------------------------------------------------------ finding


def latest(
    folder: Path, world: World, *, verify: bool = True, warn: Callable[[str], None] = warnings.warn
) -> Path | None:
    """The newest valid checkpoint in `folder`, the same on all ranks; None if there is none.

    Each one passed over is told to `warn`, on rank 0, in a sentence with its name and what is wrong with it. Without
    `verify`, contents are not read: manifest and file sizes must do. Collective. Raises CheckpointError if the folder
    cannot be read.
    """
    for name in _names(folder, world):
        problem = validate(folder / name, world, contents=verify)
        if problem is None:
            return folder / name
        if world.is_main:
            told = replace(problem, key=f"The checkpoint {problem.key}", rule=f"is passed over: it {problem.rule}")
            warn(str(told))
    return None


def validate(path: Path, world: World, *, contents: bool = True) -> Problem | None:
    """What is wrong with the checkpoint `path`; None if it is whole. The ranks share out its files.

    Its rule says what holds of the checkpoint ("has format 3, ..."). Without `contents`, checksums are left alone.
    Collective.
    """
    manifest, problem = None, None
    if world.is_main:
        try:
            manifest = _manifest(path)
        except CheckpointError as error:
            problem = error.problems[0]
    manifest, problem = world.broadcast_object((manifest, problem))
    if problem is None:
        mine = sorted(manifest["files"].items())[world.rank :: world.size]
        rule = next((r for name, expected in mine if (r := _broken_rule(path / name, expected, contents))), None)
        problem = Problem(str(path), NOTHING, rule) if rule else None
    return next((p for p in world.gather_objects(problem) if p), None)


def _broken_rule(path: Path, expected: dict[str, int], contents: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"has {size} bytes in {path.name}, which was written with {expected['size']}"
        if contents and _file_crc32(path) != expected["crc32"]:
            return f"has a {path.name} with a wrong checksum, whose contents have changed since they were written"
    except FileNotFoundError:
        return f"lacks {path.name}"
    except OSError as e:
        return f"has a {path.name} that cannot be read ({e.strerror})"
    return None


def _file_crc32(path: Path) -> int:
    crc32, block = 0, memoryview(bytearray(2**22))
    with path.open("rb", buffering=0) as f:
        while count := f.readinto(block):
            crc32 = zlib.crc32(block[:count], crc32)
    return crc32


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError."""

    def wrong(rule: str) -> CheckpointError:
        return CheckpointError(Problem(str(path), NOTHING, rule))

    try:
        content = json.loads((path / MANIFEST).read_bytes())
        sealed = content.pop("crc32")
    except OSError as e:
        if not os.path.exists(path):
            raise CheckpointError(missing_path(path)) from None
        if isinstance(e, FileNotFoundError | NotADirectoryError):
            raise wrong(f"has no {MANIFEST}, so it was not finished or is no checkpoint") from None
        raise wrong(f"has a {MANIFEST} that cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise wrong(f"has a damaged {MANIFEST}") from None
    if sealed != _seal(content):
        raise wrong(f"has a damaged {MANIFEST}")
    if content["format"] != CHECKPOINT_FORMAT:
        raise wrong(f"has format {content['format']}, but this version reads format {CHECKPOINT_FORMAT}")
    return content


def _seal(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, allow_nan=True).encode())  # format 1 had infinity


# ------------------------------------------------------------------------------------------------ reading


def read_meta(path: Path, world: World = World()) -> dict[str, Any]:
    """The `meta` a checkpoint was saved with; reads no tensor. Rank 0 reads it for all of `world`, if one is given:
    collective. Raises CheckpointError if `path` is none."""
    return world.from_main(lambda: _read_manifest(path))["meta"]


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return _manifest(path)
    except CheckpointError as error:
        problem, inside = error.problems[0], [*_published(path), *_published(path / "checkpoints")]
        fix = f"did you mean {inside[0]}?" if inside else problem.nearest or "choose another"
        rule = f"cannot be used as a checkpoint: it {problem.rule}"
        raise CheckpointError(Problem(str(path), NOTHING, rule, fix)) from None


def read_layout(path: Path, world: World = World()) -> Layout:
    """Names, shapes and dtypes of a checkpoint's tensors, and where they lie; reads none. Rank 0 reads it for all of
    `world`, if one is given: collective. Raises CheckpointError."""
    text = world.from_main(lambda: _read_tensors_json(path))
    try:
        return Layout.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise _unread(path, f"{TENSORS}: {e}") from e


def _unread(path: Path, why: str) -> CheckpointError:
    return CheckpointError(Problem(str(path), NOTHING, f"could not be read ({why})", "choose another"))


def _read_tensors_json(path: Path) -> bytes:
    expected = _read_manifest(path)["files"].get(TENSORS, {})
    try:
        text = (path / TENSORS).read_bytes()
    except OSError as e:
        raise _unread(path, f"{TENSORS}: {e.strerror}") from e
    if zlib.crc32(text) != expected.get("crc32"):
        raise _unread(path, f"the checksum of {TENSORS} is wrong")
    return text


def contents(path: Path) -> dict[str, tuple[str, torch.Size, int]]:
    """Name -> (dtype, shape, bytes in the files) of each tensor. Local, reads no tensor. Raises CheckpointError."""
    tensors = read_layout(path).tensors
    return {k: (dtype_name(t.dtype), t.shape, t.shape.numel() * t.dtype.itemsize) for k, t in tensors.items()}


DEFAULT_REMEDY = "choose the recipe that wrote it, or another checkpoint"


def load(
    path: Path,
    state: State,
    world: World,
    *,
    prefixes: str | tuple[str, ...] = "",
    remedy: str = DEFAULT_REMEDY,
    names: Mapping[str, str] | None = None,
    layout: Layout | None = None,
) -> int:
    """Fill the tensors of `state`, those whose name begins with one of `prefixes`, in place from the checkpoint `path`.

    Returns the bytes this rank has read. remedy: what to do if they do not fit. names: of tensors here to those in the
    checkpoint, of which no others are then looked at. layout: the checkpoint's, where it has been read.

    Names, shapes and dtypes must be those of the checkpoint, which is settled before any tensor is read. Rank 0 reads
    the layout; each rank opens the files that hold what it needs, once. Contents are not verified here: `latest` has,
    `validate` does. Collective. Raises CheckpointError on all ranks; after one that says "could not be read" the
    tensors are not to be used.
    """
    wanted = {k: v for k, v in state.items() if k.startswith(prefixes)}
    layout = _named(layout or read_layout(path, world), names)
    with agreement(world):
        compare(path, wanted, layout.tensors, remedy, prefixes=prefixes)
    try:
        with agreement(world):
            return _read(path, wanted, layout)
    except CheckpointError as problem:
        error = _unread(path, problem.problems[0].clause)
        error.retryable = True
        raise error from problem


def check_compatible(
    path: Path,
    state: State,
    world: World = World(),
    *,
    prefixes: str = "",
    remedy: str = DEFAULT_REMEDY,
    names: Mapping[str, str] | None = None,
) -> None:
    """That the tensors under `prefixes` in the checkpoint `path` have the names, shapes and dtypes of `state`, which
    may be on the meta device. remedy, names: as of `load`. Collective, if a world is given; reads no tensor. Raises
    CheckpointError."""
    layout = _named(read_layout(path, world), names)
    compare(path, {k: v for k, v in state.items() if k.startswith(prefixes)}, layout.tensors, remedy, prefixes=prefixes)


def _named(layout: Layout, names: Mapping[str, str] | None) -> Layout:
    if names is None:
        return layout
    return Layout({new: layout.tensors[old] for new, old in names.items() if old in layout.tensors})


def _read(path: Path, wanted: State, layout: Layout) -> int:
    """Fill `wanted`; the bytes read."""
    by_file: dict[int, list[tuple[Part, torch.Tensor]]] = {}
    scattered = []
    for name, tensor in wanted.items():
        local, (start, stop) = local_of(tensor), run_of(tensor)
        whole = local if local.is_contiguous() else torch.empty_like(local, memory_format=torch.contiguous_format)
        if whole is not local:
            scattered.append((local, whole))
        for part in layout.tensors[name].within(start, stop):
            by_file.setdefault(part.file, []).append((part, whole.view(-1)[part.start - start : part.stop - start]))
    nbytes = 0
    for file in sorted(by_file):
        with (path / _file_of(file)).open("rb", buffering=0) as raw:
            begin = 8 + int.from_bytes(raw.read(8), "little")
            for part, target in sorted(by_file[file], key=lambda pair: pair[0].offset):
                host = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
                raw.seek(begin + part.offset)
                _fill(raw, host)
                if host is not target:
                    target.copy_(host)
                nbytes += host.nbytes
    for local, whole in scattered:
        local.copy_(whole)
    return nbytes


class TensorReader:
    """The tensors of a checkpoint, whole and one at a time, for who has no room for all of them. Raises
    CheckpointError."""

    MAX_OPEN_FILES = 256
    """That stay open: one tensor may lie in the files of all ranks."""

    def __init__(self, path: Path):
        self.path, self.layout = path, read_layout(path)
        self._open: dict[int, tuple[io.FileIO, int]] = {}

    def read(self, name: str) -> torch.Tensor:
        stored = self.layout.tensors[name]
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        try:
            for part in stored.parts:
                with self._file(part.file) as (raw, begin):
                    raw.seek(begin + part.offset)
                    _fill(raw, whole.view(-1)[part.start : part.stop])
        except OSError as error:
            raise _unread(self.path, _told(error)) from error
        return whole

    @contextmanager
    def _file(self, rank: int) -> Iterator[tuple[io.FileIO, int]]:
        """The file of a rank, and where its data begin."""
        if rank in self._open:
            yield self._open[rank]
            return
        raw = (self.path / _file_of(rank)).open("rb", buffering=0)
        try:
            opened = raw, 8 + int.from_bytes(raw.read(8), "little")
            yield opened
        except BaseException:
            raw.close()
            raise
        if len(self._open) < self.MAX_OPEN_FILES:
            self._open[rank] = opened
        else:
            raw.close()

    def close(self) -> None:
        for raw, _ in self._open.values():
            raw.close()
        self._open.clear()


def _fill(raw: io.FileIO, tensor: torch.Tensor) -> None:
    left = tensor.view(torch.uint8).numpy().data
    while left:
        if not (count := raw.readinto(left)):
            raise OSError(f"{Path(raw.name).name} ends too early")
        left = left[count:]


class Described(Protocol):
    """What is said of a tensor that need not be there."""

    @property
    def dtype(self) -> torch.dtype:
        """As torch.Tensor."""

    @property
    def shape(self) -> torch.Size:
        """As torch.Tensor."""


def compare(
    path: Path,
    wanted: State,
    held: Mapping[str, Described],
    remedy: str,
    *,
    prefixes: str | tuple[str, ...] = "",
    casts: bool = False,
) -> None:
    """Raises CheckpointError with a sentence on the first tensor that differs between the run and what `path` holds
    under `prefixes`. casts: whether one type of floating point is as good as another."""

    def described(tensor: Described) -> str:
        word = "float" if casts and tensor.dtype.is_floating_point else dtype_name(tensor.dtype)
        return f"{word} {list(tensor.shape)}"

    here = {k: described(v) for k, v in wanted.items()}
    there = {k: described(v) for k, v in held.items() if k.startswith(prefixes)}
    if not here and not there:
        raise CheckpointError(Problem(str(path), NOTHING, f"holds nothing under {prefixes!r}"))
    for key in sorted(here | there):
        if here.get(key) != there.get(key):
            kind = "is of another architecture" if key.startswith("model/") else "does not fit this recipe"
            differs = f"{there.get(key, 'absent')} in the checkpoint and {here.get(key, 'absent')} in this run"
            raise CheckpointError(Problem(str(path), NOTHING, f"{kind}: {key} is {differs}", remedy))


# ------------------------------------------------------------------------------------------------ keeping few


def prune(folder: Path, keep_last: int, keep_every_samples: int, world: World) -> None:
    """Delete checkpoints, but not the newest `keep_last`, nor the first at or past each multiple of
    `keep_every_samples` (0 = none), nor the best (`mark_best`), nor the newest valid one, which is verified before
    anything goes.

    Collective. Raises CheckpointError on all ranks if one cannot be deleted.
    """
    names = _names(folder, world)
    milestones: dict[int, str] = {}
    for name in names if keep_every_samples else ():  # newest first: the oldest of each interval is set last
        milestones[_samples(Path(name)) // keep_every_samples] = name
    milestones.pop(0, None)
    old = [name for name in names[keep_last:] if name not in milestones.values()]
    if not old or (valid := latest(folder, world, warn=lambda _: None)) is None:
        return
    with agreement(world):
        if world.is_main:
            for name in old:
                if name not in (valid.name, best_of(folder)):
                    _discard(folder / name)


def mark_best(folder: Path, scores: dict[int, float]) -> str | None:
    """Let the link `best` name the checkpoint in `folder` whose samples_seen has the highest score; its name, if that
    is another than before. Local. Raises OSError."""
    scored = [p.name for p in reversed(_published(folder)) if _samples(p) in scores]
    best = max(scored, key=lambda name: scores[_samples(Path(name))], default=None)
    if best is None or best == best_of(folder):
        return None
    aside = folder / f".{BEST}.new"  # no .tmp-, which a save that begins meanwhile removes
    aside.unlink(missing_ok=True)
    os.symlink(best, aside)
    os.replace(aside, folder / BEST)
    return best


def published(folder: Path) -> list[int]:
    """samples_seen of what bears a checkpoint's name in `folder`, newest first."""
    return [_samples(p) for p in _published(folder)]


def samples_of(name: str) -> int:
    return _samples(Path(name))


def best_of(folder: Path) -> str | None:
    """The name of the checkpoint that was marked as the best."""
    try:
        return os.readlink(folder / BEST)
    except OSError:
        return None


def _discard(path: Path) -> None:
    """Delete a checkpoint; killed in between, it leaves none that is half there under a valid name."""
    waste = path.with_name(f".tmp-old-{secrets.token_hex(4)}")
    os.rename(path, waste)
    sync_folder(path.parent)
    _remove(waste)


# ------------------------------------------------------------------------------------------------ small parts


@contextmanager
def agreement(world: World) -> Iterator[None]:
    """The body succeeds on all ranks, or CheckpointError with the first rank's problem is raised on all. Collective."""
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    own: UserError | str | None = error if isinstance(error, UserError) or error is None else _told(error)
    first = next((e for e in world.gather_objects(own) if e is not None), None)
    if first is not None:
        raise CheckpointError(*(first.problems if isinstance(first, UserError) else [first])) from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _order(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is no checkpoint's name")
    return int(match[1]), int(match[2] or 1)


def _samples(path: Path) -> int:
    return _order(path)[0]


def _published(folder: Path) -> list[Path]:
    """What bears a checkpoint's name, newest first."""
    if not os.path.isdir(folder):
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=_order, reverse=True)


def _names(folder: Path, world: World) -> list[str]:
    """Rank 0's view of `_published`, on all ranks."""
    names: list[str] = []
    with agreement(world):
        if world.is_main:
            try:
                names = [p.name for p in _published(folder)]
            except OSError as e:
                rule = f"cannot be listed ({e.strerror})"
                raise CheckpointError(Problem(str(folder), NOTHING, rule, "make it readable")) from e
    return world.broadcast_object(names)


def _remove(path: Path) -> None:
    """As far as possible; what is left keeps its .tmp- name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _space(folder: Path, layout: Layout) -> str:
    needed = sum(t.shape.numel() * t.dtype.itemsize for t in layout.tensors.values())
    try:
        free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
    except OSError:
        return f"{memory_size(needed)} are needed"
    return f"{memory_size(free)} are free there and {memory_size(needed)} are needed"
