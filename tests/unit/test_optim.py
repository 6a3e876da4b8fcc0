"""Optimisers against torch's own and against LARC written out; skipping; schedules as functions of samples."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_scale.config import Optim, resolve
from seer_scale.errors import UserError
from seer_scale.optim.optimizers import build_optimizer
from seer_scale.optim.schedules import LearningRate, cosine, linear, weight_decay
from seer_scale.training.resume import rate_change
from tests.tiny import RECIPE

SHAPES = {"conv": (4, 3, 3, 3), "vector": (5,), "matrix": (6, 2)}


def draw_params(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}


def set_grads(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator)


def grads_of(params):
    return [p.grad for p in params.values()]


def norms_of(params):
    return torch.stack(
        [torch.stack([p.norm() for p in params.values()]), torch.stack([p.grad.norm() for p in params.values()])]
    )


def larc(params, momentum, lr, c):
    """apex LARC, clip off, with VISSL's zero-norm rule, then torch's SGD with momentum."""
    for n, p in params.items():
        g, pn, gn = p.grad.clone(), p.norm(), p.grad.norm()
        if pn != 0 and gn != 0:
            g = (g + c.weight_decay * p) * (c.trust_coefficient * pn / (gn + pn * c.weight_decay + 1e-8))
        momentum[n] = c.momentum * momentum[n] + g
        p -= lr * momentum[n]


def test_lars_is_larc_without_clip():
    config = Optim(name="lars", weight_decay=0.1, trust_coefficient=0.02)
    ours, theirs = draw_params(), draw_params()
    ours["vector"].zero_(), theirs["vector"].zero_()  # a zero norm: no scaling, no decay
    optimizer, momentum = build_optimizer(ours, {"vector"}, config), {n: torch.zeros(s) for n, s in SHAPES.items()}
    for step in range(6):
        set_grads(ours, step), set_grads(theirs, step)
        if step == 2:
            ours["matrix"].grad.zero_(), theirs["matrix"].grad.zero_()
        optimizer.update(grads_of(ours), 0.5, norms_of(ours), torch.zeros(()))
        larc(theirs, momentum, 0.5, config)
    for n in SHAPES:
        assert torch.allclose(ours[n], theirs[n], atol=1e-6), n


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("exclude", [False, True])
def test_equal_to_torch(name, exclude):
    config = Optim(name=name, weight_decay=0.1, exclude_vectors=exclude)
    ours, theirs = draw_params(), draw_params()
    groups = [
        {"params": [p for p in theirs.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p.ndim < 2], "weight_decay": 0.0 if exclude else 0.1},
    ]
    torch_one = (
        torch.optim.AdamW(groups, lr=0.02) if name == "adamw" else torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    )
    optimizer = build_optimizer(ours, {"vector"}, config)
    for step in range(6):
        set_grads(ours, step), set_grads(theirs, step)
        optimizer.update(grads_of(ours), 0.02, norms_of(ours), torch.zeros(()))
        torch_one.step()
    for n in SHAPES:
        assert torch.allclose(ours[n], theirs[n], atol=1e-6), n


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_without_momentum_an_update_is_the_last_gradient_and_momentum_may_come_back(name):
    """v <- 0 v + g: what a checkpoint then holds is what a resume with momentum goes on from."""
    with_momentum = Optim(name=name, weight_decay=0.1, trust_coefficient=0.02, momentum=0.9)
    without = dataclasses.replace(with_momentum, momentum=0.0)
    ours, theirs, velocity = draw_params(), draw_params(), {n: torch.zeros(s) for n, s in SHAPES.items()}
    optimizer = build_optimizer(ours, {"vector"}, with_momentum)
    for step, config in enumerate([with_momentum, without, without, with_momentum]):
        optimizer.config = config
        set_grads(ours, step), set_grads(theirs, step)
        optimizer.update(grads_of(ours), 0.5, norms_of(ours), torch.zeros(()))
        for n, p in theirs.items():
            g = p.grad + config.weight_decay * p
            if name == "lars":
                g *= config.trust_coefficient * p.norm() / (p.grad.norm() + p.norm() * config.weight_decay + 1e-8)
            velocity[n] = config.momentum * velocity[n] + g
            p -= 0.5 * velocity[n]
    for n in SHAPES:
        assert torch.allclose(ours[n], theirs[n], atol=1e-6), n
        assert torch.allclose(optimizer.state[f"{n}/momentum"], velocity[n], atol=1e-6), n


@pytest.mark.parametrize("name,momentum", [("lars", 0.9), ("sgd", 0.9), ("sgd", 0.0), ("adamw", 0.9)])
def test_a_skipped_update_changes_nothing(name, momentum):
    params = draw_params()
    optimizer = build_optimizer(params, {"vector"}, Optim(name=name, momentum=momentum))
    set_grads(params, 0)
    optimizer.update(grads_of(params), 0.1, norms_of(params), torch.zeros(()))
    before = {k: v.clone() for k, v in (params | optimizer.state).items()}
    set_grads(params, 1)
    params["conv"].grad[0] = torch.inf
    optimizer.update(grads_of(params), 0.1, norms_of(params), torch.ones(()))
    for k, v in (params | optimizer.state).items():
        assert torch.equal(v, before[k]), k


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_frozen_names_are_left_alone(name):
    params = draw_params()
    optimizer = build_optimizer(params, {"vector"}, Optim(name=name))
    before = params["matrix"].clone()
    set_grads(params, 0)
    optimizer.update(grads_of(params), 0.1, norms_of(params), torch.zeros(()), frozen={"matrix"})
    assert torch.equal(params["matrix"], before) and not torch.equal(params["conv"], draw_params()["conv"])
    assert all(not v.any() for k, v in optimizer.state.items() if k.startswith("matrix/"))


def schedule_of(**over):
    nested = {
        "schedule": {"warmup_samples": 1000} | over,
        "train": {"total_samples": 10000},
        "optim": {"lr": 0.4, "lr_batch": 16},
    }
    return LearningRate(resolve(RECIPE, nested))


def test_cosine():
    lr = schedule_of(warmup_from=0.1, final=0.01)
    assert math.isclose(lr.peak, 0.2)  # linear in the global batch: 0.4 x 8 / 16
    assert math.isclose(lr(0), 0.02) and math.isclose(lr(500), 0.11) and math.isclose(lr(1000), 0.2)
    assert math.isclose(lr(5500), 0.2 * (0.01 + 0.99 * 0.5)) and math.isclose(lr(10000), 0.002)
    assert all(lr(s) >= lr(s + 100) for s in range(1000, 10000, 100))


@pytest.mark.parametrize("total, ends", [(100_000, 1000), (10_000, 1000), (9_000, 900), (80, 8)])
def test_a_short_run_warms_up_for_a_share_of_it(total, ends):
    over = {"train": {"total_samples": total}, "schedule": {"warmup_samples": 1000, "warmup_share": 0.1}}
    lr = LearningRate(resolve(RECIPE, over))
    assert lr.warmup == ends and lr(ends) == lr.peak == max(lr(s) for s in range(0, total, max(1, total // 1000)))
    assert lr(ends - 1) < lr.peak and lr(total) == pytest.approx(0.001 * lr.peak)


def test_a_longer_run_may_keep_its_cosine():
    short, long = schedule_of(), schedule_of(decay_samples=9000)
    assert long.total == 9000 and long(9000) == long(9500) == long.peak * 0.001 and short(9000) > long(9000)


def test_the_rate_follows_the_batch_or_its_square_root():
    """Twice the batch: twice the rate, or 1.414 times; DINOv2's figures are of the second."""
    for scaling, ratio in (("linear", 2.0), ("sqrt", math.sqrt(2))):
        over = {"optim": {"lr": 4e-3, "lr_batch": 4, "lr_scaling": scaling}}
        assert math.isclose(LearningRate(resolve(RECIPE, over)).peak, 4e-3 * ratio)
    with pytest.raises(UserError, match="optim.lr_scaling is sqrt, but has no effect without an optim.lr_batch"):
        resolve(RECIPE, {"optim": {"lr_scaling": "sqrt"}})


