"""DINOv2 as its released code has it (github.com/facebookresearch/dinov2: train/ssl_meta_arch.py, loss/), over timm's
vision transformer: called once a resolution and once for the teacher; losses pair by pair, weight norm, AdamW and
moving averages of torch. Masks and schedules are the method's, as both sides need the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from seer_scale.bench.reference import Part, PlainLoop, import_timm
from seer_scale.config import Config
from seer_scale.errors import Problem
from seer_scale.interop.vit_layouts import exported, vit_of_timm
from seer_scale.methods.dinov2.method import STUDENT, TEACHER, DINOv2
from seer_scale.methods.dinov2.settings import DINOv2Settings
from seer_scale.models.layers.heads import DINOHead
from seer_scale.models.vit import VITS, ViT


class MaskedViT(nn.Module):
    """timm's network with a mask token: [N, 3, S, S] and, if any, masks [N, P] -> tokens [N, T, D]."""

    def __init__(self, ours: ViT):
        super().__init__()
        network, arguments = vit_of_timm(ours.spec)
        self.net = import_timm().create_model(network, num_classes=0, init_values=ours.spec.layer_scale, **arguments)
        state = ours.state_dict()
        self.net.load_state_dict(
            {name: make(*(state[n] for n in names)) for name, (names, make) in exported("timm", ours.spec).items()}
        )
        self.mask_token = nn.Parameter(ours.embed.mask_token.detach().clone())

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        patches = self.net.patch_embed(images)
        if masked is not None:
            patches = torch.where(masked.view(*patches.shape[:3], 1), self.mask_token.to(patches.dtype), patches)
        return self.net.norm(self.net.blocks(self.net._pos_embed(patches)))


class Head(nn.Module):
    """layers/dino_head.py of the released code."""

    def __init__(self, ours: DINOHead):
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(m.in_features, m.out_features) if isinstance(m, nn.Linear) else nn.GELU() for m in ours.mlp)
        )
        self.mlp.load_state_dict(ours.mlp.state_dict())
        prototypes, width = ours.last_layer.direction.shape
        self.last_layer = weight_norm(nn.Linear(width, prototypes, bias=False))
        self.last_layer.load_state_dict({
            "parametrizations.weight.original0": ours.last_layer.scale,
            "parametrizations.weight.original1": ours.last_layer.direction,
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12))


class Network(nn.Module):
    """Backbone and heads of student or teacher."""

    def __init__(self, ours: DINOv2, who: str):
        super().__init__()
        self.backbone = MaskedViT(cast(ViT, ours.get_submodule(who)))
        self.head = Head(head_of(ours, who))
        self.patch_head = self.head if ours.config.shared_head else Head(head_of(ours, who, of_patches=True))


