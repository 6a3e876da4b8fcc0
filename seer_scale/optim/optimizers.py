"""LARS, SGD and AdamW over named pieces of parameters, without a host synchronisation.

An optimiser never knows the sharding: it works on what this rank holds, and the norms LARS needs are those of whole
tensors, which the engine brings (one stacked collective for all of them). Whether an update happens at all is a device
scalar, `found_inf`: where it is 1 the fused kernels leave parameters and state as they were. What is updated with
another rate or decay than the rest (`ParameterGroup`) is updated by a kernel of its own.
State is created at once, so that a checkpoint can load into it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from seer_scale.config import Optim
from seer_scale.optim.parameter_groups import ParameterGroup

LARS_EPS = 1e-8


def build_optimizer(
    pieces: Mapping[str, Tensor],
    vectors: Collection[str],
    config: Optim,
    groups: Mapping[str, ParameterGroup] | None = None,
) -> Optimizer:
    return (AdamW if config.name == "adamw" else SGD)(pieces, vectors, config, groups or {})


KeyT = TypeVar("KeyT", bound=Hashable)
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Pick:
    """Of a list, what is at `places`."""

    places: list[int]

    def __call__(self, items: Sequence[ItemT]) -> list[ItemT]:
        return [items[i] for i in self.places]


def alike(names: Sequence[str], of: Callable[[str], KeyT]) -> list[tuple[KeyT, Pick]]:
    """For each value of `of`, what picks the places of the names that have it out of a list like `names`."""
    places: dict[KeyT, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        places[of(name)].append(i)
    return [(key, Pick(some)) for key, some in places.items()]


class _Step(NamedTuple):
    """What one update takes of the pieces that are not frozen: their names and gradients; their places, `chosen`, among
    all, of which `norms` are; the rest as `Optimizer.update` has it."""

    names: list[str]
    grads: list[Tensor]
    lr: float
    weight_decay: float
    norms: Tensor
    chosen: list[int]
    found_inf: Tensor


class Optimizer:
    """`pieces`: name -> what this rank updates of a parameter (fp32; may be empty). `vectors`: names of parameters with
    fewer than two dimensions. `groups`: of those with multipliers. `state`: "name/slot" -> tensor like the piece.
    `rates`, `decays`: multipliers of the rate and the decay of an update, by name."""

    slots: tuple[str, ...]

    def __init__(
        self,
        pieces: Mapping[str, Tensor],
        vectors: Collection[str],
        config: Optim,
        groups: Mapping[str, ParameterGroup],
    ):
        self.pieces, self.config = dict(pieces), config
        self.excluded = frozenset(vectors if config.exclude_vectors else ())
        each = {name: groups.get(name, ParameterGroup()) for name in self.pieces}
        self.rates = {name: group.lr for name, group in each.items()}
        self.decays = {name: 0.0 if name in self.excluded else group.weight_decay for name, group in each.items()}
        self.state = {f"{n}/{slot}": torch.zeros_like(p) for n, p in self.pieces.items() for slot in self.slots}
        self._begin()

    def _begin(self) -> None:
        """What a kind of optimiser prepares beside its slots."""

    @torch.no_grad()
    def update(
        self,
        grads: Sequence[Tensor],
        lr: float,
        norms: Tensor,
        found_inf: Tensor,
        frozen: Collection[str] = (),
        weight_decay: float | None = None,
    ) -> None:
        """One update from the pieces' gradients (unscaled; overwritten), in the order of `pieces`.

        norms: [2, P] Euclidean norms of the whole parameters and of their gradients, in that order.
        found_inf: 0-dim fp32, 1 to change nothing. frozen: names left alone, state included. weight_decay: of this
        update; None: optim.weight_decay.
        """
        chosen = [i for i, n in enumerate(self.pieces) if n not in frozen]
        names = list(self.pieces)
        if chosen:
            picked = [names[i] for i in chosen], [grads[i] for i in chosen]
            decay = self.config.weight_decay if weight_decay is None else weight_decay
            self._update(_Step(*picked, lr, decay, norms, chosen, found_inf))

    def _update(self, step: _Step) -> None:
        raise NotImplementedError

    def _slot(self, names: list[str], slot: str) -> list[Tensor]:
        return [self.state[f"{n}/{slot}"] for n in names]


class SGD(Optimizer):
    """SGD with momentum; with `lars`, LARC with clip off (apex/parallel/LARC.py as VISSL used it for SEER).

    g <- (g + wd p) * trust |p| / (|g| + wd |p| + 1e-8); where |p| or |g| is zero, g is left as it is, without weight
    decay (VISSL's rule). Then v <- momentum v + g; p <- p - lr v.
    """

    slots = ("momentum",)

    def _begin(self) -> None:
        device = next(iter(self.pieces.values())).device
        self._decay = torch.tensor([self.decays[n] for n in self.pieces], device=device)
        unscaled = [n in self.excluded or self.config.name != "lars" for n in self.pieces]
        self._unscaled = torch.tensor(unscaled, device=device)

    def _update(self, step: _Step) -> None:
        names, grads, lr, weight_decay, norms, chosen, found_inf = step
        config, params = self.config, [self.pieces[n] for n in names]
        decay, (param_norms, grad_norms) = self._decay * weight_decay, norms
        zero = (param_norms == 0) | (grad_norms == 0) if config.name == "lars" else torch.zeros_like(self._unscaled)
        ratio = torch.where(
            self._unscaled | zero,
            1.0,
            config.trust_coefficient * param_norms / (grad_norms + decay * param_norms + LARS_EPS),
        )
        shrink = torch.where(zero, 0.0, decay * ratio)
        ratios, shrinks = ratio.unbind(), shrink.unbind()
        for i, q, grad in zip(chosen, params, grads):
            grad.mul_(ratios[i]).addcmul_(q, shrinks[i])
        velocity = self._slot(names, "momentum")
        for rate, pick in alike(names, self.rates.__getitem__):
            torch._fused_sgd_(
                pick(params), pick(grads), pick(velocity) if config.momentum else [],
                weight_decay=0.0, momentum=config.momentum, lr=lr * rate, dampening=0.0,
                nesterov=False, maximize=False, is_first_step=False, found_inf=found_inf,
            )  # fmt: skip
        if not config.momentum:
            # the kernel takes no velocity then, which is the gradient, for a resume that has momentum
            for v, grad in zip(velocity, grads):
                v.copy_(torch.where(found_inf > 0, v, grad))


class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101), as torch.optim.AdamW; the number of updates a parameter had is a tensor of its
    state."""

    slots = ("exp_avg", "exp_avg_sq")

    def _begin(self) -> None:
        self.state |= {f"{n}/step": torch.zeros((), device=p.device) for n, p in self.pieces.items()}

    def _update(self, step: _Step) -> None:
        names, grads, lr, found_inf = step.names, step.grads, step.lr, step.found_inf
        config, params = self.config, [self.pieces[n] for n in names]
        for (rate, decay), pick in alike(names, lambda n: (self.rates[n], self.decays[n])):
            steps = self._slot(pick(names), "step")
            torch._foreach_add_(steps, 1.0)
            torch._fused_adamw_(
                pick(params),
                pick(grads),
                self._slot(pick(names), "exp_avg"),
                self._slot(pick(names), "exp_avg_sq"),
                [],
                steps,
                lr=lr * rate,
                beta1=config.betas[0],
                beta2=config.betas[1],
                weight_decay=step.weight_decay * decay,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
                found_inf=found_inf,
            )
            torch._foreach_sub_(steps, [found_inf] * len(steps))
