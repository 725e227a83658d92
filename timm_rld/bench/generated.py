"""A step on generated images and its parts: how near both phases of MEKD are to what their networks cost alone."""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import Config, resolve
from ..data import NoiseLoader, Source
from ..distributed import create_accelerator
from ..engine import create_optimizer, fit, optimize_for_inference, wants_channels_last
from ..engine.generator_training import Asked, GeneratorState, generator_step
from ..engine.mekd_settings import GeneratorSettings
from ..loss import MEKD, adversarial_loss, discriminator_loss, information_loss, to_pixels
from ..mekd_task import MEKDTask
from ..models import Generator
from ..pairing import Pair, Teacher, create_student, to_memory_format
from .measure import markdown


@dataclass
class FoundGenerated:
    """What :func:`bench_generated` measured.

    Attributes:
        title: pair, sizes, device.
        seconds: of a step, by what it is (medians).
        phase_1, phase_2: a step divided by the sum of its parts: median, lowest and highest of the rounds.
        batch_size: images of a step.
    """

    title: str
    seconds: dict[str, float]
    phase_1: tuple[float, float, float]
    phase_2: tuple[float, float, float]
    batch_size: int


def bench_generated(
    teacher: str,
    student: str,
    *,
    img_size: int,
    batch_size: int,
    num_classes: int,
    generator_size: int = 32,
    mixed_precision: str = 'no',
    torchcompile: bool = False,
    channels_last: bool | None = None,
    cpu_threads: int | None = None,
    rounds: int = 5,
    steps: int = 5,
) -> FoundGenerated:
    """Time the steps of both phases of MEKD and their parts, in turns, so that variation in machine speed affects all
    alike. Networks have random weights, which cost what trained ones do.

    Args:
        generator_size: pixels of the generated images.
        rounds, steps: each measures each part and each step so many times; a first round does not count.
        Others: as of :func:`timm_rld.bench.step.bench_step`.
    """
    config = resolve(
        Config(
            teacher=teacher, student=student, distill='mekd', data_dir='.', img_size=img_size, num_classes=num_classes,
            batch_size=batch_size, epochs=rounds + 1, teacher_epochs=0, lr=1e-3, sched='constant', warmup_epochs=0,
            task_loss_weight=0.0, distill_loss_weight=1.0, distill_warmup_epochs=0, mixed_precision=mixed_precision,
            torchcompile=torchcompile, channels_last=channels_last, workers=0, log_interval=10**9, teacher_cache=None,
            cpu_threads=cpu_threads,
        )
    )  # fmt: skip
    accelerator = create_accelerator(**config.arguments_of('create_accelerator'))
    config.mixed_precision = accelerator.mixed_precision
    torch.manual_seed(0)
    pair = create_student(student, num_classes, img_size=img_size)
    network = create_student(teacher, num_classes, img_size=img_size)
    pair.teacher = Teacher(network.student, network.normalize, name=teacher)
    optimize_for_inference(pair, accelerator, config)
    generator = Generator(num_classes, generator_size).to(accelerator.device)
    if wants_channels_last(config, accelerator):
        to_memory_format(generator, torch.channels_last)
    criterion = MEKD(generator)
    criterion.use(generator, image_size=pair.image_size)
    parts = {**_of_phase_2(pair, criterion, accelerator, config)}
    loop = _Loop(num_classes, batch_size, steps, parts, accelerator)
    task = MEKDTask(
        copy.deepcopy(pair.student), pair.teacher, criterion, normalize=pair.normalize, task_loss_weight=0.0,
        distill_loss_weight=1.0, warmup_epochs=0,
    )  # fmt: skip
    validation: Any = _Loop(num_classes, batch_size, 1)
    validation.images, validation.source = pair.image_size, Source(range(batch_size), 'x', num_classes, None, False, '')
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        fit(task, loop, validation, accelerator, config, log_file=Path(folder) / 'log.csv')  # type: ignore[arg-type]
    settings = GeneratorSettings(batch_size=batch_size, img_size=generator_size)
    step, of_phase_1 = _of_phase_1(pair, settings, accelerator)
    for count in range(rounds + 1):
        for _ in range(steps):
            for part in (*of_phase_1.values(), step):
                part.run(accelerator, count > 0)
    seconds = {
        'phase 2: images of noise (G)': parts['images'].median(), 'phase 2: teacher (T)': parts['teacher'].median(),
        'phase 2: student, with both images of the logits (S)': parts['student'].median(),
        'phase 2: step': statistics.median(loop.times),
        **{f'phase 1: {name}': part.median() for name, part in of_phase_1.items()},
        'phase 1: step': step.median(),
    }  # fmt: skip
    precision = accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'float32'
    return FoundGenerated(
        f'{teacher} → {student}, {img_size}×{img_size}, batch {batch_size}, {num_classes} classes, images generated at '
        f'{generator_size}×{generator_size}, {precision}, {accelerator.device.type}',
        seconds, _ratio(step.times, of_phase_1, steps), _ratio(loop.times, parts, steps),
        batch_size,
    )  # fmt: skip


def describe_generated(found: FoundGenerated) -> str:
    """Return the table and the ratios."""
    rows: list[dict[str, float | str]] = [
        {'part': name, 'ms': 1000 * s, 'images/s': found.batch_size / s} for name, s in found.seconds.items()
    ]
    ratios = 'medians of the rounds (lowest to highest): phase 1 / its parts {:.3f} ({:.3f} to {:.3f}), '.format(
        *found.phase_1
    ) + 'phase 2 / (G + T + S) {:.3f} ({:.3f} to {:.3f})'.format(*found.phase_2)
    return f'{found.title}\n\n{markdown(rows)}\n\n{ratios}'


