"""What SEER's backbones (arXiv 2103.01988 and 2202.08360) were published to reach, pretrained on a billion images of
Instagram, to stand beside figures of ours.

Linear on ImageNet: VISSL's MODEL_ZOO.md. Fine-tuned on ImageNet, iNaturalist 2018 and Places205: VISSL's
projects/SEER/README.md. Fine-tuned on 1 % and 10 % of ImageNet's labels: arXiv 2103.01988, as Papers with Code has it,
whose images are of the size of VISSL's configuration (benchmark/semi_supervised/imagenet1k).
"""

from __future__ import annotations

from dataclasses import dataclass

from seer_scale.formatting import short_number


@dataclass(frozen=True)
class Published:
    """task, figure, data: what was measured, "linear", "top1", and a word of layouts.LAYOUTS. score: in percent. size:
    of the images in pixels."""

    backbone: str
    parameters: int
    task: str
    score: float
    size: int
    figure: str = "top1"
    data: str = "imagenet"


_LINEAR = {"regnety_32gf": 74.03, "regnety_64gf": 75.25, "regnety_128gf": 75.96, "regnety_256gf": 77.51,
           "regnety_10b": 79.8}  # fmt: skip
_FINETUNED = {
    "imagenet": {"regnety_32gf": 83.4, "regnety_64gf": 84.0, "regnety_128gf": 84.5, "regnety_256gf": 85.2,
                 "regnety_10b": 85.8},
    "inat18": {"regnety_32gf": 79.1, "regnety_64gf": 80.0, "regnety_128gf": 82.6, "regnety_256gf": 83.9,
               "regnety_10b": 84.7},
    "places205": {"regnety_32gf": 67.5, "regnety_64gf": 67.4, "regnety_128gf": 67.5, "regnety_256gf": 67.7,
                  "regnety_10b": 69.0},
}  # fmt: skip
_LOWSHOT = {"1%": {"regnety_128gf": 57.5, "regnety_256gf": 60.5}, "10%": {"regnety_128gf": 76.7, "regnety_256gf": 77.9}}
PARAMETERS = {"regnety_32gf": 141_333_770, "regnety_64gf": 276_457_786, "regnety_128gf": 637_419_894,
              "regnety_256gf": 1_272_156_138, "regnety_10b": 9_323_934_872}  # fmt: skip
"""Of the trunk."""
TABLE = [Published(name, PARAMETERS[name], "linear", score, 224) for name, score in _LINEAR.items()]
for _data, _scores in _FINETUNED.items():
    TABLE += [Published(name, PARAMETERS[name], "finetune", score, 384, data=_data) for name, score in _scores.items()]
for _shot, _scores in _LOWSHOT.items():
    _figure = f"{_shot}_finetuned_top1"
    TABLE += [Published(name, PARAMETERS[name], "lowshot", score, 224, _figure) for name, score in _scores.items()]


NAMES = {"imagenet": "ImageNet", "inat18": "iNaturalist 2018", "places205": "Places205"}


def published(task: str, figure: str, data: str, backbone: str) -> Published | None:
    """What may stand beside a figure of ours. data: the word of a named data set, whose own figures alone may; "" where
    the images are the user's, beside which those of any do. Of this backbone; of one that SEER has not, that of its
    smallest."""
    rows = [p for p in TABLE if (p.task, p.figure) == (task, figure) and data in ("", p.data)]
    return next((p for p in rows if p.backbone == backbone), rows[0] if rows else None)


def difference(row: Published, backbone: str, parameters: int, samples_seen: int | None, data: str, size: int) -> str:
    """What tells a figure of ours from a published one, in a sentence."""
    seen = "an unknown number of" if samples_seen is None else f"{samples_seen:,}"
    ours = f"{backbone} ({short_number(parameters)}) after {seen} samples, {size} px, on {data}"
    theirs = f"{row.backbone} ({short_number(row.parameters)}) after 1B images of Instagram, {row.size} px"
    return f"Ours: {ours}; SEER: {theirs}, on {NAMES[row.data]}."
