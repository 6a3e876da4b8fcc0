"""A backbone as an ONNX graph: images [N, 3, S, S] to features [N, num_features], for any N."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from seer_scale.errors import Problem, UserError
from seer_scale.extras import how_to_install
from seer_scale.files import to_json
from seer_scale.interop.artefact import ABOUT, About
from seer_scale.models.backbone import Backbone


def check_installed() -> None:
    """Raises UserError."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        rule = f"it needs {error.name}, which is not installed"
        raise UserError(Problem("--format", "onnx", rule, how_to_install(error.name or "onnx"))) from error


def write_onnx(path: Path, backbone: Backbone, about: About, dtype: torch.dtype) -> None:
    """The graph at `path`; weights of more than 1 GB in a file NAME.data beside it. Its metadata say how images are
    prepared, and have `about`. Raises UserError where the network has no such graph."""
    size = int(about.preprocessing["size"])
    backbone = backbone.to(dtype)
    images = torch.zeros(2, 3, size, size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it will do otherwise some day
        try:
            program = torch.onnx.export(
                backbone,
                (images,),
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            first = str(error).strip().splitlines()[0]
            rule = f"torch cannot make a graph of {about.model['name']} ({first})"
            raise UserError(Problem("--format", "onnx", rule, "another format")) from error
    assert program is not None
    batch = (program.model.graph.inputs[0].shape or [0])[0]
    if isinstance(batch, int):
        rule = f"torch makes a graph of {about.model['name']} that takes {batch} images at once, no more or less"
        raise UserError(Problem("--format", "onnx", rule, "another format"))
    properties = {"preprocessing": to_json(about.preprocessing), ABOUT: about.to_json()}
    program.model.metadata_props.update(properties)
    nbytes = sum(t.nbytes for t in backbone.state_dict().values())
    program.save(path, external_data=nbytes > MAX_INLINE_BYTES)


MAX_INLINE_BYTES = 1 << 30
"""A graph holds 2 GiB at most."""
