"""Teachers that answer and show nothing else: what reaches the criterion, what is asked, what is refused."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from closed_teachers import images_asked, probabilities
from torch import nn

from timm_rld import DistillationTask, QueryTeacher, create_distill_loss, export_model
from timm_rld.cache import AnswersFile, answers_kind
from timm_rld.data import open_splits
from timm_rld.errors import UsageError, UserError
from timm_rld.loss import CRITERIA
from timm_rld.pairing import QueryError, Teacher, close_teacher, hard_rows, load_query, soft_rows
from train_distill import main

pytestmark = pytest.mark.usefixtures('forked_python')
ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'black_box.json').read_text(encoding='utf-8'))
SOFT = [name for name, row in CRITERIA.items() if row.plain and 'soft' in row.answers]


@pytest.fixture
def argv(folder, tmp_path, monkeypatch) -> list[str]:
    """A run of a second, asked through a function that lists its calls in `tmp_path/asked`."""
    monkeypatch.setenv('ASKED', str(tmp_path / 'asked'))
    return ['--teacher-query', 'closed_teachers:ask', '--student', 'cifar_resnet8', '--data-dir', str(folder),
            '--img-size', '16', '--epochs', '2', '-b', '8', '--workers', '0', '--lr', '0.01', '--cpu-threads', '1',
            '--no-speed', '--output', str(tmp_path)]  # fmt: skip


def student(run: Path) -> bytes:
    return (run / 'student' / 'model.safetensors').read_bytes()


def results(run: Path) -> dict:
    return json.loads((run / 'results.json').read_text(encoding='utf-8'))


def tensors(case: dict, *names: str) -> list[torch.Tensor]:
    return [torch.tensor(case[name], dtype=None if name == 'target' else torch.float64) for name in names]


# --------------------------------------------------------------------------------------- what reaches the criterion


@pytest.mark.parametrize('name', SOFT)
def test_probabilities_give_the_loss_and_gradient_of_the_logits(name):
    torch.manual_seed(1)
    student_logits, logits = 3 * torch.randn(6, 10).double(), 3 * torch.randn(6, 10).double()
    target, found = torch.randint(10, (6,)), []
    for rows in (logits, soft_rows(logits.softmax(1))):
        s = student_logits.clone().requires_grad_()
        loss = create_distill_loss(name).double()(s, rows, target)
        loss.backward()
        found.append((loss.detach(), s.grad))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-10, abs=1e-10)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('case', GOLDEN['soft'], ids=lambda c: c['id'])
def test_probabilities_give_the_published_values(case):
    s, t, y = tensors(case, 'student_logits', 'teacher_logits', 'target')
    for name, values in case['criteria'].items():
        made = create_distill_loss(name).double()
        assert made(s, soft_rows(t.softmax(1)), y).item() == pytest.approx(values['from_log_probabilities'], rel=1e-10)
        rows = soft_rows(t.softmax(1).float()).double()
        assert made(s, rows, y).item() == pytest.approx(values['from_float32_probabilities'], rel=1e-6)
        assert values['same'] == ('soft' in CRITERIA[name].answers)


def test_probabilities_below_the_floor_of_float32_tie():
    case = GOLDEN['floor']
    s, t, y = tensors(case, 'student_logits', 'teacher_logits', 'target')
    rows = soft_rows(t.softmax(1).float())
    assert rows.isfinite().all() and torch.allclose(rows.double(), tensors(case, 'log_of_floored')[0], atol=1e-5)
    rld = create_distill_loss('rld')
    assert rld(s, rows.double(), y).item() == pytest.approx(case['rld_from_floored']['loss'], rel=1e-6)
    assert rld.diagnostics['masked_classes'] == np.mean(case['rld_from_floored']['masked'])


def test_a_class_is_to_ce_teacher_what_it_is_to_wttm_at_the_limit():
    case = GOLDEN['hard_limits']
    (s,) = tensors(case, 'student_logits')
    rows = hard_rows(torch.tensor(case['teacher_class']), s.shape[1])
    assert create_distill_loss('ce_teacher')(s, rows.double()).item() == pytest.approx(case['wttm'] / 3, rel=1e-12)


# ----------------------------------------------------------------------------------------------- what answers


def test_a_closed_teacher_shows_nothing_of_its_network():
    network = Teacher(timm.create_model('test_resnet', num_classes=3).eval())
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    logits = network(pixels)
    soft, hard = close_teacher(network, 'soft'), close_teacher(network, 'hard')
    assert torch.allclose(soft(pixels).exp(), logits.softmax(1)) and soft(pixels).dtype == torch.float32
    assert torch.equal(hard(pixels), nn.functional.one_hot(logits.argmax(1), 3).float())
    assert torch.equal(soft(pixels + 0.3), soft(pixels))  # an image is uint8
    assert (soft.queries.count, hard.queries.count) == (20, 5)
    for closed in (soft, hard):
        assert not list(closed.parameters()) and not closed.state_dict() and list(closed.modules()) == [closed]
        assert not any(isinstance(value, nn.Module) for value in vars(closed).values())
        assert not hasattr(closed, 'model') and not hasattr(closed, 'normalize')


def test_the_network_of_a_closed_teacher_moves_with_it():
    network = Teacher(timm.create_model('test_resnet', num_classes=3).eval())
    nn.ModuleList([close_teacher(network, 'soft')]).to('meta')
    assert {t.device.type for t in (*network.parameters(), *network.buffers())} == {'meta'}


def test_a_function_is_a_teacher_without_weights_or_a_network_of_timm(monkeypatch):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    monkeypatch.setattr(timm, 'create_model', lambda *_, **__: pytest.fail('a network was made'))
    teacher = QueryTeacher(probabilities, num_classes=3)
    pixels = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    rows = teacher(pixels)
    assert np.allclose(rows.exp(), probabilities(pixels.permute(0, 2, 3, 1).numpy()), atol=1e-6)
    task = DistillationTask(net, teacher, 'rld', normalize=lambda x: x / 255)
    loss = task(pixels, torch.tensor([0, 1, 2, 0, 1, 2]))
    loss['loss'].backward()
    assert net[1].weight.grad.abs().sum() > 0 and teacher.queries.count == 12 and not list(teacher.parameters())
    assert torch.equal(QueryTeacher(probabilities, 3, 'hard')(pixels), hard_rows(rows.argmax(1), 3))


@pytest.mark.parametrize(
    ('function', 'answers', 'message'),
    [
        ('unnormalised', 'soft', 'expected rows that sum to 1, one sums to 0.9'),
        ('not_a_number', 'soft', 'the probabilities hold NaN or infinity'),
        ('other_classes', 'soft', 'expected floating-point probabilities [2, 3], got float64 [2, 4]'),
        ('other_classes', 'hard', 'probabilities [2, 3] or classes [2] of integers, got float64 [2, 4]'),
        ('classes', 'soft', 'the answer is a class (int64 [2]), not probabilities; --black-box hard takes it'),
        ('out_of_range', 'hard', 'expected classes from 0 to 2, got 3 to 3'),
    ],
)
def test_an_answer_that_is_none_is_an_error_that_says_what_is_wrong(function, answers, message):
    teacher = QueryTeacher(load_query(f'closed_teachers:{function}'), 3, answers, name='it')
    with pytest.raises(QueryError) as e:
        teacher(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert message in str(e.value) and str(e.value).startswith('it: asked about 2 image(s): ')
    assert teacher.queries.count == 0


def test_a_call_that_fails_is_repeated_and_then_an_error(monkeypatch):
    calls, said = [], []

    def flaky(images):
        calls.append(len(images))
        if len(calls) < 3:
            raise TimeoutError('busy')
        return probabilities(images)

    monkeypatch.setattr(QueryTeacher, 'first_wait', 0.001)
    teacher = QueryTeacher(flaky, 3, name='it', retries=2, log=said.append)
    assert teacher(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).shape == (2, 3) and calls == [2, 2, 2]
    assert said == [
        f'note: it: asked about 2 image(s): TimeoutError: busy; asking again in {w} s' for w in (0.001, 0.002)
    ]
    teacher, calls[:] = QueryTeacher(flaky, 3, name='it', retries=1, log=said.append), []
    with pytest.raises(QueryError, match=r'TimeoutError: busy; attempt 2 of 2 \(--query-retries\)'):
        teacher(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_a_call_that_takes_too_long_is_given_up():
    teacher = QueryTeacher(lambda images: time.sleep(5), 3, retries=0, timeout=0.05)
    began = time.monotonic()
    with pytest.raises(QueryError, match=r'no answer within 0.05 s \(--query-timeout\)'):
        teacher(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('closed_teachers', 'expected MODULE:FUNCTION, as in my_service:ask'),
        ('no_such_module:ask', 'no_such_module cannot be imported (ModuleNotFoundError'),
        ('closed_teachers:aks', 'closed_teachers has no aks'),
        ('closed_teachers:not_callable', 'not_callable is not a function but a int'),
        ('closed_teachers:two_arguments', 'is called with the images alone, but takes (images, temperature)'),
    ],
)
def test_a_function_that_cannot_be_had_is_refused(path, message):
    with pytest.raises(UsageError) as e:
        load_query(path)
    assert str(e.value).startswith(f'--teacher-query {path}: ') and message in str(e.value)


# ----------------------------------------------------------------------------------------------------------- refused

TIMM = ['--teacher', 'resnet34', '--student', 'resnet18']
QUERY = ['--teacher-query', 'closed_teachers:ask', '--student', 'resnet18']


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ([*TIMM, '--black-box', 'soft', '--distill', 'lr'], 'with --black-box soft: it compares raw logits'),
        *(
            ([*TIMM, '--black-box', 'hard', '--distill', name], '--distill mekd or ce_teacher')
            for name, row in CRITERIA.items()
            if row.plain and 'hard' not in row.answers
        ),
        ([*TIMM, '--black-box', 'hard', '--distill', 'ce_teacher', '--teacher-class-map', 'auto'], 'no counterpart'),
        ([*TIMM, *QUERY], '--teacher resnet34 with --teacher-query closed_teachers:ask: there is one teacher'),
        ([*TIMM, '--max-queries', '9'], '--max-queries 9: needs --black-box or --teacher-query'),
        ([*TIMM, '--query-retries', '9'], '--query-retries 9: needs --teacher-query'),
        (['--student', 'resnet18', '--distill', 'none', '--black-box', 'soft'], '--black-box soft: needs --teacher'),
        ([*QUERY, '--teacher-epochs', '3'], 'closed_teachers:ask cannot be trained'),
        ([*QUERY, '--teacher-checkpoint', 'x'], 'has no network; remove it'),
        (['--teacher-answers', 'x.csv', '--student', 'resnet18', '--mixup', '0.2'], 'and not for mixed ones'),
        (['--teacher-answers', 'x.csv', '--student', 'resnet18', '--teacher-cache', 'c'], 'on the disk already'),
        (['--teacher-answers', 'x.csv', '--student', 'resnet18', '--on-bad-image', 'skip'], 'answer belongs to'),
        (['--teacher-answers', 'x.csv', '--student', 'resnet18', '--max-queries', '9'], 'needs --black-box or'),
    ],
)
def test_what_a_closed_teacher_cannot_do_is_refused(flags, message, capsys):
    assert main([*flags, '--data-dir', '.']) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('verb', ['compare', 'tune'])
def test_a_comparison_with_a_criterion_that_it_cannot_have_is_refused_before_it_starts(verb, tmp_path, capsys):
    from timm_rld.__main__ import main as tools

    flags = [*TIMM, '--data-dir', '.', '--black-box', 'hard']
    assert tools([verb, '--criteria', 'ce_teacher', 'kd', '--output', str(tmp_path / 'out'), *flags]) == 2
    assert '--criteria kd: ' in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_a_comparison_whose_teacher_shows_no_features_is_refused_before_it_starts(tmp_path, capsys):
    from timm_rld.__main__ import main as tools

    flags = [*TIMM, '--data-dir', '.', '--black-box', 'soft']
    assert tools(['compare', '--criteria', 'rld', 'rld+at', '--output', str(tmp_path / 'out'), *flags]) == 2
    said = capsys.readouterr().err
    assert '--criteria rld+at: --feature-distill at with --black-box soft' in said and not (tmp_path / 'out').exists()


def test_a_service_that_is_down_at_the_start_is_one_error(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('DOWN', str(tmp_path))
    assert main([*argv, '--experiment', 'x']) == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and 'ConnectionRefusedError: the service is down' in err
    assert 'apple/000.png' in err and 'attempt' not in err and 'note' not in out and not (tmp_path / 'x').exists()


# -------------------------------------------------------------------------------------------------------------- runs


def test_the_student_is_the_same_however_many_batches_are_asked_about_at_once(argv, tmp_path, capsys):
    """... and with accumulation, and with answers kept in a cache."""
    exact = ['--teacher-cache-dtype', 'float32', '--teacher-cache-views', '2']
    runs = {
        'each': ['--query-workers', '0'],
        'ahead': ['--query-workers', '3', '--workers', '1'],
        'cached': ['--query-workers', '1', '--teacher-cache', str(tmp_path / 'cache'), *exact],
        'again': ['--query-workers', '2', '--teacher-cache', str(tmp_path / 'cache'), *exact],
    }
    for name, flags in runs.items():
        before = images_asked(tmp_path / 'asked')
        assert main([*argv, '--grad-accum-steps', '2', *flags, '--experiment', name]) == 0
        asked = images_asked(tmp_path / 'asked') - before
        # eight images twice, the validation images, forty training images an epoch (one is left out, which a cache
        # asks about too); a complete cache asks about none
        left_out = 2 if name == 'cached' else 0
        assert asked == results(tmp_path / name).get('queries') == (0 if name == 'again' else 116 + left_out)
        assert student(tmp_path / name) == student(tmp_path / 'each')
    assert 'the teacher is not asked' in capsys.readouterr().out
    teacher = results(tmp_path / 'ahead')['models']['teacher']
    assert teacher['answers'] == 'soft' and teacher['top1'] == 100 and 'parameters' not in teacher


@pytest.mark.slow
def test_mixed_images_are_asked_about_as_they_are_trained_on(argv, tmp_path):
    for name in ('0', '2'):
        mixed = ['--mixup', '0.4', '--cutmix', '1', '--epochs', '1']
        assert main([*argv, *mixed, '--query-workers', name, '--experiment', name]) == 0
    assert student(tmp_path / '0') == student(tmp_path / '2')


def test_the_budget_ends_a_run_before_the_step_that_would_pass_it_and_a_larger_one_resumes(argv, tmp_path, capsys):
    assert main([*argv, '--experiment', 'whole']) == 0
    total = images_asked(tmp_path / 'asked')
    (tmp_path / 'asked').unlink()
    argv = [*argv, '--experiment', 'parts', '--resume', 'auto']
    assert main([*argv, '--max-queries', '95']) == 1  # 16 at the start, 20 for validation, 7 batches of 8
    assert images_asked(tmp_path / 'asked') == 92
    said = capsys.readouterr()
    assert '--max-queries: 92 are used, and the next step needs 8 more; stopped in epoch 2' in said.err
    assert '--max-queries N continues' in said.err and 'Traceback' not in said.err
    assert main([*argv, '--max-queries', '95']) == 1 and images_asked(tmp_path / 'asked') == 92
    assert '--max-queries 95: 92 are used already' in capsys.readouterr().err
    assert main([*argv, '--max-queries', '1000']) == 0
    assert student(tmp_path / 'parts') == student(tmp_path / 'whole')
    assert images_asked(tmp_path / 'asked') == results(tmp_path / 'parts')['queries'] == total + 36
    assert 'the teacher was asked about 152 image(s)' in capsys.readouterr().out


def test_a_budget_that_the_validation_images_would_pass_is_refused_before_they_are_asked_about(argv, tmp_path, capsys):
    assert main([*argv, '--experiment', 'x', '--max-queries', '30']) == 1
    assert 'the validation images need 20 more' in capsys.readouterr().err and images_asked(tmp_path / 'asked') == 16


def test_a_service_that_fails_leaves_a_checkpoint_and_what_it_said_is_not_asked_again(
    argv, tmp_path, monkeypatch, capsys
):
    cache = ['--teacher-cache', str(tmp_path / 'cache'), '--teacher-cache-dtype', 'float32']
    monkeypatch.setattr(QueryTeacher, 'first_wait', 0.001)
    assert main([*argv, '--experiment', 'whole', '--query-retries', '1']) == 0
    (tmp_path / 'asked').unlink()
    argv = [*argv, *cache, '--query-retries', '1', '--experiment', 'parts', '--resume', 'auto']
    monkeypatch.setenv('DOWN', str(tmp_path / 'down'))
    for calls in (4, 9):  # within the validation, and within the first epoch
        monkeypatch.setenv('DOWN_AFTER', str(calls))
        (tmp_path / 'down').touch()
        assert main(argv) == 1
        said = capsys.readouterr()
        assert 'the service is down; attempt 2 of 2' in said.err and len(said.err.splitlines()) == 1
        assert 'the service is down; asking again in 0.001 s' in said.out
        (tmp_path / 'down').unlink()
    assert '(epoch 1, batch ' in said.err and '.png' in said.err and '--resume' in said.err
    assert main(argv) == 0
    assert 'resuming in epoch 1' in capsys.readouterr().out
    assert student(tmp_path / 'parts') == student(tmp_path / 'whole')
    # eight images twice at the first start and once at each other, and every other image once
    assert images_asked(tmp_path / 'asked') == 16 + 8 + 8 + 20 + 82 == results(tmp_path / 'parts')['queries']


def test_another_function_is_not_served_from_the_cache(argv, tmp_path, capsys):
    argv = [*argv, '--teacher-cache', str(tmp_path / 'cache'), '--epochs', '1', '--max-queries', '60']
    assert main([*argv, '--experiment', 'a']) == 1  # out of queries
    body = json.loads((tmp_path / 'cache' / 'cache.json').read_text())
    body['answers'] = body['answers'][1:] + body['answers'][:1]  # as another service would answer
    (tmp_path / 'cache' / 'cache.json').write_text(json.dumps(body))
    capsys.readouterr()
    assert main([*argv, '--experiment', 'b']) == 1
    assert 'the answers there are of another teacher' in capsys.readouterr().err
    assert main([*argv, '--experiment', 'c', '--teacher-query', 'closed_teachers:fickle']) == 1
    assert '--teacher-query closed_teachers:ask, not closed_teachers:fi' in capsys.readouterr().err


def test_answers_that_change_are_a_note(argv, capsys):
    argv = [*argv, '--teacher-query', 'closed_teachers:fickle', '--max-queries', '37', '--min-teacher-acc', '0']
    assert main(argv) == 1
    assert 'says something else when it is asked again about the same images' in capsys.readouterr().out


@pytest.mark.slow
def test_a_class_alone_trains_and_a_report_an_evaluation_and_a_card_say_what_it_is(argv, tmp_path, capsys):
    import pyarrow.parquet as pq

    from timm_rld.__main__ import main as tools
    from timm_rld.hub.card import card_section
    from timm_rld.run_folder import read_run

    hard = ['--black-box', 'hard', '--distill', 'ce_teacher', '--teacher-query', 'closed_teachers:classes']
    assert main([*argv, *hard, '--experiment', 'run']) == 0
    run = tmp_path / 'run'
    found = results(run)
    assert set(found['models']['teacher']) == {'answers', 'top1', 'top1_interval', 'macro_top1'}
    assert found['teacher'] == 'closed_teachers:classes' and found['teacher_top1'] == 100
    table = pq.read_table(run / 'predictions.parquet').to_pydict()
    assert table['teacher_top1'] == table['target'] and all(np.isnan(table['teacher_top1_prob']))
    assert tools(['report', str(run)]) == 0
    assert not re.search(r'\bnan\b', (run / 'report.html').read_text(encoding='utf-8'))
    assert 'of which nothing was used but its classes' in card_section(read_run(run), 'me/it', 'last', False)
    assert tools(['evaluate', str(run), '--no-speed', '--workers', '0']) == 0
    assert tools(['evaluate', str(run), '--no-speed', '--teacher', 'closed_teachers:classes']) == 2
    assert 'cannot be evaluated again' in capsys.readouterr().err


def test_a_closed_network_distils_as_the_open_one(folder, trained_teacher, tmp_path):
    argv = ['--teacher', f'local-dir:{trained_teacher}', '--student', 'cifar_resnet8', '--data-dir', str(folder),
            '--img-size', '32', '--epochs', '1', '-b', '8', '--workers', '0', '--lr', '0.01', '--cpu-threads', '1',
            '--min-teacher-acc', '0', '--no-speed', '--output', str(tmp_path)]  # fmt: skip
    rows = []
    for name, flags in (('open', []), ('closed', ['--black-box', 'soft', '--max-queries', '60'])):
        assert main([*argv, *flags, '--experiment', name]) == 0
        (row,) = csv.DictReader((tmp_path / name / 'summary.csv').open())
        rows.append({k: float(v) for k, v in row.items() if 'second' not in k})
    for key, value in rows[0].items():
        assert rows[1][key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
    one, two = (results(tmp_path / name) for name in ('open', 'closed'))
    assert one['teacher_sha256'] == two['teacher_sha256'] and two['queries'] == 60
    assert 'parameters' in one['models']['teacher'] and 'parameters' not in two['models']['teacher']


@pytest.mark.slow
def test_two_processes_share_a_budget_and_what_was_stopped_and_killed_ends_as_what_was_not(fork_server, argv, tmp_path):
    argv = [*argv, '-b', '4', '--experiment']
    env = {'ASKED': str(tmp_path / 'asked'), 'PYTHONPATH': str(Path(__file__).parent)}
    fork_server.run([*argv, 'whole'], tmp_path / 'log', processes=2, env=env)
    assert images_asked(tmp_path / 'asked') == results(tmp_path / 'whole')['queries'] == 116
    (tmp_path / 'asked').unlink()
    cache = ['--teacher-cache', str(tmp_path / 'cache'), '--teacher-cache-dtype', 'float32']
    argv = [*argv, 'parts', '--resume', 'auto', '--checkpoint-interval', '2', *cache, '--max-queries']
    training = fork_server.start([*argv, '95'], tmp_path / 'log', processes=2, env=env)
    assert training.wait() == [1, 1] and images_asked(tmp_path / 'asked') == 92
    assert '--max-queries: 92 are used, and the next step needs 8 more; stopped in epoch 2' in training.output()
    calls = (tmp_path / 'asked').read_text().count('\n')
    training = fork_server.start([*argv, '1000'], tmp_path / 'log', processes=2, env={**env, 'SLOW': '0.05'})
    until = time.monotonic() + 240
    while (tmp_path / 'asked').read_text().count('\n') < calls + 4:  # the eight images, and a step
        assert time.monotonic() < until, training.output()
        time.sleep(0.01)
    training.signal(signal.SIGKILL)
    training.wait()
    fork_server.run([*argv, '1000'], tmp_path / 'log', processes=2, env=env)
    assert student(tmp_path / 'parts') == student(tmp_path / 'whole')
    lost = 3 * 8  # of each process what it was asking about, asked ahead, and had not written yet
    assert 116 + 2 * 8 <= images_asked(tmp_path / 'asked') <= 116 + 2 * 8 + lost
    assert 116 + 2 * 8 - lost <= results(tmp_path / 'parts')['queries'] <= images_asked(tmp_path / 'asked')


@pytest.fixture
def service(tmp_path):
    """Starts the service of examples/query_teacher with a small network."""
    pytest.importorskip('fastapi')
    pytest.importorskip('uvicorn')
    torch.manual_seed(3)
    config = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation='bicubic', crop_pct=1.0)
    network = timm.create_model('cifar_resnet8', num_classes=10)
    model = export_model(network, tmp_path / 'teacher', data_config=config)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    started: list[subprocess.Popen] = []

    def start() -> subprocess.Popen:
        words = ['examples/query_teacher/service.py', '--model', f'local-dir:{model}', '--port', str(port)]
        started.append(subprocess.Popen([sys.executable, *words], cwd=ROOT))
        until = time.monotonic() + 120
        while time.monotonic() < until and started[-1].poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=5):
                return started[-1]
            time.sleep(0.1)
        raise AssertionError('the service did not start')

    yield start, f'http://127.0.0.1:{port}'
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_example_is_a_teacher_that_may_die_and_come_back(service, fork_server, tmp_path):
    start, url = service
    argv = ['--teacher-query', 'examples.query_teacher.client:ask', '--student', 'cifar_resnet8', '--epochs', '1',
            '--min-teacher-acc', '0', '--workers', '0', '--cpu-threads', '1', '--no-speed', '--query-retries', '1',
            '--output', str(tmp_path), '--teacher-cache', str(tmp_path / 'cache'), '--teacher-cache-dtype', 'float32',
            '--resume', 'auto', '--experiment']  # fmt: skip
    env = {'QUERY_TEACHER_URL': url}
    process, run = start(), fork_server.start([*argv, 'parts'], tmp_path / 'log', env=env)
    count = tmp_path / 'parts' / 'queries-0.txt'
    until = time.monotonic() + 240
    while not count.exists() or int(count.read_text() or 0) < 800:  # beyond the validation images
        assert time.monotonic() < until and run.output().count('error') == 0, run.output()
        time.sleep(0.02)
    process.kill()
    assert run.wait() == [1], run.output()
    assert 'Connection refused' in run.output() and 'attempt 2 of 2' in run.output()
    start()
    fork_server.run([*argv, 'parts'], tmp_path / 'log', env=env)
    assert 'student: resuming in epoch 1' in run.output()
    asked = results(tmp_path / 'parts')['queries']
    assert 1437 + 360 + 24 <= asked <= 1437 + 360 + 24 + 2 * 64
    shutil.rmtree(tmp_path / 'cache')
    fork_server.run([*argv, 'whole', '--query-workers', '0'], tmp_path / 'log', env=env)
    assert student(tmp_path / 'parts') == student(tmp_path / 'whole')


def test_the_answer_of_the_example_for_an_image_does_not_depend_on_the_others():
    pytest.importorskip('fastapi')
    pytest.importorskip('uvicorn')
    from examples.query_teacher.service import answer_for

    network = timm.create_model('test_resnet', num_classes=3).eval()
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    together = answer_for(Teacher(network), images)
    assert together.shape == (7, 3) and np.allclose(together.sum(axis=1), 1)
    assert np.array_equal(together, np.concatenate([answer_for(Teacher(network), images[i : i + 1]) for i in range(7)]))


# ------------------------------------------------------------------------------------------------- files of answers


def answers_of(folder: Path, splits: tuple[str, ...], hard: bool = False) -> list[dict]:
    """What `ask` says of the pictures of `folder`, a row each."""
    from PIL import Image

    rows = []
    for split in splits:
        for path in sorted((folder / split).rglob('*.png')):
            p = probabilities(np.asarray(Image.open(path).convert('RGB'))[None])[0]
            answer = {'class': ('apple', 'pear', 'plum')[p.argmax()]} if hard else {'probabilities': p.tolist()}
            rows.append({'file': str(path.relative_to(folder / split)), 'split': split, **answer})
    return rows


def write(path: Path, rows: list[dict]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == '.parquet':
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)
    with path.open('w', encoding='utf-8', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.fixture
def from_file(folder, tmp_path):
    return ['--student', 'cifar_resnet8', '--data-dir', str(folder), '--img-size', '12', '--epochs', '1', '-b', '8',
            '--workers', '0', '--lr', '0.01', '--cpu-threads', '1', '--no-speed', '--no-aug',
            '--output', str(tmp_path), '--teacher-answers']  # fmt: skip


def test_a_file_of_answers_is_the_teacher_that_gave_them(folder, from_file, tmp_path, capsys):
    """As long as no image is augmented it says what the function says, whatever the file's form."""
    rows = answers_of(folder, ('train', 'validation'))
    order = {str(p.relative_to(folder / 'train')): i for i, p in enumerate(sorted((folder / 'train').rglob('*.png')))}
    by_column = [
        {'file': f'{r["split"]}/{r["file"]}', **dict(zip(('plum', 'apple', 'pear'), np.roll(r['probabilities'], 1)))}
        for r in rows
    ]
    by_index = [{'index': order[r['file']], 'probabilities': ' '.join(map(str, r['probabilities']))}
                for r in rows if r['split'] == 'train']  # fmt: skip
    files = {'parquet': write(tmp_path / 'a.parquet', rows), 'columns': write(tmp_path / 'b.csv', by_column),
             'index': write(tmp_path / 'c.csv', by_index)}  # fmt: skip
    *flags, _ = from_file
    assert main([*flags, '--teacher-query', 'closed_teachers:ask', '--experiment', 'function']) == 0
    for name, file in files.items():
        assert main([*from_file, file, '--experiment', name]) == 0
        assert student(tmp_path / name) == student(tmp_path / 'function')
    said = capsys.readouterr().out
    assert 'probabilities of 41 training images, each used for every augmented version of it' in said
    assert '20 of 20 validation images have no answer, so the teacher is not checked' in said
    assert results(tmp_path / 'parquet')['teacher_top1'] == 100 and results(tmp_path / 'index')['teacher_top1'] is None
    assert results(tmp_path / 'parquet')['teacher'] == 'a.parquet' and 'queries' not in results(tmp_path / 'parquet')


