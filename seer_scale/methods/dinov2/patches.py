"""What DINOv2 asks of a backbone's patches, and which of them it masks."""

from __future__ import annotations

from collections.abc import Iterator

from seer_scale.config import Config
from seer_scale.errors import Problem, UserError
from seer_scale.methods.dinov2.settings import DINOv2Settings
from seer_scale.methods.masking import MIN_BLOCK, BlockMasking
from seer_scale.models.backbone import Backbone


def seen_shape(config: Config) -> tuple[int, int]:
    """Of a global crop, (height, width) in pixels, as student and teacher see it."""
    s, (height, width) = config.settings_as(DINOv2Settings), config.views.crops[0].shape
    scale = s.gram_scale if s.gram_weight else 1
    return height // scale, width // scale


def grid_of(backbone: Backbone, config: Config) -> tuple[int, int]:
    """Patches of a global crop, high and wide, as student and teacher see it; none of a backbone without."""
    (height, width), stride = seen_shape(config), backbone.patch_map.stride if backbone.patch_map else 0
    return (-(-height // stride), -(-width // stride)) if stride else (0, 0)


def masking_of(backbone: Backbone, config: Config) -> BlockMasking:
    """Of the global crops."""
    s = config.settings_as(DINOv2Settings)
    return BlockMasking(
        seed=config.run.seed, grid=grid_of(backbone, config), global_batch=config.train.global_batch,
        views=config.views.crops[0].num, share=s.mask_share, ratio=s.mask_ratio, exact=s.mask_exact,
    )  # fmt: skip


def check_patches(backbone: Backbone, config: Config) -> None:
    """Raises UserError where the backbone, on the meta device, and the recipe do not go together."""
    if problems := list(_problems(backbone, config)):
        raise UserError(*problems)


def _problems(backbone: Backbone, config: Config) -> Iterator[Problem]:
    s, patches, name = config.settings_as(DINOv2Settings), backbone.patch_map, config.model.name
    if patches is None:
        for key, weight in (("ibot_weight", s.ibot_weight), ("gram_weight", s.gram_weight)):
            if weight:
                yield Problem(f"dinov2.{key}", weight, f"it compares patches, and {name} has none", (0.0,))
        return
    size, seen = config.views.crops[0].size, " x ".join(map(str, seen_shape(config)))
    for why in backbone.refuses(seen_shape(config)) if s.gram_weight else ():
        rule = f"student and teacher see {seen} pixels of it, and the backbone does not take that: {why}"
        yield Problem("views.crops[0].size", size, rule)
    if not s.ibot_weight:
        return
    if s.shared_head and patches.channels != backbone.num_features:
        rule = f"patches of {name} have {patches.channels} channels and its class token {backbone.num_features}"
        yield Problem("dinov2.shared_head", True, rule, (False,))
    masking = masking_of(backbone, config)
    if not masking.num_masked:
        crops = config.train.global_batch * config.views.crops[0].num
        rule = f"of a batch's {crops} global crops none would be masked"
        yield Problem("dinov2.mask_share", s.mask_share, rule, f"nearest: {1 / crops:.2g}")
    (height, width), most = masking.grid, int(masking.num_patches * s.mask_ratio[1])
    blocks_fit = s.mask_exact or min(height, width) > 1 and height + width > 5 and most >= MIN_BLOCK
    if not (most and blocks_fit):
        rule = f"of the {height} x {width} patches of a crop none would be masked" + (
            "" if s.mask_exact else f": a block has at least {MIN_BLOCK}, and is smaller than the crop both ways"
        )
        fix = "larger crops (views.crops[0].size), or dinov2.ibot_weight 0"
        yield Problem("dinov2.mask_ratio", list(s.mask_ratio), rule, fix)
