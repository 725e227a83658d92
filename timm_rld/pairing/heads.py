"""Students with a head of their own for what the teacher says: "Training data-efficient image transformers &
distillation through attention", Touvron et al., ICML 2021."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

# timm's networks with such a head, by name.
FAMILIES = (
    'deit_*_distilled_*', 'pit_*_distilled_*', 'levit_* (128 to 384)', 'efficientformer_*', 'efficientformerv2_*',
    'swiftformer_*', 'repvit_*', 'iformer_*_distilled', 'efficientvim_*_dist',
)  # fmt: skip


def _switched(model: nn.Module) -> list[nn.Module]:
    """The modules that timm's ``set_distilled_training`` sets: the model, or its head."""
    return [m for m in model.modules() if hasattr(m, 'distilled_training')]


def has_distillation_head(model: nn.Module, input_size: Sequence[int]) -> bool:
    """Return whether a model gives two outputs `[B, C]` in training, those of its main and of its distillation head,
    once timm's ``set_distilled_training(True)`` is called. (Some models have that method and no such head.)

    It is tried on one grey image; no statistics of batch norms change, and the model is left as it was.

    Args:
        model: a timm model.
        input_size: (C, H, W) of its images.
    """
    switch: Callable[[bool], Any] | None = getattr(model, 'set_distilled_training', None)
    if switch is None:
        return False
    modules, training, on = _switched(model), model.training, in_distilled_training(model)
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    model.eval()
    switch(True)
    for module in modules:
        module.training = True  # of these alone, so that dropout and batch norms inside are still in evaluation
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = model(torch.zeros(1, *input_size, device=device))
    finally:
        switch(on)
        model.train(training)
    return isinstance(output, (tuple, list)) and len(output) == 2 and all(isinstance(x, Tensor) for x in output)


def in_distilled_training(model: nn.Module) -> bool:
    """Return whether timm's ``set_distilled_training(True)`` was called on a model."""
    return any(m.distilled_training for m in _switched(model))


def enable_distilled_training(model: nn.Module, input_size: Sequence[int], what: str) -> None:
    """Make a model give the outputs of its two heads in training, and their mean in evaluation.

    Args:
        model: a timm model.
        input_size: (C, H, W) of its images.
        what: names it in the error.

    Raises:
        UserError: where it has no distillation head.
    """
    if not has_distillation_head(model, input_size):
        raise UserError(
            f'--distill-token: {what} has no distillation head; these have one: {", ".join(FAMILIES)} '
            '(--no-distill-token does without)'
        )
    model.set_distilled_training(True)  # type: ignore[operator]


def outputs_of_heads(output: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the output `[B, C]` of a model's main head, and that of its distillation head: the same where there is one
    output alone, as of all models in evaluation."""
    if isinstance(output, Tensor):
        return output, output
    main, distilled = output
    return main, distilled
