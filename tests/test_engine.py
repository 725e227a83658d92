"""fit() and evaluate(): what a step averages over, what an evaluation counts."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn

from timm_rld import DistillationTask, create_distill_loss, create_teacher, engine
from timm_rld.config import Config, resolve
from timm_rld.data import Loader, eval_transform, open_split
from timm_rld.distributed import create_accelerator
from timm_rld.errors import SampleError, UsageError, UserError
from timm_rld.loss import CRITERIA
from train_distill import main

pytestmark = pytest.mark.usefixtures('forked_python')
ROOT = Path(__file__).parent.parent


def make_loader(folder, split: str, batch_size: int, **kwargs) -> Loader:
    source = open_split(None, split, flag='', data_dir=str(folder))
    return Loader(source, eval_transform((3, 32, 32), interpolation='bilinear', crop_pct=1.0), batch_size, **kwargs)


def settings(**kwargs) -> Config:
    kwargs = dict(data_dir='d', opt='momentum', momentum=0.0, weight_decay=0.0, lr=0.1, sched='none', epochs=1) | kwargs
    return resolve(Config(**kwargs))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model('test_vit', num_classes=3)


def test_each_step_is_the_mean_over_its_whole_group_the_last_incomplete_one_included(folder, tmp_path):
    loader = make_loader(folder, 'train', 8, training=True, accum=4)
    trained, expected = network(), network()
    task = DistillationTask(trained, None, None)
    accelerator = create_accelerator()
    engine.fit(task, loader, make_loader(folder, 'validation', 8, training=False), accelerator,
               settings(channels_last=False), log_file=tmp_path / 'log.csv')  # fmt: skip
    loader.set_epoch(1)
    batches = list(loader)
    expected.train()
    for group in (batches[:4], batches[4:]):
        pixels, target = torch.cat([b[0] for b in group]), torch.cat([b[1] for b in group])
        expected.zero_grad()
        nn.functional.cross_entropy(expected(task.normalize(pixels)), target).backward()
        for p in expected.parameters():
            p.data -= 0.1 * p.grad
    for (name, p), q in zip(trained.named_parameters(), expected.parameters()):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize('batch_size', [1, 7, 64])
def test_evaluation_counts_every_image_once_at_any_batch_size(folder, batch_size):
    model = network().eval()
    view = DistillationTask(model, None, None).normalize
    accelerator = create_accelerator()
    loader = make_loader(folder, 'validation', batch_size, training=False)
    metrics, predicted = engine.evaluate(lambda p: model(view(p)), loader, accelerator)
    source = loader.source
    center = eval_transform((3, 32, 32), interpolation='bilinear', crop_pct=1.0)
    images, targets = zip(*((center(source.read(i)[0]), source.read(i)[1]) for i in range(20)))
    with torch.no_grad():
        logits, targets = model(view(torch.stack(images))), torch.tensor(targets)
    assert predicted.tolist() == logits.topk(2).indices.tolist()
    assert metrics['top1'] == pytest.approx(100 * (predicted[:, 0] == targets).float().mean().item())
    assert metrics['loss'] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    assert metrics['top5'] == 100
    other = predicted.clone()
    other[:5] = other[:5].flip(1)
    again, _ = engine.evaluate(lambda p: model(view(p)), loader, accelerator, reference=other)
    assert again['agreement'] == pytest.approx(75) and again['second_class'] == pytest.approx(25)


def test_an_evaluation_of_fewer_images_than_a_stream_declares_is_an_error_that_names_both_numbers(parquet):
    keys = dict(flag='--val-split', input_key='img', target_key='fine_label', num_classes=3)
    accelerator = create_accelerator()
    predict = lambda pixels: torch.zeros(len(pixels), 3)  # noqa: E731

    def judge(declared: int):
        source = open_split(f'hfids/{parquet}', 'test', num_samples=declared, **keys)
        center = eval_transform((3, 32, 32), interpolation='bilinear', crop_pct=1.0)
        return engine.evaluate(predict, Loader(source, center, 8, training=False), accelerator)

    assert len(judge(20)[1]) == 20
    with pytest.raises(UserError, match='--val-split test: 20 images were read, it declares 30; .*--val-num-samples'):
        judge(30)


def test_multistep_lowers_the_rate_in_the_epoch_named_counted_from_one():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    config = settings(sched='multistep', decay_milestones=(3, 5), lr=1.0, warmup_epochs=0, epochs=6)
    scheduler = engine.create_scheduler(optimizer, config, 10)
    rates = []
    for epoch in range(1, 7):
        rates.append(round(optimizer.param_groups[0]['lr'], 6))
        scheduler.step(epoch)
    assert rates == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_multistep_on_updates_lowers_the_rate_with_the_first_update_of_the_epoch_named():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    config = settings(sched='multistep', decay_milestones=(3, 5), lr=1.0, warmup_epochs=0, epochs=6,
                      sched_on_updates=True)  # fmt: skip
    scheduler = engine.create_scheduler(optimizer, config, 4)
    rates = []
    for update in range(1, 25):
        rates.append(round(optimizer.param_groups[0]['lr'], 6))
        scheduler.step_update(update)
    assert rates == [1] * 8 + [0.1] * 8 + [0.01] * 8


def test_weight_decay_leaves_out_biases_and_norms_unless_told_otherwise():
    def decayed(**kwargs) -> set[float]:
        optimizer = engine.create_optimizer(timm.create_model('test_resnet'), settings(weight_decay=0.1, **kwargs))
        return {g['weight_decay'] for g in optimizer.param_groups}

    assert decayed() == {0.0, 0.1} and decayed(weight_decay_all=True) == {0.1}


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(opt='adamww'), UsageError, "--opt adamww: unknown optimizer (did you mean 'adamw'"),
        (dict(opt='adamw', opt_kwargs={'foo': 1}), UserError, '--opt adamw: '),
        (dict(opt='adahessian'), UsageError, '--opt adahessian: needs second derivatives'),
        (dict(sched='wsd', decay_epochs=50.0), UserError, '--sched wsd: '),
    ],
)
def test_an_optimizer_or_schedule_that_cannot_be_is_named(kwargs, error, message):
    with pytest.raises(error) as e:
        engine.check_settings(settings(teacher='a', student='b', **kwargs))
    assert message in str(e.value)


def test_each_process_keeps_the_statistics_of_its_own_batches():
    assert create_accelerator().ddp_handler.broadcast_buffers is False  # else they would be those of the first


@pytest.mark.parametrize('label', [-1, 3, 'apple'])
def test_a_label_of_a_stream_that_is_no_class_is_named(parquet, monkeypatch, label):
    source = open_split(f'hfids/{parquet}', 'test', flag='--val-split', num_samples=20, input_key='img',
                        target_key='fine_label', num_classes=3)  # fmt: skip
    image = Image.new('RGB', (8, 8))
    monkeypatch.setattr(type(source.dataset), '__iter__', lambda _: iter([(image, 1), (image, label)]))
    center = eval_transform((3, 8, 8), interpolation='bilinear', crop_pct=1.0)
    with pytest.raises(
        SampleError, match="image 1 of the streamed split 'test'.*cannot be read: (its label is|invalid)"
    ):
        list(Loader(source, center, 8, training=False))


def test_processes_that_do_not_know_of_each_other_are_stopped(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='Accelerate knows of 1'):
        create_accelerator()


def test_trackers_are_checked_by_name_and_installation(monkeypatch):
    with pytest.raises(UsageError, match="--report-to tensorbord: unknown tracker .did you mean 'tensorboard'"):
        create_accelerator(report_to=('tensorbord',))
    monkeypatch.setattr('accelerate.tracking._available_trackers', [])
    with pytest.raises(UserError, match='--report-to wandb: not installed'):
        create_accelerator(report_to=('wandb',))


def test_threads_are_the_cores_divided_by_local_processes_or_as_said(monkeypatch):
    before = torch.get_num_threads()
    try:
        create_accelerator(cpu_threads=3)
        assert torch.get_num_threads() == 3
        monkeypatch.setenv('LOCAL_WORLD_SIZE', '1000')
        create_accelerator()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def launch(argv: list[str], processes: int) -> subprocess.CompletedProcess:
    env = dict(os.environ, ACCELERATE_USE_CPU='true')
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', str(processes), '--master_port', '0',
               '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0', 'train_distill.py', *argv]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)


def test_with_batch_norm_the_exported_student_has_the_accuracy_that_two_processes_report(
    folder, trained_teacher, tmp_path
):
    argv = ['--teacher', f'local-dir:{trained_teacher}', '--student', 'test_resnet', '--data-dir', str(folder),
            '--img-size', '32', '--epochs', '1', '--lr', '0.05', '-b', '8', '--workers', '0', '--min-teacher-acc', '0',
            '--model-ema', '--model-ema-decay', '0.5', '--output', str(tmp_path), '--experiment', 'bn']  # fmt: skip
    done = launch(argv, 2)
    assert done.returncode == 0, done.stderr
    row = next(csv.DictReader((tmp_path / 'bn' / 'summary.csv').open()))
    loader = make_loader(folder, 'validation', 8, training=False)
    accelerator = create_accelerator()
    for name, key in (('student', 'eval_loss'), ('student_ema', 'eval_loss_ema')):
        model = timm.create_model(f'local-dir:{tmp_path / "bn" / name}', pretrained=True).eval()
        config = timm.data.resolve_data_config({}, model=model)
        center = eval_transform((3, 32, 32), interpolation=config['interpolation'], crop_pct=config['crop_pct'])
        loader = Loader(loader.source, center, 8, training=False)
        view = DistillationTask(model, None, None).normalize
        metrics, _ = engine.evaluate(lambda pixels, m=model, v=view: m(v(pixels)), loader, accelerator)
        assert metrics['loss'] == pytest.approx(float(row[key]), rel=1e-4)


def test_an_error_of_all_processes_is_said_once(folder, tmp_path):
    argv = ['--teacher', 'test_resnet', '--student', 'test_resnet', '--data-dir', str(folder), '--val-split', 'x']
    done = launch(argv, 2)
    assert done.returncode != 0
    assert done.stderr.count('train_distill.py: error:') == 1 and 'gloo' not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    'criterion',
    [['--distill', 'rld'], ['--distill', 'ctkd'], ['--distill', 'kd', '--feature-distill', 'feature']],
    ids=lambda c: c[-1],
)
def test_two_processes_train_and_evaluate_as_one(criterion, folder, trained_teacher, tmp_path):
    common = ['--teacher', f'local-dir:{trained_teacher}', '--student', 'test_vit', '--data-dir', str(folder),
              '--img-size', '32', '--epochs', '2', '--lr', '0.05', '--grad-accum-steps', '2', '--workers', '0',
              '--min-teacher-acc', '0', '--output', str(tmp_path), *criterion]  # fmt: skip
    rows, results = [], []
    for processes, batch_size in ((1, '8'), (2, '4')):
        done = launch([*common, '--batch-size', batch_size, '--experiment', str(processes)], processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('student top-1') == 1
        run = tmp_path / str(processes)
        rows.append(list(csv.DictReader((run / 'summary.csv').open())))
        results.append(json.loads((run / 'results.json').read_text()))
    for one, two in zip(*rows, strict=True):
        for key in (k for k in one if k != 'epoch' and 'second' not in k):
            assert float(two[key]) == pytest.approx(float(one[key]), rel=2e-4, abs=1e-6), key
    for key in ('teacher_top1', 'teacher_macro', 'student_top1', 'student_macro', 'agreement'):
        assert results[0][key] == results[1][key]


@pytest.mark.parametrize('name', [n for n, row in CRITERIA.items() if row.plain])
@pytest.mark.parametrize('standardize', [False, True])
def test_every_criterion_trains(name, standardize, folder, trained_teacher, tmp_path):
    if standardize and CRITERIA[name].not_standardized:
        pytest.skip('not combined')
    argv = ['--teacher', f'local-dir:{trained_teacher}', '--student', 'test_resnet', '--data-dir', str(folder),
            '--img-size', '32', '--epochs', '2', '--workers', '0', '-b', '8', '--lr', '0.001', '--min-teacher-acc', '0',
            '--distill', name, '--output', str(tmp_path), '--experiment', 'x']  # fmt: skip
    assert main([*argv, *(['--standardize'] if standardize else [])]) == 0
    rows = list(csv.DictReader((tmp_path / 'x' / 'summary.csv').open()))
    assert all(float(r['train_loss']) == pytest.approx(float(r['train_loss'])) for r in rows) and len(rows) == 2
    assert {f'train_{d}' for d in create_distill_loss(name).diagnostics} <= set(rows[0])
    options = json.loads((tmp_path / 'x' / 'results.json').read_text())['distill_options']
    if standardize:
        assert options['standardize'] is True and options.get('temperature', 2.0) == 2.0
        weight = yaml.safe_load((tmp_path / 'x' / 'args.yaml').read_text())['distill_loss_weight']
        assert weight == pytest.approx(9 * CRITERIA[name].distill_weight)


def test_what_a_criterion_learns_is_stepped_and_not_decayed(folder, trained_teacher, tmp_path):
    teacher = create_teacher(f'local-dir:{trained_teacher}', 3, image_size=(32, 32))
    task = DistillationTask(network(), teacher, 'ctkd')
    theta = task.criterion.theta
    config = settings(lr=0.02, weight_decay=5.0, channels_last=False)
    accelerator = create_accelerator(**config.arguments_of('create_accelerator'))
    loaders = make_loader(folder, 'train', 8, training=True), make_loader(folder, 'validation', 8, training=False)
    task.criterion.decay_epochs = 1e9  # λ near 0: only weight decay could move θ far
    engine.fit(task, *loaders, accelerator, config, log_file=tmp_path / 'log.csv')
    assert theta.item() == 1.0
    task.criterion.decay_epochs = 1
    engine.fit(task, *loaders, accelerator, config, log_file=tmp_path / 'log.csv')
    assert theta.item() != 1.0
