"""Recipes: frozen typed dataclasses, read from YAML and the command line by one pure `resolve()`.

Precedence: defaults < YAML < command line. Every problem of a recipe is found in one pass and reported together, each
as one sentence with key, value, rule and nearest fix. Nothing mutates a `Config` afterwards. Durations are counted in
samples (images), so a recipe means the same on any number of ranks; one key counts ranks, parallel.sync_bn_group, as
the papers do, and what BatchNorm then normalises over is that many ranks' share of the batch.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from seer_scale.cores import loads_in_processes
from seer_scale.errors import ConfigError, UserError, closest, nearest

RECIPES = Path(__file__).parent / "recipes"
ZERO = ("zero1", "zero2", "zero3")
EngineName = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3", "fairscale"]


def opt(
    default: Any,
    help: str,  # noqa: A002 - the field's help
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A field with its meaning and range; tuples are checked item by item."""
    limits = {k: v for k, v in dict(ge=ge, gt=gt, le=le, lt=lt).items() if v is not None}
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits})


@dataclass(frozen=True, kw_only=True)
class Run:
    dir: str = opt("", "folder of the run: config, metrics, logs, checkpoints, report; empty = runs/<recipe name>")
    seed: int = opt(0, "seed of weights, image order and crops", ge=0)
    hang_timeout_s: float = opt(
        1200.0,
        (
            "seconds without an update after which a rank writes its stacks and ends, to be started again; 0 = "
            "wait for ever"
        ),
        ge=0,
    )
    heartbeat_s: float = opt(
        60.0,
        (
            "seconds at most between two signs of life: a line where there is no terminal, and what inspect reads; "
            "0 = none"
        ),
        ge=0,
    )
    sinks: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = opt(
        ("tensorboard",), "where metrics go beside metrics.jsonl and the console; [] = nowhere else"
    )
    prototype_images: int = opt(
        512, "images looked at, after training, for the report's pictures of prototypes; 0 = no such pictures", ge=0
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
        "auto", "how to read data.path; auto looks at it (stream is never chosen by itself)"
    )
    exclude: tuple[str, ...] = opt(
        (), "folder: patterns of files and folders to leave out, as in ['*_mask.png', 'raw/*']"
    )
    split: str = opt("train", "hub, stream: which split of the dataset")
    image_key: str = opt("", "hub, stream: the column of images; none = the only one there is")
    length: int = opt(0, "stream: images an epoch; 0 = as many as the dataset says it has", ge=0)
    buffer: int = opt(10_000, "stream: images that are shuffled among each other", ge=1)
    block: int = opt(
        0,
        (
            "neighbours that are read together and come one after the other in every lane; 1 = none, 0 = what "
            "suits the source"
        ),
        ge=0,
    )
    photometric: Literal["auto", "cpu", "device"] = opt(
        "auto", "where flip, colours and blur are done; auto: on the device if it is a GPU"
    )
    workers: int | None = opt(
        None,
        "loader processes a rank; 0 loads in the training process; none = one for each core a rank may use, 4 at most",
        ge=0,
    )
    prefetch: int = opt(4, "batches kept ready", ge=1)
    timeout_s: float = opt(
        120.0,
        (
            "seconds after which a loader process that is stuck at an image is replaced; other ranks wait for ten "
            "times that"
        ),
        gt=0,
    )

    def num_workers(self, cores: int) -> int:
        """Loader processes of a rank that may use so many cores."""
        return min(4, cores if loads_in_processes() else 0) if self.workers is None else self.workers

    def on_device(self, device: str) -> bool:
        """Whether flip, colours and blur are done on a device of this type, instead of by the loader."""
        return self.photometric == "device" or self.photometric == "auto" and device == "cuda"


@dataclass(frozen=True, kw_only=True)
class Crop:
    num: int = opt(2, "crops of this kind an image", ge=1)
    size: int = opt(224, "height and width in pixels", ge=8)
    scale: tuple[float, float] = opt(
        (0.14, 1.0), "share of the image's area a crop covers, from and to", gt=0.0, le=1.0
    )


