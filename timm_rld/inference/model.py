"""From a run, a model folder or a model's name to the network, its preprocessing and the names of its classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..config import Config, load_yaml
from ..errors import UsageError, UserError
from ..hub import find_weights
from ..pairing import ModelInfo, Normalize, build_model, find_classes, load_into, load_weights, look_up, simple_name
from ..run_folder import read_run

WEIGHTS = ('last', 'best', 'ema')


@dataclass
class OpenModel:
    """A trained classifier.

    Attributes:
        name: as given.
        model: the network, in eval mode, on the CPU.
        normalize: from uint8 pixels to what it takes.
        data_config: its preprocessing: input_size, mean, std, interpolation, crop_pct, crop_mode.
        info: what its name or folder says of it.
        settings: of the run that trained it; None where it is no run.
        run: folder of that run.
    """

    name: str
    model: nn.Module
    normalize: Normalize
    data_config: dict[str, Any]
    info: ModelInfo
    settings: Config | None = None
    run: Path | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of its outputs: its label names, ImageNet's for a network of ImageNet, else numbers."""
        from timm.data import ImageNetInfo, infer_imagenet_subset

        if names := self.info.label_names:
            return names
        if subset := infer_imagenet_subset(self.info.config):
            return list(ImageNetInfo(subset).label_descriptions())
        return [str(i) for i in range(self.info.num_classes)]


def model_name(name: str, flag: str = 'model') -> str:
    """Return timm's name of a model, given by that name or by its folder.

    Raises:
        UserError: where it is a folder without a model, or a path that leads nowhere; it names ``flag``.
    """
    folder = Path(name).expanduser()
    if (folder / 'config.json').is_file():
        return f'local-dir:{folder}'
    if folder.is_dir():
        there = ', '.join(str(p.parent) for p in sorted(folder.glob('*/config.json')))
        hint = f'; models are in {there}' if there else ''
        raise UserError(f'{flag} {name}: neither the folder of a run (args.yaml) nor of a model (config.json){hint}')
    if os.sep in name and ':' not in name:
        raise UserError(f'{flag} {name}: no such folder')
    return name


def open_model(name: str, weights: str = 'last') -> OpenModel:
    """Open a model to use it.

    Args:
        name: a run folder, a model folder, `hf-hub:user/model`, or a timm name with published weights.
        weights: of a run: `last`, `best` or `ema`.

    Raises:
        UserError: where there is none, the run has not finished, or it does not have these weights.
        UsageError: for other weights than the last of what is no run.
    """
    from timm.data import resolve_data_config

    folder, file, settings = Path(name).expanduser(), None, None
    is_run = (folder / 'args.yaml').is_file() or (folder / 'facts.json').is_file()
    if is_run:
        file = find_weights(read_run(folder), weights, '--weights')
        settings = Config(**load_yaml(str(folder / 'args.yaml'), name))
        has_config = (file.parent / 'config.json').is_file()  # else it is a checkpoint
        found, file = f'local-dir:{file.parent if has_config else folder / "student"}', None if has_config else file
    elif weights != 'last':
        raise UsageError(f'--weights {weights}: {name} is no run folder, and has one set of weights; remove it')
    else:
        found = model_name(name)
    info = look_up(found, 'model')
    if not info.has_weights:
        raise UserError(f'model {name}: no weights are published for it; give a folder, or hf-hub:user/model')
    model = build_model(info, 'model', pretrained=True, fix='Give the folder of a model, or try again online.').eval()
    if file is not None:
        load_into(model, load_weights(str(file), '--weights'), str(file))
    data_config = resolve_data_config({}, model=model, use_test_size=True)
    if (channels := data_config['input_size'][0]) not in (1, 3):
        raise UserError(f'model {name}: takes images of {channels} channels; those of 1 and 3 can be read')
    normalize = Normalize(data_config['mean'], data_config['std'])
    return OpenModel(name, model, normalize, data_config, info, settings, folder if is_run else None)


def _exact(name: str) -> str:
    return name


def output_of_each_class(
    info: ModelInfo, model: str, classes: Sequence[str] | None, num_classes: int
) -> list[int] | None:
    """Return a model's output for each class of a dataset; None where they are the same.

    They are matched by name. A model that does not name its outputs, or a dataset that does not name its classes, is
    taken as it is, if their numbers agree. So is a model with ImageNet's number of outputs, where fewer than half of
    the dataset's names are those of ImageNet.

    Args:
        model: for messages.

    Raises:
        UserError: with the classes that only one of the two has.
    """
    labels, outputs = info.label_names, info.num_classes
    fix = "A --class-map FILE (one name per line) with all of the model's classes gives the dataset the same list"
    if labels is None or classes is None:
        if outputs != num_classes:
            raise UserError(f'{model}: it has {outputs} classes, the dataset {num_classes}. {fix}')
        return None if classes is None else _imagenet_outputs(info, model, classes, fix)
    if list(classes) == labels:
        return None
    for key in (_exact, simple_name):
        places = {key(label): i for i, label in enumerate(labels)}
        wanted = [key(name) for name in classes]
        if len(places) == len(labels) == len(set(wanted)) and set(wanted) == set(places):
            return [places[name] for name in wanted]
    known, there = {simple_name(x) for x in labels}, {simple_name(x) for x in classes}
    parts = []
    for who, names in (
        ('only in the dataset', [x for x in classes if simple_name(x) not in known]),
        ('only in the model', [x for x in labels if simple_name(x) not in there]),
    ):
        if names:
            more = f', … ({len(names)} in all)' if len(names) > 10 else ''
            parts.append(f'{who}: {", ".join(map(repr, names[:10]))}{more}')
    raise UserError(f'{model}: the dataset has other classes; {"; ".join(parts) or "a name comes twice"}.\n{fix}')


def _imagenet_outputs(info: ModelInfo, model: str, classes: Sequence[str], fix: str) -> list[int] | None:
    """Return the outputs of a model that does not list its labels, but may have those of ImageNet."""
    found = find_classes(classes, info)
    if found is None or all(i in hits for i, hits in enumerate(found)) or 2 * sum(map(bool, found)) < len(found):
        return None
    order = [next(iter(hits)) if len(hits) == 1 else -1 for hits in found]
    if len({i for i in order if i >= 0}) < len(order):
        wrong = [name for name, i in zip(classes, order) if i < 0 or order.count(i) > 1]
        shown = ', '.join(map(repr, wrong[:5])) + (f', … ({len(wrong)} in all)' if len(wrong) > 5 else '')
        raise UserError(
            f'{model}: its classes are those of ImageNet, in which {shown} has no output of its own.\n{fix}'
        )
    return order
