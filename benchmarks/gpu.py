"""What has to be measured on a GPU, in parts, each with a limit of time: correctness, a step beside what its networks
cost, the criteria, the loader, and timm's own script.

benchmarks/gpu.sh OUTPUT [WHEELS]                     # on the GPU machine; calls this program
python benchmarks/gpu.py --output DIR --smoke         # all of it on a CPU in tiny sizes: does it run?

DIR gets gpu.json and gpu.md, which are written anew with each figure, and gpu.log. A part that fails, or is stopped at
its limit, keeps what it has measured and costs the others nothing. Figures with a target say `pass` or `miss`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from timm_rld.bench.measure import run_script
from timm_rld.data.sources import SAMPLE_DIR
from timm_rld.engine.speed import device_name
from timm_rld.errors import Stopped, UsageError, UserError
from timm_rld.files import cores, write_atomic
from timm_rld.run_folder import versions

ROOT = Path(__file__).resolve().parent.parent
LEAST_SECONDS = 5.0  # of a part; it is left out where there is no more time

Row = dict[str, Any]
Tell = Callable[..., None]


@dataclass(frozen=True)
class Sizes:
    """What is measured: on a GPU, and in a trial on a CPU."""

    teacher: str = 'resnet34'
    student: str = 'resnet18'
    img_size: int = 224
    batch_size: int = 256
    num_classes: int = 1000
    mixed_precision: str = 'bf16'
    rounds: int = 5
    steps: int = 8
    repeats: int = 2
    loss_shape: tuple[int, int] = (256, 1000)
    loss_repeats: int = 15
    loader_batches: int = 24
    photo: tuple[int, int] = (500, 375)
    workers: int = 16
    cpu_threads: int | None = None
    few: tuple[str, ...] = ('--teacher', 'cifar_resnet20', '--student', 'cifar_resnet8', '--batch-size', '64')


SMOKE = Sizes(
    teacher='test_resnet', student='test_resnet', img_size=32, batch_size=4, num_classes=5, mixed_precision='no',
    rounds=1, steps=2, repeats=1, loss_shape=(4, 5), loss_repeats=1, loader_batches=2, photo=(40, 30), workers=0,
    cpu_threads=1,
    few=('--teacher', 'test_resnet', '--student', 'test_resnet', '--no-teacher-pretrained', '--batch-size', '16',
         '--workers', '0', '--dataset', f'hfds/{SAMPLE_DIR}', '--train-split', 'train[:48]', '--val-split', 'test[:32]',
         '--cpu-threads', '1'),
)  # fmt: skip


def sizes_of(args: argparse.Namespace) -> Sizes:
    """Return the sizes; on a machine with fewer cores, fewer workers."""
    return SMOKE if args.smoke else Sizes(workers=min(Sizes.workers, cores()))


# --------------------------------------------------------------------------------------- the parts, in child processes


def gpu_tests(args: argparse.Namespace, tell: Tell) -> None:
    """The tests that need a GPU."""
    run_pytest(['-m', 'gpu', 'tests'], tell)


def suite(args: argparse.Namespace, tell: Tell) -> None:
    """The whole test suite where a GPU is to be seen."""
    several = ['-n', str(min(8, cores())), '--dist', 'loadfile'] if importlib.util.find_spec('xdist') else []
    run_pytest([*several, 'tests'], tell)


def run_pytest(arguments: Sequence[str], tell: Tell) -> None:
    """Run pytest, and tell how many tests ended how."""
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8')
    print(done.stdout, flush=True)
    found = dict.fromkeys(('passed', 'skipped', 'failed', 'error'), 0)
    last = done.stdout.strip().rpartition('\n')[2]
    found |= {what.rstrip('s'): int(n) for n, what in re.findall(r'(\d+) (passed|skipped|failed|errors?)\b', last)}
    for what in ('passed', 'skipped'):
        tell(f'tests {what}', found[what])
    failed = re.findall(r'^(?:FAILED|ERROR) (\S+)', done.stdout, re.MULTILINE)
    tell('tests failed', found['failed'] + found['error'], target='<= 0', note=' '.join(failed[:8]))
    if done.returncode not in (0, 1):
        raise UserError(f'pytest ended with code {done.returncode}: {last}')


def train(args: argparse.Namespace, tell: Tell, *, precision: str) -> None:
    """A run from start to end on the sample: teacher, student, cache, clipping, averaged weights, export."""
    from train_distill import main

    if args.device == 'cpu' and precision == 'fp16':
        tell('fp16', math.nan, note='needs a GPU')
        return
    with tempfile.TemporaryDirectory() as folder:
        flags = ['--mixed-precision', precision, '--model-ema', '--reprob', '0.2', '--clip-grad', '1']
        flags += [
            '--teacher-cache',
            f'{folder}/cache',
            '--teacher-epochs',
            '2',
            '--epochs',
            '3',
            *_common(args, folder),
        ]
        _told(tell, f'{precision}: exit code', main([*flags, '--experiment', 'run']))
        results = _results(Path(folder) / 'run')
        tell(f'{precision}: top-1 of teacher, sample', results['teacher_top1'], '%')
        tell(f'{precision}: top-1 of student, sample', results['student_top1'], '%')
        tell(f'{precision}: images/s, sample', results['train_images_per_second'], 'images/s')


def resume(args: argparse.Namespace, tell: Tell) -> None:
    """Two epochs, killed in the second and resumed, beside two epochs in one go."""
    from train_distill import main

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = ['--mixed-precision', sizes_of(args).mixed_precision, '--teacher-epochs', '1', '--epochs', '2']
        flags += _common(args, name)
        command = [sys.executable, '-m', 'train_distill', *flags, '--experiment', 'killed', '--log-interval', '1']
        _kill_when(r'student epoch 2/2 \[1/', command)
        there = sorted(p.name for p in (folder / 'killed' / 'checkpoints').glob('student-*'))
        what = 'killed in the second epoch: exit code after resuming'
        _told(tell, what, main(['--resume', str(folder / 'killed')]), note=f'from {there[-1]}')
        _told(tell, 'in one go: exit code', main([*flags, '--experiment', 'whole']))
        rows = [list(csv.DictReader((folder / run / 'summary.csv').open())) for run in ('killed', 'whole')]
        tell('epochs in its log', len(rows[0]), target='>= 2')
        killed, whole = (_weights(folder / run) for run in ('killed', 'whole'))
        apart = max(_distance(killed[name], whole[name]) for name in whole)
        tell('largest difference of a weight to a run in one go', apart, note='0 where all kernels are deterministic')
        tell('top-1, resumed minus in one go', float(rows[0][-1]['eval_top1']) - float(rows[1][-1]['eval_top1']), '%')


def step(args: argparse.Namespace, tell: Tell, *, compiled: bool = False, search: bool = False) -> None:
    """A step beside what its networks cost alone.

    Args:
        search: with cuDNN's search for the fastest algorithms, which timm's script switches on.
    """
    from timm_rld.bench.step import bench_step, describe

    torch.backends.cudnn.benchmark = search
    s = sizes_of(args)
    found = bench_step(
        s.teacher, s.student, img_size=s.img_size, batch_size=s.batch_size, num_classes=s.num_classes,
        mixed_precision=s.mixed_precision, channels_last=True, torchcompile=compiled, rounds=s.rounds, steps=s.steps,
        loader=False, idle=True, cpu_threads=s.cpu_threads,
    )  # fmt: skip
    print(describe(found), flush=True)
    for what, seconds in found.seconds.items():
        tell(what, s.batch_size / seconds, 'images/s', note=f'{1000 * seconds:.3g} ms')
    for what, (middle, low, high) in (('online / (S + T)', found.online), ('cached / S', found.cached)):
        tell(what, middle, target='<= 1.03', note=f'{low:.3f} to {high:.3f}')
    tell('idle share of the device, online', 100 * found.idle, '%', target='<= 3')


def loss(args: argparse.Namespace, tell: Tell) -> None:
    """Time and memory of criteria beside kd."""
    from timm_rld.bench.loss import MODES, bench_loss

    s = sizes_of(args)
    for mode in MODES:  # first what needs no compiler
        names = ['rld', 'dkd', 'la']
        for row in bench_loss(names, [s.loss_shape], modes=[mode], repeats=s.loss_repeats, device=args.device):
            what = f'{row["name"]} / kd, {row["shape"]} {mode}'
            target = '<= 1.5' if row['name'] == 'rld' else None
            tell(what, row['of_kd'], target=target, note=f'{row["ms"]:.3g} ms, {row["mib"]:.3g} MiB')


def loader(args: argparse.Namespace, tell: Tell) -> None:
    """Images a second from JPEGs."""
    import data

    from timm_rld.bench.photographs import write_photographs
    from timm_rld.data import open_split

    s = sizes_of(args)
    with tempfile.TemporaryDirectory() as root:
        write_photographs(Path(root) / 'train', min(256, s.loader_batches * s.batch_size), s.photo)
        rows, _ = data.bench_data(
            open_split(None, 'train', flag='', data_dir=root), s.img_size, s.batch_size, workers=s.workers,
            batches=s.loader_batches, repeats=s.repeats,
        )  # fmt: skip
    for row in rows:
        tell(f'loader: {row["loader"]}', row['images/s'], 'images/s', note=f'{s.workers} workers')


def beside_timm(args: argparse.Namespace, tell: Tell) -> None:
    """Whole programs: timm's train.py and ours."""
    import timm_script

    s = sizes_of(args)
    parser = argparse.ArgumentParser()
    timm_script.add_arguments(parser)
    with tempfile.TemporaryDirectory() as cache:
        cached = f'--teacher-cache {shlex.quote(cache)}'
        given = parser.parse_args([
            '--timm-train', str(args.timm_train), '--teacher', s.teacher, '--student', s.student, '--img-size',
            str(s.img_size), '--batch-size', str(s.batch_size), '--mixed-precision', s.mixed_precision, '--device',
            args.device, '--workers', str(max(s.workers - 1, 0)), '--distill', 'rld', f'--ours={cached}', '--repeats',
            '1', '--steps', str(3 * s.steps), '--warmup-steps', str(s.steps),
        ])  # fmt: skip
        table, about = timm_script.bench(given)
    print(about, flush=True)
    for row in table:
        name = str(row['program']).replace(cached, '--teacher-cache …')
        ours, memory = name.startswith(timm_script.OURS), row["memory ×timm's"]
        target = None if not ours else '>= 1.6' if 'cache' in name else '>= 1.3'
        tell(f'{name}', row['images/s'], 'images/s', note=f'{row["memory, MiB"]} MiB')
        tell(f"{name}, ×timm's", row["×timm's"], target=target)
        tell(f"{name}, memory ×timm's", memory if isinstance(memory, float) else math.nan)


