"""What is learned in equal updates and in equal CPU time, against a plain loop of lightly's modules for the recipe's
method (SwAV, or DINO for DINOv2), and against other recipes on the same backbone.

The loop has the recipe's backbone, initial weights, batch, samples, crops, photometrics, temperatures, optimiser and
schedules (lightly_loops.py says what else). It reads by Pillow, lightly's SwaVTransform and torch's DataLoader, passes
each view by itself as lightly's examples do, and is updated by torch's SGD or AdamW. All run in this process on one CPU
thread without loader processes, and one kNN measures all. A seed gives all their weights, so differences are taken seed
by seed.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from seer_scale.bench.lightly_loops import Loop, check_lightly_has, loop_of
from seer_scale.bench.reference_swav import SINGLE_RANK
from seer_scale.config import Config, Views, load_recipe, resolve
from seer_scale.data.loading.loader import train_batches
from seer_scale.data.sampling.sampler import DataVersion, ElasticSampler
from seer_scale.data.sources import Source, open_data
from seer_scale.data.transforms.on_device import micro_batches
from seer_scale.data.transforms.views import MEAN, STD
from seer_scale.errors import NOTHING, DataError, Problem, UserError
from seer_scale.evaluate.features import FeatureTable, gather_features
from seer_scale.evaluate.knn import LabelledImages, knn, labelled_images
from seer_scale.evaluate.layers import mean_and_variance
from seer_scale.evaluate.logistic import logistic
from seer_scale.evaluate.statistics import statistics_of_images
from seer_scale.extras import how_to_install
from seer_scale.files import to_json
from seer_scale.methods.base import Method
from seer_scale.methods.registry import build_method
from seer_scale.models.backbone import Backbone
from seer_scale.models.execution import choose_execution
from seer_scale.optim.schedules import LearningRate, weight_decay
from seer_scale.parallel import build_engine
from seer_scale.parallel.engine import Engine

OURS, STEPS, TIME = "ours", "lightly, equal samples", "lightly, equal time"
SAMPLES_OF, TIME_OF = "samples", "time"
"""As --against names lightly's loop for as many samples, and for as much time."""
PILOT = 0.1
"""Share of a recipe's samples by which its rate is known before the first run for as much time."""
INVERSE_L2 = 1.0
"""Of the linear classifiers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="images to train on, as data.path takes them; they vote, too")
    parser.add_argument("--recipe", default="photos_laptop", help="a shipped recipe or a YAML file")
    parser.add_argument("--queries", default="", help="labelled images to classify (default: a fifth of PATH)")
    parser.add_argument("--samples", type=int, default=0, help="images seen (default: the recipe's)")
    parser.add_argument("--seeds", type=int, default=8, help="how many seeds, from 0 on")
    parser.add_argument(
        "--against", nargs="*", default=[SAMPLES_OF, TIME_OF], metavar="WHAT",
        help=f"{SAMPLES_OF}, {TIME_OF} (lightly's loop for as many samples, for as much CPU time; default: both), or a "
        "recipe, on this one's backbone for as much CPU time",
    )  # fmt: skip
    parser.add_argument("--linear", action="store_true", help="fit linear classifiers to the bank's features, too")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


@dataclass(frozen=True)
class Trained:
    """knn, linear: top-1 in percent, by neighbours and by a logistic regression (nan where none was asked for). cpu_s:
    CPU seconds of training, without measuring."""

    knn: float
    linear: float
    samples: int
    cpu_s: float


Train = Callable[[Config, Source], tuple[Backbone, float]]


@dataclass
class Contender:
    """equal_time: it has as many samples as take as long as ours. runs: one a seed. rates: samples and CPU seconds of
    runs, its own or others of its loop."""

    name: str
    config: Config
    train: Train
    equal_time: bool = False
    runs: list[Trained] = field(default_factory=list)
    rates: list[tuple[int, float]] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ ours


def configure(args: argparse.Namespace, recipe: str = "", model: dict[str, Any] | None = None) -> Config:
    """A recipe (default: the one asked for) on one rank, with another `model` section if one is given. Raises
    UserError."""
    over: dict[str, Any] = {
        "data": {"path": args.path, "workers": 0},
        "train": {"threads": 1} | ({"total_samples": args.samples} if args.samples else {}),
        "parallel": {"engine": "single", "ranks": 1, "device": "cpu"},
        "checkpoint": {"every_samples": 0},
        "knn": {"queries": args.queries, "every_samples": 0},
    }
    if args.seeds < 1:
        raise UserError(Problem("--seeds", args.seeds, "must be at least 1", 1))
    raw = load_recipe(recipe or args.recipe)
    return resolve(raw | ({"model": model} if model else {}), over, world_size=1)


def start(config: Config) -> tuple[Method[Any, Any], Engine, torch.memory_format]:
    """The network as a run of this recipe starts with it."""
    with torch.device("meta"):
        method = build_method(config, SINGLE_RANK)
    memory_format = choose_execution(method.backbone, config, SINGLE_RANK, cores=1).memory_format
    return method, build_engine(method, config, SINGLE_RANK), memory_format


def train_ours(config: Config, source: Source) -> tuple[Backbone, float]:
    """The updates of a run, without its log, checkpoints and report: its backbone, and the CPU seconds it took."""
    begin, lr, batch = time.process_time(), LearningRate(config), config.train.global_batch
    method, engine, memory_format = start(config)
    sampler = ElasticSampler([DataVersion(0, (("all", len(source)),))], config.run.seed, batch)
    for made in train_batches(
        source, config.data, config.views, sampler, rank=0, world_size=1, start=0, stop=config.end(0)
    ):
        views = micro_batches(made, config.views.crops, config.num_micro_batches(1), SINGLE_RANK.device, memory_format)
        engine.gradients(views, samples_seen=made.samples_seen)
        engine.update(lr(made.samples_seen), made.samples_seen)
    return cast(Backbone, method.backbone), time.process_time() - begin


# ------------------------------------------------------------------------------------------------ the reference


class Pictures(torch.utils.data.Dataset[list[Tensor]]):
    """The views of each image of a source, made by `transform` of a picture of Pillow's."""

    def __init__(self, source: Source, transform: Any):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(Image.open(io.BytesIO(self.source.read(index))).convert("RGB"))


