"""What lies in a data set is asked of the file system by rank 0 alone, from the first moment of a start on."""

from __future__ import annotations

import os
from collections import Counter

from tests.e2e.runs import events, recipe, run, start
from tests.processes import hear_questions
from tests.unit.test_sources import write_tar

TARS = 300


def count_questions() -> None:
    """Called in a rank: each question for something in a folder `tars` is a line of its standard output."""
    own = os.getpid()

    def hear(name: str, path: str) -> None:
        if "/tars" in path and os.getpid() == own:
            os.write(1, b"asked\n")

    hear_questions(hear)


def test_ranks_other_than_the_first_ask_nothing_of_a_folder_of_tars(tmp_path, photos):
    """From the recipe to the report: what is in it, whether it has labels, and what is read is found by rank 0."""
    image = (photos / "class0" / "0.jpg").read_bytes()
    (tmp_path / "tars").mkdir()
    for n in range(TARS):
        write_tar(tmp_path / "tars" / f"{n:05d}.tar", {f"{n}.jpg": image})
    given = recipe(tmp_path, tmp_path / "tars", data={"workers": 1}, train={"total_samples": 16})
    trained = start("train", given, "--run.dir", tmp_path / "run", ranks=2, folder=tmp_path, console=count_questions)
    assert trained.wait() == [0, 0], trained.text
    assert f"{TARS} images" in trained.text and "has no labels, so there is no kNN" in trained.text
    asked = Counter({rank: out.read_text().count("asked\n") for rank, out in enumerate(trained.outputs)})
    assert asked[0] > TARS and asked[1] <= 3, asked

    (tmp_path / "tars" / "1.jpg").write_bytes(image)
    for words, ranks in (
        (("--data.path", tmp_path / "tars"), 2),
        (("--data.path", photos, "--knn.bank", tmp_path / "tars"), 2),
    ):
        said = run("train", given, "--run.dir", tmp_path / "no", *words, ranks=ranks, folder=tmp_path, status=2)
        assert said.count("  - ") == said.count("holds tars and also 1.jpg") == 1 and "Traceback" not in said
    assert not events(tmp_path / "no", "start")
