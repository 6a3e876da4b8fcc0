"""Backbones for other libraries, and from them."""
