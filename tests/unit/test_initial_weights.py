"""What a run begins with: whoever's backbone goes where the method has it, and what follows it begins alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seer_scale.checkpoint import store
from seer_scale.checkpoint.layout import local_of
from seer_scale.config import resolve
from seer_scale.distributed import World
from seer_scale.errors import CheckpointError
from seer_scale.interop.artefact import About, Artefact, TensorInfo, write_artefact
from seer_scale.methods.registry import build_method
from seer_scale.parallel import build_engine
from seer_scale.parallel.engine import Engine
from seer_scale.parallel.shard import Shard
from seer_scale.training.initial_weights import find_initial_weights
from tests.tiny import DINOV2, RECIPE, losses_of, sections, tiny
from tests.toy import make, toy

ALONE = World()
TINY = {"name": "regnety", "depth": 5, "w0": 8, "wa": 12.0, "wm": 2.0, "group_width": 8}


def engine_of(kind: str, seed: int = 0) -> Engine:
    return toy(lambda: make(kind, ALONE), Engine, ALONE, **{"run.seed": seed})[1]


def values(engine: Engine) -> dict[str, torch.Tensor]:
    state = {k: v for k, v in engine.state().items() if k.startswith("model/")}
    return {k.removeprefix("model/"): local_of(v).clone().view(v.shape) for k, v in state.items()}


def begun(path: Path, make_engine, part: str = "all", **more):
    """The weights of a run that begins with `path`, and what it is told of them. make_engine: of `loaded`."""
    over = sections({"checkpoint.init_from": str(path), "checkpoint.init_part": part} | more)
    config = resolve(RECIPE, over, world_size=1)
    method, build = make_engine(config)
    weights = find_initial_weights(config, method, ALONE)
    engine = build(weights.loaded)
    nbytes = weights.load(engine.state(), ALONE)
    engine.refresh()
    return values(engine), weights, nbytes


def swav(config):
    return build_method(config, ALONE), lambda loaded: build_engine(build_method(config, ALONE), config, ALONE, loaded)


def of_kind(kind: str):
    def made(config):
        methods = []
        with torch.device("meta"):
            methods += [make(kind, ALONE), make(kind, ALONE)]
        return methods[0], lambda loaded: Engine(methods[1], config, ALONE, loaded)

    return made


def saved(folder: Path, engine: Engine, prefix: str) -> tuple[Path, dict[str, torch.Tensor]]:
    with torch.no_grad():
        for i, (name, tensor) in enumerate(values(engine).items()):  # so that a teacher differs from its student
            if tensor.is_floating_point():
                local_of(engine.state()[f"model/{name}"]).add_(0.01 * i)
    path = store.save(folder, engine.state(), {"samples_seen": 8, "export": {"prefix": prefix}}, ALONE)
    return path, values(engine)


def test_a_backbone_goes_from_method_to_method(tmp_path):
    path, there = saved(tmp_path / "a", engine_of("classifier", 1), "backbone.")
    here, weights, nbytes = begun(path, swav, "backbone")
    shared = {n for n in there if n.startswith("backbone.")}
    assert all(torch.equal(here[n], there[n]) for n in shared) and weights.anew == ("head", "prototypes")
    assert nbytes == sum(there[n].nbytes for n in shared) and all(t.isfinite().all() for t in here.values())
    with pytest.raises(CheckpointError) as caught:
        begun(path, swav)
    assert caught.value.problems[0].key == str(path) and "init_part backbone" in caught.value.problems[0].nearest


@pytest.mark.parametrize("prefix", ["student.backbone.", "teacher.backbone."])
def test_teacher_and_student_begin_as_what_was_exported(prefix, tmp_path):
    """Whichever of the two that was."""
    path, there = saved(tmp_path / "a", engine_of("teacher", 1), prefix)
    here, weights, _ = begun(path, of_kind("teacher"), "backbone")
    exported = {n.removeprefix(prefix): t for n, t in there.items() if n.startswith(prefix)}
    for name, tensor in exported.items():
        assert torch.equal(here[f"student.backbone.{name}"], tensor)
        assert torch.equal(here[f"teacher.backbone.{name}"], tensor)
    assert torch.equal(here["teacher.embed.weight"], here["student.embed.weight"])
    assert not torch.equal(here["student.embed.weight"], there["student.embed.weight"])
    here, weights, _ = begun(path, of_kind("teacher"))
    assert here.keys() == there.keys() and all(torch.equal(here[n], t) for n, t in there.items()) and not weights.anew


def artefact(path: Path, parts: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Path:
    """Of our tiny network's weights, and of what a method has beside it."""
    names = {(n.removeprefix("backbone.") if n.startswith("backbone.") else n.replace(".", "/", 1)): t
             for n, t in parts.items()}  # fmt: skip
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in names.items()}
    about = About("safetensors", TINY, {"size": 32})
    write_artefact(path, about, {n: TensorInfo(t.dtype, t.shape) for n, t in cast.items()}, cast.__getitem__)
    return path


