"""seer_scale: self-supervised pretraining of large convnets, from a laptop to 512 GPUs, with one recipe and one
checkpoint format."""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and any(w.partition(".")[0] == __name__ for w in sys.orig_argv):
    # python -m seer_scale: the current folder, which Python puts first, goes last, as a random.py in it is not the one
    # meant
    sys.path.append(sys.path.pop(0))
