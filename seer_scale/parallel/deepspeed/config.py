"""What DeepSpeed is configured with: the recipe's part, and a JSON file's for what the recipe does not say."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from seer_scale.config import Config
from seer_scale.errors import NOTHING, ConfigError, Problem, nearest
from seer_scale.extras import requirements
from seer_scale.parallel.deepspeed import as_found_here
from seer_scale.parallel.private_parts import moved_parts

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
ALL = int(1e12)
"""More elements than any model has: one bucket or sub-group for everything."""
BUCKET = 50_000_000
"""Elements reduced together, unless a file says otherwise; not more than a rank's part, as stage 3 always holds so
many."""
RECIPE_SAYS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "optimizer": "optim.name",
    "scheduler": "schedule.name",
    "activation_checkpointing": "parallel.activation_checkpoint",
    "zero_optimization.stage": "parallel.engine",
    "zero_optimization.offload_optimizer": "parallel.offload",
}
"""Keys of DeepSpeed's whose matter the recipe settles, and where."""
MEASURING_KEYS = (
    "communication_data_type",
    "prescale_gradients",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
)
"""Further keys a file may have beside zero_optimization."""


def deepspeed_config(config: Config, world_size: int, num_parameters: int = 0) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe: what the recipe says, over what a file of the user's says, over the
    shipped file. Raises ConfigError with all that is wrong: a file that cannot be read, keys or values DeepSpeed does
    not take, what says other than the recipe, and a version of DeepSpeed that lacks what is used of it."""
    shipped = DS_CONFIGS / f"{config.parallel.engine}.json"
    path = Path(config.parallel.ds_config or shipped)
    given, usual = _read(path), _read(shipped)
    ours = from_recipe(config, world_size)
    top, zero = set(ours) | set(MEASURING_KEYS), set(_fields())
    problems = [
        *_wrong(path, config, given, ours, top, ""),
        *_wrong(
            path, config, given.get("zero_optimization", {}), ours["zero_optimization"], zero, "zero_optimization."
        ),
    ]
    problems = problems or _refused(path, given.get("zero_optimization", {})) or _moved()
    if problems:
        raise ConfigError(problems)
    defaults = {
        "reduce_bucket_size": max(1, min(BUCKET, num_parameters // world_size)),
        "stage3_prefetch_bucket_size": 0,
    }
    merged = (
        defaults | usual.get("zero_optimization", {}) | given.get("zero_optimization", {}) | ours["zero_optimization"]
    )
    return usual | given | ours | {"zero_optimization": merged}


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text())
    except OSError as error:
        rule = f"it cannot be read ({error.strerror})"
        fix = "give a JSON file such as ds_configs/zero3.json"
        raise ConfigError([Problem("parallel.ds_config", path, rule, fix)]) from error
    except ValueError as error:
        raise ConfigError([Problem("parallel.ds_config", path, f"it is not JSON: {error}")]) from error
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization", {}), dict):
        rule = "it must be a JSON object whose zero_optimization is one too"
        raise ConfigError([Problem("parallel.ds_config", path, rule)])
    return given


def from_recipe(config: Config, world_size: int) -> dict[str, Any]:
    """What the recipe, or the engine for the sake of equal results, settles."""
    parallel, share = config.parallel, max(1, config.train.global_batch // world_size)
    zero: dict[str, Any] = {
        "stage": int(parallel.engine[-1]),
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "round_robin_gradients": False,
    }
    if parallel.engine == "zero3":
        zero |= {
            "sub_group_size": ALL,
            "stage3_param_persistence_threshold": 0,
            "stage3_model_persistence_threshold": ALL,
        }
    if parallel.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": parallel.device != "cpu"}
    return {
        "train_batch_size": share * world_size,
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _wrong(
    path: Path, config: Config, given: dict[str, Any], ours: dict[str, Any], known: set[str], prefix: str
) -> list[Problem]:
    """What is unknown or says other than the recipe."""
    out, recipe_says = [], {k.removeprefix(prefix): v for k, v in RECIPE_SAYS.items() if k.startswith(prefix)}
    engine = config.parallel.engine
    for key, value in given.items():
        name = f"{prefix}{key} in {path}"
        if key == "zero_optimization" or key in ours and ours[key] == value or _agrees(key, value, config):
            continue
        if key in recipe_says:
            section, field = recipe_says[key].split(".")
            rule = f"the recipe's {recipe_says[key]} is {getattr(getattr(config, section), field)}"
            out.append(Problem(name, value, rule, f"remove it there and set {recipe_says[key]}"))
        elif key in ours:
            rule = f"parallel.engine {engine} needs {ours[key]}"
            out.append(Problem(name, value, rule, "remove it from the file"))
        elif key not in known:
            rule = f"is no key that parallel.engine {engine} takes"
            out.append(Problem(name, NOTHING, rule, nearest(key, known)))
    return out


def _agrees(key: str, value: Any, config: Config) -> bool:
    """Whether what the recipe settles elsewhere stands here with the same meaning."""
    if not isinstance(value, dict):
        return False
    if key in ("fp16", "bf16", "amp", "torch_autocast") and not value.get("enabled", True):
        return True  # to DeepSpeed the model is fp32
    if key == "offload_optimizer":
        return value.get("device", "none") == ("cpu" if config.parallel.offload else "none") and set(value) <= {
            "device"
        }
    return False


def _refused(path: Path, zero: dict[str, Any]) -> list[Problem]:
    """What DeepSpeed says of values of zero_optimization."""
    with as_found_here():
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        where = [(".".join(map(str, e["loc"])), e["input"], e["msg"].rstrip(".")) for e in error.errors()]
        name = "zero_optimization.{} in {}".format
        return [Problem(name(key, path), value, f"DeepSpeed says: {told}") for key, value, told in where]
    return []


def _moved() -> list[Problem]:
    """What an installed version outside of those tested lacks of what is used of it."""
    from packaging.requirements import Requirement

    tested = Requirement(requirements().get("deepspeed", "deepspeed")).specifier
    if tested.contains(metadata.version("deepspeed"), prereleases=True):
        return []
    from seer_scale.parallel.deepspeed.private import DEEPSPEED_PARTS

    return moved_parts(DEEPSPEED_PARTS)


def _fields() -> tuple[str, ...]:
    """Keys of zero_optimization, without those that change where weights lie, which the engine would not see."""
    with as_found_here():
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    return tuple(
        n
        for n in names
        if not n.startswith(
            (
                "offload_param",
                "cpu_offload",
                "mics_",
                "zero_hpz",
                "zero_quantized",
                "zenflow",
                "stage3_gather",
                "stage3_module",
                "override",
            )
        )
    )
