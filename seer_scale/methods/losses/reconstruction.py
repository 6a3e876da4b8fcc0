"""Pixels of patches that were not seen, predicted (MAE, arXiv 2111.06377; FCMAE, arXiv 2301.00808)."""

from __future__ import annotations

import torch
from torch import Tensor

from seer_scale.models.layers.precision import at_least_fp32

TARGET_EPS = 1e-6


def patches_of(images: Tensor, side: int) -> Tensor:
    """[N, 3, H, W] -> [N, H / side, W / side, side * side * 3]: rows, then columns, then colours of each patch."""
    grid = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3)


def images_of(patches: Tensor, side: int) -> Tensor:
    """The way back from `patches_of`."""
    pixels = patches.unflatten(3, (side, side, 3)).permute(0, 5, 1, 3, 2, 4)
    return pixels.flatten(4).flatten(2, 3)


def normalised(patches: Tensor) -> Tensor:
    """Each patch less its mean, over its standard deviation (unbiased), in fp32 at least."""
    mean, deviation = _mean_and_deviation(patches)
    return (patches - mean) / deviation


def denormalised(predicted: Tensor, patches: Tensor) -> Tensor:
    """The way back, with means and deviations of `patches`."""
    mean, deviation = _mean_and_deviation(patches)
    return predicted * deviation + mean


def _mean_and_deviation(patches: Tensor) -> tuple[Tensor, Tensor]:
    x = at_least_fp32(patches)
    return x.mean(-1, keepdim=True), (x.var(-1, keepdim=True) + TARGET_EPS).sqrt()


def reconstruction_error(predicted: Tensor, images: Tensor, side: int, *, normalise: bool) -> Tensor:
    """Mean square error of each patch, [N, H / side, W / side], fp32 at least; predicted as `patches_of` has them."""
    target = patches_of(images, side)
    target = normalised(target) if normalise else at_least_fp32(target)
    return (at_least_fp32(predicted) - target).square().mean(-1)


def masked_mean(errors: Tensor, masks: Tensor) -> Tensor:
    """The mean over what is masked; 0-dim. errors: [N, h, w]; masks: bool, of the same shape."""
    return torch.where(masks, errors, 0.0).sum() / masks.sum()
