"""How the parameters of another library's network start: read off its constructor, played on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.models.init import Init, Played, PlayedStep

FILLED = {"zeros": 0.0, "ones": 1.0, "zeros_like": 0.0, "ones_like": 1.0, "new_zeros": 0.0, "new_ones": 1.0}
DRAWN = {"randn": ("normal_", 0.0, 1.0), "rand": ("uniform_", 0.0, 1.0)}
IN_PLACE_FILLS = ("uniform_", "normal_", "fill_", "zero_")
ELEMENTWISE = ("mul", "add", "sub", "div", "erfinv", "clamp", "neg")


class Constructor(TorchDispatchMode):
    """Writes down what is done to each tensor on the meta device, where nothing is drawn. What is not elementwise, from
    a draw or a number, is not told."""

    def __init__(self) -> None:
        super().__init__()
        self._done: dict[int, tuple[PlayedStep, ...] | None] = {}
        self._kept: list[Any] = []
        self._numbers = _Numbers(self)

    def __enter__(self) -> Constructor:
        self._numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._numbers.__exit__(*problem)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._write(out, func._schema.name.partition("::")[2], args, bool(kwargs))
        return out

    def _write(self, out: Tensor, name: str, args: tuple[Any, ...], has_more: bool) -> None:
        if name in FILLED:
            return self.note(out, ("fill_", None, FILLED[name]))
        if name in ("full", "new_full", "full_like"):
            return self.note(out, ("fill_", None, float(args[-1])))
        if name in DRAWN:
            kind, *range_ = DRAWN[name]
            return self.note(out, (kind, None, *range_))
        if not args or not isinstance(args[0], Tensor):
            return None
        of, *others = args
        numbers: list[float | None] = [
            v for v in others if isinstance(v, (int, float)) or v is None
        ]  # the last may lack
        plain, here, so_far = name.removesuffix("_"), _run(of), self._done.get(_place(of), ())
        known = (None,) if so_far is None else so_far
        if name in IN_PLACE_FILLS and here:
            begun = ("fill_", here, 0.0) if name == "zero_" else (name, here, *numbers)
            is_whole = here[1] - here[0] == of.untyped_storage().nbytes() // of.itemsize
            return self.note(out, *(() if is_whole else known), begun)
        if plain in ELEMENTWISE and len(numbers) == len(others) and not has_more:
            return self.note(out, *known, (f"{plain}_", here if name.endswith("_") else None, *numbers))
        if name in ("clone", "_to_copy"):
            return self.note(out, *known)
        if name.endswith("_") and not name.startswith("_") and name != "detach_":
            return self.note(out, None)
        return None

    def note(self, tensor: Tensor, *steps: PlayedStep | None) -> None:
        """What has made a tensor; None among it: something else."""
        self._kept.append(tensor.untyped_storage())  # or its place might be another's
        known = tuple(step for step in steps if step)
        self._done[_place(tensor)] = known if len(known) == len(steps) else None

    def played(self, parameter: Tensor, whose: str) -> Init:
        """What has made this parameter. Raises UserError where that is not known."""
        if steps := self._done.get(_place(parameter)):
            return Played(steps)
        raise UserError(
            Problem(whose, NOTHING, "starts in a way that cannot be followed here", "choose another network")
        )


class _Numbers(TorchFunctionMode):
    """torch.tensor(0.5), of which a dispatch mode sees no value."""

    def __init__(self, constructor: Constructor):
        super().__init__()
        self._constructor = constructor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.tensor:
            lowest, highest = (float(v) for v in func(args[0], device="cpu", dtype=torch.float64).aminmax())
            self._constructor.note(out, ("fill_", None, lowest) if lowest == highest else None)
        return out


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _run(tensor: Tensor) -> tuple[int, int] | None:
    """The elements of its storage that a tensor is, where they lie in one run."""
    first = int(tensor.storage_offset())
    return (first, first + tensor.numel()) if tensor.is_contiguous() else None
