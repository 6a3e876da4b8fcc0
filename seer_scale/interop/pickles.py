"""The tensors in a file that `torch.save` wrote, without running anything that is in it.

A pickle is a program, and a published file is hostile until shown otherwise. This reader knows the few words that make
tensors and plain containers; whatever else a pickle names (a config's class, numpy's scalars, os.system) becomes an
`Inert` value, which is never imported, called or given a state. torch's own `weights_only` refuses a whole file for one
such class, and VISSL's files keep configurations beside their weights.

Nothing is allocated by what a file claims: each storage must lie in the file, each tensor in its storage, and tensors
are mapped, so that a file of 40 GB is read as far as it is used.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from seer_scale.errors import NOTHING, Problem, UserError, missing_path

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""What a file begins with that torch wrote before 1.6."""
MAX_PICKLE_BYTES = 256 << 20
"""Of the program alone: that of the largest published file has a hundredth of this."""
_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip


OTHER_TYPE = "it has a tensor of another type than float64, float32, float16, bfloat16, int64 to int8, uint8 and bool"


class Inert(dict):
    """Whatever a pickle names beside tensors and containers. Items that it is given it keeps; it does nothing."""

    def append(self, item: object) -> None:
        """As a list's, for what pickles of lists of another class do."""

    def extend(self, items: object) -> None:
        """As `append`."""


@dataclass
class _Storage:
    """Elements of one type in the file. array: set once it is known where they lie."""

    dtype: torch.dtype
    numel: int
    key: str
    array: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file; `read` gives it."""

    storage: _Storage
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def read_run(self, start: int, stop: int) -> Tensor:
        """Of a vector that lies in one piece, a copy of these elements."""
        assert self.stride == (1,) and stop <= self.shape[0], "no vector in one piece"
        return StoredTensor(self.storage, self.offset + start, torch.Size([stop - start]), (1,)).read()

    def read(self) -> Tensor:
        """A contiguous copy, on the CPU."""
        array = self.storage.array
        assert array is not None, "every storage was found before the reader returned"
        if not self.shape.numel():
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.from_numpy(array).view(self.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


class _Refused(Exception):
    """What a file does that none does which torch.save wrote: a clause."""


ZIP = b"PK\x03\x04"
"""What a zip file begins with."""


def read_pickle(path: Path) -> Any:
    """The object in a file of torch.save: dicts, lists, tuples, numbers, texts, `StoredTensor`s, and `Inert` for all
    else. Raises UserError for what is none, what is cut off, and what claims what it does not hold."""
    fix, begin = "fetch it again, or another", b""
    try:
        with path.open("rb") as file:
            begin = file.read(4)
            file.seek(0)
            return _read_zip(path, file) if begin == ZIP else _read_legacy(path, file)
    except FileNotFoundError:
        raise UserError(missing_path(path)) from None
    except OSError as error:
        raise UserError(Problem(str(path), NOTHING, f"cannot be read ({error.strerror or error})")) from None
    except _Refused as error:
        rule = f"is no file of weights that can be trusted: {error}"
    except Exception as error:  # a damaged program fails anywhere
        rule = f"is no whole file of torch.save ({type(error).__name__}: {error})"
        if begin != ZIP and begin[:1] != pickle.PROTO:
            rule, fix = "is no file of weights", "give one of torch.save or safetensors"
    raise UserError(Problem(str(path), NOTHING, rule, fix))


# ------------------------------------------------------------------------------------------------ the two file formats


def _read_zip(path: Path, file: BinaryIO) -> Any:
    """archive/data.pkl, and archive/data/KEY for each storage; nothing compressed, as what is might be a bomb."""
    size = path.stat().st_size
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused("it has no data.pkl")
        prefix = pickles[0].removesuffix("data.pkl")
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise _Refused("it is compressed")
        if f"{prefix}byteorder" in entries and archive.read(f"{prefix}byteorder") != b"little":
            raise _Refused("it was written by a big-endian machine")
        if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise _Refused("its program is too long")
        loaded = _Unpickler(io.BytesIO(archive.read(pickles[0])), _zip_id)
        found = loaded.load()
    for storage in loaded.storages.values():
        info = entries.get(f"{prefix}data/{storage.key}")
        if info is None:
            raise _Refused(f"it lacks the tensor data {storage.key}")
        file.seek(info.header_offset)
        header = file.read(30)
        begin = (
            info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        if header[:4] != ZIP or info.file_size != storage.nbytes or begin + storage.nbytes > size:
            raise _Refused(f"the tensor data {storage.key} claims {storage.nbytes:,} bytes that are not there")
        storage.array = _mapped(path, begin, storage.nbytes)
    return found


def _read_legacy(path: Path, file: BinaryIO) -> Any:
    """Pickles of a magic number, a version, the writer's machine, the object, the keys of storages; then those."""
    size = path.stat().st_size
    limited = _Limited(file)
    if _Unpickler(limited, _no_id).load() != LEGACY_MAGIC or _Unpickler(limited, _no_id).load() != LEGACY_PROTOCOL:
        raise _Refused("it does not begin as such files do")
    machine = _Unpickler(limited, _no_id).load()
    if not isinstance(machine, Mapping) or machine.get("little_endian") is not True:
        raise _Refused("it was written by a big-endian machine")
    loaded = _Unpickler(limited, _legacy_id)
    found = loaded.load()
    keys = _Unpickler(limited, _no_id).load()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(loaded.storages):
        raise _Refused("it lists other tensor data than its tensors are of")
    for key in keys:
        storage = loaded.storages[str(key)]
        numel, begin = int.from_bytes(file.read(8), "little"), file.tell()
        if numel != storage.numel or begin + storage.nbytes > size:
            raise _Refused(f"the tensor data {storage.key} claims {storage.nbytes:,} bytes that are not there")
        storage.array = _mapped(path, begin, storage.nbytes)
        file.seek(begin + storage.nbytes)
    return found