DINO_SHORT = {"lr": 4e-3, "batch": 2048, "warmup": 12_500, "updates": 125_000, "decay": (0.04, 0.4)}
DINO_LONG = {"lr": 2e-4, "batch": 3072, "warmup": 100_000, "updates": 625_000, "decay": (0.04, 0.2)}


def dino(given, **over):
    """A recipe with the published schedules of DINOv2 (ssl_default_config.yaml), in samples."""
    batch, peak = given["batch"], given["lr"] * math.sqrt(given["batch"] / 1024)
    schedule = {"warmup_samples": given["warmup"] * batch, "warmup_from": 0.0, "final": 1e-6 / peak}
    begin, end = given["decay"]
    optim = {"name": "adamw", "lr": given["lr"], "lr_batch": 1024, "lr_scaling": "sqrt"}
    nested = {
        "schedule": schedule | over,
        "train": {"total_samples": given["updates"] * batch, "global_batch": batch},
        "optim": optim | {"weight_decay": begin, "weight_decay_end": end},
        "swav": {"prototypes": [12]},
    }
    return resolve(RECIPE, nested)


def test_dinov2_schedules_by_its_own_figures():
    """Printed by its code for these updates. Its warm-ups include their end (numpy.linspace), so one of n updates is
    one of n - 1 batches here."""
    batch, short = DINO_SHORT["batch"], LearningRate(dino(DINO_SHORT))
    inclusive = LearningRate(dino(DINO_SHORT, warmup_samples=12_499 * batch))
    for rate, update, expected in (
        (inclusive, 1250, 5.657307e-4), (inclusive, 12_499, 5.656854e-3), (short, 12_500, 5.656854e-3),
        (short, 68_750, 2.828927e-3), (short, 125_000, 1e-6),
    ):  # fmt: skip
        assert rate(update * batch) == pytest.approx(expected, rel=1e-6)
    batch, config = DINO_LONG["batch"], dino(DINO_LONG)
    assert LearningRate(config)(362_500 * batch) == pytest.approx(1.737051e-4, rel=1e-6)
    assert weight_decay(config, 362_500 * batch) == pytest.approx(0.139895, abs=5e-7)
    assert cosine(362_500 * batch, 0.994, 1.0, 625_000 * batch) == pytest.approx(0.997746, abs=5e-7)
    temperatures = {0: 0.04, 1250: 0.04100003, 18_750: 0.05500040, 37_499: 0.07, 37_500: 0.07}
    for update, expected in temperatures.items():
        assert linear(update * batch, 0.04, 0.07, 37_499 * batch) == pytest.approx(expected, abs=5e-9)