@dataclass(frozen=True, kw_only=True)
class Views:
    crops: tuple[Crop, ...] = opt(
        (Crop(), Crop(num=4, size=96, scale=(0.05, 0.14))), "kinds of crops; the codes come from the first kind"
    )
    flip: float = opt(0.5, "probability of a horizontal flip", ge=0, le=1)
    jitter: tuple[float, float, float, float] = opt((0.8, 0.8, 0.8, 0.2), "brightness, contrast, saturation, hue", ge=0)
    jitter_p: float = opt(0.8, "probability of colour jitter", ge=0, le=1)
    grayscale_p: float = opt(0.2, "probability of dropping colour", ge=0, le=1)
    blur_p: float = opt(0.5, "probability of a Gaussian blur", ge=0, le=1)
    blur_sigma: tuple[float, float] = opt((0.1, 2.0), "standard deviation of the blur in pixels, from and to", gt=0)


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str = opt("regnety_8gf", "backbone: a registered name, timm/NAME, or regnety with the six keys below")
    depth: int | None = opt(None, "regnety: number of blocks", ge=1)
    w0: int | None = opt(None, "regnety: initial width", ge=8)
    wa: float | None = opt(None, "regnety: slope of the width", ge=0)
    wm: float | None = opt(None, "regnety: width quantisation factor", gt=1)
    group_width: int | None = opt(None, "regnety: channels a group", ge=1)
    se_ratio: float | None = opt(None, "regnety: squeeze-and-excitation ratio to the block's input width", gt=0)

    def explicit_keys(self) -> dict[str, Any]:
        """The keys of a free `regnety`, those given."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "name" and v is not None}


@dataclass(frozen=True, kw_only=True)
class SwAV:
    hidden: tuple[int, ...] = opt((4096, 4096), "widths of the projection head's hidden layers", ge=1)
    embedding_dim: int = opt(256, "width of the embedding", ge=2)
    batch_norm: bool = opt(True, "BatchNorm in the projection head")
    prototypes: tuple[int, ...] = opt((16000,), "number of prototypes of each set", ge=2)
    temperature: float = opt(0.1, "softmax temperature of the prediction", gt=0)
    epsilon: float = opt(0.05, "entropy weight of the Sinkhorn assignment", gt=0)
    iterations: int = opt(10, "Sinkhorn iterations", ge=1)
    queue: int = opt(0, "past global samples that join the assignment; 0 = none", ge=0)
    queue_from_samples: int = opt(0, "the queue joins once this many samples were seen (and it is full)", ge=0)
    freeze_samples: int = opt(0, "prototypes stay fixed for the first so many samples", ge=0)


@dataclass(frozen=True, kw_only=True)
class Optim:
    name: Literal["lars", "sgd", "adamw"] = opt("lars", "optimiser; lars is LARC with clip off, as in VISSL")
    lr: float = opt(0.3, "peak learning rate for a global batch of optim.lr_batch", gt=0)
    lr_batch: int = opt(
        256, "batch optim.lr was chosen for; the rate scales linearly with train.global_batch; 0 = no scaling", ge=0
    )
    momentum: float = opt(0.9, "SGD and LARS momentum", ge=0, lt=1)
    weight_decay: float = opt(1e-5, "weight decay", ge=0)
    trust_coefficient: float = opt(0.001, "LARS trust coefficient", gt=0)
    exclude_vectors: bool = opt(False, "no LARS scaling and no weight decay for biases and normalisation parameters")
    betas: tuple[float, float] = opt((0.9, 0.999), "AdamW", ge=0, lt=1)
    clip_norm: float = opt(0.0, "gradients longer than this are shortened to it; 0 = never", ge=0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    name: Literal["cosine", "plateau"] = opt(
        "cosine", "after warm-up: cosine to the end, or constant, cut when the loss stops falling"
    )
    warmup_samples: int = opt(0, "samples of linear warm-up", ge=0)
    warmup_from: float = opt(0.015625, "learning rate at sample 0, as a share of the peak", ge=0, le=1)
    final: float = opt(0.001, "cosine: learning rate at the end, as a share of the peak", ge=0, le=1)
    decay_samples: int = opt(
        0, "cosine: samples after which the rate is at its end, and stays there; 0 = train.total_samples", ge=0
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
            "most images a rank takes through the network at once; a larger share of the batch is accumulated, "
            "with the same codes (one forward more); 0 = all at once"
        ),
        ge=0,
    )
    precision: Literal["fp32", "fp16", "bf16"] = opt("fp32", "compute type of convolutions and matrix products")
    max_skips: int = opt(50, "updates skipped in a row, for gradients that are not finite, that end the run", ge=1)
    collapse_after: float = opt(
        0.1, "share of the run, after warm-up and freezing, at which a loss still at ln K is reported", ge=0, le=1
    )
    log_every: int = opt(10, "updates between two metric lines", ge=1)
    threads: int = opt(
        0,
        (
            "CPU threads a rank; 0 = OMP_NUM_THREADS, or else measured at the start: of the cores a rank may use, "
            "as many as run faster"
        ),
        ge=0,
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = opt(
        "auto", "layout of images and feature maps; auto measures both at the start and takes the faster"
    )
    compile: bool = opt(False, "compile each unit with torch.compile")
    min_loss_scale: float = opt(1.0, "fp16: a loss scale that has fallen below this ends the run", gt=0)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    engine: Literal["auto", EngineName] = opt(
        "auto", "what holds parameters, gradients and optimiser state (docs/engines.md); auto = the cheapest that fits"
    )
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute; auto = GPUs where there are any")
    ranks: int = opt(1, "ranks the recipe was written for; a run may use another number", ge=1)
    replicate_degree: int = opt(1, "fsdp: copies of the sharded model (HSDP: replicate x shard ranks)", ge=1)
    shard_degree: int = opt(0, "fsdp: ranks one copy of the model is spread over; 0 = ranks / replicate", ge=0)
    reshard_after_forward: bool = opt(True, "fsdp: free gathered weights between forward and backward")
    max_unit_gib: float = opt(
        2.0, "fsdp, zero3: most GiB gathered at once; larger units are split into their layers", gt=0
    )
    min_unit_mib: float = opt(
        8.0,
        (
            "fsdp: consecutive units are gathered together until they come to so many MiB, within max_unit_gib; 0 "
            "= each alone"
        ),
        ge=0,
    )
    offload: bool = opt(
        False, "zero1, zero2, zero3: fp32 weights and optimiser state live in the host's memory, and update there"
    )
    ds_config: str = opt(
        "", "zero1, zero2, zero3: JSON with what DeepSpeed needs beyond the recipe; empty = ds_configs/<engine>.json"
    )
    sync_bn_group: int = opt(0, "ranks that share BatchNorm statistics; 0 = all, 1 = none", ge=0)
    activation_checkpoint: str | tuple[tuple[int, ...], ...] = opt(
        "none",
        "what is recomputed in the backward pass: none; every N = each N blocks of a stage together; or for each of "
        "the 4 stages the blocks that end a recomputed run, as in [[2], [7], [9, 17], []]",
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every_samples: int = opt(0, "samples between checkpoints; 0 = only at the end and on a stop", ge=0)
    background: bool = opt(
        True, "write checkpoints while training goes on, from a copy in memory; false: updates wait for the disk"
    )
    keep_last: int = opt(2, "newest checkpoints kept", ge=1)
    keep_every_samples: int = opt(0, "also keep those at multiples of so many samples; 0 = none", ge=0)
    keep_best: bool = opt(
        False,
        "also keep the checkpoint of the highest kNN top-1, saved at that evaluation and linked as checkpoints/best",
    )
    resume: str = opt(
        "auto",
        "auto: go on from the newest valid checkpoint in run.dir; none: refuse if there is one; or a checkpoint's path",
    )
    init_from: str = opt("", "start a new run from the weights of this checkpoint, or of the newest one of this run")
    init_part: Literal["all", "backbone"] = opt(
        "all", "what checkpoint.init_from gives; backbone: projection head and prototypes are drawn anew"
    )


@dataclass(frozen=True, kw_only=True)
class Knn:
    bank: str = opt("", "labelled images whose classes vote; empty = data.path where it has labels")
    queries: str = opt("", "labelled images to classify; empty = every fifth image of the bank, held out")
    size: int = opt(224, "images are resized so that the short side is 8/7 of this, then centre cropped", ge=8)
    k: int = opt(20, "neighbours that vote", ge=1)
    temperature: float = opt(0.07, "weight of a neighbour is exp(cosine / temperature)", gt=0)
    batch: int = opt(64, "images a forward pass", ge=1)
    limit: int = opt(100_000, "use at most so many bank images; 0 = all", ge=0)
    limit_queries: int = opt(10_000, "classify at most so many queries; 0 = all", ge=0)
    every_samples: int = opt(0, "samples between evaluations during training; 0 = only before and after", ge=0)
    enabled: bool = opt(True, "evaluate at all; needs labels")


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Run = Run()
    data: Data = Data()
    views: Views = Views()
    model: Model = Model()
    swav: SwAV = SwAV()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    train: Train = dataclasses.field(default_factory=lambda: Train(total_samples=1))
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    knn: Knn = Knn()

    @property
    def peak_lr(self) -> float:
        """Peak learning rate after linear scaling by the global batch."""
        o = self.optim
        return o.lr * self.train.global_batch / o.lr_batch if o.lr_batch else o.lr

    def end(self, samples_seen: int = 0) -> int:
        """Samples seen at the end of a run that has seen so many: whole batches are trained, until
        train.total_samples are seen."""
        left, batch = max(0, self.train.total_samples - samples_seen), self.train.global_batch
        return samples_seen + -(-left // batch) * batch

    @property
    def num_crops(self) -> int:
        return sum(c.num for c in self.views.crops)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of each rank an update: the fewest equal ones of at most train.micro_batch images."""
        share = self.train.global_batch // world_size
        most = self.train.micro_batch or share
        return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries and lists, as written to config.yaml."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


