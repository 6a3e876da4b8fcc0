"""What a task works with: backbone, ranks, loader, progress, a folder of what is done, and Hugging Face's accelerate
for whatever it trains."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from seer_scale.data.loading.listing import share
from seer_scale.data.sources import Source
from seer_scale.data.transforms.on_device import to_float
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, DataError, Problem, UserError
from seer_scale.evaluate.knn import TRAIN
from seer_scale.evaluate.places import remove, remove_stale, take_up
from seer_scale.evaluate.shards import (
    EncodePixels,
    FeatureStream,
    SafetensorsShards,
    Shards,
    encode_images,
    share_cores,
)
from seer_scale.evaluate.splits import DataSet, Split, check_targets, open_data_set
from seer_scale.evaluate.statistics import MAX_IMAGES, statistics_of_images
from seer_scale.evaluate.subject import Subject
from seer_scale.evaluate.table import Table, is_joined, join, open_matrix
from seer_scale.evaluate.task import SettingsT
from seer_scale.extras import how_to_install
from seer_scale.formatting import counted
from seer_scale.observe.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARD = 1024
"""Images whose features are written together: what a kill can lose, on each rank."""

T = TypeVar("T")
SHARED_FEATURES = "features"
UNFINISHED_WORK = "unfinished"


@dataclass(kw_only=True)
class Evaluation(Generic[SettingsT]):
    """folder: where results go (RUN/eval). workers: loader processes of this rank. All ranks make it, and call all
    methods, alike."""

    task: str
    subject: Subject
    options: SettingsT
    world: World
    progress: Progress
    folder: Path
    unreadable: dict[str, None] = field(default_factory=dict)
    """What is told of images that could not be read, sentences in the order in which that was found."""
    _used: set[Path] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.options.size or self.subject.size

    @property
    def at_size(self) -> str:
        """A protocol's sentence on the size of the images."""
        return f"Images at {self.size} pixels."

    def __post_init__(self) -> None:
        self.workers = share_cores(self.world, self.options.workers)

    # ------------------------------------------------------------------------------------------------ what is there

    def data_set(self, make: Callable[[], DataSet] | None = None, *, roles: str = TRAIN) -> DataSet:
        """What --data and --test name, or what `make` gives, listed by rank 0. roles: what the protocol says that the
        images are for (knn.TRAIN, knn.VOTE), beside their size. Untrained weights get BatchNorm statistics of its
        train part. Raises DataError."""
        options, config = self.options, self.subject.config
        sized = "" if make else f" {self.at_size}"  # whoever makes another says its size
        make = make or (lambda: open_data_set(options.data, options.test, config, roles))

        def checked() -> DataSet:
            found = make()
            for split in (found.train, found.test):
                check_targets(split)
                _ = split.mark  # reads some images, which the other ranks then need not
            return replace(found, protocol=found.protocol + sized + found.without_images)

        with self.progress.doing("listing images"):
            data = self.listed(checked, lambda found: found.sources)
        if self.subject.weights == "random":
            self._take_statistics(data.train)
        return data

    def listed(self, make: Callable[[], T], sources: Callable[[T], Iterable[Source]] = lambda _: []) -> T:
        """As `share`. Collective."""
        folder = self.work("listed") if self.world.size > 1 else self.folder  # one process writes nothing there
        return share(self.world, folder, make, sources)

    def _take_statistics(self, train: Split) -> None:
        subject, mark = self.subject, f"{train.mark} {self.size}"
        if subject.statistics == mark:
            return

        def encode(images: Tensor) -> None:
            subject.encode(images)
            self.progress.advance(len(images) * self.world.size)

        with self.progress.doing("taking BatchNorm statistics of images", min(len(train), MAX_IMAGES)):
            subject.statistics_images = statistics_of_images(
                subject.model, encode, train.source, np.arange(len(train)),
                size=self.size, workers=self.workers, world=self.world,
            )  # fmt: skip
        subject.statistics = mark

    # ------------------------------------------------------------------------------------------------ what is done

    def work(self, *parts: Any) -> Path:
        """A folder for what need not be done again after a kill, by what it depends on: the weights, the task and
        `parts` (features, which begin with SHARED_FEATURES, are of all tasks). It is removed when the command has ended
        well. A command that runs at the same time has another. Raises UserError."""
        owner = SHARED_FEATURES if parts[:1] == (SHARED_FEATURES,) else self.task
        mark = zlib.crc32(
            repr([self.subject.fingerprint, self.subject.statistics, owner, *parts]).encode(errors="backslashreplace")
        )

        def taken() -> Path:
            try:
                return take_up(self.folder / UNFINISHED_WORK / f"{owner}-{mark:08x}")
            except OSError as error:
                rule = f"it cannot be written ({error.strerror or error})"
                raise UserError(Problem("--out", self.folder, rule, "give another")) from error

        place = self.world.from_main(taken)  # a rank that could not read an image agrees
        self._used.add(place)
        return place

    def complete(
        self, paths: Sequence[Path], make: Callable[[int], None], what: str, unit: str, *, by_all: bool = False
    ) -> None:
        """Call make(i), which writes paths[i], for each that is not there. Ranks share them out; by_all: all of them
        make each together, and one writes. Collective: what make raises on one rank is raised on all."""
        done = self.world.from_main(lambda: [path.is_file() for path in paths])
        todo = [i for i, is_there in enumerate(done) if not is_there]
        first, step = (0, 1) if by_all else (self.world.rank, self.world.size)
        with self.progress.doing(what, len(paths), unit, done=len(paths) - len(todo)), self.world.together():
            for i in todo[first::step]:
                make(i)
                self.progress.advance(step)

    def clean(self, keep: set[Path] | None = None) -> None:
        """Remove what is not needed any more, also of commands that ended long ago. keep: features are added to it
        instead, as the next task may need them, too."""
        self.world.barrier()
        if keep is not None:
            keep |= {place for place in self._used if place.name.startswith(SHARED_FEATURES)}
        if self.world.is_main:
            remove(self._used - (keep or set()))
            remove_stale(self.folder / UNFINISHED_WORK, spare=keep or set())

    # ------------------------------------------------------------------------------------------------ features

    def features(
        self,
        split: Split,
        what: str = "",
        *,
        encode: Callable[[Tensor], Tensor] | None = None,
        encode_pixels: EncodePixels | None = None,
        stream: FeatureStream | None = None,
        mark: str = "",
        label: str = "",
    ) -> Table:
        """Features of every image of a split that can be read, the same on any number of ranks; goes on where a kill
        left off. Collective.

        encode: normalised images [n, 3, S, S] -> [n, D], the backbone's features otherwise. encode_pixels: instead, of
        uint8 images on the device and their rows in the split. stream: instead, features of rows in another way than by
        the loader. mark: stands for these. label: what progress says. What cannot be read is told of in `unreadable`.
        Raises DataError where no image can be read, CheckpointError where features are not finite.
        """
        of_images = encode or self.subject.encode

        def of_pixels(pixels: Tensor, rows: np.ndarray) -> Tensor:
            return of_images(to_float(pixels)).float()

        stream = stream or partial(
            encode_images, encode_pixels or of_pixels, split.source, size=self.size, batch=self.options.batch,
            workers=self.workers, device=self.device, within=SHARD,
        )  # fmt: skip
        label = label or f"computing features of {what or split.name}"
        folder, world = self.work(SHARED_FEATURES, split.mark, self.size, mark), self.world
        shards = Shards(folder, len(split), SHARD, SafetensorsShards())
        if not world.from_main(lambda: is_joined(folder)):
            shards.write(stream, split.source, world=world, progress=self.progress, label=label)
            with self.progress.doing(f"joining features of {split.name}"), world.together():
                if world.is_main and not join(shards):
                    rule = f"none of {counted(len(split), 'image')} can be read"
                    raise DataError(Problem(split.name, NOTHING, rule, "check them: seer-scale data describe"))
        features, rows = open_matrix(folder)
        if told := split.told_of_unreadable(rows):
            self.unreadable[told] = None
        return Table(features, rows, split.targets[rows], folder)

    def readable(self, split: Split) -> np.ndarray:
        """Rows of the images of a split that can be read, int64 [n], ascending: for what trains on images themselves,
        where the loader would put others in the place of those that cannot. As `features`."""

        def nothing(pixels: Tensor, rows: np.ndarray) -> Tensor:
            return torch.zeros(len(pixels), 1, device=self.device)

        return self.features(
            split, encode_pixels=nothing, mark="readable", label=f"reading images of {split.name}"
        ).rows

    def discard(self, *tables: Table) -> None:
        """Remove the files of features that are not asked for again; who has mapped them keeps them. Collective."""
        self.world.barrier()
        if self.world.is_main:
            remove([table.folder for table in tables])

    # ------------------------------------------------------------------------------------------------ training a head

    @cached_property
    def accelerator(self) -> Accelerator:
        """accelerate's, over the ranks and the device of `world`. Raises UserError where it is not installed."""
        return accelerator_of(self.world)


