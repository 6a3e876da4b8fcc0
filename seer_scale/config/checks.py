"""Rules between the keys of a recipe, and between them and the number of ranks, as tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from seer_scale.config.method_settings import all_keys
from seer_scale.config.schema import FREE_MODELS, PER_CROP, ZERO_ENGINES, Config, Photometric, keys_of_model
from seer_scale.cores import loads_in_processes
from seer_scale.errors import NOTHING, Problem

Of = Callable[[Config, int], Any]
"""Something of a Config and the number of ranks."""


@dataclass(frozen=True)
class Rule:
    """One row: the keys it is about, the first of which is at fault; when it is broken; what then to say. Where a value
    of these keys could not be read, the row is left out, as what it would say of a default is not true."""

    keys: tuple[str, ...]
    is_broken: Of
    rule: str | Of
    nearest: Any = ""
    value: Any = NOTHING
    """Instead of the key's own."""

    def check(self, config: Config, ranks: int) -> Problem | None:
        if not self.is_broken(config, ranks):
            return None

        def of(what: Any) -> Any:
            return what(config, ranks) if callable(what) else what

        value = config.get(self.keys[0]) if self.value is NOTHING else of(self.value)
        return Problem(self.keys[0], value, of(self.rule), of(self.nearest))


def divisor_near(number: int, of: int, at_most: bool = False) -> int:
    """The divisor of `of` that is nearest to `number`."""
    divisors = [d for d in range(1, of + 1) if of % d == 0 and (d <= number or not at_most)]
    return min(divisors, key=lambda d: abs(d - number))


