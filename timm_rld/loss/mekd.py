"""MEKD: "Aligning Logits Generatively for Principled Black-Box Knowledge Distillation", Ma et al., CVPR 2024.

Student and teacher are compared by the images that a generator makes of their logits. The losses that train the
generator are here too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import DistillLoss, check_choice, check_temperature, check_weight
from ._ops import kl_div

ANSWERS = ('logits', 'soft', 'hard')
LEAST = 1e-5  # added to the discriminator's probability under the information term's logarithm


def mekd_loss(
    student: Tensor,
    teacher: Tensor,
    generator: nn.Module,
    temperature: float = 5.0,
    gen_temperature: float = 5.0,
    image_weight: float = 1.0,
    kl_weight: float = 1.0,
    norm: str = 'l1',
    answers: str = 'logits',
) -> Tensor:
    """image_weight · mean |G(S/τ_g) - G(T/τ_g)| + kl_weight · τ · KL(softmax(T/τ) ‖ softmax(S/τ)).

    The first mean is over batch and pixels, the KL's over the batch: the published program's form. The paper's, as far
    as it is known, is `temperature=1, kl_weight=0.5` and the number of values of an image as `image_weight`.

    Args:
        student: logits S `[B, C]`; the gradient flows through the generator into them.
        teacher: what the teacher answers, by ``answers``.
        generator: any module that makes images of `[B, C]`: a :class:`timm_rld.Generator` in eval mode, frozen.
        temperature: τ.
        gen_temperature: τ_g.
        image_weight, kl_weight: of the two terms.
        norm: `l1`, or `l2` for squared differences.
        answers: `logits`: ``teacher`` is logits `[B, C]`. `soft`: probabilities `[B, C]`, of which T is the logarithm
            minus its mean over the classes. `hard`: class indices `[B]`, of which T is the one-hot row.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: for another ``norm`` or ``answers``.
    """
    check_choice('answers', answers, ANSWERS)
    if answers == 'soft':
        teacher = centred(teacher.clamp_min(torch.finfo(torch.float32).tiny).log())
    elif answers == 'hard':
        teacher = F.one_hot(teacher, student.shape[1]).to(student.dtype)
    images, kl = mekd_losses(student, teacher, generator, temperature, gen_temperature, norm)
    return image_weight * images + kl_weight * kl


def mekd_losses(
    student: Tensor,
    teacher: Tensor,
    generator: nn.Module,
    temperature: float = 5.0,
    gen_temperature: float = 5.0,
    norm: str = 'l1',
) -> tuple[Tensor, Tensor]:
    """The two terms of :func:`mekd_loss`, 0-d, before their weights; ``teacher`` is T `[B, C]`."""
    check_choice('norm', norm, ('l1', 'l2'))
    dtype = next((p.dtype for p in generator.parameters()), student.dtype)
    with torch.no_grad():
        of_teacher = generator((teacher / gen_temperature).to(dtype))
    difference = generator((student / gen_temperature).to(dtype)) - of_teacher
    images = difference.abs().mean() if norm == 'l1' else difference.square().mean()
    log_p_student = F.log_softmax(student / temperature, dim=1)
    log_p_teacher = F.log_softmax(teacher / temperature, dim=1)
    return images, temperature * kl_div(log_p_student, log_p_teacher)


def centred(log_probs: Tensor) -> Tensor:
    """Log-probabilities `[B, C]` minus their mean over the classes: what a softmax leaves of logits is unknown up to a
    constant of the row, which the generator, unlike a softmax, would see."""
    return log_probs - log_probs.mean(dim=1, keepdim=True)


def to_pixels(images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Images of a generator, `[B, channels, n, n]` in -1..1 → pixels in 0..255, resized to (H, W) where they have
    another size (bilinear, antialiased). Gradients flow through."""
    pixels = 127.5 * (images.float() + 1) if images.dtype != torch.float64 else 127.5 * (images + 1)
    if size is not None and tuple(pixels.shape[-2:]) != tuple(size):
        pixels = F.interpolate(pixels, size, mode='bilinear', antialias=True, align_corners=False)
    return pixels


