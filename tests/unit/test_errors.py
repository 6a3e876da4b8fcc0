"""Problems as data, and the sentences made of them."""

from __future__ import annotations

import pickle

import pytest

from seer_scale.data.sources.base import unreadable_line
from seer_scale.errors import (
    NOTHING,
    ConfigError,
    DataError,
    Problem,
    Unreadable,
    UserError,
    closest,
    missing_path,
    nearest,
)


def test_the_closest_word_is_data_and_the_clause_is_made_of_it():
    assert closest("slrum", ["local", "slurm"]) == "slurm" and closest("x", ["local", "slurm"]) is None
    assert nearest("slrum", ["local", "slurm"]) == "did you mean slurm?"
    assert nearest("x", ["slurm", "local"]) == "known: local, slurm."


@pytest.mark.parametrize(
    "problem, text",
    [
        (Problem("--ranks", 0, "must be at least 1", (1,)), "--ranks is 0, but must be at least 1; nearest: 1."),
        (Problem("train.lr", NOTHING, "is missing"), "train.lr is missing."),
        (Problem("--nodes", "5", "does not fit", (4, 6)), "--nodes is 5, but does not fit; nearest: 4 or 6."),
        (Problem("a", "x", "is none", "did you mean y?"), "a is x, but is none; did you mean y?"),
        (Problem.of("A sentence."), "A sentence."),
    ],
)
def test_the_sentence_of_a_problem(problem, text):
    assert str(problem) == text == str(UserError(problem)) and UserError(problem).problems == [problem]


@pytest.mark.parametrize(
    "problem, clause",
    [
        (Problem("data.path", NOTHING, "leads to .."), "data.path leads to .."),
        (Problem("a", "x", "is none", "did you mean y?"), "a is x, but is none; did you mean y?"),
        (Problem("a", "x", "is none", "known: b, c."), "a is x, but is none; known: b, c"),
        (Problem.of("A sentence."), "A sentence"),
    ],
)
def test_a_problem_stands_in_another_sentence_without_its_full_stop(problem, clause):
    assert problem.clause == clause
    found = Problem.from_check("run.dir", UserError(problem, Problem.of("Odd.")))
    assert found[-1].clause == "run.dir: Odd"


def test_a_missing_path_is_near_a_close_name_of_what_may_be_meant(tmp_path):
    for name in ("env.sh", "demo.sh", "weights.safetensors"):
        (tmp_path / name).write_text("")
    (tmp_path / "runs").mkdir()

    def meant(name, *suffixes):
        return missing_path(tmp_path / name, *suffixes).nearest.rpartition("/")[2]

    assert meant("nosuch") == meant("nosuch", (".safetensors",)) == tmp_path.name
    assert meant("demo.sj") == "demo.sh?" and meant("demo.sj", (".safetensors",)) == tmp_path.name
    assert meant("run", (".safetensors",)) == "runs?"
    assert meant("weight.safetensors", (".safetensors",)) == "weights.safetensors?"


def test_several_errors_are_one_that_keeps_their_lines_and_problems():
    first, second = Problem("a", 1, "is odd"), Problem("b", [2], "is a list")
    of_recipe = ConfigError([second])
    whole = UserError.joined([UserError(first), of_recipe.prefixed("run-2"), UserError(first)])
    assert whole.problems == [first, second]
    assert str(whole).splitlines() == [str(first), "run-2: The recipe has 1 problem:", f"  - {second}"]
    again = pickle.loads(pickle.dumps(whole))
    assert (str(again), again.problems) == (str(whole), whole.problems)


def test_an_error_of_a_name_with_line_ends_keeps_its_lines_when_pickled():
    error = DataError("a\nb", Problem("c", "d\x1b", "is odd"))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "a\\nb\nc is d\\x1b, but is odd." and type(again) is DataError


def test_an_unreadable_image_has_name_and_reason_as_data():
    for error in (
        Unreadable("the file is empty", "a.jpg"),
        pickle.loads(pickle.dumps(Unreadable("the file is empty", "a.jpg"))),
        Unreadable("the file is empty", "a.jpg").prefixed("part b"),
    ):
        assert (error.name, error.reason, error.problems[0].key) == ("a.jpg", "the file is empty", "a.jpg")
        assert str(error).endswith("a.jpg cannot be read (the file is empty).")


@pytest.mark.parametrize("error, line", [
    (Unreadable("it is cut short"), "a.jpg: it is cut short"),
    (Unreadable("it is cut short", "a.jpg"), "a.jpg: it is cut short"),
    (Unreadable("it is gone", "/b.jpg"), "a.jpg: /b.jpg cannot be read (it is gone)."),
    (DataError(Problem("x.tar", NOTHING, "changed", "start again")), "a.jpg: x.tar changed; start again."),
    (MemoryError(), "a.jpg: there is no memory for it"),
])  # fmt: skip
def test_the_line_of_an_image_that_cannot_be_read(error, line):
    assert unreadable_line("a.jpg", error) == line
