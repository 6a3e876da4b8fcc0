"""DeepSpeed's stages as engines."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from unittest import mock

import torch


def as_found_here() -> AbstractContextManager[object]:
    """Around the import of deepspeed, which settles on its accelerator then: where there is no GPU it is told so, or it
    warns that it found none. Processes that are started later are not told: they may have one."""
    own = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    return mock.patch.dict(os.environ, own | dict(os.environ))
