"""Base of the networks without shortcuts: convolutions, then dense layers of fixed size.

Methods and attributes are those of timm's networks.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn


class PlainNet(nn.Module):
    """Convolutions -> dense layers.

    Args:
        name: of the network, for errors.
        features: the convolutions.
        hidden: layers between the convolutions and the last ones.
        last_layers: returns new layers for a number of classes, [N, num_features] -> logits.
        num_features: what the last layers get, per image.
        num_classes: number of classes; 0: return what the last layers would get.
        image_size: side of the images, in pixels.
        feature_size: side of the output of the convolutions.
    """

    compiled_apart = ("features", "classifier")
    """Compiled separately: gradients of the classifier travel during backward of the features."""

    def __init__(
        self,
        name: str,
        features: nn.Sequential,
        hidden: Sequence[nn.Module],
        last_layers: Callable[[int], list[nn.Module]],
        *,
        num_features: int,
        num_classes: int,
        image_size: int,
        feature_size: int,
    ) -> None:
        super().__init__()
        self.name, self.image_size, self.feature_size = name, image_size, feature_size
        self.features, self.last_layers = features, last_layers
        self.num_hidden = len(hidden)
        self.num_features = num_features
        self.classifier = nn.Sequential(*hidden)
        self.reset_classifier(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, image_size, image_size] -> logits [N, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, image_size, image_size] -> output of the convolutions.

        Raises:
            ValueError: the images have another size.
        """
        features: Tensor = self.features(x)
        if features.shape[2:] != (self.feature_size, self.feature_size):
            got, expected = f"{x.shape[2]}x{x.shape[3]}", f"{self.image_size}x{self.image_size}"
            raise ValueError(f"{self.name} got images of {got} pixels; expected {expected}")
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Output of the convolutions -> logits [N, num_classes].

        With `pre_logits` -> what the last layers get [N, num_features].
        """
        layers = self.classifier[: self.num_hidden] if pre_logits else self.classifier
        logits: Tensor = layers(x)
        return logits

    def get_classifier(self) -> nn.Module:
        """Return the last layers, nn.Identity if there are none."""
        return self.classifier[self.num_hidden :] if self.num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int) -> None:
        """Put new last layers in the place of the last ones.

        Args:
            num_classes: number of classes; 0: none.
        """
        self.num_classes = num_classes
        del self.classifier[self.num_hidden :]
        like = next(self.parameters())
        for layer in self.last_layers(num_classes) if num_classes else ():
            self.classifier.append(layer.to(like.device, like.dtype).train(self.training))
