"""Methods and backbones from outside: files beside a user's images bring them, to every command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import seer_scale
from seer_scale import plugins
from seer_scale.config import all_keys, load_recipe, resolve
from seer_scale.errors import UserError
from seer_scale.launch.prepare import Request, own_plugins, prepare, write_job
from seer_scale.launch.profile import Profile
from seer_scale.models.registry import register_backbone
from tests.e2e.runs import RECIPE

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
METHOD, BACKBONE = EXAMPLES / "my_method.py", EXAMPLES / "my_backbone.py"
BOTH = ("--plugin", "my_method", "--plugin", "my_backbone")


def run(*words: object, folder: Path, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "seer_scale", *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def beside(tmp_path) -> Path:
    """A folder with the examples' plugins, and a recipe that names method and backbone."""
    for plugin in (METHOD, BACKBONE):
        shutil.copy(plugin, tmp_path)
    given = {k: v for k, v in RECIPE.items() if k not in ("swav", "model")}
    given |= {"model": {"name": "plain_convnet"}, "method": {"name": "colours"}, "knn": {"enabled": False}}
    given["train"] = RECIPE["train"] | {"total_samples": 32}
    given["optim"] = {"name": "sgd", "lr": 0.1, "lr_batch": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    return tmp_path


def test_files_beside_bring_a_method_and_a_backbone(beside, photos):
    words = ("train", "recipe.yaml", "--data.path", photos, "--run.dir", "run")
    told = run(*words, folder=beside, status=2)
    assert "method.name is colours, but must be one of dinov2, fcmae, swav" in told and "--plugin" in told
    assert "has 1 problem:" in told  # and not its section, too
    told = run(*words, *BOTH, "--colours.weight", 50, folder=beside, status=2)
    assert "colours.weight is 50, but must be at most ten a channel; nearest: 30" in told
    said = run(*words, *BOTH, "--colours.weight", 2, folder=beside)
    assert "Training plain_convnet" in said
    lines = seer_scale.Run(beside / "run").metrics()
    assert [r["samples_seen"] for r in lines if "loss" in r][-1] == 32
    assert all(r["loss"] == pytest.approx(2 * r["colours/error"]) for r in lines if "loss" in r)
    assert "prototypes" not in (beside / "run" / "report.html").read_text()  # which this method has not
    config = yaml.safe_load((beside / "run" / "config.yaml").read_text())
    assert (
        config["run"]["plugins"] == ["my_method", "my_backbone"]
        and config["colours"]["weight"] == 2
        and "swav" not in config
    )
    other = ("train", "photos_laptop", "--data.path", photos, "--run.dir", "run", "--train.threads", 1)
    told = run(*other, "--schedule.warmup_samples", 0, "--train.total_samples", 48, folder=beside, status=2)
    assert "method.name is swav, but run/checkpoints/samples-000000000032 was trained by colours; give colours" in told
    more = run(*words, *BOTH, "--colours.weight", 2, "--train.total_samples", 48, folder=beside)
    assert "Going on from" in more and "run.plugins" not in more
    assert "--colours.channels int" in run("train", "recipe.yaml", "--plugin=my_method", "--help", folder=beside)
    program = "import seer_scale; m = seer_scale.load('run', plugins=['my_backbone']); print(m.num_features)"
    done = subprocess.run([sys.executable, "-c", program], cwd=beside, capture_output=True, text=True)
    assert done.stdout == "16\n", done.stderr


MAKE = """
import torch
from seer_scale.models.registry import build_backbone, initialise
from seer_scale.plugins import load_plugins

load_plugins(["my_backbone.py"])
net = build_backbone("plain_convnet")
initialise(net, seed=3)
torch.save(net.state_dict(), "x.pth")
"""
COMPARE = """
import seer_scale, torch

made = torch.load("x.pth")
for place in ("in", "again"):
    found = seer_scale.load(place, plugins=["my_backbone.py"]).state_dict()
    assert found.keys() == made.keys() and all(torch.equal(found[n], t) for n, t in made.items())
"""


def test_weights_of_a_plugins_backbone_come_in(beside):
    """From a file by its names, and from an export by its metadata; what the file names is not loaded by itself."""

    def python(program: str) -> None:
        done = subprocess.run([sys.executable, "-c", program], cwd=beside, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    python(MAKE)
    words = ("import", "x.pth", "--model", "plain_convnet", "--out")
    told = run(*words, "in", folder=beside, status=2)
    assert "no such backbone" in told and "--plugin" in told and not (beside / "in").exists()
    plugin = ("--plugin", "my_backbone.py")
    assert "--model.name plain_convnet" in run(*words, "in", *plugin, folder=beside)
    assert "--plugin" in run("import", "in", "--out", "again", folder=beside, status=2)
    run("import", "in", "--out", "again", *plugin, folder=beside)
    python(COMPARE)
    save_file({"s9.weight": torch.zeros(1)}, beside / "y.safetensors")
    told = run("import", "y.safetensors", "--model", "plain_convnet", "--out", "no", *plugin, folder=beside, status=2)
    assert "does not hold a plain_convnet: stem.conv.weight is absent" in told


def test_what_a_class_lacks_is_told_before_anything_is_made(beside, photos):
    words = ("train", "recipe.yaml", "--data.path", photos, "--run.dir", "run")
    text = (beside / "my_method.py").read_text()
    (beside / "half_method.py").write_text(text.replace("def encode(", "def encoded("))
    told = run(*words, "--plugin", "half_method", "--plugin", "my_backbone", folder=beside, status=2)
    assert "method.name is colours, but its class Colours in half_method lacks encode" in told
    (beside / "mute_method.py").write_text(text.replace('"head.bias"', '"tail.bias"'))
    told = run(*words, "--plugin", "mute_method", "--plugin", "my_backbone", folder=beside, status=2)
    assert "do not say how head.bias starts (1 parameter in all)" in told and not (beside / "run").exists()
    assert "--plugin has no value" in run(*words, "--plugin", "--train.threads", 1, folder=beside, status=2)


def test_what_a_checkpoint_names_is_not_imported(beside, photos):
    run("train", "recipe.yaml", "--data.path", photos, "--run.dir", "run", *BOTH, folder=beside)
    for plugin in (METHOD, BACKBONE):
        (beside / plugin.name).write_text("open('imported', 'w')\n" + plugin.read_text())
    run("inspect", "run", folder=beside)
    run("report", "run", folder=beside)
    assert seer_scale.Run(beside / "run").config.method.name == "colours" and not (beside / "imported").exists()
    other = ("train", "photos_laptop", "--data.path", photos, "--run.dir", "run", "--train.threads", 1)
    run(*other, "--schedule.warmup_samples", 0, "--train.total_samples", 64, folder=beside, status=2)
    told = run("eval", "knn", "run", "--data", photos, folder=beside, status=2)
    assert "--plugin" in told and not (beside / "imported").exists()


def test_a_launched_run_takes_a_copy_of_its_plugins(beside, photos, monkeypatch):
    """Edits reach no run on its way: that of a file, of a package; an installed module is named as it is."""
    monkeypatch.chdir(beside)
    (beside / "package").mkdir()
    (beside / "package" / "__init__.py").write_text("from package.part import VALUE\n")
    (beside / "package" / "part.py").write_text("VALUE = 1\n")
    names = ["my_method", "my_backbone", "./package", "json"]
    words = ["--data.path", str(photos), "--run.plugins", json.dumps(names)]
    request = Request(recipe="recipe.yaml", cluster="local", profile=Profile(), overrides=words)
    job, recipe, _ = prepare(request, [])
    assert set(own_plugins(recipe)) == {"my_method", "my_backbone", "./package"}
    code = Path(write_job(job, recipe).code)
    travels = yaml.safe_load(job.recipe.read_text())["run"]["plugins"]
    assert travels == [
        *(str(code / "plugins" / p.name) for p in (METHOD, BACKBONE)),
        str(code / "plugins" / "package"),
        "json",
    ]
    assert (code / "plugins" / "package" / "part.py").read_text() == "VALUE = 1\n"
    (beside / "package" / "part.py").write_text("VALUE = 2\n")
    assert write_job(job, recipe).code != str(code)


def test_names_are_loaded_once_and_stay_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("counting_plugin.py").write_text("import builtins\nbuiltins.counted = getattr(builtins, 'counted', 0) + 1\n")
    plugins.load_plugins(["counting_plugin", "./counting_plugin.py", str(tmp_path / "counting_plugin.py")])
    import builtins

    assert builtins.counted == 1
    Path("torch.py").write_text("")
    for plugin, words in (
        ("./torch.py", "there is a module torch already"),
        ("nowhere_to_be_found", "there is no such module"),
        ("./gone.py", "no module lies there"),
        ("a-b", "there is no such module"),
    ):
        with pytest.raises(UserError) as caught:
            plugins.load_plugins([plugin])
        (problem,) = caught.value.problems
        assert problem.key == "run.plugins" and words in problem.rule
    Path("broken_plugin.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match="cannot be loaded .ZeroDivisionError"):
        plugins.load_plugins(["broken_plugin"])
    assert "broken_plugin" not in sys.modules
    Path("lacking_plugin.py").write_text("import not_installed_at_all\n")
    with pytest.raises(UserError, match="needs not_installed_at_all, which is not installed"):
        plugins.load_plugins(["lacking_plugin"])


def test_a_name_is_one_modules(tmp_path):
    """The second to take it is refused, and the first stays; a module may be run again."""
    shutil.copy(METHOD, tmp_path)
    (tmp_path / "other_colours.py").write_text(METHOD.read_text())
    (tmp_path / "other_swav.py").write_text(METHOD.read_text().replace('"colours"', '"swav"'))
    program = """
from seer_scale.config import settings_classes
from seer_scale.methods.registry import method_class
from seer_scale.plugins import UserError, load_plugins
load_plugins(["my_method"])
before = method_class("colours"), settings_classes()["colours"]
for name, owner in (("other_colours", "my_method"), ("other_swav", "seer_scale.methods.swav.settings")):
    try:
        load_plugins([name])
    except UserError as error:
        assert f"is a method of {owner} already" in str(error), error
    else:
        raise AssertionError(name)
assert (method_class("colours"), settings_classes()["colours"]) == before
exec(compile(open("my_method.py").read(), "again", "exec"), {"__name__": "my_method"})
assert method_class("colours") is not before[0] and method_class("swav").__name__ == "SwAV"
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "fine\n", done.stderr


def test_a_recipe_names_its_plugins_itself(tmp_path):
    """The section is known before it is read, and its keys to the hints."""
    method = tmp_path / "own_method.py"
    method.write_text(METHOD.read_text().replace('"colours', '"own_colours'))  # another test has loaded `colours`
    backbone = tmp_path / "own_backbone.py"
    backbone.write_text(BACKBONE.read_text().replace('"plain_convnet"', '"own_convnet"'))
    given = {
        "data": {"path": "-"},
        "train": {"total_samples": 8, "global_batch": 8},
        "model": {"name": "own_convnet"},
    }
    given |= {
        "run": {"plugins": [str(method), str(backbone)]},
        "method": {"name": "own_colours"},
        "own_colours": {"channels": 2},
    }
    config = resolve(given, ["--own_colours.weight", "3"])
    assert config.to_dict()["own_colours"] == {"channels": 2, "weight": 3.0} and "swav" not in config.to_dict()
    assert resolve(config.to_dict()) == config
    assert ("own_colours.channels", "int", 3, "colour channels that are regressed") in all_keys()
    with pytest.raises(UserError) as caught:
        resolve(given | {"swav": {"queue": 0}}, ["--own_colours.chanels", "3"])
    assert {(p.key, p.nearest) for p in caught.value.problems} == {
        ("swav", "remove the section"), ("own_colours.chanels", "did you mean own_colours.channels?"),
    }  # fmt: skip
    demo = resolve(load_recipe("demo"), ["--data.path", "-"])
    assert demo.method.name == "swav" and "own_colours" not in demo.to_dict()


def test_a_backbones_name_is_one_modules_too():
    def factory(module: str):
        return type("Net", (), {"__module__": module})

    register_backbone("one_modules_net")(factory("first"))
    register_backbone("one_modules_net")(factory("first"))
    with pytest.raises(ValueError, match="one_modules_net is a backbone of first already"):
        register_backbone("one_modules_net")(factory("second"))
