"""What fits: the smallest change of a recipe that does, and the fastest way of all that do.

Both try engine x recomputation x micro-batch. An engine takes one trace, of a rank's whole share without recomputation:
what is held for activations and losses shrinks with the micro-batch, the rest stays, and `recompute` says what each
unit saves and costs. So which settings are worth a plan of their own is known before they are traced. Nothing is
offered that was not planned itself.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from seer_scale.config import ZERO_ENGINES, Config, check_rules, merge, unused_keys
from seer_scale.config.schema import Parallel
from seer_scale.distributed import World
from seer_scale.errors import Problem, UserError
from seer_scale.files import shown
from seer_scale.formatting import counted, memory_size
from seer_scale.methods.base import Method
from seer_scale.methods.registry import build_method
from seer_scale.plan.bounds import check_largest_unit, least_held, memory_left
from seer_scale.plan.devices import Device
from seer_scale.plan.memory import GIVES_BACK
from seer_scale.plan.outputs import new_file
from seer_scale.plan.plan import Plan, make_plan, recomputed
from seer_scale.plan.recompute import Recomputation
from seer_scale.plan.time import milliseconds, op_seconds

ENGINE, RECOMPUTED, MICRO_BATCH = "parallel.engine", "parallel.activation_checkpoint", "train.micro_batch"
REPLICATE, OFFLOAD = "parallel.replicate_degree", "parallel.offload"
SHRINKING = ("activations", "loss", "workspaces of kernels", "allocator slack")
"""Kinds of memory that are as large as the micro-batch."""
NEEDS = dict.fromkeys(ZERO_ENGINES, "deepspeed") | {"fairscale": "fairscale"}
PLANS_OF_A_CHOICE = 3
"""Plans of one choice of units, each with less memory allowed than the one before, until one fits."""


@dataclass(frozen=True)
class Change:
    """keys: of the recipe, with the values that differ from it. plan: with them."""

    keys: dict[str, Any]
    plan: Plan

    @property
    def gpus(self) -> int:
        return self.plan.gpus

    @property
    def words(self) -> list[str]:
        """As a command line has them."""
        return [word for key, value in self.keys.items() for word in (f"--{key}", _as_word(value))]

    @property
    def fits(self) -> bool:
        return self.plan.memory.fits

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        memory, time = self.plan.memory, self.plan.time
        return {
            "gpus": self.gpus, "keys": self.keys, "fits": memory.fits, "total": memory.total,
            "capacity": memory.capacity, "update_s": time.seconds, "images_per_s": time.images_per_s,
        }  # fmt: skip


def _as_word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def with_keys(config: Config, keys: Mapping[str, Any]) -> Config:
    """The recipe with other values of these dotted keys."""
    for key, value in keys.items():
        section, name = key.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


# ------------------------------------------------------------------------------------------------ what is known


@dataclass(frozen=True)
class _Base:
    """A way to hold the model: the plan of a rank's largest micro-batch without recomputation, and what follows."""

    keys: dict[str, Any]
    plan: Plan

    @cached_property
    def recomputation(self) -> Recomputation:
        return Recomputation(self.plan.trace, self.plan.device)

    @cached_property
    def staying(self) -> int:
        """Bytes of what does not shrink with the micro-batch."""
        return sum(n for kind, n in self.plan.memory.kinds.items() if kind not in SHRINKING)

    @cached_property
    def images(self) -> int:
        return _images(self.plan.config, self.plan.gpus)

    def choose(self, images: int, spare: float = 0) -> list[str] | None:
        """The units to recompute so that this fits with so many bytes to spare; None: no number does."""
        memory = self.plan.memory
        allowed = (memory.capacity - spare - self.staying) * self.images / images + self.staying
        return self.recomputation.choose(int(memory.peak.nbytes + allowed - memory.total))

    def seconds(self, images: int, units: list[str]) -> float:
        """Of an update, at least: micro-batches cost a forward of the whole batch for its targets."""
        more = self._forward if images < self.images else 0.0
        return self.plan.time.seconds + more + self.recomputation.seconds(units)

    @cached_property
    def _forward(self) -> float:
        if not build_method(self.plan.config, World()).has_batch_targets:
            return 0.0
        ops = [op for op in self.plan.trace.ops if op.phase == "forward" and not op.collective]
        return sum(op_seconds(op, self.plan.device) for op in ops)


