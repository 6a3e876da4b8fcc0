"""Pictures of what was learned, for the report: crops, nearest neighbours, and what prototypes collect."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from seer_scale.config import Config, ImageSize, Views
from seer_scale.data.batch import Batch
from seer_scale.data.sources import Source, Subset
from seer_scale.data.transforms.decode import decode
from seer_scale.data.transforms.on_device import apply_and_round
from seer_scale.data.transforms.views import MEAN, STD, resize_centre
from seer_scale.distributed import World
from seer_scale.errors import DataError
from seer_scale.evaluate.features import Encode, extract_features, gather_rows, shared_batches
from seer_scale.evaluate.knn import LabelledImages, Neighbours
from seer_scale.methods.base import Reconstructions
from seer_scale.observe.gallery import Gallery

SHOWN, ROW, PIXELS = 6, 8, 96
"""Queries or prototypes shown, images in a row, and their height and width."""
MIN_PATCHES, COLOUR_RANGE = 4, (0.02, 0.98)
"""Patches a side of an image below which they are not shown; the quantiles of a principal component that are the ends
of its colour."""
AMONG = 64
"""So many times as many images are looked through for some that are not trained on."""
NO_ERROR = (66.0, 112.0, 178.0)
"""The colour of patches of which no error is taken."""


def show_crops(run_dir: Path, batch: Batch, views: Views) -> None:
    """The crops of the first few images of a batch, as the network sees them."""
    gallery, num = Gallery(run_dir), len(batch.indices)
    for row in range(min(SHOWN, num)):
        crops = []
        for n, kind in enumerate(views.crops):
            own = batch.views[n][row::num]
            if batch.photometric_params:
                own = apply_and_round(own, batch.photometric_params[n][row::num])
            assert len(own) == kind.num
            crops += list(own.numpy())
        gallery.add_crops(int(batch.indices[row]), crops)
    gallery.save()


def show_neighbours(
    run_dir: Path, stage: Literal["before", "after"], images: LabelledImages, found: Neighbours
) -> None:
    """The nearest bank images of a few queries, the same queries at every stage."""
    gallery = Gallery(run_dir)
    for row in np.linspace(0, len(found.queries) - 1, SHOWN).round().astype(int).tolist():
        query = int(found.queries[row])
        label = images.queries.class_of(query)
        near: list[tuple[np.ndarray, str | None, float]] = [
            (image, images.bank.class_of(i), s)
            for i, s in zip(found.bank[row, :ROW].tolist(), found.similarity[row, :ROW].tolist())
            for image in _small(images.bank, [i])
        ]
        for image in _small(images.queries, [query] if near else []):
            gallery.add_neighbours(stage, image, label, near)
    gallery.save()


@torch.no_grad()
def show_prototypes(
    run_dir: Path, encode: Encode, prototypes: torch.Tensor, source: Source, *,
    num: int, size: int, batch: int, workers: int, world: World,
) -> None:  # fmt: skip
    """How the images are shared out among the prototypes, and those nearest to a few prototypes that hold theirs close
    and are far from each other. Collective; rank 0 writes. prototypes [K, dim]; num: images looked at, spread over
    all."""
    indices = _spread(len(source), num)
    stream = extract_features(encode, source, indices, size=size, batch=batch, workers=workers, world=world)
    parts = [(z, i) for _, z, _, i in stream]
    z, ids = (gather_rows(torch.cat(column), world) for column in zip(*parts))
    if not world.is_main or len(ids) < ROW:
        return
    similarity = z @ prototypes.to(z).T
    share = torch.bincount(similarity.argmax(1), minlength=len(prototypes)) / len(z)
    top = similarity.topk(ROW, dim=0)
    gallery = Gallery(run_dir)
    gallery.set_use(share.tolist())
    for k in _apart(prototypes, torch.where(share > 0, top.values.mean(0), -1), SHOWN):
        if pictures := _small(source, ids[top.indices[:, k]].tolist()):
            gallery.add_prototype(k, share[k].item(), pictures)
    gallery.save()


def show_patches(
    run_dir: Path, encode: Encode, source: Source, *, num: int, size: int, batch: int, workers: int, world: World
) -> None:
    """Of images spread over all, each with its patches as colours and, a picture each, the weights that the CLS token
    and the registers give them. Collective; rank 0 writes. encode: images -> patches [N, P, C], attention [N, Q, P]."""
    indices = _spread(len(source), num)
    stream = extract_features(encode, source, indices, size=size, batch=batch, workers=workers, world=world)
    parts = [(patches, attention, numbers) for patches, attention, _, numbers in stream]
    patches, attention, ids = (gather_rows(torch.cat(column), world).cpu() for column in zip(*parts))
    if not world.is_main or not len(ids):
        return
    gallery, side = Gallery(run_dir), math.isqrt(patches.shape[1])
    maps = torch.cat([_principal_colours(patches)[:, None], _greys(attention)], 1)  # [N, 1 + Q, P, 3]
    pixels = (255 * maps).round().byte().unflatten(2, (side, side)).permute(0, 1, 4, 2, 3).numpy()
    for row in ids.argsort().tolist():
        if image := _small(source, [int(ids[row])]):
            gallery.add_strip("patches", f"image {int(ids[row])}", [*image, *pixels[row]])
    gallery.save()


class ShownImages(NamedTuple):
    """caption: of each, with its number for {}."""

    source: Source
    indices: np.ndarray
    caption: str


def images_to_reconstruct(config: Config, source: Source, labelled: LabelledImages | None) -> list[ShownImages]:
    """`run.patch_images` of those trained on, and as many others: of `knn.queries`, where these do not lie in
    `data.path`, or else of those that `data.max_images` leaves out."""
    num = config.run.patch_images
    shown = [ShownImages(source, _spread(len(source), num), "image {}")]
    if labelled and config.knn.queries and not _lies_in(config.knn.queries, config.data.path):
        queries = labelled.query_indices
        shown.append(ShownImages(labelled.queries, queries[_spread(len(queries), num)], "image {} of knn.queries"))
    elif isinstance(source, Subset) and len(source) < len(source.whole):
        among = _spread(len(source.whole), AMONG * num)
        rest = among[~np.isin(among, source.indices)]
        shown.append(ShownImages(source.whole, rest[_spread(len(rest), num)], "image {}, beyond data.max_images"))
    return [images for images in shown if len(images.indices)]


def _spread(length: int, num: int) -> np.ndarray:
    """`num` numbers below `length`, from the first to the last; all, where there are fewer."""
    return np.linspace(0, length - 1, min(num, length)).round().astype(np.int64)


def _lies_in(path: str, folder: str) -> bool:
    inner, outer = os.path.realpath(path), os.path.realpath(folder)
    return inner == outer or inner.startswith(os.path.join(outer, ""))


def show_reconstructions(
    run_dir: Path, reconstruct: Callable[[torch.Tensor, list[int]], Reconstructions], shown: Sequence[ShownImages], *,
    size: ImageSize, batch: int, workers: int, world: World,
) -> None:  # fmt: skip
    """A row an image: as it is, as it is seen, as it is filled in, and errors of patches. Collective; rank 0 writes."""
    gallery = Gallery(run_dir)
    for source, indices, caption in shown:
        parts = []
        stream = shared_batches(source, indices, size=size, batch=batch, workers=workers, world=world)
        for images, _, numbers in stream:
            n = len(numbers)
            made = reconstruct(images, numbers.tolist() or [0])
            parts.append([x[:n] for x in (images, *made)] + [numbers])
        images, seen, filled, errors, ids = (gather_rows(torch.cat(column), world).cpu() for column in zip(*parts))
        if not world.is_main:
            continue
        rows = torch.stack([*map(_pixels, (images, seen, filled)), _error_colours(errors, images.shape[3])], 1).numpy()
        of_image = errors.flatten(1).nanmean(1).tolist()
        for row in ids.argsort().tolist():
            small = f"error {of_image[row]:.2f} of the mean's"
            gallery.add_strip("reconstructions", caption.format(int(ids[row])), list(rows[row]), small)
    if world.is_main:
        gallery.save()


def _pixels(images: torch.Tensor) -> torch.Tensor:
    """Normalised images as uint8."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (255 * (images * std + mean)).round().nan_to_num().clamp(0, 255).byte()


