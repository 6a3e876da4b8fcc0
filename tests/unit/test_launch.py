"""Launching without a cluster: profiles, what fits a range of nodes, what travels, and what control does with any
ending."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_scale import cli
from seer_scale.errors import NOTHING, ConfigError, UserError
from seer_scale.launch import control as control_module
from seer_scale.launch import local, rank, runs, slurm, submit
from seer_scale.launch.control import Control, Limits, _describe_end
from seer_scale.launch.job import ATTEMPT, Job, is_alive, process_mark, snapshot
from seer_scale.launch.options import expand_grid
from seer_scale.launch.prepare import Request, prepare, write_job
from seer_scale.launch.profile import Profile, load_profile, minutes, read_profile

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------------ profiles


def test_the_example_is_a_profile():
    profile = load_profile(str(ROOT / "slurm" / "example.yaml"))
    assert (
        profile.resolved_ranks_per_node == 8
        and profile.minutes == 3 * 24 * 60
        and profile.sbatch == {"exclusive": "user"}
    )


@pytest.mark.parametrize(
    "time, found", [("90", 90), ("1:30", 2), ("02:00:00", 120), ("1-0", 1440), ("2-03:30", 3090), ("1-00:00:01", 1441)]
)
def test_times_are_slurms(time, found):
    assert minutes(time) == found


def test_a_time_is_no_number_and_an_option_may_have_no_value(tmp_path):
    (tmp_path / "p.yaml").write_text("time: 12:00:00\nmem: 0\nsbatch: {exclusive: true, comment: x}")
    profile = load_profile(str(tmp_path / "p.yaml"))
    assert (profile.minutes, profile.mem, profile.sbatch) == (720, "0", {"exclusive": True, "comment": "x"})


def test_all_that_is_wrong_with_a_profile_is_told(tmp_path):
    given = {
        "partiton": "x",
        "time": "soon",
        "gpus_per_node": -1,
        "before": "module load",
        "environment": [1],
        "sbatch": {"nodes": 3, "gres": "x"},
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(ConfigError) as caught:
        load_profile(str(tmp_path / "p.yaml"))
    text = str(caught.value)
    assert "p.yaml has 7 problems" in text and "gpus_per_node is -1" in text
    assert {p.key: p.value for p in caught.value.problems if p.key and p.key != "gpus_per_node"} == {
        "partiton": NOTHING,
        "time": "soon",
        "before": "module load",
        "environment": [1],
        "sbatch.nodes": NOTHING,
        "sbatch.gres": NOTHING,
    }
    assert "did you mean partition?" in text
    assert [(p.key, p.value, p.nearest) for p in read_profile({"time": "2"})[1]] == [("grace_s", 180, (40,))]
    assert [(p.key, p.nearest) for p in read_profile({"gpus_per_node": 0})[1]] == [("ranks_per_node", (1,))]
    assert not read_profile({})[1]


def test_an_evaluation_has_keys_of_its_own():
    base = {"time": "2:00:00", "gpus_per_node": 8, "sbatch": {"exclusive": True}, "before": ["module load x"]}
    profile, problems = read_profile(base | {"evaluation": {"gpus_per_node": 1, "sbatch": {}, "time": 30}})
    assert not problems and Profile(**dataclasses.asdict(profile)) == profile, "as a job's record keeps it"
    own = profile.for_evaluation()
    assert (own.gpus_per_node, own.resolved_ranks_per_node, own.minutes, own.sbatch) == (1, 1, 30, {})
    assert own.before == ["module load x"] and profile.minutes == 120
    assert read_profile(base)[0].for_evaluation() == read_profile(base)[0]
    wrong = {"gpus": 1, "time": "2", "evaluation": {}, "sbatch": {"nodes": 2}, "mem": 5}
    problems = read_profile(base | {"qoss": "x", "evaluation": wrong})[1]
    assert [(p.key, p.nearest) for p in problems] == [
        ("qoss", "did you mean qos?"),
        ("evaluation.gpus", "did you mean gpu?"),
        ("evaluation.sbatch.nodes", "remove it"),
        ("evaluation.grace_s", (40,)),
        ("evaluation.evaluation", "remove it"),
    ]
    assert [p.key for p in read_profile({"evaluation": 3})[1]] == ["evaluation"]


def test_what_yaml_takes_for_more_than_text_is_no_variable(tmp_path):
    """X: off would be False to the ranks; numbers stay as they are."""
    (tmp_path / "p.yaml").write_text(
        "environment: {A: off, B: yes, C: [1, 2], D: {e: 1}, F: 8, G: 'off'}\nsbatch: {'': x, comment: [1], hold: yes}"
    )
    with pytest.raises(ConfigError) as caught:
        load_profile(str(tmp_path / "p.yaml"))
    assert [(p.key, p.value) for p in caught.value.problems] == [
        ("environment.A", False),
        ("environment.B", True),
        ("environment.C", [1, 2]),
        ("environment.D", {"e": 1}),
        ("sbatch.comment", [1]),
        ("sbatch", NOTHING),
    ]
    assert "environment.A is false, but must be text; quote it as it is meant." in str(caught.value)


# ------------------------------------------------------------------------------------------------ what is submitted


@pytest.fixture
def recipe(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {
        "model": {"name": "regnety", "depth": 5, "w0": 16, "wa": 24.0, "wm": 2.0, "group_width": 8},
        "data": {"path": str(photos)},
        "swav": {"prototypes": [12]},
        "train": {"total_samples": 96, "global_batch": 24},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(given))
    return "tiny.yaml"


def ask(recipe: str, **more: object) -> Request:
    return Request(**{"recipe": recipe, "cluster": "slurm", "profile": Profile(gpus_per_node=2)} | more)


def test_numbers_of_nodes_that_fit(recipe):
    job, given, notes = prepare(ask(recipe, node_range=(1, 6)), [])
    assert job.node_counts == [1, 2, 3, 4, 6] and job.ranks_per_node == 2
    assert notes == [
        (
            "The recipe can be shared among 2, 4, 6, 8, 12 ranks: of 1 to 6 nodes it uses 1, 2, 3, 4, 6, the next "
            "lower of these."
        )
    ]
    assert given["run"]["dir"] == "runs/tiny" and job.run_dir == os.path.abspath("runs/tiny")
    with pytest.raises(ConfigError) as caught:
        prepare(ask(recipe, node_range=(4, 5), overrides=["--optim.lr", "-1"]), [])
    assert (
        "optim.lr is -1" in str(caught.value)
        and "must divide evenly among the ranks (10)" in str(caught.value)
        and len(caught.value.problems) == 3
    )
    nodes = caught.value.problems[-1]
    assert (nodes.key, nodes.value, nodes.nearest) == ("--nodes", "4-5", (4, 6))
    with pytest.raises(ConfigError) as caught:
        prepare(ask(recipe, node_range=(4, 5)), [])
    assert caught.value.problems[-1] == nodes
    begin = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        prepare(ask(recipe, node_range=(10**6, 10**6)), [])
    assert caught.value.problems[-1].nearest == (12,)
    with pytest.raises(ConfigError) as caught:
        prepare(ask(recipe, node_range=(2, 4), overrides=["--data.path", "gone"]), [])
    assert "--nodes" not in [p.key for p in caught.value.problems] and time.monotonic() - begin < 20
    with pytest.raises(UserError) as caught:
        prepare(ask(recipe, overrides=["--parallel.ranks", "3"]), [])
    problem = caught.value.problems[0]
    assert (problem.key, problem.value, problem.nearest) == ("parallel.ranks", 3, "give --nodes, such as 2")
    assert prepare(ask(recipe, overrides=["--parallel.ranks", "8"]), [])[0].node_counts == [4]


def test_the_script_says_what_was_asked_for(recipe):
    profile = Profile(
        partition="train",
        time="1-0",
        gpus_per_node=8,
        cpus_per_rank=4,
        environment={"A": "b c"},
        before=["module load x"],
        sbatch={"exclusive": "user", "spread_job": True},
    )
    job, _, _ = prepare(ask(recipe, node_range=(3, 3), profile=profile), [])
    text = slurm.script(job)
    for line in (
        "--nodes=3",
        "--partition=train",
        "--time=1440",
        "--gpus-per-node=8",
        "--mincpus=32",
        "--requeue",
        "--signal=USR2@180",
        "--exclusive=user",
        "--spread-job",
        "--job-name=seer-tiny",
    ):
        assert f"#SBATCH {line}\n" in text, text
    assert "ntasks" not in text and "wckey" not in text
    assert text.index("module load x") < text.index("export A='b c'") < text.index("submitit.core._submit")
    assert "#SBATCH --array=0-2%3" in slurm.script(job, 3) and "#SBATCH --nodes=2-3\n" in slurm.script(
        prepare(ask(recipe, node_range=(2, 3), profile=Profile(gpus_per_node=4)), [])[0]
    )


A_JOB_ID = st.one_of(
    st.sampled_from(["", "1", "2", "3"]), st.builds("{}_{}".format, st.integers(4, 6), st.integers(0, 3))
)


@settings(max_examples=200, deadline=None)
@given(st.lists(A_JOB_ID, unique_by=lambda job_id: job_id or object()))
def test_each_job_waits_for_its_own(job_ids):
    """Whichever are submitted together: task N of an array, by aftercorr, for task N of the other."""
    waits = slurm.dependencies(job_ids)
    assert sorted(i for _, positions in waits for i in positions) == list(range(len(job_ids)))
    for dependency, positions in waits:
        kind, _, number = dependency.partition(":")
        for task, i in enumerate(positions):
            assert job_ids[i] == {"": "", "afterok": number, "aftercorr": f"{number}_{task}"}[kind]
        assert kind != "afterok" or len(positions) == 1
    assert sum(not dependency for dependency, _ in waits) <= 1


def test_a_dependency_joins_that_of_the_profile(recipe):
    def lines(**sbatch: str) -> str:
        job, _, _ = prepare(ask(recipe, node_range=(1, 1), profile=Profile(gpus_per_node=2, sbatch=sbatch)), [])
        return slurm.script(job, 2, "aftercorr:7")

    assert "#SBATCH --dependency=aftercorr:7\n" in lines() and "#SBATCH --kill-on-invalid-dep=yes\n" in lines()
    assert "#SBATCH --dependency=aftercorr:7,singleton\n" in lines(dependency="singleton")


def test_code_and_recipe_travel(recipe, tmp_path):
    job, given, _ = prepare(ask(recipe, node_range=(1, 1), overrides=["--optim.lr", "0.5"]), ["words"])
    assert not Path(job.run_dir).exists()
    job = write_job(job, given)
    job.write()
    assert Job.read(job.run_dir) == job and yaml.safe_load(job.recipe.read_text())["optim"]["lr"] == 0.5
    code = Path(job.code)
    assert (code / "seer_scale" / "data" / "transforms" / "pixels.c").is_file() and (
        code / "seer_scale" / "ds_configs" / "zero3.json"
    ).is_file()
    assert (code / "seer_scale" / "recipes" / "demo.yaml").is_file() and not list(code.rglob("*.pyc"))
    before = set(code.parent.iterdir())
    assert snapshot(job.launch_dir) == job.code and set(code.parent.iterdir()) == before


def test_a_grid_in_one_folder_is_refused(recipe, tmp_path):
    (tmp_path / "p.yaml").write_text("gpus_per_node: 1")
    with pytest.raises(UserError, match="run.dir is .*/D, but it would be the folder of all 2 runs of --array"):
        cli.run(
            [
                "launch",
                recipe,
                "--cluster",
                "slurm",
                "--profile",
                "p.yaml",
                "--dry-run",
                "--array",
                "optim.lr=0.1,0.2",
                "--run.dir",
                "D",
            ]
        )
    with pytest.raises(
        UserError, match=r"caf\\xe9 cannot stand in a batch script, which is UTF-8; choose another run.dir"
    ):
        cli.run(["launch", recipe, "--cluster", "slurm", "--profile", "p.yaml", "--dry-run", "--run.dir", "caf\udce9"])
    with pytest.raises(UserError, match="--time is 2, but the run saves in the last 180 s"):
        cli.run(["launch", recipe, "--cluster", "slurm", "--profile", "p.yaml", "--dry-run", "--time", "2"])


@pytest.mark.parametrize(
    "place, said",
    [
        ("runs/t10:30", "PYTHONPATH, which splits at :; choose another"),
        ("runs/d%j", "submitit replaces what follows a %"),
        ("runs/%a/x", "submitit replaces what follows a %"),
    ],
)
def test_folders_of_which_others_read_a_part(recipe, place, said):
    with pytest.raises(UserError, match=said):
        cli.run(["launch", recipe, "--cluster", "local", "--run.dir", place])
    assert not Path("runs").exists()


def test_ranks_run_the_copy_and_no_other_code(tmp_path):
    """The record names it; a rank that finds itself elsewhere says so before it loads torch."""
    job = job_of(tmp_path / "run", cluster="local", code=str(tmp_path / "copy"))
    job.write()
    as_rank = [sys.executable, "-P", "-m", "seer_scale.launch.rank", job.run_dir]
    done = subprocess.run(as_rank, env=os.environ | {ATTEMPT: "7.1"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"must run the run's copy in {job.code}" in done.stderr
    assert json.loads((job.launch_dir / "outcome.json").read_text()) == {"attempt": "7.1", "status": 2}


def test_the_runs_of_an_array_share_a_copy(tmp_path):
    code = Path(rank.__file__).parents[2]
    rank._check_code_copy(str(tmp_path / "other" / "launch" / code.name))
    with pytest.raises(UserError, match="must run the run's copy"):
        rank._check_code_copy(str(code / "code-123"))


def test_a_copy_that_does_not_come_to_be_leaves_nothing(tmp_path, monkeypatch):
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("copyfile", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os if name == "rename" else shutil, name, no_space)
            with pytest.raises(OSError, match="No space left"):
                snapshot(tmp_path)
        assert not list(tmp_path.iterdir())


def test_a_process_is_known_again_and_no_other(monkeypatch):
    mark = process_mark(os.getpid())
    assert is_alive(mark) and not is_alive("") and not process_mark(2**22 + 1)
    pid, began, boot = mark.split(":")
    assert not is_alive(f"{pid}:{int(began) + 1}:{boot}") and not is_alive(f"{pid}:{began}:another-boot")


def test_a_grid_of_runs():
    made = expand_grid("a.yaml", "sweep", ["optim.lr=0.1,0.2", "swav.prototypes=[12, 8],[4]"])
    assert made[1] == ("a.yaml", "sweep-lr-0.1-prototypes-_4_", ["--optim.lr", "0.1", "--swav.prototypes", "[4]"])
    assert expand_grid("a.yaml", "", ["recipe=x.yaml,dir/y.yaml"]) == [("x.yaml", "a-x", []), ("dir/y.yaml", "a-y", [])]
    for wrong, said in (
        (["optim.lr"], "must name a key"),
        (["optim.lr=1"], "at least two values"),
        (["optim.lr=1,1"], "two runs the name sweep-lr-1; leave out values that are equal"),
        (["data.path=a/b,a_b"], "two runs the name sweep-path-a_b; .* differ only in characters"),
    ):
        with pytest.raises(UserError, match=said):
            expand_grid("a.yaml", "sweep", wrong)


def test_runs_that_want_other_nodes_are_arrays_of_their_own(recipe, tmp_path, capsys):
    (tmp_path / "p.yaml").write_text("gpus_per_node: 2")
    start = [recipe, "--cluster", "slurm", "--profile", "p.yaml", "--dry-run", "--array"]
    assert cli.run(["launch", *start, "parallel.ranks=2,4", "--array", "optim.lr=0.1,0.2"]) == 0
    script = capsys.readouterr().out
    assert (
        script.count("#SBATCH --array=0-1%2") == 2
        and "#SBATCH --nodes=1\n" in script
        and "#SBATCH --nodes=2\n" in script
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["launch", "x", "--cluster"], "--cluster cannot be taken: expected one argument"),
        (["launch", "x"], "--cluster is missing"),
        (["launch", "x", "--cluster", "slrum"], "nearest: slurm."),
        (["launch", "--cluster", "local"], "launch needs RECIPE"),
        (["launch", "x", "--cluster", "local", "--nodes", "2"], "--nodes has no effect with --cluster local"),
        (["launch", "x", "--cluster", "local", "--dry-run"], "--dry-run has no effect with --cluster local"),
        (["launch", "x", "--cluster", "local", "--rank", "2"], "did you mean --ranks?"),
        (["launch", "x", "--cluster", "local", "--ranks", "0"], "--ranks is 0, but must be"),
        (["launch", "x", "--cluster", "local", "--ranks", "two"], "--ranks is two, but must be"),
        (["launch", "x", "--cluster", "local", "--cluster", "slurm"], "given twice"),
        (["launch", "x", "--cluster", "slurm", "--partition", "a"], "partition is a key of the profile"),
        (["launch", "x", "y", "--cluster", "local"], "y is not expected here; write overrides"),
        (["launch", "x", "--cluster", "local", "--dry-run=1"], "--dry-run"),
        (["launch", "x", "--cluster", "local", "--follow"], "--follow is no option of seer-scale launch"),
        (["launch", "y", "--cluster", "local"], "RECIPE is y, but no file and no shipped recipe has that name"),
        (["status"], "status needs NAME"),
        (["logs", "a", "b"], "b is not expected here"),
        (["logs", "a", "--now"], "--now is no option of seer-scale logs"),
        (["list", "--train.total_samples", "3"], "--train.total_samples has no effect with seer-scale list"),
        (["resubmit", "a", "--train.total_samples", "3"], "to change a key of a run, give its first command again"),
    ],
)
def test_words_that_cannot_be_meant(words, said, recipe):
    with pytest.raises(UserError) as caught:
        cli.run([recipe if w == "x" else w for w in words])
    assert said in str(caught.value), caught.value


def test_problems_of_a_recipe_have_a_line_each(recipe):
    with pytest.raises(UserError) as caught:
        cli.run(["launch", recipe, "--cluster", "local", "--data.path", "/no/where", "--optim.lrr", "3"])
    header, *problems = str(caught.value).splitlines()
    assert header == "The recipe has 2 problems:" and [p[:4] for p in problems] == ["  - "] * 2


@pytest.mark.parametrize("name", ["..", ".", "%j-run", "a\nb", "a/b", "-x", "a'b"])
def test_names_that_would_mean_something_else(name, recipe):
    with pytest.raises(UserError, match="--name is"):
        cli.run(["launch", recipe, "--cluster", "local", f"--name={name}"])
    assert not Path("runs").exists()


def test_everything_that_is_wrong_is_told_at_once(recipe, tmp_path, monkeypatch):
    (tmp_path / "p.yaml").write_text(
        "gpus_per_nod: 2\nsbatch: {parsable: true, N: 3, exclusive: false, export: NONE}\nenvironment: {A-B: "
        "1, EMPTY: }\nbefore: [{echo key: value}]"
    )
    with pytest.raises(UserError) as caught:
        cli.run(
            [
                "launch",
                recipe,
                "--cluster",
                "slurm",
                "--profile",
                "p.yaml",
                "--name",
                "..",
                "--nodes",
                "3-2",
                "--restarts",
                "x",
                "--array",
                "optim.lr=-1,-2",
                "--array",
                "views.crops=[{num: 2, size: 32},{num: 1, size: 24}],[{num: 2, size: 33}]",
            ]
        )
    for part in (
        "gpus_per_nod is not a key; did you mean gpus_per_node?",
        "sbatch.parsable is for the launcher to decide",
        "sbatch.N is short for an option",
        "sbatch.exclusive is false",
        "sbatch.export is for the launcher",
        "environment.A-B is no name",
        "environment.EMPTY is none",
        "before is {'echo key': 'value'}",
        "--name is ..",
        "optim.lr is -1",
        "optim.lr is -2",
        "--nodes is 3-2",
        "--restarts is x",
    ):
        assert part in str(caught.value), (part, str(caught.value))


def test_a_run_is_started_by_one_command_at_a_time(recipe):
    job = prepare(ask(recipe, name="one", node_range=(1, 1)), [])[0]
    with submit.start_lock(job):
        with pytest.raises(UserError, match="is being started by another command"), submit.start_lock(job):
            pass
    with submit.start_lock(job):
        pass


class Unanswered:
    """SLURM's commands, where slurmctld does not answer."""

    def __init__(self, folder: Path):
        for name in ("sbatch", "srun", "scontrol", "squeue", "scancel"):
            (folder / name).write_text(
                "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' "
                ">&2\nexit 1\n"
            )
            (folder / name).chmod(0o755)


