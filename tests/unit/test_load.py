"""Loading a backbone from what many ranks wrote, of methods with a teacher, and from exported files."""

from __future__ import annotations

import pytest
import torch

import seer_scale
from seer_scale.checkpoint import store
from seer_scale.cli import main
from seer_scale.data.transforms.views import eval_preprocessing
from seer_scale.distributed import World
from seer_scale.errors import UserError
from seer_scale.evaluate.subject import check_path, open_subject
from seer_scale.interop.artefact import About, TensorInfo, write_artefact
from seer_scale.interop.load import materialise
from seer_scale.interop.weights import open_weights
from seer_scale.models.registry import build_backbone, initialise
from tests.pieces import bytes_read_by, write_in_pieces
from tests.tiny import RECIPE

MODEL = RECIPE["model"]


def backbone(seed: int = 0) -> torch.nn.Module:
    made = build_backbone(**MODEL)
    initialise(made, seed)
    for buffer in made.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return made.eval()


def checkpoint(
    folder, ranks=1, prefix="backbone.", seen=5, model=MODEL, net=None, preprocessing=None, seed=0, **others
):
    """others: networks that the method holds beside, by the prefix of their names."""
    net = net or backbone()
    state = {f"model/{prefix}{n}": t for n, t in net.state_dict().items()}
    for other, module in others.items():
        state |= {f"model/{other}.{n}": t for n, t in module.state_dict().items()}
    state |= {f"optim/{n}/momentum": torch.zeros_like(t) for n, t in state.items() if t.is_floating_point()}
    meta = {
        "samples_seen": seen,
        "config": {
            "run": {"seed": seed},
            "model": model,
            "data": {"path": "/home/someone/photos"},
            "checkpoint": {"init_from": "/home/someone/x"},
        },
        "method": {"name": "toy", "state": {}},
        "export": {"prefix": prefix},
        "preprocessing": (preprocessing or eval_preprocessing(32)) | {"training_sizes": [24]},
    }
    return net, write_in_pieces(folder, state, meta, ranks)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


def test_of_many_ranks_no_byte_is_read_but_the_backbones(tmp_path):
    """Beside them: where the data of each file begin. The opening has read what is where."""
    net, place = checkpoint(tmp_path, 96, head=torch.nn.Linear(300, 300))
    assert store.validate(place, World()) is None and len(list(place.glob("state-*"))) == 96
    own = sum(t.nbytes for t in net.state_dict().values())
    weights = open_weights(place)
    assert sum(info.nbytes for info in weights.tensors.values()) == own
    loaded, counted = materialise(weights)
    assert same(net, loaded) and counted == own
    assert bytes_read_by(lambda: weights.fill(net.state_dict())) <= own + 96 * 8 + 4096
    assert (place / store.TENSORS).stat().st_size > 4096
    assert all(torch.equal(weights.read(n), t) for n, t in net.state_dict().items())
    weights.close()
    whole = sum(f.stat().st_size for f in place.iterdir())
    assert whole > 5 * own


def test_of_a_teacher_the_prefix_says_which(tmp_path):
    teacher, place = checkpoint(tmp_path, prefix="teacher.backbone.", **{"student.backbone": backbone(seed=1)})
    assert same(seer_scale.load(place), teacher)


