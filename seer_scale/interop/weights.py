"""The backbone's weights of a run, a checkpoint or an artefact, where they lie: nothing of them is read until asked."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seer_scale.checkpoint import store
from seer_scale.config import read_config
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, ConfigError, Problem, UserError, missing_path
from seer_scale.interop.artefact import (
    FINETUNED_KEY,
    HEAD_KEY,
    INITIAL_KEY,
    ONNX_FILE,
    OWN_FORMAT,
    WEIGHT_FILES,
    About,
    Artefact,
    Finetuned,
    Head,
    TensorInfo,
    is_artefact,
)
from seer_scale.interop.names import NAME_MAPS
from seer_scale.models.backbone import Backbone
from seer_scale.models.registry import build_backbone


class Weights:
    """`tensors`, by the names of `Backbone.state_dict()`, without those that a constructor computes; `others`, of an
    artefact, of what stands beside the backbone ("head/weight"); `backbone` is the network itself on the meta device.
    Opened by `open_weights`."""

    def __init__(self, place: Path, about: About, *, run: Path | None = None, needs_plugin: str = ""):
        self.place, self.about, self.run = place, about, run
        name, generator = about.model["name"], {k: v for k, v in about.model.items() if k != "name"}
        try:
            with torch.device("meta"):
                self.backbone: Backbone = build_backbone(name, **generator)
        except UserError as error:
            first = error.problems[0]
            if not needs_plugin or first.key != "model.name":
                raise error.prefixed(str(place)) from None
            rule = f"{place} has it of a plugin, and what a file names is not loaded by itself"
            raise UserError(Problem("model.name", name, rule, f"give --plugin {needs_plugin}")) from None
        self.tensors: dict[str, TensorInfo] = {}
        self.others: dict[str, TensorInfo] = {}

    @cached_property
    def head(self) -> Head | None:
        """Of a classifier. Raises UserError where metadata are damaged."""
        given = self.about.origin.get(HEAD_KEY)
        try:
            head = None if given is None else Head(**given)
            if head and not (all(isinstance(name, str) for name in head.classes) and type(head.multi_label) is bool):
                raise TypeError("its classes are no names")
            return head
        except TypeError as error:
            raise UserError(Problem(str(self.place), NOTHING, f"has damaged metadata ({error!r})")) from None

    @cached_property
    def finetuned(self) -> list[Finetuned]:
        """On what labels all of it was trained, in order. Raises UserError where metadata are damaged."""
        try:
            return [Finetuned(**step) for step in self.about.origin.get(FINETUNED_KEY, [])]
        except TypeError as error:
            raise UserError(Problem(str(self.place), NOTHING, f"has damaged metadata ({error!r})")) from None

    def read(self, name: str) -> Tensor:
        """One of `tensors` or `others`, whole, on the CPU. Raises UserError."""
        raise NotImplementedError

    def fill(self, state: Mapping[str, Tensor]) -> int:
        """Copy all of `tensors` into those of the same name; the bytes read. Raises UserError."""
        raise NotImplementedError

    def close(self) -> None:
        """Of the files."""

    def check(self, fix: str) -> None:
        """That all of the network is there, and nothing else. Raises UserError."""
        wanted = {name: tensor.shape for name, tensor in self.backbone.state_dict().items()}
        parameters = dict(self.backbone.named_parameters())
        for name in sorted(wanted.keys() | self.tensors.keys()):
            there = list(self.tensors[name].shape) if name in self.tensors else None
            if there is None and name not in parameters:
                continue  # a table that the constructor computes
            if name not in wanted or there != list(wanted[name]):
                differs = f"{there or 'absent'} there and {list(wanted[name]) if name in wanted else 'absent'} in it"
                rule = f"does not hold a {self.about.model['name']}: {name} is {differs}"
                raise UserError(Problem(str(self.place), NOTHING, rule, fix))


class CheckpointWeights(Weights):
    def __init__(self, place: Path):
        meta = store.read_meta(place)
        problems: list[Problem] = []
        config = read_config(meta["config"], problems)
        if own := [p for p in problems if p.key.startswith("model")]:
            raise ConfigError(own, f"The recipe of {place}")
        above = place.resolve().parents
        run = above[1] if len(above) > 1 and (above[1] / "config.yaml").is_file() else None
        origin = {
            "method": meta["method"]["name"],
            "samples_seen": meta["samples_seen"],
            "checkpoint": place.resolve().name,
            "recipe": _public(meta["config"]),
            "seer_scale": meta.get("seer_scale"),
            INITIAL_KEY: {"seed": config.run.seed, "prefix": meta["export"]["prefix"]},
        }
        model = {"name": config.model.name, **config.model.explicit_keys()}
        plugins = (meta["config"].get("run") or {}).get("plugins") or []
        about = About(OWN_FORMAT, model, meta["preprocessing"], origin)
        super().__init__(place, about, run=run, needs_plugin=" --plugin ".join(plugins))
        self._prefix = f"model/{meta['export']['prefix']}"
        self._reader = store.TensorReader(place)
        known = self.backbone.state_dict().keys()
        stored = self._reader.layout.tensors
        held = {n.removeprefix(self._prefix): t for n, t in stored.items() if n.startswith(self._prefix)}
        self.tensors = {name: TensorInfo(held[name].dtype, held[name].shape) for name in known if name in held}
        self.tensors |= {name: TensorInfo(t.dtype, t.shape) for name, t in held.items() if name not in known}
        self.check("--plugin brings another network of this name" if plugins else "choose another checkpoint")

    def read(self, name: str) -> Tensor:
        return self._reader.read(self._prefix + name)

    def fill(self, state: Mapping[str, Tensor]) -> int:
        held = {self._prefix + name: state[name] for name in self.tensors}
        return store.load(self.place, held, World(), prefixes=self._prefix, layout=self._reader.layout)

    def close(self) -> None:
        self._reader.close()


def _public(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what is of this machine alone."""
    of_machine = ("run", "data", "knn", "parallel", "checkpoint")
    kept = {section: values for section, values in recipe.items() if section not in of_machine}
    kept["data"] = {"path": public_name(str((recipe.get("data") or {}).get("path", "")))}
    if began := (recipe.get("checkpoint") or {}).get("init_from"):
        kept["checkpoint"] = {"init_from": Path(began).name}
    return kept


