"""Training a detector under Hugging Face's accelerate, on one process or many, by iterations as published."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from seer_scale.data.sampling.order import permute
from seer_scale.data.sources.files import read_file
from seer_scale.data.transforms.decode import decode
from seer_scale.distributed import World
from seer_scale.errors import DataError, Problem, TrainingError, UserError
from seer_scale.evaluate.context import Evaluation, accelerator_of
from seer_scale.evaluate.detection.coco import CocoSet, clipped, is_usable
from seer_scale.evaluate.detection.model import Detector, Example
from seer_scale.evaluate.detection.settings import DetectSettings
from seer_scale.evaluate.state import read_more, read_tensors, save_state
from seer_scale.files import shown
from seer_scale.rng import key, numpy_generator

REFERENCE_BATCH = 16
"""Images an update that the published learning rate and schedules are for."""
REFERENCE_ITERATIONS, REFERENCE_IMAGES = 90_000, 117_266
"""Of the schedule 1x: updates, and images of COCO train2017 that have objects."""
DECAY_AT = (2 / 3, 8 / 9)
"""Shares of the training after which the rate is divided by ten: 60,000 and 80,000 of 90,000."""
MAX_BETWEEN_SAVES = 1000
SAVES = 20
"""Of a short training."""
STATISTICS_IMAGES = 32


class Examples(Dataset[Example | UserError]):
    """Of keys (epoch, image number): the image, mirrored in half of the epochs, and its objects. What cannot be read is
    given as its error, so that it leaves a loader process as it is."""

    def __init__(self, coco: CocoSet, options: DetectSettings, *, masks: bool):
        self.coco, self.options, self.masks = coco, options, masks
        self.numbers = {category: c for c, category in enumerate(coco.categories, 1)}

    def __getitem__(self, of: tuple[int, int]) -> Example | UserError:
        try:
            return self._example(*of)
        except UserError as error:
            return error

    def _example(self, epoch: int, i: int) -> Example:
        coco = self.coco
        image = read_image(coco, i)
        height, width = image.shape[:2]
        kept = [one for one in coco.annotations(i) if is_usable(one, height, width)]
        boxes = np.array([clipped(one["bbox"], height, width) for one in kept], np.float32).reshape(-1, 4)
        masks = np.zeros((0, height, width), np.uint8)
        if self.masks and kept:
            masks = np.stack([mask_of(one["segmentation"], height, width) for one in kept])
        draws = numpy_generator(self.options.seed, "detect", epoch, i)
        side = int(draws.choice(self.options.sides))
        if draws.random() < 0.5:
            image, masks = image[:, ::-1], masks[:, :, ::-1]
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        return Example(
            image=torch.from_numpy(image.transpose(2, 0, 1).copy()),
            boxes=torch.from_numpy(boxes),
            labels=torch.tensor([self.numbers[one["category_id"]] for one in kept], dtype=torch.int64),
            masks=torch.from_numpy(masks.copy()) if self.masks else None,
            side=side,
            draw=key(self.options.seed, "anchors", epoch, i) % (1 << 62),
        )


def read_image(coco: CocoSet, i: int) -> np.ndarray:
    """RGB uint8 [H, W, 3]. Raises DataError where it is not of the size that its annotations are for."""
    path = Path(coco.folder) / coco.names[i]
    image = decode(read_file(str(path)))
    height, width = coco.sizes[i].tolist()
    if image.shape[:2] != (height, width):
        got = f"{image.shape[1]}x{image.shape[0]}"
        rule = f"its annotations in {coco.path} are of {width}x{height} pixels"
        raise DataError(Problem(shown(path), got, rule, "use the images that were annotated"))
    return image


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Polygons, or run lengths, as uint8 [H, W]."""
    from pycocotools import mask

    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        return mask.decode(segmentation)
    found = mask.frPyObjects(segmentation, height, width)
    return mask.decode(mask.merge(found) if isinstance(found, list) else found)


def drawn(iteration: int, batch: int, images: np.ndarray, seed: int) -> list[tuple[int, int]]:
    """(epoch, image number) of each image of an update."""
    epochs, positions = np.divmod(np.arange(iteration * batch, (iteration + 1) * batch), len(images))
    found: list[tuple[int, int]] = []
    for epoch in np.unique(epochs).tolist():
        order = permute(positions[epochs == epoch], len(images), seed, epoch)
        found += [(epoch, i) for i in images[order].tolist()]
    return found


def iterations_of(options: DetectSettings, num: int) -> int:
    """What was asked for, or the published schedule's passes over the images; on COCO 90,000 updates of 16 are 1x."""
    if options.iterations:
        return options.iterations
    passes = REFERENCE_ITERATIONS * REFERENCE_BATCH / REFERENCE_IMAGES * (2 if options.schedule == "2x" else 1)
    return max(1, round(passes * num / options.batch))


def rate(options: DetectSettings, iteration: int, total: int) -> float:
    """The learning rate of an update: linear warm-up from a thousandth, then steps."""
    peak = options.lr * options.batch / REFERENCE_BATCH
    warmup = min(options.warmup, total // 10)
    if iteration < warmup:
        return peak * (0.001 + 0.999 * iteration / warmup)
    return peak * 0.1 ** sum(iteration >= share * total for share in DECAY_AT)


def build_optimizer(detector: Detector, options: DetectSettings) -> torch.optim.SGD:
    """Without weight decay of BatchNorm, as published."""
    of_norms = {id(p) for layer in detector.norms() for p in layer.parameters()}
    trained = [p for p in detector.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in of_norms], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if id(p) in of_norms], "weight_decay": 0.0},
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=0.0, momentum=0.9)


