"""A backbone leaves the house: `export_backbone`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from seer_scale.errors import NOTHING, Problem, UserError, nearest
from seer_scale.files import published, shown, to_json
from seer_scale.formatting import file_size
from seer_scale.interop import onnx_graph
from seer_scale.interop.artefact import HEAD_KEY, ONNX_FILE, OWN_FORMAT, WEIGHTS, About, TensorInfo, write_artefact
from seer_scale.interop.card import README, card, results_of
from seer_scale.interop.formats import Target, target_of
from seer_scale.interop.load import materialise
from seer_scale.interop.pieces import Piece, same
from seer_scale.interop.weights import Weights, open_weights

EXPORT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_SHARD_SIZE = "5GB"
SHARDS = "model*.safetensors*"
EXPORTED_NAMES = (README, "config.json", "preprocessor_config.json", ONNX_FILE, f"{ONNX_FILE}.data")
"""What may lie in a folder that --force replaces, beside SHARDS."""
LONE_FILES = {
    ".onnx": ("onnx",),
    ".safetensors": (OWN_FORMAT, "timm", "torchvision", "transformers", "dinov2", "convnextv2"),
}
"""How the name of a lone file ends, and of which formats it may be."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def export_backbone(
    path: Path,
    out: Path,
    format: str,
    *,
    dtype: str = "fp32",
    which: str = "last",
    license: str = "",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    force: bool = False,
) -> str:
    """Write the backbone of a run, a checkpoint or an artefact as `format` to `out`: a folder with a model card, or a
    lone file where its name ends with .safetensors or .onnx; gives the lines of Python that load it. Plugins that bring
    the backbone are loaded before.

    Of safetensors one tensor is held at a time, and no more of the network; ONNX takes all of it. `out` appears whole,
    by one rename; force: also where an earlier export lies. Raises UserError with nothing written.
    """
    if dtype not in EXPORT_DTYPES:
        raise UserError(Problem("--dtype", dtype, "that is no type of weights", nearest(dtype, EXPORT_DTYPES)))
    max_shard_bytes, is_file = size_in_bytes(max_shard_size), out.suffix in LONE_FILES
    weights = open_weights(path, which)
    try:
        target = target_of(format, weights)
        _check_out(out, format, target, force)
        if format == "onnx":
            _check_onnx(weights, dtype, is_file)
        about = _about(weights, format, dtype, license)
        with published(out, replace=force) as aside:
            if not is_file:
                aside.mkdir()
                for name, content in target.files.items():
                    (aside / name).write_text(to_json(content, indent=1))
                (aside / README).write_text(card(_title(weights), weights, about, target))
            if format == "onnx":
                backbone, _ = materialise(weights)
                for name, tensor in backbone.state_dict().items():
                    _cast(name, tensor, dtype, weights)
                onnx_graph.write_onnx(aside if is_file else aside / ONNX_FILE, backbone, about, EXPORT_DTYPES[dtype])
            else:
                _write_tensors(weights, target, aside, about, dtype, max_shard_bytes)
    except FileExistsError as error:  # meanwhile
        raise UserError(_exists(out)) from error
    except OSError as error:
        raise UserError(Problem("--out", str(out), f"it cannot be written ({error.strerror or error})")) from error
    finally:
        weights.close()
    lone = ONNX_FILE if format == "onnx" else WEIGHTS
    loading = target.loading_alone if is_file and target.loading_alone else target.loading
    return loading.replace("PATH", str(out)).replace("FILE", str(out if is_file else out / lone))


def _title(weights: Weights) -> str:
    """Of a model card: the network, and the run as far as it is known."""
    run = weights.run.resolve().name if weights.run else ""
    return f"{weights.about.model['name']}{f' of {run}' * bool(run)}"


def _about(weights: Weights, format: str, dtype: str, license: str) -> About:
    known = weights.about.origin
    results = results_of(weights.run, known.get("samples_seen")) or known.get("results", [])
    own = {"dtype": dtype, "license": license or known.get("license", ""), "results": results}
    kept = {key: value for key, value in known.items() if key != HEAD_KEY or format == OWN_FORMAT}
    return replace(weights.about, format=format, origin={**kept, **own})


