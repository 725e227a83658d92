"""A student and its teacher, by timm name, over the classes of a dataset."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UserError
from .class_map import check_order, output_names, resolve_class_map
from .heads import enable_distilled_training
from .query import ClosedTeacher
from .teacher import Floats, Normalize, Teacher, create_normalize, resized_to
from .weights import ModelInfo, build_model, first_line, head_size, load_into, load_weights, look_up, weights_origin


@dataclass
class Pair:
    """A student, its teacher, and what the student sees.

    Attributes:
        student: a timm model over the dataset's classes.
        teacher: None where nothing is distilled, or its answers are on the disk.
        normalize: the student's normalisation.
        data_config: the student's preprocessing: input_size, mean, std, interpolation, crop_pct, crop_mode.
        student_weights: where the weights come from that the student starts from (:func:`weights_origin`), or None.
    """

    student: nn.Module
    teacher: Teacher | ClosedTeacher | None
    normalize: Normalize
    data_config: dict[str, Any]
    student_weights: dict[str, str | None] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes of the dataset."""
        return cast(int, self.student.num_classes)

    @property
    def img_size(self) -> int | None:
        """Height and width of the images where they are equal, else None."""
        height, width = self.image_size
        return height if height == width else None

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        height, width = self.data_config['input_size'][-2:]
        return height, width

    def trained(self, teacher: bool) -> list[tuple[nn.Module, str, dict[str, Any]]]:
        """Return the networks that a run trains, each with its flag and preprocessing: the student, and where asked for
        the teacher."""
        found: list[tuple[nn.Module, str, dict[str, Any]]] = [(self.student, '--student', self.data_config)]
        if teacher:
            assert isinstance(self.teacher, Teacher), 'a pair without a teacher of its own'
            found.append((self.teacher.model, '--teacher', self.teacher_data_config))
        return found

    @property
    def teacher_data_config(self) -> dict[str, Any]:
        """The teacher's preprocessing on this dataset."""
        assert isinstance(self.teacher, Teacher), 'a pair without an open teacher'
        channels, *size = self.data_config['input_size']
        normalize = self.teacher.normalize
        mean, std = ((b.flatten() / 255).tolist() for b in (normalize.mean, normalize.std))
        return dict(
            self.data_config,
            input_size=(channels, *(normalize.size or size)),
            interpolation=normalize.interpolation if normalize.size else self.data_config['interpolation'],
            mean=_per_channel([round(v, 6) for v in mean], channels),
            std=_per_channel([round(v, 6) for v in std], channels),
        )


def create_student(
    name: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    in_chans: int = 3,
    img_size: int | None = None,
    mean: Floats | None = None,
    std: Floats | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    distill_token: bool = False,
    **kwargs: Any,
) -> Pair:
    """Build a student with a fresh head.

    Args:
        name: of a timm model.
        num_classes: of the dataset.
        pretrained: start from its published weights.
        img_size: size of the images; None for the model's.
        mean, std, interpolation, crop_pct: in place of the model's.
        distill_token: train its distillation head by the criterion (:func:`enable_distilled_training`).
        **kwargs: for the model's constructor, None is left out.

    Returns:
        A pair without a teacher.

    Raises:
        UserError: as :func:`look_up` and :func:`build_model`; where it has no distillation head to train.
    """
    from timm.data import resolve_input_data_config

    info = look_up(name, '--student')
    if img_size and info.config.get('fixed_input_size'):
        kwargs.setdefault('img_size', img_size)
    model = build_model(
        info, '--student', pretrained=pretrained, num_classes=num_classes, in_chans=in_chans,
        fix='--no-student-pretrained starts it from scratch.', **kwargs,
    )  # fmt: skip
    args = dict(img_size=img_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)
    config = resolve_input_data_config(model, {k: v for k, v in args.items() if v is not None})
    config['mean'], config['std'] = (_per_channel(config[k], in_chans) for k in ('mean', 'std'))
    _try_forward(model, config['input_size'], num_classes, f'--student {name}')
    if distill_token:
        enable_distilled_training(model, config['input_size'], f'--student {name}')
    origin = weights_origin(model, name) if pretrained else None
    return Pair(model, None, Normalize(config['mean'], config['std']), config, origin)


