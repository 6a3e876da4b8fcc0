"""Bad input gets one sentence that says what to do, before training where that is possible, and loses nothing."""

from __future__ import annotations

import os
import signal
import tarfile

from seer_scale.cli import main
from tests.conftest import write_photos
from tests.e2e import runs
from tests.e2e.runs import LAUNCH, checkpoints, command, events, reaches, recipe, run, start, steps, until


def told_by(capsys, words, status=2) -> str:
    """What `seer-scale` says, in this process, to words it must refuse."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    assert main([str(w) for w in words]) == status
    assert before == {s: signal.getsignal(s) for s in before}
    told = capsys.readouterr().err
    assert told.startswith("seer-scale: ") and "Traceback" not in told
    return told


def test_one_sentence_before_anything_is_taken(tmp_path, photos, capsys):
    given = recipe(tmp_path, photos)

    def refuse(*words: object) -> str:
        told = told_by(capsys, ("train", given, "--run.dir", tmp_path / "run", *words))
        assert not (tmp_path / "run").exists()
        return told

    assert "did you mean seer_regnety_8gf?" in told_by(capsys, ("train", "seer_regnet_8gf"))
    text = refuse("--data.path", f"{photos.parent}/phots")
    assert f"data.path is {photos.parent}/phots, but does not exist; did you mean {photos}?" in text
    assert "is a single image" in refuse("--data.path", photos / "class0" / "0.jpg")
    assert "knn.bank is /no/where, but does not exist" in refuse("--knn.bank", "/no/where")
    assert "did you mean regnety_8gf?" in refuse("--model.name", "regnety_8g", "--model.depth", 1)
    together = refuse(
        "--data.path", "/no/where", "--knn.queries", "/neither", "--model.wm", 1.01, "--swav.prototypes", "[5000]",
        "--optim.lrr", 1, "--parallel.sync_bn_group", 2, "--train.precision", "fp8",
    )  # fmt: skip
    assert "The recipe has 7 problems:" in together and together.count("\n") == 8
    for part in (
        "data.path is /no/where",
        "knn.queries is /neither",
        "  - model",
        "swav.prototypes is 5000",
        "did you mean optim.lr?",
        "sync_bn_group is 2",
        "fp8",
    ):
        assert part in together


def test_paths_below_what_cannot_be_looked_into(tmp_path, photos, capsys):
    """As below another user's folder: whoever asks whether such a path is there is told why it is not."""
    given, place = recipe(tmp_path, photos), tmp_path / ("x" * 300) / "y" / "z"
    for words in (
        ("data", "inspect", place),
        *(
            ("train", given, "--run.dir", tmp_path / "run", f"--{key}", place)
            for key in ("data.path", "knn.bank", "checkpoint.resume", "checkpoint.init_from")
        ),
    ):
        told = told_by(capsys, words)
        assert "cannot be read (File name too long)" in told and f"there is: {tmp_path}" in told
        assert not (tmp_path / "run").exists()
    for words in (
        ("inspect", place),
        ("report", place),
        ("eval", "knn", place),
        ("data", "refresh", place, "--manifest", place),
    ):
        assert main([str(word) for word in words]) == 2
        assert "File name too long" in (told := capsys.readouterr().err) and told.count("\n") == 1, told
    assert "is no file" in told_by(capsys, ("train", f"{place}.yaml"))
    sentence = "cannot hold a run (File name too long)"
    assert sentence in told_by(capsys, ("train", given, "--run.dir", place))
    assert main(["launch", given, "--cluster", "local", "--run.dir", str(place)]) == 2
    assert sentence in capsys.readouterr().err


