"""The command line: `seer-scale COMMAND`. Thin: each command is one call into the house."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from seer_scale.config import all_keys, recipe_names
from seer_scale.errors import EXIT_DONE, EXIT_FAILED, UserError, complain, nearest

USAGE = """seer-scale: self-supervised pretraining of large convnets, from a laptop to 512 GPUs.

  seer-scale train RECIPE --data.path DIR [--key value ...]   train, or go on where the run stopped (--help: every key)
  seer-scale eval knn RUN [--key value ...]                   kNN accuracy of a run's newest checkpoint
  seer-scale inspect CHECKPOINT [--verify]                    what is in it, who wrote it, whether it is whole
  seer-scale inspect RUN                                      where its time went: goodput, starts, what was lost
  seer-scale plan --failures                                  goodput at a rate of failures, and the best checkpoint interval
  seer-scale report RUN                                       write RUN/report.html anew
  seer-scale recipes                                          the shipped recipes
  seer-scale data inspect PATH                                counts, sizes, formats, what cannot be read, a contact sheet
  seer-scale data pack SRC DST                                balanced tars with an index, from any images
  seer-scale data refresh RUN --manifest FILE                 other images for a run, from its next metric line on
  seer-scale data demo DIR                                    write the demo's corpus of textures
  seer-scale bench step | data | engines | checkpoint | lars | sinkhorn
                                                              speed and memory, each against a reference in the same run

Several processes on this machine: python tools/launch.py RECIPE --cluster local [--ranks N] [--key value ...]
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 failed, 2 bad input, 75 stopped with its state saved)."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": train, "eval": evaluate, "inspect": inspect, "plan": plan, "report": report, "recipes": recipes, "data": data, "bench": bench}
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return EXIT_DONE
    try:
        if words[0] not in commands:
            raise UserError(f"{words[0]!r} is not a command; {nearest(words[0], commands)}")
        parts = {"data": DATA, "bench": BENCHES}.get(words[0], ())
        has_own_help = words[0] in ("train", "inspect", "plan") or words[1:] and words[1] in parts
        if _asks_help(words) and not has_own_help:
            print(USAGE)
            return EXIT_DONE
        status = commands[words[0]](words[1:])
        sys.stdout.flush()
        return status
    except UserError as error:
        return complain(error)
    except BrokenPipeError:
        if words[0] in ("train", "eval") and not _asks_help(words):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # | head has read enough; exit flushes once more
        return EXIT_DONE
    except KeyboardInterrupt:
        lost = ": what was done since the newest checkpoint is lost" if words[0] == "train" else ""
        print(f"Stopped at once{lost}.", file=sys.stderr, flush=True)
        return EXIT_FAILED


def _asks_help(words: list[str]) -> bool:
    return "-h" in words or "--help" in words


class _Parser(argparse.ArgumentParser):
    """Options in full, and a mistake as one sentence."""

    def __init__(self, **how: Any):
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help explains each.")


def _no_more(words: list[str], usage: str) -> None:
    if words:
        raise UserError(f"{words[0]!r} is not expected here: the command is {usage}.")


# ------------------------------------------------------------------------------------------------ train


def train(words: list[str]) -> int:
    if _asks_help(words):
        print(help_of_train())
        return EXIT_DONE
    if not words or words[0].startswith("--"):
        raise UserError(f"train needs a recipe first: a YAML file or one of {', '.join(recipe_names())}.")
    from seer_scale.train.start import run_training

    return run_training(words[0], words[1:])


def help_of_train() -> str:
    lines = ["seer-scale train RECIPE [--key value ...]", "", f"RECIPE: a YAML file or one of {', '.join(recipe_names())}.", ""]
    lines += ["Precedence: defaults < recipe < command line. Lists are written [1, 2]. Keys, types, defaults:", ""]
    for key, kind, default, meaning in all_keys():
        shown = json.dumps(default, default=lambda o: o.__dict__) if default is not None else "none"
        lines += [f"  --{key} {kind}", f"      {meaning} (default {shown})"]
    return "\n".join(lines)


def recipes(words: list[str]) -> int:
    from seer_scale.config import RECIPES

    _no_more([w for w in words if w != "--json"], "seer-scale recipes [--json]")
    described = {}
    for name in recipe_names():
        described[name] = [x[1:].strip() for x in (RECIPES / f"{name}.yaml").read_text().splitlines() if x.startswith("#")]
    if "--json" in words:
        print(json.dumps({name: " ".join(lines) for name, lines in described.items()}, indent=1))
    else:
        print("\n\n".join("\n  ".join([name, *lines]) for name, lines in described.items()))
    return EXIT_DONE


# ------------------------------------------------------------------------------------------------ eval, report


def evaluate(words: list[str]) -> int:
    as_json, words = "--json" in words, [w for w in words if w != "--json"]
    if len(words) < 2 or words[0] != "knn":
        raise UserError("Say what to evaluate and which run: seer-scale eval knn RUN.")
    from seer_scale import world as worlds
    from seer_scale.evaluate.run import knn_of_run

    world = worlds.start(Path(words[1]) / "logs")
    scores = knn_of_run(Path(words[1]), words[2:], world)
    worlds.stop(world)
    if world.is_main:
        text = f"kNN top-1 {scores['knn/top1']:.1f} %, top-5 {scores['knn/top5']:.1f} % after {scores['samples_seen']:,} samples ({scores['checkpoint']})"
        print(json.dumps(scores) if as_json else text)
    return EXIT_DONE


