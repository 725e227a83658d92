"""What a network says of each validation image: recorded in an evaluation, gathered from all processes, written, and
summed up."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from .. import metrics
from ..data import Loader
from ..files import write_atomic
from .evaluate import evaluate

Columns = dict[str, NDArray[Any]]
FIGURES = ('top1', 'top1_prob', 'target_prob', 'loss')  # of each network and image


class Recorder:
    """Records an evaluation on this process: it is the ``on_batch`` of :func:`timm_rld.engine.evaluate`. Nothing in it
    waits for the device.

    Attributes:
        temperature: the one that minimises the loss on all images, after :meth:`finish`.
    """

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, ...]] = []  # indices, classes and FIGURES
        self.logits: list[Tensor] = []
        self.columns: Columns | None = None
        self.temperature = math.nan

    def __call__(self, indices: Tensor, target: Tensor, logits: Tensor) -> None:
        """Record a batch: indices `[B]`, classes `[B]`, logits `[B, C]`."""
        logits = logits.detach().float()
        logs = logits.log_softmax(dim=1)
        of_target = logs.gather(1, target[:, None])[:, 0]
        top1 = logits.topk(min(5, logits.shape[1]), dim=1).indices[:, :1]  # of equals the one that the evaluator takes
        of_top1 = logs.gather(1, top1)[:, 0]
        self.batches.append((indices, target, top1[:, 0], of_top1.exp(), of_target.exp(), -of_target))
        if logits.device.type == 'cuda':
            host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
            logits = host.copy_(logits, non_blocking=True)
        self.logits.append(logits)

    def __bool__(self) -> bool:
        """Whether there is something in it."""
        return bool(self.batches) or self.columns is not None

    def finish(self, accelerator: Accelerator, num_classes: int) -> Recorder:
        """Find the best temperature, and forget the logits. Called on every process. Returns itself."""
        if self.columns is not None:
            return self
        if accelerator.device.type == 'cuda':
            torch.cuda.synchronize(accelerator.device)
        columns = [torch.cat(parts).cpu().numpy() for parts in zip(*self.batches)] or [np.empty(0, np.int64)] * 6
        self.columns = dict(zip(('index', 'target', *FIGURES), columns))
        logits = torch.cat(self.logits).cpu().numpy() if self.logits else np.empty((0, num_classes), np.float32)
        self.batches, self.logits = [], []

        def total(sums: NDArray[np.float64]) -> NDArray[np.float64]:
            if accelerator.num_processes == 1:
                return sums
            return accelerator.reduce(torch.from_numpy(sums).to(accelerator.device), 'sum').cpu().numpy()

        found = metrics.best_temperature(logits, self.columns['target'], total)
        self.temperature = float(f'{found:.4g}')  # what the order of sums leaves open is rounded away
        return self


def gather(
    recorders: dict[str, Recorder], accelerator: Accelerator, num_classes: int, in_order: bool = False
) -> Columns:
    """Return the rows of all processes, sorted by the image's index, each image once.

    Args:
        recorders: of evaluations with the same loader: `student`, `teacher`.
        in_order: of a stream, whose images have no index of their own: they are numbered by process and place.

    Returns:
        `index`, `target`, and for each network `student_top1` and so on; on every process.
    """
    mine: Columns = {}
    for name, recorder in recorders.items():
        columns = recorder.finish(accelerator, num_classes).columns
        assert columns is not None
        mine |= {k: columns[k] for k in ('index', 'target')}
        mine |= {f'{name}_{k}': columns[k] for k in FIGURES}
    parts = gather_object([mine])
    found = {k: np.concatenate([part[k] for part in parts]) for k in mine}
    if in_order:
        found['index'] = np.arange(len(found['index']))
    order = np.argsort(found['index'], kind='stable')
    return {k: v[order] for k, v in found.items()}


def parquet_of(table: Columns, files: Sequence[str] | None) -> bytes:
    """Return predictions.parquet: `index, file, target` and the figures of each network.

    Args:
        table: of :func:`gather`.
        files: the file of each image of the split, by index; None: they have none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {'index': pa.int64(), 'target': pa.int32()}
    names = [files[i] for i in table['index'].tolist()] if files is not None else [''] * len(table['index'])
    arrays = {
        k: pa.array(v, types.get(k, pa.int32() if k.endswith('top1') else pa.float32())) for k, v in table.items()
    }
    columns = {'index': arrays.pop('index'), 'file': pa.array(names, pa.string()), **arrays}
    data = io.BytesIO()
    pq.write_table(pa.table(columns), data, compression='zstd')
    return data.getvalue()


def write_predictions(path: Path, table: Columns, loader: Loader) -> None:
    """Write predictions.parquet, whole or not at all."""
    write_atomic(path, parquet_of(table, loader.source.file_names()))


def figures(table: Columns, name: str, temperature: float, num_classes: int) -> dict[str, Any]:
    """Return what results.json says of a network's predictions.

    Args:
        table: of :func:`gather`.
        name: `student` or `teacher`.
        temperature: of its :class:`Recorder`.
        num_classes: of the dataset.

    Returns:
        `top1`, `top1_interval` (Wilson, 95%) and `macro_top1` in percent; and, but of a teacher that gave classes
        alone, `ece` (15 bins), `best_temperature`, `loss`.
    """
    target, top1 = table['target'], table[f'{name}_top1']
    right = top1 == target
    correct, n = int(right.sum()), len(target)
    found: dict[str, Any] = {
        'top1': 100 * correct / max(n, 1),
        'top1_interval': [100 * x for x in metrics.wilson(correct, n)],
        'macro_top1': 100 * metrics.macro(target, top1, num_classes),
    }
    if np.isnan(table[f'{name}_top1_prob']).any():  # a closed teacher's class, without a probability
        return found
    return found | {
        'ece': metrics.ece(table[f'{name}_top1_prob'], right),
        'best_temperature': temperature,
        'loss': float(table[f'{name}_loss'].mean(dtype=np.float64)),
    }


def record(
    predict: Callable[[Tensor], Tensor], loader: Loader, accelerator: Accelerator, title: str = 'student'
) -> Recorder:
    """Return the record of an evaluation of its own; arguments as :func:`timm_rld.engine.evaluate`."""
    recorder = Recorder()
    evaluate(predict, loader, accelerator, title=title, on_batch=recorder)
    return recorder
