"""A sweep over sizes, or over numbers of images: its points are trained, evaluated and held against a straight line."""
