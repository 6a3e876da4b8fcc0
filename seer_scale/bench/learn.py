"""What is learned in equal updates and in equal CPU time, against a plain loop of lightly's SwAV modules.

Both have the recipe's backbone, initial weights, batch, samples, crops, photometrics, assignment and schedule. The
reference reads by Pillow, lightly's SwaVTransform and torch's DataLoader, passes each view by itself as lightly's
examples do, and is updated by torch's SGD. Both run in this process on one CPU thread without loader processes, and
one kNN measures both. A seed gives both their weights, so differences are taken seed by seed.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from seer_scale.bench.reference_swav import SINGLE_RANK
from seer_scale.config import Config, Views, load_recipe, resolve
from seer_scale.data.loading.loader import train_batches
from seer_scale.data.sampling.sampler import DataVersion, ElasticSampler
from seer_scale.data.sources import Source, open_data
from seer_scale.data.transforms.on_device import micro_batches
from seer_scale.data.transforms.views import MEAN, STD
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.evaluate.knn import LabelledImages, knn, labelled_images
from seer_scale.evaluate.statistics import statistics_of_images
from seer_scale.extras import how_to_install
from seer_scale.files import to_json
from seer_scale.methods.swav.method import SwAV
from seer_scale.methods.swav.settings import SwAVSettings
from seer_scale.models.backbone import Backbone
from seer_scale.models.execution import choose_execution
from seer_scale.models.registry import build_backbone, reset_buffers
from seer_scale.optim.schedules import LearningRate, weight_decay
from seer_scale.parallel import build_engine
from seer_scale.parallel.engine import Engine

OURS, STEPS, TIME = "ours", "lightly, equal samples", "lightly, equal time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="images to train on, as data.path takes them; they vote, too")
    parser.add_argument("--recipe", default="photos_laptop", help="a shipped recipe or a YAML file")
    parser.add_argument("--queries", default="", help="labelled images to classify (default: a fifth of PATH)")
    parser.add_argument("--samples", type=int, default=0, help="images seen (default: the recipe's)")
    parser.add_argument("--seeds", type=int, default=8, help="how many seeds, from 0 on")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


@dataclass(frozen=True)
class Trained:
    """knn: top-1 in percent. cpu_s: CPU seconds of training, without measuring."""

    knn: float
    samples: int
    cpu_s: float


# ------------------------------------------------------------------------------------------------ ours


def configure(args: argparse.Namespace) -> Config:
    """The recipe on one rank. Raises UserError, also for what lightly's modules do not have."""
    over: dict[str, Any] = {
        "data": {"path": args.path, "workers": 0},
        "train": {"threads": 1} | ({"total_samples": args.samples} if args.samples else {}),
        "parallel": {"engine": "single", "ranks": 1, "device": "cpu"},
        "checkpoint": {"every_samples": 0},
        "knn": {"queries": args.queries, "every_samples": 0},
    }
    if args.seeds < 1:
        raise UserError(Problem("--seeds", args.seeds, "must be at least 1", 1))
    config = resolve(load_recipe(args.recipe), over, world_size=1)
    s, photometrics = config.settings_as(SwAVSettings), {how for kind in config.views.photometric for how in kind}
    solarize_p = max(how.solarize_p for how in photometrics)
    for key, value, holds, has in (
        ("optim.name", config.optim.name, config.optim.name == "sgd", "sgd"),
        ("swav.hidden", s.hidden, len(s.hidden) == 1, "one hidden layer"),
        ("swav.batch_norm", s.batch_norm, s.batch_norm, "true"),
        ("swav.prototypes", s.prototypes, len(s.prototypes) == 1, "one set"),
        ("swav.queue", s.queue, not s.queue, "0"),
        ("views.crops", f"of {len(photometrics)} photometrics", len(photometrics) == 1, "the same for all"),
        ("views.solarize_p", solarize_p, not solarize_p, "0"),
    ):
        if not holds:
            raise UserError(Problem(key, value, "the loop of lightly's modules has another", has))
    return config


def start(config: Config) -> tuple[SwAV, Engine, torch.memory_format]:
    """The network as a run of this recipe starts with it."""
    with torch.device("meta"):
        method = SwAV(config, SINGLE_RANK)
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
    return method.backbone, time.process_time() - begin


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


class Reference(nn.Module):
    """lightly's head, prototypes and loss on our backbone, as in its example; all weights are those of `ours`."""

    def __init__(self, ours: SwAV, config: Config):
        from lightly.loss import SwaVLoss
        from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

        super().__init__()
        s, model = ours.config, config.model
        with torch.device("meta"):
            backbone = build_backbone(model.name, **model.explicit_keys())  # a copy would keep what an engine binds
        self.backbone = backbone.to_empty(device="cpu")
        reset_buffers(self.backbone)
        self.backbone.load_state_dict(ours.backbone.state_dict())
        self.head = SwaVProjectionHead(ours.backbone.num_features, s.hidden[0], s.embedding_dim)
        self.prototypes = SwaVPrototypes(s.embedding_dim, s.prototypes[0])
        self.loss = SwaVLoss(s.temperature, s.iterations, s.epsilon)
        self.num_assigned = ours.num_assigned
        with torch.no_grad():
            for mine, theirs in zip(_linear(ours.head), _linear(self.head), strict=True):
                theirs.weight.copy_(mine.weight)
                if theirs.bias is not None:  # before BatchNorm it has none
                    theirs.bias.copy_(mine.bias)
            (scores,) = _linear(self.prototypes)
            scores.weight.copy_(_linear(ours.prototypes)[0].weight)
            scores.bias.zero_()

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        self.prototypes.normalize()
        scores = [self.prototypes(F.normalize(self.head(self.backbone(view)), dim=1)) for view in views]
        return self.loss(scores[: self.num_assigned], scores[self.num_assigned :])


