"""Recipes: precedence, every problem at once and in full, and shipped recipes that hold."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import yaml

from seer_scale.cli.train import help_of_train
from seer_scale.config import RECIPES, Config, all_keys, as_asked, load_recipe, recipe_names, resolve, settings_classes
from seer_scale.errors import NOTHING, ConfigError, Problem, UserError
from seer_scale.models.registry import backbone_names, build_backbone
from seer_scale.training.resume import changes

SMALL = {"data": {"path": "images"}, "train": {"total_samples": 640, "global_batch": 64}, "swav": {"prototypes": [30]}}


def problems(given: dict, overrides: list[str] = (), **options) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        resolve(given, overrides, **options)
    return caught.value.problems


def test_problems_reach_another_process_whole():
    for error in (ConfigError(["one", "t\nwo"], "The profile"), UserError("one", "two")):
        error.is_local = True
        there = pickle.loads(pickle.dumps(error))
        assert type(there) is type(error) and str(there) == str(error) and vars(there) == vars(error)
    assert str(pickle.loads(pickle.dumps(ConfigError(["one"], "It")))) == "It has 1 problem:\n  - one"


def test_defaults_below_recipe_below_command_line():
    given = SMALL | {"optim": {"momentum": 0.8, "trust_coefficient": 0.01}}
    optim = resolve(given, ["--optim.trust_coefficient", "0.02", "--optim.weight_decay=0"]).optim
    assert (optim.lr, optim.momentum, optim.trust_coefficient, optim.weight_decay) == (0.3, 0.8, 0.02, 0.0)


@pytest.mark.parametrize("word, number", [("1e-6", 1e-6), ("1.0e-6", 1e-6), ("1E6", 1e6), ("3", 3.0), (".5", 0.5)])
def test_numbers_as_people_write_them(word, number):
    given = SMALL | yaml.safe_load(f"optim: {{weight_decay: {word}}}")
    assert (
        resolve(given).optim.weight_decay == resolve(SMALL, ["--optim.weight_decay", word]).optim.weight_decay == number
    )
    assert resolve(SMALL, ["--train.total_samples", "1e6"]).train.total_samples == 1_000_000


def test_text_stays_text():
    assert resolve(SMALL, ["--data.path", "1e6", "--run.dir", "007"]).data.path == "1e6"
    assert resolve(SMALL, ["--run.dir", "007"]).run.dir == "007"


@pytest.mark.parametrize(
    "override, key, value, nearest, words",
    [
        ("--train.global_batch=0", "train.global_batch", 0, "", "at least 1"),
        ("--train.global_batch=2.5", "train.global_batch", 2.5, "", "a whole number"),
        ("--optim.lr=.inf", "optim.lr", float("inf"), "", "finite"),
        ("--optim.lr=fast", "optim.lr", "fast", "", "a number"),
        ("--optim.lr=", "optim.lr", "", "", "a number"),
        ("--optim.name=adam", "optim.name", "adam", "did you mean adamw?", "lars, sgd, adamw"),
        ("--optim.learning_rate=1", "optim.learning_rate", NOTHING, "did you mean optim.lr_batch?", "is not a key"),
        ("--optim.momentun=1", "optim.momentun", NOTHING, "did you mean optim.momentum?", "is not a key"),
        ("--optim.global_batch=1", "optim.global_batch", NOTHING, "did you mean train.global_batch?", "is not a key"),
        ("--views=3", "views", 3, "", "a section of keys"),
        ("--parallel.sync_bn_group=3", "parallel.sync_bn_group", 3, 2, "divide the number of ranks (4)"),
        ("--train.global_batch=66", "train.global_batch", 66, (64, 68), "divide evenly among the ranks (4)"),
        ("--swav.prototypes=[3000]", "swav.prototypes", 3000, 256, "at most 4 times as many"),
        ("--swav.queue=100", "swav.queue", 100, 128, "a multiple of train.global_batch (64)"),
        ("--parallel.replicate_degree=3", "parallel.replicate_degree", 3, 2, "divide the number of ranks (4)"),
        ("--parallel.engine=single", "parallel.engine", "single", "use ddp or fsdp", "4 ranks"),
        ("--views.jitter=[0.4, 0.4]", "views.jitter", [0.4, 0.4], "", "needs 4 values"),
        ("--views.crops=[{size: 4}]", "views.crops[0].size", 4, "", "at least 8"),
        ("--views.crops=[{size: [160, 4]}]", "views.crops[0].size", [160, 4], "", "at least 8"),
        ("--views.crops=[{size: [160, 224, 3]}]", "views.crops[0].size", [160, 224, 3], "", "needs 2 values"),
        ("--views.crops=[{size: 160x224}]", "views.crops[0].size", "160x224", "", "a whole number"),
        ("--views.crops=[{num: 2, blur_p: [1, 0.1, 0]}]", "views.crops[0].blur_p", [1.0, 0.1, 0.0], [1.0, 0.1],
         "a value for each crop of the kind, whose num is 2"),
        ("--views.crops=[{solarize_p: [0, 1.2]}]", "views.crops[0].solarize_p", [0, 1.2], "", "at most 1"),
        ("--views.crops=[{jitter: [0, 0, 0, 0.6]}]", "views.crops[0].jitter", [0.0, 0.0, 0.0, 0.6],
         [0.0, 0.0, 0.0, 0.5], "at most 0.5"),
        ("--views.crops=[{blur_sigma: [2, 1]}]", "views.crops[0].blur_sigma", [2, 1], [1.0, 2.0], "small to large"),
        ("--views.crops=[{num: x, blur_p: [1, 0, 1]}]", "views.crops[0].num", "x", "", "a whole number"),
        ("--views.blur_p=dinov2_release", "views.blur_p", "dinov2_release", "did you mean dinov2_released?",
         "must be a number, or one of dinov2_published, dinov2_released"),
        ("--views={blur_p: dinov2_published, crops: [{num: 3}]}", "views.blur_p", "dinov2_published",
         "give that 2, or numbers, of which each kind may have its own", "a first kind of 2 crops"),
        ("--views={jitter_p: 0.1, crops: [{jitter_p: 0.3}]}", "views.jitter_p", 0.1, "remove it, or give that",
         "no effect without a kind of views.crops that has no jitter_p of its own"),
        ("--views.blur_sigma=[2, 1]", "views.blur_sigma", [2, 1], [1.0, 2.0], "from small to large"),
        ("--model.depth=9", "model.name", "regnety_8gf", "use model.name regnety, or give --model.depth null", "fixed"),
        ("--schedule.warmup_samples=1000", "schedule.warmup_samples", 1000,
         "nearest: 640, or less, as in --schedule.warmup_samples 64", "640 samples"),
        ("--schedule.decay_samples=5", "schedule.decay_samples", 5, 320, "the warm-up alone takes 320"),
        ("--views.crops=[{size: 64}, {size: [64, 64]}]", "views.crops", [64, (64, 64)],
         "give kinds of one size one entry", "size"),
        ("--views.crops=[]", "views.crops", [], "nearest: [{num: 2}]", "at least one kind"),
        ("--views.jitter=[0, 0, 0, 0.6]", "views.jitter", [0.0, 0.0, 0.0, 0.6], [0.0, 0.0, 0.0, 0.5], "at most 0.5"),
        ("--schedule.name=plateau", "schedule.plateau_samples", 0, 64, "a window needs at least one update"),
        ("--checkpoint.resume=x", "checkpoint.resume", "x", "give one", "checkpoint.init_from is given, too"),
        ("--optim.lr=2020-99-99", "--optim.lr", "2020-99-99", "such as 3, 0.1, true or [1, 2]", "must be a YAML value"),
        ("--method.name=swaw", "method.name", "swaw", "did you mean swav?", "must be one of"),
    ],
)  # fmt: skip
def test_a_problem_is_key_value_rule_and_fix(override, key, value, nearest, words):
    more = {"decay": ["--schedule.warmup_samples=320"], "resume": ["--checkpoint.init_from=y"]}
    (found,) = problems(
        SMALL, [override, *(w for k, words in more.items() if k in override for w in words)], world_size=4
    )
    assert (found.key, found.value, found.nearest) == (key, value, nearest) and words in found.rule
    text = str(found)
    assert text.startswith(key) and text.endswith((".", "?")) and "\n" not in text and words in text


def test_all_problems_at_once():
    def above(config: Config) -> list[Problem]:
        return [Problem("model.name", NOTHING, "is one of a room above")]

    words = ["--optim.lr", "-1", "--nonsense.key", "1", "alone", "--train.precision", "fp8", "--swav.queue"]
    found = problems({"train": {"global_batch": 10}}, words, world_size=4, extra_checks=above)
    assert sorted(p.key for p in found) == sorted(
        ("optim.lr", "nonsense", "alone", "train.precision", "--swav.queue", "train.total_samples", "data.path",
         "swav.prototypes", "train.global_batch", "model.name")
    )  # fmt: skip


def test_of_what_could_not_be_read_no_rule_is_told_to_be_broken():
    """Defaults stand in for it: swav.prototypes 16000 would be too many for 64 images, 64 for 3 ranks too few."""
    given = {"data": {"path": "-"}, "train": {"total_samples": 640, "global_batch": "x"}, "swav": {"prototypes": [30]}}
    assert [p.key for p in problems(given, world_size=3)] == ["train.global_batch"]
    given = {"data": {"path": "-"}, "train": {"total_samples": 640, "global_batch": 64}, "swav": {"prototypes": "x"}}
    assert [p.key for p in problems(given, world_size=4)] == ["swav.prototypes"]


def test_round_trip():
    words = ["--swav.prototypes=[20, 30]", "--model.name=regnety", "--model.depth=5"]
    config = resolve(SMALL, [*words, "--views.crops=[{size: [160, 224]}, {size: 96}]"])
    assert [crop.shape for crop in config.views.crops] == [(160, 224), (96, 96)]
    assert resolve(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_kinds_of_crops_round_trip_with_the_keys_that_they_give():
    words = ["--views.crops=[{blur_p: [1, 0.1], jitter: [0.4, 0.4, 0.2, 0.1]}, {num: 8, size: 96, solarize_p: 0.3}]"]
    config = resolve(SMALL, words)
    assert resolve(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    first, second = config.to_dict()["views"]["crops"]
    assert first["blur_p"] == [1.0, 0.1] and "blur_p" not in second and "jitter" not in second


@pytest.mark.parametrize(
    "name, blurs", [("dinov2_published", [1.0, 0.1, 0.5, 0.5]), ("dinov2_released", [0.0, 0.9, 0.5, 0.5])]
)
def test_published_blurs_by_name(name, blurs):
    """Of DINOv2's paper and of its code, whose GaussianBlur(p) keeps the image with probability p."""
    crops = "--views.crops=[{num: 2}, {num: 1, size: 98}, {num: 1, size: 64}]"
    config = resolve(SMALL, [f"--views.blur_p={name}", crops])
    assert [how.blur_p for kind in config.views.photometric for how in kind] == blurs
    assert resolve(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_none_is_a_value_as_the_help_writes_it():
    assert resolve(SMALL, ["--model.depth", "none", "--model.w0", "null", "--data.workers", "none"]) == resolve(SMALL)
    assert problems(SMALL, ["--train.global_batch", "none"]) == [
        Problem("train.global_batch", "none", "must be a whole number")
    ]


def test_hints_are_told_once():
    assert problems(SMALL, ["--swav.prototypes", "12,13"]) == [
        Problem("swav.prototypes", "12,13", "must be a list, as in [12,13]")
    ]
    (told,) = map(str, problems(SMALL, ["--parallel.engine", "qqq"]))
    assert told.count("ddp") == 1 and told.endswith(".")
    assert problems(SMALL, ["--parallel.engine", "ddq"])[0].nearest == "did you mean ddp?"


def test_recipes_that_are_none(tmp_path):
    with pytest.raises(UserError) as caught:
        load_recipe("cifar_laptob")
    assert caught.value.problems[0].nearest == "did you mean cifar_laptop?"
    (tmp_path / "a.yaml").write_text("train: [")
    with pytest.raises(UserError, match=r"a\.yaml is not YAML: line 1, column 9: while parsing [^\n^]*, expected"):
        load_recipe(str(tmp_path / "a.yaml"))
    (tmp_path / "c.yaml").write_text("train: {total_samples: 1}\ntrain: {global_batch: 2}\n")
    with pytest.raises(UserError, match="has train twice"):
        load_recipe(str(tmp_path / "c.yaml"))
    (tmp_path / "b.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="must hold sections"):
        load_recipe(str(tmp_path / "b.yaml"))


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_holds(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    head = re.match(r"(#.*\n)+", text)
    assert head, "a recipe begins with a comment"
    command = next(line for line in head[0].splitlines() if name in line)
    assert "seer-scale train" in command or "seer-scale launch" in command
    assert re.search(r"^# Cost: ", head[0], re.M) and re.search(r"^# (Should reach|Reached): ", head[0], re.M)
    given = load_recipe(name)
    config = resolve(given, ["--data.path", "images"])
    assert config.parallel.ranks == (given.get("parallel") or {}).get("ranks", 1)
    assert resolve(config.to_dict()) == config


def test_help_names_every_key():
    lines = help_of_train().splitlines()
    for key, kind, _, meaning in all_keys():
        row = lines.index(f"  --{key} {kind}")
        assert meaning and meaning in lines[row + 1]
    assert "        blur_p float | [float, ...]: one, or a list of one for each crop" in help_of_train()
    assert "        size int | [int, int]: in pixels: the side of a square, or [height, width]" in help_of_train()
    assert "  --views.blur_p float | dinov2_published | dinov2_released" in lines
    assert {k.split(".")[0] for k, *_ in all_keys()} == {*Config().sections(), *settings_classes()}


def test_what_would_have_no_effect_is_refused():
    """Rule 7: nothing given is ever silently ignored."""
    for key, value, need in (
        ("optim.trust_coefficient", "0.5", "optim.name lars"),
        ("optim.betas", "[0.1, 0.2]", "optim.name adamw"),
        ("schedule.plateau_factor", "0.1", "schedule.name plateau"),
        ("swav.queue_from_samples", "64", "a swav.queue"),
        ("parallel.reshard_after_forward", "false", "parallel.engine fsdp"),
    ):
        words = ["--data.path", "-", "--optim.name", "sgd", "--parallel.engine", "ddp", f"--{key}", value]
        with pytest.raises(ConfigError) as problem:
            resolve(load_recipe("photos_laptop"), words, world_size=1)
        assert len(problem.value.problems) == 1 and key in str(problem.value) and need in str(problem.value)


def test_a_short_hang_s_needs_no_loader_processes():
    given = load_recipe("photos_laptop") | {"run": {"hang_timeout_s": 60}}
    with pytest.raises(ConfigError, match="run.hang_timeout_s is 60"):
        resolve(given, {"data": {"path": "-", "workers": 1}})
    assert resolve(given, {"data": {"path": "-", "workers": 0}}).run.hang_timeout_s == 60


def test_a_run_ends_with_a_whole_batch():
    for samples, batch, seen, end in (
        (1000, 256, 0, 1024),
        (1024, 256, 0, 1024),
        (1000, 96, 512, 1088),
        (1000, 256, 1024, 1024),
        (5, 256, 0, 256),
    ):
        words = [
            "--data.path",
            "-",
            "--train.total_samples",
            str(samples),
            "--train.global_batch",
            str(batch),
            "--swav.prototypes",
            "[20]",
        ]
        config = resolve({"views": {"crops": [{"num": 2, "size": 32}]}}, words)
        assert config.end(seen) == end


def test_a_section_is_not_offered_as_a_key():
    with pytest.raises(ConfigError) as caught:
        resolve(load_recipe("photos_laptop"), ["--data.path", "-", "--swvav.dim", "3"])
    assert "swvav is not a key; did you mean the section swav, with its keys hidden, embedding_dim, " in str(
        caught.value
    )


def test_labelled_images_of_a_shipped_recipe_go_with_its_own(tmp_path):
    given, other = load_recipe("demo"), {"data": {"path": "mine"}}
    assert as_asked("demo", given, {"knn": {"k": 3}}) == (given, "")
    assert as_asked("my/demo.yaml", given, other) == (given, "")
    found, note = as_asked("demo", given, other)
    assert "queries" not in found["knn"] and found["knn"]["size"] == given["knn"]["size"] and "queries" in given["knn"]
    assert note == "knn.queries of the recipe demo go with its own images, and are left out as data.path names others."
    assert as_asked("demo", given, other | {"knn": {"queries": "yours"}}) == (given, "")
    given = load_recipe("photos_laptop")
    found, note = as_asked("photos_laptop", given, {"model": {"name": "timm/resnet50"}})
    assert "name" in found["model"] and len(found["model"]) == 1 and found["data"] == given["data"]
    assert note.startswith("model.depth and model.w0 and ") and note.endswith(
        "are left out as model.name names another."
    )
    assert as_asked("photos_laptop", given, {"model": {"name": "regnety", "depth": 6}}) == (given, "")


@pytest.mark.parametrize("name", ["demo", "my/demo.yaml"])
@pytest.mark.parametrize("share", [None, 0.25])
def test_a_warm_up_of_the_command_line_is_bounded_by_its_own_share_alone(name, share):
    given = load_recipe("demo")
    over = {"schedule": {"warmup_samples": 64} | ({"warmup_share": share} if share else {})}
    over |= {"train": {"total_samples": 192}, "data": {"path": "."}}
    found, note = as_asked(name, given, over)
    assert resolve(found, over).warmup_samples == (48 if share else 64) and given == load_recipe("demo")
    assert ("schedule.warmup_share of the recipe" in note) == (not share)
    found, _ = as_asked(name, given, {"train": {"total_samples": 192}})
    assert resolve(found, {"train": {"total_samples": 192}}).warmup_samples == 19


def test_only_what_changes_training_is_a_change(tmp_path, monkeypatch):
    """Between a checkpoint's recipe, as its JSON holds it, and a new start's."""
    monkeypatch.chdir(tmp_path)
    config = resolve(load_recipe("photos_laptop"), ["--data.path", "images"])
    then = json.loads(json.dumps(config.to_dict()))
    del then["run"]["hang_timeout_s"], then["train"]["compile"], then["views"]["solarize_p"]  # before these keys
    then["schedule"]["gone"] = 1
    words = ["--run.dir", "elsewhere", "--checkpoint.resume", "x", "--checkpoint.keep_last", "2"]
    for path in ("images", "./images/", str(tmp_path / "images")):
        assert changes(then, resolve(load_recipe("photos_laptop"), ["--data.path", path, *words])) == []
    now = resolve(
        load_recipe("photos_laptop"), ["--data.path", "others", "--optim.lr", "0.5", "--train.compile", "true", *words]
    )
    assert changes(then, now) == [
        ("data.path", "images", "others"),
        ("optim.lr", config.optim.lr, 0.5),
        ("train.compile", False, True),
    ]
    assert str(changes(then, now)[0]) == 'data.path "images" -> "others"'


def test_an_unknown_backbone_names_those_there_are():
    for name in ("resnet50", "vit_b"):
        with pytest.raises(UserError) as caught:
            build_backbone(name)
        assert all(known in str(caught.value) for known in backbone_names())