def test_a_refused_start_removes_nothing_of_another(recipe, tmp_path, monkeypatch):
    """The other has start_lock its folder, and not submitted yet."""
    (tmp_path / "p.yaml").write_text("gpus_per_node: 2")
    monkeypatch.setattr(slurm, "check_installed", lambda: None)
    words = [recipe, "--cluster", "slurm", "--profile", "p.yaml", "--nodes", "1", "--name", "one"]
    place = Path("runs/one/launch")
    exists = os.path.exists  # as seen before the other came
    monkeypatch.setattr(os.path, "exists", lambda path: os.path.basename(path) != "one" and exists(path))
    with submit.start_lock(prepare(ask(recipe, name="one", node_range=(1, 1)), [])[0]):
        with pytest.raises(UserError, match="is being started by another command"):
            cli.run(["launch", *words])
    assert place.is_dir()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="SLURM does not take the job"):  # as there is none; its own it does remove
        cli.run(["launch", *words])
    assert not place.is_dir()


def test_no_answer_of_slurm_is_no_end(recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    Unanswered(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "p.yaml").write_text("gpus_per_node: 2")
    _, job = run(tmp_path / "runs" / "a", (8, 75, ""))
    dataclasses.replace(job, name="a", job_id="7").write()
    assert cli.run(["status", "a"]) == 0 and "a: unknown, as SLURM does not answer" in capsys.readouterr().out
    for words in (
        ["cancel", "a"],
        ["launch", recipe, "--cluster", "slurm", "--profile", "p.yaml", "--nodes", "1", "--name", "a"],
    ):
        with pytest.raises(UserError, match="SLURM does not answer about job 7"):
            cli.run(words)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm, "KILL_TIMEOUT_S", 0.0)
    assert slurm._steps() is None and not slurm._end_steps()


