"""Measurements that print what they compare: `seer-scale bench NAME`."""
