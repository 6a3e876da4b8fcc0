"""Ranks find each other whoever started them and whatever else the environment says, say for whom they wait, and hold
few connections."""

from __future__ import annotations

import builtins
import ctypes
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401 (it makes the kind known)

from seer_scale import distributed, files, rendezvous
from seer_scale.cli import main
from seer_scale.errors import EXIT_STOPPED, RankError, StartStopped, UserError
from seer_scale.rank_info import RankInfo, detect, without_rank_variables
from seer_scale.training.stop import StopRequest
from tests.e2e.runs import recipe, until

# n ranks as forks of one process that has loaded torch: main(rank) returns what can be written as JSON
FORKS = """
import json, os, resource, sys
from pathlib import Path
import torch, torch.distributed as dist
torch.set_num_threads(1)
from seer_scale import distributed
folder = Path(sys.argv[1])

def ranks(size, main, **env):
    children = []
    for rank in range(size):
        read, write = os.pipe()
        if not (pid := os.fork()):
            here = dict(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
            os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size)) | here | env
            try:
                out = main(rank)
            except BaseException as error:
                out = f"{type(error).__name__}: {error}"
            os.write(write, json.dumps(out).encode())
            os._exit(0)
        os.close(write)
        children.append((pid, read))
    out = []
    for pid, read in children:
        os.waitpid(pid, 0)
        out.append(json.loads(os.read(read, 1 << 16)))
        os.close(read)
    return out

def sockets():
    files = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.readlink(file).startswith("socket:") for file in files if os.path.lexists(file))
"""


def forks(folder: Path, body: str, limit_s: float = 120.0) -> tuple[Any, str]:
    """What `body` leaves in `found`, and what was written to stderr. No rank outlives it, however it ends."""
    script = [sys.executable, "-c", FORKS + body + "\nprint(json.dumps(found))", str(folder)]
    with subprocess.Popen(script, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True) as parent:
        try:
            out, told = parent.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"ranks that should have ended have not in {limit_s:g} s")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)
    assert parent.returncode == 0, told
    return json.loads(out.splitlines()[-1]), told