def _linear(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def train_reference(config: Config, source: Source) -> tuple[Backbone, float]:
    """The plain loop: its backbone, and the CPU seconds it took."""
    begin, batch, seed = time.process_time(), config.train.global_batch, config.run.seed
    torch.manual_seed(seed)
    model, optim, lr = Reference(start(config)[0], config), config.optim, LearningRate(config)
    vectors = [p for p in model.parameters() if p.dim() < 2]
    decayed = {"params": [p for p in model.parameters() if p.dim() > 1], "decays": True}
    others = {"params": vectors, "decays": not optim.exclude_vectors}
    optimizer = torch.optim.SGD([decayed, others], lr=config.peak_lr, momentum=optim.momentum)
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
            model(views).backward()
            optimizer.step()
            seen += batch
            if seen >= config.end(0):
                break
    return model.backbone, time.process_time() - begin


# ------------------------------------------------------------------------------------------------ compared


@torch.no_grad()
def measure(backbone: Backbone, images: LabelledImages, config: Config) -> dict[str, float]:
    """kNN of the features, which both are measured by."""

    def encode(batch: Tensor) -> tuple[Tensor, Tensor]:
        features = backbone(batch)
        return features, features

    return knn(encode, images, replace(config.knn, enabled=True), workers=0, world=SINGLE_RANK)[0]


def measure_untrained(images: LabelledImages, config: Config) -> dict[str, float]:
    """That of the network as a run begins with it, with BatchNorm statistics of images that vote."""
    backbone, size = start(config)[0].backbone.eval(), config.knn.size
    statistics_of_images(backbone, backbone, images.bank, images.bank_indices, size=size, workers=0, world=SINGLE_RANK)
    return measure(backbone, images, config)


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


def run(args: argparse.Namespace) -> str:
    """Measure; returns the lines to print. Raises UserError."""
    config = configure(args)
    lightly_views(config.views)
    torch.set_num_threads(1)
    source = open_data(config.data)
    images = labelled_images(config, source)
    if images is None:
        raise UserError(Problem("PATH", args.path, "has no labels to measure kNN by", "give labelled --queries"))
    runs: dict[str, list[Trained]] = {OURS: [], STEPS: [], TIME: []}
    scores: dict[str, float] = {}
    untrained = []
    for seed in range(args.seeds):
        seeded = replace(config, run=replace(config.run, seed=seed))
        untrained.append(measure_untrained(images, seeded)["knn/top1"])
        for name in runs:
            mine = seeded if name != TIME else scaled(seeded, runs[OURS][-1].cpu_s / runs[STEPS][-1].cpu_s)
            train = train_ours if name == OURS else train_reference
            backbone, cpu_s = train(mine, source)
            scores = measure(backbone.eval(), images, config)
            runs[name].append(Trained(scores["knn/top1"], mine.end(0), cpu_s))
    differences = {
        name: mean_and_error([ours.knn - other.knn for ours, other in zip(runs[OURS], runs[name])])
        for name in (STEPS, TIME)
    }
    if args.json:
        return to_json({
            "recipe": config.to_dict(), "protocol": images.protocol, "queries": scores["knn/queries"],
            "majority": scores["knn/majority"], "untrained": untrained,
            "runs": {name: [asdict(one) for one in found] for name, found in runs.items()},
            "ours_minus": differences,
        }, indent=1)  # fmt: skip
    return "\n".join(_table(args, images, scores, untrained, runs, differences))


def _table(
    args: argparse.Namespace,
    images: LabelledImages,
    scores: dict[str, float],
    untrained: list[float],
    runs: dict[str, list[Trained]],
    differences: dict[str, tuple[float, float]],
) -> list[str]:
    def figure(values: Sequence[float]) -> str:
        return "{:6.2f} ± {:.2f} %".format(*mean_and_error(values))

    lines = [
        f"{args.recipe}, seeds 0 to {args.seeds - 1}, one CPU thread, torch {torch.__version__}; ± over seeds",
        images.protocol,
        f"{scores['knn/queries']:,.0f} queries (a figure's own standard error: "
        f"{scores['knn/top1_stderr']:.1f}); naming the commonest class: {scores['knn/majority']:.1f} %",
        f"{'untrained':23}{figure(untrained)}   with BatchNorm statistics of images that vote",
    ]
    for name, found in runs.items():
        samples, cpu_s = sum(one.samples for one in found), sum(one.cpu_s for one in found)
        line = f"{name:23}{figure([one.knn for one in found])}   {samples // len(found):9,} samples"
        line += f"{samples / cpu_s:9.1f} a CPU second"
        if name in differences:
            line += "   ours is {:+.2f} ± {:.2f} from it".format(*differences[name])
        lines.append(line)
    return lines
