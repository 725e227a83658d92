"""The step: weights, ramp, modes, and use in timm's own loop."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.task import LogitDistillationTask
from torch import nn

from timm_rld import DistillationTask, MixedTarget, Teacher, create_distill_loss, create_teacher
from timm_rld.loss import CRITERIA
from timm_rld.pairing import create_normalize

PIXELS = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
TARGET = torch.tensor([0, 2, 1, 2])


@pytest.fixture
def teacher(trained_teacher) -> Teacher:
    return create_teacher(f'local-dir:{trained_teacher}', 3, image_size=(32, 32))


@pytest.fixture
def student() -> nn.Module:
    torch.manual_seed(7)
    return timm.create_model('test_resnet', num_classes=3).eval()


@pytest.mark.parametrize('name', [n for n, row in CRITERIA.items() if row.plain])
def test_the_loss_is_the_weighted_sum_of_cross_entropy_and_the_ramped_criterion(name, student, teacher):
    row = CRITERIA[name]
    task = DistillationTask(student, teacher, name, warmup_epochs=4)
    task.set_epoch(3)
    out = task(PIXELS, TARGET)
    logits = student(create_normalize(student)(PIXELS))
    ce = nn.functional.cross_entropy(logits, TARGET)
    kd = create_distill_loss(name)(logits, teacher(PIXELS), TARGET)
    assert out['task_loss'].item() == pytest.approx(ce.item(), rel=1e-5)
    assert out['kd_loss'].item() == pytest.approx(kd.item(), rel=1e-5)
    assert out['loss'].item() == pytest.approx(
        row.task_weight * ce.item() + row.distill_weight * 0.75 * kd.item(), rel=1e-5
    )
    assert torch.equal(out['output'], logits)


def test_the_ramp_is_epoch_over_n_from_epoch_one_and_the_rows_by_default(student, teacher):
    task = DistillationTask(student, teacher, 'rld')
    assert task.warmup_epochs == CRITERIA['rld'].warmup_epochs == 20
    ramps = []
    for epoch in (1, 10, 20, 21):
        task.set_epoch(epoch)
        ramps.append(task.ramp)
    assert ramps == [0.05, 0.5, 1.0, 1.0]
    flat = DistillationTask(student, teacher, 'rld', warmup_epochs=0)
    flat.set_epoch(1)
    assert flat.ramp == 1.0


def test_weights_given_win_over_the_rows(student, teacher):
    task = DistillationTask(student, teacher, 'kd', task_loss_weight=0.0, distill_loss_weight=2.0)
    out = task(PIXELS, TARGET)
    assert out['loss'].item() == pytest.approx(2 * out['kd_loss'].item(), rel=1e-5)


def test_it_drops_into_timms_own_loop_on_normalised_floats(student, teacher):
    task = DistillationTask(student, teacher, create_distill_loss('rld'))
    from_pixels = task(PIXELS, TARGET)
    out = task(create_normalize(student)(PIXELS), TARGET)
    assert out['kd_loss'].item() == pytest.approx(from_pixels['kd_loss'].item(), rel=1e-4)
    out['loss'].backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize('weight', [0.0, 0.3])
def test_a_step_of_kd_is_that_of_timms_own_task(weight, student, teacher):
    theirs, its_teacher = copy.deepcopy(student), copy.deepcopy(teacher.model)
    task = LogitDistillationTask(theirs, its_teacher, nn.CrossEntropyLoss(label_smoothing=0.1), temperature=3.0,
                                 task_loss_weight=weight, verbose=False)  # fmt: skip
    ours = DistillationTask(student, teacher, create_distill_loss('kd', temperature=3.0), task_loss_weight=weight,
                            distill_loss_weight=1 - weight, smoothing=0.1)  # fmt: skip
    task.double(), ours.double()  # in float32 the way from one normalisation to the other is rounded differently
    x = ours.normalize(PIXELS).double()
    expected, out = task.train()(x, TARGET), ours.train()(x, TARGET)
    expected['loss'].backward()
    out['loss'].backward()
    for key, other in (('loss', 'loss'), ('task_loss', 'task_loss'), ('kd_loss', 'kd_loss')):
        assert out[key].item() == pytest.approx(expected[other].item(), rel=1e-6), key
    largest = max(p.grad.abs().max() for p in theirs.parameters())
    for (name, p), q in zip(student.named_parameters(), theirs.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-6 * largest), name


def test_training_mode_reaches_the_student_and_not_the_teacher(student, teacher):
    DistillationTask(student, teacher, 'kd').train()
    assert student.training and not any(m.training for m in teacher.modules())


@pytest.mark.parametrize('name', [n for n, row in CRITERIA.items() if row.plain])
def test_a_mixed_target_gives_lambda_of_one_loss_and_the_rest_of_the_other(name, student, teacher):
    task = DistillationTask(student, teacher, name)
    a, b = task(PIXELS, TARGET), task(PIXELS, TARGET.roll(1))
    out = task(PIXELS, MixedTarget(TARGET, TARGET.roll(1), 0.3))
    for key in ('loss', 'task_loss', 'kd_loss', *create_distill_loss(name).diagnostics):
        assert out[key].item() == pytest.approx(0.3 * a[key].item() + 0.7 * b[key].item(), rel=1e-5), key


def test_diagnostics_are_in_the_steps_dict_and_carry_no_gradient(student, teacher):
    out = DistillationTask(student, teacher, 'rld')(PIXELS, TARGET)
    assert {'scd', 'mcd', 'teacher_wrong', 'masked_classes'} <= set(out)
    assert not any(v.requires_grad for k, v in out.items() if k not in ('loss', 'output'))


def test_a_plain_model_serves_as_teacher_and_any_callable_as_criterion(student):
    other = timm.create_model('test_vit', num_classes=3)
    task = DistillationTask(student, other, lambda s, t, y: (s - t).square().mean())
    assert isinstance(task.teacher, Teacher) and not any(p.requires_grad for p in other.parameters())
    out = task(PIXELS, TARGET)
    assert out['loss'].item() == pytest.approx(out['task_loss'].item() + out['kd_loss'].item(), rel=1e-5)


def test_a_task_whose_criterion_is_no_module_compiles(student, teacher):
    task = DistillationTask(student, teacher, lambda s, t, target: (s - t).square().mean())
    task.compile(backend='eager')
    assert task(PIXELS, TARGET)['kd_loss'].isfinite()


def test_a_cache_without_the_indices_of_the_images_is_refused(student, teacher):
    class Cache:
        def logits(self, *_):
            raise AssertionError('asked')

    with pytest.raises(ValueError, match='indices'):
        DistillationTask(student, teacher, 'rld', cache=Cache())(PIXELS, TARGET)


def test_without_a_criterion_it_is_cross_entropy_with_smoothing(student):
    out = DistillationTask(student, None, None, smoothing=0.1)(PIXELS, TARGET)
    expected = nn.functional.cross_entropy(out['output'], TARGET, label_smoothing=0.1)
    assert out['loss'].item() == pytest.approx(expected.item(), rel=1e-5) and 'kd_loss' not in out


def test_a_criterion_without_a_teacher_is_refused(student):
    with pytest.raises(ValueError, match='needs a teacher'):
        DistillationTask(student, None, 'rld')


def test_ema_and_checkpoint_state_hold_the_student_alone(student, teacher):
    task = DistillationTask(student, teacher, 'rld')
    task.setup_ema(decay=0.5)
    task.update_ema(step=1)
    state = task.get_checkpoint_state()['state_dict']
    assert set(state) == set(student.state_dict())
    assert set(task.trainable_module_ema.module.state_dict()) == set(student.state_dict())


def test_a_criterion_that_learns_hands_its_parameters_to_optimizer_and_checkpoint(student, teacher):
    task = DistillationTask(student, teacher, 'ctkd')
    (theta,) = task.criterion_parameters()
    task.set_epoch(3)
    task(PIXELS, TARGET)['loss'].backward()
    assert theta.grad is not None and theta.grad != 0
    with torch.no_grad():
        theta.fill_(2.0)
    other = DistillationTask(student, teacher, 'ctkd')
    checkpoint = task.get_checkpoint_state()
    other.load_checkpoint_state(checkpoint['state_dict'], checkpoint['task_state'])
    assert other.criterion.theta.item() == 2.0
    assert DistillationTask(student, teacher, 'rld').get_task_state() == {}


def test_networks_stay_on_their_device_where_none_is_named(student):
    with torch.device('meta'):
        elsewhere = timm.create_model('test_resnet', num_classes=3)
    task = DistillationTask(elsewhere, None, None)
    assert task.device.type == 'meta' and {p.device.type for p in elsewhere.parameters()} == {'meta'}
    assert DistillationTask(student, None, None, device=torch.device('cpu')).device.type == 'cpu'


def test_soft_targets_reach_a_student_with_two_heads_and_are_refused_beside_class_weights(teacher):
    student = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=3, img_size=32, depth=1)
    student.set_distilled_training(True)
    soft = nn.functional.one_hot(TARGET, 3).float()
    task = DistillationTask(student.train(), teacher, 'kd')
    assert task(PIXELS, soft)['loss'].item() == pytest.approx(task(PIXELS, TARGET)['loss'].item(), rel=1e-6)
    weighted = DistillationTask(student, None, None, class_weights=torch.ones(3))
    with pytest.raises(ValueError, match='class weights need class indices'):
        weighted(PIXELS, soft)


def test_a_state_that_lacks_what_a_task_learns_is_refused_if_strict(student, teacher):
    task = DistillationTask(student, teacher, 'ctkd')
    with pytest.raises(ValueError, match="has no 'criterion'"):
        task.load_task_state({})
    task.load_task_state({}, strict=False)
