"""Backbones from timm, through its `features_only` interface."""

from dataclasses import dataclass

from torch import Tensor, nn

from drcnn.errors import ConfigError

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class TimmConfig:
    """A timm model as backbone; needs `pip install 'drcnn[timm]'`."""

    name: str
    """Name of a timm model that gives features at strides 4, 8, 16 and 32, such as convnext_tiny."""
    weights: str = "none"
    """`none`, `pretrained` for timm's own, or the path of a file; read when training starts."""
    frozen: bool = False
    """Do not train the backbone; its batch statistics then stay as well."""

    def build(self) -> "TimmBackbone":
        """Makes the backbone with random weights.

        Raises:
            ConfigError: timm is not installed, has no such model, or its features have other strides.
        """
        return TimmBackbone(self)


class TimmBackbone(nn.Module):
    """The feature maps C2 to C5 of a timm model. Parameter names are timm's, after ``body.``.

    Args:
        config: which model, and whether it is trained.

    Attributes:
        channels (tuple[int, ...]): channels of C2 to C5.
        strides (tuple[int, ...]): pixels per cell of C2 to C5.
    """

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        self.config = config
        try:
            import timm

            reductions = timm.create_model(config.name, features_only=True).feature_info.reduction()
        except ImportError:
            raise ConfigError(
                f"the backbone {config.name} needs timm; install it with: pip install 'drcnn[timm]'"
            ) from None
        except (RuntimeError, AttributeError) as error:
            raise ConfigError(
                f"timm cannot make a backbone of {config.name!r}: {error}; see timm.list_models()"
            ) from None
        if not set(STRIDES) <= set(reductions):
            raise ConfigError(
                f"the features of timm's {config.name} have strides {reductions}; a pyramid needs {STRIDES}"
            )
        self._indices = [reductions.index(stride) for stride in STRIDES]
        self.body = timm.create_model(config.name, features_only=True, out_indices=self._indices)
        self.channels = tuple(self.body.feature_info.channels())
        self.strides = STRIDES
        self._channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
        if config.frozen:
            self.body.requires_grad_(False)

    def pretrained(self, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Gets pretrained weights through timm, which knows how a classifier's become a backbone's.

        Args:
            weights: tensors of a classifier; None for timm's own (downloaded once).

        Returns:
            Tensors by the names of this module.
        """
        import timm

        source = {} if weights is None else {"state_dict": weights}
        body = timm.create_model(
            self.config.name,
            features_only=True,
            out_indices=self._indices,
            pretrained=True,
            pretrained_cfg_overlay=source,
        )
        return {f"body.{name}": tensor for name, tensor in body.state_dict().items()}

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Sets the mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.config.frozen:
            self.body.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Computes the feature maps.

        Args:
            images (Tensor[B, 3, H, W]): normalized; H and W are multiples of 32.

        Returns:
            list: C2 to C5, Tensor[B, channels[l], H / strides[l], W / strides[l]].
        """
        features = self.body(images)
        return [f.permute(0, 3, 1, 2) for f in features] if self._channels_last else features
