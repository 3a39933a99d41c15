"""Base of the networks with shortcuts: stem, blocks in stages, mean over the pixels, dense layer.

Methods and attributes are those of timm's networks, so that tools made for these (detectors,
segmentation, transfer to other classes) take them.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from bitfleet.models.layers.real_layers import Initializer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Blocks of one resolution.

    Args:
        blocks: called one after the other.
        channels: of their output.
        reduction: pixels of the image per pixel of the output, on each axis.
    """

    blocks: Sequence[nn.Module]
    channels: int
    reduction: int


class ResidualNet(nn.Module):
    """Stem -> blocks -> mean over the pixels -> dense layer.

    Args:
        stem: called first.
        stages: the blocks.
        num_classes: number of classes; 0: return the means, [N, num_features].
        initializer: of the dense layer's weight, with a bias of 0. None: torch's of both.
        relu: apply ReLU before the mean.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        stages: Sequence[Stage],
        *,
        num_classes: int,
        initializer: Initializer | None = None,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.initializer, self.relu = initializer, relu
        self.stem = stem
        self.blocks = nn.Sequential(*(block for stage in stages for block in stage.blocks))
        ends = itertools.accumulate(len(stage.blocks) for stage in stages)
        self.feature_info = [
            {"num_chs": stage.channels, "reduction": stage.reduction, "module": f"blocks.{end - 1}"}
            for stage, end in zip(stages, ends, strict=True)
        ]
        """Channels, reduction and last module of each stage, by timm's names."""
        self.num_features = stages[-1].channels
        self.reset_classifier(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] -> logits [N, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] -> output of the last block [N, num_features, h, w]."""
        features: Tensor = self.blocks(self.stem(x))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Output of the last block [N, num_features, h, w] -> logits [N, num_classes].

        With `pre_logits` -> what the dense layer gets [N, num_features].
        """
        if self.relu:
            x = x.relu()
        means = x.mean((2, 3))
        if pre_logits:
            return means
        logits: Tensor = self.head(means)
        return logits

    def get_classifier(self) -> nn.Module:
        """Return the dense layer, nn.Identity if there is none."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new dense layer in the place of the last one.

        Args:
            num_classes: number of classes; 0: none, the network returns the means.
        """
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            like = next(self.parameters())
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if self.initializer is not None:
                self.initializer(self.head.weight)
                nn.init.zeros_(self.head.bias)
