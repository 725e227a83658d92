"""The settings of a run: one dataclass, read from YAML and the command line, written back as YAML.

`None` means "not said": :func:`resolve` fills it in. The command line wins over the file. Both are strict: an unknown
flag or key, or a value of the wrong type, is an error that offers the nearest name.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import os
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from .errors import UsageError, did_you_mean


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
) -> Any:
    """A field of :class:`Config`: its default, the heading it stands under in `--help`, its help, and its bounds.

    Args:
        flag: a boolean that is on when the flag is given, with no `--no-` form (timm's `--no-aug`).
        lengths: how many values a list may have; any number if empty.
        alias: a short flag, as in timm.
    """
    metadata = dict(group=group, help=help, choices=choices, gt=gt, ge=ge, le=le, lengths=lengths, alias=alias)
    metadata['flag'] = flag
    factory = (lambda: dict(default)) if isinstance(default, dict) else None
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)


MODELS, DISTILL, DATA, AUG, OPTIM, SCHED, RUN, CKPT, HUB, OUT = (
    'teacher and student',
    'distillation',
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


@dataclass
class Config:
    """All settings of a run, under the names of timm's `train.py` where it has them. Each field's help says more."""

    # teacher and student
    teacher: str | None = setting(None, MODELS, 'teacher: a timm name, hf-hub:user/model or local-dir:path')
    student: str | None = setting(None, MODELS, 'student: a timm name, hf-hub:user/model or local-dir:path')
    teacher_checkpoint: str | None = setting(
        None, MODELS, 'weights of the teacher, .safetensors or .pth (read with weights_only)'
    )
    teacher_epochs: int | None = setting(
        None, MODELS, 'fit the teacher on this dataset for N epochs first; 0: do not fit', ge=0
    )
    teacher_lr: float | None = setting(None, MODELS, "learning rate of the teacher's fit (default: --lr)", gt=0)
    teacher_pretrained: bool | None = setting(None, MODELS, 'use the published weights of the teacher (default: yes)')
    teacher_class_map: str | None = setting(
        None, MODELS, "map the dataset's classes to the teacher's outputs: 'auto' (by label names) or a JSON file"
    )
    min_teacher_acc: float | None = setting(
        None, MODELS, 'stop if the top-1 %% of the teacher is below this (default: near chance); 0: never',
        ge=0, le=100,
    )  # fmt: skip
    teacher_img_size: int | None = setting(
        None, MODELS, 'resize the view to this size for the teacher (default: only for fixed-size networks)', gt=0
    )
    teacher_mean: Floats | None = setting(None, MODELS, "normalisation of the teacher (default: its own config's)")
    teacher_std: Floats | None = setting(None, MODELS, "normalisation of the teacher (default: its own config's)", gt=0)
    student_pretrained: bool = setting(
        False, MODELS, 'start the student from its published weights, with a fresh head where the classes differ'
    )
    model_kwargs: dict = setting({}, MODELS, "further arguments for the student's constructor, as name=value")
    drop: float | None = setting(None, MODELS, 'dropout of the student', ge=0, le=1)
    drop_path: float | None = setting(None, MODELS, 'stochastic depth of the student', ge=0, le=1)

    # distillation
    distill: str = setting('rld', DISTILL, 'criterion, see the table below')
    distill_kwargs: dict = setting({}, DISTILL, "the criterion's options, as name=value: alpha=1 beta=8 temperature=4")
    standardize: bool = setting(
        False,
        DISTILL,
        'standardise both logits first (z-score of each row); temperature 2 and 9 times the weight unless given',
    )
    task_loss_weight: float | None = setting(
        None, DISTILL, "weight of the cross-entropy (default: the criterion's)", ge=0
    )
    distill_loss_weight: float | None = setting(
        None, DISTILL, "weight of the distillation term (default: the criterion's)", ge=0
    )
    distill_warmup_epochs: int | None = setting(
        None, DISTILL, "ramp the distillation term by min(epoch / N, 1) (default: the criterion's)", ge=0
    )
    teacher_cache: str | None = setting(
        None, DISTILL, "folder to keep the teacher's logits in: each view of an image is computed once"
    )
    teacher_cache_views: int | None = setting(
        None, DISTILL, 'epoch e sees the images of epoch (e - 1) mod N + 1 again (default: 10, or the epochs if fewer)',
        ge=1,
    )  # fmt: skip
    teacher_cache_dtype: str = setting(
        'float16', DISTILL, 'of the kept logits', choices=('float16', 'bfloat16', 'float32')
    )
    smoothing: float | None = setting(
        None, DISTILL, 'label smoothing of the cross-entropy (default: 0.1)', ge=0, le=0.99
    )

    # data
    dataset: str | None = setting(
        None, DATA, 'hfds/NAME_OR_PATH, hfids/NAME (streaming), wds/…, torch/NAME; default: folders in --data-dir'
    )
    data_dir: str | None = setting(None, DATA, 'root folder (or cache folder of an hfds/, hfids/ --dataset)')
    train_split: str | None = setting(None, DATA, 'name of the training split (default: train)')
    val_split: str | None = setting(None, DATA, 'name of the validation split (default: validation)')
    train_num_samples: int | None = setting(
        None, DATA, 'length of a streamed training split that does not say it', gt=0
    )
    val_num_samples: int | None = setting(
        None, DATA, 'length of a streamed validation split that does not say it', gt=0
    )
    dataset_download: bool = setting(False, DATA, 'let torch/ and hfids/ datasets download', flag=True)
    num_classes: int | None = setting(None, DATA, 'number of classes, where the dataset does not say it', ge=2)
    class_map: str | None = setting(None, DATA, 'class-to-index file of the dataset (.txt), as in timm')
    input_key: str | None = setting(None, DATA, 'image column (default: image)')
    target_key: str | None = setting(None, DATA, 'label column (default: label)')
    in_chans: int = setting(3, DATA, 'image channels: 3 (RGB) or 1 (grey)', choices=('1', '3'))
    img_size: int | None = setting(None, DATA, "size of the view (default: the student's)", gt=0)
    mean: Floats | None = setting(None, DATA, "normalisation of the student (default: its own config's)")
    std: Floats | None = setting(None, DATA, "normalisation of the student (default: its own config's)", gt=0)
    interpolation: str | None = setting(
        None, DATA, "resize of validation images (default: the student's)", choices=('bilinear', 'bicubic', 'nearest')
    )
    crop_pct: float | None = setting(
        None, DATA, "center crop of validation images (default: the student's; 1 with pad crops)", gt=0, le=1
    )
    batch_size: int | None = setting(None, DATA, 'images per process and step (default: 128)', gt=0, alias='b')
    validation_batch_size: int | None = setting(None, DATA, 'default: --batch-size', gt=0)
    workers: int | Literal['auto'] | None = setting(
        None, DATA, "loader processes per training process (default: 4, or the cores if fewer); 'auto': its share of "
        'the cores but one', ge=0, alias='j',
    )  # fmt: skip
    jpeg_draft: bool = setting(
        False, DATA, 'decode JPEGs at 1/2, 1/4 or 1/8 scale where twice the pixels needed remain; views differ by '
        'less than one grey value on average', flag=True,
    )  # fmt: skip
    seed: int = setting(42, DATA, 'of weights, order and augmentation', ge=0, le=2**32 - 1024)

    # augmentation
    no_aug: bool = setting(False, AUG, 'no augmentation', flag=True)
    train_crop_mode: str | None = setting(
        None, AUG, 'random resized crop (rrc, default), resize-keep-ratio (rkrc, rkrr), or pad and crop (pad)',
        choices=('rrc', 'rkrc', 'rkrr', 'pad'),
    )  # fmt: skip
    crop_padding: int = setting(4, AUG, 'pixels of padding with --train-crop-mode pad', ge=0)
    scale: Floats | None = setting(None, AUG, 'random resize scale (default: 0.08 1.0)', gt=0, lengths=(2,))
    ratio: Floats | None = setting(None, AUG, 'random resize aspect ratio (default: 0.75 1.33)', gt=0, lengths=(2,))
    hflip: float | None = setting(None, AUG, 'probability of a horizontal flip (default: 0.5)', ge=0, le=1)
    vflip: float = setting(0.0, AUG, 'probability of a vertical flip', ge=0, le=1)
    color_jitter: float | None = setting(None, AUG, 'color jitter factor (default: 0.4)', ge=0)
    aa: str | None = setting(None, AUG, "AutoAugment policy, e.g. 'rand-m9-mstd0.5' or 'original'")
    train_interpolation: str = setting(
        'random', AUG, 'resize of training images', choices=('random', 'bilinear', 'bicubic')
    )
    reprob: float = setting(0.0, AUG, 'random erasing probability', ge=0, le=1)
    remode: str = setting('pixel', AUG, 'random erasing fill', choices=('const', 'rand', 'pixel'))
    recount: int = setting(1, AUG, 'random erasing count', gt=0)
    mixup: float = setting(0.0, AUG, 'mixup alpha, 0: off', ge=0)
    cutmix: float = setting(0.0, AUG, 'cutmix alpha, 0: off', ge=0)
    cutmix_minmax: Floats | None = setting(
        None, AUG, 'cutmix min/max ratio, in place of alpha', gt=0, le=1, lengths=(2,)
    )
    mixup_prob: float = setting(1.0, AUG, 'probability of mixup or cutmix in a batch', ge=0, le=1)
    mixup_switch_prob: float = setting(0.5, AUG, 'probability of cutmix where both are on', ge=0, le=1)
    mixup_off_epoch: int = setting(0, AUG, 'mix no more from this epoch on, 0: never', ge=0)

    # optimizer
    opt: str = setting('sgd', OPTIM, "any optimizer of timm; 'sgd' is Nesterov, 'momentum' is plain")
    momentum: float = setting(0.9, OPTIM, 'momentum', ge=0)
    weight_decay: float = setting(2e-5, OPTIM, 'weight decay', ge=0)
    weight_decay_all: bool = setting(False, OPTIM, 'weight decay on biases and norms too (timm leaves them out)')
    opt_eps: float | None = setting(None, OPTIM, "epsilon (default: the optimizer's)", gt=0)
    opt_betas: Floats | None = setting(None, OPTIM, "betas (default: the optimizer's)", ge=0)
    opt_kwargs: dict = setting({}, OPTIM, 'further arguments of the optimizer, as name=value')
    clip_grad: float | None = setting(None, OPTIM, 'clip gradients at this value (default: no clipping)', gt=0)
    clip_mode: str = setting('norm', OPTIM, 'how to clip', choices=('norm', 'value', 'agc'))
    grad_accum_steps: int | None = setting(None, OPTIM, 'batches per optimizer step (default: 1)', gt=0)
    model_ema: bool = setting(False, OPTIM, 'keep a moving average of the weights')
    model_ema_decay: float = setting(0.9998, OPTIM, 'decay of the moving average', ge=0, le=1)
    model_ema_warmup: bool = setting(False, OPTIM, 'warm the decay up')

    # learning rate
    epochs: int | None = setting(
        None, SCHED, 'epochs of the student (default: 300); 0: fit the teacher alone (--teacher-epochs)', ge=0
    )
    lr: float | None = setting(None, SCHED, 'learning rate (default: lr-base scaled to the global batch)', gt=0)
    lr_base: float = setting(0.1, SCHED, 'learning rate at a global batch of lr-base-size', gt=0)
    lr_base_size: int = setting(256, SCHED, 'see lr-base', gt=0)
    lr_base_scale: str | None = setting(
        None, SCHED, 'default: sqrt for ada* and lamb, else linear', choices=('linear', 'sqrt')
    )
    sched: str = setting(
        'cosine', SCHED, 'schedule of timm',
        choices=('cosine', 'multistep', 'step', 'poly', 'tanh', 'wsd', 'rsqrt', 'constant', 'none'),
    )  # fmt: skip
    sched_on_updates: bool | None = setting(
        None, SCHED, 'change the rate at each update rather than each epoch (default: no)'
    )
    warmup_epochs: int | None = setting(None, SCHED, 'epochs of warm-up (default: 5, at most a tenth of the run)', ge=0)
    warmup_lr: float = setting(1e-5, SCHED, 'rate at the start of the warm-up', ge=0)
    min_lr: float = setting(0.0, SCHED, 'lowest rate', ge=0)
    decay_epochs: float | None = setting(None, SCHED, 'interval of step, length of the decay of wsd and rsqrt', gt=0)
    decay_milestones: tuple[int, ...] = setting(
        (90, 180, 270), SCHED, 'epochs (the first is 1) in which multistep lowers the rate', gt=0
    )
    decay_rate: float = setting(0.1, SCHED, 'factor of step and multistep, power of poly', gt=0, le=10)
    cooldown_epochs: int = setting(0, SCHED, 'epochs at the lowest rate after the schedule', ge=0)

    # devices and speed
    mixed_precision: str | None = setting(
        None, RUN, 'default: what `accelerate launch` says, else no', choices=('no', 'fp16', 'bf16')
    )
    channels_last: bool | None = setting(None, RUN, 'memory layout (default: yes, but on GPUs without mixed precision)')
    sync_bn: bool = setting(False, RUN, 'batch norm over all processes (GPUs)', flag=True)
    torchcompile: bool = setting(False, RUN, 'compile student, teacher and criterion', flag=True)
    cpu_threads: int | None = setting(
        None, RUN, 'threads of a process on the CPU (default: cores / local processes)', gt=0
    )

    # checkpoints and faults
    resume: str | None = setting(
        None, CKPT, "go on with a run: 'auto' (that of --output/--experiment), a run folder, or one of its checkpoints"
    )
    checkpoint_interval: str = setting(
        'epoch', CKPT, "write a checkpoint each 'epoch', or every N optimizer steps; and every 15 minutes anyway"
    )
    checkpoint_hist: int = setting(2, CKPT, 'how many of the newest checkpoints to keep, beside the best', gt=0)
    skip_nonfinite: int = setting(
        0, CKPT, 'leave out up to N steps in a row whose loss or gradient is not finite; 0: stop at the first', ge=0
    )
    on_bad_image: str = setting(
        'error', CKPT, 'a training image that cannot be read: stop, or put another in its place and list it',
        choices=('error', 'skip'),
    )  # fmt: skip

    # Hub
    push_to_hub: bool = setting(
        False, HUB, 'push the student to the Hub at the end; token and repository are checked before', flag=True
    )
    hub_model_id: str | None = setting(None, HUB, 'repository: user/name, or name (default: <student>-<distill>)')
    hub_private_repo: bool = setting(False, HUB, 'make a new repository private', flag=True)
    hub_license: str = setting('apache-2.0', HUB, 'license in the card; data or teacher may ask for another')
    hub_strategy: str = setting(
        'end', HUB, "push at the 'end' alone, or also at each new 'best' epoch or 'every_save' that ends one",
        choices=('end', 'best', 'every_save'),
    )  # fmt: skip
    hub_weights: str = setting(
        'last', HUB, 'which weights: of the last epoch, the best on the validation split, or the moving average',
        choices=('last', 'best', 'ema'),
    )  # fmt: skip

    # output
    output: str | None = setting(None, OUT, 'parent of the run folder (default: ./output)')
    experiment: str | None = setting(None, OUT, 'name of the run folder (default: <time>-<student>-<distill>)')
    log_interval: int = setting(50, OUT, 'steps between progress lines', gt=0)
    report_to: tuple[str, ...] = setting((), OUT, 'trackers of Accelerate: tensorboard, wandb, …')
    debug: bool = setting(False, OUT, 'show tracebacks', flag=True)

    def pick(self, *names: str) -> dict[str, Any]:
        """Some settings as keyword arguments."""
        return {name: getattr(self, name) for name in names}

    def of_teacher(self) -> Config:
        """The settings for the teacher's fit."""
        return dataclasses.replace(
            self,
            epochs=self.teacher_epochs,
            lr=self.teacher_lr or self.lr,
            teacher_cache=None,
            teacher_cache_views=None,
        )


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
HINTS = typing.get_type_hints(Config)


def flag_of(name: str) -> str:
    """`grad_accum_steps` → `--grad-accum-steps`."""
    return '--' + name.replace('_', '-')


# ------------------------------------------------------------------------------------------------ types and values


def _base_type(name: str) -> tuple[Any, bool]:
    """The type of a field without its `| None` and its words, and whether None is allowed."""
    hint = HINTS[name]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (inner,) = (a for a in typing.get_args(hint) if a is not type(None) and typing.get_origin(a) is not Literal)
        return inner, type(None) in typing.get_args(hint)
    return hint, False


def _words(name: str) -> tuple[str, ...]:
    """The words that a field takes beside the values of its type: 'auto' of `int | Literal['auto']`."""
    literals = [a for a in typing.get_args(HINTS[name]) if typing.get_origin(a) is Literal]
    return tuple(word for a in literals for word in typing.get_args(a))


_TYPE_NAMES = {int: 'a whole number', float: 'a number', str: 'a text', bool: 'true or false', dict: 'a mapping'}


def _convert(value: Any, want: Any) -> Any:
    """``value`` (from YAML, or a string of the command line) as type ``want``; ValueError with what was expected."""
    if typing.get_origin(want) is tuple:
        item = typing.get_args(want)[0]
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            value = [value]
        return tuple(_convert(v, item) for v in value)
    if want is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as a text
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif want is dict and isinstance(value, dict):
        if odd := [k for k in value if not isinstance(k, str)]:
            raise ValueError(f'expected names as keys, got {odd[0]!r}')
        return {k: _literal(v) if isinstance(v, str) else v for k, v in value.items()}
    elif want is int and isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    elif want is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif want is int and isinstance(value, bool):
        pass
    elif isinstance(value, want):
        return value
    raise ValueError(f'expected {_TYPE_NAMES[want]}, got {value!r}')


def _literal(text: str) -> Any:
    """A text as the Python or YAML scalar that it spells, else the text itself."""
    words = {'true': True, 'false': False, 'null': None, 'none': None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_value(name: str, value: Any) -> Any:
    """``value`` converted to the field's type and within its bounds; ValueError says what is wrong."""
    want, optional = _base_type(name)
    if value is None:
        if optional:
            return None
        raise ValueError('a value is needed')
    meta = FIELDS[name].metadata
    if name == 'checkpoint_interval':
        value = str(value)  # YAML reads a number
        if value != 'epoch' and not (value.isdecimal() and int(value) > 0):
            raise ValueError(f"expected 'epoch' or a number of optimizer steps, got '{value}'")
    if value is False and 'no' in meta['choices']:
        value = 'no'  # as YAML reads it without quotes
    words = _words(name)
    if value in words:
        return value
    try:
        value = _convert(value, want)
    except ValueError as e:
        raise ValueError(f"{e}; or '{words[0]}'" if words else str(e)) from None
    if meta['choices'] and str(value) not in meta['choices']:
        hint = did_you_mean(str(value), meta['choices'], 1)
        raise ValueError(f"'{value}' is not one of {', '.join(meta['choices'])}{hint}")
    values = value if isinstance(value, tuple) else (value,)
    if meta['lengths'] and len(values) not in meta['lengths']:
        raise ValueError(f'expected {" or ".join(map(str, meta["lengths"]))} values, got {len(values)}')
    for v in values:
        if isinstance(v, float) and not math.isfinite(v):
            raise ValueError(f'must be a finite number, got {v}')
        if meta['gt'] is not None and not v > meta['gt']:
            raise ValueError(f'must be greater than {meta["gt"]:g}, got {v}')
        if meta['ge'] is not None and not v >= meta['ge']:
            raise ValueError(f'must be at least {meta["ge"]:g}, got {v}')
        if meta['le'] is not None and not v <= meta['le']:
            raise ValueError(f'must be at most {meta["le"]:g}, got {v}')
    return value


# ------------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [k.value for k, _ in node.value]
        twice = {k for k in keys if keys.count(k) > 1}
        if twice:
            raise yaml.YAMLError(f'key written twice: {", ".join(sorted(twice))}')
        return super().construct_mapping(node, deep)


def recipes_folder() -> Path:
    """Where the recipes lie: in the installed package, or in the checkout beside it."""
    package = Path(__file__).parent
    return package / 'configs' if (package / 'configs').is_dir() else package.parent / 'configs'


def list_recipes() -> list[tuple[str, str]]:
    """Recipes that ship with the package: (name for `--config`, the first line of its comment)."""
    folder = recipes_folder()
    found = []
    for path in sorted(folder.rglob('*.yaml')):
        if path.parent.name != 'accelerate':
            first = path.read_text(encoding='utf-8').partition('\n')[0]
            found.append((path.relative_to(folder).as_posix(), first.lstrip('# ')))
    return found


def find_recipe(path: str) -> Path:
    """A file's path, or that of a recipe of this name that ships with the package."""
    if not os.path.exists(path):
        name = path.removeprefix('configs/').removesuffix('.yaml')
        if (recipes_folder() / f'{name}.yaml').is_file():
            return recipes_folder() / f'{name}.yaml'
    return Path(path)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all, whenever the process or the machine stops. Bytes of a file's name that are
    no text are escaped, as JSON reads them."""
    part = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with part.open('w', encoding='utf-8', errors='backslashreplace') as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_yaml(path: str, flag: str = '--config') -> dict[str, Any]:
    """Read a configuration file; ``flag`` is named in messages.

    Returns:
        Checked and converted values by field name.

    Raises:
        UsageError: for a missing file, a file that is not a mapping, an unknown key, a wrong type or value.
    """
    try:
        data = yaml.load(find_recipe(path).read_text(encoding='utf-8'), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f'{flag} {path}: cannot be read ({getattr(e, "strerror", None) or "not a text file"})') from e
    except yaml.YAMLError as e:
        raise UsageError(f'{flag} {path}: not valid YAML ({" ".join(str(e).split())})') from e
    if not isinstance(data, dict):
        kind = 'empty' if data is None else f'a {type(data).__name__}'
        raise UsageError(f'{flag} {path}: expected a mapping of settings (name: value), the file is {kind}')
    values = {}
    for key, value in data.items():
        if key not in FIELDS:
            raise UsageError(f"{flag} {path}: unknown key '{key}'{did_you_mean(str(key), FIELDS, 1)}")
        try:
            values[key] = _check_value(key, value)
        except ValueError as e:
            raise UsageError(f'{flag} {path}: {key}: {e}') from None
    return values


def load_yaml_text(text: str) -> dict[str, Any]:
    """Settings from :func:`to_yaml`'s text, converted as :func:`load_yaml` does."""
    return {key: _check_value(key, value) for key, value in yaml.load(text, Loader=_Loader).items()}


def to_yaml(config: Config) -> str:
    """The settings as YAML that :func:`load_yaml` reads back to an equal Config."""
    data = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


# ----------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix('argument '))


class _KeyValues(argparse.Action):
    """`name=value …`, the form of timm's ParseKwargs: values are Python literals, else texts."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        out = {}
        for item in values:
            key, sep, value = item.partition('=')
            if not sep or not key:
                parser.error(f"{option_string}: expected name=value, got '{item}'")
            out[key] = _literal(value)
        setattr(namespace, self.dest, out)


def _parser(prog: str, epilog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f'{prog} --teacher NAME --student NAME [--distill rld] [--config FILE] [flags]',
        description='Distil a timm student from a timm teacher. Without --dataset or --data-dir it runs on a sample.',
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument('--config', metavar='FILE', help='YAML with any of these settings; flags win over it')
    groups: dict[str, Any] = {}
    for name, f in FIELDS.items():
        meta = f.metadata
        group = groups.setdefault(meta['group'], None) or parser.add_argument_group(meta['group'])
        groups[meta['group']] = group
        flags = [flag_of(name)] + ([f'-{meta["alias"]}'] if meta['alias'] else [])
        want, _ = _base_type(name)
        help = meta['help']
        if f.default not in (None, dataclasses.MISSING, ()) and want is not bool:
            shown = ' '.join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            help += f' (default: {shown})'
        if want is bool:
            action = 'store_true' if meta['flag'] else argparse.BooleanOptionalAction
            group.add_argument(*flags, action=action, help=help)
        elif want is dict:
            group.add_argument(*flags, nargs='*', action=_KeyValues, metavar='NAME=VALUE', help=help)
        elif typing.get_origin(want) is tuple:
            group.add_argument(*flags, nargs='*' if f.default == () else '+', metavar='X', help=help)
        else:
            metavar = (
                '{' + ','.join(meta['choices']) + '}' if meta['choices'] else {int: 'N', float: 'X'}.get(want, 'S')
            )
            group.add_argument(*flags, metavar=metavar, help=help)
    return parser


def parse_args(
    argv: list[str] | None = None, *, prog: str = 'train_distill.py', epilog: Callable[[], str] = str
) -> Config:
    """Read the command line (and the file that its `--config` names).

    Args:
        epilog: gives the text under `--help`; called for that alone.

    Raises:
        UsageError: for anything that is not a valid setting. The file's keys are checked before required flags.
        SystemExit: after `--help`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(prog, epilog() if {'-h', '--help'} & {*argv} else '')
    namespace, unknown = parser.parse_known_args(argv)
    given = vars(namespace)
    values = load_yaml(given.pop('config')) if 'config' in given else {}
    if unknown:
        first = unknown[0].split('=')[0]
        flags = [s for a in parser._actions for s in a.option_strings]
        if first.startswith('-'):
            raise UsageError(f'unknown flag {first}{did_you_mean(first, flags, 1)}; --help lists them')
        raise UsageError(f"unexpected '{first}'; every value needs a flag before it, --help lists them")
    from_file = values
    values = {}
    for name, value in given.items():
        try:
            values[name] = _check_value(name, value)
        except ValueError as e:
            raise UsageError(f'{flag_of(name)}: {e}') from None
    if (resume := values.get('resume', from_file.get('resume'))) not in (None, 'auto'):
        if from_file:
            raise UsageError(f'--resume {resume}: a run goes on with its own settings; leave --config out')
        run = run_of(resume)
        from_file = {**load_yaml(str(run / 'args.yaml'), '--resume'), 'output': str(run.parent), 'experiment': run.name}
    return Config(**{**_still_meant(from_file, values), **values})


def run_of(path: str) -> Path:
    """The run folder that `--resume PATH` means: PATH itself, or that of the checkpoint PATH.

    Raises:
        UsageError: where it is neither.
    """
    folder = Path(os.path.abspath(os.path.expanduser(path)))
    run = folder.parent.parent if (folder / 'checkpoint.json').exists() else folder
    if not (run / 'args.yaml').is_file():
        raise UsageError(f'--resume {path}: expected auto, a run folder (with args.yaml), or a checkpoint in one')
    return run


def _still_meant(from_file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The file's settings without those that belong to a choice that the command line has made anew: the options of
    another criterion, the columns of a Hub dataset where `--data-dir` names folders."""
    set_aside: tuple[str, ...] = ()
    meant = from_file.get('distill', FIELDS['distill'].default)
    if given.get('distill', meant) != meant:
        set_aside += ('distill_kwargs', 'task_loss_weight', 'distill_loss_weight', 'distill_warmup_epochs')
    if 'data_dir' in given and 'dataset' not in given and str(from_file.get('dataset')).startswith(('hfds/', 'hfids/')):
        set_aside += ('dataset', 'input_key', 'target_key')
    return {k: v for k, v in from_file.items() if k not in set_aside}


# --------------------------------------------------------------------------------------------------------- defaults

# The sample (8×8 digits shown at 32×32): settings that reach 97% within three minutes on two cores.
SAMPLE_DEFAULTS: dict[str, Any] = dict(
    img_size=32,
    train_crop_mode='pad',
    hflip=0.0,
    color_jitter=0.0,
    teacher_epochs=7,
    epochs=11,
    batch_size=64,
    lr=0.05,
    clip_grad=5.0,
    sched_on_updates=True,
    distill_warmup_epochs=3,
    train_split='train',
    val_split='test',
)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def auto_workers() -> int:
    """Loader processes for `--workers auto`: this process's share of the machine's cores, but one for itself."""
    local = os.environ.get('LOCAL_WORLD_SIZE', '')  # the processes of this machine, as torch's launchers tell them
    return max(1, cores() // (int(local) if local.isdigit() and int(local) else 1) - 1)


def uses_sample(config: Config) -> bool:
    """Whether no dataset is named, so that the run uses the sample that ships with the package."""
    return config.dataset is None and config.data_dir is None


def resolve(config: Config, num_processes: int = 1, **published: Any) -> Config:
    """Fill in every default that does not depend on the networks: timm's own, or the sample's.

    Args:
        num_processes: training processes, for the global batch that the learning rate scales with.
        **published: defaults of the criterion, by field.

    Raises:
        UsageError: for settings that contradict each other.
    """
    c = dataclasses.replace(config)

    def default(**values: Any) -> None:
        for name, value in values.items():
            if getattr(c, name) is None:
                setattr(c, name, value)

    if c.resume is not None and c.experiment is None:
        raise UsageError(f'--resume {c.resume}: which run? Give its --experiment (and --output), or --resume FOLDER')
    if uses_sample(c):
        for name in ('train_split', 'val_split', 'class_map', 'input_key', 'target_key'):
            if getattr(c, name) not in (None, SAMPLE_DEFAULTS.get(name)):
                raise UsageError(f'{flag_of(name)} {getattr(c, name)}: needs a --dataset or --data-dir to apply to')
        own_weights = c.teacher_checkpoint is not None or ':' in (c.teacher or '')
        default(teacher_pretrained=own_weights, teacher_epochs=0 if own_weights else None)
        default(**SAMPLE_DEFAULTS)
        default(warmup_epochs=1 if min(filter(None, (c.epochs, c.teacher_epochs)), default=0) > 1 else 0)
    accum_env = os.environ.get('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '1')
    default(
        **published,
        teacher_pretrained=True,
        teacher_epochs=0,
        sched_on_updates=False,
        train_split='train',
        val_split='validation',
        smoothing=0.1,
        train_crop_mode='rrc',
        hflip=0.5,
        color_jitter=0.4,
        batch_size=128,
        epochs=300,
        workers=min(4, cores()),  # on two cores two load faster than auto's one
        # `accelerate launch --gradient_accumulation_steps N` speaks through the environment
        grad_accum_steps=int(accum_env) if accum_env.isdigit() and int(accum_env) > 0 else 1,
    )
    if c.workers == 'auto':
        c.workers = auto_workers()
    default(validation_batch_size=c.batch_size, hub_model_id=_default_repository(c))
    if c.hub_weights == 'ema' and not c.model_ema:
        raise UsageError('--hub-weights ema: needs --model-ema')
    if c.lr is None:
        ratio = c.batch_size * num_processes * c.grad_accum_steps / c.lr_base_size
        by_root = c.lr_base_scale == 'sqrt' or (
            c.lr_base_scale is None and any(o in c.opt.lower() for o in ('ada', 'lamb'))
        )
        c.lr = c.lr_base * (ratio**0.5 if by_root else ratio)

    default(teacher_lr=c.lr)
    _resolve_cache(c)

    if not c.epochs and not c.teacher_epochs:
        raise UsageError('--epochs 0: fits the teacher alone, so --teacher-epochs N is needed')
    for name in ('cutmix_minmax', 'scale', 'ratio'):
        low_high = getattr(c, name)
        if (
            low_high is not None
            and not low_high[0] < low_high[1]
            and (name == 'cutmix_minmax' or low_high[0] > low_high[1])
        ):
            raise UsageError(
                f'{flag_of(name)} {low_high[0]:g} {low_high[1]:g}: the first value must be below the second'
            )
    for name in ('mean', 'std', 'teacher_mean', 'teacher_std'):
        value = getattr(c, name)
        if value is not None and len(value) not in (1, c.in_chans):
            raise UsageError(f'{flag_of(name)}: expected 1 or {c.in_chans} values (--in-chans), got {len(value)}')
    for epochs, flag in ((c.epochs, '--epochs'), (c.teacher_epochs, '--teacher-epochs')):
        if c.cooldown_epochs and epochs and c.cooldown_epochs >= epochs:
            raise UsageError(f'--cooldown-epochs {c.cooldown_epochs}: leaves nothing of {flag} {epochs}; give fewer')
        if c.warmup_epochs and epochs and c.warmup_epochs >= epochs:
            raise UsageError(
                f'--warmup-epochs {c.warmup_epochs}: leaves nothing of {flag} {epochs}; give a smaller one'
            )
    return c


def _resolve_cache(c: Config) -> None:
    """Fill in the number of views, and refuse what a teacher cache cannot go with."""
    if c.teacher_cache is None:
        for name in ('teacher_cache_views', 'teacher_cache_dtype'):
            if getattr(c, name) != FIELDS[name].default:
                raise UsageError(f'{flag_of(name)} {getattr(c, name)}: needs --teacher-cache DIR')
        return
    if not c.teacher_cache.strip():
        raise UsageError('--teacher-cache: expected a folder')
    if c.on_bad_image == 'skip':
        raise UsageError(
            '--on-bad-image skip with --teacher-cache: the image in the place of a broken one is not the one that the '
            'kept logit belongs to; leave one of the two out'
        )
    if c.teacher is None:
        raise UsageError(f'--teacher-cache {c.teacher_cache}: there is no --teacher')
    for name in ('mixup', 'cutmix', 'cutmix_minmax'):
        if getattr(c, name):
            raise UsageError(
                f'{flag_of(name)} with --teacher-cache: images are mixed anew in each epoch, and the teacher must see '
                'the mixed image, which no kept logit belongs to; leave one of the two out'
            )
    if c.teacher_cache_views is None:
        c.teacher_cache_views = max(1, min(10, c.epochs))
    if c.epochs and c.teacher_cache_views > c.epochs:
        raise UsageError(
            f'--teacher-cache-views {c.teacher_cache_views}: more than the epochs ({c.epochs}), so that some would '
            f'never be seen; give at most {c.epochs}'
        )


def _default_repository(config: Config) -> str:
    """A name for the Hub: the student's, without what stands before it (`hf-hub:user/`, a folder's path)."""
    return f'{os.path.basename((config.student or "student").rstrip("/")).rpartition(":")[2]}-{config.distill}'


def warmup_epochs(config: Config) -> int:
    """Epochs of warm-up: as said, else timm's 5, but at most a tenth of the fit."""
    return min(5, config.epochs // 10) if config.warmup_epochs is None else config.warmup_epochs
