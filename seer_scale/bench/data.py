"""Images a second that one core makes of your files: decoding alone, our views, and SwAV's own pipeline.

The reference is the one of SwAV and VISSL: Pillow decodes, torchvision v1 and Pillow's blur make each view of the whole
image, ToTensor and Normalize end it. Ours ends in uint8, as it leaves normalising to the device. All read the same
files from memory, with the recipe's crops and photometrics, in turn in one process with one thread; ratios are medians
over rounds. Workers are then measured as in training, each a process.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from seer_scale.config import Crop, Data, Method, Photometric, Views, load_recipe, resolve, size_text
from seer_scale.cores import available_cores
from seer_scale.data.loading.loader import train_batches
from seer_scale.data.sampling.sampler import DataVersion, ElasticSampler
from seer_scale.data.sources import Source, open_source
from seer_scale.data.transforms.decode import decode
from seer_scale.data.transforms.views import MEAN, STD, load_views
from seer_scale.errors import NOTHING, DataError, Problem, UserError
from seer_scale.files import to_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="images, as data.path takes them")
    parser.add_argument("--images", type=int, default=200, help="how many of them to use, spread over all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--recipe", default="", help="whose crops and photometrics to use (default: SEER's, 2 x 224 + 4 x 96)"
    )
    parser.add_argument(
        "--workers", default="", help="also measure loaders with these numbers of workers, such as 1,2,4"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds a round for each number of workers")
    parser.add_argument(
        "--need", type=float, default=0.0, help="images/s that one GPU trains on; prints how many cores supply it"
    )
    parser.add_argument("--no-reference", action="store_true", help="leave out the slow reference")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


# ------------------------------------------------------------------------------------------------ what is compared


def reference(views: Views, seed: int) -> Callable[[bytes], list[torch.Tensor]]:
    """SwAV's multi-crop pipeline (src/multicropdataset.py) with the recipe's crops and photometrics.

    Raises UserError where torchvision is missing.
    """
    try:
        from torchvision import transforms as T
    except ImportError as error:
        fix = "install it, or give --no-reference"
        raise UserError(Problem("torchvision", NOTHING, "is what the reference needs", fix)) from error
    from PIL import Image, ImageFilter

    draw = random.Random(seed)

    def pipeline(crop: Crop, how: Photometric) -> Callable[[Image.Image], torch.Tensor]:
        def blur(image: Image.Image) -> Image.Image:
            if draw.random() >= how.blur_p:
                return image
            return image.filter(ImageFilter.GaussianBlur(draw.uniform(*how.blur_sigma)))

        return T.Compose([
            T.RandomResizedCrop(crop.size, scale=crop.scale), T.RandomHorizontalFlip(how.flip),
            T.RandomApply([T.ColorJitter(*how.jitter)], how.jitter_p), T.RandomGrayscale(how.grayscale_p),
            T.Lambda(blur), *[T.RandomSolarize(128, how.solarize_p)] * (how.solarize_p > 0),
            T.ToTensor(), T.Normalize(MEAN, STD),
        ])  # fmt: skip

    pipelines = [pipeline(crop, how) for crop, kind in zip(views.crops, views.photometric) for how in kind]

    def make(data: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [make_view(image) for make_view in pipelines]

    return make


def geometry_only(views: Views) -> Views:
    crops = tuple(Crop(num=c.num, size=c.size, scale=c.scale) for c in views.crops)
    return Views(crops=crops, flip=views.flip, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0)


def pick(source: Source, num: int) -> list[bytes]:
    """`num` images that decode, spread over all of them, as bytes. Raises DataError where none does."""
    found: list[bytes] = []
    for i in np.linspace(0, len(source) - 1, min(num, len(source))).astype(np.int64).tolist():
        try:
            data = source.read(i)
            decode(data)
        except DataError:
            continue
        found.append(data)
    if not found:
        rule = f"gives no image that decodes, of {min(num, len(source))} that were tried"
        raise DataError(Problem("PATH", NOTHING, rule, "seer-scale data inspect says why"))
    return found


# ------------------------------------------------------------------------------------------------ measured


def time_each(things: dict[str, Callable[[bytes], object]], images: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Seconds an image that each takes, by round; in turn, image by image, so that what disturbs one disturbs all."""
    taken: dict[str, list[float]] = {name: [] for name in things}
    order = random.Random(0)
    for _ in range(rounds):
        total = dict.fromkeys(things, 0.0)
        for data in images:
            for name in order.sample(list(things), len(things)):
                begin = time.perf_counter()
                things[name](data)
                total[name] += time.perf_counter() - begin
        for name, t in total.items():
            taken[name].append(t / len(images))
    return taken


def rate_of_workers(source: Source, views: Views, workers: int, batch: int, batches: int) -> float:
    """Images/s of a loader of so many workers, once all of them have begun."""
    data = Data(workers=workers, prefetch=2)
    sampler = ElasticSampler([DataVersion(0, (("all", len(source)),))], 0, batch)
    skipped = 2 * (data.prefetch + 1)
    stream = train_batches(
        source, data, views, sampler, rank=0, world_size=1, start=0, stop=(skipped + batches) * batch
    )
    for _ in range(skipped):
        next(stream)
    begin = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return batches * batch / (time.perf_counter() - begin)


