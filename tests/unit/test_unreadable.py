"""Images that cannot be read are named a few times, written down each time, and counted."""

from __future__ import annotations

from seer_scale.training.unreadable import MAX_NAMED, UnreadableImages


def test_each_is_named_once_and_written_down_each_time(tmp_path, capsys):
    images = UnreadableImages(tmp_path, rank=2)
    images.add([], 0)
    assert not images.summary() and not (tmp_path / "logs").exists()
    names = [f"{i}.jpg: broken" for i in range(MAX_NAMED + 1)]
    images.add([*names[:-1], names[0]], 4)
    images.add(names, 5)  # with those of other ranks
    named = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in named] == names
    assert (tmp_path / "logs" / "unreadable-2.txt").read_text().splitlines() == [*names[:-1], names[0], *names]
    assert "9 times" in images.summary()


def test_one_is_counted_as_one(tmp_path):
    images = UnreadableImages(tmp_path, rank=0)
    images.add(["a.jpg: broken"], 1)
    assert "read once:" in images.summary()


def test_a_full_disk_costs_the_file_alone(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file where the folder should be")
    images = UnreadableImages(tmp_path, rank=0)
    images.add(["a.jpg: broken"], 1)
    assert "cannot be written" in capsys.readouterr().err and images.summary()