class Order(Sampler[list[tuple[int, int]]]):
    """What this rank draws for each of `iterations`."""

    def __init__(self, images: np.ndarray, options: DetectSettings, iterations: range, world: World):
        self.images, self.options, self.iterations, self.world = images, options, iterations, world

    def __len__(self) -> int:
        return len(self.iterations)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for i in self.iterations:
            found = drawn(i, self.options.batch, self.images, self.options.seed)
            yield found[self.world.rank :: self.world.size]


def load_examples(examples: Examples, order: Order, workers: int) -> Iterator[list[Example | UserError]]:
    """A batch for each of `order`, read ahead by loader processes."""
    yield from DataLoader(examples, batch_sampler=order, num_workers=workers, collate_fn=list)


def on_device(one: Example | UserError, device: torch.device) -> Example:
    if isinstance(one, UserError):
        one.single_rank = True  # the others wait for this one
        raise one
    for name in ("image", "boxes", "labels", "masks"):
        value = getattr(one, name)
        setattr(one, name, None if value is None else value.to(device, non_blocking=True))
    return one


def train(
    detector: Detector, examples: Examples, evaluation: Evaluation[DetectSettings], place: Path
) -> list[dict[str, Any]]:
    """To the end, from where a kill left it in `place`; the losses on the way, a row each save. Collective.

    Raises UserError where an image cannot be read (on its rank), TrainingError where the loss is not finite.
    """
    options, world = evaluation.options, evaluation.world
    images = np.flatnonzero(examples.coco.usable)
    total = iterations_of(options, len(images))
    every = max(1, min(MAX_BETWEEN_SAVES, total // SAVES))
    path = place / "detector.safetensors"
    optimizer = build_optimizer(detector, options)
    state = world.from_main(lambda: read_more(path)) or {"iteration": 0, "losses": []}
    if evaluation.subject.weights == "random" and detector.frozen:
        evaluation.subject.statistics_images = min(STATISTICS_IMAGES, len(images))
    if state["iteration"]:
        restore(detector, optimizer, read_tensors(path))
    elif num := evaluation.subject.statistics_images:
        first = [i for _, i in drawn(0, num, images, options.seed)]
        read = (torch.from_numpy(read_image(examples.coco, i).transpose(2, 0, 1).copy()) for i in first)
        detector.estimate_statistics([x.to(world.device) for x in read])
    accelerator = accelerator_of(world, "bf16" if options.precision == "bf16" else "no")
    wrapped, prepared = accelerator.prepare(detector, optimizer)
    wrapped.train()
    begin = state["iteration"]
    order = Order(images, options, range(begin, total), world)
    sums: dict[str, Tensor] = {}
    with evaluation.progress.doing("training the detector", total * options.batch, done=begin * options.batch):
        for iteration, batch in enumerate(load_examples(examples, order, evaluation.workers), begin):
            for group in optimizer.param_groups:
                group["lr"] = rate(options, iteration, total)
            for name, loss in backward(detector, wrapped, accelerator, batch, world.device).items():
                sums[name] = sums.get(name, torch.zeros((), device=world.device)) + loss
            prepared.step()
            prepared.zero_grad()
            evaluation.progress.advance(options.batch)
            if (iteration + 1) % every == 0 or iteration + 1 == total:
                since = (iteration % every) + 1
                means = world.sum_(torch.stack(list(sums.values()))) / (since * world.size)
                row = dict(zip(sums, means.tolist()))
                row |= {"loss": sum(row.values()), "iteration": iteration + 1}
                if not math.isfinite(row["loss"]):
                    rule = f"the loss is not finite after {iteration + 1:,} of {total:,} updates"
                    raise TrainingError(Problem("--lr", options.lr, rule, (options.lr / 4,)))
                state = {"iteration": iteration + 1, "losses": [*state["losses"], row]}
                sums = {}
                if world.is_main:
                    save_state(path, state_of(detector, optimizer), state)
    accelerator.free_memory()
    detector.eval()
    return state["losses"]


def backward(
    detector: Detector, wrapped: nn.Module, accelerator: Any, batch: list[Example | UserError], device: torch.device
) -> dict[str, Tensor]:
    """Gradients of the mean loss of this rank's images; its parts by name. With frozen BatchNorm one image at a time,
    whose memory is all that is needed; else all at once, since they share statistics."""
    at_once = 1 if detector.frozen else len(batch)
    sums: dict[str, Tensor] = {}
    for first in range(0, len(batch), at_once):
        some = [on_device(one, device) for one in batch[first : first + at_once]]
        is_last = first + at_once >= len(batch)
        with nullcontext() if is_last else accelerator.no_sync(wrapped):
            losses = wrapped(some)
            share = len(some) / len(batch)
            accelerator.backward(sum(losses.values()) * share)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach() * share
    return sums


def state_of(detector: Detector, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = [(name, optimizer.state.get(p, {})) for name, p in detector.named_parameters()]
    momenta = {f"momentum/{name}": of["momentum_buffer"] for name, of in states if of}
    return {f"weights/{name}": t for name, t in detector.state_dict().items()} | momenta


def restore(detector: Detector, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    of_kind: dict[str, dict[str, Tensor]] = {"weights": {}, "momentum": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        of_kind[kind][rest] = tensor
    detector.load_state_dict(of_kind["weights"])
    parameters = dict(detector.named_parameters())
    for name, tensor in of_kind["momentum"].items():
        optimizer.state[parameters[name]]["momentum_buffer"] = tensor.to(parameters[name].device)