@torch.no_grad()
def textbook_sinkhorn(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    """sinkhorn_knopp_teacher of loss/dino_clstoken_loss.py, on one rank. [B, K] -> [B, K]."""
    Q = torch.exp(scores.float() / temperature).t()
    K, B = Q.shape
    Q /= Q.sum()
    for _ in range(iterations):
        Q /= Q.sum(dim=1, keepdim=True)
        Q /= K
        Q /= Q.sum(dim=0, keepdim=True)
        Q /= B
    return (Q * B).t()


def cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """[B]."""
    return -(targets * F.log_softmax(logits.float() / temperature, dim=-1)).sum(-1)


def textbook_koleo(features: Tensor, group: int) -> Tensor:
    """loss/koleo_loss.py, of `group` images at a time, as on a GPU of so many. [B, D] -> 0-dim."""
    terms = []
    for part in features.float().split(group):
        x = F.normalize(part, eps=1e-8, p=2, dim=-1)
        cosines = torch.mm(x, x.t())
        cosines.view(-1)[:: len(x) + 1].fill_(-1)
        distances = F.pairwise_distance(x, x[cosines.argmax(dim=1)], p=2, eps=1e-8)
        terms.append(-torch.log(distances + 1e-8).mean())
    return torch.stack(terms).mean()


class DINOv2Loop(PlainLoop[DINOv2]):
    small = {
        "model": {"name": "vit", "width": 192, "depth": 6, "heads": 3, "patch": 16, "image_size": 96},
        "views": {"crops": [{"num": 2, "size": 96}, {"num": 4, "size": 48}]},
        "method": {"name": "dinov2"},
        "dinov2": {
            "hidden": [512, 512], "bottleneck": 128, "patch_bottleneck": 128, "prototypes": 1024,
            "patch_prototypes": 1024, "koleo_group": 2,
        },
        "optim": {"name": "adamw", "lr": 1e-4, "lr_batch": 0, "clip_norm": 3.0, "clip_by": "part"},
    }  # fmt: skip

    def __init__(self, ours: DINOv2, config: Config, device: torch.device):
        super().__init__(ours, config, device)
        assert ours.masking, "problems() refuses a recipe without iBOT"
        self.masking, self.momentum, self.temperature = ours.masking, ours.teacher_momentum, ours.teacher_temperature
        self.settings, optim = config.settings_as(DINOv2Settings), config.optim
        self.student, self.teacher = Network(ours, STUDENT).to(device), Network(ours, TEACHER).to(device)
        self.teacher.requires_grad_(False)
        self.model = nn.ModuleList([self.student, self.teacher])
        self.trained, self.averages = (list[Tensor](net.parameters()) for net in (self.student, self.teacher))
        matrices, vectors = ([p for p in self.trained if (p.ndim > 1) is many] for many in (True, False))
        decayed = {"params": matrices, "weight_decay": optim.weight_decay}
        self.optimizer = torch.optim.AdamW(
            [decayed, {"params": vectors, "weight_decay": 0.0}], lr=config.peak_lr, betas=optim.betas
        )

    @staticmethod
    def sides(model: str) -> dict[str, Any]:
        """timm resizes positions with antialiasing, and drops other images' paths."""
        of_vit = {"drop_path": None, "drop_path_rule": None, "position_resize": "antialias"}
        optim = {"name": "adamw", "lr": 1e-4, "lr_batch": 0, "weight_decay": 0.04, "exclude_vectors": True}
        return {
            "model": of_vit if is_vit(model) else {}, "dinov2": {"freeze_samples": 0},
            "optim": optim | {"clip_norm": 3.0, "clip_by": "part"},
        }  # fmt: skip

    @staticmethod
    def prototypes(num: int) -> dict[str, Any]:
        return {"prototypes": num, "patch_prototypes": num}

    @staticmethod
    def refusals(config: Config) -> Iterator[Problem]:
        s, batch = config.settings_as(DINOv2Settings), config.train.global_batch
        if s.gram_weight:
            yield Problem("dinov2.gram_weight", s.gram_weight, "bench step knows no Gram teacher", (0.0,))
        if s.koleo_weight and (batch < 2 or batch % s.koleo_group):
            near = max(1, round(batch / s.koleo_group)) * s.koleo_group
            yield Problem("--batch", batch, f"must be a multiple of dinov2.koleo_group ({s.koleo_group})", (near,))

    @staticmethod
    def problems(config: Config) -> Iterator[Problem]:
        s, model = config.settings_as(DINOv2Settings), config.model
        positions = model.explicit_keys().get("positions", "table")
        for key, value, holds, has in (
            ("--model", model.name, is_vit(model.name), "a vision transformer"),
            ("model.positions", positions, positions == "table", "a table of them"),
            ("dinov2.centering", s.centering, s.centering == "sinkhorn", "sinkhorn"),
            ("dinov2.ibot_weight", s.ibot_weight, s.ibot_weight > 0, "iBOT's loss"),
            ("dinov2.koleo_weight", s.koleo_weight, s.koleo_weight > 0, "KoLeo's loss"),
        ):
            if not holds:
                yield Problem(key, value, f"the plain loop has {has}", "give --alone")

    @staticmethod
    def heads(config: Config) -> str:
        s = config.settings_as(DINOv2Settings)
        hidden = " x ".join(map(str, s.hidden))
        own = f"of patches {hidden} x {s.patch_bottleneck} x {s.patch_prototypes}"
        of_patches = "" if not s.ibot_weight else f", {'shared with patches' if s.shared_head else own}"
        return f"head {hidden} x {s.bottleneck} x {s.prototypes}{of_patches}"

    @staticmethod
    def parts(method: DINOv2, config: Config, views: Sequence[Tensor]) -> dict[str, Part]:
        """Of masked patches so many as the heads take: those that are masked, and padding."""
        masking, device = method.masking, views[0].device
        batch = len(views[0]) // method.num_globals
        masked = masking.draw(0, 0, batch).masked.to(device) if masking else None
        num_patches = masking.bound(batch) if masking else 0

        def backbone(who: str, images: Sequence[Tensor]) -> Part:
            network = method.student if who == STUDENT else method.teacher
            masks = [masked if who == STUDENT else None] + [None] * (len(images) - 1)

            def forward() -> Tensor:
                if not masking:
                    return torch.cat(network(list(images)))
                tokens = network.tokens(list(images), masks)
                return torch.cat([x.flatten() for of_size in tokens for x in of_size])

            macs = sum(len(v) * network.num_macs((v.shape[2], v.shape[3])) for v in images)
            return Part(macs=macs, forward=forward, is_trained=who == STUDENT)

        def head(who: str, num: int, *, of_patches: bool) -> Part:
            layer = head_of(method, who, of_patches=of_patches)
            width = cast(nn.Linear, layer.mlp[0]).in_features
            x = torch.randn(num, width, device=device, requires_grad=who == STUDENT)
            return Part(macs=num * macs_of(layer), forward=lambda: layer(x), is_trained=who == STUDENT)

        out = {}
        for who, images in ((TEACHER, views[:1]), (STUDENT, views)):
            out[f"{who}: backbone"] = backbone(who, images)
            out[f"{who}: head of class tokens"] = head(who, sum(len(v) for v in images), of_patches=False)
            if masking:
                out[f"{who}: head of masked patches"] = head(who, num_patches, of_patches=True)
        return out

    def loss(self, views: list[Tensor], samples_seen: int) -> Tensor:
        s, temperature, student, teacher = self.settings, self.temperature(samples_seen), self.student, self.teacher
        batch, num = self.config.train.global_batch, self.config.views.crops[0].num
        masked = self.masking.draw(samples_seen, 0, batch).masked
        places, weights = masked.flatten().nonzero()[:, 0], (1 / masked.sum(1).clamp(min=1))[:, None].expand_as(masked)
        masked, places, weights = (t.to(self.device) for t in (masked, places, weights[masked]))
        prefix = student.backbone.net.num_prefix_tokens
        with self.autocast():
            with torch.no_grad():
                tokens = teacher.backbone(views[0])
                scores = teacher.head(tokens[:, 0]), teacher.patch_head(tokens[:, prefix:].flatten(0, 1)[places])
                targets = textbook_sinkhorn(scores[0], temperature, s.iterations).split(batch)
                of_patches = textbook_sinkhorn(scores[1], temperature, s.iterations)
            tokens = student.backbone(views[0], masked)
            classes = [tokens[:, 0], *(student.backbone(v)[:, 0] for v in views[1:])]
            logits = student.head(torch.cat(classes)).split(batch)
            patches = student.patch_head(tokens[:, prefix:].flatten(0, 1)[places])
        pairs = [(i, j) for i in range(num) for j in range(len(logits)) if i != j]
        dino = sum(cross_entropy(logits[j], targets[i], s.temperature).mean() for i, j in pairs) / len(pairs)
        ibot = (cross_entropy(patches, of_patches, s.temperature) * weights).sum() / len(masked)
        koleo = sum(textbook_koleo(x, s.koleo_group) for x in classes[0].split(batch))
        return s.dino_weight * dino + s.ibot_weight * ibot + s.koleo_weight * koleo

    def before_step(self) -> None:
        for part in self.student.children():
            nn.utils.clip_grad_norm_(part.parameters(), self.config.optim.clip_norm)

    def after_step(self, samples_seen: int) -> None:
        momentum = self.momentum(samples_seen)
        torch._foreach_mul_(self.averages, momentum)
        torch._foreach_add_(self.averages, self.trained, alpha=1 - momentum)


def is_vit(model: str) -> bool:
    return model in ("vit", *VITS)


def head_of(method: DINOv2, who: str, *, of_patches: bool = False) -> DINOHead:
    is_own = of_patches and not method.config.shared_head
    return cast(DINOHead, method.get_submodule(f"{who}_patch_head" if is_own else f"{who}_head"))


def macs_of(head: DINOHead) -> int:
    """Of one token."""
    linear = sum(m.in_features * m.out_features for m in head.mlp if isinstance(m, nn.Linear))
    return linear + head.last_layer.direction.numel()