def test_a_folder_that_cannot_be_written_keeps_no_run_from_its_end(tmp_path, monkeypatch):
    """Starts that could not be recorded count as in vain, and scancel ends what cannot be marked."""
    calls = []
    status, job = run(tmp_path, (None, 75, ""), requeue=lambda: calls.append(1) or True, requeues=2, ident="7.0")
    (job.launch_dir / "attempts.jsonl").unlink()
    monkeypatch.setattr(Job, "log_event", lambda self, **line: None)
    for number, (status, returns) in {1: (0, 2), 2: (0, 3)}.items():
        assert (
            run(tmp_path, (None, 75, ""), requeue=lambda: calls.append(1) or True, requeues=2, ident=f"7.{number}")[0]
            == status
            and len(calls) == returns
        )
    assert run(tmp_path, requeue=lambda: 1 / 0, requeues=2, ident="7.3")[0] == 1

    monkeypatch.setattr(
        Job, "cancel", lambda self: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    monkeypatch.setattr(slurm, "check_installed", lambda: None)
    monkeypatch.setattr(slurm, "state", lambda job_id: "RUNNING")
    monkeypatch.setattr(slurm, "_run", lambda *words: calls.append(words))
    assert "cannot be written (No space left on device)" in slurm.cancel(
        dataclasses.replace(job, job_id="7"), now=False
    )
    assert calls[-1] == ("scancel", "7")


def test_several_runs_are_asked_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        _, job = run(tmp_path / "runs" / name, (8, 0, ""))
        dataclasses.replace(job, name=name, cluster="local", job_id="7").write()
    assert cli.run(["status", "runs/a", "b", "--json"]) == 0
    assert [(told["name"], told["state"], told["samples_saved"]) for told in json.loads(capsys.readouterr().out)] == [
        ("a", "done", 8),
        ("b", "done", 8),
    ]
    with pytest.raises(UserError) as caught:
        cli.run(["cancel", "a", "b"])
    assert str(caught.value).splitlines() == ["a is not running: done.", "b is not running: done."]
    with pytest.raises(UserError, match="b is done: it has seen all its samples"):
        cli.run(["resubmit", "b"])


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "is damaged, or is not ours"),
        ('{"name": "a", "run', "is damaged"),
        ("[]", "is damaged"),
        ('{"a": 1}', "is damaged"),
        ("\xff", "is damaged"),
        ("more", "was written by another version of seer_scale"),
        ("less", "was written by another version of seer_scale"),
        ("late", "was written by another version of seer_scale"),
        ("nowhere", "is damaged, or is not ours"),
    ],
)
def test_a_record_that_is_none_is_said_to_be_that(recipe, content, said, capsys, monkeypatch):
    """It is not taken for "nothing was launched", nor for a job by those who need one."""
    job, given, _ = prepare(ask(recipe, node_range=(1, 1)), [])
    job = write_job(job, given)
    whole = dataclasses.asdict(job)
    less = {k: v for k, v in whole.items() if k != "node_counts"}
    others = {"more": whole | {"colour": 1}, "less": less}
    others |= {"late": whole | {"submitted": None}, "nowhere": whole | {"run_dir": None}}
    text = json.dumps(others[content]) if content in others else content
    job.record.write_bytes(text.encode("latin-1"))
    for read in (Job.read, Job.of):
        with pytest.raises(UserError, match=f"{job.record} {said}"):
            read(job.run_dir)
    for words in (["status", "tiny"], ["resubmit", "tiny"], ["cancel", "tiny"], ["logs", "tiny"]):
        with pytest.raises(UserError, match=said):
            cli.run(words)
    assert cli.run(["list"]) == 0 and said in capsys.readouterr().out
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "7")
    assert control_module.control_local(job.run_dir, None) == 2 and said in capsys.readouterr().err
    job.record.unlink()
    as_rank = [sys.executable, "-P", "-m", "seer_scale.launch.rank", job.run_dir]
    done = subprocess.run(as_rank, env=os.environ | {ATTEMPT: "7.1"}, capture_output=True, text=True, timeout=60)
    assert Job.read(job.run_dir) is None and done.returncode == 2 and "nothing was launched in" in done.stderr


