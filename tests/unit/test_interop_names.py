"""Names of RegNetY in other libraries: theirs, all of them, and back again."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision.models
from torchvision.models import regnet as torchvision_regnet
from transformers import RegNetConfig, RegNetModel

from seer_scale.interop.names import NAME_MAPS, TIMM_MODELS, TORCHVISION_MODELS
from seer_scale.models.registry import build_backbone
from seer_scale.models.regnet import REGNETY, stage_plan

SHAPES = dict[str, torch.Size]


def shapes(module: torch.nn.Module) -> SHAPES:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def on_meta(name: str) -> SHAPES:
    with torch.device("meta"):
        return shapes(build_backbone(name))


def of_timm(name: str) -> SHAPES:
    with torch.device("meta"):
        return shapes(timm.create_model(name, num_classes=0))


def of_torchvision(name: str) -> SHAPES:
    """Its widths are computed by tensors, which must be real."""
    real, network = torchvision_regnet.RegNet, None

    def build(*given, **more):
        with torch.device("meta"):
            return real(*given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision_regnet, "RegNet", build)
        network = getattr(torchvision.models, name)()
    return {name: shape for name, shape in shapes(network).items() if not name.startswith("fc.")}


def of_transformers(name: str) -> SHAPES:
    widths, depths = stage_plan(REGNETY[name])
    config = RegNetConfig(hidden_sizes=widths, depths=depths, groups_width=REGNETY[name].group_width)
    with torch.device("meta"):
        return shapes(RegNetModel(config))


def cases():
    for name in REGNETY:
        if name in TIMM_MODELS:
            yield pytest.param("timm", name, lambda n: of_timm(TIMM_MODELS[n]), id=f"timm-{name}")
        if name in TORCHVISION_MODELS:
            yield pytest.param("torchvision", name, lambda n: of_torchvision(TORCHVISION_MODELS[n]), id=f"tv-{name}")
        yield pytest.param("transformers", name, of_transformers, id=f"transformers-{name}")


@pytest.mark.parametrize("library,name,theirs", cases())
def test_all_names_and_shapes_are_theirs_and_lead_back(library, name, theirs):
    ours, names = on_meta(name), NAME_MAPS[library]
    assert {names.theirs(n): shape for n, shape in ours.items()} == theirs(name)
    assert [names.ours(names.theirs(n)) for n in ours] == list(ours)


def test_every_network_of_theirs_is_known_or_another():
    """torchvision's 800MF and 8GF have other widths; a library's new one is told here."""
    known = {n for n in torchvision.models.list_models() if n.startswith("regnet_y")} - set(TORCHVISION_MODELS.values())
    assert known == {"regnet_y_800mf", "regnet_y_8gf"}
    for name in known:
        ours = on_meta(name.replace("regnet_y", "regnety"))
        assert {NAME_MAPS["torchvision"].theirs(n): s for n, s in ours.items()} != of_torchvision(name)
    theirs = {n for n in timm.list_models("regnety_*") if not n.endswith(("_tv", "_sgn"))}
    assert theirs == set(TIMM_MODELS.values())


@pytest.mark.parametrize("library", NAME_MAPS)
@pytest.mark.parametrize(
    "name", ["fc.weight", "head.fc.bias", "stem.conv", "s1.b1.conv9.conv.weight", "", "stem..weight"]
)
def test_a_name_that_is_none_raises_key_error(library, name):
    for convert in (NAME_MAPS[library].theirs, NAME_MAPS[library].ours):
        with pytest.raises(KeyError):
            convert(name)
