"""VGG networks of 32×32 images, with batch norm: "Very Deep Convolutional Networks for Large-Scale Image Recognition",
Simonyan, Zisserman, ICLR 2015."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from ._base import CifarNet, build, cifar_cfgs, conv, init_weights

_WIDTHS = (64, 128, 256, 512, 512)


class CifarVgg(CifarNet):
    """Five blocks of 3×3 convolutions; the size is halved before blocks 1, 2 and 3, and before the last one too where
    the images are 64×64 or larger.

    Args:
        depths: convolutions of each block.
    """

    stages = (('block1',), ('block2',), ('block3',), ('block4',))
    stem_name = 'block0'
    classifier_name = 'classifier'
    stem_pattern = r'^block0'
    block_pattern = (r'^block(\d+)',) * 2

    def __init__(
        self,
        depths: tuple[int, ...],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        chs = in_chans
        for i, (depth, width) in enumerate(zip(depths, _WIDTHS, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [conv(chs, width, 3, bias=True), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                chs = width
            setattr(self, f'block{i}', nn.Sequential(*layers[:-1]))
        self._finish(list(_WIDTHS), [1, 2, 4, 8, 8], chs, global_pool)
        init_weights(self, linear_std=0.01)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.get_submodule('block0')(x), inplace=True)

    def run_stage(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        if names != ('block4',) or min(x.shape[-2:]) >= 8:
            x = F.max_pool2d(x, 2)
        return F.relu(super().run_stage(names, x), inplace=True)


default_cfgs = cifar_cfgs('block0.0', 'classifier', *(f'cifar_vgg{d}' for d in (8, 11, 13, 16, 19)))


def _create(name: str, depths: tuple[int, ...], pretrained: bool, **kwargs: Any) -> CifarVgg:
    return build(CifarVgg, name, pretrained, dict(depths=depths), **kwargs)


@register_model
def cifar_vgg8(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-8 with batch norm."""
    return _create('cifar_vgg8', (1, 1, 1, 1, 1), pretrained, **kwargs)


@register_model
def cifar_vgg11(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-11 with batch norm."""
    return _create('cifar_vgg11', (1, 1, 2, 2, 2), pretrained, **kwargs)


@register_model
def cifar_vgg13(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-13 with batch norm."""
    return _create('cifar_vgg13', (2, 2, 2, 2, 2), pretrained, **kwargs)


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-16 with batch norm."""
    return _create('cifar_vgg16', (2, 2, 3, 3, 3), pretrained, **kwargs)


@register_model
def cifar_vgg19(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-19 with batch norm."""
    return _create('cifar_vgg19', (2, 2, 4, 4, 4), pretrained, **kwargs)
