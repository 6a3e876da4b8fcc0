"""The command line answers each mistake with one sentence, and never with a traceback."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from seer_scale import __version__
from seer_scale.bench import BENCHES
from seer_scale.cli import build_parser, main
from seer_scale.cli.export import EXPORT_FORMATS
from seer_scale.cli.imports import SOURCE_FORMATS
from seer_scale.cli.parser import split_switches
from seer_scale.config import RECIPES, MethodSettings, load_recipe, method_settings, opt, recipe_names, resolve
from seer_scale.errors import EXIT_STOPPED
from seer_scale.interop.formats import FORMATS
from seer_scale.interop.published import SOURCE_LAYOUTS

COMMANDS = (
    "train",
    "recipes",
    "import",
    "launch",
    "sweep",
    "list",
    "status",
    "logs",
    "cancel",
    "resubmit",
    "eval",
    "export",
    "embed",
    "inspect",
    "report",
    "compare",
    "plan",
    "bench",
    "data",
)


@pytest.mark.parametrize(
    "words, part",
    [
        (["trian"], "trian is no command of seer-scale; did you mean train?"),
        (["--verbose"], "seer-scale needs one of train, recipes, launch"),
        (["train"], "train needs RECIPE; see seer-scale train --help."),
        (["train", "--data.path", "x"], "train needs RECIPE"),
        (["train", "demo", "stray"], "stray is not expected here; write overrides as --section.key value."),
        (["train", "demo", "folder"], "and a pattern in quotes, as in --data.path 'DIR/*.tar'."),
        (
            ["train", "demo", "--optim", "3"],
            "--optim is a section of the recipe, not a key; its keys are --optim.name, --optim.lr",
        ),
        (
            ["train", "demo", "--lr", "3"],
            "keys of a recipe have a dot, as in --train.total_samples; did you mean --optim.lr?",
        ),
        (["train", "demo", "--print-confg"], "did you mean --print-config?"),
        (
            ["train", "--knn.enabled", "demo"],
            "but must be true or false; write --knn.enabled=true where demo is no",
        ),
        (["train", "demo", "--probe", "ture"], "ture is not expected here"),
        (["eval", "knn", "x", "--probe"], "--probe is no option of seer-scale eval knn"),
        (["train", "no/recipe.yaml", "--help"], "no/recipe.yaml is no file"),
        (["eval"], "eval needs one of "),
        (["eval", "knn"], "eval knn needs RUN"),
        (["eval", "knm", "x"], "knm is no command of seer-scale eval; did you mean knn?"),
        (["eval", "knn", "x", "--kk", "3"], "--kk is no option of seer-scale eval knn"),
        (["eval", "knn", "x", "--knn.bank", "d"], "labelled images are given by --data and --test"),
        (["eval", "knn", "no/run"], "no/run does not exist; the nearest folder"),
        (["report"], "RUN is missing, and there is no run in runs/; nearest: runs/demo."),
        (["report", "no/run"], "RUN is no/run, but that is no run's folder: it does not exist"),
        (["eval", "suite", "x", "s.yaml"], "s.yaml is not expected here; give a file of tasks as --tasks FILE."),
        (["data", "dem", "x"], "did you mean demo?"),
        (["data", "demo", "--force", "x"], "--force is no option of seer-scale data demo"),
        (["data", "demo", "a", "b"], "b is not expected here; seer-scale data demo --help says what is."),
        (["recipes", "zzz"], "zzz is not expected here; seer-scale recipes"),
        (["recipes", "--jsn"], "did you mean --json?"),
        (["recipes", "--train.total_samples", "3"], "--train.total_samples has no effect with seer-scale recipes"),
        (["report", "folder", "extra"], "extra is not expected here"),
        (["report", "folder"], "folder, but that is no run's folder: it has neither config.yaml nor metrics.jsonl"),
        (["eval", "knn", "--json"], "eval knn needs RUN"),
        (["bench", "stop"], "stop is no command of seer-scale bench; did you mean step?"),
        (
            ["bench", "checkpoint", "--gib", "x"],
            "--gib cannot be taken: invalid float value: 'x'; see seer-scale bench checkpoint --help",
        ),
        (
            ["plan", "--failures", "--gpu", "512"],
            "--gpu is no option of seer-scale plan, and keys of a recipe have a dot, as in --train.total_samples; "
            "did you mean --gpus?",
        ),
        (["plan"], "plan needs RECIPE, or --failures"),
        (["train", "no/tiny.yaml"], "no/tiny.yaml is no file; nor is any recipe beside it."),
        (["train", "/tmp"], "/tmp is no recipe; to train on images there give a recipe's name and their path, such as"),
        (["train", __file__], "test_cli.py is no recipe; to train on images there"),
        (["inspect", "no/run"], "PATH is no/run, but it does not exist; give a run's folder"),
        (
            ["eval", "lowshot", "--finetune", "RUN"],
            "--finetune cannot be taken: RUN is neither true nor false; write =",
        ),
        (["bench"], "bench needs one of step, plan, data"),
        (["data"], "data needs one of inspect, pack, refresh, demo"),
        (["data", "refresh", "folder"], "data refresh needs --manifest"),
        (["launch", "demo"], "--cluster is missing"),
        (["list", "no/folder"], "FOLDER is no/folder, but there is no such folder"),
        (["status", "x"], "NAME is x, but neither it nor runs/x is a launched run's folder; none was launched here."),
    ],
)
def test_a_mistake_is_answered(words, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert main(words) == 2
    assert not any((tmp_path / "folder").iterdir()) and len(list(tmp_path.iterdir())) == 1
    told = capsys.readouterr().err
    assert told.startswith("seer-scale: ") and part in told and told.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_shows_the_one_door(words, capsys):
    assert main(words) == 0
    told = capsys.readouterr().out
    assert all(re.search(rf"^    {command} ", told, re.M) for command in COMMANDS)


@pytest.mark.parametrize(
    "words", [[c] for c in COMMANDS] + [["data", "demo"], ["data", "refresh"], ["eval", "knn"], ["bench", "lars"]]
)
def test_each_command_has_a_help_of_its_own(words, capsys):
    for asked in ([*words, "--help"], [*words, "-h"], ["help", *words]):
        assert main(asked) == 0
        told = capsys.readouterr().out
        assert told.startswith(f"usage: seer-scale {' '.join(words)}"), told


def test_the_help_of_a_recipe_shows_what_it_sets(capsys):
    for words in (["train", "demo", "--help"], ["help", "train", "demo"], ["train", "--help", "demo"]):
        assert main(words) == 0
        told = capsys.readouterr().out
        samples = load_recipe("demo")["train"]["total_samples"]
        assert f"(default none; demo: {samples})" in told or f"(default 0; demo: {samples})" in told
        assert told.count("; demo: ") == sum(len(section) for section in load_recipe("demo").values())


@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_is_given_what_it_can_send_to_its_ranks(name, monkeypatch):
    sent = []
    bench = importlib.import_module(f"seer_scale.bench.{name}")
    monkeypatch.setattr(bench, "run", lambda args: sent.append(pickle.loads(pickle.dumps(args))))
    assert main(["bench", name, *["unused"] * {"data": 1, "learn": 1, "embed": 2}.get(name, 0)]) == 0
    assert isinstance(vars(sent[0])[{"learn": "seeds", "load": "ranks", "plan": "updates"}.get(name, "rounds")], int)


def parser_of(*path: str) -> argparse.ArgumentParser:
    """Of a command or of a group of commands."""
    parser: argparse.ArgumentParser = build_parser(list(path))
    for name in path:
        parser = subcommands(parser)[name]
    return parser


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})


def leaves(*path: str) -> list[tuple[str, ...]]:
    """The words of every command below this one."""
    names = subcommands(parser_of(*path))
    return [leaf for name in names for leaf in leaves(*path, name)] if names else [path]


NO_TABLE = {
    ("train",), ("launch",), ("logs",), ("cancel",), ("resubmit",), ("report",),
    ("data", "pack"), ("data", "refresh"), ("data", "demo"),
}  # fmt: skip
"""Commands that print what they do, a log or a path."""


def test_every_command_that_prints_a_table_prints_it_as_json_too():
    found = leaves()
    assert NO_TABLE < set(found) and {path[0] for path in found} == set(COMMANDS)
    for path in set(found) - NO_TABLE:
        assert "--json" in parser_of(*path)._option_string_actions, path


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"seer-scale {__version__} (torch ")


def test_the_resolved_recipe_can_be_printed(capsys, photos):
    words = ["photos_laptop", "--data.path", str(photos), "--knn.enabled", "false", "--optim.lr", "0.25"]
    assert main(["train", *words, "--print-config"]) == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert told["optim"]["lr"] == 0.25 and resolve(told) == resolve(load_recipe(words[0]), words[1:])
    assert main(["train", *words, "--optim.lr", "0.5", "--print-config"]) == 2  # given twice


@pytest.mark.parametrize(
    "words, compiles, knn",
    [
        (["--train.compile", "--knn", "photos_laptop"], True, True),
        (["photos_laptop", "--knn", "false", "--train.compile"], True, False),
        (["--knn=off", "photos_laptop", "--train.compile", "no"], False, False),
        (["--knn", "False", "photos_laptop", "--train.compile"], True, False),
        (["photos_laptop", "--knn.enabled", "--knn.k", "3", "--train.compile=true"], True, True),
    ],
)
def test_a_bool_needs_no_value_and_a_section_is_switched_by_its_name(words, compiles, knn, capsys, photos):
    words = ["train", "--print-config", *words, "--data.path", str(photos)]
    assert main(words) == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert told["train"]["compile"] is compiles and told["knn"]["enabled"] is knn
    assert main([*words, "--knn", "--knn.enabled"]) == 2 and "--knn.enabled is given twice" in capsys.readouterr().err


def test_a_section_of_a_plugin_is_switched_by_its_name_too(monkeypatch):
    @dataclass(frozen=True)
    class Extra(MethodSettings):
        enabled: bool = opt(False, "more")
        number: int = opt(0, "of them")

    monkeypatch.setitem(method_settings._CLASSES, "extra", Extra)
    assert split_switches(["--extra", "x", "--extra=false", "--swav"]) == (
        ["--extra.enabled", "true", "--extra.enabled", "false"], ["x", "--swav"],
    )  # fmt: skip


def test_a_recipe_that_does_not_fit_this_machine_can_be_looked_at(capsys):
    words = ["train", "seer_regnety_256gf", "--print-config", "--optim.lr", "0.25"]
    assert main(words) == 2
    told = capsys.readouterr()
    resolved = yaml.safe_load(told.out)
    assert resolved["optim"]["lr"] == 0.25 and resolved["parallel"]["sync_bn_group"] == 64
    assert (
        told.err.startswith("seer-scale: The recipe has 2 problems:\n  - data.path is empty")
        and "sync_bn_group is 64" in told.err
    )
    assert main([*words, "--train.precision", "int3"]) == 2  # has no place in a Config
    told = capsys.readouterr()
    assert not told.out and "train.precision is int3" in told.err and "sync_bn_group is 64" in told.err


def test_report_takes_the_newest_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "old")):
        log = tmp_path / "runs" / name / "metrics.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text("")
        os.utime(log, (1e9 - age, 1e9 - age))
    assert main(["report"]) == 0
    assert capsys.readouterr().out.strip() == "runs/new/report.html"


def test_a_run_that_was_not_launched_is_told_by_inspect(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "metrics.jsonl").write_text("")
    for words in (["status", "mine"], ["logs", "runs/mine"], ["cancel", "mine"]):
        assert main(words) == 2
        assert (
            "runs/mine was started by train, not by launch; seer-scale inspect runs/mine describes it, "
            in capsys.readouterr().err
        )
    assert main(["list"]) == 0 and "seer-scale inspect RUN" in capsys.readouterr().out


def test_recipes(capsys):
    assert main(["recipes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == recipe_names() and all("Cost:" in text for text in told.values())
    assert main(["recipes"]) == 0


def test_interrupted(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("seer_scale.cli.train.recipes", interrupted)
    assert main(["recipes"]) == 1
    assert capsys.readouterr().err.startswith("Stopped at once")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_evaluation_says_that_the_same_command_goes_on(number, capsys, monkeypatch):
    def stopped(*args, **kwargs):
        os.kill(os.getpid(), number)
        time.sleep(60)

    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setattr(sys, "argv", ["seer-scale", "eval", "knn", "x"])
    monkeypatch.setattr("seer_scale.evaluate.run.run_task", stopped)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main() == EXIT_STOPPED
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "Stopped. The same command goes on with what was done.\n"


ASKED = """
import importlib, os, signal, sys
class Asked:
    def find_spec(name, *_):
        if name == moment:
            exec("os.kill(os.getpid(), number)")  # as in what makes a dataclass
        if name == "seer_scale.training.start" and number != signal.SIGINT:
            os._exit(number in signal.sigpending())