def lightly_views(views: Views) -> Any:
    """The recipe's crops and photometrics as lightly's transform. Raises UserError where lightly is missing."""
    try:
        from lightly.transforms.swav_transform import SwaVTransform
    except ImportError as error:
        fix = how_to_install("lightly")
        raise UserError(Problem("lightly", NOTHING, "is what bench learn compares with", fix)) from error
    how = views.photometric[0][0]  # of all crops, as `configure` sees to
    brightness, contrast, saturation, hue = how.jitter
    crops: dict[str, Any] = {  # lightly's types say two kinds
        "crop_sizes": [c.size for c in views.crops], "crop_counts": [c.num for c in views.crops],
        "crop_min_scales": [c.scale[0] for c in views.crops], "crop_max_scales": [c.scale[1] for c in views.crops],
    }  # fmt: skip
    return SwaVTransform(
        **crops, hf_prob=how.flip, cj_prob=how.jitter_p, cj_bright=brightness, cj_contrast=contrast,
        cj_sat=saturation, cj_hue=hue, random_gray_scale=how.grayscale_p, gaussian_blur=how.blur_p,
        sigmas=how.blur_sigma, normalize={"mean": list(MEAN), "std": list(STD)},
    )  # fmt: skip


def train_reference(config: Config, source: Source) -> tuple[Backbone, float]:
    """The plain loop: its backbone, and the CPU seconds it took."""
    begin, batch, seed = time.process_time(), config.train.global_batch, config.run.seed
    torch.manual_seed(seed)
    loop, optim, lr = loop_of(start(config)[0], config), config.optim, LearningRate(config)
    optimizer = _optimizer(loop, config)
    parts = loop.children() if optim.clip_by == "part" else [loop]
    clipped = [list(part.parameters()) for part in parts if optim.clip_norm]
    loader = torch.utils.data.DataLoader(
        Pictures(source, lightly_views(config.views)), batch, shuffle=True, drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    seen = 0
    while seen < config.end(0):
        for views in loader:
            for group in optimizer.param_groups:
                group["lr"] = lr(seen)
                group["weight_decay"] = weight_decay(config, seen) if group["decays"] else 0.0
            optimizer.zero_grad()
            loop.loss(views, seen).backward()
            for together in filter(None, clipped):
                nn.utils.clip_grad_norm_(together, optim.clip_norm)
            optimizer.step()
            loop.after_update(seen)
            seen += batch
            if seen >= config.end(0):
                break
    return loop.measured, time.process_time() - begin


def _optimizer(loop: Loop, config: Config) -> torch.optim.Optimizer:
    optim, trained = config.optim, [p for p in loop.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "decays": True},
        {"params": [p for p in trained if p.dim() < 2], "decays": not optim.exclude_vectors},
    ]
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.peak_lr, betas=optim.betas)
    return torch.optim.SGD(groups, lr=config.peak_lr, momentum=optim.momentum)


