"""Features of a pair: which maps two networks have, which of them belong together, and how a network is asked for
logits and features in one forward pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import UserError
from .weights import first_line

ISOTROPIC_STAGES = 4  # of a network whose maps all have one size, beside another such network


@dataclass(frozen=True)
class FeatureMap:
    """A map that a network's `forward_intermediates` gives.

    Attributes:
        index: its place there, 0 for the first.
        channels: C.
        size: (H, W).
        stem: whether it comes before all stages.
    """

    index: int
    channels: int
    size: tuple[int, int]
    stem: bool = False

    def __str__(self) -> str:
        return f'{self.index} ({self.channels}×{self.size[0]}×{self.size[1]})'


@dataclass(frozen=True)
class Taps:
    """What a network is asked for beside its logits.

    Attributes:
        indices: of maps, rising.
        pooled: the pooled features before the classifier, as the last feature.
        classifier: whether the classifier, applied to these, gives the logits.
    """

    indices: tuple[int, ...] = ()
    pooled: bool = False
    classifier: bool = False


@dataclass(frozen=True)
class Features:
    """What a network has, as :func:`look_at_features` finds it.

    Attributes:
        maps: of `forward_intermediates`; empty where they were not looked at.
        all_stages: whether each of them is a stage (or the stem) by its network's own word.
        width: of the pooled features.
        classifier: as in :class:`Taps`.
    """

    maps: tuple[FeatureMap, ...]
    all_stages: bool
    width: int
    classifier: bool

    @property
    def isotropic(self) -> bool:
        """Whether all maps have one size."""
        return len({m.size for m in self.maps}) == 1

    def stages(self, count: int) -> list[FeatureMap]:
        """Return the maps to choose from, from the shallowest to the deepest: the stem, and the last map of each size;
        of an isotropic network ``count`` at evenly spaced depths."""
        maps = list(self.maps)
        if self.isotropic:
            count = min(count, len(maps))
            return [maps[math.ceil((i + 1) * len(maps) / count) - 1] for i in range(count)]
        if self.all_stages:
            return maps
        last = {m.size: m for m in maps if not m.stem}
        return [m for m in maps if m.stem or last[m.size] is m]


MapPairs = list[tuple[FeatureMap, FeatureMap]]


def pair_maps(student: Features, teacher: Features, stages: Sequence[str] = ()) -> MapPairs:
    """Return which map of the student belongs to which of the teacher, from the shallowest to the deepest.

    Without ``stages`` they are paired from the deepest: the stem and the last map of each size where a network has maps
    of several sizes, else maps at evenly spaced depths, as many as the other network has stages.

    Args:
        student, teacher: of :func:`look_at_features`.
        stages: `N` for map N of both networks, `S:T` for two different ones, counted from 0.

    Raises:
        UserError: for maps that there are not, or that are not in order.
    """
    if stages:
        return _named_pairs(student, teacher, stages)
    counts = [sum(not m.stem for m in f.stages(0)) for f in (student, teacher) if not f.isotropic]
    count = min(counts, default=ISOTROPIC_STAGES)
    both = [f.stages(count)[::-1] for f in (student, teacher)]
    return list(zip(*both))[::-1]


def _named_pairs(student: Features, teacher: Features, stages: Sequence[str]) -> MapPairs:
    found: MapPairs = []
    for text in stages:
        first, sep, second = text.partition(':')
        try:
            numbers = int(first), int(second if sep else first)
        except ValueError as e:
            raise UserError(f'--feature-stages {text}: expected the number of a map, or two as 2:3') from e
        pair = []
        for who, number, features in zip(('student', 'teacher'), numbers, (student, teacher)):
            if not 0 <= number < len(features.maps):
                has = ', '.join(map(str, features.maps))
                raise UserError(f'--feature-stages {text}: the {who} has no map {number}; it has {has}')
            pair.append(features.maps[number])
        found.append((pair[0], pair[1]))
    for before, after in zip(found, found[1:]):
        if not all(b.index < a.index for b, a in zip(before, after)):
            raise UserError(f'--feature-stages {" ".join(stages)}: name each map once, from the shallowest on')
    return found


# ---------------------------------------------------------------------------------------------------------- one network


def forward_with_features(
    model: nn.Module, x: Tensor, taps: Taps, head_in_float32: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Return a network's logits `[B, C]`, and its features: maps `[B, C, H, W]`, then pooled ones `[B, D]`.

    Args:
        x: normalised images `[B, C, H, W]`.
        taps: what is asked for.
        head_in_float32: under autocast too.
    """
    network: Any = model
    if taps.indices:
        final, found = network.forward_intermediates(x, indices=list(taps.indices))
    else:
        final, found = network.forward_features(x), []
    if head_in_float32 and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _head(network, tree_map(to_float32, final), found, taps)
    return _head(network, final, found, taps)


