"""Gram anchoring: patches stay as alike as an earlier teacher found them (arXiv 2508.10104, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_scale.models.layers.precision import at_least_fp32


def gram_loss(patches: Tensor, anchors: Tensor) -> Tensor:
    """Mean square difference of the cosines of all pairs of patches of an image; 0-dim, fp32 at least.

    patches: the student's, [N, P, C]; anchors: the Gram teacher's of the same images, [N, P, C'], without a graph.
    """
    with torch.autocast(patches.device.type, enabled=False):
        ours, theirs = (F.normalize(at_least_fp32(x), dim=2) for x in (patches, anchors))
        return (ours @ ours.mT - theirs @ theirs.mT).square().mean()


def reduced(patches: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
    """Patches of images that are `scale` times larger, [N, scale^2 height width, C], as those of a grid (height,
    width), [N, height width, C]: bicubic, without antialiasing, as released."""
    if scale == 1:
        return patches
    height, width = grid
    maps = at_least_fp32(patches).mT.unflatten(2, (scale * height, scale * width))
    return F.interpolate(maps, grid, mode="bicubic", align_corners=False).flatten(2).mT
