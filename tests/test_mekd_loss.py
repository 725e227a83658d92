"""The networks and losses of MEKD against the values of the published program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_models import fill, noise
from torch import Tensor, nn

from timm_rld import Generator, create_distill_loss, mekd_loss
from timm_rld.loss import (
    adversarial_loss,
    discriminator_loss,
    information_loss,
    mekd_losses,
    top_probability,
)
from timm_rld.models import Discriminator, generator_of

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'mekd.json').read_text())
NETWORKS = {f'{n["img_size"]}x{n["channels"]}x{n["classes"]}': n for n in GOLDEN['networks']}
STAGE1 = {case['id']: case for case in GOLDEN['stage1']}
STAGE2 = {case['id']: case for case in GOLDEN['stage2']}
TRACES = [name for name in GOLDEN['traces'] if name != 'stage1']


def f64(x) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def same(found, expected, rel: float = 1e-10):
    found = found.detach().flatten().tolist() if isinstance(found, Tensor) else [found]
    expected = f64(expected).flatten().tolist()
    assert found == pytest.approx(expected, rel=rel, abs=1e-15)


class Tiny(nn.Module):
    """tanh(W y + b), the reference's generator."""

    def __init__(self, W, b, shape, **_) -> None:
        super().__init__()
        self.W, self.b, self.shape = nn.Parameter(f64(W)), nn.Parameter(f64(b)), shape

    def forward(self, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.W.T + self.b).view(len(y), *self.shape)


# ------------------------------------------------------------------------------------------------------------- networks


