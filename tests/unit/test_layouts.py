"""Named data sets: small trees of the real layouts give the published order of classes, and say what they lack."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seer_scale.cli import main
from seer_scale.errors import DataError
from seer_scale.evaluate.layouts import DATASETS, LAYOUTS, named_data_set
from seer_scale.evaluate.splits import DataSet, open_data_set
from seer_scale.evaluate.suite import rows_of
from tests.problems import refused
from tests.unit.test_load import checkpoint
from tests.unit.test_sources import touch


def opened(word: str, root: Path) -> DataSet:
    return open_data_set(f"{word}:{root}", "", None)


def write(root: Path, texts: dict[str, object]) -> None:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text if isinstance(text, str) else json.dumps(text))


def images(root: Path, *names: str) -> None:
    for name in names:
        touch(root / name)


WNIDS = ["n01440764", "n01443537", "n02007558"]


def imagenet(root: Path) -> Path:
    images(root, *(f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in reversed(WNIDS) for i in (10, 2)))
    images(root, *(f"val/{wnid}/ILSVRC2012_val_0000000{n}.JPEG" for n, wnid in enumerate(WNIDS)))
    return root


def voc(root: Path) -> Path:
    images(root, *(f"VOCdevkit/VOC2007/JPEGImages/00000{n}.jpg" for n in range(1, 5)))
    lists = "VOCdevkit/VOC2007/ImageSets/Main"
    write(root, {
        f"{lists}/cat_trainval.txt": "000001 -1\n000002  1\n",
        f"{lists}/aeroplane_trainval.txt": "000001  0\n000002 -1\n",
        f"{lists}/cat_test.txt": "000003  1\n000004 -1\n", f"{lists}/aeroplane_test.txt": "000003  1\n000004  0\n",
        f"{lists}/trainval.txt": "000001\n000002\n", f"{lists}/test.txt": "000003\n000004\n",
    })  # fmt: skip
    return root


def coco(root: Path, annotations: str = "annotations/instances_{}2017.json", folder: str = "{}2017") -> Path:
    for part in ("train", "val"):
        names = [f"{part}{n}.jpg" for n in range(2)]
        images(root, *(f"{folder.format(part)}/{name}" for name in names))
        write(root, {annotations.format(part): {
            "images": [{"id": 70 + n, "file_name": name} for n, name in enumerate(names)],
            "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
            "annotations": [{"image_id": 71, "category_id": 90}, {"image_id": 71, "category_id": 1}]
            + [{"image_id": 71, "category_id": 1}],
        }})  # fmt: skip
    return root


def inat(root: Path) -> Path:
    for part in ("train", "val"):
        names = [f"train_val2018/Plantae/{c}/{part}.jpg" for c in (7, 8)]
        images(root, *names)
        write(root, {f"{part}2018.json": {
            "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
            "categories": [{"id": n, "name": str(n)} for n in (8, 7)],
            "annotations": [{"id": n, "image_id": n, "category_id": 8 - n} for n in range(2)],
        }})  # fmt: skip
    return root


def places(root: Path) -> Path:
    images(root, "images256/a/abbey/1.jpg", "images256/b/bar/2.jpg", "images256/b/bar/3.jpg")
    lines = {"train": "b/bar/2.jpg 1\na/abbey/1.jpg 0\n", "val": "b/bar/3.jpg 1\n"}
    write(root, {f"trainvalsplit_places205/{part}_places205.csv": text for part, text in lines.items()})
    return root


def open_images(root: Path) -> Path:
    images(root, "train/00a.jpg", "train/00b.jpg", "test/00c.jpg")
    header, stem = "ImageID,Source,LabelName,Confidence\n", "{}-annotations-{}-imagelabels.csv"
    write(root, {
        "class-descriptions.csv": '/m/02,"Cat, a"\n/m/01,Dog\n',
        stem.format("train", "human"): f"{header}00a,verification,/m/01,1\n00a,verification,/m/02,0\nzzz,x,/m/01,1\n",
        stem.format("train", "machine"): f"{header}00b,machine,/m/02,0.7\n00b,machine,/m/01,0.2\n"
        "00a,machine,/m/02,0.9\n",
        stem.format("test", "human"): f"{header}00c,verification,/m/02,1\n",
    })  # fmt: skip
    return root


TREES = {
    "imagenet": imagenet, "voc07": voc, "coco": coco, "inat18": inat, "places205": places, "openimages": open_images,
    "openimages-machine": open_images,
}  # fmt: skip


def test_every_layout_has_a_tree_here():
    assert set(TREES) == set(LAYOUTS) == set(COMMANDS)


@pytest.mark.parametrize("word", LAYOUTS)
def test_each_image_is_there_and_targets_fit_the_classes(word, tmp_path):
    data = opened(word, TREES[word](tmp_path))
    for split in (data.train, data.test):
        assert split.targets.shape == (len(split), *([len(split.classes)] if split.multi_label else []))
        assert split.targets.dtype == (np.int8 if split.multi_label else np.int64)
        assert all(split.source.read(i) == b"x" for i in range(len(split.source)))
        assert split.source.has_labels != split.multi_label and split.classes == data.classes
        assert split.take(np.array([0])).mark
    assert data.protocol.startswith(f"Trained on {len(data.train)} images of {word}'s train")


def test_imagenet_is_numbered_by_sorted_wnids(tmp_path):
    data = opened("imagenet", imagenet(tmp_path))
    assert data.classes == WNIDS and data.train.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert [Path(data.train.source.name(i)).parent.name for i in range(6)] == [WNIDS[t] for t in data.train.targets]
    assert data.test.targets.tolist() == [0, 1, 2]


def test_a_class_that_val_lacks_leaves_the_numbers_of_train(tmp_path):
    root = imagenet(tmp_path)
    (root / "val" / WNIDS[0]).rename(tmp_path / "aside")
    assert opened("imagenet", root).test.targets.tolist() == [1, 2]


def test_a_flat_val_is_labelled_by_the_devkit_whose_numbers_are_others(tmp_path):
    io = pytest.importorskip("scipy.io")
    images(tmp_path, *(f"train/{wnid}/0.JPEG" for wnid in WNIDS))
    images(tmp_path, *(f"val/ILSVRC2012_val_0000000{n}.JPEG" for n in (1, 2, 3, 4)))
    synsets = [(3, WNIDS[0], 0), (1, WNIDS[1], 0), (2, WNIDS[2], 0), (4, "n00001740", 3)]  # the last an inner node
    table = np.array(synsets, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    place = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    place.mkdir(parents=True)
    io.savemat(place / "meta.mat", {"synsets": table})
    truth = place / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("3\n1\n2\n3\n")
    assert opened("imagenet", tmp_path).test.targets.tolist() == [0, 1, 2, 0]
    truth.write_text("3\n1\n4\n3\n")
    with refused(truth):
        opened("imagenet", tmp_path)
    truth.write_text("3\n1\n")
    with refused(tmp_path / "val", nearest="unpack all of them"):
        opened("imagenet", tmp_path)
    (place / "meta.mat").write_bytes(b"no matrix")
    truth.write_text("3\n1\n2\n3\n")
    with refused(place / "meta.mat"):
        opened("imagenet", tmp_path)


def test_numbers_of_the_files_are_kept(tmp_path):
    assert opened("places205", places(tmp_path / "p")).classes == ["a/abbey", "b/bar"]
    assert opened("places205", tmp_path / "p").train.targets.tolist() == [1, 0]
    data = opened("inat18", inat(tmp_path / "i"))
    assert data.classes == ["7", "8"] and data.test.targets.tolist() == [1, 0]
    data = opened("coco", coco(tmp_path / "c"))
    assert data.classes == ["person", "car", "toothbrush"] and data.train.targets.tolist() == [[0, 0, 0], [1, 0, 1]]


def test_what_is_difficult_or_not_verified_is_not_counted(tmp_path):
    data = opened("voc07", voc(tmp_path / "v"))
    assert data.classes == ["aeroplane", "cat"]
    assert data.train.targets.tolist() == [[-1, 0], [0, 1]] and data.test.targets.tolist() == [[1, 1], [-1, 0]]
    root = open_images(tmp_path / "o")
    data = opened("openimages", root)
    assert data.classes == ["Dog", "Cat, a"]
    assert data.train.targets.tolist() == [[1, 0], [-1, -1]] and data.test.targets.tolist() == [[-1, 1]]
    assert opened("openimages-machine", root).train.targets.tolist() == [[1, 0], [0, 1]], "people have the last word"


def test_a_word_alone_is_looked_for_in_the_folder_of_all(tmp_path, monkeypatch):
    imagenet(tmp_path / "all" / "imagenet")
    monkeypatch.delenv(DATASETS, raising=False)
    with refused("--data", "imagenet"):
        named_data_set("imagenet")
    monkeypatch.setenv(DATASETS, str(tmp_path / "all"))
    assert len(named_data_set("imagenet").train) == 6
    with refused("--data", "coco"):
        named_data_set("coco")
    assert named_data_set("photos:x") is None and named_data_set("hf:imagenet") is None
    with refused("--test", "other"):
        open_data_set("imagenet", "other", None)
    with refused(tmp_path / "nowhere"):
        named_data_set(f"coco:{tmp_path}/nowhere")


@pytest.mark.parametrize(
    "word, lost",
    [
        ("imagenet", "val"),
        ("places205", "images256"),
        ("inat18", "val2018.json"),
        ("voc07", "VOCdevkit/VOC2007/ImageSets/Main/cat_test.txt"),
        ("coco", "annotations/instances_val2017.json"),
        ("openimages", "class-descriptions.csv"),
    ],
)
def test_what_is_missing_is_told_by_what_was_looked_for(word, lost, tmp_path):
    root = TREES[word](tmp_path / "tree")
    (root / lost).rename(tmp_path / "lost")
    with pytest.raises(DataError) as found:
        opened(word, root)
    (problem,) = found.value.problems
    assert Path(lost).name in problem.rule and str(root) in problem.key


@pytest.mark.parametrize(
    "word, name, text",
    [
        ("places205", "trainvalsplit_places205/val_places205.csv", "b/bar/3.jpg one\n"),
        ("places205", "trainvalsplit_places205/val_places205.csv", "b/bar/3.jpg 0\n"),
        ("places205", "trainvalsplit_places205/val_places205.csv", "b/bar/3.jpg 1\nc/cat/4.jpg 3\n"),
        ("inat18", "val2018.json", "{"),
        ("inat18", "val2018.json", '{"images": [], "categories": []}'),
        ("coco", "annotations/instances_val2017.json", "[1]"),
        ("voc07", "VOCdevkit/VOC2007/ImageSets/Main/cat_test.txt", "000003 2\n000004 -1\n"),
        ("voc07", "VOCdevkit/VOC2007/ImageSets/Main/cat_test.txt", "000003 1\n"),
        ("openimages", "test-annotations-human-imagelabels.csv", "ImageID,LabelName\n"),
        ("openimages", "test-annotations-human-imagelabels.csv", "ImageID,Source,LabelName,Confidence\n00c,x\n"),
    ],
)
def test_a_file_that_is_damaged_is_told(word, name, text, tmp_path):
    root = TREES[word](tmp_path)
    (root / name).write_text(text)
    with pytest.raises(DataError) as found:
        opened(word, root)
    assert len(found.value.problems) == 1 and found.value.problems[0].key


# ------------------------------------------------------------------------------------------------ the command

ONE_HEAD = ["--epochs", "1", "--lr", "0.1", "--weight-decay", "0", "--global-batch", "2"]
COMMANDS = {
    "imagenet": (["knn", "--k", "1"], "knn/top1"),
    "places205": (["lowshot", "--finetune", "--shots", "1", "--draws", "1", "--epochs", "1", "--global-batch", "2"],
                  "lowshot/1_finetuned_top1"),
    "inat18": (["lowshot", "--shots", "1", "--draws", "1"], "lowshot/1_top1"),
    "voc07": (["svm", "--c", "1", "--folds", "2"], "svm/map"),
    "coco": (["linear", *ONE_HEAD], "linear/map"),
    "openimages": (["linear", *ONE_HEAD], "linear/map"),
    "openimages-machine": (["finetune", "--epochs", "1", "--global-batch", "2", "--held-out", "0"], "finetune/map"),
}  # fmt: skip


@pytest.mark.parametrize("word", COMMANDS)
def test_each_word_is_measured_by_the_command(word, tmp_path, monkeypatch, capsys):
    """On pictures laid out as the real set, which the environment's folder of all has."""
    root = TREES[word](tmp_path / "tree")
    if word == "voc07":  # more of each class, for the folds
        lists = root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
        for part in ("trainval", "test"):
            numbers = [f"{n:06}" for n in range(1, 9)] if part == "trainval" else [f"{n:06}" for n in range(9, 13)]
            for c, name in enumerate(("aeroplane", "cat")):
                labels = [1 if n % 2 == c else 0 if n % 5 == 0 else -1 for n in range(len(numbers))]
                rows = [f"{number} {label:2}" for number, label in zip(numbers, labels)]
                (lists / f"{name}_{part}.txt").write_text("\n".join(rows) + "\n")
            images(root, *(f"VOCdevkit/VOC2007/JPEGImages/{n}.jpg" for n in numbers))
    draw = np.random.default_rng(0)
    for path in root.rglob("*"):
        if path.is_file() and path.read_bytes() == b"x":
            Image.fromarray(draw.integers(0, 256, (28, 36, 3), dtype=np.uint8)).save(path, "JPEG")
    _, place = checkpoint(tmp_path / "run")
    (task, *options), headline = COMMANDS[word]
    monkeypatch.setenv(DATASETS, str(tmp_path / "all"))
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / word.partition("-")[0]).symlink_to(root)
    out = tmp_path / "eval"
    words = ["eval", task, str(place), "--data", word, "--size", "24", "--workers", "0", "--out", str(out), *options]
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((out / f"{task}.json").read_text())
    assert record["headline"] == headline and 0 <= record["score"] <= 100
    assert f"{word}'s " in record["protocol"] and record["data"] == word
    assert [row["published"] for row in rows_of(record)] == [None], "there is none of this task, figure and set"
