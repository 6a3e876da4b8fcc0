"""What a run's images are, from its first sample on: which source, in which order, and how a refresh changes both."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from seer_scale.config import Config
from seer_scale.data.sampling.order import permute
from seer_scale.data.sampling.sampler import DataVersion, ElasticSampler, needed
from seer_scale.data.sources import Source, Subset, open_data, open_source, subset
from seer_scale.data.sources.manifest import MANIFEST_SUFFIXES, ConcatSource, Part, absolute, read_manifest
from seer_scale.errors import NOTHING, DataError, Problem, UserError
from seer_scale.formatting import counted

MANIFESTS = "manifests"
"""The folder, in a run's, of those that a refresh gave it."""
ANOTHER_RUN = "start another run.dir with checkpoint.init_from"
DRAW = -1
"""In the place of an epoch's number: the order in which data.max_images takes images, which no epoch has."""


class DataHistory:
    """The versions of a run's data, the source of the one that holds now, and the sampler over them."""

    def __init__(self, source: Source, versions: Sequence[DataVersion], refreshes: int, config: Config):
        self.source, self.refreshes, self._config = source, refreshes, config
        self.sampler = ElasticSampler(versions, config.run.seed, config.train.global_batch)

    @property
    def versions(self) -> tuple[DataVersion, ...]:
        return self.sampler.versions

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "versions": [asdict(e) for e in self.versions],
            "refreshes": self.refreshes,
            "buffer": self.source.buffer,
            **({"drawn_from": len(self.source.whole)} if isinstance(self.source, Subset) else {}),
        }

    def refreshed(self, source: Source, number: int, samples_seen: int) -> DataHistory:
        """The data history from `samples_seen` on, over `source`. Raises DataError for a part that changed its size, or
        where the run takes some of its images only."""
        if self._config.data.max_images:
            raise DataError(_never_refreshed(self._config.data.max_images))
        parts, block, interleave = _reading(source, self._config)
        _check_sizes(dict(self.versions[-1].parts), parts)
        version = self.sampler.next_version(samples_seen, parts, block, interleave)
        return DataHistory(source, needed((*self.versions, version)), number, self._config)


def training_images(config: Config) -> Source:
    """The images of data.path, or data.max_images of them: the first of an order that follows run.seed, so that the
    more hold the fewer, in the order in which they lie. Raises UserError."""
    source, most = open_data(config.data), config.data.max_images
    if not most:
        return source
    if most > len(source):
        rule = f"{config.data.path} has {counted(len(source), 'image')}"
        raise UserError(Problem("data.max_images", most, rule, len(source)))
    return subset(source, np.sort(permute(np.arange(most), len(source), config.run.seed, DRAW)))


def _never_refreshed(most: int) -> Problem:
    return Problem("data.max_images", most, "a run on some of its images takes no others by a refresh", ANOTHER_RUN)


def open_data_history(config: Config, run_dir: Path, saved: dict[str, Any] | None) -> DataHistory:
    """The data history of a new run, or of one that goes on from a checkpoint's `saved` state. Raises UserError."""
    if saved is None:
        source = training_images(config)
        return DataHistory(source, [DataVersion(0, *_reading(source, config))], 0, config)
    versions = [DataVersion(**{**e, "parts": tuple(map(tuple, e["parts"]))}) for e in saved["versions"]]
    number, now = saved["refreshes"], versions[-1]
    if number and config.data.max_images:
        raise UserError(_never_refreshed(config.data.max_images))
    source = open_source(str(manifest_of(run_dir, number))) if number else training_images(config)
    drawn_from = len(source.whole) if isinstance(source, Subset) else None
    if (before := saved.get("drawn_from")) != drawn_from or drawn_from and len(source) != now.n:
        had = f"{now.n:,} drawn from {before:,}" if before else f"all {now.n:,}"
        has = f"now it would take {len(source):,} of {drawn_from:,}" if drawn_from else "now it would take all"
        rule = f"this run's checkpoint was trained on {had} images, and {has}"
        fix = f"give {now.n if before else 0} and the same images, or {ANOTHER_RUN}"
        raise UserError(Problem("data.max_images", config.data.max_images, rule, fix))
    what = f"manifest {number} of {run_dir}" if number else "data.path"
    if len(source) != now.n:
        raise UserError(
            Problem(
                what,
                NOTHING,
                f"has {len(source):,} images, but this run's checkpoint was trained on {now.n:,}, and their order "
                "depends on the number",
                f"bring the same images, add others by seer-scale data refresh, or {ANOTHER_RUN}",
            )
        )
    if config.data.block and _reading(source, config)[1] != now.block:
        raise UserError(
            Problem(
                "data.block",
                config.data.block,
                f"this run reads its images in blocks of {now.block}, which their order follows",
                f"give {now.block} or 0, or {ANOTHER_RUN}",
            )
        )
    if bool(source.buffer) != bool(saved.get("buffer", source.buffer)):
        one, other = ("by number", "as a stream") if source.buffer else ("as a stream", "by number")
        raise UserError(
            Problem(
                "data.kind",
                config.data.kind,
                f"data.path is read {other} by it, and this run has read its images {one}",
                f"give it as before, or {ANOTHER_RUN}",
            )
        )
    if source.buffer != (before := saved.get("buffer", source.buffer)):  # older checkpoints do not say
        raise UserError(
            Problem(
                "data.buffer",
                source.buffer,
                f"this run mixes its stream through {before} images, which their order follows",
                f"give {before}, or {ANOTHER_RUN}",
            )
        )
    parts = _parts(source, config)
    if len(parts) == len(now.parts) == 1:  # the same images may have moved
        versions[-1] = replace(now, parts=parts)
    elif parts != now.parts:
        (was, num), (name, there) = next(
            (a, b) for a, b in zip((*now.parts, ("nothing", 0)), (*parts, ("nothing", 0))) if a != b
        )
        raise UserError(
            Problem(
                what,
                NOTHING,
                f"has {name} ({there:,} images) where this run's checkpoint was trained on {was} ({num:,} images), and "
                "the order of images follows the parts, their sizes and their order",
                f"bring them as they were, change them by seer-scale data refresh, or {ANOTHER_RUN}",
            )
        )
    return DataHistory(source, versions, number, config)


