"""The table of settings: one row each, with all that is true of it. Every other list of settings is derived from it.

`None` means "not given": :mod:`timm_rld.config.resolve` fills it in.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


def setting(
    default: Any,
    group: str,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    gt: float | None = None,
    ge: float | None = None,
    le: float | None = None,
    lengths: tuple[int, ...] = (),
    alias: str = '',
    flag: bool = False,
    sample: Any = None,
    used_by: str = '',
    logits: bool | Callable[[Config], bool] = False,
    resumable: bool = False,
    path: bool | str = False,
    per_run: bool = False,
    belongs_to: str = '',
    evaluation: bool = False,
    in_epochs: bool = False,
) -> Any:
    """A row of the table: a field of :class:`Config`.

    Args:
        default: where neither the command line nor a file gives the setting.
        group: heading in `--help`.
        help: for `--help`.
        choices, gt, ge, le: bounds of the value, or of each of its values.
        lengths: how many values a list may have; any number if empty.
        alias: a short flag, as in timm.
        flag: a boolean that is on when the flag is given, with no `--no-` form (timm's `--no-aug`).
        sample: default on the sample dataset, in place of timm's.
        used_by: functions that take the setting as an argument, separated by spaces: `name`, or `name:argument` where
            the argument has another name (:meth:`Config.arguments_of`).
        logits: whether a cached logit of a training image depends on it (the augmentation, the compilation); or a
            function of the settings that returns this.
        resumable: whether a run may be resumed with another value: the result is the same.
        path: whether the value is a path; `'prefixed'` where a path may follow a prefix (`local-dir:`, `hfds/`).
        per_run: chosen for each run of a comparison.
        belongs_to: the setting whose choice this one completes. Where the command line changes that choice, a value
            from a file no longer applies.
        evaluation: whether `timm-rld evaluate` takes the setting too.
        in_epochs: whether the value counts epochs, so that a shorter run under the same schedule has a smaller one.
    """
    arguments = dict(entry.partition(':')[::2] for entry in used_by.split())
    metadata = dict(
        group=group, help=help, choices=choices, gt=gt, ge=ge, le=le, lengths=lengths, alias=alias, flag=flag,
        sample=sample, used_by=arguments, logits=logits, resumable=resumable, path=path, per_run=per_run,
        belongs_to=belongs_to, evaluation=evaluation, in_epochs=in_epochs,
    )  # fmt: skip
    factory = (lambda: dict(default)) if isinstance(default, dict) else None
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)


MODELS, DISTILL, GENERATED, DATA, AUG, OPTIM, SCHED, RUN, CKPT, HUB, OUT = (
    'teacher and student',
    'distillation',
    'generated images (--distill mekd)',
    'data',
    'augmentation',
    'optimizer',
    'learning rate',
    'devices and speed',
    'checkpoints and faults',
    'Hugging Face Hub',
    'output',
)
Floats = tuple[float, ...]


@dataclass(frozen=True)
class Origin:
    """Where those values of a :class:`Config` come from that nobody gave.

    Attributes:
        derived: names of the settings that :func:`timm_rld.config.resolve` filled in.
        processes, images: training processes and images that it knew of; None: it did not, or has not run.
        earlier: the settings of an earlier run, as its args.yaml has them, on which these build.
        resumed: whether that run is continued.
        flags: names of the settings that the command line gave.
    """

    derived: tuple[str, ...] = ()
    processes: int | None = None
    images: int | None = None
    earlier: Config | None = None
    resumed: bool = False
    flags: tuple[str, ...] = ()


@dataclass
class Config:
    """All settings of a run, under the names of timm's `train.py` where it has them. Each field's help says more."""

    # teacher and student
    teacher: str | None = setting(None, MODELS, 'teacher: a timm name, hf-hub:user/model or local-dir:path',
        used_by='create_teacher:name teacher_facts:name', path='prefixed')  # fmt: skip
    student: str | None = setting(None, MODELS, 'student: a timm name, hf-hub:user/model or local-dir:path',
        used_by='create_student:name', path='prefixed')  # fmt: skip
    teacher_checkpoint: str | None = setting(None, MODELS,
        'weights of the teacher, .safetensors or .pth (read with weights_only)',
        used_by='create_teacher:checkpoint teacher_facts:checkpoint', path=True)  # fmt: skip
    teacher_epochs: int | None = setting(None, MODELS,
        'train the teacher on this dataset for N epochs first; 0: do not', ge=0, sample=7,
        used_by='teacher_facts:epochs')  # fmt: skip
    teacher_lr: float | None = setting(None, MODELS, "learning rate of the teacher's training (default: --lr)", gt=0)
    teacher_pretrained: bool | None = setting(None, MODELS, 'use the published weights of the teacher (default: yes)',
        used_by='create_teacher:pretrained')  # fmt: skip
    teacher_class_map: str | None = setting(None, MODELS,
        "map the dataset's classes to the teacher's outputs: 'auto' (by label names) or a JSON file",
        used_by='create_teacher:class_map teacher_facts:class_map', path=True)  # fmt: skip
    min_teacher_acc: float | None = setting(None, MODELS,
        'stop if the top-1 %% of the teacher is below this (default: near chance); 0: never', ge=0, le=100,
        resumable=True)  # fmt: skip
    teacher_img_size: int | None = setting(None, MODELS,
        'resize images to this size for the teacher (default: only for fixed-size networks)', gt=0,
        used_by='create_teacher:img_size')  # fmt: skip
    teacher_mean: Floats | None = setting(None, MODELS, "normalisation of the teacher (default: its own config's)",
        used_by='create_teacher:mean')  # fmt: skip
    teacher_std: Floats | None = setting(None, MODELS, "normalisation of the teacher (default: its own config's)", gt=0,
        used_by='create_teacher:std')  # fmt: skip
    black_box: str | None = setting(None, MODELS,
        "a closed teacher, which answers with probabilities ('soft') or a class ('hard') and shows nothing else",
        choices=('soft', 'hard'), used_by='QueryTeacher:answers AnswersFile:answers check_poison',
        logits=lambda c: c.black_box is not None)  # fmt: skip
    teacher_query: str | None = setting(None, MODELS,
        'a closed teacher in place of --teacher: MODULE:FUNCTION takes images (uint8 NumPy [B, H, W, C]) and returns '
        'probabilities [B, C] or classes [B]', used_by='load_query:path',
        logits=lambda c: c.teacher_query is not None)  # fmt: skip
    teacher_answers: str | None = setting(None, MODELS,
        'a closed teacher in place of --teacher: a .parquet or .csv file with its answer for each image', path=True,
        used_by='AnswersFile:path gather_facts:answers')  # fmt: skip
    max_queries: int | None = setting(None, MODELS,
        'limit on the images sent to a closed teacher in one run, validation included; the run stops with a checkpoint '
        'before it is exceeded', gt=0, used_by='QueryTeacher:limit',
        resumable=True)  # fmt: skip
    query_retries: int = setting(3, MODELS, 'how often a call of --teacher-query that fails is repeated', ge=0,
        used_by='QueryTeacher:retries', resumable=True)  # fmt: skip
    query_timeout: float = setting(60.0, MODELS, 'seconds that a call of --teacher-query may take; 0: any time', ge=0,
        used_by='QueryTeacher:timeout', resumable=True)  # fmt: skip
    query_workers: int = setting(1, MODELS,
        'batches sent to --teacher-query ahead of their step; 0: each step waits for its answers',
        ge=0, used_by='QueryTeacher:workers', resumable=True)  # fmt: skip
    student_pretrained: bool = setting(False, MODELS,
        'start the student from its published weights, with a fresh head where the classes differ',
        used_by='create_student:pretrained')  # fmt: skip
    model_kwargs: dict = setting({}, MODELS, "further arguments for the student's constructor, as name=value")
    drop: float | None = setting(None, MODELS, 'dropout of the student', ge=0, le=1, used_by='create_student:drop_rate')
    drop_path: float | None = setting(None, MODELS, 'stochastic depth of the student', ge=0, le=1,
        used_by='create_student:drop_path_rate')  # fmt: skip

    # distillation
    distill: str = setting('rld', DISTILL, 'criterion, see the table below', per_run=True,
        used_by='published_defaults:name check_poison')  # fmt: skip
    distill_kwargs: dict = setting({}, DISTILL, "the criterion's options, as name=value: alpha=1 beta=8 temperature=4",
        belongs_to='distill')  # fmt: skip
    standardize: bool = setting(False, DISTILL,
        'standardise both logits first (z-score of each row); defaults: temperature 2, 9 times the weight',
        used_by='published_defaults')  # fmt: skip
    distill_token: bool = setting(False, DISTILL,
        'of a student with a distillation head (deit_*_distilled_*, levit_*, …) train that head by the criterion, the '
        'main one by cross-entropy; evaluation takes their mean',
        used_by='create_student published_defaults')  # fmt: skip
    task_loss_weight: float | None = setting(None, DISTILL, "weight of the cross-entropy (default: the criterion's)",
        ge=0, used_by='DistillationTask', belongs_to='distill')  # fmt: skip
    distill_loss_weight: float | None = setting(None, DISTILL,
        "weight of the distillation term (default: the criterion's)", ge=0, used_by='DistillationTask',
        belongs_to='distill')  # fmt: skip
    distill_warmup_epochs: int | None = setting(None, DISTILL,
        "ramp the distillation term by min(epoch / N, 1) (default: the criterion's share of the epochs)", ge=0,
        sample=3, used_by='DistillationTask:warmup_epochs', belongs_to='distill')  # fmt: skip
    feature_distill: str = setting('none', DISTILL, 'method on features, beside the criterion; see the table below',
        per_run=True, used_by='create_features:name published_defaults:features')  # fmt: skip
    feature_kwargs: dict = setting({}, DISTILL, "the method's options, as name=value: p=4",
        used_by='create_features:options', belongs_to='feature_distill')  # fmt: skip
    feature_loss_weight: float | None = setting(None, DISTILL,
        "weight of the term on features (default: the method's)", ge=0, used_by='DistillationTask',
        belongs_to='feature_distill')  # fmt: skip
    feature_warmup_epochs: int | None = setting(None, DISTILL,
        "ramp the term on features by min(epoch / N, 1) (default: the method's share of the epochs)", ge=0,
        used_by='DistillationTask', belongs_to='feature_distill')  # fmt: skip
    feature_stages: tuple[str, ...] = setting((), DISTILL,
        'maps to compare, as numbers of `forward_intermediates`: N, or S:T of student and teacher (default: the last '
        'of each size, paired from the deepest)', used_by='create_features:stages',
        belongs_to='feature_distill')  # fmt: skip
    teacher_cache: str | None = setting(None, DISTILL,
        "folder to cache the teacher's logits in: those of each augmented image are computed once",
        used_by='TeacherCache:folder create_features:cache', resumable=True, path=True)  # fmt: skip
    teacher_cache_views: int | None = setting(None, DISTILL,
        'augmented versions of each image: epoch e repeats those of epoch (e - 1) mod N + 1 (default: 10, or the '
        'epochs if fewer)', ge=1, used_by='TeacherCache:augmentation_epochs')  # fmt: skip
    teacher_cache_dtype: str = setting('float16', DISTILL, 'dtype of the cached logits',
        choices=('float16', 'bfloat16', 'float32'), used_by='TeacherCache:dtype')  # fmt: skip
    poison: str = setting('none', DISTILL,
        "attack the teacher's logits on a fraction of the training images, to study a criterion: shift each row's "
        'ranks (fdla), peak at the second class (pcfdla), reverse the ranks (fdpla), all zero, or noise',
        choices=('none', 'fdla', 'pcfdla', 'fdpla', 'zero', 'random'),
        used_by='check_poison:attack create_poison:attack')  # fmt: skip
    poison_fraction: float | None = setting(None, DISTILL, 'fraction of the training images to attack', gt=0,
        le=1, used_by='check_poison:fraction create_poison:fraction', belongs_to='poison')  # fmt: skip
    poison_strength: float | None = setting(None, DISTILL,
        'height of the peak of --poison pcfdla (default: 9), or deviation of --poison random (default: 1)',
        used_by='check_poison:strength create_poison:strength', belongs_to='poison')  # fmt: skip
    smoothing: float | None = setting(None, DISTILL, 'label smoothing of the cross-entropy (default: 0.1)', ge=0,
        le=0.99, used_by='DistillationTask')  # fmt: skip
    class_weights: str | None = setting(None, DISTILL,
        "weigh the classes in the student's cross-entropy: 'auto' (by inverse frequency), or a CSV file with a class "
        'and a weight per line', used_by='class_weights:weights gather_facts:weights', path=True)  # fmt: skip

    # generated images
    generator: str | None = setting(None, GENERATED,
        'a generator trained before, in place of phase 1: a run folder, its folder generator, or a file',
        used_by='read_generator:path', path=True, belongs_to='distill')  # fmt: skip
    generator_epochs: int | None = setting(None, GENERATED,
        'epochs of phase 1, which trains the generator on the training images (default: 200)', ge=1,
        used_by='generator_settings:epochs', belongs_to='generator')  # fmt: skip
    generator_kwargs: dict = setting({}, GENERATED,
        'settings of phase 1, as name=value: batch_size=64 lr=2e-4 info_weight=0.5 info=paper img_size=32',
        used_by='generator_settings:options', belongs_to='generator')  # fmt: skip
    steps_per_epoch: int | None = setting(None, GENERATED,
        'optimizer steps of an epoch of the student, on generated images (default: 500)', ge=1,
        belongs_to='distill')  # fmt: skip

    # data
    dataset: str | None = setting(None, DATA,
        'hfds/NAME_OR_PATH, hfids/NAME (streaming), wds/…, torch/NAME; default: folders in --data-dir',
        used_by='open_splits open_validation', path='prefixed', evaluation=True)  # fmt: skip
    data_dir: str | None = setting(None, DATA, 'root folder (or cache folder of an hfds/, hfids/ --dataset)',
        used_by='open_splits open_validation', path=True, evaluation=True)  # fmt: skip
    train_split: str | None = setting(None, DATA, 'name of the training split (default: train, training)',
        sample='train', used_by='open_splits')  # fmt: skip
    val_split: str | None = setting(None, DATA,
        'name of the validation split (default: the first there is of validation, val, valid, eval, evaluation, dev, '
        'test)',
        sample='test', used_by='open_splits open_validation', belongs_to='val_fraction', evaluation=True)  # fmt: skip
    val_fraction: float | None = setting(None, DATA,
        'hold out this fraction of each class of the training split for validation', gt=0, le=0.99,
        used_by='open_splits')  # fmt: skip
    val_seed: int | None = setting(None, DATA, 'which part --val-fraction takes (default: --seed)', ge=0,
        used_by='open_splits')  # fmt: skip
    labels: str | None = setting(None, DATA,
        'table with a row for each image, .csv or .parquet: path, label, split; in place of class folders',
        used_by='open_splits open_validation', path=True, evaluation=True)  # fmt: skip
    drop_unlabeled: bool = setting(False, DATA, 'leave out images whose label is missing (None or -1)', flag=True,
        used_by='open_splits open_validation', evaluation=True)  # fmt: skip
    tune_holdout: float | None = setting(None, DATA,
        'validate on this share of the training split, held out of each class, and do not open the validation split: '
        'how `timm-rld tune` compares candidates', gt=0, le=0.5, used_by='open_splits', per_run=True)  # fmt: skip
    train_on_holdout: bool = setting(False, DATA,
        'train on the share of --tune-holdout too, as the teacher of `timm-rld tune` does', flag=True,
        used_by='open_splits', per_run=True)  # fmt: skip
    train_fraction: float | None = setting(None, DATA,
        'train on this share of the training images alone, drawn by --seed (a teacher trained here has them all)',
        gt=0, le=1, used_by='open_splits')  # fmt: skip
    train_num_samples: int | None = setting(None, DATA,
        'number of images of a streamed training split, where the dataset does not give it', gt=0,
        used_by='open_splits')  # fmt: skip
    val_num_samples: int | None = setting(None, DATA,
        'number of images of a streamed validation split, where the dataset does not give it', gt=0,
        used_by='open_splits open_validation', evaluation=True)  # fmt: skip
    dataset_download: bool = setting(False, DATA, 'let torch/ and hfids/ datasets download', flag=True,
        used_by='open_splits open_validation', resumable=True, evaluation=True)  # fmt: skip
    num_classes: int | None = setting(None, DATA, 'number of classes, where the dataset does not give it', ge=2,
        used_by='open_splits open_validation', evaluation=True)  # fmt: skip
    class_map: str | None = setting(None, DATA, 'class-to-index file of the dataset (.txt), as in timm',
        used_by='open_splits open_validation', path=True, evaluation=True)  # fmt: skip
    input_key: str | None = setting(None, DATA,
        'image column (default: image); of --labels, the column with the paths (default: path, file, image, …)',
        used_by='open_splits open_validation', belongs_to='dataset', evaluation=True)  # fmt: skip
    target_key: str | None = setting(None, DATA,
        'label column (default: label); of --labels (default: label, class, target, …)',
        used_by='open_splits open_validation', belongs_to='dataset', evaluation=True)  # fmt: skip
    in_chans: int = setting(3, DATA, 'image channels: 3 (RGB) or 1 (grey)', choices=('1', '3'),
        used_by='open_splits open_validation create_student create_teacher')  # fmt: skip
    img_size: int | None = setting(None, DATA, "image size (default: the student's)", gt=0, sample=32,
        used_by='create_student check_data:image_size')  # fmt: skip
    mean: Floats | None = setting(None, DATA, "normalisation of the student (default: its own config's)",
        used_by='create_student')  # fmt: skip
    std: Floats | None = setting(None, DATA, "normalisation of the student (default: its own config's)", gt=0,
        used_by='create_student')  # fmt: skip
    interpolation: str | None = setting(None, DATA, "resize of validation images (default: the student's)",
        choices=('bilinear', 'bicubic', 'nearest'), used_by='create_student')  # fmt: skip
    crop_pct: float | None = setting(None, DATA,
        "center crop of validation images (default: the student's; 1 with pad crops)", gt=0, le=1,
        used_by='create_student')  # fmt: skip
    batch_size: int | None = setting(None, DATA, 'images per process and step (default: 128)', gt=0, alias='b',
        sample=64, used_by='open_splits create_loaders')  # fmt: skip
    validation_batch_size: int | None = setting(None, DATA, 'default: --batch-size', gt=0,
        used_by='open_splits open_validation create_loaders')  # fmt: skip
    workers: int | Literal['auto'] | None = setting(None, DATA,
        "loader processes per training process (default: 4, or the cores if fewer); 'auto': its share of the cores "
        'but one', ge=0, alias='j', used_by='create_loaders', resumable=True, evaluation=True)  # fmt: skip
    jpeg_draft: bool = setting(False, DATA,
        'decode JPEGs at 1/2, 1/4 or 1/8 scale where twice the pixels needed remain; pixels differ by less than one '
        'grey value on average', flag=True, used_by='create_loaders', logits=True, evaluation=True)  # fmt: skip
    no_exif: bool = setting(False, DATA,
        'leave photographs as they are stored, as timm does, whatever orientation their EXIF data gives', flag=True,
        used_by='open_splits open_validation', logits=True, evaluation=True)  # fmt: skip
    skip_list: str | None = setting(None, DATA,
        'file with images to leave out of training and validation, one path per line (below --data-dir, or absolute)',
        used_by='open_splits open_validation', resumable=True, path=True, evaluation=True)  # fmt: skip
    seed: int = setting(42, DATA, 'seed of weights, order and augmentation', ge=0, le=2**32 - 1024,
        used_by='open_splits open_validation create_loaders Mixup create_features create_poison',
        per_run=True)  # fmt: skip

    # augmentation
    no_aug: bool = setting(False, AUG, 'no augmentation', flag=True, used_by='create_loaders', logits=True)
    train_crop_mode: str | None = setting(None, AUG,
        'random resized crop (rrc, default), resize-keep-ratio (rkrc, rkrr), or pad and crop (pad)',
        choices=('rrc', 'rkrc', 'rkrr', 'pad'), sample='pad', used_by='create_loaders', logits=True)  # fmt: skip
    crop_padding: int = setting(4, AUG, 'pixels of padding with --train-crop-mode pad', ge=0, used_by='create_loaders',
        logits=lambda c: c.train_crop_mode == 'pad')  # fmt: skip
    scale: Floats | None = setting(None, AUG, 'random resize scale (default: 0.08 1.0)', gt=0, lengths=(2,),
        used_by='create_loaders', logits=True)  # fmt: skip
    ratio: Floats | None = setting(None, AUG, 'random resize aspect ratio (default: 0.75 1.33)', gt=0, lengths=(2,),
        used_by='create_loaders', logits=True)  # fmt: skip
    hflip: float | None = setting(None, AUG, 'probability of a horizontal flip (default: 0.5)', ge=0, le=1, sample=0.0,
        used_by='create_loaders', logits=True)  # fmt: skip
    vflip: float = setting(0.0, AUG, 'probability of a vertical flip', ge=0, le=1, used_by='create_loaders',
        logits=True)  # fmt: skip
    color_jitter: float | None = setting(None, AUG, 'color jitter factor (default: 0.4)', ge=0, sample=0.0,
        used_by='create_loaders', logits=True)  # fmt: skip
    aa: str | None = setting(None, AUG, "AutoAugment policy, e.g. 'rand-m9-mstd0.5' or 'original'",
        used_by='create_loaders', logits=True)  # fmt: skip
    train_interpolation: str = setting('random', AUG, 'resize of training images',
        choices=('random', 'bilinear', 'bicubic'), used_by='create_loaders', logits=True)  # fmt: skip
    reprob: float = setting(0.0, AUG, 'random erasing probability', ge=0, le=1, used_by='create_loaders', logits=True)
    remode: str = setting('pixel', AUG, 'random erasing fill', choices=('const', 'rand', 'pixel'),
        used_by='create_loaders', logits=lambda c: c.reprob > 0)  # fmt: skip
    recount: int = setting(1, AUG, 'random erasing count', gt=0, used_by='create_loaders',
        logits=lambda c: c.reprob > 0)  # fmt: skip
    mixup: float = setting(0.0, AUG, 'mixup alpha, 0: off', ge=0, used_by='Mixup')
    cutmix: float = setting(0.0, AUG, 'cutmix alpha, 0: off', ge=0, used_by='Mixup')
    cutmix_minmax: Floats | None = setting(None, AUG, 'cutmix min/max ratio, in place of alpha', gt=0, le=1,
        lengths=(2,), used_by='Mixup')  # fmt: skip
    mixup_prob: float = setting(1.0, AUG, 'probability of mixup or cutmix in a batch', ge=0, le=1, used_by='Mixup:prob')
    mixup_switch_prob: float = setting(0.5, AUG, 'probability of cutmix where both are on', ge=0, le=1,
        used_by='Mixup:switch_prob')  # fmt: skip
    mixup_off_epoch: int = setting(0, AUG, 'turn mixup and cutmix off from this epoch on, 0: never', ge=0,
        used_by='Mixup:off_epoch', in_epochs=True)  # fmt: skip

    # optimizer
    opt: str = setting('sgd', OPTIM, "any optimizer of timm; 'sgd' is Nesterov, 'momentum' is plain")
    momentum: float = setting(0.9, OPTIM, 'momentum', ge=0)
    weight_decay: float = setting(2e-5, OPTIM, 'weight decay', ge=0)
    weight_decay_all: bool = setting(False, OPTIM, 'weight decay on biases and norms too (timm leaves them out)')
    opt_eps: float | None = setting(None, OPTIM, "epsilon (default: the optimizer's)", gt=0)
    opt_betas: Floats | None = setting(None, OPTIM, "betas (default: the optimizer's)", ge=0)
    opt_kwargs: dict = setting({}, OPTIM, 'further arguments of the optimizer, as name=value')
    clip_grad: float | None = setting(None, OPTIM, 'clip gradients at this value (default: no clipping)', gt=0,
        sample=5.0)  # fmt: skip
    clip_mode: str = setting('norm', OPTIM, 'how to clip', choices=('norm', 'value', 'agc'))
    grad_accum_steps: int | None = setting(None, OPTIM, 'batches per optimizer step (default: 1)', gt=0,
        used_by='create_loaders')  # fmt: skip
    model_ema: bool = setting(False, OPTIM, 'keep a moving average of the weights')
    model_ema_decay: float = setting(0.9998, OPTIM, 'decay of the moving average', ge=0, le=1)
    model_ema_warmup: bool = setting(False, OPTIM, 'warm the decay up')

    # learning rate
    epochs: int | None = setting(None, SCHED,
        'epochs of the student (default: 300); 0: train the teacher alone (--teacher-epochs)', ge=0,
        sample=11, used_by='published_defaults')  # fmt: skip
    lr: float | None = setting(None, SCHED,
        'learning rate (default: lr-base scaled to the global batch, or to the images of an epoch if fewer)',
        gt=0)  # fmt: skip
    lr_base: float | None = setting(None, SCHED,
        "learning rate at a global batch of lr-base-size (default: the optimizer's: sgd 0.1, adamw 0.0007, …)",
        gt=0, sample=0.2)  # fmt: skip
    lr_base_size: int = setting(256, SCHED, 'see lr-base', gt=0)
    lr_base_scale: str | None = setting(None, SCHED,
        "how the learning rate grows with the batch (default: the optimizer's; sgd linear, adamw sqrt)",
        choices=('linear', 'sqrt'))  # fmt: skip
    sched: str = setting('cosine', SCHED, 'schedule of timm',
        choices=('cosine', 'multistep', 'step', 'poly', 'tanh', 'wsd', 'rsqrt', 'constant', 'none'))  # fmt: skip
    sched_on_updates: bool | None = setting(None, SCHED,
        'change the learning rate at each update rather than each epoch (default: no)', sample=True)  # fmt: skip
    warmup_epochs: int | None = setting(None, SCHED, 'epochs of warm-up (default: 5, at most a tenth of the run)', ge=0,
        in_epochs=True)  # fmt: skip
    warmup_lr: float = setting(1e-5, SCHED, 'learning rate at the start of the warm-up', ge=0)
    min_lr: float = setting(0.0, SCHED, 'lowest learning rate', ge=0)
    decay_epochs: float | None = setting(None, SCHED, 'interval of step, length of the decay of wsd and rsqrt', gt=0,
        in_epochs=True)  # fmt: skip
    decay_milestones: tuple[int, ...] = setting((90, 180, 270), SCHED,
        'epochs (the first is 1) in which multistep lowers the learning rate', gt=0, in_epochs=True)  # fmt: skip
    decay_rate: float = setting(0.1, SCHED, 'factor of step and multistep, power of poly', gt=0, le=10)
    cooldown_epochs: int = setting(0, SCHED, 'epochs at the lowest learning rate after the schedule', ge=0,
        in_epochs=True)  # fmt: skip

    # devices and speed
    mixed_precision: str | None = setting(None, RUN, 'default: that of `accelerate launch`, else no',
        choices=('no', 'fp16', 'bf16'), used_by='create_accelerator', evaluation=True)  # fmt: skip
    channels_last: bool | None = setting(None, RUN, 'memory layout (default: yes, except on GPUs in full precision)',
        evaluation=True)  # fmt: skip
    sync_bn: bool = setting(False, RUN, 'batch norm over all processes (GPUs)', flag=True, used_by='create_accelerator')
    torchcompile: bool = setting(False, RUN, 'compile student, teacher and criterion', flag=True,
        logits=lambda c: c.teacher_query is None)  # fmt: skip
    cpu_threads: int | None = setting(None, RUN, 'threads of a process on the CPU (default: cores / local processes)',
        gt=0, used_by='create_accelerator', evaluation=True)  # fmt: skip

    # checkpoints and faults
    resume: str | None = setting(None, CKPT,
        "resume a run: 'auto' (that of --output/--experiment), a run folder, or one of its checkpoints", resumable=True,
        path=True, per_run=True)  # fmt: skip
    checkpoint_interval: str = setting('epoch', CKPT,
        "'epoch', or a number of optimizer steps; a checkpoint is also written every 15 minutes",
        resumable=True)  # fmt: skip
    checkpoint_hist: int = setting(2, CKPT, 'how many of the newest checkpoints to keep, beside the best', gt=0,
        resumable=True)  # fmt: skip
    best_by: str = setting('top1', CKPT,
        'what makes an epoch the best: highest top-1, highest macro accuracy (mean over the classes), or lowest loss, '
        'on the validation split', choices=('top1', 'macro', 'loss'))  # fmt: skip
    skip_nonfinite: int = setting(0, CKPT,
        'skip up to N steps in a row whose loss or gradient is not finite; 0: stop at the first', ge=0,
        resumable=True)  # fmt: skip
    on_bad_image: str = setting('error', CKPT,
        'unreadable training image: stop, or replace it with another and list it', choices=('error', 'skip'),
        resumable=True)  # fmt: skip

    # Hub
    push_to_hub: bool = setting(False, HUB,
        'push the student to the Hub at the end; token and repository are checked before',
        resumable=True)  # fmt: skip
    hub_model_id: str | None = setting(None, HUB, 'repository: user/name, or name (default: <student>-<distill>)',
        used_by='check_hub push_run BackgroundPush', resumable=True)  # fmt: skip
    hub_private_repo: bool = setting(False, HUB, 'make a new repository private', flag=True,
        used_by='check_hub:private push_run', resumable=True)  # fmt: skip
    hub_license: str | None = setting(None, HUB,
        "license in the model card; check what data and teacher require (default: that of the student's pretrained "
        'weights, else apache-2.0; an existing card keeps its own)',
        used_by='check_hub:license push_run BackgroundPush', resumable=True)  # fmt: skip
    hub_strategy: str = setting('end', HUB,
        "push at the 'end' alone, also after each new 'best' epoch, or after 'every_save' (each epoch that is saved)",
        choices=('end', 'best', 'every_save'), used_by='BackgroundPush', resumable=True)  # fmt: skip
    hub_weights: str = setting('last', HUB,
        'which weights: of the last epoch, the best on the validation split, or the moving average',
        choices=('last', 'best', 'ema'), used_by='push_run BackgroundPush', resumable=True)  # fmt: skip

    # output
    output: str | None = setting(None, OUT, 'parent of the run folder (default: ./output)', resumable=True, path=True,
        per_run=True)  # fmt: skip
    experiment: str | None = setting(None, OUT, 'name of the run folder (default: <time>-<student>-<distill>)',
        resumable=True, path=True, per_run=True)  # fmt: skip
    no_predictions: bool = setting(False, OUT,
        'do not write predictions.parquet (of student and teacher, for each validation image)', flag=True,
        resumable=True)  # fmt: skip
    no_speed: bool = setting(False, OUT,
        'do not measure the latency of the networks, which takes a few seconds', flag=True,
        resumable=True, evaluation=True)  # fmt: skip
    log_interval: int = setting(50, OUT, 'steps between progress lines', gt=0, resumable=True)
    report_to: tuple[str, ...] = setting((), OUT, 'trackers of Accelerate: tensorboard, wandb, …',
        used_by='create_accelerator', resumable=True)  # fmt: skip
    debug: bool = setting(False, OUT, 'show tracebacks', flag=True, resumable=True)

    @property
    def origin(self) -> Origin:
        """Where derived values come from. It is no setting, so no field."""
        return self.__dict__.get('_origin', Origin())

    @origin.setter
    def origin(self, origin: Origin) -> None:
        self.__dict__['_origin'] = origin

    @property
    def teacher_name(self) -> str | None:
        """What is distilled from: a network, a function or a file of answers; None where there is nothing."""
        return self.teacher or self.teacher_query or (self.teacher_answers and os.path.basename(self.teacher_answers))

    def give(self, **values: Any) -> None:
        """Set values that are not to be derived any more."""
        for name, value in values.items():
            setattr(self, name, value)
        self.origin = dataclasses.replace(
            self.origin, derived=tuple(name for name in self.origin.derived if name not in values)
        )

    def changed(self, **values: Any) -> Config:
        """Return a copy with other values of some settings, and the same :attr:`origin`."""
        c = copy.copy(self)
        for name, value in values.items():
            setattr(c, name, value)
        return c

    def pick(self, *names: str) -> dict[str, Any]:
        """Return some settings as keyword arguments."""
        return {name: getattr(self, name) for name in names}

    def arguments_of(self, function: str) -> dict[str, Any]:
        """Return the arguments that a function takes from the settings (``used_by``), by its own names for them."""
        return {
            f.metadata['used_by'][function] or f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if function in f.metadata['used_by']
        }

    def arguments_of_each(self, *functions: str) -> dict[str, dict[str, Any]]:
        """Return :meth:`arguments_of` of some functions, by function."""
        return {function: self.arguments_of(function) for function in functions}

    @property
    def method(self) -> str:
        """What the student learns by, for names of runs: `rld`, with features `rld-at`."""
        return self.distill if self.feature_distill == 'none' else f'{self.distill}-{self.feature_distill}'

    def of_logits(self) -> dict[str, Any]:
        """Return the settings that a cached logit of a training image depends on, by flag."""
        marks = ((f.name, f.metadata['logits']) for f in dataclasses.fields(self))
        return {flag_of(n): getattr(self, n) for n, mark in marks if (mark(self) if callable(mark) else mark)}

    def of_teacher(self) -> Config:
        """Return the settings for training the teacher."""
        return dataclasses.replace(
            self, epochs=self.teacher_epochs, lr=self.teacher_lr or self.lr, teacher_cache=None,
            teacher_cache_views=None, feature_distill='none',
        )  # fmt: skip

    def with_absolute_paths(self) -> Config:
        """Return a copy whose paths, where they lead somewhere, do not depend on the working directory."""
        paths: dict[str, Any] = {
            f.name: absolute(getattr(self, f.name), prefixed=f.metadata['path'] == 'prefixed')
            for f in dataclasses.fields(self) if f.metadata['path']
        }  # fmt: skip
        return dataclasses.replace(self, **paths)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def marked(mark: str, value: Any = True, settings: type[Config] = Config) -> list[str]:
    """Return the names of the settings whose rows carry a mark, e.g. ``marked('resumable')``."""
    return [f.name for f in dataclasses.fields(settings) if f.metadata[mark] == value]


def completing(choice: str) -> list[str]:
    """Return the names of the settings that complete a choice (``belongs_to``), and of those that complete theirs."""
    own = marked('belongs_to', choice)
    return [*own, *(deeper for name in own for deeper in completing(name))]


def taken_by(*functions: str) -> list[str]:
    """Return the names of the settings that some functions take as arguments (``used_by``)."""
    return [name for name, f in FIELDS.items() if not f.metadata['used_by'].keys().isdisjoint(functions)]


def flag_of(name: str) -> str:
    """Return the flag of a setting: `grad_accum_steps` → `--grad-accum-steps`."""
    return '--' + name.replace('_', '-')


def absolute(value: str | None, prefixed: bool = False) -> str | None:
    """Return a path that exists as an absolute one, and any other text as it is.

    Args:
        prefixed: the path may follow a prefix: `local-dir:PATH`, `hfds/PATH`.
    """
    prefix, path = '', value or ''
    if prefixed:
        separator = next((s for s in (':', '/') if s in path), '')
        prefix, _, path = path.partition(separator) if separator else (path, '', '')
        prefix += separator
    expanded = os.path.expanduser(path)
    return prefix + os.path.abspath(expanded) if path and os.path.exists(expanded) else value
