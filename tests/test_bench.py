"""The benchmarks run, and say what is wrong."""

from __future__ import annotations

import json
import os
import sys
import textwrap

import pytest
import torch

from benchmarks import cache, data
from benchmarks import timm_script as beside_timm
from timm_rld.__main__ import main
from timm_rld.errors import UserError


def test_the_loss_benchmark_prints_a_row_for_each_criterion_and_shape(capsys):
    argv = ['bench', 'loss', '--no-compile', '--repeats', '1', '--shapes', '4x5', '--criteria', 'rld', 'dkd']
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert [f'| {n} |' in out for n in ('cross-entropy', 'kd', 'rld', 'dkd', 'la')] == [True] * 4 + [False]
    for wrong, message in ((['--shapes', '4'], 'BATCHxCLASSES'), (['--criteria', 'rdl'], "did you mean 'rld'")):
        assert main([*argv, *wrong]) != 0
        assert message in capsys.readouterr().err


def test_the_data_benchmark_prints_our_loader_beside_timms_and_what_limits(folder, capsys):
    argv = ['--img-size', '16', '--batch-size', '4', '--batches', '2', '--repeats', '1']
    argv += ['--workers', '0']
    assert data.main([*argv, '--photo', '40x30']) == 0
    out = capsys.readouterr().out
    assert 'No --data-dir: 8 synthetic JPEGs of 40×30.' in out and 'Where the time of a worker goes: decode' in out
    for loader in ('timm, prefetcher', 'timm, no prefetcher', 'timm_rld', 'timm_rld --jpeg-draft'):
        assert f'| {loader} |' in out
    assert data.main([*argv, '--data-dir', str(folder), '--batches', '20']) == 0  # more than the 41 images there are
    assert 'synthetic' not in capsys.readouterr().out
    for wrong, message in (
        (['--photo', '40'], 'WIDTHxHEIGHT'),
        (['--workers', '-1'], '--workers -1: must be at least 0'),
        (['--data-dir', '/nowhere'], '--data-dir /nowhere: no such folder'),
    ):
        assert data.main([*argv, *wrong]) != 0
        assert message in capsys.readouterr().err


def test_the_benchmark_of_loaders_measures_normalised_batches_of_the_same_size(folder):
    from benchmarks.data import NORM, _Images, _ours, _timms
    from timm_rld.data import Loader, eval_transform, open_split

    images = _Images(open_split(None, 'train', flag='', data_dir=str(folder)).dataset, 8)
    theirs = [x for use in (True, False) for x in _timms(images, (3, 16, 16), 4, 0, use)()]
    assert [x.shape for x in theirs] == [(4, 3, 16, 16)] * 4 and all(x.is_floating_point() for x in theirs)
    source = open_split(None, 'train', flag='', data_dir=str(folder))
    loader = Loader(source, eval_transform((3, 12, 12), interpolation='bilinear', crop_pct=1.0), 4, training=False)
    pixels = next(iter(_ours(loader)()))
    raw = next(iter(loader))[0].double() / 255
    mean, std = (torch.tensor(NORM[k]).view(-1, 1, 1) for k in ('mean', 'std'))
    assert torch.allclose(pixels.double(), (raw - mean) / std, atol=1e-5)


def test_the_step_benchmark_sets_the_loop_beside_its_parts(capsys):
    argv = ['bench', 'step', '--teacher', 'test_resnet', '--student', 'test_vit', '--img-size', '32', '--batch-size',
            '4', '--rounds', '1', '--steps', '2', '--num-classes', '10', '20', '--no-loader', '--features']  # fmt: skip
    assert main(argv) == 0
    out = capsys.readouterr().out
    for part in ('(S) |', '| rld alone |', '(T) |', '| online step |', '| cached step |'):
        assert out.count(part) == 2, part
    assert out.count('asking both networks for their maps, unused: ') == 2
    assert 'online / (S + T) ' in out and 'cached / S ' in out and 'teacher ' in out
    assert '10 classes' in out and '20 classes' in out
    for wrong in (
        ['--rounds', '0'],
        ['--num-classes', '0'],
        ['--student', 'resnet81'],
        ['--teacher', 'nosuch'],
        ['--distill', 'rdl'],
    ):
        assert main([*argv, *wrong]) != 0
        assert wrong[0] in capsys.readouterr().err