@pytest.mark.parametrize(
    "name, content",
    [
        ("launch/attempts.jsonl", b"\xff\xfe\n"),
        ("launch/attempts.jsonl", b'{"event": "begin"}\n'),
        ("launch/attempts.jsonl", b'{"event": "end", "attempt": 7, "time": "x"}\n'),
        ("launch/attempts.jsonl", b'{"event": [], "attempt": "7.0.1", "time": 1}\n'),
        ("launch/attempts.jsonl", b'{"event": "pause", "attempt": "7.0.1", "time": 1}\n'),
        ("launch/attempts.jsonl", b'{"event": "begin", "attempt": "7.0.1", "ran'),
        ("launch/attempts.jsonl", None),
        ("metrics.jsonl", b"5\n"),
        ("metrics.jsonl", b'{"step": 5}\n'),
        ("metrics.jsonl", b'{"step": 5, "samples_seen": "x"}\n'),
        ("metrics.jsonl", b'{"step": 5, "samples_seen": 40, "throughput/img_per_s": "x"}\n'),
        ("config.yaml", b"train:\n  total_samples: 8\n  global_batch: 0\n"),
        ("config.yaml", b"train: {total_samples: 8, global_batch: x}\n"),
        ("config.yaml", b"train: [total_samples, global_batch]\n"),
        ("config.yaml", b"- train\n"),
        ("config.yaml", b"train: {total_samples: 8, glob"),
        ("config.yaml", b"train: \xff\n"),
        ("config.yaml", b"run: {seed: 2026-13-45}\n"),
        ("config.yaml", b"[" * 100_000),
    ],
)
def test_odd_lines_are_passed_over(tmp_path, monkeypatch, capsys, name, content):
    """None: a folder in its place. Neither those who look on nor the job itself end by it, and the next line is
    whole."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs" / "a"
    _, job = run(place, (8, 0, ""))
    dataclasses.replace(job, cluster="local", job_id="7").write()
    if content is None:
        (place / name).unlink()
        (place / name).mkdir()
    else:
        with (place / name).open("ab") as file:
            file.write(content)
    for words in (["list"], ["status", "a"]):
        assert cli.run(words) == 0 and "samples saved" in capsys.readouterr().out
    status, job = run(place, (16, 75, ""), requeue=lambda: True, ident="7.1")
    lines = job.attempts()
    assert status == 0 and (lines[-1]["cause"] == "stopped" if lines else content is None)
    assert content is None or len([line for line in lines if line["event"] == "begin"]) == 2


def test_a_launcher_that_is_no_process_is_gone(tmp_path, monkeypatch, capsys):
    """An earlier version wrote 0 where there was none."""
    monkeypatch.chdir(tmp_path)
    for launcher in ("x", 0, 12, ""):
        dataclasses.replace(job_of(tmp_path / "a", cluster="local"), launcher=launcher).write()
        assert cli.run(["status", "a"]) == 0 and "x: never started" in capsys.readouterr().out


def test_a_run_is_where_it_lies(recipe, tmp_path, capsys):
    """Moved, it is known and goes on there; a copy says of what, and the job is not its own."""
    (tmp_path / "p.yaml").write_text("gpus_per_node: 2")
    request = ask(recipe, node_range=(1, 1), name="a", overrides=["--run.dir", "runs/a"])
    job, given, _ = prepare(
        request,
        [recipe, "--cluster", "slurm", "--profile", "p.yaml", "--nodes", "1", "--name", "a", "--run.dir", "runs/a"],
    )
    dataclasses.replace(write_job(job, given), job_id="7", log_dir=str(job.logs)).write()
    (job.logs / "7_0.out").write_text("said there\n")
    before = Path(job.run_dir)
    shutil.copytree(before, tmp_path / "copy")
    assert cli.run(["status", "copy"]) == 0 and f"a copy of {before}, where it was launched" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"copy is a copy of {before}, whose job it names; cancel the original"):
        cli.run(["cancel", "copy"])

    place = tmp_path / "elsewhere" / "b"
    place.parent.mkdir()
    before.rename(place)
    assert cli.run(["status", "elsewhere/b"]) == 0
    told = capsys.readouterr().out
    assert f"\n  {place}, " in told and f"moved from {before}, where it was launched" in told
    assert cli.run(["logs", "elsewhere/b"]) == 0 and capsys.readouterr().out == "said there\n"
    assert cli.run(["resubmit", "elsewhere/b", "--nodes", "2", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert (
        f"PYTHONPATH={place}/launch/code-" in script and str(before) not in script and "#SBATCH --nodes=2\n" in script
    )
    assert not before.exists()
    link = tmp_path / "link"
    link.symlink_to(place)
    assert Job.of(link).run_dir == str(link) and Job.of(before.parent / "../elsewhere/b").run_dir == str(place)

    gone = dataclasses.replace(Job.of(place), folder=str(tmp_path / "gone"))
    with pytest.raises(
        UserError,
        match=f"a was launched from {tmp_path}/gone, which does not exist any more; give .* --run.dir {place}",
    ):
        runs.relaunch_words(gone, nodes="", time="")


def test_a_copy_of_a_running_run_is_not_running(tmp_path, monkeypatch, capsys):
    """A launch in it is taken, and no signal goes to the job that it names; also once the original has been moved."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs" / "a" / "launch"
    place.mkdir(parents=True)
    with (place / ".start_lock").open("w") as claim, subprocess.Popen(["cat"], stdin=-1, stdout=claim) as launcher:
        job = job_of(tmp_path / "runs" / "a", cluster="local", launcher=process_mark(launcher.pid), job_id="7")
        job.write()
        job.log_event(event="begin", attempt="7.1", ranks=1, nodes=["n"], samples=-1)
        shutil.copytree(job.run_dir, "runs/copy")
        heard: list[int] = []
        monkeypatch.setattr(os, "kill", lambda pid, number: heard.append(number))
        for _ in range(2):
            assert cli.run(["status", "copy"]) == 0
            told = capsys.readouterr().out
            assert "x: a copy, made before that job had ended" in told and "a copy of" in told
            with pytest.raises(UserError, match="copy is a copy of"):
                cli.run(["cancel", "copy"])
            with submit.start_lock(dataclasses.replace(job, run_dir=str(tmp_path / "runs" / "copy"))):
                pass
            if os.path.exists("runs/a"):
                os.rename("runs/a", "runs/moved")
        assert not heard and cli.run(["cancel", "moved"]) == 0 and heard == [signal.SIGUSR2]


