"""FCMAE beside a plain loop of timm's ConvNeXt V2, dense and masked by hooks, with torch's AdamW: the same losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.distributed import World
from seer_scale.interop.convnext_layouts import exported, timm_network
from seer_scale.optim.schedules import LearningRate
from tests.tiny import FCMAE, tiny

timm = pytest.importorskip("timm")
UPDATES, BATCH, SIZE = 60, 4, 32
SMALL = {
    "model.drop_path": None, "views.crops": [{"num": 1, "size": SIZE}], "optim.name": "adamw", "optim.lr": 3e-3,
    "optim.betas": [0.9, 0.95], "optim.weight_decay": 0.05, "optim.exclude_vectors": True,
    "train.total_samples": 100 * BATCH, "train.global_batch": BATCH,
}  # fmt: skip


class DenseMasked(nn.Module):
    """timm's network and its block as a decoder. What is masked is 0 before each norm over places and after each layer
    that fills it."""

    def __init__(self, ours):
        super().__init__()
        spec, decoder = ours.backbone.spec, ours.decoder
        how = timm_network(spec, {})
        self.net = timm.create_model(how.name, num_classes=0, **how.arguments)
        state = ours.backbone.state_dict()
        theirs = {name: make(*(state[n] for n in names)) for name, (names, make) in exported("timm", spec).items()}
        self.net.load_state_dict(theirs)
        width = decoder.embed.proj.out_features
        self.proj, self.pred = nn.Linear(ours.feature_width, width), nn.Linear(width, decoder.pred.out_features)
        self.proj.load_state_dict(decoder.embed.proj.state_dict())
        self.pred.load_state_dict(decoder.pred.state_dict())
        self.token = nn.Parameter(decoder.embed.mask_token.detach().clone())
        self.block = timm.models.convnext.ConvNeXtBlock(width, use_grn=True, ls_init_value=None)
        parts = {"dw": "conv_dw", "fc1": "mlp.fc1", "grn": "mlp.grn", "fc2": "mlp.fc2"}
        of_block = {n.partition(".")[::2]: t for n, t in decoder.blocks[0].state_dict().items()}
        self.block.load_state_dict({f"{parts.get(layer, layer)}.{leaf}": t for (layer, leaf), t in of_block.items()})
        self.hidden = torch.empty(0)
        for name, layer in self.net.named_modules():
            if name == "stem" or name.endswith("downsample") or isinstance(layer, timm.models.convnext.ConvNeXtBlock):
                layer.register_forward_hook(lambda _, args, out: out * self.seen(out.shape[2:])[:, None])
            elif name.endswith(".grn"):
                layer.register_forward_pre_hook(lambda _, args: args[0] * self.seen(args[0].shape[1:3])[..., None])

    def seen(self, size: torch.Size) -> Tensor:
        return 1 - F.interpolate(self.hidden[:, None].float(), tuple(size), mode="nearest")[:, 0]

    def loss(self, images: Tensor, hidden: Tensor) -> Tensor:
        """[N, 3, S, S], bool [N, g, g]."""
        self.hidden = hidden
        x = self.net.stages(self.net.stem(images)).permute(0, 2, 3, 1)
        x = torch.where(hidden[..., None], self.token, self.proj(x))
        x = self.pred(self.block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        side = images.shape[2] // hidden.shape[1]
        patches = F.unfold(images, side, stride=side).transpose(1, 2).unflatten(2, (3, -1)).transpose(2, 3).flatten(2)
        target = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
        return (x.flatten(1, 2) - target).square().mean(2)[hidden.flatten(1)].mean()


def smooth_images(number: int) -> Tensor:
    noise = torch.randn(BATCH, 3, 3, 3, generator=torch.Generator().manual_seed(number))
    return F.interpolate(noise, (SIZE, SIZE), mode="bicubic", align_corners=False)


def test_a_plain_loop_of_dense_masking_has_the_same_losses():
    """To rounding, over updates that lower it by a tenth."""
    config, engine = tiny(World(), FCMAE, **SMALL)
    ours, rate, pairs = engine.method, LearningRate(config), []
    theirs = DenseMasked(ours)
    groups = [[p for p in theirs.parameters() if (p.squeeze().ndim > 1) is many] for many in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": ps, "weight_decay": decay} for ps, decay in zip(groups, (0.05, 0.0))], betas=(0.9, 0.95)
    )
    for update in range(UPDATES):
        images, seen = smooth_images(update), update * BATCH
        hidden = ours._masks([images], seen, (0, 1))[0][0]
        loss = theirs.loss(images, hidden)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate(seen)
        optimizer.step()
        pairs.append((engine.gradients([lambda x=images: [x]], samples_seen=seen).loss.item(), loss.item()))
        engine.update(rate(seen), seen)
    a, b = torch.tensor(pairs).T
    torch.testing.assert_close(a, b, rtol=1e-3, atol=0)
    torch.testing.assert_close(a[:30], b[:30], rtol=1e-4, atol=0)
    assert a[-20:].mean() < 0.9 * a[:5].mean()
