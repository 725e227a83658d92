"""Defaults that follow the run: the ramp, the learning rate; and values of an args.yaml that are derived again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from benchmarks import gradients
from timm_rld.config import (
    FIELDS,
    Config,
    describe_derived,
    load_yaml,
    parse_args,
    resolve,
    to_yaml,
)
from timm_rld.config.learning_rate import ADAM, FAMILIES, SGD, family_of
from timm_rld.errors import UsageError
from timm_rld.loss import CRITERIA, published_defaults
from train_distill import main

PAIR = ['--teacher', 'resnet34', '--student', 'resnet18']
OWN = [*PAIR, '--data-dir', 'd']


def settings(*argv: str, processes: int = 1, images: int | None = None) -> Config:
    """The settings of a command line, as a run has them."""
    return resolve(parse_args(list(argv)), processes, images, published_defaults)


# ------------------------------------------------------------------------------------------------------------- the ramp


@pytest.mark.parametrize(
    ('argv', 'ramp'),
    [
        (['--epochs', '240'], 20),
        (['--epochs', '120'], 10),
        (['--epochs', '30'], 2),
        (['--epochs', '12'], 1),
        (['--epochs', '1'], 1),
        ([], 20),  # of 300 epochs no more than published
        (['--distill', 'dkd', '--epochs', '60'], 5),
        (['--distill', 'kd', '--epochs', '60'], 0),
        (['--distill', 'none', '--epochs', '60'], 0),
        (['--epochs', '12', '--distill-warmup-epochs', '20'], 20),
        (['--epochs', '12', '--distill-warmup-epochs', '0'], 0),
    ],
)
def test_the_ramp_is_the_published_share_of_the_run(argv, ramp):
    assert settings(*OWN, *argv).distill_warmup_epochs == ramp


def test_every_criterion_has_its_own_ramp_at_its_published_epochs_and_none_elsewhere_longer():
    for row in CRITERIA.values():
        assert row.defaults(row.epochs)['distill_warmup_epochs'] == row.warmup_epochs
        found = [row.defaults(epochs)['distill_warmup_epochs'] for epochs in range(1, 2 * row.epochs)]
        assert found == sorted(found) and (found[0], found[-1]) == (min(1, row.warmup_epochs), row.warmup_epochs)


def test_the_sample_keeps_its_own_ramp_and_learning_rate():
    config = settings(*PAIR, images=1437)
    assert (config.distill_warmup_epochs, config.lr, config.teacher_lr) == (3, 0.05, 0.05)
    assert settings(*PAIR, '--opt', 'adamw', images=1437).lr < 1e-3


# ---------------------------------------------------------------------------------------------------- the learning rate


@pytest.mark.parametrize(
    ('argv', 'processes', 'images', 'lr'),
    [
        ([], 1, 50_000, 0.05),
        (['-b', '64', '--grad-accum-steps', '2'], 4, 50_000, 0.2),
        (['-b', '100000'], 1, 400, 0.1 * 400 / 256),  # no batch holds more images than an epoch has
        (['--grad-accum-steps', '1000'], 1, 400, 0.1 * 400 / 256),
        (['-b', '100000'], 1, 10**6, 3.2),  # nor does the rate grow beyond a batch of 8192
        (['-b', '100000'], 1, None, 3.2),
        (['--opt', 'adamw'], 1, 50_000, 7e-4 * 0.5**0.5),
        (['--opt', 'adamw', '-b', '64'], 4, 50_000, 7e-4),
        (['--opt', 'lamb', '-b', '256'], 1, 50_000, 1.8e-3),
        (['--opt', 'lion', '-b', '256'], 1, 50_000, 7e-5),
        (['--opt', 'muon', '-b', '256'], 1, 50_000, 7e-4),
        (['--opt', 'rmsproptf', '-b', '768'], 1, 50_000, 0.048),
        (['--opt', 'adamw', '--lr-base', '1e-3'], 1, 50_000, 1e-3 * 0.5**0.5),
        (['--opt', 'adamw', '--lr-base-scale', 'linear'], 1, 50_000, 3.5e-4),
        (['--opt', 'adamw', '--lr', '0.3'], 4, 50_000, 0.3),
    ],
)
def test_the_learning_rate_is_the_optimizers_scaled_to_the_batch_that_an_epoch_has(argv, processes, images, lr):
    config = settings(*OWN, *argv, processes=processes, images=images)
    assert config.lr == pytest.approx(lr) and config.teacher_lr == config.lr


def test_the_families_know_the_optimizers_of_timm_by_their_names():
    of_adam = {'adam', 'adamw', 'cadamw', 'nadamw', 'bnbadamw8bit', 'adopt', 'adan', 'radam', 'laprop', 'muon', 'kron'}
    others = {
        'sgd': 'sgd', 'momentum': 'sgd', 'csgdw': 'sgd', 'nesterovw': 'sgd', 'bnbsgd8bit': 'sgd', 'lambcw': 'lamb',
        'fusedlamb': 'lamb', 'clionc': 'lion', 'bnblion': 'lion', 'nlarc': 'lars', 'crmsproptf': 'rmsprop',
    }  # fmt: skip
    assert {n for n in of_adam if family_of(n) is not ADAM} == set()
    assert {n for n, family in others.items() if family not in family_of(n).names} == set()
    known = [str(n) for n in list_optimizers()]
    assert all(any(part in n for n in known) for f in FAMILIES for part in f.names)  # none is a name of the past


@pytest.mark.parametrize('opt', ['sgd', 'adamw', 'lamb', 'lion', 'muon', 'rmsproptf', 'lars', 'adagrad', 'adopt'])
def test_an_optimizer_learns_at_its_default_and_does_not_diverge(opt):
    lr = settings(*OWN, '--opt', opt, images=50_000).lr
    x = torch.randn(128, 16)
    target = x[:, :4].argmax(dim=1)
    network = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = create_optimizer_v2(network, opt=opt, lr=lr)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) < 2.5 and losses[-1] < 0.95 * losses[0]


def test_what_was_chosen_is_said_in_a_line_and_what_was_given_is_not():
    config = settings(*OWN, '--opt', 'adamw', '--epochs', '12', images=50_000)
    assert describe_derived(config) == [
        'learning rate 0.000495 (adamw, batch 128; --lr changes it)',
        'distillation ramps up over 1 of 12 epoch(s) (--distill-warmup-epochs changes it)',
    ]
    assert 'batch 400;' in describe_derived(settings(*OWN, '-b', '100000', images=400))[0]
    assert describe_derived(settings(*OWN, '--lr', '0.1', '--distill-warmup-epochs', '3')) == []


# ---------------------------------------------------------------------------------------------- derived once, and again


def args_yaml(path: Path, *argv: str, processes: int = 1, images: int = 50_000) -> list[str]:
    """Write the args.yaml of a run; return the flags that read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(settings(*argv, processes=processes, images=images)), encoding='utf-8')
    return ['--config', str(path)]