def test_a_folder_by_another_mount_is_no_copy_of_itself(tmp_path, monkeypatch):
    job = job_of(tmp_path / "a", cluster="local", launcher=process_mark(os.getpid()))
    job.write()
    (tmp_path / "mount").symlink_to(tmp_path / "a")
    monkeypatch.setattr(os.path, "realpath", os.path.abspath)
    there = Job.of(tmp_path / "mount")
    assert there.launched_in == job.run_dir and not runs._is_copy(there) and runs.is_running(there)


def test_names_of_any_signs_are_found_and_shown_on_one_line(tmp_path, monkeypatch, capsys):
    """Those of patterns, of escapes and line ends, of bytes; and of a run that a link leads to."""
    monkeypatch.chdir(tmp_path)
    for name in ("a[1]", "what?", "red\x1b[31m\nline", "caf\udce9"):
        job = dataclasses.replace(job_of(tmp_path / "runs" / name, cluster="local"), name=name)
        job.write()
        assert runs.find_one(name) == runs.find_one(f"runs/{name}") == job
        assert cli.run(["status", name]) == 0
    job_of(tmp_path / "scratch" / "q", cluster="local").write()
    (tmp_path / "runs" / "q").symlink_to(tmp_path / "scratch" / "q")
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    told = capsys.readouterr().out
    assert "red\\x1b[31m\\nline: never started" in told and "caf\\xe9: never started" in told
    assert cli.run(["list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split("  ")[0] for line in listed.splitlines()] == [
        "a[1]", "caf\\xe9", "scratch/q", "red\\x1b[31m\\nline", "what?"
    ]  # fmt: skip
    assert (told + listed).isascii() and "\x1b" not in told + listed


def test_commands_that_are_told_can_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "python"))
    job = dataclasses.replace(job_of(tmp_path / "runs" / "b c", cluster="local"), command=["x.yaml", "--name", "b c"])
    with pytest.raises(UserError) as caught:
        runs.relaunch_words(dataclasses.replace(job, folder="gone"), nodes="", time="")
    assert str(caught.value).endswith(
        "; give 'my env/python' -m seer_scale launch x.yaml --name 'b c' from where its recipe and images are now."
    )
    dataclasses.replace(job, launcher=process_mark(os.getpid())).write()
    with pytest.raises(UserError, match="cancel 'b c'"), submit.start_lock(job):
        pass


