"""Poisoned logits: the attacks, whom they strike, what each criterion makes of them, and runs under attack."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from benchmarks.poison import loss_of_rows, margin, mean_field_margins, share_where_wrong_kd_wins
from timm_rld import DistillationTask, MixedTarget, create_distill_loss, poison_logits, poisoned_indices
from timm_rld.config import FIELDS, parse_args
from timm_rld.engine.evaluate import two_highest
from timm_rld.engine.log import Means
from timm_rld.errors import UsageError
from timm_rld.loss import CRITERIA
from timm_rld.loss.la import swap_top_and_true
from timm_rld.loss.rld import masked_correlation_loss, misleading_classes, sample_confidence_loss
from timm_rld.poison import ATTACKS, Poison, check_poison, describe, poison_noise, ranking, top1_apart
from timm_rld.seeds import derive_seed
from train_distill import main

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'poison_golden.json').read_text())
BLOCKS = {block['id']: block for block in GOLDEN['criteria_under_attack']}
TAU = 4.0
NAMED = ('fdla', 'fdpla', 'pcfdla', 'zero')


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, **kwargs) -> None:
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), tensor(expected), rtol=1e-10, atol=1e-10,
                               **kwargs)  # fmt: skip


def ranks(teacher: Tensor, target: Tensor) -> Tensor:
    """The rank of the true class, 0 for the first."""
    return (ranking(teacher) == target[:, None]).int().argmax(dim=1)


def rows(name: str = 'six_classes') -> tuple[Tensor, Tensor, Tensor]:
    """Student, clean teacher and target of a block of reference rows."""
    block = BLOCKS[name]
    return tensor(block['student']), tensor(block['variants'][0]['teacher']), torch.tensor(block['target'])


# --------------------------------------------------------------------------------------------------------- the attacks


@pytest.mark.parametrize('case', GOLDEN['attacks'], ids=lambda c: c['id'])
def test_the_attacks_give_the_reference_values_ties_included(case):
    logits = tensor([case['logits']])
    assert ranking(logits)[0].tolist() == case['ranking']
    assert two_highest(logits)[0].tolist() == case['ranking'][:2]
    for attack in ('fdla', 'fdpla', 'zero'):
        close(poison_logits(logits, attack)[0], case[attack])
    for of_strength in case['pcfdla']:
        close(poison_logits(logits, 'pcfdla', of_strength['strength'])[0], of_strength['poisoned'])
    close(poison_logits(logits, 'pcfdla')[0], next(p for p in case['pcfdla'] if p['strength'] == 9)['poisoned'])


@pytest.mark.parametrize('attack', ATTACKS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_attack_keeps_shape_and_dtype_and_leaves_its_input_alone(attack, dtype):
    logits = torch.randn(7, 5).to(dtype)
    before = logits.clone()
    poisoned = poison_logits(logits, attack)
    assert poisoned.shape == (7, 5) and poisoned.dtype == dtype and torch.equal(logits, before)
    assert poison_logits(logits[:0], attack).shape == (0, 5)
    alone = torch.cat([poison_logits(row, attack, indices=[i]) for i, row in enumerate(logits.split(1))])
    assert torch.equal(poisoned, alone), 'a row depends on itself alone'


@pytest.mark.parametrize(
    'case', GOLDEN['random_noise']['cases'], ids=lambda c: f'{c["seed"]}-{c["epoch"]}-{c["index"]}'
)
def test_noise_follows_from_seed_epoch_and_image(case):
    seed, epoch, index = case['seed'], case['epoch'], case['index']
    assert derive_seed(7, seed, epoch, index) == int(case['derived_seed'])
    close(poison_noise([index], len(case['values']), seed, epoch)[0], case['values'])
    logits = torch.randn(3, len(case['values']), dtype=torch.float64)
    images = torch.tensor([4, index, 5])
    found = poison_logits(logits, 'random', 2.5, seed=seed, epoch=epoch, indices=images)
    close(found[1], [2.5 * v for v in case['values']])


def test_the_poisoned_images_are_those_of_the_reference():
    for case in GOLDEN['selection']['cases']:
        assert derive_seed(6, case['seed']) == int(case['derived_seed'])
        for fraction, chosen in case['chosen'].items():
            found = poisoned_indices(case['images'], float(fraction), case['seed'])
            assert found.tolist() == chosen and found.dtype == np.int64


@pytest.mark.parametrize('length', [1, 7, 1437])
def test_the_number_of_poisoned_images_is_exact_and_a_larger_fraction_has_those_of_a_smaller(length):
    before: set[int] = set()
    for fraction in (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 1.0):
        found = poisoned_indices(length, fraction, 3)
        assert len(found) == math.floor(fraction * length + 0.5) and before <= set(found.tolist())
        before = set(found.tolist())
    assert before == set(range(length))
    assert length == 1 or poisoned_indices(length, 0.5, 3).tolist() != poisoned_indices(length, 0.5, 4).tolist()


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda z: poison_logits(z, 'fdal'), r"unknown attack 'fdal' \(did you mean 'fdla'"),
        (lambda z: poison_logits(z, 'fdla', 2.0), r'fdla takes no strength, got 2 \(pcfdla and random do\)'),
        (lambda z: poison_logits(z, 'zero', 2.0), 'zero takes no strength'),
        (
            lambda z: poison_logits(z, 'pcfdla', 0.0),
            'the strength of pcfdla must be another number than 0, up to 10000',
        ),
        (lambda z: poison_logits(z, 'pcfdla', -2e4), 'got -20000'),
        (lambda z: poison_logits(z, 'pcfdla', math.nan), 'got nan'),
        (lambda z: poison_logits(z, 'random', -1.0), 'the strength of random must be above 0, up to 10000, got -1'),
        (lambda z: poison_logits(z[0], 'zero'), r'expected floats \[B, C\] with at least 2 classes'),
        (lambda z: poison_logits(z[:, :1], 'fdla'), 'at least 2 classes'),
        (lambda z: poison_logits(z.int(), 'fdla'), 'expected floats'),
        (lambda z: poisoned_indices(10, 1.5, 0), 'fraction must be from 0 to 1, got 1.5'),
        (lambda z: poisoned_indices(10, math.nan, 0), 'fraction must be from 0 to 1'),
        (lambda z: Poison('fdla', 0.01, 10, 0), 'a fraction of 0.01 of 10 images is none'),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 3))


# ---------------------------------------------------------------------------------------- criteria, and what is derived


def variants() -> list:
    return [
        pytest.param(block, variant, id=f'{block["id"]}-{variant["attack"]}-{variant["strength"]}')
        for block in BLOCKS.values() for variant in block['variants']
    ]  # fmt: skip


@pytest.mark.parametrize(('block', 'variant'), variants())
def test_each_criterion_has_the_reference_values_under_each_attack(block, variant):
    student, target = tensor(block['student']).requires_grad_(), torch.tensor(block['target'])
    clean, teacher = tensor(block['variants'][0]['teacher']), tensor(variant['teacher'])
    if variant['attack'] in NAMED:
        close(poison_logits(clean, variant['attack'], variant['strength']), variant['teacher'])
    for name, expected in variant['criteria'].items():
        if name == 'ctkd':
            continue  # its parameter is in float32: 1e-8
        close(create_distill_loss(name)(student, teacher, target).detach(), expected, msg=lambda m, n=name: f'{n}: {m}')
    criterion = create_distill_loss('rld')
    (grad,) = torch.autograd.grad(criterion(student, teacher, target), student)
    close(grad, variant['rld']['grad_student'])
    (grad,) = torch.autograd.grad(create_distill_loss('kd')(student, teacher, target), student)
    close(grad, variant['kd_grad_student'])
    for i, row in enumerate(variant['rld']['rows']):
        one = (student[i : i + 1], teacher[i : i + 1], target[i : i + 1])
        close(sample_confidence_loss(*one).detach(), row['scd'])
        close(masked_correlation_loss(*one).detach(), row['mcd'])
        close((teacher[i] / TAU).softmax(0).max(), row['scd_target'])
        assert int(-misleading_classes(*one[1:]).sum()) == row['masked_classes']
        assert bool(teacher[i].max() > teacher[i, target[i]]) == row['teacher_wrong']


def test_ctkd_under_attack_is_right_as_far_as_its_float32_parameter():
    for block in BLOCKS.values():
        for variant in block['variants']:
            one = tensor(block['student']), tensor(variant['teacher']), torch.tensor(block['target'])
            assert create_distill_loss('ctkd')(*one).item() == pytest.approx(variant['criteria']['ctkd'], rel=1e-6)


def random_rows(classes: int = 7, count: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(count, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.arange(count) % classes


@pytest.mark.parametrize('attack', ['clean', *ATTACKS])
def test_of_what_rld_does_at_the_true_logit_the_teacher_decides_how_sure_alone(attack):
    student, teacher, target = random_rows()
    if attack != 'clean':
        teacher = poison_logits(teacher, attack)
    student.requires_grad_()
    (grad,) = torch.autograd.grad(create_distill_loss('rld')(student, teacher, target), student)
    sigma = (student / TAU).softmax(1).gather(1, target[:, None])
    confidence = (teacher / TAU).softmax(1).amax(1, keepdim=True)
    close(grad.gather(1, target[:, None]), (TAU * (sigma - confidence) / len(target)).tolist())


@pytest.mark.parametrize('attack', ['fdla', 'fdpla'])
def test_exchanging_the_values_of_a_row_leaves_scd_as_it_was(attack):
    student, teacher, target = random_rows()
    poisoned = poison_logits(teacher, attack)
    assert torch.equal(poisoned.sort().values, teacher.sort().values)
    close(sample_confidence_loss(student, poisoned, target), sample_confidence_loss(student, teacher, target).item())


def test_what_rld_masks_under_fdla_and_fdpla():
    student, teacher, target = random_rows()
    classes, rank = teacher.shape[1], ranks(teacher, target)
    of_fdla = -misleading_classes(poison_logits(teacher, 'fdla'), target).sum(1)
    assert torch.equal(of_fdla, torch.where(rank == 0, classes, rank).double())
    of_fdpla = -misleading_classes(poison_logits(teacher, 'fdpla'), target).sum(1)
    assert torch.equal(of_fdpla, (classes - rank).double())
    first = rank == 0
    assert first.any()
    student = student[first].requires_grad_()
    mcd = masked_correlation_loss(student, poison_logits(teacher[first], 'fdla'), target[first])
    (grad,) = torch.autograd.grad(mcd, student)
    assert mcd == 0 and not grad.any()


@pytest.mark.parametrize('case', GOLDEN['pcfdla_target'], ids=lambda c: f'{c["C"]}-{c["tau"]:g}-{c["s"]:g}')
def test_how_sure_a_peak_makes_rld_follows_from_its_height(case):
    classes, tau, s = case['C'], case['tau'], case['s']
    closed = 1 / (1 + (classes - 1) * math.exp(-2 * s / tau) if s > 0 else classes - 1 + math.exp(-2 * abs(s) / tau))
    assert closed == pytest.approx(case['t'], rel=1e-10)
    poisoned = poison_logits(torch.randn(5, classes, dtype=torch.float64), 'pcfdla', s)
    close((poisoned / tau).softmax(1).amax(1), [case['t']] * 5)


@pytest.mark.parametrize('strength', [9.0, 0.5, -0.5, -9.0])
def test_nothing_is_left_of_mcd_under_pcfdla_unless_the_true_class_has_the_peak(strength):
    student, teacher, target = random_rows()
    classes, second = teacher.shape[1], ranks(teacher, target) == 1
    poisoned = poison_logits(teacher, 'pcfdla', strength)
    masked = -misleading_classes(poisoned, target).sum(1)
    expected = torch.where(second, 1, classes) if strength > 0 else torch.where(second, classes, classes - 1)
    assert torch.equal(masked, expected.double()) and second.any()
    assert masked_correlation_loss(student[~second], poisoned[~second], target[~second]) == 0
    mcd = masked_correlation_loss(student[second], poisoned[second], target[second])
    others = torch.ones_like(student[second], dtype=torch.bool).scatter(1, target[second][:, None], False)
    logs = (student[second][others].view(-1, classes - 1) / TAU).log_softmax(1)
    uniform = torch.full_like(logs, 1 / (classes - 1))
    by_hand = TAU**2 * F.kl_div(logs, uniform, reduction='batchmean').item()
    close(mcd, by_hand if strength > 0 else 0.0)


def test_zeros_tell_rld_to_be_as_unsure_as_can_be_and_nothing_else():
    student, teacher, target = random_rows()
    zeros = poison_logits(teacher, 'zero')
    classes = teacher.shape[1]
    criterion = create_distill_loss('rld')
    criterion(student, zeros, target)
    assert criterion.diagnostics['mcd'] == 0 and criterion.diagnostics['teacher_wrong'] == 0
    assert criterion.diagnostics['masked_classes'] == classes
    close((zeros / TAU).softmax(1).amax(1), [1 / classes] * len(zeros))
    uniform = torch.full_like(student, 1 / classes)
    of_kd = TAU**2 * F.kl_div((student / TAU).log_softmax(1), uniform, reduction='batchmean')
    close(create_distill_loss('kd')(student, zeros, target), of_kd.item())
    gamma, beta = (CRITERIA['wttm'].options[k] for k in ('gamma', 'beta'))
    of_wttm = beta * classes ** (1 - gamma) * F.kl_div(student.log_softmax(1), uniform, reduction='batchmean')
    close(create_distill_loss('wttm')(student, zeros, target), of_wttm.item())


def test_label_augment_undoes_a_peak_and_has_the_true_class_on_top_under_any_attack():
    student, teacher, target = random_rows()
    for attack in ATTACKS:
        swapped = swap_top_and_true(poison_logits(teacher, attack), target)
        assert torch.equal(swapped.gather(1, target[:, None])[:, 0], swapped.amax(1)), attack
    poisoned = poison_logits(teacher, 'pcfdla', 3.0)
    peak, classes = (poisoned / TAU).softmax(1).amax().item(), teacher.shape[1]
    label = torch.full_like(student, (1 - peak) / (classes - 1)).scatter(1, target[:, None], peak)
    expected = TAU**2 * F.kl_div((student / TAU).log_softmax(1), label, reduction='batchmean')
    close(create_distill_loss('la')(student, poisoned, target), expected.item())


@pytest.mark.parametrize(('attack', 'strength'), [('fdla', None), ('fdpla', None), ('pcfdla', 9.0), ('pcfdla', 0.1)])
def test_label_revision_puts_the_true_class_a_fifth_above_the_liars(attack, strength):
    _, teacher, target = random_rows()
    poisoned = poison_logits(teacher, attack, strength)
    wrong = poisoned.argmax(1) != target
    p, y = poisoned[wrong].softmax(1), target[wrong][:, None]
    eta = CRITERIA['lr'].options['eta']
    b = eta / (p.amax(1, keepdim=True) - p.gather(1, y) + 1)
    revised = b * p + (1 - b) * torch.zeros_like(p).scatter(1, y, 1.0)
    said = revised.gather(1, p.argmax(1, keepdim=True))
    close(revised.gather(1, y) - said, [[1 - eta]] * len(y))
    student = torch.randn_like(p)
    expected = (student.softmax(1) - revised).square().mean().item()
    close(create_distill_loss('lr')(student, poisoned[wrong], target[wrong]), expected)


@pytest.mark.parametrize('strength', [9.0, 2.0, -3.0])
def test_a_peak_once_standardised_has_no_height(strength):
    _, teacher, _ = random_rows()
    classes = teacher.shape[1]
    poisoned = poison_logits(teacher, 'pcfdla', strength)
    close(poisoned.std(1), [2 * abs(strength) / math.sqrt(classes)] * len(teacher))
    scaled = math.copysign(1, strength) * (poisoned - poisoned.mean(1, keepdim=True)) / poisoned.std(1, keepdim=True)
    expected = torch.full_like(scaled, -1 / math.sqrt(classes))
    expected.scatter_(1, ranking(teacher)[:, 1:2], (classes - 1) / math.sqrt(classes))
    close(scaled, expected.tolist())


@pytest.mark.parametrize('name', [n for n, row in CRITERIA.items() if row.cls and not row.not_standardized] + ['atkd'])
def test_the_strength_does_not_matter_to_standardised_criteria(name):
    student, teacher, target = random_rows()
    options = {} if name == 'atkd' else {'standardize': True}
    weak, strong, other = (
        create_distill_loss(name, **options)(student, poison_logits(teacher, 'pcfdla', s), target).item()
        for s in (1.0, 100.0, -1.0)
    )
    if name == 'mlkd':
        return  # rounding decides its medians under pcfdla
    assert weak == pytest.approx(strong, rel=1e-5) and weak != pytest.approx(other, rel=1e-3)


def test_the_standardised_reference_values():
    found = GOLDEN['standardized_pcfdla']
    student, teacher, target = rows(found['block'])
    for name, values in found['values'].items():
        criterion = create_distill_loss(name, standardize=True, temperature=found['temperature'])
        for key, expected in values.items():
            strength = float(key.removeprefix('strength_'))
            close(criterion(student, poison_logits(teacher, 'pcfdla', strength), target), expected)


def test_normkd_grows_with_the_square_of_the_strength():
    student, teacher, target = random_rows()
    at = [create_distill_loss('normkd')(student, poison_logits(teacher, 'pcfdla', s), target) for s in (2.0, 6.0)]
    assert at[1].item() == pytest.approx(9 * at[0].item(), rel=1e-6)


@pytest.mark.parametrize(('attack', 'strength'), [('fdla', None), ('pcfdla', 5.0)])
def test_what_kd_is_told_is_the_second_class(attack, strength):
    _, teacher, _ = random_rows()
    p, clean = (poison_logits(teacher, attack, strength) / TAU).softmax(1), (teacher / TAU).softmax(1)
    assert torch.equal(p.argmax(1), ranking(teacher)[:, 1])
    peak = 1 / (1 + (teacher.shape[1] - 1) * math.exp(-2 * (strength or 0) / TAU))
    close(p.amax(1), clean.amax(1).tolist() if attack == 'fdla' else [peak] * len(p))


def test_noise_masks_half_of_the_classes_in_the_mean():
    count, classes = 4000, 9
    poisoned = poison_logits(torch.zeros(count, classes, dtype=torch.float64), 'random')
    masked = -misleading_classes(poisoned, torch.zeros(count, dtype=torch.int64)).sum(1)
    error = masked.std().item() / math.sqrt(count)
    assert masked.mean().item() == pytest.approx((classes + 1) / 2, abs=4 * error)
    assert poisoned.std().item() == pytest.approx(1, abs=0.02)


# ------------------------------------------------------------------------------------------------------ the mean field

FIELD = GOLDEN['mean_field']


def field_cases(name: str, fractions: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean and poisoned teacher, target and reference margins `[N, fractions]` of a criterion."""
    cases = [r for r in FIELD['results'] if r['criterion'] == name]
    clean = tensor([FIELD['archetypes'][r['archetype']]['logits'] for r in cases])
    poisoned = [poison_logits(z[None], r['attack'], r['strength']) for z, r in zip(clean, cases)]
    target = torch.tensor([FIELD['archetypes'][r['archetype']]['y'] for r in cases])
    return clean, torch.cat(poisoned), target, tensor([[r['margin'][round(10 * p)] for p in fractions] for r in cases])


