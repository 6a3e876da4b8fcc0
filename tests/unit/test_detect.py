"""Detection: the same figure on two processes and after a kill, by COCO's own evaluation, of annotations that were
checked before."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seer_scale.distributed import World
from seer_scale.errors import CheckpointError, ConfigError, DataError, TrainingError, UserError
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.detection import precision, training
from seer_scale.evaluate.detection.coco import find_pair, read_coco
from seer_scale.evaluate.detection.model import Detector, levels_of
from seer_scale.evaluate.detection.precision import average_precision
from seer_scale.evaluate.registry import task_class
from seer_scale.evaluate.run import read_settings
from seer_scale.evaluate.subject import Subject
from seer_scale.models.layers.norm import BatchNorm
from seer_scale.models.registry import build_backbone, initialise
from seer_scale.observe.progress import Progress
from tests.ranks import run_ranks
from tests.tiny import RECIPE, world_of

coco_masks = pytest.importorskip("pycocotools.mask")
pytest.importorskip("torchvision")
pytest.importorskip("accelerate")
COLOURS = {3: (220, 30, 30), 7: (30, 30, 220)}
"""By category: ids are not contiguous."""


def rectangles(folder: Path, part: str, num: int) -> None:
    """Images of two sizes with one to three rectangles, whose colour is their category; a crowd in the first."""
    draws = np.random.default_rng([num, len(part)])
    found: dict = {"images": [], "annotations": [], "categories": [{"id": i, "name": f"c{i}"} for i in COLOURS]}
    (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for n in range(num):
        height, width = ((48, 64), (56, 40))[n % 2]
        pixels = np.full((height, width, 3), 128, np.uint8)
        found["images"].append({"id": 100 + n, "file_name": f"{n}.png", "height": height, "width": width})
        for _ in range(draws.integers(1, 4)):
            w, h = draws.integers(12, 25, 2).tolist()
            x, y = draws.integers(0, width - w), draws.integers(0, height - h)
            category = list(COLOURS)[draws.integers(2)]
            pixels[y : y + h, x : x + w] = COLOURS[category]
            found["annotations"].append(annotation(100 + n, [int(x), int(y), w, h], category))
        Image.fromarray(pixels).save(folder / part / f"{n}.png")
    runs = {"size": [48, 64], "counts": [0, 48 * 8, 48 * 56]}
    found["annotations"].append(annotation(100, [0, 0, 8, 48]) | {"iscrowd": 1, "segmentation": runs})
    for i, one in enumerate(found["annotations"]):
        one |= {"id": i, "iscrowd": one.get("iscrowd", 0)}
    (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(found))


def annotation(image: int, box: list[float], category: int = 3) -> dict:
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {"image_id": image, "category_id": category, "bbox": box, "area": w * h, "segmentation": [polygon]}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    rectangles(folder, "train", 8)
    rectangles(folder, "val", 5)
    return folder


def evaluation_of(data: Path, out: Path, world: World = World(), weights: str = "trained", **given) -> Evaluation:
    tiny = {"size": 48, "batch": 4, "iterations": 6, "width": 16, "regions": 16, "workers": 0, "lr": 0.1}
    settings = read_settings("detect", {"data": str(data)} | {k: str(v) for k, v in (tiny | given).items()})
    model = build_backbone(**RECIPE["model"])
    initialise(model, seed=0)
    subject = Subject(path=out, model=model.eval(), fingerprint="0", weights=weights, size=32)
    return Evaluation(
        task="detect", subject=subject, options=settings, world=world, progress=Progress(active=False), folder=out
    )


def measured(rank: int, size: int, data: Path, out: Path, given: dict) -> tuple[dict, list, dict]:
    """(scores, losses, the backbone's weights and statistics)"""
    evaluation = evaluation_of(data, out, world_of(rank, size), **given)
    result = task_class("detect")(evaluation.options).measure(evaluation)
    weights = {n: t.detach().numpy() for n, t in evaluation.subject.model.state_dict().items()}
    evaluation.clean()
    return dict(result.scores), list(result.more["losses"]), weights


def on_two(rank: int, size: int, data: Path, out: Path) -> list:
    return [measured(rank, size, data, out, given) for given in ({}, SYNC)]


SYNC = {"norm": "sync", "iterations": 2}
"""Longer, rounding would choose other proposals."""


def test_the_figure_is_the_same_after_a_kill_and_on_two_processes(data, tmp_path, monkeypatch):
    whole = measured(0, 1, data, tmp_path / "whole", {})
    assert {"detect/box_ap", "detect/mask_ap"} <= set(whole[0]) and whole[0]["detect/images"] == 5

    class Killed(BaseException):
        pass

    def dies_after(num: int, save) -> None:
        calls = []

        def dying(*args):
            save(*args)
            calls.append(args)
            if len(calls) == num:
                raise Killed

        return dying

    seen = []
    read = training.read_image
    monkeypatch.setattr(training, "read_image", lambda coco, i: seen.append(i) or read(coco, i))
    monkeypatch.setattr(precision, "SHARD_IMAGES", 2)
    for module, name in ((training, "save_state"), (precision, "write_whole")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, dies_after(2, getattr(module, name)))
            with pytest.raises(Killed):
                measured(0, 1, data, tmp_path / "killed", {})
    resumed = measured(0, 1, data, tmp_path / "killed", {})
    assert len(seen) == 6 * 4, "no update is made twice"
    assert resumed[:2] == whole[:2]
    assert all(np.array_equal(resumed[2][n], whole[2][n]) for n in whole[2])
    assert not (tmp_path / "killed" / "unfinished").exists()

    shared = measured(0, 1, data, tmp_path / "shared", SYNC)
    for ranks in run_ranks(2, on_two, data, tmp_path / "two"):
        assert ranks[0][0] == whole[0]
        for (_, losses, weights), of_one in zip(ranks, (whole, shared), strict=True):
            for row, expected in zip(losses, of_one[1], strict=True):
                assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
            for name, expected in of_one[2].items():
                np.testing.assert_allclose(weights[name], expected, rtol=1e-3, atol=1e-4, err_msg=name)
    assert not np.array_equal(shared[2]["s1.b1.conv1.bn.running_var"], whole[2]["s1.b1.conv1.bn.running_var"])


def test_frozen_statistics_stay_and_of_untrained_weights_are_estimated(data, tmp_path):
    before = evaluation_of(data, tmp_path).subject.model
    trained = measured(0, 1, data, tmp_path, {"iterations": 2, "masks": False})
    assert "detect/mask_ap" not in trained[0]
    norms = [name for name, layer in before.named_modules() if isinstance(layer, BatchNorm)]
    of_norms = {n: t for n, t in before.state_dict().items() if n.rpartition(".")[0] in norms}
    assert all(np.array_equal(trained[2][n], t.numpy()) for n, t in of_norms.items())
    moved = [n for n, p in before.named_parameters() if not np.array_equal(trained[2][n], p.detach().numpy())]
    assert set(moved) == {n for n, _ in before.named_parameters()} - set(of_norms)

    random = measured(0, 1, data, tmp_path, {"iterations": 1, "masks": False, "weights": "random"})[2]
    assert np.abs(random["s4.b1.conv1.bn.running_var"] - 1).max() > 0.1
    assert all(np.isfinite(t).all() for t in random.values())


def test_it_learns_to_find_rectangles(tmp_path):
    """From untrained weights; of four seeds the least is 14."""
    rectangles(tmp_path, "train", 24)
    rectangles(tmp_path, "val", 8)
    given = {"weights": "random", "norm": "sync", "iterations": 80, "lr": 0.06, "width": 32, "regions": 32}
    scores = measured(0, 1, tmp_path, tmp_path, given)[0]
    assert scores["detect/box_ap50"] > 5 and scores["detect/mask_ap50"] > 5


def test_losses_of_an_image_do_not_depend_on_its_batch_nor_on_those_before(data, tmp_path):
    """Of sizes whose padding leads torchvision's pooling to other scales, were they inferred from the first image."""
    evaluation = evaluation_of(data, tmp_path, train_sizes=44)
    options = evaluation.options
    examples = training.Examples(read_coco(*find_pair(data, "train")), options, masks=True)
    model = evaluation.subject.model
    detector = Detector(model, levels_of(model, "it"), 2, options, masks=True).train()
    other = Detector(copy.deepcopy(model), levels_of(model, "it"), 2, options, masks=True).train()
    other.load_state_dict(detector.state_dict())
    wide, small = examples[0, 0], dataclasses.replace(examples[0, 1], side=34)
    together, alone, last = detector([wide, small]), other([small]), other([wide])
    for name, loss in together.items():
        torch.testing.assert_close(loss, (alone[name] + last[name]) / 2)


def test_an_example_is_a_function_of_seed_epoch_and_image(data, tmp_path):
    """And its boxes are those of its masks, mirrored or not."""
    options = evaluation_of(data, tmp_path).options
    examples, again = (training.Examples(read_coco(*find_pair(data, "train")), options, masks=True) for _ in range(2))
    found = [examples[epoch, 0] for epoch in range(8)]
    for epoch, one in enumerate(found):
        other = again[epoch, 0]
        assert torch.equal(one.image, other.image) and (one.side, one.draw) == (other.side, other.draw)
        for box, mask in zip(one.boxes.int().tolist(), one.masks, strict=True):
            ys, xs = mask.nonzero().T
            assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert len({one.boxes[0, 0].item() for one in found}) == 2 and len({one.side for one in found}) > 2
    images = np.array([4, 5, 9])
    drawn = [of for i in range(3) for of in training.drawn(i, 4, images, seed=0)]
    assert sorted(drawn) == [(epoch, i) for epoch in range(4) for i in images.tolist()]


def test_the_schedule_is_the_published_one():
    def options(**given):
        return read_settings("detect", {"data": "x"} | given)

    assert training.iterations_of(options(), 117_266) == 90_000
    assert training.iterations_of(options(schedule="2x", batch="8"), 117_266) == 360_000
    rates = [training.rate(options(), i, 90_000) for i in (0, 1000, 59_999, 60_000, 80_000)]
    assert rates == pytest.approx([0.02 / 1000, 0.02, 0.02, 0.002, 0.0002])
    assert options().sides == (640, 672, 704, 736, 768, 800) and options().longest == 1333


# ------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize("package", ["pycocotools", "faster_coco_eval"])
def test_average_precision_is_that_of_pycocotools_on_the_file(package, data, monkeypatch):
    """With crowds, ids that are not contiguous, and an annotation of number 0, which it takes for none."""
    if package == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    pytest.importorskip(package)
    assert precision.evaluator()[0].__module__.startswith(package)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    path, folder = find_pair(data, "val")
    coco, draws, raw = read_coco(path, folder), np.random.default_rng(0), json.loads(path.read_text())
    results = []
    for one in raw["annotations"]:
        for _ in range(3):
            x, y, w, h = (np.array(one["bbox"]) + draws.normal(0, 2, 4)).clip(1).tolist()
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            size = next(i for i in raw["images"] if i["id"] == one["image_id"])
            runs = coco_masks.merge(coco_masks.frPyObjects(polygon, size["height"], size["width"]))
            results.append({
                "image_id": one["image_id"], "category_id": int(draws.choice([3, 3, 7])), "bbox": [x, y, w, h],
                "score": round(draws.random(), 1), "segmentation": runs | {"counts": runs["counts"].decode()},
            })  # fmt: skip
    for i, one in enumerate(raw["annotations"], 1):
        one |= {"id": i, "iscrowd": one.get("iscrowd", 0)}
    truth = COCO()
    truth.dataset = raw
    truth.createIndex()
    for kind, theirs in (("box", "bbox"), ("mask", "segm")):
        expected = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), theirs)
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
        figures, by_category = average_precision(coco, results, kind)
        wanted = {n: 100 * v for n, v in zip(precision.SUMMARY, expected.stats) if v >= 0}
        assert figures == pytest.approx(wanted, abs=1e-9) and 0 < figures["ap"] < 100
        assert np.mean(list(by_category.values())) == pytest.approx(figures["ap"])
        assert set(average_precision(coco, [], kind)[0].values()) == {0.0}
    perfect = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 1.0}
        for one in raw["annotations"]
    ]
    assert average_precision(coco, perfect, "box")[0]["ap"] == pytest.approx(100)