# ------------------------------------------------------------------------------------------------ control


class Scripted:
    """Ranks that end as a script says: (checkpoint they leave or None, status they tell or None, problem)."""

    code = 0

    def __init__(self, job: Job, attempt: str, checkpoint: int | None, status: int | None, problem: str):
        if checkpoint is not None:
            (Path(job.run_dir) / "checkpoints" / f"samples-{checkpoint:012d}").mkdir(parents=True, exist_ok=True)
        if status is not None:
            (job.launch_dir / "outcome.json").write_text(json.dumps({"attempt": attempt, "status": status}))
        self._problem, self._polls, self.heard = problem, 0, []

    def poll(self) -> str | None:
        self._polls += 1
        return self._problem if self._polls > 1 else None

    def signal(self, number: int) -> None:
        self.heard.append(number)


def job_of(tmp_path: Path, **more) -> Job:
    """Of one rank on one node."""
    given = dict(
        cluster="slurm", command=[], folder=".", code="", ranks_per_node=1, node_counts=[1], restarts=1, requeues=1
    )
    return Job(name="x", run_dir=str(tmp_path), **(given | dict(profile={}, submitted=0.0) | more))


def run(
    tmp_path,
    *script: tuple,
    requeue=None,
    restarts: int = 1,
    requeues: int = 1,
    ident: str = "7.0",
    submitted: float = 0.0,
) -> tuple[int, Job]:
    job = job_of(tmp_path, restarts=restarts, requeues=requeues, submitted=submitted)
    job.launch_dir.mkdir(parents=True, exist_ok=True)
    turns = iter(script)
    control = Control(
        job, lambda attempt: Scripted(job, attempt, *next(turns)), ident=ident, ranks=1, nodes=["n"], requeue=requeue
    )
    status = control.run()
    assert next(turns, None) is None, "it ended before the script"
    return status, job


@pytest.mark.parametrize("status", [0, 1, 2])
def test_what_the_ranks_say_of_their_end_is_the_end(tmp_path, status):
    assert run(tmp_path, (8, status, ""))[0] == status


def test_a_loss_is_followed_by_a_start_until_too_many_are_in_vain(tmp_path, capsys):
    lost = "Rank 1 was ended by SIGKILL"
    status, job = run(tmp_path, (8, None, lost), (16, None, lost), (None, None, lost), (24, 0, ""))
    assert status == 0 and [line["samples"] for line in job.attempts() if line["event"] == "begin"] == [-1, 8, 16, 16]
    assert capsys.readouterr().err.count("Starting the ranks again") == 3
    assert run(tmp_path, (None, None, lost), (None, None, lost), ident="8.0")[0] == 1
    assert (
        "As 2 starts in a row brought no new checkpoint, the run ends here; the newest checkpoint stands"
        in capsys.readouterr().err
    )


