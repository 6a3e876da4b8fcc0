"""What the loader hands to training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch, b images, in host memory.

    views: for each kind of crop uint8 [num * b, 3, *shape], all images' first crop, then all their second.
    photometric_params: for each kind float32 [num * b, photometric.PARAMS_PER_CROP], to be applied on the device; or
    none, where the views are done. indices: int64 [b], the images really used. samples_seen: global samples before this
    batch. unreadable: "name: reason" of each image that was replaced.
    """

    views: list[Tensor]
    photometric_params: list[Tensor]
    indices: Tensor
    samples_seen: int
    unreadable: list[str]
