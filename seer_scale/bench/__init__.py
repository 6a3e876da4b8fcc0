"""Measurements that print what they compare: `seer-scale bench NAME`."""

BENCHES = {
    "step": ("bench.step", "an update against a plain loop"),
    "plan": ("bench.plan", "what is planned of an update against what it takes"),
    "data": ("bench.data", "images/s that a core makes of your files"),
    "engines": ("bench.engines", "every engine against ddp, in speed and memory"),
    "checkpoint": ("bench.checkpoint", "how long training waits for a checkpoint"),
    "load": ("bench.load", "what loading a backbone reads of a checkpoint of many ranks"),
    "lars": ("bench.lars", "LARS on sharded parameters"),
    "sinkhorn": ("bench.sinkhorn", "Sinkhorn against a lower bound from its memory traffic"),
    "fcmae": ("bench.fcmae", "visible tiles alone against the whole image, masked and unmasked"),
    "eval": ("bench.eval", "a sweep of linear classifiers against a single one"),
    "embed": ("bench.embed", "images/s that embed makes, against the bare forward"),
    "learn": ("bench.learn", "what is learned in equal updates and equal time, against lightly"),
}
"""By name: the module, and what it measures."""