def test_a_stop_goes_back_to_the_queue_and_starts_in_vain_come_to_an_end(tmp_path, capsys):
    asked = []

    def requeue() -> bool:
        asked.append(1)
        return True

    assert run(tmp_path, (8, 75, ""), requeue=requeue)[0] == 0 and len(asked) == 1
    for n in range(1, 9):  # each start of the job: two starts of the ranks, then the queue
        status, job = run(tmp_path, (None, None, "x"), (None, None, "x"), requeue=requeue, requeues=2, ident=f"7.{n}")
        if status:
            break
    assert (
        status == 1
        and n == 3
        and len(asked) == 3
        and "3 starts of this job brought no new checkpoint" in capsys.readouterr().err
    )
    # SLURM itself may have put it back, after lost nodes: nothing is started then
    assert run(tmp_path, requeue=requeue, requeues=2, ident="7.4")[0] == 1 and len(asked) == 3
    # the same run, submitted anew, begins to count anew
    assert run(tmp_path, (None, 75, ""), requeue=requeue, requeues=2, ident="8.0", submitted=time.time())[0] == 0


class Limited(Limits):
    def __init__(self, **said: bool):
        self.said = said

    def is_cancelled(self) -> bool:
        return self.said.get("cancelled", False)

    def should_stop(self) -> bool:
        return self.said.get("stop", False) or self.is_cancelled()

    def is_over(self) -> bool:
        return self.said.get("over", False)


def test_ranks_that_do_not_save_in_time_go_back_to_the_queue_without(tmp_path, capsys):
    """At the time limit SLURM would end the job for good."""
    limits = Limited(stop=True)

    class Deaf(Scripted):
        def poll(self) -> str | None:
            limits.said["over"] = self._polls > 3
            self._polls += 1
            return "killed" if signal.SIGKILL in self.heard else None

    control, made = controlled(tmp_path, Deaf, limits, requeue=lambda: True)
    assert control.run() == 0 and made[0].heard == [signal.SIGUSR2, signal.SIGKILL] and len(made) == 1
    assert "have not saved" in capsys.readouterr().err
    assert [line["cause"] for line in control.job.attempts() if line["event"] == "end"] == ["out of time"]

    limits.said["over"] = False  # nor does one that was cancelled go back
    control, made = controlled(tmp_path, Deaf, limits, requeue=lambda: 1 / 0)
    control._limits.is_cancelled = lambda: bool(made)
    assert control.run() == 1 and len(made) == 1 and capsys.readouterr().err.count("have not saved") == 1
    assert [line["cause"] for line in control.job.attempts() if line["event"] == "end"] == 2 * ["out of time"]


def test_a_cancelled_job_is_told_until_it_hears_and_never_started_again(tmp_path, monkeypatch):
    """A request that comes while ranks start reaches none of them."""
    monkeypatch.setattr(control_module, "STOP_REPEAT_S", 0.2)
    limits, requeued = Limited(), []

    class Slow(Scripted):
        def poll(self) -> str | None:
            self._polls += 1
            limits.said["cancelled"] = self._polls > 2
            return "Rank 0 was ended by SIGUSR2" if len(self.heard) == 3 else None

    control, made = controlled(tmp_path, Slow, limits, requeue=lambda: requeued.append(1) or True)
    assert control.run() == 1 and len(made) == 1 and made[0].heard == 3 * [signal.SIGUSR2] and not requeued
    assert control.job.attempts()[-1]["cause"] == "asked to stop, but not saved: Rank 0 was ended by SIGUSR2"
    control, made = controlled(tmp_path, Slow, limits)
    assert control.run() == 75 and not made  # nor begun, where it came between two starts


def test_a_cancelled_job_that_has_saved_does_not_go_back_to_the_queue(tmp_path):
    limits = Limited()

    class Saves(Scripted):
        def poll(self) -> str | None:
            limits.said["cancelled"] = True
            return super().poll()

    control, made = controlled(tmp_path, Saves, limits, (8, 75, ""), requeue=lambda: 1 / 0)
    assert control.run() == 75 and len(made) == 1 and control.job.attempts()[-1]["cause"] == "stopped"


def test_ranks_are_not_started_again_shortly_before_the_limit(tmp_path):
    limits, requeued = Limited(stop=True), []
    control, made = controlled(
        tmp_path, Scripted, limits, (8, None, "Rank 0 died"), requeue=lambda: requeued.append(1) or True
    )
    assert control.run() == 0 and len(made) == len(requeued) == 1


def controlled(tmp_path, kind, limits, script=(None, None, ""), **more) -> tuple[Control, list]:
    """A Control of ranks of that kind, and those it makes."""
    job = job_of(tmp_path)
    job.launch_dir.mkdir(exist_ok=True)
    made: list = []
    return Control(
        job,
        lambda a: made.append(kind(job, a, *script)) or made[-1],
        ident="1",
        ranks=1,
        nodes=[],
        limits=limits,
        **more,
    ), made