door, moment, number = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
sys.meta_path.insert(0, Asked)
module, _, name = door.partition(":")
sys.exit(getattr(importlib.import_module(module), name)())
"""


@pytest.mark.parametrize("moment", ["seer_scale.cli", "yaml", "seer_scale.training.start"])
def test_a_stop_is_noted_from_the_first_moment(moment, tmp_path):
    """By the installed script's function; of SIGINT the start ends, the others wait until a run can save."""
    door = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]["seer-scale"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        (tmp_path / "asked.py").write_text(ASKED)
        words = [sys.executable, "-m", "asked", door, moment, str(int(number)), "train", "demo"]
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        if number == signal.SIGINT:
            told = "seer-scale: Stopped by SIGINT before anything was begun. Start it again and it goes on.\n"
            assert (done.returncode, done.stderr) == (EXIT_STOPPED, told)
        else:
            assert done.returncode == 1 and not done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["asked.py"]


def test_a_command_within_a_process_blocks_no_signal():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert main(["train", "no.yaml"]) == 2
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_commands_start_in_a_moment(tmp_path):
    """Help and mistakes need no torch, whose import takes seconds."""
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"event": "start", "text": "Training.", "samples_seen": 0, "wall_time": 1.0}\n')
    asked = [
        "--help",
        "--version",
        "recipes",
        "list",
        "status one",
        "inspect runs/one",
        "train demo --help",
        "train no",
        "trian",
    ]
    asked += [f"{command} --help" for command in ("launch", "import", "inspect", "eval", "bench", "data", "plan")]
    code = (
        "import sys; from seer_scale import cli\n"
        "for words in sys.argv[1:]:\n"
        "    cli.main(words.split())\n"
        "    loaded = {'torch', 'torchvision', 'datasets', 'pyarrow', 'tensorboard', 'deepspeed', 'timm'} & "
        "sys.modules.keys()\n"
        "    assert not loaded, (words, loaded)"
    )
    words = [sys.executable, "-c", code, *asked]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_start_is_told_before_torch_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "seer_scale.training.start", None)  # which would load it
    monkeypatch.delattr("seer_scale.training.start", raising=False)
    with pytest.raises(ImportError):
        main(["train", "demo"])
    assert capsys.readouterr().out == f"seer-scale {__version__}: starting demo ...\n"
    for quiet in (["train", "demo", "--print-config"], ["train", "no.yaml"]):
        with suppress(ImportError):
            main(quiet)
        assert not capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ImportError):
        main(["train", "demo"])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("group", ["bench", "data", "eval"])
