"""What is evaluated: the backbone of a run, a checkpoint or an exported file, or the same network untrained."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seer_scale.checkpoint import store
from seer_scale.config import Config, read_config
from seer_scale.errors import NOTHING, Problem, UserError, missing_path
from seer_scale.files import shown
from seer_scale.interop.artefact import INITIAL_KEY, WEIGHT_FILES, About
from seer_scale.interop.load import materialise
from seer_scale.interop.weights import check_not_onnx, open_weights
from seer_scale.models.backbone import Backbone
from seer_scale.models.init import initial_values
from seer_scale.models.registry import reset_buffers


@dataclass(kw_only=True)
class Subject:
    """model: whole, in eval mode, on the rank's device. fingerprint: stands for its weights. run_dir: of its run, None
    of a file that was exported. config: the recipe it was trained by, as far as it is known. about: what an export
    of it says. remark: what its figures are to be read with, a sentence. statistics: stands for the images that the
    BatchNorm statistics of untrained weights are of, so many of them ("": they have none yet)."""

    path: Path
    model: Backbone
    fingerprint: str
    weights: str
    size: int
    backbone: str = ""
    checkpoint: str = ""
    samples_seen: int | None = None
    statistics: str = ""
    statistics_images: int = 0
    run_dir: Path | None = None
    config: Config | None = field(default=None, repr=False)
    about: About | None = field(default=None, repr=False)
    remark: str = ""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, S, S] on the model's device -> features float32 [N, num_features], by running
        statistics. No collectives."""
        return self.model(images).float()


def check_path(path: Path) -> None:
    """That there is something to evaluate. Raises UserError before any process group is made."""
    if not path.exists():
        raise UserError(missing_path(path, WEIGHT_FILES))
    check_not_onnx(path)
    is_run = (path / "config.yaml").is_file() or (path / "checkpoints").is_dir()
    is_exported = path.is_file() or any(path.glob("*.safetensors*")) or any(path.glob("config.json"))
    if not is_run and not (path / store.MANIFEST).is_file() and not is_exported:
        rule = "is not a run's folder (it has no config.yaml), nor a checkpoint, nor an exported file"
        raise UserError(Problem(str(path), NOTHING, rule, "give one, such as runs/demo"))


def run_dir_of(path: Path) -> Path:
    """The folder of the run at `path` or of the checkpoint at `path`; of one that lies elsewhere, where it lies."""
    if (path / "config.yaml").is_file():
        return path
    above = path.resolve().parents
    return above[1] if (above[1] / "config.yaml").is_file() else above[0]


def open_subject(path: Path, which: str, weights: str, device: torch.device, seed: int = 0) -> Subject:
    """weights: "trained", or "random": the same network as its run began; by `seed` where a file does not say how its
    run did. Raises UserError."""
    opened = open_weights(path, which)
    try:
        model, _ = materialise(opened)
    finally:
        opened.close()
    checkpoint = opened.place if (opened.place / store.MANIFEST).is_file() else None
    meta = store.read_meta(checkpoint) if checkpoint else {}
    config = read_config(meta["config"], []) if checkpoint else None
    is_random, remark = weights == "random", ""
    if is_random:
        initial = opened.about.origin.get(INITIAL_KEY)
        begin(model, *((seed, "") if initial is None else _seed_and_prefix(initial, path)))
        if initial is None:
            remark = (
                f"{shown(path)} does not say how its run drew weights: the untrained ones are of seed {seed}, and "
                "their figure is not that of the run's --init random."
            )
    return Subject(
        path=path,
        model=model.to(device),
        fingerprint=fingerprint(model),
        weights=weights,
        backbone=str(opened.about.model["name"]),
        size=int(opened.about.preprocessing["size"]),
        checkpoint=checkpoint.resolve().name if checkpoint and not is_random else "",
        samples_seen=0 if is_random else opened.about.origin.get("samples_seen"),
        run_dir=opened.run,
        config=config,
        about=opened.about,
        remark=remark,
    )


def _seed_and_prefix(initial: Any, path: Path) -> tuple[int, str]:
    """Of an export's metadata. Raises UserError where they are damaged."""
    try:
        seed, prefix = initial["seed"], initial["prefix"]
    except (TypeError, LookupError):
        seed = prefix = None
    if type(seed) is not int or not isinstance(prefix, str):
        raise UserError(Problem(str(path), NOTHING, f"has damaged metadata ({INITIAL_KEY} is {initial!r})"))
    return seed, prefix


@torch.no_grad()
def begin(model: Backbone, seed: int, prefix: str = "") -> None:
    """Give a backbone the weights with which its run began, and no statistics. prefix: what its parameters' names begin
    with there."""
    inits = model.initialisers()
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_values(inits[name], parameter.shape, seed, prefix + name).view_as(parameter))
    reset_buffers(model)


def fingerprint(model: torch.nn.Module) -> str:
    """Of the weights and statistics, whatever file they came from: what was computed with other weights is not gone
    on with."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        sample = tensor.detach().flatten()
        step = max(1, sample.numel() // 4096)
        digest.update(sample[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()
