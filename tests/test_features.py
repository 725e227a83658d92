"""Features of a pair of networks: which maps are paired, and runs that distil them."""

from __future__ import annotations

import copy
import csv
import itertools
import json

import pytest
import timm
import torch
from timm.task import FeatureDistillationTask
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train_distill
from timm_rld import DistillationTask
from timm_rld.config import Config, load_yaml, parse_args, resolve
from timm_rld.engine import Checkpoints
from timm_rld.errors import UsageError, UserError
from timm_rld.hub.card import card_section
from timm_rld.loss import FEATURES, published_defaults
from timm_rld.pairing import (
    Normalize,
    Pair,
    Teacher,
    close_teacher,
    create_normalize,
    forward_with_features,
    look_at_features,
    pair_maps,
)  # fmt: skip
from timm_rld.report import write_report
from timm_rld.run_folder import read_run
from timm_rld.runs import parse_variant
from timm_rld.task import create_features
from timm_rld.tune.candidates import published

# Cheap members of families whose features differ in kind: with a stem, without, isotropic, one map a block, windows.
FAMILIES = {
    'cifar_resnet8': {},
    'test_resnet': {},
    'test_convnext': {},
    'test_vit': dict(img_size=64),
    'test_efficientnet': {},
}
SIZE = (3, 64, 64)


def network(name: str, classes: int = 5, **kwargs) -> nn.Module:
    return timm.create_model(name, num_classes=classes, **(FAMILIES.get(name, {}) | kwargs))


def pair_of(student: nn.Module, teacher: nn.Module, size=SIZE) -> Pair:
    view = Normalize((0.5,) * 3, (0.25,) * 3)
    return Pair(student, Teacher(copy.deepcopy(teacher), view), view, {'input_size': size})


# --------------------------------------------------------------------------------------------------------------- pairs


@pytest.fixture(scope='module')
def networks():
    torch.manual_seed(0)
    return {name: network(name) for name in FAMILIES}


@pytest.mark.parametrize(('student', 'teacher'), list(itertools.product(FAMILIES, FAMILIES)))
def test_any_two_families_are_paired_and_the_student_learns_from_the_maps(student, teacher, networks):
    pair = pair_of(networks[student].train(), networks[teacher])
    said: list[str] = []
    features = create_features(pair, 'at', log=said.append)
    sizes = [(s.size, t.size) for s, t in features.pairs]
    assert len(sizes) >= 2 and sizes == sorted(sizes, reverse=True)
    assert not any(m.stem for p in features.pairs for m in p)
    assert [p[0].index for p in features.pairs][-1] == max(m.index for m, _ in features.pairs)
    assert said[0].startswith('features (at), student ← teacher: ') and said[0].count('←') == len(sizes) + 1
    task = DistillationTask(pair.student, pair.teacher, None, task_loss_weight=0, features=features).train()
    out = task(torch.randint(256, (2, *SIZE), dtype=torch.uint8), torch.tensor([0, 1]))
    pair.student.zero_grad()
    out['loss'].backward()
    assert out['feature_loss'].isfinite() and out['loss'].isfinite()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in pair.student.parameters())


@pytest.mark.parametrize(
    ('name', 'size', 'stages'),
    [
        ('cifar_resnet8', 32, [0, 1, 2, 3]),
        ('cifar_wrn_16_1', 32, [0, 1, 2, 3]),
        ('cifar_vgg8', 32, [0, 1, 2, 3, 4]),  # the last two have one size, and are two stages of the published network
        ('cifar_mobilenetv2', 32, [0, 1, 2, 3, 4]),
        ('cifar_shufflev2', 32, [0, 1, 2, 3]),
        ('test_resnet', 64, [0, 1, 2, 3, 4]),
        ('test_convnext', 64, [0, 1, 2, 3]),
        ('test_vit', 64, [1, 2, 4, 5]),
    ],
)
def test_the_stages_of_a_network_are_the_stem_and_the_last_map_of_each_size(name, size, stages):
    model = timm.create_model(name, num_classes=5, **(dict(img_size=size) if 'vit' in name else {}))
    features = look_at_features(model, (3, size, size), name, train=True)
    assert [m.index for m in features.stages(4)] == stages
    stem = 'vit' not in name and 'convnext' not in name
    assert [m.stem for m in features.stages(4)] == [stem and not i for i in stages]