def _images(config: Config, gpus: int) -> int:
    """Of a micro-batch of a rank."""
    return config.train.global_batch // gpus // config.num_micro_batches(gpus)


class _Search:
    """The recipe as it was given, and what has been planned of it."""

    def __init__(self, config: Config, device: Device):
        self.given, self.device = config, device
        self._plans: dict[tuple[Any, ...], Plan | UserError] = {}
        self.refusals: list[UserError] = []

    @cached_property
    def method(self) -> Method[Any, Any]:
        """To count its parameters."""
        return build_method(self.given, World())

    def check_largest_unit(self, gpus: int) -> None:
        """Raises UserError where a unit alone is more than the device has, however the model is held."""
        config = with_keys(self.given, self.engine("fsdp"))
        check_largest_unit(self.method, config, max(2, gpus), self.device)

    def is_too_large(self, keys: Mapping[str, Any], gpus: int) -> bool:
        """Whether weights, gradients and state alone are more than a device has: then nothing needs to be traced."""
        config = with_keys(self.given, keys)
        engine = "single" if gpus == 1 and not config.parallel.offload else config.parallel.engine
        needed = least_held(self.method, config, engine, gpus)
        if needed <= memory_left(self.device, gpus):
            return False
        name, many = _engine_name(config, gpus), f"{gpus:,} x {self.device.name}"
        tell(f"{name} on {many} is left out: weights, gradients and state alone take {memory_size(needed)} of each")
        return True

    def engine(self, name: str, **more: Any) -> dict[str, Any]:
        """The keys that make this the recipe's engine: with those that it does not read as they are by default."""
        keys = {ENGINE: name} | {f"parallel.{key}": value for key, value in more.items()}
        resets = {"replicate_degree", "shard_degree"} if name != "fsdp" or "replicate_degree" in more else set()
        resets |= {"offload"} if name not in ZERO_ENGINES else set()
        unused = {
            p.key.partition(".")[2] for p in unused_keys(with_keys(self.given, keys)) if p.key.startswith("parallel.")
        }
        for key in (resets | unused) - set(more):
            keys[f"parallel.{key}"] = getattr(Parallel(), key)
        return keys

    def plan(self, keys: Mapping[str, Any], gpus: int) -> Plan | None:
        """None where no update can be planned with these keys."""
        config = with_keys(self.given, keys)
        key = (gpus, *sorted((k, str(v)) for k, v in self._differing(keys).items()))
        if key not in self._plans:
            if check_rules(config, gpus):
                return None
            tell(f"planning {told(with_keys(self.given, keys), gpus, self.device)} ...")
            try:
                self._plans[key] = make_plan(config, gpus, self.device)
            except UserError as error:
                self._plans[key] = error
                self.refusals.append(error)
        found = self._plans[key]
        return found if isinstance(found, Plan) else None

    def change(self, keys: Mapping[str, Any], gpus: int) -> Change | None:
        plan = self.plan(keys, gpus)
        return Change(self._differing(keys), plan) if plan else None

    def base(self, keys: Mapping[str, Any], gpus: int, images: int = 0) -> _Base | None:
        """Of one micro-batch of a rank's whole share (images: of so many), which shows all that smaller ones take."""
        keys = {**keys, RECOMPUTED: "none", MICRO_BATCH: images}
        plan = self.plan(keys, gpus)
        return _Base(keys, plan) if plan else None

    def fitting(self, base: _Base, images: int) -> Change | None:
        """Micro-batches of so many images, with as few units recomputed as fit, and all before none."""
        every, spare = base.recomputation.units, 0.0
        if base.choose(images) is None:
            return None
        for number in range(1, PLANS_OF_A_CHOICE + 1):
            units = base.choose(images, spare) if number < PLANS_OF_A_CHOICE else every
            units = every if units is None else units
            found = self.change(self.keys_of(base, images, units), base.plan.gpus)
            if found is None or found.fits:
                return found
            if len(units) == len(every):
                break
            spare -= found.plan.memory.room * 1.05
        return None

    def keys_of(self, base: _Base, images: int, units: list[str]) -> dict[str, Any]:
        """micro_batch as it was given where that is the same number of images."""
        keys = base.keys | {RECOMPUTED: base.recomputation.setting(units)}
        gpus = base.plan.gpus
        is_given = _images(self.given, gpus) == images
        share = self.given.train.global_batch // gpus
        return keys | {MICRO_BATCH: self.given.train.micro_batch if is_given else images if images < share else 0}

    def _differing(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in keys.items() if self.given.get(key) != value}


