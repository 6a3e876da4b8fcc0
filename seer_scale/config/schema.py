"""The sections of a recipe, their keys, types, defaults and ranges."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple, TypeVar

from seer_scale.config.fields import opt
from seer_scale.cores import loads_in_processes
from seer_scale.errors import Problem

ZERO_ENGINES = ("zero1", "zero2", "zero3")
EngineName = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3", "fairscale"]
METHOD_SETTINGS = "method_settings"
"""The one field of a Config whose section bears another name in a recipe: the method's."""


@dataclass(frozen=True, kw_only=True)
class Run:
    dir: str = opt("", "folder of the run: config, metrics, logs, checkpoints, report; empty = runs/<recipe name>")
    seed: int = opt(0, "seed of weights, image order and crops", ge=0)
    hang_timeout_s: float = opt(
        1200.0,
        (
            "seconds without an update after which a rank logs its stacks and ends, and launch restarts the ranks; "
            "0 = no limit"
        ),
        ge=0,
    )
    heartbeat_s: float = opt(
        60.0,
        (
            "most seconds between two progress reports: a line where there is no terminal, and what inspect reads; "
            "0 = none"
        ),
        ge=0,
    )
    sinks: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = opt(
        ("tensorboard",), "where metrics go, besides metrics.jsonl and the console; [] = nowhere else"
    )
    plugins: tuple[str, ...] = opt(
        (), "Python modules that register methods and backbones: names, or paths of files or packages (--plugin)"
    )
    prototype_images: int = opt(
        512, "images used, after training, for the report's pictures of prototypes; 0 = no such pictures", ge=0
    )
    patch_images: int = opt(
        8,
        (
            "images whose patches the report shows, after training, where one of knn.size has 4 x 4 patches or more, "
            "and whose reconstructions, of a method that makes some; 0 = none"
        ),
        ge=0,
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    path: str = opt(
        "",
        (
            "images: a folder tree, a list file (one path or URL a line, optional tab and label), tars, a "
            "manifest, hf:NAME"
        ),
    )
    kind: Literal["auto", "folder", "list", "tar", "manifest", "hub", "stream"] = opt(
        "auto", "how to read data.path; auto = by what is there (never stream)"
    )
    exclude: tuple[str, ...] = opt(
        (), "folder: patterns of files and folders to leave out, as in ['*_mask.png', 'raw/*']"
    )
    split: str = opt("train", "hub, stream: which split of the dataset")
    image_key: str = opt("", "hub, stream: the column of images; empty = the only one")
    length: int = opt(0, "stream: images an epoch; 0 = the number that the dataset states", ge=0)
    buffer: int = opt(10_000, "stream: images in the shuffle buffer", ge=1)
    block: int = opt(
        0,
        (
            "tar: neighbouring images read in one request and shown one after the other in a slot of the batch; "
            "1 = none, 0 = what suits the source"
        ),
        ge=0,
    )
    photometric: Literal["auto", "cpu", "device"] = opt(
        "auto", "where flip, colours, blur and solarisation are done; auto: on the device if it is a GPU"
    )
    workers: int | None = opt(
        None,
        "loader processes a rank; 0 = load in the training process; none = one for each core a rank may use, at most 4",
        ge=0,
    )
    max_images: int = opt(
        0,
        (
            "train on so many images of data.path only, drawn by run.seed, the fewer among the more; kNN's bank stays "
            "all of them; 0 = all"
        ),
        ge=0,
    )
    prefetch: int = opt(4, "batches loaded ahead", ge=1)
    timeout_s: float = opt(
        120.0,
        ("seconds after which a loader process that hangs at an image is replaced; other ranks wait ten times as long"),
        gt=0,
    )

    def num_workers(self, cores: int) -> int:
        """Loader processes of a rank that may use so many cores."""
        return min(4, cores if loads_in_processes() else 0) if self.workers is None else self.workers

    def on_device(self, device: str) -> bool:
        """Whether `photometric` is done on a device of this type, instead of by the loader."""
        return self.photometric == "device" or self.photometric == "auto" and device == "cuda"


ImageSize = int | tuple[int, int]
"""In pixels: the side of a square, or (height, width)."""


def shape_of(size: ImageSize) -> tuple[int, int]:
    """(height, width)"""
    return (size, size) if isinstance(size, int) else size


def sides_of(size: ImageSize) -> dict[str, int]:
    """A square's side as "it", others' as "its height" and "its width", as a problem calls them."""
    height, width = shape_of(size)
    return {"it": height} if height == width else {"its height": height, "its width": width}


def size_text(size: ImageSize | list[int]) -> str:
    """As in `224`, `160x224`; of a size in JSON, too."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


@dataclass(frozen=True, kw_only=True)
class Crop:
    num: int = opt(2, "crops of this kind an image", ge=1)
    size: ImageSize = opt(224, "in pixels: the side of a square, or [height, width]", ge=8)
    scale: tuple[float, float] = opt(
        (0.14, 1.0), "share of the image's area a crop covers, from and to", gt=0.0, le=1.0, rising=True
    )
    jitter: tuple[float, float, float, float] | None = opt(None, "null: views.jitter", ge=0)
    jitter_p: float | None = opt(None, "null: views.jitter_p", ge=0, le=1)
    grayscale_p: float | None = opt(None, "null: views.grayscale_p", ge=0, le=1)
    blur_p: float | tuple[float, ...] | None = opt(
        None, "one, or a list of one for each crop of this kind; null: views.blur_p", ge=0, le=1
    )
    blur_sigma: tuple[float, float] | None = opt(None, "null: views.blur_sigma", gt=0, rising=True)
    solarize_p: float | tuple[float, ...] | None = opt(
        None, "one, or a list of one for each crop of this kind; null: views.solarize_p", ge=0, le=1
    )

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)"""
        return shape_of(self.size)


PER_CROP = ("blur_p", "solarize_p")
"""Of a kind of crop, the keys that may be a list, one value for each crop."""
PUBLISHED_BLUR_P = {"dinov2_published": ((1.0, 0.1), 0.5), "dinov2_released": ((0.0, 0.9), 0.5)}
"""By name, views.blur_p of the two crops of the first kind and of all others."""


class Photometric(NamedTuple):
    """How one crop is flipped, coloured, blurred and solarised: what the keys of these names in `views`, or in its
    kind, say."""

    flip: float
    jitter: tuple[float, float, float, float]
    jitter_p: float
    grayscale_p: float
    blur_p: float
    blur_sigma: tuple[float, float]
    solarize_p: float


@dataclass(frozen=True, kw_only=True)
class Views:
    crops: tuple[Crop, ...] = opt(
        (Crop(), Crop(num=4, size=96, scale=(0.05, 0.14))),
        "kinds of crops, each with the keys below; targets are made of the first kind",
    )
    flip: float = opt(0.5, "probability of a horizontal flip", ge=0, le=1)
    jitter: tuple[float, float, float, float] = opt(
        (0.8, 0.8, 0.8, 0.2), "strength of jitter in brightness, contrast, saturation, hue", ge=0
    )
    jitter_p: float = opt(0.8, "probability of colour jitter", ge=0, le=1)
    grayscale_p: float = opt(0.2, "probability of conversion to grayscale", ge=0, le=1)
    blur_p: float | Literal["dinov2_published", "dinov2_released"] = opt(
        0.5,
        "probability of a Gaussian blur; dinov2_published: 1.0 and 0.1 for the two crops of the first kind, 0.5 for "
        "others; dinov2_released: 0.0, 0.9 and 0.5, which the released code makes of these (it inverts them) and "
        "its weights were trained with",
        ge=0,
        le=1,
    )
    blur_sigma: tuple[float, float] = opt(
        (0.1, 2.0), "standard deviation of the blur in pixels, from and to", gt=0, rising=True
    )
    solarize_p: float = opt(
        0.0, "probability of solarisation, which inverts channels of at least 128, after the blur", ge=0, le=1
    )

    @cached_property
    def photometric(self) -> tuple[tuple[Photometric, ...], ...]:
        """For each kind of crop that of each of its crops."""
        return tuple(tuple(self._photometric(kind, n) for n in range(c.num)) for kind, c in enumerate(self.crops))

    def _photometric(self, kind: int, n: int) -> Photometric:
        values = {}
        for key in Photometric._fields:
            own = getattr(self.crops[kind], key, None)  # flip is the same for all
            value = getattr(self, key) if own is None else own
            if isinstance(value, str):
                first, others = PUBLISHED_BLUR_P[value]
                value = others if kind else first
            values[key] = value[n] if key in PER_CROP and isinstance(value, tuple) else value
        return Photometric(**values)


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str = opt(
        "regnety_8gf", "backbone: a registered name, timm/NAME, or regnety, vit, convnext(v2) with the keys below"
    )
    depth: int | None = opt(None, "regnety, vit: number of blocks", ge=1)
    w0: int | None = opt(None, "regnety: initial width", ge=8)
    wa: float | None = opt(None, "regnety: slope of the width", ge=0)
    wm: float | None = opt(None, "regnety: width quantisation factor", gt=1)
    group_width: int | None = opt(None, "regnety: channels a group", ge=1)
    se_ratio: float | None = opt(None, "regnety: squeeze-and-excitation ratio to the block's input width", gt=0)
    width: int | None = opt(None, "vit: width of a token; convnext(v2): channels of the first stage", ge=1)
    depths: tuple[int, ...] | None = opt(None, "convnext(v2): blocks of each of its four stages", ge=1)
    heads: int | None = opt(None, "vit: heads of attention", ge=1)
    patch: int | None = opt(None, "vit, convnext(v2): side of a patch in pixels; null: 4 of a convnext(v2)", ge=1)
    ffn: Literal["mlp", "swiglu"] | None = opt(None, "vit, vit_SIZE: feed-forward network; null: the size's, or mlp")
    registers: int | None = opt(None, "vit, vit_SIZE: register tokens; null: 0", ge=0)
    positions: Literal["table", "rope"] | None = opt(
        None, "vit, vit_SIZE: a learned table, or axial rotary ones; null: table"
    )
    image_size: int | None = opt(None, "vit, vit_SIZE: in pixels, what the table is made for; null: 224", ge=1)
    position_resize: Literal["auto", "offset", "antialias", "exact"] | None = opt(
        None, "vit, vit_SIZE: how the table is resized; null or auto: antialias with registers, else offset, as DINOv2"
    )
    layer_scale: float | None = opt(
        None,
        "vit, convnext and their sizes: initial value of LayerScale; null: 1e-5 of a vit, for large ones (small ones "
        "learn sooner with 1), 1e-6 of a convnext",
        gt=0,
    )
    drop_path: float | None = opt(
        None,
        "vit and its sizes: rate of dropped branches; convnext(v2) and its sizes: of the last block; null: 0",
        ge=0,
        lt=1,
    )
    drop_path_rule: Literal["constant", "linear"] | None = opt(
        None, "vit, vit_SIZE: that rate in every block, or rising to it; null: constant"
    )

    def explicit_keys(self) -> dict[str, Any]:
        """The keys beside the name, those given."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "name" and v is not None}

    def misplaced_keys(self) -> list[str]:
        """Of `explicit_keys`, those that a network of this name does not take."""
        return [key for key in self.explicit_keys() if key not in keys_of_model(self.name)]


_SHAPES = {
    "regnety": ("depth", "w0", "wa", "wm", "group_width", "se_ratio"),
    "vit": ("width", "depth", "heads", "patch"),
    "convnext": ("width", "depths", "patch"),
    "convnextv2": ("width", "depths", "patch"),
}
"""Keys that a size by name fixes."""
_OPTIONS = {
    "regnety": (),
    "vit": ("ffn", "registers", "positions", "image_size", "position_resize", "layer_scale", "drop_path",
            "drop_path_rule"),
    "convnext": ("layer_scale", "drop_path"),
    "convnextv2": ("drop_path",),
}  # fmt: skip
"""Keys that it leaves open."""
FREE_MODELS = tuple(_SHAPES)
"""Networks whose shape a recipe gives."""
KEYS_OF_TRAINING = ("layer_scale", "drop_path", "drop_path_rule")
"""Of a model, that leave its tensors as they are."""


def keys_of_model(name: str) -> tuple[str, ...]:
    """The keys of a recipe's section `model` that a network of this name takes."""
    if name in _SHAPES:
        return _SHAPES[name] + _OPTIONS[name]
    return next((_OPTIONS[family] for family in _SHAPES if name.startswith(f"{family}_")), ())


@dataclass(frozen=True, kw_only=True)
class Method:
    name: str = opt("swav", "method of pretraining; its own keys are the section of that name")


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """The section of a recipe that a method brings: a subclass has its keys, their rules and what they depend on."""

    def rules(self, config: Config, ranks: int) -> Iterator[Problem]:
        """Rules between these keys, and between them and those of other sections or the number of ranks: those that
        are broken."""
        return iter(())

    def needs(self) -> dict[str, tuple[bool, str]]:
        """For a key that only has an effect with another: whether it has, and what it needs."""
        return {}


S = TypeVar("S", bound=MethodSettings)


@dataclass(frozen=True, kw_only=True)
class Optim:
    name: Literal["lars", "sgd", "adamw"] = opt("lars", "optimiser; lars is LARC with clip off, as in VISSL")
    lr: float = opt(0.3, "peak learning rate for a global batch of optim.lr_batch", gt=0)
    lr_batch: int = opt(
        256, "batch optim.lr was chosen for; the rate scales with train.global_batch from there; 0 = no scaling", ge=0
    )
    lr_scaling: Literal["linear", "sqrt"] = opt(
        "linear", "how the rate scales with the batch: linear, or by the square root, as is usual with AdamW"
    )
    momentum: float = opt(0.9, "SGD and LARS momentum", ge=0, lt=1)
    weight_decay: float = opt(1e-5, "weight decay", ge=0)
    weight_decay_end: float | None = opt(
        None,
        "weight decay goes to this by a cosine from sample 0 to schedule.decay_samples, and stays; none = constant",
        ge=0,
    )
    trust_coefficient: float = opt(0.001, "LARS trust coefficient", gt=0)
    exclude_vectors: bool = opt(False, "no LARS scaling and no weight decay for biases and normalisation parameters")
    betas: tuple[float, float] = opt((0.9, 0.999), "AdamW: decay rates of the moments", ge=0, lt=1)
    clip_norm: float = opt(0.0, "gradients are clipped to this norm; 0 = never", ge=0)
    clip_by: Literal["all", "part"] = opt(
        "all", "clip_norm is that of all gradients together, or of each part of the method (backbone, each head) apart"
    )
    layer_decay: float = opt(
        1.0, "the rate of each unit of the backbone (a ViT's block) is that of the next one times this", gt=0, le=1
    )
    patch_lr: float = opt(1.0, "multiplier of the rate of the backbone's first convolution (patch embedding)", gt=0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    name: Literal["cosine", "plateau"] = opt(
        "cosine", "after warm-up: cosine to the end; or constant, lowered when the loss stops falling"
    )
    warmup_samples: int = opt(0, "samples of linear warm-up", ge=0)
    warmup_share: float = opt(
        0.0,
        "the warm-up takes no more than this share of train.total_samples; 0 = no limit; a recipe's share does not "
        "bound warmup_samples of the command line",
        ge=0,
        le=1,
    )
    warmup_from: float = opt(0.015625, "learning rate at sample 0, as a share of the peak", ge=0, le=1)
    final: float = opt(0.001, "cosine: learning rate at the end, as a share of the peak", ge=0, le=1)
    decay_samples: int = opt(
        0,
        "samples at which a cosine (of the learning rate, of the weight decay) reaches its end, and stays there; "
        "0 = train.total_samples",
        ge=0,
    )
    plateau_factor: float = opt(0.5, "plateau: multiply the rate by this", gt=0, lt=1)
    plateau_samples: int = opt(
        0, "plateau: compare the mean loss of windows of so many samples, counted from the end of the warm-up", ge=0
    )
    plateau_threshold: float = opt(0.001, "plateau: a window must lower the best mean loss by this share", ge=0)


@dataclass(frozen=True, kw_only=True)
class Train:
    total_samples: int = opt(0, "length of the run: images seen (an image seen in two epochs counts twice)", ge=1)
    global_batch: int = opt(256, "images an update, over all ranks", ge=1)
    micro_batch: int = opt(
        0,
        (
            "most images a rank takes through the network at once; a larger share of the batch is split into "
            "micro-batches, with the targets of the whole batch (one more forward, if there are any); 0 = all at once"
        ),
        ge=0,
    )
    freeze_backbone_samples: int = opt(
        0,
        (
            "the backbone's parameters stay fixed until this many samples were seen, while what is new beside it "
            "settles; its BatchNorm statistics adapt to the images"
        ),
        ge=0,
    )
    precision: Literal["fp32", "fp16", "bf16"] = opt("fp32", "compute type of convolutions and matrix products")
    max_skips: int = opt(50, "as many updates skipped in a row, because gradients are not finite, end the run", ge=1)
    collapse_after: float = opt(
        0.1,
        "share of the run, after warm-up and freezing, at which a loss still at its baseline (ln K) is reported",
        ge=0,
        le=1,
    )
    log_every: int = opt(10, "updates between two metric lines", ge=1)
    threads: int = opt(
        0,
        (
            "CPU threads a rank; 0 = OMP_NUM_THREADS, or else the fastest number, measured at the start, up to the "
            "cores a rank may use"
        ),
        ge=0,
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = opt(
        "auto", "memory format of images and feature maps; auto = the faster, measured at the start"
    )
    compile: bool = opt(False, "compile each unit with torch.compile")
    min_loss_scale: float = opt(1.0, "fp16: a loss scale below this ends the run", gt=0)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    engine: Literal["auto", EngineName] = opt(
        "auto",
        "how parameters, gradients and optimiser state are held (docs/engines.md); auto = ddp if it fits, else fsdp",
    )
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute; auto = GPUs where there are any")
    ranks: int = opt(1, "ranks the recipe was written for; a run may use another number", ge=1)
    replicate_degree: int = opt(
        1, "fsdp: copies of the sharded model (HSDP: replicate_degree x shard_degree ranks)", ge=1
    )
    shard_degree: int = opt(0, "fsdp: ranks that share one copy of the model; 0 = ranks / replicate_degree", ge=0)
    reshard_after_forward: bool = opt(True, "fsdp: free gathered weights between forward and backward")
    max_unit_gib: float = opt(
        2.0, "fsdp, zero3: most GiB gathered at once; larger units are split into their layers", gt=0
    )
    min_unit_mib: float = opt(
        8.0,
        ("fsdp: consecutive units are gathered together up to this size, within max_unit_gib; 0 = each unit alone"),
        ge=0,
    )
    offload: bool = opt(
        False, "zero1, zero2, zero3: fp32 weights and optimiser state stay in the host's memory, and are updated there"
    )
    ds_config: str = opt(
        "", "zero1, zero2, zero3: JSON file with further settings of DeepSpeed; empty = ds_configs/<engine>.json"
    )
    sync_bn_group: int = opt(0, "ranks that share BatchNorm statistics; 0 = all, 1 = none", ge=0)
    activation_checkpoint: str | tuple[tuple[int, ...], ...] = opt(
        "none",
        "what is recomputed in the backward pass: none; every N = each N blocks of a stage together; units s1.b1 s2.b3 "
        "... = these blocks, each alone; or, for each of the 4 stages, the last blocks of its recomputed segments, as "
        "in [[2], [7], [9, 17], []]",
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every_samples: int = opt(0, "samples between checkpoints; 0 = only at the end and on a stop", ge=0)
    background: bool = opt(
        True, "write checkpoints beside training, from a copy in memory; false = updates wait for the disk"
    )
    keep_last: int = opt(2, "newest checkpoints kept", ge=1)
    keep_every_samples: int = opt(0, "also keep checkpoints at multiples of this number of samples; 0 = none", ge=0)
    keep_best: bool = opt(
        False,
        "also keep the checkpoint of the highest kNN top-1, saved at that evaluation and linked as checkpoints/best",
    )
    resume: str = opt(
        "auto",
        "auto = from the newest valid checkpoint in run.dir; none = refuse where there is one; or a checkpoint's path",
    )
    init_from: str = opt(
        "",
        "start a new run from weights: those of a run's newest checkpoint, of a checkpoint, or of what import and "
        "export make",
    )
    init_part: Literal["all", "backbone"] = opt(
        "all",
        "what checkpoint.init_from gives; backbone = the method's own layers start anew, as those do in any case that "
        "an imported file has not or has in other shapes",
    )


@dataclass(frozen=True, kw_only=True)
class Knn:
    bank: str = opt("", "labelled images that vote with their classes; empty = data.path where it has labels")
    queries: str = opt("", "labelled images to classify; empty = every fifth image of the bank, held out")
    size: int = opt(224, "size of the centre crop, after the short side is resized to 8/7 of this", ge=8)
    k: int = opt(20, "neighbours that vote", ge=1)
    temperature: float = opt(0.07, "weight of a neighbour is exp(cosine / temperature)", gt=0)
    batch: int = opt(64, "images a forward pass", ge=1)
    limit: int = opt(100_000, "most images of the bank; 0 = all", ge=0)
    limit_queries: int = opt(10_000, "most queries; 0 = all", ge=0)
    every_samples: int = opt(
        0, "samples between evaluations (kNN, health of features) during training; 0 = only before and after", ge=0
    )
    enabled: bool = opt(True, "measure kNN; needs labels")


@dataclass(frozen=True, kw_only=True)
class Health:
    images: int = opt(
        2048,
        "images whose features are looked at (rank, norm, alignment, uniformity: docs/health.md) whenever kNN would be "
        "measured, also without labels: of kNN's queries, or else of those trained on; 0 = none",
        ge=0,
        le=10_000,
    )


@dataclass(frozen=True, kw_only=True)
class Probe:
    enabled: bool = opt(
        False,
        "train a linear classifier on the features of the training images, which never touches the network "
        "(docs/health.md); needs labels of data.path and kNN's queries",
    )
    lr: float = opt(0.001, "its learning rate (AdamW)", gt=0)


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Run = Run()
    data: Data = Data()
    views: Views = Views()
    model: Model = Model()
    method: Method = Method()
    method_settings: MethodSettings = MethodSettings()
    """What the method's section holds; in a recipe it bears the method's name."""
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    train: Train = dataclasses.field(default_factory=lambda: Train(total_samples=1))
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    knn: Knn = Knn()
    health: Health = Health()
    probe: Probe = Probe()

    @property
    def peak_lr(self) -> float:
        """Peak learning rate, scaled by the global batch."""
        o = self.optim
        ratio = self.train.global_batch / o.lr_batch if o.lr_batch else 1.0
        return o.lr * (math.sqrt(ratio) if o.lr_scaling == "sqrt" else ratio)

    @property
    def warmup_samples(self) -> int:
        """Samples of warm-up: schedule.warmup_samples, or schedule.warmup_share of the run where that is less."""
        asked, share = self.schedule.warmup_samples, self.schedule.warmup_share
        return min(asked, round(share * self.train.total_samples)) if share else asked

    @property
    def decay_samples(self) -> int:
        """Samples at which cosines reach their end: schedule.decay_samples, or the length of the run."""
        return self.schedule.decay_samples or self.train.total_samples

    def end(self, samples_seen: int = 0) -> int:
        """Samples seen at the end of a run that has seen so many: whole batches are trained, until
        train.total_samples are seen."""
        left, batch = max(0, self.train.total_samples - samples_seen), self.train.global_batch
        return samples_seen + -(-left // batch) * batch

    @property
    def num_crops(self) -> int:
        return sum(c.num for c in self.views.crops)

    def num_micro_batches(self, world_size: int) -> int:
        """Micro-batches of each rank an update: the fewest equal ones of at most train.micro_batch images."""
        share = self.train.global_batch // world_size
        most = self.train.micro_batch or share
        return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most)

    def images_at_once(self, world_size: int) -> int:
        """Of a micro-batch of a rank."""
        return self.train.global_batch // world_size // self.num_micro_batches(world_size)

    def settings_as(self, cls: type[S]) -> S:
        """The method's section. Raises TypeError where it is another method's."""
        if not isinstance(self.method_settings, cls):
            raise TypeError(f"the recipe's method is {self.method.name}, whose section is no {cls.__name__}")
        return self.method_settings

    def sections(self) -> dict[str, Any]:
        """Every section by the name it has in a recipe, the method's after `method`."""
        out = {}
        for f in dataclasses.fields(self):
            name = self.method.name if f.name == METHOD_SETTINGS else f.name
            out[name] = getattr(self, f.name)
        return out

    def get(self, key: str) -> Any:
        """The value of a dotted key."""
        section, name = key.split(".")
        return getattr(self.sections()[section], name)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries and lists, as written to config.yaml."""
        return {name: _plain(dataclasses.asdict(section)) for name, section in self.sections().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(_without_nulls(v)) for v in value] if isinstance(value, tuple | list) else value


def _without_nulls(value: Any) -> Any:
    """Of a section in a list, a kind of crop, the keys that it gives."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


@cache
def section_classes() -> dict[str, type]:
    """The class of each field of a Config."""
    return typing.get_type_hints(Config)