def _head(network: Any, final: Any, found: Sequence[Tensor], taps: Taps) -> tuple[Tensor, list[Tensor]]:
    if not taps.pooled:
        return network.forward_head(final), list(found)
    pooled = network.forward_head(final, pre_logits=True)
    logits = network.get_classifier()(pooled) if taps.classifier else network.forward_head(final)
    return logits, [*found, pooled.flatten(1)]


def to_float32(value: Any) -> Any:
    """A floating tensor as float32, anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class WithFeatures(nn.Module):
    """A network that gives logits and features in one call (:func:`forward_with_features`), for what wraps a module:
    DDP, `torch.compile`, autocast. The network itself, and the names of its weights, stay as they are.

    Attributes:
        module: the network.
    """

    def __init__(self, module: nn.Module, taps: Taps) -> None:
        super().__init__()
        self.module, self.taps = module, taps

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return forward_with_features(self.module, x, self.taps)


@torch.no_grad()
def look_at_features(
    model: nn.Module, size: tuple[int, ...], what: str, *, maps: bool = True, train: bool = False
) -> Features:
    """Run a network on two images, and return what features it has.

    Args:
        size: (C, H, W) of the images.
        what: it is, for messages: `--student NAME`.
        maps: look at the maps of `forward_intermediates` too.
        train: see whether they are the same in training, in a copy of the network.

    Raises:
        UserError: where it has none, where they are not what its `feature_info` says, or where it gives other logits
            with its features than without.
    """
    network: Any = model
    refused = f'--feature-distill: {what} cannot be asked for features'
    if maps and not hasattr(network, 'forward_intermediates'):
        raise UserError(f'{refused}: it has no forward_intermediates; `--feature-distill feature` needs none')
    like = next(model.parameters())
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    training = model.training
    with torch.random.fork_rng(devices=[]):
        try:
            logits = network.eval()(x)
            final, found = network.forward_intermediates(x) if maps else (network.forward_features(x), [])
            pooled = network.forward_head(final, pre_logits=True)
            again, classifier = network.forward_head(final), _try_classifier(network, pooled)
            if train:
                copied: Any = copy.deepcopy(network).train()
                shapes = [tuple(m.shape) for m in copied.forward_intermediates(x)[1]] if maps else []
            else:
                shapes = [tuple(m.shape) for m in found]
        except Exception as e:
            raise UserError(f'{refused} ({first_line(e)})') from e
        finally:
            model.train(training)
    if not _same(again, logits):
        raise UserError(f'{refused}: it gives other logits with its features than without')
    if not isinstance(pooled, Tensor) or pooled.flatten(1).shape[1] != max(pooled.shape[1:]):
        raise UserError(f'{refused}: its pooled features are no vectors [B, D]')
    info = _feature_info(network) if maps else []
    if wrong := _differences(info, shapes, x):
        raise UserError(f'{refused}: {wrong}')
    own_word = bool(info) and 'stem' in info[0]
    found_maps = tuple(
        FeatureMap(i, s[1], (s[2], s[3]), stem=_is_stem(info, i)) for i, s in enumerate(shapes)
    )  # fmt: skip
    width = pooled.flatten(1).shape[1]
    return Features(found_maps, own_word, width, classifier is not None and _same(classifier, logits))


def _try_classifier(network: Any, pooled: Tensor) -> Tensor | None:
    """The classifier's logits of pooled features; None where there is no single one."""
    try:
        return network.get_classifier()(pooled)
    except Exception:
        return None


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return False
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def _feature_info(network: Any) -> list[dict[str, Any]]:
    info = getattr(network, 'feature_info', [])
    return list(getattr(info, 'info', info))


def _differences(info: list[dict[str, Any]], shapes: list[tuple[int, ...]], x: Tensor) -> str:
    """Return what is wrong with some maps, or an empty text."""
    if len(info) != len(shapes):
        return f'it gives {len(shapes)} maps, its feature_info lists {len(info)}'
    for i, (entry, shape) in enumerate(zip(info, shapes)):
        if len(shape) != 4 or shape[0] != len(x):
            return f'its map {i} is {list(shape)}, and no [B, C, H, W]'
        if shape[1] != entry['num_chs']:
            return f'its map {i} has {shape[1]} channels in training, its feature_info says {entry["num_chs"]}'
        expected = x.shape[-1] / entry['reduction']
        if not expected / 2 - 1 <= shape[3] <= 2 * expected + 1:
            return f'its map {i} is {shape[3]} wide, its feature_info says a {entry["reduction"]}th of {x.shape[-1]}'
    return ''


def _is_stem(info: list[dict[str, Any]], index: int) -> bool:
    """Whether a map is that of the stem: the first, where its network says so, or names its module unlike the next."""
    if index or len(info) < 2:
        return False
    if 'stem' in info[0]:
        return bool(info[0]['stem'])
    first, second = (str(entry['module']).partition('.')[0].rstrip('_0123456789') for entry in info[:2])
    return first != second