# ------------------------------------------------------------------------------------------------ typed reading


class _Bad(Exception):
    """A value that does not fit its type; the text completes the sentence "KEY is VALUE, but ..."."""


def _coerce(tp: Any, value: Any, key: str, problems: list[str]) -> Any:
    """`value` as type `tp`. Raises _Bad for a value of another kind; nested problems go to `problems`."""
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin in (types.UnionType, typing.Union):
        if type(None) in args and (value is None or value == "none"):  # as --help calls it
            return None
        kinds = [
            a
            for a in args
            if a is not type(None) and isinstance(value, list | tuple) == (typing.get_origin(a) is tuple)
        ]
        return _coerce((kinds or args)[0], value, key, problems)
    if origin is Literal:
        if value not in args:
            found = closest(str(value), args)
            raise _Bad(f"must be one of {', '.join(map(str, args))}" + (f"; did you mean {found}?" if found else ""))
        return value
    if origin is tuple:
        if isinstance(value, str) and "," in value and args[0] is not str:
            raise _Bad(f"must be a list, as in [{value}]")
        items = value if isinstance(value, list | tuple) else [value]
        item_types = [args[0]] * len(items) if args[1:] == (Ellipsis,) else list(args)
        if len(items) != len(item_types):
            raise _Bad(f"needs {len(item_types)} values, as in [{', '.join('1' * len(item_types))}]")
        return tuple(_coerce(t, v, f"{key}[{i}]", problems) for i, (t, v) in enumerate(zip(item_types, items)))
    if isinstance(tp, type) and dataclasses.is_dataclass(tp):
        return read_section(tp, value, key, problems)
    if tp is bool and isinstance(value, bool):
        return value
    if tp is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if tp in (int, float) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-6 as text: a number is what float() takes
            number = float(value) if not isinstance(value, int) else value
            if tp is float:
                return float(number)
            if isinstance(number, int) or number.is_integer():
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise _Bad(f"must be {names.get(tp, tp)}")


