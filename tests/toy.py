"""Small methods unlike SwAV on a RegNetY, with what an engine asks of any method.

vit, matrices: layers over tokens, parameters of three dimensions outside every unit; no BatchNorm, no float buffers, no
rows of unit length; the second no vector either. classifier: a RegNetY with labels. teacher: a student that sees a part
of the tokens follows a moving average of itself that sees all, centred over the whole batch. autoencoder: a decoder
behind the backbone, of other units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.config import Config, resolve
from seer_scale.distributed import World
from seer_scale.methods.base import Baseline, Features, LossOutput, Method
from seer_scale.models.init import Constant, Init, Normal, Uniform
from seer_scale.models.registry import build_backbone
from seer_scale.optim.parameter_groups import ParameterGroup
from seer_scale.parallel.engine import Engine
from seer_scale.rng import numpy_generator
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

    def shard_units(self) -> dict[str, nn.Module]:
        return {f"blocks.{i}": block for i, block in enumerate(self.blocks)}

    def stage_units(self) -> list[list[str]]:
        return [list(self.shard_units())]

    def forward_units(self, names: list[str], xs: list[Tensor]) -> list[Tensor]:
        for name in names:
            xs = self.shard_units()[name](xs)
        return xs

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return self.forward_units(list(self.shard_units()), xs)


def patches(x: Tensor) -> Tensor:
    """Images [B, 3, SIZE, SIZE] -> [B, T, 3 PATCH^2]."""
    return F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)


def visible(tokens: Tensor, samples_seen: int, keep: int = NUM_TOKENS // 2) -> Tensor:
    """Indices [B, keep] of the tokens a student sees: of image i of the global batch a function of (samples_seen, i),
    but for the ranks, which these small tests leave out."""
    order = numpy_generator(samples_seen, "mask").permutation(tokens.shape[1])[:keep]
    return torch.from_numpy(order).to(tokens.device, non_blocking=True).expand(len(tokens), keep)


def pick(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


class Simple(Method[None, None]):
    """Without targets that a whole batch makes."""

    name = "toy"

    @property
    def baseline(self) -> Baseline:
        return Baseline("nothing", 1.0)

    def initialisers(self) -> dict[str, Init]:
        out: dict[str, Init] = {}
        for name, p in self.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            matrix = Uniform(1 / math.sqrt(p.shape[1])) if p.ndim == 2 else Normal(0.02)
            out[name] = Constant(1.0) if is_norm else Constant(0.5) if "layer_scale" in name else matrix
        return out


class Toy(Simple):
    """Patches to tokens, blocks, and a head that tells the mean colour of each image. kind: vit (of WIDTH),
    matrices."""

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
        return (
            {"embed": self.embed}
            | {f"backbone.{n}": u for n, u in self.backbone.shard_units().items()}
            | {"head": self.head}
        )

    def _tokens(self, views: list[Tensor]) -> list[Tensor]:
        return self.backbone([self.embed(patches(x)) + self.position for x in views])

    def loss(
        self,
        views: list[Tensor],
        *,
        samples_seen: int,
        part: tuple[int, int] = (0, 1),
        targets: None = None,
        with_metrics: bool = False,
    ) -> LossOutput:
        wrong = [
            (self.head(x.mean(1)).float() - v.mean((2, 3))).square().mean() for x, v in zip(self._tokens(views), views)
        ]
        return LossOutput(torch.stack(wrong).mean(), {})

    def encode(self, images: Tensor) -> Features:
        features = self._tokens([images])[0].mean(1).float()
        return Features(features, F.normalize(features, dim=1))


class Classifier(Simple):
    """Supervised: which colour each image has most of."""

    def __init__(self):
        super().__init__()
        spec = {"depth": 5, "w0": 8, "wa": 12.0, "wm": 2.0, "group_width": 8}
        self.backbone = build_backbone("regnety", **spec)
        self.fc = nn.Linear(self.backbone.num_features, 3)

    def shard_units(self) -> dict[str, nn.Module]:
        return {f"backbone.{n}": u for n, u in self.backbone.shard_units().items()} | {"fc": self.fc}

    def initialisers(self) -> dict[str, Init]:
        own = {f"backbone.{n}": init for n, init in self.backbone.initialisers().items()}
        return own | {"fc.weight": Normal(0.01), "fc.bias": Constant(0)}

    def loss(
        self,
        views: list[Tensor],
        *,
        samples_seen: int,
        part: tuple[int, int] = (0, 1),
        targets: None = None,
        with_metrics: bool = False,
    ) -> LossOutput:
        logits = [self.fc(features).float() for features in self.backbone(views)]
        wrong = [F.cross_entropy(y, x.mean((2, 3)).argmax(1)) for y, x in zip(logits, views, strict=True)]
        return LossOutput(torch.stack(wrong).mean(), {})

    def encode(self, images: Tensor) -> Features:
        features = self.backbone([images])[0].float()
        return Features(features, F.normalize(features, dim=1))


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Linear(3 * PATCH**2, WIDTH), nn.Parameter(torch.empty(1, NUM_TOKENS, WIDTH))
        self.backbone = Backbone(Block() for _ in range(2))

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        tokens = self.embed(patches(x)) + self.position
        return self.backbone([tokens if index is None else pick(tokens, index)])[0]

    def shard_units(self) -> dict[str, nn.Module]:
        return {"embed": self.embed} | {f"backbone.{n}": u for n, u in self.backbone.shard_units().items()}


UNIT_ROWS = "student.backbone.blocks.1.down.weight"


class Taught(Simple, Method[list[Tensor], list[Tensor]]):
    """Targets: the teacher's mean token of each view, less the centre, the mean over all images of the global batch."""

    def __init__(self, world: World):
        super().__init__()
        self.world = world
        self.student, self.teacher = Student(), Student()

    @property
    def backbone(self) -> nn.Module:
        return self.student.backbone

    def shard_units(self) -> dict[str, nn.Module]:
        both = {"student": self.student, "teacher": self.teacher}
        return {f"{who}.{n}": u for who, module in both.items() for n, u in module.shard_units().items()}

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        own = super().parameter_groups()
        for name in own:
            if name.startswith("teacher."):
                own[name] = ParameterGroup(average_of=name.replace("teacher.", "student."))
            elif name == UNIT_ROWS:
                own[name] = ParameterGroup(normalized_rows=True)
            elif "embed" in name:
                own[name] = ParameterGroup(lr=0.2, weight_decay=0.0, clip="embed", frozen=((8, 16),))
        return own

    def average_momentum(self, name: str, samples_seen: int) -> float:
        return 0.5 if samples_seen < 16 else 0.75

    @torch.no_grad()
    def prepare_targets(self, views: list[Tensor], *, samples_seen: int, part: tuple[int, int]) -> list[Tensor]:
        return [self.teacher(x, None).float().mean(1) for x in views]

    def targets(self, inputs: Sequence[list[Tensor]], samples_seen: int) -> list[list[Tensor]]:
        sums = torch.stack([torch.cat(of_view).sum(0) for of_view in zip(*inputs, strict=True)])
        num = sum(len(part[0]) for part in inputs) * self.world.size
        centres = self.world.sum_(sums) / num
        return [[t - c for t, c in zip(part, centres, strict=True)] for part in inputs]

    def loss(
        self,
        views: list[Tensor],
        *,
        samples_seen: int,
        part: tuple[int, int] = (0, 1),
        targets: list[Tensor] | None = None,
        with_metrics: bool = False,
    ) -> LossOutput:
        if targets is None:
            inputs = self.prepare_targets(views, samples_seen=samples_seen, part=(0, 1))
            targets = self.targets([inputs], samples_seen)[0]
        wrong = []
        for x, target in zip(views, targets, strict=True):
            seen = self.student(x, visible(patches(x), samples_seen)).float().mean(1)
            wrong.append((seen - target).square().mean())
        return LossOutput(torch.stack(wrong).mean(), {})

    def encode(self, images: Tensor) -> Features:
        features = self.student(images, None).float().mean(1)
        return Features(features, F.normalize(features, dim=1))


