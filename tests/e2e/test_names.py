"""Names are any bytes: a run, its log, its report and all commands live with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.conftest import write_photos
from tests.e2e.runs import recipe, run
from tests.e2e.test_data import steps

ODD = ["caf\udce9", "\x1b[31mred\n", "gpj.\u202eexe$\\x_^{"]


def test_names_of_any_bytes_end_nothing(tmp_path):
    """As the run's folder, the folder of images, as classes, as images that cannot be read; before and after a
    restart."""
    photos = write_photos(tmp_path / "photos", classes=3, each=8).rename(tmp_path / ODD[0])
    for name, folder in zip(ODD, sorted(photos.iterdir())):
        folder = folder.rename(photos / name)
        (folder / "0.jpg").rename(folder / f"{name}.jpg")
        (folder / f"broken {name}.jpg").write_bytes(b"no image")
    given, place = recipe(tmp_path, photos, data={"workers": 1}), tmp_path / f"r{ODD[0]}" / f"{ODD[1]}{ODD[2]}"
    for samples in (40, 80):
        text = run("train", given, "--run.dir", place, "--train.total_samples", samples, folder=tmp_path)
        assert "Report: " in text and "Traceback" not in text
        assert "with 27 images on" in text or samples == 40
        assert "; 3 classes: " in text, "each start names the classes"
        assert all(line.isprintable() for line in text.splitlines()), "a name has reached the terminal as it is"
    assert sum(row["data/unreadable"] for row in steps(place).values()) >= 3
    for path in place.rglob("*"):
        if path.suffix in (".jsonl", ".json", ".html", ".txt", ".yaml"):
            assert not {"\x1b", "\u202e"} & set(path.read_text()), path
    for command in (["eval", "knn"], ["report"], ["inspect"]):
        run(*command, place, folder=tmp_path)
    told = (place / "logs" / "unreadable-0.txt").read_text().splitlines()
    assert any(r"caf\xe9/broken caf\xe9.jpg: " in line for line in told) and all(": " in line for line in told)
    sheet, listing = tmp_path / "sheet.jpg", tmp_path / "unreadable.txt"
    text = run("data", "inspect", photos, "--sheet", sheet, "--unreadable", listing, "--workers", 1, folder=tmp_path)
    assert r"caf\xe9" in text and len(listing.read_text().splitlines()) == 3 and sheet.stat().st_size
    facts = run("data", "inspect", photos, "--json", "--workers", 0, folder=tmp_path)
    assert json.loads(facts[facts.index("{") :])["unreadable"]["count"] == 3
    text = run("data", "pack", photos, tmp_path / "packed", "--check", "--workers", 0, folder=tmp_path)
    assert "24 images" in text
    classes = Path(tmp_path / "packed" / "classes.txt").read_text().splitlines()
    assert len(classes) == 3 and all(name.isprintable() for name in classes)
    assert os.fsencode(photos).endswith(b"caf\xe9")
