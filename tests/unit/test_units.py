"""What engines are chosen by and cut: the 10B's units under a size, refusals before anything is built, auto."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seer_scale import parallel
from seer_scale.config import load_recipe, resolve
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, ConfigError, Problem, UserError
from seer_scale.methods.swav.method import SwAV
from seer_scale.parallel.units import compute_type, joined_units, matrix_numel, sharded_units
from seer_scale.training.start import read_recipe, resolve_given
from tests.tiny import RECIPE


def method_of(recipe: str, *overrides: str):
    config = resolve(load_recipe(recipe), ["--data.path", "-", *overrides], world_size=8)
    with torch.device("meta"):
        return SwAV(config, World()), config


@pytest.mark.parametrize(
    "recipe,total",
    [
        ("seer_regnety_128gf", 771e6),
        ("seer_regnety_256gf", 1.431e9),
        ("seer_regnety_10b", 9.629e9),
        ("seer_regnety_20b", 20.432e9),
        ("seer_regnety_40b", 40.396e9),
    ],
)
def test_no_gather_of_the_big_models_exceeds_the_size_and_nothing_is_left_out(recipe, total):
    """Totals: FACTS, with SEER's head and prototypes; of the last two the trunk's in test_regnet.py and that head."""
    method, config = method_of(recipe, "--parallel.sync_bn_group", "8")
    units = sharded_units(method, config)
    assert max(2 * matrix_numel(u) for u in units.values()) <= config.parallel.max_unit_gib * 2**30
    assert sum(map(matrix_numel, units.values())) == sum(p.numel() for p in method.parameters() if p.ndim > 1)
    assert abs(sum(p.numel() for p in method.parameters()) / total - 1) < 1e-3
    assert all(p.is_meta for p in method.parameters())


def test_a_layer_larger_than_the_size_is_named_with_the_size_it_needs():
    method, config = method_of("seer_regnety_10b", "--parallel.max_unit_gib", "1")
    with pytest.raises(
        UserError, match=r"max_unit_gib is 1, but backbone.s4.b1.conv3 .* 1.49 GiB in fp16; nearest: 1.49"
    ):
        sharded_units(method, config)
    method, config = method_of("seer_regnety_10b", "--parallel.max_unit_gib", "1.49")
    assert "backbone.s4.b1.conv3" in sharded_units(method, config)


@pytest.mark.parametrize("fp32, most, least", [("head", 0.07, 0), ("backbone.s2.b1", 2, 1024), ("backbone.s2", 2, 0)])
def test_what_is_declared_fp32_is_so_in_parts_and_beside_others(monkeypatch, fp32, most, least):
    """A unit that is cut into parts, one among those that are joined, and no more than is named."""
    own = SwAV.fp32_units.fget
    monkeypatch.setattr(SwAV, "fp32_units", property(lambda method: own(method) | {fp32}))
    given = ("--parallel.engine", "fsdp", "--parallel.max_unit_gib", str(most), "--parallel.min_unit_mib", str(least))
    method, config = method_of("seer_regnety_8gf", *given, "--parallel.sync_bn_group", "0")
    groups = joined_units(method, config)
    names = [name for group in groups for name in group]
    is_fp32 = {name: compute_type(name, method, config) == "fp32" for name in names}
    assert {n for n in names if is_fp32[n]} == {
        n for n in names if n.startswith((f"{fp32}.", "prototypes")) or n == fp32
    }
    assert all(len({is_fp32[name] for name in group}) == 1 for group in groups)
    assert len(groups) < len(names) or not least
    assert not most < 1 or sum(name.startswith("head.") for name in names) > 1


@pytest.mark.parametrize("least", [0, 1, 8, 64, 1024])
@pytest.mark.parametrize("recipe", ["seer_regnety_8gf", "seer_regnety_256gf", "seer_regnety_10b"])
def test_small_units_are_gathered_together(recipe, least):
    """In order, each once, never over the size, of one part of the model and one type; as large as asked for wherever
    the next one was of the same kind and would have fitted; and a unit that is alone where `least` is 0."""
    method, config = method_of(
        recipe, "--parallel.engine", "fsdp", "--parallel.min_unit_mib", str(least), "--parallel.sync_bn_group", "0"
    )
    groups = joined_units(method, config)
    assert {n: u for g in groups for n, u in g.items()} == sharded_units(method, config)
    assert [n for g in groups for n in g] == list(sharded_units(method, config))
    kinds = [{(n.split(".")[0], n in method.fp32_units) for n in g} for g in groups]
    assert all(len(kind) == 1 for kind in kinds)
    width = [4 if next(iter(g)) in method.fp32_units else 2 for g in groups]
    sizes = [w * sum(map(matrix_numel, g.values())) for w, g in zip(width, groups)]
    assert max(sizes) <= config.parallel.max_unit_gib * 2**30
    for i in range(len(groups) - 1):
        fits = (
            sizes[i] + width[i] * matrix_numel(next(iter(groups[i + 1].values())))
            <= config.parallel.max_unit_gib * 2**30
        )
        assert sizes[i] >= least * 2**20 or kinds[i] != kinds[i + 1] or not fits
        *before, last = groups[i].values()
        assert not before or width[i] * sum(map(matrix_numel, before)) < least * 2**20


@pytest.mark.parametrize(
    "words,sentence",
    [
        (
            ["--parallel.engine", "ddp", "--parallel.offload", "true"],
            "parallel.offload is true, but parallel.engine is ddp, which offloads nothing",
        ),
        (
            ["--parallel.engine", "fsdp", "--parallel.replicate_degree", "2", "--parallel.shard_degree", "3"],
            "with parallel.replicate_degree 2 takes 6 ranks, and there are 4; nearest: 2",
        ),
        (
            ["--parallel.engine", "fsdp", "--parallel.replicate_degree", "3"],
            "parallel.replicate_degree is 3, but must divide the number of ranks (4); nearest: 2",
        ),
        (["--parallel.engine", "zero2", "--parallel.replicate_degree", "2"], "has no mesh of replicas and shards"),
        (["--parallel.engine", "zero"], "parallel.engine is zero, but must be one of"),
        (["--parallel.activation_checkpoint", "every 0"], "nearest: every 1"),
        (["--parallel.activation_checkpoint", "units s1.b9"], "nearest: units s"),
        (["--parallel.activation_checkpoint", "[[1], [1]]"], "must have one list for each of the 4 stages"),
        (["--parallel.activation_checkpoint", "[[9], [], [], []]"], "nearest: [1]"),
        (
            ["--parallel.max_unit_gib", "0.000001", "--parallel.min_unit_mib", "0"],
            "parallel.max_unit_gib is 1e-06, but",
        ),
        (
            ["--parallel.max_unit_gib", "0.5", "--parallel.min_unit_mib", "600"],
            (
                "parallel.min_unit_mib is 600, but parallel.max_unit_gib 0.5 lets no more than 512 MiB be gathered "
                "together; nearest: 512."
            ),
        ),
        (
            ["--parallel.engine", "zero3", "--parallel.min_unit_mib", "4"],
            "parallel.min_unit_mib is 4, but has no effect without parallel.engine fsdp",
        ),
        (
            ["--train.min_loss_scale", "2"],
            "train.min_loss_scale is 2, but has no effect without train.precision fp16",
        ),
        (
            ["--parallel.engine", "ddp", "--parallel.ds_config", "x.json"],
            "parallel.ds_config is x.json, but has no effect without parallel.engine zero1",
        ),
        (["--parallel.engine", "zero3", "--parallel.ds_config", "nowhere.json"], "parallel.ds_config is nowhere.json"),
        (
            ["--parallel.engine", "zero4", "--parallel.offload", "true"],
            "parallel.engine is zero4, but must be one of",
        ),
        (["--train.total_samples", "64", "--train.total_samples", "128"], "--train.total_samples is given twice"),
        (["--train.micro_batch", "1", "--parallel.sync_bn_group", "1"], "leaves BatchNorm 1 image to normalise over"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_built(tmp_path, words, sentence):
    (tmp_path / "tiny.yaml").write_text(json.dumps(RECIPE))
    with pytest.raises(ConfigError) as problem:
        given = ["--data.path", str(tmp_path), "--data.kind", "folder", *words]
        resolve_given(read_recipe(str(tmp_path / "tiny.yaml"), given)[0], given, 4)
    assert sentence in str(problem.value), problem.value
    assert len(problem.value.problems) == 1, problem.value.problems


def ds_config_of(tmp_path: Path, engine: str, given: object, **parallel_keys) -> dict:
    (tmp_path / "ds.json").write_text(json.dumps(given))
    section = {"engine": engine, "ds_config": str(tmp_path / "ds.json")} | parallel_keys
    config = resolve(RECIPE, {"parallel": section}, world_size=4)
    return parallel.load("deepspeed.config").deepspeed_config(config, 4)


@pytest.mark.parametrize(
    "given,name,told",
    [
        ({"train_batch_size": 64}, "train_batch_size", "train.global_batch is 8"),
        ({"fp16": {"enabled": True}}, "fp16", "train.precision is fp32"),
        ({"optimizer": {"type": "Adam"}}, "optimizer", "optim.name is lars"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage", "parallel.engine is zero3"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer",
            "parallel.offload is False",
        ),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "zero_optimization.offload_param", "is no key"),
        ({"zero_optimization": {"sub_group_size": 1000}}, "zero_optimization.sub_group_size", "needs 1000000000000"),
        ({"zero_optimization": {"reduce_buket_size": 1000}}, "zero_optimization.reduce_buket_size", "is no key"),
        ({"gradient_clip": 1.0}, "gradient_clip", "is no key"),
        (
            {"zero_optimization": {"reduce_bucket_size": "big"}},
            "zero_optimization.reduce_bucket_size",
            "DeepSpeed says",
        ),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu", "train.micro_batch is 0"),
        ({"sparse_gradients": True}, "sparse_gradients", "is no key"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_recipe_is_refused_with_both_named(tmp_path, given, name, told):
    with pytest.raises(ConfigError) as error:
        ds_config_of(tmp_path, "zero3", given)
    (problem,) = error.value.problems
    value = given.get("zero_optimization", given)[name.rpartition(".")[2]]
    assert problem.key == f"{name} in {tmp_path / 'ds.json'}" and told in problem.rule
    assert problem.value in (value, NOTHING)


@pytest.mark.parametrize(
    "key,fix", [("reduce_buket_size", "reduce_bucket_size"), ("prefetch_bucket_size", "stage3_prefetch_bucket_size")]
)
def test_a_key_of_deepspeeds_that_is_none_is_told_the_nearest(tmp_path, key, fix):
    with pytest.raises(ConfigError) as error:
        ds_config_of(tmp_path, "zero3", {"zero_optimization": {key: 5}})
    assert error.value.problems[0].nearest == f"did you mean {fix}?"


def test_a_deepspeed_file_is_a_json_object(tmp_path):
    with pytest.raises(ConfigError) as error:
        ds_config_of(tmp_path, "zero3", [])
    (problem,) = error.value.problems
    assert problem.key == "parallel.ds_config" and problem.value == tmp_path / "ds.json"


def test_another_version_of_deepspeed_is_asked_for_what_is_used_of_it(tmp_path, monkeypatch):
    ds_config = parallel.load("deepspeed.config")
    ds_config_of(tmp_path, "zero2", {})
    moved = Problem("deepspeed 0.99: Engine.part", NOTHING, "is gone (used for this)", "pip install deepspeed")
    monkeypatch.setattr(ds_config, "moved_parts", lambda parts: [moved])
    ds_config_of(tmp_path, "zero2", {})  # one that was tested is not asked
    monkeypatch.setattr(ds_config.metadata, "version", lambda _: "0.99")
    monkeypatch.setattr(ds_config, "requirements", lambda: {"deepspeed": "deepspeed<0.20,>=0.19"})
    with pytest.raises(ConfigError) as error:
        ds_config_of(tmp_path, "zero2", {})
    assert error.value.problems == [moved]


def test_a_deepspeed_files_problems_are_told_together(tmp_path):
    (tmp_path / "ds.json").write_text(
        json.dumps(
            {
                "train_batch_size": 9,
                "fp16": {"enabled": True},
                "wibble": 1,
                "zero_optimization": {"stage": 3, "overlap_com": 1},
            }
        )
    )
    config = resolve(RECIPE, {"parallel": {"engine": "zero2", "ds_config": str(tmp_path / "ds.json")}}, world_size=4)
    with pytest.raises(ConfigError) as problem:
        parallel.load("deepspeed.config").deepspeed_config(config, 4)
    assert len(problem.value.problems) == 5


def test_a_deepspeed_file_may_say_what_the_recipe_says_and_keeps_the_shipped_rest(tmp_path):
    agrees = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    (tmp_path / "ds.json").write_text(json.dumps(agrees))
    config = resolve(
        RECIPE, {"parallel": {"engine": "zero2", "offload": True, "ds_config": str(tmp_path / "ds.json")}}, world_size=4
    )
    made = parallel.load("deepspeed.config").deepspeed_config(config, 4)
    assert made["zero_optimization"]["use_multi_rank_bucket_allreduce"] is False and made["train_batch_size"] == 8


def test_a_deepspeed_file_adds_what_the_recipe_does_not_say(tmp_path):
    ds_config = parallel.load("deepspeed.config")
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 77}, "prescale_gradients": True})
    )
    config = resolve(
        RECIPE, {"parallel": {"engine": "zero2", "offload": True, "ds_config": str(tmp_path / "ds.json")}}, world_size=4
    )
    made = ds_config.deepspeed_config(config, 4)
    zero = made["zero_optimization"]
    assert (
        zero["reduce_bucket_size"] == 77
        and zero["stage"] == 2
        and zero["offload_optimizer"]["device"] == "cpu"
        and made["prescale_gradients"]
    )


def test_a_precision_that_the_device_lacks_is_refused(monkeypatch):
    def refuses(*_, **__):
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")

    config = resolve(RECIPE, {"train": {"precision": "fp16"}, "parallel": {"device": "cpu"}})
    assert parallel.check_device(config) == []
    monkeypatch.setattr(torch.nn.functional, "conv2d", refuses)
    (problem,) = parallel.check_device(config)
    assert (problem.key, problem.value, problem.nearest) == ("train.precision", "fp16", ("fp32",))
    assert "this CPU" in problem.rule
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    for precision, have, refused in (
        ("fp16", (5, 2), True),
        ("fp16", (7, 0), False),
        ("bf16", (7, 5), True),
        ("bf16", (8, 0), False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda have=have: have)
        config = resolve(RECIPE, {"train": {"precision": precision}})
        assert bool(parallel.check_device(config)) == refused, (precision, have)


def test_auto_takes_ddp_while_it_fits_and_shards_beyond(monkeypatch):
    class Ranks(World):
        def gather_objects(self, value):
            return [value] * 4

    world = Ranks(size=4)
    method, config = method_of("seer_regnety_8gf", "--parallel.engine", "auto", "--parallel.sync_bn_group", "0")
    state = 12 * sum(p.numel() for p in method.parameters())
    for memory, engine in ((2.6 * state, "ddp"), (2.4 * state, "fsdp")):
        monkeypatch.setattr(parallel, "_memory", lambda _, memory=memory: memory)
        assert parallel.choose_engine(method, config, world) == engine
    assert parallel.choose_engine(method, config, World()) == "single"
    _, hsdp = method_of(
        "seer_regnety_8gf",
        "--parallel.engine",
        "auto",
        "--parallel.replicate_degree",
        "2",
        "--parallel.sync_bn_group",
        "0",
    )
    assert parallel.choose_engine(method, hsdp, world) == "fsdp"


def test_prototypes_count_in_fp32_whatever_the_precision():
    over = {
        "train": {"precision": "fp16"},
        "swav": {"embedding_dim": 256, "prototypes": [32]},
        "parallel": {"engine": "zero3", "max_unit_gib": 20_000 / 2**30},
    }
    config = resolve(RECIPE, over, world_size=2)
    with torch.device("meta"):
        method = SwAV(config, World())
    with pytest.raises(UserError) as error:
        sharded_units(method, config)  # 32 kB; in half precision they would fit
    (problem,) = error.value.problems
    assert problem.key == "parallel.max_unit_gib" and problem.nearest == 3.06e-05
    assert "prototypes.0" in problem.rule and "fp32" in problem.rule
