"""The kernels in C: built at installation, the same bytes on every machine, and to one level what torch does without
them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import seer_scale
from seer_scale.config import Crop, Views
from seer_scale.data.transforms import native as n
from seer_scale.data.transforms import photometric, views
from seer_scale.distributed import World
from seer_scale.training import run
from tests.pictures import apart, encode, photo

PACKAGE = Path(seer_scale.__file__).parent
ROOT = PACKAGE.parent
BUILT = [name for name in n.SETS if n.load(name)]


def made(
    kernels, image: np.ndarray, size: tuple[int, int], how: photometric.PhotometricParams
) -> tuple[np.ndarray, np.ndarray]:
    """What resizing gives, and what photometrics make of it, by these kernels (None: by torch)."""
    with pytest.MonkeyPatch.context() as m:
        for module in (photometric, views):
            m.setattr(module, "native", lambda: kernels)
        small, planes = views.resize(image, size), np.empty((3, *size), np.uint8)
        photometric.apply_photometric(small, how, planes)
    return small, planes


some_params = st.builds(
    lambda flip, ops, *last: photometric.PhotometricParams(
        flip, tuple((op, f / 4 if op == photometric.HUE else f) for op, f in ops), *last
    ),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 4), st.floats(0, 2, width=32)), max_size=4, unique_by=lambda x: x[0]),
    st.sampled_from([0.0, 0.3, 2.0, 12.0]),
    st.booleans(),
)


@settings(deadline=None, max_examples=50)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 99),
    how=some_params,
)
def test_every_instruction_set_gives_the_same_bytes_and_torch_the_same_to_one_level(height, width, size, seed, how):
    image = (
        np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
        if seed % 2
        else photo(height, width, seed)
    )
    small, planes = made(n.native(), image, size, how)
    for name in BUILT[1:]:
        other, other_planes = made(n.load(name), image, size, how)
        assert np.array_equal(small, other) and np.array_equal(planes, other_planes), name
    other, other_planes = made(None, image, size, how)
    assert np.array_equal(small, other) and apart(planes, other_planes) <= 1


def build(folder: Path, **environment: str) -> set[str]:
    """Instruction sets that an installation into `folder` builds kernels for."""
    words = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        folder / "lib",
        "--build-temp",
        folder / "temp",
    ]
    subprocess.run(words, cwd=ROOT, env=os.environ | environment, check=True, capture_output=True)
    return {path.name.removeprefix("_pixels_").partition(".")[0] for path in folder.rglob("_pixels_*.so")}


@pytest.mark.skipif(not BUILT, reason="the kernels were not built")
def test_kernels_of_other_sources_are_not_called(monkeypatch):
    """They would take other arguments: those of an installation that was not renewed with its sources."""
    monkeypatch.setattr(n, "INTERFACE", n.INTERFACE - 1)
    assert not any(map(n.load, n.SETS))


@pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc").split()[0]), reason="there is no C compiler")
def test_an_installation_builds_them():
    assert BUILT, "seer_scale was installed before its kernels were part of that: make install"


@pytest.mark.skipif(not (ROOT / "setup.py").exists() or not shutil.which("gcc"), reason="needs the sources and gcc")
def test_they_are_built_by_the_compiler_that_is_named_and_an_installation_succeeds_without(tmp_path):
    """CC may be words, as ccache wants it; with a compiler that is none the installation goes on."""
    wrap = tmp_path / "wrap"
    wrap.write_text('#!/bin/sh\necho x >> "$0.log"\nexec "$@"\n')
    wrap.chmod(0o755)
    built = build(tmp_path / "wrapped", CC=f"{wrap} gcc", CFLAGS="-O0")
    assert built >= set(BUILT) and built and (tmp_path / "wrap.log").exists()
    assert build(tmp_path / "none", CC="no-such-compiler") == set()


@pytest.mark.skipif(not (ROOT / "setup.py").exists() or not shutil.which("clang"), reason="needs the sources and clang")
def test_clang_builds_them_too(tmp_path):
    assert build(tmp_path, CC="clang") >= set(BUILT)


@pytest.mark.parametrize("built", [True, False])
def test_a_start_says_so_where_they_are_missing(built, monkeypatch):
    made = MagicMock(world=World())
    made.saver.nbytes = 0
    monkeypatch.setattr(run, "start_event", lambda *_, **__: ("start", "", {}))
    monkeypatch.setattr(run, "notes", lambda *_: [])
    monkeypatch.setattr(run, "native", lambda: object() if built else None)
    run.TrainingRun._log_start(made)
    assert any(n.MISSING in call.args for call in made.events.log_event_of_rank.call_args_list) == (not built)


def test_without_them_batches_are_the_same_to_one_level(tmp_path):
    """A copy of the package without kernels, its loader processes too; decoding is the same, so nothing else
    differs."""
    shutil.copytree(PACKAGE, tmp_path / "seer_scale", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(encode(Image.fromarray(photo(90, 120, i)), quality=90))
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path[0] = {str(tmp_path)!r}
import numpy as np
from seer_scale.config import Crop, Data, Views
from seer_scale.data.loading.loader import train_batches
from seer_scale.data.transforms.native import native
from seer_scale.data.sampling.sampler import ElasticSampler, DataVersion
from seer_scale.data.sources import open_source
assert native() is None
views = Views(crops=(Crop(num=2, size=(48, 64)), Crop(num=2, size=24, scale=(0.05, 0.14))))
source = open_source({str(tmp_path / "images")!r})
sampler = ElasticSampler([DataVersion(0, (("all", 4),))], 0, 4)
for workers in (0, 1):
    batch = next(train_batches(source, Data(workers=workers), views, sampler, rank=0, world_size=1, start=0, stop=4))
    made = [v.numpy() for v in batch.views]
    np.savez({str(tmp_path)!r} + f"/made{{workers}}.npz", *made, indices=batch.indices.numpy())
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    kinds = Views(crops=(Crop(num=2, size=(48, 64)), Crop(num=2, size=24, scale=(0.05, 0.14))))
    for workers in (0, 1):
        theirs = np.load(tmp_path / f"made{workers}.npz")
        for place, index in enumerate(theirs["indices"].tolist()):
            data = (tmp_path / "images" / f"{index}.jpg").read_bytes()
            for kind, ours in enumerate(views.load_views(data, kinds, 0, 0, index)):
                assert apart(ours, theirs[f"arr_{kind}"].reshape(2, 4, *ours.shape[1:])[:, place]) <= 1