def changes(path: Path, config: Config) -> dict[str, object]:
    """The settings that are others than those of a file."""
    there = load_yaml(str(path))
    return {name: getattr(config, name) for name in FIELDS if getattr(config, name) != there[name]}


@pytest.mark.parametrize(
    ('argv', 'processes', 'images', 'expected'),
    [
        ([], 1, 50_000, {}),
        (['-b', '64'], 1, 50_000, {'batch_size': 64, 'validation_batch_size': 64, 'lr': 0.025, 'teacher_lr': 0.025}),
        ([], 2, 50_000, {'lr': 0.1, 'teacher_lr': 0.1}),
        (['-b', '64'], 2, 50_000, {'batch_size': 64, 'validation_batch_size': 64}),
        ([], 1, 64, {'lr': 0.025, 'teacher_lr': 0.025}),
        (['--lr', '1'], 1, 50_000, {'lr': 1.0, 'teacher_lr': 1.0}),
        (['--lr', '0.05', '-b', '64'], 1, 50_000, {'batch_size': 64, 'validation_batch_size': 64}),
        (['--epochs', '24'], 1, 50_000, {'epochs': 24, 'distill_warmup_epochs': 2}),
        (['--opt', 'lion'], 1, 50_000,
         {'opt': 'lion', 'lr_base': 7e-5, 'lr_base_scale': 'sqrt', 'lr': 7e-5 * 0.5**0.5,
          'teacher_lr': 7e-5 * 0.5**0.5}),
        (['--standardize'], 1, 50_000, {'standardize': True, 'distill_loss_weight': 9.0}),
        (['--student', 'resnet50'], 1, 50_000, {'student': 'resnet50', 'hub_model_id': 'resnet50-rld'}),
        (['--distill', 'kd'], 1, 50_000,
         {'distill': 'kd', 'hub_model_id': 'resnet18-kd', 'task_loss_weight': 0.1, 'distill_loss_weight': 0.9,
          'distill_warmup_epochs': 0}),
    ],
)  # fmt: skip
def test_a_derived_value_is_derived_again_where_what_it_depends_on_has_changed(
    tmp_path, argv, processes, images, expected
):
    file = tmp_path / 'args.yaml'
    read = args_yaml(file, *OWN, '--epochs', '60')
    assert changes(file, settings(*read, *argv, processes=processes, images=images)) == pytest.approx(expected)


