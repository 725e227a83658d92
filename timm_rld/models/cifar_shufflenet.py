"""ShuffleNets of 32×32 images, with a 1×1 stem.

"ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", Zhang et al., CVPR 2018;
"ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", Ma et al., ECCV 2018.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from ._base import CifarNet, build, cifar_cfgs, conv


class V1Block(nn.Module):
    """Grouped 1×1, shuffle, depthwise 3×3, grouped 1×1; added to the input, or beside it where the size is halved."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, groups: int, first: bool) -> None:
        super().__init__()
        self.halves, self.groups = stride == 2, 1 if first else groups
        out = out_chs - in_chs if self.halves else out_chs
        mid = out // 4
        self.conv1 = conv(in_chs, mid, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = conv(mid, mid, 3, stride, groups=mid)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = conv(mid, out, 1, groups=groups)
        self.bn3 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.channel_shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.halves:
            out = torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], dim=1)
        else:
            out = out + x
        return F.relu(out, inplace=True)


class V2Block(nn.Module):
    """One half of the channels through 1×1, depthwise 3×3, 1×1, the other as it is; then shuffled."""

    def __init__(self, chs: int) -> None:
        super().__init__()
        half = chs // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)), inplace=True)
        return F.channel_shuffle(torch.cat([kept, out], dim=1), 2)


class V2Down(nn.Module):
    """Halves the size, all channels through both branches."""

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        mid = out_chs // 2
        self.conv1 = conv(in_chs, in_chs, 3, 2, groups=in_chs)
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv2 = conv(in_chs, mid, 1)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = conv(in_chs, mid, 1)
        self.bn3 = nn.BatchNorm2d(mid)
        self.conv4 = conv(mid, mid, 3, 2, groups=mid)
        self.bn4 = nn.BatchNorm2d(mid)
        self.conv5 = conv(mid, mid, 1)
        self.bn5 = nn.BatchNorm2d(mid)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))), inplace=True)
        return F.channel_shuffle(torch.cat([left, right], dim=1), 2)


class CifarShuffleNetV1(CifarNet):
    """Three stages of :class:`V1Block`.

    Args:
        channels, blocks: of each stage.
        groups: of the 1×1 convolutions.
    """

    classifier_name = 'linear'

    def __init__(
        self,
        channels: tuple[int, ...],
        blocks: tuple[int, ...],
        groups: int,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        chs = 24
        self.conv1 = conv(in_chans, chs, 1)
        self.bn1 = nn.BatchNorm2d(chs)
        for i, (out, count) in enumerate(zip(channels, blocks, strict=True)):
            stage = []
            for j in range(count):
                stage.append(V1Block(chs, out, 1 if j else 2, groups, first=not i and not j))
                chs = out
            setattr(self, f'layer{i + 1}', nn.Sequential(*stage))
        self._finish([24, *channels], [1, 2, 4, 8], chs, global_pool)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)), inplace=True)


class CifarShuffleNetV2(CifarNet):
    """Three stages of :class:`V2Down` and :class:`V2Block`, and a 1×1 convolution.

    Args:
        channels: of each stage, then of the last convolution.
        blocks: of each stage, the one that halves the size not counted.
    """

    classifier_name = 'linear'

    def __init__(
        self,
        channels: tuple[int, ...],
        blocks: tuple[int, ...],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        chs = 24
        self.conv1 = conv(in_chans, chs, 1)
        self.bn1 = nn.BatchNorm2d(chs)
        *widths, num_features = channels
        for i, (out, count) in enumerate(zip(widths, blocks, strict=True)):
            setattr(self, f'layer{i + 1}', nn.Sequential(V2Down(chs, out), *(V2Block(out) for _ in range(count))))
            chs = out
        self.conv2 = conv(chs, num_features, 1)
        self.bn2 = nn.BatchNorm2d(num_features)
        self._finish([24, *widths], [1, 2, 4, 8], num_features, global_pool)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)), inplace=True)

    def end(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)), inplace=True)


default_cfgs = cifar_cfgs('conv1', 'linear', 'cifar_shufflev1', 'cifar_shufflev2')


@register_model
def cifar_shufflev1(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNetV1:
    """ShuffleNet V1, three groups."""
    args = dict(channels=(240, 480, 960), blocks=(4, 8, 4), groups=3)
    return build(CifarShuffleNetV1, 'cifar_shufflev1', pretrained, args, **kwargs)


@register_model
def cifar_shufflev2(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNetV2:
    """ShuffleNet V2, full width."""
    args = dict(channels=(116, 232, 464, 1024), blocks=(3, 7, 3))
    return build(CifarShuffleNetV2, 'cifar_shufflev2', pretrained, args, **kwargs)
