"""Exports in the real libraries: the same features, from files that hold no code of ours."""

from __future__ import annotations

import json
import weakref

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

import seer_scale
from seer_scale.cli import main
from seer_scale.data.transforms.views import eval_preprocessing
from seer_scale.interop import write as interop_write
from seer_scale.interop.artefact import About, TensorInfo, write_artefact
from seer_scale.interop.formats import FORMATS
from seer_scale.interop.names import TIMM_MODELS, TORCHVISION_MODELS
from seer_scale.interop.weights import CheckpointWeights
from seer_scale.models.registry import build_backbone, initialise
from seer_scale.models.regnet import REGNETY
from tests.pieces import write_in_pieces
from tests.unit.test_load import MODEL, backbone, checkpoint

LARGEST = 25e6
"""Parameters of the networks that are compared by value; names and shapes of all are compared in
test_interop_names.py."""
SIZE = 32


def network(name: str, size: int = 64) -> torch.nn.Module:
    """With statistics of activations that are not those of a new network."""
    net = build_backbone(name)
    if name.startswith("timm/"):
        net = net.to_empty(device="cpu")
    initialise(net, seed=3)
    generator = torch.Generator().manual_seed(0)
    net.train()
    with torch.no_grad():
        net(torch.randn(4, 3, size, size, generator=generator))
    return net.eval()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A folder with photo.jpg, of smooth colours."""
    folder = tmp_path_factory.mktemp("photo")
    small = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(small).resize((640, 512), Image.Resampling.BICUBIC).save(folder / "photo.jpg", quality=95)
    return folder


def images(n: int = 2, size: int = SIZE) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def run_lines(out, monkeypatch, photo) -> dict:
    """What the lines of the model card define when they are run beside photo.jpg, without a word of ours in them."""
    text = (out / "README.md").read_text()
    lines = text.partition("```python\n")[2].partition("```")[0]
    if "seer_scale" not in lines.splitlines()[0]:
        assert "seer_scale" not in lines
    monkeypatch.chdir(photo)
    found: dict = {}
    file = next(iter([*out.glob("*.onnx"), *out.glob("model*.safetensors")]))
    with torch.no_grad():
        exec(lines.replace("PATH", str(out)).replace("FILE", str(file)), found)
    return found


def small(library_names) -> list[str]:
    def size(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build_backbone(name).parameters())

    return [name for name in library_names if size(name) < LARGEST]


def cases():
    for name in small(REGNETY):
        formats = ["transformers"] + ["timm"] * (name in TIMM_MODELS) + ["torchvision"] * (name in TORCHVISION_MODELS)
        yield name, formats


@pytest.mark.parametrize("name,formats", cases())
def test_the_same_features_in_every_library_that_has_the_network(name, formats, tmp_path, photo, monkeypatch):
    net = network(name)
    _, place = checkpoint(tmp_path / "run", model={"name": name}, net=net)
    ours = seer_scale.load(place)
    x = images()
    with torch.no_grad():
        expected = ours(x)
        close(expected, net(x))
    for format in formats:
        out = seer_scale.export(place, tmp_path / format, format)
        found = run_lines(out, monkeypatch, photo)
        with torch.no_grad():
            theirs = found["model"].eval()(x)
        close(theirs.pooler_output.flatten(1) if format == "transformers" else theirs, expected)
        again = seer_scale.load(out)
        with torch.no_grad():
            assert torch.equal(again(x), expected)


def problem_of(*given, **options) -> seer_scale.Problem:
    with pytest.raises(seer_scale.UserError) as caught:
        seer_scale.export(*given, **options)
    (problem,) = caught.value.problems
    assert "\n" not in str(problem)
    return problem


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(network, checkpoint) of a free generator."""
    return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("format", ["timm", "transformers"])
