"""Features of a folder, and which images a trained backbone finds alike.

python docs/examples/nearest_neighbours.py runs/first corpus/test --to features.npz
"""

import argparse

import numpy as np
from torch.nn.functional import normalize

import seer_scale

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", help="a run's folder, or a checkpoint's")
parser.add_argument("images", help="whatever data.path takes")
parser.add_argument("--queries", type=int, default=5, help="images to name the neighbours of, spread over all")
parser.add_argument("--neighbours", type=int, default=3, help="of each")
parser.add_argument("--to", default="features.npz", help="where features, names and labels are written")
args = parser.parse_args()

model = seer_scale.load(args.run)
found = seer_scale.embed(model, args.images)
np.savez(args.to, features=found.features.numpy(), names=found.names, labels=found.labels.numpy())
print(f"{args.to}: {len(found.names):,} images, {model.num_features} features each")

features = normalize(found.features, dim=1)
similarity = features @ features.T  # cosine; of very many images take a part of the rows at a time
similarity.fill_diagonal_(-1)  # an image is no neighbour of itself
for query in range(0, len(features), -(-len(features) // args.queries)):
    best = similarity[query].topk(min(args.neighbours, len(features) - 1))
    print(found.names[query])
    for cosine, other in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"    {cosine:.3f}  {found.names[other]}")
