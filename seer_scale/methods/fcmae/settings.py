"""FCMAE's section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from seer_scale.config import MethodSettings, opt, register_settings


@register_settings("fcmae")
@dataclass(frozen=True, kw_only=True)
class FCMAESettings(MethodSettings):
    mask_ratio: float = opt(0.6, "share of an image's patches that the encoder does not see", gt=0, lt=1)
    decoder: Literal["convnext", "unet"] = opt(
        "convnext",
        "ConvNeXt V2 blocks on the last stage's map, or SparK's U-Net on the maps of all stages",
        of_network=True,
    )
    decoder_width: int = opt(
        512, "channels of the decoder; of a U-Net those of its coarsest map", ge=1, of_network=True
    )
    decoder_depth: int = opt(1, "blocks of a convnext decoder", ge=1, of_network=True)
    normalise: bool = opt(True, "each patch is predicted less its mean and over its standard deviation")

    def needs(self) -> dict[str, tuple[bool, str]]:
        return {"decoder_depth": (self.decoder == "convnext", "fcmae.decoder convnext")}
