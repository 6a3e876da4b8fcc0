"""Train on several processes: each calls `train` alike and takes its share of every batch.

    torchrun --nproc-per-node 2 docs/examples/two_processes.py corpus/train

The next start may use another number of processes, or another engine: the run goes on. `seer-scale launch RECIPE
--cluster local --ranks 2` does the same without torchrun, and starts ranks again that were lost.
"""

import argparse
import os

import seer_scale

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", help="whatever data.path takes")
parser.add_argument("--samples", type=int, default=20_000, help="images to see in all, over all processes")
parser.add_argument("--engine", default="auto", help="auto, ddp, fsdp, zero1, zero2, zero3 or fairscale")
parser.add_argument("--recipe", default="photos_laptop", help="a shipped recipe's name, or a YAML file")
parser.add_argument("--run-dir", default="runs/two", help="the run's folder, which all processes see")
args = parser.parse_args()

run = seer_scale.train(
    args.recipe,
    args.images,
    run_dir=args.run_dir,
    train={"total_samples": args.samples},
    parallel={"engine": args.engine},
)
if os.environ.get("RANK", "0") == "0":
    start = [event for event in run.events() if event["event"] in ("start", "resume")][-1]
    print(f"{run.path}: {run.samples_seen:,} images seen on {start['ranks']} ranks")