def check_images(images: Tensor, expected: dict) -> None:
    n = images.shape[-1]
    same(images.mean(), expected['mean'], 1e-8)
    same(images.abs().mean(), expected['mean_abs'], 1e-8)
    same(images.norm(), expected['norm'], 1e-8)
    at = [(0, 0), (1, 7), (5, 3), (n - 1, n - 1)]
    same(torch.stack([images[:, 0, y, x] for y, x in at], 1), expected['pixels_c0'], 1e-8)
    at = [(0, 1), (2, 0), (n // 2, n // 2), (n - 1, 0)]
    same(torch.stack([images[:, -1, y, x] for y, x in at], 1), expected['pixels_last'], 1e-8)


@pytest.mark.parametrize('name', NETWORKS)
def test_the_networks_have_the_published_sizes_and_images(name):
    expected = NETWORKS[name]
    n, k, c = expected['img_size'], expected['channels'], expected['classes']
    generator, discriminator = Generator(c, n, k).double(), Discriminator(n, k).double()
    for network, what in ((generator, 'generator'), (discriminator, 'discriminator')):
        fill(network)
        assert sum(p.numel() for p in network.parameters()) == expected[f'{what}_parameters']
        if names := expected.get(f'{what}_state'):
            assert {key: list(v.shape) for key, v in network.state_dict().items()} == names
    if 'eval' not in expected:
        return
    images = generator.eval()(2 * noise(2 * c, 1).reshape(2, c))
    check_images(images, expected['eval']['images'])
    scores = discriminator.eval()(images)
    same(scores, expected['eval']['discriminator_scores'], 1e-8)
    same(scores.sigmoid(), expected['eval']['discriminator'], 1e-8)
    trained = expected['train_mode_generator']
    check_images(generator.train()(2 * noise(4 * c, 2).reshape(4, c)), trained['images'])
    state = generator.state_dict()
    for key, norm in {**trained['running_mean_norm'], **trained['running_var_norm']}.items():
        same(state[key].norm(), norm, 1e-8)


def test_batch_norms_have_the_published_epsilons():
    (expected,) = (n['batch_norm_eps'] for n in NETWORKS.values() if 'batch_norm_eps' in n)
    networks = {'generator': Generator(10), 'discriminator': Discriminator()}
    found = {
        f'{what}.{name}': m.eps
        for what, network in networks.items()
        for name, m in network.named_modules()
        if isinstance(m, nn.BatchNorm2d)
    }
    assert found == expected


def test_convolutions_and_batch_norms_start_as_published():
    torch.manual_seed(0)
    for network in (Generator(10), Discriminator()):
        for m in network.modules():
            if isinstance(m, nn.Conv2d):
                assert m.weight.std().item() == pytest.approx(0.02, rel=0.2)
            elif isinstance(m, nn.BatchNorm2d):
                assert m.weight.mean().item() == pytest.approx(1, abs=0.02) and not m.bias.any()
                assert 0 < m.weight.std().item() < 0.04


def test_other_sizes_grow_the_linear_layers_alone_and_huge_ones_are_refused():
    assert sum(p.numel() for p in Generator(200, 64).parameters()) == pytest.approx(6.8e6, rel=0.01)
    assert Generator(5, 16, 1)(torch.zeros(2, 5)).shape == (2, 1, 16, 16)
    with pytest.raises(ValueError, match='multiple of 16 pixels; 32 is one'):
        Generator(10, 28)
    with pytest.raises(ValueError, match='402 million weights'):
        Generator(1000, 224)
    with pytest.raises(ValueError, match='at least 2 classes'):
        Generator(1)


def test_a_generators_sizes_follow_from_its_weights():
    original = Generator(7, 48, 1)
    found = generator_of(original.state_dict())
    assert (found.num_classes, found.img_size, found.in_chans) == (7, 48, 1)
    z = torch.randn(2, 7)
    assert torch.equal(found.eval()(z), original.eval()(z))
    for state in ({}, Discriminator().state_dict(), {'l1.0.weight': torch.zeros(3)}):
        with pytest.raises(ValueError, match='not the weights of a generator'):
            generator_of(state)


# -------------------------------------------------------------------------------------------------------------- phase 1


@pytest.mark.parametrize('name', STAGE1)
def test_losses_of_phase_1_are_the_published_ones_and_finite_where_those_saturate(name):
    case = STAGE1[name]
    expected, in_log_space = case['expected'], case['expected_log_space']
    real, fake, adv, im = (
        f64(case[k]).requires_grad_()
        for k in ('real_scores', 'fake_scores_d_step', 'fake_scores_g_step', 'fake_scores_im_pass')
    )
    teacher, w = f64(case['teacher_logits']), case['w_im']
    d_loss = discriminator_loss(real, fake)
    d_loss.backward()
    same(d_loss, in_log_space['d_loss'])
    same(real.grad, in_log_space['grad_d_loss_real'])
    same(fake.grad, in_log_space['grad_d_loss_fake'])
    g_adv, coded = adversarial_loss(adv), information_loss(im, teacher, info='coded')
    same(g_adv, in_log_space['g_adv'])
    same(coded, in_log_space['g_im_coded'])
    (g_adv + w * coded).backward()
    same(g_adv + w * coded, in_log_space['g_loss_coded'])
    same(adv.grad, in_log_space['grad_g_loss_coded_fake'])
    same(im.grad, expected['grad_g_loss_coded_im'])
    same(top_probability(teacher), expected['teacher_top_probability'])
    same(information_loss(im, teacher, 'hard'), expected['g_im_paper_hard'])
    im.grad = None
    soft = information_loss(im, teacher)
    same(soft, expected['g_im_paper_soft'])
    same(information_loss(im, teacher.log_softmax(1), 'soft'), expected['g_im_paper_soft'])
    same(information_loss(im, top_probability(teacher)), expected['g_im_paper_soft'])
    (w * soft).backward()
    same(im.grad, expected['grad_g_loss_paper_soft_im'])
    if name != 'saturated_4x5':
        for ours, theirs in ((d_loss, 'd_loss'), (g_adv, 'g_adv'), (g_adv + w * soft, 'g_loss_paper_soft')):
            same(ours, expected[theirs])


def test_losses_of_phase_1_are_finite_in_float32_at_any_score():
    scores = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4], requires_grad=True)
    teacher = torch.eye(5) * 1e4
    total = discriminator_loss(scores, scores) + adversarial_loss(scores)
    total = total + information_loss(scores, teacher) + information_loss(scores, teacher, info='coded')
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(scores.grad).all()


