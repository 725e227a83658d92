"""A training step and its parts: how near the loop is to what the two networks cost alone."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..cache import TeacherCache
from ..config import Config, parse_args, resolve
from ..data import Source, Step, create_loaders, open_splits
from ..data.loader import Batch
from ..distributed import create_accelerator
from ..engine import create_optimizer, fit, optimize_for_inference, wants_channels_last
from ..engine.log import PARTS
from ..errors import UsageError
from ..loss import choose_criterion
from ..pairing import Pair, Teacher, WithFeatures, create_student, look_up
from ..task import DistillationTask, FeatureDistillation, create_features
from .generated import bench_generated, describe_generated
from .measure import Profiled, markdown
from .photographs import write_photographs

LOADER_SECONDS = 8.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's flags."""
    parser.add_argument('--teacher', default='resnet34', metavar='NAME', help='default: resnet34')
    parser.add_argument('--student', default='resnet18', metavar='NAME', help='default: resnet18')
    parser.add_argument('--img-size', type=int, default=224, metavar='N', help='default: 224')
    parser.add_argument('--batch-size', type=int, default=32, metavar='N', help='default: 32')
    classes = 'a table each (default: 1000; 100 below 128 pixels)'
    parser.add_argument('--num-classes', type=int, nargs='+', metavar='N', help=classes)
    parser.add_argument('--distill', default='rld', metavar='NAME', help='default: rld')
    parser.add_argument('--features', action='store_true', help='what asking both networks for their maps costs')
    parser.add_argument('--mixed-precision', choices=('no', 'fp16', 'bf16'), default='no')
    parser.add_argument('--torchcompile', action='store_true')
    parser.add_argument('--channels-last', action=argparse.BooleanOptionalAction, help='default: as in a run')
    parser.add_argument('--rounds', type=int, default=5, help='in which all take turns (default: 5)')
    parser.add_argument('--steps', type=int, default=5, help='of each in a round (default: 5)')
    parser.add_argument('--data-dir', metavar='DIR', help='for the loader (default: photographs made for it)')
    parser.add_argument('--workers', default='auto', metavar='N', help='of the loader (default: auto)')
    parser.add_argument('--cpu-threads', type=int, metavar='N', help='default: as in a run')
    parser.add_argument('--no-loader', action='store_true', help='leave the loader out')


def run(args: argparse.Namespace) -> str:
    """Return tables as Markdown, with a line of ratios and advice under each."""
    least = {'img_size': 1, 'batch_size': 2, 'rounds': 1, 'steps': 1, 'num_classes': 2 if args.num_classes else None}
    least['cpu_threads'] = 1 if args.cpu_threads is not None else None
    for name, lowest in least.items():
        values = getattr(args, name)
        if lowest and min(values if isinstance(values, list) else [values]) < lowest:
            raise UsageError(f'--{name.replace("_", "-")} {values}: must be at least {lowest}')
    row, criterion = choose_criterion(args.distill, False, {})
    if criterion is None:
        raise UsageError(f'--distill {args.distill}: distils nothing')
    workers = parse_args(['--workers', args.workers]).workers
    for flag, name in (('--teacher', args.teacher), ('--student', args.student)):
        look_up(name, flag)
    texts: list[str] = []
    for classes in args.num_classes or [1000 if args.img_size >= 128 else 100]:
        if row.generated:
            texts.append(describe_generated(bench_generated(
                args.teacher, args.student, num_classes=classes, **{name: getattr(args, name) for name in (
                    'img_size', 'batch_size', 'mixed_precision', 'torchcompile', 'channels_last', 'cpu_threads',
                    'rounds', 'steps',
                )},
            )))  # fmt: skip
            continue
        found = bench_step(
            args.teacher, args.student, num_classes=classes, rounds=args.rounds, steps=args.steps,
            loader=not args.no_loader and not texts, data_dir=args.data_dir,
            workers=workers, **{name: getattr(args, name) for name in (
                'img_size', 'batch_size', 'distill', 'mixed_precision', 'torchcompile', 'channels_last', 'cpu_threads',
                'features',
            )},
        )  # fmt: skip
        texts.append(describe(found))
    return '\n\n'.join(texts)


