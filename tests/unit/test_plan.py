"""`seer-scale plan RECIPE`, and the launcher that asks it."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch.distributed as dist
import yaml
from torch import Tensor

from seer_scale.cli import main
from seer_scale.config import RECIPES, load_recipe, read_yaml, recipe_names, resolve
from seer_scale.formatting import memory_size, rough_duration
from seer_scale.methods.swav.method import SwAV
from seer_scale.plan import plan as plan_module
from seer_scale.plan import search
from seer_scale.plan.allocator import MIB, CachingAllocator, reserved
from seer_scale.plan.devices import DEVICES, load_device
from seer_scale.plan.memory import GIVES_BACK, KERNEL_WORKSPACE, Memory
from seer_scale.plan.time import milliseconds
from tests.tiny import RECIPE

GPUS = 4
HUGE = ["--swav.hidden", "[400000000]", "--parallel.engine", "ddp", "--gpus", "4", "--device", "v100-32gb"]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({k: v for k, v in RECIPE.items() if k != "data"}))
    return "tiny.yaml"


@pytest.fixture
def small_gpu(tmp_path):
    """A device on which no update fits beside what it takes itself; another name than the file's."""
    device = read_yaml(DEVICES, "devices")["h100"]
    taken = device["context_bytes"] + device["communicator_bytes"] + KERNEL_WORKSPACE
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(device | {"memory_bytes": taken + 2**19, "name": "tiny"}))
    return str(path)


