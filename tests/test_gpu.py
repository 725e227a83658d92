"""The same on a GPU as on a CPU; and what fp16 does, which a CPU can be made to do."""

from __future__ import annotations

import csv
import json

import pytest
import timm
import torch
from accelerate import Accelerator
from test_engine import make_loader

from timm_rld import DistillationTask, create_distill_loss
from timm_rld.config import Config, resolve
from timm_rld.engine import fit
from timm_rld.engine.state import TrainState
from timm_rld.loss import CRITERIA
from timm_rld.pairing import Teacher
from train_distill import main

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
PRECISIONS = [
    ('cpu', 'no'),
    pytest.param('cuda', 'no', marks=pytest.mark.gpu),
    pytest.param('cuda', 'bf16', marks=pytest.mark.gpu),
    pytest.param('cuda', 'fp16', marks=pytest.mark.gpu),
]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', [name for name, row in CRITERIA.items() if row.plain])
def test_a_criterion_gives_on_each_device_what_it_gives_in_float64_on_the_cpu(name, device):
    generator = torch.Generator().manual_seed(0)
    logits = [4 * torch.randn(16, 12, generator=generator) for _ in range(2)]
    target, found = torch.randint(12, (16,), generator=generator), []
    for place, dtype in (('cpu', torch.float64), (device, torch.float32)):
        student, teacher = (x.to(place, dtype) for x in logits)
        criterion = create_distill_loss(name).to(place, dtype)
        loss = criterion(student.requires_grad_(), teacher, target.to(place))
        loss.backward()
        found.append((loss.detach().double().cpu(), student.grad.double().cpu()))
    for exact, here in zip(*found):
        torch.testing.assert_close(here, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(('device', 'precision'), PRECISIONS)
def test_a_run_of_each_precision_fills_its_cache_ends_and_continues(device, precision, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_CPU', str(device == 'cpu').lower())
    argv = [*tiny, '--mixed-precision', precision, '--teacher-cache', str(tmp_path / 'cache'), '--clip-grad', '1',
            '--model-ema', '--sched', 'constant', '--warmup-epochs', '0', '--distill-warmup-epochs', '1', '--no-speed',
            '--teacher-cache-views', '1']  # fmt: skip
    assert main([*argv, '--epochs', '1']) == 0
    first = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert main(['--resume', str(tmp_path / 'run'), '--epochs', '2']) == 0
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    assert [row['epoch'] for row in rows] == ['1', '2'] and results['epochs'] == 2
    assert results['teacher_top1'] == first['teacher_top1']
    assert all(float(row['train_loss']) > 0 for row in rows)
    assert min(float(rows[1][f'seconds_{part}']) for part in ('data', 'teacher', 'student', 'other')) > 0


def fp16_on_a_cpu() -> Accelerator:
    """An accelerator that scales gradients as on a GPU under fp16; networks stay in float32."""
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = 'fp16'
    accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    unscale = accelerator.scaler.unscale_

    def unscale_gradients(optimizer):
        unscale(optimizer.optimizer)

    accelerator.unscale_gradients = unscale_gradients
    return accelerator


def settings(**kwargs) -> Config:
    return resolve(Config(teacher='a', student='b', distill='kd', data_dir='.', epochs=1, teacher_epochs=0, lr=0.01,
                          img_size=32, **kwargs))  # fmt: skip


def task_of(criterion) -> DistillationTask:
    student, teacher = (timm.create_model(name, num_classes=3) for name in ('test_vit', 'test_resnet'))
    return DistillationTask(student, Teacher(teacher), criterion)


def test_under_fp16_each_training_begins_with_the_same_scale():
    accelerator = fp16_on_a_cpu()
    TrainState(task_of('kd'), settings(), accelerator, 1, 'student')
    assert accelerator.scaler.get_scale() == torch.amp.GradScaler('cpu').get_scale() != 4


class BadOnce(torch.nn.Module):
    """A criterion whose second loss is not a number."""

    calls = 0

    def forward(self, student, teacher, target):
        self.calls += 1
        return student.mean() * (float('nan') if self.calls == 2 else 1.0)


@pytest.mark.parametrize('clip', [None, 1.0])
def test_under_fp16_a_step_that_is_skipped_does_not_keep_the_next_from_being_clipped(clip, folder, tmp_path):
    loaders = [make_loader(folder, split, 8, training=split == 'train') for split in ('train', 'validation')]
    task = task_of(BadOnce())
    rows = fit(
        task, *loaders, fp16_on_a_cpu(), settings(clip_grad=clip, skip_nonfinite=1), log_file=tmp_path / 'log.csv'
    )
    assert rows[-1]['skipped_steps'] == 1 and task.criterion.calls > 3
