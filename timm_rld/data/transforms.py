"""Transforms from a PIL image to the uint8 pixels that both networks see: timm's own, without normalisation."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError
from .images import decode, flips, orientation, upright_size

Transform = Callable[[Any], Tensor]
# A JPEG is decoded at reduced scale where at least this many times the pixels needed remain, in width and in height.
# On photographs the pixels then differ from those of a full decode by less than one grey value on average.
DRAFT_MARGIN = 2


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 `[C, H, W]`, contiguous. PIL writes the planes one by one, which takes half the time of a copy of its
    interleaved pixels that is transposed when the batch is put together."""
    bands = image.getbands()
    planes = bytearray().join(image.tobytes('raw', band) for band in bands)
    return torch.frombuffer(planes, dtype=torch.uint8).view(len(bands), image.height, image.width)


class DraftTransform:
    """A transform that also decodes: JPEGs at 1/2, 1/4 or 1/8 of their size where :data:`DRAFT_MARGIN` allows it.

    The box to be cut is that for the full size, from the same random numbers.

    Args:
        first: timm's random resized crop or torchvision's `Resize`, the first step of the transform.
        rest: the other steps.
        mode: PIL mode to convert to.
    """

    def __init__(self, first: Any, rest: Transform, mode: str) -> None:
        from timm.data.transforms import RandomResizedCropAndInterpolation

        self.first, self.rest, self.mode = first, rest, mode
        self.box_of = self._random_box if isinstance(first, RandomResizedCropAndInterpolation) else self._whole

    def __call__(self, image: Image.Image) -> Tensor:
        return self.rest(self.decode(image, exif=False))

    def decode(self, image: Image.Image, exif: bool = True) -> Image.Image:
        """The first step, on an image that is opened but, for an effect, not decoded yet.

        Args:
            exif: whether to apply the EXIF orientation. The box is that of the image that is turned upright.
        """
        from torchvision.transforms.functional import pil_modes_mapping

        if image.format not in ('JPEG', 'MPO'):
            image.load()
        turn = orientation(image) if exif else 1
        full = upright_size(image.size, turn)
        box, size, interpolation = self.box_of(full)
        room = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]) / DRAFT_MARGIN
        factor = next((k for k in (8, 4, 2) if k <= room), 1)
        if factor > 1 and image.draft(None, (image.width // factor, image.height // factor)) is None:
            factor = 1  # no JPEG
        image = decode(image, self.mode, exif)
        left, top, right, bottom = (x / factor for x in box)
        flip_x, flip_y = flips(turn)  # the part of a pixel by which the reduced image is larger is now before the first
        before_x, before_y = image.width - full[0] / factor, image.height - full[1] / factor
        left, right = (x + flip_x * before_x for x in (left, right))
        top, bottom = (y + flip_y * before_y for y in (top, bottom))
        x, y = int(left), int(top)
        image = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
        if image.size == size and factor == 1:
            return image
        return image.resize(size, pil_modes_mapping[interpolation], box=(left - x, top - y, right - x, bottom - y))

    def _random_box(self, full: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, int], Any]:
        """Box, size (width, height) and interpolation, drawn as timm draws them for an image of size ``full``."""
        stand_in = torch.empty(1, 1, 1).expand(1, *full[::-1])
        top, left, height, width = self.first.get_params(stand_in, self.first.scale, self.first.ratio)
        interpolation = self.first.interpolation
        if isinstance(interpolation, (tuple, list)):
            interpolation = random.choice(interpolation)
        return (left, top, left + width, top + height), self.first.size[::-1], interpolation

    def _whole(self, full: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, int], Any]:
        """The same for a resize of the whole image, to a size or of its shorter side."""
        width, height = full
        size = self.first.size
        if not isinstance(size, int):
            size = tuple(size)[::-1]
        elif width <= height:
            size = (size, int(size * height / width))
        else:
            size = (int(size * width / height), size)
        return (0, 0, width, height), size, self.first.interpolation