def test_maps_are_paired_from_the_deepest_and_a_transformer_has_as_many_as_the_other_has_stages(networks):
    looked = {name: look_at_features(net, SIZE, name) for name, net in networks.items()}
    pairs = pair_maps(looked['test_resnet'], looked['test_convnext'])
    assert [(s.index, t.index) for s, t in pairs] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    pairs = pair_maps(looked['cifar_resnet8'], looked['test_vit'])
    assert [(s.index, t.index) for s, t in pairs] == [(1, 1), (2, 3), (3, 5)]
    assert [(s.index, t.index) for s, t in pair_maps(*[looked['test_vit']] * 2, ['2', '3:5'])] == [(2, 2), (3, 5)]


@pytest.mark.parametrize(
    ('name', 'stages', 'message'),
    [
        ('at', ['7'], 'the student has no map 7; it has 0 (16×64×64), 1 (16×64×64)'),
        ('at', ['x'], '--feature-stages x: expected the number of a map, or two as 2:3'),
        ('at', ['2', '1'], '--feature-stages 2 1: name each map once, from the shallowest on'),
        ('rkd', ['1'], '--feature-stages 1: rkd takes pooled features, and no maps'),
    ],
)
def test_maps_that_there_are_not_are_refused_with_those_that_there_are(name, stages, message, networks):
    with pytest.raises(UserError) as e:
        create_features(pair_of(networks['cifar_resnet8'], networks['cifar_resnet8']), name, stages=stages)
    assert message in str(e.value)


