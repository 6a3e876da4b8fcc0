"""Whose tensors other libraries have in layouts of their own, by family."""

from __future__ import annotations

from typing import Any

from seer_scale.interop.convnext_layouts import CONVNEXT_LAYOUTS, FIRST_CONVNEXT_LAYOUTS
from seer_scale.interop.pieces import FamilyLayouts, Shapes
from seer_scale.interop.vit_layouts import VIT_LAYOUTS

FAMILY_LAYOUTS = (VIT_LAYOUTS, CONVNEXT_LAYOUTS, FIRST_CONVNEXT_LAYOUTS)


def layouts_of(spec: Any) -> FamilyLayouts | None:
    """Of the network that `spec_of` gives this for; None where tensors are ours by other names at most."""
    return next((layouts for layouts in FAMILY_LAYOUTS if type(spec) is layouts.spec), None)


def layouts_matching(shapes: Shapes) -> FamilyLayouts | None:
    """Of the family that tensors are of, by their names."""
    return next((layouts for layouts in FAMILY_LAYOUTS if layouts.matches(shapes)), None)