# ------------------------------------------------------------------------------------------------ bad input


def changed(data: Path, tmp_path: Path, change) -> Path:
    """The training annotations after change(them)."""
    found = json.loads((data / "annotations" / "instances_train.json").read_text())
    path = tmp_path / "changed.json"
    other = change(found)
    path.write_text(json.dumps(other if isinstance(other, list | dict) else found))
    return path


def of_annotations(**values):
    def change(found: dict) -> None:
        for one in found["annotations"][:2]:
            one.update({"image_id": 100} | values)

    return change


@pytest.mark.parametrize(
    "change, rule",
    [
        (lambda found: [found], 'it has no list "images"'),
        (lambda found: found | {"annotations": {}}, 'it has no list "annotations"'),
        (of_annotations(image_id=5), "has 2 annotations whose image_id is of no image (the first: id 0)"),
        (of_annotations(image_id=[1]), "has 2 annotations whose image_id is of no image"),
        (of_annotations(category_id=1), "has 2 annotations whose category_id is of no category"),
        (of_annotations(bbox=[1, 2, 3]), "has 2 annotations without a bbox of four finite numbers"),
        (of_annotations(bbox=[0, 0, float("nan"), 2]), "has 2 annotations without a bbox of four finite numbers"),
        (of_annotations(bbox=[500, 0, 5, 5]), "has 2 annotations whose bbox lies outside its image"),
        (of_annotations(segmentation=[[1, 2, 3, 4]]), "has 2 annotations whose segmentation is not of polygons"),
        (of_annotations(segmentation={"size": [48, 64], "counts": "1"}), "whose segmentation has runs that do not"),
        (of_annotations(segmentation={"size": [1, 1], "counts": [1]}), "has 2 annotations whose segmentation"),
        (lambda found: found["images"].append(found["images"][0]), "has 1 image whose id another has"),
        (lambda found: found["images"][0].pop("width"), "has 1 image without an id, file_name, height or width"),
        (lambda found: found["annotations"].clear(), "has no object with an area that is no crowd"),
    ],
)  # fmt: skip
def test_annotations_that_are_wrong_are_counted(data, tmp_path, change, rule):
    path = changed(data, tmp_path, change)
    with pytest.raises(DataError) as error:
        read_coco(path, data / "train")
    (problem,) = error.value.problems
    assert problem.key == str(path) and rule in problem.rule


