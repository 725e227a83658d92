#!/usr/bin/env python
"""Do timm's architectures go through the program? The smallest one of each of timm's modules is tried, as student and
as teacher, with random weights and no network.

    python benchmarks/zoo.py --output DIR [--modules resnet vision_transformer …] [--seconds 90]

The pair (the architecture with itself) is built by `create_pair` at the smallest size of images that it takes. Then

- student step: one step of `DistillationTask` with `rld` on 8 images; loss and gradients are finite;
- export: the student as a timm folder, loaded by `timm.create_model('local-dir:…')`, gives the same logits bit for bit;
- fold: how many of the teacher's batch norms are folded, and by how much its logits differ then, as a share of the
  largest: at most 1e-5, or ten times what float32 and float64 differ by on that network;
- bf16: under autocast the teacher's logits are finite, and are float32 values that bfloat16 does not have; shown is how
  far they are from those without autocast.

Each architecture has a process of its own and a limit of time, so that a crash or a hang is a row of the table. What is
found is written to DIR/results.jsonl: after an interruption the same command continues. DIR/zoo.md is the table, with
failures first.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import timm  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import timm_rld  # noqa: E402
from timm_rld import DistillationTask, create_pair, export_model  # noqa: E402
from timm_rld.bench.measure import run_script  # noqa: E402
from timm_rld.errors import UsageError, UserError, did_you_mean  # noqa: E402
from timm_rld.pairing import Pair  # noqa: E402

SIZES = (32, 64, 96, 128, 160, 192, 224, 256)
CLASSES, BATCH = 10, 8
CHECKS = {'step': 'student step', 'export': 'export, reload', 'fold': 'fold', 'bf16': 'bf16'}
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------- one architecture


class Failed(Exception):
    """A check that did not pass; the message says what was found."""


def build(name: str) -> Pair:
    """The pair at the smallest size that it takes."""
    native = timm.get_pretrained_cfg(name, allow_unregistered=True).input_size[-1]
    for size in sorted({*SIZES, native}):
        try:
            return create_pair(
                name, name, CLASSES, seed=0, img_size=size, student_pretrained=False, teacher_pretrained=False,
                train_teacher=True,
            )  # fmt: skip
        except UserError as e:
            problem = e
    raise problem


def wake(model: nn.Module) -> None:
    """Weights that begin at zero, and batch norms that have seen nothing, would hide what is wrong."""
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() and not p.any():
                p.normal_(std=0.02)
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
                m.running_mean.normal_(std=0.1)
                m.running_var.uniform_(0.5, 2)
                if m.affine:
                    m.weight.uniform_(0.5, 1.5)
                    m.bias.normal_(std=0.1)


def pixels(pair: Pair, count: int) -> torch.Tensor:
    shape = (count, *pair.data_config['input_size'])
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def distance(logits: torch.Tensor, others: torch.Tensor) -> float:
    """The largest difference of two networks' logits, as a share of the largest logit."""
    return ((logits - others).abs().max() / others.abs().max()).item()


def step(pair: Pair) -> Row:
    task = DistillationTask(pair.student, pair.teacher, 'rld', normalize=pair.normalize).train()
    optimizer = torch.optim.SGD(pair.student.parameters(), lr=1e-3)
    loss = task(pixels(pair, BATCH), torch.arange(BATCH) % CLASSES)['loss']
    loss.backward()
    gradients = [p.grad for p in pair.student.parameters() if p.requires_grad]
    if not (loss.isfinite() and all(g.isfinite().all() for g in gradients if g is not None)):
        raise Failed(f'loss {loss.item():.3g}, or a gradient that is not finite')
    optimizer.step()
    unused = sum(g is None for g in gradients)
    return {'note': f'{unused} parameters have no part in the loss'} if unused else {}


