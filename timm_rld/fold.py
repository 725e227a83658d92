"""Batch norms of a frozen network, folded into the convolutions before them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

# Folding changes the order of roundings alone; what differs by more is not the same network.
TOLERANCE = 1e-5


@torch.inference_mode()
def fold_batch_norms(model: nn.Module, x: Tensor) -> int:
    """Fold each batch norm that takes just what a convolution gives into that convolution, in place:
    w' = w · γ / √(σ² + ε), b' = (b - μ) · γ / √(σ² + ε) + β.

    Which ones do is seen from one forward pass, so that it works for networks that cannot be traced. The folded network
    is then held against the unfolded one: where a logit differs by more than 1e-5 of an image's largest, all is left as
    it was.

    Args:
        model: in eval mode.
        x: a batch that it takes, float32.

    Returns:
        How many were folded.
    """
    before, pairs = _look(model, x)
    unfolded = {name: model.get_submodule(name) for pair in pairs for name in pair}
    done = False
    try:
        for conv, norm in pairs:
            # outside inference mode, so that the new weights are ordinary tensors
            with torch.inference_mode(False):
                model.set_submodule(conv, nn.utils.fuse_conv_bn_eval(unfolded[conv], unfolded[norm]))
            rest = [unfolded[norm].drop, unfolded[norm].act] if hasattr(unfolded[norm], 'act') else []
            model.set_submodule(norm, nn.Sequential(*rest) if rest else nn.Identity())
        difference = (model(x) - before).abs().flatten(1).amax(1)
        done = bool((difference <= TOLERANCE * before.abs().flatten(1).amax(1)).all())
    except Exception:  # a network that looks into its own modules
        done = False
    finally:
        if not done:
            for name, module in unfolded.items():
                model.set_submodule(name, module)
    return len(pairs) if done else 0


def _look(model: nn.Module, x: Tensor) -> tuple[Tensor, list[tuple[str, str]]]:
    """Run a network once.

    Returns:
        Its output, and the names of the pairs of convolution and batch norm, both called once.
    """
    from timm.layers import BatchNormAct2d, Conv2dSame

    convs, norms = (nn.Conv2d, Conv2dSame), (nn.BatchNorm2d, BatchNormAct2d)  # these very types: others compute more
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no id comes twice
    pairs, calls = [], {}

    def look(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        if isinstance(module, convs):
            outputs[id(output)] = (name, output)
        elif args and id(args[0]) in outputs and module.running_mean is not None:
            pairs.append((outputs[id(args[0])][0], name))

    hooks = [
        module.register_forward_hook(functools.partial(look, name))
        for name, module in model.named_modules()
        if type(module) in (*convs, *norms)
    ]
    try:
        output = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return output, [pair for pair in pairs if all(calls[name] == 1 for name in pair)]
