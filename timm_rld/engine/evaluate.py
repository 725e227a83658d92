"""Loss and accuracy of a network over a validation split."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from timm.task import ClassificationEvaluator
from torch import Tensor

from ..data import Loader
from ..distributed import all_reduce_max
from ..errors import UserError


class Interrupted(Exception):
    """An evaluation that was stopped before its end."""


@torch.inference_mode()
def evaluate(
    predict: Callable[..., Tensor],
    loader: Loader,
    accelerator: Accelerator,
    reference: Tensor | None = None,
    title: str = 'teacher',
    interrupted: Callable[[], bool] = lambda: False,
    on_batch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    with_indices: bool = False,
) -> tuple[dict[str, float], Tensor]:
    """Loss and accuracy over a validation split, each image counted once, whatever the number of processes.

    Args:
        predict: pixels `[B, C, H, W]` → logits `[B, C]`. Not a DDP module: its collectives would hang where processes
            have different numbers of batches.
        loader: of the split.
        reference: predictions of another network from an earlier call with this loader.
        title: for messages.
        interrupted: called after each batch; once it returns true on one process, the evaluation ends on all.
        on_batch: called with the indices, classes and logits of each batch.
        with_indices: ``predict`` takes the indices of the images `[B]` too.

    Returns:
        `loss` (cross-entropy), `top1`, `top5`, `macro` (percent; the mean of the classes' top-1, over those that have
        images), with a reference also `agreement` (percentage of images where both predict the same class); and this
        process's predicted classes `[n]`.

    Raises:
        UserError: where the loss is not finite, or a stream held fewer images than its split declares.
        Interrupted: where ``interrupted`` returned true.
    """
    device = accelerator.device
    evaluator = ClassificationEvaluator(device)
    predictions, targets = [], []
    loader.set_epoch(0)
    for pixels, target, indices in loader:
        pixels, target = pixels.to(device, non_blocking=True), target.to(device, non_blocking=True)
        with accelerator.autocast():
            logits = predict(pixels, indices) if with_indices else predict(pixels)
        evaluator.update(logits, target)
        predictions.append(logits.argmax(dim=1))
        targets.append(target)
        if on_batch is not None:
            on_batch(indices, target, logits)
        if interrupted():
            break
    if any(all_reduce_max(accelerator, interrupted())):
        raise Interrupted
    predicted = torch.cat(predictions) if predictions else torch.empty(0, dtype=torch.int64, device=device)
    if loader.declared is not None:
        seen = int(accelerator.reduce(torch.tensor(len(predicted), device=device), 'sum'))
        if seen < loader.declared:
            raise UserError(
                f'--val-split {loader.source.split}: {seen} images were read, it declares {loader.declared}; '
                'are files missing or damaged? (--val-num-samples N declares another number)'
            )
    metrics = dict(evaluator.compute(distributed=accelerator.num_processes > 1))
    if not math.isfinite(metrics['loss']):
        raise UserError(
            f'the validation loss of the {title} is {metrics["loss"]}: its weights or normalisation are not finite, '
            'or it has diverged (try a lower --lr)'
        )
    none = torch.empty(0, dtype=torch.int64, device=device)
    metrics['macro'] = macro_accuracy(predicted, torch.cat([none, *targets]), loader.source.num_classes, accelerator)
    if reference is not None:
        same = torch.stack([(predicted == reference).sum(), torch.tensor(len(predicted), device=device)])
        agreed, total = accelerator.reduce(same, 'sum').tolist()
        metrics['agreement'] = 100 * agreed / max(total, 1)
    return metrics, predicted


def macro_accuracy(predicted: Tensor, target: Tensor, num_classes: int, accelerator: Accelerator) -> float:
    """Return the mean over the classes that have images of the percentage of them that is right.

    Args:
        predicted, target: classes of this process's images `[n]`; all processes' are counted.
    """
    right = torch.bincount(target[predicted == target], minlength=num_classes)
    counts = torch.stack([right, torch.bincount(target, minlength=num_classes)])
    right, images = accelerator.reduce(counts, 'sum').cpu().double()
    return 100 * (right[images > 0] / images[images > 0]).mean().item()
