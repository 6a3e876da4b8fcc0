"""The loss and the queue against the textbook; what a uniform prediction costs; what SwAV says of itself."""

import math

import pytest
import torch
import torch.nn.functional as F

from seer_scale.bench.reference_swav import textbook_loss, textbook_sinkhorn
from seer_scale.checkpoint.layout import local_of
from seer_scale.distributed import World
from seer_scale.methods.losses.sinkhorn import sinkhorn
from seer_scale.methods.swav import method as swav
from seer_scale.methods.swav.method import SwAV
from tests.tiny import fake_views, losses_of, micro_batches, tiny

WORLD = World()


def test_loss_equals_the_textbook():
    config, engine = tiny(WORLD, **{"parallel.engine": "single", "swav.prototypes": [12]})
    method = engine.method
    views = fake_views(config, 0, WORLD)
    loss = method.loss(views, samples_seen=0).loss
    with torch.no_grad():
        method.eval()  # the same running statistics for both
        z = method.embed(views, 0, (0, 1))[0]
        scores = method.prototypes[0](z)
        ours = method.loss(views, samples_seen=0).loss
    assert torch.isfinite(loss)
    assert torch.allclose(ours, textbook_loss(scores.flatten(0, 1), config), atol=1e-5)


def test_prototype_sets_average():
    config, engine = tiny(WORLD, **{"parallel.engine": "single"})
    method = engine.method.eval()
    views = fake_views(config, 0, WORLD)
    with torch.no_grad():
        both = method.loss(views, samples_seen=0).loss
        scores = [p(method.embed(views, 0, (0, 1))[0]) for p in method.prototypes]
    alone = [textbook_loss(s.flatten(0, 1), config) for s in scores]
    assert torch.allclose(both, sum(alone) / 2, atol=1e-5)


def test_uniform_prediction_costs_ln_k():
    """FACTS: 8.0064 for K = 3000, 9.6803 for K = 16,000."""
    config, engine = tiny(WORLD, **{"parallel.engine": "single"})
    method = engine.method
    for k, expected in ((3000, 8.0064), (16000, 9.6803)):
        codes = torch.softmax(torch.randn(2, 8, k), 2)
        assert math.isclose(method._swapped(torch.zeros(4, 8, k), codes).item(), expected, abs_tol=1e-4)
    assert math.isclose(method.baseline.loss, (math.log(12) + math.log(7)) / 2)


def test_queue_joins_the_assignment_when_full():
    """With the queue, codes are those of queue and batch assigned together; before it is full, those of the batch."""
    over = {"parallel.engine": "single", "swav.queue": 16, "swav.prototypes": [12]}
    config, engine = tiny(WORLD, **over)
    method = engine.method.train()
    embedded = []
    for step in range(2):
        method.eval()
        with torch.no_grad():
            embedded.append(method.embed(fake_views(config, step, WORLD), 0, (0, 1))[0][:2])
            method.training = True
            method.loss(fake_views(config, step, WORLD), samples_seen=8 * step)
    assert torch.allclose(method.queue, torch.cat([embedded[1], embedded[0]], dim=1))
    method.eval()
    views = fake_views(config, 2, WORLD)
    with torch.no_grad():
        z, w = method.embed(views, 0, (0, 1))[0], method.prototypes[0].weight
        for seen, others in ((8, []), (16, [method.queue])):
            loss = method.loss(views, samples_seen=seen).loss
            codes = torch.stack(
                [
                    textbook_sinkhorn(
                        torch.cat([z[c], *(q[c] for q in others)]) @ w.T,
                        config.method_settings.epsilon,
                        config.method_settings.iterations,
                    )[:8]
                    for c in range(2)
                ]
            )
            assert torch.allclose(loss, method._swapped(z @ w.T, codes), atol=1e-5)


