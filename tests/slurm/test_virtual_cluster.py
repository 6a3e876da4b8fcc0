"""What the other tests here rely on: several nodes, a requeue of what a power cut hit, and signals passed on."""

from __future__ import annotations

from pathlib import Path

from tests.slurm.virtual_cluster import Cluster


def submit(cluster: Cluster, folder: Path, script: str, *options: str) -> str:
    """The number of a job that writes to folder/job.out and leaves files in `folder`, its working directory."""
    (folder / "job.sh").write_text(f"#!/bin/bash\n{script}\n")
    words = ("--parsable", "--chdir", folder, "--output", "job.out", "--open-mode", "append", *options)
    return cluster.run("sbatch", *words, folder / "job.sh").strip()


def test_nodes_are_distinct(cluster):
    assert sorted(cluster.run("srun", "-N2", "-w", "n2,n3", "hostname").split()) == ["n2", "n3"]


def test_devices_are_given_out(cluster):
    shown = cluster.run("srun", "-N1", "--gpus-per-node", "3", "printenv", "CUDA_VISIBLE_DEVICES")
    assert shown.strip() == "0,1,2"


def test_power_cut_leaves_the_job_to_the_other_nodes(cluster, tmp_path):
    script = "srun --ntasks-per-node=1 bash -c 'touch start-${SLURM_RESTART_COUNT:-0}-$SLURMD_NODENAME; sleep 1000'"
    job = submit(cluster, tmp_path, script, "-N1-2")
    cluster.until(lambda: len(list(tmp_path.glob("start-0-*"))) == 2, 20, "it ran on two nodes", tmp_path)
    lost = cluster.job(job)["BatchHost"]
    cluster.kill_node(lost)
    cluster.until(lambda: len(list(tmp_path.glob("start-1-*"))) == 2, 40, "it ran on two other nodes", tmp_path)
    assert not (tmp_path / f"start-1-{lost}").exists()
    assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("RUNNING", "1")


def test_signal_reaches_the_tasks(cluster, tmp_path):
    task = 'trap "touch heard-$SLURM_PROCID; exit" USR2; touch ready-$SLURM_PROCID; while :; do sleep 0.1; done'
    job = submit(cluster, tmp_path, f"srun --ntasks-per-node=1 bash -c '{task}'", "-N2")
    cluster.until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, 20, "both tasks were ready", tmp_path)
    cluster.run("scancel", "--signal", "USR2", job)
    cluster.until(lambda: cluster.job(job)["JobState"] == "COMPLETED", 20, "the job had ended by itself", tmp_path)
    assert len(list(tmp_path.glob("heard-*"))) == 2