def test_ranks_meet_and_hold_few_connections(tmp_path):
    """Connections grow with the logarithm of the ranks but for rank 0's store, over two groups on the host and the
    default one: a full mesh of each would be 3 (N - 1). An address left behind, one of another size, a name that is not
    known,
    MASTER_ADDR and other variables of another launcher are no obstacle, and other ranks' objects and errors arrive. The
    limit of open files is raised; one that is too low is told before anything is opened. All groups have one limit of
    time, a stop is agreed at one step, and a metric line costs one collective."""
    body = """
import signal
from seer_scale import rendezvous
from seer_scale.errors import UserError
from seer_scale.training import stop
from seer_scale.training import metric_window as window
stop.STOP_POLL_S = 0.0
own = rendezvous._own_addresses
rendezvous._own_addresses = lambda info: ["no-such-host.invalid", *own(info)]
left = {"hosts": ["127.0.0.1"], "port": 9, "size": 2, "token": "x"}
(folder / "rendezvous-0.0.0").write_text(json.dumps(left))

def main(rank):
    world = distributed.init(folder)
    world.barrier(); word = world.broadcast_object(f"word of {rank}"); everyone = world.gather_objects(rank)
    dist.all_reduce(torch.ones(1000))
    another = dist.new_group(backend="gloo"); dist.barrier(another)
    distributed.limit_groups(world)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = {world.store.timeout if soft == hard else 0}  # of what NCCL asks when it makes a communicator
    limits |= {g._get_backend(torch.device("cpu")).options._timeout for g in dist.distributed_c10d._world.pg_map}
    def fails(): raise UserError(f"{rank} cannot")
    try:
        world.from_main(fails)
    except UserError as error:
        said = str(error)
    counted = sockets()
    stopped, line = stops(world), metric_line(world)
    distributed.shutdown(world)
    return [counted, word, everyone, said, limits == {world.timeout}, stopped, line]

def stops(world):
    with stop.StopRequest() as request:
        for step in range(100_000):
            if step == 3 and rank_of_signal(world) == world.rank:
                os.kill(os.getpid(), signal.SIGUSR1)
            if told := request.stop_signal(world):
                return [step, told]
            dist.all_reduce(torch.ones(1))

def rank_of_signal(world):
    return world.size - 1

def metric_line(world):
    calls, reduce = [], dist.all_reduce
    dist.all_reduce = lambda *given, **how: calls.append(1) or reduce(*given, **how)
    w = window.MetricWindow(world, folder)
    window.newest_manifest = lambda _: 7 + world.rank
    w.loss_sum += world.rank; w.fingerprint = 2**52 - 1 - world.rank
    w.unreadable = ["x"] * world.rank; w.waited_s = 0.5 * world.rank
    means, counts = w.reduce({"watched": torch.full((2, 3), float(world.rank))})
    dist.all_reduce = reduce
    return [len(calls), float(means["loss_sum"]), means["watched"].tolist(), counts, w.waited_s, w.newest_manifest]

def few_files(rank):
    soft, hard = ((33, 4096), (33, 33), (33, 400), (33, 400))[rank]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        distributed.allow_open_files(*((0, 8), (3, 8), (0, 512), (3, 512))[rank])
    except UserError as error:
        assert not error.single_rank  # all ranks end with it
        raise
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
met = [ranks(n, main, MASTER_ADDR="192.0.2.1", MASTER_PORT="9", GROUP_RANK="3") for n in (2, 4, 8)]
found = [met, ranks(4, few_files)]
"""
    (found, (raised, small, first, other)), told = forks(tmp_path, body)
    assert "FutureWarning" not in told
    assert raised == 4096 and other == 400
    assert small.startswith("UserError: Rank 3 of 8 may open 33 files, but needs about ") and "ulimit -Hn" in small
    assert first.startswith("UserError: Rank 0 of 512 may open 400 files, but needs about ")
    for n, out in zip((2, 4, 8), found):
        counts, words, everyone, said, limited, stopped, lines = zip(*out)
        assert all(limited) and stopped == (stopped[0],) * n and stopped[0][1] == "SIGUSR1", out
        mean, fingerprint = (n - 1) / 2, (n * (2**52 - 1) - n * (n - 1) // 2) % 2**52
        assert lines == ([1, mean, [mean] * 6, [fingerprint, n * (n - 1) // 2], 0.5 * (n - 1), 7],) * n
        assert (
            set(words) == {"word of 0"} and set(said) == {"0 cannot"} and all(e == list(range(n)) for e in everyone)
        ), out
    most = [max(c for c, *_ in out[1:]) for out in found]
    assert max(b - a for a, b in zip(most, most[1:])) <= 6, most
    assert all(out[0][0] <= most[i] + n + 1 for i, (n, out) in enumerate(zip((2, 4, 8), found))), found
    assert not list(tmp_path.iterdir())


def test_what_keeps_one_rank_from_beginning_ends_all_before_any_takes_its_gpu(tmp_path, photos):
    """At once and with one sentence, whichever rank sees it: rank 0 the images, another its machine's GPUs, a limit of
    its own, or the recipe's needs. One whose peers never come says what is wrong with itself. (Stand-ins for GPUs.)"""
    recipe(tmp_path, photos)
    body = """
from seer_scale import rendezvous
from seer_scale.errors import UserError
from seer_scale.training import start
rendezvous.TELL_S = 1e6  # they stay until all know, not until then

def ending(rank, words, gpus=3, files=400, capability=(9, 0)):
    taken = []
    torch.cuda.is_available = lambda: gpus > 0
    torch.cuda.device_count = lambda: gpus
    torch.cuda.get_device_capability = lambda: capability
    torch.cuda.get_device_name = lambda: "an old GPU"
    torch.cuda.set_device = lambda device: taken.append(str(device))
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    try:
        given = ["--run.dir", str(folder / "run"), "--train.global_batch", "6", *words]
        start.run_training(str(folder / "tiny.yaml"), given)
    except UserError as error:
        return [str(error), error.single_rank, taken, error.retryable]

def alone(rank):
    start.Timeouts.of = lambda config: start.Timeouts(meet_s=0.2)
    return ending(rank, [], gpus=1)

found = [
    ranks(3, lambda rank: ending(rank, ["--data.path", str(folder / "nowhere")])),
    ranks(3, lambda rank: ending(rank, [], gpus=1 if rank == 2 else 3)),
    ranks(3, lambda rank: ending(rank, [], files=40 if rank == 1 else 400)),
    ranks(3, lambda rank: ending(rank, ["--train.precision", "bf16"], capability=(7, 0) if rank == 1 else (9, 0))),
    ranks(3, lambda rank: ending(rank, [], gpus=0 if rank == 1 else 3)),
    ranks(1, alone, RANK="2", LOCAL_RANK="2", WORLD_SIZE="3", LOCAL_WORLD_SIZE="3"),
]
"""
    found, _ = forks(tmp_path, body)
    sentences = [
        f"data.path is {tmp_path}/nowhere, but does not exist",
        " has 1 GPUs for 3 ranks",
        "Rank 1 of 3 may open 40 files",
        "no bf16",
        "would compute on c",
    ]
    for sentence, ends in zip([*sentences, sentences[1]], found):
        assert all(sentence in end[0] and end == ends[0] and not end[2] for end in ends), ends
    assert [ends[0][1] for ends in found] == [False] * 5 + [True]  # told once a machine, or by whom alone knows it
    assert [ends[0][3] for ends in found] == [False] + [True] * 5  # another machine may do: a launched run begins again
    assert not list(tmp_path.glob("run/logs/rendezvous-*"))


def test_on_gpus_the_default_group_is_nccl_alone(monkeypatch, tmp_path):
    """And all groups have one limit of time. (What is called, as there is no GPU here.)"""
    called = []
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "512")
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.append(("device", device.index)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    monkeypatch.setattr(distributed.World, "gather_objects", lambda world, mine: [mine])
    monkeypatch.setattr(distributed, "meet", lambda *_, **__: dist.HashStore())
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout, **_: called.append((backend, timeout)))
    monkeypatch.setattr(dist, "new_group", lambda ranks=None, *, backend, timeout: called.append((backend, timeout)))
    world = distributed.init(tmp_path)
    assert (
        called == [("device", 5), ("nccl", world.timeout), ("gloo", world.timeout)]
        and os.environ["TORCH_GLOO_LAZY_INIT"] == "1"
    )


def test_groups_are_of_the_default_groups_kind():
    """Whatever the device, as ranks that share a GPU use gloo."""
    # a kind that connects to nobody; another would wait in vain, for this long
    default = {"store": dist.HashStore(), "rank": 2, "world_size": 4, "timeout": timedelta(seconds=1)}
    dist.init_process_group("fake", **default)
    try:
        for device in ("cpu", "cuda"):
            world = distributed.World(2, 4, device=torch.device(device), timeout=default["timeout"])
            group = world.group("use", 2)
            assert dist.get_backend(group) == "fake" and dist.get_process_group_ranks(group) == [2, 3]
    finally:
        dist.destroy_process_group()


ALONE, SRUN = (
    {"PATH": "/"},
    {
        "SLURM_PROCID": "3",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "6",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    },
)
TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "env, expected",
    [
        (ALONE, RankInfo()),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}, RankInfo()),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, RankInfo()),  # a batch script, or a shell of salloc
        (TORCH, RankInfo(3, 4, 1, 2, "WORLD_SIZE")),
        (SRUN, RankInfo(3, 6, 1, 2, "SLURM_NTASKS")),
        (SRUN | {"SLURM_NODEID": "2"}, RankInfo(3, 6, 1, 1, "SLURM_NTASKS")),
        (
            SRUN | TORCH | {"TORCHELASTIC_RUN_ID": "none"},
            RankInfo(3, 4, 1, 2, "WORLD_SIZE"),
        ),  # torchrun on each node, by srun
        (SRUN | TORCH | {"SEER_SCALE_LAUNCHER": "local"}, RankInfo(3, 4, 1, 2, "WORLD_SIZE")),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1", "SEER_SCALE_LAUNCHER": "slurm"}, RankInfo(3, 6, 1, 2, "SLURM_NTASKS")),
        (
            SRUN | {"RANK": "3", "WORLD_SIZE": "6"},
            RankInfo(3, 6, 1, 2, "SLURM_NTASKS"),
        ),  # a script that sets what srun says
    ],
)
def test_who_numbers_this_rank(env, expected):
    assert detect(env) == expected
    if "SEER_SCALE_LAUNCHER" not in env:
        assert detect(without_rank_variables(env)) == RankInfo()