def _error_colours(errors: torch.Tensor, width: int) -> torch.Tensor:
    """[N, h, w] -> uint8 [N, 3, height, width]: from black to white at 1, and a colour where there is none."""
    colours = torch.where(errors.isnan()[..., None], torch.tensor(NO_ERROR), 255 * errors.clamp(0, 1)[..., None])
    pixels = colours.round().byte().permute(0, 3, 1, 2)
    side = width // errors.shape[2]
    return pixels.repeat_interleave(side, 2).repeat_interleave(side, 3)


def _principal_colours(patches: torch.Tensor) -> torch.Tensor:
    """[N, P, C] -> their first three principal components as colours, [N, P, 3], between 0 and 1; each has the sign in
    which its largest value is positive."""
    x = patches.flatten(0, 1).double().nan_to_num()
    x = x - x.mean(0)
    if len(x) < x.shape[1]:
        values, vectors = torch.linalg.eigh(x @ x.T)
        scores = vectors * values.clamp(min=0).sqrt()
    else:
        scores = x @ torch.linalg.eigh(x.T @ x)[1]
    scores = scores[:, -3:].flip(1)
    scores = scores * scores.gather(0, scores.abs().argmax(0, keepdim=True)).sign()
    low, high = scores.quantile(torch.tensor(COLOUR_RANGE, dtype=scores.dtype), dim=0)
    colours = ((scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)).clamp(0, 1)
    return colours.float().unflatten(0, patches.shape[:2])


def _greys(weights: torch.Tensor) -> torch.Tensor:
    """[N, Q, P] -> [N, Q, P, 3], the least of each map black and the largest white."""
    above = weights - weights.amin(2, keepdim=True)
    share = above / above.amax(2, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return share.nan_to_num()[..., None].expand(-1, -1, -1, 3)


def _apart(prototypes: torch.Tensor, closeness: torch.Tensor, num: int) -> list[int]:
    """`num` prototypes or fewer, the closest first and then each the farthest from those before it, among the closest 8
    num.

    Several prototypes often share one group of images, and would show the same ones. prototypes [K, dim], closeness
    [K]."""
    among = closeness.topk(min(8 * num, int((closeness > -1).sum()))).indices
    vectors = torch.nn.functional.normalize(prototypes[among].float(), dim=1)
    nearest = torch.full((len(among),), -2.0, device=vectors.device)
    chosen: list[int] = []
    for _ in range(min(num, len(among))):
        nearest[chosen] = 2.0
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, vectors @ vectors[chosen[-1]])
    return among[chosen].tolist()


def _small(source: Source, indices: list[int]) -> list[np.ndarray]:
    """Thumbnails of those images that can still be read: files vanish while a run lasts."""
    images = []
    for index in indices:
        with contextlib.suppress(DataError):
            images.append(resize_centre(decode(source.read(index)), PIXELS))
    return images