def test_a_file_of_classes_needs_no_flag_and_a_changed_one_does_not_resume(folder, from_file, tmp_path, capsys):
    rows = answers_of(folder, ('train',), hard=True)
    file = write(tmp_path / 'a.csv', rows)
    assert main([*from_file, file, '--experiment', 'x']) == 2
    assert 'with --black-box hard' in capsys.readouterr().err
    argv = [*from_file, file, '--distill', 'ce_teacher', '--experiment', 'x', '--resume', 'auto']
    assert main(argv) == 0
    write(tmp_path / 'a.csv', [{**row, 'class': 'plum'} for row in rows])
    (tmp_path / 'x' / 'results.json').unlink()
    assert main(argv) == 1 and '--teacher-answers (a digest)' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda rows: rows[3:], 'lacks 3 of 41 training images: apple/000.png, apple/003.png, apple/006.png'),
        (lambda rows: [*rows, rows[0]], 'has two answers for apple/000.png'),
        (lambda rows: [{**rows[0], 'probabilities': [0.5, 0.5, 0.5]}, *rows[1:]], 'apple/000.png: expected rows that'),
        (lambda rows: [{**r, 'probabilities': [0.5, 0.5]} for r in rows], 'probabilities [1, 3], got float32 [1, 2]'),
        (
            lambda rows: [{'file': f'train/{r["file"]}'} for r in rows],
            'needs a column class, a column probabilities, or',
        ),
        (
            lambda rows: [{k: r[k] for k in ('file', 'probabilities')} for r in rows],
            'is a training and a validation image',
        ),
        (lambda rows: [{'probabilities': r['probabilities']} for r in rows], 'needs a column file'),
        (
            lambda rows: [{'file': r['file'], 'split': r['split'], 'class': 'fig'} for r in rows],
            "holds 'fig', neither a class of the dataset nor a number",
        ),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_image(folder, from_file, tmp_path, change, message, capsys):
    rows = change(answers_of(folder, ('train',)))
    hard = ['--distill', 'ce_teacher'] if 'class' in rows[0] else []
    assert main([*from_file, write(tmp_path / 'a.parquet', rows), *hard, '--experiment', 'x']) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('by', ['index', 'file'])