class Autoencoder(Simple):
    """Predicts the patches that the encoder did not see, from those it saw."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(3 * PATCH**2, WIDTH), nn.Linear(WIDTH, 3 * PATCH**2)
        self.position, self.mask = (nn.Parameter(torch.empty(1, n, WIDTH)) for n in (NUM_TOKENS, 1))
        self.backbone, self.decoder = Backbone(Block() for _ in range(2)), Backbone([Block()])

    def checkpointed_sequences(self) -> list[nn.Module]:
        return [self.backbone, self.decoder]

    def shard_units(self) -> dict[str, nn.Module]:
        ours = {f"backbone.{n}": u for n, u in self.backbone.shard_units().items()}
        ours |= {f"decoder.{n}": u for n, u in self.decoder.shard_units().items()}
        return {"embed": self.embed} | ours | {"out": self.out}

    def loss(
        self,
        views: list[Tensor],
        *,
        samples_seen: int,
        part: tuple[int, int] = (0, 1),
        targets: None = None,
        with_metrics: bool = False,
    ) -> LossOutput:
        wrong = []
        for x in views:
            tokens, index = self.embed(patches(x)) + self.position, visible(patches(x), samples_seen)
            seen = self.backbone([pick(tokens, index)])[0]
            places = index.unsqueeze(2).expand(-1, -1, WIDTH)
            whole = self.mask.expand(len(x), NUM_TOKENS, WIDTH).to(seen.dtype).scatter(1, places, seen)
            off = self.out(self.decoder([whole + self.position])[0]).float() - patches(x)
            hidden = torch.ones(off.shape[:2], device=off.device).scatter(1, index, 0.0)
            wrong.append((off.square().mean(2) * hidden).sum() / hidden.sum())
        return LossOutput(torch.stack(wrong).mean(), {})

    def encode(self, images: Tensor) -> Features:
        features = self.backbone([self.embed(patches(images)) + self.position])[0].mean(1).float()
        return Features(features, F.normalize(features, dim=1))


def make(kind: str, world: World) -> Method:
    kinds = {"classifier": Classifier, "teacher": lambda: Taught(world), "autoencoder": Autoencoder}
    return kinds[kind]() if kind in kinds else Toy(kind)


def toy(method: Callable[[], Method], engine_class: type[Engine], world: World, **overrides) -> tuple[Config, Engine]:
    """An engine with what `method` makes; overrides are "section.key": value."""
    over = sections({"views.crops": [{"num": 2, "size": SIZE}]} | overrides)
    config = resolve(RECIPE, over, world_size=world.size)
    with torch.device("meta"):
        made = method()
    return config, engine_class(made, config, world)
