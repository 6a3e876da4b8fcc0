"""FCMAE's section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from seer_scale.config import MethodSettings, opt, register_settings


@register_settings("fcmae")
@dataclass(frozen=True, kw_only=True)
class FCMAESettings(MethodSettings):
    mask_ratio: float = opt(0.6, "share of an image's patches that the encoder does not see", gt=0, lt=1)
    decoder_width: int = opt(512, "channels of the decoder", ge=1, of_network=True)
    decoder_depth: int = opt(1, "blocks of the decoder", ge=1, of_network=True)
    normalise: bool = opt(True, "each patch is predicted less its mean and over its standard deviation")
