"""What a study of poisoned logits measured, as a picture, beside the mean field of docs/poison.md.

timm-rld compare --poison fdla pcfdla zero --poison-fraction 0 0.3 1 ... --output out
python benchmarks/poison.py out --output poison.png [--mean-field]
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_rld import create_student, create_teacher
from timm_rld.bench.measure import markdown, run_script
from timm_rld.config import parse_args, resolve
from timm_rld.data import create_loaders, open_splits
from timm_rld.errors import UserError
from timm_rld.loss import CRITERIA, create_distill_loss
from timm_rld.poison import poison_logits
from timm_rld.poison_study import curve, names_of

STEPS = 400
TIE = 1e-4  # of margins: below, all classes are alike
COPIES = 10  # of a row, of which tenths are poisoned
IMAGES = 200  # of the validation split, that the mean field is computed for
COLOURS = ('#c8452d', '#d9912b', '#3b8f57', '#1f6fb4', '#7a5aa8', '#8c6d4f')


def loss_of_rows(
    name: str, clean: Tensor, poisoned: Tensor, target: Tensor, fraction: float
) -> Callable[[Tensor], Tensor]:
    """Return a function of a student's logits `[N, C]`: the sum over rows of task_weight · CE + distill_weight ·
    criterion (published weights and options, ramp 1, no label smoothing), where a share of a row's copies is poisoned.

    Args:
        name: a criterion.
        clean, poisoned: logits of the teacher `[N, C]`.
        target: `[N]`.
        fraction: the share, in tenths.
    """
    info, criterion = CRITERIA[name], create_distill_loss(name)
    lies = (torch.arange(COPIES) < round(fraction * COPIES))[None, :, None]
    teacher = torch.where(lies, poisoned.double()[:, None], clean.double()[:, None]).flatten(0, 1)
    index = target.repeat_interleave(COPIES)

    def loss(student: Tensor) -> Tensor:
        copies = student.repeat_interleave(COPIES, dim=0)
        found = info.distill_weight * criterion(copies, teacher, index)
        if info.task_weight:
            found = found + info.task_weight * F.cross_entropy(copies, index)
        return found * len(student)

    return loss


def mean_field(name: str, clean: Tensor, poisoned: Tensor, target: Tensor, fraction: float) -> Tensor:
    """Return the logits of a student that fits each row on its own, `[N, C]` in float64: where :func:`loss_of_rows` is
    stationary, sought from zeros. (`rc` has no such point to be found by descent: its gradient is not that of its
    loss.)"""
    loss = loss_of_rows(name, clean, poisoned, target, fraction)
    student = torch.zeros_like(clean, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([student], max_iter=STEPS, history_size=50, tolerance_grad=1e-8,
                                  tolerance_change=1e-13, line_search_fn='strong_wolfe')  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        found = loss(student)
        found.backward()
        return found.item()

    optimizer.step(closure)
    return student.detach()


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """Return the logit of the true class minus the highest other, `[N]`."""
    index = target[:, None]
    return logits.gather(1, index)[:, 0] - logits.scatter(1, index, -torch.inf).amax(1)


def mean_field_margins(
    name: str, clean: Tensor, poisoned: Tensor, target: Tensor, fractions: Sequence[float], size: int = 1
) -> Tensor:
    """Return :func:`margin` of :func:`mean_field` at each fraction, `[N, fractions]`.

    Args:
        size: rows that are sought together; `lr`, whose means are over the rows on which the teacher is right, and
            wrong, takes one.
    """
    parts = [slice(i, i + size) for i in range(0, len(target), size)]
    found = []
    for fraction in fractions:
        rows = [mean_field(name, clean[p], poisoned[p], target[p], fraction) for p in parts]
        found.append(margin(torch.cat(rows), target))
    return torch.stack(found, dim=1)


def share_where_wrong_kd_wins(clean: Tensor, poisoned: Tensor, temperature: float = 4.0) -> Tensor:
    """Return from which poisoned share on KD without cross-entropy names the clean teacher's second class: (a - b) /
    ((a - b) + (c - d)), with a, b the clean softened probabilities of first and second, and c, d those of second and
    first after the attack, `[N]`."""
    top = clean.topk(2, dim=1).indices
    before, after = ((z / temperature).softmax(1).gather(1, top) for z in (clean, poisoned))
    gap, turned = before[:, 0] - before[:, 1], after[:, 1] - after[:, 0]
    return gap / (gap + turned)


def teacher_on_validation(folder: Path, found: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the clean teacher's logits `[n, C]` on images of the validation split of a comparison, spread evenly over
    it, and their classes `[n]`."""
    config = resolve(parse_args(shlex.split(found['flags'])))
    name = f'local-dir:{folder / "teacher" / "teacher"}' if config.teacher_epochs else config.teacher
    train, val = open_splits(**config.arguments_of('open_splits'))
    pair = create_student(num_classes=train.num_classes, **config.arguments_of('create_student'))
    of_teacher = {**config.arguments_of('create_teacher'), 'name': name, 'pretrained': True}
    teacher = create_teacher(num_classes=train.num_classes, image_size=pair.image_size, **of_teacher)
    _, loader = create_loaders(
        train, val, pair.data_config, **{**config.arguments_of('create_loaders'), 'workers': 0}
    )  # fmt: skip
    loader.set_epoch(0)
    with torch.inference_mode():
        logits, target = zip(*((teacher(pixels), target) for pixels, target, _ in loader))
    chosen = torch.linspace(0, len(val) - 1, min(IMAGES, len(val))).round().long()
    return torch.cat(logits)[chosen].double().clone(), torch.cat(target)[chosen].clone()