def multiples_near(number: int, of: int) -> tuple[int, ...]:
    """The multiples of `of` around `number`, but 0."""
    return tuple(dict.fromkeys(n for n in (number // of * of, -(-number // of) * of) if n))


def _is_meshed(config: Config) -> bool:
    return config.parallel.engine in ("fsdp", "auto")


def _stall_s(config: Config) -> float:
    """How long a rank may wait for another's loader."""
    return 10 * config.data.timeout_s


def _misplaced(config: Config) -> list[str]:
    return [f"model.{key}" for key in config.model.misplaced_keys()]


def _takers(config: Config) -> list[str]:
    """Free networks that take all keys given, that of the name's own kind first."""
    takers = [name for name in FREE_MODELS if {*config.model.explicit_keys()} <= {*keys_of_model(name)}]
    return sorted(takers, key=lambda name: not config.model.name.startswith(name))


def _of_mesh(name: str, default: int) -> Rule:
    return Rule(
        (f"parallel.{name}", "parallel.engine"),
        lambda config, ranks: not _is_meshed(config) and getattr(config.parallel, name) != default,
        lambda config, ranks: f"parallel.engine is {config.parallel.engine}, which has no mesh of replicas and shards",
        f"use engine fsdp, or leave {name} out",
    )


RULES = (
    Rule(
        ("data.workers",),
        lambda config, ranks: config.data.workers and not loads_in_processes(),
        "loader processes need Linux",
        0,
    ),
    Rule(
        ("train.global_batch", "parallel.ranks"),
        lambda config, ranks: config.train.global_batch % ranks,
        lambda config, ranks: f"must divide evenly among the ranks ({ranks})",
        lambda config, ranks: multiples_near(config.train.global_batch, ranks),
    ),
    Rule(
        ("parallel.sync_bn_group", "parallel.ranks"),
        lambda config, ranks: config.parallel.sync_bn_group and ranks % config.parallel.sync_bn_group,
        lambda config, ranks: f"must divide the number of ranks ({ranks})",
        lambda config, ranks: divisor_near(config.parallel.sync_bn_group, ranks),
    ),
    Rule(
        ("parallel.replicate_degree", "parallel.ranks"),
        lambda config, ranks: ranks % config.parallel.replicate_degree,
        lambda config, ranks: f"must divide the number of ranks ({ranks})",
        lambda config, ranks: divisor_near(config.parallel.replicate_degree, ranks, at_most=True),
    ),
    Rule(
        ("parallel.shard_degree", "parallel.replicate_degree", "parallel.ranks"),
        lambda config, ranks: (
            config.parallel.shard_degree
            and ranks % config.parallel.replicate_degree == 0
            and config.parallel.replicate_degree * config.parallel.shard_degree != ranks
        ),
        lambda config, ranks: (
            f"with parallel.replicate_degree {config.parallel.replicate_degree} takes "
            f"{config.parallel.replicate_degree * config.parallel.shard_degree} ranks, and there are {ranks}"
        ),
        lambda config, ranks: ranks // config.parallel.replicate_degree,
    ),
    _of_mesh("replicate_degree", 1),
    _of_mesh("shard_degree", 0),
    Rule(
        ("parallel.min_unit_mib", "parallel.max_unit_gib", "parallel.engine"),
        lambda config, ranks: _is_meshed(config) and config.parallel.min_unit_mib > 1024 * config.parallel.max_unit_gib,
        lambda config, ranks: (
            f"parallel.max_unit_gib {config.parallel.max_unit_gib:g} lets no more than "
            f"{1024 * config.parallel.max_unit_gib:g} MiB be gathered together"
        ),
        lambda config, ranks: 1024 * config.parallel.max_unit_gib,
    ),
    Rule(
        ("parallel.engine", "parallel.ranks"),
        lambda config, ranks: config.parallel.engine == "single" and ranks > 1,
        lambda config, ranks: f"there are {ranks} ranks",
        "use ddp or fsdp",
    ),
    Rule(
        ("parallel.offload", "parallel.engine"),
        lambda config, ranks: config.parallel.offload and config.parallel.engine not in ZERO_ENGINES,
        lambda config, ranks: f"parallel.engine is {config.parallel.engine}, which offloads nothing",
        f"use {', '.join(ZERO_ENGINES)}, or offload false",
    ),
    Rule(
        ("train.freeze_backbone_samples", "train.total_samples"),
        lambda config, ranks: config.train.freeze_backbone_samples > config.train.total_samples,
        lambda config, ranks: f"the run has {config.train.total_samples} samples",
        lambda config, ranks: config.train.total_samples,
    ),
    Rule(
        ("run.hang_timeout_s", "data.workers", "data.timeout_s"),
        lambda config, ranks: config.data.workers != 0 and 0 < config.run.hang_timeout_s < _stall_s(config),
        lambda config, ranks: f"a rank may wait {_stall_s(config):g} s for another's loader (10 x data.timeout_s)",
        lambda config, ranks: f"nearest: {_stall_s(config):g}, or 0 for none",
    ),
    Rule(
        ("views.crops",),
        lambda config, ranks: not config.views.crops,
        "must name at least one kind of crop",
        "nearest: [{num: 2}]",
        value=[],
    ),
    Rule(
        ("views.crops",),
        lambda config, ranks: len({crop.shape for crop in config.views.crops}) < len(config.views.crops),
        "each kind of crop needs a size of its own",
        "give kinds of one size one entry",
        value=lambda config, ranks: [crop.size for crop in config.views.crops],
    ),
    Rule(
        ("views.blur_p", "views.crops"),
        lambda config, ranks: (
            isinstance(config.views.blur_p, str) and config.views.crops and config.views.crops[0].num != 2
        ),
        lambda config, ranks: f"needs a first kind of 2 crops, and views.crops[0].num is {config.views.crops[0].num}",
        "give that 2, or numbers, of which each kind may have its own",
    ),
    Rule(
        ("schedule.decay_samples", "schedule.warmup_samples", "schedule.warmup_share", "train.total_samples"),
        lambda config, ranks: 0 < config.schedule.decay_samples < config.warmup_samples,
        lambda config, ranks: f"the warm-up alone takes {config.warmup_samples} samples",
        lambda config, ranks: config.warmup_samples,
    ),
    Rule(
        ("schedule.warmup_samples", "schedule.warmup_share", "train.total_samples"),
        lambda config, ranks: config.warmup_samples > config.train.total_samples,
        lambda config, ranks: f"the run has {config.train.total_samples} samples",
        lambda config, ranks: (
            f"nearest: {config.train.total_samples}, or less, as in "
            f"--schedule.warmup_samples {config.train.total_samples // 10}"
        ),
    ),
    Rule(
        ("schedule.plateau_samples", "schedule.name", "train.global_batch"),
        lambda config, ranks: (
            config.schedule.name == "plateau" and config.schedule.plateau_samples < config.train.global_batch
        ),
        "a window needs at least one update (train.global_batch)",
        lambda config, ranks: config.train.global_batch,
    ),
    Rule(
        ("model.name", "model"),
        lambda config, ranks: bool(_misplaced(config)),
        lambda config, ranks: (
            f"it takes no {', '.join(_misplaced(config))}"
            if config.model.name in FREE_MODELS
            else f"its shape is fixed, and {', '.join(_misplaced(config))} given"
        ),
        lambda config, ranks: (
            "".join(f"use model.name {free}, or " for free in _takers(config)[:1])
            + f"give {' '.join(f'--{key} null' for key in _misplaced(config))}"
        ),
    ),
    Rule(
        ("checkpoint.resume", "checkpoint.init_from"),
        lambda config, ranks: config.checkpoint.init_from and config.checkpoint.resume not in ("auto", "none"),
        "checkpoint.init_from is given, too: init_from starts a new run from weights, resume goes on with everything",
        "give one",
    ),
)


def check_rules(config: Config, ranks: int, broken: Collection[str] = ()) -> list[Problem]:
    """What of the rules is broken. broken: keys whose value could not be read, so that a default stands in."""
    found = [
        problem
        for rule in RULES
        if not any(is_about(key, broken) for key in rule.keys) and (problem := rule.check(config, ranks))
    ]
    found += [
        problem for keys, problem in _photometric_problems(config) if not any(is_about(key, broken) for key in keys)
    ]
    return found + [p for p in config.method_settings.rules(config, ranks) if not is_about(p.key, broken)]


def _photometric_problems(config: Config) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """What is wrong with photometrics, those of all crops and those of a kind, each with the keys it is about."""
    kinds = {f"views.crops[{i}]": crop for i, crop in enumerate(config.views.crops)}
    jitters = {"views": config.views.jitter} | {section: crop.jitter for section, crop in kinds.items()}
    for section, jitter in jitters.items():
        if jitter and jitter[3] > 0.5:
            rule, key = "a hue shift, the last of the four, is at most 0.5", f"{section}.jitter"
            yield (key,), Problem(key, list(jitter), rule, [*jitter[:3], 0.5])
    for section, crop in kinds.items():
        for key in PER_CROP:
            given, num = getattr(crop, key), crop.num
            if isinstance(given, tuple) and len(given) != num:
                rule = f"a list has a value for each crop of the kind, whose num is {num}"
                near: Any = [*given, *given[-1:] * num][:num] or "give a number"
                yield (f"{section}.{key}", f"{section}.num"), Problem(f"{section}.{key}", list(given), rule, near)


def is_about(key: str, broken: Collection[str]) -> bool:
    """Whether one of `broken` is this key, within it or around it."""
    return any(b == key or b.startswith((f"{key}.", f"{key}[")) or key.startswith(f"{b}.") for b in broken)


def _needs(config: Config) -> dict[str, tuple[bool, str]]:
    """For a key that only has an effect with another: whether it has, and what it needs."""
    engine, kind = config.parallel.engine, config.data.kind
    is_hub = (kind in ("auto", "hub", "stream"), "data.kind hub or stream")
    is_plateau = (config.schedule.name == "plateau", "schedule.name plateau")
    is_cosine = (config.schedule.name == "cosine", "schedule.name cosine")
    has_workers = (config.data.workers != 0, "data.workers of at least 1")
    needs = {
        "optim.lr_scaling": (config.optim.lr_batch > 0, "an optim.lr_batch"),
        "optim.trust_coefficient": (config.optim.name == "lars", "optim.name lars"),
        "optim.momentum": (config.optim.name != "adamw", "optim.name lars or sgd"),
        "optim.betas": (config.optim.name == "adamw", "optim.name adamw"),
        "optim.clip_by": (config.optim.clip_norm > 0, "an optim.clip_norm"),
        "schedule.final": is_cosine,
        "schedule.decay_samples": (
            config.schedule.name == "cosine" or config.optim.weight_decay_end is not None,
            "schedule.name cosine or an optim.weight_decay_end",
        ),
        "schedule.plateau_factor": is_plateau,
        "schedule.plateau_samples": is_plateau,
        "schedule.plateau_threshold": is_plateau,
        "parallel.reshard_after_forward": (engine in ("fsdp", "auto"), "parallel.engine fsdp"),
        "parallel.max_unit_gib": (engine in ("fsdp", "zero3", "auto"), "parallel.engine fsdp or zero3"),
        "parallel.min_unit_mib": (engine in ("fsdp", "auto"), "parallel.engine fsdp"),
        "parallel.ds_config": (engine in ZERO_ENGINES, f"parallel.engine {', '.join(ZERO_ENGINES)}"),
        "train.min_loss_scale": (config.train.precision == "fp16", "train.precision fp16"),
        "checkpoint.keep_best": (config.knn.enabled and config.knn.every_samples > 0, "knn.every_samples"),
        "checkpoint.init_part": (bool(config.checkpoint.init_from), "a checkpoint.init_from"),
        "health.images": (
            kind != "stream" or config.knn.enabled and bool(config.knn.bank),
            "a data.kind other than stream, or a knn.bank",
        ),
        "probe.enabled": (config.knn.enabled, "knn.enabled true"),
        "probe.lr": (config.probe.enabled, "probe.enabled true"),
        "data.prefetch": has_workers,
        "data.timeout_s": has_workers,
        "data.block": (kind != "stream", "a data.kind other than stream"),
        "data.max_images": (kind != "stream", "a data.kind other than stream"),
        "data.length": (kind == "stream", "data.kind stream"),
        "data.buffer": (kind == "stream", "data.kind stream"),
        "data.split": is_hub,
        "data.image_key": is_hub,
    }
    for key in Photometric._fields:
        used = any(getattr(crop, key, None) is None for crop in config.views.crops) or not config.views.crops
        needs[f"views.{key}"] = (used, f"a kind of views.crops that has no {key} of its own")
    own = config.method_settings.needs()
    return needs | {f"{config.method.name}.{key}": need for key, need in own.items()}


def unused_keys(config: Config, broken: Collection[str] = ()) -> list[Problem]:
    """Keys that differ from their default but that nothing would read: nothing given is silently ignored."""
    needs, problems = _needs(config), []
    for key, _, default, _ in all_keys(config.method.name):
        has_effect, need = needs.get(key, (True, ""))
        if not has_effect and config.get(key) != default and not is_about(key, broken):
            rule = f"has no effect without {need}"
            problems.append(Problem(key, config.get(key), rule, "remove it, or give that"))
    return problems