def test_crowds_boxes_over_the_edge_and_without_area_are_counted(data, tmp_path):
    def change(found: dict) -> None:
        found["annotations"] = [
            annotation(100, [-4, 0, 10, 10]), annotation(100, [60, 40, 10, 20]), annotation(100, [64, 9, 0, 5]),
            annotation(101, [3, 3, 0, 0]), found["annotations"][-1],
        ]  # fmt: skip

    coco = read_coco(changed(data, tmp_path, change), data / "train")
    counts = {"clipped": 2, "without_area": 2, "crowds": 1, "without_mask": 0}
    assert coco.counts == counts and coco.usable.tolist() == [2, *[0] * 7]


def test_images_that_are_missing_or_of_another_size_are_told(data, tmp_path):
    def rename(found: dict) -> None:
        found["images"][0]["file_name"], found["images"][1]["file_name"] = "../val/0.png", "none.png"

    with pytest.raises(DataError) as error:
        read_coco(changed(data, tmp_path, rename), data / "train")
    (problem,) = error.value.problems
    assert problem.key == str(data / "train") and problem.rule.startswith("lacks 2 of 8 images")

    def resize(found: dict) -> None:
        found["images"][0] |= {"width": 640}
        found["annotations"].pop()  # a crowd's runs are of the old size

    evaluation = evaluation_of(
        data / "train", tmp_path, annotations=changed(data, tmp_path, resize), test=data / "val",
        test_annotations=data / "annotations" / "instances_val.json",
    )  # fmt: skip
    with pytest.raises(DataError) as error:
        task_class("detect")(evaluation.options).measure(evaluation)
    (problem,) = error.value.problems
    assert problem.key == str(data / "train" / "0.png") and problem.value == "64x48" and error.value.single_rank


