"""What says how other libraries have the networks of one family, where tensors are more than ours by other names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shapes = Mapping[str, torch.Size]


class Piece(NamedTuple):
    """A tensor here, made of tensors there; of none where it has no counterpart."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor]


def same(x: Tensor) -> Tensor:
    return x


class Network(NamedTuple):
    """One that a library builds. arguments: what it is given beside its name; of transformers, its config.json. layers:
    those that timm's configuration names."""

    name: str
    arguments: dict[str, Any]
    layers: Mapping[str, Any] = {}


@dataclass(frozen=True)
class FamilyLayouts:
    """spec: the class that a family's networks are described by. libraries: whose files of them are read.
    imported(library, spec): our parameters of its tensors, those left out that it never has. exported(library, spec):
    its tensors of our parameters. initial(spec): parameters that a file may lack, as they are before any training.
    networks: of the libraries that are exported to, what (spec, preprocessing) is there, or a clause on why nothing is.
    matches: whether tensors are of such a network, by names of any of the libraries. find(where, shapes): then, the
    keys of a recipe's section `model`; raises UserError where they tell none."""

    spec: type
    libraries: tuple[str, ...]
    imported: Callable[[str, Any], dict[str, Piece]]
    exported: Callable[[str, Any], dict[str, Piece]]
    initial: Callable[[Any], dict[str, Tensor]]
    networks: Mapping[str, Callable[[Any, Mapping[str, Any]], Network | str]]
    matches: Callable[[Shapes], bool]
    find: Callable[[str, Shapes], dict[str, Any]]
