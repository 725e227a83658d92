#!/usr/bin/env python
"""Which architectures can be exported? The smallest one of each family of ours and of each of timm's modules is tried,
with random weights and no network.

    python benchmarks/export.py --output DIR [--architectures cifar_vgg8 resnet18 …] [--seconds 300]

Each is built at the smallest size of images that it takes, and written as pt2 and as ONNX, with the normalisation
inside. The files are opened in torch and in onnxruntime, and see random images in batches of 1, 7 and 16. Shown is the
largest difference of a logit to the network's own, as a share of the logits' standard deviation; above 1% it counts as
failed. Where an exporter fails, its reason is shown.

Each architecture has a process of its own and a limit of time. What is found is written to DIR/results.jsonl: after an
interruption the same command continues. DIR/export.md is the table, with failures first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402

from benchmarks.zoo import SIZES, versions, wake, watch  # noqa: E402
from timm_rld.bench.measure import run_script  # noqa: E402
from timm_rld.errors import UsageError, UserError, did_you_mean  # noqa: E402
from timm_rld.export import Graph, trace  # noqa: E402
from timm_rld.export.check import LARGEST_DIFFERENCE  # noqa: E402
from timm_rld.export.export import FORMATS, open_file  # noqa: E402
from timm_rld.export.graph import describe, prepare, reason  # noqa: E402
from timm_rld.export.onnx import label_onnx, write_onnx  # noqa: E402
from timm_rld.export.pt2 import write_pt2  # noqa: E402
from timm_rld.pairing import Pair, create_student  # noqa: E402

CLASSES, BATCHES = 10, (1, 7, 16)
Row = dict[str, Any]


def build(name: str) -> Pair:
    """The network at the smallest size that it takes."""
    native = timm.get_pretrained_cfg(name, allow_unregistered=True).input_size[-1]
    for size in sorted({*SIZES, native}):
        try:
            pair = create_student(name, CLASSES, img_size=size)
            with torch.no_grad():
                pair.student.eval()(torch.zeros(2, *pair.data_config['input_size']))
            return pair
        except Exception as e:
            problem = e
    raise UserError(str(problem).partition('\n')[0])


def write(pair: Pair, format: str, program: Any, file: Path) -> None:
    about = describe(
        pair.data_config, [str(i) for i in range(CLASSES)], architecture='', in_graph=True, precision='fp32', exif=True
    )
    if format == 'pt2':
        write_pt2(program, file, about)
    else:
        write_onnx(program, file, in_graph=True)
        label_onnx(file, about)


@torch.inference_mode()
def difference(pair: Pair, file: Path, format: str) -> float:
    """The largest difference of the file's logits, as a share of their standard deviation."""
    opened, worst = open_file(file, format, torch.get_num_threads()), 0.0
    generator = torch.Generator().manual_seed(1)
    for batch in BATCHES:
        pixels = torch.randint(256, (batch, *pair.data_config['input_size']), dtype=torch.uint8, generator=generator)
        expected = pair.student(pair.normalize(pixels)).numpy()
        found = opened(prepare(pixels.numpy(), opened.about))
        worst = max(worst, float(np.abs(found - expected).max() / expected.std()))
    return worst


def examine(name: str, tell: Callable[[Row], None]) -> None:
    """Export an architecture in both formats, and tell what came of it."""
    tell({'stage': 'build'})
    torch.manual_seed(0)
    try:
        pair = build(name)
    except UserError as e:
        return tell({'note': str(e)})
    wake(pair.student.eval())
    tell({'size': pair.data_config['input_size'][-1], 'stage': 'torch.export'})
    try:
        program = trace(Graph(pair.student, pair.normalize), pair.data_config['input_size'])
    except Exception as e:
        return tell({**dict.fromkeys(FORMATS, 'FAILED'), 'note': f'torch.export: {reason(e)}'})
    for format in ('pt2', 'onnx'):
        tell({'stage': format})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f'model.{format}'
            try:
                write(pair, format, program, file)
                found = difference(pair, file, format)
            except Exception as e:
                tell({format: 'FAILED', 'note': f'{format}: {reason(e)}'})
                continue
            ok = found <= LARGEST_DIFFERENCE
            tell({format: 'ok' if ok else 'FAILED', f'{format}_difference': found})
            if not ok:
                tell({'note': f'{format}: other logits'})
    return tell({'stage': 'done'})


