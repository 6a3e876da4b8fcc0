"""report.html: one self-contained page on which a person sees what a run learned. `page` has its sections, `plots` the
curves, `pictures` the gallery, `style.css` how it looks, light and dark, on a phone and on a desk."""

from seer_scale.observe.report.page import headline, write_report

__all__ = ["headline", "write_report"]
