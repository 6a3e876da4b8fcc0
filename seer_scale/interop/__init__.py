"""Weights for other libraries, and from them (`seer_scale.export` is the function of the Python face)."""
