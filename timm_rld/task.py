"""The distillation step as a timm TrainingTask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from timm.loss import create_classification_loss
from timm.task import TrainingTask
from torch import Tensor, nn

from .data import MixedTarget
from .data.replay import ReplayDataset
from .loss import CRITERIA, DistillLoss, create_distill_loss
from .pairing import ClosedTeacher, Normalize, Teacher, create_normalize, in_distilled_training, outputs_of_heads
from .poison import Poison


class CachedLogits(Protocol):
    """What the task and :func:`timm_rld.engine.fit` ask of a cache of the teacher's logits
    (:class:`timm_rld.cache.TeacherCache`, which says what each does)."""

    def logits(
        self, epoch: int, indices: Tensor, target: Tensor, compute: Callable[..., Tensor] | None = None
    ) -> Tensor: ...

    def missing(self, epoch: int, indices: Tensor) -> int: ...

    def flush(self) -> None: ...

    def end_epoch(
        self, epoch: int, left_out: Sequence[int], dataset: ReplayDataset, compute: Callable[[Tensor], Tensor] | None
    ) -> None: ...


class WeightedCrossEntropy(nn.Module):
    """Mean over the batch of weight[target] · CE. torch's own divides by the batch's sum of weights, so that a step
    would depend on how its images are spread over batches and processes.

    Args:
        weights: of the classes `[C]`.
        smoothing: of the labels.
    """

    def __init__(self, weights: Tensor, smoothing: float = 0.0) -> None:
        super().__init__()
        self.weights: Tensor
        self.register_buffer('weights', weights, persistent=False)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, target, label_smoothing=self.smoothing, reduction='none')
        return (loss * self.weights[target]).mean()


class DistillationTask(TrainingTask):
    """Cross-entropy and a distillation term: task_loss_weight · CE + distill_loss_weight · ramp · criterion.

    The ramp is min(epoch / warmup_epochs, 1), epoch 1-based, once :meth:`set_epoch` has been called.

    It takes batches in two forms. uint8 pixels `[B, C, H, W]` are normalised for each network by its own normalisation.
    Floating inputs are taken as normalised for the student, as in timm's own loop, and are turned into the teacher's
    normalisation.

    A student with a distillation head gives the outputs of two heads in training, once timm's
    ``student.set_distilled_training(True)`` is called. The cross-entropy then goes to the main head, the criterion to
    the other (as in timm's TokenDistillationTask; Touvron et al., ICML 2021), and each needs a weight above 0 to learn.
    Without a criterion the cross-entropy trains their mean, which is also what the student gives in evaluation.

    Args:
        student: the model to train.
        teacher: a :class:`Teacher`, or a model (which is wrapped in one), or one that can only be asked
            (:class:`timm_rld.QueryTeacher`). None where nothing is distilled.
        criterion: from :func:`create_distill_loss`, or its name. None for cross-entropy alone.
        task_loss_weight, distill_loss_weight, warmup_epochs: None for the published ones of the criterion's row
            (cross-entropy that has the main head to itself: 1 where 0 is published).
        smoothing: label smoothing of the cross-entropy.
        class_weights: of the cross-entropy, `[C]`: the mean over a batch of weight[class] · CE. None: all 1.
        normalize: of the student; None for that of its `pretrained_cfg`.
        cache: of the teacher's logits; the teacher may then be None.
        poison: changes the teacher's logits on a part of the training images, after the cache.
        device, dtype, verbose: as in timm.

    Raises:
        ValueError: a criterion without a teacher or its cache; poison without a criterion.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | ClosedTeacher | nn.Module | None,
        criterion: DistillLoss | Callable[..., Tensor] | str | None = 'rld',
        *,
        task_loss_weight: float | None = None,
        distill_loss_weight: float | None = None,
        warmup_epochs: int | None = None,
        smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        normalize: Normalize | None = None,
        cache: CachedLogits | None = None,
        poison: Poison | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if isinstance(criterion, str):
            criterion = None if criterion == 'none' else create_distill_loss(criterion)
        if criterion is not None and teacher is None and cache is None:
            raise ValueError('a distillation criterion needs a teacher')
        if criterion is None and poison is not None:
            raise ValueError('without a criterion there are no logits to poison')
        if teacher is not None and not isinstance(teacher, (Teacher, ClosedTeacher)):
            teacher = Teacher(teacher)
        row = CRITERIA['none'] if criterion is None else CRITERIA.get(getattr(criterion, 'name', ''))
        defaults = row.defaults(distill_token=in_distilled_training(student)) if row else {}
        published = tuple(defaults.values()) or (1.0, 1.0, 0)
        given = (task_loss_weight, distill_loss_weight, warmup_epochs)
        self.task_loss_weight, self.distill_loss_weight, self.warmup_epochs = (
            p if g is None else g for p, g in zip(published, given)
        )
        self.trainable_module = student
        self.teacher = teacher
        self.cache, self.poison = cache, poison
        self.normalize = normalize if normalize is not None else create_normalize(student)
        self.criterion = criterion
        self.task_criterion: nn.Module = create_classification_loss('ce', smoothing=smoothing)
        if class_weights is not None:
            self.task_criterion = WeightedCrossEntropy(class_weights, smoothing)
        self.ramp = 1.0
        self.to(self.device)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch (1-based), for the ramp and for a criterion that changes over the run."""
        self.ramp = min(epoch / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0
        set_epoch = getattr(self.criterion, 'set_epoch', None)
        if set_epoch is not None:
            set_epoch(epoch)

    def criterion_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the criterion learns, for the optimizer (without weight decay). With several
        processes their gradients must be averaged by whoever steps: they are not in the student's DDP."""
        if not isinstance(self.criterion, nn.Module):
            return []
        return [p for p in self.criterion.parameters() if p.requires_grad]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the criterion's state, for checkpoints; empty where it learns nothing."""
        if not isinstance(self.criterion, nn.Module) or not self.criterion_parameters():
            return {}
        return {'criterion': self.criterion.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load what :meth:`get_task_state` returned."""
        if isinstance(self.criterion, nn.Module) and self.criterion_parameters() and (state or strict):
            self.criterion.load_state_dict((state or {})['criterion'], strict=strict)

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> DistillationTask:
        """Wrap the student in DDP, and not the teacher. Returns the task."""
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(  # type: ignore[override]  # as in timm's TrainingTask
        self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the forward passes of student and teacher, and the criterion where it is a module. Returns the
        compiled student."""
        kwargs: dict[str, Any] = dict(backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = cast(nn.Module, torch.compile(self.trainable_module, **kwargs))
        self.eval_model = self.trainable_module
        if self.teacher is not None:
            self.teacher.compile(**kwargs)
        if isinstance(self.criterion, nn.Module):
            self.criterion.compile(**kwargs)
        return self.trainable_module

    def teacher_logits(
        self, input: Tensor, target: Tensor | None = None, indices: Tensor | None = None, epoch: int | None = None
    ) -> Tensor | None:
        """Return the teacher's logits `[B, C]` for an input of :meth:`forward`, poisoned where that is asked for; None
        where nothing is distilled.

        Args:
            target, indices, epoch: with a cache or poison: classes and indices of the images, and the epoch (1-based).

        Raises:
            ValueError: with a cache or poison, where one of these is not given.
        """
        if self.criterion is None:
            return None

        teacher: Any = self.teacher  # None only beside a cache, which is not given compute() then

        def compute(chosen: Tensor | None = None) -> Tensor:
            images = input if chosen is None else input[chosen.to(input.device)]
            return teacher(self.normalize.inverse(images) if images.is_floating_point() else images)

        if self.cache is None and self.poison is None:
            return compute()
        if target is None or indices is None or epoch is None:
            what = 'poison' if self.cache is None else 'a cache of logits'
            raise ValueError(f'{what} needs the classes and indices of the images, and the epoch')
        if self.cache is None:
            logits = compute()
        else:
            logits = self.cache.logits(epoch, indices, target, compute if teacher is not None else None)
        return logits if self.poison is None else self.poison(logits, indices, epoch)

    def _student_outputs(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The student's outputs `[B, C]` for the cross-entropy and for the criterion: those of its two heads, or twice
        the same."""
        output = self.trainable_module(input if input.is_floating_point() else self.normalize(input))
        main, distilled = outputs_of_heads(output)
        if self.criterion is None and distilled is not main:
            main = distilled = (main + distilled) / 2
        return main, distilled

    def forward(
        self,
        input: Tensor,
        target: Tensor | MixedTarget,
        teacher_logits: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One step's forward pass.

        Args:
            input: uint8 pixels, or floats normalised for the student, `[B, C, H, W]`.
            target: class indices `[B]`. Of mixed images a :class:`MixedTarget`: then each loss is
                λ · L(a) + (1-λ) · L(b), since a criterion like RLD needs the class, not a soft target.
            teacher_logits: `[B, C]`, where they are known already; None: they are computed.
            indices: with poison: of the images in the training split, `[B]`.

        Returns:
            `loss` (for backward), `output` (student logits `[B, C]`), `task_loss` (cross-entropy), `kd_loss` (the
            criterion, before weight and ramp), the criterion's diagnostics, and with poison and indices
            :meth:`Poison.figures` (of mixed images, those of the first one); all but `output` are 0-d. Of two heads
            `output` is the main one's, and `main_top1` and `distill_top1` are the percentages that each has right.
        """
        output, distilled = self._student_outputs(input)
        logits, distilled_logits = _in_float32(output), _in_float32(distilled)
        task_loss = _mixed(target, lambda index: self.task_criterion(logits, index))
        result = {'loss': self.task_loss_weight * task_loss, 'output': output, 'task_loss': task_loss.detach()}
        criterion = self.criterion
        if criterion is None:
            return result
        if teacher_logits is None:
            teacher_logits = self.teacher_logits(input)
        if distilled is not output:
            result['main_top1'], result['distill_top1'] = _top1(output, target), _top1(distilled, target)
        if isinstance(target, MixedTarget) and not getattr(criterion, 'needs_target', True):
            target = target.a
        figures: list[dict[str, Tensor]] = []

        def distill(index: Tensor) -> Tensor:
            loss = criterion(distilled_logits, teacher_logits, index)
            figures.append(getattr(criterion, 'diagnostics', {}))
            return loss

        kd_loss = _mixed(target, distill)
        result['loss'] = result['loss'] + self.distill_loss_weight * self.ramp * kd_loss
        result['kd_loss'] = kd_loss.detach()
        for name, figure in figures[0].items():
            other = figures[-1][name]
            result[name] = other.lerp(figure, target.lam) if isinstance(target, MixedTarget) else figure
        if self.poison is not None and indices is not None:
            first = target.a if isinstance(target, MixedTarget) else target
            result.update(self.poison.figures(logits, first, indices))
        return result


def _in_float32(logits: Tensor) -> Tensor:
    """float16 and bfloat16 as float32."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _top1(logits: Tensor, target: Tensor | MixedTarget) -> Tensor:
    """Percentage of a batch in which the highest logit is that of the class, 0-d."""
    predicted = logits.detach().argmax(1)
    return _mixed(target, lambda index: 100 * (predicted == index).float().mean())


def _mixed(target: Tensor | MixedTarget, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """loss(target), or λ · loss(a) + (1-λ) · loss(b) for a mixed target."""
    if isinstance(target, MixedTarget):
        return target.lam * loss(target.a) + (1 - target.lam) * loss(target.b)
    return loss(target)
