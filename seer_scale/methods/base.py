"""The protocol in which methods and engines meet: a method knows no sharding, an engine knows no method.

A method is a module of a backbone and what it trains beside it, built on the meta device. It sees tensors and the
world's collectives. What it needs of an engine it declares as data; `methods.registry.build_method` alone knows methods
by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

from torch import Tensor, nn

from seer_scale.config import Config, ImageSize
from seer_scale.errors import Problem
from seer_scale.models.backbone import Backbone
from seer_scale.models.init import Init
from seer_scale.models.layers.stateful import StatefulLayer
from seer_scale.observe.metric_plot import MetricPlot, ReportSection
from seer_scale.optim.parameter_groups import ParameterGroup

InputsT = TypeVar("InputsT")
TargetsT = TypeVar("TargetsT")


class LossOutput(NamedTuple):
    """loss: fp32, 0-dim, the mean over the images of the views given. metrics: what `Method.metrics` reads once it is
    averaged over micro-batches and ranks; empty where none was asked for. features: of one view of each image, which
    the loss needs anyway, [B, Method.feature_width], without a graph; None where the method has none to give."""

    loss: Tensor
    metrics: dict[str, Tensor]
    features: Tensor | None = None


class Features(NamedTuple):
    """features: the backbone's, [N, D]. embeddings: what the method compares images by, of unit length, [N, dim].
    fp32."""

    features: Tensor
    embeddings: Tensor


class PatchFeatures(NamedTuple):
    """patches: the backbone's, [N, P, C], row by row. attention: of a vision transformer, how the CLS token and the
    registers weigh them in its last block, a mean over its heads, [N, 1 + registers, P]; of another network [N, 0, P].
    fp32."""

    patches: Tensor
    attention: Tensor


class Reconstructions(NamedTuple):
    """seen: the images, 0 where the network sees nothing, [N, 3, H, W]. filled: what it makes of the rest pasted into
    them, normalised as they are. errors: of each patch that it does not see the mean square error, as a share of what
    the patch's own mean has; NaN where it sees, [N, h, w]. fp32."""

    seen: Tensor
    filled: Tensor
    errors: Tensor


class Baseline(NamedTuple):
    """The loss of a network that has learned nothing, and what it is called."""

    name: str
    loss: float


class BufferKind(Enum):
    """STATISTICS: running means that a forward moves: averaged over ranks, moved once an update, as they were where it
    is skipped. MEMORY: what a method remembers of past samples and can fill anew. CONSTANT: made at every start by the
    `reset_buffers` of its module, and never saved."""

    STATISTICS = "statistics"
    MEMORY = "memory"
    CONSTANT = "constant"


class UnitSequence(Protocol):
    """A module of units that follow one another, such as a backbone."""

    training: bool

    def shard_units(self) -> dict[str, nn.Module]:
        """Name -> module of what is sharded and recomputed by, in forward order; each takes and gives a list of
        tensors."""

    def stage_units(self) -> list[list[str]]:
        """Names of the units of each stage; what is recomputed together lies within one."""

    def forward_units(self, names: list[str], xs: list[Tensor]) -> list[Tensor]:
        """xs through the units `names`, one after the other."""