@pytest.mark.parametrize('name', ['rld', 'kd', 'dkd', 'la', 'lr'])
def test_the_mean_field_has_the_reference_margins(name):
    fractions = [0.3, 1.0]
    *rows, expected = field_cases(name, fractions)
    torch.testing.assert_close(mean_field_margins(name, *rows, fractions), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('fraction', [0.3, 1.0])
def test_the_mean_field_of_review_and_correction_has_the_reference_margins(fraction):
    *rows, expected = field_cases('rc', [fraction])
    loss, student = loss_of_rows('rc', *rows, fraction), torch.zeros_like(rows[0], requires_grad=True)
    for _ in range(400):  # its gradient is not that of its loss, so there is nothing to search lines for
        (grad,) = torch.autograd.grad(loss(student), student)
        student = (student - 2 * grad).detach().requires_grad_()
    torch.testing.assert_close(margin(student.detach(), rows[2])[:, None], expected, rtol=1e-3, atol=1e-3)


def test_the_first_share_at_which_the_reference_has_the_true_class_lose_is_where_its_margin_falls_below_0():
    for case in FIELD['results']:
        lost = [p for p, m in zip(FIELD['fractions'], case['margin']) if m < 0]
        assert (lost or [None])[0] == case['first_fraction_where_wrong'], case


@pytest.mark.parametrize('case', FIELD['kd_alone'], ids=lambda c: f'{c["archetype"]}-{c["attack"]}-{c["strength"]}')
def test_from_which_share_on_kd_alone_names_the_second_class(case):
    teacher = tensor([FIELD['archetypes'][case['archetype']]['logits']])
    found = share_where_wrong_kd_wins(teacher, poison_logits(teacher, case['attack'], case['strength']), case['tau'])
    close(found, [case['critical_fraction']])


# ------------------------------------------------------------------------------------------------------- the attacker


@pytest.mark.parametrize('attack', ATTACKS)
def test_the_attacker_changes_the_rows_of_poisoned_images_alone_in_any_batch_and_process(attack):
    poison = Poison(attack, 0.3, 50, seed=5)
    chosen = poisoned_indices(50, 0.3, 5)
    teacher = torch.randn(50, 6)
    whole = poison(teacher, torch.arange(50), epoch=2)
    expected = teacher.clone()
    expected[chosen] = poison_logits(teacher[chosen], attack, seed=5, epoch=2, indices=chosen)
    assert torch.equal(whole, expected) and poison.count == 15
    order = torch.randperm(50)
    for world, batch in ((1, 7), (2, 3), (5, 1)):
        parts = [order[rank::world].split(batch) for rank in range(world)]
        for indices in (i for part in parts for i in part):
            assert torch.equal(poison(teacher[indices], indices, epoch=2), whole[indices])
    assert torch.equal(whole, poison(teacher, torch.arange(50), epoch=3)) == (attack != 'random')
    assert poison(teacher.half(), torch.arange(50), epoch=2).dtype == torch.float32
    assert poison(teacher[:0], torch.arange(0), epoch=2).shape == (0, 6)


def accuracies(poison: Poison, batches: list[list[int]], right: set[int]) -> dict[str, float]:
    """What an epoch reports whose student is right on some images."""
    means = Means(torch.device('cpu'))
    for indices in batches:
        output = torch.tensor([[0.0, 1.0] if i in right else [1.0, 0.0] for i in indices])
        figures = poison.figures(output, torch.ones(len(indices), dtype=torch.int64), torch.tensor(indices))
        means.add(figures, len(indices))
    return top1_apart(means.local())


def test_training_top1_of_poisoned_and_clean_images_is_counted_image_by_image():
    poison = Poison('fdla', 0.4, 10, seed=0)
    dark = poisoned_indices(10, 0.4, 0).tolist()
    light = [i for i in range(10) if i not in dark]
    right = {dark[0], *light[:5]}
    batches = [light[:3], [*dark, *light[3:5]], light[5:]]  # a part without poisoned images, one with two clean ones
    found = accuracies(poison, batches, right)
    assert found == pytest.approx({'poisoned': 0.4, 'top1_poisoned': 25.0, 'top1_clean': 100 * 5 / 6}, rel=1e-6)
    found = accuracies(Poison('fdla', 1.0, 10, seed=0), batches, right)
    assert found['top1_poisoned'] == pytest.approx(60) and math.isnan(found['top1_clean'])
    assert math.isnan(accuracies(poison, [light], right)['top1_poisoned'])
    assert top1_apart({'loss': 1.0}) == {'loss': 1.0}


class AsItIs(nn.Identity):
    """A normalisation that changes nothing."""

    def inverse(self, x: Tensor) -> Tensor:
        return x


def task_with(poison: Poison | None, cache=None, criterion: str | None = 'kd') -> DistillationTask:
    torch.manual_seed(3)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(12, 6)) for _ in range(2)]
    teacher = None if criterion is None else networks[1]
    return DistillationTask(networks[0], teacher, criterion, normalize=AsItIs(), cache=cache, poison=poison)


