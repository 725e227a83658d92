"""timm's own training script with `--kd-model-name` beside train_distill.py: two whole programs on the same data.

Both run as processes of their own, one after another. The clock is read when the lines about two batches come out of
their pipes, so that both are measured alike, whatever rates they print.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch

from timm_rld.bench.measure import markdown, run_script
from timm_rld.bench.photographs import draw_photograph
from timm_rld.errors import Stopped, UsageError, UserError, did_you_mean
from timm_rld.files import cores
from timm_rld.hub import export_model
from timm_rld.loss import CRITERIA, get_criterion

TIMM, OURS = "timm's train.py", 'train_distill.py'
LEAVE_SECONDS = 30.0
DISTINCT = 64  # photographs; the others are further names of theirs
_BATCH_OF_TIMM = re.compile(r'Train: 0 \[ *(\d+)/(\d+)')  # from 0
_BATCH_OF_OURS = re.compile(r'student epoch 1/\d+ \[(\d+)/(\d+)\]')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--timm-train', required=True, metavar='PATH', help="timm's train.py, from its repository")
    parser.add_argument('--teacher', default='resnet34', metavar='NAME', help='random weights (default: resnet34)')
    parser.add_argument('--student', default='resnet18', metavar='NAME', help='default: resnet18')
    parser.add_argument('--img-size', type=int, default=224, metavar='N', help='default: 224')
    parser.add_argument('--batch-size', type=int, default=32, metavar='N', help='default: 32')
    parser.add_argument('--mixed-precision', choices=('no', 'bf16'), default='no')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    workers = min(4, cores())
    parser.add_argument('--workers', type=int, default=workers, metavar='N', help=f'default: {workers}')
    parser.add_argument('--distill', nargs='+', default=['kd', 'rld'], metavar='NAME', help='ours (default: kd rld)')
    more = "'--flag value …'"
    parser.add_argument(
        '--ours', action='append', default=[], metavar='FLAGS',
        help=f'a further row, train_distill.py with the last criterion and these flags: --ours={more}',
    )  # fmt: skip
    parser.add_argument(
        '--timm', action='append', default=[], metavar='FLAGS',
        help=f"a further row, timm's script with these flags: --timm={more}",
    )  # fmt: skip
    parser.add_argument('--steps', type=int, default=20, metavar='N', help='batches to time (default: 20)')
    parser.add_argument('--warmup-steps', type=int, default=5, metavar='N', help='batches before them (default: 5)')
    parser.add_argument('--repeats', type=int, default=3, help='rounds in which all take turns (default: 3)')
    parser.add_argument('--data-dir', metavar='DIR', help='with train, validation (default: photographs made for it)')
    parser.add_argument('--num-classes', type=int, default=100, metavar='N', help='of the photographs (default: 100)')


def run(args: argparse.Namespace) -> str:
    """The table as Markdown, and under it what was compared."""
    table, about = bench(args)
    return f'{markdown(table)}\n\n{about}'


def bench(args: argparse.Namespace) -> tuple[list[dict[str, float | str]], str]:
    """Return the table of :func:`rows`, and what was compared."""
    _check(args)
    last = args.warmup_steps + args.steps
    threads = int(os.environ.get('OMP_NUM_THREADS') or cores())
    with tempfile.TemporaryDirectory(prefix='bench-timm-') as folder:
        data = Path(args.data_dir or Path(folder) / 'data').expanduser()
        if not args.data_dir:
            write_data(data, args.batch_size * (last + 1), args.num_classes, args.img_size)
        classes = class_names(data)
        teacher = write_teacher(args.teacher, Path(folder) / 'teacher', classes, args.img_size)
        programs = commands(args, data, f'local-dir:{teacher}', len(classes), threads, Path(folder) / 'runs')
        env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONUNBUFFERED': '1'}
        env['ACCELERATE_USE_CPU'] = str(args.device == 'cpu').lower()
        found: dict[str, list[Measured]] = {name: [] for name in programs}
        with _told_to_stop():
            for name, command in programs.items():
                if '--teacher-cache' in command:  # filled before it is measured
                    measure(name, command, args.warmup_steps, args.steps, env, gently=True, device=args.device)
            for n in range(args.repeats):
                for name, command in programs.items():
                    measured = measure(name, command, args.warmup_steps, args.steps, env, device=args.device)
                    found[name].append(measured)
                    rate = args.batch_size * args.steps / measured.seconds
                    print(f'[{n + 1}/{args.repeats}] {name}: {rate:.3g} images/s', file=sys.stderr)
                    shutil.rmtree(Path(folder) / 'runs', ignore_errors=True)
    where = 'cuda' if args.device == 'cuda' else f'CPU, {threads} thread(s)'
    memory = 'what the GPU had less' if args.device == 'cuda' else 'peak of the training process in main memory'
    about = (
        f'{args.teacher} → {args.student}, {len(classes)} classes, {args.img_size} pixels, batch '
        f'{args.batch_size}, mixed precision {args.mixed_precision}, {where}, {args.workers} workers; {args.steps} '
        f'batches after the first {args.warmup_steps}, median of {args.repeats}. Memory: {memory}.'
    )
    return rows(found, args.batch_size * args.steps), about


@dataclass(frozen=True)
class Measured:
    """What one run took.

    Attributes:
        seconds: between the ends of two batches.
        peak: bytes of main memory, without those of loader workers; None where the system does not report it. On a
            GPU, bytes of its memory that the program holds: torch gives none back.
    """

    seconds: float
    peak: int | None


def rows(found: dict[str, list[Measured]], images: int) -> list[dict[str, float | str]]:
    """Medians, and their ratios to the first program's.

    Args:
        found: the runs of each program.
        images: that were timed in each run.
    """
    table: list[dict[str, float | str]] = []
    base: tuple[float, float] | None = None
    for name, runs in found.items():
        rate = images / statistics.median(r.seconds for r in runs)
        peak = statistics.median(math.nan if r.peak is None else r.peak for r in runs)
        base = base or (rate, peak)
        known = not math.isnan(peak) and not math.isnan(base[1])
        table.append({
            'program': name, 'images/s': rate, "×timm's": rate / base[0],
            'memory, MiB': f'{peak / 2**20:.0f}' if known else '', "memory ×timm's": peak / base[1] if known else '',
        })  # fmt: skip
    return table


def commands(
    args: argparse.Namespace, data: Path, teacher: str, num_classes: int, threads: int, output: Path
) -> dict[str, list[str]]:
    """Return the command of each row, timm's first. Both get the same settings."""
    both = [
        '--data-dir', str(data), '--img-size', str(args.img_size), '--batch-size', str(args.batch_size),
        '--workers', str(args.workers), '--output', str(output), '--opt', 'sgd', '--smoothing', '0.1',
        '--color-jitter', '0.4', '--epochs', '300', '--seed', '42',
    ]  # fmt: skip
    timms = [
        sys.executable, str(Path(args.timm_train).expanduser()), *both, '--model', args.student,
        '--num-classes', str(num_classes), '--kd-model-name', teacher, '--device', args.device, '--log-interval', '1',
    ]  # fmt: skip
    if args.mixed_precision == 'bf16':
        timms += ['--amp', '--amp-dtype', 'bfloat16']
    homes = {timm.models.model_entrypoint(name).__module__.partition('.')[0] for name in (args.teacher, args.student)}
    if others := sorted(homes - {'timm'}):  # networks that these register with timm
        timms += ['--device-modules', *others]
    # timm's script waits for each step to read its loss, whatever it prints; ours waits where it prints
    interval = math.gcd(args.warmup_steps, args.steps)
    ours = [
        sys.executable, '-m', 'train_distill', *both, '--teacher', teacher, '--student', args.student,
        '--teacher-epochs', '0', '--min-teacher-acc', '0', '--mixed-precision', args.mixed_precision,
        '--cpu-threads', str(threads), '--log-interval', str(interval),
    ]  # fmt: skip
    made = {f'{TIMM} {flags}'.strip(): [*timms, *shlex.split(flags)] for flags in ('', '--channels-last', *args.timm)}
    made.update({f'{OURS} --distill {name}': [*ours, '--distill', name] for name in args.distill})
    for flags in args.ours:
        made[f'{OURS} --distill {args.distill[-1]} {flags}'] = [
            *ours, '--distill', args.distill[-1], *shlex.split(flags)
        ]  # fmt: skip
    return made