def create_teacher(
    name: str,
    num_classes: int,
    *,
    class_names: Sequence[str] | None = None,
    pretrained: bool = True,
    checkpoint: str | None = None,
    class_map: str | Sequence[int] | None = None,
    to_train: bool = False,
    in_chans: int = 3,
    image_size: tuple[int, int] = (224, 224),
    img_size: int | None = None,
    mean: Floats | None = None,
    std: Floats | None = None,
) -> Teacher:
    """Build a teacher over a dataset's classes, with weights that fit them.

    Args:
        name: a timm name, `hf-hub:user/model` or `local-dir:path`.
        num_classes, class_names: of the dataset.
        pretrained: use its published weights.
        checkpoint: a file of weights, in place of the published ones.
        class_map: `auto`, a JSON file, or a list: for each class of the dataset the teacher's output.
        to_train: it will be trained on this dataset first: a fresh head is what is wanted.
        in_chans: of the dataset.
        image_size: (H, W) of the images that the student sees.
        img_size: resize them to this size for the teacher; None: only where its network takes one size only.
        mean, std: in place of the model's.

    Returns:
        The teacher, on the CPU.

    Raises:
        UserError: where its head does not fit (timm would put a random one in its place), its weights cannot be
            loaded, or a class has no counterpart.
    """
    info = look_up(name, '--teacher')
    state = load_weights(checkpoint, '--teacher-checkpoint') if checkpoint else None
    outputs = num_classes
    if to_train:
        _check_to_train(class_map, checkpoint)
    else:
        outputs = _check_outputs(info, state, pretrained, class_map, num_classes, in_chans)
    published = class_map is None and not to_train and state is None
    names = output_names(info) if published and class_names else None  # that must be those of the dataset
    if names and class_names:
        check_order(class_names, names, info)
    index = resolve_class_map(class_map, info, outputs, num_classes, class_names)
    kwargs = dict(img_size=img_size) if img_size and info.config.get('fixed_input_size') else {}
    model = build_model(
        info, '--teacher', pretrained=pretrained and state is None and info.has_weights, num_classes=outputs,
        fix='--no-teacher-pretrained (with --teacher-epochs N) trains it from scratch on this dataset.',
        in_chans=in_chans, **kwargs,
    )  # fmt: skip
    if state is not None:
        load_into(model, state, f'--teacher-checkpoint {checkpoint} for --teacher {name}')
    normalize = create_normalize(model, mean=mean, std=std, img_size=img_size, image_size=image_size)
    teacher = Teacher(model, normalize, index, name)
    listed = names and info.label_names  # WordNet ids may have other words for the same class
    teacher.other_names = bool(listed and class_names and not set(class_names) & set(listed))
    size = normalize.size or image_size
    own = tuple(info.config.get('input_size', ())[-2:])
    if own and not to_train and (state is None or own < tuple(size)):  # a file may come from training at another size
        teacher.own_size = own
    _try_forward(model, (in_chans, *size), outputs, f'--teacher {name}')
    return teacher


def teacher_skeleton(
    name: str,
    num_classes: int,
    *,
    checkpoint: str | None = None,
    class_map: str | Sequence[int] | None = None,
    in_chans: int = 3,
    image_size: tuple[int, int] = (224, 224),
    img_size: int | None = None,
    **_: Any,
) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return the network of :func:`create_teacher` without weights, on torch's meta device, and the (C, H, W) that it
    takes: what its size can be told from where it is not loaded. Arguments as there."""
    info, outputs = look_up(name, '--teacher'), num_classes
    if class_map is not None:
        state = load_weights(checkpoint, '--teacher-checkpoint') if checkpoint else {}
        outputs = head_size(state, info.config) or info.num_classes
    kwargs = dict(img_size=img_size) if img_size and info.config.get('fixed_input_size') else {}
    with torch.device('meta'):
        model = build_model(
            info, '--teacher', pretrained=False, num_classes=outputs, in_chans=in_chans, fix='', **kwargs
        )
    return model, (in_chans, *(resized_to(info, img_size, image_size) or image_size))


def _check_to_train(class_map: str | Sequence[int] | None, checkpoint: str | None) -> None:
    if class_map is not None:
        raise UserError('--teacher-class-map: a teacher trained here has the classes of the dataset; remove it')
    if checkpoint:
        raise UserError('--teacher-checkpoint with --teacher-epochs: choose one of the two')


def _check_outputs(
    info: ModelInfo,
    state: dict[str, Tensor] | None,
    pretrained: bool,
    class_map: str | Sequence[int] | None,
    num_classes: int,
    in_chans: int,
) -> int:
    """Return how many outputs a teacher's weights have; UserError where they do not fit the dataset."""
    if state is not None:
        outputs = head_size(state, info.config) or num_classes
    elif not info.has_weights or not pretrained:
        why = 'no weights are published for it' if not info.has_weights else '--no-teacher-pretrained leaves it random'
        raise UserError(
            f'--teacher {info.name}: {why}. Give --teacher-epochs N to train it on this dataset first, or '
            '--teacher-checkpoint FILE'
        )
    else:
        outputs = info.num_classes
        channels = tuple(info.config.get('input_size', (3,)))[0]
        if channels != in_chans:
            raise UserError(
                f'--teacher {info.name}: its weights take images of {channels} channels, this run has {in_chans} '
                f'(--in-chans); give --in-chans {channels}, or --teacher-epochs N to train it on this dataset'
            )
    if class_map is None and outputs != num_classes:
        raise UserError(
            f'--teacher {info.name}: its head has {outputs} classes, the dataset {num_classes}; timm would put a '
            'random head in its place.\nGive --teacher-epochs N (train it on this dataset first), --teacher-checkpoint '
            f'FILE (weights for these classes), or --teacher-class-map auto|FILE (pick them from its {outputs})'
        )
    return outputs


