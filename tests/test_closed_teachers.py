"""Teachers that answer and show nothing else: what reaches the criterion, what is asked, what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from closed_teachers import probabilities
from torch import nn

from timm_rld import DistillationTask, QueryTeacher, create_distill_loss
from timm_rld.errors import UsageError
from timm_rld.loss import CRITERIA
from timm_rld.pairing import QueryError, Teacher, close_teacher, hard_rows, load_query, soft_rows

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'black_box.json').read_text(encoding='utf-8'))
SOFT = [name for name, row in CRITERIA.items() if row.cls and 'soft' in row.answers]


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