def _check_limits(limits: dict[str, float], value: Any) -> None:
    for v in value if isinstance(value, tuple) else (value,):
        if not isinstance(v, int | float) or isinstance(v, bool):
            continue
        if not math.isfinite(v):
            raise _Bad("must be finite")
        for rule, bound in limits.items():
            ok, words = {
                "ge": (v >= bound, "at least"), "gt": (v > bound, "greater than"),
                "le": (v <= bound, "at most"), "lt": (v < bound, "less than"),
            }[rule]  # fmt: skip
            if not ok:
                raise _Bad(f"must be {words} {bound}")


def read_section(cls: type, given: Any, prefix: str, problems: list[str]) -> Any:
    """Dataclass `cls` from a mapping; problems are collected, and a broken field keeps its default."""
    if given is None:
        given = {}
    if not isinstance(given, dict):
        problems.append(f"{prefix or 'the recipe'} is {given!r}, but must be a section of keys.")
        given = {}
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for name, value in given.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in fields:
            known = [f"{prefix}.{n}" if prefix else n for n in fields]
            everywhere = {k.rsplit(".", 1)[-1]: k for k, *_ in all_keys()}
            near, section = nearest(key, known), closest(key, known)
            if cls is Config and section:
                near = (
                    f"did you mean the section {section}, with its keys "
                    f"{', '.join(f.name for f in dataclasses.fields(hints[section]))}?"
                )
            hint = f"did you mean {everywhere[name]}?" if name in everywhere else near
            problems.append(f"{key} is not a key; {hint}")
            continue
        try:
            values[name] = _coerce(hints[name], value, key, problems)
            _check_limits(fields[name].metadata.get("limits", {}), values[name])
        except _Bad as bad:
            values.pop(name, None)
            problems.append(f"{key} is {value!r}, but {bad}{'' if str(bad).endswith(('?', '.')) else '.'}")
    if cls is Train:  # where it is missing or wrong, no other rule shall be broken by its default
        values.setdefault("total_samples", sys.maxsize)
    return cls(**values)