@pytest.mark.parametrize(
    "env, told",
    [
        (
            TORCH | {"RANK": "x"},
            "RANK is x, but must be a whole number; RANK and WORLD_SIZE say which rank of how many",
        ),
        (TORCH | {"WORLD_SIZE": "-4"}, "WORLD_SIZE is -4"),
        (TORCH | {"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        (TORCH | {"RANK": "4"}, "RANK is 4, but must be from 0 to 3, as WORLD_SIZE is 4"),
        (
            SRUN | {"SLURM_NTASKS": "many"},
            "SLURM_NTASKS is many, but must be a whole number; SLURM_PROCID and SLURM_NTASKS say",
        ),
        ({"RANK": "0"}, "RANK is 0, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "RANK is not set"),
        (
            SRUN | {"RANK": "0", "WORLD_SIZE": "1"},
            (
                "RANK is 0, but this is task 3 of the 6 that srun has started (SLURM_PROCID is 3); unset RANK and "
                "WORLD_SIZE"
            ),
        ),
        (
            SRUN | {"WORLD_SIZE": "1"},
            (
                "WORLD_SIZE is 1, but this is task 3 of the 6 that srun has started (SLURM_NTASKS is 6); unset "
                "WORLD_SIZE"
            ),
        ),
    ],
)
def test_variables_that_contradict_each_other_are_told(env, told):
    with pytest.raises(UserError) as error:
        detect(env)
    assert told in str(error.value), str(error.value)
    assert error.value.single_rank  # else no rank tells, as none knows that it is the first


@pytest.mark.parametrize(
    "env", [{"RANK": "3", "LOCAL_RANK": "3"}, SRUN | {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "8"}]
)
def test_a_rank_that_cannot_know_which_it_is_says_so(env, monkeypatch, capsys):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "demo"]) == 2
    assert "RANK is " in capsys.readouterr().err


@pytest.mark.parametrize("others", ["another", "one"])
def test_a_task_may_see_one_gpu_if_it_is_its_own(others, monkeypatch, tmp_path):
    """CUDA_VISIBLE_DEVICES=$SLURM_LOCALID for each task. (Stand-ins, as there is no GPU here.)"""
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "1"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(distributed, "meet", lambda *_, **__: dist.HashStore())
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "new_group", lambda *_, **__: None)
    compared = []
    monkeypatch.setattr(
        distributed.World,
        "gather_objects",
        lambda _, mine: compared.append(mine) or [mine if others == "one" else "node GPU-0", mine],
    )
    if others == "one":
        with pytest.raises(UserError, match="Ranks 0 and 1 have the same GPU"):
            distributed.init(tmp_path)
    else:
        assert distributed.init(tmp_path).device == torch.device("cuda", 0)
        with monkeypatch.context() as alone_on_its_node:  # compares with the others, who wait for it
            alone_on_its_node.setenv("LOCAL_RANK", "0")
            alone_on_its_node.setenv("LOCAL_WORLD_SIZE", "1")
            distributed.init(tmp_path)
        assert len(compared) == 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="has 1 GPUs for 2 ranks; start 1 a machine"):
        distributed._gpu_of(detect())


