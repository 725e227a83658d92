"""An exported file, in its own runtime, held against the model that it was made of."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..data import Loader
from ..engine import device_name, frozen_network, median_ms
from ..errors import UserError
from ..inference import OpenModel
from .graph import OpenFile, prepare, reason

BATCH, SMALL, LEAST = 64, (1, 7), 64  # of the whole split; of some images of it, and how many at least
MIN_AGREEMENT = 0.999  # of float32
LARGEST_DIFFERENCE = 0.01  # of float32: of logits, as a share of their standard deviation
MOST_POINTS = 1.0  # of accuracy that int8 may lose
Logits = NDArray[np.float32]
Found = dict[str, Any]


class _Compared:
    """Counts on how many images two sets of logits name the same class, and by how much they differ."""

    def __init__(self) -> None:
        self.images = self.same = 0
        self.difference, self.error = 0.0, ''

    def add(self, of_file: Logits, of_torch: Logits) -> None:
        """Count a batch: logits `[B, K]` each, in the same order of classes."""
        self.images += len(of_torch)
        self.same += int((of_file.argmax(1) == of_torch.argmax(1)).sum())
        found = float(np.abs(of_file - of_torch).max(initial=0.0))
        self.difference = max(self.difference, found if math.isfinite(found) else math.inf)

    def figures(self) -> Found:
        """What the side file says."""
        if self.error:
            return {'error': self.error}
        return {
            'images': self.images,
            'same_top1': self.same / max(self.images, 1),
            'largest_difference': self.difference if math.isfinite(self.difference) else None,
        }


def output_order(of_file: Sequence[str], of_model: Sequence[str]) -> list[int] | None:
    """Return the file's output for each of the model's, by their names; None where they have not the same names. Of a
    name that comes twice the one at the model's place is meant."""
    if sorted(of_file) != sorted(of_model):
        return None
    places = {name: i for i, name in enumerate(of_file)}
    return [i if of_file[i] == name else places[name] for i, name in enumerate(of_model)]


@torch.inference_mode()
def compare(opened: OpenModel, outputs: list[int] | None, file: OpenFile, loader: Loader) -> Found:
    """Hold an exported file against the model, over a validation split in batches of 64, and over its first images in
    batches of 1 and of 7.

    The file is used as its own metadata say, by somebody who has nothing else: they give layout and normalisation of
    its input, and the names of its outputs.

    Args:
        opened: the model.
        outputs: its output for each class of the dataset; None where they are the same.
        file: the exported file.
        loader: of the split, in batches of :data:`BATCH`.

    Returns:
        `images`; `top1` of `torch` and of the `file`, in percent; `same_top1`, the share of images on which both name
        the same class, and `largest_difference` of their logits: the worst of all batch sizes; `deviation`, the
        standard deviation of torch's logits; `batches` with the figures of each size, or the `error` with which the
        runtime refused it.

    Raises:
        UserError: where the file names other outputs than the model, or the model's logits are not finite.
    """
    order = output_order(file.about['labels'], opened.class_names)
    if order is None:
        raise UserError('the exported file has other labels than the model')
    index = None if outputs is None else np.asarray(outputs)
    compared = {size: _Compared() for size in (*SMALL, BATCH)}
    right, moments, images = {'torch': 0, 'file': 0}, np.zeros(2), 0
    kept: list[tuple[Tensor, Logits]] = []
    loader.set_epoch(0)
    with tqdm(total=len(loader.source), unit='image', disable=not sys.stderr.isatty(), leave=False) as bar:
        for pixels, target, _ in loader:
            expected = opened.model(opened.normalize(pixels)).float().numpy()
            if not np.isfinite(expected).all():
                raise UserError(f'model {opened.name}: its logits are not finite, so that nothing can be compared')
            if images < LEAST + max(SMALL):
                kept.append((pixels, expected))
            images += len(pixels)
            moments += [np.power(expected, n, dtype=np.float64).mean(1).sum() for n in (1, 2)]
            found = _run(file, pixels, order, compared[BATCH])
            for who, logits in (('torch', expected), ('file', found)):
                if logits is not None:
                    classes = logits if index is None else logits[:, index]
                    right[who] += int((classes.argmax(1) == target.numpy()).sum())
            if found is not None:
                compared[BATCH].add(found, expected)
            bar.update(len(pixels))
    for size in SMALL:
        for pixels, expected in _batches(kept, size):
            if (found := _run(file, pixels, order, compared[size])) is not None:
                compared[size].add(found, expected)
    every = {str(size): c.figures() for size, c in compared.items()}
    top1: dict[str, float | None] = {who: 100 * count / max(images, 1) for who, count in right.items()}
    if compared[BATCH].error:
        top1['file'] = None
    mean, square = moments / max(images, 1)
    worst = max(c.difference for c in compared.values())
    refused = any(c.error for c in compared.values())
    return {
        'images': images, 'top1': top1, 'same_top1': 0.0 if refused else min(f['same_top1'] for f in every.values()),
        'largest_difference': None if refused or math.isinf(worst) else worst,
        'deviation': math.sqrt(max(square - mean**2, 0.0)), 'batches': every,
    }  # fmt: skip


