"""Options of the criteria: how many classes they take, their limits, and what they are at special values."""

from __future__ import annotations

import pytest
import torch

from timm_rld.errors import UsageError
from timm_rld.loss import CRITERIA, abkd_loss, choose_criterion, create_distill_loss, kd_loss


def double_logits(b: int = 5, c: int = 7, scale: float = 3.0):
    student, teacher = (scale * torch.randn(b, c, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(c, (b,))


def kl(q, p):
    """KL(q ‖ p) of two distributions `[C]`."""
    return (q * (q / p).log()).sum()


# ------------------------------------------------------------------------------------------------- how many classes


@pytest.mark.parametrize(
    ('name', 'options', 'classes', 'message'),
    [
        ('gdkd', {'top_k': 5}, 5, 'gdkd: top_k=5 does not fit 5 classes; 1 to 4 do'),
        ('gdkd', {'top_k': 5}, 2, 'gdkd: top_k=5 does not fit 2 classes; 1 does'),
        ('gdkd', {'top_k': 9, 'groups': 3}, 5, 'gdkd with groups=3: top_k=9 does not fit 5 classes; 2 to 4 do'),
        ('gdkd', {'groups': 3}, 2, 'gdkd with groups=3 needs at least 3 classes, got 2'),
        ('ldrld', {'top_k': 7}, 6, 'ldrld: top_k=7 does not fit 6 classes; 2 to 6 do'),
    ],
)
def test_a_top_k_that_does_not_fit_is_an_error_that_says_which_do(name, options, classes, message):
    student, teacher, target = double_logits(c=classes)
    criterion = create_distill_loss(name, **options)
    for call in (lambda: criterion(student, teacher, target), lambda: criterion.check_classes(classes)):
        with pytest.raises(UsageError) as e:
            call()
        assert str(e.value) == message


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('gdkd', {'top_k': 0}, 'top_k must be a whole number of at least 1, got 0'),
        ('gdkd', {'top_k': 1, 'groups': 3}, 'top_k must be a whole number of at least 2, got 1'),
        ('gdkd', {'groups': 4}, 'groups must be 2 or 3, got 4'),
        ('gdkd', {'kl_type': 'backward'}, "kl_type must be forward, reverse or both, got 'backward'"),
        ('gdkd', {'strategy': 'first'}, "strategy must be best or worst, got 'first'"),
        ('ldrld', {'top_k': 2.5}, 'top_k must be a whole number of at least 2, got 2.5'),
        ('ldrld', {'top_k': True}, 'top_k must be a whole number of at least 2, got True'),
        ('abkd', {'alpha': float('nan')}, 'alpha must be a number from -10 to 10, got nan'),
        ('abkd', {'beta': 'half'}, "beta must be a number from -10 to 10, got 'half'"),
        ('ttm', {'gamma': 0}, 'gamma must be a positive number (1e-4 to 1e6), got 0'),
        ('dist', {'beta': -1}, 'beta must be a finite number of at least 0, got -1'),
    ],
)
def test_a_value_out_of_range_is_refused_when_the_criterion_is_made(name, options, message):
    with pytest.raises(ValueError) as e:
        create_distill_loss(name, **options)
    assert str(e.value) == f"criterion '{name}': {message}"


@pytest.mark.parametrize(
    ('name', 'options', 'classes', 'top_k'),
    [
        ('gdkd', {}, 7, 5),
        ('gdkd', {}, 3, 2),
        ('gdkd', {}, 2, 1),
        ('gdkd', {'groups': 3}, 7, 4),
        ('gdkd', {'groups': 3}, 3, 2),
        ('ldrld', {}, 10, 7),
        ('ldrld', {}, 7, 6),
        ('ldrld', {}, 2, 2),
    ],
)
def test_the_published_top_k_is_lowered_to_fit_few_classes(name, options, classes, top_k):
    student, teacher, target = double_logits(c=classes)
    loss = create_distill_loss(name, **options)(student, teacher, target)
    assert loss.item() == create_distill_loss(name, top_k=top_k, **options)(student, teacher, target).item()


@pytest.mark.parametrize('name', ['gdkd', 'ldrld'])
def test_a_run_is_as_lenient_with_the_published_top_k_and_as_strict_with_a_given_one(name):
    student, teacher, target = double_logits(c=3)
    row, criterion = choose_criterion(name, True, {})
    assert row.options['top_k'] == CRITERIA[name].options['top_k'] and criterion.standardize
    assert criterion(student, teacher, target).isfinite()
    row, criterion = choose_criterion(name, False, {'top_k': row.options['top_k']})
    with pytest.raises(UsageError, match='does not fit 3 classes'):
        criterion(student, teacher, target)