def _common(args: argparse.Namespace, folder: str) -> list[str]:
    return [*sizes_of(args).few, '--img-size', '32', '--lr', '0.05', '--min-teacher-acc', '0', '--no-speed',
            '--output', folder]  # fmt: skip


def _told(tell: Tell, what: str, code: int, note: str = '') -> None:
    """Tell an exit code, and go on only where it is 0."""
    tell(what, code, target='<= 0', note=note)
    if code:
        raise UserError(f'{what} {code}; gpu.log says why')


def _results(run: Path) -> Row:
    return json.loads((run / 'results.json').read_text(encoding='utf-8'))


def _weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's newest checkpoint."""
    newest = max((run / 'checkpoints').glob('student-*'), key=lambda p: p.name)
    return safetensors.torch.load_file(newest / 'model.safetensors')


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def _kill_when(pattern: str, command: list[str]) -> None:
    """Run a command, and kill it once a line of its output matches."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8', errors='replace'
    )
    last = ''
    with process:
        for line in process.stdout:
            print(line, end='', flush=True)
            if re.search(pattern, line):
                process.kill()
                return
            last = line.strip() or last
    raise UserError(f'ended with code {process.returncode} before it could be killed: {last}')


@dataclass(frozen=True)
class Part:
    """A part.

    Attributes:
        seconds: its limit.
        function: takes the arguments, and a function that tells a figure.
    """

    seconds: float
    function: Callable[..., None]

    @property
    def about(self) -> str:
        """What is measured, and what is special about it."""
        partial = isinstance(self.function, functools.partial)
        function = self.function.func if partial else self.function
        special = self.function.keywords if partial else {}
        title = str(function.__doc__).partition('\n')[0].rstrip('.')
        return ', '.join([title, *(str(value) if value is not True else key for key, value in special.items())])


# by worth: what comes last is what is missing where time is short
PARTS = {
    'tests': Part(60, gpu_tests),
    'step': Part(75, step),
    'loss': Part(50, loss),
    'bf16': Part(45, functools.partial(train, precision='bf16')),
    'fp16': Part(45, functools.partial(train, precision='fp16')),
    'resume': Part(60, resume),
    'loader': Part(45, loader),
    'timm': Part(150, beside_timm),
    'compiled': Part(150, functools.partial(step, compiled=True)),
    'search': Part(60, functools.partial(step, search=True)),
    'suite': Part(math.inf, suite),
}


# ------------------------------------------------------------------------------------------------ the parent's process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--output', type=Path, required=True, metavar='DIR', help='for gpu.json, gpu.md and gpu.log')
    parser.add_argument('--parts', nargs='+', metavar='NAME', default=list(PARTS), help=f'default: {" ".join(PARTS)}')
    parser.add_argument('--seconds', type=float, default=570, help='for all parts together (default: 570)')
    parser.add_argument('--limit', type=float, metavar='SECONDS', help="of each part, in place of the part's own")
    parser.add_argument('--timm-train', type=Path, metavar='PATH', help="timm's train.py; without it, no part timm")
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda', help='default: cuda')
    parser.add_argument('--smoke', action='store_true', help='tiny sizes, on a CPU')
    parser.add_argument('--tell', type=Path, help=argparse.SUPPRESS)  # of a child: where its figures go


def run(args: argparse.Namespace) -> str:
    """Run the parts. Returns the tables as Markdown."""
    for name in args.parts:
        if name not in PARTS:
            raise UsageError(f'--parts {name}: one of {", ".join(PARTS)}')
    if args.smoke:
        args.device = 'cpu'
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: there is none that torch can use; --smoke tries everything on a CPU')
    if args.tell is not None:
        with args.tell.open('a', encoding='utf-8') as f:
            PARTS[args.parts[0]].function(args, functools.partial(_tell, f))
        return ''
    args.output.mkdir(parents=True, exist_ok=True)
    report = Report(args.output, facts(args))
    deadline = time.monotonic() + args.seconds
    with _told_to_stop():
        for name in args.parts:
            left = deadline - time.monotonic()
            limit = min(left, args.limit or PARTS[name].seconds)
            if name == 'timm' and args.timm_train is None:
                report.end(name, 'left out: no --timm-train')
            elif limit < min(LEAST_SECONDS, args.seconds):
                report.end(name, 'left out: no time was left')
            else:
                report.end(name, watch(name, limit, args, report))
    return report.markdown()


def _tell(file: Any, what: str, value: float, unit: str = '', *, target: str | None = None, note: str = '') -> None:
    """Tell a figure to the parent.

    Args:
        target: `<= number` or `>= number`.
    """
    row = {'what': what, 'value': None if math.isnan(value) else value, 'unit': unit, 'target': target, 'note': note}
    file.write(json.dumps(row, ensure_ascii=False) + '\n')
    file.flush()
    print(f'{what}: {value} {unit} {note}', flush=True)


def watch(name: str, limit: float, args: argparse.Namespace, report: Report) -> str:
    """Run a part in a process of its own until its end or its limit, and report its figures as they come.

    Returns:
        How it ended.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, (args.output / 'gpu.log').open('ab') as log:
        log.write(f'\n==== {name}\n'.encode())
        log.flush()
        told = Path(folder) / 'told.jsonl'
        told.touch()
        command = command_of(name, args, told)
        at = log.tell()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment(args),
                                   start_new_session=True)  # fmt: skip
        try:
            with told.open(encoding='utf-8') as f:
                while True:
                    ended = process.poll() is not None
                    for line in f:
                        report.add(name, json.loads(line))
                    if ended or time.monotonic() - started > limit:
                        break
                    time.sleep(0.2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    seconds = time.monotonic() - started
    if not ended:
        return f'stopped at its limit of {limit:.0f} s'
    if code:
        with (args.output / 'gpu.log').open('rb') as log:
            log.seek(at)
            said = log.read().decode(errors='replace').strip().rpartition('\n')[2]
        return f'failed with code {code} after {seconds:.0f} s: {said[:200]}'
    return f'done in {seconds:.0f} s'


def command_of(name: str, args: argparse.Namespace, told: Path) -> list[str]:
    """Return the command that runs a part and puts its figures into a file."""
    command = [sys.executable, str(Path(__file__).resolve()), '--output', str(args.output), '--parts', name,
               '--device', args.device, '--tell', str(told), '--debug']  # fmt: skip
    command += ['--smoke'] if args.smoke else []
    return command + (['--timm-train', str(args.timm_train.resolve())] if args.timm_train else [])


def _environment(args: argparse.Namespace) -> dict[str, str]:
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'PYTHONUNBUFFERED': '1', 'ACCELERATE_USE_CPU': 'false'}
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    if args.smoke:
        env |= {'ACCELERATE_USE_CPU': 'true', 'TORCHDYNAMO_DISABLE': '1'}  # the compiler takes minutes
    return env


