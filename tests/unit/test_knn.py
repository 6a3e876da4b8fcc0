"""kNN against brute force over whole matrices, on one rank and on two."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from seer_scale.config import Config, Data, Knn, Run
from seer_scale.data.loading.loader import eval_batches
from seer_scale.data.sources import Source, open_source, subset
from seer_scale.data.transforms.decode import decode
from seer_scale.data.transforms.on_device import to_float
from seer_scale.data.transforms.views import resize_centre
from seer_scale.distributed import World
from seer_scale.errors import CheckpointError, UserError
from seer_scale.evaluate.gallery_pictures import (
    _principal_colours,
    images_to_reconstruct,
    show_neighbours,
    show_patches,
    show_prototypes,
    show_reconstructions,
)
from seer_scale.evaluate.knn import knn, labelled_images, why_unlabelled
from seer_scale.methods.base import Reconstructions
from seer_scale.observe.gallery import read_gallery
from tests.ranks import run_ranks
from tests.tiny import world_of
from tests.unit.test_sources import write_tar

KNN = Knn(size=16, k=5, temperature=0.2, batch=4)


def encode(images):
    features = images.mean((2, 3)) @ torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.3], [0.5, 0.0, 1.0]])
    return features, features


def write_corpus(folder):
    draw = np.random.default_rng(0)
    for split, num in (("train", 11), ("test", 5)):
        for c, colour in enumerate(([200, 60, 60], [60, 200, 60], [90, 120, 180])):
            (folder / split / f"class{c}").mkdir(parents=True)
            for i in range(num):
                image = np.clip(draw.normal(colour + draw.normal(0, 60, 3), 20, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(image[..., ::-1]).save(folder / split / f"class{c}" / f"{i}.jpg", quality=95)
    (folder / "train" / "class1" / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    return folder


def images_of(folder):
    c = Config(data=Data(path=str(folder / "train")), knn=dataclasses.replace(KNN, queries=str(folder / "test")))
    return labelled_images(c)


def brute_force(images):
    def whole(source, indices):
        parts = list(eval_batches(source, indices, KNN.size, batch=100, workers=0))
        return torch.nn.functional.normalize(encode(to_float(parts[0][0]))[0], dim=1), parts[0][1]

    q, qy = whole(images.queries, images.query_indices)
    b, by = whole(images.bank, images.bank_indices)
    top = (q @ b.T).topk(KNN.k, dim=1)
    votes = torch.zeros(len(q), 3).scatter_add_(1, by[top.indices], (top.values / KNN.temperature).exp())
    return 100 * (votes.argmax(1) == qy).float().mean().item(), top.values


def not_finite(images):
    """A network whose features of some images are not finite; an image is told by its mean."""
    features, _ = encode(images)
    return features.where(features[:, :1] < features[:, :1].median(), torch.inf), features


def failure_on_rank(rank, size, folder):
    with pytest.raises(CheckpointError, match="features are not finite") as told:
        knn(not_finite, images_of(folder), KNN, workers=0, world=world_of(rank, size))
    return str(told.value)


def score_on_rank(rank, size, folder):
    seen = []
    scores, found = knn(encode, images_of(folder), KNN, workers=0, world=world_of(rank, size), see_bank=seen.append)
    return scores["knn/top1"], found.similarity.numpy(), found.queries.numpy(), torch.cat(seen).numpy()


def test_equal_to_brute_force(tmp_path):
    images = images_of(write_corpus(tmp_path))
    images.query_to_bank.setflags(write=False)  # as on the ranks that rank 0 shares its listing with
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # users would see them
            scores, found = knn(encode, images, KNN, workers=0, world=World())
    finally:
        torch.set_warn_always(False)
    top1, similarity = brute_force(images)
    assert abs(scores["knn/top1"] - top1) < 1e-4 and 40 < top1 < 100
    torch.testing.assert_close(found.similarity, similarity)
    assert scores["knn/top5"] == 100.0  # three classes


def test_the_same_on_two_ranks(tmp_path):
    images = images_of(write_corpus(tmp_path))
    seen = []
    scores, found = knn(encode, images, KNN, workers=0, world=World(), see_bank=seen.append)
    on_ranks = run_ranks(2, score_on_rank, tmp_path)
    shares = np.concatenate([share for *_, share in on_ranks])
    assert len(shares) == len(images.bank_indices) - 1  # one cannot be read
    np.testing.assert_allclose(np.sort(shares, axis=0), np.sort(torch.cat(seen).numpy(), axis=0), atol=1e-6)
    for top1, similarity, queries, _ in on_ranks:
        assert abs(top1 - scores["knn/top1"]) < 1e-4
        np.testing.assert_array_equal(queries, found.queries.numpy())
        np.testing.assert_allclose(similarity, found.similarity.numpy(), atol=1e-6)


def test_a_fifth_is_held_out_where_no_queries_are_given(tmp_path):
    folder = write_corpus(tmp_path)
    images = labelled_images(Config(data=Data(path=str(folder / "train")), knn=KNN))
    assert len(images.query_indices) == -(-len(images.bank) // 5)
    assert not set(images.query_indices) & set(images.bank_indices)
    assert len(images.query_indices) + len(images.bank_indices) == len(images.bank)


class Many(Source):
    """More images than could be numbered in memory, in two classes."""

    classes = ("a", "b")
    has_labels = True

    def __len__(self):
        return 10**12


def test_no_more_is_drawn_than_asked_for(tmp_path):
    c = Config(data=Data(path="unused"), knn=dataclasses.replace(KNN, limit=30, limit_queries=7))
    images = labelled_images(c, Many())
    queries, bank = images.query_indices, images.bank_indices
    assert len(queries) == 7 and len(bank) == 30 and not set(queries) & set(bank)
    assert (np.diff(queries) > 0).all() and (np.diff(bank) > 0).all() and bank.max() > 10**11

    write_corpus(tmp_path)
    c = dataclasses.replace(c, data=Data(path=str(tmp_path / "train")))
    beside = dataclasses.replace(c.knn, queries=str(tmp_path / "test"), limit=9)
    few = labelled_images(dataclasses.replace(c, knn=beside))
    assert len(few.query_indices) == 7 and len(few.bank_indices) == 9
    everything = labelled_images(dataclasses.replace(c, knn=dataclasses.replace(c.knn, limit=0, limit_queries=0)))
    assert len(everything.query_indices) == 7 and len(everything.bank_indices) == 27  # of 34


def test_numbers_as_labels(tmp_path):
    """Bank and queries have the same numbers, not the same positions of them: names decide."""
    write_corpus(tmp_path)
    named = images_of(tmp_path)
    for name, split, classes, num in (("bank", "train", range(3), 11), ("queries", "test", (1, 2), 5)):
        lines = [f"{split}/class{n}/{i}.jpg\t{7 * n}\n" for n in classes for i in range(num)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    c = dataclasses.replace(KNN, queries=str(tmp_path / "queries.txt"))
    images = labelled_images(Config(data=Data(path=str(tmp_path / "bank.txt")), knn=c))
    assert images.classes == ["0", "7", "14"] and images.query_to_bank.tolist() == [1, 2]
    scores, found = knn(encode, images, KNN, workers=0, world=World())
    named = dataclasses.replace(named, query_indices=np.arange(5, 15))
    assert scores == knn(encode, named, KNN, workers=0, world=World())[0]
    show_neighbours(tmp_path, "after", images, found)
    assert {e["label"] for e in read_gallery(tmp_path)["after"]} == {"7", "14"}


def test_features_that_are_not_finite(tmp_path):
    images = images_of(write_corpus(tmp_path))
    with pytest.raises(CheckpointError, match="features are not finite.*use an earlier checkpoint"):
        knn(not_finite, images, KNN, workers=0, world=World())
    calls = []

    def broken_bank(batch):
        calls.append(0)
        return not_finite(batch) if len(calls) > 4 else encode(batch)  # 15 queries in batches of 4

    with pytest.raises(CheckpointError, match="features are not finite"):
        knn(broken_bank, images, KNN, workers=0, world=World())
    assert len(set(run_ranks(2, failure_on_rank, tmp_path))) == 1


def test_pictures_of_images_that_vanished(tmp_path):
    images = images_of(write_corpus(tmp_path))
    _, found = knn(encode, images, KNN, workers=0, world=World())

    def vanish(batch):
        """Between features and pictures, one query vanishes, and half the bank is no images any more."""
        Path(images.queries.name(int(found.queries[0]))).unlink(missing_ok=True)
        for i in range(0, len(images.bank), 2):
            Path(images.bank.name(i)).write_bytes(b"no image")
        return encode(batch)

    show_prototypes(tmp_path, vanish, torch.eye(3), images.bank, num=100, size=16, batch=64, workers=0, world=World())
    assert 0 < sum(len(e["images"]) for e in read_gallery(tmp_path)["prototypes"]) < 3 * 8
    show_neighbours(tmp_path, "after", images, found)
    rows = read_gallery(tmp_path)["after"]
    assert len(rows) == 5 and 0 < sum(len(e["neighbours"]) for e in rows) < 5 * KNN.k  # of six queries


def test_pictures_of_prototypes_look_at_so_many_images_and_no_more(tmp_path):
    images, looked = images_of(write_corpus(tmp_path)), []

    def counted(batch):
        looked.append(len(batch))
        return encode(batch)

    for num in (1, 9, 20, len(images.bank), 10**6):  # of 34, one of which is broken
        looked.clear()
        show_prototypes(
            tmp_path, counted, torch.eye(3), images.bank, num=num, size=16, batch=4, workers=0, world=World()
        )
        assert min(num, len(images.bank)) - 1 <= sum(looked) <= num


def patches_of(batch):
    """Of images whose four quarters are of colours of their own: 4 x 4 patches of their mean colours, and attention to
    red and to blue."""
    colours = F.adaptive_avg_pool2d(batch, 4).flatten(2).mT
    return colours, colours[:, :, [0, 2]].clamp(min=0).mT


def test_pictures_of_patches_are_in_the_gallery(tmp_path):
    quarters = np.zeros((2, 2, 3), np.uint8)
    for n in range(9):
        quarters[0, 0], quarters[0, 1], quarters[1, 0] = (255 - n, 0, 0), (0, 255 - n, 0), (0, 0, 255 - n)
        Image.fromarray(quarters.repeat(8, 0).repeat(8, 1)).save(tmp_path / f"{n}.png")
    (tmp_path / "4.png").write_bytes(b"no image")
    source = open_source(str(tmp_path))
    show_patches(tmp_path, patches_of, source, num=3, size=16, batch=2, workers=0, world=World())
    strips = read_gallery(tmp_path)["patches"]
    assert [strip["caption"] for strip in strips] == ["image 0", "image 8"]
    _, *maps = (np.asarray(Image.open(tmp_path / "gallery" / name), int) for name in strips[1]["images"])
    assert [m.shape for m in maps] == [(4, 4, 3)] * 3
    colours = [maps[0][row, column].tolist() for row in (0, 2) for column in (0, 2)]
    for m, where in zip(maps[1:], [(slice(2), slice(2)), (slice(2, 4), slice(2))]):
        inside = m[where].copy()
        m[where] = 0
        assert inside.max() == 255 and inside.min() > 200 and m.max() < 30  # white there, and black elsewhere
    apart = np.abs(np.subtract.outer(colours, colours).diagonal(axis1=1, axis2=3)).max(2)
    assert apart[~np.eye(4, dtype=bool)].min() > 100 and np.abs(maps[0][:2, :2] - maps[0][0, 0]).max() < 40
    first = np.asarray(Image.open(tmp_path / "gallery" / strips[0]["images"][1]), int)
    assert np.abs(first - maps[0]).max() < 40  # what is alike in two images has one colour


def half_hidden(images, numbers):
    """The upper half is not seen; it is filled with mid grey, at half the error of the mean's and at twice."""
    seen, filled, errors = images.clone(), images.clone(), torch.full((len(images), 2, 3), math.nan)
    seen[:, :, :8], filled[:, :, :8] = 0, to_float(torch.full((1, 3, 1, 1), 128, dtype=torch.uint8))
    errors[:, 0] = torch.tensor([0.5, 0.5, 2.0])
    assert len(numbers) == len(images)
    return Reconstructions(seen, filled, errors)