@pytest.fixture(scope="module")
def trained():
    config = resolve(RECIPE, sections({"run.seed": 1}), world_size=1)
    return values(build_engine(build_method(config, ALONE), config, ALONE))


def test_what_is_imported_is_kept_where_it_fits(trained, tmp_path):
    path = artefact(tmp_path / "all.safetensors", trained)
    here, weights, _ = begun(path, swav)
    assert weights.kept == ("head", "prototypes") and weights.anew == ()
    assert all(torch.equal(here[n], t) for n, t in trained.items())

    here, weights, _ = begun(path, swav, **{"swav.prototypes": [12, 8]})  # all of a part, or none of it
    assert weights.kept == ("head",) and weights.anew == ("prototypes",)
    assert all(torch.equal(here[n], t) for n, t in trained.items() if not n.startswith("prototypes"))
    assert not torch.equal(here["prototypes.0.weight"], trained["prototypes.0.weight"])
    assert begun(path, swav, **{"swav.prototypes": [12]})[1].anew == ("prototypes",)

    here, weights, _ = begun(path, swav, "backbone")
    assert weights.kept == () and not torch.equal(here["head.0.weight"], trained["head.0.weight"])

    only = {n: t for n, t in trained.items() if n.startswith("backbone.")}
    half, weights, _ = begun(artefact(tmp_path / "half.safetensors", only, torch.float16), swav)
    assert weights.anew == ("head", "prototypes")
    assert all(torch.equal(half[n], t.half().to(t.dtype) if t.is_floating_point() else t) for n, t in only.items())
    assert all(t.isfinite().all() for t in half.values())


def test_another_network_is_refused_before_anything_is_built(trained, tmp_path):
    only = {n: t for n, t in trained.items() if n.startswith("backbone.")}
    path = artefact(tmp_path / "x.safetensors", only)
    for over in ({"model.group_width": 4}, {"model.depth": 6}):
        with pytest.raises(CheckpointError) as caught:
            begun(path, swav, **over)
        assert caught.value.problems[0].key == str(path) and "--model.w0 8" in caught.value.problems[0].nearest
    only.pop("backbone.stem.conv.weight")
    with pytest.raises(CheckpointError):
        begun(artefact(tmp_path / "y.safetensors", only), swav)


def test_a_rank_reads_what_it_holds_of_an_artefact(trained, tmp_path):
    held = Artefact(artefact(tmp_path / "x.safetensors", trained))
    name = "s2.b1.conv2.conv.weight"
    whole = trained[f"backbone.{name}"]
    for start, stop in ((0, whole.numel()), (5, 77), (300, 301), (9, 9)):
        run = Shard(torch.zeros(stop - start), start, whole.shape)
        read = held.fill(run, name)
        assert torch.equal(run.local, whole.flatten()[start:stop])
        assert read <= (stop - start + 2 * whole[0].numel()) * 4


LARGER = [{"num": 2, "size": 48}, {"num": 2, "size": 24}]