def batch_done(line: str) -> tuple[int, int] | None:
    """Return the batch of the first epoch that a line reports, from 1, and the epoch's batches; None for others."""
    if found := _BATCH_OF_TIMM.search(line):
        return int(found[1]) + 1, int(found[2])
    if found := _BATCH_OF_OURS.match(line):
        return int(found[1]), int(found[2])
    return None


def measure(
    name: str, command: Sequence[str], warmup: int, steps: int, env: dict[str, str], *, gently: bool = False,
    device: str = 'cpu',
) -> Measured:  # fmt: skip
    """Run a program until ``steps`` batches after the first ``warmup`` are done, and stop it.

    Args:
        name: of the program, for errors.
        gently: let it end by itself when it is stopped.
        device: that it works on.

    Raises:
        UserError: where it ends early, with its last output, or an epoch has too few batches.
    """
    said, error, started = '', '', None
    held = _gpu_memory() if device == 'cuda' else 0  # by others
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env,
        encoding='utf-8', errors='replace', start_new_session=True,
    )  # fmt: skip
    try:
        for line in process.stdout:
            now = time.perf_counter()
            said = line.strip() or said
            error = said if re.search(r'\berror: |^[\w.]*(Error|Exception)\b', said) else error
            if (batch := batch_done(line)) is None:
                continue
            if batch[1] < warmup + steps:
                raise UserError(
                    f'--steps {steps}: an epoch has {batch[1]} batches, and {warmup} + {steps} are needed; lower '
                    '--steps or --batch-size, or take more images'
                )
            if batch[0] == warmup:
                started = now
            elif batch[0] == warmup + steps and started is not None:
                if gently:
                    process.terminate()
                    process.communicate()
                peak = _gpu_memory() - held if device == 'cuda' else _peak_memory(process.pid)
                return Measured(now - started, peak)
        raise UserError(f'{name}: ended with code {process.wait()} before batch {warmup + steps}: {error or said}')
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # loader workers in groups of their own leave within seconds, and hold the pipe until then: nothing of this
        # program may run beside the next
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=LEAVE_SECONDS)
        process.stdout.close()