LATER = timedelta(days=1)


def test_waiting_is_told_and_ends(monkeypatch, tmp_path, capsys):
    """Rank 0 says who is missing, another what it cannot find; after the time that is given, or at a signal, they
    end."""
    monkeypatch.setattr(rendezvous, "TELL_S", 0.1)
    place = tmp_path / "logs" / "rendezvous"
    with pytest.raises(
        RankError,
        match=(
            r"Rank 0 of 3 \(SLURM_NTASKS is 3\) has waited \d+ s for the others: 1 of 3 are there, not yet 1, 2; "
            r"start all"
        ),
    ):
        rendezvous.meet(place, RankInfo(0, 3, 0, 3, "SLURM_NTASKS"), timeout_s=0.4, later=LATER)
    assert capsys.readouterr().err.count("not yet 1, 2.") >= 2
    asked = []
    monkeypatch.setattr(rendezvous, "_missing", lambda *_: asked.append(1) or "")
    wait = rendezvous._Wait(RankInfo(9, 512, 1, 8, "SLURM_NTASKS"), 60.0, lambda: None)
    wait._told_at -= 1.0
    wait.pause(lambda: rendezvous._missing(None, None))
    assert not asked  # a rank that prints nothing asks rank 0 nothing
    monkeypatch.undo()
    store = SimpleNamespace(add=lambda *_: 3)  # and one that prints asks how many, not each of them
    assert rendezvous._missing(store, RankInfo(8, 512, 0, 8, "SLURM_NTASKS")) == "3 of 512 are there"
    monkeypatch.setattr(rendezvous, "TELL_S", 0.1)
    told = {"1 of 2": "rank 0 does not answer at 127.0.0.1", "1 of 3": "rank 0 is one of 2 ranks"}
    place.write_text(json.dumps({"hosts": ["127.0.0.1"], "port": 9, "size": 2, "token": "x"}))
    for size in (2, 3):
        with pytest.raises(RankError, match=told[f"1 of {size}"]):
            rendezvous.meet(place, RankInfo(1, size, 1, size, "WORLD_SIZE"), timeout_s=0.2, later=LATER)
    place.unlink()
    with pytest.raises(UserError, match=f"rank 0 has not published its address in {place}"):
        rendezvous.meet(place, RankInfo(1, 2, 1, 2, "WORLD_SIZE"), timeout_s=0.1, later=LATER)
    for rank in (0, 1):
        with pytest.raises(StartStopped, match="Stopped by SIGHUP while ranks waited"):
            rendezvous.meet(
                place,
                RankInfo(rank, 2, rank, 2, "WORLD_SIZE"),
                timeout_s=60,
                later=LATER,
                asked_to_stop=lambda: "SIGHUP",
            )