def test_images_that_are_none(tmp_path, photos, capsys):
    given = recipe(tmp_path, photos)
    empty, text = tmp_path / "empty", tmp_path / "text"
    for place in (empty, text):
        place.mkdir()
    (text / "readme.md").write_text("no image")
    (tmp_path / "list.txt").write_text("no/such.jpg\n")
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        tar.add(photos, "photos")
    (tmp_path / "short.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:20_000])
    broken = write_photos(tmp_path / "broken")
    for path in broken.rglob("*.jpg"):
        path.write_bytes(b"")
    for path, part in (
        (empty, "holds no image"), (text, "holds no image"), (tmp_path / "list.txt", "no/such.jpg"),
        (tmp_path / "short.tar", "cut short"), (broken, "can be read"),
    ):  # fmt: skip
        told = told_by(capsys, ("train", given, "--run.dir", tmp_path / "run", "--data.path", path))
        assert part in told and told.count("\n") == 1
    told = told_by(
        capsys, ("train", given, "--run.dir", tmp_path / "x", "--data.path", broken, "--knn.enabled", "false")
    )
    assert "data.path leads to 24 images of which none can be read" in told


def test_directories_that_hold_no_run(tmp_path, photos, capsys):
    given = recipe(tmp_path, photos)
    (tmp_path / "file").write_text("")
    told = told_by(capsys, ("train", given, "--run.dir", tmp_path / "file" / "run"))
    assert "cannot hold a run" in told and "choose another" in told
    launcher = command(*LAUNCH, given, "--cluster", "local", "--run.dir", tmp_path / "file" / "run", folder=tmp_path)
    assert launcher.wait() == 2 and "cannot hold a run" in launcher.text and "Traceback" not in launcher.text


def test_ranks_tell_once(tmp_path, photos):
    """What all ranks find out together is told by one; what one rank finds out alone, by that one."""
    given = recipe(tmp_path, photos)
    empty = tmp_path / "empty"
    empty.mkdir()
    text = run("train", given, "--run.dir", tmp_path / "run", "--data.path", empty, ranks=2, folder=tmp_path, status=2)
    assert text.count("holds no image") == 1 and "Traceback" not in text
    text = run("train", given, "--train.global_batch", 9, ranks=2, folder=tmp_path, status=2)
    assert text.count("nearest: 8 or 10") == 1


def test_one_rank_without_images(tmp_path, photos, monkeypatch):
    """A rank that alone runs out of readable images says so, and does not leave the others waiting."""
    broken = write_photos(tmp_path / "broken")
    given = recipe(tmp_path, broken, knn={"enabled": False}, train={"total_samples": 80_000})
    r = start("train", given, "--run.dir", tmp_path / "run", ranks=2, folder=tmp_path)
    until(lambda: steps(tmp_path / "run"), lambda: r.text)
    for path in broken.rglob("*.jpg"):
        path.write_bytes(b"cut")
    assert set(r.wait()) <= {1, 2}
    assert "data.path leads to" in r.text and "Traceback" not in r.text


def test_a_second_run_is_told_the_owner(tmp_path, photos, capsys):
    given, place = recipe(tmp_path, photos, train={"total_samples": 80_000}), tmp_path / "run"
    first = start("train", given, "--run.dir", place, folder=tmp_path)
    until(reaches(place, 24), lambda: first.text)
    told = told_by(capsys, ("train", given, "--run.dir", place))
    assert f"is in use by pid {first.processes[0].pid} on " in told
    first.kill(signal.SIGTERM)
    assert first.wait() == [75], first.text


def test_another_architecture(tmp_path, photos):
    given, place = recipe(tmp_path, photos, train={"total_samples": 24}), tmp_path / "run"
    run("train", given, "--run.dir", place, folder=tmp_path)
    for words, part in (
        (
            ("--swav.embedding_dim", 24),
            "give back what the checkpoint has (swav.embedding_dim 16 -> 24), or begin in another run.dir",
        ),
        (("--model.se_ratio", 0.5), "is of another architecture"),
        (("--optim.name", "adamw"), "optim.name is adamw"),
        (("--run.seed", 3), "run.seed is 3"),
        (("--data.path", photos / "class0"), "data.path has 8 images, but this run's checkpoint was trained on 24"),
    ):
        text = run("train", given, "--run.dir", place, "--train.total_samples", 48, *words, folder=tmp_path, status=2)
        assert part in text and text.count("seer-scale: ") == 1 and "Traceback" not in text
    text = run(
        "train",
        given,
        "--run.dir",
        tmp_path / "new",
        "--checkpoint.init_from",
        place / "checkpoints" / checkpoints(place)[-1],
        "--swav.embedding_dim",
        24,
        folder=tmp_path,
        status=2,
    )
    assert "is of another architecture" in text
    assert checkpoints(place) == ["samples-000000000024"]
    run("train", given, "--run.dir", place, "--train.total_samples", 32, folder=tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, photos):
    words = {"optim": {"name": "sgd", "lr": 1e30}, "train": {"max_skips": 3}}
    given, place = recipe(tmp_path, photos, **words), tmp_path / "run"
    text = run("train", given, "--run.dir", place, ranks=2, folder=tmp_path, status=1)
    assert text.count("seer-scale: ") == 1 and "lower optim.lr" in text and "Traceback" not in text
    assert not checkpoints(place)  # none with such weights
    given = recipe(tmp_path, photos, **words, checkpoint={"every_samples": 0})
    text = run("train", given, "--run.dir", place, folder=tmp_path, status=1)
    assert "updates in a row were skipped" in text
    assert [r["loss"] for r in steps(place).values()][-1] is None


def test_a_full_disk_costs_no_checkpoint(tmp_path, photos):
    """Checkpoints cannot be written, the log can: training goes on, and the end says what to do."""
    given, place = recipe(tmp_path, photos, train={"total_samples": 32}, knn={"enabled": False}), tmp_path / "run"
    run("train", given, "--run.dir", place, folder=tmp_path)
    before = checkpoints(place)
    words = ("train", given, "--run.dir", place, "--train.total_samples", 64)
    text = run(*words, folder=tmp_path, status=1, limit_bytes=100_000)
    assert max(steps(place)) == 64 and checkpoints(place) == before
    assert text.count("could not be written to") == 2 and "earlier checkpoints are untouched" in text
    assert "free some space and start it again" in text and "Traceback" not in text
    run(*words, folder=tmp_path)
    assert checkpoints(place)[-1] == "samples-000000000064" and events(place, "resume")[-1]["samples_seen"] == 32


def test_unreadable_images_among_good_ones(tmp_path):
    photos = write_photos(tmp_path / "photos")
    (photos / "class0" / "3.jpg").write_bytes(b"")
    whole = (photos / "class1" / "5.jpg").read_bytes()
    (photos / "class1" / "5.jpg").write_bytes(whole[: len(whole) // 3])
    (photos / "class2" / "1.jpg").write_bytes(os.urandom(500))
    given, place = recipe(tmp_path, photos, data={"workers": 1}), tmp_path / "run"
    words = ("train", given, "--knn.enabled", "false", "--train.total_samples", 48, "--run.dir")
    text = run(*words, place, ranks=2, folder=tmp_path)
    rows = steps(place)
    assert sum(r["data/unreadable"] for r in rows.values()) >= 6  # three in each of two epochs
    for name in ("class0/3.jpg", "class2/1.jpg"):
        assert f"Replaced an image that cannot be read: {photos}/{name}" in text
    alone = tmp_path / "alone"
    text = run(*words, alone, folder=tmp_path)
    runs.assert_same_path(place, alone)
    listed = (alone / "logs" / "unreadable-0.txt").read_text()  # every one of them, also where no launcher made logs/
    assert len(listed.splitlines()) == sum(r["data/unreadable"] for r in steps(alone).values())
    assert all(name in listed for name in ("class0/3.jpg", "class1/5.jpg", "class2/1.jpg"))
    assert "cannot be written" not in text
    assert f"cannot be read {len(listed.splitlines())} times: {alone}/logs/unreadable-*.txt name them." in text
