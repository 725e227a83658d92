"""The folder that a run leaves: args.yaml, facts.json, results.json, summary.csv, the trained teacher."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import shlex
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .files import LockedError, lock, sha256_of, write_atomic


def claim(folder: Path, resume: bool) -> bool:
    """Make a run folder and lock it for this process.

    Args:
        resume: whether a run that is there may be continued.

    Returns:
        Whether there is a run to continue.

    Raises:
        UserError: where it holds files already, or is in use by another run.
        OSError: where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = [p for p in folder.iterdir() if p.name != '.lock']
    is_run = (folder / 'args.yaml').exists()
    if is_run or not there:  # else it is not ours to lock
        try:
            lock(folder / '.lock')
        except LockedError as e:
            raise UserError(f'{folder}: in use by {e}') from e
    if there and not (resume and is_run):
        fix = '--resume auto continues it, or ' if is_run else ''
        raise UserError(f'--output/--experiment: {folder} is not empty; {fix}name another --experiment')
    return any((folder / part).exists() for part in ('checkpoints', 'teacher'))


def write_inputs(folder: Path, args_yaml: str, facts: dict[str, Any], held_out: list[str] | None = None) -> None:
    """Write args.yaml and facts.json, unless they are there with this content; and in validation.txt, one per line, the
    images that are held out for validation, if any are."""
    files = {'args.yaml': args_yaml, 'facts.json': json.dumps(facts, indent=1)}
    if held_out is not None:
        files['validation.txt'] = ''.join(f'{name}\n' for name in held_out)
    for file, text in files.items():
        if not (folder / file).exists() or (folder / file).read_text(encoding='utf-8') != text:
            write_atomic(folder / file, text)


def is_finished(folder: Path, epochs: int) -> bool:
    """Return whether a run has finished this number of epochs."""
    try:
        return json.loads((folder / 'results.json').read_text(encoding='utf-8'))['epochs'] == epochs
    except (OSError, ValueError, KeyError):
        return False


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    packages = ('timm_rld', 'timm', 'torch', 'accelerate', 'datasets')
    return {'python': platform.python_version(), **{p: metadata.version(p) for p in packages}}


def write_results(run: Path, results: dict[str, Any]) -> None:
    """Write results.json, whole or not at all."""
    bad = run / 'bad_images.txt'
    if bad.exists():
        results = {**results, 'bad_images': len(bad.read_text(encoding='utf-8').splitlines())}
    write_atomic(run / 'results.json', json.dumps(results, indent=2, ensure_ascii=False))


def write_teacher_checksum(folder: Path, weights: Path) -> None:
    """Write teacher.sha256: the teacher is trained, and this is what its file holds."""
    write_atomic(folder / 'teacher.sha256', sha256_of(weights))


def teacher_is_trained(folder: Path, weights: Path) -> bool:
    """Return whether an earlier process has trained the teacher.

    Raises:
        UserError: where its file is not what was written.
    """
    checksum = folder / 'teacher.sha256'
    if not checksum.exists():
        return False
    if not weights.exists() or sha256_of(weights) != checksum.read_text(encoding='utf-8'):
        raise UserError(f'{weights}: is damaged or gone; delete {checksum} to train the teacher again')
    return True


def queries_in(folder: Path) -> int:
    """Return how many images a closed teacher was asked about by the processes of a run, on this host."""
    return sum(int(file.read_text(encoding='utf-8') or 0) for file in folder.glob('queries-*.txt'))


def best_epoch(history: list[dict[str, float]], by: str = 'top1') -> int:
    """Return the first epoch of the highest validation `top1` or `macro` accuracy, or of the lowest `loss`."""
    sign = -1 if by == 'loss' else 1
    return int(max(history, key=lambda row: sign * row[f'eval_{by}'])['epoch'])


