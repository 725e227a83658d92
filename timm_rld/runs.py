"""Trainings as subprocesses, each in a folder of its own: what commands that hold several runs together share."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import FIELDS, Config, completing, flag_of, load_yaml, marked, parse_args, resolve, to_yaml
from .errors import Stopped, UsageError, UserError, writing
from .files import LockedError, lock, write_atomic
from .loss import choose_criterion, published_defaults
from .loss.features import check_features
from .metrics import mean_interval


@dataclass(frozen=True)
class Variant:
    """A criterion to compare, and the flags that choose it.

    Attributes:
        label: as it was written; the name in tables and folders.
        flags: for `train_distill.py`.
    """

    label: str
    flags: tuple[str, ...]


def parse_variant(text: str, answers: str | None = None) -> Variant:
    """Return the variant that a text names: `rld`, or with options and weights
    `rld:beta=2,temperature=1,distill_warmup_epochs=1`, `kd:standardize=true`; after a plus sign a method on features,
    likewise: `rld+at`, `none+fitnet:stage=3,feature_loss_weight=50`.

    Args:
        answers: of a closed teacher, as `--black-box` has them.

    Raises:
        UsageError: for an unknown criterion, method or option, and a criterion that cannot be computed from such
            answers.
    """
    criterion, *features = re.split(r'\+(?=[a-z])', text)  # not that of 1e+3
    if len(features) > 1:
        raise UsageError(f'--criteria {text}: expected one criterion and at most one method on features')
    flags = [
        *_flags_of(text, criterion, 'distill'),
        *(x for f in features for x in _flags_of(text, f, 'feature_distill')),
    ]
    try:
        config = parse_args(flags)
        row, _ = choose_criterion(config.distill, config.standardize, config.distill_kwargs, answers)
        if row.not_standardized:
            flags.append('--no-standardize')  # whatever a file says
        check_features(config.feature_distill, config.feature_kwargs, config.distill)
    except UsageError as e:
        raise UsageError(f'--criteria {text}: {str(e).partition(": ")[2]}') from e
    return Variant(text, tuple(flags))


def _flags_of(text: str, part: str, choice: str) -> list[str]:
    """Return the flags that a part of a variant's text stands for.

    Args:
        text: the whole, for messages.
        part: NAME or NAME:options.
        choice: the setting that the name is of.
    """
    name, _, rest = part.partition(':')
    options, flags = [], [flag_of(choice), name]
    own = completing(choice)
    kwargs = next(name for name in own if name.endswith('_kwargs'))
    for item in filter(None, re.split(r',(?![^\[]*\])', rest)):  # not within a list
        key, sep, value = item.partition('=')
        if not sep:
            raise UsageError(f"--criteria {text}: expected name=value after the colon, got '{item}'")
        if key == 'standardize' and choice == 'distill':
            if value.lower() not in ('true', 'false'):
                raise UsageError(f'--criteria {text}: standardize must be true or false, got {value}')
            flags += ['--standardize' if value.lower() == 'true' else '--no-standardize']
        elif key in own:
            flags += [flag_of(key), *value.strip('[]').split(',')]
        else:
            options.append(item)
    return flags + ([flag_of(kwargs), *options] if options else [])


def mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return mean and standard deviation; None without a value, and of one alone."""
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def paired_difference(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean of some differences, one a seed, and half the width of its 95% interval (Student's t); None where
    there are too few."""
    return mean_interval(differences) if differences else (None, None)


def reference_of(names: Sequence[str]) -> str | None:
    """Return the criterion that a comparison holds the others against: `rld`, else the first variant of it."""
    return 'rld' if 'rld' in names else next((n for n in names if re.split(r'[:+]', n)[0] == 'rld'), None)


def show_difference(mean: float | None, half: float | None) -> str:
    """Return the text of a difference, `+1.20 ± 0.35`, as far as it and half the width of its interval are known."""
    return '' if mean is None else f'{mean:+.2f}' + ('' if half is None else f' ± {half:.2f}')


def check_flags(seeds: Sequence[int], flags: Sequence[str], verb: str) -> Config:
    """Return the settings that all runs share.

    Args:
        seeds: of the runs.
        flags: of `train_distill.py`.
        verb: of `timm-rld`, for messages.

    Raises:
        UsageError: for wrong ones, and those that are chosen for each run.
    """
    config = parse_args(list(flags))
    for name in marked('per_run'):
        if getattr(config, name) != FIELDS[name].default and flag_of(name) in {f.partition('=')[0] for f in flags}:
            raise UsageError(f'{flag_of(name)}: is chosen for each run; see --criteria, --seeds and --output of {verb}')
    if config.push_to_hub:
        raise UsageError(
            f'--push-to-hub: {verb} makes many students; push the one that you want with `timm-rld push RUN` '
            '(--no-push-to-hub leaves it out)'
        )
    if config.student is None or config.teacher_name is None:
        raise UsageError('--teacher and --student are needed, e.g. --teacher resnet34 --student resnet18')
    for seed in seeds:
        parse_args(['--seed', str(seed)])
    resolve(config)
    return config


def check_variant(variant: Variant, flags: Sequence[str], check: Callable[[Config], None]) -> None:
    """Raise UsageError where a variant cannot be had with the flags of all runs: before the others take their hours.

    Args:
        check: what a run checks before it builds anything (:func:`timm_rld.engine.check_settings`).
    """
    try:
        config = parse_args([*flags, *variant.flags])
        if resolve(config).teacher_epochs:  # the teacher is trained once, before the runs
            config = parse_args([*flags, *variant.flags, '--teacher-epochs', '0'])
        config = resolve(config, published=published_defaults)
        check(config)
        choose_criterion(config.distill, config.standardize, config.distill_kwargs, config.black_box)
    except UsageError as e:
        raise UsageError(f'--criteria {variant.label}: {e}') from e


def check_unique(what: str, values: Sequence[Any]) -> None:
    """Raise UsageError where a list of a flag is empty, or has a value twice."""
    if not values:
        raise UsageError(f'{what}: name at least one')
    if twice := [v for i, v in enumerate(values) if v in values[:i]]:
        raise UsageError(f'{what}: {twice[0]} is there twice')


def same_held_out(config: Config) -> list[str]:
    """Return flags that hold the same images out in all runs: the teacher, which is trained once, must not have seen
    them. Of a run's args.yaml they are those of that run."""
    derived = config.val_seed is None or 'val_seed' in config.origin.derived  # and would follow each run's --seed
    return ['--val-seed', str(resolve(config).val_seed)] if config.val_fraction is not None and derived else []


def claim(output: Path, config: Config, what: str) -> None:
    """Write the settings into a folder, as settings.yaml, so that runs under others are never put into one table; and
    lock it for as long as this process lives.

    Args:
        output: the folder; is made if it does not exist.
        what: it holds, for messages: `a comparison`.

    Raises:
        UserError: where it holds something else, is in use, or cannot be written.
    """
    file = output / 'settings.yaml'
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(output.iterdir()):
                raise UserError(f'--output {output}: is not empty; name another folder')
            write_atomic(file, to_yaml(config))
        lock(output / '.lock')
    except LockedError as e:
        raise UserError(f'--output {output}: in use by {e}') from e
    except OSError as e:
        raise UserError(f'--output {output}: cannot be written ({e.strerror})') from e
    there = {**dataclasses.asdict(Config()), **load_yaml(str(file), '--output')}
    for name, value in dataclasses.asdict(config).items():
        if there[name] != value:
            raise UserError(
                f'--output {output}: holds {what} with {flag_of(name)} {there[name]}, not {value}; name another folder'
            )


def launch_command(launcher: str) -> list[str]:
    """Return the words that start a training, before its flags.

    Args:
        launcher: a command in place of `python`, or an empty text.

    Raises:
        UsageError: where there is no such program.
    """
    try:
        words = shlex.split(launcher) or [sys.executable]
    except ValueError as e:
        raise UsageError(f'--launcher {launcher}: {e}') from e
    if shutil.which(words[0]) is None:
        raise UsageError(f'--launcher {launcher}: there is no program {words[0]}')
    return [*words, '-m', 'train_distill']


def train_teacher(
    launch: Sequence[str], flags: Sequence[str], output: Path, log: Callable[[str], None], *extra: str
) -> list[str]:
    """Train the teacher alone, in OUTPUT/teacher, unless that is done.

    Args:
        launch: :func:`launch_command`.
        flags: of all runs.
        extra: flags of this one.

    Returns:
        The flags of all runs that use it.

    Raises:
        UserError: as :func:`run_training`.
    """
    folder = output / 'teacher'
    run_training([*launch, *flags, '--epochs', '0', *extra], folder, 'the teacher', log)
    return [*flags, '--teacher', f'local-dir:{folder / "teacher"}', '--teacher-epochs', '0', '--teacher-pretrained']


def run_training(command: list[str], folder: Path, title: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Run one training to its end, or read the results of one that is complete.

    Args:
        command: without the flags that name the folder.
        folder: of the run; its output goes into FOLDER.log.
        title: for messages.
        log: prints a line.

    Returns:
        What results.json holds.

    Raises:
        UserError: where it failed; the reason in a line.
    """
    done = folder / 'results.json'
    if done.exists():
        log(f'{title}: already there')
        return _read_results(done)
    log_file = folder.with_name(f'{folder.name}.log')
    started = time.perf_counter()
    command = [*command, '--output', str(folder.parent), '--experiment', folder.name, '--resume', 'auto']
    with contextlib.ExitStack() as stack:
        with writing(f'{title} failed: {log_file}'):
            f = stack.enter_context(log_file.open('ab'))
        begin = f.tell()
        code = _wait(subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=os.environ))
    if code or not done.exists():
        how = f'was ended by {signal.Signals(-code).name}' if code < 0 else f'failed with code {code}'
        raise UserError(f'{title} {how}: {_last_words(log_file.read_bytes()[begin:])} (its output: {log_file})')
    results = _read_results(done)
    top1 = results.get('student_top1', results['teacher_top1'])
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    log(f'{title}: top-1 {top1:.2f} ({minutes}:{seconds:02})')
    return results


def _read_results(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise UserError(f'{file}: is damaged; delete it to have the run repeated') from e


def _last_words(output: bytes) -> str:
    """Return the error that a program ended with, else its last line."""
    text = output.decode(errors='replace').strip()
    text = text.rpartition('error: ')[2] if 'error: ' in text else text.rpartition('\n')[2]
    return ' '.join(text.split()) or 'no output'


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a run. A signal to us is passed on, and the run then has time for a checkpoint."""

    def stop(number: int, _: object) -> None:
        raise Stopped('stopped by SIGTERM; the same command continues', 128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return process.wait()
    except KeyboardInterrupt:  # which the run has got too
        process.wait()
        raise Stopped('interrupted; the same command continues', 130) from None
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def slug(label: str) -> str:
    """Return a name for a folder."""
    return ''.join(c if c.isalnum() or c in '._-' else '_' for c in label)


def wait_until_free(folder: Path, title: str, log: Callable[[str], None], seconds: float = 2.0) -> None:
    """Wait for a training that an earlier process has started and that outlived it, so that it is not started twice.

    Args:
        folder: of the run.
        seconds: between two looks.
    """
    file, said = folder / '.lock', False
    while file.exists():
        try:
            os.close(lock(file))
            return
        except LockedError as e:
            if not said:
                log(f'{title}: still running ({e}); waiting for its end')
            said = True
            time.sleep(seconds)
        except OSError:
            return
