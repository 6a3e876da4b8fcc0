"""What methods take for a backbone: a chain of units over a list of image tensors, one a resolution."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seer_scale.config import ImageSize, shape_of
from seer_scale.models.init import Init


class StageMap(NamedTuple):
    """What a stage makes of an image [3, H, W]: [channels, H / stride, W / stride], rounded up."""

    name: str
    channels: int
    stride: int


class Tokens(NamedTuple):
    """What a backbone makes of images: what stands for a whole image, `cls` [N, D] (a vision transformer's CLS token,
    else the pooled features); registers [N, R, D]; and patches [N, height * width, C], row by row."""

    cls: Tensor
    registers: Tensor
    patches: Tensor


class Backbone(nn.Module, ABC):
    """Construction draws nothing and works on the meta device."""

    num_features: int
    num_draws: int = 0
    """Uniform numbers that decide, in training, what of one image is dropped at random."""
    transform: object = None
    """What an image needs before: set where a backbone is loaded from a run (`seer_scale.load`)."""

    if TYPE_CHECKING:

        @overload
        def __call__(self, xs: Tensor) -> Tensor: ...

        @overload
        def __call__(self, xs: list[Tensor], draws: Sequence[Tensor] | None = None) -> list[Tensor]: ...

        def __call__(self, xs: list[Tensor] | Tensor, draws: Sequence[Tensor] | None = None) -> list[Tensor] | Tensor:
            """As `forward`."""

    @overload
    def forward(self, xs: Tensor) -> Tensor: ...

    @overload
    def forward(self, xs: list[Tensor], draws: Sequence[Tensor] | None = None) -> list[Tensor]: ...

    def forward(self, xs: list[Tensor] | Tensor, draws: Sequence[Tensor] | None = None) -> list[Tensor] | Tensor:
        """Images [N_r, 3, H_r, W_r] -> pooled features [N_r, num_features]; a single tensor gives a tensor. draws: for
        each resolution uniform numbers [N_r, num_draws], by which parts of it are dropped in training; without them
        nothing is."""
        if isinstance(xs, Tensor):
            return self.pooled_features([xs])[0]
        return self.pooled_features(xs) if draws is None else self.features_of_draws(xs, draws)

    @abstractmethod
    def pooled_features(self, xs: list[Tensor]) -> list[Tensor]:
        """Images [N_r, 3, H_r, W_r], one tensor a resolution -> features [N_r, num_features]."""

    def features_of_draws(self, xs: list[Tensor], draws: Sequence[Tensor]) -> list[Tensor]:
        """As `pooled_features`, with something dropped: of a backbone that has `num_draws`."""
        raise NotImplementedError(f"{type(self).__name__} drops nothing")

    def forward_units(self, names: list[str], xs: list[Tensor]) -> list[Tensor]:
        """xs through the units `names`, one after the other (`parallel.activation_checkpoint` may stand before it)."""
        for name in names:
            xs = self.get_submodule(name)(xs)
        return xs

    @abstractmethod
    def shard_units(self) -> dict[str, nn.Module]:
        """What an engine shards and recomputes by, in order of use; each takes and gives a list."""

    @abstractmethod
    def stage_units(self) -> list[list[str]]:
        """The names of the units of each stage."""

    def stage_maps(self) -> list[StageMap]:
        """What `forward_stages` gives, finest first; nothing of a backbone without feature maps."""
        return []

    def forward_stages(self, xs: list[Tensor]) -> list[list[Tensor]]:
        """Images [N_r, 3, H_r, W_r] -> of each of `stage_maps` its maps, one tensor a resolution."""
        raise NotImplementedError(f"{type(self).__name__} has no feature maps")

    def visible_stages(
        self, xs: list[Tensor], masks: list[Tensor], places: list[Tensor], draws: Sequence[Tensor] | None = None
    ) -> list[list[Tensor]]:
        """What is visible of images [N_r, 3, H_r, W_r], whose sides the stride of the last stage divides: of each of
        `stage_maps` its maps [N_r, K_r, t, t, C], t falling to 1; masks, places: as `layers.tiles.Travelling` has them.
        Without places: dense, [N_r, H_r / stride, W_r / stride, C], with 0 where tiles are masked. Of a backbone that
        `hides_tiles`."""
        raise NotImplementedError(f"{type(self).__name__} hides no tiles")

    def pooled_visible(self, maps: list[Tensor]) -> list[Tensor]:
        """The pooled features [N_r, num_features] of the packed last maps that `visible_stages` gives."""
        raise NotImplementedError(f"{type(self).__name__} hides no tiles")

    @property
    def hides_tiles(self) -> bool:
        return type(self).visible_stages is not Backbone.visible_stages

    @property
    def patch_map(self) -> StageMap | None:
        """What patches `tokens` gives: so many channels, and a side of so many pixels; None of a backbone without."""
        maps = self.stage_maps()
        return maps[-1] if maps else None

    def tokens(
        self, xs: list[Tensor], masks: Sequence[Tensor | None] = (), draws: Sequence[Tensor] | None = None
    ) -> list[Tokens]:
        """Images [N_r, 3, H_r, W_r], one tensor a resolution. masks: of each resolution None, or bool [N_r, P_r], the
        patches that it does not see: in the place of their pixels a network of convolutions sees 0, the mean colour.
        draws: in training, of each resolution uniform numbers [N_r, num_draws] that decide what is dropped; without
        them nothing is."""
        raise NotImplementedError(f"{type(self).__name__} has no patches")

    def tokens_and_attention(self, images: Tensor) -> tuple[Tokens, Tensor | None]:
        """Of images [N, 3, H, W], and how the CLS token and the registers weigh the patches in the last block,
        [N, heads, 1 + registers, height * width]; None of a network without such. Without gradients of the weights."""
        return self.tokens([images])[0], None

    def hide(self, xs: list[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
        """The images with 0 in the place of what is masked; of a network of convolutions."""
        stride, out = self.patch_map.stride if self.patch_map else 1, list(xs)
        for i, mask in enumerate(masks):
            if mask is not None:
                height, width = xs[i].shape[2:]
                grid = mask.view(-1, 1, -(-height // stride), -(-width // stride))
                pixels = grid.repeat_interleave(stride, 2).repeat_interleave(stride, 3)[:, :, :height, :width]
                out[i] = xs[i].masked_fill(pixels, 0)
        return out

    def resizer(self, name: str, shape: torch.Size) -> Callable[[Tensor], Tensor] | None:
        """What makes the parameter `name` of a network of this kind for images of another size, which has this shape
        there, one of this network's; None where nothing does."""
        return None

    def after_stages(self) -> list[str]:
        """The names of the parameters between the last stage and the pooled features, which `forward_stages` does not
        use."""
        return []

    def refuses(self, size: ImageSize) -> list[str]:
        """Why it takes no images of this size, a clause each, of each side where it is one; none where it does. Asked
        of one on the meta device."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                self(torch.empty(1, 3, *shape_of(size), device="meta"))
        except Exception as error:  # of another library, which says in its own way what it takes
            return [" ".join(str(error).split()).rstrip(".") or type(error).__name__]
        finally:
            self.train(training)
        return []

    def num_macs(self, size: ImageSize) -> int:
        """Multiply-accumulates of convolutions and products of matrices in one forward of one image of this size."""
        twin = copy.deepcopy(self).to("meta").eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            twin(torch.empty(1, 3, *shape_of(size), device="meta"))
        return counter.get_total_flops() // 2

    @abstractmethod
    def initialisers(self) -> dict[str, Init]:
        """How each parameter starts."""
