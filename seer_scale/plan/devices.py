"""What a plan has to know of a device: how fast it multiplies and moves bytes, alone and with others.

Those it knows stand in devices.yaml, with where each figure comes from. `seer-scale bench step --calibrate` measures
any other and writes it as a file of the same keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from seer_scale.config import opt, read_section, read_yaml
from seer_scale.errors import NOTHING, ConfigError, Problem, UserError, closest

DEVICES = Path(__file__).with_name("devices.yaml")
HOW_TO_MEASURE = "seer-scale bench step --calibrate --out FILE"
IS_MISSING = "is missing"
Interval = tuple[float, float, float]
"""Low, likely, high."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """How fast a device multiplies numbers of one type. Shares are low, likely and high."""

    peak: float = opt(0.0, "FLOP/s of dense products, two a multiply-add", gt=0)
    product: Interval = opt((0.0, 0.0, 0.0), "share of it that matrix products reach", gt=0)
    convolution: Interval = opt((0.0, 0.0, 0.0), "share that convolutions without groups reach", gt=0)
    grouped: tuple[tuple[float, float, float, float], ...] = opt(
        (), "share that grouped convolutions reach, as [channels a group, low, likely, high], from narrow to wide", gt=0
    )

    def grouped_share(self, width: int) -> Interval:
        """Of groups of `width` channels: between the widths that are known in proportion to the logarithms of both, and
        outside of them as at the nearest."""
        below = [row for row in self.grouped if row[0] <= width] or [self.grouped[0]]
        above = [row for row in self.grouped if row[0] >= width] or [self.grouped[-1]]
        (x0, *y0), (x1, *y1) = below[-1], above[0]
        at = math.log(width / x0) / math.log(x1 / x0) if x1 > x0 else 0.0
        low, likely, high = (a ** (1 - at) * b**at for a, b in zip(y0, y1))
        return low, likely, high


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """What a GPU sends through at once, in one direction."""

    bandwidth: float = opt(0.0, "bytes a second and GPU that collectives reach", gt=0)
    latency_s: float = opt(0.0, "seconds a message takes to the next rank, whatever its size", gt=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """A key each. Shares and intervals are low, likely and high."""

    name: str = opt("", "what it is called")
    memory_bytes: int = opt(0, "memory, as torch counts it", gt=0)
    context_bytes: int = opt(0, "of it, what the driver and the kernels of a process take", ge=0)
    block_bytes: int = opt(0, "what its allocator rounds a tensor to", gt=0)
    communicator_bytes: int = opt(0, "what a process group takes on each of its ranks", ge=0)
    fp32: Precision = opt(Precision(), "numbers in single precision, whose products are not rounded to TF32")
    fp16: Precision = opt(Precision(), "numbers of float16")
    bf16: Precision = opt(Precision(), "numbers of bfloat16")
    bandwidth: float = opt(0.0, "bytes of memory a second", gt=0)
    elementwise: Interval = opt((0.0, 0.0, 0.0), "share of it that operations an element reach", gt=0)
    normalisation: Interval = opt(
        (0.0, 0.0, 0.0), "share that normalisations reach, their input and output counted once", gt=0
    )
    reduction: Interval = opt((0.0, 0.0, 0.0), "share that sums, means and norms reach", gt=0)
    launch_s: float = opt(0.0, "seconds a kernel takes at least", gt=0)
    convolution_s: float = opt(0.0, "seconds a convolution takes at least, and each of its two gradients", gt=0)
    host_s: Interval = opt((0.0, 0.0, 0.0), "seconds in which the host gives an operation to the device", gt=0)
    asynchronous: bool = opt(True, "whether the host goes on while the device works")
    gpus_per_node: int = opt(0, "GPUs a node", gt=0)
    link: Link = opt(Link(), "between GPUs of a node")
    network: Link = opt(Link(), "between nodes, as each GPU's share of its node's")

    @property
    def given(self) -> str:
        """What `load_device` was asked for."""
        return self.name

    @property
    def torch_type(self) -> str:
        """As parallel.device has it."""
        return "cuda" if self.asynchronous else "cpu"

    def precision(self, dtype: torch.dtype) -> Precision:
        """Products of other types are counted as of fp32."""
        return {torch.float16: self.fp16, torch.bfloat16: self.bf16}.get(dtype, self.fp32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOfFile(Device):
    path: str = ""

    @property
    def given(self) -> str:
        return self.path


OPTIONAL = ("name", "context_bytes", "communicator_bytes", "asynchronous")


def _missing(section: Any, prefix: str, told: set[str]) -> Iterator[Problem]:
    """Keys of a device that have no value: no figure stands in for what only its maker knows."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if key in told or field.name in OPTIONAL:
            continue
        if value == Link():
            continue  # a device that is alone needs none, and a plan of several says so
        if dataclasses.is_dataclass(value):
            yield from _missing(value, f"{key}.", told)
        elif not value or isinstance(value, tuple) and not value[0]:
            yield Problem(key, NOTHING, f"{IS_MISSING}: {field.metadata['help']}")


def _not_rising(section: Any, prefix: str) -> Iterator[Problem]:
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _not_rising(value, f"{key}.")
        elif isinstance(value, tuple):
            rows = value if field.name == "grouped" else ((0.0, *value),)
            for row in rows:
                if list(row[1:]) != sorted(row[1:]):
                    yield Problem(key, list(row[-3:]), "must go from low to high", sorted(row[-3:]))
            if [row[0] for row in rows] != sorted({row[0] for row in rows}):
                widths = [row[0] for row in rows]
                yield Problem(key, widths, "its widths must go from narrow to wide", sorted(set(widths)))


def read_device(given: dict[str, Any]) -> tuple[Device, list[Problem]]:
    """The device of a mapping, with all that is wrong with it."""
    problems: list[Problem] = []
    device = read_section(Device, given, "", problems)
    told = {p.key.partition("[")[0] for p in problems}
    problems += [*_missing(device, "", told), *_not_rising(device, "")]
    return device, problems


@cache
def known_devices() -> dict[str, Device]:
    """By name."""
    table = read_yaml(DEVICES, "devices")
    found = {}
    for name, given in table.items():
        device, problems = read_device({"name": name} | given)
        if problems:
            raise ConfigError(problems, what=f"The device {name}")
        found[name] = device
    return found


def load_device(name_or_file: str) -> Device:
    """A known device, or one that a YAML file describes.

    Raises ConfigError with all that is wrong with a file, UserError where there is no such device.
    """
    known = known_devices()
    if name_or_file in known:
        return known[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        near = closest(name_or_file, known)
        meant = f"did you mean {near}? " * bool(near)
        fix = f"{meant}{HOW_TO_MEASURE} describes the one it runs on"
        rule = f"is no device, neither one of {', '.join(known)} nor a YAML file"
        raise UserError(Problem(name_or_file, NOTHING, rule, fix))
    device, problems = read_device(read_yaml(path, "keys of a device, such as 'bandwidth: 3.35e12'"))
    if problems:
        fix = f" ({HOW_TO_MEASURE} writes a whole one)" if any(p.rule.startswith(IS_MISSING) for p in problems) else ""
        raise ConfigError(problems, what=f"The device {name_or_file}{fix}")
    return DeviceOfFile(**vars(device) | {"name": device.name or path.stem}, path=name_or_file)