def test_reconstructions_of_images_trained_on_and_of_others_are_in_the_gallery(tmp_path):
    """What is visible is as in the image, to the pixel."""
    images = images_of(write_corpus(tmp_path))
    config = Config(
        data=Data(path=str(tmp_path / "train")),
        knn=dataclasses.replace(KNN, queries=str(tmp_path / "test")),
        run=Run(patch_images=3),
    )
    shown = images_to_reconstruct(config, images.bank, images)
    assert [images.indices.tolist() for images in shown] == [[0, 16, 33], [0, 7, 14]]
    broken = next(i for i in range(34) if "broken" in images.bank.name(i))
    shown[0] = shown[0]._replace(indices=np.array([0, broken, 33]))
    show_reconstructions(tmp_path, half_hidden, shown, size=(16, 24), batch=2, workers=0, world=World())
    strips = read_gallery(tmp_path)["reconstructions"]
    names = ["image 0", "image 33", *(f"image {i} of knn.queries" for i in (0, 7, 14))]
    assert [strip["caption"] for strip in strips] == names
    assert all(s["small"] == "error 1.00 of the mean's" for s in strips)
    for strip, i in zip(strips[-3:], (0, 7, 14), strict=True):
        whole, seen, filled, errors = (np.asarray(Image.open(tmp_path / "gallery" / n), int) for n in strip["images"])
        assert np.array_equal(whole, resize_centre(decode(images.queries.read(i)), (16, 24)).transpose(1, 2, 0))
        assert np.array_equal(seen[8:], whole[8:]) and np.array_equal(filled[8:], whole[8:])
        assert (filled[:8] == 128).all() and (seen[:8] == [124, 116, 104]).all()  # the mean colour of ImageNet
        assert (
            (errors[:8, :16] == 128).all() and (errors[:8, 16:] == 255).all() and (errors[8:] == [66, 112, 178]).all()
        )


