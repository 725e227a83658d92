"""Residual networks of 32×32 images: the 6n+2 ones, and the ImageNet shapes with a 3×3 stem.

"Deep Residual Learning for Image Recognition", He et al., CVPR 2016. The `x4` networks are four times as wide, with a
stem of 32 channels, as the distillation literature has them.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from ._base import CifarNet, build, cifar_cfgs, conv, init_weights


class Block(nn.Module):
    """Two 3×3 convolutions, or 1×1, 3×3, 1×1 with a four times wider output, and what was put in added.

    Args:
        shortcut: name of the projection where the input's shape differs: the 6n+2 networks call it `downsample`, and
            have none where none is needed; the others call it `shortcut`, and leave it empty.
    """

    def __init__(self, in_chs: int, chs: int, stride: int, bottleneck: bool, shortcut: str) -> None:
        super().__init__()
        shapes = [(in_chs, chs, 3, stride), (chs, chs, 3, 1)]
        if bottleneck:
            shapes = [(in_chs, chs, 1, 1), (chs, chs, 3, stride), (chs, 4 * chs, 1, 1)]
        self.depth = len(shapes)
        for i, shape in enumerate(shapes, 1):
            setattr(self, f'conv{i}', conv(*shape))
            setattr(self, f'bn{i}', nn.BatchNorm2d(shape[1]))
        out_chs = shapes[-1][1]
        self.shortcut_name = shortcut
        if stride != 1 or in_chs != out_chs:
            projection = nn.Sequential(conv(in_chs, out_chs, 1, stride), nn.BatchNorm2d(out_chs))
        else:
            projection = nn.Sequential()
        setattr(self, shortcut, projection)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(out))
            if i < self.depth:
                out = F.relu(out, inplace=True)
        return F.relu(out + getattr(self, self.shortcut_name)(x), inplace=True)


class CifarResNet(CifarNet):
    """A 3×3 stem and stages of blocks, each but the first halving the size.

    Args:
        blocks: of each stage.
        channels: of the stem, then of each stage.
        bottleneck, shortcut: as in :class:`Block`.
        classifier: name of the last layer.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        channels: tuple[int, ...],
        bottleneck: bool = False,
        shortcut: str = 'downsample',
        classifier: str = 'fc',
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        self.classifier_name = classifier
        self.stages = tuple((f'layer{i + 1}',) for i in range(len(blocks)))
        expansion = 4 if bottleneck else 1
        chs, widths = channels[0], channels[1:]
        self.conv1 = conv(in_chans, chs, 3)
        self.bn1 = nn.BatchNorm2d(chs)
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = []
            for j in range(count):
                stage.append(Block(chs, width, 2 if i and not j else 1, bottleneck, shortcut))
                chs = width * expansion
            setattr(self, f'layer{i + 1}', nn.Sequential(*stage))
        outs = [channels[0], *(w * expansion for w in widths)]
        self._finish(outs, [1, *(2**i for i in range(len(blocks)))], chs, global_pool)
        init_weights(self)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)), inplace=True)


_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
default_cfgs = cifar_cfgs('conv1', 'fc', *(f'cifar_resnet{d}' for d in _DEPTHS), 'cifar_resnet8x4', 'cifar_resnet32x4')
default_cfgs.update(cifar_cfgs('conv1', 'linear', 'cifar_resnet18', 'cifar_resnet50'))


def _narrow(name: str, depth: int, pretrained: bool, width: int = 1, **kwargs: Any) -> CifarResNet:
    channels = (16, 16, 32, 64) if width == 1 else (32, 16 * width, 32 * width, 64 * width)
    return build(CifarResNet, name, pretrained, dict(blocks=((depth - 2) // 6,) * 3, channels=channels), **kwargs)


def _wide(name: str, blocks: tuple[int, ...], bottleneck: bool, pretrained: bool, **kwargs: Any) -> CifarResNet:
    args = dict(
        blocks=blocks, channels=(64, 64, 128, 256, 512), bottleneck=bottleneck, shortcut='shortcut', classifier='linear'
    )
    return build(CifarResNet, name, pretrained, args, **kwargs)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8 of 32×32 images."""
    return _narrow('cifar_resnet8', 8, pretrained, **kwargs)


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-14 of 32×32 images."""
    return _narrow('cifar_resnet14', 14, pretrained, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 of 32×32 images."""
    return _narrow('cifar_resnet20', 20, pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 of 32×32 images."""
    return _narrow('cifar_resnet32', 32, pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 of 32×32 images."""
    return _narrow('cifar_resnet44', 44, pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 of 32×32 images."""
    return _narrow('cifar_resnet56', 56, pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 of 32×32 images."""
    return _narrow('cifar_resnet110', 110, pretrained, **kwargs)


@register_model
def cifar_resnet8x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8, four times as wide."""
    return _narrow('cifar_resnet8x4', 8, pretrained, width=4, **kwargs)


@register_model
def cifar_resnet32x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32, four times as wide."""
    return _narrow('cifar_resnet32x4', 32, pretrained, width=4, **kwargs)


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 with a 3×3 stem and no pooling after it."""
    return _wide('cifar_resnet18', (2, 2, 2, 2), False, pretrained, **kwargs)


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-50 with a 3×3 stem and no pooling after it."""
    return _wide('cifar_resnet50', (3, 4, 6, 3), True, pretrained, **kwargs)
