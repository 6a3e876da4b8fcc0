"""A backbone of your own, as a plugin: two convolutions of stride 2, then global average pooling.

    seer-scale train photos_laptop --plugin docs/examples/my_backbone.py --model.name plain_convnet --data.path IMAGES

and, to load what it learned: seer_scale.load(RUN, plugins=["docs/examples/my_backbone.py"]).
"""

import math

from torch import Tensor, nn

from seer_scale.models.backbone import Backbone
from seer_scale.models.init import Constant, Init, Normal
from seer_scale.models.layers.norm import BatchNorm
from seer_scale.models.registry import register_backbone
from seer_scale.models.regnet import Conv, Stem


@register_backbone("plain_convnet")
class PlainConvNet(Backbone):
    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem(3, 8, kernel_size=3, stride=2)
        self.s1 = Stem(8, 16, kernel_size=3, stride=2)

    def pooled_features(self, xs: list[Tensor]) -> list[Tensor]:
        return [x.mean((2, 3)) for x in self.forward_units(["stem", "s1"], xs)]

    def shard_units(self) -> dict[str, nn.Module]:
        return {"stem": self.stem, "s1": self.s1}

    def stage_units(self) -> list[list[str]]:
        return [["s1"]]

    def initialisers(self) -> dict[str, Init]:
        inits: dict[str, Init] = {}
        for name, module in self.named_modules():
            if isinstance(module, Conv):
                inits[f"{name}.weight"] = Normal(math.sqrt(2 / (9 * module.out_channels)))
            elif isinstance(module, BatchNorm):
                inits[f"{name}.weight"], inits[f"{name}.bias"] = Constant(1), Constant(0)
        return inits
