"""report.html: one self-contained page on which a person sees what a run learned. `page` gathers what is shown, `plots`
draws curves, `pictures` reads the gallery; `report.html.j2` has the sections and `style.css` how they look, light and
dark, on a phone and on a desk. `comparison` shows several runs in a page of the same look."""

from seer_scale.observe.report.comparison import write_comparison
from seer_scale.observe.report.page import headline, write_report

__all__ = ["headline", "write_comparison", "write_report"]
