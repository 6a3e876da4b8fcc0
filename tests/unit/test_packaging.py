"""What a wheel holds works wherever it is installed; hints name packages as they are pinned."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from seer_scale import extras
from seer_scale.extras import how_to_install, requirements

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package from a wheel, in a folder of its own, with nothing of the source tree."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT / "seer_scale", folder / "source" / "seer_scale", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    for name in ("pyproject.toml", "README.md", "setup.py", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / "source" / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(folder / "source"),
    ]
    env = os.environ | {"CFLAGS": "-O0", "PIP_NO_INDEX": "1"}  # how fast the kernels are is not the point
    subprocess.run(pip, check=True, capture_output=True, cwd=folder, env=env, timeout=300)
    shutil.rmtree(folder / "source")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_all_that_is_no_code_is_in_the_wheel(installed):
    package = ROOT / "seer_scale"
    ours = {
        p.relative_to(package)
        for p in package.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".so"
    }
    theirs = {p.relative_to(installed / "seer_scale") for p in (installed / "seer_scale").rglob("*") if p.is_file()}
    assert ours <= theirs, sorted(ours - theirs)
    assert list((installed / "seer_scale" / "data" / "transforms").glob("_pixels_*.so")) or not shutil.which("gcc")
    assert not (installed / "tests").exists() and {p.name.partition("-")[0] for p in installed.iterdir()} == {
        "seer_scale"
    }


def test_the_one_door_opens_from_anywhere(installed, photos, tmp_path):
    """A dry run by the wheel's code alone, with its profile, its recipe and its DeepSpeed configuration."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {"PYTHONPATH": str(installed)}

    def seer_scale(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "seer_scale", *words],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "mine.yaml").write_text(seer_scale("launch", "--print-profile"))
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["gpus_per_node"] == 8
    words = (
        "--cluster",
        "slurm",
        "--profile",
        "mine.yaml",
        "--nodes",
        "1",
        "--data.path",
        str(photos),
        "--knn.enabled",
        "false",
    )
    script = seer_scale(
        "launch",
        "seer_regnety_8gf",
        *words,
        "--train.global_batch",
        "512",
        "--swav.prototypes",
        "[2000]",
        "--parallel.sync_bn_group",
        "8",
        "--parallel.engine",
        "zero3",
        "--dry-run",
    )
    assert "#SBATCH --nodes=1\n" in script and f"{tmp_path}/runs/seer_regnety_8gf/launch/code-" in script
    code = f"import seer_scale, sys; sys.exit(not seer_scale.__file__.startswith({str(installed)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=60)


def test_hints_name_packages_as_pinned(monkeypatch):
    lines = [
        "torch>=2.11",
        'deepspeed<0.20,>=0.19; extra == "engines"',
        'pillow_heif>=1; extra == "heif"',
        'seer-scale[hub]; extra == "test"',
    ]
    monkeypatch.setattr(extras.metadata, "requires", lambda name: lines)
    assert how_to_install("deepspeed.runtime.zero") == "pip install 'deepspeed<0.20,>=0.19'"
    assert how_to_install("pillow_heif") == "pip install 'pillow-heif>=1'".replace("pillow-", "pillow_")
    assert how_to_install("s3fs") == "pip install s3fs" and "seer-scale" not in requirements()

    def missing(name):
        raise extras.metadata.PackageNotFoundError

    monkeypatch.setattr(extras.metadata, "requires", missing)
    assert how_to_install("deepspeed") == "pip install deepspeed"
