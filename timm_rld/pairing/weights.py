"""Model names to configs, files to weights."""

from __future__ import annotations

import argparse
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError, did_you_mean, is_not_plain
from ..files import sha256_of
from ..offline import hub_in_reach

_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN_TYPES = [
    argparse.Namespace, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType, _SCALAR,
    (_SCALAR, 'numpy.core.multiarray.scalar'),  # its name before NumPy 2
]  # fmt: skip


@dataclass
class ModelInfo:
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
        """Number of its outputs."""
        return self.config.get('num_classes', 1000)

    @property
    def label_names(self) -> list[str] | None:
        """Label names by output index, or None."""
        names = self.config.get('label_names')
        if isinstance(names, dict):
            names = {int(k): v for k, v in names.items()}
            names = [names[i] for i in range(len(names))] if set(names) == set(range(len(names))) else None
        return [str(name) for name in names] if names and len(names) == self.num_classes else None


def look_up(name: str, flag: str) -> ModelInfo:
    """Find a model by name: timm's registry, `hf-hub:user/model` or `local-dir:path`.

    Returns:
        What is known of it; no weights are loaded.

    Raises:
        UserError: where there is none; the message offers the nearest names.
    """
    from timm import models

    from .._timm import load_model_config_from_path

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
            why = 'no config.json in this folder' if missing else f'config.json cannot be read ({first_line(e)})'
        else:
            why = f'not found on the Hub ({first_line(e)})' if hub_in_reach() else 'the Hub is out of reach'
        raise UserError(f'{flag} {name}: {why}') from e
    has_weights = source is not None or any(config.get(k) for k in ('hf_hub_id', 'url', 'file'))
    return ModelInfo(name, config, source, has_weights, architecture, dict(model_args or {}))


def constructor_arguments(info: ModelInfo, img_size: int | None) -> dict[str, Any]:
    """Return the arguments that a teacher is built with, but for those that timm writes into each folder whether they
    were asked for or not: the same network has the same ones, by name and from its folder.

    Args:
        info: from :func:`look_up`.
        img_size: of `--teacher-img-size`.
    """
    from timm.models import get_pretrained_cfg

    arguments = {k: v for k, v in info.model_args.items() if k not in ('num_classes', 'in_chans', 'global_pool')}
    if img_size and info.config.get('fixed_input_size'):
        arguments['img_size'] = [img_size, img_size]
    native = get_pretrained_cfg(info.architecture, allow_unregistered=True)
    if native is not None and arguments.get('img_size') == list(native.input_size[-2:]):
        del arguments['img_size']
    return arguments


def build_model(info: ModelInfo, flag: str, *, pretrained: bool, fix: str, **kwargs: Any) -> nn.Module:
    """Return `timm.create_model`'s model, with errors that say what to do.

    Args:
        info: from :func:`look_up`.
        flag: that named the model.
        pretrained: load its published weights.
        fix: what to do where these cannot be reached.
        **kwargs: for the model, None is left out.

    Raises:
        UserError: weights out of reach, arguments that the model does not take.
    """
    from timm import create_model

    if pretrained and info.source != 'local-dir':
        hub_in_reach()
    try:
        return create_model(info.name, pretrained=pretrained, **kwargs)
    except TypeError as e:
        raise UserError(f'{flag} {info.name}: {first_line(e)}') from e
    except Exception as e:
        if not pretrained:
            raise UserError(f'{flag} {info.name}: cannot be built ({first_line(e)})') from e
        if info.source == 'local-dir':
            raise UserError(f'{flag} {info.name}: its weights cannot be loaded ({first_line(e)})') from e
        why = first_line(e) if hub_in_reach() else 'no network'
        raise UserError(f'{flag} {info.name}: its published weights cannot be reached ({why}). {fix}') from e


def load_weights(path: str, flag: str) -> dict[str, Tensor]:
    """Read a state dict: safetensors, or a .pth read with weights_only, bare or under `state_dict` or `model`.

    As in timm, averaged weights are preferred where the file has them (`state_dict_ema` or `model_ema`). Prefixes of
    wrappers (`module.`, `_orig_mod.`) are dropped.

    Returns:
        The state dict.

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
        raise UserError(f'{flag} {path}: not a checkpoint ({type(e).__name__}: {first_line(e)})') from e
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f'{flag} {path}: not a checkpoint (expected a state dict of tensors)')
    return state


def load_into(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load a state dict, or raise UserError with the keys that are missing, left over or of another shape."""
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


