"""What other libraries promise to nobody and is used here is there, as it is used; a version that moved it is named."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.tensor.debug
import torch.testing._internal.distributed.fake_pg

import seer_scale
from seer_scale.parallel import private_parts
from seer_scale.parallel.deepspeed import private
from seer_scale.parallel.fairscale import FAIRSCALE_PARTS
from seer_scale.parallel.private_parts import PrivatePart, moved_parts

HOUSE = Path(seer_scale.__file__).parent
QUARANTINE = HOUSE / "parallel" / "deepspeed" / "private.py"
OF_TORCH = {
    "torch._foreach_norm": "", "torch._foreach_mul_": "", "torch._foreach_lerp_": "", "torch._foreach_sub_": "",
    "torch._foreach_add_": "", "torch._foreach_copy_": "",
    "torch._fused_sgd_": "momentum_buffer_list weight_decay momentum lr dampening nesterov maximize is_first_step"
    " found_inf",
    "torch._fused_adamw_": "exp_avgs exp_avg_sqs max_exp_avg_sqs state_steps lr beta1 beta2 weight_decay eps amsgrad"
    " maximize found_inf",
    "torch._amp_foreach_non_finite_check_and_unscale_": "found_inf inv_scale",
    "torch._amp_update_scale_": "growth_tracker found_inf scale_growth_factor scale_backoff_factor growth_interval",
    "torch._scaled_dot_product_flash_attention": "query key value dropout_p is_causal return_debug_mask scale",
    "torch._scaled_dot_product_efficient_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal"
    " scale",
    "torch._dynamo.config.recompile_limit": None,
    "torch._dynamo.config.accumulated_recompile_limit": None,
    "Tensor._make_wrapper_subclass": None,
    "torch.UntypedStorage._cdata": None,
    "torch.utils._python_dispatch.TorchDispatchMode": None,
    "torch.ops.aten._to_copy.default": None,
    "torch.utils._pytree.tree_map_only": None, "torch._ops.OpOverload": None,
    "dist.distributed_c10d._world.pg_map": None,
    "dist.distributed_c10d._set_pg_timeout": "timeout group",
} | dict.fromkeys((
    "torch._C._autograd._get_sequence_nr", "torch._C._current_autograd_node", "torch._C._DisableTorchDispatch",
    "torch._C._set_warn_deprecated_on_mutable_data_ptr", "torch._C._get_privateuse1_backend_name",
    "torch._C.DispatchKeySet",
    "torch._C.DispatchKey", "torch._C._only_lift_cpu_tensors", "torch._C._set_only_lift_cpu_tensors",
    "torch._C._ExcludeDispatchKeyGuard", "torch._C._dispatch_has_kernel_for_dispatch_key",
    "torch._subclasses.fake_tensor.FakeTensorMode", "torch._subclasses.fake_tensor.unset_fake_temporarily",
    "torch.testing._internal.distributed.fake_pg.FakeStore",
    "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam.reset_sharded_param",
    "torch.distributed.tensor.debug._clear_sharding_prop_cache",
    "torch.utils._python_dispatch._disable_current_modes",
))  # fmt: skip
"""Of torch: what the package names, and words that its schema or signature must have."""


def names_in(path: Path) -> set[str]:
    """Dotted names in a module."""
    tree = ast.parse(path.read_text())
    dotted = (ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    names = {name for name in dotted if re.fullmatch(r"[\w.]+", name)}
    return names | {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}


def arguments(kernel: str) -> set[str]:
    """Of one of torch's native functions, in any of its overloads."""
    packet = getattr(torch.ops.aten, kernel.removeprefix("torch."))
    return {a.name for overload in packet.overloads() for a in getattr(packet, overload)._schema.arguments}


@pytest.mark.parametrize("part", [*private.DEEPSPEED_PARTS, *FAIRSCALE_PARTS], ids=lambda part: part.name)
def test_each_part_is_there_as_it_is_used(part):
    assert moved_parts([part]) == []


