"""MobileNetV2 of half width for 32×32 images, as the distillation literature has it: ReLU instead of ReLU6, an
expansion in the first block too, and strides for small images.

"MobileNetV2: Inverted Residuals and Linear Bottlenecks", Sandler et al., CVPR 2018.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from ._base import CifarNet, build, cifar_cfgs, conv, init_weights


def _conv_bn_relu(in_chs: int, out_chs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [conv(in_chs, out_chs, kernel, stride, groups), nn.BatchNorm2d(out_chs), nn.ReLU(inplace=True)]


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, linear 1×1; what was put in is added where the shape allows."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, expansion: int) -> None:
        super().__init__()
        mid = in_chs * expansion
        self.conv = nn.Sequential(
            *_conv_bn_relu(in_chs, mid, 1),
            *_conv_bn_relu(mid, mid, 3, stride, mid),
            conv(mid, out_chs, 1),
            nn.BatchNorm2d(out_chs),
        )
        self.residual = stride == 1 and in_chs == out_chs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class CifarMobileNetV2(CifarNet):
    """Args:
    width: times the published channels.
    """

    # expansion, channels at full width, blocks, stride
    _BLOCKS = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    stages = (('blocks.0', 'blocks.1'), ('blocks.2',), ('blocks.3', 'blocks.4'), ('blocks.5', 'blocks.6'))
    classifier_name = 'classifier.0'
    stem_pattern = r'^conv1'
    block_pattern = (r'^blocks\.(\d+)', r'^blocks\.(\d+)\.(\d+)')

    def __init__(
        self,
        width: float,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        stem = chs = int(32 * width)
        self.conv1 = nn.Sequential(*_conv_bn_relu(in_chans, chs, 3, stride=2))
        self.blocks = nn.Sequential()
        for expansion, full, count, stride in self._BLOCKS:
            stage = []
            for j in range(count):
                stage.append(InvertedResidual(chs, int(full * width), 1 if j else stride, expansion))
                chs = int(full * width)
            self.blocks.append(nn.Sequential(*stage))
        num_features = int(1280 * max(width, 1.0))
        self.conv2 = nn.Sequential(*_conv_bn_relu(chs, num_features, 1))
        channels = [stem, *(int(c * width) for c in (24, 32, 96, 320))]
        self._finish(channels, [2, 2, 4, 8, 16], num_features, global_pool)
        init_weights(self, linear_std=0.01)

    def stem(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def end(self, x: Tensor) -> Tensor:
        return self.conv2(x)


default_cfgs = cifar_cfgs('conv1.0', 'classifier.0', 'cifar_mobilenetv2')


@register_model
def cifar_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> CifarMobileNetV2:
    """MobileNetV2 of half width."""
    return build(CifarMobileNetV2, 'cifar_mobilenetv2', pretrained, dict(width=0.5), **kwargs)
