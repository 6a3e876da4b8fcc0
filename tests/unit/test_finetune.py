"""Fine-tuning: what is learned, kept and gone on with, and that it does not depend on the number of processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import seer_scale
from seer_scale.config import load_recipe
from seer_scale.data.loading.loader import eval_batches
from seer_scale.data.transforms.on_device import to_float
from seer_scale.data.transforms.views import eval_preprocessing
from seer_scale.distributed import World
from seer_scale.errors import ConfigError, UserError
from seer_scale.evaluate.augmenting import erase, operations, rand_augment
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.finetuning import (
    FinetuneSettings,
    Finetuning,
    losses,
    parameter_groups,
    told_of_few_updates,
)
from seer_scale.evaluate.mixing import dropout_scale, mix_pairs, partners
from seer_scale.evaluate.registry import task_class
from seer_scale.evaluate.run import as_record, read_settings, recipes_of
from seer_scale.evaluate.splits import Split
from seer_scale.evaluate.subject import Subject
from seer_scale.interop.artefact import About, Artefact, TensorInfo, write_artefact
from seer_scale.models.classifier import Classifier, parameter_depths
from seer_scale.models.convnextv2 import CONVNEXTV2
from seer_scale.models.registry import build_backbone, initialise
from seer_scale.observe.progress import Progress
from tests.conftest import write_photos
from tests.forks import fork
from tests.problems import refused
from tests.ranks import run_ranks
from tests.tiny import FCMAE, RECIPE, world_of

SIZE, MODEL = 24, RECIPE["model"]
COLOURS = {"blue": (60, 80, 200), "green": (60, 180, 60), "red": (200, 70, 60)}
EVERYTHING = {
    "mixup": "0.4", "cutmix": "1", "dropout": "0.2", "label_smoothing": "0.1", "ema": "0.5", "layer_decay": "0.8",
    "accumulate": "2", "clip_norm": "1", "warmup_epochs": "0.5", "schedule": "cosine", "final": "0.1",
    "randaugment": "9", "erasing": "0.5",
}  # fmt: skip
QUICK = {"epochs": "2", "global_batch": "8", "lr": "0.8"}


def write_squares(folder: Path) -> Path:
    """A square of a class's colour, somewhere on grey noise."""
    draw = np.random.default_rng(0)
    for part, num in (("train", 14), ("test", 7)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(num):
                image = draw.normal(110, 30, (24, 24, 3))
                top, left = draw.integers(0, 10, 2)
                image[top : top + 14, left : left + 14] = draw.normal(colour, 25, (14, 14, 3))
                image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
                image.save(folder / part / name / f"{i}.jpg", quality=95)
    (folder / "test" / "red" / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    return folder


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


def backbone(model=MODEL):
    made = build_backbone(**model)
    initialise(made, 0)
    return made.eval()


def evaluation_of(
    data: Path,
    folder: Path,
    world: World = World(),
    weights: str = "trained",
    task: str = "finetune",
    model=MODEL,
    **given,
) -> Evaluation:
    quick = QUICK if task in ("finetune", "lowshot", "linear") else {}
    settings = read_settings(task, {"workers": "0", "batch": "16", "data": str(data), **quick, **given})
    about = About("safetensors", model, eval_preprocessing(SIZE), {"method": "toy"})
    subject = Subject(
        path=folder, model=backbone(model), fingerprint="0", weights=weights, size=SIZE, samples_seen=7, about=about
    )
    return Evaluation(
        task=task, subject=subject, options=settings, world=world, progress=Progress(active=False),
        folder=folder,
    )  # fmt: skip


def measure(evaluation: Evaluation):
    result = task_class(evaluation.task)(evaluation.options).measure(evaluation)
    evaluation.clean()
    return result


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    kept = Artefact(folder / "finetune")
    return {name: kept.read(name) for name in kept.tensors}


def test_it_learns_and_what_is_kept_predicts_as_measured(squares, tmp_path):
    evaluation = evaluation_of(squares, tmp_path, epochs="6", held_out="0.1")
    before = {n: t.clone() for n, t in evaluation.subject.model.state_dict().items()}
    result = measure(evaluation)
    assert result.scores["finetune/top1"] > 75, "chance is 33"
    assert all(torch.equal(t, before[n]) for n, t in evaluation.subject.model.state_dict().items())
    epochs = result.more["epochs"]
    assert len(epochs) == 6 and epochs[-1]["train_loss"] < 0.6 * epochs[0]["train_loss"]
    assert all(0 <= row["held_out_top1"] <= 100 for row in epochs)
    assert result.scores["finetune/images"] == 21 and sum(row["images"] for row in result.table) == 21
    assert not (tmp_path / "unfinished").exists()
    assert "BatchNorm by statistics of 8 crops; measured" in result.protocol
    assert result.files == ("finetune/model.safetensors", "finetune/README.md")
    assert result.protocol.startswith("Trained on 42 images of ") and "vote" not in result.protocol
    (warning,) = result.warnings  # 39 images in 6 epochs are 30 updates of 8
    assert warning.startswith("30 updates can hardly train") and "(21 make 100 updates of 8 images)" in warning

    about = Artefact(tmp_path / "finetune").about
    assert about.origin["method"] == "toy" and about.origin["finetuned"][0]["scores"] == dict(result.scores)
    data = evaluation.data_set()
    images, *_ = next(eval_batches(data.test.source, np.arange(len(data.test)), SIZE, batch=99, workers=0))
    seer_scale.export(tmp_path / "finetune", tmp_path / "exported", "safetensors")
    for place in (tmp_path / "finetune", tmp_path / "exported" / "model.safetensors"):
        kept = seer_scale.load_classifier(place)
        assert kept.classes == list(COLOURS) and not kept.multi_label and kept.transform.size == SIZE
        with torch.no_grad():
            right = (kept(to_float(images)).argmax(1) == torch.from_numpy(data.test.targets[:21])).double().mean()
        assert 100 * right == pytest.approx(result.scores["finetune/top1"])


def test_the_card_of_what_is_kept_says_what_it_is_and_its_lines_classify(squares, tmp_path, monkeypatch):
    """Also that of an export of it, to a library without the head, and of what began untrained."""
    given = {"epochs": "1", "held_out": "0"}
    result = measure(evaluation_of(squares, tmp_path / "a run", **given))
    measure(evaluation_of(squares, tmp_path / "a run", weights="random", **given))
    kept = tmp_path / "a run" / "finetune"
    exported = seer_scale.export(kept, tmp_path / "exported", "safetensors", dtype="fp32")
    (tmp_path / "photo.jpg").write_bytes((squares / "test" / "red" / "0.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    top1 = f"**finetune/top1: {result.scores['finetune/top1']:.4g} %**. "
    for place in (kept, exported):
        text, found = (place / "README.md").read_text(), {}
        assert str(tmp_path) not in text and str(squares.parent) not in text
        assert "| classes | 3: blue, green, red |" in text and 'tags: ["fine-tuned", "toy"]' in text
        assert "a classifier of 3 classes" in text and "pipeline_tag: image-classification" in text
        assert f"{top1}Trained with 42 images of {squares.name}, tested on 21 others. The whole network" in text
        assert "\nglobal_batch: 8\n" in text
        with torch.no_grad():
            exec(text.partition("```python\n")[2].partition("```")[0].replace("PATH", str(place)), found)
        assert found["seen"] in COLOURS and found["probabilities"].sum() == pytest.approx(1)
        assert found["features"].shape == (1, found["model"].backbone.num_features)
    text = (seer_scale.export(kept, tmp_path / "for timm", "timm") / "README.md").read_text()
    assert "a backbone without a classifier, pretrained by toy, then fine-tuned with labels" in text
    assert top1 in text and "| classes |" not in text and "self-supervised" not in text
    text = (tmp_path / "a run" / "finetune-random" / "README.md").read_text()
    assert "features, trained with labels" in text and "toy" not in text and "pretraining" not in text
    assert "from untrained weights" in text


def test_a_head_that_is_not_there_is_told(tmp_path):
    net = backbone()
    tensors = dict(net.state_dict())
    for head, rule in ((None, "no head"), ({"classes": ["a", "b"]}, "has no head/weight"), ({"of": 1}, "damaged")):
        about = About("safetensors", MODEL, eval_preprocessing(SIZE), {"head": head} if head else {})
        infos = {n: TensorInfo(t.dtype, t.shape) for n, t in tensors.items()}
        write_artefact(tmp_path / "x.safetensors", about, infos, tensors.__getitem__)
        with pytest.raises(UserError, match=rule):
            seer_scale.load_classifier(tmp_path / "x.safetensors")


def train_until_killed(squares: Path, folder: Path, given: dict[str, str]) -> None:
    torch.set_num_threads(1)
    save, saves = Finetuning.save, []

    def save_and_die(self):
        save(self)
        saves.append(self.done.samples_seen)
        if len(saves) == 4:
            Finetuning._loss_of = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # in the next update

    Finetuning.save = save_and_die
    measure(evaluation_of(squares, folder, **given))


@pytest.mark.parametrize("optimizer", ["adamw"])
def test_what_was_killed_goes_on_to_the_same_weights(squares, tmp_path, optimizer):
    """In mid-epoch, with all that has a state."""
    given = EVERYTHING | {"optimizer": optimizer, "lr": "0.02", "save_every": "1e-9", "freeze_epochs": "0.3"}
    whole = measure(evaluation_of(squares, tmp_path / "whole", **given))
    process = fork(train_until_killed, squares, tmp_path / "killed", given)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    state = next((tmp_path / "killed").glob("unfinished/*/state.safetensors"))
    assert not (tmp_path / "killed" / "finetune").exists()
    seen = []
    resumed = evaluation_of(squares, tmp_path / "killed", **given)
    resumed.progress.advance = seen.append
    again = measure(resumed)
    assert sum(seen) == 80 - 32 + 21 and not state.exists(), "it began anew"
    assert again.scores == whole.scores and again.more == whole.more
    a, b = weights_in(tmp_path / "whole"), weights_in(tmp_path / "killed")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


CONVNEXT = FCMAE["model"] | {"drop_path": 0.0}
CASES = {
    "synchronised": EVERYTHING, "frozen": EVERYTHING | {"statistics": "frozen", "optimizer": "adamw"},
    "dropping": {"model": CONVNEXT, "drop_path": "0.5"},
}  # fmt: skip


def on_ranks(rank: int, size: int, squares: Path, folder: Path) -> list:
    found = []
    for name, given in CASES.items():
        evaluation = evaluation_of(squares, folder / name, world_of(rank, size), **given | {"epochs": "1"})
        result = measure(evaluation)
        found.append((dict(result.scores), result.more["epochs"]))
    few = measure(evaluation_of(squares, folder / "few", world_of(rank, size), **FEW | {"epochs": "1"}))
    return [*found, (dict(few.scores), [{k: v for k, v in row.items() if k != "shots"} for row in few.table])]


def test_processes_share_the_work_and_change_nothing(squares, tmp_path):
    """Weights are equal to rounding after the updates of an epoch."""
    alone = on_ranks(0, 1, squares, tmp_path / "one")
    first, second = run_ranks(2, on_ranks, squares, tmp_path / "two")
    assert first == second
    few, wanted = first.pop()[1], alone.pop()[1]
    assert [pytest.approx(row, rel=1e-3) for row in wanted] == few, "by few labels"
    for name, (scores, epochs), (wanted, wanted_epochs) in zip(CASES, first, alone):
        assert scores == pytest.approx(wanted, rel=1e-3), name
        assert scores["finetune/images"] == 21 and epochs[0]["train_loss"] == pytest.approx(
            wanted_epochs[0]["train_loss"], rel=1e-4
        )
        a, b = weights_in(tmp_path / "one" / name), weights_in(tmp_path / "two" / name)
        for key in a:
            assert torch.allclose(a[key].float(), b[key].float(), rtol=1e-3, atol=1e-4), (name, key)


def test_a_backbone_held_fixed_moves_afterwards_only(squares, tmp_path, monkeypatch):
    states = []

    def keep(self):
        states.append({n: t.clone() for n, t in self.network.state_dict().items()})

    monkeypatch.setattr(Finetuning, "save", keep)
    measure(evaluation_of(squares, tmp_path, freeze_epochs="1"))
    begun = {f"backbone.{n}": t for n, t in backbone().state_dict().items()}
    moved = [{n for n, t in state.items() if n in begun and not torch.equal(t, begun[n])} for state in states]
    assert not moved[0] and {n for n in moved[-1] if "num_batches" not in n} >= {"backbone.stem.conv.weight"}
    assert any("running_mean" in n for n in moved[-1])
    assert states[0]["head.weight"].std() != states[-1]["head.weight"].std()


def test_half_precision_and_several_labels_an_image(squares, tmp_path):
    evaluation = evaluation_of(squares, tmp_path, precision="bf16", mixup="0.2", **{"lr": "0.4", "epochs": "6"})
    data = evaluation.data_set()
    draw = np.random.default_rng(1)

    def several(split):
        targets = np.eye(3, dtype=np.int8)[split.targets]
        targets[draw.random(targets.shape) < 0.1] = -1
        return dataclasses.replace(split, targets=targets)

    both = dataclasses.replace(data, train=several(data.train), test=several(data.test))
    evaluation.data_set = lambda: both
    result = measure(evaluation)
    assert result.headline == "finetune/map" and result.scores["finetune/map"] > 80
    assert "[0].sigmoid()" in (tmp_path / "finetune" / "README.md").read_text()
    assert result.more["epochs"][-1]["train_loss"] < result.more["epochs"][0]["train_loss"]
    assert Artefact(tmp_path / "finetune").about.origin["head"]["multi_label"] is True


FEW = {"task": "lowshot", "finetune": "true", "shots": "3,50%", "draws": "2", "epochs": "10"}


def test_few_labels_teach_the_whole_network_and_a_draw_is_not_trained_again(squares, tmp_path, monkeypatch):
    evaluation = evaluation_of(squares, tmp_path / "whole", **FEW)
    before = {n: t.clone() for n, t in evaluation.subject.model.state_dict().items()}
    whole = measure(evaluation)
    assert all(torch.equal(t, before[n]) for n, t in evaluation.subject.model.state_dict().items())
    assert not any((tmp_path / "whole").iterdir()), "no network is kept"
    assert whole.headline == "lowshot/3_finetuned_top1" and whole.scores["lowshot/50%_finetuned_top1"] > 55
    of_half = [row["top1"] for row in whole.table if row["shots"] == "50%"]
    assert whole.scores["lowshot/50%_finetuned_top1_std"] == pytest.approx(np.std(of_half, ddof=1))
    assert [(row["images"], row["epochs"]) for row in whole.table] == [(9, 10)] * 2 + [(21, 10)] * 2
    assert whole.scores["lowshot/images"] == 21, "one cannot be read"
    assert [text.partition(" can hardly")[0] for text in whole.warnings] == [
        "Draws of 3: 12 updates",
        "Draws of 50%: 27 updates",
    ]
    assert "(89 make 100 updates of 8 images)" in whole.warnings[0]
    told = (
        "mean and deviation of 2 draws; the whole network was trained on each draw for 10 epochs from the pretrained "
    )
    assert f"{told}weights, BatchNorm by statistics of 8 crops; " in whole.protocol
    few = dataclasses.replace(evaluation.options, draws=1)
    rows = [row | {"epochs": 1, "tested": 21} for row in whole.table]
    told = task_class("lowshot")(few)._result(rows, evaluation.data_set(), evaluation.subject).protocol
    assert "one draw of each; the whole network was trained on each draw for 1 epoch from" in told

    trained, train, scores_of = [], Finetuning.train, Finetuning.scores_of

    def counted(self):
        trained.append(len(self.split))
        train(self)

    def killed(self, split):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return scores_of(self, split)

    monkeypatch.setattr(Finetuning, "train", counted)
    monkeypatch.setattr(Finetuning, "scores_of", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(evaluation_of(squares, tmp_path / "killed", **FEW))
    monkeypatch.setattr(Finetuning, "scores_of", scores_of)
    updates = []
    monkeypatch.setattr(Finetuning, "_after_update", lambda self, after=Finetuning._after_update, **how: (
        updates.append(len(self.split)), after(self, **how)
    ))  # fmt: skip
    again = measure(evaluation_of(squares, tmp_path / "killed", **FEW))
    assert trained == [9, 9, 9, 21, 21] and set(updates) == {21}, "what was trained needs to be measured alone"
    assert again.scores == whole.scores and list(again.table) == list(whole.table)


ONE_DRAW = {"shots": "2", "draws": "1"}


@pytest.mark.parametrize(
    ("task", "given", "is_refused"),
    [
        ("linear", {"weight_decay": "0"}, False),
        ("linear", {"weight_decay": "0", "augment": "true"}, False),
        ("robustness", {"classifier": "linear", "corruptions": "fog", "severities": "1"}, False),
        ("finetune", {"held_out": "0"}, False),
        ("lowshot", {"solver": "sgd", **ONE_DRAW}, True),
        ("lowshot", {"finetune": "true", **ONE_DRAW}, True),
        ("lowshot", {"finetune": "true", "shots": "50%", "draws": "1"}, True),
    ],
)
def test_images_that_cannot_be_read_are_told_of_and_count_nothing(tmp_path, task, given, is_refused):
    """Of 3 classes of 4 images one has none that can be read, and of another one of the test images cannot be."""
    for part in ("train", "test"):
        write_photos(tmp_path / part, each=4)
    lost = [tmp_path / "train" / "class1" / f"{i}.jpg" for i in range(4)]
    for path in (*lost, in_test := tmp_path / "test" / "class2" / "3.jpg"):
        path.write_bytes(b"")
    evaluation = evaluation_of(tmp_path, tmp_path / "eval", task=task, size="32", **given)
    if is_refused:
        with refused("--shots", given["shots"], "check the images: seer-scale data describe") as told:
            measure(evaluation)
        assert "of the class class1 there are 0 images that can be read" in str(told.value)
        return
    result = measure(evaluation)
    protocol = as_record(task, evaluation.options, evaluation, result, 0.0)["protocol"]
    of_train = f"4 cannot be read and are left out: {lost[0]} and others; that leaves none of class1."
    assert f"Of 12 images of train {of_train} " in f"{protocol} "
    assert f"Of 12 images of test 1 cannot be read and is left out: {in_test}." in protocol
    if task == "finetune":
        assert result.scores["finetune/train_images"] == 8 and "trained on 8 of these" in protocol
        assert "Trained with 8 images" in (tmp_path / "eval" / "finetune" / "README.md").read_text()


def test_few_labels_are_seen_as_often_as_they_need():
    options = read_settings("lowshot", {"finetune": "true"})
    published = [options.of_images(num) for num in (12_811, 24_488)]  # 1 % of ImageNet, and of Places205
    assert {o.epochs for o in published} == {70} and published[0] == options.of_images(12_811)
    assert (options.lr, options.weight_decay, options.global_batch) == (0.05, 0, 256)
    rates = [published[0].rate(12_811 * epoch, 12_811) for epoch in (0, 29, 31, 69)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1])
    few = options.of_images(50)
    assert few.epochs == 256 and few.updates(few.epochs, 50) == 50
    assert read_settings("lowshot", {"finetune": "true", "epochs": "3"}).of_images(50).epochs == 3


@pytest.mark.parametrize(
    ("task", "given", "told"),
    [
        ("lowshot", {"mixup": "1"}, {"--mixup": "without --finetune"}),
        ("lowshot", {"finetune": "true", "c": "1"}, {"--c": "with --finetune"}),
        ("lowshot", {"finetune": "true", "split_file": __file__, "draws": "5"}, {"--draws": "with --split-file"}),
        ("lowshot", {"held_out": "0.2"}, {"--held-out": "without several heads by --solver sgd"}),
        ("lowshot", {"solver": "sgd", "c": "1"}, {"--c": "with --solver sgd"}),
        ("linear", {"solver": "lbfgs", "lr": "1"}, {"--lr": "with --solver lbfgs"}),
        ("linear", {"lr": "1", "weight_decay": "0", "refit": "true"}, {"--refit": "with one classifier"}),
        ("linear", {"crop_scale": "0.1,1"}, {"--crop-scale": "without --augment"}),
        ("finetune", {"optimizer": "adamw", "momentum": "0.9"}, {"--momentum": "with --optimizer adamw"}),
        ("finetune", {"final": "0"}, {"--final": "with --schedule steps"}),
        ("finetune", {"layer_decay_by": "units"}, {"--layer-decay-by": "without --layer-decay"}),
        ("retrieval", {"gem_p": "3"}, {"--gem-p": "without --pool gem"}),
        ("retrieval", {"data": "rparis6k:x", "k": "1"}, {"--k": "with images of a revisited set, taken whole"}),
        ("robustness", {"c": "1"}, {"--c": "with --classifier knn"}),
        ("detect", {"data": "x", "iterations": "3", "schedule": "1x"}, {"--schedule": "with --iterations"}),
    ],
)  # fmt: skip
def test_an_option_that_has_no_effect_is_refused(task, given, told):
    """Also one that has its default's value, and whatever else is wrong is told as well."""
    with pytest.raises(ConfigError) as found:
        read_settings(task, given)
    assert {p.key: p.rule for p in found.value.problems} == {k: f"has no effect {why}" for k, why in told.items()}


VIT = {"name": "vit", "width": 8, "depth": 2, "heads": 2, "patch": 8, "image_size": SIZE}


@pytest.mark.parametrize(
    ("given", "key", "nearest"),
    [
        ({"lr": "1e30"}, "--lr", "give a lower one"),
        ({"precision": "fp16"}, "--precision", ("bf16", "fp32")),
        ({"global_batch": "9", "mixup": "1"}, "--global-batch", (10,)),
        ({"drop_path": "0.1"}, "--drop-path", (0.0,)),
        ({"layer_decay": "0.9", "layer_decay_by": "groups", "model": VIT}, "--layer-decay-by", ("units", "stages")),
    ],
)
def test_what_cannot_be_trained_is_told_and_leaves_nothing(squares, tmp_path, given, key, nearest):
    with pytest.raises(UserError) as told:
        measure(evaluation_of(squares, tmp_path, **given))
    assert [(p.key, p.nearest) for p in told.value.problems] == [(key, nearest)]
    assert not (tmp_path / "finetune").exists()


def test_statistics_of_more_crops_than_images_are_told_as_that():
    options = FinetuneSettings()
    task, split = task_class("finetune")(options), Split(None, np.zeros(60, np.int64), ["a"])
    subject = Subject(path=Path(), model=backbone(), fingerprint="", weights="trained", size=SIZE)
    assert "BatchNorm by statistics of 256 crops of 60 images; " in task._how(split, subject)
    subject.model = backbone(CONVNEXT)
    assert "from the pretrained weights; measured are" in task._how(split, subject), "it has no BatchNorm"
    num = next(n for n in range(1, 10_000) if not told_of_few_updates(options, n))
    assert options.updates(35, num) == 100 and options.updates(35, num - 1) == 99


def test_an_average_that_has_hardly_moved_is_told_and_the_nearest_has():
    options = FinetuneSettings(epochs=10, global_batch=64, ema=0.9999)
    (told,) = told_of_few_updates(options, 1280)
    assert "98 % initial weights after 200 updates: give --ema 0, or 0.9851 at most" in told
    assert told_of_few_updates(dataclasses.replace(options, ema=0.985), 1280) == ()


def test_untrained_weights_have_statistics_of_images_to_keep(squares, tmp_path):
    evaluation = evaluation_of(squares, tmp_path, weights="random", statistics="frozen", epochs="1")
    result = measure(evaluation)
    told = as_record("finetune", evaluation.options, evaluation, result, 1.0)["protocol"]
    assert "for 1 epoch from untrained weights, BatchNorm by statistics of 42 images, taken before; " in told
    moved = dataclasses.replace(evaluation.options, statistics="synchronised")
    told += task_class("finetune")(moved)._how(evaluation.data_set().train, evaluation.subject)
    assert "Untrained" not in told and told.count("42 images, taken before") == 1, "of a network that was trained"
    kept = Artefact(tmp_path / "finetune-random")
    taken = {n: t for n, t in evaluation.subject.model.state_dict().items() if "running" in n}
    assert taken and all(torch.equal(kept.read(n), t) for n, t in taken.items())
    assert all(t.abs().max() > 0 for n, t in taken.items() if "mean" in n)
    assert evaluation.subject.statistics_images == 42


def test_options_that_exclude_each_other():
    with pytest.raises(ConfigError) as told:
        read_settings("finetune", {
            "accumulate": "3", "schedule": "cosine", "steps": "0.5", "warmup_epochs": "35", "freeze_epochs": "40",
        })  # fmt: skip
    found = {p.key: p.nearest for p in told.value.problems}
    assert found == {
        "--global-batch": (258,), "--steps": "leave it out", "--warmup-epochs": (34,), "--freeze-epochs": (34,),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ parts


def test_the_learning_rate_is_that_of_the_paper():
    options, num = FinetuneSettings(), 2560  # ten updates an epoch
    rates = [options.rate(epoch * num, num) for epoch in range(35)]
    assert rates == pytest.approx([1.0] * 30 + [0.1] * 5) and options.updates(35, num) == 350
    cosine = FinetuneSettings(schedule="cosine", warmup_epochs=1)
    risen = [cosine.rate(256 * update, num) for update in range(350)]
    assert np.all(np.diff(risen[:11]) > 0) and np.all(np.diff(risen[10:]) < 0) and max(risen) == 1 > risen[-1] > 0


def test_lower_units_learn_more_slowly():
    network = Classifier(backbone(), ["a", "b"])
    options = FinetuneSettings(layer_decay=0.5, exclude_vectors=True)
    groups = parameter_groups(network, options)
    of = {id(p): group for group in groups for p in group["params"]}
    rates = {name: of[id(p)]["rate"] for name, p in network.named_parameters()}
    depths, top = parameter_depths(network.backbone)
    assert rates["head.bias"] == 1 and rates["backbone.stem.conv.weight"] == 0.5**top
    last = network.backbone.stage_units()[-1][-1]
    assert rates[f"backbone.{last}.conv1.conv.weight"] == 0.5 and top == 1 + 5
    assert {d for n, d in parameter_depths(network.backbone, "stages")[0].items()} == {0, 1, 2, 3, 4}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(depths) + 2
    for name, p in network.named_parameters():
        assert of[id(p)]["weight_decay"] == (0 if p.ndim < 2 else options.weight_decay), name


def layer_id(name: str, depths: tuple[int, ...], by: str) -> int:
    """As ConvNeXt V2's released code numbers, of a parameter by our name."""
    if not name.startswith(("backbone.s1", "backbone.s2", "backbone.s3", "backbone.s4", "backbone.stem")):
        return 13 if by == "groups" else sum(depths) + 1
    _, stage, block, *_ = name.split(".")
    s = 0 if stage == "stem" else int(stage[1]) - 1
    if by == "groups":
        if stage == "stem" or block == "down":
            return (0, 2, 3, 12)[s]
        return (1, 2, 3 + (int(block[1:]) - 1) // 3, 12)[s]
    return sum(depths[:s]) + (1 if stage == "stem" or block == "down" else int(block[1:]))


@pytest.mark.parametrize("size, by, stem", [
    ("atto", "blocks", 0.9**12), ("tiny", "blocks", 0.9**18), ("tiny", "groups", 0.9**13),
    ("base", "groups", 0.001306069), ("huge", "blocks", 0.75**36),
])  # fmt: skip
def test_rates_of_convnext_s_published_fine_tuning(size, by, stem):
    """By the shipped recipe, whose option is another of `tiny` alone; what is a vector does not decay."""
    options = read_settings(
        "finetune", {"recipe": f"convnextv2_{size}"} | ({"layer_decay_by": by} if size == "tiny" else {})
    )
    with torch.device("meta"):
        network = Classifier(build_backbone(f"convnextv2_{size}"), ["a", "b"])
    of = {id(p): group for group in parameter_groups(network, options) for p in group["params"]}
    depths = network.backbone.spec.depths
    top = layer_id("head", depths, by)
    for name, p in network.named_parameters():
        wanted = options.layer_decay ** (top - layer_id(name, depths, by))
        assert of[id(p)]["rate"] == pytest.approx(wanted, rel=1e-12), name
        assert of[id(p)]["weight_decay"] == (0 if p.ndim < 2 else options.weight_decay), name
    assert of[id(network.backbone.stem.conv.weight)]["rate"] == pytest.approx(stem, rel=1e-6)


def test_shipped_recipes_of_fine_tuning_and_what_is_given_beside(tmp_path):
    for name, path in recipes_of("finetune").items():
        options = read_settings("finetune", {"recipe": name})
        text = path.read_text()
        assert f"eval finetune RUN --recipe {name} " in text.splitlines()[0] and "# Should reach: " in text
        assert name in CONVNEXTV2 and options.final * options.lr * 1024 / 256 == pytest.approx(1e-6)
        assert options.rate(0, 1_281_167) <= 1 and set(options.given) <= set(load_recipe(str(path))) | {"recipe"}
    tiny = read_settings("finetune", {"recipe": "convnextv2_tiny", "lr": "0.1", "mixup": "0"})
    assert (tiny.lr, tiny.mixup, tiny.cutmix, tiny.epochs, tiny.drop_path) == (0.1, 0, 1.0, 300, 0.2)
    steps = read_settings("finetune", {"recipe": "convnextv2_tiny", "schedule": "steps", "warmup_epochs": "0"})
    assert (steps.schedule, steps.final) == ("steps", 0.0), "what goes with cosine alone"
    assert "recipe" not in steps.of_weights
    with refused("--recipe", "convnextv2_tinny", "did you mean convnextv2_tiny?", error=UserError):
        read_settings("finetune", {"recipe": "convnextv2_tinny"})
    own = tmp_path / "own.yaml"
    for text, key, rule in (
        ("momentun: 0.9\n", "--momentun", "is not a key"), ("lr: -1\n", "--lr", "must be greater than 0"),
        ("optimizer: adamw\nmomentum: 0.9", "--momentum", "has no effect with --optimizer adamw"),
        ("recipe: convnextv2_tiny", str(own), "names another recipe"),
    ):  # fmt: skip
        own.write_text(text)
        with pytest.raises(UserError, match=rule) as found:
            read_settings("finetune", {"recipe": str(own)})
        assert [p.key for p in found.value.problems] == [key]


def test_operations_are_timms(monkeypatch):
    """On one image, each at two strengths and both signs, to interpolation and rounding; and which are drawn is a
    function of the sample."""
    augment = pytest.importorskip("timm.data.auto_augment")
    image = Image.fromarray(np.random.default_rng(0).integers(20, 230, (6, 6, 3), np.uint8)).resize((48, 48))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert list(operations()) == augment._RAND_INCREASING_TRANSFORMS
    for name, apply in operations().items():
        how = {"resample": Image.BILINEAR, "fillcolor": (124, 116, 104)}
        for strength, sign in itertools.product((0.35, 0.98), (1.0, -1.0)):
            monkeypatch.setattr(augment, "_randomly_negate", lambda value, sign=sign: sign * value)
            level = augment.LEVEL_TO_ARG[name]
            theirs = augment.NAME_TO_OP[name](image, *(level(10 * strength, {}) if level else ()), **how)
            theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1)
            off = (apply(x, strength, sign).int() - theirs.int()).abs()[:, 2:-2, 2:-2].float()
            assert off.mean() < 1.5 and (off > 8).float().mean() < 0.04, (name, strength, sign, off.mean(), off.max())
    images = torch.stack([x.roll(i, 1) for i in range(40)])
    done = rand_augment(images, 8, 9.0, seed=1)
    assert torch.equal(done[10:], rand_augment(images[10:], 18, 9.0, seed=1)) and done.dtype == torch.uint8
    same = torch.tensor([torch.equal(a, b) for a, b in zip(images, done)]).float().mean()
    assert 0.1 < same < 0.45, "two of chance a half leave a quarter"
    noisy = erase(torch.full((200, 3, 24, 24), 9.0), 4, 0.25, seed=1)
    is_noise = (noisy != 9).float()
    hurt = is_noise.amax((1, 2, 3)) > 0
    assert 0.17 < hurt.float().mean() < 0.33 and 0.1 < is_noise[hurt].mean() < 0.25
    assert abs(noisy[noisy != 9].std() - 1) < 0.05
    assert torch.equal(noisy[50:60], erase(torch.full((10, 3, 24, 24), 9.0), 54, 0.25, seed=1))


@pytest.mark.parametrize("alphas", [(0.5, 0.0), (0.0, 1.0), (0.5, 1.0)])
def test_a_pair_is_mixed_alike_wherever_it_stands(alphas):
    """And as much of the other image as of its target."""
    images = torch.arange(12.0)[:, None, None, None].expand(12, 3, 8, 8)
    options = {"mixup": alphas[0], "cutmix": alphas[1], "seed": 3}
    mixed, shares = mix_pairs(images, 40, **options)
    halves = [mix_pairs(part, 40 + first, **options) for first, part in ((0, images[:4]), (4, images[4:]))]
    assert torch.equal(mixed, torch.cat([half[0] for half in halves]))
    assert torch.equal(shares, torch.cat([half[1] for half in halves]))
    own, other = torch.arange(12.0), torch.arange(12.0)[partners(12)]
    assert torch.allclose(mixed.mean((1, 2, 3)), shares * own + (1 - shares) * other, atol=1e-5)
    assert len(shares.unique()) >= 5 and not torch.equal(mix_pairs(images, 42, **options)[1], shares)
    scale = dropout_scale(6, (4, 5000), 0.3, seed=1)
    assert torch.equal(scale[2:], dropout_scale(8, (2, 5000), 0.3, seed=1))
    assert scale.mean().item() == pytest.approx(1, abs=0.03) and set(scale.unique().tolist()) == {0, scale.max().item()}


def test_losses_are_torchs_and_what_is_not_known_counts_for_nothing():
    scores, targets = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    wanted = F.cross_entropy(scores, targets, label_smoothing=0.1, reduction="none")
    assert torch.equal(losses(scores, targets, 0.1), wanted)
    several = torch.tensor([[1, 0, -1]] * 4, dtype=torch.int8)
    known = F.binary_cross_entropy_with_logits(scores[:, :2], several[:, :2].float(), reduction="none").sum(1)
    assert torch.allclose(losses(scores, several), known)


def test_settings_as_they_are_written():
    settings = read_settings("finetune", {"steps": "0.5,0.75", "crop_scale": "[0.3, 1]"})
    assert settings.steps == (0.5, 0.75) and json.dumps(dataclasses.asdict(settings))
