#!/usr/bin/env python
"""Start a recipe on several processes: python tools/launch.py RECIPE --cluster local [--ranks N] [--key value ...]"""

from __future__ import annotations

import sys

from seer_scale.errors import UserError, complain, nearest

CLUSTERS = ("local",)
HELP = f"""{__doc__}

  RECIPE           a shipped recipe's name or a YAML file
  --cluster local  processes on this machine, by submitit's local executor
  --ranks N        number of processes (default: the recipe's parallel.ranks)
  --key value      any key of the recipe (seer-scale train --help shows them)

Ctrl-C saves and stops; the same command goes on. Exit status: 0 done, 1 failed, 2 bad input, 75 stopped and saved.
"""


def main(words: list[str]) -> int:
    if not words or "-h" in words or "--help" in words:
        print(HELP)
        return 0
    try:
        recipe, own, overrides = _split(words)
        cluster = own.get("--cluster")
        if cluster is None:
            raise UserError(f"--cluster is missing: say where to start, as in --cluster {CLUSTERS[0]}.")
        if cluster not in CLUSTERS:
            raise UserError(f"--cluster is {cluster!r}, but must be one of {', '.join(CLUSTERS)}; {nearest(cluster, CLUSTERS)}")
        ranks = own.get("--ranks")
        if ranks is not None and not (ranks.isdecimal() and int(ranks)):
            raise UserError(f"--ranks is {ranks!r}, but must be a whole number of processes, such as 2.")
        from seer_scale.launch.local import launch

        return launch(recipe, overrides, int(ranks) if ranks else None)
    except UserError as error:
        return complain(error)


def _split(words: list[str]) -> tuple[str, dict[str, str], list[str]]:
    """The recipe, the launcher's own options, and the recipe's overrides."""
    own, rest, words = {}, [], list(words)
    while words:
        name, given, value = words.pop(0).partition("=")
        if name in ("--cluster", "--ranks"):
            if not given and not words:
                raise UserError(f"{name} has no value; write {name} VALUE.")
            own[name] = value if given else words.pop(0)
        elif name.startswith("--") and "." not in name:
            raise UserError(f"{name} is no option of the launcher, and keys of a recipe have a dot, as in --train.samples; {nearest(name, ('--cluster', '--ranks'))}")
        else:
            rest.append(name + given + value)
    if not rest or rest[0].startswith("--"):
        raise UserError("The recipe comes first: python tools/launch.py RECIPE --cluster local.")
    return rest[0], own, rest[1:]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