@pytest.mark.parametrize("name,words", OF_TORCH.items())
def test_each_part_of_torch_is_there(name, words):
    scope = {"torch": torch, "dist": torch.distributed, "Tensor": torch.Tensor}
    if name.endswith("_set_pg_timeout") and hasattr(torch.distributed, "set_timeout"):
        return  # it has a public name, which is taken
    part = eval(name, scope)  # a name of the table above
    if words is not None:
        takes = arguments(name) if name.startswith("torch.") else set(inspect.signature(part).parameters)
        assert set(words.split()) <= takes, f"torch {torch.__version__}: {name} takes {takes}"


def test_no_other_part_of_torch_is_used():
    listed = {*OF_TORCH}
    for path in HOUSE.rglob("*.py"):
        for name in names_in(path):
            inner = [word for word in name.split(".") if word.startswith("_") and not word.startswith("__")]
            if inner and name.split(".")[0] in ("torch", "dist"):
                assert any(known.startswith(name) or name.startswith(known) for known in listed), f"{path}: {name}"


def test_nothing_else_touches_deepspeeds_parts():
    used = {part.name.rpartition(".")[2] for part in private.DEEPSPEED_PARTS}
    inner = {name for name in used if name.startswith(("_", "ds_")) or "_groups" in name or "partition" in name}
    inner -= {"partition"}  # of strings
    for path in HOUSE.rglob("*.py"):
        names = names_in(path)
        if path != QUARANTINE:
            assert not {n.rpartition(".")[2] for n in names} & inner, path
            assert not {n for n in names if n.startswith("deepspeed")} - {"deepspeed.runtime.zero.config"}, path


@pytest.fixture
def library(tmp_path, monkeypatch):
    (tmp_path / "somelib").mkdir()
    file = tmp_path / "somelib" / "inner.py"
    file.write_text(
        "LIMIT = 3\nclass Thing:\n    def __init__(self):\n        self.state = {}\n"
        "    def turn(self, angle, speed=1):\n        def inner(x): pass\n"
    )
    (tmp_path / "somelib" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(private_parts.metadata, "version", lambda _: "7.1")
    for cached in (private_parts._definitions, private_parts._values):
        cached.cache_clear()
    yield file
    for cached in (private_parts._definitions, private_parts._values):
        cached.cache_clear()


def test_what_is_as_it_was_is_no_problem(library):
    there = [("LIMIT", None), ("Thing.state", None), ("Thing.turn", ("angle",)), ("Thing.turn", ("angle", "speed"))]
    there += [("Thing.turn.inner", ("x",))]
    assert moved_parts(PrivatePart("somelib.inner", name, "this", takes) for name, takes in there) == []


@pytest.mark.parametrize(
    "name,takes,rule",
    [
        ("Thing.gone", (), "is gone (used for turning)"),
        ("Thing.gone", None, "is gone (used for turning)"),
        ("Other.turn", (), "is gone (used for turning)"),
        ("Thing.turn", ("speed",), "takes (angle, speed) instead of (speed) (used for turning)"),
        ("Thing.turn", (), "takes (angle, speed) instead of () (used for turning)"),
        ("Thing.turn", None, ""),
    ],
)
def test_what_moved_is_named_with_its_version(library, name, takes, rule):
    problems = moved_parts([PrivatePart("somelib.inner", name, "turning", takes)])
    if not rule:
        assert len(problems) == 1  # a function where a value was
        return
    (problem,) = problems
    assert problem.key == f"somelib 7.1: {name}" and problem.rule == rule and "pip install" in problem.nearest


def test_a_module_that_moved_is_a_part_that_is_gone(library):
    (problem,) = moved_parts([PrivatePart("somelib.elsewhere", "LIMIT", "turning")])
    assert problem.key == "somelib 7.1: LIMIT" and "is gone" in problem.rule
