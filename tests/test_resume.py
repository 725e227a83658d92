"""A run that is killed or stopped is resumed to the same student, bit for bit; what must not change is refused."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from fork_server import kill_until_done
from safetensors.torch import load_file, save_file

from timm_rld.engine.checkpoint import Checkpoint, Checkpoints, Damaged, Position, read_checkpoint
from timm_rld.errors import UserError
from train_distill import main


@pytest.fixture
def flags(folder, trained_teacher, tmp_path) -> list[str]:
    """Flags of a run of a second, with all that is random in it."""
    return [
        '--teacher', f'local-dir:{trained_teacher}', '--student', 'test_vit', '--data-dir', str(folder),
        '--img-size', '32', '--epochs', '3', '--batch-size', '8', '--lr', '0.01', '--min-teacher-acc', '0',
        '--cpu-threads', '1', '--drop', '0.2', '--drop-path', '0.2', '--mixup', '0.3', '--reprob', '0.5',
        '--model-ema', '--model-ema-decay', '0.9', '--checkpoint-interval', '1', '--workers', '0',
        '--output', str(tmp_path), '--resume', 'auto',
    ]  # fmt: skip


@pytest.mark.parametrize(('every', 'epochs'), [('5', [1, 2, 3, 4]), ('10', [2, 4]), ('epoch', [1, 2, 3, 4])])
def test_an_interval_that_ends_with_an_epoch_is_kept_too(flags, tmp_path, monkeypatch, every, epochs):
    monkeypatch.setattr(sys.modules['timm_rld.engine.fit'], 'best_epoch', lambda *_: 4)
    flags = [*flags, '--student', 'test_resnet', '--epochs', '4', '--checkpoint-hist', '99', '--experiment', 'run']
    assert main([*flags, '--checkpoint-interval', every]) == 0  # 5 steps an epoch
    found = sorted(p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir() if p.name.startswith('student'))
    assert found == [f'student-epoch{n:04}-end' for n in epochs]


def test_a_run_is_not_resumed_with_another_teacher(flags, trained_teacher, tmp_path, capsys):
    shutil.copytree(trained_teacher, teacher := tmp_path / 'teacher')
    (tmp_path / 'map.json').write_text('{"apple": 0, "pear": 1, "plum": 2}')
    flags = [*flags, '--teacher', f'local-dir:{teacher}', '--teacher-class-map', str(tmp_path / 'map.json'),
             '--epochs', '1', '--experiment', 'run']  # fmt: skip
    assert main(flags) == 0
    (tmp_path / 'map.json').write_text('{"apple": 1, "pear": 0, "plum": 2}')
    assert main([*flags, '--min-teacher-acc', '0']) == 1
    assert 'was started with --teacher-class-map (a digest) ' in capsys.readouterr().err
    (tmp_path / 'map.json').write_text('{"apple": 0, "pear": 1, "plum": 2}')
    assert main(flags) == 0 and 'has finished' in capsys.readouterr().err
    state = load_file(teacher / 'model.safetensors')
    save_file({k: v + 1 if v.is_floating_point() else v for k, v in state.items()}, teacher / 'model.safetensors')
    assert main(flags) == 1
    assert "was started with the teacher's weights (a digest) " in capsys.readouterr().err


def weights(run: Path) -> list[str]:
    """Digests of what a run made."""
    files = [run / part / 'model.safetensors' for part in ('student', 'student_ema')]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def log_of(run: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((run / 'summary.csv').open()))
    return [{k: v for k, v in row.items() if 'second' not in k} for row in rows]


@pytest.mark.parametrize(
    ('processes', 'extra'),
    [
        (1, []),
        (1, ['--workers', '2', '--grad-accum-steps', '3']),
        (1, ['--student', 'test_resnet', '--drop', '0', '--drop-path', '0', '--distill', 'ctkd', '--opt', 'adamw',
             '--clip-grad', '1', '--sched-on-updates', '--checkpoint-interval', '2']),
        (2, ['--student', 'test_resnet', '--drop', '0', '--drop-path', '0', '--batch-size', '4']),
        (2, ['--batch-size', '4', '--grad-accum-steps', '2', '--workers', '1']),
    ],
    ids=['plain', 'workers-accum', 'bn-adamw-ctkd', 'two-bn', 'two-accum-workers'],
)  # fmt: skip
def test_a_run_killed_at_random_moments_ends_as_the_one_that_was_not(fork_server, flags, tmp_path, processes, extra):
    started = time.monotonic()
    whole, killed = ([*flags, *extra, '--experiment', name] for name in ('whole', 'killed'))
    fork_server.run(whole, tmp_path / 'whole.log', processes)
    longest = time.monotonic() - started
    kills = kill_until_done(fork_server, killed, tmp_path / 'killed.log', random.Random(7), longest, 3, processes)
    assert kills >= 1
    assert weights(tmp_path / 'killed') == weights(tmp_path / 'whole')
    assert log_of(tmp_path / 'killed') == log_of(tmp_path / 'whole')


def test_a_run_goes_on_from_an_early_a_middle_and_a_late_checkpoint_to_the_same_end(fork_server, flags, tmp_path):
    flags = [*flags, '--checkpoint-hist', '100', '--experiment']
    fork_server.run([*flags, 'whole'], tmp_path / 'log')
    names = Checkpoints(tmp_path / 'whole' / 'checkpoints').names()
    assert sum('batch' in name for name in names) == 18 - 3  # six steps an epoch, the last of which is the epoch's end
    for name in (names[0], names[7], names[-2]):
        shutil.copytree(tmp_path / 'whole', tmp_path / name)
        (tmp_path / name / 'results.json').unlink()
        checkpoint = tmp_path / name / 'checkpoints' / name
        training = fork_server.run(['--resume', str(checkpoint)], tmp_path / f'{name}.log')
        assert 'student: resuming in epoch' in training.output()
        assert weights(tmp_path / name) == weights(tmp_path / 'whole')
        shutil.rmtree(tmp_path / name)


def test_a_trained_teacher_is_used_and_not_trained_again(fork_server, flags, tmp_path, folder):
    flags = [*flags, '--teacher', 'test_resnet', '--teacher-epochs', '2', '--no-teacher-pretrained', '--experiment']
    fork_server.run([*flags, 'whole'], tmp_path / 'log')
    kill_until_done(fork_server, [*flags, 'killed'], tmp_path / 'killed.log', random.Random(3), 1.5, 4)
    assert weights(tmp_path / 'killed') == weights(tmp_path / 'whole')
    killed, whole = (tmp_path / run / 'teacher' / 'model.safetensors' for run in ('killed', 'whole'))
    assert killed.read_bytes() == whole.read_bytes()
    (tmp_path / 'whole' / 'results.json').unlink()
    again = fork_server.run([*flags, 'whole'], tmp_path / 'again.log')
    assert 'teacher epoch' not in again.output()


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize('processes', [1, 2])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_says_how_to_go_on(
    fork_server, flags, tmp_path, number, code, processes
):
    flags = [*flags, '--checkpoint-interval', 'epoch', '--epochs', '40', '--workers', '1', '--experiment', 'run']
    training = fork_server.start(flags, tmp_path / 'log', processes)
    wait_for(lambda: 'student epoch 2/40' in training.output())
    started = time.monotonic()
    if processes == 1:
        os.killpg(training.pids[0], number)  # the whole group, as Ctrl-C and Slurm do
    else:
        os.kill(training.pids[1], number)  # one of them alone
    assert training.wait() == [code] * processes, training.output()
    assert time.monotonic() - started < 60
    assert f'stopped by {number.name} in epoch' in training.output()
    assert f'--resume {tmp_path / "run"} continues' in training.output()
    newest = Checkpoints(tmp_path / 'run' / 'checkpoints').newest('student')
    assert newest.position.updates >= 12 // processes and 'Traceback' not in training.output()


def test_a_streamed_run_goes_on_from_the_end_of_an_epoch_and_says_so(fork_server, flags, tmp_path, parquet):
    at = flags.index('--data-dir')
    stream = [*flags[:at], '--dataset', f'hfids/{parquet}', '--input-key', 'img', '--target-key', 'fine_label',
              '--val-split', 'test', '--train-num-samples', '41', '--val-num-samples', '20', '--num-classes', '3',
              *flags[at + 2 :], '--batch-size', '2', '--mixup', '0', '--experiment']  # fmt: skip
    fork_server.run([*stream, 'whole'], tmp_path / 'whole.log')
    training = fork_server.start([*stream, 'stopped', '--log-interval', '1'], tmp_path / 'log')
    wait_for(lambda: 'student epoch 2/3 [3/' in training.output())
    training.signal(signal.SIGTERM)
    assert training.wait() == [143]
    assert 'continues from the end of the epoch before' in training.output()
    assert Checkpoints(tmp_path / 'stopped' / 'checkpoints').names() == ['student-epoch0001-end']
    fork_server.run([*stream, 'stopped'], tmp_path / 'again.log')
    assert weights(tmp_path / 'stopped') == weights(tmp_path / 'whole')


def test_a_loss_that_is_not_finite_on_two_processes_is_said_once(fork_server, flags, tmp_path):
    training = fork_server.start([*flags, '--lr', '1e30', '--experiment', 'run'], tmp_path / 'log', processes=2)
    assert training.wait() == [1, 1]
    assert training.output().count('try a lower --lr') == 1 and 'samples ' in training.output()


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'waited for too long'
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope='module')
def stopped_run(folder, trained_teacher, tmp_path_factory) -> list[str]:
    """Flags of a run that has one of two epochs behind it."""
    output = tmp_path_factory.mktemp('stopped')
    flags = [
        '--teacher', f'local-dir:{trained_teacher}', '--student', 'test_resnet', '--data-dir', str(folder),
        '--img-size', '32', '--batch-size', '8', '--lr', '0.01', '--min-teacher-acc', '0', '--workers', '0',
        '--output', str(output), '--experiment', 'run', '--sched', 'multistep', '--warmup-epochs', '0',
    ]  # fmt: skip
    assert main([*flags, '--epochs', '1']) == 0
    return flags


@pytest.mark.parametrize(
    ('extra', 'message'),
    [
        (['--lr', '0.02'], '--lr 0.01, not 0.02'),
        (['--distill', 'kd'], '--distill rld, not kd'),
        (['--cpu-threads', '1'], '--cpu-threads None, not 1'),
        (['--sched', 'cosine', '--epochs', '3'], '--sched multistep, not cosine'),
        (['--val-split', 'train'], '--val-split validation, not train'),
    ],
)
def test_a_setting_that_would_change_the_result_is_refused_by_name(stopped_run, capsys, extra, message):
    assert main([*stopped_run, '--epochs', '1', '--resume', 'auto', '--epochs', '2', *extra]) == 1
    assert message in capsys.readouterr().err


def test_more_epochs_workers_and_log_lines_are_fine(stopped_run, capsys):
    argv = [*stopped_run, '--resume', 'auto', '--epochs', '2', '--workers', '1', '--log-interval', '1']
    assert main(argv) == 0
    run = Path(stopped_run[stopped_run.index('--output') + 1]) / 'run'
    assert [row['epoch'] for row in log_of(run)] == ['1', '2']
    assert 'student: resuming in epoch 2, batch 1' in capsys.readouterr().out


def test_a_dataset_that_has_changed_is_refused_by_name(stopped_run, capsys, folder, tmp_path):
    run = copy_of(stopped_run, tmp_path)
    facts = json.loads((run / 'facts.json').read_text())
    (run / 'facts.json').write_text(json.dumps({**facts, 'training images': 40}))
    assert main(['--resume', str(tmp_path / 'run')]) == 1
    assert 'was started with training images 40, now 41' in capsys.readouterr().err


def copy_of(stopped_run: list[str], tmp_path: Path) -> Path:
    """An unfinished copy of the run."""
    run = Path(stopped_run[stopped_run.index('--output') + 1]) / 'run'
    shutil.copytree(run, tmp_path / 'run')
    (tmp_path / 'run' / 'results.json').unlink()
    return tmp_path / 'run'


def test_files_that_would_hide_a_change_are_refused(stopped_run, capsys, tmp_path, folder):
    run = copy_of(stopped_run, tmp_path)
    args, facts = run / 'args.yaml', run / 'facts.json'
    text = args.read_text()
    args.write_text('')
    assert main(['--resume', str(run)]) == 2
    assert f'--resume {args}: expected a mapping' in capsys.readouterr().err
    args.write_text(text)
    facts.write_text('')
    assert main(['--resume', str(run)]) == 1
    assert 'facts.json is missing or damaged' in capsys.readouterr().err


def test_other_labels_of_the_same_number_of_files_are_refused(stopped_run, capsys, tmp_path, folder):
    images, output = tmp_path / 'images', tmp_path / 'out'
    shutil.copytree(folder, images)
    argv = [str(images) if x == str(folder) else x for x in stopped_run]
    argv[argv.index('--output') + 1] = str(output)
    assert main([*argv, '--epochs', '1']) == 0
    (output / 'run' / 'results.json').unlink()
    for name, other, file in (('pear', 'apple', '001.png'), ('apple', 'pear', '000.png')):
        (images / 'train' / name / file).rename(images / 'train' / other / file)
    assert main(['--resume', str(output / 'run')]) == 1
    assert 'was started with files and labels (a digest)' in capsys.readouterr().err


def test_a_damaged_trained_teacher_is_named_with_the_fix(flags, tmp_path, capsys):
    flags = [*flags, '--teacher', 'test_resnet', '--teacher-epochs', '1', '--no-teacher-pretrained', '--epochs', '1']
    assert main([*flags, '--experiment', 'run']) == 0
    (tmp_path / 'run' / 'results.json').unlink()
    weights = tmp_path / 'run' / 'teacher' / 'model.safetensors'
    data = bytearray(weights.read_bytes())
    data[-100:] = bytes(100)
    weights.write_bytes(data)
    assert main([*flags, '--experiment', 'run']) == 1
    assert f'{weights}: is damaged or gone; delete {tmp_path}/run/teacher.sha256' in capsys.readouterr().err


def test_a_finished_run_under_other_settings_is_refused(stopped_run, capsys):
    assert main([*stopped_run, '--epochs', '2', '--resume', 'auto', '--distill', 'kd']) == 1
    assert '--distill rld, not kd' in capsys.readouterr().err


def test_a_finished_run_says_so_and_a_fresh_one_too(stopped_run, capsys, tmp_path):
    run = Path(stopped_run[stopped_run.index('--output') + 1]) / 'run'
    assert main(['--resume', str(run)]) == 0
    assert f'{run} has finished, there is nothing to resume' in capsys.readouterr().err
    argv = [*stopped_run, '--epochs', '1', '--resume', 'auto', '--experiment', 'fresh']
    assert main(argv) == 0
    assert 'nothing to resume' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('argv', 'code', 'message'),
    [
        (['--resume', 'nowhere'], 2, '--resume nowhere: expected auto, a run folder'),
        (['--teacher', 'a', '--student', 'b', '--resume', 'auto'], 2, '--resume auto: which run?'),
        (['--checkpoint-interval', 'often'], 2, "expected 'epoch' or a number of optimizer steps, got 'often'"),
        (['--checkpoint-hist', '0'], 2, '--checkpoint-hist: must be greater than 0'),
    ],
)
def test_wrong_flags_of_checkpoints_are_named(argv, code, message, capsys):
    assert main(argv) == code
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the files


def a_checkpoint(epoch: int, batch: int | None = None, top1: float = 50.0) -> Checkpoint:
    history = [{'epoch': e, 'eval_top1': top1 if e == epoch else 0.0} for e in range(1, epoch + 1)]
    weights = {'model': {'w': torch.full((4,), float(epoch)).expand(3, 4)}}
    return Checkpoint(Position('student', epoch, batch, 10 * epoch), history, 0.1, weights, {'processes': []})


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(a_checkpoint(2))
    back = checkpoints.newest('student')
    assert back.position == Position('student', 2, None, 20) and back.history[1]['eval_top1'] == 50.0
    assert torch.equal(back.weights['model']['w'], torch.full((3, 4), 2.0))
    assert checkpoints.newest('teacher') is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    figures = {'top1': (1, 5, 2, 3, 4), 'macro': (5, 1, 2, 3, 4), 'loss': (5, 4, 1, 2, 3)}
    rows = [{'epoch': e, **{f'eval_{k}': v[e - 1] for k, v in figures.items()}} for e in range(1, 6)]
    for by, best in (('top1', 2), ('macro', 1), ('loss', 3)):
        checkpoints = Checkpoints(tmp_path / by, keep=2, best_by=by)
        for epoch in range(1, 6):
            checkpoints.save(dataclasses.replace(a_checkpoint(epoch, 3), history=rows[: epoch - 1]))
            checkpoints.save(dataclasses.replace(a_checkpoint(epoch), history=rows[:epoch]))
        assert checkpoints.names() == [
            f'student-epoch{best:04}-end', 'student-epoch0005-batch000003', 'student-epoch0005-end'
        ]  # fmt: skip


@pytest.mark.parametrize(
    ('file', 'damage'),
    [(f, d) for f in ('model.safetensors', 'state.pt') for d in ('cut', 'flip', 'gone')]
    + [('checkpoint.json', 'cut'), ('checkpoint.json', 'gone')],  # it holds the digests of the others
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, file, damage):
    said = []
    checkpoints = Checkpoints(tmp_path, log=said.append)
    for epoch in (1, 2):
        checkpoints.save(a_checkpoint(epoch))
    path = tmp_path / 'student-epoch0002-end' / file
    data = path.read_bytes()
    half = len(data) // 2
    if damage == 'gone':
        path.unlink()
    else:
        path.write_bytes(data[:half] if damage == 'cut' else data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :])
    assert checkpoints.newest('student').position.epoch == 1
    assert 'student-epoch0002-end is damaged' in said[0]
    shutil.rmtree(tmp_path / 'student-epoch0001-end')
    with pytest.raises(UserError, match='no checkpoint of the student is whole'):
        checkpoints.newest('student')


def test_a_checkpoint_without_a_key_is_damaged(tmp_path):
    lines = []
    checkpoints = Checkpoints(tmp_path, log=lines.append)
    for epoch in (1, 2):
        checkpoints.save(a_checkpoint(epoch))
    file = tmp_path / 'student-epoch0002-end' / 'checkpoint.json'
    file.write_text(file.read_text().replace('"lr"', '"rate"'))
    assert checkpoints.newest('student').position.epoch == 1
    assert 'student-epoch0002-end is damaged' in lines[0]


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/executed',)

    checkpoint = a_checkpoint(1)
    checkpoint.state = {'processes': Bomb()}
    said = []
    checkpoints = Checkpoints(tmp_path, log=said.append)
    folder = checkpoints.save(checkpoint)
    with pytest.raises(Damaged) as e:
        read_checkpoint(folder)
    assert str(e.value) == 'state.pt holds more than tensors and plain values, so it was not loaded'
    with pytest.raises(UserError, match='no checkpoint of the student is whole'):
        checkpoints.newest('student')
    assert 'weights_only' not in said[0] and 'so it was not loaded' in said[0]  # torch's way out runs the code
    assert not (tmp_path / 'executed').exists()


def test_what_a_killed_writer_left_is_undone_or_finished(tmp_path):
    from accelerate import Accelerator

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(a_checkpoint(1))
    shutil.copytree(tmp_path / 'student-epoch0001-end', tmp_path / '.part-student-epoch0002-end')
    (tmp_path / 'student-epoch0001-end').rename(tmp_path / '.old-student-epoch0001-end')
    checkpoints.prepare(None, Accelerator(cpu=True))
    assert [p.name for p in tmp_path.iterdir()] == ['student-epoch0001-end']
    assert checkpoints.newest('student').position.epoch == 1
