"""Compare two or more runs in a picture of your own: one metric's curves, and the last figures in a line a run. The
page of all their metrics is `seer-scale compare runs/first runs/second`, here `seer_scale.compare([...])`.

python docs/examples/compare_runs.py runs/first runs/second --to curves.png
python docs/examples/compare_runs.py runs/first runs/second --metric knn/top1
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files, needs no screen
from matplotlib import pyplot as plt  # noqa: E402

import seer_scale  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("runs", nargs="+", type=Path, help="runs' folders")
parser.add_argument("--metric", default="loss", help="a name in metrics.jsonl, as loss, lr or knn/top1")
parser.add_argument("--to", default="curves.png", help="the picture to write")
args = parser.parse_args()

figure, axes = plt.subplots(figsize=(7, 4))
for path in args.runs:
    run = seer_scale.Run(path)
    rows = [row for row in run.metrics() if row.get(args.metric) is not None]
    if not rows:
        names = sorted({name for row in run.metrics() for name in row})
        parser.error(f"{path} has no {args.metric}; it has {', '.join(names) or 'no metrics'}")
    samples, values = zip(*((row["samples_seen"], row[args.metric]) for row in rows), strict=True)
    axes.plot(samples, values, label=str(path))
    recipe = run.config
    print(
        f"{path}: {args.metric} {values[-1]:.4g} after {samples[-1]:,} images "
        f"({recipe.model.name}, {recipe.optim.name}, peak learning rate {recipe.peak_lr:g})"
    )
axes.set(xlabel="images seen", ylabel=args.metric)
axes.legend()
figure.tight_layout()
figure.savefig(args.to)
print(args.to)