def _run(file: OpenFile, pixels: Tensor, order: list[int], compared: _Compared) -> Logits | None:
    """The file's logits in the model's order; None from the first batch on that its runtime has refused."""
    if compared.error:
        return None
    try:
        logits = _run_once(file, pixels)
        if logits.shape != (len(pixels), len(order)):
            raise ValueError(f'logits of shape {logits.shape} for {len(pixels)} images of {len(order)} classes')
        return logits[:, order]
    except Exception as e:
        compared.error = reason(e)
        return None


def _batches(kept: list[tuple[Tensor, Logits]], size: int) -> Iterator[tuple[Tensor, Logits]]:
    """The first images again, in batches of another size: whole ones, at least :data:`LEAST` images if there are."""
    pixels, expected = torch.cat([part for part, _ in kept]), np.concatenate([part for _, part in kept])
    for start in range(0, min(LEAST, len(pixels)), size):
        yield pixels[start : start + size], expected[start : start + size]


def _run_once(file: OpenFile, pixels: Tensor) -> Logits:
    return file(prepare(pixels.numpy(), file.about))


def latencies(opened: OpenModel, file: OpenFile) -> Found:
    """Return what batches of 1 and of 64 take the model, as this package runs one that is not trained, and the file:
    `latency_ms` from uint8 pixels to logits on this CPU, and `latency_device`."""
    size = tuple(opened.data_config['input_size'])
    network = frozen_network(opened.model, opened.normalize, size, channels_last=True)
    cpu = torch.device('cpu')
    found: dict[str, dict[str, float]] = {'torch': {}, 'file': {}}
    for batch in (1, BATCH):
        pixels = torch.randint(256, (batch, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        passes: dict[str, Callable[[], object]] = {
            'torch': functools.partial(network, pixels),
            'file': functools.partial(_run_once, file, pixels),
        }
        for who, ms in median_ms(passes, cpu).items():
            found[who][str(batch)] = ms
    return {'latency_ms': found, 'latency_device': device_name(cpu)}


def faults(found: Found, precision: str, min_agreement: float | None) -> list[str]:
    """Return why a file is not taken for the model, from :func:`compare`; an empty list where it is.

    Args:
        precision: of float32 at least 99.9% of the classes must be the same, and no logit may differ by more than 1% of
            the logits' standard deviation; int8 may lose one point of accuracy.
        min_agreement: the share of equal classes that is enough, in the place of these; a batch size that the runtime
            refuses, and logits that are not finite, are always a fault.
    """
    refused = {size: f['error'] for size, f in found['batches'].items() if 'error' in f}
    if refused:
        return [f'its runtime refuses batches of {" and ".join(refused)} ({next(iter(refused.values()))})']
    if found['largest_difference'] is None:
        return ['some of its logits are not finite']
    same, lost = found['same_top1'], found['top1']['torch'] - found['top1']['file']
    least = MIN_AGREEMENT if min_agreement is None and precision == 'fp32' else min_agreement
    problems = []
    if least is not None and same < least:
        problems.append(
            f'it gives the same class as torch for {100 * same:.2f}% of the images, less than {100 * least:g}%'
        )
    if min_agreement is None and precision == 'fp32' and not problems:
        share = found['largest_difference'] / max(found['deviation'], 1e-12)
        if share > LARGEST_DIFFERENCE:
            problems.append(f'a logit differs from that of torch by {100 * share:.1f}% of their standard deviation')
    if min_agreement is None and precision == 'int8' and lost > MOST_POINTS:
        problems.append(f'its top-1 is {lost:.2f} points lower, more than {MOST_POINTS:g}')
    return problems


def summary(found: Found, file: str) -> str:
    """Return what the terminal shows of a check."""
    rows: dict[str, list[str]] = {'': ['torch', file]}
    rows['top-1, %'] = [f'{x:.2f}' if (x := found['top1'][who]) is not None else '' for who in ('torch', 'file')]
    rows['size, MB'] = [f'{found["size_mb"][who]:.3g}' for who in ('torch', 'file')]
    for size in found.get('latency_ms', {}).get('torch', {}):
        rows[f'a batch of {size}, ms'] = [f'{found["latency_ms"][who][size]:.4g}' for who in ('torch', 'file')]
    widths = [max(map(len, column)) for column in zip(*([k, *cells] for k, cells in rows.items()))]
    lines = ['  '.join(c.ljust(w) for c, w in zip([k, *cells], widths)).rstrip() for k, cells in rows.items()]
    sizes = [
        f'{f["error"]} in batches of {size}' if 'error' in f
        else f'{100 * f["same_top1"]:.2f}% of {f["images"]:,} images in batches of {size}'
        for size, f in found['batches'].items()
    ]  # fmt: skip
    difference = found['largest_difference']
    shown = 'not known' if difference is None else f'{difference:.2g}'
    return '\n'.join([
        f'{found["images"]:,} images (split {found["split"]} of {found["data"]}), {found["runtime"]}', *lines,
        f'the same top-1 for {", ".join(sizes)}',
        f'largest difference of logits: {shown} (their standard deviation is {found["deviation"]:.3g})',
    ])  # fmt: skip