def public_name(path: str) -> str:
    """Of images: what tells nothing of this machine."""
    return path if path.startswith("hf:") else Path(path).name


class ArtefactWeights(Weights):
    def __init__(self, place: Path):
        self._artefact = Artefact(place)
        super().__init__(place, self._artefact.about)
        held = self._artefact.tensors
        self.tensors = {name: info for name, info in held.items() if "/" not in name}
        self.others = {name: info for name, info in held.items() if "/" in name}
        self.check("choose another")

    def read(self, name: str) -> Tensor:
        return self._artefact.read(name)

    @torch.no_grad()
    def fill(self, state: Mapping[str, Tensor]) -> int:
        for name in self.tensors:
            state[name].copy_(self.read(name))
        return sum(info.nbytes for info in self.tensors.values())


def open_weights(path: Path, which: str = "last") -> Weights:
    """Those of a run, a checkpoint or an artefact. which: of a run, "last", "best" or samples seen. Plugins that
    bring its backbone are loaded before. Reads no tensor. Raises UserError."""
    if not path.exists():
        raise UserError(missing_path(path, WEIGHT_FILES))
    check_not_onnx(path)
    if is_artefact(path) or (path / store.MANIFEST).is_file():
        if which != "last":
            raise UserError(Problem("which", which, f"{path} is no run, and holds one state only", "give the run"))
        return ArtefactWeights(path) if is_artefact(path) else CheckpointWeights(path)
    return CheckpointWeights(find_checkpoint(path, which))


def check_not_onnx(path: Path) -> None:
    """Raises UserError for a file of ONNX, and for a folder with one and nothing that is read."""
    read = is_artefact(path) or (path / store.MANIFEST).is_file() or (path / "checkpoints").is_dir()
    if path.suffix == ".onnx" or ((path / ONNX_FILE).is_file() and not read):
        rule, formats = "is of ONNX, whose weights are not read back", ", ".join((OWN_FORMAT, *NAME_MAPS))
        raise UserError(Problem(str(path), NOTHING, rule, f"give the run, or an export as one of {formats}"))


def find_checkpoint(path: Path, which: str) -> Path:
    """A checkpoint itself, or that of a run which is meant. Its contents are not verified, which would read all of it.
    Raises UserError."""
    if (path / store.MANIFEST).is_file():
        return path
    if not path.exists():
        raise UserError(missing_path(path, WEIGHT_FILES))
    folder = path / "checkpoints"
    if which == "last":
        found = store.latest(folder, World(), verify=False)
    else:
        named = folder / (store.BEST if which == "best" else f"samples-{which.zfill(12)}")
        found = named if (named / store.MANIFEST).is_file() else None
    if found is None:
        there = ", ".join(sorted(p.name for p in folder.glob("samples-*"))) if folder.is_dir() else ""
        fix = f"there are {there}" if there else "give a run's folder with checkpoints, a checkpoint's or an export"
        rule = f"has no checkpoint {which}" if there else "has no valid checkpoint"
        if path.is_file():
            rule, fix = "is no file of weights that is read here", "give a run's folder, a checkpoint's or an export"
        raise UserError(Problem(str(path), NOTHING, rule, fix))
    return found
