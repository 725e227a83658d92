"""Poisoned logits: what a teacher says is changed on a part of the training images, to study what a criterion makes of
a teacher that lies.

The attacks are those of malicious clients in federated distillation: FDLA ("Logits Poisoning Attack in Federated
Distillation", Tang et al., 2024, arXiv 2401.03685) and PCFDLA ("Peak-Controlled Logits Poisoning Attack in Federated
Distillation", Tang et al., 2024, arXiv 2407.18039), with FDPLA, zeros and noise beside them as in the programs that
compare them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import UsageError, UserError, did_you_mean
from .seeds import POISON_NOISE, POISONED, derive_seed

MAX_STRENGTH = 1e4


@dataclass(frozen=True)
class Attack:
    """A row of the table.

    Attributes:
        change: (logits `[B, C]`, strength) → what the criterion gets; None for noise, which the logits do not enter.
        strength: the default one; None: it takes none.
        signed: whether the strength may be negative.
    """

    change: Callable[[Tensor, float], Tensor] | None
    strength: float | None = None
    signed: bool = False


def _fdla(logits: Tensor, _: float) -> Tensor:
    order = ranking(logits)
    return logits.scatter(1, order, logits.gather(1, order).roll(1, 1))


def _fdpla(logits: Tensor, _: float) -> Tensor:
    order = ranking(logits)
    return logits.scatter(1, order, logits.gather(1, order).flip(1))


def _pcfdla(logits: Tensor, strength: float) -> Tensor:
    return torch.full_like(logits, -strength).scatter(1, ranking(logits)[:, 1:2], strength)


ATTACKS: dict[str, Attack] = {
    'fdla': Attack(_fdla),
    'pcfdla': Attack(_pcfdla, strength=9.0, signed=True),
    'fdpla': Attack(_fdpla),
    'zero': Attack(lambda logits, _: torch.zeros_like(logits)),
    'random': Attack(None, strength=1.0),
}


def ranking(logits: Tensor) -> Tensor:
    """Return the classes of each row from the highest logit to the lowest, of equals the lower index first.

    Args:
        logits: `[B, C]`.

    Returns:
        int64 `[B, C]`.
    """
    return logits.sort(dim=1, descending=True, stable=True).indices


def poison_logits(
    logits: Tensor,
    attack: str,
    strength: float | None = None,
    *,
    seed: int = 0,
    epoch: int = 1,
    indices: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Return the logits that an attacker puts in place of a teacher's.

    With o the classes of a row by falling logit (:func:`ranking`), v their values in that order, and s the strength:

    - `fdla`: each class takes the value of the one above it, the first the lowest: out[o_{k+1}] = v_k, out[o_0] =
      v_{C-1}. The second class becomes the first, with the same probability.
    - `pcfdla`: out[o_1] = s, all others -s.
    - `fdpla`: the ranks reversed, out[o_k] = v_{C-1-k}.
    - `zero`: all 0.
    - `random`: s · N(0, 1), of each image and epoch its own (:func:`poison_noise`).

    Args:
        logits: `[B, C]`.
        attack: a name of the table.
        strength: s, of `pcfdla` (default 9; negative: the second class becomes the lowest) and `random` (default 1).
        seed, epoch, indices: of `random`: what its noise follows from; by default the images are 0, 1, … B - 1.

    Returns:
        `[B, C]`, with dtype and device of ``logits``.

    Raises:
        ValueError: for an unknown attack, a strength that does not fit, or logits that are no `[B, C]` of floats with
            at least two classes.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f'poison_logits: expected floats [B, C] with at least 2 classes, got {logits.dtype} {[*logits.shape]}'
        )
    strength = check_strength(attack, strength) or 0.0
    change = ATTACKS[attack].change
    if change is not None:
        return change(logits, strength)
    images = range(len(logits)) if indices is None else [int(i) for i in indices]
    noise = strength * poison_noise(images, logits.shape[1], seed, epoch)
    return torch.from_numpy(noise).to(logits)


def check_strength(attack: str, strength: float | None) -> float | None:
    """Return the strength of an attack: the one that is given, else its default; None where it takes none.

    Raises:
        ValueError: for an unknown attack, one that takes no strength, or a strength that does not fit.
    """
    if attack not in ATTACKS:
        raise ValueError(f"unknown attack '{attack}'{did_you_mean(attack, ATTACKS)}; known: {', '.join(ATTACKS)}")
    row = ATTACKS[attack]
    if strength is None or row.strength is None:
        if strength is not None:
            takers = ' and '.join(name for name, a in ATTACKS.items() if a.strength is not None)
            raise ValueError(f'{attack} takes no strength, got {strength:g} ({takers} do)')
        return row.strength
    if not 0 < (abs(strength) if row.signed else strength) <= MAX_STRENGTH:
        what = 'another number than 0' if row.signed else 'above 0'
        raise ValueError(f'the strength of {attack} must be {what}, up to {MAX_STRENGTH:g}, got {strength:g}')
    return float(strength)


def poisoned_indices(length: int, fraction: float, seed: int) -> NDArray[np.int64]:
    """Return which of a dataset's images are poisoned: the first ⌊fraction · length + ½⌋ of a permutation that follows
    from the seed. Those of a smaller fraction are among those of a larger one.

    Args:
        length: images.
        fraction: 0 to 1.
        seed: of the run.

    Returns:
        Their indices in rising order, int64 `[n]`.

    Raises:
        ValueError: for a fraction outside 0..1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f'fraction must be from 0 to 1, got {fraction}')
    order = np.random.default_rng(derive_seed(POISONED, seed)).permutation(length)
    return np.sort(order[: math.floor(fraction * length + 0.5)])


