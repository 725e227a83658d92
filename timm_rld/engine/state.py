"""The state of a training: all that changes from step to step, and so what a checkpoint holds."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.layers import convert_sync_batchnorm
from torch import nn

from ..config import Config
from ..distributed import raise_on_all
from ..errors import UserError
from ..pairing import to_memory_format
from ..poison import top1_apart
from ..task import DistillationTask
from .checkpoint import Checkpoint, Checkpoints, Position
from .log import Means, Timer
from .optim import add_criteria, create_optimizer, create_scheduler


def wants_channels_last(config: Config, accelerator: Accelerator) -> bool:
    """Return the memory layout: that of the settings, else channels-last but for float32 on a GPU. Measured on a CPU,
    networks for 32 pixels took 0.53 to 0.87 of the time with it, resnet18 the same at 32 and 0.8 at 224."""
    if config.channels_last is not None:
        return config.channels_last
    return accelerator.device.type != 'cuda' or accelerator.mixed_precision != 'no'


def reset_scaler(accelerator: Accelerator) -> None:
    """Give fp16's loss scale its first value, else a training began with the one at which that before it ended."""
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())


class TrainState:
    """A task made ready to train on its device, with its optimizer and schedule, and how far the training is.

    Args:
        task: its ``trainable_module`` is wrapped by Accelerate.
        config: optimizer, schedule, EMA, memory layout, compilation.
        accelerator: for the device, the scaler and the other processes.
        updates_per_epoch: optimizer steps in an epoch.
        phase: `teacher` or `student`.

    Attributes:
        module: the network, without wrappers.
        epoch: 1-based, the one to train or evaluate next.
        batch: batches of that epoch that are done.
        updates: optimizer steps so far.
        history: rows of the epochs that are done.
        means: of the epoch's figures so far.
        timer: where the epoch's time went so far.
        lr: the learning rate at which the epoch began.
    """

    def __init__(
        self, task: DistillationTask, config: Config, accelerator: Accelerator, updates_per_epoch: int, phase: str
    ) -> None:
        self.task, self.accelerator, self.phase = task, accelerator, phase
        if config.sync_bn and accelerator.num_processes > 1:
            task.trainable_module = convert_sync_batchnorm(task.trainable_module)
        self.module: nn.Module = task.trainable_module
        task.to(accelerator.device)
        channels_last = wants_channels_last(config, accelerator)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        to_memory_format(self.module, self.memory_format)  # the teacher has its own
        if config.model_ema:
            task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        optimizer = create_optimizer(self.module, config)
        add_criteria(optimizer, task, config)
        self.scheduler = create_scheduler(optimizer, config, updates_per_epoch)
        if config.torchcompile:
            task.compile()
        else:
            task.eval_model = task.trainable_module  # what evaluate() may call: not in DDP
        reset_scaler(accelerator)
        task.trainable_module, self.optimizer = accelerator.prepare(task.module_to_wrap(), optimizer)
        self.epoch, self.batch, self.updates = 1, 0, 0
        self.history: list[dict[str, float]] = []
        self.start_epoch()

    def start_epoch(self) -> None:
        """Empty the epoch's means and times."""
        self.means, self.timer = Means(self.accelerator.device), Timer(self.accelerator.device)
        self.lr = self.optimizer.param_groups[0]['lr']

    def end_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0

    def _networks(self) -> dict[str, nn.Module]:
        found = {'model': self.module}
        if self.task.has_ema():
            found['ema'] = self.task.trainable_module_ema.module
        return found

    def save(self, checkpoints: Checkpoints, batch: int | None) -> None:
        """Write a checkpoint; called on every process.

        Args:
            checkpoints: where to.
            batch: batches of the epoch that are done; None: it has been evaluated too.

        Raises:
            UserError: on every process, where it cannot be written.
        """
        if self.task.cache is not None:
            self.task.cache.flush()
        networks = self._networks()
        mine = {
            'generators': generators_state(self.accelerator.device),
            # of batch norm: each process has its own until the epoch ends
            'buffers': {k: {n: b.cpu().clone() for n, b in net.named_buffers()} for k, net in networks.items()},
            'means': self.means.state(),
        }
        processes = gather_object([mine])
        error = None
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                'optimizer': self.optimizer.state_dict(),
                'scheduler': self.scheduler.state_dict(),
                'scaler': scaler.state_dict() if scaler is not None else None,
                'task': self.task.get_task_state(),
                'seconds': self.timer.read(),
                'processes': processes,
            }
            weights = {name: network.state_dict() for name, network in networks.items()}
            position = Position(self.phase, self.epoch, batch, self.updates)
            try:
                checkpoints.save(Checkpoint(position, self.history, self.lr, weights, state))
            except UserError as e:
                error = e
        raise_on_all(error)

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint; called on every process."""
        state, device, at = checkpoint.state, self.accelerator.device, checkpoint.position
        mine = state['processes'][self.accelerator.process_index]
        for name, network in self._networks().items():
            network.load_state_dict(checkpoint.weights[name])
            for key, buffer in network.named_buffers():
                buffer.copy_(mine['buffers'][name][key])
        self.optimizer.load_state_dict(state['optimizer'])
        self.scheduler.load_state_dict(state['scheduler'])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        self.task.load_task_state(state['task'])
        self.history, self.updates = checkpoint.history, at.updates
        self.epoch, self.batch = (at.epoch + 1, 0) if at.batch is None else (at.epoch, at.batch)
        self.start_epoch()
        if at.batch is not None:
            self.lr = checkpoint.lr
            self.timer.seconds.update(state['seconds'])
            self.means.load_state(mine['means'])
        set_generators_state(mine['generators'], device)

    def summary_row(
        self, train: dict[str, float], metrics: dict[str, float], averaged: dict[str, float] | None
    ) -> dict[str, float]:
        """Return the epoch's row of summary.csv.

        Args:
            train: means over the epoch, and the `count` of images.
            metrics: of the evaluation.
            averaged: of the evaluation of the averaged weights, if there are any.
        """
        train, seconds = dict(top1_apart(train)), self.timer.read()
        images = train.pop('count')
        row = {
            'epoch': self.epoch,
            'train_loss': train.pop('loss', math.nan),
            'train_task_loss': train.pop('task_loss', math.nan),
            'train_kd_loss': train.pop('kd_loss', math.nan),
            **{f'eval_{k}': metrics[k] for k in ('loss', 'top1', 'top5', 'macro')},
            'lr': self.lr,
            'images_per_second': images / sum(seconds.values()),
            **{f'seconds_{part}': value for part, value in seconds.items()},
        }
        row.update({f'eval_{k}': metrics[k] for k in ('agreement', 'second_class') if k in metrics})
        if averaged is not None:
            row.update({f'eval_{k}_ema': v for k, v in averaged.items()})
        row.update({f'train_{k}': v for k, v in train.items()})
        return row

    def release(self) -> None:
        """Unwrap the trained module, contiguous, and free what Accelerate holds."""
        self.accelerator.unwrap_model(
            self.task.trainable_module, keep_fp32_wrapper=False, keep_torch_compile=False
        )  # which also gives the module its own forward() back
        self.task.unwrap(self.module)
        self.task.to(memory_format=torch.contiguous_format)
        self.accelerator.free_memory()


def generators_state(device: torch.device) -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators, in types that weights_only reads: Accelerate and
    NumPy would pickle them."""
    numpy_state: Any = np.random.get_state()
    _, keys, *rest = numpy_state
    version, internal, gauss = random.getstate()
    return {
        'python': [version, list(internal), gauss],
        'numpy': [torch.from_numpy(keys.astype(np.int64)), *rest],
        'torch': torch.random.get_rng_state(),
        'cuda': torch.cuda.get_rng_state(device) if device.type == 'cuda' else None,
    }


def set_generators_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo of :func:`generators_state`."""
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    keys, *rest = state['numpy']
    np.random.set_state(('MT19937', keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(state['torch'])
    if state['cuda'] is not None and device.type == 'cuda':
        torch.cuda.set_rng_state(state['cuda'], device)