# ------------------------------------------------------------------------------------------------ compared


@torch.no_grad()
def measure(backbone: Backbone, images: LabelledImages, config: Config, *, linear: bool) -> dict[str, float]:
    """By features, which all are measured by: kNN and, as "linear/top1", a logistic regression of standardised ones
    (nan without `linear`)."""
    bank: list[Tensor] = []

    def encode(batch: Tensor) -> tuple[Tensor, Tensor]:
        features = backbone(batch)
        return features, features

    how: dict[str, Any] = dict(workers=0, world=SINGLE_RANK)
    queries = gather_features(
        encode, images.queries, images.query_indices, size=config.knn.size, batch=config.knn.batch, **how
    )
    see = bank.append if linear else None
    scores = knn(encode, images, replace(config.knn, enabled=True), queries=queries, see_bank=see, **how)[0]
    scores["linear/top1"] = _linear(torch.cat(bank), queries, images) if linear else math.nan
    return scores


def _linear(bank: Tensor, queries: FeatureTable, images: LabelledImages) -> float:
    """Top-1 in percent. Raises DataError where an image of the bank cannot be read, whose label would be another's."""
    labels = images.bank.labels
    assert labels is not None
    if len(bank) != len(images.bank_indices):
        raise DataError(Problem("PATH", NOTHING, "has images that cannot be read", "leave out --linear"))
    mean, variance = mean_and_variance(bank)
    scale = (variance + 1e-5 * variance.mean()).rsqrt()
    fit = logistic((bank - mean) * scale, labels[images.bank_indices], len(images.classes), INVERSE_L2)
    found = fit.scores(((queries.features - mean) * scale).float()).argmax(1)
    return 100 * (found == torch.tensor(images.query_to_bank)[queries.labels]).double().mean().item()


