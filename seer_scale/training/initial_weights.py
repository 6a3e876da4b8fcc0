"""Weights that a new run begins with (checkpoint.init_from): of a run, a checkpoint, or what import and export make.

The backbone goes by what a checkpoint says of its names and by what the method says of its own, so that methods give
and take whatever they call it; a moving average of it, or what it is one of, begins alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seer_scale.checkpoint import store
from seer_scale.checkpoint.layout import local_of, run_of
from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.errors import CheckpointError, Problem
from seer_scale.interop.artefact import Artefact, is_artefact
from seer_scale.methods.base import BufferKind, Method
from seer_scale.models.backbone import Backbone
from seer_scale.optim.parameter_groups import ParameterGroup

Resize = Callable[[Tensor], Tensor]
MODEL = "model/"
"""What the names of weights and statistics begin with in a state."""


def print_warning(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class InitialWeights:
    """path: a checkpoint, or an artefact. names: of a run's state, without MODEL, to those in it. loaded: what the
    names begin with that it brings. kept, anew: of the method's own parts, by the first word of their names, those that
    it brings and those that begin anew. resized: of names that have another shape there, as of images of another size:
    that shape, and what makes it ours."""

    path: Path
    names: Mapping[str, str]
    loaded: tuple[str, ...]
    kept: tuple[str, ...] = ()
    anew: tuple[str, ...] = ()
    artefact: Artefact | None = None
    resized: Mapping[str, tuple[torch.Size, Resize]] = field(default_factory=dict)

    def __str__(self) -> str:
        """What a run is told of them: a clause."""
        told = ", with positions resized to this run's images" if self.resized else ""
        return self._origin + told

    @property
    def _origin(self) -> str:
        if not self.anew:
            return f"Its weights are those of {self.path}"
        if not self.kept:
            return f"Its backbone is that of {self.path} and all else drawn anew"
        return (
            f"Its backbone and {', '.join(self.kept)} are those of {self.path}, and {', '.join(self.anew)} drawn anew"
        )

    def load(self, state: store.State, world: World) -> int:
        """Fill the tensors of a run's `state` that it brings; the bytes this rank has read. Collective. Raises
        CheckpointError."""
        whole = {name: local_of(state[MODEL + name]).new_empty(shape) for name, (shape, _) in self.resized.items()}
        wanted = {MODEL + name: whole.get(name, state[MODEL + name]) for name in self.names}
        if self.artefact is None:
            nbytes = store.load(self.path, wanted, world, names=_in_model(self.names))
        else:
            with store.agreement(world):
                nbytes = sum(self.artefact.fill(wanted[MODEL + name], source) for name, source in self.names.items())
        for name, (_, resize) in self.resized.items():
            local, (start, stop) = local_of(state[MODEL + name]), run_of(state[MODEL + name])
            local.copy_(resize(whole[name]).reshape(-1)[start:stop].view_as(local))
        return nbytes


def find_initial_weights(
    config: Config,
    method: Method[Any, Any],
    world: World,
    *,
    contents: bool = True,
    warn: Callable[[str], None] = print_warning,
) -> InitialWeights:
    """What checkpoint.init_from names: the newest valid checkpoint of a run, a checkpoint, an artefact; and that what
    checkpoint.init_part takes of it fits the method. Without `contents` sizes of files must do. Reads no tensor.
    Collective. Raises CheckpointError."""
    path = Path(config.checkpoint.init_from)
    state = state_of(method)
    if world.from_main(lambda: is_artefact(path)):
        with store.agreement(world):
            return _of_artefact(config, method, state, Artefact(path))
    return _of_checkpoint(config, method, state, _checkpoint(path, world, contents, warn), world)


def _checkpoint(path: Path, world: World, contents: bool, warn: Callable[[str], None]) -> Path:
    for folder in (path / "checkpoints", path):
        if found := store.latest(folder, world, verify=contents, warn=warn):
            return found
    if problem := store.validate(path, world, contents=contents):
        raise CheckpointError(Problem("checkpoint.init_from", path, f"it {problem.rule}", problem.nearest))
    return path


def _of_checkpoint(
    config: Config, method: Method[Any, Any], state: store.State, path: Path, world: World
) -> InitialWeights:
    prefix = store.read_meta(path, world)["export"]["prefix"]
    shapes = {
        n.removeprefix(MODEL): t.shape for n, t in store.read_layout(path, world).tensors.items() if n.startswith(MODEL)
    }
    there = set(shapes)
    names = _backbone(method, state, prefix, there)
    resized = _resized(method, state, names, shapes)
    state = {**state, **{MODEL + n: torch.empty(shape, device="meta") for n, (shape, _) in resized.items()}}
    _check(path, state, world, names)
    if config.checkpoint.init_part == "backbone":
        own = method.backbone_prefixes()
        return InitialWeights(path, names, own, anew=_parts(state, own), resized=resized)
    twins, groups = _twins(method, state), method.parameter_groups()
    for name in state:
        direct = name.removeprefix(MODEL)
        if direct in names and (source := groups.get(direct)) and _is_of_average(groups, source.average_of):
            continue  # what is kept of a teacher begins as the teacher that there is, not as what was kept of another
        if direct in there or direct not in names:  # all of it: as it was there, where it goes by the same name
            names[direct] = next((n for n in (direct, *twins.get(direct, ())) if n in there), direct)
    product = MODEL + method.export_prefix
    copies = {n for n in there if product + n.partition(".")[2] in state}
    names |= {n: n for n in there - set(names.values()) - copies}  # to be told of
    anew = "give checkpoint.init_part backbone, which draws all else anew, or choose another checkpoint"
    _check(path, state, world, names, anew)
    return InitialWeights(path, names, ("",), resized=resized)


def _is_of_average(groups: Mapping[str, ParameterGroup], name: str) -> bool:
    return name in groups and bool(groups[name].average_of)


def _check(
    path: Path, state: store.State, world: World, names: Mapping[str, str], remedy: str = store.DEFAULT_REMEDY
) -> None:
    wanted = {name: state[name] for name in state if name.removeprefix(MODEL) in names}
    store.check_compatible(path, wanted, world, remedy=remedy, names=_in_model(names))


def _of_artefact(config: Config, method: Method[Any, Any], state: store.State, artefact: Artefact) -> InitialWeights:
    held = {(name.replace("/", ".") if "/" in name else f"backbone.{name}"): name for name in artefact.tensors}
    names = _backbone(method, state, "backbone.", set(held))
    own = method.backbone_prefixes()
    shapes = {MODEL + name: artefact.tensors[held[source]] for name, source in names.items() if source in held}
    resized = _resized(method, state, names, {n: artefact.tensors[held[n]].shape for n in held})
    network = {n: t for n, t in state.items() if n.removeprefix(MODEL).startswith(own)}
    network |= {MODEL + name: torch.empty(shape, device="meta") for name, (shape, _) in resized.items()}
    model = " ".join(f"--model.{key} {value}" for key, value in artefact.about.model.items())
    store.compare(artefact.path, network, shapes, f"it is of {model}", casts=True)
    kept, anew = [], []
    twins = _twins(method, state)
    for part in _parts(state, own):
        mine = [n.removeprefix(MODEL) for n in state if n.startswith(f"{MODEL}{part}.") and n not in network]
        sources = {n: next((s for s in (n, *twins.get(n, ())) if s in held), "") for n in mine}
        of_part = {n for n in held if n.startswith(f"{part}.")}
        fits = all(s and artefact.tensors[held[s]].shape == state[MODEL + n].shape for n, s in sources.items())
        if config.checkpoint.init_part == "all" and fits and of_part <= set(sources.values()):
            names |= sources
            kept.append(part)
        else:
            anew.append(part)
    found = {name: held[source] for name, source in names.items()}
    loaded = (*own, *(f"{part}." for part in kept))
    return InitialWeights(artefact.path, found, loaded, tuple(kept), tuple(anew), artefact, resized)


def _backbone(method: Method[Any, Any], state: store.State, prefix: str, there: set[str]) -> dict[str, str]:
    """Names of the backbone, and of what is to begin like it, to those that begin with `prefix`; and of what else has
    that, so that it is told of."""
    names, own = {}, method.backbone_prefixes()
    for name in (n.removeprefix(MODEL) for n in state):
        if begin := next((p for p in own if name.startswith(p)), None):
            names[name] = prefix + name.removeprefix(begin)
    unknown = {n for n in there if n.startswith(prefix)} - set(names.values())
    return names | {own[0] + n.removeprefix(prefix): n for n in unknown}


def _resized(
    method: Method[Any, Any], state: store.State, names: Mapping[str, str], shapes: Mapping[str, torch.Size]
) -> dict[str, tuple[torch.Size, Resize]]:
    """What of the backbone has another shape there, of which one of this network can be made."""
    out, backbone, prefixes = {}, method.backbone, method.backbone_prefixes()
    for name, source in names.items():
        ours, shape = state.get(MODEL + name), shapes.get(source)
        if ours is None or shape in (None, ours.shape) or not isinstance(backbone, Backbone):
            continue
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is not None and (resize := backbone.resizer(name.removeprefix(prefix), shape)):
            out[name] = shape, resize
    return out


def _parts(state: store.State, own: tuple[str, ...]) -> tuple[str, ...]:
    """The first words of the names of what is no backbone's."""
    others = (name.removeprefix(MODEL) for name in state)
    return tuple(dict.fromkeys(name.partition(".")[0] for name in others if not name.startswith(own)))


def _twins(method: Method[Any, Any], state: store.State) -> dict[str, tuple[str, ...]]:
    """For each parameter or statistic those that it is a moving average of, or that are one of it."""
    modules: dict[str, list[str]] = {}
    for name, group in method.parameter_groups().items():
        if group.average_of:
            this, other = name.rpartition(".")[0], group.average_of.rpartition(".")[0]
            modules.setdefault(this, []).append(other)
            modules.setdefault(other, []).append(this)
    names = [name.removeprefix(MODEL).rpartition(".") for name in state]
    return {f"{m}.{leaf}": tuple(f"{other}.{leaf}" for other in modules.get(m, ())) for m, _, leaf in names}


def _in_model(names: Mapping[str, str]) -> dict[str, str]:
    return {MODEL + name: MODEL + source for name, source in names.items()}


def state_of(method: Method[Any, Any]) -> store.State:
    """The names and shapes that a checkpoint has of a network, from the network itself (on meta, say)."""
    statistics = {n: b for n, b in method.named_buffers() if method.buffer_kind(n) == BufferKind.STATISTICS}
    return {f"{MODEL}{n}": t for n, t in (dict(method.named_parameters()) | statistics).items()}