def accelerator_of(world: World, precision: str = "no", accumulate: int = 1) -> Accelerator:
    """accelerate's Accelerator over the process group that stands. precision: "no", "fp16" or "bf16" (autocast).
    accumulate: backward passes an update. Raises UserError where it is not installed."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        rule = "is not installed, and trains the heads"
        raise UserError(Problem("accelerate", NOTHING, rule, how_to_install("accelerate"))) from error
    local_rank = world.device.index if world.device.type == "cuda" else world.local_rank  # one that sees its GPU alone
    ranks = {
        "RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": world.local_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    if world.size > 1:  # it reads them even where there is a process group; nothing connects to the address
        for name, value in ranks.items():
            os.environ.setdefault(name, str(value))
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()  # it refuses a second precision in a process, where several tasks may run
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # older torch knows no other
    threads = torch.get_num_threads()
    # DeepSpeed leaves a LOCAL_RANK, by which accelerate would join other ranks
    alone = mock.patch.dict(os.environ, {"LOCAL_RANK": "-1"}) if world.size == 1 else nullcontext()
    with alone, warnings.catch_warnings():  # on CPUs it chooses threads by itself and warns of it
        warnings.simplefilter("ignore")
        made = Accelerator(
            cpu=world.device.type == "cpu",
            mixed_precision=precision,
            gradient_accumulation_steps=accumulate,
            # ranks move buffers alike, or by statistics that they share
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    torch.set_num_threads(threads)
    return made