def told(config: Config, gpus: int, device: Device) -> str:
    """What is planned, while one waits for it."""
    images = counted(_images(config, gpus), "image")
    ranks = f"{_engine_name(config, gpus)} on {gpus:,} x {device.name}"
    return f"{ranks}, {images} at once, recomputed: {_short_recomputed(config)}"


def _short_recomputed(config: Config) -> str:
    told = recomputed(config)
    return counted(len(told.split()) - 1, "unit") if told.startswith("units ") else told


def _engine_name(config: Config, gpus: int) -> str:
    parallel = config.parallel
    replicas = f" in {parallel.replicate_degree} copies" * (parallel.replicate_degree > 1)
    offloads = ", offloading" * parallel.offload
    return ("single" if gpus == 1 and not parallel.offload else parallel.engine) + replicas + offloads


def tell(line: str) -> None:
    """A line of progress, to stderr."""
    print(f"seer-scale: {shown(line)}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ the smallest change


def smallest_change(config: Config, gpus: int, device: Device) -> tuple[Change | None, list[int]]:
    """What makes a recipe fit that does not, at the least cost to whoever trains it: units recomputed where that saves
    most for its time; smaller micro-batches, too; another engine; state in the host's memory; more GPUs. None: none of
    these does. And the numbers of GPUs that were tried.

    config: checked for so many GPUs. Raises UserError for what no update can be made of.
    """
    search = _Search(config, device)
    search.check_largest_unit(gpus)
    given = _named_engine(search, config, gpus)
    tried: list[int] = []
    for keys, number in _ways(search, given, gpus):
        if search.is_too_large(keys, number):
            continue
        tried += [number] * (number not in tried)
        base = search.base(keys, number)
        # of the given micro-batch first, then of smaller ones; none with less memory than the one that follows allows
        for images in _micro_batches(search.given, number) if base else ():
            if base and (found := search.fitting(base, images)):
                return found, tried
    return None, tried


def _named_engine(search: _Search, config: Config, gpus: int) -> dict[str, Any]:
    """What `parallel.engine auto` would come to where it does not fit."""
    return {ENGINE: "fsdp"} if config.parallel.engine == "auto" and gpus > 1 else {}


def _ways(search: _Search, given: dict[str, Any], gpus: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Ways to hold the model, with the number of GPUs, from the least change to the largest."""
    parallel, device = search.given.parallel, search.device
    yield given, gpus
    sharded = search.engine("fsdp", replicate_degree=1)
    is_sharded = parallel.engine in ("fsdp", "auto") and parallel.replicate_degree == 1
    if gpus > 1 and not is_sharded:
        yield sharded, gpus
    if find_spec(NEEDS["zero2"]) and not parallel.offload:
        for engine in ("zero2", "zero3") if gpus > 1 else ("zero2",):
            yield search.engine(engine, offload=True), gpus
    node, batch = device.gpus_per_node, search.given.train.global_batch
    more = [n for n in range(gpus + 1, batch + 1) if batch % n == 0 and (n % node == 0 or n < node)]
    least = 0
    for number in [n for n in more if (n // node or n).bit_count() == 1] or more:  # powers of two of nodes
        if number >= least:
            yield sharded, number
            least = 2 * number


def _micro_batches(config: Config, gpus: int) -> list[int]:
    """Images a rank takes at once: the recipe's number and its smaller divisors of a rank's share, largest first."""
    share, most = config.train.global_batch // gpus, _images(config, gpus)
    return [n for n in range(most, 0, -1) if share % n == 0]


# ------------------------------------------------------------------------------------------------ the fastest that fits


def fit(config: Config, gpus: int, device: Device) -> list[Change]:
    """Engine x recomputation x micro-batch x copies: all that was planned, those that fit first and the fastest of them
    at the beginning. What cannot be faster than what fits already is not planned. A line of progress a plan goes to
    stderr.

    config: checked for so many GPUs. Raises UserError where nothing can be planned.
    """
    search = _Search(config, device)
    search.check_largest_unit(gpus)
    whole = dataclasses.replace(config.train, micro_batch=0)
    sizes = _micro_batches(dataclasses.replace(config, train=whole), gpus)
    found: list[Change] = []
    waiting: list[tuple[float, int, _Base]] = []
    for keys in _engines(search, gpus):
        # the first is planned all the same: what it lacks is told
        base = None if found and search.is_too_large(keys, gpus) else search.base(keys, gpus)
        if base is None:
            continue
        found.append(Change(search._differing(base.keys), base.plan))
        if base.plan.memory.fits:
            continue  # neither recomputation nor smaller micro-batches make it faster
        for images in sizes:
            units = base.choose(images)
            if units is not None:
                waiting.append((base.seconds(images, units), images, base))
            if units == []:
                break
    for seconds, images, base in sorted(waiting, key=lambda w: w[0]):
        if seconds >= min((c.plan.time.seconds for c in found if c.fits), default=float("inf")):
            break
        if change := search.fitting(base, images):
            found.append(change)
    if not found:
        raise (
            UserError.joined(search.refusals)
            if search.refusals
            else UserError(Problem("--gpus", gpus, "no engine makes an update of this recipe on so many"))
        )
    return sorted(found, key=lambda change: (not change.fits, change.plan.time.seconds))


def _engines(search: _Search, gpus: int) -> Iterator[dict[str, Any]]:
    """The keys of every engine there is for so many GPUs."""
    if gpus == 1:
        yield search.engine("single")
        return
    node = search.device.gpus_per_node
    yield search.engine("fsdp", replicate_degree=1)
    if gpus > node and gpus % node == 0:
        yield search.engine("fsdp", replicate_degree=gpus // node)
    yield search.engine("ddp")
    for engine, package in NEEDS.items():
        if find_spec(package):
            yield search.engine(engine, **({"offload": False} if engine in ZERO_ENGINES else {}))


# ------------------------------------------------------------------------------------------------ what is said, written


def lines(found: list[Change]) -> list[str]:
    """A table of what `fit` gives."""
    rows = []
    for change in found:
        plan = change.plan
        config, memory = plan.config, plan.memory
        room = f"{memory_size(memory.room)} to spare" if memory.fits else f"{memory_size(-memory.room)} too much"
        rows.append((
            _engine_name(config, plan.gpus), f"{_images(config, plan.gpus)}", _short_recomputed(config),
            memory_size(memory.total), room, milliseconds(plan.time.seconds),
        ))  # fmt: skip
    titles = ("engine", "images at once", "recomputed", "memory", "", "update")
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [titles, *rows]]


def change_lines(change: Change | None, tried: Sequence[int]) -> list[str]:
    """What `smallest_change` gives, below a plan that does not fit."""
    if change is None:
        if not tried:
            return ["what fits         no number of GPUs: weights, gradients and state alone are more than each has"]
        numbers = ", ".join(f"{n:,}" for n in tried)
        return [f"what fits         nothing tried: recomputation, micro-batches, engines, offload on {numbers} GPUs"]
    memory = change.plan.memory
    return [
        f"what fits         on {change.gpus:,} GPUs: {shlex.join(change.words)}",
        f"  {memory_size(memory.total)} of {memory_size(memory.capacity)}, "
        f"{milliseconds(change.plan.time.seconds)} an update",
    ]


def environment_lines() -> list[str]:
    """Below a plan that fits only as the allocator gives back its slack."""
    return [f"what fits         the recipe as it is, with {name}={value} set" for name, value in GIVES_BACK.items()]


def write_recipe(path: Path, given: dict[str, Any], change: Change) -> None:
    """A recipe with the keys of a change, headed by what is planned of it. given: the recipe's mapping. Whole or not at
    all. Raises UserError, also where there is something at `path` already."""
    plan = change.plan
    nested: dict[str, Any] = {}
    keys = change.keys
    if plan.config.parallel.device not in ("auto", plan.device.torch_type):
        keys = keys | {"parallel.device": "auto"}
    for key, value in (keys | {"parallel.ranks": plan.gpus}).items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    head = [
        f"Planned for {plan.gpus} x {plan.device.name}: {plan.trace.engine}, {memory_size(plan.memory.total)} of "
        f"{memory_size(plan.memory.capacity)} a GPU,",
        f"{milliseconds(plan.time.seconds)} an update of {plan.config.train.global_batch} images.",
        f"Changed: {', '.join(keys) or 'nothing'}.",
    ]
    text = "".join(f"# {line}\n" for line in head) + yaml.safe_dump(merge(given, nested), sort_keys=False, width=120)
    with new_file(path) as aside:
        aside.write_text(text)
