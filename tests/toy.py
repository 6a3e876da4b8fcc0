"""Small methods unlike SwAV on a RegNetY, with what an engine asks of any method: no BatchNorm, no float buffers, no rows
of unit length, layers over tokens, parameters of three dimensions outside every unit; and one of matrices alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.config import Config, resolve
from seer_scale.methods.base import Baseline, Features, LossOutput, Method
from seer_scale.parallel.engine import Engine
from seer_scale.rng import Constant, Init, Normal, Uniform
from seer_scale.world import World
from tests.tiny import RECIPE, sections

SIZE, PATCH, WIDTH, HEADS = 8, 4, 24, 2
NUM_TOKENS = (SIZE // PATCH) ** 2


class Block(nn.Module):
    """A transformer's block, of a list of [B, T, WIDTH]."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.layer_scale = nn.Parameter(torch.empty(1, 1, WIDTH))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [self._tokens(x) for x in xs]

    def _tokens(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.layer_scale * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Mixer(nn.Module):
    """One matrix over the tokens, and no vector at all."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Linear(width, width, bias=False)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [torch.tanh(self.mix(x)) + x for x in xs]


class Backbone(nn.Module):
    def __init__(self, blocks: Iterable[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def units(self) -> dict[str, nn.Module]:
        return {f"blocks.{i}": block for i, block in enumerate(self.blocks)}

    def stage_units(self) -> list[list[str]]:
        return [list(self.units())]

    def chain(self, names: list[str], xs: list[Tensor]) -> list[Tensor]:
        for name in names:
            xs = self.units()[name](xs)
        return xs

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return self.chain(list(self.units()), xs)


class Toy(Method[None, None]):
    """Patches to tokens, blocks, and a head that tells the mean colour of each image. kind: vit (of WIDTH), matrices."""

    name = "toy"

    def __init__(self, kind: str, width: int = WIDTH, depth: int = 2):
        super().__init__()
        is_vit = kind == "vit"
        self.embed = nn.Linear(3 * PATCH**2, width, bias=is_vit)
        self.position = nn.Parameter(torch.empty(1, NUM_TOKENS, width))
        self.backbone = Backbone(Block() if is_vit else Mixer(width) for _ in range(depth))
        self.head = nn.Linear(width, 3, bias=is_vit)
        if is_vit:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # no float

    def shard_units(self) -> dict[str, nn.Module]:
        return {"embed": self.embed} | {f"backbone.{n}": u for n, u in self.backbone.units().items()} | {"head": self.head}

    def initialisers(self) -> dict[str, Init]:
        out: dict[str, Init] = {}
        for name, p in self.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            out[name] = Constant(1.0) if is_norm else Constant(0.5) if "layer_scale" in name else Normal(0.02) if p.ndim != 2 else Uniform(1 / math.sqrt(p.shape[1]))
        return out

    def _tokens(self, views: list[Tensor]) -> list[Tensor]:
        tokens = [F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2) for x in views]
        return self.backbone([self.embed(t) + self.position for t in tokens])

    def loss(
        self, views: list[Tensor], *, samples_seen: int, targets: None = None, with_metrics: bool = False
    ) -> LossOutput:
        wrong = [(self.head(x.mean(1)).float() - v.mean((2, 3))).square().mean() for x, v in zip(self._tokens(views), views)]
        return LossOutput(torch.stack(wrong).mean(), {})

    def prepare_targets(self, views: list[Tensor], *, samples_seen: int, part: tuple[int, int]) -> None:
        self._tokens(views)

    def targets(self, inputs: Sequence[None], samples_seen: int) -> list[None]:
        return [None] * len(inputs)

    def encode(self, images: Tensor) -> Features:
        features = self._tokens([images])[0].mean(1).float()
        return Features(features, F.normalize(features, dim=1))

    @property
    def baseline(self) -> Baseline:
        return Baseline("grey", 1.0)


def toy(method: Callable[[], Toy], engine_class: type[Engine], world: World, **overrides) -> tuple[Config, Engine]:
    """An engine with what `method` makes; overrides are "section.key": value."""
    over = sections({"views.crops": [{"num": 2, "size": SIZE}]} | overrides)
    config = resolve(RECIPE, over, world_size=world.size)
    with torch.device("meta"):
        made = method()
    return config, engine_class(made, config, world)
