"""Files that a plan writes: anew, and whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from seer_scale.errors import NOTHING, Problem, UserError, missing_path
from seer_scale.files import published


def free_place(name: str, endings: Sequence[str] = ()) -> Path:
    """Raises UserError where no file can be made anew. endings: one of which its name must have; (): any will do."""
    path = Path(name)
    if endings and path.suffix.lower() not in endings:
        rule = "is no name of a picture"
        raise UserError(Problem(name, NOTHING, rule, f"it must end in {', '.join(endings[:-1])} or {endings[-1]}"))
    if not path.parent.is_dir():
        raise UserError(missing_path(path.parent))
    if path.exists() or path.is_symlink():
        raise UserError(_taken(path))
    return path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Where to write what stands at `path` once the body has ended well. Raises UserError, also where something stands
    there by then."""
    try:
        free_place(str(path))
        with published(path) as aside:
            yield aside
    except FileExistsError:
        raise UserError(_taken(path)) from None
    except OSError as error:
        raise UserError(Problem(str(path), NOTHING, f"cannot be written ({error.strerror or error})")) from None


def _taken(path: Path) -> Problem:
    return Problem(str(path), NOTHING, "is there already", "give another name, or remove it")
