"""`timm-rld export`: from a run or a model to a file, the example beside it, and the figures of its check."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from ..config import Config, data_named, resolve
from ..data import Source, open_splits
from ..distributed import create_accelerator
from ..engine import size_of
from ..errors import UsageError, UserError, check_file, writing
from ..files import write_atomic
from ..hub.card import without_local_path
from ..inference import OpenModel, open_model
from ..inference.evaluate import evaluation_loader, evaluation_settings, names_other_data, open_validation_of
from ..inference.model import output_of_each_class
from ..run_folder import versions
from . import check as checks
from . import onnx as of_onnx
from . import pt2 as of_pt2
from .example import HEADING, example
from .graph import About, Graph, OpenFile, describe, prepare, reason, trace
from .quantize import IMAGES, quantize

FORMATS, PRECISIONS = ('onnx', 'pt2'), ('fp32', 'int8')
_NAMES = {'last': 'student', 'best': 'student_best', 'ema': 'student_ema'}  # of a run's folders
Log = Callable[[str], object]


@dataclass
class Plan:
    """What is to be exported, and how.

    Attributes:
        opened: the model.
        format, precision, in_graph, weights: as in :func:`export_file`.
        file: the target.
        config: settings of the data that the file is checked on.
        accelerator: for the CPU, with the threads that the settings ask for.
        val: their validation split; None without a check.
        outputs: of the model, for each class of that split; None where they are the same.
        train: images to calibrate with; None but for int8.
    """

    opened: OpenModel
    format: str
    precision: str
    in_graph: bool
    weights: str
    file: Path
    config: Config
    accelerator: Accelerator | None = None
    val: Source | None = None
    outputs: list[int] | None = None
    train: Source | None = None


def export_file(
    name: str,
    *,
    format: str | None = None,
    output: str | None = None,
    with_preprocessing: bool = False,
    precision: str = 'fp32',
    weights: str = 'last',
    given: dict[str, Any] | None = None,
    check: bool = True,
    min_agreement: float | None = None,
    log: Log = print,
) -> Path:
    """Write a model as a file for another runtime, and check that the file is the model.

    Beside FILE lie FILE.json (labels, preprocessing, figures of the check) and FILE.py, a program that uses it. A file
    that fails its check is left as FILE.failed, with its figures in FILE.failed.json.

    Args:
        name: a run, a model folder, `hf-hub:user/model`, or a timm name.
        format: `onnx` or `pt2`; None for that of the output's name, else `onnx`.
        output: the file; None for one in the run, or in the working directory.
        with_preprocessing: the graph takes uint8 pixels `[B, H, W, C]`; else normalised floats `[B, C, H, W]`.
        precision: `fp32`, or of ONNX `int8`.
        weights: of a run: `last`, `best` or `ema`.
        given: settings of the data; those of a run otherwise.
        check: whether to hold the file against the model on the validation split (:func:`timm_rld.export.compare`).
        min_agreement: the share of equal classes that is enough (:func:`timm_rld.export.faults`).
        log: prints.

    Returns:
        The file.

    Raises:
        UserError: where there is no such model or data, packages are missing, the file is there, the model cannot be
            exported, or the file fails its check.
    """
    given = given or {}
    format = _check_arguments(format, output, precision, check, min_agreement)
    opened = open_model(name, weights)
    file = _target(opened, weights, format, precision, output)
    plan = Plan(opened, format, precision, with_preprocessing, weights, file, Config(**given))
    plan = _open_data(plan, given, check, log)
    plan.accelerator = create_accelerator(cpu=True, mixed_precision='no', cpu_threads=plan.config.cpu_threads)
    about = describe(
        opened.data_config, opened.class_names, architecture=opened.info.architecture, in_graph=with_preprocessing,
        precision=precision, exif=not plan.config.no_exif,
    )  # fmt: skip
    part = file.with_name(f'.{file.name}.{os.getpid()}.tmp')
    try:
        with writing(file):
            _write(plan, about, part)
        side: dict[str, Any] = {
            **about, 'weights': weights, 'format': format, 'bytes': part.stat().st_size, 'versions': versions(),
            **({'epochs': opened.settings.epochs} if opened.settings is not None else {}),  # of the run by now
            'check': None if plan.val is None else _check(plan, part, min_agreement, log),
        }  # fmt: skip
        with writing(file):
            _put(part, file, side, format)
    finally:
        part.unlink(missing_ok=True)
    log(f'{file}: {file.stat().st_size / 1e6:.1f} MB; python {file.name}.py IMAGE … uses it')
    return file


def _check_arguments(
    format: str | None, output: str | None, precision: str, check: bool, min_agreement: float | None
) -> str:
    """Check what needs no model, and return the format."""
    suffix = Path(output).suffix[1:].lower() if output else ''
    format = format or (suffix if suffix in FORMATS else 'onnx')
    if output and suffix != format:  # NAME.json and NAME.py beside NAME could be files of a model or a run
        wrong = f'is the name of another --format than {format}' if suffix in FORMATS else f'must end in .{format}'
        raise UsageError(f'--output {output}: {wrong}')
    if precision == 'int8' and format != 'onnx':
        raise UsageError(f'--precision int8: is made by onnxruntime; --format {format} has fp32 alone')
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise UsageError(f'--min-agreement {min_agreement:g}: is a share, from 0 to 1')
    if min_agreement is not None and not check:
        raise UsageError(f'--min-agreement {min_agreement:g}: --no-check compares nothing; remove one of the two')
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise UsageError('export works in one process; start it without a launcher')
    if format == 'onnx':
        of_onnx.require()
    if output is not None:
        check_file('--output', output)
    return format


def _target(opened: OpenModel, weights: str, format: str, precision: str, output: str | None) -> Path:
    if output is not None:
        file = Path(output).expanduser()
    else:
        name = str(Path(opened.name).resolve()) if Path(opened.name).is_dir() else opened.name  # of '.' too
        stem = name.rstrip('/').rpartition('/')[2].rpartition(':')[2] or 'model'
        folder = opened.run if opened.run is not None else Path()
        stem = _NAMES[weights] if opened.run is not None else stem
        file = folder / f'{stem}{"" if precision == "fp32" else f"-{precision}"}.{format}'
        if not os.access(folder, os.W_OK):
            raise UserError(f'{folder}: cannot be written (Permission denied); give --output FILE')
    if file.exists():
        raise UserError(f'--output {file}: is there already; delete it, or name another file')
    for beside in (f'{file.name}.json', f'{file.name}.py'):
        if not _may_be_replaced(file.with_name(beside)):
            raise UserError(
                f'--output {file}: {beside} would be written beside it, and is there already; name another file'
            )
    return file


def _may_be_replaced(beside: Path) -> bool:
    """Return whether there is no such file, or one that an earlier export has left."""
    if not beside.exists():
        return True
    try:
        text = beside.read_text(encoding='utf-8')
        return text.startswith(HEADING) if beside.suffix == '.py' else 'preprocessing' in json.loads(text)
    except (OSError, ValueError, TypeError):
        return False


def _open_data(plan: Plan, given: dict[str, Any], check: bool, log: Log) -> Plan:
    """Fill in settings and splits, before any work.

    Raises:
        UserError: where there are none; it offers what can be done without them.
    """
    opened, named = plan.opened, data_named(given) is not None
    if opened.settings is None and not named:
        if plan.precision == 'int8':
            raise UsageError(
                f'{opened.name}: give --data-dir D or --dataset NAME: int8 is calibrated on training images'
            )
        if check:
            raise UsageError(
                f'{opened.name}: no data to check the file with; give --data-dir D or --dataset NAME, or --no-check'
            )
        return plan
    config = evaluation_settings(opened, given, checks.BATCH)
    config.jpeg_draft = False  # no program that uses the file will have it
    config.no_speed = bool(given.get('no_speed'))  # of the run it meant its own end
    try:
        val = open_validation_of(config, log) if check else None
        outputs = (
            None
            if val is None
            else output_of_each_class(opened.info, f'model {opened.name}', val.class_names, val.num_classes)
        )
        train = _open_training(plan, config, given) if plan.precision == 'int8' else None
    except UserError as e:
        without = '' if plan.precision == 'int8' else ', --no-check exports without a check'
        raise UserError(f'{e}\n--data-dir D names the data to check with{without}') from e
    return dataclasses.replace(plan, config=config, val=val, outputs=outputs, train=train)


def _open_training(plan: Plan, config: Config, given: dict[str, Any]) -> Source:
    """Return images to calibrate with: of a run those that it was trained on, whatever the file is checked on."""
    opened = plan.opened
    if opened.settings is not None:
        moved = {} if names_other_data(opened, given) else {k: v for k, v in given.items() if k == 'data_dir'}
        config = resolve(evaluation_settings(opened, moved))
    train, _ = open_splits(**config.arguments_of('open_splits'))
    if train.streamed:
        raise UserError(
            '--precision int8: is calibrated on images of the whole training split, and this one is streamed'
        )
    chosen = np.random.default_rng(config.seed).permutation(len(train))[:IMAGES]
    return train.subset(np.sort(chosen))


def _write(plan: Plan, about: About, part: Path) -> None:
    """Write the exported file, with what it says of itself."""
    opened, size = plan.opened, plan.opened.data_config['input_size']
    graph = Graph(opened.model, opened.normalize if plan.in_graph else None)
    try:
        program = trace(graph, size)
        if plan.format == 'pt2':
            of_pt2.write_pt2(program, part, about)
            return
        of_onnx.write_onnx(program, part, plan.in_graph)
        if plan.train is not None:
            whole = part.with_suffix('.fp32')
            part.rename(whole)
            try:
                quantize(whole, part, _calibration(plan, about))
            finally:
                whole.unlink(missing_ok=True)
        of_onnx.label_onnx(part, about)
    except (UserError, OSError):
        raise
    except Exception as e:
        how = f'--format {plan.format} --precision {plan.precision}'
        raise UserError(f'{how}: {opened.name} cannot be exported: {reason(e)} (--debug shows all)') from e


def _calibration(plan: Plan, about: About) -> Iterator[NDArray[Any]]:
    """Yield what the network sees of the training images, a few at a time."""
    assert plan.train is not None and plan.accelerator is not None
    config = dataclasses.replace(plan.config, validation_batch_size=16)
    loader = evaluation_loader(plan.opened, plan.train, config, plan.accelerator)
    loader.set_epoch(0)
    for pixels, _, _ in loader:
        yield prepare(pixels.numpy(), about)


def open_file(file: Path, format: str, threads: int) -> OpenFile:
    """Open an exported file in its own runtime."""
    return of_onnx.OnnxFile(file, threads) if format == 'onnx' else of_pt2.Pt2File(file)


def _check(plan: Plan, part: Path, min_agreement: float | None, log: Log) -> dict[str, Any]:
    """Return the figures of the check, and print them."""
    import torch

    opened, val = plan.opened, plan.val
    assert val is not None and plan.accelerator is not None
    try:
        file = open_file(part, plan.format, torch.get_num_threads())
    except Exception as e:
        return {'passed': False, 'faults': [f'its own runtime cannot open it ({reason(e)})']}
    if checks.output_order(file.about['labels'], opened.class_names) is None:
        return {'passed': False, 'faults': ['it has other labels than the model']}
    loader = evaluation_loader(opened, val, plan.config, plan.accelerator)
    found = checks.compare(opened, plan.outputs, file, loader)
    absolute = plan.config.with_absolute_paths()
    data = data_named(vars(absolute))
    found |= {
        'data': 'the sample' if data is None else without_local_path(data), 'split': val.split,
        'size_mb': {'torch': size_of(opened.model, opened.data_config['input_size'])['weights_mb'],
                    'file': round(part.stat().st_size / 1e6, 3)},
        'runtime': file.runtime,
    }  # fmt: skip
    if not plan.config.no_speed and not any('error' in f for f in found['batches'].values()):
        found |= checks.latencies(opened, file)
    problems = checks.faults(found, plan.precision, min_agreement)
    log(checks.summary(found, plan.file.name))
    return {'passed': not problems, 'faults': problems, 'min_agreement': min_agreement, **found}


def _put(part: Path, file: Path, side: dict[str, Any], format: str) -> None:
    """Put the file in its place, with what belongs beside it.

    Raises:
        UserError: where it has failed its check; it lies under another name then.
    """
    problems = side['check']['faults'] if side['check'] else []
    to = file.with_name(f'{file.name}.failed') if problems else file
    write_atomic(to.with_name(f'{to.name}.json'), json.dumps(side, indent=1, ensure_ascii=False))
    if not problems:
        write_atomic(file.with_name(f'{file.name}.py'), example(file.name, format, side))
    os.replace(part, to)
    if problems:
        raise UserError(
            f'{file}: {"; ".join(problems)}.\nThe file is left as {to.name}; --min-agreement X sets another limit'
        )
