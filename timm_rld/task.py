"""The distillation step as a timm TrainingTask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from timm.loss import create_classification_loss
from timm.task import TrainingTask
from torch import Tensor, nn

from .data import MixedTarget
from .data.replay import ReplayDataset, seeded
from .errors import UserError
from .loss import CRITERIA, DistillLoss, create_distill_loss
from .loss.features import FEATURES, FeatureLoss, choose_stage, create_feature_loss, get_feature_method
from .pairing import (
    ClosedTeacher,
    MapPairs,
    Normalize,
    Pair,
    Taps,
    Teacher,
    WithFeatures,
    create_normalize,
    forward_with_features,
    in_distilled_training,
    look_at_features,
    outputs_of_heads,
    pair_maps,
)
from .poison import Poison
from .seeds import FEATURE_LAYERS


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
        if target.is_floating_point():
            raise ValueError('class weights need class indices [B] as target, not a soft one; use MixedTarget')
        loss = F.cross_entropy(logits, target, label_smoothing=self.smoothing, reduction='none')
        return (loss * self.weights[target]).mean()


@dataclass
class FeatureDistillation:
    """A method on features for two networks, as :func:`create_features` makes it.

    Attributes:
        criterion: (student's features, teacher's features) → the unweighted term.
        student: what it is asked for. (The teacher knows: :attr:`timm_rld.pairing.Teacher.taps`.)
        pairs: which maps belong together.
    """

    criterion: FeatureLoss
    student: Taps
    pairs: MapPairs


def create_features(
    pair: Pair,
    name: str,
    *,
    options: dict[str, Any] | None = None,
    stages: Sequence[str] = (),
    seed: int = 0,
    cache: str | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> FeatureDistillation | None:
    """Look at the features of two networks, pair their maps, and make a method for them.

    Args:
        pair: student and teacher, as built; the teacher is told what it will be asked for.
        name: of the method; `none` for none.
        options: of the method.
        stages: which maps, in place of those that would be chosen (:func:`timm_rld.pairing.pair_maps`).
        seed: of the weights of the method's layers.
        cache: of the teacher's logits, for a note that it holds no features.
        log: prints a line: what was paired.

    Returns:
        For :class:`DistillationTask`; None for the name `none`.

    Raises:
        UserError: where a network has no such features, an option does not fit them, or the teacher is closed.
        ValueError: for an unknown method.
    """
    if name == 'none':
        return None
    row, options, teacher = get_feature_method(name), dict(options or {}), pair.teacher
    flag = f'--feature-distill {name}'
    if teacher is None:
        raise UserError(f'{flag}: needs a teacher')
    if isinstance(teacher, ClosedTeacher):
        raise UserError(f'{flag}: the teacher is closed: it answers ({teacher.answers}), and shows no features')
    if stages and (not row.takes or 'stage' in options):
        why = 'takes pooled features, and no maps' if not row.takes else 'give these, or --feature-kwargs stage=N'
        raise UserError(f'--feature-stages {" ".join(stages)}: {name} {why}')
    size = pair.data_config['input_size']
    both = {
        'student': look_at_features(pair.student, size, 'the student', maps=bool(row.takes), train=True),
        'teacher': look_at_features(
            teacher.model, (size[0], *(teacher.normalize.size or size[1:])), 'the teacher', maps=bool(row.takes)
        ),
    }
    pairs: MapPairs = pair_maps(both['student'], both['teacher'], stages) if row.takes else []
    try:
        pairs = _those_taken(row.takes, pairs, bool(stages), options)
        shapes = {
            f'{who}_shapes': [(1, p[i].channels, *p[i].size) for p in pairs] + [(1, found.width)] * row.pooled
            for i, (who, found) in enumerate(both.items())
        }
        with seeded(seed, FEATURE_LAYERS):
            criterion = create_feature_loss(name, **shapes, **options)
    except ValueError as e:
        raise UserError(f'{flag}: {e}') from e
    of_student, teacher.taps = (
        Taps(tuple(p[i].index for p in pairs), row.pooled, found.classifier) for i, found in enumerate(both.values())
    )
    paired = [f'{s} ← {t}' for s, t in pairs] + ['pooled features'] * row.pooled
    log(f'features ({name}), student ← teacher: {", ".join(paired)}')
    if cache is not None:
        log('note: --teacher-cache holds logits alone; the teacher is asked for its features in each step')
    return FeatureDistillation(criterion, of_student, pairs)


def _those_taken(takes: str, pairs: MapPairs, named: bool, options: dict[str, Any]) -> MapPairs:
    """Return the pairs that a method takes. The option `stage` of one that takes a single pair is used up."""
    if takes == 'one':
        return [pairs[choose_stage(options.pop('stage', None), len(pairs))]]
    if named or not takes:
        return pairs
    stages = [pair for pair in pairs if not any(m.stem for m in pair)]
    return stages[-1:] if takes == 'last' else stages


class DistillationTask(TrainingTask):
    """Cross-entropy and distillation terms: task_loss_weight · CE + distill_loss_weight · ramp · criterion
    + feature_loss_weight · feature ramp · method on features.

    A ramp is min(epoch / its warmup_epochs, 1), epoch 1-based, once :meth:`set_epoch` has been called.

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
        cache: of the teacher's logits; the teacher may then be None, unless features are distilled: its features are
            asked for in each step, and its logits still come from the cache.
        poison: changes the teacher's logits on a part of the training images, after the cache.
        features: of :func:`create_features`. None: no features are distilled.
        feature_loss_weight, feature_warmup_epochs: None for the published ones of the method's row.
        device, dtype, verbose: as in timm.

    Raises:
        ValueError: a criterion without a teacher or its cache, a method on features without a teacher, poison without a
            criterion.
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
        features: FeatureDistillation | None = None,
        feature_loss_weight: float | None = None,
        feature_warmup_epochs: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = False,
    ) -> None:
        device = device or next((p.device for p in student.parameters()), None)
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
        self._set_features(features, feature_loss_weight, feature_warmup_epochs)
        self.ramp = self.feature_ramp = 1.0
        self.to(self.device)

    def _set_features(self, features: FeatureDistillation | None, weight: float | None, ramp: int | None) -> None:
        if features is not None and self.teacher is None:
            raise ValueError('a method on features needs a teacher')
        self.features, self._wrapped = features, False
        self.feature_criterion = features.criterion if features is not None else None  # a module of this task
        row = FEATURES.get(getattr(self.feature_criterion, 'name', ''))
        self.feature_loss_weight = weight if weight is not None else row.weight if row else 1.0
        self.feature_warmup_epochs = ramp if ramp is not None else row.warmup_epochs if row else 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch (1-based), for the ramp and for a criterion that changes over the run."""
        self.ramp, self.feature_ramp = (
            min(epoch / n, 1.0) if n else 1.0 for n in (self.warmup_epochs, self.feature_warmup_epochs)
        )
        set_epoch = getattr(self.criterion, 'set_epoch', None)
        if set_epoch is not None:
            set_epoch(epoch)

    def criterion_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the criterion learns, for the optimizer (without weight decay). With several
        processes their gradients must be averaged by whoever steps: they are not in the student's DDP."""
        return _learned(self.criterion)

    def feature_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the layers of a method on features, for the optimizer, with the student's weight
        decay. Their gradients must be averaged likewise."""
        return _learned(self.feature_criterion)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the parameters whose gradients are clipped: the student's, and those of layers on its features."""
        return [*super().get_clip_parameters(exclude_head), *self.feature_parameters()]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the criteria's state, for checkpoints; empty where they learn nothing."""
        return {name: criterion.state_dict() for name, criterion in self._learning().items()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load what :meth:`get_task_state` returned."""
        state = state or {}
        for name, criterion in self._learning().items():
            if name in state:
                criterion.load_state_dict(state[name], strict=strict)
            elif strict:
                raise ValueError(f'the state of the task has no {name!r}, whose parameters this task learns')

    def _learning(self) -> dict[str, nn.Module]:
        both = {'criterion': self.criterion, 'features': self.feature_criterion}
        return {name: c for name, c in both.items() if isinstance(c, nn.Module) and _learned(c)}

    def module_to_wrap(self) -> nn.Module:
        """Return what is to be compiled and wrapped in DDP, and then to become ``trainable_module``: the student, or,
        where its features are wanted, a thin module that gives them with its logits in one call."""
        if self.features is None or self._wrapped:
            return self.trainable_module
        self._wrapped = True
        return WithFeatures(self.trainable_module, self.features.student)

    def unwrap(self, student: nn.Module) -> None:
        """Put the student back in place of what :meth:`module_to_wrap` returned."""
        self.trainable_module, self._wrapped = student, False

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> DistillationTask:
        """Wrap the student in DDP, and not the teacher. Returns the task."""
        self.eval_model = getattr(self, 'eval_model', self.trainable_module)
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.module_to_wrap(), device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(  # type: ignore[override]  # as in timm's TrainingTask
        self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the forward passes of student and teacher, and the criteria where they are modules. Returns the
        compiled student."""
        kwargs: dict[str, Any] = dict(backend=backend, mode=mode, **compile_kwargs)
        self.eval_model = cast(nn.Module, torch.compile(self.trainable_module, **kwargs))
        to_train = self.module_to_wrap()
        wraps = to_train is not self.trainable_module
        self.trainable_module = cast(nn.Module, torch.compile(to_train, **kwargs)) if wraps else self.eval_model
        if self.teacher is not None:
            self.teacher.compile(**kwargs)
        for criterion in (self.criterion, self.feature_criterion):
            if isinstance(criterion, nn.Module):
                criterion.compile(**kwargs)
        return self.eval_model

    def images(self, input: Tensor) -> Tensor:
        """Return the images that the networks see of a loader's batch: here the batch itself."""
        return input

    def ask_teacher(
        self, input: Tensor, target: Tensor | None = None, indices: Tensor | None = None, epoch: int | None = None
    ) -> tuple[Tensor | None, list[Tensor] | None]:
        """Return the teacher's logits `[B, C]` for an input of :meth:`forward`, poisoned where that is asked for, and
        its features, of one forward pass; None for what is not distilled.

        Args:
            target, indices, epoch: with a cache or poison: classes and indices of the images, and the epoch (1-based).

        Raises:
            ValueError: with a cache or poison, where one of these is not given.
        """
        if self.criterion is None and self.features is None:
            return None, None
        teacher: Any = self.teacher  # None only beside a cache, which is not given compute() then

        def pixels(chosen: Tensor | None = None) -> Tensor:
            images = input if chosen is None else input[chosen.to(input.device)]
            return self.normalize.inverse(images) if images.is_floating_point() else images

        logits, features = (None, None) if self.features is None else teacher.with_features(pixels())
        if self.criterion is None:
            return None, features

        def compute(chosen: Tensor | None = None) -> Tensor:
            if logits is None:
                return teacher(pixels(chosen))
            return logits if chosen is None else logits[chosen.to(logits.device)]

        if self.cache is None and self.poison is None:
            return compute(), features
        if target is None or indices is None or epoch is None:
            what = 'poison' if self.cache is None else 'a cache of logits'
            raise ValueError(f'{what} needs the classes and indices of the images, and the epoch')
        if self.cache is None:
            rows = compute()
        else:
            rows = self.cache.logits(epoch, indices, target, compute if teacher is not None else None)
        return rows if self.poison is None else self.poison(rows, indices, epoch), features

    def _student_outputs(self, input: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The student's outputs `[B, C]` for the cross-entropy and for the criterion, those of its two heads or twice
        the same; and its features, where they are distilled."""
        output, features = self._ask_student(input if input.is_floating_point() else self.normalize(input))
        main, distilled = outputs_of_heads(output)
        if self.criterion is None and distilled is not main:
            main = distilled = (main + distilled) / 2
        return main, distilled, features

    def _ask_student(self, x: Tensor) -> tuple[Any, list[Tensor]]:
        """Return what the student gives, and its features."""
        if self.features is None:
            return self.trainable_module(x), []
        if self._wrapped:
            return self.trainable_module(x)
        return forward_with_features(self.trainable_module, x, self.features.student)

    def forward(
        self,
        input: Tensor,
        target: Tensor | MixedTarget,
        teacher_logits: Tensor | None = None,
        teacher_features: Sequence[Tensor] | None = None,
        indices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One step's forward pass.

        Args:
            input: uint8 pixels, or floats normalised for the student, `[B, C, H, W]`.
            target: class indices `[B]`. Of mixed images a :class:`MixedTarget`: then each loss is
                λ · L(a) + (1-λ) · L(b), since a criterion like RLD needs the class, not a soft target.
            teacher_logits, teacher_features: of :meth:`ask_teacher`, where they are known already; None: they are
                computed.
            indices: with poison: of the images in the training split, `[B]`.

        Returns:
            `loss` (for backward), `output` (student logits `[B, C]`), `task_loss` (cross-entropy), `kd_loss` (the
            criterion, before weight and ramp), `feature_loss` (the method on features, likewise), the criterion's
            diagnostics, and with poison and indices :meth:`Poison.figures` (of mixed images, those of the first one);
            all but `output` are 0-d. Of two heads `output` is the main one's, and `main_top1` and `distill_top1` are
            the percentages that each has right.
        """
        if (self.criterion is not None and teacher_logits is None) or (self.features and teacher_features is None):
            logits_now, features_now = self.ask_teacher(input)
            teacher_logits = logits_now if teacher_logits is None else teacher_logits
            teacher_features = features_now if teacher_features is None else teacher_features
        output, distilled, features = self._student_outputs(input)
        logits, distilled_logits = _in_float32(output), _in_float32(distilled)
        task_loss = _mixed(target, lambda index: self.task_criterion(logits, index))
        result = {'loss': self.task_loss_weight * task_loss, 'output': output, 'task_loss': task_loss.detach()}
        if self.feature_criterion is not None:
            feature_loss = self.feature_criterion(features, teacher_features)
            result['loss'] = result['loss'] + self.feature_loss_weight * self.feature_ramp * feature_loss
            result['feature_loss'] = feature_loss.detach()
        criterion = self.criterion
        if criterion is None:
            return result
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


def _learned(criterion: Any) -> list[nn.Parameter]:
    """The parameters that a criterion learns, if it is a module."""
    return [p for p in criterion.parameters() if p.requires_grad] if isinstance(criterion, nn.Module) else []


def _in_float32(logits: Tensor) -> Tensor:
    """float16 and bfloat16 as float32."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _top1(logits: Tensor, target: Tensor | MixedTarget) -> Tensor:
    """Percentage of a batch in which the highest logit is that of the class, 0-d."""
    predicted = logits.detach().argmax(1)
    if isinstance(target, Tensor) and target.ndim == 2:  # soft
        target = target.argmax(1)
    return _mixed(target, lambda index: 100 * (predicted == index).float().mean())


def _mixed(target: Tensor | MixedTarget, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """loss(target), or λ · loss(a) + (1-λ) · loss(b) for a mixed target."""
    if isinstance(target, MixedTarget):
        return target.lam * loss(target.a) + (1 - target.lam) * loss(target.b)
    return loss(target)