def predict(folder: Path, found: dict[str, Any], fractions: Sequence[float]) -> dict[tuple[str, str], list[float]]:
    """Return for each criterion and attack the top-1 (percent) of a student that follows :func:`mean_field` on each
    image, at each fraction."""
    clean, target = teacher_on_validation(folder, found)
    cells, predicted = found['poison'], {}
    for attack in names_of(cells, 'poison'):
        name, _, strength = attack.partition(':strength=')
        poisoned = poison_logits(clean, name, float(strength) if strength else None)
        for criterion in names_of(cells, 'criterion'):
            if criterion in CRITERIA and criterion not in ('none', 'rc', 'lr'):
                margins = mean_field_margins(criterion, clean, poisoned, target, fractions, size=len(clean))
                right = (margins > TIE).double() + (margins.abs() <= TIE).double() / clean.shape[1]
                predicted[criterion, attack] = (100 * right.mean(0)).tolist()
    return predicted


def draw(found: dict[str, Any], predicted: dict[tuple[str, str], list[float]], fractions: Sequence[float]) -> Any:
    """Return a figure: for each attack top-1 against the poisoned fraction, a line for each criterion; what is
    predicted is dotted."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = found['poison']
    attacks = names_of(cells, 'poison')
    style = {'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
             'grid.color': '#e4e4e4', 'axes.axisbelow': True, 'axes.titlelocation': 'left', 'axes.titleweight': 'bold',
             'legend.frameon': False, 'lines.linewidth': 1.6, 'lines.markersize': 4}  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(3.2 * len(attacks), 3.2), layout='constrained')
        FigureCanvasAgg(figure)
        none = next((c for c in cells if c['criterion'] == 'none'), None)
        for axes, attack in zip(figure.subplots(1, len(attacks), sharey=True, squeeze=False)[0], attacks):
            if none is not None:
                axes.axhline(none['top1'], color='#555555', linestyle=(0, (4, 3)), linewidth=1.1, label='none')
            criteria = [c for c in names_of(cells, 'criterion') if c != 'none']
            for colour, marker, criterion in zip(itertools.cycle(COLOURS), itertools.cycle('osD^vP'), criteria):
                points = curve(cells, criterion, attack)
                x, y = [p['fraction'] for p in points], [p['top1'] for p in points]
                axes.plot(x, y, color=colour, marker=marker, label=criterion)
                for p in points:
                    if p['half'] is not None:
                        ends = [p['top1'] - p['half'], min(p['top1'] + p['half'], 100)]
                        axes.plot([p['fraction']] * 2, ends, color=colour, linewidth=1, alpha=0.6)
                if (criterion, attack) in predicted:
                    axes.plot(fractions, predicted[criterion, attack], color=colour, linestyle=':', linewidth=1.3)
            axes.set(title=f'poisoned by {attack}', xlabel='fraction of the training images', ylim=(0, 102))
        figure.axes[0].set_ylabel('top-1, %')
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=6)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('folder', metavar='DIR', help='of `timm-rld compare --poison`')
    parser.add_argument('--output', metavar='FILE', default='poison.png', help='the picture (default: poison.png)')
    parser.add_argument('--mean-field', action='store_true', help='also what the mean field predicts, dotted')


def run(args: argparse.Namespace) -> str:
    """Write the picture, and return a table of what was measured, and predicted."""
    folder = Path(args.folder)
    try:
        found = json.loads((folder / 'compare.json').read_text(encoding='utf-8'))
        cells = found['poison']
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f'{folder}: not a comparison under attack (`timm-rld compare --poison …`)') from e
    measured = {cell['fraction'] for cell in cells}
    fractions = sorted({i / 10 for i in range(11)} | measured) if args.mean_field else []
    predicted = predict(folder, found, fractions) if args.mean_field else {}
    draw(found, predicted, fractions).savefig(args.output, dpi=110, metadata={'Software': None})
    rows = []
    for attack in names_of(cells, 'poison'):
        for criterion in names_of(cells, 'criterion'):
            for cell in curve(cells, criterion, attack):
                row = {'attack': attack, 'criterion': criterion, 'fraction': cell['fraction'], 'top-1': cell['top1']}
                if args.mean_field:
                    of_field = predicted.get((criterion, attack))
                    row['mean field'] = of_field[fractions.index(cell['fraction'])] if of_field else ''
                rows.append(row)
    return markdown(rows)


def main(argv: list[str] | None = None) -> int:
    """Write the picture and print the table. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