def test_frozen_prototypes_do_not_move_and_rows_keep_unit_length():
    config, engine = tiny(WORLD, **{"parallel.engine": "single", "swav.freeze_samples": 16})
    start = engine.whole("prototypes.0.weight").clone()
    losses_of(engine, config, WORLD, range(2))
    assert torch.equal(engine.whole("prototypes.0.weight"), start)
    losses_of(engine, config, WORLD, range(2, 4))
    moved = engine.whole("prototypes.0.weight")
    assert not torch.allclose(moved, start, atol=1e-4)
    assert torch.allclose(moved.norm(dim=1), torch.ones(12), atol=1e-6)


def test_a_frozen_backbone_settles_the_head_and_its_statistics_adapt():
    """No update, no decay, no momentum: it goes on from there as if its own run began."""
    config, engine = tiny(
        WORLD, **{"parallel.engine": "single", "train.freeze_backbone_samples": 16, "optim.weight_decay": 0.1}
    )
    start = {name: local_of(tensor).clone() for name, tensor in engine.state().items()}
    losses_of(engine, config, WORLD, range(2))
    now = {name: local_of(tensor) for name, tensor in engine.state().items()}
    moved = {name for name, tensor in now.items() if not torch.equal(tensor, start[name])}
    backbone = {name for name in now if name.split("/")[1].startswith("backbone.")}
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert {name.rpartition(".")[2] for name in moved & backbone} == statistics
    assert {"model/head.0.weight", "optim/head.0.weight/momentum", "model/prototypes.0.weight"} <= moved
    losses_of(engine, config, WORLD, range(2, 3))
    stem = "backbone.stem.conv.weight"
    assert not torch.equal(engine.whole(stem), start[f"model/{stem}"])


def test_it_watches_itself():
    config, engine = tiny(WORLD, **{"parallel.engine": "single"})
    out = engine.gradients(micro_batches(config, 0, WORLD), samples_seen=0, with_metrics=True)
    figures = engine.method.metrics(out.metrics, 1.0)
    assert 0 < figures["swav/prototype_use"] <= 1 and 0 < figures["swav/assignment_entropy"] <= 1
    collapsed = {f"prediction.{i}": F.one_hot(torch.tensor(0), k).float() for i, k in enumerate((12, 7))}
    collapsed |= {f"code_entropy.{i}": torch.tensor(math.log(k)) for i, k in enumerate((12, 7))}
    figures = engine.method.metrics(collapsed, 1.0)
    assert math.isclose(figures["swav/prototype_use"], (1 / 12 + 1 / 7) / 2) and math.isclose(
        figures["swav/assignment_entropy"], 1, rel_tol=1e-6
    )
    row = {"loss": engine.method.baseline.loss, "samples_seen": config.train.total_samples} | figures
    problem = engine.method.health(row, config)
    assert (problem.key, problem.value) == ("loss", row["loss"]) and "swav.epsilon" in problem.nearest
    assert engine.method.health(row | {"loss": 0.5 * row["loss"]}, config) is None


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_scores_codes_and_loss_are_fp32_whatever_the_precision(monkeypatch, precision):
    """VISSL's prototypes take part in half precision, and its Sinkhorn with them."""
    config, engine = tiny(WORLD, **{"parallel.engine": "single", "train.precision": precision})
    seen = []

    def watched(scores, *rest):
        seen.extend(scores)
        return sinkhorn(scores, *rest)

    monkeypatch.setattr(swav, "sinkhorn", watched)
    embeddings = []
    monkeypatch.setattr(
        type(engine.method),
        "embed",
        lambda self, *given, embed=SwAV.embed: embeddings.append((both := embed(self, *given))[0]) or both,
    )
    loss = engine._run("loss", fake_views(config, 0, WORLD), samples_seen=0).loss
    assert loss.dtype == embeddings[0].dtype == torch.float32
    for scores, prototypes in zip(seen, engine.method.prototypes):
        exact = embeddings[0][:2].detach().double() @ prototypes.weight.detach().double().T
        assert scores.dtype == torch.float32 and (scores - exact).abs().max() < 1e-6  # half precision is off by 1e-4
