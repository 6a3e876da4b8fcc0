"""How well a trained backbone's features tell labelled classes apart: a logistic regression on them, by torch alone.

python docs/examples/logistic_regression.py runs/first corpus/train corpus/test
"""

import argparse

import torch
from torch.nn.functional import cross_entropy

import seer_scale

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", help="a run's folder, or a checkpoint's")
parser.add_argument("train", help="labelled images to fit on: a folder for each class, or whatever data.path takes")
parser.add_argument("test", help="labelled images to measure on, of the same classes")
parser.add_argument("--weight-decay", type=float, default=1e-3)
args = parser.parse_args()

model = seer_scale.load(args.run)
fit, test = (seer_scale.embed(model, images) for images in (args.train, args.test))
if fit.classes != test.classes or min(fit.labels.min(), test.labels.min()) < 0:
    parser.error("both need labels, of the same classes")

mean, std = fit.features.mean(0), fit.features.std(0) + 1e-6
x, y = (fit.features - mean) / std, fit.labels
weight = torch.zeros(x.shape[1], len(fit.classes), requires_grad=True)
bias = torch.zeros(len(fit.classes), requires_grad=True)
optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")


def loss() -> torch.Tensor:
    optimizer.zero_grad()
    value = cross_entropy(x @ weight + bias, y) + args.weight_decay * weight.square().sum()
    value.backward()
    return value


optimizer.step(loss)
with torch.no_grad():
    right = ((test.features - mean) / std @ weight + bias).argmax(1) == test.labels
top1, error = 100 * right.float().mean(), 100 * right.float().std() / len(right) ** 0.5
commonest = 100 * test.labels.bincount().max() / len(test.labels)
print(f"top-1 {top1:.1f} ± {error:.1f} % of {len(right):,} images; always the commonest class: {commonest:.1f} %")