class _Limited:
    """A file of which pickles may read so much and no more."""

    def __init__(self, file: BinaryIO):
        self.file, self.left = file, MAX_PICKLE_BYTES

    def read(self, size: int) -> bytes:
        self._count(size)
        return self.file.read(size)

    def readline(self) -> bytes:
        line = self.file.readline(1 << 16)
        self._count(len(line))
        return line

    def _count(self, size: int) -> None:
        self.left -= size
        if size < 0 or self.left < 0:
            raise _Refused("its program is too long")


def _mapped(path: Path, begin: int, nbytes: int) -> np.ndarray:
    """Copied where it is written to, which nobody does."""
    return np.memmap(path, np.uint8, "c", begin, nbytes) if nbytes else np.empty(0, np.uint8)


# ------------------------------------------------------------------------------------------------ the program


def _zip_id(words: Any) -> tuple[torch.dtype, str, int]:
    kind, dtype, key, _, numel = words
    return _storage_id(kind, dtype, key, numel)


def _legacy_id(words: Any) -> tuple[torch.dtype, str, int]:
    kind, dtype, key, _, numel, view = words
    if view is not None:
        raise _Refused("it has views of storages, as torch has not written since 0.4")
    return _storage_id(kind, dtype, key, numel)


def _storage_id(kind: Any, dtype: Any, key: Any, numel: Any) -> tuple[torch.dtype, str, int]:
    if kind == "storage" and not isinstance(dtype, torch.dtype):
        raise _Refused(OTHER_TYPE)
    if kind != "storage" or not isinstance(key, str) or not _is_count(numel):
        raise _Refused("it refers to something that is no tensor data")
    return dtype, key, numel


def _no_id(words: Any) -> tuple[torch.dtype, str, int]:
    raise _Refused("it has tensors where none belong")


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 62