def export(pair: Pair) -> Row:
    with tempfile.TemporaryDirectory() as parent, torch.no_grad():
        folder = export_model(pair.student, Path(parent) / 'student', data_config=pair.data_config)
        again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        x = pair.normalize(pixels(pair, 2))
        if not torch.equal(again(x), pair.student.eval()(x)):
            raise Failed('loaded again it gives other logits')
    return {}


def fold(pair: Pair) -> Row:
    teacher, x = pair.teacher, pixels(pair, 2)
    before, plain = teacher(x), copy.deepcopy(teacher.model)
    found: Row = {'batch_norms': sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in plain.modules())}
    found['folded'] = teacher.optimize_for_inference(pair.data_config['input_size'])
    found['error'] = distance(teacher(x), before)
    if not found['error'] <= 1e-5:
        with torch.no_grad():
            own = distance(before.double(), plain.double()(teacher.normalize(x).double()))
        if not found['error'] <= 10 * own:
            raise Failed(f'folded, logits differ by {found["error"]:.1e}; float32 itself errs by {own:.1e}')
    return found


def bf16(pair: Pair) -> Row:
    x = pixels(pair, 2)
    with torch.autocast('cpu', torch.bfloat16):
        logits = pair.teacher(x)
    if not logits.isfinite().all():
        raise Failed('logits are not finite under bf16')
    if logits.dtype != torch.float32 or torch.equal(logits, logits.bfloat16().float()):
        raise Failed('the head works in bf16')
    return {'bf16_error': distance(logits, pair.teacher(x))}


def examine(name: str, tell: Callable[[Row], None]) -> None:
    """Run all checks on an architecture, and tell what each found; the next ones are run where one fails."""
    tell({'stage': 'build'})
    try:
        pair = build(name)
    except UserError as e:
        return tell({'note': _first_line(e)})
    tell({'size': pair.img_size, 'teacher_size': (pair.teacher.normalize.size or [pair.img_size])[0]})
    for model in (pair.student, pair.teacher.model):
        wake(model)
    for check in (step, export, fold, bf16):
        tell({'stage': CHECKS[check.__name__]})
        try:
            tell({check.__name__: 'ok', **check(pair)})
        except Exception as e:
            tell({check.__name__: 'FAILED', 'note': _first_line(e)})
    return tell({'stage': 'done'})


def _first_line(e: Exception) -> str:
    text = str(e).strip().partition('\n')[0][:160] or type(e).__name__
    return text if isinstance(e, (Failed, UserError)) else f'{type(e).__name__}: {text}'


# ------------------------------------------------------------------------------------------------------- all of them


def smallest(module: str) -> tuple[str, int] | None:
    """The smallest architecture of one of timm's modules, and its number of parameters. timm's own `test_…` networks
    do not count."""
    sizes = {}
    for name in timm.list_models(module=module, exclude_filters='test_*'):
        sizes[name] = sum(p.numel() for p in timm.create_model(name, device='meta').parameters())
    return min(sizes.items(), key=lambda item: item[1], default=None)


def watch(examine: Callable[[str, Callable[[Row], None]], None], name: str, row: Row, seconds: float) -> Row:
    """Examine an architecture in a process of its own.

    Args:
        row: what is known of it.

    Returns:
        The row, with what the process told until it ended, crashed or was stopped after so many seconds.
    """
    context = multiprocessing.get_context('fork')  # a fresh process would take longer to import timm than to run
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=examine, args=(name, sender.send))
    started = time.monotonic()
    process.start()
    sender.close()
    row = {**row, 'architecture': name, **versions()}
    notes = []
    while True:
        if not receiver.poll(max(0.0, started + seconds - time.monotonic())):
            process.kill()
            notes.append(f'stopped after {seconds:g} s in: {row.get("stage")}')
            break
        try:
            told = receiver.recv()
        except EOFError:
            process.join()
            if process.exitcode:  # negative: of a signal
                notes.append(f'died in: {row.get("stage")} (exit code {process.exitcode})')
            break
        if 'note' in told:
            notes.append(told.pop('note'))
        row.update(told)
    process.join()
    return {**row, 'seconds': round(time.monotonic() - started, 1), 'note': '; '.join(notes)}