@pytest.mark.parametrize("part", ["all", "backbone"])
def test_a_phase_of_larger_images_begins_with_the_table_resized(tmp_path, part):
    """Of student and teacher each its own; all else bit for bit, heads too unless they begin anew. A table of another
    width is refused."""
    config, engine = tiny(ALONE, DINOV2, **{"parallel.engine": "single"})
    losses_of(engine, config, ALONE, range(2), 0.1)  # so that student and teacher differ
    path, before = saved(tmp_path, engine, engine.method.export_prefix)
    over = {"checkpoint.init_from": str(path), "checkpoint.init_part": part, "model.image_size": 48, "run.seed": 7}
    config = resolve(DINOV2, sections(over | {"views.crops": LARGER}), world_size=1)
    weights = find_initial_weights(config, build_method(config, ALONE), ALONE)
    larger = build_engine(build_method(config, ALONE), config, ALONE, weights.loaded)
    weights.load(larger.state(), ALONE)
    assert "positions resized" in str(weights)
    after = values(larger)
    for name, value in after.items():
        who, _, inner = name.partition(".")
        old = before[f"teacher.{inner}" if part == "backbone" and who == "student" else name]
        if inner == "embed.pos_embed":
            grid = old[1:].T.reshape(1, 24, 6, 6)
            grid = torch.nn.functional.interpolate(grid, (12, 12), mode="bicubic", antialias=True)
            torch.testing.assert_close(value, torch.cat([old[:1], grid.flatten(2)[0].T]))
        elif "_head" not in name or part == "all":
            assert torch.equal(value, old), name
    if part == "all":
        assert not torch.equal(after["student.embed.pos_embed"], after["teacher.embed.pos_embed"])
    assert torch.isfinite(torch.tensor(losses_of(larger, config, ALONE, range(1), 0.1))).all()
    config = resolve(DINOV2, sections(over | {"model.width": 32}), world_size=1)
    with pytest.raises(CheckpointError, match="another architecture"):
        find_initial_weights(config, build_method(config, ALONE), ALONE)


def test_what_is_left_over_is_told_but_copies_of_the_backbone(tmp_path):
    """A Gram teacher that was kept is not needed; one that is to be kept begins as the teacher there. Another depth is
    another architecture, also where it is less."""
    gram = {"dinov2.gram_weight": 1.0, "dinov2.gram_scale": 1}
    _, engine = tiny(ALONE, DINOV2, **gram, **{"dinov2.gram_from_samples": 8})
    path, before = saved(tmp_path / "gram", engine, engine.method.export_prefix)
    plain = resolve(DINOV2, sections({"checkpoint.init_from": str(path)}), world_size=1)
    anchored = resolve(DINOV2, sections({"checkpoint.init_from": str(path)} | gram), world_size=1)
    for config in (plain, anchored):
        weights = find_initial_weights(config, build_method(config, ALONE), ALONE)
        begun_with = build_engine(build_method(config, ALONE), config, ALONE, weights.loaded)
        weights.load(begun_with.state(), ALONE)
        for name, value in values(begun_with).items():
            who, _, inner = name.partition(".")
            assert torch.equal(value, before[f"teacher.{inner}" if who == "gram" else name]), name
    for key, less in (("model.depth", 2), ("model.registers", 0)):
        config = resolve(DINOV2, sections({"checkpoint.init_from": str(path), key: less}), world_size=1)
        with pytest.raises(CheckpointError, match="is of another architecture: model/.* and absent in this run"):
            find_initial_weights(config, build_method(config, ALONE), ALONE)
    regnety = resolve(RECIPE, sections({"model.depth": 6}), world_size=1)
    longer = build_engine(build_method(regnety, ALONE), regnety, ALONE)
    path, _ = saved(tmp_path / "swav", longer, "backbone.")
    config = resolve(RECIPE, sections({"checkpoint.init_from": str(path)}), world_size=1)
    with pytest.raises(CheckpointError, match="is of another architecture"):
        find_initial_weights(config, build_method(config, ALONE), ALONE)
