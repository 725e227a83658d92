"""The networks of MEKD: a generator that makes an image of a row of logits, and the discriminator it learns from.

"Aligning Logits Generatively for Principled Black-Box Knowledge Distillation", Ma et al., CVPR 2024; layers and state
names are those of the published program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

LARGEST_LINEAR = 50_000_000  # weights: at 224 pixels and 1,000 classes there would be 402 million


class Generator(nn.Module):
    """From a row of numbers, one a class, to an image: noise while it is trained, logits / τ while a student is.

    linear C → 128·(n/4)², then twice nearest ×2 and a 3×3 convolution, each with batch norm and LeakyReLU 0.2 (128 and
    64 channels), a 3×3 convolution to the image's channels, tanh.

    Args:
        num_classes: C.
        img_size: n, height and width of the images; a multiple of 16.
        in_chans: channels of the images.

    Raises:
        ValueError: for other sizes, and where the linear layer would have over 50 million weights.
    """

    def __init__(self, num_classes: int, img_size: int = 32, in_chans: int = 3) -> None:
        super().__init__()
        if why := check_size(num_classes, img_size, in_chans):
            raise ValueError(why)
        self.num_classes, self.img_size, self.in_chans = num_classes, img_size, in_chans
        self.init_size = img_size // 4
        self.l1 = nn.Sequential(nn.Linear(num_classes, 128 * self.init_size**2))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.BatchNorm2d(128, eps=0.8),  # 0.8 is the published epsilon: it stands where torch has it
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 64, 3, padding=1),
            nn.BatchNorm2d(64, eps=0.8),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, in_chans, 3, padding=1),
            nn.Tanh(),
        )
        self.apply(_init_weights)

    def forward(self, z: Tensor) -> Tensor:
        """Rows `[B, C]` → images `[B, in_chans, n, n]` in -1..1."""
        return self.conv_blocks(self.l1(z).view(len(z), 128, self.init_size, self.init_size))


class Discriminator(nn.Module):
    """From an image to the score that it is real: four 3×3 convolutions of stride 2 (16, 32, 64, 128 channels) with
    LeakyReLU 0.2, channel dropout 0.25 and, but for the first, batch norm; then a linear layer.

    The published one ends in a sigmoid; here that is part of the losses, which work on scores.

    Args:
        img_size: height and width of the images; a multiple of 16.
        in_chans: channels of the images.
    """

    def __init__(self, img_size: int = 32, in_chans: int = 3) -> None:
        super().__init__()
        if why := check_size(2, img_size, in_chans):
            raise ValueError(why)
        layers: list[nn.Module] = []
        channels = (in_chans, 16, 32, 64, 128)
        for i, (before, after) in enumerate(zip(channels, channels[1:])):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Dropout2d(0.25)]
            layers += [nn.BatchNorm2d(after, eps=0.8)] if i else []
        self.model = nn.Sequential(*layers)
        self.adv_layer = nn.Sequential(nn.Linear(128 * (img_size // 16) ** 2, 1))
        self.apply(_init_weights)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, in_chans, n, n]` in -1..1 → scores `[B]`; sigmoid(score) is the probability of a real one."""
        return self.adv_layer(self.model(images).flatten(1)).squeeze(1)


def check_size(num_classes: int, img_size: int, in_chans: int) -> str:
    """Return why there is no generator of these sizes, or an empty text."""
    if num_classes < 2 or in_chans < 1:
        return f'a generator needs at least 2 classes and 1 channel, got {num_classes} and {in_chans}'
    if img_size < 16 or img_size % 16:
        near = max(16, round(img_size / 16) * 16)
        return f'img_size={img_size}: the generator makes images of a multiple of 16 pixels; {near} is one'
    if (weights := (num_classes + 1) * 128 * (img_size // 4) ** 2) > LARGEST_LINEAR:
        return (
            f'img_size={img_size} with {num_classes:,} classes: the linear layer of the generator would have '
            f'{weights / 1e6:.0f} million weights (at most {LARGEST_LINEAR / 1e6:.0f}); take 32 or 64: the images are '
            'resized to what each network takes'
        )
    return ''


def generator_of(state: Mapping[str, Tensor]) -> Generator:
    """Return the generator that a state dict belongs to, with these weights; its sizes follow from their shapes.

    Raises:
        ValueError: where the state dict is not that of a :class:`Generator`.
    """
    try:
        rows, num_classes = state['l1.0.weight'].shape
        in_chans = len(state['conv_blocks.9.weight'])
        generator = Generator(num_classes, 4 * math.isqrt(rows // 128), in_chans)
        generator.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as e:
        raise ValueError('not the weights of a generator of MEKD') from e
    return generator


def _init_weights(module: nn.Module) -> None:
    """Convolutions N(0, 0.02), batch norms N(1, 0.02) without bias, the rest torch's."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