@dataclass
class Found:
    """What :func:`bench_step` measured.

    Attributes:
        title: pair, sizes, precision, device.
        seconds: of a step, by what it is (medians).
        online, cached: the loop beside its bound, measured in turns: median, lowest and highest of the rounds.
        split: shares of the online loop's time, by part.
        batch_size: images.
        folded: batch norms of the teacher.
        idle: share of the online loop's time in which the device did nothing, where no step waits for it.
        asking: S + T with the features asked for and not used, over S + T: median, lowest and highest of the rounds.
    """

    title: str
    seconds: dict[str, float]
    online: tuple[float, float, float]
    cached: tuple[float, float, float]
    split: dict[str, float]
    batch_size: int
    folded: int
    idle: float = math.nan
    asking: tuple[float, float, float] | None = None


def bench_step(
    teacher: str,
    student: str,
    *,
    img_size: int,
    batch_size: int,
    num_classes: int,
    distill: str = 'rld',
    mixed_precision: str = 'no',
    torchcompile: bool = False,
    channels_last: bool | None = None,
    rounds: int = 5,
    steps: int = 5,
    workers: int | Literal['auto'] | None = 'auto',
    data_dir: str | None = None,
    loader: bool = True,
    idle: bool | None = None,
    cpu_threads: int | None = None,
    features: bool = False,
) -> Found:
    """Time the parts of a training step, and the loop of a real run (:func:`timm_rld.engine.fit`) on batches in memory,
    with the teacher and with a cache of its logits.

    Networks have random weights, which cost what trained ones do. Before each epoch of the loop come the student alone
    on the same batches and logits (S) and the teacher alone (T), so that variation in machine speed affects all alike.

    Args:
        rounds, steps: the loop's epochs, and batches in each; before them, one epoch that does not count.
        loader: measure the loader too: on ``data_dir``, or on photographs made for it.
        idle: measure the device's idle time too, in one more loop; None: on a GPU alone.
        cpu_threads: on a CPU; None: as in a run.
        features: measure what asking for the maps that `at` takes costs.

    Returns:
        What was measured.
    """
    config = resolve(
        Config(
            teacher=teacher, student=student, distill=distill, data_dir=data_dir or '.', img_size=img_size,
            num_classes=num_classes, batch_size=batch_size, epochs=rounds + 1, teacher_epochs=0, lr=1e-3,
            sched='constant', warmup_epochs=0, task_loss_weight=1.0, distill_loss_weight=1.0, distill_warmup_epochs=0,
            mixed_precision=mixed_precision, torchcompile=torchcompile, channels_last=channels_last, workers=workers,
            log_interval=10**9, teacher_cache=None, cpu_threads=cpu_threads,
        )
    )  # fmt: skip
    accelerator = create_accelerator(**config.arguments_of('create_accelerator'))
    config.mixed_precision = accelerator.mixed_precision
    pair = _random_pair(teacher, student, num_classes, img_size)
    asked = create_features(pair, 'at') if features else None
    optimize_for_inference(pair, accelerator, config)
    criterion = choose_criterion(distill, False, {})[1]
    on_gpu = accelerator.device.type == 'cuda'
    batches = _batches(steps, batch_size, pair.data_config['input_size'], num_classes, pinned=on_gpu)
    alone = _Alone(pair, copy.deepcopy(criterion), batches, accelerator, config, asked)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        loops, histories = _run_loops(pair, criterion, batches, alone, accelerator, config, Path(folder))
        watched = on_gpu if idle is None else idle
        idle_time = _run_watched(pair, criterion, batches, accelerator, config, Path(folder)) if watched else math.nan
    seconds = {
        f'student alone, with {distill} on logits in memory (S)': statistics.median(alone.times['student']),
        f'{distill} alone': statistics.median(alone.times['criterion']),
        'teacher alone (T)': statistics.median(alone.times['teacher']),
        'online step': loops['online'].step_seconds(),
        'cached step': loops['cached'].step_seconds(),
    }
    if loader:
        seconds['loader alone, a batch'] = _loader(config, pair, data_dir)
    # its data come from memory
    spent = {p: sum(row[f'seconds_{p}'] for row in histories['online']) for p in PARTS if p != 'data'}
    return Found(
        title=_title(config, accelerator.device),
        seconds=seconds,
        online=_ratio(loops['online'], {k: alone.times[k][: rounds * steps] for k in ('student', 'teacher')}, steps),
        cached=_ratio(loops['cached'], {'student': alone.times['student'][rounds * steps :]}, steps),
        split={k: v / sum(spent.values()) for k, v in spent.items()},
        batch_size=batch_size,
        folded=alone.teacher.folded,
        idle=idle_time,
        asking=_asking(alone.times, steps) if features else None,
    )


