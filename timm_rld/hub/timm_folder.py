"""A model as a plain timm folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import UserError, WriteError, writing

# What an exported config must not inherit from the base weights, since it is not true of ours.
_BASE_WEIGHTS_KEYS = ('tag', 'origin_url', 'paper_ids', 'paper_name', 'license', 'description', 'notes')


def export_model(
    model: nn.Module,
    folder: str | Path,
    *,
    data_config: dict[str, Any],
    label_names: list[str] | None = None,
    about: str = '',
) -> Path:
    """Write a timm model folder (config.json, model.safetensors, README.md) for `timm.create_model('local-dir:…')`.

    The folder appears whole or not at all. What the config would inherit from the base weights and is no longer true
    (tag, origin, papers, license, test size and crop) is left out or overwritten.

    Args:
        model: a timm model, unwrapped.
        folder: is replaced if it exists.
        data_config: preprocessing used in validation: input_size, mean, std, interpolation, crop_pct, crop_mode.
        label_names: class names by index.
        about: a sentence for its README.

    Returns:
        The folder.

    Raises:
        UserError: where it cannot be written.
    """
    folder = Path(folder)
    parts = folder.with_name(f'.{folder.name}.{os.getpid()}.tmp')
    data_config = dict(data_config, test_input_size=data_config['input_size'], test_crop_pct=data_config['crop_pct'])
    hook = model.register_state_dict_post_hook(_separate)
    try:
        with writing(folder):
            _save_for_hf(model, parts, dict(label_names=list(label_names)) if label_names else {}, data_config)
            config_file = parts / 'config.json'
            config = json.loads(config_file.read_text(encoding='utf-8'))
            for key in _BASE_WEIGHTS_KEYS:
                config['pretrained_cfg'].pop(key, None)
            config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding='utf-8')
            (parts / 'README.md').write_text(_how_to_load(model, folder.name, about), encoding='utf-8')
            if folder.exists():
                shutil.rmtree(folder)
            parts.rename(folder)
    finally:
        hook.remove()
        shutil.rmtree(parts, ignore_errors=True)
    return folder


def _architecture(model: nn.Module) -> str:
    """Return timm's name of a network."""
    config: Any = model.pretrained_cfg
    return config['architecture']


def _separate(model: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """Give each tensor of a state dict contiguous memory of its own, as safetensors requires: some networks (coat) use
    the same weights in several places, and in training they may lie channels-last."""
    seen = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        value = value.contiguous()
        shared = value.untyped_storage().data_ptr() in seen
        seen.add(value.untyped_storage().data_ptr())
        state[name] = value.clone() if shared else value


def check_export(model: nn.Module, flag: str, data_config: dict[str, Any]) -> None:
    """Export a model into a temporary folder and load it again, before hours are spent on training it.

    Args:
        flag: that named the model.
        data_config: as in :func:`export_model`.

    Raises:
        UserError: where it cannot be exported, or does not come back as the same network.
    """
    from timm import create_model

    refused = f'{flag}: {_architecture(model)} cannot be exported and loaded again as a timm folder'
    training, x = model.training, torch.rand(1, *data_config['input_size'], generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix='timm_rld-') as parent, torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            folder = export_model(model, Path(parent) / 'model', data_config=data_config)
            again = create_model(f'local-dir:{folder}', pretrained=True).eval()
            same = all(torch.equal(*pair) for pair in zip(model.state_dict().values(), again.state_dict().values()))
            same = same and torch.allclose(model.eval()(x), again(x), rtol=1e-3, atol=1e-3, equal_nan=True)
        except (OSError, WriteError):  # no room for a trial, which is not the network's fault
            return
        except Exception as e:
            why = str(e).strip().partition('\n')[0][:200] or type(e).__name__
            raise UserError(f'{refused} ({why}); use another architecture') from e
        finally:
            model.train(training)
    if not same:
        raise UserError(f'{refused} (it is another network then); use another architecture')


def _save_for_hf(model: nn.Module, folder: Path, model_config: dict[str, Any], data_config: dict[str, Any]) -> None:
    """timm's, with an OSError where safetensors says in words alone what the disk did."""
    from timm.models import save_for_hf

    try:
        save_for_hf(model, str(folder), model_config=model_config, safe_serialization=True, data_config=data_config)
    except SafetensorError as e:
        if not (found := re.search(r'\(os error (\d+)\)', str(e))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from e


def _how_to_load(model: nn.Module, folder: str, about: str) -> str:
    """Return a README: the lines that load a model folder. Networks of ours need our registration first."""
    package = __package__.partition('.')[0]
    ours = type(model).__module__.partition('.')[0] == package
    name = f'local-dir:path/to/{folder}'  # quoted as Python does: a backtick or a line's end stays within it
    registers = f"import {package}  # puts {_architecture(model)} into timm's registry\n"
    return (
        f'# {_architecture(model)}\n\nA timm model folder, written by {package}. {about}'.rstrip() + '\n\n```python\n'
        f'{registers if ours else ""}import timm\n\n'
        f'model = timm.create_model({name!r}, pretrained=True).eval()\n'
        'config = timm.data.resolve_data_config({}, model=model, use_test_size=True)\n'
        'transform = timm.data.create_transform(**config)\n```\n'
    )
