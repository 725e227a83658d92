"""The folder that a run leaves, and what it prints on the way."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from .config import Config, flag_of, load_yaml, load_yaml_text, to_yaml, warmup_epochs, write_whole
from .errors import Stopped, UserError, writing

T = TypeVar('T')


def _on_main(accelerator: Accelerator, function: Callable[[], T]) -> T | None:
    """Call a function on the main process alone; what goes wrong there is raised on all."""
    result = problem = None
    if accelerator.is_main_process:
        try:
            result = function()
        except UserError as e:
            problem = e
    raise_on_all(problem)
    return result


def main_first(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call a function on the main process, then on the others."""
    result = _on_main(accelerator, function)
    return result if accelerator.is_main_process else function()


def main_only(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call a function on the main process alone; its result reaches all."""
    return broadcast_object_list([_on_main(accelerator, function)])[0]


def main_saves(accelerator: Accelerator, run: Path, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """Call a function that writes into a run folder on the main process alone.

    Raises:
        WriteError: on every process, where it cannot be written; it says how the run goes on.
    """

    def save() -> None:
        with writing(run, then=f'train_distill.py --resume {run} goes on'):
            function(*args, **kwargs)

    _on_main(accelerator, save)


def raise_on_all(problem: UserError | None) -> None:
    """Raise on every process what is wrong on the main one; the others' argument does not matter."""
    said = [(type(problem), str(problem)) if problem is not None else None]
    broadcast_object_list(said)
    if said[0]:
        kind, message = said[0]
        raise kind(message)


# settings that may change when a run goes on: they do not change its result
_HARMLESS = {
    'workers', 'log_interval', 'report_to', 'debug', 'output', 'experiment', 'resume', 'checkpoint_interval',
    'checkpoint_hist', 'skip_nonfinite', 'on_bad_image', 'min_teacher_acc', 'dataset_download', 'push_to_hub',
    'hub_model_id', 'hub_private_repo', 'hub_license', 'hub_weights', 'hub_strategy', 'teacher_cache',
}  # fmt: skip


def open_run(config: Config, accelerator: Accelerator, train: Any, val: Any) -> Path:
    """Make the run folder: `OUTPUT/EXPERIMENT`, by default `output/<time>-<student>-<distill>`, the same on all ranks,
    and write args.yaml and facts.json into it; or with `--resume` go on in the one that is there.

    Args:
        train, val: the splits.

    Raises:
        Stopped: with exit code 0, where the run that is to go on has finished.
        UserError: where it holds files already, cannot be written, is in use by another run, or where the run that is
            to go on has other settings or facts.
    """
    from timm.models import safe_model_name

    facts = _gather_facts(accelerator, train, val, config.workers)
    name = config.experiment or '-'.join(
        [time.strftime('%Y%m%d-%H%M%S'), safe_model_name(config.student), config.distill]
    )
    (name,) = broadcast_object_list([name])  # another rank may be a second later
    folder = Path(config.output or 'output').expanduser() / name
    problem, finished = None, False
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            there = [p for p in folder.iterdir() if p.name != '.lock']
            is_run = (folder / 'args.yaml').exists()
            if is_run or not there:  # else it is not ours to lock
                _lock(folder)
            if there and not (config.resume and is_run):
                way_out = '--resume auto goes on with it, or ' if is_run else ''
                raise UserError(f'--output/--experiment: {folder} is not empty; {way_out}name another --experiment')
            if any((folder / part).exists() for part in ('checkpoints', 'teacher')):
                _check_same(folder, config, facts)
                finished = _finished(folder, config)
            elif config.resume:
                accelerator.print(f'--resume {config.resume}: nothing to go on from in {folder}, a fresh run')
            for file, text in (
                ('args.yaml', to_yaml(dataclasses.replace(config, resume=None))),
                ('facts.json', json.dumps({**facts, 'settings': _digest_of(dataclasses.asdict(config))}, indent=1)),
            ):
                if not (folder / file).exists() or (folder / file).read_text(encoding='utf-8') != text:
                    write_whole(folder / file, text)
        except OSError as e:
            problem = UserError(f'--output: {folder} cannot be written ({e.strerror or e}); give another --output')
        except UserError as e:
            problem = e
    raise_on_all(problem)
    if broadcast_object_list([finished])[0]:
        raise Stopped(f'{folder} has finished, there is nothing to go on with', 0)
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.project_configuration.logging_dir = str(folder)
    return folder


def _finished(folder: Path, config: Config) -> bool:
    try:
        return json.loads((folder / 'results.json').read_text(encoding='utf-8'))['epochs'] == config.epochs
    except (OSError, ValueError, KeyError):
        return False


def _digest_of(settings: dict[str, Any]) -> str:
    """Of the settings that must not change while a run lasts."""
    kept = {k: v for k, v in settings.items() if k not in _HARMLESS and k != 'epochs'}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _lock(folder: Path) -> None:
    """Hold the folder for as long as this process lives: the file stays open, and the kernel closes it, however the
    process ends."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        return
    lock = os.open(folder / '.lock', os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        holder = os.read(lock, 1000).decode(errors='replace').strip() or 'another process'
        os.close(lock)
        raise UserError(f'{folder}: in use by {holder}') from e
    os.ftruncate(lock, 0)
    os.pwrite(lock, f'process {os.getpid()} on {platform.node()}\n'.encode(), 0)


def _check_same(folder: Path, config: Config, facts: dict[str, Any]) -> None:
    """Refuse to go on where the result would not be that of the run that began."""
    there = {**load_yaml_text(to_yaml(Config())), **load_yaml(str(folder / 'args.yaml'), '--resume')}
    ours = load_yaml_text(to_yaml(config))
    changed = []
    for name, value in ours.items():
        if name in _HARMLESS or there.get(name) == value:
            continue
        if name == 'teacher_lr' and value == ours['lr'] != there['lr'] == there['teacher_lr']:
            continue  # it follows --lr
        if name == 'epochs' and value > there['epochs'] and _may_be_longer(config, there):
            continue
        why = ' (more epochs would change this schedule)' if name == 'epochs' else ''
        changed.append(f'{flag_of(name)} {there.get(name)}, not {value}{why}')
    if changed:
        raise UserError(
            f'--resume: {folder} was begun with {"; ".join(changed[:4])}. '
            'Leave it as it was, or start anew under another --experiment'
        )
    try:
        begun = json.loads((folder / 'facts.json').read_text(encoding='utf-8'))
        settings_then = begun.pop('settings')
    except (OSError, ValueError, KeyError) as e:
        raise UserError(
            f'--resume: {folder}/facts.json is missing or damaged, so it cannot be told whether data and machine are '
            'those of the run; start anew under another --experiment'
        ) from e
    if settings_then != _digest_of(there):
        raise UserError(f'--resume: {folder}/args.yaml has been edited since the run began; undo that, or start anew')
    for name, value in facts.items():
        if begun.get(name) != value:
            raise UserError(f'--resume: {folder} was begun with {name} {begun.get(name)}, now {value}: another result')


def _may_be_longer(config: Config, there: dict[str, Any]) -> bool:
    """Whether the rate of an epoch does not depend on how many there are."""
    before = dataclasses.replace(config, epochs=there['epochs'])
    steady = config.sched in ('multistep', 'step', 'constant', 'none') and not config.cooldown_epochs
    return steady and warmup_epochs(before) == warmup_epochs(config)


def _gather_facts(accelerator: Accelerator, train: Any, val: Any, workers: int) -> dict[str, Any]:
    """What a result depends on beside the settings: data, processes, threads."""
    on_cpu = accelerator.device.type == 'cpu'
    return {
        'processes': accelerator.num_processes,
        'device': accelerator.device.type,
        **({'CPU threads (--cpu-threads)': torch.get_num_threads()} if on_cpu else {}),
        **({'--workers of a streamed dataset': workers} if train.streamed else {}),
        'training images': len(train),
        'validation images': len(val),
        'classes': train.num_classes,
        'files and labels (a digest)': f'{train.digest()} {val.digest()}',
    }


def versions() -> dict[str, str]:
    """Of Python and of what a result rests on."""
    packages = ('timm_rld', 'timm', 'torch', 'accelerate', 'datasets')
    return {'python': platform.python_version(), **{p: metadata.version(p) for p in packages}}


def write_results(run: Path, results: dict[str, Any]) -> None:
    """Write results.json, whole or not at all."""
    bad = run / 'bad_images.txt'
    if bad.exists():
        results = {**results, 'bad_images': len(bad.read_text(encoding='utf-8').splitlines())}
    write_whole(run / 'results.json', json.dumps(results, indent=2, ensure_ascii=False))


def seal_teacher(run: Path, weights: Path) -> None:
    """Note that a teacher is fitted, and what its file holds."""
    write_whole(run / 'teacher.sha256', hashlib.sha256(weights.read_bytes()).hexdigest())


def teacher_is_fitted(run: Path, weights: Path) -> bool:
    """Whether an earlier process has fitted the teacher.

    Raises:
        UserError: where its file is not what was written.
    """
    seal = run / 'teacher.sha256'
    if not seal.exists():
        return False
    if not weights.exists() or hashlib.sha256(weights.read_bytes()).hexdigest() != seal.read_text(encoding='utf-8'):
        raise UserError(f'{weights}: is damaged or gone; delete {seal} to fit the teacher again')
    return True


def outcome(history: list[dict[str, float]]) -> dict[str, Any]:
    """What results.json says of a student, from the rows of its log."""
    last, best = history[-1], best_epoch(history)
    return dict(
        student_top1=last['eval_top1'],
        student_top1_best=history[best - 1]['eval_top1'],
        best_epoch=best,
        student_top1_ema=last.get('eval_top1_ema'),
        agreement=last.get('eval_agreement'),
        train_images_per_second=len(history) / sum(1 / r['images_per_second'] for r in history),
    )


def in_a_line(results: dict[str, Any]) -> str:
    """The accuracies of a run."""
    found = {'teacher': results['teacher_top1'], 'student': results.get('student_top1')}
    return ', '.join(f'{who} top-1 {top1:.2f}' for who, top1 in found.items() if top1 is not None)


class Means:
    """Sample-weighted sums of a step's 0-d results, kept on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.sums, self.count = device, {}, 0

    def add(self, result: dict[str, Tensor], count: int) -> None:
        for name, value in result.items():
            if value.ndim == 0:
                value = value.detach().float() * count if count else torch.zeros((), device=self.device)
                self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += count

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {'sums': {k: v.cpu() for k, v in self.sums.items()}, 'count': self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state`."""
        self.sums, self.count = {k: v.to(self.device) for k, v in state['sums'].items()}, state['count']

    def local(self) -> dict[str, float]:
        """This process's means. Waits for the device."""
        return {k: v / max(self.count, 1) for k, v in zip(self.sums, torch.stack(list(self.sums.values())).tolist())}

    def over_processes(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes, and the `count` of samples. Waits for the device."""
        values = torch.stack([*self.sums.values(), torch.tensor(float(self.count), device=self.device)])
        *sums, count = accelerator.reduce(values, 'sum').tolist()
        return {**{k: v / max(count, 1) for k, v in zip(self.sums, sums)}, 'count': count}


PARTS = ('data', 'teacher', 'student', 'other')


class Clock:
    """Where an epoch's time goes, by part. On a GPU it is the GPU's time, of events that no step waits for: `data` is
    then what the GPU waits for a batch.

    Attributes:
        seconds: by part, so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == 'cuda'
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.laps: list[tuple[str, Any]] = []
        self.start()

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Go on here: what has passed since the last lap belongs to no part."""
        self.read()
        self.last = self._now()

    def lap(self, part: str) -> None:
        """What has passed since the last lap belongs to a part."""
        now = self._now()
        if self.on_gpu:
            self.laps.append((part, self.last, now))
            if len(self.laps) > 1000 and self.laps[499][2].query():
                self._add(500)
        else:
            self.seconds[part] += now - self.last
        self.last = now

    def _add(self, count: int) -> None:
        for part, begin, end in self.laps[:count]:
            self.seconds[part] += begin.elapsed_time(end) / 1000
        del self.laps[:count]

    def read(self) -> dict[str, float]:
        """Seconds by part. Waits for the device."""
        if self.laps:
            self.laps[-1][2].synchronize()
            self._add(len(self.laps))
        return dict(self.seconds)


class Progress:
    """A bar on a terminal, plain lines elsewhere; on the main process alone."""

    def __init__(self, active: bool, title: str, epochs: int, batches: int, interval: int, done: int = 0) -> None:
        self.active, self.title, self.epochs, self.batches, self.interval = active, title, epochs, batches, interval
        self.first = done  # batches that an earlier process has done
        self.started = self.epoch_started = time.perf_counter()
        on_terminal = active and sys.stderr.isatty()
        self.bar = tqdm(total=epochs * batches, initial=done, desc=title, leave=False) if on_terminal else None
        self.unshown = 0

    def start_epoch(self, images: int) -> None:
        self.epoch_started, self.images = time.perf_counter(), images

    def due(self, batch: int) -> bool:
        self.unshown += 1
        return self.active and (batch + 1) % self.interval == 0

    def show(self, epoch: int, batch: int, means: dict[str, float], lr: float, images: int) -> None:
        done = (epoch - 1) * self.batches + batch + 1
        elapsed = time.perf_counter() - self.started
        rate = (images - self.images) / (time.perf_counter() - self.epoch_started)
        losses = ' '.join(f'{k} {means[k]:.4f}' for k in ('loss', 'task_loss', 'kd_loss') if k in means)
        if self.bar is not None:
            self.bar.update(self.unshown)
            self.bar.set_postfix_str(f'{losses} lr {lr:.3g} {rate:.0f} img/s')
        else:
            eta = elapsed / max(done - self.first, 1) * (self.epochs * self.batches - done)
            print(
                f'{self.title} epoch {epoch}/{self.epochs} [{batch + 1}/{self.batches}] {losses} lr {lr:.3g} '
                f'{rate:.0f} img/s eta {_duration(eta)}',
                flush=True,
            )
        self.unshown = 0

    def end_epoch(self, row: dict[str, float]) -> None:
        if not self.active:
            return
        parts = f' (task {row["train_task_loss"]:.4f} kd {row["train_kd_loss"]:.4f})'
        kd = '' if math.isnan(row['train_kd_loss']) else parts
        ema = f' ema {row["eval_top1_ema"]:.2f}' if 'eval_top1_ema' in row else ''
        done = row['epoch'] * self.batches - self.first
        left = (self.epochs - row['epoch']) * self.batches
        eta = (time.perf_counter() - self.started) / max(done, 1) * left
        line = (
            f'{self.title} epoch {row["epoch"]:.0f}/{self.epochs}  loss {row["train_loss"]:.4f}{kd}  '
            f'top-1 {row["eval_top1"]:.2f}{ema}  lr {row["lr"]:.3g}  {row["images_per_second"]:.0f} img/s  '
            f'eta {_duration(eta)}'
        )
        if self.bar is not None:
            self.bar.update(self.unshown)
            self.unshown = 0
            self.bar.write(line)
            if row['epoch'] == self.epochs:
                self.bar.close()
        else:
            print(line, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """Write a CSV. NaN, which stands for "not there", is left empty."""
    f = io.StringIO()
    writer = csv.DictWriter(f, fieldnames=list(dict.fromkeys(k for row in rows for k in row)), lineterminator='\n')
    writer.writeheader()
    for row in rows:
        writer.writerow({k: '' if isinstance(v, float) and math.isnan(v) else f'{v:.6g}' for k, v in row.items()})
    write_whole(path, f.getvalue())


def best_epoch(history: list[dict[str, float]]) -> int:
    """The first epoch of the highest validation top-1."""
    return max(history, key=lambda row: row['eval_top1'])['epoch']