def test_what_does_not_depend_on_the_change_stays_whatever_this_version_and_machine_would_choose(tmp_path, monkeypatch):
    file = tmp_path / 'args.yaml'
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '4')  # of `accelerate launch`
    read = args_yaml(file, *OWN)
    monkeypatch.delenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS')
    file.write_text(file.read_text(encoding='utf-8').replace('smoothing: 0.1', 'smoothing: 0.2'), encoding='utf-8')
    assert changes(file, settings(*read, images=50_000)) == {}
    found = changes(file, settings(*read, '-b', '64', images=50_000))
    assert set(found) == {'batch_size', 'validation_batch_size', 'lr', 'teacher_lr'}


def test_args_yaml_ends_with_all_that_nobody_gave(tmp_path):
    given = parse_args([*OWN, '--epochs', '12', '--opt', 'adamw'])
    found = yaml.safe_load(to_yaml(resolve(given, 2, 999, published_defaults)))
    assert list(found)[-2:] == ['derived_from', 'derived'] and found['derived_from'] == {'processes': 2, 'images': 999}
    filled_in = [n for n in FIELDS if getattr(given, n) is None and found[n] is not None]
    assert found['derived'] == filled_in and {'lr', 'teacher_lr', 'distill_warmup_epochs', 'workers'} <= set(filled_in)


def test_settings_can_be_resolved_again_once_more_is_known():
    first = resolve(parse_args([*OWN, '-b', '1000']))
    again = resolve(first, 1, 256, published_defaults)
    assert (first.lr, again.lr) == (pytest.approx(0.1 * 1000 / 256), 0.1)
    again.give(hub_model_id='user/own')
    assert resolve(again, 1, 256, published_defaults).hub_model_id == 'user/own'


def test_an_args_yaml_of_the_sample_becomes_that_of_another_dataset(tmp_path):
    file = tmp_path / 'args.yaml'
    config = settings(*args_yaml(file, *PAIR, images=1437), '--data-dir', 'd', images=50_000)
    assert config.changed(hub_model_id='') == settings(*OWN, images=50_000).changed(hub_model_id='')


def test_a_file_without_derived_values_is_taken_as_it_is(tmp_path):
    file = tmp_path / 'args.yaml'
    read = args_yaml(file, *OWN)
    text = file.read_text(encoding='utf-8')
    file.write_text(text[: text.index('derived_from')], encoding='utf-8')
    assert set(changes(file, settings(*read, '-b', '64'))) == {'batch_size'}


