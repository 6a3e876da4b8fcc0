"""What the names of the network to export begin with, whatever a method calls it."""

from __future__ import annotations

import pytest
import torch

from seer_scale.distributed import World
from tests.toy import make


@pytest.mark.parametrize("kind,prefix", [("classifier", "backbone."), ("teacher", "student.backbone.")])
def test_the_prefix_is_that_of_the_backbones_parameters(kind, prefix):
    with torch.device("meta"):
        method = make(kind, World())
    assert method.export_prefix == prefix
    twins = {"backbone.": (), "student.backbone.": ("teacher.backbone.",)}[prefix]
    assert method.backbone_prefixes() == (prefix, *twins)
    names = {name.removeprefix(prefix) for name, _ in method.named_parameters() if name.startswith(prefix)}
    assert names == {name for name, _ in method.backbone.named_parameters()}