@given(begin=st.floats(0, 1), end=st.floats(0, 1), samples=st.integers(0, 10**9), seen=st.integers(0, 2 * 10**9))
def test_a_schedule_goes_from_its_beginning_to_its_end_and_stays(begin, end, samples, seen):
    for of in (linear, cosine):
        assert of(0, begin, end, samples) == pytest.approx(begin if samples else end, abs=1e-15)
        assert of(samples + seen, begin, end, samples) == pytest.approx(end, abs=1e-15)
        assert min(begin, end) - 1e-15 <= of(seen, begin, end, samples) <= max(begin, end) + 1e-15


def test_weight_decay_is_constant_unless_it_has_an_end():
    def at(seen, **over):
        return weight_decay(resolve(RECIPE, over), seen)

    assert at(0) == at(160) == 1e-5
    optim = {"weight_decay": 0.04, "weight_decay_end": 0.2}
    assert [at(s, optim=optim) for s in (0, 80, 160, 999)] == pytest.approx([0.04, 0.12, 0.2, 0.2])
    assert at(80, optim=optim, schedule={"decay_samples": 80}) == pytest.approx(0.2)
    plateau = {"name": "plateau", "plateau_samples": 40, "decay_samples": 80}
    assert at(80, optim=optim, schedule=plateau) == pytest.approx(0.2)
    with pytest.raises(UserError, match="schedule.name cosine or an optim.weight_decay_end"):
        at(80, schedule=plateau)


