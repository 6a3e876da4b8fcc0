"""One thread a process, here and in every process a test starts; a small corpus of real JPEGs, and a run of it."""

from __future__ import annotations

import gc
import os
import signal

gc.disable()  # what is imported and collected stays: gc looked through it 23 times, a third of collecting's CPU time

for _threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_threads] = "1"

from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

torch.set_num_threads(1)
# ignored where a script's `&` or nohup has started this; tests send them to what they start
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def _enlarged(values: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))


def write_photos(root: Path, classes: int = 3, each: int = 8, pixels: int = 40) -> Path:
    """Stripes of another slope a class over patches of colour, as JPEGs in one folder a class."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:pixels, :pixels]
    for c in range(classes):
        place = root / f"class{c}"
        place.mkdir(parents=True)
        for i in range(each):
            wave = 128 + 90 * np.sin((x * np.cos(c) + y * np.sin(c)) / 3 + rng.uniform(0, 6))
            patches = np.stack([_enlarged(rng.uniform(-100, 100, (4, 4)), pixels) for _ in range(3)], 2)
            image = wave[..., None] + patches + rng.normal(0, 12, (pixels, pixels, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(place / f"{i}.jpg", quality=95)
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("corpus") / "photos")


@pytest.fixture(scope="session")
def straight(tmp_path_factory, photos):
    """The run that others are held against: 20 updates on one process, never stopped."""
    from tests.e2e.runs import recipe, run

    folder = tmp_path_factory.mktemp("straight")
    text = run("train", recipe(folder, photos), "--run.dir", folder / "run", folder=folder)
    assert "kNN top-1: " in text and text.index("kNN top-1: ") < text.index("Report: ")
    return folder / "run"
