"""Families of timm as students and as teachers of each other's maps: which of their maps are paired, and whether a step
of a method on features gives a finite loss and gradient. Random weights.

python benchmarks/features.py --output docs/features_matrix.md
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import timm_rld.models  # noqa: F401  (registers the CIFAR networks)
from timm_rld.bench.measure import run_script
from timm_rld.errors import UsageError, UserError
from timm_rld.loss import create_feature_loss
from timm_rld.pairing import Features, Taps, forward_with_features, look_at_features, pair_maps

# The smallest member of each, or nearly.
FAMILIES = (
    'cifar_resnet8', 'cifar_wrn_16_1', 'resnet10t', 'regnetx_002', 'densenet121', 'dla46x_c', 'repvgg_a0',
    'mobilenetv2_035', 'mobilenetv3_small_050', 'mobilenetv4_conv_small_035', 'ghostnet_050', 'hgnetv2_b0',
    'convnext_atto', 'edgenext_xx_small', 'fastvit_t8', 'mobilevit_xxs', 'poolformerv2_s12', 'starnet_s050',
    'fasternet_t0', 'inception_next_atto', 'pvt_v2_b0', 'vit_tiny_patch16_224', 'deit_tiny_patch16_224',
    'xcit_nano_12_p16_224', 'swin_tiny_patch4_window7_224',
)  # fmt: skip


def build(name: str, size: int) -> nn.Module:
    """A network for images of a size, with 10 classes."""
    config = timm.models.get_pretrained_cfg(name)
    fixed = {'img_size': size} if config is not None and config.fixed_input_size else {}
    return timm.create_model(name, num_classes=10, **fixed)


def steps(
    name: str, networks: dict[str, tuple[nn.Module, Features]], x: Tensor, method: str
) -> dict[str, tuple[int, bool]]:
    """One forward pass of a student, and a backward pass for each teacher.

    Returns:
        For each teacher the number of pairs, and whether loss and gradients are finite and not all 0.
    """
    student, features = networks[name]
    every = Taps(tuple(m.index for m in features.maps))
    _, maps = forward_with_features(student.train(), x, every)
    found = {}
    for other, (teacher, of_teacher) in networks.items():
        pairs = [pair for pair in pair_maps(features, of_teacher) if not any(m.stem for m in pair)]
        with torch.no_grad():
            taps = Taps(tuple(t.index for _, t in pairs))
            _, goals = forward_with_features(teacher.eval(), x, taps)
        student.train().zero_grad()
        loss = create_feature_loss(method)([maps[s.index] for s, _ in pairs], goals)
        loss.backward(retain_graph=True)
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        finite = bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in gradients)
        found[other] = len(pairs), finite and (other == name or any(bool(g.any()) for g in gradients))
    return found


def table(networks: dict[str, tuple[nn.Module, Features]], found: dict[str, dict[str, tuple[int, bool]]]) -> str:
    """Return what each family has, and the matrix, as Markdown."""
    lines = ['| | network | parameters, M | maps that are used, C×H×W | stem |', '| --- | --- | --- | --- | --- |']
    for i, (name, (network, features)) in enumerate(networks.items(), 1):
        stages = features.stages(4)
        shown = ', '.join(f'{m.channels}×{m.size[0]}×{m.size[1]}' for m in stages if not m.stem)
        count = sum(p.numel() for p in network.parameters()) / 1e6
        lines.append(f'| {i} | {name} | {count:.1f} | {shown} | {"yes" if stages[0].stem else ""} |')
    numbers = range(1, len(networks) + 1)
    lines += ['', f'| student \\ teacher | {" | ".join(map(str, numbers))} |', '| --- |' + ' --- |' * len(networks)]
    for i, row in enumerate(found.values(), 1):
        cells = [str(pairs) if good else 'FAILED' for pairs, good in row.values()]
        lines.append(f'| {i} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def run(args: argparse.Namespace) -> str:
    """Return the tables as Markdown."""
    names = list(dict.fromkeys(args.networks or FAMILIES))
    if unknown := [name for name in names if not timm.is_model(name)]:
        raise UsageError(f'--networks {unknown[0]}: no model of timm')
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    say = functools.partial(print, file=sys.stderr, flush=True)
    networks: dict[str, Any] = {}
    refused = []
    for name in names:
        network = build(name, args.img_size)
        try:
            networks[name] = network, look_at_features(network, (3, args.img_size, args.img_size), name, train=True)
        except UserError as e:
            refused.append(str(e).removeprefix('--feature-distill: '))
    x = torch.randn(2, 3, args.img_size, args.img_size)
    found = {}
    for name in networks:
        started = time.perf_counter()
        found[name] = steps(name, networks, x, args.method)
        say(f'{name}: {sum(good for _, good in found[name].values())} of {len(networks)}, '
            f'{time.perf_counter() - started:.0f} s')  # fmt: skip
    good = sum(ok for row in found.values() for _, ok in row.values())
    text = (
        f'{good} of {len(networks) ** 2} pairs of {len(networks)} families: `{args.method}`, {args.img_size} pixels, '
        f'batch 2; torch {torch.__version__.partition("+")[0]}, timm {timm.__version__}.\n\n{table(networks, found)}\n'
    )
    text += ''.join(f'\nRefused: {line}\n' for line in refused)
    if args.output:
        args.output.write_text(text, encoding='utf-8')
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--networks', nargs='+', metavar='NAME', help='default: 25 families')
    parser.add_argument('--method', default='at', metavar='NAME', help='of features, without layers (default: at)')
    parser.add_argument('--img-size', type=int, default=64, metavar='N', help='default: 64')
    parser.add_argument('--threads', type=int, default=1, metavar='N', help="torch's (default: 1)")
    parser.add_argument('--output', type=Path, metavar='FILE', help='write the tables there too')


def main(argv: list[str] | None = None) -> int:
    """Run the matrix and print its tables. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