def test_going_on_with_another_weight_decay_is_said():
    def config(samples, **optim):
        return resolve(RECIPE, {"train": {"total_samples": samples}, "optim": optim})

    then = config(160, weight_decay=0.04, weight_decay_end=0.2)
    meta = {"config": then.to_dict(), "samples_seen": 80, "schedule": LearningRate(then).state}
    assert rate_change(meta, then) == ""
    constant = rate_change(meta, config(160, weight_decay=0.04))
    assert constant == "The weight decay goes from 0.12 to 0.04, because of optim.weight_decay_end."
    longer = rate_change(meta, config(320, weight_decay=0.04, weight_decay_end=0.2))
    assert "to 0.56, because of train.total_samples (schedule.decay_samples 160 keeps" in longer
    assert longer.endswith(" The weight decay goes from 0.12 to 0.0634, because of train.total_samples.")


def test_going_on_with_another_rate_is_said_with_what_changed_it():
    def config(samples, **schedule):
        return resolve(RECIPE, {"train": {"total_samples": samples}, "schedule": schedule})

    then = config(160)
    meta = {"config": then.to_dict(), "samples_seen": 160, "schedule": LearningRate(then).state}
    assert rate_change(meta, then) == rate_change(meta, config(160, final=0.001)) == ""
    longer = rate_change(meta, config(320))
    assert longer.startswith(
        "The learning rate goes from 0.0006 to 0.352, because of train.total_samples (schedule.decay_samples 160 keeps"
    )
    assert rate_change(meta, config(320, decay_samples=160)) == ""
    assert rate_change(meta, config(320, name="plateau", plateau_samples=40)).endswith(
        "because of schedule.name, schedule.plateau_samples, train.total_samples."
    )


def test_seer_figures():
    """FACTS: 0.15 -> 9.6 over 8,000 updates of 8,192, cosine to 0.0096."""
    from seer_scale.config import load_recipe

    lr = LearningRate(resolve(load_recipe("seer_regnety_256gf"), {"data": {"path": "-"}}, world_size=512))
    assert (
        math.isclose(lr(0), 0.15, rel_tol=1e-3)
        and math.isclose(lr(8000 * 8192), 9.6)
        and math.isclose(lr(10**9), 0.0096)
    )


@settings(max_examples=50, deadline=None)
@given(
    losses=st.lists(st.floats(1, 6, width=32) | st.just(math.nan), min_size=40, max_size=120),
    log_every=st.integers(1, 30),
    stops=st.sets(st.integers(1, 120)),
    warmup=st.integers(0, 100),
    window=st.integers(8, 200),
)
def test_plateau_is_the_same_however_it_is_logged_and_stopped(losses, log_every, stops, warmup, window):
    """Against means over the updates of each window of a fixed grid; a stop ends a metric line and its state is
    JSON."""
    options = dict(name="plateau", plateau_samples=window, warmup_samples=warmup, plateau_threshold=0.01)
    schedule = schedule_of(**options)
    best, cuts, mine, total, count = math.inf, 0, [], 0.0, 0
    for i, loss in enumerate(losses):
        if 8 * i >= warmup:
            assert schedule(8 * i) == schedule.peak * 0.5**cuts
            mine += [loss] * math.isfinite(loss)
        total, count = total + (loss if math.isfinite(loss) else 0.0), count + math.isfinite(loss)
        ends = 8 * i >= warmup and (8 * i - warmup) // window != (8 * i + 8 - warmup) // window
        assert not ends or schedule.ends_window(8 * i)
        if schedule.ends_window(8 * i) or (i + 1) % log_every == 0 or i in stops:
            assert schedule.observe(8 * i + 8, total, count) == bool(
                ends and mine and sum(mine) / len(mine) >= best * 0.99
            )
            total, count = 0.0, 0
        if ends and mine:
            mean, mine = sum(mine) / len(mine), []
            cuts, best = cuts + (mean >= best * 0.99), min(best, mean)
        if i in stops:
            kept, schedule = json.dumps(schedule.state, allow_nan=False), schedule_of(**options)
            schedule.state |= json.loads(kept)
