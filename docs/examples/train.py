"""Train a backbone on your own images from Python, then go on where the run stopped.

    seer-scale data demo corpus                # or take a folder of yours
    python docs/examples/train.py corpus/train --samples 20000
    python docs/examples/train.py corpus/train --samples 40000    # goes on from 20,000

Ctrl-C saves and stops; the same command goes on.
"""

import argparse

import seer_scale

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", help="a folder, a list of paths, tars: whatever data.path takes")
parser.add_argument("--samples", type=int, default=20_000, help="images to see in all")
parser.add_argument("--recipe", default="photos_laptop", help="a shipped recipe's name, or a YAML file")
parser.add_argument("--run-dir", default="runs/first", help="the run's folder")
args = parser.parse_args()

try:
    run = seer_scale.train(args.recipe, args.images, run_dir=args.run_dir, train={"total_samples": args.samples})
except seer_scale.UserError as error:  # names each key that is wrong, its value, the rule and the nearest fix
    parser.exit(2, f"{error}\n")

print(f"{run.path}: {run.samples_seen:,} images seen, complete: {run.is_complete}")
for row in run.metrics():
    if "knn/top1" in row:  # measured where the images have labels
        print(f"after {row['samples_seen']:,}: kNN top-1 {row['knn/top1']:.1f} %")
print(f"Report: {run.report()}")