def head_size(state: dict[str, Tensor], config: dict[str, Any]) -> int | None:
    """Return the number of classes of the head in a state dict, by the classifier's name in the model's config."""
    names = config.get('classifier')
    names = (names,) if isinstance(names, str) else names or ()
    for name in names:
        for key in (f'{name}.weight', f'{name}.bias'):
            if key in state:
                return state[key].shape[0]
    return None


def weights_file(teacher: str, checkpoint: str | None = None) -> Path | None:
    """Return the file that holds a teacher's weights on this machine, or None where there is none (yet).

    Args:
        teacher: a timm name, `hf-hub:user/model` or `local-dir:path`.
        checkpoint: a file in place of the published ones.
    """
    if checkpoint is not None:
        path = Path(checkpoint).expanduser()
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    from .. import _timm

    info = look_up(teacher, '--teacher')
    config = info.config
    if info.source == 'local-dir':
        candidates = [Path(teacher.partition(':')[2]).expanduser() / name for name in _timm.PREFERRED_FILES]
    elif config.get('file'):
        candidates = [Path(config['file'])]
    elif config.get('hf_hub_id'):
        repository, revision = _timm.hf_split(config['hf_hub_id'])
        default = config.get('hf_hub_filename') or _timm.HF_WEIGHTS_NAME
        names = [*_timm.get_safe_alternatives(default), default]
        found = (try_to_load_from_cache(repository, name, revision=revision) for name in names)
        candidates = [Path(path) for path in found if isinstance(path, str)]
    elif config.get('url'):
        candidates = [Path(_timm.get_cache_dir()) / os.path.basename(config['url'])]
    else:
        candidates = []
    return next((path for path in candidates if path.is_file()), None)


def teacher_facts(
    name: str | None, checkpoint: str | None = None, class_map: str | None = None, epochs: int | None = None
) -> dict[str, str]:
    """Return what the files of a teacher hold, as digests by name; a resumed run may find others in their place.

    Args:
        name: a timm name, `hf-hub:user/model` or `local-dir:path`; None for no teacher.
        checkpoint: a file in place of its published weights.
        class_map: a file, or `auto`.
        epochs: for which it is trained in the run; then it has no file before.
    """
    files: dict[str, Path | None] = {}
    if name is not None and not epochs:
        files["the teacher's weights"] = weights_file(name, checkpoint)
    if class_map is not None and class_map != 'auto':
        files['--teacher-class-map'] = Path(class_map).expanduser()
    return {f'{what} (a digest)': sha256_of(file) for what, file in files.items() if file}


def weights_origin(model: nn.Module, name: str) -> dict[str, str | None]:
    """Return where a pretrained model's weights come from: `name` (on the Hub, where they lie there) and `license`, as
    timm records it; None where it does not.

    Args:
        model: built with its published weights.
        name: as it was given: a timm name, `hf-hub:user/model` or `local-dir:path`.
    """
    config: Any = model.pretrained_cfg
    source, _, rest = name.rpartition(':')
    if source == 'local-dir':
        where: str = Path(rest).name
    else:
        where = rest if source == 'hf-hub' else config.get('hf_hub_id') or name
    return {'name': where.partition('@')[0], 'license': config.get('license')}


def weights_digest(model: nn.Module | None) -> str | None:
    """Return the SHA-256 of a model's weights, whatever file they came from; of a teacher, as it was loaded."""
    if model is None:
        return None
    if (loaded := getattr(model, 'digest', None)) is not None:  # of a Teacher, whose batch norms are folded
        return loaded
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def first_line(e: Exception) -> str:
    """Return the first line of an error's message, at most 200 characters."""
    if is_not_plain(e):
        return 'they hold more than tensors and plain values'
    text = str(e).strip().splitlines()
    return text[0][:200] if text else type(e).__name__
