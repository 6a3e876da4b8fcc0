"""Where images come from: a folder tree, a list file, or WebDataset tars; each gives image i as bytes at random.

A source is a few numpy arrays (one blob of names with offsets, positions, labels) or a mapped file, so ten million
images are not ten million Python objects and forked loader workers share them. Labels serve evaluation only.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

from seer_scale.data.sources.base import Source, is_image, subset
from seer_scale.data.sources.files import folder
from seer_scale.data.sources.lists import ListFile
from seer_scale.data.sources.tars import Tars
from seer_scale.errors import DataError, nearest

__all__ = ["KINDS", "Source", "kind_of", "open_source", "subset"]

KINDS = ("auto", "folder", "list", "tar")


def open_source(path: str, kind: str = "auto") -> Source:
    """The images at `path`: a folder tree, a list file, a tar, a folder of tars, or a glob or comma list of tars.

    Raises DataError when there is no image to read, saying what was looked for.
    """
    if kind not in KINDS:
        raise DataError(f"data.kind is {kind!r}, but must be one of {', '.join(KINDS)}; {nearest(kind, KINDS)}")
    if not path:
        raise DataError("data.path is empty: give a folder of images, a list file or tars.")
    kind = kind_of(path) if kind == "auto" else kind
    if kind == "tar":
        return Tars(_tar_paths(path))
    must_exist(path)
    return folder(path) if kind == "folder" else ListFile(path)


def kind_of(path: str) -> str:
    """Which kind of source a path is; lists no images. Raises DataError where it is none."""
    if not os.path.exists(path) and (glob.has_magic(path) or "," in path):
        return "tar"
    must_exist(path)
    if not os.path.isdir(path):
        if path.lower().endswith(".tar"):
            return "tar"
        if path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")):
            raise DataError(
                f"{path} is compressed, so no image can be read alone; unpack it to .tar files or a folder."
            )
        if is_image(path):
            raise DataError(f"{path} is a single image; give its folder, or a list file.")
        return "list"
    entries = list(os.scandir(path))
    if not any(e.name.endswith(".tar") for e in entries):
        return "folder"
    other = next((e.name for e in entries if is_image(e.name) or (e.is_dir() and not e.name.startswith("."))), None)
    if other:
        raise DataError(f"{path} holds tars and also {other}; say what is meant by data.kind tar or data.kind folder.")
    return "tar"


def _tar_paths(path: str) -> list[str]:
    """The tars that a path, a folder, a glob or a comma list of these means, each once, in order."""
    paths: list[str] = []
    for part in [path] if os.path.exists(path) else path.split(","):
        part = part.strip()
        if os.path.isdir(part):
            found = sorted(glob.glob(os.path.join(glob.escape(part), "*.tar")))
        elif os.path.exists(part) or not glob.has_magic(part):
            must_exist(part)
            found = [part]
        else:
            found = sorted(_matches(part))
        if not found:
            raise DataError(f"{part} holds no .tar file; give a folder of tars, or a glob such as shards/*.tar.")
        paths += found
    return list(dict.fromkeys(paths))


def _matches(pattern: str) -> list[str]:
    """What a glob matches; the folders at its beginning that exist as written are meant so, brackets and all."""
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return glob.glob(glob.escape(folder) + pattern[len(folder) :])


def must_exist(path: str) -> None:
    if os.path.exists(path):
        return
    missing = Path(path)
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    try:
        close = nearest(missing.name, os.listdir(missing.parent))
    except OSError:
        close = ""
    if close.startswith("did"):
        hint = f"did you mean {missing.parent / close.removeprefix('did you mean ')}"
    else:
        hint = f"the nearest folder there is: {missing.parent.absolute()}."
    raise DataError(f"{path} does not exist; {hint}")
