"""Features in files: the same on any number of ranks and after a kill, in three formats, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import safe_open

from seer_scale.bench import embed as bench
from seer_scale.cli.embed import as_text
from seer_scale.data.loading.loader import eval_batches
from seer_scale.data.sources import open_source
from seer_scale.distributed import World
from seer_scale.errors import UserError
from seer_scale.evaluate import shards
from seer_scale.evaluate.embed import EmbedOptions, embed
from seer_scale.evaluate.subject import Subject, begin
from seer_scale.models.registry import build_backbone
from tests.problems import refused
from tests.ranks import run_ranks
from tests.tiny import world_of
from tests.tries import tries
from tests.unit.test_evaluate import SIZE, Colours
from tests.unit.test_knn import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus")) / "train"


def embedded(corpus: Path, out: Path, world: World = World(), model: Colours | None = None, **given: object) -> dict:
    model = model or Colours()
    model.num_features = 3
    subject = Subject(path=corpus, model=model, fingerprint="0", weights="trained", size=SIZE)
    options = EmbedOptions(**{"shard": 10, "batch": 4, "workers": 0} | given)
    options.check()
    return embed(subject, str(corpus), out, options, world, out.with_name(f".{out.name}.unfinished"))


def on_ranks(rank: int, size: int, corpus: Path, out: Path) -> None:
    embedded(corpus, out, world_of(rank, size))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}


def test_shards_hold_each_image_once_with_its_name_and_label(corpus, tmp_path):
    made = embedded(corpus, tmp_path / "out")
    source = open_source(str(corpus))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == made
    assert (made["images"], made["unreadable"], made["num_features"]) == (33, 1, 3)
    assert made["classes"] == ["class0", "class1", "class2"] and made["preprocessing"]["size"] == SIZE
    assert [s["first"] for s in made["shards"]] == [0, 10, 20, 30]
    names = []
    for shard in made["shards"]:
        with safe_open(tmp_path / "out" / shard["file"], "pt") as file:
            numbers, labels = file.get_tensor("numbers"), file.get_tensor("labels")
            assert file.get_slice("features").get_shape() == [shard["images"], 3]
            assert [source.label(i) for i in numbers.tolist()] == labels.tolist()
            found = json.loads(file.metadata()["names"])
            assert found == [source.name(i) for i in numbers.tolist()]
            names += found
    assert len(set(names)) == 33
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.unfinished", "out"]


def test_two_ranks_and_a_kill_leave_the_same_bytes(corpus, tmp_path):
    embedded(corpus, tmp_path / "alone")
    run_ranks(2, on_ranks, corpus, tmp_path / "pair")
    assert files(tmp_path / "pair") == files(tmp_path / "alone")

    model, begun = Colours(), 0

    def until(images, forward=model.forward):
        if model.seen >= 23:
            raise KeyboardInterrupt
        return forward(images)

    model.forward = until
    with pytest.raises(KeyboardInterrupt):
        embedded(corpus, tmp_path / "killed", model=model)
    assert not (tmp_path / "killed").exists()
    begun = Colours()
    embedded(corpus, tmp_path / "killed", model=begun)
    assert begun.seen in (13, 14), "two shards of ten were whole"
    assert files(tmp_path / "killed") == files(tmp_path / "alone")
    again = Colours()
    assert embedded(corpus, tmp_path / "killed", model=again)["images"] == 33 and not again.seen
    with refused("--out", ANYWHERE := str(tmp_path / "killed"), "give a new folder", error=UserError):
        embedded(corpus, Path(ANYWHERE), size=8)


def test_formats_hold_the_same_numbers(corpus, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    embedded(corpus, tmp_path / "s", shard=40)
    embedded(corpus, tmp_path / "n", shard=40, format="npy")
    embedded(corpus, tmp_path / "p", shard=40, format="parquet")
    embedded(corpus, tmp_path / "h", shard=40, dtype="bfloat16")
    expected = safetensors.torch.load_file(tmp_path / "s" / "features-000000.safetensors")
    array = np.load(tmp_path / "n" / "features-000000.npy")
    beside = json.loads((tmp_path / "n" / "features-000000.json").read_text())
    table = pq.read_table(tmp_path / "p" / "features-000000.parquet")
    half = safetensors.torch.load_file(tmp_path / "h" / "features-000000.safetensors")["features"]
    assert np.array_equal(array, expected["features"]) and half.equal(expected["features"].bfloat16())
    assert np.array_equal(np.stack(table["features"].to_numpy()), array)
    assert beside["labels"] == expected["labels"].tolist() == table["labels"].to_pylist()
    assert beside["names"] == table["names"].to_pylist() and beside["numbers"] == table["numbers"].to_pylist()


def test_what_cannot_be_stored_is_told(corpus, tmp_path):
    with refused("--dtype", "bfloat16", ("float32", "float16"), error=UserError):
        embedded(corpus, tmp_path / "out", format="npy", dtype="bfloat16")
    model = Colours()
    model.forward = lambda images, forward=model.forward: 1e6 + forward(images)
    with refused("--dtype", "float16", "give --dtype float32", error=UserError):
        embedded(corpus, tmp_path / "out", dtype="float16", model=model)
    with pytest.raises(UserError) as found:
        EmbedOptions(shard=0, batch=0, size=3).check()
    assert [p.key for p in found.value.problems] == ["--shard-size", "--batch", "--size"]
    assert not (tmp_path / "out").exists()


def test_no_batch_reaches_over_a_shard(corpus):
    source = open_source(str(corpus))
    for workers in (0, 2):
        batches = [n.tolist() for *_, n in eval_batches(source, np.arange(34), 8, batch=4, workers=workers, within=10)]
        assert all(b[0] // 10 == b[-1] // 10 and len(b) <= 4 for b in batches)
        assert sum(batches, []) == sorted(sum(batches, [])) and len(sum(batches, [])) == 33


def test_the_bench_compares_with_the_bare_forward(corpus, monkeypatch):
    subject = Subject(path=corpus, model=Colours(), fingerprint="0", weights="trained", size=SIZE)
    monkeypatch.setattr(bench, "open_subject", lambda *_: subject)
    monkeypatch.setattr(bench, "check_path", lambda path: None)
    threads = torch.get_num_threads()
    parser = bench.argparse.ArgumentParser()
    bench.add_arguments(parser)
    words = [str(corpus), str(corpus), "--images", "12", "--rounds", "1", "--workers", "0", "--device", "cpu", "--json"]
    found = json.loads(bench.run(parser.parse_args(words)))
    torch.set_num_threads(threads)
    assert set(found["images_per_s"]) == {"forward", "loader", "embed"} and found["to_forward"] > 0


def test_embed_makes_as_many_images_a_second_as_the_bare_forward(monkeypatch, tmp_path):
    """Where the loader keeps up, as it is here: the images are there. Each is encoded once, in full batches."""
    for i in range(96):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    draw = torch.Generator().manual_seed(0)
    pixels = [torch.randint(256, (16, 3, 96, 96), generator=draw, dtype=torch.uint8) for _ in range(6)]
    labels = torch.full((16,), -1)

    def loaded(source, indices, size, *, batch, workers, within=0):
        return ((p, labels, torch.arange(16 * i, 16 * (i + 1))) for i, p in enumerate(pixels))

    model = build_backbone("regnety_200mf").to_empty(device="cpu").eval()
    begin(model, 0)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    subject = Subject(path=tmp_path, model=model, fingerprint="0", weights="random", size=96)
    for module, name, value in (
        (bench, "open_subject", lambda *_: subject), (bench, "check_path", lambda path: None),
        (bench, "available_cores", lambda: 1), (bench, "eval_batches", loaded), (shards, "eval_batches", loaded),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    parser = bench.argparse.ArgumentParser()
    bench.add_arguments(parser)
    given = parser.parse_args([str(tmp_path)] * 2 + ["--device", "cpu", "--json", "--batch", "16", "--rounds", "3"])
    ratios = tries(lambda: json.loads(bench.run(given))["to_forward"], lambda ratio: ratio >= 0.95)
    assert max(ratios) >= 0.95, ratios
    assert sizes == [16] * (1 + 3 * 2) * 6 * len(ratios), "a warm-up, and each round's forwards and embed's"


def test_what_was_written_is_told_with_nouns_that_agree():
    made = {"shards": [{}], "format": "npy", "images": 33, "num_features": 3, "unreadable": 0}
    assert as_text(made, Path("out")).endswith("in 1 npy file.")
    assert as_text(made | {"shards": [{}, {}]}, Path("out")).endswith("in 2 npy files.")
