"""The examples of CONTRIBUTING.md work as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seer_scale.config import Config, Data, Knn, resolve
from seer_scale.distributed import World
from seer_scale.errors import ConfigError
from seer_scale.evaluate.knn import labelled_images

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


def test_its_examples_run(tmp_path):
    names: dict = {"__name__": "contributing"}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    assert len(blocks) == 4
    with pytest.raises(ConfigError) as caught:
        resolve(names["recipe"], ["--views.crops", "[{num: 3, size: 24}]"])
    assert [(p.key, p.value, p.nearest) for p in caught.value.problems] == [("views.crops", 3, "num: 2")]
    assert names["engine"].state()  # by the names of its units
    assert list(names["engine"].method.shard_units()) == ["backbone.stem", "backbone.s1", "head"]

    for label, colour in enumerate(([220, 30, 30], [30, 30, 220])):
        (tmp_path / str(label)).mkdir()
        for i in range(10):
            image = np.full((24, 24, 3), colour, np.uint8) + np.uint8(i)
            Image.fromarray(image).save(tmp_path / str(label) / f"{i}.jpg")
    images = labelled_images(Config(data=Data(path=str(tmp_path)), knn=Knn(size=24)))

    def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.mean((2, 3)), x.mean((2, 3))

    found = names["class_means"](encode, images, size=24, workers=0, world=World())
    assert found == {"means/top1": 100.0}


def test_the_files_it_names_are_there():
    root = Path(__file__).parents[2]
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", TEXT):
        assert (root / name).exists() or (root / "seer_scale" / name).exists(), name
    for name in re.findall(r"\]\(([\w/]+\.md)\)", TEXT):
        assert (root / name).exists(), name