def versions() -> dict[str, str]:
    return {'timm_rld': timm_rld.__version__, 'timm': timm.__version__, 'torch': torch.__version__.partition('+')[0]}


def passes(row: Row) -> bool:
    return all(row.get(check) == 'ok' for check in CHECKS)


def table(rows: list[Row], left_out: list[str], limit: float) -> str:
    """The summary line and the table as Markdown, failures first."""
    passed = ', '.join(f'{title} {sum(r.get(c) == "ok" for r in rows)}' for c, title in CHECKS.items())
    lines = [f'{len(rows)} architectures: {passed}; all of these {sum(map(passes, rows))}.']
    if left_out:
        lines.append(f'Without an architecture of at most {limit:g} M parameters: {", ".join(left_out)}.')
    head = ['module', 'architecture', 'M parameters', 'size', 'student step', 'export, reload', 'fold', 'folded',
            'error', 'bf16', 'error', 'seconds', 'note']  # fmt: skip
    lines += ['', f'| {" | ".join(head)} |', '|' + ' --- |' * len(head)]
    for r in sorted(rows, key=lambda r: (passes(r), r['module'])):
        size = r.get('size', '')
        if r.get('teacher_size', size) != size:
            size = f'{size} (teacher {r["teacher_size"]})'
        folded = f'{r["folded"]} of {r["batch_norms"]}' if r.get('batch_norms') else ''
        errors = [f'{r[k]:.0e}' if k in r else '' for k in ('error', 'bf16_error')]
        cells = [r['module'], r['architecture'], f'{r["parameters"] / 1e6:.1f}', size,
                 *(r.get(k, '–') for k in ('step', 'export', 'fold')), folded, errors[0], r.get('bf16', '–'), errors[1],
                 r['seconds'], r['note'].replace('|', '/')]  # fmt: skip
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines) + '\n'


def run(args: argparse.Namespace) -> str:
    """Return the summary and the table as Markdown."""
    known = [m for m in timm.list_modules() if hasattr(timm.models, m)]  # ours are in its registry too
    for name in args.modules or ():
        if name not in known:
            raise UsageError(f'--modules {name}: no module of timm{did_you_mean(name, known)}')
    warnings.simplefilter('ignore')
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / 'results.jsonl'
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = {r['module']: r for r in rows if versions().items() <= r.items() and (passes(r) or not args.retry)}
    modules, left_out = args.modules or known, []
    for i, module in enumerate(modules, 1):
        if module in rows:
            continue
        pick = smallest(module)
        if pick is None or pick[1] > args.max_parameters * 1e6:
            left_out.append(module)
            continue
        name, count = pick
        row = rows[module] = watch(examine, name, {'module': module, 'parameters': count}, args.seconds)
        with file.open('a') as f:
            f.write(json.dumps(row) + '\n')
        verdict = 'ok' if passes(row) else 'FAILED'
        print(f'{i}/{len(modules)} {row["architecture"]}: {verdict}, {row["seconds"]} s  {row["note"]}', flush=True)
    text = table([rows[m] for m in modules if m in rows], left_out, args.max_parameters)
    (args.output / 'zoo.md').write_text(text, encoding='utf-8')
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--output', type=Path, required=True, metavar='DIR', help='for results.jsonl and zoo.md')
    parser.add_argument('--modules', nargs='+', metavar='NAME', help='of timm.models; default: all')
    parser.add_argument('--seconds', type=float, default=90, help='for one architecture (default: 90)')
    parser.add_argument('--max-parameters', type=float, default=60, metavar='M', help='in millions (default: 60)')
    parser.add_argument('--threads', type=int, default=1, help="torch's, in each process (default: 1)")
    parser.add_argument('--retry', action='store_true', help='run those again that failed')


def main(argv: list[str] | None = None) -> int:
    """Run the sweep and print its table. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