def measure_untrained(images: LabelledImages, config: Config, *, linear: bool) -> dict[str, float]:
    """That of the network as a run begins with it, with BatchNorm statistics of images that vote."""
    backbone, size = cast(Backbone, start(config)[0].backbone.eval()), config.knn.size
    statistics_of_images(backbone, backbone, images.bank, images.bank_indices, size=size, workers=0, world=SINGLE_RANK)
    return measure(backbone, images, config, linear=linear)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """And the standard error, over seeds; nan of one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def scaled(config: Config, share: float) -> Config:
    """The recipe with that share of its samples, and of its warm-up."""
    batch, train, schedule = config.train.global_batch, config.train, config.schedule
    total = max(1, round(share * train.total_samples / batch)) * batch
    warmup = round(schedule.warmup_samples * total / train.total_samples)
    return replace(config, train=replace(train, total_samples=total), schedule=replace(schedule, warmup_samples=warmup))


def contenders_of(args: argparse.Namespace) -> list[Contender]:
    """Ours first. Raises UserError."""
    config = configure(args)
    if len(set(args.against)) < len(args.against):
        fix = "nearest: " + " ".join(dict.fromkeys(args.against))
        raise UserError(Problem("--against", " ".join(args.against), "has one twice", fix))
    found = [Contender(OURS, config, train_ours)]
    for what in args.against:
        if what in (SAMPLES_OF, TIME_OF):
            check_lightly_has(config)
            lightly_views(config.views)
            found.append(Contender(STEPS if what == SAMPLES_OF else TIME, config, train_reference, what == TIME_OF))
        else:
            other = configure(args, what, {"name": config.model.name} | config.model.explicit_keys())
            found.append(Contender(f"{what}, equal time", other, train_ours, equal_time=True))
    of_lightly = [c for c in found if c.train is train_reference]
    for contender in of_lightly:  # they are one loop
        contender.rates = of_lightly[0].rates
    return found


def lasting(contender: Contender, config: Config, cpu_s: float, source: Source) -> Config:
    """The recipe with as many samples as take so long by its runs so far, or else by a part of one."""
    if not contender.rates:
        pilot = scaled(config, PILOT)
        contender.rates.append((pilot.end(0), contender.train(pilot, source)[1]))
    samples, took = (sum(column) for column in zip(*contender.rates, strict=True))
    return scaled(config, cpu_s * samples / took / config.train.total_samples)


def run(args: argparse.Namespace) -> str:
    """Measure; returns the lines to print. Raises UserError."""
    contenders = contenders_of(args)
    ours, *others = contenders
    torch.set_num_threads(1)
    source = open_data(ours.config.data)
    images = labelled_images(ours.config, source)
    if images is None:
        raise UserError(Problem("PATH", args.path, "has no labels to measure kNN by", "give labelled --queries"))
    untrained = []
    for seed in range(args.seeds):
        with_seed = {c.name: replace(c.config, run=replace(c.config.run, seed=seed)) for c in contenders}
        scores = measure_untrained(images, with_seed[OURS], linear=args.linear)
        untrained.append(Trained(scores["knn/top1"], scores["linear/top1"], 0, 0.0))
        for one in contenders:
            config = with_seed[one.name]
            if one.equal_time:
                config = lasting(one, config, ours.runs[-1].cpu_s, source)
            backbone, cpu_s = one.train(config, source)
            found = measure(backbone.eval(), images, ours.config, linear=args.linear)
            one.runs.append(Trained(found["knn/top1"], found["linear/top1"], config.end(0), cpu_s))
            one.rates.append((config.end(0), cpu_s))
    if args.json:
        return to_json({
            "recipe": ours.config.to_dict(), "protocol": images.protocol, "queries": scores["knn/queries"],
            "majority": scores["knn/majority"], "untrained": [asdict(one) for one in untrained],
            "runs": {c.name: [asdict(one) for one in c.runs] for c in contenders},
            "ours_minus": {c.name: {key: ours_minus(ours, c, key) for key in figures(args)} for c in others},
        }, indent=1)  # fmt: skip
    return "\n".join(_table(args, images, scores, untrained, contenders))


def figures(args: argparse.Namespace) -> list[str]:
    return ["knn", "linear"] if args.linear else ["knn"]


def ours_minus(ours: Contender, other: Contender, key: str) -> tuple[float, float]:
    return mean_and_error([getattr(a, key) - getattr(b, key) for a, b in zip(ours.runs, other.runs, strict=True)])


def _table(
    args: argparse.Namespace,
    images: LabelledImages,
    scores: dict[str, float],
    untrained: list[Trained],
    contenders: list[Contender],
) -> list[str]:
    ours, width = contenders[0], 1 + max(map(len, ["untrained", *(c.name for c in contenders)]))

    def of(runs: Sequence[Trained], key: str) -> str:
        return "{:6.2f} ± {:.2f} %".format(*mean_and_error([getattr(one, key) for one in runs]))

    lines = [
        f"{args.recipe}, seeds 0 to {args.seeds - 1}, one CPU thread, torch {torch.__version__}; ± over seeds",
        images.protocol,
        f"{scores['knn/queries']:,.0f} queries (a figure's own standard error: "
        f"{scores['knn/top1_stderr']:.1f}); naming the commonest class: {scores['knn/majority']:.1f} %",
    ]
    for key in figures(args):
        lines.append(f"{'untrained':{width}}{key} {of(untrained, key)}   with BatchNorm statistics of images that vote")
        for one in contenders:
            samples, cpu_s = sum(run.samples for run in one.runs), sum(run.cpu_s for run in one.runs)
            line = f"{one.name:{width}}{key} {of(one.runs, key)}   {samples // len(one.runs):9,} samples"
            line += f"{samples / cpu_s:9.1f} a CPU second"
            if one is not ours:
                line += "   ours is {:+.2f} ± {:.2f} from it".format(*ours_minus(ours, one, key))
            lines.append(line)
    return lines
