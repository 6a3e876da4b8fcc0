"""torchvision's Mask R-CNN with a feature pyramid (arXiv 1703.06870, 1612.03144) on a backbone of ours.

An image is never padded to another's size, since squeeze-and-excitation would average over the padding: the backbone
takes a list of images, the heads one image at a time. The losses of an image do not depend on which images share its
batch or process, so neither does an update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from seer_scale.errors import NOTHING, CheckpointError, Problem
from seer_scale.evaluate.detection.settings import DetectSettings
from seer_scale.models.backbone import Backbone, StageMap
from seer_scale.models.layers.norm import BatchNorm, estimate_statistics
from seer_scale.models.layers.stateful import share_statistics


@dataclass
class Example:
    """image: uint8 [3, H, W]. boxes: float32 [n, 4], (left, top, right, bottom); labels int64 [n], from 1; masks: uint8
    [n, H, W], or none. side: what its short side is resized to. draw: seeds what is drawn for it."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None
    side: int
    draw: int


def levels_of(backbone: Backbone, name: str) -> list[tuple[int, StageMap]]:
    """(place among the stages, map) of those that a pyramid stands on: the last of each stride, from 4 on. Raises
    CheckpointError of a backbone that has not two."""
    last = {of.stride: (i, of) for i, of in enumerate(backbone.stage_maps()) if of.stride >= 4}
    if len(last) < 2:
        rule = "has no feature maps of several strides, which a feature pyramid needs"
        raise CheckpointError(Problem(name, NOTHING, rule, "evaluate a convnet, such as a RegNetY"))
    return [last[stride] for stride in sorted(last)]


class Pyramid(nn.Module):
    """Images [1, 3, H_i, W_i] -> of each the maps of all levels, and of a coarser one."""

    def __init__(self, backbone: Backbone, levels: Sequence[tuple[int, StageMap]], width: int):
        super().__init__()
        self.body, self.out_channels = backbone, width
        self.places = [i for i, _ in levels]
        self.fpn = FeaturePyramidNetwork([of.channels for _, of in levels], width, LastLevelMaxPool())

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        stages = self.body.forward_stages(images)
        return [
            self.fpn({str(level): stages[place][i] for level, place in enumerate(self.places)})
            for i in range(len(images))
        ]


def _pool(strides: Sequence[int], size: int) -> MultiScaleRoIAlign:
    """With the scales that the strides give. It would infer them from the first image it sees, padding included, and
    keep them: wrong ones of a small image."""
    pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], size, sampling_ratio=2)
    finest, coarsest = (round(math.log2(stride)) for stride in (strides[0], strides[-1]))
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(finest, coarsest, pool.canonical_scale, pool.canonical_level)
    return pool


class Detector(nn.Module):
    """classes: without the background. group: of all ranks, over which statistics of BatchNorm are taken where the
    options say so. Draws its initial weights; the backbone keeps its own."""

    def __init__(
        self, backbone: Backbone, levels: Sequence[tuple[int, StageMap]], classes: int, options: DetectSettings, *,
        masks: bool, group: dist.ProcessGroup | None = None,
    ):  # fmt: skip
        super().__init__()
        strides = [of.stride for _, of in levels]
        ratios = ((0.5, 1.0, 2.0),) * (len(strides) + 1)
        width, regions = options.width, options.regions
        shape: dict[str, Any] = {
            "min_size": options.size,
            "max_size": options.longest,
            "rpn_anchor_generator": AnchorGenerator(tuple((8 * s,) for s in (*strides, 2 * strides[-1])), ratios),
            "rpn_post_nms_top_n_train": min(2000, 4 * regions),
            "rpn_post_nms_top_n_test": min(1000, 2 * regions),
            "box_roi_pool": _pool(strides, 7),
            "box_batch_size_per_image": regions,
            "box_head": TwoMLPHead(7 * 7 * width, 4 * width),
            "box_predictor": FastRCNNPredictor(4 * width, classes + 1),
        }
        pyramid = Pyramid(backbone, levels, width)
        if masks:
            net: FasterRCNN = MaskRCNN(
                pyramid,
                mask_roi_pool=_pool(strides, 14),
                mask_head=MaskRCNNHeads(width, (width,) * 4, 1),
                mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
                **shape,
            )
        else:
            net = FasterRCNN(pyramid, **shape)
        self.net, self.size, self.frozen = net, options.size, options.norm == "frozen"
        unused = set(backbone.after_stages())
        for name, p in backbone.named_parameters():
            p.requires_grad_(name not in unused)
        for layer in self.norms():
            layer.joint = True
            if self.frozen:
                layer.requires_grad_(False)
        share_statistics(backbone, None if self.frozen else group)

    def norms(self) -> list[BatchNorm]:
        return [layer for layer in self.net.backbone.modules() if isinstance(layer, BatchNorm)]

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        if self.frozen:
            for layer in self.norms():
                layer.eval()
        return self

    def forward(self, examples: list[Example]) -> dict[str, Tensor]:
        """The losses by name, each the mean over these images; images of different sizes make one forward of the
        backbone."""
        prepared = [self._prepare(one) for one in examples]
        maps = self.net.backbone([images.tensors for images, _ in prepared])
        sums: dict[str, Tensor] = {}
        for one, (images, target), of_image in zip(examples, prepared, maps):
            torch.manual_seed(one.draw)  # which anchors and proposals its losses are of
            proposals, losses = self.net.rpn(images, of_image, [target])
            _, of_heads = self.net.roi_heads(of_image, proposals, images.image_sizes, [target])
            for name, loss in (losses | of_heads).items():
                sums[name] = sums[name] + loss if name in sums else loss
        return {name: loss / len(examples) for name, loss in sums.items()}

    @torch.no_grad()
    def detect(self, image: Tensor) -> dict[str, Tensor]:
        """uint8 [3, H, W] -> boxes [n, 4] and, where it has them, masks [n, 1, H, W] in [0, 1], of the image as it is
        given; labels [n], scores [n]. In eval mode."""
        images, _ = self._resized(image, self.size)
        (maps,) = self.net.backbone([images.tensors])
        proposals, _ = self.net.rpn(images, maps)
        found, _ = self.net.roi_heads(maps, proposals, images.image_sizes)
        height, width = image.shape[1:]
        return self.net.transform.postprocess(found, images.image_sizes, [(height, width)])[0]

    @torch.no_grad()
    def estimate_statistics(self, images: Sequence[Tensor], at_once: int = 8) -> None:
        """Running statistics of BatchNorm from these images, uint8 [3, H, W] each: of weights that have none yet."""

        def forwards() -> Iterator[int]:
            for first in range(0, len(images), at_once):
                part = images[first : first + at_once]
                self.net.backbone([self._resized(x, self.size)[0].tensors for x in part])
                yield len(part)

        estimate_statistics(self.net.backbone, forwards())

    def _prepare(self, one: Example) -> tuple[ImageList, dict[str, Tensor]]:
        target = {"boxes": one.boxes, "labels": one.labels} | ({} if one.masks is None else {"masks": one.masks})
        return self._resized(one.image, one.side, target)

    def _resized(
        self, image: Tensor, side: int, target: dict[str, Tensor] | None = None
    ) -> tuple[ImageList, dict[str, Tensor]]:
        """torchvision's preparation, with the short side given instead of drawn."""
        transform = self.net.transform
        transform.min_size = (side,)
        images, targets = transform([image.float() / 255], None if target is None else [target])
        return images, targets[0] if targets else {}
