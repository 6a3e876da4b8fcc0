"""What other libraries call the parts of a RegNetY, and the networks themselves: one table a library, read both ways.

A parameter or buffer of ours is "stem.PART.LEAF" or "sS.bB.PART.LEAF", with S and B from 1: "s3.b2.se.fc1.bias". Each
library has its own words for the stem, for block B of stage S and for the parts; leaves ("weight", "running_var") are
torch's everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class NameMap:
    """stem: what the stem is called. block: block `b` of stage `s`, as a format of these two, counted as `first_stage`
    and `first_block` say. stem_parts, parts: our name of a part to theirs; no two are called alike."""

    stem: str
    block: str
    stem_parts: Mapping[str, str]
    parts: Mapping[str, str]
    first_stage: int = 1
    first_block: int = 1

    def theirs(self, name: str) -> str:
        """Their name of our parameter or buffer. Raises KeyError where we have none of this name."""
        unit, part, leaf = _split(_OURS, name)
        if unit["s"] is None:
            return f"{self.stem}.{self.stem_parts[part]}.{leaf}"
        stage, block = int(unit["s"]) - 1 + self.first_stage, int(unit["b"]) - 1 + self.first_block
        return f"{self.block.format(s=stage, b=block)}.{self.parts[part]}.{leaf}"

    def ours(self, name: str) -> str:
        """Our name of their parameter or buffer. Raises KeyError where it is none of a RegNetY's trunk."""
        unit, part, leaf = _split(self._pattern, name)
        if unit["s"] is None:
            return f"stem.{self._stem_parts[part]}.{leaf}"
        stage, block = int(unit["s"]) + 1 - self.first_stage, int(unit["b"]) + 1 - self.first_block
        return f"s{stage}.b{block}.{self._parts[part]}.{leaf}"

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pieces = re.split(r"(\{[sb]\})", self.block)
        block, seen = "", set[str]()
        for piece in pieces:
            key = piece.strip("{}") if piece in ("{s}", "{b}") else ""
            block += (f"(?P={key})" if key in seen else f"(?P<{key}>\\d+)") if key else re.escape(piece)
            seen.add(key)
        return re.compile(rf"(?:{re.escape(self.stem)}|{block})\.(?P<part>.+)\.(?P<leaf>\w+)")

    @cached_property
    def _parts(self) -> dict[str, str]:
        return {theirs: ours for ours, theirs in self.parts.items()}

    @cached_property
    def _stem_parts(self) -> dict[str, str]:
        return {theirs: ours for ours, theirs in self.stem_parts.items()}


_OURS = re.compile(r"(?:stem|s(?P<s>\d+)\.b(?P<b>\d+))\.(?P<part>.+)\.(?P<leaf>\w+)")


def _split(pattern: re.Pattern[str], name: str) -> tuple[re.Match[str], str, str]:
    match = pattern.fullmatch(name)
    if match is None:
        raise KeyError(name)
    return match, match["part"], match["leaf"]


def _conv_norms(names: Mapping[str, str], conv: str, norm: str) -> dict[str, str]:
    """Parts that are a convolution and a BatchNorm, whose own names are the same in each."""
    return {f"{ours}.{a}": f"{theirs}.{b}" for ours, theirs in names.items() for a, b in (("conv", conv), ("bn", norm))}


_OWN_PARTS = ("conv1.conv", "conv1.bn", "conv2.conv", "conv2.bn", "se.fc1", "se.fc2", "conv3.conv", "conv3.bn",
              "downsample.conv", "downsample.bn")  # fmt: skip

NAME_MAPS = {
    "timm": NameMap("stem", "s{s}.b{b}", {p: p for p in ("conv", "bn")}, {p: p for p in _OWN_PARTS}),
    "torchvision": NameMap(
        "stem",
        "trunk_output.block{s}.block{s}-{b}",
        {"conv": "0", "bn": "1"},
        _conv_norms({"conv1": "f.a", "conv2": "f.b", "conv3": "f.c", "downsample": "proj"}, "0", "1")
        | {"se.fc1": "f.se.fc1", "se.fc2": "f.se.fc2"},
        first_block=0,
    ),
    "transformers": NameMap(
        "embedder.embedder",
        "encoder.stages.{s}.layers.{b}",
        {"conv": "convolution", "bn": "normalization"},
        _conv_norms(
            {"conv1": "layer.0", "conv2": "layer.1", "conv3": "layer.3", "downsample": "shortcut"},
            "convolution",
            "normalization",
        )
        | {"se.fc1": "layer.2.attention.0", "se.fc2": "layer.2.attention.2"},
        first_stage=0,
        first_block=0,
    ),
}
"""transformers: of RegNetModel; RegNetForImageClassification puts "regnet." before each."""

TIMM_MODELS = {
    "regnety_200mf": "regnety_002", "regnety_400mf": "regnety_004", "regnety_600mf": "regnety_006",
    "regnety_800mf": "regnety_008", "regnety_1_6gf": "regnety_016", "regnety_3_2gf": "regnety_032",
    "regnety_4gf": "regnety_040", "regnety_6_4gf": "regnety_064", "regnety_8gf": "regnety_080",
    "regnety_12gf": "regnety_120", "regnety_16gf": "regnety_160", "regnety_32gf": "regnety_320",
    "regnety_64gf": "regnety_640", "regnety_128gf": "regnety_1280", "regnety_256gf": "regnety_2560",
}  # fmt: skip
"""Our name of a network to timm's."""
TORCHVISION_MODELS = {
    name: f"regnet_y_{name.removeprefix('regnety_')}"
    for name in ("regnety_400mf", "regnety_1_6gf", "regnety_3_2gf", "regnety_16gf", "regnety_32gf", "regnety_128gf")
}
"""Our name of a network to torchvision's. Its 800MF and 8GF have other widths: it rounds them so that none shrinks by
more than a tenth."""