class Plain(nn.Module):
    """A classifier without timm's interface to features."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x):
        return self.fc(x.mean(dim=(2, 3)))


def wrong(what: str) -> nn.Module:
    if what == 'patches are dropped':
        return network('test_vit', patch_drop_rate=0.5)
    if what == 'no maps':
        return Plain()
    model = network('cifar_resnet8')
    if what == 'other channels':
        model.feature_info[2]['num_chs'] = 7
    elif what == 'other size':
        model.feature_info[2]['reduction'] = 32
    elif what == 'fewer maps':
        del model.feature_info[3]
    elif what == 'other logits':
        plain = model.forward_intermediates
        model.forward_intermediates = lambda x, **kw: (plain(x, **kw)[0] + 1, plain(x, **kw)[1])
    return model


@pytest.mark.parametrize(
    ('what', 'message'),
    [
        ('patches are dropped', 'the student cannot be asked for features'),
        ('no maps', 'it has no forward_intermediates'),
        ('other channels', 'its map 2 has 32 channels in training, its feature_info says 7'),
        ('other size', 'its map 2 is 32 wide, its feature_info says a 32th of 64'),
        ('fewer maps', 'it gives 4 maps, its feature_info lists 3'),
        ('other logits', 'it gives other logits with its features than without'),
    ],
)
def test_a_network_whose_maps_are_not_what_it_says_is_refused_with_the_reason(what, message, networks):
    with pytest.raises(UserError) as e:
        create_features(pair_of(wrong(what), networks['test_vit']), 'at')
    assert message in str(e.value)


def test_a_closed_teacher_has_no_features(networks):
    pair = pair_of(networks['cifar_resnet8'], networks['cifar_resnet8'])
    pair.teacher = close_teacher(pair.teacher, 'hard')
    with pytest.raises(UserError, match='the teacher is closed: it answers .hard., and shows no features'):
        create_features(pair, 'at')
    flags = ['--teacher', 'resnet34', '--student', 'resnet18', '--feature-distill', 'at', '--black-box', 'soft']
    with pytest.raises(UsageError, match='--feature-distill at with --black-box soft: a closed teacher answers'):
        resolve(parse_args(flags))


def test_looking_at_a_network_changes_nothing_in_it(networks):
    model = network('cifar_resnet8').train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    look_at_features(model, SIZE, 'it', train=True)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_folding_batch_norms_leaves_the_features_as_they_were():
    torch.manual_seed(0)
    model = timm.create_model('cifar_wrn_16_1', num_classes=5)  # only a batch norm reads what its stem gives
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2), m.running_var.uniform_(0.5, 2)
    pair = pair_of(timm.create_model('cifar_wrn_16_1', num_classes=5), model, (3, 32, 32))
    create_features(pair, 'fitnet', options={'stage': 1})
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    logits, (stem,) = pair.teacher.with_features(pixels)
    assert pair.teacher.optimize_for_inference((3, 32, 32)) > 0
    again, (folded,) = pair.teacher.with_features(pixels)
    assert torch.allclose(folded, stem, atol=1e-5) and torch.allclose(again, logits, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- task


@pytest.mark.parametrize('teacher', ['test_resnet', 'cifar_resnet8'])
def test_feature_is_timms_task_on_one_batch(teacher):
    torch.manual_seed(0)
    student, taught = network('cifar_resnet8').double(), network(teacher).double()
    for net in (student, taught):
        net.pretrained_cfg = dict(net.pretrained_cfg, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), input_size=SIZE)
    theirs = FeatureDistillationTask(student, taught, nn.CrossEntropyLoss(), distill_loss_weight=3.0, verbose=False,
                                     dtype=torch.float64)  # fmt: skip
    pair = Pair(student, Teacher(copy.deepcopy(taught)), create_normalize(student), {'input_size': SIZE})
    ours = DistillationTask(pair.student, pair.teacher, None, features=create_features(pair, 'feature'),
                            feature_loss_weight=3.0, dtype=torch.float64)  # fmt: skip
    ours.double().train()
    if theirs.trainable_module.projection is not None:
        ours.feature_criterion.projection.load_state_dict(theirs.trainable_module.projection.state_dict())
    x, target = torch.randn(4, *SIZE, dtype=torch.float64), torch.tensor([0, 1, 2, 4])
    found = {name: task.train()(x, target) for name, task in (('theirs', theirs), ('ours', ours))}
    for ours_key, key in (('loss', 'loss'), ('task_loss', 'task_loss'), ('feature_loss', 'kd_loss')):
        assert found['ours'][ours_key].item() == pytest.approx(found['theirs'][key].item(), rel=1e-6)


def test_one_forward_pass_gives_logits_and_features_that_are_those_of_two(networks):
    model, x = networks['cifar_resnet8'].eval(), torch.randn(2, *SIZE)
    pair = pair_of(model, networks['cifar_resnet8'])
    for name in ('reviewkd', 'rkd', 'at'):
        taps = create_features(pair, name).student
        logits, found = forward_with_features(model, x, taps)
        assert torch.allclose(logits, model(x), atol=1e-5)
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert all(torch.equal(f, maps[i]) for f, i in zip(found, taps.indices))
        assert not taps.pooled or torch.allclose(found[-1], maps[-1].mean(dim=(2, 3)), atol=1e-5)


class Operations(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', ['cifar_resnet8', 'test_resnet'])
def test_asking_for_maps_adds_no_operation_to_the_pass_of_a_convolutional_network(name, networks):
    model, x = networks[name].eval(), torch.randn(2, *SIZE)
    taps = create_features(pair_of(model, networks['cifar_resnet8']), 'at').student
    with torch.no_grad(), Operations() as plain:
        model(x)
    with torch.no_grad(), Operations() as asked:
        forward_with_features(model, x, taps)
    assert asked.count == plain.count > 20


def pixels_and_target(size: int = 32):
    return torch.randint(256, (4, 3, size, size), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize('name', list(FEATURES))
def test_the_loss_of_a_step_is_the_sum_of_its_terms(name):
    torch.manual_seed(0)
    pair = pair_of(network('cifar_resnet8'), network('cifar_resnet14'), (3, 32, 32))
    features = create_features(pair, name)
    task = DistillationTask(pair.student, pair.teacher, 'kd', features=features, feature_warmup_epochs=4)
    task.set_epoch(1)
    out = task.train()(*pixels_and_target())
    expected = 0.1 * out['task_loss'] + 0.9 * out['kd_loss'] + FEATURES[name].weight / 4 * out['feature_loss']
    assert out['loss'].item() == pytest.approx(expected.item(), rel=1e-5)
    out['loss'].backward()
    assert all(p.grad is not None for p in (*pair.student.parameters(), *task.feature_parameters()))
    assert bool(task.feature_parameters()) == (name in ('fitnet', 'reviewkd'))
    assert all(p.grad is None for p in pair.teacher.parameters())


def test_what_a_method_learns_is_in_checkpoints_and_clipped_and_the_student_has_none_of_it():
    pair = pair_of(network('cifar_resnet8'), network('cifar_resnet8'), (3, 32, 32))
    task = DistillationTask(pair.student, pair.teacher, None, features=create_features(pair, 'fitnet'))
    task.setup_ema(decay=0.5)
    assert set(task.get_task_state()['features']) == {'conv.weight', 'conv.bias', 'bn.weight', 'bn.bias'}
    with torch.no_grad():
        task.feature_criterion.bn.weight.fill_(3.0)
    other = DistillationTask(pair.student, pair.teacher, None, features=create_features(pair, 'fitnet', seed=1))
    other.load_task_state(task.get_task_state())
    assert other.feature_criterion.bn.weight[0].item() == 3.0
    names = set(pair.student.state_dict())
    wrapped = task.module_to_wrap()
    assert set(task.get_checkpoint_state()['state_dict']) == names == set(wrapped.module.state_dict())
    assert set(task.trainable_module_ema.module.state_dict()) == names
    assert {id(p) for p in task.feature_parameters()} <= {id(p) for p in task.get_clip_parameters()}
    task.trainable_module = wrapped
    assert task(*pixels_and_target())['feature_loss'].isfinite()
    task.update_ema(step=1)
    task.unwrap(pair.student)
    assert task.trainable_module is pair.student and task(*pixels_and_target())['feature_loss'].isfinite()


def test_layers_of_a_method_follow_from_the_seed_and_leave_the_generator_alone():
    pair = pair_of(network('cifar_resnet8'), network('cifar_resnet8'), (3, 32, 32))
    state = torch.random.get_rng_state()
    a, b, c = (create_features(pair, 'reviewkd', seed=s).criterion.abfs[0].conv2[0].weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.random.get_rng_state(), state)


def test_compiled_a_step_is_the_same():
    torch.manual_seed(0)
    pair = pair_of(network('cifar_resnet8'), network('cifar_resnet8'), (3, 32, 32))
    task = DistillationTask(pair.student, pair.teacher, 'kd', features=create_features(pair, 'reviewkd')).train()
    batch = pixels_and_target()
    plain = task(*batch)
    compiled = task.compile(backend='eager')
    again = task(*batch)
    assert again['feature_loss'].item() == pytest.approx(plain['feature_loss'].item(), rel=1e-4)
    assert compiled is task.get_eval_model() and compiled(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_a_cache_of_logits_is_read_while_the_teacher_is_asked_for_features():
    class Cache:
        def logits(self, epoch, indices, target, compute):
            return torch.full((4, 5), 7.0)

    pair = pair_of(network('cifar_resnet8'), network('cifar_resnet8'), (3, 32, 32))
    said: list[str] = []
    features = create_features(pair, 'at', cache='folder', log=said.append)
    task = DistillationTask(pair.student, pair.teacher, 'kd', features=features, cache=Cache())
    images, target = pixels_and_target()
    logits, maps = task.ask_teacher(images, target, torch.arange(4), 1)
    assert (logits == 7).all() and len(maps) == 3 and 'holds logits alone' in said[-1]


# ---------------------------------------------------------------------------------------------------- settings, runs


def test_weight_and_ramp_are_the_rows_and_a_flag_that_replaces_the_method_sets_its_options_aside(tmp_path):
    base = ['--teacher', 'resnet34', '--student', 'resnet18', '--data-dir', 'D', '--epochs', '24']
    config = resolve(parse_args([*base, '--feature-distill', 'reviewkd']), published=published_defaults)
    assert (config.feature_loss_weight, config.feature_warmup_epochs, config.method) == (5, 2, 'rld-reviewkd')
    assert resolve(parse_args(base), published=published_defaults).feature_loss_weight is None
    (tmp_path / 'a.yaml').write_text('feature_distill: at\nfeature_kwargs: {p: 4}\nfeature_loss_weight: 9\n')
    kept = parse_args(['--config', str(tmp_path / 'a.yaml'), '--feature-distill', 'at'])
    assert (kept.feature_kwargs, kept.feature_loss_weight) == ({'p': 4}, 9)
    other = parse_args(['--config', str(tmp_path / 'a.yaml'), '--feature-distill', 'sp'])
    assert (other.feature_kwargs, other.feature_loss_weight) == ({}, None)
    with pytest.raises(UsageError, match='--feature-stages: needs --feature-distill NAME'):
        resolve(parse_args([*base, '--feature-stages', '1']))


def test_a_variant_of_a_comparison_has_a_method_on_features_after_a_plus():
    assert parse_variant('none+fitnet:stage=3,feature_loss_weight=50').flags == (
        '--distill', 'none', '--feature-distill', 'fitnet', '--feature-loss-weight', '50',
        '--feature-kwargs', 'stage=3', '--no-standardize',
    )  # fmt: skip
    assert parse_variant('rld:beta=1e+3+at:feature_stages=[1,2:3]').flags == (
        '--distill', 'rld', '--distill-kwargs', 'beta=1e+3', '--feature-distill', 'at', '--feature-stages', '1', '2:3',
    )  # fmt: skip
    with pytest.raises(UsageError, match='tune searches criteria alone'):
        published('rld+at', Config(epochs=1))
    for text, message in (
        ('rld+att', "unknown method 'att' (did you mean 'at'"),
        ('rld+at:q=1', "method 'at' has no option 'q'"),
        ('none+fitnet:stge=3', "(did you mean 'stage'?); it has: stage"),
        ('rld+at+sp', 'expected one criterion and at most one method'),
        ('+at', 'unknown criterion'),
    ):
        with pytest.raises(UsageError) as e:
            parse_variant(text)
        assert message in str(e.value) and str(e.value).startswith(f'--criteria {text}: ')


@pytest.fixture
def flags(folder, trained_teacher, tmp_path) -> list[str]:
    return ['--teacher', f'local-dir:{trained_teacher}', '--student', 'test_resnet', '--data-dir', str(folder),
            '--img-size', '32', '--epochs', '2', '--lr', '0.01', '-b', '8', '--workers', '0', '--min-teacher-acc', '0',
            '--no-speed', '--output', str(tmp_path)]  # fmt: skip


def test_a_run_distils_features_alone_and_leaves_a_plain_student(flags, tmp_path, capsys):
    argv = [*flags, '--distill', 'none', '--feature-distill', 'reviewkd', '--model-ema', '--grad-accum-steps', '2',
            '--clip-grad', '1', '--mixed-precision', 'bf16', '--experiment', 'x']  # fmt: skip
    assert train_distill.main(argv) == 0
    run = tmp_path / 'x'
    said = capsys.readouterr().out
    assert 'features (reviewkd), student ← teacher: 1 (' in said and 'pooled features' in said
    rows = list(csv.DictReader((run / 'summary.csv').open()))
    assert all(float(row['train_feature_loss']) > 0 for row in rows) and 'train_kd_loss' in rows[0]
    results, settings = json.loads((run / 'results.json').read_text()), load_yaml(str(run / 'args.yaml'))
    assert (results['distill'], results['feature_distill']) == ('none', 'reviewkd')
    assert (settings['feature_loss_weight'], settings['feature_warmup_epochs']) == (5, 1)
    card = card_section(read_run(run), 'me/x', 'last', False)
    assert 'by `reviewkd` distillation' in card and '- Features: `reviewkd` (options: as published), weight 5.' in card
    with pytest.raises(UserError, match='was trained with --feature-distill reviewkd'):
        write_report(run, tmp_path / 'page.html', baseline=run)
    plain = set(timm.create_model('test_resnet', num_classes=3).state_dict())
    for folder in ('student', 'student_ema'):
        model = timm.create_model(f'local-dir:{run / folder}', pretrained=True)
        assert set(model.state_dict()) == plain


def test_a_run_goes_on_from_a_checkpoint_to_the_same_student_bit_for_bit(flags, tmp_path, capsys):
    argv = [*flags, '--distill', 'kd', '--feature-distill', 'fitnet', '--feature-kwargs', 'stage=2', '--mixup', '0.3',
            '--checkpoint-interval', '1', '--checkpoint-hist', '99', '--opt', 'adamw', '--experiment', 'x']  # fmt: skip
    assert train_distill.main(argv) == 0
    run = tmp_path / 'x'
    whole = [(run / 'student' / 'model.safetensors').read_bytes(), (run / 'summary.csv').read_text()]
    name = Checkpoints(run / 'checkpoints').names()[1]
    (run / 'results.json').unlink()
    assert train_distill.main(['--resume', str(run / 'checkpoints' / name)]) == 0
    assert 'student: resuming in epoch 1' in capsys.readouterr().out
    assert (run / 'student' / 'model.safetensors').read_bytes() == whole[0]
    losses = [[row['train_feature_loss'] for row in csv.DictReader(text.splitlines())]
              for text in (whole[1], (run / 'summary.csv').read_text())]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_with_a_complete_cache_a_run_asks_for_features_and_gives_the_same_student(flags, tmp_path, capsys):
    argv = [*flags, '--distill', 'kd', '--feature-distill', 'at', '--feature-loss-weight', '10', '--epochs', '1',
            '--teacher-cache', str(tmp_path / 'cache'), '--experiment']  # fmt: skip
    for name in ('filled', 'read'):
        assert train_distill.main([*argv, name]) == 0
        assert 'the teacher is asked for its features in each step' in capsys.readouterr().out
    filled, read = ((tmp_path / n / 'student' / 'model.safetensors').read_bytes() for n in ('filled', 'read'))
    assert filled == read
