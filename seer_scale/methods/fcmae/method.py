"""FCMAE: a network of convolutions sees some patches of an image and predicts the pixels of the others (arXiv
2301.00808). Only what is visible is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.config import Config, ImageSize, multiples_near, sides_of, size_text
from seer_scale.distributed import World
from seer_scale.errors import Problem, UserError
from seer_scale.methods.base import Baseline, Features, LossOutput, Method, Reconstructions
from seer_scale.methods.draws import ViewDraws
from seer_scale.methods.fcmae.decoder import ConvNeXtDecoder, Decoder, UNetDecoder, is_token
from seer_scale.methods.fcmae.diagnostics import SECTIONS, batch_metrics, figures, filled_in, health, plots_of
from seer_scale.methods.fcmae.settings import FCMAESettings
from seer_scale.methods.losses.reconstruction import masked_mean, reconstruction_error
from seer_scale.methods.masking import RandomMasking
from seer_scale.methods.registry import register_method
from seer_scale.models.backbone import Backbone
from seer_scale.models.init import Init
from seer_scale.models.layers.stateful import StatefulLayer
from seer_scale.models.registry import build_backbone
from seer_scale.observe.metric_plot import MetricPlot, ReportSection
from seer_scale.optim.parameter_groups import ParameterGroup


@register_method("fcmae")
class FCMAE(Method[None, None]):
    """Backbone and decoder."""

    backbone: Backbone

    def __init__(self, config: Config, world: World):
        super().__init__()
        self.config, self.world, self.recipe = config.settings_as(FCMAESettings), world, config
        backbone = build_backbone(config.model.name, **config.model.explicit_keys())
        patches = backbone.patch_map
        if not backbone.hides_tiles or patches is None:
            rule = "fcmae packs what is visible, which it can of a convnext, convnextv2 or regnety"
            raise UserError(Problem("model.name", config.model.name, rule, ("convnextv2_tiny", "regnety_8gf")))
        self.backbone, self.patch = backbone, patches.stride
        self.maskings = [self._masking(i) for i in range(len(config.views.crops))]
        self.decoder = self._decoder()
        self.draws = ViewDraws(config, world, backbone.num_draws)

    def _decoder(self) -> Decoder:
        s = self.config
        if s.decoder == "unet":
            return UNetDecoder(self.backbone.stage_maps(), s.decoder_width, batch_norm=self.has_statistics)
        return ConvNeXtDecoder(self.backbone.num_features, s.decoder_width, s.decoder_depth, 3 * self.patch**2)

    def _masking(self, kind: int) -> RandomMasking:
        crop, ratio, patch = self.recipe.views.crops[kind], self.config.mask_ratio, self.patch
        rule = f"must be a multiple of the {patch} pixels of a patch"
        if problems := [
            Problem(f"views.crops[{kind}].size", crop.size, f"{side} {rule}", multiples_near(pixels, patch))
            for side, pixels in sides_of(crop.size).items()
            if pixels % patch
        ]:
            raise UserError(*problems)
        height, width = crop.shape
        masking = RandomMasking(seed=self.recipe.run.seed, grid=(height // patch, width // patch), ratio=ratio)
        num = masking.num_patches
        if num == 1:
            rule = "is one patch: there is nothing to see, or nothing to predict"
            raise UserError(Problem(f"views.crops[{kind}].size", crop.size, rule, (2 * patch,)))
        if not 0 < masking.keep < num:
            rule = f"of {num} patches of a crop of {size_text(crop.size)} pixels it leaves {masking.keep}"
            near = math.ceil(1e4 / num) if masking.keep else math.floor(1e4 * (num - 1) / num)
            raise UserError(Problem("fcmae.mask_ratio", ratio, rule, (near / 1e4, "larger crops")))
        return masking

    # --- what it declares

    @property
    def feature_width(self) -> int:
        return self.backbone.num_features

    def shard_units(self) -> dict[str, nn.Module]:
        units = {f"backbone.{name}": unit for name, unit in self.backbone.shard_units().items()}
        return units | {f"decoder.{name}": unit for name, unit in self.decoder.shard_units().items()}

    @property
    def has_statistics(self) -> bool:
        """Whether the backbone normalises by batches."""
        return any(isinstance(layer, StatefulLayer) for layer in self.backbone.modules())

    def check_statistics(self, config: Config, images: int) -> Problem | None:
        if not self.has_statistics:
            return None  # a U-Net's has four places or more of each patch
        for i, (crop, masking) in enumerate(zip(config.views.crops, self.maskings, strict=True)):
            if (num := images * crop.num * masking.keep) < 2:
                rule = f"leaves BatchNorm {num} visible patch of views.crops[{i}] to normalise over, which needs 2"
                fix = "lower fcmae.mask_ratio, or take more images at once"
                return Problem("train.global_batch", config.train.global_batch, rule, fix)
        return None

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        groups = super().parameter_groups()
        return {n: ParameterGroup(weight_decay=0.0) if is_token(n) else group for n, group in groups.items()}

    def initialisers(self) -> dict[str, Init]:
        parts: dict[str, Backbone | Decoder] = {"backbone": self.backbone, "decoder": self.decoder}
        return {f"{who}.{n}": init for who, part in parts.items() for n, init in part.initialisers().items()}

    # --- the step

    def _masks(
        self, views: list[Tensor], samples_seen: int, part: tuple[int, int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        drawn = []
        for kind, (view, masking) in enumerate(zip(views, self.maskings, strict=True)):
            num = self.recipe.views.crops[kind].num
            noise = masking.noise(self.recipe, self.world, samples_seen, part, len(view) // num, num, kind)
            drawn.append(masking.masks(noise, view.device))
        return [masks for masks, _ in drawn], [places for _, places in drawn]

    def _predict(
        self, views: list[Tensor], masks: list[Tensor], places: list[Tensor], draws: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The last stage's maps of what is visible, and predictions of all patches [N_r, h_r, w_r, pixels]."""
        stages = self.backbone.visible_stages(views, masks, places, draws)
        return stages[-1], self.decoder(stages, masks, places)

    def loss(
        self,
        views: list[Tensor],
        *,
        samples_seen: int,
        part: tuple[int, int] = (0, 1),
        targets: None = None,
        with_metrics: bool = False,
    ) -> LossOutput:
        masks, places = self._masks(views, samples_seen, part)
        maps, predicted = self._predict(views, masks, places, self.draws(views, samples_seen, part))
        # pooled features take part by nothing: some engines await a gradient of every parameter, the last norm's too
        features = self.backbone.pooled_visible(maps)
        with torch.autocast(views[0].device.type, enabled=False):
            errors = [
                reconstruction_error(p, x, self.patch, normalise=self.config.normalise)
                for p, x in zip(predicted, views, strict=True)
            ]
            loss = torch.stack([masked_mean(e, m) for e, m in zip(errors, masks, strict=True)]).mean()
            loss = loss + 0 * torch.stack([f.float().sum() for f in features]).sum()
            metrics = batch_metrics([x.flatten(1, 3) for x in maps]) if with_metrics else {}
        batch = len(views[0]) // self.recipe.views.crops[0].num
        return LossOutput(loss, metrics, features[0][:batch].detach())

    def encode(self, images: Tensor) -> Features:
        features = self.backbone([images])[0].float()
        return Features(features, F.normalize(features, dim=1))

    @property
    def reconstruction_size(self) -> ImageSize:
        return self.recipe.views.crops[0].size

    def reconstruct(self, images: Tensor, numbers: Sequence[int]) -> Reconstructions:
        masks, places = self.maskings[0].masks(self.maskings[0].noise_of(numbers), images.device)
        _, (predicted,) = self._predict([images], [masks], [places])
        return filled_in(predicted, images, masks, self.patch, normalised=self.config.normalise)

    # --- what it says of itself

    @property
    def baseline(self) -> Baseline | None:
        """Of predicting each patch's mean, of normalised patches."""
        values = 3 * self.patch**2
        return Baseline("predicting means", (values - 1) / values) if self.config.normalise else None

    @property
    def plots(self) -> tuple[MetricPlot, ...]:
        return plots_of(self.config)

    @property
    def report_sections(self) -> tuple[ReportSection, ...]:
        return SECTIONS

    def metrics(self, means: Mapping[str, Tensor], loss: float) -> dict[str, float]:
        return figures(means, loss, self.baseline) if means else {}

    def health(self, row: Mapping[str, Any], config: Config) -> Problem | None:
        return health(row, config, self.baseline)