class MEKD(DistillLoss):
    """Module face of :func:`mekd_loss`, for rows `[B, C]` of a teacher as a run has them.

    Args:
        generator: makes images of `[B, C]`; it is frozen, and stays in eval mode. None: it is given later.
        temperature, gen_temperature, image_weight, kl_weight, norm: as in :func:`mekd_loss`.

    Attributes:
        generator: see above.
        image_size: see :meth:`use`.
        answers: what the teacher's rows are: `logits`, `soft` (log-probabilities, which are centred) or `hard`
            (one-hot rows of 0 and 1).
    """

    def __init__(
        self,
        generator: nn.Module | None = None,
        temperature: float = 5.0,
        gen_temperature: float = 5.0,
        image_weight: float = 1.0,
        kl_weight: float = 1.0,
        norm: str = 'l1',
    ) -> None:
        super().__init__()
        self.temperature = check_temperature('temperature', temperature)
        self.gen_temperature = check_temperature('gen_temperature', gen_temperature)
        self.image_weight = check_weight('image_weight', image_weight)
        self.kl_weight = check_weight('kl_weight', kl_weight)
        self.norm = check_choice('norm', norm, ('l1', 'l2'))
        self.answers = 'logits'
        self.image_size: tuple[int, int] | None = None
        self.generator: nn.Module | None = None
        if generator is not None:
            self.use(generator)

    def use(self, generator: nn.Module, answers: str = 'logits', image_size: tuple[int, int] | None = None) -> None:
        """Set the generator, what the teacher's rows are, and the (H, W) of :meth:`pixels`; None: the generator's."""
        self.generator = generator.requires_grad_(False).eval()
        self.answers = check_choice('answers', answers, ANSWERS)
        self.image_size = image_size

    @torch.no_grad()
    def pixels(self, z: Tensor) -> Tensor:
        """Noise `[B, C]` → the images made of it, pixels `[B, channels, H, W]` in 0..255, floating."""
        return to_pixels(self._generator(z), self.image_size)

    @property
    def device(self) -> torch.device | None:
        """Where the generator is; None for one without weights."""
        return next((p.device for p in self._generator.parameters()), None)

    @property
    def _generator(self) -> nn.Module:
        if self.generator is None:
            raise ValueError("MEKD: needs a generator: create_distill_loss('mekd', generator=…)")
        return self.generator

    def train(self, mode: bool = True) -> MEKD:
        super().train(mode)
        if self.generator is not None:
            self.generator.eval()
        return self

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        used = centred(teacher) if self.answers == 'soft' else teacher
        of_images, kl = mekd_losses(
            student, used, self._generator, self.temperature, self.gen_temperature, self.norm
        )  # fmt: skip
        agree = (student.argmax(dim=1) == teacher.argmax(dim=1)).to(student.dtype).mean()
        self.diagnostics = {'image_loss': of_images.detach(), 'kl_loss': kl.detach(), 'agreement': agree}
        return self.image_weight * of_images + self.kl_weight * kl


# ------------------------------------------------------------------------------------------------- phase 1: the GAN


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-mean log D(x) - mean log(1 - D(G(z))), D being sigmoid(score), 0-d.

    Computed from scores, so that it is finite and has a gradient where the sigmoid saturates. (The published program
    clamps the logarithm at -100 there, and has none.)

    Args:
        real, fake: scores `[B]` of real and generated images.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def adversarial_loss(fake: Tensor) -> Tensor:
    """-mean log D(G(z)), the non-saturating loss of a generator, of scores `[B]`; 0-d."""
    return F.softplus(-fake).mean()


def information_loss(fake: Tensor, teacher: Tensor, answers: str = 'logits', info: str = 'paper') -> Tensor:
    """The term by which a generator is to make images that the teacher is sure of.

    `paper`: -mean ŷ·log(D(G(z)) + 1e-5), ŷ the teacher's highest probability; 1 for hard answers.
    `coded`: -mean(index of the teacher's class)·mean log(D(G(z)) + 1e-5), as the published program computes it: it
    depends on how the classes are numbered, and is 0 where the teacher says class 0.

    Args:
        fake: scores `[B]` of generated images.
        teacher: what the teacher says of these images: rows `[B, C]`, or for `info='paper'` what
            :func:`top_probability` makes of them, `[B]`.
        answers: what the rows are: `logits`, `soft` (log-probabilities) or `hard` (one-hot).
        info: `paper` or `coded`.

    Returns:
        A 0-d tensor.
    """
    check_choice('info', info, ('paper', 'coded'))
    # log(D + 1e-5) = log(e^(log D) + e^(log 1e-5)), which has a gradient where D is 0 to all digits
    log_d = torch.logaddexp(F.logsigmoid(fake), torch.full_like(fake, math.log(LEAST)))
    if info == 'coded':
        return -teacher.argmax(dim=1).to(fake.dtype).mean() * log_d.mean()
    top = top_probability(teacher, answers) if teacher.ndim == 2 else teacher
    return -(top.to(fake.dtype) * log_d).mean()


def top_probability(teacher: Tensor, answers: str = 'logits') -> Tensor:
    """The highest probability of each row `[B, C]`, `[B]`; 1 for hard answers."""
    check_choice('answers', answers, ANSWERS)
    if answers == 'hard':
        return torch.ones_like(teacher[:, 0])
    log_probs = teacher if answers == 'soft' else F.log_softmax(teacher, dim=1)
    return log_probs.amax(dim=1).exp()