def test_the_cache_benchmark_prints_a_row_for_each_length(capsys):
    argv = ['--rows', '50', '300', '--num-classes', '7', '--batch-size', '16']
    assert cache.main(argv) == 0
    assert [f'| {n} |' in capsys.readouterr().out for n in (50,)] == [True]
    for wrong, message in ((['--rows', '3'], 'at least a batch'), (['--num-classes', '0'], 'at least 1')):
        assert cache.main([*argv, *wrong]) == 2
        assert message in capsys.readouterr().err


FAKE = """
import json, os, sys, time
json.dump(sys.argv[1:], open(os.environ['FAKE_ARGV'], 'w'))
for batch in range(10):
    time.sleep(0.02)
    print(f'Train: 0 [{batch:>4d}/10 ( 10%)]  Loss: 6.94 (6.94)  Time: 0.020s,  200.00/s  (0.020s,  200.00/s)',
          file=sys.stderr, flush=True)
time.sleep(600)
"""


def program(code: str) -> list[str]:
    return [sys.executable, '-c', textwrap.dedent(code)]


@pytest.mark.parametrize(
    ('line', 'batch'),
    [
        ('Train: 0 [   0/35 (  3%)]  Loss: 6.94 (6.94)  Time: 1.234s,   25.93/s  (1.234s,   25.93/s)', (1, 35)),
        ('Train: 0 [  34/35 (100%)]  Loss: 6.94 (6.94)  Time: 1.234s,   25.93/s', (35, 35)),
        ('Train: 0 [1250/5004 ( 25%)]  Loss: 6.94 (6.94)', (1251, 5004)),
        ('student epoch 1/300 [5/35] loss 5.1 task_loss 4.6 kd_loss 0.5 lr 1e-05 26 img/s eta 1:02:03', (5, 35)),
        ('Train: 1 [   0/35 (  3%)]  Loss: 6.94 (6.94)', None),
        ('student epoch 2/300 [5/35] loss 5.1 lr 1e-05 26 img/s', None),
        ('student epoch 1/300  loss 5.1  top-1 1.00', None),
        ('Test: [   0/3]  Time: 1.234 (1.234)  loss: 4.6', None),
        ('Scheduled epochs: 300 (epochs + cooldown_epochs).', None),
    ],
)  # fmt: skip
def test_the_lines_of_both_programs_tell_the_batch_that_is_done(line, batch):
    assert beside_timm.batch_done(line + '\n') == batch


def test_the_recipe_is_measured_beside_a_script_with_timms_flags(folder, tmp_path, monkeypatch, capsys):
    script = tmp_path / 'train.py'
    script.write_text(FAKE)
    monkeypatch.setenv('FAKE_ARGV', str(tmp_path / 'argv.json'))
    argv = ['--timm-train', str(script), '--teacher', 'test_resnet', '--student', 'cifar_resnet8',
            '--img-size', '32', '--batch-size', '4', '--data-dir', str(folder), '--steps', '2', '--warmup-steps', '2',
            '--repeats', '1', '--workers', '0', '--distill', 'rld', '--mixed-precision', 'bf16',
            '--device', 'cpu']  # fmt: skip
    assert beside_timm.main(argv) == 0
    out = capsys.readouterr().out
    table = [[c.strip() for c in line.strip('|').split('|')] for line in out.splitlines() if line.startswith('|')][2:]
    assert [r[0] for r in table] == [
        "timm's train.py",
        "timm's train.py --channels-last",
        'train_distill.py --distill rld',
    ]
    rates = [float(r[1]) for r in table]
    assert 0 < rates[0] <= 2 * 4 / 0.02 and rates[2] > 0
    assert [float(r[2]) for r in table] == pytest.approx([r / rates[0] for r in rates], rel=0.02)
    assert 'test_resnet → cifar_resnet8, 3 classes, 32 pixels, batch 4, mixed precision bf16, CPU' in out
    said = json.loads((tmp_path / 'argv.json').read_text())
    told = dict(zip(said, said[1:], strict=False))
    assert told['--kd-model-name'].startswith('local-dir:') and told['--data-dir'] == str(folder)
    assert told['--amp-dtype'] == 'bfloat16' and told['--num-classes'] == '3' and said[-1] == '--channels-last'
    assert told['--device-modules'] == 'timm_rld'  # where timm's script finds our networks