def test_a_full_disk_does_not_end_the_job(tmp_path, monkeypatch):
    """What it says and records is lost; a stop is known by the status, as the ranks cannot write their outcome."""

    class Full(Scripted):
        code = 75

    def no_space(self, mode: str = "r", *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        monkeypatch.setattr(Path, "open", no_space)
        control, made = controlled(
            tmp_path, Full, Limits(), (None, None, "A rank ended with status 75"), requeue=lambda: True
        )
        assert control.run() == 0 and len(made) == 1
        monkeypatch.undo()


def test_what_was_asked_to_stop_is_not_started_again(tmp_path):
    requeued = []
    job = job_of(tmp_path, cluster="local")
    job.launch_dir.mkdir()

    class Stopping(Scripted):
        def poll(self) -> str | None:
            if self._polls == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            self._polls += 1
            return "" if self.heard else None

    made = []
    control = Control(
        job,
        lambda a: made.append(Stopping(job, a, 8, 75, "")) or made[-1],
        ident="1",
        ranks=1,
        nodes=[],
        requeue=lambda: requeued.append(1) or True,
    )
    before = signal.getsignal(signal.SIGTERM)
    assert control.run() == 75 and not requeued and set(made[0].heard) == {signal.SIGTERM}
    assert signal.getsignal(signal.SIGTERM) is before


def test_cancel_given_twice_asks_once(tmp_path, monkeypatch):
    """A second one ends nothing at once, however long saving takes; nor does the launcher take it for that."""
    monkeypatch.setattr(control_module, "ECHO_S", -1.0)
    monkeypatch.setattr(local, "ECHO_S", -1.0)

    class Saving(Scripted):
        def poll(self) -> str | None:
            if self._polls < 3:
                assert "saves and stops" in runs._cancel_one(running, now=False)
            self._polls += 1
            return "" if self._polls > 5 else None

    control, made = controlled(tmp_path, Saving, Limits(), (8, 75, ""))
    running = dataclasses.replace(control.job, cluster="local", launcher=process_mark(os.getpid()))
    assert control.run() == 75 and signal.SIGKILL not in made[0].heard
    with local._LogFollower(None) as watch:
        for _ in range(2):
            runs._cancel_one(running, now=False)
    assert watch._requests == 1


def test_a_launcher_passes_no_signal_on_that_is_submitits(monkeypatch):
    """Once the ranks have ended, submitit would start them again for SIGUSR2; nobody is there to be told then."""
    process = subprocess.Popen(["sh", "-c", "sleep 100 & wait $!; exit $?"])
    with local._LogFollower(type("Job", (), {"_process": process})) as watch:
        os.kill(os.getpid(), signal.SIGUSR2)
        while watch._passed_on < watch._requests:
            watch._pass_on()
        assert process.wait() == 128 + signal.SIGTERM
        watch._passed_on = 0
        monkeypatch.setattr(Path, "read_text", lambda self: str(process.pid))  # as if its child had just ended
        watch._pass_on()
        assert watch._passed_on == 0


def test_cancel_now_of_a_launcher_that_ends_meanwhile(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen(["sleep", "100"])
    job = job_of(tmp_path / "a", cluster="local", launcher=process_mark(process.pid))
    job.write()
    monkeypatch.setattr(time, "sleep", lambda seconds: process.wait())
    assert cli.run(["cancel", "a", "--now"]) == 0 and capsys.readouterr().out == "x ends at once.\n"


@pytest.mark.parametrize(
    "requests, saved, before, cause",
    [
        (2, 72, -1, "ended at once when asked again; the checkpoint at 72 samples stands"),
        (2, None, -1, "ended at once when asked again; there is no checkpoint"),
        (1, 72, 40, "asked to stop: Rank 0 was ended by SIGKILL; the checkpoint at 72 samples stands"),
        (1, None, 40, "asked to stop, but not saved: Rank 0 was ended by SIGKILL"),
    ],
)
def test_what_was_saved_before_an_end_is_told_with_it(tmp_path, monkeypatch, requests, saved, before, cause):
    monkeypatch.setattr(control_module, "ECHO_S", -1.0)
    if before >= 0:
        (tmp_path / "checkpoints" / f"samples-{before:012d}").mkdir(parents=True)

    class Killed(Scripted):
        def poll(self) -> str | None:
            self._polls += 1
            if self._polls <= requests:
                os.kill(os.getpid(), signal.SIGTERM)
            return "Rank 0 was ended by SIGKILL" if self._polls > 4 else None

    control, made = controlled(tmp_path, Killed, Limits(), (saved, None, ""))
    assert control.run() == 1 and (signal.SIGKILL in made[0].heard) == (requests == 2)
    assert control.job.attempts()[-1]["cause"] == cause


def test_an_outcome_of_another_start_is_none(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "outcome.json").write_text(json.dumps({"attempt": "6.0.1", "status": 0}))
    assert run(tmp_path, (None, None, "x"), (None, None, "x"))[0] == 1
    for odd in ("[]", "null", '{"attempt": "8.0.1"}', '{"attempt": "8.0.1", "status": "x"}', "\xff"):
        (tmp_path / "launch" / "outcome.json").write_bytes(odd.encode("latin-1"))
        assert run(tmp_path, (None, None, "x"), (None, None, "x"), ident="8.0")[0] == 1


def test_ends_are_told_by_name():
    assert _describe_end("Rank 3", -signal.SIGKILL) == "Rank 3 was ended by SIGKILL, from outside or for want of memory"
    assert (
        "hung" in _describe_end("Rank 3", 76)
        and "hung" in _describe_end("Rank 3", -signal.SIGALRM)
        and _describe_end("Rank 3", 7) == "Rank 3 ended with status 7"
    )
    assert _describe_end("Rank 3", -40) == "Rank 3 was ended by signal 40, from outside or for want of memory"
    assert slurm._describe_srun_end(-40) == "srun was ended by signal 40"


@pytest.mark.parametrize(
    "recipe",
    [
        "run:\n  seed: 0\ntrain:\n  total_samples: 100\n  global_batch: 24\n",
        "{train: {global_batch: 24, total_samples: 1_00}, run: {seed: 0}}",
        "notes: |\n  train:\n    total_samples: 7\ntrain:\n    total_samples: 100\n    global_batch: 24\n",
    ],
)
def test_a_state_says_of_how_many_samples(tmp_path, monkeypatch, capsys, recipe):
    """Whole batches, as a run goes on to the end of its last one; however the YAML of its recipe is written."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs" / "a"
    job_of(place, cluster="local", job_id="7").write()
    (place / "config.yaml").write_text(recipe)
    (place / "metrics.jsonl").write_text('{"step": 2, "samples_seen": 48, "throughput/img_per_s": 5.0}\n')
    assert cli.run(["status", "a"]) == 0
    assert "48 of 120 samples, 0 samples saved, 5 images/s" in capsys.readouterr().out


def test_a_list_of_runs_as_json(tmp_path, monkeypatch, capsys):
    """A run whose record is damaged has its place in it, too."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        job_of(tmp_path / "runs" / name, cluster="local", job_id="7").write()
    (tmp_path / "runs" / "b" / "launch" / "job.json").write_text("{")
    assert cli.run(["list", "--json"]) == 0
    sound, damaged = json.loads(capsys.readouterr().out)
    assert (sound["run_dir"], sound["state"]) == (str(tmp_path / "runs" / "a"), "never started")
    assert "is damaged" in damaged["error"]
