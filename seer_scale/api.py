"""The Python face: `import seer_scale`, then `train`, `compare`, `load`, `load_classifier`, `embed`, `export`,
`views`.

What the command line does, these do, and a `~` that begins a path is the home folder, as in a shell. Errors are
`seer_scale.UserError`, whose `problems` have key, value, rule and nearest fix. Under `torchrun` and `srun` every
process calls the same.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from seer_scale.checkpoint import store
from seer_scale.config import Config, checked, load_recipe, merge, read_config
from seer_scale.cores import available_cores
from seer_scale.data.sources import open_source
from seer_scale.data.sources.files import of_paths
from seer_scale.data.transforms.image import ImageLike, Transform, pixels_of
from seer_scale.data.transforms.on_device import to_float
from seer_scale.data.transforms.views import make_views
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, ConfigError, Problem, UserError
from seer_scale.evaluate.shards import encode_images
from seer_scale.interop.load import load_backbone
from seer_scale.interop.load import load_classifier as load_classifier_at
from seer_scale.interop.write import MAX_SHARD_SIZE, export_backbone
from seer_scale.models.compute import training_flops
from seer_scale.observe.records import read_metrics
from seer_scale.plugins import load_plugins
from seer_scale.rank_info import detect
from seer_scale.training.start import default_run_dir, run_training

if TYPE_CHECKING:
    from seer_scale.interop.importing import Imported
    from seer_scale.models.backbone import Backbone
    from seer_scale.models.classifier import Classifier

__all__ = [
    "Embedded",
    "Run",
    "Transform",
    "ViewSheet",
    "compare",
    "embed",
    "export",
    "import_weights",
    "load",
    "load_classifier",
    "train",
    "views",
]


# ------------------------------------------------------------------------------------------------ runs


@dataclass(frozen=True)
class Run:
    """A run's folder, whether it trains, has ended or is to go on."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def config(self) -> Config:
        """The recipe as it was resolved. Raises UserError where the folder has none."""
        return read_config(load_recipe(str(self.path / "config.yaml")), [])

    @property
    def samples_seen(self) -> int:
        """By the newest valid checkpoint; 0 without one."""
        found = store.latest(self.path / "checkpoints", World(), verify=False)
        return store.read_meta(found)["samples_seen"] if found else 0

    @property
    def is_complete(self) -> bool:
        return self.samples_seen >= self.config.train.total_samples

    def metrics(self) -> list[dict[str, Any]]:
        """The metric lines, oldest first, without what a restart did again; `pandas.DataFrame(run.metrics())`."""
        return read_metrics(self.path)[0]

    def events(self) -> list[dict[str, Any]]:
        """What was told beside them: starts, checkpoints, evaluations, trouble."""
        return read_metrics(self.path)[1]

    def report(self) -> Path:
        """Write report.html, as it stands now; its path. Raises UserError where the folder is no run's."""
        if not any((self.path / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
            raise UserError(Problem(str(self.path), NOTHING, "is no run's folder"))
        from seer_scale.observe.report import write_report  # loads matplotlib

        return write_report(self.path)

    def load(self, which: str | int = "last", *, plugins: str | Sequence[str] = ()) -> Backbone:
        """`load` of this run."""
        return load(self.path, which=which, plugins=plugins)


def train(
    recipe: str | Path | Mapping[str, Any],
    data: str | Path | None = None,
    *,
    run_dir: str | Path | None = None,
    plugins: str | Sequence[str] = (),
    **overrides: Any,
) -> Run:
    """Train a recipe, or go on where its run stopped; returns the run when it has ended or was stopped.

    recipe: a shipped one's name, a YAML file, or a mapping of sections. data: `data.path`. overrides: sections, as in
    `train={"total_samples": 10_000}`, or dotted keys, as in `**{"optim.lr": 0.1}`. In a notebook, interrupting the cell
    saves and stops; the same call goes on. In a thread that is not the main one no signal reaches the run. A process
    that is alone has no watchdog unless `run.hang_timeout_s` is given, as that would end the notebook.

    Under torchrun or srun all processes call it alike (collective). Raises UserError: `ConfigError`, with every
    problem, before any device is taken; `TrainingError` where the run cannot go on.
    """
    given = _mapping(recipe)
    over = merge(_sections(overrides), {"data": {"path": os.path.expanduser(data)}} if data is not None else {})
    if plugins:
        over = merge(over, {"run": {"plugins": _several(plugins)}})
    own = merge(given, over).get("run") or {}
    if run_dir is None and not own.get("dir"):
        if not isinstance(recipe, str | Path):
            fix = "give one: a recipe that is a mapping has no name"
            raise ConfigError([Problem("run.dir", NOTHING, "is missing", fix)])
        run_dir = default_run_dir(str(recipe))
    path = Path(run_dir or own["dir"]).expanduser()
    if detect().size == 1 and "hang_timeout_s" not in own:
        over = merge(over, {"run": {"hang_timeout_s": 0}})
    run_training(str(recipe) if isinstance(recipe, str | Path) else given, merge(over, {"run": {"dir": str(path)}}))
    return Run(path)


def compare(
    runs: Sequence[str | Path | Run], out: str | Path = "compare.html", *, plugins: str | Sequence[str] = ()
) -> Path:
    """Write one page with the curves of several runs, the keys of their recipes that differ, and where each stands;
    returns `out`. runs: their folders. plugins: those that bring their methods and backbones, without which defaults
    and compute of these are not known. Raises UserError, with every problem."""
    from seer_scale.observe.report import write_comparison  # loads matplotlib

    load_plugins(_several(plugins))
    folders = [run.path if isinstance(run, Run) else Path(run).expanduser() for run in runs]
    place = Path(out).expanduser()
    write_comparison(folders, place, training_flops)
    return place


def _mapping(recipe: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Raises UserError for what is no recipe."""
    if isinstance(recipe, str | Path):
        return load_recipe(str(recipe))
    if not isinstance(recipe, Mapping):
        raise UserError(Problem("recipe", type(recipe).__name__, "must be a name, a path or a mapping of sections"))
    return dict(recipe)


def _several(plugins: str | Sequence[str]) -> list[str]:
    return [plugins] if isinstance(plugins, str) else list(plugins)


def _sections(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Sections and dotted keys as one mapping of sections."""
    out: dict[str, Any] = {}
    for key, value in overrides.items():
        section, dot, name = key.partition(".")
        if not dot and not isinstance(value, Mapping):
            raise UserError(Problem(key, value, "must be a section of keys", f"write {key}={{'KEY': ...}}"))
        out = merge(out, {section: {name: value} if dot else value})
    return out


# ------------------------------------------------------------------------------------------------ what was learned


def load(path: str | Path, *, which: str | int = "last", plugins: str | Sequence[str] = ()) -> Backbone:
    """The backbone of a run, a checkpoint or an export: an `nn.Module` on the CPU, in eval mode, of images [N, 3, S, S]
    or a list of such, one a resolution, to features [N, num_features] or a list. Its `transform` is the right
    preprocessing.

    path: a run's folder, a checkpoint's, or what `export` wrote (but ONNX). which: of a run, "last", "best" or samples
    seen. plugins: those that bring the backbone; none that a file names is loaded by itself. The backbone's bytes alone
    are read, straight from the shards: no optimiser state, no process group, nothing pickled; checksums are not
    verified, as that would read all of a checkpoint (`seer-scale inspect --verify` does). Raises UserError,
    CheckpointError.
    """
    load_plugins(_several(plugins))
    return load_backbone(Path(path).expanduser(), str(which))


def load_classifier(path: str | Path, *, plugins: str | Sequence[str] = ()) -> Classifier:
    """The network that `seer-scale eval finetune` has trained and kept (RUN/eval/finetune), or an export of it in the
    format safetensors: an `nn.Module` on the CPU, in eval mode, of images [N, 3, S, S] to scores [N, classes], before
    softmax (`multi_label`: sigmoid). Its `classes` are names, its `transform` is the right preprocessing. Raises
    UserError: also where there is no head.
    """
    load_plugins(_several(plugins))
    return load_classifier_at(Path(path).expanduser())


def export(
    path: str | Path,
    out: str | Path,
    format: str,
    *,
    dtype: str = "fp32",
    which: str | int = "last",
    license: str = "",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    force: bool = False,
    plugins: str | Sequence[str] = (),
) -> Path:
    """Write the backbone of a run, a checkpoint or an earlier export for another library, which loads it without this
    package and gives the same features; returns `out`.

    format: timm, torchvision, transformers, safetensors (what `load` takes, too) or onnx. out: a folder, which gets the
    weights, what the library wants beside them and a model card; a name that ends with .safetensors or .onnx is that of
    a lone file. dtype: fp32, fp16 or bf16. which, plugins: as `load`. max_shard_size: of a file, in bytes or as "5GB",
    where the library reads several. force: replace an earlier export. One tensor is held at a time (of ONNX the whole
    network). Raises UserError, with nothing written, also where the library has no such network: its problem's
    `nearest` are the formats that do.
    """
    load_plugins(_several(plugins))
    place = Path(out).expanduser()
    export_backbone(
        Path(path).expanduser(), place, format, dtype=dtype, which=str(which), license=license,
        max_shard_size=max_shard_size, force=force,
    )  # fmt: skip
    return place


def import_weights(
    path: str | Path, out: str | Path, *, format: str = "auto", model: str = "", size: int = 0, force: bool = False,
    plugins: str | Sequence[str] = (),
) -> Imported:  # fmt: skip
    """Published weights become a folder `out` that `load` and `checkpoint.init_from` take; what was taken.

    path: a file of VISSL, timm, torchvision or the SwAV repository, or a folder of timm or transformers. format: auto
    goes by the names. model: the backbone they must be of, as in `model.name`. size: of the images in pixels; 0: as
    metadata of ours, timm's config.json or transformers' preprocessor_config.json tell, else 224. force: replace an
    earlier import. plugins: as `load`; of a plugin's backbone, tensors have the names of its `state_dict`. Nothing in a
    file is run. Raises UserError, with nothing left behind.
    """
    from seer_scale.interop import importing

    load_plugins(_several(plugins))
    given, made = (Path(p).expanduser() for p in (path, out))
    return importing.import_weights(given, made, format=format, model=model, size=size, force=force)


class Embedded(NamedTuple):
    """features: float32 [N, num_features]. names: of the images, as a log shows them. labels: int64 [N], -1 where there
    is none; classes: what they are called."""

    features: Tensor
    names: list[str]
    labels: Tensor
    classes: list[str]


@torch.no_grad()
def embed(
    model: nn.Module,
    images: str | Path | Sequence[str | Path],
    *,
    batch: int = 64,
    workers: int | None = None,
    size: int | None = None,
) -> Embedded:
    """Features of every image that can be read, in order, on the device of the model's parameters.

    images: whatever `data.path` takes (a folder, a list, tars, `hf:NAME` ...), or paths of images. size: in pixels;
    the model's `transform` says it otherwise. workers: loader processes; as many as cores otherwise, 4 at most. Raises
    DataError where there is none.
    """
    limits: tuple[tuple[str, int | None, int], ...] = (("batch", batch, 1), ("size", size, 8), ("workers", workers, 0))
    for name, value, least in limits:
        if value is not None and value < least:
            raise UserError(Problem(name, value, f"must be at least {least}", least))
    if not isinstance(model, nn.Module):
        raise UserError(Problem("model", type(model).__name__, "must be a module", "seer_scale.load gives a run's"))
    expanded = [os.path.expanduser(p) for p in ([images] if isinstance(images, str | Path) else images)]
    source = open_source(str(expanded[0])) if isinstance(images, str | Path) else of_paths([str(p) for p in expanded])
    if size is None:
        transform = getattr(model, "transform", None)
        size = transform.size if isinstance(transform, Transform) else 224
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    workers = min(4, available_cores()) if workers is None else workers
    before, features, labels, numbers = model.training, [], [], []
    model.eval()
    try:
        for part in encode_images(
            lambda pixels, _: model(to_float(pixels)).float(), source, np.arange(len(source)), size=size, batch=batch,
            workers=workers, device=device,
        ):  # fmt: skip
            features.append(part.features)
            labels.append(part.labels)
            numbers += part.numbers.tolist()
    finally:
        model.train(before)
    if not features:
        raise UserError(Problem("images", str(images), "none of them can be read"))
    return Embedded(torch.cat(features), [source.name(i) for i in numbers], torch.cat(labels), list(source.classes))


# ------------------------------------------------------------------------------------------------ augmentations


@dataclass(frozen=True)
class ViewSheet:
    """The crops that training would see. crops: for each kind in views.crops uint8 [num, H, W, 3]."""

    crops: list[np.ndarray]

    def sheet(self, columns: int = 8) -> Image.Image:
        """All crops as one picture, a kind after the other."""
        gap, rows = 4, []
        for kind in self.crops:
            rows += [kind[i : i + columns] for i in range(0, len(kind), columns)]
        width = max(len(row) * (row.shape[2] + gap) for row in rows) - gap
        page = Image.new("RGB", (width, sum(row.shape[1] + gap for row in rows) - gap), "white")
        top = 0
        for row in rows:
            for n, crop in enumerate(row):
                page.paste(Image.fromarray(crop), (n * (row.shape[2] + gap), top))
            top += row.shape[1] + gap
        return page

    def _repr_png_(self) -> bytes:
        """How a notebook shows it."""
        out = io.BytesIO()
        self.sheet().save(out, "png")
        return out.getvalue()


def views(
    recipe: str | Path | Mapping[str, Any],
    image: ImageLike,
    *,
    epoch: int = 0,
    index: int = 0,
    **overrides: Any,
) -> ViewSheet:
    """What a recipe's augmentations make of an image: the crops that training sees of image number `index` in `epoch`,
    which are a function of those and `run.seed`. overrides: as in `train`. Raises UserError."""
    given = _mapping(recipe)
    over = merge({"data": {"path": "-"}}, _sections(overrides))
    config, problems = checked(given, over)
    if own := [p for p in problems if p.key.startswith(("views", "run."))]:
        raise ConfigError(own)
    made = make_views(pixels_of(image), config.views, config.run.seed, epoch, index)
    return ViewSheet([np.ascontiguousarray(kind.transpose(0, 2, 3, 1)) for kind in made])