def test_three_steps_of_phase_1_are_the_published_ones():
    trace = GOLDEN['traces']['stage1']
    generator = Tiny(**trace['generator'])
    v, c = (nn.Parameter(f64(trace['discriminator'][k])) for k in 'vc')
    V, d = (f64(trace['teacher'][k]) for k in 'Vd')
    o = trace['options']
    adam = dict(lr=o['lr'], betas=tuple(o['betas']), eps=o['eps'])
    of_d, of_g = torch.optim.Adam([v, c], **adam), torch.optim.Adam(generator.parameters(), **adam)

    def scores(images: Tensor) -> Tensor:
        return images.flatten(1) @ v + c

    for step in trace['steps']:
        of_d.zero_grad()
        loss = discriminator_loss(scores(f64(step['real'])), scores(generator(f64(step['z_d'])).detach()))
        same(loss, step['d_loss'], 1e-8)
        loss.backward()
        of_d.step()
        of_g.zero_grad()
        images = generator(f64(step['z_g']))
        answers = (images.flatten(1) @ V.T + d).detach()
        adv, im = adversarial_loss(scores(images)), information_loss(scores(images), answers, info='coded')
        same(adv, step['g_adv'], 1e-8)
        same(im, step['g_im_coded'], 1e-8)
        (adv + o['w_im'] * im).backward()
        of_g.step()
    for found, name in ((generator.W, 'W'), (generator.b, 'b'), (v, 'v'), (c, 'c')):
        same(found, trace['final'][name], 1e-8)


# -------------------------------------------------------------------------------------------------------------- phase 2


def options_of(case: dict) -> dict:
    o = case['options']
    return dict(temperature=o['t'], gen_temperature=o['gen_t'], image_weight=o['w_f'], kl_weight=o['w_kl'],
                norm=case.get('norm') or o['norm'])  # fmt: skip


@pytest.mark.parametrize('name', STAGE2)
def test_the_loss_of_phase_2_and_its_gradient_are_the_published_ones(name):
    case = STAGE2[name]
    expected, other = case['expected'], case['other']
    generator, teacher = Tiny(**case['generator']), f64(case['teacher_logits'])
    student, options = f64(case['student_logits']).requires_grad_(), options_of(case)
    hard = case['options']['res_type'] == 'hard'
    given, answers = (teacher.argmax(1), 'hard') if hard else (teacher, 'logits')
    loss = mekd_loss(student, given, generator, **options, answers=answers)
    loss.backward()
    same(loss, expected['loss'])
    same(student.grad, expected['grad_student'])
    used = F.one_hot(given, teacher.shape[1]).double() if hard else teacher
    same(used, expected['teacher_used'])
    images, kl = mekd_losses(student, used, generator, options['temperature'], options['gen_temperature'],
                             options['norm'])  # fmt: skip
    same(images, expected['loss_f'])
    same(kl, expected['loss_kl'])
    for term, weights in (('f', {'kl_weight': 0.0}), ('kl', {'image_weight': 0.0})):
        alone = f64(case['student_logits']).requires_grad_()
        mekd_loss(alone, given, generator, **{**options, **weights}, answers=answers).backward()
        same(alone.grad, expected[f'grad_from_{term}'])
    if other['loss_centred'] is not None:
        same(mekd_loss(student, teacher.softmax(1), generator, **options, answers='soft'), other['loss_centred'])


@pytest.mark.parametrize('name', STAGE2)
def test_the_papers_form_is_reached_by_arguments(name):
    case = STAGE2[name]
    teacher, student = f64(case['teacher_logits']), f64(case['student_logits'])
    generator, o, other = Tiny(**case['generator']), options_of(case), case['other']
    pixels = generator(student)[0].numel()
    hard = case['options']['res_type'] == 'hard'
    used = F.one_hot(teacher.argmax(1), teacher.shape[1]).double() if hard else teacher
    images = mekd_loss(student, used, generator, **{**o, 'kl_weight': 0.0, 'image_weight': pixels, 'norm': 'l1'})
    same(images, other['loss_f_paper_sum_over_pixels'])
    kl = mekd_loss(student, teacher, generator, temperature=1, kl_weight=1, image_weight=0)
    same(kl, other['kl_paper_no_temperature'])
    same(images + 0.5 * kl, other['loss_paper_beta_0_5'])
    if not hard:
        same(mekd_loss(student, teacher, generator, temperature=1, gen_temperature=o['gen_temperature'],
                       kl_weight=0.5, image_weight=pixels), other['loss_paper_beta_0_5'])  # fmt: skip