def _check_sizes(known: dict[str, int], parts: Sequence[tuple[str, int]]) -> None:
    for name, num in parts:
        if known.get(name, num) != num:
            raise DataError(
                Problem(
                    f"The part {name}",
                    NOTHING,
                    f"has {num:,} images, and had {known[name]:,}: its images cannot be told apart",
                    "list the new ones as a part of their own, or give it another name",
                )
            )


def _reading(source: Source, config: Config) -> tuple[tuple[tuple[str, int], ...], int, int]:
    """(parts, block, interleave) of a version over `source`."""
    parts, n, interleave = _parts(source, config), len(source), config.train.global_batch
    if source.is_stream:
        return parts, 0, 1
    # an eighth of an epoch at most is without whole rows of interleave
    block = min(n, config.data.block or max(1, min(source.locality, n // (8 * interleave))))
    return parts, block, interleave if block > 1 else 1


def _parts(source: Source, config: Config) -> tuple[tuple[str, int], ...]:
    """A source that is no manifest is one part, called by its path."""
    own = getattr(source, "parts", None)
    if own is not None:
        return own
    return ((absolute(config.data.path), len(source)),)


# ------------------------------------------------------------------------------------------------ manifests


def manifest_of(run_dir: Path, number: int) -> Path:
    return run_dir / MANIFESTS / f"{number:04d}.yaml"


def newest_manifest(run_dir: Path) -> int:
    """The number of the newest manifest that a run was given; 0 for none."""
    try:
        names = os.listdir(run_dir / MANIFESTS)
    except OSError:
        return 0
    return max((int(m[1]) for name in names if (m := re.fullmatch(r"(\d{4,})\.yaml", name))), default=0)


def ask_refresh(run_dir: Path, manifest: str, saved: dict[str, Any] | None) -> str:
    """Give a run a new manifest, which it takes up at its next metric line or start; a sentence that says so.

    saved: the data's state in the run's newest checkpoint, to compare with. Raises UserError.
    """
    if saved and "drawn_from" in saved:
        raise UserError(_never_refreshed(saved["versions"][-1]["parts"][0][1]))
    parts = read_manifest(manifest)
    joined = open_source(manifest)
    if not isinstance(joined, ConcatSource):
        raise UserError(
            Problem(
                manifest, NOTHING, "is read as no manifest", f"its name must end in {' or '.join(MANIFEST_SUFFIXES)}"
            )
        )
    known = dict(map(tuple, saved["versions"][-1]["parts"])) if saved else {}
    _check_sizes(known, joined.parts)
    folder = run_dir / MANIFESTS
    folder.mkdir(exist_ok=True)
    text = yaml.safe_dump(
        {"parts": [{k: v for k, v in vars(p).items() if v != getattr(Part, k, None)} for p in parts]}, sort_keys=False
    )
    number = newest_manifest(run_dir) + 1
    aside = folder / f".{os.getpid()}.tmp"
    aside.write_text(text)
    while True:  # another refresh may be asked for at the same time
        try:
            os.link(aside, manifest_of(run_dir, number))
            break
        except FileExistsError:
            number += 1
    aside.unlink()
    new = [num for name, num in joined.parts if name not in known]
    gone = sorted(set(known) - {name for name, _ in joined.parts})
    compared = f" ({len(new)} new with {sum(new):,}; {len(gone)} gone)" if saved else ""
    said = f"{counted(len(joined.parts), 'part')} with {counted(len(joined), 'image')}{compared}"
    return f"{run_dir} will read {manifest}, {said}, from its next metric line on, or from its next start."
