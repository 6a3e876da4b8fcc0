"""`seer-scale plan RECIPE --plot FILE`."""

from __future__ import annotations

from functools import cache
from itertools import accumulate

import pytest
import yaml
from matplotlib.figure import Figure

from seer_scale.cli import main
from seer_scale.config import resolve
from seer_scale.errors import UserError
from seer_scale.formatting import memory_size
from seer_scale.plan import plan as plan_module
from seer_scale.plan import plots
from seer_scale.plan.devices import load_device
from seer_scale.plan.memory import SLACK, block_of, rounded
from seer_scale.plan.plan import Plan, make_plan
from seer_scale.plan.plots import memory_over_time, op_times, phases
from tests.tiny import RECIPE

CASES = {
    "sharded": (4, "h100", {"parallel": {"engine": "fsdp"}}),
    "recomputed": (2, "h200", {"parallel": {"engine": "ddp", "activation_checkpoint": "every 1"},
                               "train": {"precision": "bf16"}}),
    "six micro-batches": (2, "h100", {"train": {"micro_batch": 1, "global_batch": 12}}),
    "CPU": (1, "cpu", {"train": {"global_batch": 32}}),
}  # fmt: skip


@cache
def planned(case: str) -> Plan:
    gpus, device, over = CASES[case]
    return make_plan(resolve(RECIPE, over, world_size=gpus), gpus, load_device(device))


@pytest.mark.parametrize("case", CASES)
def test_what_is_stacked_at_the_peak_is_the_plan_byte_for_byte(case):
    plan = planned(case)
    held = memory_over_time(plan)
    assert {kind: n[held.peak] for kind, n in held.kinds.items() if n[held.peak]} == plan.memory.kinds
    tensors = sum(n for kind, n in held.kinds.items() if kind != SLACK)
    assert tensors.max() == tensors[held.peak] == plan.memory.total - plan.memory.kinds.get(SLACK, 0)
    assert all((n >= 0).all() for n in held.kinds.values())
    assert (sum(held.kinds.values()) <= plan.memory.total).all()


@pytest.mark.parametrize("case", ["sharded", "recomputed"])
def test_at_each_time_most_of_what_is_alive_then_is_drawn(case):
    """By the trace's own list of what comes and goes, over the whole update."""
    plan = planned(case)
    held, times, block = memory_over_time(plan), op_times(plan), block_of(plan.trace, plan.device)
    changes = [(h.born if comes else h.freed, h, comes) for h, comes in plan.trace.changes]
    alive = accumulate(rounded(h.nbytes, block) * (1 if comes else -1) for _, h, comes in changes)
    width = 2 * held.seconds[0]
    most = [0] * len(held.seconds)
    for (at, *_), nbytes in zip(changes, alive):
        point = min(len(most) - 1, int(times[min(at, len(times) - 1)] / width))
        most[point] = max(most[point], nbytes)
    beside = sum(plan.memory.kinds.values()) - sum(plan.memory.peak.kinds.values()) - plan.memory.kinds.get(SLACK, 0)
    drawn = sum(n for kind, n in held.kinds.items() if kind != SLACK) - beside
    assert sum(map(bool, most)) > 10 and all(d == m for d, m in zip(drawn, most) if m)


@pytest.mark.parametrize("case", CASES)
def test_phases_follow_each_other_over_the_whole_update(case):
    plan = planned(case)
    times = op_times(plan)
    spans = phases(plan.trace, times)
    assert times == sorted(times) and times[-1] > 0
    assert [begin for _, begin, _ in spans] == [times[0], *(end for *_, end in spans[:-1])]
    assert spans[-1][2] == times[-1]
    names = [name for name, *_ in spans]
    num = plan.trace.config.num_micro_batches(plan.gpus)
    assert [n for n in names if n in ("loss", "backward", "update")] == ["loss", "backward"] * num + ["update"]
    assert names.index("forward") < names.index("loss")


@pytest.mark.parametrize("case", CASES)
def test_the_picture_has_all_kinds_and_all_times(case):
    plan = planned(case)
    above, below = plots.figure_of(plan, "tiny").axes
    held = memory_over_time(plan)
    scale = 1000
    legend = {t.get_text().split("  ")[-1]: t.get_text() for t in above.get_legend().get_texts()}
    for kind, area in zip(held.kinds, above.collections):
        ys = [y for x, y in area.get_paths()[0].vertices if x == scale * held.seconds[held.peak]]
        assert (max(ys) - min(ys)) * 2**30 == pytest.approx(plan.memory.kinds.get(kind, 0), abs=1)
        at_peak = plan.memory.kinds.get(kind, 0)
        assert memory_size(at_peak) in legend[kind] if at_peak else kind not in legend, "all is below a device's 500th"
    widths = dict(zip([t.get_text() for t in below.get_yticklabels()], [bar.get_width() for bar in below.patches]))
    assert widths.pop(plots.IDLE) == plan.time.idle
    assert widths.pop(plots.NOT_HIDDEN, 0) == plan.time.exposed
    assert widths == plan.time.busy
    assert ("4 of 6 micro-batches" in above.get_title("left")) == (case == "six micro-batches")


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({k: v for k, v in RECIPE.items() if k != "data"}))
    return "tiny.yaml"


@pytest.mark.parametrize("ending,first", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_the_ending_names_the_kind_of_picture_and_the_same_plan_is_the_same_file(tmp_path, ending, first):
    paths = [tmp_path / f"{name}{ending}" for name in "ab"]
    for path in paths:
        plots.draw(planned("sharded"), path, "tiny")
    made = [path.read_bytes() for path in paths]
    assert made[0].startswith(first) and made[0] == made[1]


@pytest.mark.parametrize(
    "words,part",
    [
        (["--plot", "a.jpg"], "a.jpg is no name of a picture; it must end in .png, .svg or .pdf."),
        (["--plot", "missing/a.png"], "missing does not exist"),
        (["--plot", "taken.png"], "taken.png is there already; give another name, or remove it."),
    ],
)
def test_a_bad_place_is_one_error_before_anything_is_traced(recipe, tmp_path, words, part, capsys, monkeypatch):
    (tmp_path / "taken.png").write_bytes(b"mine")
    monkeypatch.setattr(plan_module, "trace", None)
    assert main(["plan", recipe, "--gpus", "1", *words]) == 2
    told = capsys.readouterr()
    assert part in told.err and len(told.err.splitlines()) == 1 and not told.out
    assert (tmp_path / "taken.png").read_bytes() == b"mine"


def test_a_picture_without_a_recipe_has_no_effect(capsys):
    assert main(["plan", "--failures", "--plot", "a.png"]) == 2
    assert "--plot has no effect without RECIPE" in capsys.readouterr().err


def test_a_picture_is_written_whole_or_not_at_all(recipe, tmp_path, monkeypatch, capsys):
    assert main(["plan", recipe, "--gpus", "1", "--plot", "a.svg", "--json"]) == 0
    assert (tmp_path / "a.svg").read_text().rstrip().endswith("</svg>")

    def full(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(UserError, match=r"b\.png cannot be written \(No space left on device\)"):
        plots.draw(planned("CPU"), tmp_path / "b.png", "tiny")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.svg", "tiny.yaml"]
