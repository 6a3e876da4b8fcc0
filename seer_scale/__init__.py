"""seer_scale: self-supervised pretraining of large convnets, from a laptop to 512 GPUs, with one recipe and one checkpoint format."""

__version__ = "0.1.0"
