"""Data sets of the library `datasets`: every image comes back as written, from whatever holds it, and in passing."""

import io
import itertools
import json
import multiprocessing
import pickle
import sys
import zipfile
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from PIL import Image

from seer_scale.errors import NOTHING, DataError, Unreadable
from seer_scale.evaluate.splits import open_data_set
from tests.problems import refused, unreadable

datasets = pytest.importorskip("datasets")

from seer_scale.corpus.describe import format_of  # noqa: E402
from seer_scale.data.sources import hub, kind_of, open_source  # noqa: E402
from seer_scale.extras import how_to_install  # noqa: E402

N = 60
LABELS = [i % 3 for i in range(N)]
NAMES = ["ant", "bee", "cow"]


def jpeg(i: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (i, 255 - i, 7 * i % 256)).save(out, "JPEG")
    return out.getvalue()


JPEGS = [jpeg(i) for i in range(N)]


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No network, and a cache for each test: the library has read its variables by now, so its own names are set."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "hf" / "modules"))
    datasets.disable_progress_bars()


def made(images=None, features=None, **columns):
    """A data set of columns id, image (declared as images) and label (declared as classes), or of others."""
    images = [{"bytes": b, "path": None} for b in JPEGS] if images is None else images
    declared = {"id": datasets.Value("int64"), "image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    rows = {"id": list(range(len(images))), "image": images, "label": LABELS[: len(images)], **columns}
    return datasets.Dataset.from_dict(rows, features=datasets.Features({**declared, **(features or {})}))


def saved(tmp_path) -> str:
    made().save_to_disk(tmp_path / "saved", num_shards=3)
    return str(tmp_path / "saved")


def parquet(tmp_path, names=("0", "1", "2")) -> str:
    (tmp_path / "parquet").mkdir()
    for n, name in enumerate(names):
        made().shard(len(names), n, contiguous=True).to_parquet(tmp_path / "parquet" / f"{name}.parquet", batch_size=7)
    return str(tmp_path / "parquet")


def image_folder(tmp_path) -> str:
    for i, label in enumerate(LABELS):
        path = tmp_path / "photos" / NAMES[label] / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JPEGS[i])
    return f"hf:{tmp_path / 'photos'}"


def clone_of_the_hub(tmp_path) -> str:
    """As `git clone` leaves it: a card, and shards in a folder."""
    Path(parquet(tmp_path)).rename(tmp_path / "data")
    (tmp_path / "clone").mkdir()
    (tmp_path / "data").rename(tmp_path / "clone" / "data")
    (tmp_path / "clone" / "README.md").write_text("A card.")
    (tmp_path / "clone" / ".gitattributes").write_text("*.parquet filter=lfs")
    return str(tmp_path / "clone")


def in_capitals(tmp_path) -> str:
    folder = Path(parquet(tmp_path))
    for name in ("0", "2"):
        (folder / f"{name}.parquet").rename(folder / f"{name}.PARQUET")
    return str(folder)


def zipped_folder(tmp_path) -> str:
    image_folder(tmp_path)
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "train.zip", "w") as archive:
        for path in sorted((tmp_path / "photos").rglob("*.jpg")):
            archive.write(path, path.relative_to(tmp_path / "photos"))
    return f"hf:{tmp_path / 'zipped'}"


def test_a_path_may_name_its_split_so_that_one_is_trained_on_and_another_tested_on(tmp_path):
    parts = datasets.DatasetDict(train=made().select(range(8)), test=made().select(range(8, 12)))
    parts.save_to_disk(tmp_path / "saved")
    path = f"hf:{tmp_path / 'saved'}"
    data = open_data_set(path, f"{path}[test]", None)
    assert (len(data.train), len(data.test)) == (8, 4)
    assert data.train.targets.tolist() == LABELS[:8] and data.test.targets.tolist() == LABELS[8:12]
    with pytest.raises(DataError):
        open_source(f"{path}[val]")


def arrow_file(tmp_path) -> str:
    (shard,) = made().save_to_disk(tmp_path / "one", num_shards=1) or (tmp_path / "one").glob("*.arrow")
    return str(shard.rename(tmp_path / "x.arrow"))