def test_a_file_of_something_else_is_told_as_no_file_of_weights(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(seer_scale.UserError, match="photo.jpg is no file of weights"):
        open_weights(tmp_path / "photo.jpg")


def test_a_network_that_is_not_what_the_recipe_says_is_refused(tmp_path):
    _, place = checkpoint(tmp_path / "a", model=MODEL | {"depth": 6})
    with pytest.raises(seer_scale.UserError, match="does not hold a regnety: s"):
        seer_scale.load(place)
    _, place = checkpoint(tmp_path / "b", model={"name": "mine"})
    with pytest.raises(seer_scale.UserError, match="no such backbone") as caught:
        seer_scale.load(place)
    assert caught.value.problems[0].key == "model.name"


def test_what_has_one_state_has_no_other(tmp_path):
    _, place = checkpoint(tmp_path)
    with pytest.raises(seer_scale.UserError) as caught:
        seer_scale.load(place, which="best")
    assert (caught.value.problems[0].key, caught.value.problems[0].value) == ("which", "best")


def test_onnx_is_not_read_back_and_what_is_is_told(tmp_path):
    (tmp_path / "model.onnx").touch()
    for path in (tmp_path, tmp_path / "model.onnx"):
        for read in (seer_scale.load, check_path):
            with pytest.raises(seer_scale.UserError) as caught:
                read(path)
            problem = caught.value.problems[0]
            assert problem.key == str(path) and "ONNX" in problem.rule
            assert all(name in problem.nearest for name in ("safetensors", "timm", "torchvision", "transformers"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_artefact_is_loaded_as_its_run_is(tmp_path, dtype):
    net = backbone()
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in net.state_dict().items()}
    tensors["head/0.weight"] = torch.zeros(3)  # of no backbone
    infos = {n: TensorInfo(t.dtype, t.shape) for n, t in tensors.items()}
    about = About("safetensors", MODEL, eval_preprocessing(32))
    write_artefact(tmp_path / "x.safetensors", about, infos, tensors.__getitem__)
    loaded = seer_scale.load(tmp_path / "x.safetensors")
    assert loaded.transform.size == 32 and all(p.dtype == torch.float32 for p in loaded.parameters())
    assert all(torch.equal(t, tensors[n].to(t.dtype)) for n, t in loaded.state_dict().items())
    del tensors["s4.b1.se.fc1.bias"], infos["s4.b1.se.fc1.bias"]
    write_artefact(tmp_path / "y.safetensors", about, infos, tensors.__getitem__)
    with pytest.raises(seer_scale.UserError, match="s4.b1.se.fc1.bias is absent there"):
        seer_scale.load(tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    "command", ["eval knn", "eval suite", "embed", "export --format timm --out x", "import --out x", "bench embed"]
)
def test_a_path_that_is_not_there_is_said_to_be_not_there(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    words = command.split()
    beside = {"embed": ["d", "--out", "x"], "bench embed": ["d"]}.get(command, [])
    place = 2 if words[0] in ("eval", "bench") else 1
    assert main([*words[:place], "runs/nowhere", *beside, *words[place:]]) == 2
    told = capsys.readouterr()
    assert "runs/nowhere does not exist; the nearest folder there is: " in told.err and not told.out
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("format", ["safetensors", "timm"])
def test_untrained_weights_of_an_export_are_those_with_which_its_run_began(format, tmp_path):
    """By the run's seed and its names, also of an export of an export, at another precision."""
    _, place = checkpoint(tmp_path / "run", prefix="teacher.backbone.", seed=7)
    first = seer_scale.export(place, tmp_path / "first", format, dtype="bf16")
    second = seer_scale.export(first, tmp_path / "second", "transformers")
    seer_scale.import_weights(second, tmp_path / "third")
    wanted = open_subject(place, "last", "random", torch.device("cpu"))
    for path in (first, second, tmp_path / "third"):
        found = open_subject(path, "last", "random", torch.device("cpu"), seed=3)
        assert same(found.model, wanted.model) and found.fingerprint == wanted.fingerprint and not found.remark
    net = backbone()
    tensors = dict(net.state_dict())
    infos = {name: TensorInfo(t.dtype, t.shape) for name, t in tensors.items()}
    file = tmp_path / "other.safetensors"
    for initial in (None, 3, {"seed": "x", "prefix": ""}):
        about = About("safetensors", MODEL, eval_preprocessing(32), {} if initial is None else {"initial": initial})
        write_artefact(file, about, infos, tensors.__getitem__)
        if initial is None:
            assert "of seed 3" in open_subject(file, "last", "random", torch.device("cpu"), seed=3).remark
            continue
        with pytest.raises(UserError, match="damaged metadata"):
            open_subject(file, "last", "random", torch.device("cpu"))
