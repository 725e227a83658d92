"""Teacher and student: the one place where they may differ, in classes, size, channels, normalisation and weights."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import models as _models  # noqa: F401  (in timm's registry)
from .errors import UserError, did_you_mean, is_not_plain
from .fold import fold_batch_norms
from .hub import check_export, hub_in_reach

Floats = Sequence[float]
_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN_TYPES = [
    argparse.Namespace, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType, _SCALAR,
    (_SCALAR, 'numpy.core.multiarray.scalar'),  # its name before NumPy 2
]  # fmt: skip


# -------------------------------------------------------------------------------------------------- what a network sees


class InputView(nn.Module):
    """From the pixels that both networks share to what one of them takes: resize if need be, then normalise.

    Args:
        mean, std: of pixels in 0..1, one value or one a channel.
        size: (H, W) that the network wants, or None to take the pixels as they are. Resizing is antialiased.
        interpolation: `bicubic` or `bilinear`.
    """

    def __init__(
        self,
        mean: Floats,
        std: Floats,
        size: tuple[int, int] | None = None,
        interpolation: str = 'bicubic',
    ) -> None:
        super().__init__()
        self.register_buffer('mean', 255 * torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', 255 * torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.size = tuple(size) if size else None
        self.interpolation = resize_mode(interpolation)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels `[B, C, H, W]` in 0..255, uint8 or floating → normalised `[B, C, h, w]`, float32 or higher."""
        x = pixels if pixels.is_floating_point() else pixels.to(self.mean.dtype)
        if self.size and x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode=self.interpolation, antialias=True, align_corners=False)
        if x is pixels:
            return (x - self.mean) / self.std
        return x.sub_(self.mean).div_(self.std)  # in place: fresh memory costs more than arithmetic

    def pixels(self, normalized: Tensor) -> Tensor:
        """The inverse of the normalisation: pixels in 0..255, floating."""
        return normalized * self.std + self.mean

    def extra_repr(self) -> str:
        mean, std = ([round(v, 4) for v in (b.flatten() / 255).tolist()] for b in (self.mean, self.std))
        return f'mean={mean}, std={std}, size={self.size}'


def resize_mode(interpolation: str | None) -> str:
    """The mode of `F.interpolate` for the interpolation of a model's config: those without antialiasing become
    `bilinear`, and none becomes timm's default, `bicubic`."""
    return interpolation if interpolation in ('bicubic', 'bilinear') else 'bilinear' if interpolation else 'bicubic'