def _compose(steps: Any, channels: int, jpeg_draft: bool) -> Transform:
    """timm's steps with our own conversion to a tensor, and where asked for with the first as the decoder of JPEGs."""
    from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
    from torchvision import transforms

    first, *rest = (to_tensor if isinstance(step, MaybePILToTensor) else step for step in steps)
    _allow_no_bits(rest)
    # rkrc and rkrr choose their box otherwise, and 'nearest' takes single pixels, which a smaller image has not
    if not (
        jpeg_draft
        and isinstance(first, (RandomResizedCropAndInterpolation, transforms.Resize))
        and first.interpolation != transforms.InterpolationMode.NEAREST
    ):
        return transforms.Compose([first, *rest])
    return DraftTransform(first, transforms.Compose(rest), {1: 'L', 3: 'RGB'}[channels])


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's, for all that its policies ask for: of 0 bits, a black image, Pillow knows nothing from 13.0 on."""
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def _allow_no_bits(steps: list[Any]) -> None:
    from timm.data.auto_augment import AutoAugment, RandAugment

    ops: list[Any] = []
    for step in steps:
        if isinstance(step, RandAugment):
            ops += step.ops
        elif isinstance(step, AutoAugment):
            ops += itertools.chain.from_iterable(step.policy)
    for op in ops:
        if op.name.startswith('Posterize'):
            op.aug_fn = _posterize


class ErasePixels:
    """Random erasing on uint8 pixels, before normalisation.

    timm erases normalised images: a constant 0 there is the mean colour here, and standard normal noise is
    N(mean, std), rounded to whole grey values and cut to 0..255.

    Args:
        probability, mode, max_count: as in timm's RandomErasing.
        mean, std: of the student's normalisation, for pixels in 0..1.
    """

    def __init__(
        self, probability: float, mode: str, max_count: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
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
    jpeg_draft: bool = False,
) -> Transform:
    """timm's training transform with uint8 output, the pad-and-crop of 32×32 work, and erasing.

    Args:
        input_size: (C, H, W) of the images.
        mean, std: of the student: for random erasing, and the fill colour of AutoAugment.
        train_crop_mode: timm's `rrc`, `rkrc`, `rkrr`, or `pad`: resize the shorter side, pad by ``crop_padding`` zeros
            on each side, crop at random.
        jpeg_draft: decode JPEGs at reduced scale where the crop allows it; not with `rkrc` and `rkrr`.
        Others: as in timm's `create_transform`.
    """
    from timm.data import create_transform
    from timm.data.transforms import str_to_interp_mode
    from torchvision import transforms

    if aa:
        _check_policy(aa)
    kwargs: dict[str, Any] = dict(
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
        return _compose([*create_transform(**kwargs, no_aug=True).transforms, *erase], input_size[0], jpeg_draft)
    if train_crop_mode != 'pad':
        kwargs.update(train_crop_mode=train_crop_mode, scale=scale, ratio=ratio)
        return _compose([*create_transform(**kwargs).transforms, *erase], input_size[0], jpeg_draft)
    size = input_size[-2:]
    _, colors, last = create_transform(**kwargs, separate=True)
    first = [
        transforms.Resize(min(size), str_to_interp_mode('bilinear' if interpolation == 'random' else interpolation)),
        transforms.RandomCrop(size, padding=crop_padding),
    ]
    if hflip:
        first.append(transforms.RandomHorizontalFlip(hflip))
    if vflip:
        first.append(transforms.RandomVerticalFlip(vflip))
    return _compose([*first, *colors.transforms, *last.transforms, *erase], input_size[0], jpeg_draft)


def _check_policy(aa: str) -> None:
    from timm.data.auto_augment import auto_augment_transform, rand_augment_transform

    if aa.startswith('augmix'):
        raise UserError(f'--aa {aa}: AugMix makes several versions of an image; not supported, use rand-… or original')
    try:
        (rand_augment_transform if aa.startswith('rand') else auto_augment_transform)(aa, {})
    except Exception as e:
        raise UserError(f"--aa {aa}: unknown policy; timm's are rand-m9-mstd0.5, original, v0, 3a, … ({e!r})") from e


def eval_transform(
    input_size: tuple[int, int, int],
    *,
    interpolation: str,
    crop_pct: float,
    crop_mode: str | None = None,
    mean: tuple[float, ...] | None = None,
    jpeg_draft: bool = False,
) -> Transform:
    """timm's validation transform with uint8 output `[C, H, W]`; ``jpeg_draft`` not with crop mode `border`, nor with
    images that are not square.

    Args:
        mean: of the normalisation: the colour of the border with crop mode `border`; None for timm's default.
        Others: as in timm's `create_transform`.
    """
    from timm.data import create_transform

    fill: dict[str, Any] = {} if mean is None else {'mean': mean}
    transform = create_transform(
        input_size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, normalize=False, **fill
    )
    return _compose(transform.transforms, input_size[0], jpeg_draft)