def _write_tensors(weights: Weights, target: Target, out: Path, about: About, dtype: str, max_shard_bytes: int) -> None:
    made = target.made or {target.names(name): Piece((name,), same) for name in weights.backbone.state_dict()}
    stored = weights.tensors
    if about.format == OWN_FORMAT:  # other libraries have no place for a head of ours
        made |= {name: Piece((name,), same) for name in weights.others}
        stored = stored | weights.others
    tables: Mapping[str, Tensor] = {}  # that a constructor computes, and no checkpoint holds
    if any(name not in stored for piece in made.values() for name in piece.sources):
        tables = materialise(weights)[0].state_dict()

    def read(theirs: str) -> Tensor:
        sources, make = made[theirs]
        of_ours = (weights.read(name) if name in stored else tables[name] for name in sources)
        return _cast(" and ".join(sources), make(*of_ours), dtype, weights)

    infos = {}
    for theirs, (sources, make) in made.items():
        held = [stored.get(name) or TensorInfo(tables[name].dtype, tables[name].shape) for name in sources]
        shape = make(*(torch.empty(info.shape, device="meta") for info in held)).shape
        infos[theirs] = TensorInfo(EXPORT_DTYPES[dtype] if held[0].dtype.is_floating_point else held[0].dtype, shape)
    write_artefact(out, about, infos, read, max_shard_bytes=max_shard_bytes if target.in_shards else 0)


def _cast(name: str, tensor: Tensor, dtype: str, weights: Weights) -> Tensor:
    """Raises UserError where a value is not finite, or beyond what `dtype` can hold."""
    if not tensor.is_floating_point():
        return tensor
    if not tensor.isfinite().all():
        rule = f"has values that are not finite in {name}"
        raise UserError(Problem(str(weights.place), NOTHING, rule, "choose an earlier checkpoint"))
    cast = tensor.to(EXPORT_DTYPES[dtype])
    if not cast.isfinite().all():
        rule = f"{name} of {weights.place} has a value of {tensor.abs().max().item():.3g}, beyond its range"
        raise UserError(Problem("--dtype", dtype, rule, ("bf16", "fp32")))
    return cast


def _check_out(out: Path, format: str, target: Target, force: bool) -> None:
    """That `out` may be written, and by this format. Raises UserError."""
    if out.suffix in LONE_FILES and format not in LONE_FILES[out.suffix]:
        rule = f"a file of the format {format} does not end with {out.suffix}"
        raise UserError(Problem("--out", str(out), rule, "give a folder"))
    if out.suffix in LONE_FILES and target.needs_folder:
        raise UserError(Problem("--out", str(out), f"{format} reads a folder", str(out.with_suffix(""))))
    check_replaceable(out, force)


def check_replaceable(out: Path, force: bool, only: str = "--force replaces exports only") -> None:
    """That there is nothing at `out`, or, with `force`, an artefact (an export, an import, a network that was trained)
    and nothing else; the problem says `only`. Raises UserError."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    if not force:
        raise UserError(_exists(out))
    if out.is_dir():
        weights = [p.name for p in out.iterdir() if p.name == ONNX_FILE or fnmatch(p.name, SHARDS)]
        others = [p.name for p in out.iterdir() if p.name not in (*weights, *(EXPORTED_NAMES if weights else ()))]
    else:
        others = [] if out.suffix in LONE_FILES else [out.name]
    if others or out.is_symlink():
        rule = f"{only}, and {shown(others[0]) if others else 'a link'} is none"
        raise UserError(Problem("--out", str(out), rule, "choose another"))


def _exists(out: Path) -> Problem:
    return Problem("--out", str(out), "it exists already", "choose another, or give --force")


def _check_onnx(weights: Weights, dtype: str, is_file: bool) -> None:
    """Raises UserError."""
    onnx_graph.check_installed()
    if dtype == "bf16":
        raise UserError(Problem("--dtype", dtype, "onnxruntime has no convolution of it", ("fp32", "fp16")))
    nbytes = sum(i.shape.numel() * EXPORT_DTYPES[dtype].itemsize for i in weights.tensors.values())
    if is_file and nbytes > onnx_graph.MAX_INLINE_BYTES:
        rule = f"the graph's {file_size(nbytes)} of weights lie in a file beside it"
        raise UserError(Problem("--out", NOTHING, f": {rule}", "give a folder"))


def size_in_bytes(size: int | str) -> int:
    """Of "5GB", or a number of bytes. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", str(size).strip().upper())
    unit = f"{match[2].rstrip('B')}B" if match and match[2].rstrip("B") else ""
    if not match or not (nbytes := int(float(match[1]) * _UNITS[unit])):
        raise UserError(Problem("--max-shard-size", size, "that is no size", "5GB"))
    return nbytes