def all_keys(cls: type = Config, prefix: str = "") -> list[tuple[str, str, Any, str]]:
    """Every key as (dotted name, type, default, meaning), in the order of the recipe."""
    rows = []
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        key = f"{prefix}{f.name}"
        if dataclasses.is_dataclass(hints[f.name]):
            rows += all_keys(hints[f.name], key + ".")
        else:
            rows.append((key, _type_name(hints[f.name]), f.default, f.metadata["help"]))
    return rows


def _type_name(tp: Any) -> str:
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        return f"[{_type_name(args[0])}, ...]" if args[1:] == (Ellipsis,) else f"[{', '.join(map(_type_name, args))}]"
    if origin is types.UnionType:
        return " | ".join(_type_name(a) for a in args if a is not type(None))
    return "{num, size, scale}" if tp is Crop else tp.__name__


# ------------------------------------------------------------------------------------------------ sources of a recipe


def recipe_names() -> list[str]:
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """YAML without its traps: of a key given twice it would take the last and say nothing, and 12:00:00 would be
    43,200."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [k.value for k, _ in node.value]
        twice = next((k for i, k in enumerate(keys) if k in keys[:i]), None)
        if twice is not None:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1} begins a section that has {twice} twice")
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        plain = self.construct_yaml_int if node.tag.endswith("int") else self.construct_yaml_float
        return node.value if ":" in node.value else plain(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def yaml_problem(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """What PyYAML complains of, in a line, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        context = f"{error.context}, " * bool(error.context)
        return f"line {mark.line + 1}, column {mark.column + 1}: {context}{error.problem}"
    return " ".join(str(error).split())


