"""FCMAE: the loss against plain dense masking in float64, published figures, masks, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import seer_scale
from seer_scale.checkpoint import inspect
from seer_scale.config import resolve
from seer_scale.distributed import World
from seer_scale.errors import UserError
from seer_scale.methods.losses.reconstruction import (
    images_of,
    masked_mean,
    normalised,
    patches_of,
    reconstruction_error,
)
from seer_scale.methods.masking import RandomMasking
from seer_scale.methods.registry import build_method
from seer_scale.models.registry import initialise
from seer_scale.observe.gallery import read_gallery
from tests.tiny import FCMAE, FCMAE_REGNETY, fake_views, losses_of, sections, tiny

DEEPER = {
    "fcmae.decoder_depth": 2, "fcmae.mask_ratio": 0.3, "model.patch": 2,
    "views.crops": [{"num": 1, "size": [48, 32]}, {"num": 2, "size": 32}],
}  # fmt: skip


UNET = {
    "fcmae.decoder": "unet",
    "fcmae.decoder_width": 16,
    "model.patch": 2,
    "views.crops": [{"num": 2, "size": [32, 64]}],
}


def make(recipe=FCMAE, **overrides):
    config = resolve(recipe, sections(overrides | {"model.drop_path": None}), world_size=1)
    method = build_method(config, World())
    method.to_empty(device="cpu")
    initialise(method, 0)
    method.double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return config, method


def reference(method, views, masks):
    """Dense masking, one resolution after the other, image by image in the loss."""
    total = torch.zeros((), dtype=torch.float64)
    for view, mask in zip(views, masks, strict=True):
        stages = [maps for (maps,) in method.backbone.visible_stages([view], [mask], [])]
        decoder = unet if hasattr(method.decoder, "densify") else convnext
        x, side, wrong, num = decoder(method.decoder, stages, mask), method.patch, torch.zeros(()).double(), 0
        for n, row, column in mask.nonzero().tolist():
            patch = view[n, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
            target = patch.permute(1, 2, 0).flatten()
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            wrong, num = wrong + (x[n, row, column] - target).square().mean(), num + 1
        total = total + wrong / num
    return total / len(views)


def convnext(decoder, stages, mask):
    embed = decoder.embed
    x = torch.where(mask[..., None], embed.mask_token, F.linear(stages[-1], embed.proj.weight, embed.proj.bias))
    for block in decoder.blocks:
        x = block([x])[0]
    return F.linear(x, decoder.pred.weight, decoder.pred.bias)


def unet(decoder, stages, mask):
    """SparK's, with torch's functions; [N, C, H, W] throughout."""
    x = 0
    for i, block in enumerate(decoder.blocks):
        if i < len(decoder.densify):
            part, known = decoder.densify[i], stages[-1 - i]
            if isinstance(part.norm, torch.nn.LayerNorm):
                known = F.layer_norm(known, known.shape[-1:], part.norm.weight, part.norm.bias, 1e-6)
            else:  # of visible places
                at = ~mask.repeat_interleave(2**i, 1).repeat_interleave(2**i, 2)
                rows = F.batch_norm(known[at], None, None, part.norm.weight, part.norm.bias, training=True)
                known = torch.zeros_like(known).index_put((at,), rows)
            hidden = mask[:, None].double().repeat_interleave(2**i, 2).repeat_interleave(2**i, 3) > 0
            seen = torch.where(hidden, part.mask_token[..., None, None], known.permute(0, 3, 1, 2))
            x = x + F.conv2d(seen, part.proj.weight, part.proj.bias, padding=part.proj.kernel_size[0] // 2)
        x = F.conv_transpose2d(x, block.up.weight, block.up.bias, stride=2, padding=1)
        x = F.conv2d(x, block.conv1.weight, padding=1)
        x = F.batch_norm(x, None, None, block.bn1.weight, block.bn1.bias, training=True).clamp(0, 6)
        x = F.conv2d(x, block.conv2.weight, padding=1)
        x = F.batch_norm(x, None, None, block.bn2.weight, block.bn2.bias, training=True)
    x = F.conv2d(x, decoder.pred.weight[..., None, None], decoder.pred.bias)
    assert x.shape[2] == decoder.patch * mask.shape[1]
    return patches_of(x, decoder.patch)


@pytest.mark.parametrize("recipe, overrides", [
    (FCMAE, {}), (FCMAE, DEEPER), (FCMAE, UNET), (FCMAE, UNET | {"model.patch": 1}),
    (FCMAE_REGNETY, {"views.crops": [{"num": 1, "size": [64, 96]}, {"num": 2, "size": 64}], "train.global_batch": 4}),
    (FCMAE_REGNETY, {"fcmae.decoder": "unet", "fcmae.decoder_width": 32, "train.global_batch": 4}),
])  # fmt: skip
def test_loss_and_gradients_are_those_of_dense_masking(recipe, overrides):
    config, method = make(recipe, **overrides)
    views = [v.double() for v in fake_views(config, 3, World())]
    ours = method.loss(views, samples_seen=16).loss
    theirs = reference(method, views, method._masks(views, 16, (0, 1))[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    trained = dict(method.named_parameters())
    a, b = (torch.autograd.grad(loss, trained.values(), allow_unused=True) for loss in (ours, theirs))
    for (name, p), ga, gb in zip(trained.items(), a, b, strict=True):
        torch.testing.assert_close(ga, torch.zeros_like(p) if gb is None else gb, rtol=1e-9, atol=1e-9, msg=name)
        assert ga.abs().max() > 0 or name.startswith("backbone.norm."), name


def test_the_loss_has_the_published_figures():
    images = (torch.arange(48, dtype=torch.float64) / 10).view(1, 3, 4, 4).clone()
    images[:, 1] *= -1
    images[:, 2] = images[:, 2].square() / 10
    predicted = torch.zeros(1, 4, 12, dtype=torch.float64)
    predicted[:, :, 0] = 1
    predicted[:, 1] = 0.5
    masks = torch.tensor([[[True, False], [True, True]]])
    target = normalised(patches_of(images, 2))
    assert target[0, 0, 0, :3].tolist() == pytest.approx([0.100623, -1.090473, 0.862924], abs=1e-6)
    errors = reconstruction_error(predicted.view(1, 2, 2, 12), images, 2, normalise=True)
    assert errors.flatten().tolist() == pytest.approx([0.983229, 1.166666, 0.940527, 0.934881], abs=1e-6)
    assert masked_mean(errors, masks).item() == pytest.approx(0.952879, abs=1e-6)
    raw = reconstruction_error(predicted.view(1, 2, 2, 12), images, 2, normalise=False)
    assert masked_mean(raw, masks).item() == pytest.approx(3.347511, abs=1e-6)
    nothing = reconstruction_error(torch.zeros(1, 2, 2, 12).double(), images, 2, normalise=True)
    assert masked_mean(nothing, masks).item() == pytest.approx(11 / 12, abs=1e-6)
    assert torch.equal(images_of(patches_of(images, 2), 2), images)


@pytest.mark.parametrize("normalise", [True, False])
def test_reconstructions_are_the_predictions_beside_what_is_seen(normalise):
    """To the pixel where it sees; elsewhere with the mean and deviation that each patch has."""
    config, method = make(**{"fcmae.normalise": normalise, "views.crops": [{"num": 1, "size": [16, 64]}]})
    images = torch.randn(3, 3, 16, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    method.eval()
    with torch.no_grad():
        made = method.reconstruct(images, [5, 0, 9])
        masks, places = method.maskings[0].masks(method.maskings[0].noise_of([5, 0, 9]), images.device)
        _, (predicted,) = method._predict([images], [masks], [places])
    assert (
        method.reconstruction_size == (16, 64)
        and torch.equal(made.errors.isnan(), ~masks)
        and (masks.sum((1, 2)) == 10).all()
    )
    for n, row, column in torch.ones_like(masks).nonzero().tolist():
        where = (n, slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
        if not masks[n, row, column]:
            assert torch.equal(made.seen[where], images[where]) and torch.equal(made.filled[where], images[where])
            continue
        ours, patch = predicted[n, row, column].view(8, 8, 3).permute(2, 0, 1), images[where]
        if normalise:
            ours = ours * (patch.var() + 1e-6).sqrt() + patch.mean()
        torch.testing.assert_close(made.filled[where], ours)
        error = (ours - patch).square().mean() / patch.var(correction=0)
        torch.testing.assert_close(made.errors[n, row, column], error)
        assert (made.seen[where] == 0).all()
    alone = method.reconstruct(images[1:2], [0])
    torch.testing.assert_close(alone.filled, made.filled[1:2])  # a function of the image and its number


@pytest.mark.parametrize("side, keep", [(7, 19), (8, 25), (9, 32), (12, 57), (16, 102)])
def test_as_many_patches_are_seen_as_published(side, keep):
    assert RandomMasking(seed=0, grid=(side, side), ratio=0.6).keep == keep
    assert RandomMasking(seed=0, grid=(10, 10), ratio=0.9).keep == 10


def test_masks_are_functions_of_the_image():
    """On any number of ranks and in any micro-batches; every patch as often as another."""
    config = resolve(FCMAE, {}, world_size=1)
    masking = RandomMasking(seed=3, grid=(2, 8), ratio=0.6)

    def drawn(seen: int, ranks: int, parts: int) -> torch.Tensor:
        batch = 8 // ranks // parts
        out = [
            masking.masks(masking.noise(config, World(rank, ranks), seen, (i, parts), batch, 2, 0), torch.device("cpu"))
            for rank in range(ranks) for i in range(parts)
        ]  # fmt: skip
        for hidden, places in out:
            assert not hidden.flatten(1).gather(1, places).any() and (hidden.flatten(1).sum(1) == 16 - 6).all()
        return torch.cat([hidden.unflatten(0, (2, batch)) for hidden, _ in out], 1)

    whole = drawn(8, 1, 1)
    assert all(torch.equal(drawn(8, *split), whole) for split in ((2, 1), (2, 2), (1, 4)))
    assert torch.equal(drawn(4, 1, 1)[:, 4:], whole[:, :4]) and not torch.equal(whole[0], whole[1])
    share = torch.cat([drawn(8 * i, 1, 1) for i in range(200)], 1).flatten(0, 1).double().mean(0)
    assert (share - 10 / 16).abs().max() < 0.05


def test_recomputing_a_regnety_changes_no_statistic():
    engines = []
    for over in ({}, {"parallel.activation_checkpoint": "every 1"}):
        config, engine = tiny(World(), FCMAE_REGNETY, **over)
        losses_of(engine, config, World(), range(2), 0.1)
        engines.append(engine)
    for name in engines[0].shapes:
        assert torch.equal(*(engine.whole(name) for engine in engines)), name
    (first, again) = (dict(engine.method.named_buffers()) for engine in engines)
    assert len(first) > 20 and all(torch.equal(b, again[name]) for name, b in first.items())


def test_a_batch_norm_of_one_visible_patch_is_refused_before_ranks_start():
    over = {"train.global_batch": 1, "views.crops": [{"num": 1, "size": 64}], "fcmae.mask_ratio": 0.7}
    config = resolve(FCMAE_REGNETY, sections(over), world_size=1)
    method = build_method(config, World())
    problem = method.check_statistics(config, 1)
    assert problem.key == "train.global_batch" and problem.value == 1 and "1 visible patch" in problem.rule
    assert "fcmae.mask_ratio" in problem.nearest and method.check_statistics(config, 2) is None


def test_micro_batches_and_recomputation_change_nothing():
    expected = losses_of(*reversed(tiny(World(), FCMAE)), World(), range(3), 0.1)
    for over in ({"train.micro_batch": 2}, {"parallel.activation_checkpoint": "every 1"}):
        assert losses_of(*reversed(tiny(World(), FCMAE, **over)), World(), range(3), 0.1) == pytest.approx(
            expected, rel=1e-5
        )


@pytest.mark.parametrize("over, key", [
    ({"views.crops": [{"num": 1, "size": 36}]}, "views.crops[0].size"),
    ({"fcmae.mask_ratio": 0.99}, "fcmae.mask_ratio"),
    ({"views.crops": [{"num": 1, "size": [32, 8]}], "fcmae.mask_ratio": 0.9}, "fcmae.mask_ratio"),
    (UNET | {"fcmae.decoder_width": 20}, "fcmae.decoder_width"),
    ({"model.name": "vit", "model.depths": None, "model.depth": 1, "model.heads": 1, "model.image_size": 32},
     "model.name"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_ranks_start(over, key):
    with pytest.raises(UserError) as refused:
        build_method(resolve(FCMAE, sections(over), world_size=1), World())
    assert [problem.key for problem in refused.value.problems] == [key] and refused.value.problems[0].nearest


@pytest.mark.parametrize("size, ratio", [(32, 0.99), (56, 0.999), (32, 1e-9), ([32, 8], 0.9)])
def test_the_nearest_ratio_is_one_that_can_be(size, ratio):
    over = {"views": {"crops": [{"num": 1, "size": size}]}}
    with pytest.raises(UserError) as refused:
        build_method(resolve(FCMAE, over | {"fcmae": {"mask_ratio": ratio}}, world_size=1), World())
    (near, _) = refused.value.problems[0].nearest
    (masking,) = build_method(resolve(FCMAE, over | {"fcmae": {"mask_ratio": near}}, world_size=1), World()).maskings
    assert masking.keep == (1 if ratio > 0.5 else masking.num_patches - 1)


def test_a_crop_of_one_patch_wants_larger_crops():
    with pytest.raises(UserError) as refused:
        build_method(resolve(FCMAE, {"views": {"crops": [{"num": 1, "size": 8}]}}, world_size=1), World())
    assert refused.value.problems[0].key == "views.crops[0].size" and refused.value.problems[0].nearest == (16,)


def test_a_loss_of_plain_pixels_is_compared_with_nothing():
    assert make(**{"fcmae.normalise": False})[1].baseline is None and make()[1].baseline.loss == 191 / 192


def test_each_side_of_a_crop_is_a_multiple_of_the_patch():
    with pytest.raises(UserError) as refused:
        build_method(resolve(FCMAE, {"views": {"crops": [{"size": [36, 44]}]}}, world_size=1), World())
    height, width = refused.value.problems
    assert (height.key, height.value, height.nearest) == ("views.crops[0].size", (36, 44), (32, 40))
    assert str(height).startswith("views.crops[0].size is [36, 44], but its height must be a multiple of the 8 pixels")
    assert (width.key, width.nearest) == ("views.crops[0].size", (40, 48)) and "its width" in width.rule


def test_a_run_on_crops_that_are_not_square(photos, tmp_path):
    """Crops, what is reconstructed and a checkpoint's words are of their height and width."""
    given = sections({
        "views.crops": [{"num": 1, "size": [16, 32]}, {"num": 1, "size": [24, 16]}], "train.total_samples": 24,
        "knn.enabled": False, "health.images": 0, "run.patch_images": 2, "schedule.warmup_samples": 8,
    })  # fmt: skip
    run = seer_scale.train(FCMAE | {"data": {"workers": 0}}, photos, run_dir=tmp_path / "run", **given)
    losses = [row["loss"] for row in run.metrics() if "loss" in row]
    assert run.samples_seen == 24 and losses and all(map(math.isfinite, losses))
    gallery = read_gallery(run.path)
    sizes = {
        name: {
            Image.open(run.path / "gallery" / picture).size for strip in gallery[name] for picture in strip["images"]
        }
        for name in ("crops", "reconstructions")
    }
    assert sizes == {"crops": {(32, 16), (16, 24)}, "reconstructions": {(32, 16)}}
    newest = max((run.path / "checkpoints").glob("samples-*"))
    assert "trained on crops of 16x32, 24x16" in inspect.text(inspect.describe(newest))
