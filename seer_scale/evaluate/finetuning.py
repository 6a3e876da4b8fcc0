"""Training a whole network on labels, on one process or many, under Hugging Face's accelerate.

A global batch is cut into --accumulate parts, each of which all processes take together: BatchNorm's statistics are
those of a part, over all processes, so they do not depend on how many there are. Images, crops, mixing and dropout are
functions of (seed, sample). What was done is saved as safetensors, and gone on with on any number of processes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from seer_scale.config import Crop, Data, Views, keys_of_model
from seer_scale.config.fields import opt
from seer_scale.data.loading.loader import train_batches
from seer_scale.data.sampling.sampler import DataVersion, ElasticSampler
from seer_scale.data.transforms.on_device import to_float
from seer_scale.errors import DataError, Problem, UserError
from seer_scale.evaluate.augmenting import erase, rand_augment
from seer_scale.evaluate.context import Evaluation, accelerator_of
from seer_scale.evaluate.features import gather_features
from seer_scale.evaluate.metrics import average_precisions, mean_of, per_class_accuracy, topk_accuracy
from seer_scale.evaluate.mixing import dropout_scale, mix_pairs, partners
from seer_scale.evaluate.splits import DataSet, Split
from seer_scale.evaluate.state import read_more, read_tensors, save_state
from seer_scale.evaluate.subject import Subject
from seer_scale.evaluate.task import NOT_IN_FIGURES, TaskSettings
from seer_scale.formatting import counted
from seer_scale.models.backbone import Backbone
from seer_scale.models.classifier import HEAD_STD, Classifier, LayerDecayBy, parameter_depths
from seer_scale.models.layers.stateful import StatefulLayer, share_statistics
from seer_scale.models.registry import build_backbone, reset_buffers
from seer_scale.rng import draw

LR_BATCH = 256
"""Images of the global batch for which --lr is given; it scales with it."""
MUCH_OF_INITIAL = 0.05
"""Share of a moving average of weights that is of their initial values: above, these matter in what is measured."""
FEW_UPDATES = 100
"""Below so many a figure tells more of how few they were than of the weights they began with."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(TaskSettings):
    """By default as SEER's networks were fine-tuned (arXiv 2103.01988, section 4.1)."""

    trains_network = True

    epochs: int = opt(35, "passes over the training images", ge=1)
    global_batch: int = opt(256, "images an update, over all processes", ge=1)
    accumulate: int = opt(
        1, "parts a global batch is cut into where it does not fit the devices; statistics are those of a part", ge=1
    )
    optimizer: Literal["sgd", "adamw"] = opt("sgd", "sgd with momentum, or adamw")
    lr: float = opt(0.0125, "learning rate of the head, for a global batch of 256", gt=0)
    momentum: float = opt(0.9, "sgd: momentum", ge=0, lt=1)
    weight_decay: float = opt(1e-4, "weight decay", ge=0)
    exclude_vectors: bool = opt(False, "no weight decay of biases and of BatchNorm's weights")
    schedule: Literal["steps", "cosine"] = opt(
        "steps", "of the learning rate: divided by 10 at --steps, or cosine to --final"
    )
    steps: tuple[float, ...] = opt(
        (30 / 35,), "shares of the training after which the rate is divided by 10; [] = never", gt=0, lt=1
    )
    final: float = opt(0.0, "where cosine ends, as a share of the peak", ge=0, le=1)
    warmup_epochs: float = opt(0.0, "epochs over which the rate rises from 0", ge=0)
    freeze_epochs: float = opt(0.0, "epochs at first in which the head alone is trained", ge=0)
    layer_decay: float = opt(1.0, "the rate of each unit as a share of that of the next one up", gt=0, le=1)
    layer_decay_by: LayerDecayBy = opt(
        "units", "what layer decay counts: units, blocks or stages; or ConvNeXt's groups: stages, the third by threes"
    )
    clip_norm: float = opt(0.0, "longest gradient, over all parameters; 0 = no limit", ge=0)
    statistics: Literal["synchronised", "frozen"] = opt(
        "synchronised", "BatchNorm: by a part's statistics over all processes, or by those of the pretraining"
    )
    precision: Literal["fp32", "fp16", "bf16"] = opt("fp32", "of forward and backward, by autocast")
    crop_scale: tuple[float, float] = opt(
        (0.08, 1.0), "share of the image's area a random crop covers", gt=0.0, le=1.0, rising=True
    )
    randaugment: float = opt(
        0.0, "magnitude of two operations of RandAugment, each done to half of the images; 0 = none", ge=0, le=10
    )
    erasing: float = opt(0.0, "share of the images of which a rectangle becomes noise", ge=0, le=1)
    mixup: float = opt(0.0, "alpha of mixup; 0 = none", ge=0)
    cutmix: float = opt(0.0, "alpha of CutMix; 0 = none; with mixup, each pair has one of them", ge=0)
    label_smoothing: float = opt(0.0, "share of a target that is spread over all classes", ge=0, lt=1)
    dropout: float = opt(0.0, "share of the features dropped before the head", ge=0, lt=1)
    drop_path: float = opt(0.0, "rate of dropped branches, as model.drop_path, of a backbone that has it", ge=0, lt=1)
    head_std: float = opt(HEAD_STD, "deviation of the head's first weights", ge=0)
    ema: float = opt(0.0, "decay an update of a moving average of the weights, which is then measured; 0 = none", ge=0,
                     lt=1)  # fmt: skip
    save_every: float = opt(10.0, "minutes after which what was done is saved, beside the end of each epoch", gt=0)

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.global_batch % self.accumulate:
            near = -(-self.global_batch // self.accumulate) * self.accumulate
            rule = f"must be a multiple of --accumulate, {self.accumulate}"
            found.append(Problem("global_batch", self.global_batch, rule, (near,)))
        for key in ("warmup_epochs", "freeze_epochs"):
            if getattr(self, key) >= (last := self.least_epochs):
                found.append(Problem(key, getattr(self, key), f"training ends after {last}", (last - 1,)))
        return found

    def without_effect(self) -> dict[str, str]:
        found = super().without_effect()
        found |= (
            {"steps": "with --schedule cosine"} if self.schedule == "cosine" else {"final": "with --schedule steps"}
        )
        found |= {"momentum": "with --optimizer adamw"} if self.optimizer == "adamw" else {}
        return found | ({"layer_decay_by": "without --layer-decay"} if self.layer_decay == 1 else {})

    @property
    def of_weights(self) -> dict[str, Any]:
        """The options on which the trained weights depend: images are told by their marks."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in (*NOT_IN_FIGURES, "save_every")}

    @property
    def least_epochs(self) -> int:
        """So many at least, of whatever images."""
        return self.epochs

    @property
    def measure_every(self) -> int:
        """Epochs between two rows of what was learned, after which all is saved, too."""
        return max(1, self.epochs // 10)

    @property
    def part(self) -> int:
        """Images of all processes in one forward."""
        return self.global_batch // self.accumulate

    def updates(self, epochs: float, num: int) -> int:
        """Whole updates for so many epochs of `num` images."""
        return math.ceil(num * epochs / self.global_batch)

    def rate(self, samples_seen: int, num: int) -> float:
        """The learning rate as a share of the peak, of the update that begins at `samples_seen`."""
        total, warmup = self.updates(self.epochs, num), self.updates(self.warmup_epochs, num)
        update = samples_seen // self.global_batch
        if update < warmup:
            return (update + 1) / (warmup + 1)
        if self.schedule == "steps":
            return 0.1 ** sum(update >= step * total for step in self.steps)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * (update - warmup) / (total - warmup)))


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainingSettings):
    recipe: str = opt(
        "", "options of a shipped recipe, such as convnextv2_tiny, or a YAML file; what else is given wins"
    )
    held_out: float = opt(
        0.05, "share of the training images that is not trained on, for the curve by epoch; 0 = none", ge=0, lt=1
    )
    eval_every: int = opt(1, "epochs between two figures on the held-out images", ge=1)

    @property
    def measure_every(self) -> int:
        return self.eval_every


def check_processes(options: TrainingSettings, evaluation: Evaluation[Any]) -> None:
    """Raises UserError where the processes cannot do what was asked for."""
    size, device = evaluation.world.size, evaluation.device.type
    mixes = options.mixup or options.cutmix
    least = size * (2 if mixes else 1)
    if options.part % least:
        near = options.accumulate * least * math.ceil(options.part / least)
        pairs = ", of pairs of images that are mixed" if mixes else ""
        rule = f"each of {options.accumulate} parts must be shared out evenly among {size} processes{pairs}"
        raise UserError(Problem("--global-batch", options.global_batch, rule, (near,)))
    if options.precision == "fp16" and device != "cuda":
        raise UserError(Problem("--precision", "fp16", f"it needs a GPU, and this runs on {device}", ("bf16", "fp32")))


def begins_with(subject: Subject) -> str:
    """From which weights a network is trained, as a protocol says it."""
    return "from untrained weights" if subject.weights == "random" else "from the pretrained weights"


def told_of_statistics(options: TrainingSettings, subject: Subject, num: int = 0) -> str:
    """Which BatchNorm has, as a protocol says it, after a comma; "" of a network without. num: images there are
    to train on, where a part may have more."""
    if not any(isinstance(layer, StatefulLayer) for layer in subject.model.modules()):
        return ""
    if options.statistics == "synchronised":
        several = f" of {num:,} images" if 0 < num < options.part else ""
        return f", BatchNorm by statistics of {options.part:,} crops{several}"
    images = subject.statistics_images
    taken = f"of {counted(images, 'image')}, taken before" if images else "as they were"
    return f", BatchNorm by statistics {taken}"


def new_classifier(evaluation: Evaluation[Any], data: DataSet) -> Classifier:
    """A copy of the subject's network, with a head over the classes of the data. Raises UserError where it cannot drop
    what it is asked to."""
    options = evaluation.options
    return Classifier(
        _copy_of(evaluation.subject, options.drop_path), data.classes, multi_label=data.train.multi_label,
        seed=options.seed, head_std=options.head_std,
    )  # fmt: skip


def _copy_of(subject: Subject, drop_path: float) -> Backbone:
    if not drop_path:
        return copy.deepcopy(subject.model)
    assert subject.about is not None, "it was opened from a path"
    model, device = subject.about.model, next(subject.model.parameters()).device
    if "drop_path" not in keys_of_model(name := str(model["name"])):
        raise UserError(Problem("--drop-path", drop_path, f"{name} has no branches that are dropped", (0.0,)))
    with torch.device("meta"):
        network = build_backbone(**{**model, "drop_path": drop_path})
    network.to_empty(device=device)
    reset_buffers(network)
    network.load_state_dict(subject.model.state_dict())
    network.transform = subject.model.transform
    return network.eval()


def told_of_few_updates(options: TrainingSettings, num: int, of: str = "") -> tuple[str, ...]:
    """A warning where `num` images make too few, or nothing. of: which images, as it begins: "Draws of 5: "."""
    updates, epochs = options.updates(options.epochs, num), math.ceil(FEW_UPDATES * options.global_batch / num)
    out = []
    if updates < FEW_UPDATES:
        out.append(
            f"{of}{counted(updates, 'update')} can hardly train a network: give a smaller --global-batch, or more "
            f"--epochs ({epochs:,} make {FEW_UPDATES} updates of {options.global_batch} images)."
        )
    if options.ema and (share := options.ema**updates) > MUCH_OF_INITIAL:
        near = MUCH_OF_INITIAL ** (1 / updates)
        out.append(
            f"{of}the moving average of --ema {options.ema:g}, which is measured, is {100 * share:.3g} % initial "
            f"weights after {counted(updates, 'update')}: give --ema 0, or {near:.4g} at most."
        )
    return tuple(out)


# ------------------------------------------------------------------------------------------------ loss, optimiser


def losses(scores: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Of each image, [n], of scores [n, classes]: cross-entropy of targets [n], or the sum over classes of binary ones
    where targets are [n, classes], without those of -1."""
    if targets.ndim == 1:
        return F.cross_entropy(scores, targets, reduction="none", label_smoothing=smoothing)
    wanted = targets.clamp(min=0).to(scores.dtype) * (1 - smoothing) + smoothing / 2
    each = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
    return torch.where(targets >= 0, each, 0).sum(1)


def parameter_groups(network: Classifier, options: TrainingSettings) -> list[dict[str, Any]]:
    """For torch's optimisers; "rate" multiplies the learning rate of the group."""
    depths, top = parameter_depths(network.backbone, options.layer_decay_by)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in network.named_parameters():
        rate = options.layer_decay ** (top - depths.get(name.removeprefix("backbone."), top))
        decay = 0.0 if options.exclude_vectors and p.ndim < 2 else options.weight_decay
        groups.setdefault((rate, decay), []).append(p)
    return [{"params": ps, "rate": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def build_optimizer(network: Classifier, options: TrainingSettings) -> torch.optim.Optimizer:
    groups = parameter_groups(network, options)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    return torch.optim.SGD(groups, lr=0.0, momentum=options.momentum)


# ------------------------------------------------------------------------------------------------ what is kept


@dataclass
class Done:
    """epochs: a row each epoch that was measured. loss, parts: sum and number of the losses since the last row. scaler:
    of fp16's loss scale."""

    samples_seen: int = 0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    loss: float = 0.0
    parts: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)


def tensors_of(network: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """By "network/NAME", "average/NAME" and "optimizer/NAME/SLOT"."""
    tensors = {f"network/{name}": t for name, t in network.state_dict().items()}
    tensors |= {f"average/{name}": t for name, t in average.state_dict().items()} if average else {}
    for name, p in network.named_parameters():
        tensors |= {f"optimizer/{name}/{k}": v for k, v in optimizer.state.get(p, {}).items() if v is not None}
    return tensors


@torch.no_grad()
def take_tensors(
    kept: Mapping[str, Tensor], network: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer
) -> None:
    places, parameters = tensors_of(network, average, optimizer), dict(network.named_parameters())
    for name, tensor in kept.items():
        if name in places:
            places[name].copy_(tensor)
        else:
            _, whose, slot = name.split("/")
            p = parameters[whose]
            optimizer.state[p][slot] = tensor.to(p.device) if tensor.ndim else tensor  # AdamW counts on the host


# ------------------------------------------------------------------------------------------------ the loop


class Finetuning:
    """`network` is trained on `split` and, where `held` has images, measured on them. place: a folder for what is
    done. All processes make it, and call all methods, alike."""

    def __init__(
        self, network: Classifier, split: Split, held: Split, options: TrainingSettings, evaluation: Evaluation[Any],
        place: Path,
    ):  # fmt: skip
        self.network, self.split, self.held, self.options = network, split, held, options
        self.evaluation, self.world = evaluation, evaluation.world
        self._path = place / "state.safetensors"
        world = self.world
        precision = "no" if options.precision == "fp32" else options.precision
        self.accelerator = accelerator_of(world, precision, options.accumulate)
        self.optimizer = build_optimizer(network, options)
        self._average: AveragedModel | None = None
        if options.ema:
            average = get_ema_multi_avg_fn(options.ema)
            self._average = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
        network.moves_statistics = options.statistics == "synchronised"
        if network.moves_statistics:  # after the copy: a process group is not copied
            share_statistics(network.backbone, world.group("statistics", world.size))
        self.done = Done(**world.from_main(lambda: read_more(self._path)))
        if self.done.samples_seen:
            take_tensors(read_tensors(self._path), network, self._average, self.optimizer)
        if self.done.scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(self.done.scaler)
        self._loss = torch.tensor(self.done.loss, dtype=torch.float64, device=world.device)
        self._saved = time.monotonic()

    @property
    def measured(self) -> Classifier:
        """The network whose figures count: the moving average where there is one."""
        return self.network if self._average is None else cast(Classifier, self._average.module)

    @property
    def total_samples(self) -> int:
        return self.options.updates(self.options.epochs, len(self.split)) * self.options.global_batch

    def train(self) -> None:
        """To the end. Raises UserError where the loss is not finite any more, or memory does not suffice."""
        options, total = self.options, self.total_samples
        frozen = min(total, options.updates(options.freeze_epochs, len(self.split)) * options.global_batch)
        with self.evaluation.progress.doing("fine-tuning", total, done=self.done.samples_seen):
            for stop, trains_backbone in ((frozen, False), (total, True)):
                if self.done.samples_seen < stop:
                    self.network.trains_backbone = trains_backbone
                    self.network.backbone.requires_grad_(trains_backbone)
                    self._train_until(stop)
        self.network.eval()

    def _train_until(self, stop: int) -> None:
        options, accelerator, done = self.options, self.accelerator, self.done
        # a fresh module each time: accelerate changes the forward of what it prepares
        wrapped, optimizer = accelerator.prepare(_Wrapped(self.network), self.optimizer)
        wrapped.train()
        peak = options.lr * options.global_batch / LR_BATCH
        try:
            for images, targets in self._batches(stop):
                for group in self.optimizer.param_groups:
                    begin = done.samples_seen // options.global_batch * options.global_batch
                    group["lr"] = peak * group["rate"] * options.rate(begin, len(self.split))
                with accelerator.accumulate(wrapped):
                    loss = self._loss_of(wrapped, images, targets)
                    accelerator.backward(loss)
                    if options.clip_norm and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.network.parameters(), options.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                self._loss += self.world.sum_(loss.detach().double()) / self.world.size
                done.parts += 1
                done.samples_seen += options.part
                self.evaluation.progress.advance(options.part)
                if done.samples_seen % options.global_batch == 0:
                    self._after_update(skipped=optimizer.step_was_skipped)
                    wrapped.train()
        except torch.OutOfMemoryError as error:
            rule = f"{options.part // self.world.size} images of {self.evaluation.size} pixels do not fit the device"
            problem = UserError(Problem("--accumulate", options.accumulate, rule, (2 * options.accumulate,)))
            problem.single_rank = True
            raise problem from error
        del wrapped, optimizer
        accelerator.free_memory()

    def _batches(self, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's (images uint8, targets) of each part, on the device."""
        options, world, evaluation = self.options, self.world, self.evaluation
        crop = Crop(num=1, size=evaluation.size, scale=options.crop_scale)
        views = Views(crops=(crop,), flip=0.5, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0)
        sampler = ElasticSampler([DataVersion(0, (("all", len(self.split)),))], options.seed, options.part)
        targets = torch.from_numpy(self.split.targets)
        made = train_batches(
            self.split.source, Data(path="-", workers=evaluation.workers), views, sampler, rank=world.rank,
            world_size=world.size, start=self.done.samples_seen, stop=stop, pin=world.device.type == "cuda",
        )  # fmt: skip
        try:
            for batch in made:
                yield batch.views[0].to(world.device, non_blocking=True), targets[batch.indices].to(world.device)
        except DataError as problem:
            problem.single_rank = True
            raise

    def _loss_of(self, wrapped: nn.Module, pixels: Tensor, targets: Tensor) -> Tensor:
        """The mean over this process's images of a part."""
        options, num = self.options, len(pixels)
        first, scale, draws, shares = self.done.samples_seen + self.world.rank * num, None, None, None
        if options.randaugment:
            pixels = rand_augment(pixels, first, options.randaugment, options.seed)
        images = to_float(pixels)
        if options.erasing:
            images = erase(images, first, options.erasing, options.seed)
        if options.mixup or options.cutmix:
            images, shares = mix_pairs(images, first, mixup=options.mixup, cutmix=options.cutmix, seed=options.seed)
        if options.dropout:
            width = self.network.backbone.num_features
            scale = dropout_scale(first, (num, width), options.dropout, options.seed).to(images.device)
        if width := self.network.backbone.num_draws * (options.drop_path > 0):
            drawn = draw(options.seed, "drop path", start=first * width, stop=(first + num) * width)
            draws = torch.from_numpy(drawn).view(num, width).to(images.device)
        scores = wrapped(images, scale, draws)
        each = losses(scores, targets, options.label_smoothing)
        if shares is not None:
            of_partner = losses(scores, targets[partners(len(targets)).to(targets.device)], options.label_smoothing)
            each = shares * each + (1 - shares) * of_partner
        return each.mean()

    def _after_update(self, *, skipped: bool) -> None:
        options, done, num = self.options, self.done, len(self.split)
        if self._average is not None and not skipped:
            self._average.update_parameters(self.network)
        before, now = (s // num for s in (done.samples_seen - options.global_batch, done.samples_seen))
        is_last = done.samples_seen >= self.total_samples
        if before // options.measure_every != now // options.measure_every or is_last:
            self._end_epoch()
        elif time.monotonic() - self._saved < 60 * options.save_every:
            return
        self.save()

    def _end_epoch(self) -> None:
        done, options = self.done, self.options
        loss = self._loss.item() / done.parts
        if not math.isfinite(loss):
            raise UserError(Problem("--lr", options.lr, "the loss is not finite any more", "give a lower one"))
        row: dict[str, Any] = {
            "epoch": round(done.samples_seen / len(self.split), 2),
            "samples_seen": done.samples_seen,
            "train_loss": loss,
            "lr": self.optimizer.param_groups[-1]["lr"],  # the head's
        }
        if len(self.held):
            with self.evaluation.progress.doing("measuring the held-out images"):
                scores, rows = self.scores_of(self.held)
            row |= {f"held_out_{k}": v for k, v in figures(scores, self.held.targets[rows]).items()}
        done.epochs.append(row)
        done.loss, done.parts = 0.0, 0
        self._loss.zero_()

    def save(self) -> None:
        """By rank 0, what all hold alike; not where the loss is not finite any more."""
        self._saved = time.monotonic()
        if not self.world.is_main or not self._loss.isfinite():
            return
        self.done.loss = self._loss.item()
        self.done.scaler = dict(self.accelerator.scaler.state_dict()) if self.accelerator.scaler else {}
        save_state(self._path, tensors_of(self.network, self._average, self.optimizer), vars(self.done))

    # -------------------------------------------------------------------------------------------- scores

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Normalised images [n, 3, S, S] -> scores float32 [n, classes] of the measured network, in eval mode."""
        self.measured.eval()
        with self.accelerator.autocast():
            return self.measured(images).float()

    def scores_of(self, split: Split) -> tuple[Tensor, np.ndarray]:
        """Scores of the images of a split that can be read, and their rows, on every process. Collective."""
        evaluation = self.evaluation

        def encode(images: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.scores(images)
            return scores, scores[:, :1]

        found = gather_features(
            encode, split.source, np.arange(len(split)), size=evaluation.size, batch=evaluation.options.batch,
            workers=evaluation.workers, world=self.world,
        )  # fmt: skip
        return found.features.cpu(), found.numbers.cpu().numpy()


class _Wrapped(nn.Module):
    def __init__(self, network: Classifier):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, feature_scale: Tensor | None, draws: Tensor | None) -> Tensor:
        return self.network(images, feature_scale, draws)


def figures(scores: Tensor, targets: np.ndarray) -> dict[str, float]:
    """Of scores [n, classes]: "top1", "top5" with standard errors and "mean_class" in percent, or "map"."""
    if targets.ndim == 2:
        return {"map": mean_of(average_precisions(scores, targets))}
    return topk_accuracy(scores, targets) | {"mean_class": mean_of(per_class_accuracy(scores, targets))}
