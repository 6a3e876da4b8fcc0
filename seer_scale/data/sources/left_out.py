"""What a source holds and does not read, counted by kind, and what would read it: nothing is passed over in silence."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from seer_scale.extras import how_to_install

HIDDEN, UNLISTABLE, EXCLUDED = "hidden", "folders that cannot be listed", "excluded"
TOO_DEEP = "folders whose paths are too long for the system"
RUN_FOLDERS = "folders of runs"
UNKNOWN_MEMBERS = "tar members of a type that is not known"
DANGLING_LINKS, SPECIAL = "links that lead nowhere", "pipes, sockets or devices"
LINKS, SPARSE, SECOND, NO_END = "links in tars", "sparse members", "further images of a key", "tars without an end mark"
HEADERS, COMMENTS, FURTHER_COLUMNS = "header lines", "lines that begin with #", "lines with further columns"
NO_SUFFIX, OTHER = "files without a suffix", "other files"
HIDDEN_MEMBERS, NO_SUFFIX_MEMBERS = "hidden members of tars", "members of tars without a suffix"
"""No list can name a tar's members."""
ONE = {
    TOO_DEEP: "folder whose path is too long for the system", RUN_FOLDERS: "folder of a run",
    DANGLING_LINKS: "link that leads nowhere", SPECIAL: "pipe, socket or device", COMMENTS: "line that begins with #",
}  # fmt: skip
"""What one of a kind is called, where that is more than its noun without an s."""
SUFFIXES_OF = {
    "HEIF images": (".heic", ".heif", ".hif"),
    "camera raw images": (".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    "other images": (".jxl", ".svg", ".psd", ".exr", ".hdr", ".tga", ".dds", ".ico", ".pcx", ".npy", ".jxr", ".dcm"),
    "tars": (".tar",),
    "archives": (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"),
    "Parquet or Arrow files": (".parquet", ".arrow"),
}
"""The first kind that has a suffix counts."""
ADVICE = {
    HIDDEN: "data.kind list reads what a list names",
    UNLISTABLE: "make them readable",
    TOO_DEEP: "move what is in them further up",
    RUN_FOLDERS: "the pictures in them are their own",
    DANGLING_LINKS: "",
    SPECIAL: "no regular files",
    EXCLUDED: "by data.exclude",
    LINKS: "they are never followed; store the images themselves",
    UNKNOWN_MEMBERS: "store them as regular files",
    SPARSE: "pack them as whole files (tar without --sparse)",
    SECOND: "of each key one image is read, as WebDataset does",
    NO_END: "read as far as it goes; it may have been cut between two members",
    HEADERS: "a first line of column names, and no file",
    COMMENTS: "they name no file",
    FURTHER_COLUMNS: "a path and a label are read",
    "HEIF images": f"{how_to_install('pillow_heif')} reads them",
    "camera raw images": "develop them to JPEG or TIFF",
    "other images": "convert them to JPEG or PNG",
    "tars": "data.kind tar reads them",
    "archives": "unpack them",
    "Parquet or Arrow files": "data.kind hub reads them",
    NO_SUFFIX: "data.kind list reads images whatever they are called",
    HIDDEN_MEMBERS: "store them under names that begin with no dot",
    NO_SUFFIX_MEMBERS: "store them with a suffix, such as .jpg",
}
LEFT_OUT_KINDS = (*ADVICE, OTHER)
"""In a fixed order, which indexes of tars rely on."""
_KIND_OF = {suffix: kind for kind, suffixes in reversed(SUFFIXES_OF.items()) for suffix in suffixes}
SERVICE_FOLDERS = frozenset(
    {"@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "#recycle", "#snapshot"}
)
"""What systems put beside images without a dot before the name."""
OF_A_RUN = (frozenset({".lock", "logs"}), frozenset({"config.yaml", "metrics.jsonl"}))
"""What lies in the folder of a run from its first moment on; and where a copy has lost what is hidden."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name, without its folder, is not meant to be seen."""
    return name.startswith(".") or name in SERVICE_FOLDERS


def is_run(names: Collection[str]) -> bool:
    """Whether a folder that holds things of these names is that of a run, in which lie pictures of its images."""
    return any(marks.issubset(names) for marks in OF_A_RUN)


def kind_of(name: str) -> str:
    """The kind of a file that is not read."""
    base, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return _KIND_OF.get(f".{suffix.lower()}", OTHER) if dot and base else NO_SUFFIX


def described(left_out: Mapping[str, int]) -> str:
    """In words, the most first: "12 HEIF images (pip install ... reads them), 3 hidden"; empty where there is none."""
    counts = sorted(((left_out.get(kind, 0), kind) for kind in LEFT_OUT_KINDS), key=lambda c: -c[0])
    return ", ".join(f"{_named(n, kind)}{f' ({ADVICE[kind]})' if ADVICE.get(kind) else ''}" for n, kind in counts if n)


def _named(num: int, kind: str) -> str:
    if num == 1:
        kind = ONE.get(kind) or re.sub(r"\b(image|file|folder|link|member|tar|archive|line)s\b", r"\1", kind, count=1)
    return f"{num:,} {kind}"


def warning(left_out: Mapping[str, int]) -> str:
    """A sentence on what is left out; empty where nothing is."""
    words = described(left_out)
    return f"Left out: {words}." if words else ""