def inspect(words: list[str]) -> int:
    from seer_scale.checkpoint import inspect as checkpoints
    from seer_scale.observe import ledger
    from seer_scale.observe.sinks import plain

    description = "Of a checkpoint: what is in it, who wrote it, whether it is whole; no tensor is read for that. Of a run: where its time went."
    parser = _Parser(prog="seer-scale inspect", description=description)
    parser.add_argument("path", type=Path, help="a checkpoint, such as runs/demo/checkpoints/samples-000000012800, or a run's folder")
    parser.add_argument("--verify", action="store_true", help="of a checkpoint: read all its files, and compare their checksums")
    parser.add_argument("--tensors", type=int, default=0, metavar="N", help="of a checkpoint: also list the N largest tensors")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args(words)
    if (args.path / "metrics.jsonl").is_file():
        if args.verify or args.tensors:
            raise UserError(f"{args.path} is a run, and --verify and --tensors are for checkpoints, such as those in {args.path / 'checkpoints'}.")
        found = ledger.read_ledger(args.path)
        print(json.dumps(plain(found.to_dict()), indent=1) if args.json else ledger.text(found))
        return EXIT_DONE
    if not args.path.exists():
        below = f"did you mean {Path('runs') / args.path}?" if (Path("runs") / args.path).is_dir() else "give a run's folder or one of its checkpoints."
        raise UserError(f"There is no {args.path}: {below}")
    if (args.path / "launch").is_dir() or (args.path / "config.yaml").is_file():
        print("Nothing was logged yet.")
        return EXIT_DONE
    found = checkpoints.describe(args.path, verify=args.verify)
    print(json.dumps(plain(found), indent=1) if args.json else checkpoints.text(found, tensors=args.tensors))
    return EXIT_FAILED if found["flaw"] else EXIT_DONE


def plan(words: list[str]) -> int:
    if "--failures" not in words and not _asks_help(words):
        raise UserError("Say what to plan: seer-scale plan --failures.")
    from seer_scale.plan import failures

    parser = _Parser(prog="seer-scale plan --failures", description=failures.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    failures.add_arguments(parser)
    print(failures.run(parser.parse_args([w for w in words if w != "--failures"])))
    return EXIT_DONE


def report(words: list[str]) -> int:
    from seer_scale.observe.report import write_report

    if not words or not Path(words[0]).is_dir():
        raise UserError(f"{words[0] if words else 'report'} is not a run's folder: give one, such as runs/demo.")
    _no_more(words[1:], "seer-scale report RUN")
    if not any((Path(words[0]) / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(
            f"{words[0]} is not a run's folder (it has neither config.yaml nor metrics.jsonl): "
            "give one, such as runs/demo."
        )
    print(write_report(Path(words[0])))
    return EXIT_DONE


# ------------------------------------------------------------------------------------------------ data, bench


DATA = ("inspect", "pack", "refresh", "demo")
HELP_OF_DATA = {
    "refresh": """seer-scale data refresh RUN --manifest FILE

Gives a run other images: those of the manifest FILE (docs/data.md explains it), which is copied into the run's folder. A run
that is under way takes it up at its next metric line, any other at its next start; the epoch goes on with what is left of the
parts that stay and with the new ones in proportion, and no image comes twice in it.""",
    "demo": """seer-scale data demo DIR

Writes the demo's corpus into the folder DIR: 5,000 small JPEGs of ten textures, a folder a texture, the same wherever it is
written.""",
}


def data(words: list[str]) -> int:
    if not words or words[0] not in DATA:
        hint = nearest(words[0], DATA) if words else f"one of {', '.join(DATA)}."
        raise UserError(f"Say what to do, as in seer-scale data inspect PATH; {hint}")
    if words[0] in ("inspect", "pack"):
        return _run_module("data", words)
    if _asks_help(words):
        print(HELP_OF_DATA[words[0]])
        return EXIT_DONE
    if words[0] == "refresh":
        return refresh(words[1:])
    if len(words) < 2 or words[1].startswith("-"):
        raise UserError("Say where to: seer-scale data demo DIR writes the demo's corpus.")
    _no_more(words[2:], "seer-scale data demo DIR")
    from seer_scale.data.demo import write_demo_corpus

    write_demo_corpus(Path(words[1]))
    print(f"The demo corpus is in {words[1]}.")
    return EXIT_DONE


def refresh(words: list[str]) -> int:
    from seer_scale import world as worlds
    from seer_scale.checkpoint import store
    from seer_scale.train.course import ask_refresh

    if len(words) != 3 or words[1] != "--manifest":
        raise UserError("The command is seer-scale data refresh RUN --manifest FILE.")
    run_dir = Path(words[0])
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not a run's folder (it has no config.yaml): give one, such as runs/demo.")
    found = store.newest(run_dir / "checkpoints", worlds.World(), warn=lambda sentence: print(sentence, file=sys.stderr))
    print(ask_refresh(run_dir, words[2], store.read_meta(found)["data"] if found else None))
    return EXIT_DONE


BENCHES = ("step", "data", "engines", "checkpoint", "lars", "sinkhorn")


def bench(words: list[str]) -> int:
    if not words or words[0] not in BENCHES:
        hint = nearest(words[0], BENCHES) if words else f"one of {', '.join(BENCHES)}."
        raise UserError(f"Say what to measure, as in seer-scale bench step; {hint}")
    return _run_module("bench", words)


def _run_module(room: str, words: list[str]) -> int:
    """A command that is a module of a room, whose description is its help."""
    module = importlib.import_module(f"seer_scale.{room}.{words[0]}")
    parser = _Parser(prog=f"seer-scale {room} {words[0]}", description=module.__doc__)
    module.add_arguments(parser)
    print(module.run(parser.parse_args(words[1:])))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