PIXELS = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
TARGET, INDICES = torch.arange(8) % 6, torch.tensor([3, 1, 19, 4, 7, 8, 11, 2])


def test_the_task_poisons_what_the_teacher_says_and_what_a_cache_says_and_caches_it_clean():
    poison = Poison('pcfdla', 0.5, 20, seed=0)
    task = task_with(poison)
    clean = task_with(None).ask_teacher(PIXELS)[0]
    expected = poison(clean, INDICES, epoch=1)
    assert torch.equal(task.ask_teacher(PIXELS, TARGET, INDICES, 1)[0], expected) and not torch.equal(expected, clean)

    class Cache:
        kept = None

        def logits(self, epoch, indices, target, compute=None):
            self.kept = clean if compute is None else compute()
            return self.kept

    cache = Cache()
    assert torch.equal(task_with(poison, cache).ask_teacher(PIXELS, TARGET, INDICES, 1)[0], expected)
    assert torch.equal(cache.kept, clean)


def test_the_step_reports_poisoned_images_of_mixed_ones_the_first():
    poison = Poison('zero', 0.5, 20, seed=0)
    task = task_with(poison)
    logits = task.ask_teacher(PIXELS, TARGET, INDICES, 1)[0]
    out = task(PIXELS, TARGET, logits, None, INDICES)
    right = out['output'].argmax(1) == TARGET
    dark = torch.tensor([i in poisoned_indices(20, 0.5, 0) for i in INDICES.tolist()])
    assert out['poisoned'] == dark.float().mean() and out['right_poisoned'] == (right & dark).float().mean()
    assert out['right_clean'] == (right & ~dark).float().mean()
    mixed = task(PIXELS, MixedTarget(TARGET, TARGET.roll(1), 0.3), logits, None, INDICES)
    assert all(torch.equal(mixed[k], out[k]) for k in ('poisoned', 'right_poisoned', 'right_clean'))
    assert 'poisoned' not in task_with(None)(PIXELS, TARGET, logits, None, INDICES)


