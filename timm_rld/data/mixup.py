"""Mixup and CutMix on batches of uint8 pixels, replayable."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..seeds import MIX
from .replay import seeded


class MixedTarget(NamedTuple):
    """The targets of mixed images: λ of class ``a``, 1-λ of class ``b`` (both int64 `[B]`, λ a float)."""

    a: Tensor
    b: Tensor
    lam: float


class Mixup:
    """Mixes each image with its neighbour: the partner is the batch rolled by one, so odd batches work too.

    λ, and for CutMix the box, follow from (seed, epoch, batch number) and are the same for the whole batch, on every
    process. Mixed pixels are rounded to whole grey values, so that both networks see the same uint8 pixels, as with
    timm's prefetching loader. (timm's Mixup makes soft targets, which a criterion like RLD cannot use, and needs even
    batches; what it draws is taken from it.)

    Args:
        mixup: α of mixup's Beta distribution, 0 for off.
        cutmix: α of CutMix's Beta distribution, 0 for off.
        cutmix_minmax: range of the box's sides as shares of the image's, in place of ``cutmix``.
        prob: probability that a batch is mixed.
        switch_prob: probability of CutMix where both are on.
        off_epoch: from this epoch on (1-based) nothing is mixed, 0 for never.
        seed: of the run.
    """

    def __init__(
        self,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        cutmix_minmax: tuple[float, ...] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        off_epoch: int = 0,
        seed: int = 0,
    ) -> None:
        from timm.data.mixup import Mixup as TimmMixup

        self.active = mixup > 0 or cutmix > 0 or cutmix_minmax is not None
        self.off_epoch, self.seed = off_epoch, seed
        self.minmax = cutmix_minmax
        if self.active:
            self.timm_mixup = TimmMixup(
                mixup, cutmix, cutmix_minmax, prob=prob, switch_prob=switch_prob, label_smoothing=0
            )

    def __call__(self, pixels: Tensor, target: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor | MixedTarget]:
        """Mix a batch.

        Args:
            pixels: uint8 `[B, C, H, W]`.
            target: class indices `[B]`.
            epoch: 1-based.
            batch: 0-based number of the batch in the epoch.

        Returns:
            Pixels of the same shape and dtype, and a :class:`MixedTarget`; or the arguments where nothing is mixed.
        """
        if not self.active or (self.off_epoch and epoch >= self.off_epoch):
            return pixels, target
        from timm.data.mixup import cutmix_bbox_and_lam

        from .._timm import mixup_params

        with seeded(MIX, self.seed, epoch, batch):
            lam, use_cutmix = mixup_params(self.timm_mixup)
            if use_cutmix:
                (top, bottom, left, right), lam = cutmix_bbox_and_lam(pixels.shape, lam, ratio_minmax=self.minmax)
        lam = float(lam)
        if lam == 1.0:
            return pixels, target
        partner = pixels.roll(1, 0)
        if use_cutmix:
            pixels = pixels.clone()
            pixels[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
        else:
            pixels = torch.lerp(partner.float(), pixels.float(), lam).round_().to(torch.uint8)
        return pixels, MixedTarget(target, target.roll(1, 0), lam)
