"""Groups of images within which a loss compares them (KoLeo): parts of the global batch, so that neither the number of
ranks nor micro-batches change them. Free of torch, for the rules of a section."""

from __future__ import annotations

from seer_scale.config import Config
from seer_scale.errors import Problem
from seer_scale.formatting import counted


def group_problem(key: str, size: int, config: Config, ranks: int) -> Problem | None:
    """What is wrong with groups of `size` images, which `key` gives: each must lie within what a rank takes through
    the network at once, and have two images or more. None: nothing."""
    if config.train.global_batch % ranks:
        return None  # which has a rule of its own
    images = config.images_at_once(ranks)
    if size >= 2 and images % size == 0:
        return None
    if images < 2:
        fix = "use fewer ranks, or a larger train.global_batch or train.micro_batch"
        return Problem(key, size, "a rank takes one image at once, which has no neighbour", fix)
    near = min((n for n in range(2, images + 1) if images % n == 0), key=lambda n: abs(n - size))
    of = f"train.global_batch {config.train.global_batch} on {counted(ranks, 'rank')}"
    parts = config.num_micro_batches(ranks)
    of += f" in {parts} micro-batches" if parts > 1 else ""
    rule = f"must be at least 2 and divide the {images} images that a rank takes at once ({of})"
    return Problem(key, size, rule, near)
