"""What goes wrong on shared machines: full disks, NaN, broken images, killed workers, two runs in one folder."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import SafetensorError

import train_distill
from timm_rld import run_folder
from timm_rld.engine import checkpoint, log
from timm_rld.engine.checkpoint import Checkpoints
from timm_rld.errors import run_main
from timm_rld.files import LockedError, lock, write_atomic
from timm_rld.task import DistillationTask
from train_distill import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def flags(folder, trained_teacher, tmp_path) -> list[str]:
    """Flags of a run of a second."""
    return [
        '--teacher', f'local-dir:{trained_teacher}', '--student', 'test_resnet', '--data-dir', str(folder),
        '--img-size', '32', '--epochs', '2', '--batch-size', '8', '--lr', '0.01', '--min-teacher-acc', '0',
        '--cpu-threads', '1', '--workers', '0', '--output', str(tmp_path), '--experiment', 'run',
    ]  # fmt: skip


def poison(monkeypatch, steps: set[int], what: str = 'loss') -> None:
    """Make the loss, or only its gradient, NaN at some forward passes (counted from 1)."""
    forward, count = DistillationTask.forward, [0]

    def poisoned(self, *args):
        result = forward(self, *args)
        count[0] += 1
        if count[0] in steps:
            if what == 'loss':
                result['loss'] = result['loss'] * torch.nan
            else:
                result['loss'].register_hook(lambda gradient: gradient * torch.inf)
        return result

    monkeypatch.setattr(DistillationTask, 'forward', poisoned)


@pytest.mark.parametrize(
    ('what', 'message'),
    [
        ('loss', 'the loss is nan in epoch 2 of the student, batch 3, samples '),
        ('gradient', 'a gradient is not finite (l'),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_step_and_the_last_checkpoint_is_good(
    flags, tmp_path, monkeypatch, capsys, what, message
):
    poison(monkeypatch, {8}, what)
    assert main(flags) == 1
    assert message in capsys.readouterr().err
    newest = Checkpoints(tmp_path / 'run' / 'checkpoints').newest('student')
    assert newest.position.epoch == 1 and all(torch.isfinite(v).all() for v in newest.weights['model'].values())


def test_some_steps_in_a_row_may_be_left_out_and_are_counted(flags, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {2, 3, 8})
    assert main([*flags, '--skip-nonfinite', '2']) == 0
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    assert [row['skipped_steps'] for row in rows] == ['2', '3']
    assert all(float(row['train_loss']) < 10 for row in rows)
    poison(monkeypatch, {2, 3, 4})
    assert main([*flags, '--skip-nonfinite', '2', '--experiment', 'three']) == 1
    assert 'epoch 1 of the student, batch 4, samples' in capsys.readouterr().err


def test_a_step_that_is_left_out_leaves_no_trace_in_batch_norm():
    from timm_rld.distributed import create_accelerator
    from timm_rld.engine.faults import FiniteCheck

    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    check = FiniteCheck(create_accelerator(), 1, 'student')

    def step(images: torch.Tensor) -> bool:
        check.start_group(network)
        loss = network(images).square().mean()
        loss.backward()
        return check.allows_step(network, 1, 0, [loss.detach()], [torch.arange(2)])

    assert step(torch.rand(2, 3, 4, 4))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    images = torch.rand(2, 3, 4, 4)
    images[0, 0, 0, 0] = torch.inf
    assert not step(images) and check.skipped == 1
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_full_disk_is_named_and_the_checkpoint_before_stays_whole(flags, tmp_path, monkeypatch, capsys):
    write, count = checkpoint.write_synced, [0]

    def full(path: Path, data: bytes) -> None:
        count[0] += 1
        if count[0] == 5:  # in the middle of the second checkpoint
            path.write_bytes(data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(checkpoint, 'write_synced', full)
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert f'{tmp_path / "run" / "checkpoints"}: a checkpoint cannot be written (No space left on device)' in error
    resume = f'accelerate launch train_distill.py --resume {tmp_path / "run"}'
    assert f'free some space, then {resume} continues from the one before' in error
    assert [p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()] == ['student-epoch0001-end']
    assert Checkpoints(tmp_path / 'run' / 'checkpoints').newest('student').position.epoch == 1


@pytest.mark.parametrize(
    ('size', 'what', 'then'),
    [
        ('8k', '', ''),  # not even the settings
        ('64k', '/checkpoints: a checkpoint', 'starts again: there is none before it'),
        ('4m', '/student', 'continues'),  # the only checkpoint takes 3 MB, the student 1.5
    ],
)
def test_a_full_disk_is_named_with_the_fix(fork_server, flags, tmp_path, size, what, then):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('may not mount')
    try:
        flags = [*flags, '--epochs', '1']
        training = fork_server.start([*flags, '--output', str(disk)], tmp_path / 'log')
        assert training.wait() == [1]
        said = f'{disk}/run{what} cannot be written (No space left on device); '
        said += (
            f'free some space, then accelerate launch train_distill.py --resume {disk}/run {then}'
            if what
            else 'give another --output'
        )
        assert training.output().count('error: ') == 1 and said in training.output().splitlines()[-1]
        subprocess.run(['mount', '-o', 'remount,size=64m', disk], check=True)
        fork_server.run([*flags, '--output', str(disk), '--resume', 'auto'], tmp_path / 'log')
        fork_server.run([*flags, '--experiment', 'whole'], tmp_path / 'log')
        a, b = ((run / 'student' / 'model.safetensors').read_bytes() for run in (disk / 'run', tmp_path / 'whole'))
        assert a == b
    finally:
        subprocess.run(['umount', disk], check=True)


@pytest.mark.parametrize('file', ['summary.csv', 'student', 'results.json'])
def test_what_does_not_fit_on_the_disk_is_written_by_resume(flags, tmp_path, monkeypatch, capsys, file):
    run = tmp_path / 'run'
    write_atomic = run_folder.write_atomic

    def full(path: Path, text: str) -> None:
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomic(path, text)

    def no_model(*_, **__) -> None:
        raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')

    with monkeypatch.context() as disk:
        disk.setattr(run_folder, 'write_atomic', full)
        disk.setattr(log, 'write_atomic', full)
        if file == 'student':
            disk.setattr('timm.models.save_for_hf', no_model)
        assert main(flags) == 1
    where = run / 'student' if file == 'student' else run
    said = f'error: {where} cannot be written (No space left on device); free some space, then '
    assert f'{said}accelerate launch train_distill.py --resume {run} continues\n' in capsys.readouterr().err
    assert main(['--resume', str(run)]) == 0
    assert (run / file).exists() and (run / 'results.json').exists()


def test_a_file_that_does_not_fit_on_the_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomic(tmp_path / 'x', 'before')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError):
        write_atomic(tmp_path / 'x', 'after')
    assert [p.read_text() for p in tmp_path.iterdir()] == ['before']


@pytest.fixture
def broken(folder, tmp_path) -> Path:
    """The folder of images with two that cannot be read."""
    copy = tmp_path / 'images'
    shutil.copytree(folder, copy)
    first, second = sorted((copy / 'train' / 'pear').iterdir())[:2]
    first.write_bytes(first.read_bytes()[:60])
    second.write_text('not an image')
    return copy


@pytest.mark.parametrize('workers', ['0', '1'])
def test_an_unreadable_image_is_named_or_replaced_and_listed(flags, broken, tmp_path, capsys, workers):
    flags = [*flags, '--data-dir', str(broken), '--workers', workers]
    assert main(flags) == 1
    assert '/train/pear/00' in capsys.readouterr().err
    assert main([*flags, '--on-bad-image', 'skip', '--experiment', 'skip']) == 0
    run = tmp_path / 'skip'
    lines = (run / 'bad_images.txt').read_text().splitlines()
    assert len(lines) == 4 == json.loads((run / 'results.json').read_text())['bad_images']
    assert lines[0].startswith('epoch 1: image ') and 'cannot be read' in lines[0] and '.png' in lines[0]
    assert main([*flags, '--on-bad-image', 'skip', '--experiment', 'again']) == 0
    a, b = ((tmp_path / name / 'student' / 'model.safetensors').read_bytes() for name in ('skip', 'again'))
    assert a == b


def test_a_killed_worker_is_an_error_and_not_a_hang(fork_server, flags, tmp_path):
    training = fork_server.start([*flags, '--workers', '1', '--epochs', '500'], tmp_path / 'log')
    deadline = time.monotonic() + 60
    while 'student epoch 1/' not in training.output():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(training.pids[0]).children()
    assert len(children) >= 2  # of the training and of the validation loader
    started = time.monotonic()
    for child in children:
        child.send_signal(signal.SIGKILL)
    assert training.wait() == [1]
    assert time.monotonic() - started < 60
    assert 'A loader worker was killed' in training.output() and '--workers' in training.output()


def test_a_folder_in_use_by_a_live_run_is_refused_and_free_once_it_is_killed(fork_server, flags, tmp_path):
    training = fork_server.start([*flags, '--epochs', '500'], tmp_path / 'log')
    deadline = time.monotonic() + 60
    while 'student epoch 1/' not in training.output():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for extra in ([], ['--resume', 'auto']):
        second = fork_server.start([*flags, '--epochs', '500', *extra], tmp_path / 'second')
        assert second.wait() == [1]
    assert second.output().count(f'{tmp_path / "run"}: in use by process {training.pids[0]} on ') == 2
    training.signal(signal.SIGKILL)
    training.wait()
    third = fork_server.start([*flags, '--epochs', '500', '--resume', 'auto'], tmp_path / 'third')
    deadline = time.monotonic() + 60
    while 'student: resuming in epoch' not in third.output():
        assert time.monotonic() < deadline, third.output()
        time.sleep(0.02)
    third.signal(signal.SIGKILL)
    third.wait()


@pytest.mark.parametrize('code', [errno.ENOSYS, errno.ENOLCK, errno.EAGAIN, errno.EACCES])
def test_where_the_file_system_has_no_locks_a_folder_is_used_without(tmp_path, monkeypatch, code):
    def no_lock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr('timm_rld.files.fcntl.lockf', no_lock)
    if code in (errno.EAGAIN, errno.EACCES):
        with pytest.raises(LockedError):
            lock(tmp_path / '.lock')
    else:
        assert lock(tmp_path / '.lock') == -1


def test_paths_with_spaces_and_letters_of_all_alphabets_work(flags, tmp_path):
    output = tmp_path / 'a b' / 'Größe 模型'
    assert main([*flags, '--output', str(output)]) == 0
    (output / 'run' / 'results.json').unlink()
    assert main(['--resume', str(output / 'run')]) == 0


def command(*words: str, after: str = '', **env: str) -> subprocess.CompletedProcess:
    """Run Python from a shell, which closes streams with what stands `after` it."""
    env = dict(os.environ, HF_HUB_OFFLINE='1', PYTHONPATH=str(ROOT), **env)
    line = f'{shlex.join([sys.executable, *words])} {after}'
    return subprocess.run(line, shell=True, cwd=ROOT, env=env, capture_output=True, timeout=240)


def test_a_run_whose_output_is_closed_trains_all_the_same(tiny, tmp_path):
    done = command('train_distill.py', *tiny, '--workers', '1', after='<&- >&- 2>&-')
    assert done.returncode == 0
    assert json.loads((tmp_path / 'run' / 'results.json').read_text(encoding='utf-8'))['student_top1'] > 0
    for file in (tmp_path / 'run').rglob('*.*'):  # nothing of what was printed went into a file that got its number
        assert file.is_dir() or b'top-1' not in file.read_bytes(), file


@pytest.mark.parametrize('after', ['>&-', '2>&-', '<&- >&- 2>&-'])
def test_the_tools_keep_their_exit_codes_where_their_output_is_closed(after):
    assert command('-m', 'timm_rld', 'list', 'recipes', after=after).returncode == 0
    assert command('-m', 'timm_rld', 'list', 'recipe', after=after).returncode == 2


def test_names_of_all_alphabets_come_through_a_locale_that_knows_ascii_alone(folder, tiny, tmp_path):
    data = shutil.copytree(folder, tmp_path / 'data')
    for split in ('train', 'validation'):
        (data / split / 'pear').rename(data / split / 'Груша')
    (tmp_path / 'classes.txt').write_text('plum\nГруша\napple\n', encoding='utf-8')
    argv = [*tiny, '--data-dir', str(data), '--class-map', str(tmp_path / 'classes.txt'),
            '--output', str(tmp_path / 'Ausgänge')]  # fmt: skip
    done = command('train_distill.py', *argv, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    assert done.returncode == 0, done.stderr.decode()
    run = tmp_path / 'Ausgänge' / 'run'
    found = json.loads((run / 'student' / 'config.json').read_text(encoding='utf-8'))
    assert found['label_names'] == ['plum', 'Груша', 'apple']
    assert '--class-map' in json.loads((run / 'results.json').read_text(encoding='utf-8'))['command']
    (run / 'results.json').unlink()
    assert main(['--resume', str(run)]) == 0, 'the same data, in whatever locale'


def test_a_character_that_the_terminal_does_not_know_is_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), 'ascii')
    monkeypatch.setattr(sys, 'stdout', terminal)
    assert run_main(lambda: print('a → я'), 'test', False) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == rb'a \u2192 \u044f' + b'\n'


def test_a_run_with_a_cache_closes_what_it_opens(flags, tmp_path):
    argv = [*flags, '--epochs', '1', '--workers', '1', '--teacher-cache', str(tmp_path / 'cache')]
    env = dict(os.environ, PYTHONWARNINGS='error::ResourceWarning')
    done = subprocess.run([sys.executable, train_distill.__file__, *argv], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and 'ResourceWarning' not in done.stderr, done.stderr