def test_rank_0_ends_with_its_own_problem(monkeypatch, tmp_path):
    """What is wrong with the recipe, say; the first problem may be one machine's trouble alone. The others, and a rank
    0 without any, end with the first."""
    monkeypatch.setattr(rendezvous, "TELL_S", 0.0)  # nobody else is there to be told
    first, own = UserError("Rank 2 has no GPU"), UserError("There are no images")
    for rank, problem, told in ((0, own, own), (0, None, first), (1, own, first)):
        store = dist.HashStore()
        store.set("problem", pickle.dumps(first))
        store.set("go", "")
        for way in ("_serve", "_join"):
            monkeypatch.setattr(rendezvous, way, lambda *_, store=store: (store, ""))
        with pytest.raises(UserError) as ended:
            rendezvous.meet(
                tmp_path / "place", RankInfo(rank, 3, rank, 3, "WORLD_SIZE"), timeout_s=20, later=LATER, problem=problem
            )
        assert str(ended.value) == str(told)


def test_an_address_that_another_start_has_taken_over_is_none(tmp_path):
    """The port that a file left behind names may be another start's by now: it is not joined, nor counts this rank."""
    place = tmp_path / "place"
    others, _ = rendezvous._serve(place, RankInfo(0, 2, 0, 2, "WORLD_SIZE"))
    place.write_text(json.dumps(json.loads(place.read_text()) | {"token": "of an earlier start"}))
    with pytest.raises(RankError, match=f"rank 0 does not answer at 127.0.0.1, port {others.port}"):
        rendezvous.meet(place, RankInfo(1, 2, 1, 2, "WORLD_SIZE"), timeout_s=0.2, later=LATER)
    assert not others.check(["rank/1"])