def test_a_free_generator_where_the_library_can_be_told_of_it(format, tiny, tmp_path, photo, monkeypatch):
    net, place = tiny
    found = run_lines(seer_scale.export(place, tmp_path / "out", format), monkeypatch, photo)
    with torch.no_grad():
        theirs = found["model"].eval()(images())
        close(theirs.pooler_output.flatten(1) if format == "transformers" else theirs, net(images()))


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/vit_tiny_patch16_224", "timm/levit_128s"])
def test_other_backbones_of_timm_go_back_to_it(name, tmp_path, photo, monkeypatch):
    """Of units, with tokens, and as one unit; at another size than timm's own."""
    size = 224 if "levit" in name else 64
    net = network(name, size)
    meta = {"model": {"name": name}, "net": net, "preprocessing": eval_preprocessing(size)}
    _, place = checkpoint(tmp_path / "run", **meta)
    out = seer_scale.export(place, tmp_path / "out", "timm")
    found = run_lines(out, monkeypatch, photo)
    with torch.no_grad():
        close(found["model"](images(2, size)), net(images(2, size)))
    assert problem_of(place, tmp_path / "no", "torchvision").nearest == ("timm", "safetensors", "onnx")


@pytest.mark.parametrize("name", ["regnety_200mf", "timm/vit_tiny_patch16_224", None])
def test_the_lines_printed_of_a_lone_file_give_our_features(name, tiny, tmp_path, photo, monkeypatch):
    """In every format of such files that has the network; the last is a free generator."""
    place = tiny[1]
    if name:
        meta = {"model": {"name": name}, "net": network(name), "preprocessing": eval_preprocessing(64)}
        _, place = checkpoint(tmp_path / "run", **meta)
    monkeypatch.chdir(photo)
    ours = seer_scale.load(place)
    with torch.no_grad():
        expected = ours(ours.transform("photo.jpg")[None])
    done = []
    for format in interop_write.LONE_FILES[".safetensors"]:
        lone = tmp_path / f"{format}.safetensors"
        try:
            lines = interop_write.export_backbone(place, lone, format)
        except seer_scale.UserError as error:
            (problem,) = error.problems
            assert problem.key == "--format" or format == "transformers" and "reads a folder" in problem.rule
            assert not lone.exists()
            continue
        found: dict = {}
        with torch.no_grad():
            exec(lines, found)
        close(found["features"], expected, 0.05)  # libraries resize in orders of their own
        done.append(format)
    assert {"timm", "safetensors"} <= set(done)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_onnx_takes_any_number_of_images(dtype, tiny, tmp_path, photo, monkeypatch):
    net, place = tiny
    out = seer_scale.export(place, tmp_path / "out", "onnx", dtype=dtype)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    for n in (1, 5):
        given = images(n).numpy().astype(np.float16 if dtype == "fp16" else np.float32)
        (features,) = session.run(None, {"images": given})
        with torch.no_grad():
            close(torch.from_numpy(features).float(), net(images(n)), 2e-2 if dtype == "fp16" else 1e-5)
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described["preprocessing"]) == eval_preprocessing(32) | {"training_sizes": [24]}
    assert json.loads(described["seer_scale"])["origin"]["samples_seen"] == 5
    if dtype == "fp32":
        assert run_lines(out, monkeypatch, photo)["features"].shape == (1, net.num_features)


def test_each_library_prepares_images_as_ours_does(tmp_path, photo, monkeypatch):
    """To a few steps of 256. Ours cuts first, theirs resize first, so the picture's sides are multiples of both."""
    model, net = {"name": "regnety_400mf"}, network("regnety_400mf")
    _, place = checkpoint(tmp_path / "run", model=model, net=net, preprocessing=eval_preprocessing(224))
    ours = seer_scale.load(place).transform(photo / "photo.jpg")
    for format in ("timm", "torchvision", "transformers"):
        found = run_lines(seer_scale.export(place, tmp_path / format, format), monkeypatch, photo)
        picture = Image.open(photo / "photo.jpg")
        theirs = found["images"]["pixel_values"][0] if format == "transformers" else found["transform"](picture)
        assert theirs.shape == ours.shape and (theirs - ours).abs().max() < 6 / 255 / 0.225, format


