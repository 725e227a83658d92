"""Transforms from a PIL image to the uint8 view that both networks see. timm's own, without normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

Transform = Callable[[Any], Tensor]


class ErasePixels:
    """Random erasing on uint8 pixels, before normalisation.

    timm erases normalised images: a constant 0 there is the mean colour here, and standard normal noise is
    N(mean, std), rounded to whole grey values and cut to 0..255.

    Args:
        probability, mode, max_count: as in timm's RandomErasing.
        mean, std: of the student's normalisation, for pixels in 0..1.
    """

    def __init__(self, probability: float, mode: str, max_count: int, mean: tuple, std: tuple) -> None:
        from timm.data.random_erasing import RandomErasing

        self.erase = RandomErasing(probability, mode=mode, max_count=max_count, device='cpu')
        self.mean = 255 * torch.tensor(mean).view(-1, 1, 1)
        self.std = 255 * torch.tensor(std).view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        # erase a canvas of NaN, so that what timm filled in is what is no longer NaN
        fill = self.erase(torch.full(pixels.shape, torch.nan))
        erased = (fill * self.std + self.mean).round_().clamp_(0, 255)
        return torch.where(fill.isnan(), pixels, erased.nan_to_num_().to(torch.uint8))


def train_transform(
    input_size: tuple[int, int, int],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    no_aug: bool = False,
    train_crop_mode: str = 'rrc',
    crop_padding: int = 4,
    scale: tuple[float, ...] | None = None,
    ratio: tuple[float, ...] | None = None,
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float | None = 0.4,
    aa: str | None = None,
    interpolation: str = 'random',
    reprob: float = 0.0,
    remode: str = 'pixel',
    recount: int = 1,
) -> Transform:
    """timm's training transform with uint8 output, the pad-and-crop of 32×32 work, and erasing.

    Args:
        input_size: (C, H, W) of the view.
        mean, std: of the student: for random erasing, and the fill colour of AutoAugment.
        train_crop_mode: timm's `rrc`, `rkrc`, `rkrr`, or `pad`: resize the shorter side, pad by ``crop_padding`` zeros
            on each side, crop at random.
        Others: as in timm's `create_transform`.
    """
    from timm.data import create_transform
    from timm.data.transforms import str_to_interp_mode
    from torchvision import transforms

    if aa:
        _check_policy(aa)
    kwargs = dict(
        input_size=input_size,
        is_training=True,
        hflip=hflip,
        vflip=vflip,
        color_jitter=color_jitter or None,
        auto_augment=aa,
        interpolation=interpolation,
        mean=mean,
        std=std,
        normalize=False,
    )
    erase = [ErasePixels(reprob, remode, recount, mean, std)] if reprob else []
    if no_aug:
        return transforms.Compose([create_transform(**kwargs, no_aug=True), *erase])
    if train_crop_mode != 'pad':
        kwargs.update(train_crop_mode=train_crop_mode, scale=scale, ratio=ratio)
        return transforms.Compose([create_transform(**kwargs), *erase])
    size = input_size[-2:]
    _, colors, to_tensor = create_transform(**kwargs, separate=True)
    first = [
        transforms.Resize(min(size), str_to_interp_mode('bilinear' if interpolation == 'random' else interpolation)),
        transforms.RandomCrop(size, padding=crop_padding),
    ]
    if hflip:
        first.append(transforms.RandomHorizontalFlip(hflip))
    if vflip:
        first.append(transforms.RandomVerticalFlip(vflip))
    return transforms.Compose([*first, colors, to_tensor, *erase])


def _check_policy(aa: str) -> None:
    from timm.data.auto_augment import auto_augment_transform, rand_augment_transform

    if aa.startswith('augmix'):
        raise UserError(f'--aa {aa}: AugMix makes several views of an image; not supported, use rand-… or original')
    try:
        (rand_augment_transform if aa.startswith('rand') else auto_augment_transform)(aa, {})
    except Exception as e:
        raise UserError(f"--aa {aa}: unknown policy; timm's are rand-m9-mstd0.5, original, v0, 3a, … ({e!r})") from e


def eval_transform(
    input_size: tuple[int, int, int], *, interpolation: str, crop_pct: float, crop_mode: str | None = None
) -> Transform:
    """timm's validation transform with uint8 output `[C, H, W]`."""
    from timm.data import create_transform

    return create_transform(
        input_size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, normalize=False
    )