def _random_pair(teacher: str, student: str, num_classes: int, img_size: int) -> Pair:
    """Return a pair with random weights."""
    torch.manual_seed(0)
    pair, network = (create_student(name, num_classes, img_size=img_size) for name in (student, teacher))
    pair.teacher = Teacher(network.student, network.normalize, name=teacher)
    return pair


def _title(config: Config, device: torch.device) -> str:
    precision = 'float32' if config.mixed_precision == 'no' else config.mixed_precision
    return (
        f'{config.teacher} → {config.student}, {config.img_size}×{config.img_size}, batch {config.batch_size}, '
        f'{config.num_classes} classes, {precision}{", compiled" if config.torchcompile else ""}, {device.type}'
    )


def _run_loops(
    pair: Pair, criterion: Any, batches: list[Batch], alone: _Alone, accelerator: Accelerator, config: Config,
    folder: Path,
) -> tuple[dict[str, _InMemory], dict[str, list[dict[str, float]]]]:  # fmt: skip
    """Run the loop `online` and `cached`. Returns the loaders, with their times, and the rows of the logs."""
    classes, size = pair.num_classes, len(batches[0][1])
    source = Source(range(len(batches) * size), 'train', classes, None, False, 'RGB')
    cached = dataclasses.replace(config, teacher_cache=f'{folder}/cache', teacher_cache_views=1)
    cache = TeacherCache(
        accelerator=accelerator, train=source, val=source, data_config=pair.data_config, depends_on={},
        arguments=cached.arguments_of_each('open_splits', 'create_loaders', 'create_teacher'), train_teacher=True,
        **cached.arguments_of('TeacherCache'),
    )  # fmt: skip
    cache.open(teacher=pair.teacher)
    for i, (_, target, indices) in enumerate(batches):
        cache.logits(1, indices, target, alone.logits[i].cpu)
    loops: dict[str, Any] = {}
    histories: dict[str, list[dict[str, float]]] = {}
    for name, used, c in (('online', None, config), ('cached', cache, cached)):
        task = DistillationTask(
            copy.deepcopy(pair.student), None if used else pair.teacher, copy.deepcopy(criterion), cache=used,
            normalize=pair.normalize, task_loss_weight=1.0, distill_loss_weight=1.0, warmup_epochs=0,
        )  # fmt: skip
        loops[name] = _InMemory(batches, size, alone.all if name == 'online' else alone.student, accelerator)
        validation = _validation(batches, classes)
        histories[name] = fit(task, loops[name], validation, accelerator, c, log_file=folder / 'log.csv')[1:]
    return loops, histories


def _run_watched(
    pair: Pair, criterion: Any, batches: list[Batch], accelerator: Accelerator, config: Config, folder: Path
) -> float:
    """Run the loop online, as a training does: no step is waited for. Returns the device's idle share."""
    task = DistillationTask(
        copy.deepcopy(pair.student), pair.teacher, copy.deepcopy(criterion), normalize=pair.normalize,
        task_loss_weight=1.0, distill_loss_weight=1.0, warmup_epochs=0,
    )  # fmt: skip
    loop: Any = _Watched(batches, len(batches[0][1]), accelerator.device)
    c = dataclasses.replace(config, epochs=2)
    fit(task, loop, _validation(batches, pair.num_classes), accelerator, c, log_file=folder / 'log.csv')
    return loop.profiled.idle


def _validation(batches: list[Batch], classes: int) -> Any:
    loop: Any = _InMemory(batches[:1], len(batches[0][1]))
    loop.source = Source(range(len(batches) * loop.batch_size), 'train', classes, None, False, 'RGB')
    return loop


def describe(found: Found) -> str:
    """Return the table, the ratios, where the time goes, and advice."""
    rows: list[dict[str, float | str]] = [
        {'part': name, 'ms': 1000 * seconds, 'images/s': found.batch_size / seconds}
        for name, seconds in found.seconds.items()
    ]
    online, cached = found.seconds['online step'], found.seconds['cached step']
    shares = ', '.join(f'{name} {100 * share:.1f}%' for name, share in found.split.items())
    lines = [
        f'{found.title}; {found.folded} batch norms of the teacher are folded',
        '',
        markdown(rows),
        '',
        'medians of the rounds (lowest to highest): online / (S + T) {:.3f} ({:.3f} to {:.3f}), '.format(*found.online)
        + 'cached / S {:.3f} ({:.3f} to {:.3f})'.format(*found.cached),
        f'where the online step goes: {shares}',
    ]
    if not math.isnan(found.idle):
        lines.append(
            f'idle share of the device in the online loop, where no step waits for it: {100 * found.idle:.1f}%'
        )
    if found.asking:
        change = (f'{100 * (ratio - 1):+.1f}%' for ratio in found.asking)
        lines.append('asking both networks for their maps, unused: {} of S + T ({} to {})'.format(*change))
    loader = found.seconds.get('loader alone, a batch')
    if loader and loader > cached:
        lines.append(f'the loader is the limit of a {"" if loader > online else "cached "}run: more --workers, '
                     'or --jpeg-draft')  # fmt: skip
    best = max(cached, loader or 0)
    if online / best > 1.1:
        lines.append(f'a --teacher-cache would give {max(online, loader or 0) / best:.1f}×')
    return '\n'.join(lines)