def test_a_group_of_commands_has_a_sentence(group, capsys):
    assert main([group, "--help"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"\n\n[A-Z][^\n]*\.\n\n", told), told


@pytest.mark.parametrize("module", ["seer_scale", "seer_scale.cli"])
def test_a_module_of_the_current_folder_stands_in_for_nothing(module, tmp_path):
    for name in ("random", "argparse", "json"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, "-m", module, "recipes", "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and list(json.loads(done.stdout)) == recipe_names(), done.stderr


def test_nor_for_what_a_command_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setattr(sys, "argv", ["seer-scale", "--version"])
    (tmp_path / "random.py").write_text("raise SystemExit(3)")
    child = [sys.executable, "-c", "import random"]
    assert subprocess.run(child, cwd=tmp_path).returncode == 3
    assert main() == 0
    assert subprocess.run(child, cwd=tmp_path).returncode == 0


def test_a_fixed_backbone_with_keys_of_a_free_one_is_one_problem(tmp_path, capsys, photos):
    (tmp_path / "mine.yaml").write_text((RECIPES / "photos_laptop.yaml").read_text())
    words = ["--data.path", str(photos), "--model.name", "regnety_200mf"]
    assert main(["train", str(tmp_path / "mine.yaml"), *words]) == 2
    told = capsys.readouterr().err
    assert "The recipe has 1 problem:" in told and "--model.depth null" in told and told.count("model.name") == 2


def test_formats_of_the_command_line_are_those_of_the_rooms():
    assert EXPORT_FORMATS == tuple(sorted(FORMATS, key=EXPORT_FORMATS.index)) and len(EXPORT_FORMATS) == len(FORMATS)
    assert set(SOURCE_FORMATS) == {"auto", "safetensors", *SOURCE_LAYOUTS}
