"""The API reference builds, and refers to nothing that is not there; nor do the pages written by hand."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "seer_scale"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def build_docs() -> ModuleType:
    pytest.importorskip("pdoc")
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "tools" / "build_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_few_modules_build(build_docs, tmp_path):
    assert build_docs.build(["seer_scale.errors", "seer_scale.launch.options"], tmp_path) == []
    page = (tmp_path / "seer_scale" / "launch" / "options.html").read_text()
    assert "expand_grid" in page and 'href="../errors.html' in page and (tmp_path / "index.html").is_file()


def test_private_modules_are_left_out(build_docs):
    import seer_scale

    found = build_docs.public_modules(seer_scale)
    assert "seer_scale.launch.options" in found and not [name for name in found if "._" in name]


def test_broken_references_are_found(build_docs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "referring.py").write_text(
        '"""As `Box.size`, `Box.gone`, `seer_scale.errors.Problem`, `seer_scale.nothing` and `other.thing`."""\n'
        'class Box:\n    """See launch/options.py and launch/gone.py, not runs/demo/config.yaml."""\n    size: int\n'
    )
    found = build_docs.broken_references(importlib.import_module("referring"))
    assert found == [
        "referring: there is no Box.gone",
        "referring: there is no seer_scale.nothing",
        "referring.Box: there is no file launch/gone.py",
    ]
    (tmp_path / "failing.py").write_text("import no_such_module")
    with pytest.raises(ImportError):
        build_docs.build(["failing"], tmp_path / "docs")
    sys.modules.pop("referring")


def exists(path: str, *bases: Path) -> bool:
    return any((base / path).exists() or (base / f"{path}.py").exists() for base in bases)


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_the_files_that_a_page_names_are_there(page):
    """Paths in backticks that begin in a folder of ours, modules by their bare names, and links."""
    text = page.read_text()
    folders = {p.name for base in (ROOT, PACKAGE) for p in base.iterdir() if p.is_dir()}
    for path in re.findall(r"`((?:[\w-]+/)+(?:[\w-]+\.\w+)?)`", text):
        assert path.split("/")[0] not in folders or exists(path, ROOT, PACKAGE), path
    for name in re.findall(r"`(\w+\.(?:py|c))`", text):
        assert any(found for base in (PACKAGE, ROOT / "tests") for found in base.rglob(name)), name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / link).exists(), link


def test_the_table_of_rooms_names_what_is_there():
    """In a row, all in backticks are modules or folders of its room, at any depth."""
    rows = re.findall(r"^\| (`\S+`(?:, `\S+`)*|core) \| (.*) \|$", (ROOT / "docs" / "design.md").read_text(), re.M)
    named = [room for rooms, _ in rows for room in re.findall(r"`([\w/]+)/`", rooms)]
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    assert set(named) == rooms and len(named) == len(rooms)
    for cell, what in rows:
        rooms = [PACKAGE / room for room in re.findall(r"`([\w/]+)/`", cell)]
        folders = [folder for room in rooms for folder in (room, *room.rglob("*/"))] or [PACKAGE]
        for name in re.findall(r"`([^`]+)`", what):
            assert exists(name, *folders), f"{cell} has no {name}"