@pytest.mark.parametrize(
    "given, key, nearest",
    [
        ({"data": ""}, "--data", "give a folder laid out as COCO's"),
        ({"annotations": "x"}, "--test-annotations", "give it, too"),
        ({"max_size": 40}, "--max-size", (48,)),
    ],
)
def test_options_are_checked(data, tmp_path, given, key, nearest):
    with pytest.raises(ConfigError) as error:
        evaluation_of(**{"data": data, "out": tmp_path} | given)
    assert error.value.problems[0].key == key and error.value.problems[0].nearest == nearest


def test_what_cannot_be_trained_is_refused(data, tmp_path):
    shared = evaluation_of(data, tmp_path)
    shared.world = World(0, 3)
    for task, error, key in (
        (shared, UserError, "--batch"),
        (evaluation_of(data / "no", tmp_path), DataError, str(data / "no")),
        (evaluation_of(Path(f"coco:{data}/no"), tmp_path), DataError, str(data / "no")),
        (evaluation_of(data, tmp_path, lr=1e30, iterations=2), TrainingError, "--lr"),
    ):
        with pytest.raises(error) as raised:
            task_class("detect")(task.options).measure(task)
        assert raised.value.problems[0].key == key
    assert not list(tmp_path.glob("*.json"))


def test_a_backbone_without_maps_of_several_strides_is_refused():
    pytest.importorskip("timm")
    with pytest.raises(CheckpointError) as error:
        levels_of(build_backbone("timm/test_vit"), "it")
    assert error.value.problems[0].key == "it"
    strides = [of.stride for _, of in levels_of(build_backbone("timm/test_efficientnet"), "it")]
    assert strides == [4, 8, 16, 32]