class _Maker:
    """A word that a pickle may call: of tensors and plain containers."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]):
        self.make = make


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """torch._utils._rebuild_tensor and _v2. A tensor lies in its storage, and holds no element twice: else a file of
    few bytes would claim any memory."""
    if not isinstance(storage, _Storage) or not _is_count(offset):
        raise _Refused("it has a tensor of no tensor data")
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise _Refused("it has a tensor of no shape")
    if not all(map(_is_count, (*shape, *stride))):
        raise _Refused("it has a tensor of a shape that cannot be")
    numel = 1
    for n in shape:
        numel *= n
    if numel and (
        offset + sum((n - 1) * step for n, step in zip(shape, stride)) >= storage.numel or numel > storage.numel
    ):
        raise _Refused(f"it has a tensor of shape {list(shape)} that reaches beyond its data of {storage.numel:,}")
    return StoredTensor(storage, offset, torch.Size(shape), stride)


def _first(tensor: Any = None, *_: Any) -> Any:
    """torch._utils._rebuild_parameter, of (data, requires_grad, hooks)."""
    return tensor


def _dict(*args: Any) -> Any:
    """collections.OrderedDict() and, as pickles of old have it, OrderedDict([[key, value], ...])."""
    return {key: value for key, value in (args[0] if args else ()) if isinstance(key, str | int)}


def _of_other_type(*_: Any) -> Any:
    """torch._utils._rebuild_tensor_v3, by which torch writes tensors of the types that no storage is named after."""
    raise _Refused(OTHER_TYPE)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _Maker(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Maker(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Maker(_of_other_type),
    ("torch._utils", "_rebuild_parameter"): _Maker(_first),
    ("torch._utils", "_rebuild_parameter_with_state"): _Maker(_first),
    ("torch", "Size"): _Maker(lambda shape=(): tuple(shape)),
    ("collections", "OrderedDict"): _Maker(_dict),
    ("collections", "defaultdict"): _Maker(lambda *_: {}),
} | {(module, name): dtype for module in ("torch", "torch.storage") for name, dtype in _DTYPES.items()}


class _Unpickler(pickle._Unpickler):
    """The pure Python one, whose every instruction that could call something, or allocate what is not there, is
    replaced."""

    stack: list[Any]  # typeshed leaves out what the instructions work on
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    readline: Callable[[], bytes]

    def __init__(self, file: Any, storage_id: Callable[[Any], tuple[torch.dtype, str, int]]):
        super().__init__(file, encoding="latin-1")
        self.storages: dict[str, _Storage] = {}
        self._storage_id = storage_id

    def find_class(self, module: str, name: str) -> Any:
        return _ALLOWED.get((module, name)) or _Maker(lambda *_: Inert())

    def get_extension(self, code: int) -> None:
        raise _Refused("it names classes by numbers")

    def persistent_load(self, words: Any) -> _Storage:
        if not isinstance(words, tuple):
            raise _Refused("it refers to something that is no tensor data")
        dtype, key, numel = self._storage_id(words)
        storage = self.storages.setdefault(key, _Storage(dtype, numel, key))
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise _Refused(f"it describes the tensor data {key} in two ways")
        return storage

    def _reduce(self) -> None:
        args, called = self.stack.pop(), self.stack[-1]
        is_word = isinstance(called, _Maker) and isinstance(args, tuple)
        self.stack[-1] = called.make(*args) if is_word else Inert()

    def _make(self) -> None:
        """NEWOBJ: of the allowed words only a dict's is a class."""
        self._reduce()

    def _make_with_keys(self) -> None:
        self.stack.pop()
        self._make()

    def _inert_of_mark(self) -> None:
        self.pop_mark()
        self.append(Inert())

    def _inert_instance(self) -> None:
        self.readline()
        self.readline()
        self._inert_of_mark()

    def _no_state(self) -> None:
        self.stack.pop()

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):  # other keys, which hashing could be made to take for ever, are of no use
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update({key: value for key, value in pairs if isinstance(key, str | int)})

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_several(self) -> None:
        self._set_items(self.pop_mark())

    def _inert_set(self) -> None:
        self.append(Inert())

    def _drop_items(self) -> None:
        self.pop_mark()

    def _dict_of_mark(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _no_bytearray(self) -> None:
        raise _Refused("it allocates bytes")

    dispatch: ClassVar[Any] = pickle._Unpickler.dispatch | {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _make,
        pickle.NEWOBJ_EX[0]: _make_with_keys,
        pickle.INST[0]: _inert_instance,
        pickle.OBJ[0]: _inert_of_mark,
        pickle.BUILD[0]: _no_state,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_several,
        pickle.DICT[0]: _dict_of_mark,
        pickle.EMPTY_SET[0]: _inert_set,
        pickle.ADDITEMS[0]: _drop_items,
        pickle.FROZENSET[0]: _inert_of_mark,
        pickle.BYTEARRAY8[0]: _no_bytearray,
    }
