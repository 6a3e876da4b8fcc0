"""Checkpoints on disk: written aside, checked, published by one rename; found again whole or passed over.

The state is one flat dict, name -> full-precision Tensor or DTensor ("model/backbone.stem.conv.weight",
"optim/backbone.stem.conv.weight/momentum"), plus `meta`, a JSON-able dict that holds at least samples_seen. Tensors are
laid out by torch.distributed.checkpoint, so a state saved by any number of ranks loads on any other. A folder is a
checkpoint if its name is samples-NNNNNNNNNNNN (a state saved again at the same count gets -2, -3, ...) and its
manifest.json, written last, agrees with every file in size and crc32. Names that begin with .tmp- are work in progress
or waste; as one run owns the folder (`RunLock`), the next save removes those it finds.

All coordination goes through the `World` given: a background save needs no more than a world with its own control group.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import secrets
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from seer_scale.errors import CheckpointError
from seer_scale.files import sync_folder
from seer_scale.world import World

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"samples-(\d{12,})(?:-(\d+))?")

State = dict[str, torch.Tensor]


# ------------------------------------------------------------------------------------------------ writing


def save(folder: Path, state: State, meta: dict[str, Any], world: World) -> Path:
    """Publish `state` and rank 0's `meta` as a new checkpoint in `folder`; its path.

    What was published before stays untouched until the new one is safe on disk; then one of the same samples_seen is
    replaced. Collective. Raises CheckpointError on all ranks, with nothing left behind, if any rank cannot write.
    """
    aside = folder / world.broadcast_object(f".tmp-{meta['samples_seen']}-{secrets.token_hex(4)}")
    files = _Files()
    name = None
    try:
        with _agreement(world):
            if world.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                for stale in folder.glob(".tmp-*"):
                    _remove(stale)
                aside.mkdir()
        with _agreement(world), _quiet():
            writer = dcp.FileSystemWriter(aside)
            writer.fs = files
            dcp.save(state, storage_writer=writer, process_group=world.control, no_dist=world.size == 1)
        written = world.gather_objects(files.written)
        with _agreement(world):
            if world.is_main:
                name = _publish(aside, meta, {k: v for rank in written for k, v in rank.items()})
    except CheckpointError as problem:
        if world.is_main:
            _remove(aside)
        sentence = (
            f"The checkpoint at {meta['samples_seen']} samples could not be written to {folder} ({problem}); "
            f"{_space(folder, state)}; {'earlier checkpoints are untouched' if _published(folder) else 'there is no earlier checkpoint'} and training can go on."
        )
        raise CheckpointError(world.broadcast_object(sentence)) from problem
    return folder / world.broadcast_object(name)


def _publish(aside: Path, meta: dict[str, Any], files: dict[str, dict[str, int]]) -> str:
    for name, expected in files.items():
        path = aside / name
        if not path.exists():
            raise OSError(f"{name}, written by another rank, is not there: do all nodes share this file system?")
        if path.stat().st_size != expected["size"]:
            raise OSError(f"{name} has {path.stat().st_size} bytes on disk of {expected['size']} written")
    # Through text once, so that what is sealed is exactly what will be read.
    content = json.loads(json.dumps({"format": FORMAT, "meta": meta, "files": files}))
    with (aside / MANIFEST).open("w") as f:
        json.dump({"crc32": _seal(content)} | content, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    sync_folder(aside)
    same = [p for p in _published(aside.parent) if _samples(p) == meta["samples_seen"]]
    again = f"-{_order(same[0])[1] + 1}" if same else ""
    final = aside.with_name(f"samples-{meta['samples_seen']:012d}{again}")
    os.rename(aside, final)
    sync_folder(final.parent)
    for replaced in same:
        with suppress(OSError):  # what is left of it is older than `final`, and falls to `retain`
            _discard(replaced)
    return final.name


class _Checksummed(io.FileIO):
    """A raw file that keeps size and crc32 of what is written to it, and the error that ended that."""

    size = crc32 = 0
    error: OSError | None = None

    def write(self, data) -> int:
        try:
            count = super().write(data)
        except OSError as e:
            self.error = e
            raise
        self.size += count
        self.crc32 = zlib.crc32(memoryview(data).cast("B")[:count], self.crc32)
        return count


class _Files(FileSystem):
    """DCP's files, with size and crc32 taken as they are written: nothing is read back, and what is recorded is what
    was meant, not what arrived."""

    def __init__(self):
        self.written: dict[str, dict[str, int]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        raw = _Checksummed(path, mode)
        try:
            with io.BufferedWriter(raw, 2**20) as stream:
                yield stream
        except Exception:
            if raw.error:  # torch.save hides "no space left" behind an error of its own
                raise raw.error from None
            raise
        self.written[Path(path).name] = {"size": raw.size, "crc32": raw.crc32}

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


# ------------------------------------------------------------------------------------------------ finding


def newest(
    folder: Path, world: World, *, verify: bool = True, warn: Callable[[str], None] = warnings.warn
) -> Path | None:
    """The newest valid checkpoint in `folder`, the same on all ranks; None if there is none.

    Each one passed over is told to `warn`, on rank 0, in a sentence with its name and what is wrong with it. Without
    `verify`, contents are not read: manifest and file sizes must do. Collective. Raises CheckpointError if the folder
    cannot be read.
    """
    for name in _names(folder, world):
        problem = flaw(folder / name, world, contents=verify)
        if problem is None:
            return folder / name
        if world.is_main:
            warn(f"The checkpoint {folder / name} is passed over: {problem}.")
    return None


def flaw(path: Path, world: World, *, contents: bool = True) -> str | None:
    """What is wrong with the checkpoint `path`, as a clause; None if it is whole. The ranks share out its files.

    Without `contents`, checksums are left alone. Collective.
    """
    manifest, problem = None, None
    if world.is_main:
        try:
            manifest = _manifest(path)
        except ValueError as e:
            problem = str(e)
    manifest, problem = world.broadcast_object((manifest, problem))
    if problem is None:
        mine = sorted(manifest["files"].items())[world.rank :: world.size]
        problem = next((p for name, expected in mine if (p := _file_flaw(path / name, expected, contents))), None)
    return next((p for p in world.gather_objects(problem) if p), None)


def _file_flaw(path: Path, expected: dict[str, int], contents: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{path.name} has {size} bytes, but was written with {expected['size']}"
        if contents and _file_crc32(path) != expected["crc32"]:
            return f"the checksum of {path.name} is wrong, its contents have changed since they were written"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as e:
        return f"{path.name} cannot be read ({e.strerror})"
    return None


def _file_crc32(path: Path) -> int:
    crc32, block = 0, memoryview(bytearray(2**22))
    with path.open("rb", buffering=0) as f:
        while count := f.readinto(block):
            crc32 = zlib.crc32(block[:count], crc32)
    return crc32


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; ValueError with a clause that says why there is none to trust."""
    try:
        content = json.loads((path / MANIFEST).read_bytes())
        sealed = content.pop("crc32")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"it has no {MANIFEST}, so it was not finished or is no checkpoint") from None
    except OSError as e:
        raise ValueError(f"its {MANIFEST} cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"its {MANIFEST} is damaged") from None
    if sealed != _seal(content):
        raise ValueError(f"its {MANIFEST} is damaged")
    if content["format"] != FORMAT:
        raise ValueError(f"it has format {content['format']}, but this version reads format {FORMAT}")
    return content


def _seal(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


# ------------------------------------------------------------------------------------------------ reading


def read_meta(path: Path) -> dict[str, Any]:
    """The `meta` a checkpoint was saved with. Local, reads no tensor. Raises CheckpointError if `path` is none."""
    try:
        return _manifest(path)["meta"]
    except ValueError as e:
        inside = [*_published(path), *_published(path / "checkpoints")]
        hint = f"did you mean {inside[0]}?" if inside else "choose another."
        raise CheckpointError(f"{path} cannot be used as a checkpoint: {e}; {hint}") from None


def contents(path: Path) -> dict[str, tuple[str, torch.Size, int]]:
    """Name -> (dtype, shape, bytes in the files) of each tensor. Local, reads no tensor. Raises CheckpointError."""
    reader, nbytes = _reader(path), {}
    for index, stored in reader.metadata.storage_data.items():
        nbytes[index.fqn] = nbytes.get(index.fqn, 0) + stored.length
    held = reader.metadata.state_dict_metadata
    return {k: (str(v.properties.dtype).removeprefix("torch."), v.size, nbytes.get(k, 0)) for k, v in held.items()}


def load(path: Path, state: State, world: World, *, only: str | tuple[str, ...] = "") -> int:
    """Fill the tensors of `state`, those whose name begins with `only`, in place from the checkpoint `path`.

    Returns the bytes this rank has read.

    Names, shapes and dtypes must be those of the checkpoint, which is settled before any tensor is read; each rank
    reads what its shards need. Contents are not verified here: `newest` has, `flaw` does. Collective. Raises
    CheckpointError on all ranks; after one that says "could not be read" the tensors are not to be used.
    """
    wanted = {k: v for k, v in state.items() if k.startswith(only)}
    with _agreement(world):
        reader = must_fit(path, wanted, only=only)
    try:
        with _agreement(world), _quiet():
            dcp.load(wanted, storage_reader=reader, process_group=world.control, no_dist=world.size == 1)
    except CheckpointError as problem:
        error = CheckpointError(f"{path} could not be read ({problem}); choose another.")
        error.may_pass = True
        raise error from problem
    return reader.nbytes


def must_fit(path: Path, state: State, *, only: str | tuple[str, ...] = "") -> _Reader:
    """A reader of the checkpoint `path`, whose tensors under `only` have the names, shapes and dtypes of `state` (which
    may be on the meta device). Local, reads no tensor. Raises CheckpointError."""
    read_meta(path)
    reader = _reader(path)
    if difference := _difference(path, state, reader.metadata, only):
        raise CheckpointError(difference)
    return reader


def _reader(path: Path) -> _Reader:
    try:
        return _Reader(path)
    except Exception as e:
        raise CheckpointError(f"{path} could not be read ({type(e).__name__}: {e}); choose another.") from e


class _Reader(dcp.FileSystemReader):
    """Reads DCP's metadata, large on many ranks, once, and counts what else is read."""

    nbytes = 0

    def __init__(self, path: Path):
        super().__init__(path)
        with (path / ".metadata").open("rb") as file:
            self.metadata = _Unpickler(file).load()
        self.metadata.storage_meta = self.metadata.storage_meta or StorageMeta()

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        self.nbytes += sum(self.storage_data[item.storage_index].length for item in plan.items)
        return super().read_data(plan, planner)

    def read_metadata(self) -> Metadata:
        return self.metadata


class _Unpickler(pickle.Unpickler):
    """DCP keeps its metadata as a pickle, and a checkpoint may come from anywhere: this reads metadata and runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _HARMLESS.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)


_HARMLESS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}  # fmt: skip


def _difference(path: Path, wanted: State, metadata: Metadata, only: str | tuple[str, ...]) -> str | None:
    """A sentence on the first tensor that differs between the run and the checkpoint."""

    def form(dtype: torch.dtype, size: torch.Size) -> str:
        return f"{str(dtype).removeprefix('torch.')} {list(size)}"

    held = {k: v for k, v in metadata.state_dict_metadata.items() if k.startswith(only)}
    here = {k: form(v.dtype, v.shape) for k, v in wanted.items()}
    there = {k: form(v.properties.dtype, v.size) for k, v in held.items()}
    if not here and not there:
        return f"{path} holds nothing under {only!r}."
    for key in sorted(here | there):
        if here.get(key) != there.get(key):
            kind = "is of another architecture" if key.startswith("model/") else "does not fit this recipe"
            return (
                f"{path} {kind}: {key} is {there.get(key, 'absent')} in the checkpoint and "
                f"{here.get(key, 'absent')} in this run; choose the recipe that wrote it, or another checkpoint."
            )
    return None


# ------------------------------------------------------------------------------------------------ keeping few


def retain(folder: Path, keep_last: int, keep_every_samples: int, world: World) -> None:
    """Delete checkpoints, but not the newest `keep_last`, nor the first at or past each multiple of
    `keep_every_samples` (0 = none), nor the newest valid one, which is verified before anything goes.

    Collective. Raises CheckpointError on all ranks if one cannot be deleted.
    """
    names = _names(folder, world)
    milestones: dict[int, str] = {}
    for name in names if keep_every_samples else ():  # newest first: the oldest of each interval is set last
        milestones[_samples(Path(name)) // keep_every_samples] = name
    milestones.pop(0, None)
    old = [name for name in names[keep_last:] if name not in milestones.values()]
    if not old or (valid := newest(folder, world, warn=lambda _: None)) is None:
        return
    with _agreement(world):
        if world.is_main:
            for name in old:
                if name != valid.name:
                    _discard(folder / name)


def _discard(path: Path) -> None:
    """Delete a checkpoint; killed in between, it leaves none that is half there under a valid name."""
    waste = path.with_name(f".tmp-old-{secrets.token_hex(4)}")
    os.rename(path, waste)
    sync_folder(path.parent)
    _remove(waste)


# ------------------------------------------------------------------------------------------------ small parts


@contextmanager
def _agreement(world: World) -> Iterator[None]:
    """The body succeeds on all ranks, or CheckpointError with the first rank's problem is raised on all. Collective."""
    error: BaseException | None = None
    try:
        yield
    except CheckpointException as e:  # DCP's, and no Exception: what each rank raised is in it
        error = e.failures[min(e.failures)][0]
    except Exception as e:
        error = e
    if problem := world.first_problem(error):
        raise CheckpointError(problem.removeprefix("CheckpointError: ")) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's remark that a world of one saves in a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _order(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    return int(match[1]), int(match[2] or 1)


def _samples(path: Path) -> int:
    return _order(path)[0]


def _published(folder: Path) -> list[Path]:
    """What bears a checkpoint's name, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=_order, reverse=True)


def _names(folder: Path, world: World) -> list[str]:
    """Rank 0's view of `_published`, on all ranks."""
    names: list[str] = []
    with _agreement(world):
        if world.is_main:
            names = [p.name for p in _published(folder)]
    return world.broadcast_object(names)


def _remove(path: Path) -> None:
    """As far as possible; what is left keeps its .tmp- name."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _space(folder: Path, state: State) -> str:
    needed = sum(t.numel() * t.element_size() for t in state.values()) / 2**20
    try:
        free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free / 2**20
    except OSError:
        return f"{needed:.1f} MiB are needed"
    return f"{free:.1f} MiB are free there and {needed:.1f} MiB are needed"
