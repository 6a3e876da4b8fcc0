"""What DeepSpeed is configured with: the recipe's part, and a JSON file's for what the recipe does not say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from seer_scale.config import Config
from seer_scale.errors import UserError, nearest

FOLDER = next(
    (f for f in (Path(__file__).parents[2] / "ds_configs", Path(sys.prefix) / "share/seer_scale/ds_configs") if f.is_dir()),
    Path("ds_configs"),
)
ALL = int(1e12)
"""More elements than any model has: one bucket or sub-group for everything."""
BUCKET = 50_000_000
"""Elements reduced together, unless a file says otherwise; not more than a rank's part, as stage 3 always holds so many."""
RECIPE_SAYS = {
    "train_batch_size": "train.global_batch", "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch", "fp16": "train.precision", "bf16": "train.precision",
    "amp": "train.precision", "torch_autocast": "train.precision", "data_types": "train.precision",
    "optimizer": "optim.name", "scheduler": "schedule.name", "activation_checkpointing": "parallel.activation_checkpoint",
    "zero_optimization.stage": "parallel.engine", "zero_optimization.offload_optimizer": "parallel.offload",
}  # fmt: skip
"""Keys of DeepSpeed's whose matter the recipe settles, and where."""
FREE = (
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "comms_logger", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "steps_per_print", "flops_profiler", "sparse_gradients", "seq_parallel_communication_data_type",
)  # fmt: skip
"""Further keys a file may have beside zero_optimization."""


def deepspeed_config(config: Config, world_size: int, num_parameters: int = 0) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe. Raises UserError where the file cannot be read, has a key DeepSpeed does
    not know, or says other than the recipe."""
    path = Path(config.parallel.ds_config or FOLDER / f"{config.parallel.engine}.json")
    try:
        given = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"parallel.ds_config {path} cannot be read ({error.strerror}); give a JSON file such as ds_configs/zero3.json.") from error
    except ValueError as error:
        raise UserError(f"parallel.ds_config {path} is not JSON: {error}.") from error
    zero = given.get("zero_optimization", {}) if isinstance(given, dict) else None
    if not isinstance(zero, dict):
        raise UserError(f"parallel.ds_config {path} must be a JSON object whose zero_optimization is one too.")
    ours = from_recipe(config, world_size)
    _check(path, config, given, ours, (*ours, *RECIPE_SAYS, *FREE), "")
    _check(path, config, zero, ours["zero_optimization"], _fields(), "zero_optimization.")
    defaults = {"reduce_bucket_size": max(1, min(BUCKET, num_parameters // world_size)), "stage3_prefetch_bucket_size": 0}
    return {**given, **ours, "zero_optimization": {**defaults, **zero, **ours["zero_optimization"]}}


def from_recipe(config: Config, world_size: int) -> dict[str, Any]:
    """What the recipe, or the engine for the sake of equal results, settles."""
    p, share = config.parallel, max(1, config.train.global_batch // world_size)
    zero: dict[str, Any] = {"stage": int(p.engine[-1]), "contiguous_gradients": True, "reduce_scatter": True, "round_robin_gradients": False}
    if p.engine == "zero3":
        zero |= {"sub_group_size": ALL, "stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": ALL}
    if p.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": p.device != "cpu"}
    return {
        "train_batch_size": share * world_size, "train_micro_batch_size_per_gpu": share, "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0, "steps_per_print": None, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero,
    }  # fmt: skip


def _check(path: Path, config: Config, given: dict[str, Any], ours: dict[str, Any], known: tuple[str, ...], prefix: str) -> None:
    for key, value in given.items():
        name = f"{prefix}{key}"
        recipe = RECIPE_SAYS.get(name)
        if key == "zero_optimization" or key in ours and ours[key] == value:
            continue
        if recipe:
            section, field = recipe.split(".")
            said = getattr(getattr(config, section), field)
            raise UserError(f"{path} has {name} {json.dumps(value)}, but the recipe's {recipe} is {json.dumps(said)}: remove {name} from the file, and set {recipe}.")
        if key in ours:
            raise UserError(f"{path} has {name} {json.dumps(value)}, but parallel.engine {config.parallel.engine} needs {json.dumps(ours[key])}: remove it from the file.")
        if key not in known:
            raise UserError(f"{path} has {name}, which is no key that parallel.engine {config.parallel.engine} takes; {nearest(key, list(known))}")


def _fields() -> tuple[str, ...]:
    """Keys of zero_optimization, without those that change where weights lie, which the engine would not see."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    names = (*fields, *(f.alias for f in fields.values() if f.alias))
    return tuple(n for n in names if not n.startswith(("offload_param", "cpu_offload", "mics_", "zero_hpz", "zero_quantized")))