def _gpu_memory() -> int:
    """Bytes of the GPU's memory that are in use."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def _peak_memory(pid: int) -> int | None:
    """Bytes, as Linux counts them."""
    try:
        status = Path(f'/proc/{pid}/status').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return None
    found = re.search(r'^VmHWM:\s+(\d+) kB', status, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


@contextlib.contextmanager
def _told_to_stop() -> Iterator[None]:
    """SIGTERM ends the program that is running, too."""

    def told(number: int, _: object) -> None:
        raise Stopped('stopped by SIGTERM', 128 + number)

    before = signal.signal(signal.SIGTERM, told)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write_data(root: Path, count: int, classes: int, img_size: int) -> None:
    """JPEGs in folders of classes, as large as 500×375 is for 224, at least one for each class and split."""
    rng = np.random.default_rng(0)
    size = (max(2, 500 * img_size // 224), max(2, 375 * img_size // 224))
    made: list[Path] = []
    for split, n in (('train', max(count, classes)), ('validation', classes)):
        for i in range(n):
            path = root / split / f'{i % classes:05}' / f'{i:06}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            if len(made) < DISTINCT:
                draw_photograph(rng, size).save(path, quality=90)
                made.append(path)
            else:
                shutil.copyfile(made[i % DISTINCT], path)


def class_names(data: Path) -> list[str]:
    """The folders of the training split.

    Raises:
        UserError: where there are none.
    """
    try:
        names = sorted(p.name for p in (data / 'train').iterdir() if p.is_dir())
    except OSError as e:
        raise UserError(f'--data-dir {data}: cannot read its folder train ({e.strerror})') from e
    if len(names) < 2:
        raise UserError(f'--data-dir {data}: its folder train needs a folder for each class')
    return names


def write_teacher(name: str, folder: Path, classes: list[str], img_size: int) -> Path:
    """A timm model folder with random weights, the same for both programs: what they are changes no speed."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(classes))
    config = timm.data.resolve_model_data_config(model)
    return export_model(
        model, folder, data_config=dict(config, input_size=(3, img_size, img_size)), label_names=classes
    )


def _check(args: argparse.Namespace) -> None:
    for name, least in (
        ('img_size', 1), ('batch_size', 2), ('steps', 1), ('warmup_steps', 1), ('repeats', 1), ('num_classes', 2),
        ('workers', 0),
    ):  # fmt: skip
        if getattr(args, name) < least:
            raise UsageError(f'--{name.replace("_", "-")} {getattr(args, name)}: must be at least {least}')
    if not Path(args.timm_train).expanduser().is_file():
        raise UserError(
            f"--timm-train {args.timm_train}: no such file; it is train.py of timm's repository, in the version of "
            f'the timm that is installed ({timm.__version__})'
        )
    for flag, name in (('--teacher', args.teacher), ('--student', args.student)):
        if not timm.is_model(name):
            hint = did_you_mean(name, timm.list_models())
            raise UsageError(f"{flag} {name}: not one of timm's networks{hint}")
    for name in args.distill:
        if not get_criterion(name).plain:
            known = ', '.join(n for n, row in CRITERIA.items() if row.plain)
            raise UsageError(f'--distill {name}: not a function of two rows of logits; one of {known}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: there is none that torch can use; take cpu')


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its result. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