def create_pair(
    teacher: str | None,
    student: str,
    num_classes: int,
    *,
    class_names: Sequence[str] | None = None,
    seed: int | None = None,
    in_chans: int = 3,
    img_size: int | None = None,
    train_teacher: bool = False,
    student_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Pair:
    """Build a student and its teacher by timm name.

    Args:
        teacher: None for a student alone.
        class_names, in_chans: of the dataset.
        seed: of torch's generator before each of the two, so that neither's start depends on the other; None leaves it.
        img_size: size of the images; None for the student's.
        train_teacher: the teacher will be trained on this dataset first.
        student_kwargs: for the student's constructor.
        **kwargs: `student_pretrained`, `mean`, `std`, `interpolation`, `crop_pct`, `distill_token`, as in
            :func:`create_student`; with `teacher_` before their name, the arguments of :func:`create_teacher`:
            `teacher_checkpoint`, ….

    Returns:
        The pair.

    Raises:
        UserError: as these two.
        TypeError: for an argument that neither has.

    Example:
        >>> pair = create_pair('resnet34', 'resnet18', num_classes=10, teacher_checkpoint='teacher.safetensors')
        >>> task = DistillationTask(pair.student, pair.teacher, create_distill_loss('rld'))
    """
    if unknown := kwargs.keys() - _PAIR_ARGUMENTS:
        raise TypeError(f"create_pair() got an unexpected keyword argument '{min(unknown)}'")
    of_teacher = {k.removeprefix('teacher_'): v for k, v in kwargs.items() if k.startswith('teacher_')}
    of_student = {k.removeprefix('student_'): v for k, v in kwargs.items() if not k.startswith('teacher_')}
    if seed is not None:
        torch.manual_seed(seed)
    pair = create_student(
        student, num_classes, in_chans=in_chans, img_size=img_size, **of_student, **check_kwargs(student_kwargs)
    )
    if seed is not None:
        torch.manual_seed(seed)
    if teacher is not None:
        pair.teacher = create_teacher(
            teacher, num_classes, class_names=class_names, to_train=train_teacher, in_chans=in_chans,
            image_size=pair.image_size, **of_teacher,
        )  # fmt: skip
    return pair


_PAIR_ARGUMENTS = {
    'student_pretrained', 'mean', 'std', 'interpolation', 'crop_pct', 'distill_token', 'teacher_pretrained',
    'teacher_checkpoint', 'teacher_class_map', 'teacher_img_size', 'teacher_mean', 'teacher_std',
}  # fmt: skip
_STUDENT_ARGUMENTS = set(inspect.signature(create_student).parameters) - {'kwargs'}


def check_kwargs(student_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of `--model-kwargs`, or raise UserError for one that has a flag of its own."""
    kwargs = student_kwargs or {}
    if taken := [k for k in kwargs if k in _STUDENT_ARGUMENTS]:
        raise UserError(f'--model-kwargs {taken[0]}: the run sets it; see the flags of that name')
    return kwargs


def audit(pair: Pair) -> list[str]:
    """Return lines that say where teacher and student differ."""
    teacher = pair.teacher
    lines: list[str] = []
    if not isinstance(teacher, Teacher):
        return lines
    for what in ('mean', 'std'):
        theirs, ours = ((getattr(n, what) / 255).flatten() for n in (teacher.normalize, pair.normalize))
        if not torch.allclose(theirs, ours):
            shown = (' '.join(f'{x:.4g}' for x in v.tolist()) for v in (theirs, ours))
            lines.append('normalisation ({}): teacher {}, student {}'.format(what, *shown))
    image_size = pair.image_size
    if size := teacher.normalize.size:
        h, w = image_size
        lines.append(f'size: the teacher sees the {h}×{w} images resized to {size[0]}×{size[1]}')
    made_for, sees = teacher.own_size, teacher.normalize.size or image_size
    if made_for and not 0.5 <= sees[0] / made_for[0] <= 2:
        lines.append(
            f'size: the weights of the teacher were trained at {made_for[0]}×{made_for[1]}, it sees '
            f'{sees[0]}×{sees[1]} (--teacher-img-size {made_for[0]} resizes)'
        )
    if teacher.other_names:
        lines.append("classes: none of the teacher's label names is one of the dataset's; they are used in order")
    if teacher.class_map is not None:
        lines.append(f"classes: {len(teacher.class_map)} of the teacher's {teacher.model.num_classes} outputs are used")
    return lines


def _try_forward(model: nn.Module, input_size: tuple[int, ...], num_classes: int, what: str) -> None:
    """One forward pass of a grey image, so that a size that a network cannot take shows before anything else."""
    training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, *input_size))
    except Exception as e:
        c, h, w = input_size
        raise UserError(f'{what}: cannot take images of {c}×{h}×{w} ({first_line(e)}); try another --img-size') from e
    finally:
        model.train(training)
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f'{what}: expected logits [1, {num_classes}], the model gives {shape}')


def _per_channel(values: Floats, in_chans: int) -> tuple[float, ...]:
    return tuple(values) * in_chans if len(values) == 1 else tuple(values)