def _batches(count: int, batch_size: int, size: tuple[int, ...], classes: int, *, pinned: bool = False) -> list[Batch]:
    """Batches as a loader gives them.

    Args:
        pinned: for a GPU, as the loader's are.
    """
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randint(256, (batch_size, *size), generator=generator, dtype=torch.uint8),
            torch.randint(classes, (batch_size,), generator=generator),
            torch.arange(i * batch_size, (i + 1) * batch_size),
        )
        for i in range(count)
    ]
    if not pinned:
        return batches
    return [(pixels.pin_memory(), target.pin_memory(), indices.pin_memory()) for pixels, target, indices in batches]


class _Alone:
    """The parts by themselves: the least that has to be done.

    Attributes:
        logits: the teacher's, of each batch.
        times: seconds of each step so far, by part.
    """

    def __init__(
        self, pair: Pair, criterion: Any, batches: list[Batch], accelerator: Accelerator, config: Config,
        features: FeatureDistillation | None = None,
    ) -> None:  # fmt: skip
        assert pair.teacher is not None
        teacher: Any = copy.deepcopy(pair.teacher)
        self.teacher, self.accelerator = teacher, accelerator
        self.normalize = copy.deepcopy(pair.normalize)
        self.device = accelerator.device
        self.network, self.criterion = copy.deepcopy(pair.student).to(self.device).train(), criterion.to(self.device)
        self.normalize.to(self.device)
        self.format = torch.channels_last if wants_channels_last(config, accelerator) else torch.contiguous_format
        self.network.to(memory_format=self.format)
        self.optimizer = create_optimizer(self.network, config)
        self.asked: nn.Module | None = WithFeatures(self.network, features.student) if features else None
        if config.torchcompile:
            self.network = cast(nn.Module, torch.compile(self.network))
            self.asked = cast(nn.Module, torch.compile(self.asked)) if self.asked else None
            self.teacher.compile()
            self.criterion.compile()
        self.batches = [(p.to(self.device), t.to(self.device)) for p, t, _ in batches]
        self.logits = [self._ask(p) for p, _ in self.batches]
        parts = ('student', 'teacher', 'criterion', 'student, asked', 'teacher, asked')
        self.times: dict[str, list[float]] = {part: [] for part in parts}

    def _ask(self, pixels: Tensor, features: bool = False) -> Tensor:
        with self.accelerator.autocast():
            found: Tensor = self.teacher.with_features(pixels)[0] if features else self.teacher(pixels)
            return found

    def _timed(self, part: str, steps: Sequence[Callable[[], Any]], count: bool) -> None:
        for step in steps:
            started = time.perf_counter()
            step()
            if self.device.type == 'cuda':
                torch.cuda.synchronize()
            if count:
                self.times[part].append(time.perf_counter() - started)

    def student(self, count: bool, part: str = 'student') -> None:
        """A round of the student alone, or asked for its features."""
        asked = self.asked if part == 'student, asked' else None

        def step(i: int) -> None:
            pixels, target = self.batches[i]
            with self.accelerator.autocast():
                x = self.normalize(pixels.to(memory_format=self.format))
                logits = (asked(x)[0] if asked else self.network(x)).float()
                loss = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
                loss = loss + self.criterion(logits, self.logits[i], target)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()

        self._timed(part, [functools.partial(step, i) for i in range(len(self.batches))], count)

    def all(self, count: bool) -> None:
        """A round of each."""

        def criterion(i: int) -> None:
            logits = self.logits[i].clone().requires_grad_()
            self.criterion(logits, self.logits[i - 1], self.batches[i][1]).backward()

        self.student(count)
        self._timed('teacher', [functools.partial(self._ask, p) for p, _ in self.batches], count)
        if self.asked:
            self.student(count, 'student, asked')
            self._timed('teacher, asked', [functools.partial(self._ask, p, True) for p, _ in self.batches], count)
        self._timed('criterion', [functools.partial(criterion, i) for i in range(len(self.batches))], count)


