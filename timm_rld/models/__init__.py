"""CIFAR networks of the distillation literature, in timm's registry as `cifar_…`."""

from . import cifar_mobilenetv2, cifar_resnet, cifar_shufflenet, cifar_vgg, cifar_wrn
from ._base import CifarNet
from .generator import Discriminator, Generator, generator_of

__all__ = [
    'cifar_mobilenetv2', 'cifar_resnet', 'cifar_shufflenet', 'cifar_vgg', 'cifar_wrn', 'CifarNet',
    'Discriminator', 'Generator', 'generator_of',
]  # fmt: skip
