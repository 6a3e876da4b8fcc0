"""What rank 0 lists, the other ranks take over: the same images, and hardly a question to the file system."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from torch import nn

from seer_scale.data.loading import listing
from seer_scale.data.loading.listing import share
from seer_scale.data.sources import open_source
from seer_scale.distributed import World
from seer_scale.errors import ConfigError, DataError, StartStopped, UserError
from seer_scale.evaluate import shards
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.run import read_settings
from seer_scale.evaluate.splits import DataSet
from seer_scale.evaluate.subject import Subject
from seer_scale.observe.progress import Progress
from tests.problems import refused, unreadable
from tests.processes import hear_questions
from tests.unit.test_sources import cache, contents, numbered_tars, touch  # noqa: F401  the cache is a fixture


class Rank(World):
    """One of two ranks that run one after the other: what rank 0 broadcasts, rank 1 finds, in order,
    the last as often as it asks."""

    said: list = []

    def broadcast_object(self, value):
        if not self.is_main:
            return self.said.pop(0) if len(self.said) > 1 else self.said[0]
        self.said.append(value)
        return value

    def gather_objects(self, value):
        return [value]


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setattr(Rank, "said", [])
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # rank 1 comes after rank 0 is done
    return [Rank(rank=rank, size=2) for rank in range(2)]


def questions(folder: Path, monkeypatch, call) -> int:
    """How often `call` asks for something in `folder`."""
    asked: Counter[str] = Counter()

    def hear(name: str, path: str) -> None:
        asked[name] += path.startswith(str(folder))

    with monkeypatch.context() as patch:
        hear_questions(hear, patch.setattr)
        call()
    return asked.total()


@pytest.mark.parametrize("mapped_from", [1, 1 << 30])
def test_other_ranks_take_over_what_rank_0_has_listed(tmp_path, monkeypatch, ranks, mapped_from):
    monkeypatch.setattr(listing, "MAPPED_FROM", mapped_from)
    (tmp_path / "data").mkdir()
    numbered_tars(tmp_path / "data" / "tars", 40)
    for n in range(30):
        touch(tmp_path / "data" / "files" / str(n % 3) / f"{n}.jpg")
    (tmp_path / "data" / "list.txt").write_text("".join(f"files/{n % 3}/{n}.jpg\t{n % 3}\n" for n in range(30)))
    (tmp_path / "data" / "all.yaml").write_text("parts: [tars, files, list.txt]")
    (tmp_path / "logs").mkdir()

    def opened():
        source = open_source(str(tmp_path / "data" / "all.yaml"))
        assert source.has_labels and len(source.labels) == 180  # as kNN asks, which reads all indexes
        return source

    opened()  # indexes are made
    made = []
    asked = [
        questions(
            tmp_path / "data",
            monkeypatch,
            lambda rank=rank: made.append(share(rank, tmp_path / "logs", opened, lambda s: [s])),
        )
        for rank in ranks
    ]
    assert asked[0] < 40 * 6 and asked[1] <= 5, "one question a part, and none a tar"
    assert contents(made[1]) == contents(made[0]) and made[1].classes == made[0].classes
    assert np.array_equal(made[1].labels, made[0].labels) and len(made[1]) == 180


@pytest.mark.parametrize("mapped_from", [1, 1 << 30])
def test_a_refresh_takes_no_file_from_ranks_that_may_have_mapped_it(tmp_path, monkeypatch, mapped_from):
    monkeypatch.setattr(listing, "MAPPED_FROM", mapped_from)
    monkeypatch.setattr(Rank, "broadcast_object", lambda world, value: value)
    (tmp_path / "listing-1.bin").touch()  # of a start that was killed
    made = [share(Rank(rank=0, size=2), tmp_path, lambda n=n: np.arange(n), lambda _: []) for n in (10, 20)]
    assert [len(numbers) for numbers in made] == [10, 20]
    left = sorted(path.stat().st_size for path in tmp_path.glob("*.bin"))
    assert left == ([128, 192] if mapped_from == 1 else []), "what is read whole is removed at once"


def test_a_node_s_own_copies_may_have_other_dates_but_no_other_sizes(tmp_path, ranks):
    first, second = numbered_tars(tmp_path / "data", 2)
    main, other = ranks

    def opened():
        return open_source(str(tmp_path / "data"))

    before = contents(share(main, tmp_path, opened, lambda s: [s]))
    for n, path in enumerate((first, second)):
        os.utime(path, ns=(n, n))
    assert contents(share(other, tmp_path, opened, lambda s: [s])) == before
    second.write_bytes(second.read_bytes() + bytes(512))
    with refused(second, nearest="bring the same to every node", error=UserError):
        share(other, tmp_path, opened, lambda s: [s])
    first.rename(tmp_path / "gone.tar")
    with unreadable(first):
        share(other, tmp_path, opened, lambda s: [s])


def test_a_reason_of_rank_0_is_every_rank_s(tmp_path, ranks):
    def opened():
        raise DataError("no images.")

    for rank in ranks:
        with pytest.raises(UserError, match="no images"):
            share(rank, tmp_path, opened, lambda s: [s])


def test_a_stop_that_ends_the_listing_is_one_on_every_rank(tmp_path, ranks):
    def opened():
        raise StartStopped("Stopped by SIGTERM.")

    for rank in ranks:
        with pytest.raises(StartStopped, match="Stopped by SIGTERM"):  # whose exit status is its own
            share(rank, tmp_path, opened, lambda s: [s])


def test_a_folder_that_the_nodes_do_not_share_is_told(tmp_path, ranks, monkeypatch):
    touch(tmp_path / "data" / "1.jpg")
    monkeypatch.setattr(listing, "PATIENCE_S", 0.0)
    main, other = ranks

    def opened():
        return open_source(str(tmp_path / "data"))

    share(main, tmp_path, opened, lambda s: [s])
    [published] = tmp_path.glob("listing-*.bin")
    published.rename(tmp_path / "elsewhere")
    with refused(ANY, nearest=f"is {tmp_path} on a file system that all nodes share?", error=UserError):
        share(other, tmp_path, opened, lambda s: [s])


def test_an_evaluation_lists_once_and_leaves_a_run_s_listing_alone(tmp_path, monkeypatch, ranks):
    for n in range(60):
        touch(tmp_path / "data" / f"c{n % 3}" / f"{n}.jpg")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "listing-1.bin").touch()
    monkeypatch.setattr(shards, "rank_cores", lambda world: 1)

    def listed(rank: World, data: str) -> DataSet:
        settings = read_settings("knn", {"data": str(tmp_path / data)})
        subject = Subject(path=tmp_path, model=nn.Identity(), fingerprint="", weights="trained", size=8)
        return Evaluation(
            task="knn", subject=subject, options=settings, world=rank, progress=Progress(active=False),
            folder=tmp_path / "eval",
        ).data_set()  # fmt: skip

    found = []
    asked = [
        questions(tmp_path / "data", monkeypatch, lambda rank=rank: found.append(listed(rank, "data")))
        for rank in ranks
    ]
    assert asked[0] > 3 and asked[1] <= 2, asked
    assert found[0].classes == found[1].classes == ["c0", "c1", "c2"] and found[0].protocol == found[1].protocol
    for one, other in zip((found[0].train, found[0].test), (found[1].train, found[1].test)):
        assert np.array_equal(one.targets, other.targets) and contents(one.source) == contents(other.source)
    assert (tmp_path / "eval" / "listing-1.bin").exists()
    Rank.said.clear()
    for rank in ranks:
        with pytest.raises(UserError, match="has no labels; give labelled images"):
            listed(rank, "data/c0")


def test_problems_of_a_recipe_reach_other_ranks_as_they_are():
    error = pickle.loads(pickle.dumps(ConfigError(["one.", "two."], "The request")))
    assert (
        list(map(str, error.problems)) == ["one.", "two."]
        and str(error) == "The request has 2 problems:\n  - one.\n  - two."
    )