def test_a_plan_says_what_memory_is_for_and_how_long_it_takes(recipe, capsys):
    words = ["plan", recipe, "--gpus", str(GPUS), "--device", "h200", "--price", "2", "--failures", "--stall", "5"]
    assert main([*words, "--parallel.engine", "fsdp", "--train.precision", "bf16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    memory, time = told["memory"], told["time"]
    assert memory["fits"] and memory["total"] == sum(memory["kinds"].values())
    assert memory["room"] == memory["capacity"] - memory["total"]
    assert {"parameters", "optimiser state", "activations", "views", "CUDA context"} <= set(memory["kinds"])
    assert time["low_s"] <= time["update_s"] <= time["high_s"] and time["updates"] == 20
    assert time["price"] == pytest.approx(2 * time["gpu_hours"]) and told["host_waits"] == []
    assert told["failures"]["stall_s"] == 5 and told["failures"]["days"] > time["days"]
    assert told["engine"] == "fsdp" and told["gpus"] == GPUS
    assert told["proved_ranks"] == [0, GPUS - 1] and told["collectives"]


def test_what_does_not_fit_is_said_and_fails(recipe, small_gpu, monkeypatch, capsys):
    """A recipe that is compiled is planned operation by operation, and says so."""
    monkeypatch.setattr(search, "smallest_change", lambda *asked: (None, [4, 8]))
    assert main(["plan", recipe, "--gpus", str(GPUS), "--device", small_gpu, "--train.compile", "true"]) == 1
    told = capsys.readouterr().out
    assert "does NOT fit, by" in told and "counted operation by operation" in told and "offload on 4, 8 GPUs" in told
    assert "hold less memory or more" in told


def test_the_change_that_fits_is_named_and_the_fastest_is_written(recipe, tmp_path, capsys):
    """Each is planned again as a user would, and takes what was said."""
    path = tmp_path / "between.yaml"

    def plan(memory_bytes: int, *words: str, recipe: str = recipe) -> tuple[int, dict]:
        path.write_text(yaml.safe_dump(read_yaml(DEVICES, "devices")["h100"] | {"memory_bytes": memory_bytes}))
        code = main(["plan", recipe, "--gpus", "1", "--device", str(path), "--json", *words])
        return code, json.loads(capsys.readouterr().out)

    wide = ["--model.w0", "64", "--model.wa", "96", "--train.global_batch", "1024", "--train.total_samples", "10240"]
    every = ["--parallel.activation_checkpoint", "every 1"]
    (_, most), (_, least) = plan(2**36, *wide), plan(2**36, *wide, *every)
    assert "smallest_change" not in most and least["memory"]["total"] < most["memory"]["total"]
    slack = most["memory"]["kinds"]["allocator slack"]
    code, told = plan(most["memory"]["total"] - slack // 2, *wide)
    assert code == 0 and told["smallest_change"] == {"environment": GIVES_BACK}  # nothing is searched
    between = least["memory"]["total"] + 2**20
    assert between < most["memory"]["total"] - slack
    code, told = plan(between, *wide)
    keys = told["smallest_change"]["keys"]
    assert code == int(told["memory"]["cannot_fit"]) and list(keys) == ["parallel.activation_checkpoint"]
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    code, changed = plan(between, *wide, *words)
    assert code == 0 and changed["memory"]["fits"] and changed["memory"]["total"] == told["smallest_change"]["total"]
    code, fitted = plan(between, *wide, "--fit")
    assert code == 0 and fitted["written"] == "tiny-1xbetween.yaml" and fitted["memory"]["fits"]
    code, again = plan(between, recipe=fitted["written"])
    assert code == 0 and again["memory"] == fitted["memory"] and again["time"] == fitted["time"]
    assert "path" not in (yaml.safe_load((tmp_path / fitted["written"]).read_text()).get("data") or {})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(search, "fit", lambda *asked: pytest.fail("was planned"))
        assert main(["plan", recipe, "--gpus", "1", "--device", str(path), "--fit"]) == 2
    assert "tiny-1xbetween.yaml is there already" in capsys.readouterr().err


def test_failures_of_a_plan_are_told_of_the_job_or_of_its_gpus(recipe, capsys):
    words = ["plan", recipe, "--gpus", str(GPUS), "--failures", "--json"]
    assert main([*words, "--mtbf-hours", "5"]) == 0
    by_job = json.loads(capsys.readouterr().out)["failures"]
    assert main([*words, "--gpu-hours", str(5 * GPUS)]) == 0
    assert json.loads(capsys.readouterr().out)["failures"] == by_job and by_job["mtbf_s"] == 5 * 3600


def test_what_is_planned_is_told_while_one_waits(recipe, capsys):
    """And the picture that was written; a rank of a CPU is no GPU."""
    words = ["plan", recipe, "--gpus", "2", "--parallel.engine", "ddp", "--device", "cpu", "--plot", "a.svg"]
    assert main(words) == 0
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        "seer-scale: planning ddp on 2 x cpu, 4 images at once, recomputed: none ...",
        "seer-scale: tracing the same update as the last rank, 1 ...",
    ]
    assert told.out.endswith("\nwritten: a.svg\n") and "\nmemory of a rank " in told.out and " rank-hours" in told.out


def waits(loss: Tensor) -> None:
    loss.detach().cpu()


def sums_in_half(loss: Tensor) -> None:
    dist.all_reduce(loss.detach().half())


def last_is_alone(loss: Tensor) -> None:
    if dist.get_rank() == GPUS - 1:
        dist.all_reduce(loss.detach().clone())


@pytest.mark.parametrize("fault,says", [
    (waits, "makes the host wait for the device"),
    (sums_in_half, "sums over ranks in float16"),
    (last_is_alone, rf"differ between ranks: the \d+th of rank 0 is .+, of rank {GPUS - 1} all-reduce of 4 B"),
])  # fmt: skip
def test_an_update_that_would_hang_or_wait_is_one_error(recipe, fault, says, monkeypatch, capsys):
    loss = SwAV.loss

    def faulty(self, *args, **kwargs):
        out = loss(self, *args, **kwargs)
        fault(out.loss)
        return out

    monkeypatch.setattr(SwAV, "loss", faulty)
    assert main(["plan", recipe, "--gpus", str(GPUS), "--parallel.engine", "ddp"]) == 2
    told = capsys.readouterr()
    assert re.search(says, told.err) and __file__ in told.err and not told.out


def test_what_was_shown_of_the_ranks_is_said(recipe, capsys):
    assert main(["plan", recipe, "--gpus", str(GPUS), "--parallel.engine", "ddp"]) == 0
    said = r"^proof +ranks 0 and 3 exchange the same \d+ collectives in one order; no wait of the host$"
    assert re.search(said, capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    "words,part",
    [
        (["--gpus", "3"], "--gpus is 3, but train.global_batch 8 does not divide among them; nearest: 2 or 4."),
        (["--device", "h300"], "did you mean h200?"),
        (["--out", "x.yaml"], "--out is x.yaml, but has no effect without --fit"),
        (["--fit", "--out", "nowhere/x.yaml"], "nowhere does not exist"),
        (["--stall", "3"], "--stall has no effect without --failures"),
        (["--failures", "--images-per-second", "5"], "--images-per-second is 5, but has no effect beside RECIPE"),
        (["--published"], "plan seer_regnety_128gf or seer_regnety_256gf"),
        (["--price", "-1"], "--price is -1, but must be a number of at least 0."),
        (["--train.lr", "1"], "train.lr is not a key"),
        (HUGE, "30.8 GiB of it for tensors, but its weights alone take"),
    ],
)
def test_bad_input_is_one_error_before_anything_is_traced(recipe, words, part, capsys):
    assert main(["plan", recipe, *words]) == 2
    told = capsys.readouterr()
    assert part in told.err and not told.out


def test_many_micro_batches_are_planned_from_a_few(monkeypatch):
    config = resolve(RECIPE, {"train": {"micro_batch": 1, "global_batch": 16}}, world_size=2)
    device = load_device("h100")
    few = plan_module.make_plan(config, 2, device)
    monkeypatch.setattr(plan_module, "TRACED", 8)
    whole = plan_module.make_plan(config, 2, device)
    assert (few.trace.config.num_micro_batches(2), whole.trace.config.num_micro_batches(2)) == (4, 8)
    assert few.memory.allocated == pytest.approx(whole.memory.allocated, rel=1e-3)
    assert few.memory.total == pytest.approx(whole.memory.total, rel=0.01)
    assert few.memory.kinds["loss"] == pytest.approx(whole.memory.kinds["loss"], rel=0.05)
    assert few.time.seconds == pytest.approx(whole.time.seconds, rel=1e-3)
    assert (few.time.images, few.time.flops) == (whole.time.images, whole.time.flops)


# ------------------------------------------------------------------------------------------------ the allocator


def test_segments_are_taken_as_cuda_s_allocator_takes_them():
    allocator = CachingAllocator(512)
    first = allocator.allocate(1000, 0)
    allocator.allocate(600_000, 0)
    assert first.nbytes == 1024 and allocator.reserved == 2 * MIB  # both of one small segment
    allocator.allocate(3 * MIB, 0)
    allocator.allocate(3 * MIB, 0)
    assert allocator.reserved == 22 * MIB  # both of one of 20 MiB
    own = allocator.allocate(11 * MIB, 0)
    assert allocator.reserved == 22 * MIB  # what is left of that one is large enough
    allocator.allocate(11 * MIB, 0)
    assert allocator.reserved == 34 * MIB  # in multiples of 2 MiB
    allocator.free(own, False, 0)
    allocator.allocate(11 * MIB, 1)
    assert allocator.reserved == 46 * MIB  # another stream's are its own
    allocator.allocate(11 * MIB, 0)
    assert allocator.reserved == 46 * MIB


def test_neighbours_that_are_free_are_one_block():
    allocator = CachingAllocator(512)
    blocks = [allocator.allocate(5 * MIB, 0) for _ in range(4)]
    for i in (0, 2, 1):
        allocator.free(blocks[i], False, 0)
    assert allocator.reserved == 20 * MIB
    allocator.allocate(15 * MIB, 0)
    assert allocator.reserved == 20 * MIB


def test_of_equal_blocks_the_first_is_taken():
    """Else what is reserved would be another each time."""
    allocator = CachingAllocator(512)
    blocks = [allocator.allocate(12 * MIB, 0) for _ in range(4)]
    for i in (2, 0, 3):
        allocator.free(blocks[i], False, 0)
    assert [allocator.allocate(12 * MIB, 0).at for _ in range(3)] == [blocks[i].at for i in (0, 2, 3)]


def test_what_is_reserved_is_that_of_updates_in_a_row():
    lasting, passing = object(), object()
    changes = [(lasting, 4 * MIB, 0, True), (passing, 30 * MIB, 0, True), (passing, 30 * MIB, 0, False)]
    assert reserved(changes, 512) == 50 * MIB


# ------------------------------------------------------------------------------------------------ the launcher


def launched(folder, gpu: str, *words: str) -> int:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "0.jpg").write_bytes(b"")
    (folder / "profile.yaml").write_text(yaml.safe_dump({"gpu": gpu, "gpus_per_node": 4}))
    start = ["launch", "tiny.yaml", "--cluster", "slurm", "--profile", "profile.yaml", "--nodes", "1", "--dry-run"]
    return main([*start, "--data.path", "images", *words])


def test_what_cannot_fit_is_not_submitted(recipe, small_gpu, tmp_path, capsys):
    assert launched(tmp_path, small_gpu) == 2
    assert "as planned; seer-scale plan --gpus 4" in capsys.readouterr().err
    assert launched(tmp_path, small_gpu, "--no-plan") == 0


def test_a_job_that_fits_without_slack_alone_gives_it_back(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Memory, "room", property(lambda memory: -memory.kinds["allocator slack"]))
    assert launched(tmp_path, "h100") == 0
    assert "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in capsys.readouterr().out


def test_the_value_that_was_given_for_a_device_is_named(recipe, small_gpu, capsys):
    large = ["--swav.hidden", "[10000]"]
    assert main(["plan", recipe, "--gpus", "4", "--device", small_gpu, "--parallel.engine", "fsdp", *large]) == 2
    said = capsys.readouterr().err
    assert f"--device {small_gpu} has" in said and "holds it" in said and "max_unit_gib" not in said


def test_both_readings_of_the_published_run_are_planned_where_asked(recipe, monkeypatch, capsys):
    planned = []
    tiny = plan_module.make_plan(resolve(RECIPE, world_size=1), 1, load_device("h100"))

    def planning(config, gpus, device):
        planned.append((config.model.name, gpus, device.name))
        return dataclasses.replace(tiny, config=config, gpus=gpus)

    monkeypatch.setattr(plan_module, "_plan", planning)
    monkeypatch.setattr(plan_module, "proved", lambda plan: plan)
    words = ["plan", "seer_regnety_256gf", "--gpus", "512", "--parallel.engine", "fsdp"]
    assert main([*words, "--published"]) == 0
    assert planned[:2] == [(name, 512, "v100-32gb") for name in ("regnety_128gf", "regnety_256gf")]
    said = capsys.readouterr().out
    assert said.count("SEER's 6,125 ms") == 2 and all(f"read as {name}" in said for name, *_ in planned[:2])
    assert main(words) == 0
    assert "--published plans that update under both readings" in capsys.readouterr().out and len(planned) == 4


def test_a_recipe_for_a_cpu_is_written_for_the_gpu_it_is_planned_for(recipe, tmp_path, capsys):
    words = ["plan", recipe, "--gpus", "1", "--device", "h100", "--parallel.device", "cpu"]
    assert main([*words, "--fit", "--out", "fitted.yaml"]) == 0
    assert yaml.safe_load((tmp_path / "fitted.yaml").read_text())["parallel"]["device"] == "auto"
    assert "parallel.device is cpu: h100 takes --parallel.device auto" in capsys.readouterr().out


def test_failures_of_a_run_are_bounded_by_it(recipe, capsys):
    """Which is shorter here than a save; as long a one as an hour then, and an interval that it has not."""
    assert main(["plan", recipe, "--failures", "--mtbf-hours", "100"]) == 0
    said = capsys.readouterr().out
    assert "its last checkpoint is enough" in said and "--checkpoint.every_samples 160" in said
    assert not re.search(r" 0 GPU-hours", said)
    long = ["--train.total_samples", "80000000", "--failures", "--json"]
    assert main(["plan", recipe, *long]) == 0
    told = json.loads(capsys.readouterr().out)["failures"]
    assert told["best_interval_s"]["ours"] < told["run_s"]
    assert main(["plan", recipe, *long, "--interval", f"{told['run_s'] + 1:.0f}"]) == 2
    assert "the whole run takes" in capsys.readouterr().err


def test_the_launcher_says_what_is_planned_and_auto_takes_its_engine(recipe, tmp_path, capsys):
    assert launched(tmp_path, "h100", "--parallel.engine", "auto") == 0
    assert "Planned for 4 ranks: ddp, " in capsys.readouterr().out


PLANNED = [name for name in recipe_names() if "seer-scale plan" in (RECIPES / f"{name}.yaml").read_text()]


def test_every_large_recipe_s_head_has_its_plan():
    assert {name for name in recipe_names() if load_recipe(name)["parallel"]["ranks"] > 8} == set(PLANNED)


@pytest.mark.parametrize("name", [
    name if name == "seer_regnety_8gf" else pytest.param(name, marks=pytest.mark.long) for name in PLANNED
])  # fmt: skip
def test_the_head_of_a_recipe_says_what_is_planned(name):
    """To two percent, or one of its unit: a plan moves a little with every operation."""
    head = " ".join(re.findall(r"^# (.*)", (RECIPES / f"{name}.yaml").read_text(), re.MULTILINE))
    ranks = load_recipe(name)["parallel"]["ranks"]
    device = re.findall(rf"\(seer-scale plan {name} --gpus {ranks} --device (\S+)\): ", head)[0]
    config = resolve(load_recipe(name), ["--data.path", "-"], world_size=ranks)
    plan = plan_module.make_plan(config, ranks, load_device(device))
    time, samples = plan.time, config.train.total_samples
    took = f"{milliseconds(time.seconds)} an update, {samples / 1e9:.3g} billion images in "
    planned = f"{memory_size(plan.memory.total)} a GPU, {took}{rough_duration(86400 * time.days(samples))}, "
    planned += f"{time.gpu_hours(samples):,.0f} GPU-hours"
    said = re.search(rf"--device {device}\): (.*? GPU-hours)\.", head)[1]
    said = re.sub(r" of [\d.]+ GiB \(it fits only.*?\)", "", said)
    of_plan, of_head = (re.split(r"([\d.,]*\d)", text) for text in (planned, said))
    assert of_head[::2] == of_plan[::2], (said, planned)
    for there, here in zip(of_head[1::2], of_plan[1::2], strict=True):
        assert float(there.replace(",", "")) == pytest.approx(float(here.replace(",", "")), rel=0.02, abs=1), said
    assert f"{samples / 1e9:.3g} billion images" in said
    assert ("fits only as the allocator gives back its slack" in head) == (not plan.memory.fits)