def test_a_run_gives_groups_of_libraries_its_limit_of_time(tmp_path, photos, monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=7))
    limits, end = [], dist.destroy_process_group

    def read_and_end() -> None:
        limits.extend(g._get_backend(torch.device("cpu")).options._timeout for g in dist.distributed_c10d._world.pg_map)
        end()

    monkeypatch.setattr(dist, "destroy_process_group", read_and_end)
    try:
        words = [
            "train",
            recipe(tmp_path, photos, knn={"enabled": False}),
            "--run.dir",
            str(tmp_path / "run"),
            "--train.total_samples",
            "8",
        ]
        assert main(words) == 0
    finally:
        if dist.is_initialized():
            end()
    assert limits == [distributed.World().timeout]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_start(number, tmp_path, photos, monkeypatch, capsys):
    """While the other rank is waited for, which never comes."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def send() -> None:
        until(lambda: list(tmp_path.glob("run/logs/rendezvous-*")))
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    assert main(["train", recipe(tmp_path, photos), "--run.dir", str(tmp_path / "run")]) == EXIT_STOPPED
    assert (
        f"Stopped by {number.name} while ranks waited for each other, so nothing was begun." in capsys.readouterr().err
    )


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_was_ignored_at_the_start_stays_ignored(number):
    """As by nohup, or a script's `&`; also what came while a launcher had it blocked."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])
        signal.raise_signal(number)
        with StopRequest() as request:
            signal.raise_signal(number)
            assert request.asked() is None
            signal.raise_signal(signal.SIGTERM)
            assert request.asked() == "SIGTERM"
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_nothing_at_import_or_start_needs_linux(tmp_path, photos, monkeypatch, capsys):
    """Without what macOS has not: /proc, affinity, pidfd, memfd, the clock of the boot; nor sysv_signal, home and
    account."""
    for where, name in ((os, "sched_getaffinity"), (os, "pidfd_open"), (os, "memfd_create"), (time, "CLOCK_BOOTTIME")):
        monkeypatch.delattr(where, name)
    opened = io.open

    def without_proc(file, *given, **how):
        if str(file).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return opened(file, *given, **how)

    for where in (io, builtins):
        monkeypatch.setattr(where, "open", without_proc)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(name) if name else object())
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where there is no account
    words = [
        "train",
        recipe(tmp_path, photos, data={}, knn={"enabled": False}),
        "--run.dir",
        str(tmp_path / "run"),
        "--train.total_samples",
        "8",
    ]
    assert main(words) == 0, capsys.readouterr().err
    assert (
        main([*words, "--data.workers", "2"]) == 2
        and "data.workers is 2, but loader processes need Linux; nearest: 0." in capsys.readouterr().err
    )
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert files.cache_folder() == Path(tempfile.gettempdir()) / f"seer_scale-{os.getuid()}"
