"""Modulated deformable convolution: Zhu et al., "Deformable ConvNets v2", arXiv 1811.11168, section 3.2."""

from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class ModulatedDeformConv2d(nn.Conv2d):
    """A convolution that predicts, for every cell and tap, where to sample and how much it counts.

    ``y(p) = sum_k w_k x(p + p_k + dp_k) m_k`` with offsets ``dp_k`` in cells and modulation ``m_k`` in 0..1
    from a convolution of the same input, ``conv_offset``. That one starts at zero: no offset, and a
    modulation of 0.5. Arguments and the names of the weights are those of ``nn.Conv2d``.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(
            self.in_channels, 3 * taps, self.kernel_size, self.stride, self.padding, self.dilation
        )
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    @classmethod
    def like(cls, conv: nn.Conv2d) -> "ModulatedDeformConv2d":
        """Makes one of the same shape, with the same weights, as a plain convolution."""
        made = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=conv.bias is not None,
        )
        made.load_state_dict(conv.state_dict(), strict=False)
        return made

    def forward(self, features: Tensor) -> Tensor:
        """Convolves.

        Args:
            features (Tensor[B, C, H, W]): the input.

        Returns:
            Tensor[B, out_channels, H', W']: float32 under autocast, where torchvision's operator computes so.
        """
        taps = self.kernel_size[0] * self.kernel_size[1]
        # 2 taps channels: y and x of each tap in turn; then the modulation of each.
        offset, modulation = self.conv_offset(features).split([2 * taps, taps], dim=1)
        return deform_conv2d(
            features,
            offset,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            modulation.sigmoid(),
        )