def test_a_program_is_stopped_once_it_is_measured_and_its_memory_read(tmp_path):
    code = f"""
        import os, sys, time
        open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))
        full = bytearray(b'1') * 2**26
        for batch in range(3):
            print(f'Train: 0 [{{batch}}/9]', flush=True)
            time.sleep(0.05)
        time.sleep(600)
    """
    measured = beside_timm.measure('it', program(code), 1, 2, dict(os.environ))
    assert 0.05 <= measured.seconds < 60
    assert measured.peak is None or 2**26 < measured.peak < 2**28
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / 'pid').read_text()), 0)


def test_nothing_of_a_program_is_left_when_the_next_starts(tmp_path):
    code = f"""
        import os, time
        program = os.getpid()
        if not os.fork():  # as a loader worker: in a group of its own, it leaves some time after its parent
            os.setpgrp()
            while os.getppid() == program:
                time.sleep(0.05)
            time.sleep(0.3)
            open({str(tmp_path / 'left')!r}, 'w').close()
            os._exit(0)
        time.sleep(0.2)
        for batch in range(3):
            print(f'Train: 0 [{{batch}}/9]', flush=True)
        time.sleep(600)
    """
    beside_timm.measure('it', program(code), 1, 2, dict(os.environ))
    assert (tmp_path / 'left').exists()


@pytest.mark.parametrize(
    ('code', 'message'),
    [
        ("import sys; print('Train: 0 [0/9]'); sys.exit('train.py: error: no such thing')",
         'it: ended with code 1 before batch 3: train.py: error: no such thing'),
        ("print('Train: 0 [0/9]'); raise KeyError('x')", "before batch 3: KeyError: 'x'"),
        ("print('Train: 0 [0/2]')", '--steps 2: an epoch has 2 batches, and 1 \\+ 2 are needed'),
    ],
)  # fmt: skip
def test_a_program_that_fails_says_why(code, message):
    with pytest.raises(UserError, match=message):
        beside_timm.measure('it', program(code), 1, 2, dict(os.environ))


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (['--timm-train', 'nowhere/train.py'], '--timm-train nowhere/train.py: no such file'),
        (['--teacher', 'resnet43'], "--teacher resnet43: not one of timm's networks (did you mean"),
        (['--distill', 'none'], '--distill none: not a function of two rows of logits'),
        (['--steps', '0'], '--steps 0: must be at least 1'),
        (['--data-dir', 'nowhere'], '--data-dir nowhere: cannot read its folder train'),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(wrong, message, capsys, monkeypatch):
    monkeypatch.setattr(beside_timm, 'measure', None)
    assert beside_timm.main(['--timm-train', __file__, *wrong]) != 0
    assert message in capsys.readouterr().err


def test_ratios_are_those_of_medians_to_the_first_program():
    found = {'a': [beside_timm.Measured(s, 2**20) for s in (1.0, 2.0, 9.0)], 'b': [beside_timm.Measured(4.0, 2**21)]}
    a, b = beside_timm.rows(found, 100)
    assert (a['images/s'], b['images/s'], b["×timm's"], b["memory ×timm's"]) == (50, 25, 0.5, 2)
    assert beside_timm.rows({'a': [beside_timm.Measured(1.0, None)]}, 100)[0]['memory, MiB'] == ''
