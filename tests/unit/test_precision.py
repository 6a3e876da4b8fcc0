"""What is promised in fp32 is computed in fp32, whatever the precision of the rest and what the process was told."""

from __future__ import annotations

import pytest
import torch

from seer_scale.distributed import World
from tests.tiny import tiny

PRODUCTS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


def backend(name: str):
    one, other = name.split(".")
    return getattr(getattr(torch.backends, one), other)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("told", ["tf32 everywhere", "allow_tf32", "nothing"])
def test_no_fp32_product_is_rounded_beside_half_precision(precision, told):
    before = {name: backend(name).fp32_precision for name in PRODUCTS}, torch.backends.fp32_precision
    try:
        if told == "tf32 everywhere":
            torch.backends.fp32_precision = "tf32"
        elif told == "allow_tf32":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        tiny(World(), **{"parallel.engine": "single", "train.precision": precision})
        assert {backend(name).fp32_precision for name in PRODUCTS} == {"ieee"}
        # what libraries still ask: an error where the older names and the newer disagree
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.fp32_precision = before[1]
        for name, value in before[0].items():
            backend(name).fp32_precision = value