class _InMemory:
    """Batches in memory in the place of a :class:`timm_rld.data.Loader`. Each epoch begins with a round of something
    else; the first one does not count.

    Attributes:
        epochs: for each that counts, seconds of its steps, and of what was measured before them.
    """

    can_start_within = True
    dataset = declared = None

    def __init__(
        self,
        batches: list[Batch],
        batch_size: int,
        before: Callable[[bool], None] = lambda _: None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.batches, self.batch_size, self.before = batches, batch_size, before
        self.updates_per_epoch, self.epoch = len(batches), 0
        self.times: list[float] = []
        self.wait = torch.cuda.synchronize if accelerator and accelerator.device.type == 'cuda' else lambda: None

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, start: int = 0, augmentation_epoch: int | None = None) -> None:
        self.epoch = epoch

    def step(self, batch: int) -> Step:
        return Step(self.batch_size, self.batch_size, True)

    def left_out(self) -> tuple[int, ...]:
        return ()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        self.before(self.epoch > 1)
        for batch in self.batches:
            self.wait()
            started = time.perf_counter()
            yield batch
            self.wait()
            if self.epoch > 1:
                self.times.append(time.perf_counter() - started)

    def step_seconds(self) -> float:
        """Return the median of the steps that count."""
        return statistics.median(self.times)


class _Watched(_InMemory):
    """Batches in memory for two epochs. Nothing waits for the device; what it does in the second one is recorded.

    Attributes:
        profiled: the second epoch.
    """

    AT_LEAST = 12  # batches: of a few the start would be too large a part

    def __init__(self, batches: list[Batch], batch_size: int, device: torch.device) -> None:
        super().__init__(batches * -(-self.AT_LEAST // len(batches)), batch_size)
        self.profiled = Profiled(device.type)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        with self.profiled if self.epoch > 1 else contextlib.nullcontext():
            yield from self.batches


def _medians(times: list[float], steps: int) -> list[float]:
    """The median of each round of so many steps."""
    return [statistics.median(times[r : r + steps]) for r in range(0, len(times), steps)]


def _ratio(loop: _InMemory, alone: dict[str, list[float]], steps: int) -> tuple[float, float, float]:
    """Return the time of a loop's step divided by that of its parts: median, lowest and highest of the rounds."""
    bounds = zip(*(_medians(times, steps) for times in alone.values()))
    ratios = [step / sum(parts) for step, parts in zip(_medians(loop.times, steps), bounds)]
    return statistics.median(ratios), min(ratios), max(ratios)


def _asking(times: dict[str, list[float]], steps: int) -> tuple[float, float, float]:
    """Return the time of both networks asked for their features, divided by that of both alone: median, lowest and
    highest of the rounds."""
    alone, asked = (
        [sum(pair) for pair in zip(*(_medians(times[f'{who}{how}'], steps) for who in ('student', 'teacher')))]
        for how in ('', ', asked')
    )
    ratios = [a / b for a, b in zip(asked, alone)]  # the student alone has more rounds
    return statistics.median(ratios), min(ratios), max(ratios)


def _loader(config: Config, pair: Pair, data_dir: str | None) -> float:
    """Return the seconds for a batch of the training loader alone, with the augmentation of a run."""
    assert config.img_size is not None and config.batch_size is not None  # bench_step() gives them
    with tempfile.TemporaryDirectory() as made:
        if data_dir is None:
            side = max(32, min(500, 2 * config.img_size))
            for split in ('train', 'validation'):
                write_photographs(Path(made) / split, 2 * config.batch_size, (side, side * 3 // 4))
        splits = open_splits(**config.arguments_of('open_splits') | {'data_dir': data_dir or made, 'num_classes': None})
        loader = create_loaders(*splits, pair.data_config, **config.arguments_of('create_loaders'))[0]
        count, epoch, started = 0, 0, None
        while started is None or time.perf_counter() - started < LOADER_SECONDS:
            epoch += 1
            loader.set_epoch(epoch)
            for _ in loader:
                count += started is not None
            started = started or time.perf_counter()  # the first epoch starts the workers
    return (time.perf_counter() - started) / max(count, 1)
