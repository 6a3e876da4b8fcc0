"""What this package needs and may use beside it, as its metadata pins it: the one place that tells how to install
something."""

from __future__ import annotations

import re
import shlex
from importlib import metadata

DISTRIBUTION = "seer-scale"


def how_to_install(package: str) -> str:
    """The command that installs what the module `package` belongs to, in a version that was tested."""
    name = package.partition(".")[0].replace("_", "-").lower()
    return f"pip install {shlex.quote(requirements().get(name, name))}"


def requirements() -> dict[str, str]:
    """Name to requirement, such as 'deepspeed' to 'deepspeed<0.20,>=0.19', with those of all extras; none where this
    package is not installed but only found on the path."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    pinned = {}
    for line in lines:
        requirement = line.partition(";")[0].strip()
        name = re.match(r"[\w.-]+", requirement)
        if name and "[" not in requirement:
            pinned[name[0].replace("_", "-").lower()] = requirement
    return pinned
