"""Which output of a teacher stands for each class of a dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, did_you_mean
from .weights import ModelInfo


def simple_name(name: str) -> str:
    """Return a class name in lower case, with single spaces in place of underscores and other white space."""
    return ' '.join(name.lower().replace('_', ' ').split())


def _output_texts(info: ModelInfo) -> list[tuple[str, str]] | None:
    """Return the name and the description of each output of a model: those of its config, else ImageNet's (WordNet ids
    and lemmas) where its number of outputs is an ImageNet's, else None."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if info.label_names is not None:
        descriptions = info.config.get('label_descriptions') or {}
        return [(name, descriptions.get(name, '')) for name in info.label_names]
    if subset := infer_imagenet_subset(info.config):
        imagenet = ImageNetInfo(subset)
        return [(name, imagenet.label_name_to_description(name)) for name in imagenet.label_names()]
    return None


def output_names(info: ModelInfo) -> list[str] | None:
    """Return the names of a model's outputs, WordNet ids for those of ImageNet; None where they are not known."""
    texts = _output_texts(info)
    return None if texts is None else [name for name, _ in texts]


def find_classes(class_names: Sequence[str], info: ModelInfo) -> list[set[int]] | None:
    """Return for each class of a dataset the outputs of a model that its name fits; None where they have no names.

    A full name counts before a synonym ("tench" in "tench, Tinca tinca").
    """
    texts = _output_texts(info)
    if texts is None:
        return None
    full: dict[str, set[int]] = {}
    partial: dict[str, set[int]] = {}
    for i, entries in enumerate(texts):
        for text in filter(None, entries):
            full.setdefault(simple_name(text), set()).add(i)
            for part in text.split(','):
                partial.setdefault(simple_name(part), set()).add(i)
    found = []
    for name in class_names:
        hits = full.get(simple_name(name)) or partial.get(simple_name(name)) or set()
        if not hits:
            parts = [partial.get(simple_name(p), set()) for p in name.split(',')]
            hits = set().union(*parts)
        found.append(hits)
    return found


def match_classes(class_names: Sequence[str], info: ModelInfo) -> list[int]:
    """Find each class of a dataset among a teacher's outputs, by name.

    The teacher's names are those of its config, else ImageNet's (WordNet ids and lemmas) where its number of outputs is
    an ImageNet's. A full name counts before a synonym ("tench" in "tench, Tinca tinca").

    Returns:
        For each class the index of the teacher's output.

    Raises:
        UserError: naming classes that have no counterpart, or more than one.
    """
    flag = '--teacher-class-map auto'
    found = find_classes(class_names, info)
    if found is None:
        raise UserError(
            f'{flag}: {info.name} does not name its {info.num_classes} outputs; give a JSON FILE of indices'
        )
    for problem, wrong in (
        ('no counterpart', [n for n, h in zip(class_names, found) if not h]),
        ('more than one counterpart', [n for n, h in zip(class_names, found) if len(h) > 1]),
    ):
        if wrong:
            shown = ', '.join(map(repr, wrong[:5])) + (', …' if len(wrong) > 5 else '')
            raise UserError(
                f'{flag}: {problem} in {info.name} for {len(wrong)} of {len(class_names)} classes: {shown}. '
                'A JSON FILE maps them by hand.'
            )
    return [hits.pop() for hits in found]


def check_order(class_names: Sequence[str], label_names: Sequence[str], info: ModelInfo) -> None:
    """Raise UserError where a class of the dataset has its name at another output of the teacher."""
    theirs = [simple_name(name) for name in label_names]
    outputs = {name: i for i, name in reversed(list(enumerate(theirs)))}
    ours = [simple_name(name) for name in class_names]
    moved = [i for i, name in enumerate(ours) if name in outputs and theirs[i] != name]
    if not moved:
        return
    try:
        match_classes(class_names, info)
        fix = 'give --teacher-class-map auto'
    except UserError as e:
        fix = str(e)
    first = moved[0]
    raise UserError(
        f'--teacher {info.name}: it has {len(moved)} of the {len(ours)} classes of the dataset in another order '
        f'({class_names[first]!r}, class {first}, is its output {outputs[ours[first]]});\n{fix}'
    )


def read_class_map(path: str, num_classes: int, class_names: Sequence[str] | None) -> list[int]:
    """Read a class map: a JSON list of the teacher's indices, or a mapping from class name or index to them.

    Returns:
        For each class the index of the teacher's output.

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


def resolve_class_map(
    class_map: str | Sequence[int] | None,
    info: ModelInfo,
    outputs: int,
    num_classes: int,
    class_names: Sequence[str] | None,
) -> list[int] | None:
    """Return for each class the index of the teacher's output, checked; None where no map is given."""
    if class_map is None:
        return None
    if class_map == 'auto':
        if not class_names:
            raise UserError('--teacher-class-map auto: the dataset does not name its classes; give a JSON FILE')
        index = match_classes(class_names, info)
    elif isinstance(class_map, str):
        index = read_class_map(class_map, num_classes, class_names)
    else:
        index = list(class_map)
    if bad := [i for i in index if not 0 <= i < outputs]:
        raise UserError(f'--teacher-class-map: index {bad[0]} is not among the {outputs} outputs of {info.name}')
    if len(set(index)) < len(index):
        twice = next(i for i in index if index.count(i) > 1)
        raise UserError(f'--teacher-class-map: output {twice} of {info.name} stands for two classes')
    return index