WAYS = {
    "saved": saved,
    "parquet folder": parquet,
    "parquet glob": lambda d: f"{parquet(d)}/*.parquet",
    "parquet file": lambda d: f"{parquet(d, ['all'])}/all.parquet",
    "arrow file": arrow_file,
    "image folder": image_folder,
    "clone": clone_of_the_hub,
    "in capitals": in_capitals,
}
IN_PASSING = {name: way for name, way in WAYS.items() if name != "saved"} | {"zipped folder": zipped_folder}


def contents(source):
    return sorted((source.read(i), source.label(i)) for i in range(len(source)))


# ---------------------------------------------------------------------------------------------- reading at random


@pytest.mark.parametrize("way", WAYS)
def test_every_image_and_label_is_what_was_written(tmp_path, way):
    path = WAYS[way](tmp_path)
    assert hub.looks_like_hub(path)
    source = hub.open_hub(path)
    assert contents(source) == sorted(zip(JPEGS, LABELS)) and source.classes == NAMES and source.has_labels
    assert source.labels.dtype == np.int32 and not source.is_stream
    if way != "image folder":
        assert [source.read(i) for i in range(N)] == JPEGS  # in the order of the data set
    assert source.name(17) == f"hf:{path.removeprefix('hf:')}[train]#17"


