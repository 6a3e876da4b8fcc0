"""The least precision in which losses, norms and tables are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision as fp32; what is more exact stays so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