def poison_noise(images: Sequence[int], classes: int, seed: int, epoch: int) -> NDArray[np.float64]:
    """Return N(0, 1) that follows from (seed, epoch, image) alone, `[B, C]`: the same in any batch and process."""
    rows = [
        np.random.default_rng(derive_seed(POISON_NOISE, seed, epoch, image)).standard_normal(classes)
        for image in images
    ]
    return np.stack(rows) if rows else np.empty((0, classes))


class Poison:
    """The attacker of a run, between teacher (or its cache) and criterion.

    Args:
        attack, strength: as in :func:`poison_logits`.
        fraction: of the training images that are poisoned, above 0, at most 1.
        length: of the training split.
        seed: of the run.

    Raises:
        ValueError: as :func:`poison_logits`; where no image is poisoned.
    """

    def __init__(self, attack: str, fraction: float, length: int, seed: int, strength: float | None = None) -> None:
        self.attack, self.fraction, self.seed = attack, fraction, seed
        self.strength = check_strength(attack, strength)
        chosen = poisoned_indices(length, fraction, seed)
        if not len(chosen):
            raise ValueError(f'a fraction of {fraction:g} of {length:,} images is none')
        self.count = len(chosen)
        self.chosen = torch.zeros(length, dtype=torch.bool)
        self.chosen[torch.from_numpy(chosen)] = True

    def __call__(self, logits: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Return the logits of a batch with those of poisoned images changed.

        Args:
            logits: of the teacher `[B, C]`; halves become float32.
            indices: of the images in the training split `[B]`, on the CPU.
            epoch: 1-based.
        """
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        where = self.chosen[indices].nonzero()[:, 0]
        there = where.to(logits.device)
        changed = poison_logits(
            logits[there], self.attack, self.strength, seed=self.seed, epoch=epoch, indices=indices[where]
        )
        return logits.index_copy(0, there, changed)

    def figures(self, output: Tensor, target: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """Return means over a batch, 0-d: `poisoned` (share of the images), and of all images the shares on which the
        student is right and which are poisoned (`right_poisoned`) or not (`right_clean`). :func:`top1_apart` makes
        accuracies of their means.

        Args:
            output: logits of the student `[B, C]`.
            target: classes `[B]`.
            indices: of the images `[B]`, on the CPU.
        """
        chosen = self.chosen[indices].to(output.device, non_blocking=True)
        right = output.detach().argmax(dim=1) == target
        shares = {'poisoned': chosen, 'right_poisoned': right & chosen, 'right_clean': right & ~chosen}
        return {name: found.float().mean() for name, found in shares.items()}


def facts(poison: Poison | None) -> dict[str, Any] | None:
    """Return what results.json says of a run's attacker: `attack`, `strength`, `fraction` as given, and `images`
    poisoned; None where there is none."""
    if poison is None:
        return None
    return {'attack': poison.attack, 'strength': poison.strength, 'fraction': poison.fraction, 'images': poison.count}


def top1_apart(means: dict[str, float]) -> dict[str, float]:
    """Return the means of an epoch with `top1_poisoned` and `top1_clean` (training top-1 of either kind of images,
    percent) in place of the shares of :meth:`Poison.figures`; NaN where there were no such images. Means without them
    are returned as they are."""
    if 'poisoned' not in means:
        return means
    found = {name: value for name, value in means.items() if name not in ('right_poisoned', 'right_clean')}
    for name, share in (('poisoned', means['poisoned']), ('clean', 1 - means['poisoned'])):
        # of sums in float32, so that a share of none may not be 0 to the last digit
        found[f'top1_{name}'] = 100 * min(means[f'right_{name}'] / share, 1.0) if share > 1e-7 else math.nan
    return found


def describe(facts: dict[str, Any]) -> str:
    """Return what :func:`facts` returned in words: `pcfdla at strength 9 on 30 % of the training images (431)`."""
    strength = '' if facts['strength'] is None else f' at strength {facts["strength"]:g}'
    return f'{facts["attack"]}{strength} on {100 * facts["fraction"]:g} % of the training images ({facts["images"]:,})'


# ------------------------------------------------------------------------------------------------------------ settings

_UNFIT = {'none': 'distils nothing, so that there is nothing to poison', 'mekd': 'sees no training image'}


def check_poison(
    attack: str, fraction: float | None, strength: float | None, distill: str, black_box: str | None = None
) -> None:
    """Raise UsageError for settings that do not go together.

    Args:
        attack, fraction, strength: `--poison` (`none` for no attack), `--poison-fraction`, `--poison-strength`.
        distill: the criterion.
        black_box: what a closed teacher answers with; `hard`: a class alone.
    """
    if attack == 'none':
        for flag, value in (('fraction', fraction), ('strength', strength)):
            if value is not None:
                raise UsageError(f'--poison-{flag} {value:g}: needs --poison {"|".join(ATTACKS)}')
        return
    if distill in _UNFIT:
        raise UsageError(f'--poison {attack}: --distill {distill} {_UNFIT[distill]}; remove one of the two')
    if black_box == 'hard':
        raise UsageError(f'--poison {attack}: --black-box hard answers with a class, which has no logits to change')
    if fraction is None:
        raise UsageError(f'--poison {attack}: needs --poison-fraction P, the part of the training images (0 < P <= 1)')
    try:
        check_strength(attack, strength)
    except ValueError as e:
        raise UsageError(f'--poison-strength {strength:g}: {e}' if strength is not None else f'--poison: {e}') from e


class Split(Protocol):
    """What :func:`create_poison` asks of a training split."""

    streamed: bool

    def __len__(self) -> int: ...


def create_poison(
    train: Split, attack: str, fraction: float | None, strength: float | None, seed: int
) -> Poison | None:
    """Return the attacker of a run; None where there is none (`attack` is `none`).

    Raises:
        UserError: for a streamed split; where the fraction is less than an image.
    """
    if attack == 'none':
        return None
    if train.streamed:
        raise UserError(
            f'--poison {attack}: the images of a streamed dataset have no index to choose them by; use hfds/… or a '
            'folder'
        )
    assert fraction is not None  # check_poison() has seen to it
    try:
        return Poison(attack, fraction, len(train), seed, strength)
    except ValueError as e:
        raise UserError(f'--poison-fraction {fraction:g}: {e}; give a larger one') from e
