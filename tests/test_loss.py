"""The criteria: published values, numerics, and the table."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from timm_rld.config import parse_args
from timm_rld.loss import CRITERIA, create_distill_loss, masked_correlation_loss, sample_confidence_loss
from timm_rld.loss.la import swap_top_and_true

FOLDER = Path(__file__).parent / 'golden'
CASES = [
    case
    for file in ('criteria_golden.json', 'criteria2_golden.json')
    for case in json.loads((FOLDER / file).read_text(encoding='utf-8'))
]
NAMES = [name for name, row in CRITERIA.items() if row.plain]
GOLDEN = [(i, name) for i, case in enumerate(CASES) for name in case['criteria']]
# Where an exponent of abkd is 0 the published program has this factor (alpha here) times the limit of its formula.
TIMES_THE_LIMIT = {'abkd_beta_0': 0.5, 'abkd_sum_0': 0.5}


# What does not hold for all: rc and lr hold a cross-entropy of their own, ttm and wttm follow a transformed teacher,
# nkd, pld and ce_teacher are cross-entropies.
ZERO_AT_EQUAL_LOGITS = [n for n in NAMES if n not in ('rc', 'lr', 'ttm', 'wttm', 'nkd', 'pld', 'ce_teacher')]
# rc adds a logit to another, lr compares raw logits: a shift of one network's row changes them.
SHIFT_INVARIANT = [n for n in NAMES if n not in ('rc', 'lr')]
# lr, mlkd and dist use statistics of the batch.
MEAN_OVER_SAMPLES = [n for n in NAMES if n not in ('lr', 'mlkd', 'dist')]
# rc and atkd hold a part of the student fixed.
DIFFERENTIATED_WHOLE = [n for n in NAMES if n not in ('rc', 'atkd')]
STANDARDIZABLE = [n for n in NAMES if not CRITERIA[n].not_standardized]


def logits(b: int = 6, c: int = 10, scale: float = 3.0, dtype: torch.dtype = torch.float32):
    student = (scale * torch.randn(b, c)).to(dtype).requires_grad_()
    return student, (scale * torch.randn(b, c)).to(dtype), torch.randint(c, (b,))


def published(name: str, golden: dict):
    """The criterion of a golden value, in float64."""
    options = dict(golden['options'])
    criterion = golden.get('criterion', name.partition('_')[0])
    if criterion == 'gdkd3':
        criterion, options['groups'] = 'gdkd', 3
    made = create_distill_loss(criterion, **options).double()
    if criterion == 'ctkd':
        made.theta.data.fill_(golden['theta'])
        made.set_epoch(golden['epoch'])
    return made


@pytest.mark.parametrize(
    ('case', 'name'), [pytest.param(CASES[i], name, id=f'{CASES[i]["id"]}-{name}') for i, name in GOLDEN]
)
def test_value_and_gradient_are_the_published_programs(case, name):
    golden, times = case['criteria'][name], TIMES_THE_LIMIT.get(name, 1)
    student = torch.tensor(case['student'], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(case['teacher'], dtype=torch.float64)
    criterion = published(name, golden)
    loss = criterion(student, teacher, torch.tensor(case['target']))
    loss.backward()
    assert loss.dtype == torch.float64 and loss.ndim == 0
    close = functools.partial(pytest.approx, rel=1e-10, abs=1e-10)
    assert times * loss.item() == close(golden['loss'])
    assert (times * student.grad[0]).tolist() == close(golden['grad_row0'])
    assert times * student.grad.abs().sum().item() == close(golden['grad_sum_abs'])
    if 'theta' in golden:
        assert criterion.diagnostics['temperature'].item() == close(golden['temperature'])
        assert criterion.theta.grad.item() == close(golden['grad_theta'])


def test_every_criterion_has_golden_values():
    tested = {CASES[i]['criteria'][n].get('criterion', n.partition('_')[0]) for i, n in GOLDEN}
    assert tested == {*NAMES, 'gdkd3'} - {'ce_teacher'}  # which is torch's cross-entropy, as tested below


@pytest.mark.parametrize('name', DIFFERENTIATED_WHOLE)
def test_the_gradient_is_that_of_finite_differences(name):
    student, teacher, target = double_logits()
    criterion = create_distill_loss(name).double()
    assert torch.autograd.gradcheck(lambda s: criterion(s, teacher, target), student.requires_grad_())


def test_rld_is_its_definition_sample_by_sample():
    student, teacher, target = (x.detach().double() if x.is_floating_point() else x for x in logits(8, 7))
    scd = mcd = 0.0
    for s, t, y in zip(student, teacher, target):
        p, q = (t / 2).softmax(0).max(), (s / 2).softmax(0)[y]
        scd += 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()) / 8
        keep = t < t[y]
        if keep.any():
            p, q = (t[keep] / 2).softmax(0), (s[keep] / 2).softmax(0)
            mcd += 4 * (p * (p / q).log()).sum() / 8
    assert sample_confidence_loss(student, teacher, target, 2.0).item() == pytest.approx(float(scd), rel=1e-12)
    assert masked_correlation_loss(student, teacher, target, 2.0).item() == pytest.approx(float(mcd), rel=1e-12)
    got = create_distill_loss('rld', alpha=3, beta=5, temperature=2)(student, teacher, target)
    assert got.item() == pytest.approx(float(3 * scd + 5 * mcd), rel=1e-12)


@pytest.mark.parametrize('alpha_temperature', [2.0, 1.0])
def test_the_gradient_of_rld_is_that_of_its_two_terms(alpha_temperature):
    student, teacher, target = double_logits()
    target[0], target[1] = teacher[0].argmax(), teacher[1].argmin()
    student.requires_grad_()
    scd = sample_confidence_loss(student, teacher, target, alpha_temperature)
    mcd = masked_correlation_loss(student, teacher, target, 2.0)
    (expected,) = torch.autograd.grad(5 * (3 * scd + 7 * mcd), student)
    options = dict(alpha=3.0, beta=7.0, temperature=2.0, alpha_temperature=alpha_temperature)
    loss = create_distill_loss('rld', **options)(student, teacher, target)
    (got,) = torch.autograd.grad(5 * loss, student)
    assert loss.item() == pytest.approx((3 * scd + 7 * mcd).item(), rel=1e-12)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda s: create_distill_loss('rld', **options)(s, teacher, target), student)


def test_a_second_derivative_of_rld_is_an_error_and_not_a_wrong_number():
    student, teacher, target = logits()
    (gradient,) = torch.autograd.grad(create_distill_loss('rld')(student, teacher, target), student, create_graph=False)
    assert not gradient.requires_grad
    with pytest.raises(RuntimeError, match='no second derivative'):
        torch.autograd.grad(create_distill_loss('rld')(student, teacher, target), student, create_graph=True)


def test_masked_correlation_is_zero_where_the_true_class_is_ranked_last():
    student, teacher, _ = logits()
    student.grad = None
    loss = masked_correlation_loss(student, teacher, teacher.argmin(dim=1))
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().sum() == 0


def test_masked_classes_have_no_say_in_the_masked_correlation():
    student, teacher, target = logits()
    masked = teacher >= teacher.gather(1, target[:, None])
    other = torch.where(masked, student.detach() + 5 * torch.randn_like(teacher), student.detach())
    assert torch.allclose(
        masked_correlation_loss(student, teacher, target), masked_correlation_loss(other, teacher, target)
    )


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('margin', [1e2, 1e4])
@pytest.mark.parametrize('classes', [2, 10])
def test_loss_and_gradient_stay_finite_at_huge_margins(name, margin, classes):
    has_temperature = 'temperature' in CRITERIA[name].options
    for options in [{'temperature': 1.0}, {'temperature': 4.0}] if has_temperature else [{}]:
        student = torch.zeros(5, classes)
        student[:, 0] = margin
        student[4] = 0  # a constant row
        student.requires_grad_()
        teacher = torch.zeros(5, classes)
        teacher[:3, 1] = margin
        target = torch.tensor([0, 1, classes - 1, 0, 1])
        loss = create_distill_loss(name, **options)(student, teacher, target)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_the_float32_result_and_autocast_changes_nothing(name, dtype):
    student, teacher, target = logits(dtype=dtype)
    criterion = create_distill_loss(name)
    expected = criterion(student.detach().float(), teacher.float(), target)
    with torch.autocast('cpu', torch.bfloat16):
        got = criterion(student, teacher, target)
    assert got.dtype == torch.float32 and got.item() == expected.item()


@pytest.mark.parametrize('name', ZERO_AT_EQUAL_LOGITS)
def test_loss_is_zero_at_equal_logits_where_the_teacher_is_right(name):
    _, teacher, _ = double_logits()
    loss = create_distill_loss(name)(teacher, teacher, teacher.argmax(1))
    # dist adds 1e-8 to what it divides by
    assert loss.item() == pytest.approx(0, abs=1e-4 if name == 'dist' else 1e-12)


def double_logits():
    return (x.detach().double() if x.is_floating_point() else x for x in logits())


@pytest.mark.parametrize('name', SHIFT_INVARIANT)
def test_loss_does_not_change_when_a_row_is_shifted(name):
    student, teacher, target = double_logits()
    criterion = create_distill_loss(name)
    loss = criterion(student, teacher, target)
    assert criterion(student + 3, teacher - 2, target).item() == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize('name', NAMES)
def test_loss_does_not_change_when_classes_are_renamed(name):
    student, teacher, target = double_logits()
    criterion = create_distill_loss(name)
    loss = criterion(student, teacher, target)
    order = torch.randperm(10)
    renamed = criterion(student[:, order], teacher[:, order], order.argsort()[target])
    assert renamed.item() == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize('name', MEAN_OVER_SAMPLES)
def test_loss_is_the_mean_over_samples(name):
    student, teacher, target = logits(4)
    criterion = create_distill_loss(name)
    each = [criterion(student[i : i + 1], teacher[i : i + 1], target[i : i + 1]).item() for i in range(4)]
    assert criterion(student, teacher, target).item() == pytest.approx(sum(each) / 4, rel=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_no_gradient_flows_into_the_teacher(name):
    student, teacher, target = logits()
    teacher.requires_grad_()
    create_distill_loss(name)(student, teacher, target).backward()
    assert teacher.grad is None and student.grad is not None


def test_rld_reports_what_it_did():
    student, teacher, target = logits()
    target[0] = teacher[0].argmax()
    criterion = create_distill_loss('rld')
    loss = criterion(student, teacher, target)
    d = criterion.diagnostics
    assert not any(v.requires_grad for v in d.values())
    assert d['scd'] + 8 * d['mcd'] == pytest.approx(loss.item(), rel=1e-5)
    assert d['teacher_wrong'] == (teacher.argmax(1) != target).float().mean()
    assert d['masked_classes'] == (teacher >= teacher.gather(1, target[:, None])).float().sum(1).mean()


def test_alpha_temperature_is_the_temperature_unless_given():
    student, teacher, target = logits()
    a = create_distill_loss('rld', temperature=2.0)(student, teacher, target)
    b = create_distill_loss('rld', temperature=2.0, alpha_temperature=2.0)(student, teacher, target)
    c = create_distill_loss('rld', temperature=2.0, alpha_temperature=1.0)(student, teacher, target)
    assert a.item() == b.item() != c.item()


@pytest.mark.parametrize('name', NAMES)
def test_published_defaults_of_a_row_are_arguments_of_its_class(name):
    row = CRITERIA[name]
    assert create_distill_loss(name).name == name
    assert row.paper and row.year and row.summary


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: create_distill_loss('rdl'), "unknown criterion 'rdl' (did you mean 'rld'"),
        (lambda: create_distill_loss('rld', betta=1), "criterion 'rld' has no option 'betta' (did you mean 'beta'"),
        (
            lambda: create_distill_loss('kd', temperature=0),
            'temperature must be a positive number (1e-4 to 1e6), got 0',
        ),
        (
            lambda: create_distill_loss('rld', alpha_temperature='x'),
            "alpha_temperature must be a positive number (1e-4 to 1e6), got 'x'",
        ),
        (
            lambda: create_distill_loss('rld', alpha=float('nan')),
            'alpha must be a finite number of at least 0, got nan',
        ),
        (lambda: create_distill_loss('kd', standardize='false'), "standardize must be true or false, got 'false'"),
        (lambda: create_distill_loss('none'), "'none' distils nothing"),
    ],
)
def test_the_factory_says_what_is_wrong(call, message):
    with pytest.raises(ValueError) as e:
        call()
    assert message in str(e.value)


@pytest.mark.parametrize(
    ('student', 'teacher', 'target', 'message'),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), [0, 0], 'expected floating-point student logits [B, C]'),
        (torch.zeros(2, 3), torch.zeros(2, 4), [0, 0], "like the student's float32 [2, 3], got float32 [2, 4]"),
        (torch.zeros(2, 3), torch.zeros(2, 3), [0], 'expected class indices int64 [2] as target, got int64 [1]'),
        (torch.zeros(2, 3), torch.zeros(2, 3), [0, 3], 'expected targets in 0..2, got 0..3'),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            [[1.0, 0, 0], [0, 1, 0]],
            'a soft target: this criterion needs an index',
        ),
        (torch.zeros(2, 3), torch.full((2, 3), torch.nan), [0, 0], "the teacher's logits hold NaN or infinity"),
        (torch.zeros(2, 3), torch.full((2, 3), -torch.inf), [0, 0], "the teacher's logits hold NaN or infinity"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            [True, False],
            'expected class indices int64 [2] as target, got bool [2]',
        ),
        (torch.zeros(0, 3), torch.zeros(0, 3), [], 'with B >= 1, C >= 2, got float32 [0, 3]'),
        (torch.zeros(2, 3), torch.zeros(2, 3), None, 'got None'),
    ],
)
def test_bad_input_says_what_was_expected_and_what_came(student, teacher, target, message):
    target = None if target is None else torch.tensor(target)
    with pytest.raises(ValueError) as e:
        create_distill_loss('rld')(student, teacher, target)
    assert message in str(e.value)


@pytest.mark.parametrize('name', NAMES)
def test_a_batch_of_one_and_constant_rows_are_fine(name):
    for student in (torch.randn(1, 5), torch.zeros(1, 5)):
        for teacher in (torch.randn(1, 5), torch.zeros(1, 5)):
            s = student.clone().requires_grad_()
            loss = create_distill_loss(name)(s, teacher, torch.tensor([2]))
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(s.grad).all()


def test_rld_is_dkd_where_the_teacher_is_right_on_every_sample():
    student, teacher, _ = double_logits()
    target = teacher.argmax(1)
    a, b = (create_distill_loss(n)(student, teacher, target).item() for n in ('rld', 'dkd'))
    assert a == pytest.approx(b, rel=1e-12)


@pytest.mark.parametrize('name', STANDARDIZABLE)
def test_standardize_is_the_criterion_on_standardised_logits_and_multiplies_nothing(name):
    student, teacher, target = double_logits()
    s, t = ((z - z.mean(1, keepdim=True)) / (1e-7 + z.std(1, keepdim=True)) for z in (student, teacher))
    expected = create_distill_loss(name)(s, t, target)
    assert create_distill_loss(name, standardize=True)(student, teacher, target).item() == expected.item()


@pytest.mark.parametrize('name', [n for n in CRITERIA if n not in STANDARDIZABLE])
def test_standardize_is_refused_with_a_reason_where_it_makes_no_sense(name):
    with pytest.raises(
        ValueError, match=f"criterion '{name}' is not combined with standardize: {CRITERIA[name].not_standardized}"
    ):
        create_distill_loss(name, standardize=True)
    if name != 'none':
        create_distill_loss(name, standardize=False)


def test_exactly_these_criteria_are_standardised():
    assert set(STANDARDIZABLE) == {'kd', 'dkd', 'gdkd', 'rld', 'la', 'rc', 'mlkd', 'ctkd', 'ldrld'}


def test_wttm_is_its_definition_sample_by_sample():
    student, teacher, target = double_logits()
    total = 0.0
    for s, t in zip(student, teacher):
        powered = t.softmax(0) ** 0.3
        u = powered.sum()
        q = powered / u
        total += u * (q * (q.log() - s.log_softmax(0))).sum() / 6
    got = create_distill_loss('wttm', gamma=0.3, beta=2.0)(student, teacher, target)
    assert got.item() == pytest.approx(2 * total.item(), rel=1e-12)


def test_ctkd_is_kd_at_its_learned_temperature_and_learns_it_against_the_student():
    student, teacher, target = double_logits()
    student.requires_grad_()
    criterion = create_distill_loss('ctkd').double()
    plain = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    tau = 1 + 20 * plain.sigmoid()
    expected = 0.0
    for s, t in zip(student, teacher):
        p, q = (t / tau).softmax(0), (s / tau).softmax(0)
        expected = expected + tau**2 * (p * (p / q).log()).sum() / 6
    (g_theta, g_student) = torch.autograd.grad(expected, (plain, student))
    for epoch, factor in ((1, -(1 - math.cos(math.pi / 10)) / 2), (10, -1.0), (30, -1.0)):
        criterion.set_epoch(epoch)
        loss = criterion(student, teacher, target)
        got = torch.autograd.grad(loss, (criterion.theta, student))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        assert got[0].item() == pytest.approx(factor * g_theta.item(), rel=1e-9)
        assert torch.allclose(got[1], g_student)
    assert criterion.diagnostics['temperature'].item() == pytest.approx(tau.item())


def test_la_swaps_two_logits_and_no_others():
    _, teacher, target = double_logits()
    swapped = swap_top_and_true(teacher, target)
    assert torch.equal(swapped.argmax(1), target)
    assert torch.equal(swapped.sort(1).values, teacher.sort(1).values)
    assert ((swapped != teacher).sum(1) == 2 * (teacher.argmax(1) != target)).all()


@pytest.mark.parametrize('name', [n for n in NAMES if CRITERIA[n].imagenet])
def test_the_imagenet_flags_of_a_row_are_flags_that_it_takes(name):
    config = parse_args(['--distill', name, *CRITERIA[name].imagenet.split()])
    assert create_distill_loss(name, **config.distill_kwargs)


def test_kd_is_torchs_kl_divergence_times_temperature_squared():
    student, teacher, _ = logits()
    expected = 9 * F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction='batchmean')
    assert create_distill_loss('kd', temperature=3)(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


def test_ce_teacher_is_torchs_cross_entropy_with_the_teachers_class():
    student, teacher, target = double_logits()
    expected = F.cross_entropy(student, teacher.argmax(1))
    one_hot = F.one_hot(teacher.argmax(1), 10).double()
    for rows in (teacher, teacher.log_softmax(1), one_hot):
        assert create_distill_loss('ce_teacher')(student, rows).item() == expected.item()