class _Part:
    """Something that is timed.

    Attributes:
        times: seconds of each run that counts.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work
        self.times: list[float] = []

    def run(self, accelerator: Accelerator, counts: bool) -> None:
        """Do it once."""
        wait = torch.cuda.synchronize if accelerator.device.type == 'cuda' else lambda: None
        wait()
        started = time.perf_counter()
        self.work()
        wait()
        if counts:
            self.times.append(time.perf_counter() - started)

    def median(self) -> float:
        """Return the median of what counts."""
        return statistics.median(self.times)


class _Loop(NoiseLoader):
    """A loader that has the parts measured before each epoch, and measures the steps of those after the first."""

    images: tuple[int, int] | None = None

    def __init__(
        self, num_classes: int, batch_size: int, steps: int, parts: dict[str, _Part] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, batch_size, steps)
        self.parts, self.accelerator = parts or {}, accelerator
        self.times: list[float] = []

    def __iter__(self) -> Any:
        if self.images is not None:  # validation
            size = (self.batch_size, 3, *self.images)
            yield (
                torch.zeros(size, dtype=torch.uint8),
                torch.zeros(self.batch_size, dtype=torch.int64),
                torch.arange(self.batch_size),
            )
            return
        assert self.accelerator is not None
        wait = torch.cuda.synchronize if self.accelerator.device.type == 'cuda' else lambda: None
        for _ in range(self.updates_per_epoch):
            for part in self.parts.values():
                part.run(self.accelerator, self.epoch > 1)
        for batch in super().__iter__():
            wait()
            started = time.perf_counter()
            yield batch
            wait()
            if self.epoch > 1:
                self.times.append(time.perf_counter() - started)


def _of_phase_2(pair: Pair, criterion: MEKD, accelerator: Accelerator, config: Config) -> dict[str, _Part]:
    """The parts of a student's step: the least that has to be done."""
    assert pair.teacher is not None and config.batch_size is not None
    device, teacher, criterion = accelerator.device, copy.deepcopy(pair.teacher), copy.deepcopy(criterion)
    network, normalize = copy.deepcopy(pair.student).to(device).train(), copy.deepcopy(pair.normalize).to(device)
    if wants_channels_last(config, accelerator):
        to_memory_format(network, torch.channels_last)
    optimizer, z = create_optimizer(network, config), torch.randn(config.batch_size, pair.num_classes, device=device)
    pixels = criterion.pixels(z)
    rows = teacher(pixels)

    def images() -> Tensor:
        with accelerator.autocast():
            return criterion.pixels(z)

    def ask() -> Tensor:
        with accelerator.autocast():
            return teacher(pixels)

    def student() -> None:
        with accelerator.autocast():
            loss = criterion(network(normalize(pixels)).float(), rows)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return {'images': _Part(images), 'teacher': _Part(ask), 'student': _Part(student)}


def _of_phase_1(
    pair: Pair, settings: GeneratorSettings, accelerator: Accelerator
) -> tuple[_Part, dict[str, _Part]]:  # fmt: skip
    """A step of phase 1, and its parts."""
    assert pair.teacher is not None
    teacher, m = pair.teacher, settings.batch_size
    states = [GeneratorState(pair.num_classes, 3, settings, 0, accelerator) for _ in range(2)]
    asked = Asked(teacher, 'logits', settings, accelerator, pair.image_size)
    stored = torch.randint(256, (4 * m, 3, settings.img_size, settings.img_size), dtype=torch.uint8)
    real = stored[:m].to(accelerator.device).float() / 127.5 - 1
    z = torch.randn(m, pair.num_classes, device=accelerator.device)
    generator, discriminator = states[1].generator, states[1].discriminator
    fake = generator(z).detach()
    rows = teacher(to_pixels(fake, pair.image_size))

    def step() -> None:
        pixels = stored[torch.randperm(len(stored))[:m].tolist()]
        generator_step(states[0], pixels.to(accelerator.device).float() / 127.5 - 1, asked, settings, 0)

    def of_discriminator() -> None:
        discriminator.requires_grad_(True)
        with accelerator.autocast():
            real_scores, fake_scores = discriminator(real).float(), discriminator(fake).float()
        states[1].of_discriminator.zero_grad()
        accelerator.backward(discriminator_loss(real_scores, fake_scores))
        states[1].of_discriminator.step()

    def of_generator() -> None:
        discriminator.requires_grad_(False)
        with accelerator.autocast():
            with torch.no_grad():
                generator(z)
            scores = discriminator(generator(z)).float()
        states[1].of_generator.zero_grad()
        accelerator.backward(adversarial_loss(scores) + settings.info_weight * information_loss(scores, rows))
        states[1].of_generator.step()

    def ask() -> None:
        with torch.no_grad(), accelerator.autocast():
            teacher(to_pixels(fake, pair.image_size))

    names = {'discriminator': of_discriminator, 'generator, two passes': of_generator, 'teacher': ask}
    return _Part(step), {name: _Part(work) for name, work in names.items()}


def _ratio(times: list[float], parts: dict[str, _Part], steps: int) -> tuple[float, float, float]:
    """Return the time of a step divided by that of its parts: median, lowest and highest of the rounds."""

    def medians(values: list[float]) -> list[float]:
        return [statistics.median(values[i : i + steps]) for i in range(0, len(values), steps)]

    sums = [sum(found) for found in zip(*(medians(part.times) for part in parts.values()))]
    ratios = [step / whole for step, whole in zip(medians(times), sums)]
    return statistics.median(ratios), min(ratios), max(ratios)