def test_what_does_not_look_like_it(tmp_path):
    for name in ("photos/1.jpg", "mixed/1.parquet", "mixed/1.tar", "tars/1.tar", "nested.parquet/a/1.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()
    for name in ("photos", "mixed", "tars", "tars/1.tar", "empty", "nowhere", "nested.parquet"):
        assert not hub.looks_like_hub(str(tmp_path / name))
    assert hub.looks_like_hub("hf:owner/name@config")
    assert kind_of(clone_of_the_hub(tmp_path)) == "hub"
    (tmp_path / "photos" / "a").mkdir()
    (tmp_path / "photos" / "metadata.parquet").touch()  # beside images
    assert kind_of(str(tmp_path / "photos")) == "folder"


@pytest.mark.parametrize("table", ["data/0.parquet", "X.PARQUET"])
def test_tables_beside_a_few_images_are_asked_about(tmp_path, table):
    """A clone's logo is not its data; of many images, and a table beside them, there is no doubt."""
    place = tmp_path / "clone"
    for name in (table, "assets/logo.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
    made().to_parquet(place / table)
    (place / "assets" / "logo.png").write_bytes(JPEGS[0])
    (place / "self").symlink_to("self")
    with refused(place) as error:
        open_source(str(place))
    assert table in error.value.problems[0].rule and "assets/logo.png" in error.value.problems[0].rule
    assert len(open_source(str(place), "hub")) == N and len(open_source(str(place), "folder")) == 1
    for n in range(hub.FEW_IMAGES):
        (place / "assets" / f"{n}.jpg").touch()
    assert kind_of(str(place)) == "folder"


def test_folders_of_many_classes_are_no_tables(tmp_path):
    for n in range(hub.LOOKED_AT):
        (tmp_path / f"{n}").mkdir()
        (tmp_path / f"{n}" / "1.jpg").touch()
    (tmp_path / "index.parquet").touch()
    assert kind_of(str(tmp_path)) == "folder"


def test_columns_that_are_empty_throughout(tmp_path):
    """A struct of bytes and paths whose paths, or labels, were never given has no type for them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, cells in (
        ("bytes", [{"bytes": b, "path": None} for b in JPEGS[:9]]),
        ("more", [{"bytes": b, "path": None, "width": 8} for b in JPEGS[:9]]),
    ):
        pq.write_table(pa.table({"image": cells, "label": ["cat", "", None] * 3}), tmp_path / f"{name}.parquet")
        source = open_source(str(tmp_path / f"{name}.parquet"))
        assert [source.read(i) for i in range(9)] == JPEGS[:9]
        assert source.classes == ["cat"] and source.labels.tolist() == [0, -1, -1] * 3 and not source.has_labels
    pq.write_table(pa.table({"image": [{"bytes": None, "path": None}] * 3}), tmp_path / "none.parquet")
    with refused("data.image_key", NOTHING):
        open_source(str(tmp_path / "none.parquet"))


def test_a_clone_without_its_large_files(tmp_path):
    clone = Path(clone_of_the_hub(tmp_path))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for path in (clone / "data").iterdir():
        path.write_text(pointer)
    with unreadable(clone, "run git lfs pull"):
        open_source(str(clone))
    assert format_of(pointer.encode()) == "a Git LFS pointer"


def test_splits(tmp_path):
    parts = datasets.DatasetDict(train=made().select(range(40)), test=made().select(range(40, 60)))
    parts.save_to_disk(tmp_path / "dict")
    path = str(tmp_path / "dict")
    assert hub.looks_like_hub(path)
    assert contents(hub.open_hub(path)) == sorted(zip(JPEGS[:40], LABELS))
    assert contents(hub.open_hub(path, "test")) == sorted(zip(JPEGS[40:], LABELS[40:]))
    with refused("data.split", "tests", "did you mean test?"):
        hub.open_hub(path, "tests")
    with refused("data.split", "test"):
        hub.open_hub(saved(tmp_path), "test")
    folder = parquet(tmp_path, ["train-0", "train-1", "test-0"])  # a folder's file names say the split
    assert len(hub.open_hub(folder)) == 40 and hub.open_hub(folder, "test").read(19) == JPEGS[59]
    assert len(hub.open_hub(folder, "train[:25%]")) == 10
    with unreadable(f"{folder}/test-0.parquet", "Unknown split"):
        hub.open_hub(f"{folder}/test-0.parquet", "validation")


def test_only_the_row_and_its_columns_are_read(tmp_path, monkeypatch):
    source = hub.open_hub(saved(tmp_path))
    assert source._data.column_names == ["image", "label"]
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *a, **k: pytest.fail("decoded"))
    source.read(3)
    assert "_numbered" not in vars(source)  # labels are read when they are asked for


@pytest.mark.parametrize(
    "feature, cells",
    [
        (datasets.Value("binary"), JPEGS),
        (datasets.Value("large_binary"), JPEGS),
        (
            {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            [{"bytes": b, "path": "x"} for b in JPEGS],
        ),
    ],
)
def test_bytes_that_are_not_declared_as_images(tmp_path, feature, cells):
    made(features={"image": feature}, image=cells).to_parquet(tmp_path / "x.parquet")
    source = hub.open_hub(str(tmp_path / "x.parquet"))
    assert [source.read(i) for i in range(N)] == JPEGS and source.name(3).endswith("x.parquet[train]#3")


def test_paths_and_addresses(tmp_path):
    (tmp_path / "1.jpg").write_bytes(JPEGS[1])
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/2.jpg", JPEGS[2])
    archive = f"::{tmp_path}/x.zip"
    paths = [f"{tmp_path}/1.jpg", f"zip://a/2.jpg{archive}"]
    paths += [f"{tmp_path}/gone.jpg", f"file://{tmp_path}/gone.jpg", f"zip://gone{archive}", f"zip://gone{archive}x"]
    text, pair = datasets.Value("string"), {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    for n, (feature, cells) in enumerate([(text, paths), (pair, [{"bytes": None, "path": p} for p in paths])]):
        made(cells, {"image": feature}).save_to_disk(tmp_path / f"{n}")
        source = hub.open_hub(f"{tmp_path}/{n}")
        assert [source.read(i) for i in range(2)] == JPEGS[1:3]
        for gone in range(2, 6):
            with unreadable(paths[gone]):
                source.read(gone)


def test_no_data_is_read_for_a_name(tmp_path, monkeypatch):
    """A damaged file would end this process, where a loader process can be replaced."""
    source = hub.open_hub(saved(tmp_path))
    monkeypatch.setattr(hub.HubSource, "_cell", lambda *_: pytest.fail("read"))
    assert source.name(3).endswith("[train]#3")


def test_an_image_that_is_missing_is_that_image_s_error(tmp_path):
    images = [{"bytes": JPEGS[0], "path": None}, None, {"bytes": JPEGS[2], "path": None}]
    made(images).save_to_disk(tmp_path / "x")
    source = hub.open_hub(str(tmp_path / "x"))
    with unreadable(source.name(1), "neither bytes nor a path"):
        source.read(1)
    assert source.read(2) == JPEGS[2]


@pytest.mark.parametrize(
    "feature, cells, labels, classes",
    [
        (datasets.Value("int16"), [10, 2, -1, 10], [1, 0, -1, 1], ["2", "10"]),
        (datasets.Value("string"), ["cow", None, "ant", "cow"], [1, -1, 0, 1], ["ant", "cow"]),
        (datasets.ClassLabel(names=NAMES), [2, -1, 0, None], [2, -1, 0, -1], NAMES),
        (datasets.Value("float32"), [0.5] * 4, None, []),
    ],
)
def test_labels(tmp_path, feature, cells, labels, classes):
    images = [{"bytes": b, "path": None} for b in JPEGS[:4]]
    made(images, {"label": feature}, label=cells).save_to_disk(tmp_path / "x")
    source = hub.open_hub(str(tmp_path / "x"))
    assert (source.labels if labels is None else source.labels.tolist()) == labels and list(source.classes) == classes
    assert not source.has_labels


def test_the_label_is_the_only_declared_column_or_one_of_the_usual_names(tmp_path):
    kind = datasets.ClassLabel(names=NAMES)
    for n, (names, chosen) in enumerate(
        [(["breed"], "breed"), (["coarse", "fine_label"], "fine_label"), (["a", "b"], None)]
    ):
        columns = {name: [k] * N for k, name in enumerate(names)}
        made(features=dict.fromkeys(names, kind), **columns).remove_columns("label").save_to_disk(tmp_path / f"{n}")
        source = hub.open_hub(f"{tmp_path}/{n}")
        assert source.label(5) == (names.index(chosen) if chosen else None)


def test_every_bad_data_set_gets_one_sentence_that_helps(tmp_path):
    two = {"image": datasets.Image(), "mask": datasets.Image()}
    made(features=two, mask=[None] * N).save_to_disk(tmp_path / "two")
    made().remove_columns("image").save_to_disk(tmp_path / "none")
    made([]).save_to_disk(tmp_path / "empty", num_shards=1)
    made([]).to_parquet(tmp_path / "empty.parquet")
    (tmp_path / "x.parquet").write_bytes(b"text" * 100)
    (tmp_path / "photos").mkdir()
    for path, key, at_fault, value, nearest in [
        ("two", "", "data.image_key", NOTHING, ANY),
        ("two", "masks", "data.image_key", "masks", "did you mean mask?"),
        ("two", "id", "data.image_key", "id", "known: image, mask."),
        ("none", "", "data.image_key", NOTHING, ANY),
        ("empty", "", tmp_path / "empty", NOTHING, ""),
    ]:
        with refused(at_fault, value, nearest):
            hub.open_hub(str(tmp_path / path), image_key=key)
    for path, reason in [
        ("empty.parquet", "corresponds to no data"),
        ("x.parquet", ""),
        ("y.parquet", ""),
        ("photos", ""),
    ]:
        with unreadable(tmp_path / path, reason) as error:
            hub.open_hub(str(tmp_path / path))
        assert "\n" not in str(error.value)
    assert hub.open_hub(str(tmp_path / "two"), image_key="image").read(5) == JPEGS[5]


def test_the_hub_out_of_reach(monkeypatch):
    for path in ("hf:owner/name", "hf:owner/name@config"):
        with unreadable(path, "owner/name"):
            hub.open_hub(path)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or made())
    assert hub.open_hub("hf:owner/name@config", "test").name(3) == "hf:owner/name@config[test]#3"
    assert asked == [(("owner/name", "config"), {"split": "test"})]


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert hub.looks_like_hub("hf:owner/name")
    with refused("data.path", nearest=how_to_install("datasets")):
        hub.open_hub("hf:owner/name")


@pytest.mark.parametrize("way", ["saved", "parquet folder"])
def test_pickles_hold_no_images_and_forks_read_the_same(tmp_path, way):
    source = hub.open_hub(WAYS[way](tmp_path))
    copy = pickle.dumps(source)
    assert len(copy) < sum(map(len, JPEGS)) / 5 and contents(pickle.loads(copy)) == contents(source)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(source.read, range(N)) == JPEGS


# ------------------------------------------------------------------------------------------------------ in passing


def images_of(stream, seed=0, epoch=0, first=0):
    return list(stream.iterate(seed, epoch, first))


@pytest.mark.parametrize("way", IN_PASSING)
@pytest.mark.parametrize("buffer", [1, 10, 1000])
def test_an_epoch_has_every_image_once_and_is_a_function_of_seed_and_epoch(tmp_path, way, buffer):
    path = IN_PASSING[way](tmp_path)
    stream = hub.open_hub_stream(path, length=N, buffer=buffer)
    whole = images_of(stream)
    assert [p for p, _ in whole] == list(range(N)) and sorted(b for _, b in whole) == sorted(JPEGS)
    assert len(stream) == N and stream.classes == NAMES and stream.is_stream and not stream.has_labels
    assert images_of(stream) == whole == images_of(hub.open_hub_stream(path, length=N, buffer=buffer))
    for first in (1, 31, 59, 60):
        assert images_of(stream, first=first) == whole[first:]
    others = [images_of(stream, 0, 1), images_of(stream, 1, 0), list(enumerate(JPEGS))]
    assert all(sorted(b for _, b in o) == sorted(JPEGS) for o in others)
    if buffer > 1:
        assert all(a != b for a, b in itertools.combinations([whole, *others], 2))


def test_mixing_reaches_as_far_as_the_buffer(tmp_path):
    images = [{"bytes": b"%d" % i, "path": None} for i in range(1000)]
    made(images, label=[0] * 1000).to_parquet(tmp_path / "x.parquet")
    for buffer in (1, 100, 1000):
        stream = hub.open_hub_stream(str(tmp_path / "x.parquet"), length=1000, buffer=buffer)
        order = np.array([int(b) for _, b in images_of(stream)])
        ahead = order - np.arange(1000)
        assert buffer / 2 < ahead.max() < buffer + 3 * hub.SLICE
        assert (np.corrcoef(order, np.arange(1000))[0, 1] < 0.2) == (buffer == 1000)


def test_a_loader_process_reads_the_whole_stream(tmp_path):
    stream = hub.open_hub_stream(parquet(tmp_path), length=N)
    workers = torch.utils.data.DataLoader(
        Epochs(stream), batch_size=None, num_workers=2, multiprocessing_context="fork", collate_fn=list
    )
    assert [list(e) for e in workers] == [images_of(stream, epoch=e) for e in range(2)]
    assert images_of(pickle.loads(pickle.dumps(stream))) == images_of(stream)


class Epochs(torch.utils.data.Dataset):
    def __init__(self, stream):
        self._stream = stream

    def __len__(self):
        return 2

    def __getitem__(self, epoch):
        return images_of(self._stream, epoch=epoch)


def test_threads_that_would_decode_are_taken_away(tmp_path):
    """The library gives them to every stream from the Hub."""
    threaded = datasets.load_dataset(parquet(tmp_path), split="train", streaming=True).decode(num_threads=2)
    stream = hub.HubStream(threaded, "image", "x", N, 10)
    assert sorted(b for _, b in images_of(stream)) == sorted(JPEGS)


def test_the_length_is_what_is_given_or_what_the_data_set_says(tmp_path):
    path = clone_of_the_hub(tmp_path)
    with refused("data.length", NOTHING):
        hub.open_hub_stream(path)
    card = {"features": [{"name": "image", "dtype": "image"}], "splits": [{"name": "train", "num_examples": N}]}
    features = [
        {"name": "id", "dtype": "int64"}, {"name": "image", "dtype": "image"},
        {"name": "label", "dtype": {"class_label": {"names": {str(n): c for n, c in enumerate(NAMES)}}}},
    ]  # fmt: skip
    (tmp_path / "clone" / "README.md").write_text(
        f"---\ndataset_info: {json.dumps(card | {'features': features})}\n---\n"
    )
    assert len(hub.open_hub_stream(path)) == N
    part = hub.open_hub_stream(path, length=20)
    assert len(part) == 20 and len(images_of(part)) == 20
    with refused("data.length", 61, 60):
        images_of(hub.open_hub_stream(path, length=61))


def test_a_missing_image_goes_by_and_a_broken_file_ends_the_stream(tmp_path):
    made([{"bytes": JPEGS[0], "path": None}, None]).to_parquet(tmp_path / "x.parquet")
    stream = hub.open_hub_stream(str(tmp_path / "x.parquet"), length=2)
    (error,) = [item for _, item in images_of(stream) if not isinstance(item, bytes)]
    assert isinstance(error, Unreadable)
    (tmp_path / "x.parquet").write_bytes(b"text" * 100)
    with unreadable(f"hf:{tmp_path}/x.parquet[train]"):
        images_of(stream)
    with refused("data.kind", "stream", ("hub",)):
        hub.open_hub_stream(saved(tmp_path))
