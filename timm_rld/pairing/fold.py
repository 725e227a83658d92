"""Batch norms of a frozen network, folded into the convolutions before them."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Pair = tuple[str, str]  # names of a convolution and of the batch norm after it
Outputs = Callable[[nn.Module, Tensor], Sequence[Tensor]]

# Both in units of float32's own error on the network, which depends on its depth and weights. A right fold changes the
# order of roundings alone: measured on 60 networks, 1e-8 of these in float64 (its roundings are 2e-9 of float32's), and
# 3 in float32. A wrong one that moves the logits by a ten-thousandth of what rounding does is seen.
EXACT, ROUNDED = 1e-4, 10
CHECKS = 32  # passes at most in search of wrong pairs: one among 500 is found in 20


@torch.no_grad()  # not inference mode: the new weights are to be ordinary tensors
def fold_batch_norms(model: nn.Module, x: Tensor, outputs: Outputs | None = None) -> int:
    """Fold each batch norm that takes just what a convolution gives into that convolution, in place:
    w' = w · γ / √(σ² + ε), b' = (b - μ) · γ / √(σ² + ε) + β.

    Which ones do is seen from one forward pass, so that it works for networks that cannot be traced. The folds are made
    in a copy in float64, where a right one gives the same logits and a wrong one does not; wrong ones are left out. The
    network with the folds must then be as near to float64 as the one without, else all is left as it was.

    Args:
        model: in eval mode. For a moment there is a copy of it, twice its size.
        x: a batch that it takes, float32.
        outputs: (model, x) → all that must stay the same; None: its logits.

    Returns:
        How many were folded.
    """
    plain, pairs = _look(model, x, outputs or _logits)
    if not pairs:
        return 0
    exact, run = copy.deepcopy(model).double(), functools.partial(_run, outputs or _logits)
    truth = run(exact, x.double())
    own_error = max(torch.finfo(x.dtype).eps, _distance(plain, truth))
    if own_error == math.inf:
        return 0
    right = _fold_right_ones(exact, pairs, lambda: _distance(run(exact, x.double()), truth) <= EXACT * own_error)
    unfolded = {name: model.get_submodule(name) for pair in right for name in pair}
    for name in unfolded:
        model.set_submodule(name, exact.get_submodule(name).to(x.dtype))
    if _distance(run(model, x), truth) <= ROUNDED * own_error:
        return len(right)
    for name, module in unfolded.items():
        model.set_submodule(name, module)
    return 0


def _fold_right_ones(model: nn.Module, pairs: list[Pair], is_right: Callable[[], bool]) -> list[Pair]:
    """Fold all pairs; where that is wrong, those of each half that are right. Returns the folded ones."""
    checks = 0

    def fold(some: list[Pair]) -> list[Pair]:
        nonlocal checks
        if checks == CHECKS or not some:
            return []
        checks += 1
        unfolded: dict[str, Any] = {name: model.get_submodule(name) for pair in some for name in pair}
        for conv, norm in some:
            model.set_submodule(conv, nn.utils.fuse_conv_bn_eval(unfolded[conv], unfolded[norm]))
            rest = [unfolded[norm].drop, unfolded[norm].act] if hasattr(unfolded[norm], 'act') else []
            model.set_submodule(norm, nn.Sequential(*rest) if rest else nn.Identity())
        if is_right():
            return some
        for name, module in unfolded.items():
            model.set_submodule(name, module)
        half = len(some) // 2
        return fold(some[:half]) + fold(some[half:]) if half else []

    return fold(pairs)


def _logits(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [model(x)]


def _run(outputs: Outputs, model: nn.Module, x: Tensor) -> Sequence[Tensor] | None:
    """A network's outputs; None where it cannot run, as one that looks into its own modules, or makes float32
    itself."""
    try:
        return outputs(model, x)
    except Exception:
        return None


def _distance(found: Sequence[Tensor] | None, truth: Sequence[Tensor] | None) -> float:
    """Return the largest difference of an output, as a share of an image's largest value in it; infinite where it is
    not a number."""
    if found is None or truth is None:
        return math.inf
    worst = 0.0
    for one, true in zip(found, truth, strict=True):
        difference = (one - true).abs().flatten(1).amax(1) / true.abs().flatten(1).amax(1).clamp_min(1e-30)
        worst = max(worst, difference.max().item() if difference.isfinite().all() else math.inf)
    return worst


class _Reads(TorchDispatchMode):
    """Counts the operations that read certain tensors.

    Attributes:
        counts: by the tensor's id; those that are not in it are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if id(value) in self.counts:
                self.counts[id(value)] += 1
        return function(*args, **(kwargs or {}))


def _look(model: nn.Module, x: Tensor, outputs: Outputs) -> tuple[Sequence[Tensor], list[Pair]]:
    """Run a network once.

    Returns:
        Its outputs, and the pairs where both are called once, and nothing but the batch norm reads what the convolution
        gives.
    """
    from timm.layers import BatchNormAct2d, Conv2dSame, SyncBatchNormAct

    convs = (nn.Conv2d, Conv2dSame)  # these very types: others compute more
    norms = (nn.BatchNorm2d, BatchNormAct2d, nn.SyncBatchNorm, SyncBatchNormAct)
    of_convs: dict[int, tuple[str, Tensor]] = {}  # holds the tensors, so that no id comes twice
    pairs: dict[Pair, int] = {}
    calls: dict[str, int] = {}
    reads = _Reads()

    def look(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        if isinstance(module, convs):
            of_convs[id(output)], reads.counts[id(output)] = (name, output), 0
        elif args and id(args[0]) in of_convs and module.running_mean is not None:
            pairs[of_convs[id(args[0])][0], name] = id(args[0])

    hooks = [
        module.register_forward_hook(functools.partial(look, name))
        for name, module in model.named_modules()
        if type(module) in (*convs, *norms)
    ]
    try:
        with reads:
            found = outputs(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    return found, [p for p, i in pairs.items() if reads.counts[i] == 1 and calls[p[0]] == calls[p[1]] == 1]
