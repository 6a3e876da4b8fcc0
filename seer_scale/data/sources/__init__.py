"""Where images come from: a folder tree, a list file, WebDataset tars, here or behind URLs, data sets of Hugging Face's
library, a manifest of these. Each gives image i as bytes at random; only a stream does not.

A source is a few numpy arrays (one blob of names with offsets, positions) or files that are read by parts, so ten
million images are not ten million Python objects and forked loader workers share them. Labels serve evaluation only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from seer_scale.config import Data
from seer_scale.data.sources import hub, remote
from seer_scale.data.sources.base import Source, Stream, Subset, is_image, is_tar, must_exist, subset, unlistable
from seer_scale.data.sources.files import folder, is_file, is_folder, is_of_runs
from seer_scale.data.sources.left_out import is_hidden
from seer_scale.data.sources.lists import ListFile
from seer_scale.data.sources.manifest import MANIFEST_SUFFIXES, open_manifest
from seer_scale.data.sources.tar_paths import is_several
from seer_scale.data.sources.tars import open_tars
from seer_scale.errors import NOTHING, DataError, Problem, nearest

__all__ = ["SOURCE_KINDS", "Source", "Stream", "Subset", "kind_of", "open_data", "open_source", "subset"]

OPENERS: dict[str, Callable[[str], Source]] = {"list": ListFile, "tar": open_tars}
SOURCE_KINDS = ("auto", "folder", *OPENERS, "hub", "stream", "manifest")
LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".list")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


def open_source(
    path: str, kind: str = "auto", *, split: str = "train", image_key: str = "", length: int = 0, buffer: int = 10_000,
    exclude: Sequence[str] = (),
) -> Source:  # fmt: skip
    """The images at `path`: a folder tree, a list file, a tar, a folder of tars, a glob, a range in braces or a comma
    list of tars, a manifest, or a data set as hub.py takes it, which alone reads the other arguments, but for
    `exclude`, which is a folder tree's (files.folder). All but the folder tree may be URLs.

    Raises DataError when there is no image to read, saying what was looked for.
    """
    if kind not in SOURCE_KINDS:
        raise DataError(Problem("data.kind", kind, "no source is of that kind", nearest(kind, SOURCE_KINDS)))
    if not path:
        raise DataError(Problem("data.path", NOTHING, "is empty", "give a folder of images, a list file or tars"))
    kind = kind_of(path) if kind == "auto" else kind
    if kind in ("list", "manifest") and not remote.is_url(path) and os.path.isdir(path):
        rule = f"wants a file, and {path} is a folder"
        raise DataError(Problem("data.kind", kind, rule, "leave it out, or give folder or tar"))
    if kind == "hub":
        return hub.open_hub(path, split, image_key)
    if kind == "stream":
        return hub.open_hub_stream(path, split, image_key, length, buffer)
    if kind == "folder":
        return folder(path, exclude)
    if kind == "manifest":
        return open_manifest(path, open_source)
    return OPENERS[kind](path)


def open_data(data: Data) -> Source:
    """What a recipe's data section names. Raises DataError."""
    return open_source(
        data.path, data.kind, split=data.split, image_key=data.image_key, length=data.length, buffer=data.buffer,
        exclude=data.exclude,
    )  # fmt: skip


def kind_of(path: str) -> str:
    """Which kind of source a path is; lists no images and asks no server. Raises DataError where it is none."""
    is_url = remote.is_url(path)
    if not is_url and hub.looks_like_hub(path):
        return "hub"
    if not os.path.exists(path) and is_several(path):
        return "tar"
    if not is_url:
        must_exist(path)
    if not os.path.isdir(path):
        name = path.partition("?")[0].lower() if is_url else path.lower()
        if is_tar(name) or is_url and name.endswith("/"):
            return "tar"
        if name.endswith(COMPRESSED):
            rule = "is compressed, so no image can be read alone"
            raise DataError(Problem(path, NOTHING, rule, "unpack it to .tar files or a folder"))
        if name.endswith(MANIFEST_SUFFIXES) and not is_url:
            return "manifest"
        if is_image(name):
            raise DataError(Problem(path, NOTHING, "is a single image", "give its folder, or a list file"))
        if is_url and not name.endswith(LIST_SUFFIXES):
            lists = ", ".join(LIST_SUFFIXES)
            rule = f"ends neither like tars (.tar, or / for a folder of them) nor like a list of images ({lists})"
            raise DataError(Problem(path, NOTHING, rule, "say what is meant by data.kind tar or data.kind list"))
        return "list"
    try:
        with os.scandir(path) as found:
            entries = [e for e in found if not is_hidden(e.name)]
    except OSError as error:
        raise unlistable(path, error) from error
    if not any(is_tar(e.name) for e in entries):
        return "folder"
    folders = (e.name for e in entries if is_folder(e) and not is_of_runs(e.path))
    other = next(folders, None) or next((e.name for e in entries if is_image(e.name) and is_file(e)), None)
    if other:
        rule = f"holds tars and also {other}"
        raise DataError(Problem(path, NOTHING, rule, "say what is meant by data.kind tar or data.kind folder"))
    return "tar"