@pytest.mark.parametrize(
    ('lines', 'message'),
    [
        ('derived: lr', 'derived: expected a list of settings'),
        ('derived: [lr, batchsize]', r"derived: unknown setting 'batchsize' \(did you mean 'batch_size'\?\)"),
        ('derived_from: {processes: 0}', 'derived_from: expected numbers'),
        ('derived_from: {machines: 1}', 'derived_from: expected numbers'),
    ],
)
def test_a_damaged_list_of_derived_values_is_refused_by_name(tmp_path, lines, message):
    (tmp_path / 'a.yaml').write_text(f'student: resnet18\n{lines}\n', encoding='utf-8')
    with pytest.raises(UsageError, match=message):
        parse_args(['--config', str(tmp_path / 'a.yaml')])


# ------------------------------------------------------------------------------------------------------------- a resume


@pytest.mark.parametrize('how', ['auto', 'folder'])
def test_a_run_that_is_resumed_keeps_what_was_derived_when_it_began(tmp_path, how):
    file = tmp_path / 'out' / 'run' / 'args.yaml'
    flags = [*OWN, '--sched', 'multistep', '--epochs', '24', '--output', str(tmp_path / 'out'), '--experiment', 'run']
    args_yaml(file, *flags)
    file.write_text(file.read_text(encoding='utf-8').replace('lr: 0.05\n', 'lr: 0.04\n'), encoding='utf-8')
    again = ['--resume', str(file.parent)] if how == 'folder' else [*flags, '--resume', 'auto']
    config = settings(*again, '--epochs', '240', processes=2, images=50_000)
    found = changes(file, config.changed(resume=None))
    assert found == {'epochs': 240}  # neither the ramp nor the learning rate


def test_a_resumed_run_takes_a_flag_as_given(tmp_path):
    file = tmp_path / 'out' / 'run' / 'args.yaml'
    flags = [*OWN, '--output', str(tmp_path / 'out'), '--experiment', 'run']
    args_yaml(file, *flags)
    config = settings(*flags, '--resume', 'auto', '--lr', '0.01', images=50_000)
    assert config.lr == 0.01  # which check_unchanged() refuses


@pytest.mark.slow
def test_a_longer_run_continues_with_the_ramp_of_the_shorter_one(tiny, tmp_path, capsys):
    flags = [*tiny, '-b', '41', '--distill', 'dkd', '--sched', 'constant', '--warmup-epochs', '0', '--resume', 'auto']
    flags[flags.index('--lr') : flags.index('--lr') + 2] = []
    assert main(flags) == 0
    assert 'learning rate 0.016 (sgd, batch 41; --lr changes it)' in capsys.readouterr().out
    first = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text(encoding='utf-8'))
    assert main([*flags, '--epochs', '18', '--debug']) == 0
    then = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text(encoding='utf-8'))
    assert {k for k in first if first[k] != then[k]} == {'epochs', 'debug'} and then['distill_warmup_epochs'] == 1


def test_a_run_on_more_images_a_step_than_there_are_scales_its_learning_rate_to_those_there_are(tiny, tmp_path):
    flags = [*tiny, '--epochs', '1', '-b', '1000']
    flags[flags.index('--lr') : flags.index('--lr') + 2] = []
    assert main(flags) == 0
    args = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text(encoding='utf-8'))
    assert args['lr'] == pytest.approx(0.1 * 41 / 256) and args['derived_from'] == {'processes': 1, 'images': 41}
    assert SGD.lr_base == args['lr_base']


def test_the_pull_of_a_criterion_beside_the_cross_entropy_falls_with_the_number_of_classes(capsys):
    assert gradients.main(['--classes', '10', '100', '--criteria', 'rld', 'dkd']) == 0
    table = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines()[2:]]
    (_, *few), (_, *many) = [[float(cell) for cell in row] for row in table]
    # about as the root of the number of other classes, (99 / 9)^(1/2) = 3.3; the cross-entropy's own falls a little too
    assert all(3 < a / b < 5 for a, b in zip(few, many))
    assert gradients.main(['--criteria', 'none']) == 2 and gradients.main(['--classes', '1']) == 2
