"""The step of MEKD as a timm TrainingTask: a student learns from generated images alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .data import MixedTarget
from .loss import MEKD, top_probability
from .task import DistillationTask


class MEKDTask(DistillationTask):
    """A :class:`DistillationTask` whose input is noise: the criterion's generator makes the images of it, which student
    and teacher see, each under its own normalisation. There is neither an image of the dataset nor a label.

    The loss is distill_loss_weight · ramp · criterion; arguments as of :class:`DistillationTask`.
    """

    _made: tuple[Tensor, Tensor] | None = None

    @property
    def mekd(self) -> MEKD:
        """The criterion."""
        return cast(MEKD, self.criterion)

    def images(self, input: Tensor) -> Tensor:
        """Noise `[B, C, 1, 1]` → pixels `[B, channels, H, W]`. Those of the last noise are kept, so that a step makes
        them once."""
        if self._made is None or self._made[0] is not input:
            self._made = input, self.mekd.pixels(input.flatten(1).to(self.mekd.device))
        return self._made[1]

    def ask_teacher(
        self, input: Tensor, target: Tensor | None = None, indices: Tensor | None = None, epoch: int | None = None
    ) -> tuple[Tensor, None]:
        """Return what the teacher answers to the images of noise `[B, C, 1, 1]`: rows `[B, C]`, and no features. Where
        it was asked ahead (``cache``) target, indices and epoch are needed too."""
        if self.cache is not None:
            assert target is not None and indices is not None and epoch is not None
            return self.cache.logits(epoch, indices, target), None
        assert self.teacher is not None
        with torch.no_grad():
            return self.teacher(self.images(input)), None

    def forward(
        self,
        input: Tensor,
        target: Tensor | MixedTarget | None = None,
        teacher_logits: Tensor | None = None,
        teacher_features: Sequence[Tensor] | None = None,
        indices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One step's forward pass.

        Args:
            input: noise `[B, C, 1, 1]`.
            target, teacher_features, indices: are not looked at.
            teacher_logits: of :meth:`ask_teacher`, where they are known already.

        Returns:
            `loss`, `output`, `kd_loss` as :meth:`DistillationTask.forward`; the criterion's `image_loss`, `kl_loss` and
            `agreement` (share of the images that both networks put into the same class); and `teacher_confidence` (the
            mean of its highest probability; 1 for hard answers).
        """
        if teacher_logits is None:
            teacher_logits, _ = self.ask_teacher(input)
        output = self.trainable_module(self.normalize(self.images(input)))
        self._made = None
        logits = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        kd_loss = self.mekd(logits, teacher_logits)
        result = {'loss': self.distill_loss_weight * self.ramp * kd_loss, 'output': output, 'kd_loss': kd_loss.detach()}
        confidence = top_probability(teacher_logits, self.mekd.answers).mean()
        return {**result, **self.mekd.diagnostics, 'teacher_confidence': confidence}
