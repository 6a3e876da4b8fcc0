"""What a plain loop of each method has in common, and of what parts a method's update consists, for `bench step`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from seer_scale.config import Config
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.extras import how_to_install
from seer_scale.methods.base import Method
from seer_scale.models.execution import COMPUTE_DTYPES

MethodT = TypeVar("MethodT", bound=Method[Any, Any])


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part of an update. macs: multiply-accumulates of a forward of the batch. forward: makes it, from inputs that need
    a gradient where the part is trained: its backward takes twice as many then."""

    macs: int
    forward: Callable[[], Tensor]
    is_trained: bool = True

    @property
    def update_macs(self) -> int:
        return self.macs * (3 if self.is_trained else 1)

    def run(self) -> None:
        with torch.set_grad_enabled(self.is_trained):
            out = self.forward()
        if self.is_trained:
            out.backward(torch.ones_like(out))


class PlainLoop(ABC, Generic[MethodT]):
    """An update as anybody would write it, of public modules with the method's weights. A subclass makes `model` and
    `optimizer`."""

    small: ClassVar[Mapping[str, Any]]
    """Sections of a small recipe of the method, whose data are never read."""
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, ours: MethodT, config: Config, device: torch.device):
        """With the weights of `ours`. Raises UserError where a library is missing."""
        self.config, self.device, self.dtype = config, device, COMPUTE_DTYPES[config.train.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    @staticmethod
    @abstractmethod
    def sides(model: str) -> dict[str, Any]:
        """Keys that both sides of the comparison have, whatever the recipe of this backbone says: an optimiser that the
        plain loop has, and nothing that it cannot do. None: not given."""

    @staticmethod
    @abstractmethod
    def prototypes(num: int) -> dict[str, Any]:
        """Keys of the method's section for so many prototypes."""

    @staticmethod
    def refusals(config: Config) -> Iterator[Problem]:
        """Why this cannot be timed, alone neither."""
        yield from ()

    @staticmethod
    @abstractmethod
    def problems(config: Config) -> Iterator[Problem]:
        """Why the plain loop is not this recipe's."""

    @staticmethod
    @abstractmethod
    def heads(config: Config) -> str:
        """What stands between the backbone and the loss, in words."""

    @staticmethod
    @abstractmethod
    def parts(method: MethodT, config: Config, views: Sequence[Tensor]) -> dict[str, Part]:
        """What an update of these views consists of, but for losses and the optimiser."""

    @abstractmethod
    def loss(self, views: list[Tensor], samples_seen: int) -> Tensor:
        """fp32, 0-dim."""

    def before_step(self) -> None:
        """What is done to the unscaled gradients."""

    @abstractmethod
    def after_step(self, samples_seen: int) -> None:
        """What follows the optimiser's step."""

    def update(self, views: list[Tensor], samples_seen: int) -> Tensor:
        loss = self.loss(views, samples_seen)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.before_step()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            self.after_step(samples_seen)
        return loss.detach()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def import_timm() -> Any:
    """Raises UserError where it is missing."""
    try:
        import timm
    except ImportError as error:
        fix = f"install it ({how_to_install('timm')}), or give --alone"
        raise UserError(Problem("timm", NOTHING, "is what bench step compares with", fix)) from error
    return timm