@contextlib.contextmanager
def _told_to_stop() -> Any:
    """SIGTERM ends the part that is running, too."""

    def told(number: int, _: object) -> None:
        raise Stopped('stopped by SIGTERM', 128 + number)

    before = signal.signal(signal.SIGTERM, told)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def facts(args: argparse.Namespace) -> Row:
    """Return on what is measured, and how."""
    return {
        'device': device_name(torch.device(args.device)),
        'cores': cores(),
        'cuda': torch.version.cuda,
        'cudnn': torch.backends.cudnn.version() if args.device == 'cuda' else None,
        'versions': {**versions(), 'python': platform.python_version()},
        'command': shlex.join(['python', 'benchmarks/gpu.py', *(a for a in sys.argv[1:] if a != '--debug')]),
        'smoke': args.smoke,
    }


def verdict(row: Row) -> str:
    """Return `pass` or `miss`, or nothing where there is no target."""
    if not row['target']:
        return ''
    sign, _, limit = row['target'].partition(' ')
    if row['value'] is None:
        return 'miss'
    return 'pass' if (row['value'] <= float(limit) if sign == '<=' else row['value'] >= float(limit)) else 'miss'


class Report:
    """What has been found so far, in DIR/gpu.json and DIR/gpu.md.

    Args:
        folder: DIR.
        facts: on what is measured, and how.

    Attributes:
        parts: by name: how it `ended`, and its figures, `rows`.
    """

    def __init__(self, folder: Path, facts: Row) -> None:
        self.folder, self.facts = folder, facts
        self.parts: dict[str, Row] = {}

    def add(self, part: str, row: Row) -> None:
        """Add a figure."""
        self._part(part)['rows'].append({**row, 'verdict': verdict(row)})
        self._write()

    def end(self, part: str, how: str) -> None:
        """Note how a part ended."""
        self._part(part)['ended'] = how
        print(f'{part}: {how}', file=sys.stderr, flush=True)
        self._write()

    def _part(self, name: str) -> Row:
        return self.parts.setdefault(name, {'ended': 'running', 'rows': []})

    def _write(self) -> None:
        found = {**self.facts, 'parts': self.parts, 'derived': self.derived()}
        write_atomic(self.folder / 'gpu.json', json.dumps(found, indent=1, ensure_ascii=False) + '\n')
        write_atomic(self.folder / 'gpu.md', self.markdown() + '\n')

    def derived(self) -> list[str]:
        """Return what a student of the measured speed needs of the loader."""
        rows = {(part, r['what']): r for part, found in self.parts.items() for r in found['rows']}
        rate = rows.get(('loader', 'loader: timm_rld'))
        lines = []
        for what in ('cached step', 'online step'):
            wanted = rows.get(('step', what))
            if rate and wanted and rate['value'] and wanted['value']:
                share = wanted['value'] / rate['value']
                lines.append(
                    f'The {what} takes {wanted["value"]:.0f} images/s, {self.facts["cores"]} cores give '
                    f'{rate["value"]:.0f}: it needs {share:.2f} times as many, about '
                    f'{math.ceil(share * self.facts["cores"])} cores a GPU.'
                )
        return lines

    def markdown(self) -> str:
        """Return the tables."""
        f = self.facts
        listed = ', '.join(f'{name} {version}' for name, version in f['versions'].items())
        cuda = f'; CUDA {f["cuda"]}, cuDNN {f["cudnn"]}' if f['cudnn'] else ''
        lines = [f'{f["device"]}, {f["cores"]} cores; {listed}{cuda}.', '', f'`{f["command"]}`']
        if f['smoke']:
            lines += ['', 'A trial of the program in tiny sizes on a CPU: its figures mean nothing.']
        verdicts = [r['verdict'] for found in self.parts.values() for r in found['rows']]
        lines += ['', f'{verdicts.count("pass")} of {len(verdicts) - verdicts.count("")} targets passed.']
        for name, found in self.parts.items():
            lines += ['', f'**{name}**: {PARTS[name].about} ({found["ended"]})']
            if found['rows']:
                lines += ['', '| figure | value | | target | | note |', '| --- | --- | --- | --- | --- | --- |']
            for r in found['rows']:
                value = '' if r['value'] is None else f'{r["value"]:.4g}'
                cells = [r['what'], value, r['unit'], r['target'] or '', r['verdict'], r['note']]
                lines.append('| ' + ' | '.join(str(c).replace('|', '/') for c in cells) + ' |')
        return '\n'.join([*lines, '', *self.derived()]).rstrip()


def main(argv: list[str] | None = None) -> int:
    """Run the parts and print their tables. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
