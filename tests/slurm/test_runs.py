"""Runs of RegNetY and SwAV on a real SLURM: stopped, preempted, cut off, on other numbers of ranks, and still the same
run."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from seer_scale.launch.job import Job
from tests.e2e.runs import ROOT, assert_same_path, events, reaches, recipe, run, steps
from tests.slurm.virtual_cluster import Cluster

PROFILE = {
    "partition": "main", "time": 20, "gpus_per_node": 0, "ranks_per_node": 2, "grace_s": 60,
    "environment": {"OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"},
}  # fmt: skip


class Runs:
    """The launcher in a folder of its own, with the lab's SLURM."""

    def __init__(self, cluster: Cluster, folder: Path, photos: Path):
        self.cluster, self.folder = cluster, folder
        self.recipe = recipe(folder, photos)
        self.profile()

    def profile(self, **changes: object) -> None:
        (self.folder / "lab.yaml").write_text(yaml.safe_dump(PROFILE | changes))

    def launch(self, *words: object, status: int = 0, path: str = "", tool: str = "launch.py") -> str:
        env = self.cluster.env | ({"PATH": path} if path else {})
        command = [sys.executable, ROOT / "tools" / tool, *words]
        done = subprocess.run(
            list(map(str, command)), cwd=self.folder, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status and "Traceback" not in done.stderr, (
            f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
        return done.stdout + done.stderr

    def submit(self, name: str, *words: object) -> str:
        """The job's number."""
        said = self.launch(self.recipe, "--cluster", "slurm", "--profile", "lab.yaml", "--name", name, *words)
        return said.partition(f"Submitted {name} as job ")[2].split()[0]

    def place(self, name: str) -> Path:
        return self.folder / "runs" / name

    def until(self, what: str, name: str, condition, seconds: float = 90) -> None:
        self.cluster.until(condition, seconds, what, self.place(name) / "logs")

    def until_ended(self, name: str, job: str, state: str = "COMPLETED", seconds: float = 150) -> None:
        self.until(f"{name} was {state}", name, lambda: self.cluster.job(job)["JobState"] == state, seconds)

    def begins(self, name: str) -> list[dict]:
        path = self.place(name) / "launch" / "attempts.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["event"] == "begin"]

    def starts(self, name: str) -> list[dict]:
        """Of each start of the job the last begin: what SLURM wanted to end on a node that was gone it ends when that
        node is back, though the job has begun anew since; it begins again by itself then."""
        return list({line["attempt"].rpartition(".")[0]: line for line in self.begins(name)}.values())


@pytest.fixture
def lab(cluster, tmp_path, photos) -> Runs:
    return Runs(cluster, tmp_path, photos)


def test_killed_stopped_and_cut_off_it_is_the_same_run(lab, straight):
    """2 x 2 ranks: kill -9 of one -> started again in the job; USR2 -> saved -> requeued; a node's power cut ->
    requeued on what is left; the same losses and images."""
    job, place = lab.submit("cut", "--nodes", 2), lab.place("cut")

    lab.until("it was on its way", "cut", reaches(place, 24))
    ranks = [int(p.name) for p in Path("/proc").glob("[0-9]*") if _is_rank(p, place)]
    assert len(ranks) == 4
    os.kill(max(ranks), 9)
    lab.until("it had begun again", "cut", lambda: len(lab.begins("cut")) == 2 and events(place, "resume"))
    assert lab.cluster.job(job)["Restarts"] == "0" and lab.begins("cut")[0]["nodes"] == lab.begins("cut")[1]["nodes"]
    lab.cluster.run("scancel", "--signal=USR2", job)
    lab.until(
        "it was back from the queue", "cut", lambda: len(lab.starts("cut")) == 2 and len(events(place, "resume")) >= 2
    )
    (stop,) = events(place, "stop")
    assert "Stopped by SIGUSR2" in stop["text"] and f"samples-{stop['samples_seen']:012d}" in stop["text"]
    assert events(place, "resume")[1]["samples_seen"] == stop["samples_seen"]
    lab.until("it went on", "cut", lambda: max(steps(place)) > stop["samples_seen"] + 24)
    lab.cluster.kill_node(lab.cluster.job(job)["BatchHost"])
    lab.until_ended("cut", job)
    first, second, third = lab.starts("cut")
    assert first["nodes"] == second["nodes"] != third["nodes"] and all(b["ranks"] == 4 for b in lab.begins("cut"))
    assert_same_path(place, straight)
    said = lab.launch("status", "cut")
    assert "cut: done" in said and "4 ranks" in said and "160 samples saved" in said
    said = lab.launch("logs", "cut")
    assert "Starting the ranks again, from the checkpoint at" in said and "Done: 160 samples" in said
    found = json.loads(
        subprocess.run(
            [sys.executable, "-m", "seer_scale.cli", "inspect", place, "--json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert len(found["attempts"]) >= 4 and found["attempts"][1]["cause"] == "stopped" and found["seconds"]["down"] > 0


def test_whatever_nodes_there_are(lab, tmp_path, photos):
    """One job of 2 to 4 nodes, a rank each: on 4, after a power cut on 2, preempted, then on 3, each with every image
    once."""
    lab.recipe = recipe(
        tmp_path, photos, train={"global_batch": 12, "total_samples": 192}, checkpoint={"every_samples": 24}
    )
    run("train", lab.recipe, "--run.dir", tmp_path / "straight", folder=tmp_path)
    job = lab.submit("elastic", "--nodes", "2-4", "--ranks", 1)
    place = lab.place("elastic")
    lab.until("it was on its way", "elastic", reaches(place, 24))
    for node in ("n3", "n4"):
        lab.cluster.kill_node(node)
    lab.until(
        "it went on on two", "elastic", lambda: lab.begins("elastic")[-1]["ranks"] == 2 and events(place, "resume")
    )
    for node in ("n3", "n4"):
        lab.cluster.start_node(node)
    more = lab.cluster.run(
        "sbatch",
        "--parsable",
        "--partition=high",
        "--exclusive",
        "--nodelist=n1",
        "--output=/dev/null",
        "--wrap=sleep 600",
    ).strip()
    lab.until("it went on on three", "elastic", lambda: lab.begins("elastic")[-1]["ranks"] == 3)
    lab.until_ended("elastic", job)
    assert lab.cluster.job(more)["JobState"] == "RUNNING"
    ranks = [num for num, _ in itertools.groupby(b["ranks"] for b in lab.starts("elastic"))]
    stops, resumes = ([e["samples_seen"] for e in events(place, kind)] for kind in ("stop", "resume"))
    assert ranks[0] == 4 and ranks[-2:] == [2, 3] and stops and set(stops) <= set(resumes)
    assert_same_path(place, tmp_path / "straight")


def _words(process: Path) -> list[str]:
    try:
        return os.fsdecode((process / "cmdline").read_bytes()).split("\0")
    except OSError:
        return []


def _is_rank(process: Path, place: Path) -> bool:
    words = _words(process)
    return "seer_scale.launch.rank" in words and str(place) in words and words[0] == sys.executable


def _holds_back_usr2(pid: int) -> bool:
    """Until it can be noted; before, it is passed over."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigBlk:")[2].split()[0], 16) >> (signal.SIGUSR2 - 1) & 1)


@pytest.mark.long
def test_a_rank_hangs_and_who_looks_after_the_ranks_is_killed(lab, straight):
    """SIGSTOP of a rank, for which the other waits; kill -9 of srun, whose ranks go on without it; then of the process
    that started it, without which the batch job ends."""
    job, place = (
        lab.submit("alone", "--nodes", 1, "--data.workers", 1, "--data.timeout_s", 0.8, "--run.hang_timeout_s", 8),
        lab.place("alone"),
    )

    def on_its_way() -> None:
        lab.until(
            "it was on its way",
            "alone",
            lambda: reaches(place, max([0, *(e["samples_seen"] for e in events(place, "resume"))]))(),
        )

    def kill(word: str) -> None:
        on_its_way()
        found = [
            p
            for p in Path("/proc").glob("[0-9]*")
            if _words(p)[:1] == [word] or word in _words(p) and str(place / "logs") in _words(p)
        ]
        assert found, word
        for process in found:
            os.kill(int(process.name), 9)

    on_its_way()
    os.kill(max(int(p.name) for p in Path("/proc").glob("[0-9]*") if _is_rank(p, place)), signal.SIGSTOP)
    lab.until(
        "it had begun again", "alone", lambda: len(lab.begins("alone")) == 2 and len(events(place, "resume")) == 1
    )
    said = lab.launch("logs", "alone")
    assert "no progress for" in said and "thread MainThread:" in said and "Starting the ranks again" in said
    kill("srun")
    lab.until(
        "it had begun once more", "alone", lambda: len(lab.begins("alone")) == 3 and len(events(place, "resume")) == 2
    )
    assert "srun was ended by SIGKILL. Starting the ranks again" in lab.launch("logs", "alone")
    kill("submitit.core._submit")
    lab.until_ended("alone", job)
    assert lab.cluster.job(job)["Restarts"] == "1" and len(lab.starts("alone")) == 2
    assert_same_path(place, straight)


@pytest.mark.long
def test_a_time_limit_and_beside_it_plain_srun(lab, straight, tmp_path):
    """Two minutes, of which the last is for saving: saved, back to the queue, on. And `srun seer-scale train` without
    us."""
    lab.profile(time=2, grace_s=60)
    job, place = lab.submit("limit", "--nodes", 1, "--train.total_samples", 80000), lab.place("limit")
    words = [
        "srun",
        "--nodes=1",
        "--ntasks=2",
        "--cpu-bind=none",
        "--time=10",
        sys.executable,
        "-m",
        "seer_scale.cli",
        "train",
        lab.recipe,
        "--run.dir",
        str(tmp_path / "plain"),
    ]
    env = lab.cluster.env | {k: str(v) for k, v in PROFILE["environment"].items()}
    plain = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=150)
    assert plain.returncode == 0 and "2 ranks (fsdp, cpu)" in plain.stdout, plain.stdout + plain.stderr
    assert_same_path(tmp_path / "plain", straight)
    lab.until("it went on", "limit", lambda: events(place, "resume"), 150)
    (stop,), (resume,) = events(place, "stop"), events(place, "resume")
    assert resume["samples_seen"] == stop["samples_seen"] > 0 and f"samples-{stop['samples_seen']:012d}" in stop["text"]
    assert lab.cluster.job(job)["Restarts"] == "1"
    lab.launch("cancel", "limit", "--now")


def test_cancelled_it_stays_away(lab):
    """Before the ranks can hear of it."""
    job = lab.submit("cancelled", "--nodes", 1, "--train.total_samples", 80000)
    said = lab.launch(
        lab.recipe, "--cluster", "slurm", "--profile", "lab.yaml", "--name", "cancelled", "--nodes", 1, status=2
    )
    assert f"is in use by job {job}" in said and "cancel cancelled)" in said
    lab.until(
        "its ranks were there",
        "cancelled",
        lambda: any(_is_rank(p, lab.place("cancelled")) for p in Path("/proc").glob("[0-9]*")),
    )
    assert "saves and stops" in lab.launch("cancel", "cancelled")
    lab.until_ended("cancelled", job, "FAILED")  # it is not complete
    stops = events(lab.place("cancelled"), "stop")  # none where ranks still waited for each other
    assert (
        len(lab.begins("cancelled")) == 1
        and lab.cluster.job(job)["Restarts"] == "0"
        and all(s["samples_seen"] < 4000 for s in stops)
    )
    assert "is not running: its job" in lab.launch("cancel", "cancelled", status=2)
    assert "cancelled" in lab.launch("list") and "stopped" in lab.launch("status", "cancelled")


def test_an_array_is_a_run_each(lab):
    said = lab.launch(
        lab.recipe,
        "--cluster",
        "slurm",
        "--profile",
        "lab.yaml",
        "--nodes",
        1,
        "--train.total_samples",
        16,
        "--array",
        "optim.lr=0.01,0.02",
        "--name",
        "sweep",
    )
    job = said.partition("as job ")[2].partition("_")[0]
    for n, name in enumerate(("sweep-lr-0.01", "sweep-lr-0.02")):
        lab.until_ended(name, f"{job}_{n}")
        config = yaml.safe_load((lab.place(name) / "config.yaml").read_text())
        assert config["optim"]["lr"] == float(name[-4:]) and "done" in lab.launch("status", name)


@pytest.mark.long
def test_a_sweep_trains_and_then_evaluates(lab, photos):
    """Three sizes: one is requeued as it trains, and a rank of its evaluation is killed; one is cancelled, and with it
    its evaluation, until the same command puts both into the queue, of which the evaluation is requeued. Then all is
    there, each trained and measured once."""
    go = lab.folder / "go"
    lab.profile(
        ranks_per_node=1, before=[f"while [ ! -e {go} ]; do sleep 0.2; done"],
        evaluation={"time": 10, "ranks_per_node": 2, "before": []},
    )  # fmt: skip
    (lab.folder / "tasks.yaml").write_text("- {task: knn, k: [3], size: 32}\n- {task: retrieval, size: 32}")
    words = [
        lab.recipe, "--out", "runs/cap", "--widths", "1,1.5,2", "--knn.enabled", "false", "--train.total_samples", 480,
        "--tasks", "tasks.yaml", "--data", photos, "--cluster", "slurm", "--profile", "lab.yaml", "--nodes", 1,
    ]  # fmt: skip
    names = [f"cap/tiny-x{w}-s0" for w in ("1", "1.5", "2")]
    evals = [f"{name}/eval" for name in names]
    results = [lab.place(name) / "knn.json" for name in evals]

    def sweep(*more: object, status: int = 0) -> str:
        return lab.launch(*words, *more, status=status, tool="capacity_sweep.py")

    def job(name: str) -> str:
        return Job.of(lab.place(name)).job_id

    def ranks(name: str) -> list[int]:
        return [int(p.name) for p in Path("/proc").glob("[0-9]*") if _is_rank(p, lab.place(name))]

    sweep()
    first, last = job(names[0]), job(names[2])
    assert [job(name).partition("_")[2] for name in (*names, *evals)] == ["0", "1", "2"] * 2
    lab.cluster.run("scancel", last)
    go.touch()
    lab.until("it was on its way", names[0], reaches(lab.place(names[0]), 24))
    lab.cluster.run("scontrol", "requeue", first)
    lab.until_ended(evals[2], job(evals[2]), "CANCELLED")
    assert lab.cluster.job(job(evals[2]))["Reason"] == "DependencyNeverSatisfied"
    assert "never started: SLURM says CANCELLED" in lab.launch("status", evals[2])
    lab.until("its evaluation was on its way", evals[0], lambda: len(ranks(evals[0])) == 2)
    assert lab.cluster.job(first)["JobState"] == "COMPLETED" and lab.cluster.job(first)["Restarts"] == "1"
    assert len(events(lab.place(names[0]), "resume")) == 1
    os.kill(max(ranks(evals[0])), 9)
    for name in evals[:2]:
        lab.until_ended(name, job(name))
    assert [begin["ranks"] for begin in lab.begins(evals[0])] == [2, 2] and len(lab.begins(evals[1])) == 1
    written, before = [path.read_bytes() for path in results[:2]], [job(name) for name in (*names[:2], *evals[:2])]

    go.unlink()
    assert sweep().count("Submitted ") == 2
    assert sweep().count("Submitted ") == 0, "both are in the queue"
    assert job(names[2]) != last
    go.touch()
    lab.until("it could note signals", evals[2], lambda: sum(map(_holds_back_usr2, ranks(evals[2]))) == 2)
    lab.cluster.run("scancel", "--signal=USR2", job(evals[2]))
    lab.until_ended(evals[2], job(evals[2]))
    assert lab.cluster.job(job(evals[2]))["Restarts"] == "1" and len(lab.starts(evals[2])) == 2
    said = sweep("--table")
    told = json.loads((lab.place("cap") / "sweep.json").read_text())
    assert "Missing" not in said and told["missing"] == {} and (lab.place("cap") / "sweep.svg").is_file()
    assert [(point["samples_seen"], len(point["scores"])) for point in told["points"]] == [(480, 2)] * 3
    assert {curve["axis"] for curve in told["curves"]} == {"parameters", "compute"}
    assert sweep().count("Submitted ") == 0
    assert [path.read_bytes() for path in results[:2]] == written
    assert [job(name) for name in (*names[:2], *evals[:2])] == before


def test_starts_in_vain_come_to_an_end(lab):
    """A rank that cannot live: two starts a job, one return to the queue, and a sentence."""
    lab.profile(restarts=1, requeues=1, before=["ulimit -v 1500000"])
    job = lab.submit("vain", "--nodes", 1)
    lab.until_ended("vain", job, "FAILED")
    assert len(lab.begins("vain")) == 4
    assert "brought no new checkpoint, the run ends here" in lab.launch("logs", "vain")


def test_bad_input_is_refused_before_anything_is_submitted(lab, tmp_path):
    start = (lab.recipe, "--cluster", "slurm", "--profile", "lab.yaml", "--name", "bad")
    told = lab.launch(*start, "--nodes", "3", "--optim.lr", -1, status=2)
    assert all(
        part in told
        for part in (
            "optim.lr",
            "must divide evenly among the ranks (6)",
            "cannot share the batch evenly; nearest: 2 or 4",
        )
    ), told
    lab.profile(partition="nowhere")
    assert "SLURM does not take the job" in lab.launch(*start, "--nodes", 1, status=2)
    lab.profile()
    assert "sbatch is not on the path" in lab.launch(*start, "--nodes", 1, status=2, path="/bin-without-slurm")
    script = lab.launch(*start, "--nodes", "1-2", "--dry-run")
    assert "#SBATCH --nodes=1-2" in script and "#SBATCH --requeue" in script and "#SBATCH --signal=USR2@60" in script
    assert lab.cluster.run("squeue", "--noheader") == ""