@pytest.mark.parametrize('part', [dict(train_fraction=0.5), dict(val_fraction=0.2), dict(skip_list='skip.txt')])
def test_a_part_of_a_split_has_the_answers_of_its_own_images(folder, tmp_path, part, by):
    """... whether they are told by name or by place in the split, and the images that the part lacks are no strangers
    to the dataset."""
    if 'skip_list' in part:
        (tmp_path / 'skip.txt').write_text('train/apple/000.png\ntrain/pear/001.png\n')
        part = dict(skip_list=str(tmp_path / 'skip.txt'))
    rows = answers_of(folder, ('train',))
    of_image = {r['file']: torch.tensor(r['probabilities']) for r in rows}
    files = sorted(of_image)
    rows = [{by: files.index(r['file']) if by == 'index' else r['file'], 'split': 'train',
             'probabilities': r['probabilities']} for r in rows]  # fmt: skip
    train, val = open_splits(None, data_dir=str(folder), **part)
    said: list[str] = []
    answers = AnswersFile(write(tmp_path / 'a.parquet', rows), train, val, 'soft', said.append)
    found = answers.logits(1, torch.arange(len(train)), torch.zeros(len(train))).exp()
    assert len(train) < 41
    assert torch.allclose(found, torch.stack([of_image[train.key(i)] for i in range(len(train))]), atol=1e-6)
    assert answers.has_validation == ('val_fraction' in part)
    if 'skip_list' not in part:
        assert not any('are not in this dataset' in line for line in said)