def test_hard_answers_are_softened_as_published():
    for row in GOLDEN['hard_kl_target']['rows']:
        target = (F.one_hot(torch.tensor(0), row['C']).double() / row['t']).softmax(0)
        same(target[0], row['top'])
        same(target[1], row['other'])


@pytest.mark.parametrize('name', TRACES)
def test_three_steps_of_phase_2_are_the_published_ones(name):
    trace = GOLDEN['traces'][name]
    generator = Tiny(**trace['generator'])
    V, d = (nn.Parameter(f64(trace['student'][k])) for k in 'Vd')
    teacher_V, teacher_d = (f64(trace['teacher'][k]) for k in 'Vd')
    o = trace['options']
    sgd = torch.optim.SGD([V, d], o['lr'], o['momentum'], weight_decay=o['weight_decay'])
    criterion = create_distill_loss('mekd', generator=generator, norm=trace['norm'])
    hard = trace['res_type'] == 'hard'
    criterion.use(generator, 'hard' if hard else 'logits')
    for step in trace['steps']:
        images = generator(f64(step['z']))
        same(images.flatten(1), step['images'], 1e-8)
        answers = (images.flatten(1) @ teacher_V.T + teacher_d).detach()
        used = F.one_hot(answers.argmax(1), answers.shape[1]).double() if hard else answers
        sgd.zero_grad()
        loss = criterion(images.flatten(1).detach() @ V.T + d, used)
        same(loss, step['loss'], 1e-8)
        same(criterion.diagnostics['image_loss'], step['loss_f'], 1e-8)
        same(criterion.diagnostics['kl_loss'], step['loss_kl'], 1e-8)
        loss.backward()
        sgd.step()
    same(V, trace['final']['V'], 1e-8)
    same(d, trace['final']['d'], 1e-8)


def test_the_module_freezes_its_generator_and_centres_soft_answers():
    torch.manual_seed(0)
    generator = Generator(5, 16).double()
    criterion = create_distill_loss('mekd', generator=generator).double().train()
    assert not any(m.training for m in generator.modules()) and not any(p.requires_grad for p in criterion.parameters())
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    criterion.use(generator, 'soft')
    loss = criterion(student, teacher.log_softmax(1))
    same(loss, mekd_loss(student, teacher.softmax(1), generator, answers='soft').item())
    criterion.use(generator, 'logits')
    assert criterion(student, teacher).item() != pytest.approx(loss.item(), rel=1e-6)
    assert 0 <= criterion.diagnostics['agreement'].item() <= 1


@pytest.mark.parametrize(
    'options, message',
    [
        ({'norm': 'l3'}, 'norm must be l1 or l2'),
        ({'temperature': 0}, 'temperature must be a positive number'),
        ({'image_weight': -1}, 'image_weight must be a finite number'),
        ({'alpha': 1}, "has no option 'alpha'"),
    ],
)
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        create_distill_loss('mekd', **options)


def test_without_a_generator_or_with_other_answers_there_is_no_loss():
    logits = torch.randn(2, 5)
    with pytest.raises(ValueError, match='needs a generator'):
        create_distill_loss('mekd')(logits, logits)
    with pytest.raises(ValueError, match='answers must be logits, soft or hard'):
        mekd_loss(logits, logits, Generator(5, 16), answers='classes')


def test_a_generator_of_another_precision_than_the_logits_is_asked_in_its_own():
    logits = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = Tiny(torch.randn(3 * 16, 4).double(), torch.randn(3 * 16).double(), (3, 4, 4))
    expected = mekd_loss(*logits, generator)
    assert mekd_loss(*logits, generator.float()).item() == pytest.approx(expected.item(), rel=1e-5)