# ------------------------------------------------------------------------------------------------------- definitions


@pytest.mark.parametrize('kl_type', ['forward', 'reverse', 'both'])
@pytest.mark.parametrize('strategy', ['best', 'worst'])
@pytest.mark.parametrize('groups', [2, 3])
def test_gdkd_is_its_definition_sample_by_sample(kl_type, strategy, groups):
    student, teacher, target = double_logits()
    of_inner = {'forward': (1, 0), 'reverse': (0, 1), 'both': (0.5, 0.5)}[kl_type]
    expected = 0.0
    for s, t in zip(student / 2, teacher / 2):
        order = t.argsort(descending=strategy == 'best').tolist()
        parts = [order[:3], order[3:]] if groups == 2 else [order[:1], order[1:3], order[3:]]
        p, q = s.softmax(0), t.softmax(0)
        between = kl(torch.stack([q[g].sum() for g in parts]), torch.stack([p[g].sum() for g in parts]))
        inside, outside = (
            of_inner[0] * kl(t[g].softmax(0), s[g].softmax(0)) + of_inner[1] * kl(s[g].softmax(0), t[g].softmax(0))
            for g in parts[-2:]
        )
        expected += 4 * (3 * between + 5 * inside + 7 * outside) / 5
    options = dict(w0=3, w1=5, w2=7, top_k=3, temperature=2, kl_type=kl_type, strategy=strategy, groups=groups)
    criterion = create_distill_loss('gdkd', **options)
    loss = criterion(student, teacher, target)
    assert loss.item() == pytest.approx(float(expected), rel=1e-12)
    d = criterion.diagnostics
    assert loss.item() == pytest.approx(float(3 * d['between'] + 5 * d['inside'] + 7 * d['outside']), rel=1e-12)


def test_gdkd_of_one_class_is_dkd_where_the_teacher_is_right():
    student, teacher, _ = double_logits()
    target = teacher.argmax(1)
    a = create_distill_loss('gdkd', top_k=1, w0=1, w2=8)(student, teacher, target)
    assert a.item() == pytest.approx(create_distill_loss('dkd')(student, teacher, target).item(), rel=1e-12)


def test_pld_is_its_definition_sample_by_sample():
    student, teacher, target = double_logits()
    expected = 0.0
    for s, t, y in zip(student, teacher, target):
        left = [int(y), *(c for c in t.argsort(descending=True).tolist() if c != y)]
        q = (t / 2).softmax(0)
        while left:
            expected += float(q[left[0]] * (s[left].logsumexp(0) - s[left[0]])) / 5
            left.pop(0)
    assert create_distill_loss('pld', temperature=2)(student, teacher, target).item() == pytest.approx(expected)


def test_ttm_is_the_kl_to_a_teacher_at_temperature_one_over_gamma():
    student, teacher, target = double_logits()
    expected = sum(kl((0.3 * t).softmax(0), s.softmax(0)) for s, t in zip(student, teacher)) / 5
    got = create_distill_loss('ttm', gamma=0.3, beta=2)(student, teacher, target)
    assert got.item() == pytest.approx(2 * expected.item(), rel=1e-12)


def test_ldrld_has_nothing_outside_at_k_of_all_classes():
    student, teacher, target = double_logits()
    for classes in (7, 2):
        s = student[:, :classes].clone().requires_grad_()
        criterion = create_distill_loss('ldrld', top_k=classes)
        criterion(s, teacher[:, :classes], target).backward()
        assert criterion.diagnostics['rest'] == 0 < criterion.diagnostics['local']
        assert s.grad.abs().sum() > 0


def test_nkd_of_two_classes_is_its_first_term():
    student, teacher, target = double_logits(c=2)
    got = create_distill_loss('nkd')(student, teacher, target)
    expected = -(teacher.softmax(1) * student.log_softmax(1))[torch.arange(5), target].mean()
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)


# -------------------------------------------------------------------------------------------------------------- abkd

