"""Look at what a recipe's augmentations make of an image, before training with them.

    python docs/examples/look_at_views.py corpus/train --to views.png
    python docs/examples/look_at_views.py corpus/train --jitter 0.8    # stronger colours

The crops are exactly those that training would see: a function of run.seed, the epoch and the image's number.
"""

import argparse

from PIL import Image

import seer_scale
from seer_scale.data.sources import open_source

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", help="whatever data.path takes")
parser.add_argument("--number", type=int, default=0, help="which of the images")
parser.add_argument("--epochs", type=int, default=4, help="of how many epochs")
parser.add_argument("--jitter", type=float, help="strength in brightness, contrast and saturation; else the recipe's")
parser.add_argument("--recipe", default="photos_laptop", help="a shipped recipe's name, or a YAML file")
parser.add_argument("--to", default="views.png", help="the picture to write: a row for each epoch")
args = parser.parse_args()

image = open_source(args.images).read(args.number)  # the file's bytes; a path would do, too
changes = {} if args.jitter is None else {"views.jitter": [args.jitter] * 3 + [args.jitter / 4]}
sheets = [
    seer_scale.views(args.recipe, image, epoch=epoch, index=args.number, **changes).sheet()
    for epoch in range(args.epochs)
]
page = Image.new("RGB", (sheets[0].width, sum(sheet.height + 4 for sheet in sheets)), "white")
for row, sheet in enumerate(sheets):
    page.paste(sheet, (0, row * (sheet.height + 4)))
page.save(args.to)
print(f"{args.to}: {args.epochs} epochs of image {args.number}")