def test_poison_needs_to_know_the_images_and_a_criterion():
    with pytest.raises(ValueError, match='poison needs the classes and indices of the images, and the epoch'):
        task_with(Poison('zero', 0.5, 20, seed=0))(PIXELS, TARGET)
    with pytest.raises(ValueError, match='without a criterion there are no logits to poison'):
        task_with(Poison('zero', 0.5, 20, seed=0), criterion=None)


def test_in_the_first_step_scd_under_fdla_is_that_without_and_mcd_is_not():
    clean = task_with(None, criterion='rld')(PIXELS, TARGET)
    task = task_with(Poison('fdla', 1.0, 20, seed=0), criterion='rld')
    out = task(PIXELS, TARGET, task.ask_teacher(PIXELS, TARGET, INDICES, 1)[0])
    assert out['scd'].item() == pytest.approx(clean['scd'].item(), rel=1e-5)
    assert out['mcd'].item() != pytest.approx(clean['mcd'].item(), rel=1e-2)


# ---------------------------------------------------------------------------------------------------------------- runs


def results_of(run: Path) -> tuple[dict, list[dict[str, str]], dict]:
    found = list(csv.DictReader((run / 'summary.csv').open()))
    return json.loads((run / 'results.json').read_text()), found, yaml.safe_load((run / 'args.yaml').read_text())


