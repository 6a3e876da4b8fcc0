"""Optimisers against torch's own and against LARC written out; skipping; schedules as functions of samples."""

import dataclasses
import math

import pytest
import torch

from seer_scale.config import Optim, resolve
from seer_scale.optim.optimizers import build_optimizer
from seer_scale.optim.schedules import LearningRate
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
    return torch.stack([torch.stack([p.norm() for p in params.values()]), torch.stack([p.grad.norm() for p in params.values()])])


def larc(params, momentum, lr, c):
    """apex LARC, clip off, with VISSL's zero-norm rule, then torch's SGD with momentum."""
    for n, p in params.items():
        g, pn, gn = p.grad.clone(), p.norm(), p.grad.norm()
        if pn != 0 and gn != 0:
            g = (g + c.weight_decay * p) * (c.trust * pn / (gn + pn * c.weight_decay + 1e-8))
        momentum[n] = c.momentum * momentum[n] + g
        p -= lr * momentum[n]


def test_lars_is_larc_without_clip():
    config = Optim(name="lars", weight_decay=0.1, trust=0.02)
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
    torch_one = torch.optim.AdamW(groups, lr=0.02) if name == "adamw" else torch.optim.SGD(groups, lr=0.02, momentum=0.9)
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
    with_momentum = Optim(name=name, weight_decay=0.1, trust=0.02, momentum=0.9)
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
                g *= config.trust * p.norm() / (p.grad.norm() + p.norm() * config.weight_decay + 1e-8)
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
    nested = {"schedule": {"warmup_samples": 1000} | over, "train": {"samples": 10000}, "optim": {"lr": 0.4, "lr_batch": 16}}
    return LearningRate(resolve(RECIPE, nested))


def test_cosine():
    lr = schedule_of(warmup_from=0.1, final=0.01)
    assert math.isclose(lr.peak, 0.2)  # linear in the global batch: 0.4 x 8 / 16
    assert math.isclose(lr(0), 0.02) and math.isclose(lr(500), 0.11) and math.isclose(lr(1000), 0.2)
    assert math.isclose(lr(5500), 0.2 * (0.01 + 0.99 * 0.5)) and math.isclose(lr(10000), 0.002)
    assert all(lr(s) >= lr(s + 100) for s in range(1000, 10000, 100))


def test_seer_figures():
    """FACTS: 0.15 -> 9.6 over 8,000 updates of 8,192, cosine to 0.0096."""
    from seer_scale.config import load_recipe

    lr = LearningRate(resolve(load_recipe("seer_regnety_256gf"), {"data": {"path": "-"}}, world_size=512))
    assert math.isclose(lr(0), 0.15, rel_tol=1e-3) and math.isclose(lr(8000 * 8192), 9.6) and math.isclose(lr(10**9), 0.0096)


def test_plateau_halves_when_the_loss_stops_and_resumes_from_its_state():
    def run(schedule, steps, falling_until):
        return [schedule.observe(8 * s, max(5.0 - 0.01 * s, 5.0 - 0.01 * falling_until)) for s in steps]

    options = dict(name="plateau", plateau_samples=800)
    straight = schedule_of(**options)
    fell = run(straight, range(1, 1000), 400)
    assert sum(fell) >= 3 and not any(fell[:500])
    first, second = schedule_of(**options), schedule_of(**options)
    fell_1 = run(first, range(1, 555), 400)
    second.state |= first.state
    assert fell_1 + run(second, range(555, 1000), 400) == fell
    assert math.isclose(second(8000), second.peak * 0.5 ** sum(fell))