def outcome(history: list[dict[str, float]], best_by: str = 'top1') -> dict[str, Any]:
    """Return what results.json says of a student, from the rows of its log."""
    last, best = history[-1], best_epoch(history, best_by)
    return dict(
        student_top1=last['eval_top1'],
        student_top1_best=history[best - 1]['eval_top1'],
        student_macro=last.get('eval_macro'),
        student_macro_best=history[best - 1].get('eval_macro'),
        best_epoch=best,
        best_by=best_by,
        student_top1_ema=last.get('eval_top1_ema'),
        student_macro_ema=last.get('eval_macro_ema'),
        agreement=last.get('eval_agreement'),
        second_class=last.get('eval_second_class'),
        train_top1_poisoned=_known(last.get('train_top1_poisoned')),
        train_top1_clean=_known(last.get('train_top1_clean')),
        train_images_per_second=len(history) / sum(1 / max(r['images_per_second'], 1e-9) for r in history),
    )


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def summary_line(results: dict[str, Any]) -> str:
    """Return the accuracies of a run as a line."""
    found = {'teacher': results['teacher_top1'], 'student': results.get('student_top1')}
    return ', '.join(f'{who} top-1 {top1:.2f}' for who, top1 in found.items() if top1 is not None)


@dataclass(frozen=True)
class RunFiles:
    """A finished run, read from its folder.

    Attributes:
        folder: where it lies.
        settings: of args.yaml.
        results: of results.json.
        history: rows of summary.csv; a figure that is not there is left out.
        config: config.json of the student.
    """

    folder: Path
    settings: dict[str, Any]
    results: dict[str, Any]
    history: list[dict[str, float]]
    config: Path


def read_run(folder: str | Path) -> RunFiles:
    """Return what a run folder holds.

    Raises:
        UserError: where it is not that of a finished run.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder')
    try:
        settings = yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8'))
        results = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
        with (folder / 'summary.csv').open(encoding='utf-8') as f:
            history = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
        config = folder / 'student' / 'config.json'
        json.loads(config.read_text(encoding='utf-8'))['architecture']
        shlex.split(results['command'])
        if len(history) != results['epochs'] or not 1 <= results['best_epoch'] <= len(history):
            raise ValueError('summary.csv has another number of epochs than results.json')
        settings['val_split'], results['student_top1'], history[-1]['eval_top1']
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, yaml.YAMLError) as e:
        what = os.path.basename(getattr(e, 'filename', None) or '') or (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(
            f'{folder}: not the folder of a finished run ({what}); --resume finishes one that is not'
        ) from e
    return RunFiles(folder, settings, results, history, config)


@dataclass(frozen=True)
class Export:
    """An exported file in a run folder (`timm-rld export`).

    Attributes:
        file: where it lies.
        about: what its side file says: `architecture`, `weights`, `format`, `precision`, `bytes`, `labels`, …, and of
            its `check` the figures, or None.
    """

    file: Path
    about: dict[str, Any]

    @property
    def beside(self) -> list[Path]:
        """The file, and what lies beside it."""
        names = ('', '.json', '.py')
        return [p for n in names if (p := self.file.with_name(f'{self.file.name}{n}')).is_file()]


def read_exports(folder: Path) -> list[Export]:
    """Return the exported files that lie in a run folder, by name; one whose side file is gone or damaged is left out,
    and so is one of a student that the run has since trained for more epochs."""
    found = []
    for side in sorted(folder.glob('*.json')):
        file = side.with_suffix('')
        try:
            about = json.loads(side.read_text(encoding='utf-8')) if file.is_file() else {}
            complete = {'format', 'precision', 'weights', 'bytes', 'check'} <= set(about)
            of_this_student = 'epochs' not in about or is_finished(folder, about['epochs'])
            if complete and of_this_student and about['bytes'] == file.stat().st_size:
                found.append(Export(file, about))
        except (OSError, ValueError, TypeError):
            continue
    return [e for e in found if not e.file.name.endswith('.failed')]
