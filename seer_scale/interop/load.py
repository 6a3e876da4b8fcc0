"""A backbone as a plain module."""

from __future__ import annotations

from pathlib import Path

from seer_scale.data.transforms.image import Transform
from seer_scale.interop.weights import Weights, open_weights
from seer_scale.models.backbone import Backbone
from seer_scale.models.registry import reset_buffers


def load_backbone(path: Path, which: str = "last") -> Backbone:
    """As `seer_scale.load`, whose plugins are loaded already."""
    weights = open_weights(path, which)
    try:
        return materialise(weights)[0]
    finally:
        weights.close()


def materialise(weights: Weights) -> tuple[Backbone, int]:
    """The backbone on the CPU, in eval mode, with its `transform`; and the bytes of tensors read for it, which are its
    own. Raises UserError."""
    backbone = weights.backbone.to_empty(device="cpu").eval()
    reset_buffers(backbone)
    nbytes = weights.fill(backbone.state_dict())
    backbone.transform = Transform(int(weights.about.preprocessing["size"]))
    return backbone, nbytes
