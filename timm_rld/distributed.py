"""Several processes: how they start, and how they agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
)

from .errors import UsageError, UserError, did_you_mean, writing
from .files import cores

T = TypeVar('T')


def create_accelerator(
    *,
    mixed_precision: str | None = None,
    report_to: Iterable[str] = (),
    sync_bn: bool = False,
    cpu_threads: int | None = None,
    cpu: bool = False,
) -> Accelerator:
    """Start Accelerate as `accelerate launch` asked for, and set torch's threads on the CPU.

    Args:
        mixed_precision: `no`, `fp16` or `bf16`; None for that of `accelerate launch`.
        report_to: trackers of Accelerate.
        sync_bn: whether batch norm is to be shared by the processes.
        cpu_threads: of this process on a CPU; None for its share of the cores.
        cpu: stay on the CPU where there is a GPU too.

    Returns:
        The accelerator.

    Raises:
        UserError: where the launcher started several processes that do not know of each other, or a tracker is not
            installed.
        UsageError: for an unknown tracker.
    """
    report_to = list(report_to)
    _check_trackers(report_to)
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=mixed_precision,
            # fit() divides by the group's true size itself: Accelerate divides the last, smaller group by the full one
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=report_to or None,
            project_config=ProjectConfiguration('.', logging_dir='.'),  # open_run() sets the folder
            # batch norm keeps each process's own statistics, and not those of the first alone
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as e:
        if 'precision' not in str(e):
            raise
        raise UserError(f'--mixed-precision {mixed_precision}: {str(e).splitlines()[0]}') from e
    if (kind := str(accelerator.distributed_type.value)) in ('FSDP', 'DEEPSPEED', 'MEGATRON_LM'):
        raise UserError(
            f'distributed_type {kind}: not supported, as checkpoints, averaged weights and the export need whole '
            'weights; use MULTI_GPU'
        )
    if accelerator.mixed_precision == 'fp16' and accelerator.device.type == 'cpu':
        raise UserError('--mixed-precision fp16: has no effect on a CPU; use bf16, or no')
    if sync_bn and accelerator.device.type != 'cuda':
        raise UserError('--sync-bn: needs GPUs; without it the statistics are averaged after each epoch')
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    if world_size != accelerator.num_processes:
        raise UserError(
            f'the launcher started {world_size} processes (WORLD_SIZE), Accelerate knows of '
            f'{accelerator.num_processes}: each would train alone and overwrite the others.\n'
            f'Without GPUs: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {world_size} …'
        )
    if cpu_threads or accelerator.device.type == 'cpu':
        local = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        torch.set_num_threads(cpu_threads or max(1, cores() // local))
    return accelerator


def _check_trackers(names: Iterable[str]) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = [str(n) for n in LOGGER_TYPE_TO_CLASS]
    installed = [str(getattr(n, 'value', n)) for n in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UsageError(
                f'--report-to {name}: unknown tracker{did_you_mean(name, known)}; known: {", ".join(known)}'
            )
        if name not in installed:
            raise UserError(f'--report-to {name}: not installed (pip install {name})')


# Accelerate has `main_process_first`, but where the main process raises an error there, the others wait for ever.


def main_first(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Return what a function returns, called on the main process first, then on the others. A UserError of the main
    process is raised on all."""
    result = _on_main(accelerator, function)
    return result if accelerator.is_main_process else function()  # type: ignore[return-value]


def main_only(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Return, on all processes, what a function returns on the main one. A UserError is raised on all."""
    return broadcast_object_list([_on_main(accelerator, function)])[0]


def main_writes(
    accelerator: Accelerator, folder: Path, function: Callable[..., object], *args: Any, **kwargs: Any
) -> None:
    """Call a function that writes into a run folder on the main process alone.

    Raises:
        WriteError: on every process, where it cannot be written; it says how to continue.
    """

    def write() -> None:
        with writing(folder, then=f'accelerate launch train_distill.py --resume {folder} continues'):
            function(*args, **kwargs)

    _on_main(accelerator, write)


def _on_main(accelerator: Accelerator, function: Callable[[], T]) -> T | None:
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = function()
        except UserError as e:
            error = e
    raise_on_all(error)
    return result


def raise_on_all(error: UserError | None) -> None:
    """Raise the main process's error, if there is one, on every process; the others' argument does not matter."""
    sent = [(type(error), str(error)) if error is not None else None]
    broadcast_object_list(sent)
    if sent[0]:
        kind, message = sent[0]
        raise kind(message)


def all_reduce_max(accelerator: Accelerator, *values: float) -> list[int]:
    """Return the maximum of each value over the processes. Waits for all of them."""
    if accelerator.num_processes == 1:
        return [int(v) for v in values]
    tensor = torch.tensor([float(v) for v in values], device=accelerator.device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return [int(v) for v in tensor.tolist()]