def test_what_a_library_does_not_have_is_refused_with_those_that_do(tiny, tmp_path):
    _, place = tiny
    found = problem_of(place, tmp_path / "out", "torchvision")
    assert (found.key, found.value) == ("--format", "torchvision")
    assert found.nearest == ("timm", "transformers", "safetensors", "onnx")
    with torch.device("meta"):
        shapes = {n: TensorInfo(t.dtype, t.shape) for n, t in build_backbone("regnety_800mf").state_dict().items()}
    zeros = {n: torch.zeros(i.shape, dtype=i.dtype) for n, i in shapes.items()}
    about = About("safetensors", {"name": "regnety_800mf"}, eval_preprocessing(32))
    write_artefact(tmp_path / "x.safetensors", about, shapes, zeros.__getitem__)
    found = problem_of(tmp_path / "x.safetensors", tmp_path / "out", "torchvision")
    assert "other widths" in found.rule and "torchvision" not in found.nearest
    squeezed = MODEL | {"se_ratio": 0.5}
    net = build_backbone(**squeezed)
    initialise(net, 0)
    _, place = checkpoint(tmp_path / "run", model=squeezed, net=net)
    assert problem_of(place, tmp_path / "out", "transformers").nearest == ("timm", "safetensors", "onnx")
    assert problem_of(place, tmp_path / "out", "tim").nearest == "did you mean timm?"
    assert {p.name for p in tmp_path.iterdir()} == {"x.safetensors", "run"}


def test_what_is_written_is_whole_or_not_there(tiny, tmp_path, monkeypatch):
    net, place = tiny
    for dtype, value in (("fp32", float("nan")), ("fp16", 1e9)):
        broken = backbone()
        broken.get_parameter("s4.b1.conv3.conv.weight").data[0] = value
        _, bad = checkpoint(tmp_path / dtype, net=broken)
        for format in FORMATS if dtype == "fp32" else ["timm", "onnx"]:
            if format not in ("torchvision", "dinov2", "convnextv2"):  # which this network has no layout of
                found = problem_of(bad, tmp_path / "out", format, dtype=dtype)
                assert "s4.b1.conv3.conv.weight" in found.rule
    assert found.nearest == ("bf16", "fp32")
    assert problem_of(place, tmp_path / "out", "onnx", dtype="bf16").nearest == ("fp32", "fp16")
    assert problem_of(place, tmp_path / "out", "timm", dtype="fp8").key == "--dtype"
    assert problem_of(place, tmp_path / "out.onnx", "timm").key == "--out"
    assert problem_of(place, tmp_path / "x.safetensors", "transformers").nearest == str(tmp_path / "x")
    for size in ("", "5XB", "-1", 0):
        assert problem_of(place, tmp_path / "out", "timm", max_shard_size=size).key == "--max-shard-size"
    assert {p.name for p in tmp_path.iterdir()} == {"fp32", "fp16"}


def test_only_an_export_is_replaced_and_only_when_asked(tiny, tmp_path):
    _, place = tiny
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is no obstacle
    seer_scale.export(place, out, "timm")
    before = (out / "config.json").stat().st_ino
    assert "--force" in str(problem_of(place, out, "timm").nearest)
    assert (out / "config.json").stat().st_ino == before
    seer_scale.export(place, out, "transformers", force=True)
    assert json.loads((out / "config.json").read_text())["model_type"] == "regnet"
    (out / "thesis.txt").write_text("mine")
    assert "thesis.txt" in problem_of(place, out, "timm", force=True).rule
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "file").write_text("mine")
    for other in ("link", "file"):
        assert problem_of(place, tmp_path / other, "timm", force=True).key == "--out"
    assert problem_of(place, tmp_path / "file" / "below", "timm").key == "--out"


def test_the_largest_tensor_is_held_and_no_second(tmp_path, monkeypatch):
    """Of 41 MB in pieces of 7 ranks: alive at once is one tensor, read and cast; shards are as small as asked."""
    net = build_backbone("regnety_1_6gf")
    initialise(net, 0)
    _, place = checkpoint(tmp_path / "run", ranks=7, model={"name": "regnety_1_6gf"}, net=net)
    alive: dict[int, int] = {}
    most = [0]
    read, cast = CheckpointWeights.read, interop_write._cast

    def watched(tensor):
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor), None)
        most[0] = max(most[0], sum(alive.values()))
        return tensor

    monkeypatch.setattr(CheckpointWeights, "read", lambda *given: watched(read(*given)))
    monkeypatch.setattr(interop_write, "_cast", lambda *given: watched(cast(*given)))
    out = seer_scale.export(place, tmp_path / "out", "transformers", dtype="bf16", max_shard_size="5MB")
    sizes = {n: t.nbytes for n, t in net.state_dict().items()}
    assert sum(sizes.values()) > 40e6 and 0 < most[0] <= 2 * max(sizes.values()) < 0.2 * sum(sizes.values())
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) == 5 and all(f.stat().st_size < 5.2e6 for f in shards)
    loaded = seer_scale.load(out)
    assert all(torch.equal(t, net.state_dict()[n].bfloat16().to(t)) for n, t in loaded.state_dict().items())
    from transformers import RegNetModel

    assert RegNetModel.from_pretrained(out).dtype == torch.bfloat16