def test_a_poisoned_run_says_so_in_all_that_it_leaves(tiny, tmp_path):
    assert main([*tiny, '--distill', 'kd', '--poison', 'pcfdla', '--poison-fraction', '0.3', '--epochs', '1']) == 0
    results, summary, settings = results_of(tmp_path / 'run')
    assert results['poison'] == {'attack': 'pcfdla', 'strength': 9.0, 'fraction': 0.3, 'images': 12}
    assert describe(results['poison']) == 'pcfdla at strength 9 on 30 % of the training images (12)'
    assert (settings['poison'], settings['poison_fraction'], settings['poison_strength']) == ('pcfdla', 0.3, None)
    row = summary[-1]
    assert float(row['train_poisoned']) == pytest.approx(12 / 40, abs=0.026)  # of 41 images an odd last one is left out
    for name in ('train_top1_poisoned', 'train_top1_clean'):
        assert 0 <= results[name] <= 100 and float(row[name]) == pytest.approx(results[name], rel=1e-5)
    assert results['second_class'] + results['agreement'] <= 100
    assert float(row['eval_second_class']) == pytest.approx(results['second_class'], rel=1e-5)


def test_of_a_run_with_all_images_poisoned_there_is_no_clean_accuracy(tiny, tmp_path):
    argv = [*tiny, '--distill', 'kd', '--poison', 'zero', '--poison-fraction', '1', '--epochs', '1', '--mixup', '0.5']
    assert main(argv) == 0
    results, summary, _ = results_of(tmp_path / 'run')
    assert results['train_top1_clean'] is None and summary[-1]['train_top1_clean'] == ''
    assert results['train_top1_poisoned'] is not None and summary[-1]['train_poisoned'] == '1'


