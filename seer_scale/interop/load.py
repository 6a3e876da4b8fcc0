"""A backbone as a plain module."""

from __future__ import annotations

from pathlib import Path

from seer_scale.data.transforms.image import Transform
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.formatting import counted
from seer_scale.interop.weights import Weights, open_weights
from seer_scale.models.backbone import Backbone
from seer_scale.models.classifier import Classifier
from seer_scale.models.registry import reset_buffers


def load_backbone(path: Path, which: str = "last") -> Backbone:
    """As `seer_scale.load`, whose plugins are loaded already."""
    weights = open_weights(path, which)
    try:
        return materialise(weights)[0]
    finally:
        weights.close()


def load_classifier(path: Path) -> Classifier:
    """As `seer_scale.load_classifier`, whose plugins are loaded already."""
    weights = open_weights(path)
    try:
        backbone, _ = materialise(weights)
        head, width = weights.head, backbone.num_features
        if head is None:
            raise UserError(
                Problem(str(path), NOTHING, "has no head over classes", "seer-scale eval finetune trains one")
            )
        shapes = {"head/weight": (len(head.classes), width), "head/bias": (len(head.classes),)}
        if wrong := [
            name for name, shape in shapes.items() if getattr(weights.others.get(name), "shape", None) != shape
        ]:
            rule = f"has no {wrong[0]} of {list(shapes[wrong[0]])}, as {counted(len(head.classes), 'class')} want"
            raise UserError(Problem(str(path), NOTHING, rule))
        made = Classifier(backbone, head.classes, multi_label=head.multi_label).eval()
        for name, parameter in made.head.named_parameters():
            parameter.data.copy_(weights.read(f"head/{name}"))
        return made
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