def test_a_backbone_of_a_plugin_says_which(tmp_path):
    config = {"model": {"name": "mine"}, "run": {"plugins": ["my_backbone.py"]}}
    net = backbone()
    meta = {
        "samples_seen": 1,
        "config": config,
        "method": {"name": "toy", "state": {}},
        "export": {"prefix": "backbone."},
        "preprocessing": eval_preprocessing(32) | {"training_sizes": [24]},
    }
    place = write_in_pieces(tmp_path / "run", {f"model/backbone.{n}": t for n, t in net.state_dict().items()}, meta, 1)
    found = problem_of(place, tmp_path / "out", "timm")
    assert (found.key, found.value, found.nearest) == ("model.name", "mine", "give --plugin my_backbone.py")


def test_the_command_exports_a_run_with_its_results(tmp_path, capsys):
    """The card has what was measured, and nothing of this machine: the folder of the images by its last name."""
    run = tmp_path / "run"
    checkpoint(run / "checkpoints")
    (run / "config.yaml").write_text("{}")
    rows = [{"samples_seen": n, "knn/top1": 30.0 + n} for n in (0, 5, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "eval").mkdir()
    subject = {"weights": "trained", "samples_seen": 5}
    linear = {"task": "linear", "subject": subject, "scores": {"top1": 61.25}}
    own = {
        "scores": {"knn/top1": 45.25},
        "data_name": "clothes",
        "given": {"k": [10], "lists": ["/home/someone/a.txt"]},
    }
    results = {"linear": linear, "a|b": {"task": 3}, "c": [], "knn": linear | {"task": "knn"} | own}
    results["shirts"] = linear | own | {"given": 3}
    results["coats"] = linear | own | {"given": None}
    for weights, seen in (("random", 0), ("random", 5), ("trained", 10)):
        results[f"{weights}-{seen}"] = linear | {
            "subject": {"weights": weights, "samples_seen": seen}, "scores": {"top1": 99.5},
        }  # fmt: skip
    for name, content in results.items():
        (run / "eval" / f"{name}.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    words = ["export", str(run), "--out", str(out), "--format", "safetensors", "--license", "cc-by-4.0"]
    assert main(words) == 0
    assert f'seer_scale.load("{out}")' in capsys.readouterr().out
    text = (out / "README.md").read_text()
    assert "\n# regnety of run\n" in text
    front, _, body = text.removeprefix("---\n").partition("---\n")
    front = yaml.safe_load(front)
    assert front["license"] == "cc-by-4.0"
    assert front["tags"] == ["toy"], "what it began with may have learned from labels"
    for words_in in (
        "| knn (in training) | of the recipe | of the recipe | 5 | knn/top1: 35 |",
        "| knn | clothes | k [10], lists ['a.txt'] | 5 | knn/top1: 45.25 |",
        "| linear (coats) | clothes |  | 5 | knn/top1: 45.25 |",
        "| linear | of the recipe |  | 5 | top1: 61.25 |",
        "| data | photos |",
        "| began with | the weights of x |",
    ):
        assert words_in in body
    assert "shirts" not in body, "damaged"
    assert "99.5" not in body, "of other weights"
    assert "/home/someone" not in text + (out / "model.safetensors").read_bytes()[:9000].decode(errors="ignore")
    again = seer_scale.export(out, tmp_path / "again", "timm")  # what is known goes along
    assert "| knn | clothes | k [10], lists ['a.txt'] | 5 | knn/top1: 45.25 |" in (again / "README.md").read_text()
    onnx = ["export", str(out), "--out", str(tmp_path / "x.onnx"), "--format", "onnx", "--json"]
    assert main(onnx) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == "onnx" and str(tmp_path / "x.onnx") in told["loading"]
    assert main(["export", str(run), "--out", str(out), "--format", "timm"]) == 2
    assert main(["export", str(run), "--out", str(tmp_path / "b"), "--format", "timm", "--which", "7"]) == 2