@pytest.fixture
def flags(folder, trained_teacher, tmp_path) -> list[str]:
    """Flags of a run under the attack that draws numbers."""
    return [
        '--teacher', f'local-dir:{trained_teacher}', '--student', 'test_resnet', '--data-dir', str(folder),
        '--img-size', '32', '--epochs', '2', '--batch-size', '8', '--lr', '0.01', '--min-teacher-acc', '0',
        '--cpu-threads', '1', '--workers', '0', '--distill', 'kd', '--distill-warmup-epochs', '0', '--no-speed',
        '--poison', 'random', '--poison-fraction', '0.5', '--output', str(tmp_path), '--resume', 'auto',
        '--checkpoint-interval', '1', '--checkpoint-hist', '100', '--experiment',
    ]  # fmt: skip


def outcome(run: Path) -> tuple[bytes, list[dict[str, str]]]:
    """Weights, and figures but those of time."""
    _, summary, _ = results_of(run)
    rows = [{k: v for k, v in row.items() if 'seconds' not in k and k != 'images_per_second'} for row in summary]
    return (run / 'student' / 'model.safetensors').read_bytes(), rows


@pytest.mark.slow
def test_a_poisoned_run_is_the_same_with_workers_a_cache_and_from_any_checkpoint(fork_server, flags, tmp_path):
    cache = ['--teacher-cache', str(tmp_path / 'cache'), '--teacher-cache-dtype', 'float32']
    clean = [f for f in flags if f not in ('--poison', 'random', '--poison-fraction', '0.5')]
    fork_server.run([*flags, 'whole'], tmp_path / 'log')
    fork_server.run([*clean, 'clean', *cache], tmp_path / 'log')
    fork_server.run([*flags, 'cached', *cache, '--workers', '2'], tmp_path / 'cached.log')
    assert 'complete' in (tmp_path / 'cached.log').read_text(), 'with the logits of the clean run'
    assert outcome(tmp_path / 'cached') == outcome(tmp_path / 'whole')
    assert outcome(tmp_path / 'clean')[0] != outcome(tmp_path / 'whole')[0]
    assert 'train_poisoned' not in outcome(tmp_path / 'clean')[1][0]
    names = sorted(p.name for p in (tmp_path / 'whole' / 'checkpoints').iterdir())
    for name in (names[0], names[len(names) // 2]):
        shutil.copytree(tmp_path / 'whole', tmp_path / name)
        (tmp_path / name / 'results.json').unlink()
        fork_server.run(['--resume', str(tmp_path / name / 'checkpoints' / name)], tmp_path / 'log')
        assert outcome(tmp_path / name) == outcome(tmp_path / 'whole')


@pytest.mark.slow
def test_two_processes_see_the_poisoned_images_that_one_sees(fork_server, flags, tmp_path):
    flags = [f if f != 'test_resnet' else 'test_vit' for f in flags]  # no batch norm, whose statistics would differ
    fork_server.run([*flags, 'one'], tmp_path / 'log')
    fork_server.run([*flags, 'two', '--batch-size', '4'], tmp_path / 'log', 2)
    (one, rows), (two, others) = (outcome(tmp_path / name) for name in ('one', 'two'))
    assert [r['train_poisoned'] for r in rows] == [r['train_poisoned'] for r in others]
    for row, other in zip(rows, others):
        assert float(row['train_kd_loss']) == pytest.approx(float(other['train_kd_loss']), rel=1e-4)
        assert float(row['train_top1_poisoned']) == pytest.approx(float(other['train_top1_poisoned']), abs=5.1)


WRONG = [
    (['--poison', 'fdal', '--poison-fraction', '0.1'], 2, "--poison: 'fdal' is not one of none, fdla, pcfdla"),
    (['--poison', 'fdla'], 2, '--poison fdla: needs --poison-fraction P'),
    (['--poison', 'fdla', '--poison-fraction', '0'], 2, '--poison-fraction: must be greater than 0'),
    (['--poison', 'fdla', '--poison-fraction', '1.1'], 2, '--poison-fraction: must be at most 1'),
    (['--poison', 'fdla', '--poison-fraction', 'nan'], 2, '--poison-fraction'),
    (['--poison', 'fdla', '--poison-fraction', '0.01'], 1, 'a fraction of 0.01 of 41 images is none'),
    (['--poison', 'fdla', '--poison-fraction', '0.1', '--poison-strength', '2'], 2, 'strength 2: fdla takes no'),
    (['--poison', 'zero', '--poison-fraction', '0.1', '--poison-strength', '2'], 2, 'strength 2: zero takes no'),
    (['--poison', 'pcfdla', '--poison-fraction', '0.1', '--poison-strength', '0'], 2, 'another number than 0'),
    (['--poison', 'random', '--poison-fraction', '0.1', '--poison-strength', '-1'], 2, 'must be above 0, up to 10000'),
    (['--poison', 'pcfdla', '--poison-fraction', '0.1', '--poison-strength', '2e4'], 2, 'up to 10000, got 20000'),
    (['--poison', 'fdla', '--poison-fraction', '0.1', '--distill', 'none'], 2, '--poison fdla: --distill none distils'),
    (['--poison-fraction', '0.1'], 2, '--poison-fraction 0.1: needs --poison fdla|pcfdla|fdpla|zero|random'),
    (['--poison-strength', '3'], 2, '--poison-strength 3: needs --poison'),
    (['--poison', 'none', '--poison-fraction', '0.1'], 2, '--poison-fraction 0.1: needs --poison'),
]  # fmt: skip


@pytest.mark.parametrize(('more', 'code', 'message'), WRONG, ids=[' '.join(w[0]) for w in WRONG])
def test_poison_that_cannot_be_is_a_line_before_anything_is_made(tiny, tmp_path, capsys, more, code, message):
    assert main([*tiny, *more]) == code
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[0] and err[0].startswith('train_distill.py: error: ') and len(err) <= 2
    assert list(tmp_path.iterdir()) == []


def test_a_stream_whose_images_have_no_index_cannot_be_poisoned(tiny, parquet, capsys):
    at = tiny.index('--data-dir')
    argv = [*tiny[:at], '--dataset', f'hfids/{parquet}', *tiny[at + 2 :], '--input-key', 'img', '--target-key',
            'fine_label', '--num-classes', '3', '--train-num-samples', '41', '--val-num-samples', '20', '--val-split',
            'test', '--poison', 'fdla', '--poison-fraction', '0.5']  # fmt: skip
    assert main(argv) == 1
    assert '--poison fdla: the images of a streamed dataset have no index' in capsys.readouterr().err


def test_what_never_sees_a_training_image_is_not_poisoned():
    with pytest.raises(UsageError, match='--poison fdla: --distill mekd sees no training image'):
        check_poison('fdla', 0.1, None, 'mekd')


def test_of_a_teacher_that_names_a_class_alone_there_is_nothing_to_poison(tiny, capsys):
    assert main([*tiny, '--black-box', 'hard', '--poison', 'fdla', '--poison-fraction', '0.1']) == 2
    assert '--poison fdla: --black-box hard answers with a class' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(('answers', 'columns'), [('soft', {'eval_second_class', 'train_poisoned'}), ('hard', set())])
def test_a_closed_teacher_is_poisoned_where_it_answers_with_probabilities(tiny, tmp_path, answers, columns):
    poison = ['--poison', 'pcfdla', '--poison-fraction', '0.5', '--distill', 'kd']
    argv = [
        *tiny,
        '--black-box',
        answers,
        '--epochs',
        '1',
        *(poison if answers == 'soft' else ['--distill', 'ce_teacher']),
    ]
    assert main(argv) == 0
    results, summary, _ = results_of(tmp_path / 'run')
    assert {k for k in ('eval_second_class', 'train_poisoned') if k in summary[-1]} == columns
    assert (results['poison'] is None) == (answers == 'hard') and 0 <= results['agreement'] <= 100


def test_the_setting_knows_the_attacks_of_the_table():
    assert set(FIELDS['poison'].metadata['choices']) == {'none', *ATTACKS}
    help = FIELDS['poison_strength'].metadata['help']
    for name, attack in ATTACKS.items():
        default = 'none' if attack.strength is None else f'{attack.strength:g}'
        assert (f'{name} (default: {default})' in help) == (attack.strength is not None)


def test_another_attack_on_the_command_line_drops_strength_and_fraction_of_a_file(tmp_path):
    file = tmp_path / 'a.yaml'
    file.write_text('poison: pcfdla\npoison_fraction: 0.3\npoison_strength: 4\n')
    assert parse_args(['--config', str(file), '--poison', 'pcfdla']).poison_strength == 4
    other = parse_args(['--config', str(file), '--poison', 'none'])
    assert (other.poison, other.poison_fraction, other.poison_strength) == ('none', None, None)