def test_images_not_trained_on_are_those_of_other_folders_or_beyond_max_images(tmp_path):
    labelled = images_of(write_corpus(tmp_path))

    def others(source, data: str, queries: str) -> list[str]:
        knn = dataclasses.replace(KNN, queries=queries and str(tmp_path / queries))
        shown = images_to_reconstruct(Config(data=Data(path=str(tmp_path / data)), knn=knn), source, labelled)
        return [images.caption for images in shown[1:]]

    bank = labelled.bank
    assert others(bank, "train", "test") == ["image {} of knn.queries"]
    assert others(bank, "test", "test") == others(bank, ".", "test") == others(bank, "train", "") == []
    some = subset(bank, np.arange(30))
    config = Config(data=Data(path=str(tmp_path / "train")), knn=KNN)
    (_, beyond) = images_to_reconstruct(config, some, labelled)
    assert beyond.source is bank and beyond.indices.tolist() == [30, 31, 32, 33]
    assert len(images_to_reconstruct(config, subset(bank, np.arange(34)), None)) == 1


@pytest.mark.parametrize("width", [5, 40])  # fewer than patches, and more
def test_colours_of_patches_are_principal_components(width):
    """Of patches that lie in three directions of ever smaller spread, beside noise."""
    generator = torch.Generator().manual_seed(width)
    basis = torch.linalg.qr(torch.randn(width, 3, generator=generator))[0]
    planted = torch.randn(2, 16, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    colours = _principal_colours(planted @ basis.T + 0.01 * torch.randn(2, 16, width, generator=generator) + 7)
    assert colours.shape == (2, 16, 3) and colours.min() == 0 and colours.max() == 1
    inside = (colours > 0) & (colours < 1)
    for channel in range(3):
        seen = inside[..., channel]
        together = torch.stack([colours[..., channel][seen], planted[..., channel][seen]])
        assert torch.corrcoef(together)[0, 1].abs() > 0.9
    assert torch.equal(_principal_colours(torch.ones(1, 16, width)), torch.zeros(1, 16, 3))


def test_prototypes_shown_are_apart_from_each_other():
    """Where many prototypes share a place, one of them is shown."""
    import torch

    from seer_scale.evaluate.gallery_pictures import _apart

    directions = torch.eye(8)[:4]
    prototypes = torch.cat(
        [directions + 0.01 * torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    )
    closeness = torch.linspace(1, 0.5, 20)
    closeness[3::4] = -1  # of no image
    chosen = _apart(prototypes, closeness, 3)
    assert chosen[0] == 0 and sorted(k % 4 for k in chosen) == [0, 1, 2]


# ------------------------------------------------------------------------------------------------ what the figures mean


def folders(root: Path, *names: str, num: int = 3) -> str:
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(num):
            Image.fromarray(np.full((20, 24, 3), 40 * i, np.uint8)).save(root / name / f"{i}.jpg")
    return str(root)


def told(path: str, **more) -> tuple[str | None, str | None]:
    """(protocol, or why there is none)."""
    c = Config(data=Data(path=path), knn=dataclasses.replace(KNN, **more))
    images = labelled_images(c)
    if images:
        return images.protocol, None
    problem = why_unlabelled(c)
    return None, f"{problem.key} {problem.rule}"


def test_standard_errors_and_the_share_of_the_commonest_class(tmp_path):
    images = images_of(write_corpus(tmp_path))
    images = dataclasses.replace(images, query_indices=np.arange(12))  # 5, 5 and 2 of a class
    scores, _ = knn(encode, images, KNN, workers=0, world=World())
    share = scores["knn/top1"] / 100
    assert (
        scores["knn/top1_stderr"] == pytest.approx(100 * (share * (1 - share) / 12) ** 0.5)
        and scores["knn/top5_stderr"] == 0
    )
    assert scores["knn/majority"] == pytest.approx(100 * 5 / 12)
    assert scores["knn/queries"] == 12 and scores["knn/classes"] == 3


def test_what_is_measured_has_a_mark(tmp_path):
    path = folders(tmp_path / "photos", "a", "b", num=5)

    def mark(path: str, **more) -> str:
        c = dataclasses.replace(KNN, **more)
        return labelled_images(Config(data=Data(path=path), knn=c)).measurement(c)

    others = [
        mark(path, k=6),
        mark(path, limit=3),
        mark(path, limit_queries=1),
        mark(path, queries=folders(tmp_path / "asked", "a", "b", num=5)),
        mark(path, size=17),
    ]
    others.append(mark(folders(tmp_path / "other", "a", "c", num=5)))
    assert mark(path) not in others and len(set(others)) == len(others)
    assert mark(str(Path(path).rename(tmp_path / "moved"))) == mark(folders(tmp_path / "photos", "a", "b", num=5))


def test_classes_are_named_and_dates_doubted(tmp_path):
    path = folders(tmp_path / "photos", "2019", "2020-11")
    protocol, _ = told(path)
    assert protocol.startswith(
        f"4 images of {path} vote on 2 others of it, held out; 2 classes: 2019, 2020-11. These look like dates"
    )
    path = folders(tmp_path / "odd", "a\nb", "c")
    assert "2 classes: a\\nb, c." in told(path)[0]
    path = folders(tmp_path / "more", *"abcdefg")
    assert (
        told(path)[0] == f"16 images of {path} vote on 5 others of it, held out; 7 classes: a, b, c, d, e and 2 more."
    )


def test_splits_are_bank_and_queries_and_their_folders_the_classes(tmp_path):
    path = folders(tmp_path / "photos", "Train/cat", "Train/dog", "test/cat", "test/dog", "val/cat", "val/dog")
    folders(tmp_path / "photos", "valid")  # without classes: no queries
    (tmp_path / "photos" / "training").mkdir()  # nor here
    protocol, _ = told(path)
    assert protocol.startswith(
        f"6 images of {path}/Train vote on 6 of {path}/val; 2 classes: cat, dog. "
        f"Pretraining sees the images of {path}/val, too, without labels (data.path {path}/Train would not)."
    )
    assert told(path, queries=f"{path}/test")[0].startswith(
        f"6 images of {path}/Train vote on 6 of {path}/test; 2 classes"
    )
    other = folders(tmp_path / "other", "x", "y")
    assert told(other, bank=path)[0] == f"6 images of {path}/Train vote on 6 of {path}/val; 2 classes: cat, dog."
    alone = folders(tmp_path / "alone", "train/cat", "train/dog")
    assert told(alone)[0].startswith(
        f"4 images of {alone}/train vote on 2 others of it, held out; 2 classes: cat, dog."
    )
    mixed = folders(tmp_path / "mixed", "test", "cat")  # a class called test
    assert "2 classes: cat, test" in told(mixed)[0]


def test_what_lies_beside_splits_leaves_them_splits(tmp_path):
    path = folders(tmp_path / "photos", "train/cat", "train/dog", "test/cat", "test/dog")
    plain = told(path)
    assert plain[0].startswith(f"6 images of {path}/train vote on 6 of {path}/test; 2 classes")
    for name in ("@eaDir", "lost+found", "__MACOSX", ".git"):
        (tmp_path / "photos" / name).mkdir()
    (tmp_path / "photos" / "loop").symlink_to("loop")
    assert told(path) == plain
    folders(tmp_path / "photos", "raw")
    assert told(path) == (f"{plain[0]} What lies beside them is left out: raw.", plain[1])
    config = Config(data=Data(path=path, exclude=("raw",)), knn=KNN)
    assert labelled_images(config).protocol == plain[0]
    folders(tmp_path / "photos", "val/.cache", "train/@eaDir/cat")
    assert told(path)[0].startswith(plain[0])
    flat = folders(tmp_path / "flat", "train", "test", "raw")
    assert told(flat) == (None, f"{flat} has no classes (train, test: parts of a data set)")


def test_classes_called_train_and_test_are_told_by_what_lies_beside_them(tmp_path):
    classes = ("bike", "bus", "car", "test", "train")
    path = folders(tmp_path / "vehicles", *classes)
    protocol, _ = told(path)
    assert "5 classes: bike, bus, car, test, train. test, train are taken for classes, as 3 others lie" in protocol
    (tmp_path / "list.txt").write_text("".join(f"{path}/{name}/0.jpg\t{name}\n" for name in classes))
    assert "test, train are taken for classes, as 3 others" in told(str(tmp_path / "list.txt"))[0]
    path = folders(tmp_path / "vehicles", "train/old", "train/new", "test/old", "test/new")  # beside images in train
    assert "test, train are taken for classes" in told(path)[0]
    path = folders(tmp_path / "sorted", *classes[:3], "train/old", "train/new", "test/old", "test/new")
    protocol, _ = told(path)
    assert f" {path}/train vote on 6 of {path}/test" in protocol and "is left out: bike, bus, car." in protocol


def test_splits_without_classes_below_are_none_themselves(tmp_path):
    path = folders(tmp_path / "photos", "train", "test")
    assert told(path) == (None, f"{path} has no classes (train, test: parts of a data set)")
    for more in ({"bank": path}, {"queries": path}):
        with pytest.raises(
            UserError, match=r"has no classes \(train, test: parts of a data set\), but kNN needs classes"
        ):
            told(folders(tmp_path / "named", "cat", "dog"), **more)
    (tmp_path / "list.txt").write_text("".join(f"{path}/{split}/0.jpg\t{split}\n" for split in ("train", "val")))
    assert (
        told(str(tmp_path / "list.txt"))[1] == f"{tmp_path}/list.txt has no classes (train, val: parts of a data set)"
    )
    (Path(path) / "train" / "0.jpg").rename(tmp_path / "photos" / "0.jpg")
    assert told(folders(tmp_path / "flat", "."))[1] == f"{tmp_path}/flat has no labels"


def test_one_class_alone_is_told_as_that(tmp_path):
    path = folders(tmp_path / "one", "hat")
    assert told(path) == (None, f"{path} has one class alone (hat)")
    with pytest.raises(
        UserError, match="has one class alone .hat., but kNN needs classes of knn.queries, two at least"
    ):
        told(folders(tmp_path / "pets", "cat", "dog"), queries=path)


def test_a_bank_that_is_asked_about_itself_is_refused(tmp_path):
    path = folders(tmp_path / "pets", "cat", "dog")
    (tmp_path / "link").symlink_to("pets")
    for bank, queries in ((path, path), (path, f"{tmp_path}/link"), ("", f"{path}/")):
        with pytest.raises(UserError) as caught:
            told(path, bank=bank, queries=queries)
        (problem,) = caught.value.problems
        assert (problem.key, problem.value) == ("knn.queries", queries) and "the bank itself" in problem.rule


def test_an_image_without_a_label_is_named_as_what_keeps_knn_away(tmp_path):
    """A loose one beside class folders, also as a part of a manifest, and some of a tar."""
    path = folders(tmp_path / "pets", "cat", "dog")
    shutil.copy(f"{path}/cat/0.jpg", f"{path}/stray.jpg")
    num = len(open_source(path))
    assert told(path) == (
        None,
        f"{path} has not a label for each image: 1 of its {num} images has none ({path}/stray.jpg)",
    )
    cat = (Path(path) / "cat" / "0.jpg").read_bytes()
    write_tar(tmp_path / "t.tar", {"0.jpg": cat, "0.cls": b"1", "1.jpg": cat, "2.jpg": cat})
    assert f"2 of its 3 images are without a .cls ({tmp_path}/t.tar::1.jpg)" in told(str(tmp_path / "t.tar"))[1]
    (tmp_path / "parts.yaml").write_text(f"parts: [{{path: {path}}}]\n")
    assert f"1 of its {num} images has none ({path}/stray.jpg)" in told(str(tmp_path / "parts.yaml"))[1]
    os.remove(f"{path}/stray.jpg")
    assert told(path)[0]
    write_tar(tmp_path / "a.tar", {"cat/0.jpg": cat, "dog/1.jpg": cat})
    write_tar(tmp_path / "b.tar", {"cat/0.jpg": cat, "root.jpg": cat})
    both = f"{tmp_path}/a.tar,{tmp_path}/b.tar"
    assert f"1 of its 4 images is outside its folders ({tmp_path}/b.tar::root.jpg)" in told(both)[1]
    write_tar(tmp_path / "one.tar", {"cat/0.jpg": cat, "root.jpg": cat})  # of which one folder makes no classes
    assert told(str(tmp_path / "one.tar"))[1] == f"{tmp_path}/one.tar has no labels"


def test_an_image_beside_the_classes_of_a_split_is_named_as_what_keeps_knn_away(tmp_path):
    path = folders(tmp_path / "photos", "train/cat", "train/dog", "val/cat", "val/dog")
    shutil.copy(f"{path}/train/cat/0.jpg", f"{path}/train/stray.jpg")
    why = f"{path}/train has not a label for each image: 1 of its 7 images has none ({path}/train/stray.jpg)"
    assert told(path) == (None, why)
    for more in ({"bank": path}, {"queries": f"{path}/val"}):
        with pytest.raises(UserError, match=rf"{path}/train/stray.jpg\), but kNN needs classes"):
            told(path, **more)
    assert labelled_images(Config(data=Data(path=path, exclude=("stray.jpg",)), knn=KNN))