class Method(nn.Module, ABC, Generic[InputsT, TargetsT]):
    """One class a method. `views`: for each resolution [num * B, 3, H, W], crop-major, float, normalised.

    Six entry points: `loss`, `prepare_targets`, `encode`, `encode_patches` and `reconstruct` run the network, called
    through `forward`; `targets` runs none. Each rank calls each as often as the others, for the collectives within.
    """

    name: str
    backbone: nn.Module
    """A `UnitSequence` that turns a list of images into a list of features [N_r, num_features]."""

    def forward(self, entrance: str, *args: Any, **kwargs: Any) -> Any:
        """What wrappers of modules know as the only entrance; engines alone call it."""
        return getattr(self, entrance)(*args, **kwargs)

    # --- the step

    @abstractmethod
    def loss(
        self,
        views: list[Tensor],
        *,
        samples_seen: int,
        part: tuple[int, int] = (0, 1),
        targets: TargetsT | None = None,
        with_metrics: bool = False,
    ) -> LossOutput:
        """The loss over micro-batch i of this rank's n, part (i, n), from which the numbers of its images follow
        (`methods.draws`). targets: of these images, where they were made before; else made here."""

    def prepare_targets(self, views: list[Tensor], *, samples_seen: int, part: tuple[int, int]) -> InputsT:
        """What `targets` needs of micro-batch i of this rank's n, part (i, n); without gradients. An engine calls it,
        and `targets`, where there are several micro-batches; a method without targets leaves both out."""
        raise NotImplementedError(f"{type(self).__name__} makes no targets over the whole batch")

    def targets(self, inputs: Sequence[InputsT], samples_seen: int) -> list[TargetsT]:
        """The targets of each micro-batch, made over the whole global batch."""
        raise NotImplementedError(f"{type(self).__name__} makes no targets over the whole batch")

    @property
    def has_batch_targets(self) -> bool:
        """Whether the whole global batch decides what its micro-batches learn."""
        return type(self).prepare_targets is not Method.prepare_targets

    @abstractmethod
    def encode(self, images: Tensor) -> Features:
        """Of normalised images [N, 3, S, S], with running statistics; for evaluation."""

    def encode_patches(self, images: Tensor) -> PatchFeatures:
        """Of normalised images [N, 3, S, S], for the report's pictures; of a method that has a `patch_side`."""
        tokens, attention = cast(Backbone, self.backbone).tokens_and_attention(images)
        patches = tokens.patches.float()
        of_heads = patches.new_zeros(len(patches), 0, patches.shape[1]) if attention is None else attention.mean(1)
        return PatchFeatures(patches, of_heads.float())

    def reconstruct(self, images: Tensor, numbers: Sequence[int]) -> Reconstructions:
        """Of normalised images [N, 3, H, W] of `reconstruction_size`, for the report's pictures; what is not seen of
        each is a function of its number."""
        raise NotImplementedError(f"{type(self).__name__} reconstructs nothing")

    # --- what it declares

    @property
    def patch_side(self) -> int:
        """In pixels, of the patches of which `encode_patches` makes features; 0: it has none. Asked for before an
        engine wraps it."""
        patch_map = self.backbone.patch_map if isinstance(self.backbone, Backbone) else None
        return patch_map.stride if patch_map else 0

    @property
    def reconstruction_size(self) -> ImageSize:
        """Of the images that `reconstruct` takes; 0: it has none."""
        return 0

    @property
    def feature_width(self) -> int:
        """Of the features that `loss` gives (the backbone's, of a whole view: the first assigned crop, a teacher's
        first global crop, what is visible of a masked image); 0: it gives none. A probe learns from them."""
        return 0

    @abstractmethod
    def shard_units(self) -> dict[str, nn.Module]:
        """Name -> module of what is gathered together, in forward order. Units whose names begin with one word run in
        the same forwards, so that small ones may be gathered together."""

    @property
    def fp32_units(self) -> frozenset[str]:
        """Units whose weights take part in fp32 whatever the precision of the rest."""
        return frozenset()

    def checkpointed_sequences(self) -> Sequence[UnitSequence]:
        """What parallel.activation_checkpoint is about."""
        return [cast(UnitSequence, self.backbone)]

    def buffer_kind(self, name: str) -> BufferKind:
        """Of the buffer of this name: by default the method's own are memory, those of stateful layers (BatchNorm)
        statistics, others constants."""
        if "." not in name:
            return BufferKind.MEMORY
        is_stateful = isinstance(self.get_submodule(name.rpartition(".")[0]), StatefulLayer)
        return BufferKind.STATISTICS if is_stateful else BufferKind.CONSTANT

    def check_statistics(self, config: Config, images: int) -> Problem | None:
        """What is wrong where a BatchNorm normalises over so many images and needs more."""
        rule = f"leaves BatchNorm {images} image to normalise over, which needs at least 2"
        return None if images > 1 else Problem("train.global_batch", config.train.global_batch, rule)

    @abstractmethod
    def initialisers(self) -> dict[str, Init]:
        """How each parameter starts."""

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """How updates treat each parameter, by its name."""
        return {name: ParameterGroup() for name, _ in self.named_parameters()}

    def backbone_prefixes(self) -> tuple[str, ...]:
        """What the names of the backbone begin with: `export_prefix`, and that of the network it is a moving average
        of, or that is one of it."""
        own, found = self.export_prefix, {self.export_prefix: None}
        for name, group in self.parameter_groups().items():
            for this, other in ((name, group.average_of), (group.average_of, name)):
                rest = this.removeprefix(own)
                if group.average_of and rest != this and other.endswith(f".{rest}"):
                    found[other.removesuffix(rest)] = None
        return tuple(found)

    def average_momentum(self, name: str, samples_seen: int) -> float:
        """Of the moving average `name`, in the update after `samples_seen` samples: 1 leaves it, 0 copies its
        source."""
        raise NotImplementedError(f"{type(self).__name__} declares moving averages, but no momentum.")

    # --- what it keeps beside parameters and buffers

    def state(self) -> dict[str, Any]:
        """A few numbers for a checkpoint, as JSON has them."""
        return {}

    def load_state(self, saved: Mapping[str, Any], then: Mapping[str, Any], samples_seen: int) -> bool:
        """Go on from a checkpoint's `state()`, made with the recipe `then` after `samples_seen` samples; whether what
        the method remembers of past samples (its own buffers) is to be loaded, too, rather than filled anew."""
        return True

    # --- what it says of itself

    @property
    @abstractmethod
    def baseline(self) -> Baseline | None:
        """What a network that has learned nothing would have as its loss; None where only the images say."""

    @property
    def plots(self) -> Sequence[MetricPlot]:
        """What the report shows of the figures that `metrics` gives."""
        return ()

    @property
    def report_sections(self) -> Sequence[ReportSection]:
        """Sections of its own that the report shows beside those of every run."""
        return ()

    def metrics(self, means: Mapping[str, Tensor], loss: float) -> dict[str, float]:
        """Figures for a metric line, from the means of what `loss` gave as metrics (none where a line has none)."""
        return {}

    def health(self, row: Mapping[str, Any], config: Config) -> Problem | None:
        """Where a metric line shows that nothing is being learned: what shows it, and what to change; told once a
        run."""
        return None

    @property
    def export_prefix(self) -> str:
        """What the names of the parameters and buffers of the network to export begin with."""
        return next(f"{name}." for name, module in self.named_modules() if module is self.backbone)

    @property
    def anchors(self) -> str:
        """A parameter whose rows lie among the embeddings, as prototypes do: the report shows the images nearest to
        some. Empty: none."""
        return ""
