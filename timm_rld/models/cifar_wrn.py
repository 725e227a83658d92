"""Wide residual networks of 32×32 images: "Wide Residual Networks", Zagoruyko, Komodakis, BMVC 2016.

`cifar_wrn_40_2`: 40 layers, twice as wide as a ResNet. Norm and activation come before each convolution.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from ._base import CifarNet, build, cifar_cfgs, conv, init_weights


class PreActBlock(nn.Module):
    """Norm, activation and 3×3 convolution, twice. Where the shape changes, the shortcut takes the activated input."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = conv(in_chs, out_chs, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.conv2 = conv(out_chs, out_chs, 3)
        self.drop_rate = drop_rate
        self.convShortcut = conv(in_chs, out_chs, 1, stride) if in_chs != out_chs else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x), inplace=True)
        out = F.relu(self.bn2(self.conv1(active)), inplace=True)
        out = self.conv2(F.dropout(out, self.drop_rate, self.training))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class Stage(nn.Module):
    """Blocks of one width, under the published name `layer`."""

    def __init__(self, *blocks: PreActBlock) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class CifarWideResNet(CifarNet):
    """A 3×3 stem, three stages, norm and activation at the end (features are taken before these).

    Args:
        depth: 6n + 4 layers.
        width: times the channels of a ResNet.
        block_drop_rate: dropout between a block's convolutions.
    """

    stages = (('block1.layer',), ('block2.layer',), ('block3.layer',))
    stem_pattern = r'^conv1'
    block_pattern = (r'^block(\d+)', r'^block(\d+)\.layer\.(\d+)')
    end_pattern = r'^bn1'

    def __init__(
        self,
        depth: int,
        width: int,
        block_drop_rate: float = 0.0,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        chs = 16
        self.conv1 = conv(in_chans, chs, 3)
        for i, out in enumerate((16 * width, 32 * width, 64 * width)):
            blocks = []
            for j in range((depth - 4) // 6):
                blocks.append(PreActBlock(chs, out, 2 if i and not j else 1, block_drop_rate))
                chs = out
            setattr(self, f'block{i + 1}', Stage(*blocks))
        self.bn1 = nn.BatchNorm2d(chs)
        self._finish([16, 16 * width, 32 * width, chs], [1, 1, 2, 4], chs, global_pool)
        init_weights(self)
        if num_classes:
            nn.init.zeros_(self.get_classifier().bias)

    def stem(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def end(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x), inplace=True)


_SHAPES = ('16_1', '16_2', '16_4', '28_2', '28_4', '40_1', '40_2')
default_cfgs = cifar_cfgs('conv1', 'fc', *(f'cifar_wrn_{s}' for s in _SHAPES))


def _create(depth: int, width: int, pretrained: bool, **kwargs: Any) -> CifarWideResNet:
    return build(CifarWideResNet, f'cifar_wrn_{depth}_{width}', pretrained, dict(depth=depth, width=width), **kwargs)


@register_model
def cifar_wrn_16_1(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-16-1."""
    return _create(16, 1, pretrained, **kwargs)


@register_model
def cifar_wrn_16_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-16-2."""
    return _create(16, 2, pretrained, **kwargs)


@register_model
def cifar_wrn_16_4(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-16-4."""
    return _create(16, 4, pretrained, **kwargs)


@register_model
def cifar_wrn_28_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-28-2."""
    return _create(28, 2, pretrained, **kwargs)


@register_model
def cifar_wrn_28_4(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-28-4."""
    return _create(28, 4, pretrained, **kwargs)


@register_model
def cifar_wrn_40_1(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-40-1."""
    return _create(40, 1, pretrained, **kwargs)


@register_model
def cifar_wrn_40_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-40-2."""
    return _create(40, 2, pretrained, **kwargs)