def rate_of_processes(images: list[bytes], views: Views, num: int, each: int) -> float:
    """Images/s of so many processes that make views of `each` images and hand them to nobody: what the machine can
    do."""
    context = multiprocessing.get_context("fork")
    begun, made = context.Barrier(num + 1), context.Barrier(num + 1)

    def work() -> None:
        begun.wait()
        for n in range(each):
            load_views(images[n % len(images)], views, 0, 0, n)
        made.wait()

    processes = [context.Process(target=work, daemon=True) for _ in range(num)]
    for p in processes:
        p.start()
    begun.wait()
    begin = time.perf_counter()
    made.wait()
    taken = time.perf_counter() - begin
    for p in processes:
        p.join()
    return num * each / taken


# ------------------------------------------------------------------------------------------------ what is printed


def run(args: argparse.Namespace) -> str:
    """Measure; returns the lines to print. Raises UserError."""
    workers = [_count(w) for w in args.workers.split(",") if w]
    views = _views(args.recipe)
    source = open_source(args.path)
    images = pick(source, args.images)
    torch.set_num_threads(1)
    geometry, turn = geometry_only(views), iter(range(10**9))
    things: dict[str, Callable[[bytes], object]] = {
        "decode": decode,
        "ours": lambda data: load_views(data, views, 0, 0, next(turn)),
        "ours, geometry only": lambda data: load_views(data, geometry, 0, 0, next(turn)),
    }
    if not args.no_reference:
        things["reference"] = reference(views, 0)
    for thing in things.values():
        thing(images[0])
    taken = time_each(things, images, args.rounds)
    rates = {name: 1 / statistics.median(t) for name, t in taken.items()}
    ratios = {
        n: statistics.median(r / t for r, t in zip(taken["reference"], own))
        for n, own in taken.items()
        if not args.no_reference
    }
    # batches so small that even one worker fills several in a few seconds; all numbers of workers in turn
    rounds, each = [], math.ceil(args.seconds * rates["ours"])
    for _ in range(args.rounds if workers else 0):
        rounds.append([
            (rate_of_workers(source, views, w, 16, w * math.ceil(each / 16)), rate_of_processes(images, views, w, each))
            for w in workers
        ])  # fmt: skip
    by_workers = {w: _compare(column, [r[0] for r in rounds]) for w, column in zip(workers, zip(*rounds))}
    pixels = statistics.median(math.prod(decode(d).shape[:2]) for d in images[:50])
    crops = " + ".join(f"{c.num} x {size_text(c.size)}" for c in views.crops)
    title = (
        f"{len(images)} images of {args.path}, median {pixels / 1e6:.2f} megapixels and "
        f"{statistics.median(map(len, images)) / 1e3:.0f} kB; {crops}; one thread"
    )
    if args.json:
        return to_json({"what": title, "images_per_s": rates, "to_reference": ratios, "workers": by_workers}, indent=1)
    lines = [title]
    for name, rate in rates.items():
        ratio = f"{ratios[name]:8.2f} times the reference" if name != "reference" and ratios else ""
        lines.append(f"{name:20} {rate:8.1f} images/s {ratio}".rstrip())
    for w, found in by_workers.items():
        beside = (
            (
                f", {found['to_first']:.2f} times {workers[0]} (processes without a loader: "
                f"{found['processes_to_first']:.2f} times)"
            )
            if w != workers[0]
            else ""
        )
        lines.append(
            f"{f'{w} workers' if w > 1 else '1 worker':20} {found['images_per_s']:8.1f} images/s: "
            f"{found['of_processes']:.2f} of what as many processes make without a loader{beside}"
        )
    if args.need:
        cores = args.need / rates["ours"]
        lines.append(
            f"{args.need:g} images/s need {cores:.1f} such cores: data.workers {math.ceil(cores)} a GPU; this "
            f"machine has {available_cores()} cores."
        )
    return "\n".join(lines)


def _compare(own: Sequence[tuple[float, float]], first: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Medians over rounds of (workers' rate, processes' rate) and of their ratios."""
    return {
        "images_per_s": statistics.median(w for w, _ in own),
        "of_processes": statistics.median(w / p for w, p in own),
        "to_first": statistics.median(a[0] / b[0] for a, b in zip(own, first)),
        "processes_to_first": statistics.median(a[1] / b[1] for a, b in zip(own, first)),
    }


def _views(recipe: str) -> Views:
    if not recipe:
        return Views()
    given, usual = load_recipe(recipe), {"swav": {"prototypes": [8]}}  # but valid
    method = (given.get("method") or {}).get("name", Method().name)
    if method != Method().name:  # it has rules of crops of its own
        usual = {"method": {"name": method}}
    others = {"data": {"path": "unused"}, "train": {"total_samples": 1 << 40}}
    return resolve({"views": given.get("views") or {}, **others, **usual}).views


def _count(word: str) -> int:
    if not word.strip().isdecimal() or not int(word):
        raise UserError(Problem("--workers", word, "must be numbers of at least 1", ("1,2,4",)))
    return int(word)