class Teacher(nn.Module):
    """A frozen network: eval mode whatever `train()` says, no gradients, inference only.

    Args:
        model: a classifier with logits `[B, T]`.
        view: its resize and normalisation; None for that of the model's `pretrained_cfg`.
        class_map: for each class of the dataset the teacher's output; None where they are the same.
        name: for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        view: InputView | None = None,
        class_map: Sequence[int] | None = None,
        name: str = 'teacher',
    ) -> None:
        super().__init__()
        self.name = name
        self.other_names = False  # its labels have none of the dataset's names
        self.folded = 0  # batch norms
        self.digest: str | None = None  # of the weights as they were loaded, once they are folded
        self.own_size: tuple[int, int] | None = None  # (H, W) that its weights were made for, where that is known
        self.model = model
        self.view = view if view is not None else input_view(model)
        index = None if class_map is None else torch.tensor(list(class_map), dtype=torch.int64)
        self.register_buffer('class_map', index, persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    def compile(self, **kwargs: Any) -> None:
        """Compile the network's forward pass (`torch.compile`)."""
        self._logits = torch.compile(self._logits, **kwargs)

    def quicken(self, size: tuple[int, int, int], channels_last: bool = True) -> int:
        """Make the forward pass faster without changing what it computes: batch norms are folded into the convolutions
        before them (:func:`timm_rld.fold.fold_batch_norms`), and weights laid out channels-last.

        Args:
            size: (C, H, W) of the pixels.
            channels_last: the layout.

        Returns:
            How many batch norms were folded.
        """
        if self.digest is None:
            self.digest = weights_digest(self)
        noise = torch.randint(256, (4, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        noise[2], noise[3] = 0, 255
        self.folded += fold_batch_norms(self.model, self.view(noise.to(self.view.mean.device)))
        # after the folds, which are tried in float64: there depthwise convolutions are slow in channels-last
        lay_out(self.model, torch.channels_last if channels_last else torch.contiguous_format)
        return self.folded

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels `[B, C, H, W]` in 0..255 → logits over the dataset's classes `[B, C]`."""
        with torch.inference_mode():
            logits = self._logits(self.view(pixels))
            if self.class_map is not None:
                logits = logits.index_select(1, self.class_map)
        return logits.clone()  # out of inference mode, so that autograd may save it

    def _logits(self, x: Tensor) -> Tensor:
        """Under autocast the head still works in float32: rounded logits tie, and ties change what RLD masks."""
        if not torch.is_autocast_enabled(x.device.type) or not hasattr(self.model, 'forward_head'):
            return self.model(x)
        features = self.model.forward_features(x)  # of some networks a list
        with torch.autocast(x.device.type, enabled=False):
            return self.model.forward_head(tree_map(_to_float32, features))


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def input_view(
    model: nn.Module,
    *,
    mean: Floats | None = None,
    std: Floats | None = None,
    img_size: int | None = None,
    view_size: tuple[int, int] | None = None,
) -> InputView:
    """The view of a timm model: the normalisation of its config, and a resize where it takes one size only.

    Args:
        mean, std: in place of the config's.
        img_size: resize to this size.
        view_size: (H, W) of the shared pixels, to leave out a resize that does nothing.
    """
    from timm.data import resolve_input_data_config

    args = {k: tuple(v) for k, v in (('mean', mean), ('std', std)) if v is not None}
    config = resolve_input_data_config(model, args)
    size = None
    if img_size:
        size = (img_size, img_size)
    elif has_fixed_size(model):
        size = tuple(config['input_size'][-2:])
    if size == view_size:
        size = None
    return InputView(config['mean'], config['std'], size, config['interpolation'])


def has_fixed_size(model: nn.Module) -> bool:
    """Whether a timm model takes images of one size only, as most vision transformers do."""
    from timm.models import get_model_input_config

    return bool(get_model_input_config(model)['fixed_input_size'])


def resized_to(card: ModelCard, img_size: int | None, view_size: tuple[int, int]) -> tuple[int, int] | None:
    """The (H, W) that :func:`create_teacher` resizes the shared images to; None where it takes them as they are. No
    weights are loaded.

    Args:
        card: from :func:`look_up`.
        img_size: of `--teacher-img-size`.
        view_size: (H, W) of the shared images.
    """
    size = (img_size, img_size) if img_size else None
    if size is None and card.config.get('fixed_input_size'):
        from timm import create_model
        from timm.models import get_model_input_config

        with torch.device('meta'):  # some configs call a network fixed that takes any size
            config = get_model_input_config(create_model(card.name))
        size = tuple(config['input_size'][-2:]) if config['fixed_input_size'] else None
    return None if size == view_size else size


def constructor_arguments(card: ModelCard, img_size: int | None) -> dict[str, Any]:
    """Arguments that a teacher is built with, but for those that timm writes into each folder whether they were asked
    for or not: the same network has the same ones, by name and from its folder.

    Args:
        card: from :func:`look_up`.
        img_size: of `--teacher-img-size`.
    """
    from timm.models import get_pretrained_cfg

    arguments = {k: v for k, v in card.model_args.items() if k not in ('num_classes', 'in_chans', 'global_pool')}
    if img_size and card.config.get('fixed_input_size'):
        arguments['img_size'] = [img_size, img_size]
    native = get_pretrained_cfg(card.architecture, allow_unregistered=True)
    if native is not None and arguments.get('img_size') == list(native.input_size[-2:]):
        del arguments['img_size']
    return arguments


def lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Put a network's 4-D weights into a memory format, which those of other dimensions have not."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model computes batch statistics, which a single sample may not have."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


# ---------------------------------------------------------------------------------------------------- names and weights


@dataclass
class ModelCard:
    """What is known of a model before it is built.

    Attributes:
        name: as given.
        config: timm's pretrained_cfg as a dict.
        source: None for a timm name, `hf-hub` or `local-dir`.
        has_weights: whether weights are published under this name.
        architecture: timm's name of the network.
        model_args: of its constructor, that a folder's or the Hub's config asks for.
    """

    name: str
    config: dict[str, Any]
    source: str | None
    has_weights: bool
    architecture: str = ''
    model_args: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return self.config.get('num_classes', 1000)

    @property
    def label_names(self) -> list[str] | None:
        """Label names by output index, or None."""
        names = self.config.get('label_names')
        if isinstance(names, dict):
            names = {int(k): v for k, v in names.items()}
            names = [names[i] for i in range(len(names))] if set(names) == set(range(len(names))) else None
        return list(names) if names and len(names) == self.num_classes else None


def look_up(name: str, flag: str) -> ModelCard:
    """Find a model by name: timm's registry, `hf-hub:user/model` or `local-dir:path`.

    Raises:
        UserError: where there is none; the message offers the nearest names.
    """
    from timm import models
    from timm.models._hub import load_model_config_from_path

    architecture, model_args = models.get_arch_name(name), {}
    try:
        source, model_id = models.parse_model_name(name)
    except ValueError as e:
        raise UserError(f'{flag} {name}: {e}') from e
    try:
        if source == 'local-dir':
            config, architecture, model_args = load_model_config_from_path(model_id)
        elif source == 'hf-hub':
            hub_in_reach()
            config, architecture, model_args = models.load_model_config_from_hf(model_id)
        elif not models.is_model(name):
            arch = models.get_arch_name(name)
            raise UserError(
                f'{flag} {name}: unknown model{did_you_mean(arch, models.list_models())}; '
                "`timm-rld list models '*name*'` shows timm's names"
            )
        else:
            config = models.get_pretrained_cfg(name, allow_unregistered=True)
            config = config.to_dict() if config is not None else {}
    except UserError:
        raise
    except Exception as e:
        arch = models.get_arch_name(name)
        if source is None:
            there = list(models.get_arch_pretrained_cfgs(arch))
            why = f'no such weights{did_you_mean(name, there)}; there: {", ".join(there[:6])}'
        elif source == 'local-dir':
            missing = isinstance(e, FileNotFoundError)
            why = 'no config.json in this folder' if missing else f'config.json cannot be read ({_first_line(e)})'
        else:
            why = f'not found on the Hub ({_first_line(e)})' if hub_in_reach() else 'the Hub is out of reach'
        raise UserError(f'{flag} {name}: {why}') from e
    has_weights = source is not None or any(config.get(k) for k in ('hf_hub_id', 'url', 'file'))
    return ModelCard(name, config, source, has_weights, architecture, dict(model_args or {}))


def build_model(card: ModelCard, flag: str, *, pretrained: bool, way_out: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with errors that say what to do.

    Args:
        card: from :func:`look_up`.
        flag: that named the model.
        pretrained: load its published weights.
        way_out: what to offer where these cannot be reached.
        **kwargs: for the model, None is left out.

    Raises:
        UserError: weights out of reach, arguments that the model does not take.
    """
    from timm import create_model

    if pretrained and card.source != 'local-dir':
        hub_in_reach()
    try:
        return create_model(card.name, pretrained=pretrained, **kwargs)
    except TypeError as e:
        raise UserError(f'{flag} {card.name}: {_first_line(e)}') from e
    except Exception as e:
        if not pretrained:
            raise UserError(f'{flag} {card.name}: cannot be built ({_first_line(e)})') from e
        if card.source == 'local-dir':
            raise UserError(f'{flag} {card.name}: its weights cannot be loaded ({_first_line(e)})') from e
        why = _first_line(e) if hub_in_reach() else 'no network'
        raise UserError(f'{flag} {card.name}: its published weights cannot be reached ({why}). {way_out}') from e


def load_weights(path: str, flag: str) -> dict[str, Tensor]:
    """Read a state dict: safetensors, or a .pth read with weights_only, bare or under `state_dict` or `model`.

    Prefixes of wrappers (`module.`, `_orig_mod.`) are dropped.

    Raises:
        UserError: where the file is not there or does not hold weights; nothing in it is ever executed.
    """
    from timm.models import load_state_dict

    if not os.path.isfile(path):
        raise UserError(f'{flag} {path}: no such file')
    try:
        # scalars and options that training programs save beside the weights: known types, which run no code
        with torch.serialization.safe_globals(_PLAIN_TYPES):
            state = load_state_dict(path, weights_only=True)
    except Exception as e:
        if is_not_plain(e):
            raise UserError(
                f'{flag} {path}: not a file of weights alone, so it was not loaded; save the state_dict as .safetensors'
            ) from e
        raise UserError(f'{flag} {path}: not a checkpoint ({type(e).__name__}: {_first_line(e)})') from e
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f'{flag} {path}: not a checkpoint (expected a state dict of tensors)')
    return state


def _load_into(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.endswith('num_batches_tracked')]
    left = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or left or shapes:
        parts = []
        for label, keys in (('missing', missing), ('left over', left), ('other shape', shapes)):
            if keys:
                parts.append(f'{len(keys)} {label}: {", ".join(keys[:5])}{", …" if len(keys) > 5 else ""}')
        raise UserError(f'{what}: weights of another network ({"; ".join(parts)})')
    model.load_state_dict(state, strict=False)


def _head_size(state: dict[str, Tensor], config: dict[str, Any]) -> int | None:
    """Classes of the head in a state dict, by the classifier's name in the model's config."""
    names = config.get('classifier')
    names = (names,) if isinstance(names, str) else names or ()
    for name in names:
        for key in (f'{name}.weight', f'{name}.bias'):
            if key in state:
                return state[key].shape[0]
    return None


# ----------------------------------------------------------------------------------------------------------- class maps


def _normal(name: str) -> str:
    return ' '.join(str(name).lower().replace('_', ' ').split())


def match_classes(class_names: Sequence[str], card: ModelCard) -> list[int]:
    """Find each class of a dataset among a teacher's outputs, by name.

    The teacher's names are those of its config, else ImageNet's (WordNet ids and lemmas) where its number of outputs is
    an ImageNet's. A full name counts before a synonym ("tench" in "tench, Tinca tinca").

    Raises:
        UserError: naming classes that have no counterpart, or more than one.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    flag = '--teacher-class-map auto'
    names = card.label_names
    if names is not None:
        descriptions = card.config.get('label_descriptions') or {}
        texts = [[n, descriptions.get(n, '')] for n in names]
    elif subset := infer_imagenet_subset(card.config):
        info = ImageNetInfo(subset)
        texts = [[n, info.label_name_to_description(n)] for n in info.label_names()]
    else:
        raise UserError(
            f'{flag}: {card.name} does not name its {card.num_classes} outputs; give a JSON FILE of indices'
        )
    full: dict[str, set[int]] = {}
    partial: dict[str, set[int]] = {}
    for i, entries in enumerate(texts):
        for text in filter(None, entries):
            full.setdefault(_normal(text), set()).add(i)
            for part in text.split(','):
                partial.setdefault(_normal(part), set()).add(i)
    found = []
    for name in class_names:
        hits = full.get(_normal(name)) or partial.get(_normal(name)) or set()
        if not hits:
            parts = [partial.get(_normal(p), set()) for p in name.split(',')]
            hits = set().union(*parts)
        found.append(hits)
    for problem, wrong in (
        ('no counterpart', [n for n, h in zip(class_names, found) if not h]),
        ('more than one counterpart', [n for n, h in zip(class_names, found) if len(h) > 1]),
    ):
        if wrong:
            shown = ', '.join(map(repr, wrong[:5])) + (', …' if len(wrong) > 5 else '')
            raise UserError(
                f'{flag}: {problem} in {card.name} for {len(wrong)} of {len(class_names)} classes: {shown}. '
                'A JSON FILE maps them by hand.'
            )
    return [hits.pop() for hits in found]


def _check_order(class_names: Sequence[str], label_names: Sequence[str], card: ModelCard) -> None:
    """Raise UserError where a class of the dataset has its name at another output of the teacher."""
    theirs = [_normal(name) for name in label_names]
    outputs = {name: i for i, name in reversed(list(enumerate(theirs)))}
    ours = [_normal(name) for name in class_names]
    moved = [i for i, name in enumerate(ours) if name in outputs and theirs[i] != name]
    if not moved:
        return
    try:
        match_classes(class_names, card)
        way_out = 'give --teacher-class-map auto'
    except UserError as e:
        way_out = str(e)
    first = moved[0]
    raise UserError(
        f'--teacher {card.name}: it has {len(moved)} of the {len(ours)} classes of the dataset in another order '
        f'({class_names[first]!r}, class {first}, is its output {outputs[ours[first]]});\n{way_out}'
    )


def read_class_map(path: str, num_classes: int, class_names: Sequence[str] | None) -> list[int]:
    """Read a class map: a JSON list of the teacher's indices, or a mapping from class name or index to them.

    Raises:
        UserError: where the file is not one, or a class has no counterpart (it is named).
    """
    flag = f'--teacher-class-map {path}'
    try:
        data = json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as e:
        raise UserError(f"{flag}: cannot be read ({e.strerror}); expected 'auto' or a JSON file") from e
    except ValueError as e:
        raise UserError(f'{flag}: not valid JSON ({e})') from e
    names = list(class_names) if class_names else [str(i) for i in range(num_classes)]
    if isinstance(data, dict):
        unknown = [k for k in data if k not in names and not (k.isdecimal() and int(k) < num_classes)]
        if unknown:
            raise UserError(f"{flag}: '{unknown[0]}' is no class of the dataset{did_you_mean(unknown[0], names)}")
        data = [data.get(name, data.get(str(i))) for i, name in enumerate(names)]
        if absent := [n for n, v in zip(names, data) if v is None]:
            raise UserError(f'{flag}: no counterpart for class {", ".join(map(repr, absent[:5]))}')
    if not isinstance(data, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in data):
        raise UserError(f'{flag}: expected a JSON list or mapping of whole numbers')
    if len(data) != num_classes:
        raise UserError(f'{flag}: {len(data)} entries for {num_classes} classes')
    return data


# ------------------------------------------------------------------------------------------------------------- builders

# Names of settings, for the recipe: arguments of create_pair.
PAIR_SETTINGS = (
    'seed', 'in_chans', 'img_size', 'mean', 'std', 'interpolation', 'student_pretrained', 'teacher_pretrained',
    'teacher_checkpoint', 'teacher_class_map', 'teacher_img_size', 'teacher_mean', 'teacher_std',
)  # fmt: skip


@dataclass
class Pair:
    """A student, its teacher, and what the student sees.

    Attributes:
        student: a timm model over the dataset's classes.
        teacher: None where nothing is distilled.
        view: the student's normalisation.
        data_config: the student's preprocessing: input_size, mean, std, interpolation, crop_pct, crop_mode.
    """

    student: nn.Module
    teacher: Teacher | None
    view: InputView
    data_config: dict[str, Any]

    @property
    def img_size(self) -> int | None:
        """Height and width of the view where they are equal, else None."""
        height, width = self.data_config['input_size'][-2:]
        return height if height == width else None

    @property
    def teacher_data_config(self) -> dict[str, Any]:
        """The teacher's preprocessing on this dataset."""
        channels, *size = self.data_config['input_size']
        view = self.teacher.view
        mean, std = ((b.flatten() / 255).tolist() for b in (view.mean, view.std))
        return dict(
            self.data_config,
            input_size=(channels, *(view.size or size)),
            interpolation=view.interpolation if view.size else self.data_config['interpolation'],
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
    **kwargs: Any,
) -> Pair:
    """Build a student with a fresh head.

    Args:
        name: of a timm model.
        num_classes: of the dataset.
        pretrained: start from its published weights.
        img_size: size of the view; None for the model's.
        mean, std, interpolation, crop_pct: in place of the model's.
        **kwargs: for the model's constructor, None is left out.

    Returns:
        A pair without a teacher.

    Raises:
        UserError: as :func:`look_up` and :func:`build_model`.
    """
    from timm.data import resolve_input_data_config

    card = look_up(name, '--student')
    if img_size and card.config.get('fixed_input_size'):
        kwargs.setdefault('img_size', img_size)
    model = build_model(
        card, '--student', pretrained=pretrained, num_classes=num_classes, in_chans=in_chans,
        way_out='--no-student-pretrained starts it from scratch.', **kwargs,
    )  # fmt: skip
    args = dict(img_size=img_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)
    config = resolve_input_data_config(model, {k: v for k, v in args.items() if v is not None})
    config['mean'], config['std'] = (_per_channel(config[k], in_chans) for k in ('mean', 'std'))
    _try_forward(model, config['input_size'], num_classes, f'--student {name}')
    return Pair(model, None, InputView(config['mean'], config['std']), config)


def create_teacher(
    name: str,
    num_classes: int,
    *,
    class_names: Sequence[str] | None = None,
    pretrained: bool = True,
    checkpoint: str | None = None,
    class_map: str | Sequence[int] | None = None,
    to_fit: bool = False,
    in_chans: int = 3,
    view_size: tuple[int, int] = (224, 224),
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
        to_fit: it will be trained on this dataset first: a fresh head is what is wanted.
        in_chans: of the dataset.
        view_size: (H, W) of the images that the student sees.
        img_size: resize the view to this size for the teacher; None: only where its network wants one size.
        mean, std: in place of the model's.

    Raises:
        UserError: where its head does not fit (timm would put a random one in its place), its weights are not to be
            had, or a class has no counterpart.
    """
    card = look_up(name, '--teacher')
    kwargs: dict[str, Any] = dict(in_chans=in_chans)
    if img_size and card.config.get('fixed_input_size'):
        kwargs['img_size'] = img_size
    state = load_weights(checkpoint, '--teacher-checkpoint') if checkpoint else None
    outputs = num_classes
    if to_fit:
        if class_map is not None:
            raise UserError(
                '--teacher-class-map: a teacher that is fitted has the classes of the dataset; leave it out'
            )
        if checkpoint:
            raise UserError('--teacher-checkpoint with --teacher-epochs: choose one of the two')
    else:
        if state is not None:
            outputs = _head_size(state, card.config) or num_classes
        elif not card.has_weights or not pretrained:
            why = (
                'no weights are published for it'
                if not card.has_weights
                else '--no-teacher-pretrained leaves it random'
            )
            raise UserError(
                f'--teacher {name}: {why}. Give --teacher-epochs N to fit it on this dataset first, or '
                '--teacher-checkpoint FILE'
            )
        else:
            outputs = card.num_classes
            channels = tuple(card.config.get('input_size', (3,)))[0]
            if channels != in_chans:
                raise UserError(
                    f'--teacher {name}: its weights take images of {channels} channels, this run has {in_chans} '
                    f'(--in-chans); give --in-chans {channels}, or --teacher-epochs N to fit it on this dataset'
                )
        if class_map is None and outputs != num_classes:
            raise UserError(
                f'--teacher {name}: its head has {outputs} classes, the dataset {num_classes}; timm would put a random '
                'head in its place.\nWays out: --teacher-epochs N (fit it on this dataset first), --teacher-checkpoint '
                f'FILE (weights for these classes), --teacher-class-map auto|FILE (pick them from its {outputs})'
            )
    published = class_map is None and not to_fit and state is None
    names = card.label_names if published and class_names else None  # that must be those of the dataset
    if names:
        _check_order(class_names, names, card)
    index = _resolve_class_map(class_map, card, outputs, num_classes, class_names)
    model = build_model(
        card, '--teacher', pretrained=pretrained and state is None and card.has_weights, num_classes=outputs,
        way_out='--no-teacher-pretrained (with --teacher-epochs N) fits it from scratch on this dataset.', **kwargs,
    )  # fmt: skip
    if state is not None:
        _load_into(model, state, f'--teacher-checkpoint {checkpoint} for --teacher {name}')
    view = input_view(model, mean=mean, std=std, img_size=img_size, view_size=view_size)
    teacher = Teacher(model, view, index, name)
    teacher.other_names = bool(names) and not set(class_names) & set(names)
    size = view.size or view_size
    own = tuple(card.config.get('input_size', ())[-2:])
    if own and not to_fit and (state is None or own < tuple(size)):  # a file may come from training at another size
        teacher.own_size = own
    _try_forward(model, (in_chans, *size), outputs, f'--teacher {name}')
    return teacher


def create_pair(
    teacher: str | None,
    student: str,
    num_classes: int,
    *,
    class_names: Sequence[str] | None = None,
    seed: int | None = None,
    in_chans: int = 3,
    img_size: int | None = None,
    mean: Floats | None = None,
    std: Floats | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    student_pretrained: bool = False,
    student_kwargs: dict[str, Any] | None = None,
    teacher_pretrained: bool = True,
    teacher_checkpoint: str | None = None,
    teacher_class_map: str | Sequence[int] | None = None,
    teacher_img_size: int | None = None,
    teacher_mean: Floats | None = None,
    teacher_std: Floats | None = None,
    fit_teacher: bool = False,
    needs_teacher: Callable[[dict[str, Any]], bool] | None = None,
) -> Pair:
    """Build a student and its teacher by timm name.

    Args:
        teacher: None for a student alone.
        seed: of torch's generator before each of the two, so that neither's start depends on the other; None leaves it.
        student_kwargs: for the student's constructor.
        needs_teacher: asked with the student's preprocessing, whether to build the teacher; None: yes.
        Others: as in :func:`create_student`, and with `teacher_` as in :func:`create_teacher`.

    Raises:
        UserError: as these two.

    Example:
        >>> pair = create_pair('resnet34', 'resnet18', num_classes=10, teacher_checkpoint='teacher.safetensors')
        >>> task = DistillationTask(pair.student, pair.teacher, create_distill_loss('rld'))
    """
    taken = [k for k in student_kwargs or {} if k in inspect.signature(create_student).parameters]
    if taken:
        raise UserError(f'--model-kwargs {taken[0]}: the run sets it; see the flags of that name')
    if seed is not None:
        torch.manual_seed(seed)
    pair = create_student(
        student, num_classes, pretrained=student_pretrained, in_chans=in_chans, img_size=img_size, mean=mean, std=std,
        interpolation=interpolation, crop_pct=crop_pct, **(student_kwargs or {}),
    )  # fmt: skip
    if seed is not None:
        torch.manual_seed(seed)
    if teacher is not None and (needs_teacher is None or needs_teacher(pair.data_config)):
        pair.teacher = create_teacher(
            teacher, num_classes, class_names=class_names, pretrained=teacher_pretrained, checkpoint=teacher_checkpoint,
            class_map=teacher_class_map, to_fit=fit_teacher, in_chans=in_chans, img_size=teacher_img_size,
            view_size=tuple(pair.data_config['input_size'][-2:]), mean=teacher_mean, std=teacher_std,
        )  # fmt: skip
    return pair


def check_exports(pair: Pair, teacher_too: bool) -> None:
    """Try the export of what will be trained: the student, and perhaps the teacher.

    Raises:
        UserError: where one cannot be exported.
    """
    check_export(pair.student, '--student', pair.data_config)
    if teacher_too:
        check_export(pair.teacher.model, '--teacher', pair.teacher_data_config)


def least_teacher_accuracy(num_classes: int) -> float:
    """Top-1 below which a teacher counts as near chance: twice chance, or chance and a tenth of the rest if lower."""
    chance = 100 / num_classes
    return min(2 * chance, chance + 0.1 * (100 - chance))


def check_accuracy(name: str, top1: float, num_classes: int, least: float | None) -> None:
    """Raise UserError where a teacher's top-1 (percent) is below ``least``, by default
    :func:`least_teacher_accuracy`."""
    limit = least_teacher_accuracy(num_classes) if least is None else least
    if not top1 >= limit:
        near = ', which is near chance: are its classes those of the dataset, has it been fitted for too few epochs?'
        raise UserError(
            f'--teacher {name}: its top-1 of {top1:.2f} is below {limit:.4g}{near if least is None else ""}\n'
            '--min-teacher-acc sets another limit (0: none)'
        )


def weights_digest(model: nn.Module | None) -> str | None:
    """SHA-256 of a model's weights, whatever file they came from, of a teacher as it was loaded; None of none."""
    if model is None:
        return None
    if isinstance(model, Teacher) and model.digest is not None:
        return model.digest
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def audit(pair: Pair) -> list[str]:
    """Lines that say where teacher and student differ."""
    teacher, lines = pair.teacher, []
    if teacher is None:
        return lines
    for what in ('mean', 'std'):
        theirs, ours = ((getattr(view, what) / 255).flatten() for view in (teacher.view, pair.view))
        if not torch.allclose(theirs, ours):
            shown = (' '.join(f'{x:.4g}' for x in v.tolist()) for v in (theirs, ours))
            lines.append('normalisation ({}): teacher {}, student {}'.format(what, *shown))
    if teacher.view.size:
        h, w = pair.data_config['input_size'][-2:]
        lines.append(
            f'size: the teacher sees the {h}×{w} view resized to {teacher.view.size[0]}×{teacher.view.size[1]}'
        )
    made_for, sees = teacher.own_size, teacher.view.size or pair.data_config['input_size'][-2:]
    if made_for and not 0.5 <= sees[0] / made_for[0] <= 2:
        lines.append(
            f'size: the weights of the teacher were made for {made_for[0]}×{made_for[1]}, it sees {sees[0]}×{sees[1]} '
            f'(--teacher-img-size {made_for[0]} resizes)'
        )
    if teacher.other_names:
        lines.append("classes: none of the teacher's label names is one of the dataset's; they are taken in order")
    if teacher.class_map is not None:
        lines.append(f"classes: {len(teacher.class_map)} of the teacher's {teacher.model.num_classes} outputs are used")
    return lines


def _resolve_class_map(
    class_map: str | Sequence[int] | None,
    card: ModelCard,
    outputs: int,
    num_classes: int,
    class_names: Sequence[str] | None,
) -> list[int] | None:
    if class_map is None:
        return None
    if class_map == 'auto':
        if not class_names:
            raise UserError('--teacher-class-map auto: the dataset does not name its classes; give a JSON FILE')
        index = match_classes(class_names, card)
    elif isinstance(class_map, str):
        index = read_class_map(class_map, num_classes, class_names)
    else:
        index = list(class_map)
    if bad := [i for i in index if not 0 <= i < outputs]:
        raise UserError(f'--teacher-class-map: index {bad[0]} is not among the {outputs} outputs of {card.name}')
    if len(set(index)) < len(index):
        twice = next(i for i in index if index.count(i) > 1)
        raise UserError(f'--teacher-class-map: output {twice} of {card.name} stands for two classes')
    return index


def _try_forward(model: nn.Module, input_size: tuple[int, ...], num_classes: int, what: str) -> None:
    """One forward pass of a grey image, so that a size that a network cannot take shows before anything else."""
    training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, *input_size))
    except Exception as e:
        c, h, w = input_size
        raise UserError(f'{what}: cannot take images of {c}×{h}×{w} ({_first_line(e)}); try another --img-size') from e
    finally:
        model.train(training)
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f'{what}: expected logits [1, {num_classes}], the model gives {shape}')


def _per_channel(values: Floats, in_chans: int) -> tuple[float, ...]:
    return tuple(values) * in_chans if len(values) == 1 else tuple(values)


def _first_line(e: Exception) -> str:
    if is_not_plain(e):
        return 'they hold more than tensors and plain values'
    text = str(e).strip().splitlines()
    return text[0][:200] if text else type(e).__name__