def read_yaml(path: Path, example: str) -> dict[str, Any]:
    """The mapping in a YAML file. example: of what it should hold. Raises UserError."""
    try:
        given = yaml.load(path.read_text(), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {yaml_problem(error)}.") from error
    if not isinstance(given, dict):
        raise UserError(f"{path} must hold {example}, not {type(given).__name__}.")
    return given


def load_recipe(name_or_path: str) -> dict[str, Any]:
    """The mapping in a shipped recipe or a YAML file. Raises UserError."""
    path = Path(name_or_path)
    if name_or_path in recipe_names():
        path = RECIPES / f"{name_or_path}.yaml"
    elif os.path.isdir(path) or os.path.isfile(path) and path.suffix.lower() not in (".yaml", ".yml", ".json", ""):
        raise UserError(
            f"{name_or_path} is no recipe: to train on images there give a recipe's name and their path, such as "
            f"photos_laptop --data.path {name_or_path}"
        )
    elif not os.path.isfile(path) and (path.suffix in (".yaml", ".yml") or "/" in name_or_path):
        beside = sorted(glob.glob(os.path.join(glob.escape(str(path.parent)), "*.y*ml")))
        raise UserError(
            f"There is no file {name_or_path}; "
            f"{nearest(name_or_path, beside) if beside else 'nor any recipe beside it.'}"
        )
    elif not os.path.isfile(path):
        raise UserError(
            f"There is no recipe {name_or_path!r}: give a YAML file or a shipped name; "
            f"{nearest(name_or_path, recipe_names())}"
        )
    return read_yaml(path, "sections of keys, such as 'train:'")


SHAPE = tuple(f.name for f in dataclasses.fields(Model) if f.name != "name")
"""Keys of a network whose shape is given freely."""


def as_asked(name: str, given: dict[str, Any], over: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A shipped recipe's mapping without what goes with its own images or network, where the command line names others;
    and what to say of it: the labelled images beside its own, the shape of its own network."""
    if name not in recipe_names():
        return given, ""
    notes = []
    for section, keys, changed, of_its_own in (
        ("knn", ("bank", "queries"), "data.path", "go with its own images, and are left out as data.path names others"),
        ("model", SHAPE, "model.name", "shape its own network, and are left out as model.name names another"),
    ):
        place, key = changed.split(".")
        changes, own, kept = over.get(place), given.get(section) or {}, over.get(section) or {}
        gone = [k for k in keys if own.get(k) and k not in kept]
        is_other = isinstance(changes, dict) and key in changes and (changed, changes[key]) != ("model.name", "regnety")
        if is_other and gone:
            notes.append(f"{' and '.join(f'{section}.{k}' for k in gone)} of the recipe {name} {of_its_own}.")
            given = given | {section: {k: v for k, v in own.items() if k not in gone}}
    return given, " ".join(notes)


def parse_overrides(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """`--a.b value` and `--a.b=value` as a nested mapping, with the problems found; values are read as YAML."""
    nested: dict[str, Any] = {}
    problems, words = [], list(words)
    text_keys, texts_keys = ({k for k, tp, *_ in all_keys() if tp == kind} for kind in ("str", "[str, ...]"))
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            quote = " A pattern goes in quotes, as in --data.path 'DIR/*.tar'." if os.path.exists(word) else ""
            problems.append(f"{word!r} stands alone; overrides are written --section.key value.{quote}")
            continue
        key, given, value = word[2:].partition("=")
        if not given:
            if not words or (words[0].startswith("--")):
                problems.append(f"--{key} has no value; write --{key} VALUE.")
                continue
            value = words.pop(0)
        try:
            is_text = key in text_keys or key in texts_keys and not value.startswith("[")
            parsed = value if is_text else yaml.safe_load(value)
        except yaml.YAMLError:
            problems.append(f"--{key} is {value!r}, but must be a YAML value, such as 3, 0.1, true or [1, 2].")
            continue
        *sections, name = key.split(".")
        place = nested
        for s in sections:
            place = place.setdefault(s, {})
            if not isinstance(place, dict):
                problems.append(f"--{key} goes below {s}, which was given a value.")
                place = {}
        twice = f"--{key} is given twice; give it once."
        if name in place and twice not in problems:
            problems.append(twice)
        place[name] = parsed
    return nested, problems


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one; where both have a key, `over` says what it is."""
    both = dict(base)
    for k, v in over.items():
        both[k] = merge(both[k], v) if isinstance(v, dict) and isinstance(both.get(k), dict) else v
    return both


# ------------------------------------------------------------------------------------------------ resolve


def resolve(
    given: dict[str, Any],
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    world_size: int | None = None,
    also: Callable[[Config], list[str]] = lambda config: [],
) -> Config:
    """The frozen Config of a recipe, checked for `world_size` ranks (default: parallel.ranks).

    `also` brings the checks of rooms above this one (does the data exist, can the model be built). Raises ConfigError
    with every problem.
    """
    config, problems = checked(given, overrides, world_size=world_size, also=also)
    if problems:
        raise ConfigError(problems)
    return config


def checked(
    given: dict[str, Any],
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    world_size: int | None = None,
    also: Callable[[Config], list[str]] = lambda config: [],
) -> tuple[Config, list[str]]:
    """As `resolve`, with the problems beside the Config. Raises ConfigError, with all of them, where a value cannot be
    read."""
    over, problems = (overrides, []) if isinstance(overrides, dict) else parse_overrides(list(overrides))
    merged = merge(given, over)
    config = read_section(Config, merged, "", problems)
    if not isinstance(merged.get("train"), dict) or "total_samples" not in merged["train"]:
        problems.append("train.total_samples is missing: give the number of images the run sees, such as 1000000.")
    is_read = not problems
    if not config.data.path:
        problems.append(
            "data.path is empty: give a folder of images, a list file or tars, as in --data.path ~/Pictures."
        )
    broken = [
        key for key in (p.partition(" ")[0] for p in problems) if "." in key
    ]  # their defaults stand in: what is said of those is not true
    further = cross_checks(config, world_size or config.parallel.ranks) + without_effect(config) + also(config)
    problems += [p for p in further if not any(key in p for key in broken)]
    if not is_read:
        raise ConfigError(problems)
    return config, problems


def without_effect(c: Config) -> list[str]:
    """Keys that differ from their default but that nothing would read: nothing given is silently ignored."""
    needs = {
        "optim.trust_coefficient": (c.optim.name == "lars", "optim.name lars"),
        "optim.momentum": (c.optim.name != "adamw", "optim.name lars or sgd"),
        "optim.betas": (c.optim.name == "adamw", "optim.name adamw"),
        "schedule.final": (c.schedule.name == "cosine", "schedule.name cosine"),
        "schedule.decay_samples": (c.schedule.name == "cosine", "schedule.name cosine"),
        "schedule.plateau_factor": (c.schedule.name == "plateau", "schedule.name plateau"),
        "schedule.plateau_samples": (c.schedule.name == "plateau", "schedule.name plateau"),
        "schedule.plateau_threshold": (c.schedule.name == "plateau", "schedule.name plateau"),
        "swav.queue_from_samples": (c.swav.queue > 0, "a swav.queue"),
        "parallel.reshard_after_forward": (c.parallel.engine in ("fsdp", "auto"), "parallel.engine fsdp"),
        "parallel.max_unit_gib": (c.parallel.engine in ("fsdp", "zero3", "auto"), "parallel.engine fsdp or zero3"),
        "parallel.min_unit_mib": (c.parallel.engine in ("fsdp", "auto"), "parallel.engine fsdp"),
        "parallel.ds_config": (c.parallel.engine in ZERO, f"parallel.engine {', '.join(ZERO)}"),
        "train.min_loss_scale": (c.train.precision == "fp16", "train.precision fp16"),
        "checkpoint.keep_best": (c.knn.enabled and c.knn.every_samples > 0, "knn.every_samples"),
        "checkpoint.init_part": (bool(c.checkpoint.init_from), "a checkpoint.init_from"),
        "data.prefetch": (c.data.workers != 0, "data.workers of at least 1"),
        "data.timeout_s": (c.data.workers != 0, "data.workers of at least 1"),
        "data.block": (c.data.kind != "stream", "a data.kind other than stream"),
        "data.length": (c.data.kind == "stream", "data.kind stream"),
        "data.buffer": (c.data.kind == "stream", "data.kind stream"),
        "data.split": (c.data.kind in ("auto", "hub", "stream"), "data.kind hub or stream"),
        "data.image_key": (c.data.kind in ("auto", "hub", "stream"), "data.kind hub or stream"),
    }
    problems = []
    for key, _, default, _ in all_keys():
        has_effect, need = needs.get(key, (True, ""))
        section, name = key.split(".")
        value = getattr(getattr(c, section), name)
        if not has_effect and value != default:
            problems.append(f"{key} is {value}, but has no effect without {need}; remove it, or give that.")
    return problems


def cross_checks(c: Config, world_size: int) -> list[str]:
    """Rules between keys, and between keys and the number of ranks; each broken one is a sentence."""
    problems = []
    batch, p, s = c.train.global_batch, c.parallel, c.swav

    def fail(condition: bool, sentence: str) -> None:
        if condition:
            problems.append(sentence)

    fail(
        bool(c.data.workers) and not loads_in_processes(),
        f"data.workers is {c.data.workers}, but loader processes need Linux; nearest: 0.",
    )
    if batch % world_size:
        below, above = batch // world_size * world_size, -(-batch // world_size) * world_size
        near = " or ".join(str(n) for n in (below, above) if n)
        fail(
            True,
            f"train.global_batch is {batch}, but must divide evenly among the ranks ({world_size}); nearest: {near}.",
        )
    if p.sync_bn_group and world_size % p.sync_bn_group:
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        closest = min(divisors, key=lambda d: abs(d - p.sync_bn_group))
        fail(
            True,
            (
                f"parallel.sync_bn_group is {p.sync_bn_group}, but must divide the number of ranks "
                f"({world_size}); nearest: {closest}."
            ),
        )
    if world_size % p.replicate_degree:
        closest = max(d for d in range(1, p.replicate_degree + 1) if world_size % d == 0)
        fail(
            True,
            (
                f"parallel.replicate_degree is {p.replicate_degree}, but must divide the number of ranks "
                f"({world_size}); nearest: {closest}."
            ),
        )
    elif p.shard_degree and p.replicate_degree * p.shard_degree != world_size:
        fail(
            True,
            (
                f"parallel.replicate_degree x parallel.shard_degree is {p.replicate_degree} x {p.shard_degree} = "
                f"{p.replicate_degree * p.shard_degree}, but there are {world_size} ranks; "
                f"nearest: shard_degree {world_size // p.replicate_degree}."
            ),
        )
    for key, value in (("replicate_degree", p.replicate_degree > 1), ("shard_degree", p.shard_degree > 0)):
        fail(
            value and p.engine not in ("fsdp", "auto"),
            (
                f"parallel.{key} is {getattr(p, key)}, but parallel.engine is {p.engine}, which has no mesh of "
                f"replicas and shards; use engine fsdp, or leave {key} out."
            ),
        )
    most = 1024 * p.max_unit_gib
    fail(
        p.engine in ("fsdp", "auto") and p.min_unit_mib > most,
        f"parallel.min_unit_mib is {p.min_unit_mib:g}, but parallel.max_unit_gib {p.max_unit_gib:g} lets no more than "
        f"{most:g} MiB be gathered together; nearest: {most:g}.",
    )
    fail(
        p.engine == "single" and world_size > 1,
        f"parallel.engine is single, but there are {world_size} ranks; use ddp or fsdp.",
    )
    fail(
        p.offload and p.engine not in ZERO,
        (
            f"parallel.offload is true, but parallel.engine is {p.engine}, which offloads nothing; use "
            f"{', '.join(ZERO)}, or offload false."
        ),
    )
    if batch % world_size == 0:
        normalised = batch // world_size // c.accumulation(world_size) * (p.sync_bn_group or world_size)
        fail(
            normalised < 2,
            (
                f"train.global_batch is {batch}, which leaves BatchNorm {normalised} image to normalise over; it "
                "needs at least 2."
            ),
        )
    fail(
        c.data.workers != 0 and 0 < c.run.hang_timeout_s < 10 * c.data.timeout_s,
        (
            f"run.hang_timeout_s is {c.run.hang_timeout_s:g}, but a rank may wait {10 * c.data.timeout_s:g} s for "
            f"another's loader (10 x data.timeout_s); nearest: {10 * c.data.timeout_s:g}, or 0 for none."
        ),
    )
    for k in s.prototypes:
        most = 4 * (batch + s.queue)
        fail(
            k > most,
            (
                f"swav.prototypes is {k}, but an assignment of {batch + s.queue} samples (train.global_batch + "
                f"swav.queue) can use at most 4 times as many; nearest: {most}."
            ),
        )
    fail(not s.prototypes, "swav.prototypes is empty, but must name at least one set; nearest: [3000].")
    fail(not c.views.crops, "views.crops is empty, but must name at least one kind of crop; nearest: [{num: 2}].")
    fail(
        bool(c.views.crops) and c.num_crops < 2,
        "views.crops makes 1 crop an image, but SwAV compares at least 2; nearest: num: 2.",
    )
    for i, crop in enumerate(c.views.crops):
        fail(
            crop.scale[0] > crop.scale[1],
            f"views.crops[{i}].scale is {list(crop.scale)}, but must go from small to large.",
        )
    sizes = [crop.size for crop in c.views.crops]
    fail(
        len(set(sizes)) < len(sizes),
        f"views.crops has the sizes {sizes}, but each kind needs its own; give kinds of one size one entry.",
    )
    fail(
        c.views.blur_sigma[0] > c.views.blur_sigma[1],
        f"views.blur_sigma is {list(c.views.blur_sigma)}, but must go from small to large.",
    )
    fail(
        c.views.jitter[3] > 0.5,
        f"views.jitter has hue {c.views.jitter[3]}, but a hue shift is at most 0.5; nearest: 0.5.",
    )
    fail(
        s.queue % batch != 0,
        (
            f"swav.queue is {s.queue}, but must be a multiple of train.global_batch ({batch}); nearest: "
            f"{max(1, round(s.queue / batch)) * batch}."
        ),
    )
    fail(
        0 < c.schedule.decay_samples < c.schedule.warmup_samples,
        f"schedule.decay_samples is {c.schedule.decay_samples}, but the warm-up alone takes "
        f"{c.schedule.warmup_samples} samples; nearest: {c.schedule.warmup_samples}.",
    )
    fail(
        c.schedule.warmup_samples > c.train.total_samples,
        (
            f"schedule.warmup_samples is {c.schedule.warmup_samples}, but the run has {c.train.total_samples} samples; "
            f"nearest: {c.train.total_samples}, or less, as in --schedule.warmup_samples {c.train.total_samples // 10}."
        ),
    )
    fail(
        c.schedule.name == "plateau" and c.schedule.plateau_samples < batch,
        f"schedule.plateau_samples is {c.schedule.plateau_samples}, but a window needs at least one update; "
        f"nearest: {batch} (train.global_batch).",
    )
    free = c.model.explicit_keys()
    fail(
        c.model.name != "regnety" and bool(free),
        (
            f"model.{next(iter(free), '')} is given, but model.name is {c.model.name}, whose shape is fixed; use "
            f"model.name regnety, or give {' '.join(f'--model.{key} null' for key in free)}."
        ),
    )
    fail(
        bool(c.checkpoint.init_from) and c.checkpoint.resume not in ("auto", "none"),
        (
            "checkpoint.init_from and checkpoint.resume both name a checkpoint: init_from starts a new run from "
            "weights, resume goes on with everything; give one."
        ),
    )
    return problems