LIMITS = [(1.0, 0.0), (0.5, 0.0), (0.0, 1.0), (0.0, 0.5), (0.0, 0.0), (0.5, -0.5), (-0.3, 0.3)]
EXPONENTS = [*LIMITS, (0.8, 0.3), (0.5, 0.5), (1.2, -0.2), (-0.4, 1.4), (0.01, 0.02), (-2.0, -1.0)]


def ab_divergence(p, q, a, b):
    """The general formula, at three exponents that are not 0."""
    return -(q**a * p**b - a / (a + b) * q ** (a + b) - b / (a + b) * p ** (a + b)).sum() / (a * b)


@pytest.mark.parametrize(('alpha', 'beta'), LIMITS)
def test_abkd_at_a_limit_is_what_the_general_formula_comes_to(alpha, beta):
    student, teacher, _ = double_logits(scale=1.0)
    at = abkd_loss(student, teacher, alpha, beta, 1.0).item()
    p, q = student.softmax(1), teacher.softmax(1)
    near = ab_divergence(p, q, alpha + 1e-4, beta + 2e-4).item() / 5
    assert near == pytest.approx(at, rel=1e-2)
    for step in (1e-9, -1e-9):  # where the general formula has no digit left
        assert abkd_loss(student, teacher, alpha + step, beta + 2 * step, 1.0).item() == pytest.approx(at, rel=1e-6)


@pytest.mark.parametrize(('alpha', 'beta'), EXPONENTS)
def test_abkd_in_float32_has_the_digits_of_float64(alpha, beta):
    student, teacher, _ = double_logits(scale=1.0)
    for a, b in ((alpha, beta), (alpha + 1e-4, beta + 1e-4)):
        got = abkd_loss(student.float(), teacher.float(), a, b, 1.0)
        assert got.item() == pytest.approx(abkd_loss(student, teacher, a, b, 1.0).item(), rel=1e-4)


@pytest.mark.parametrize(('alpha', 'beta'), EXPONENTS)
def test_the_gradient_of_abkd_is_that_of_finite_differences_at_any_exponents(alpha, beta):
    student, teacher, _ = double_logits(scale=1.0)
    assert torch.autograd.gradcheck(lambda s: abkd_loss(s, teacher, alpha, beta, 2.0), student.requires_grad_())
    equal = teacher.clone().requires_grad_()
    loss = abkd_loss(equal, teacher, alpha, beta, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and equal.grad.abs().max() < 1e-14


def test_abkd_is_forward_and_reverse_kl_at_the_corners():
    student, teacher, _ = double_logits()
    assert abkd_loss(student, teacher, 1, 0, 2.0).item() == pytest.approx(kd_loss(student, teacher, 2.0).item() / 4)
    assert abkd_loss(student, teacher, 0, 1, 2.0).item() == pytest.approx(kd_loss(teacher, student, 2.0).item() / 4)


def test_a_second_derivative_of_abkd_is_an_error_and_not_a_wrong_number():
    student, teacher, _ = double_logits()
    with pytest.raises(RuntimeError, match='no second derivative'):
        torch.autograd.grad(abkd_loss(student.requires_grad_(), teacher), student, create_graph=True)


# ------------------------------------------------------------------------------------------------------ huge margins


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        *[('gdkd', {'kl_type': kl_type, 'strategy': s}) for kl_type in ('reverse', 'both') for s in ('best', 'worst')],
        *[('gdkd', {'groups': 3, 'kl_type': kl_type}) for kl_type in ('forward', 'both')],
        *[('abkd', {'alpha': a, 'beta': b}) for a, b in EXPONENTS],
        *[('ldrld', {'top_k': k}) for k in (2, 10)],
        ('dist', {'gamma': 0.0}),
        ('nkd', {'gamma': 1.5}),
        ('ttm', {'gamma': 1.0}),
    ],
)
@pytest.mark.parametrize('margin', [1e2, 1e4])
def test_loss_and_gradient_stay_finite_at_huge_margins_with_other_options(name, options, margin):
    student, teacher = torch.zeros(4, 10), torch.zeros(4, 10)
    student[0, 0] = student[1, :5] = student[2, 9] = teacher[0, 1] = teacher[1, 5:] = margin
    teacher[2] = margin * torch.linspace(-1, 1, 10)
    student.requires_grad_()
    for temperature in (1.0, 4.0):
        given = {**options, 'temperature': temperature} if name != 'ttm' else options
        student.grad = None
        loss = create_distill_loss(name, **given)(student, teacher, torch.tensor([0, 5, 9, 1]))
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()
