"""Parts and segments: what is cut covers the whole once and in order, and recomputing it changes no bit."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from seer_scale.errors import UserError
from seer_scale.models.layers.heads import ProjectionHead
from seer_scale.models.registry import build_backbone, initialise
from seer_scale.models.regnet import RegNetY
from seer_scale.parallel.activation_checkpoint import OPTION, apply_activation_checkpointing, find_segments
from seer_scale.parallel.units import matrix_numel, split_units

STAGES = [["s1.b1"], ["s2.b1", "s2.b2"], ["s3.b1", "s3.b2", "s3.b3", "s3.b4"], ["s4.b1", "s4.b2"]]
UNITS = "units s1.b1 s2.b2 s3.b1 s3.b2 s3.b4 s4.b2"
FORMS = ["every 1", "every 2", "every 3", "every 9", UNITS, ((1,), (2,), (1, 3), ()), ((), (1,), (4,), (1, 2))]


def largest(units: dict) -> tuple[str, int]:
    return max(((name, matrix_numel(unit)) for name, unit in units.items()), key=lambda x: x[1])


def tiny() -> RegNetY:
    model = build_backbone("regnety", depth=9, w0=8, wa=6.0, wm=2.0, group_width=8)
    initialise(model, seed=0)
    assert model.stage_units() == STAGES
    return model


def recomputed(form) -> RegNetY:
    model = tiny()
    apply_activation_checkpointing(model, find_segments(form, model.stage_units()))
    return model


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in ((2, 3, 32, 32), (4, 3, 24, 24))]


def count_runs(model: RegNetY) -> list[str]:
    """The names of blocks, each as often as it runs from now on."""
    runs: list[str] = []
    for name in sum(STAGES, []):
        model.get_submodule(name).conv1.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    return runs


@contextmanager
def saved_tensors():
    """The number of tensors that autograd saves under it, at [0]; a checkpoint keeps what is saved inside to itself."""
    saved = [0]

    def pack(t):
        saved[0] += 1
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved


# --- segments


@pytest.mark.parametrize(
    "form, expected",
    [
        ("none", []),
        ("every 1", [1] * 9),
        ("every 3", [1, 2, 3, 1, 2]),
        ("every 100", [1, 2, 4, 2]),
        (((1,), (2,), (1, 3), ()), [1, 2, 1, 2, 1]),
        (((), (), (), ()), []),
        (UNITS, [1] * 6),
    ],
)
def test_segments_by_example(form, expected):
    assert [len(names) for names in find_segments(form, STAGES)] == expected


def test_units_are_recomputed_alone_in_order_of_use():
    assert find_segments("units s3.b2 s2.b1 s3.b1", STAGES) == [["s2.b1"], ["s3.b1"], ["s3.b2"]]
    assert find_segments("units " + " ".join(sum(STAGES, [])), STAGES) == find_segments("every 1", STAGES)


def test_each_unit_that_is_not_there_is_named():
    with pytest.raises(UserError) as error:
        find_segments("units s2.b3 s3.b4 stem s3.b1 s3.b1", STAGES)
    unknown, other, twice = error.value.problems
    assert (unknown.value, other.value) == ("units s2.b3", "units stem") and "s1.b1 to s4.b2" in unknown.rule
    assert {unknown.nearest, other.nearest} <= {f"nearest: units {name}" for name in sum(STAGES, [])}
    assert (twice.value, twice.nearest) == ("units s3.b1 s3.b1", "nearest: units s3.b1")


def test_seers_10b():
    """VISSL's configs/config/pretrain/seer/models/regnet10B.yaml: all of stages 1 and 2, two halves of 3, not stage
    4."""
    with torch.device("meta"):
        stages = build_backbone("regnety_10b").stage_units()
    found = find_segments(((2,), (7,), (9, 17), ()), stages)
    assert [(s[0], s[-1], len(s)) for s in found] == [
        ("s1.b1", "s1.b2", 2), ("s2.b1", "s2.b7", 7), ("s3.b1", "s3.b9", 9), ("s3.b10", "s3.b17", 8),
    ]  # fmt: skip


@st.composite
def stages_and_ends(draw):
    depths = [draw(st.integers(1, 20)) for _ in range(4)]
    ends = tuple(tuple(sorted(draw(st.sets(st.integers(1, d))))) for d in depths)
    return [[f"s{s}.b{b}" for b in range(1, d + 1)] for s, d in enumerate(depths, 1)], ends


@given(stages_and_ends(), st.integers(1, 25))
def test_segments_cut_stages(case, n):
    stages, ends = case
    for form in (ends, f"every {n}"):
        found = find_segments(form, stages)
        assert all(found)
        for stage, names in enumerate(stages):
            inside = [s for s in found if s[0] in names]
            cut_at = [names.index(s[-1]) + 1 for s in inside]
            if form is ends:
                assert cut_at == ([*dict.fromkeys((*ends[stage], len(names)))] if ends[stage] else [])
            else:
                assert all(len(s) == n for s in inside[:-1]) and len(inside[-1]) <= n
            assert sum(inside, []) == (names if inside else [])
    assert find_segments("none", stages) == []


@pytest.mark.parametrize(
    "form, value, nearest",
    [
        ("every 0", "every 0", "nearest: every 1"),
        ("every", "every", "nearest: every 1"),
        ("each 2", "each 2", "nearest: every 1"),
        ("units", "units", "nearest: units s1.b1, or none"),
        (((1,), (2,)), [[1], [2]], ""),
        (((1,), (3,), (), ()), [3], [2]),
        (((), (), (3, 1, 1), ()), [3, 1, 1], [1, 3]),
        (((0,), (), (), ()), [0], [1]),
    ],
)
def test_impossible_segments_name_the_fix(form, value, nearest):
    with pytest.raises(UserError) as error:
        find_segments(form, STAGES)
    (problem,) = error.value.problems
    assert problem.key == OPTION and (problem.value, problem.nearest) == (value, nearest)


# --- recomputing


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_recomputing_changes_no_bit(form, precision):
    """Gradients, running statistics and counters of two steps, with a forward between that no backward follows."""
    models = plain, again = tiny(), recomputed(form)
    xs = images()
    for _ in range(2):
        for model in models:
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                loss = sum(y.square().mean() for y in model(xs))
                with torch.no_grad():
                    model(xs[:1])
            (loss * 1024).backward()
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert again.s1.b1.conv1.bn.num_batches_tracked == 2 * (2 + 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_segment_runs_once_more_and_saves_nothing_inside(form):
    plain, model, xs = tiny(), recomputed(form), images()
    segmented = sum(find_segments(form, STAGES), [])
    saved_by, ys = {}, xs
    for name in plain.shard_units():
        with saved_tensors() as saved:
            ys = plain.forward_units([name], ys)
        saved_by[name] = saved[0]
    runs = count_runs(model)
    with saved_tensors() as saved:
        loss = sum(y.mean() for y in model(xs))
    assert runs == sum(STAGES, [])
    loss.backward()
    assert sorted(runs[9:]) == segmented
    assert saved[0] == sum(n for name, n in saved_by.items() if name not in segmented) < sum(saved_by.values()) / 2


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_recomputes_nothing(form):
    plain, model, xs = tiny().eval(), recomputed(form).eval(), images()
    runs = count_runs(model)
    sum(y.mean() for y in model(xs)).backward()
    assert len(runs) == 9
    assert all(torch.equal(a, b) for a, b in zip(model(xs), plain(xs)))


@pytest.mark.parametrize("form", FORMS)
def test_stage_maps_recompute_the_same(form):
    plain, model, xs = tiny(), recomputed(form), images()
    for m in (plain, model):
        sum(x.square().mean() for maps in m.forward_stages(xs) for x in maps).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters()))


# --- parts


def units_of(backbone: nn.Module, hidden: tuple[int, ...], batch_norm: bool) -> dict[str, nn.Module]:
    head = ProjectionHead(backbone.num_features, hidden, 16, batch_norm=batch_norm)
    units = {f"backbone.{name}": unit for name, unit in backbone.shard_units().items()}
    return units | {"head": head, "prototypes.0": nn.Linear(16, 3000, bias=False)}


TINY_UNITS = units_of(tiny(), (32, 24), True)


@given(st.integers(0, 20_000))
def test_parts_cover_the_matrices_of_their_units_in_order(max_numel):
    split = split_units(TINY_UNITS, max_numel)
    whole, cut = ([p for u in us.values() for p in u.parameters() if p.ndim >= 2] for us in (TINY_UNITS, split))
    assert list(map(id, cut)) == list(map(id, whole))
    for name, unit in TINY_UNITS.items():
        mine = {n: m for n, m in split.items() if f"{n}.".startswith(f"{name}.")}
        if matrix_numel(unit) <= max_numel or name in ("backbone.stem", "prototypes.0"):
            assert mine == {name: unit}
        else:
            assert len(mine) > 1 and all(m is unit.get_submodule(n[len(name) + 1 :]) for n, m in mine.items())
    name, numel = largest(split)
    assert numel == matrix_numel(split[name]) == max(map(matrix_numel, split.values()))


def test_each_part_is_called_once_a_pass_and_in_order():
    model, calls = tiny(), []
    units = units_of(model, (32, 24), True)
    parts = split_units(units, 0)
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    units["prototypes.0"](units["head"](torch.cat(model(images()))))
    assert calls == list(parts)
    assert [n for n in calls if n.startswith(("backbone.s2.b1", "head"))] == [
        *(f"backbone.s2.b1.{part}" for part in ("conv1", "conv2", "se", "conv3", "downsample")),
        "head.0",
        "head.3",
        "head.6",
    ]


def test_seers_10b_in_parts():
    """Its largest block has 1.84e9 parameters, its largest part, a 1x1 convolution of 28280 channels, 0.80e9."""
    with torch.device("meta"):
        units = units_of(build_backbone("regnety_10b"), (8192, 8192), False)
    assert largest(units) == ("backbone.s4.b1", 1_842_328_880)
    split = split_units(units, 10**9)
    assert largest(split) == ("backbone.s4.b1.conv3", 28280**2)
    assert len(split) == len(units) + 4
    assert largest(split_units(units, 10**8)) == ("backbone.s4.b1.conv3", 28280**2)


def test_what_recomputes_is_not_copied_with_units_of_the_original():
    """A copy would silently have the outputs of what it was copied from."""
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(recomputed("every 2"))
    assert copy.deepcopy(tiny()).shard_units().keys() == tiny().shard_units().keys()
