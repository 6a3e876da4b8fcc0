"""Dynamic loss scaling: doubled after 2,000 good updates, halved after a bad one, and every streak of skips counted."""

from __future__ import annotations

import torch

from seer_scale.distributed import World
from seer_scale.parallel.loss_scaler import LossScaler
from tests.tiny import losses_of, tiny

GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


def scaler_after(*updates: tuple[torch.Tensor, int]) -> LossScaler:
    scaler = LossScaler(torch.device("cpu"), dynamic=True)
    for found_inf, times in updates:
        for _ in range(times):
            scaler.update(found_inf)
    return scaler


def test_the_scale_follows_good_and_bad_updates():
    for updates, scale in (
        ([(GOOD, 1999)], 2.0**16),
        ([(GOOD, 2000)], 2.0**17),
        ([(GOOD, 4000)], 2.0**18),
        ([(BAD, 1)], 2.0**15),
        ([(BAD, 3), (GOOD, 1999)], 2.0**13),
        ([(GOOD, 1999), (BAD, 1), (GOOD, 1999)], 2.0**15),
        ([(BAD, 1), (GOOD, 2000)], 2.0**16),
    ):
        assert scaler_after(*updates).scale.item() == scale, updates


def test_streaks_are_counted_also_those_that_ended():
    scaler = scaler_after((BAD, 4), (GOOD, 1), (BAD, 2))
    assert (scaler.skipped.item(), scaler.skipped_in_a_row.item(), scaler.longest_streak.item()) == (6, 2, 4)


def test_state_brings_the_scale_back():
    one, other = scaler_after((BAD, 2), (GOOD, 100)), LossScaler(torch.device("cpu"), dynamic=True)
    for name, value in other.state().items():
        value.copy_(one.state()[name])
    for scaler in (one, other):
        for _ in range(1900):
            scaler.update(GOOD)
    assert one.scale.item() == other.scale.item() == 2.0**15


def test_gradients_are_divided_and_checked_where_they_are():
    scaler = LossScaler(torch.device("cpu"), dynamic=True)
    grads = [torch.full((3,), 65536.0), torch.full((2,), 131072.0)]
    assert (
        scaler.unscale_(grads).item() == 0
        and torch.equal(grads[0], torch.ones(3))
        and torch.equal(grads[1], torch.full((2,), 2.0))
    )
    assert scaler.unscale_([torch.tensor([1.0, torch.inf])]).item() == 1


def test_an_update_that_overflows_in_backward_still_fills_the_queue():
    """Embeddings of a good forward are good; and the queue's fullness is counted in samples seen."""
    config, engine = tiny(World(), **{"parallel.engine": "single", "train.precision": "fp16", "swav.queue": 16})
    engine.scaler.scale.fill_(1e38)

    def model() -> dict[str, torch.Tensor]:
        return {
            k: getattr(v, "local", v)
            for k, v in engine.state().items()
            if k.startswith("model/") and "num_batches" not in k
        }

    before = {k: v.clone() for k, v in model().items()}
    losses_of(engine, config, World(), range(1))
    assert engine.scaler.skipped.item() == 1
    assert all(torch.equal(v, before[k]) for k, v in model().items())
    assert (
        torch.allclose(engine.method.queue[:, :8].norm(dim=2), torch.ones(2, 8))
        and not engine.method.queue[:, 8:].any()
    )