def family(name: str) -> str:
    """The family of an architecture: of ours its name without size, of timm's its module."""
    ours = re.match(r'cifar_([a-z]+v[12]$|[a-z]+)', name)
    return ours[0] if ours else timm.models.model_entrypoint(name).__module__.rpartition('.')[2]


def smallest_of_each() -> list[str]:
    """The smallest architecture of each family; timm's own `test_…` networks do not count."""
    found: dict[str, tuple[int, str]] = {}
    for name in timm.list_models(exclude_filters='test_*'):
        of = family(name)
        found[of] = min(found.get(of, (sys.maxsize, '')), (parameters_of(name), name))
    return [name for _, name in found.values()]


def parameters_of(name: str) -> int:
    return sum(p.numel() for p in timm.create_model(name, device='meta').parameters())


def passes(row: Row) -> bool:
    return all(row.get(format) == 'ok' for format in FORMATS)


def table(rows: list[Row]) -> str:
    """The summary line and the table as Markdown, failures first."""
    counts = ', '.join(f'{format} {sum(r.get(format) == "ok" for r in rows)}' for format in FORMATS)
    head = ['family', 'architecture', 'M parameters', 'size', 'onnx', 'difference', 'pt2', 'difference', 'note']
    lines = [f'{len(rows)} architectures: {counts}.', '', f'| {" | ".join(head)} |', '|' + ' --- |' * len(head)]
    for r in sorted(rows, key=lambda r: (passes(r), not r['family'].startswith('cifar_'), r['family'])):
        cells = [r['family'], r['architecture'], f'{r["parameters"] / 1e6:.1f}', r.get('size', '')]
        for format in FORMATS:
            known = r.get(f'{format}_difference')
            cells += [r.get(format, '–'), '' if known is None else f'{known:.0e}']
        lines.append(f'| {" | ".join(map(str, [*cells, r["note"].replace("|", "/")]))} |')
    return '\n'.join(lines) + '\n'


def run(args: argparse.Namespace) -> str:
    """Return the summary and the table as Markdown."""
    for name in args.architectures or ():
        if not timm.is_model(name):
            raise UsageError(f'--architectures {name}: unknown{did_you_mean(name, timm.list_models())}')
    warnings.simplefilter('ignore')
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / 'results.jsonl'
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = {r['architecture']: r for r in rows if versions().items() <= r.items() and (passes(r) or not args.retry)}
    names = args.architectures or smallest_of_each()
    import onnxruntime  # noqa: F401  (once, and not in each process)
    import onnxscript  # noqa: F401

    for i, name in enumerate(names, 1):
        if name in rows or (count := parameters_of(name)) > args.max_parameters * 1e6:
            continue
        row = rows[name] = watch(examine, name, {'family': family(name), 'parameters': count}, args.seconds)
        with file.open('a') as f:
            f.write(json.dumps(row) + '\n')
        verdict = 'ok' if passes(row) else 'FAILED'
        print(f'{i}/{len(names)} {name}: {verdict}, {row["seconds"]} s  {row["note"]}', flush=True)
    text = table([rows[name] for name in names if name in rows])
    (args.output / 'export.md').write_text(text, encoding='utf-8')
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--output', type=Path, required=True, metavar='DIR', help='for results.jsonl and export.md')
    parser.add_argument('--architectures', nargs='+', metavar='NAME', help='default: the smallest of each family')
    parser.add_argument('--seconds', type=float, default=300, help='for one architecture (default: 300)')
    parser.add_argument('--max-parameters', type=float, default=60, metavar='M', help='in millions (default: 60)')
    parser.add_argument('--threads', type=int, default=1, help="torch's, in each process (default: 1)")
    parser.add_argument('--retry', action='store_true', help='run those again that failed')


def main(argv: list[str] | None = None) -> int:
    """Run the sweep and print its table. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