@pytest.mark.parametrize('columns', ['list', 'numbered', 'named'])
def test_a_column_of_classes_beside_probabilities_is_not_taken_for_the_answers(folder, tmp_path, columns):
    rows = [{**r, 'label': 'apple'} for r in answers_of(folder, ('train',))]
    splits = open_splits(None, data_dir=str(folder))
    if columns != 'list':
        names = ['p0', 'p1', 'p2'] if columns == 'numbered' else splits[0].class_names
        for row in rows:
            row.update(zip(names, row.pop('probabilities')))
    file = write(tmp_path / 'a.parquet', rows)
    assert answers_kind(file) == ('soft' if columns != 'named' else 'hard'), "names of classes are the dataset's"
    assert answers_kind(file, 'soft') == 'soft'
    for kind in ('soft', 'hard'):
        answers = AnswersFile(file, *splits, kind, lambda _: None).logits(1, torch.arange(41), torch.zeros(41))
        shares = (answers.exp() if kind == 'soft' else answers).mean(dim=0)
        assert torch.allclose(shares, torch.ones(3) / 3, atol=0.1)


def test_classes_are_no_probabilities_whatever_stands_beside_them(folder, tmp_path):
    rows = [{'file': r['file'], 'split': 'train', 'class': 'apple', 'note': 1, 'seen': 2}
            for r in answers_of(folder, ('train',))]  # fmt: skip
    file = write(tmp_path / 'a.parquet', rows)
    assert answers_kind(file, 'soft') == 'soft'  # as they might be the classes' columns
    with pytest.raises(UserError, match='holds classes and no probabilities; --black-box hard takes them'):
        AnswersFile(file, *open_splits(None, data_dir=str(folder)), 'soft', lambda _: None)


def test_images_of_a_file_that_are_not_in_the_dataset_are_counted(folder, from_file, tmp_path, capsys):
    rows = [*answers_of(folder, ('train',)), {'file': 'fig/1.png', 'split': 'train', 'probabilities': [1.0, 0.0, 0.0]}]
    assert main([*from_file, write(tmp_path / 'a.parquet', rows), '--experiment', 'x']) == 0
    assert '1 of its images are not in this dataset: fig/1.png' in capsys.readouterr().out
