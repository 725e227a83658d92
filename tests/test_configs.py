"""The recipes in configs/: each is read, its networks are built, and its schedule is the one that its title says."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from torch import nn

from timm_rld.config import Config, list_recipes, load_yaml, parse_args, recipes_folder, resolve
from timm_rld.engine import check_settings, create_optimizer, create_scheduler
from timm_rld.loss import choose_criterion, published_defaults
from timm_rld.pairing import create_student, look_up

RECIPES = [path for path, _ in list_recipes()]
# of the paper's table on CIFAR-100
PAIRS = {
    'resnet32x4': ['resnet8x4', 'wrn_16_2', 'wrn_40_2', 'shufflev2'],
    'vgg13': ['vgg8', 'mobilenetv2'],
    'wrn_40_2': ['wrn_40_1', 'wrn_16_2', 'resnet8x4', 'mobilenetv2'],
    'resnet56': ['resnet20'],
    'resnet110': ['resnet32', 'resnet20'],
    'resnet50': ['mobilenetv2'],
}

FEATURES = 'cifar100/resnet32x4_resnet8x4_reviewkd.yaml'


def read(path: str) -> Config:
    config = parse_args(['--config', path])
    return resolve(config, published=published_defaults)


def rates(config: Config, updates_per_epoch: int = 2) -> list[float]:
    """The learning rate of each epoch, the first update's."""
    optimizer = create_optimizer(nn.Linear(2, 2), config)
    scheduler = create_scheduler(optimizer, config, updates_per_epoch)
    found = []
    for epoch in range(config.epochs):
        found.append(optimizer.param_groups[0]['lr'])
        for update in range(updates_per_epoch):
            scheduler.step_update(epoch * updates_per_epoch + update + 1)
        scheduler.step(epoch + 1)
    return found


@pytest.mark.parametrize('path', RECIPES)
def test_a_recipe_is_built(path):
    config = read(path)
    check_settings(config)
    assert len(rates(config)) == config.epochs
    card = look_up(config.teacher, '--teacher')
    with torch.device('meta'):
        timm.create_model(card.name, num_classes=100)
    pair = create_student(config.student, 100, img_size=config.img_size, distill_token=config.distill_token)
    assert pair.img_size == (config.img_size or pair.img_size)
    assert config.teacher_epochs or card.has_weights or path == 'quickstart.yaml'
    first = (recipes_folder() / path).read_text(encoding='utf-8').splitlines()[0]
    assert first.startswith('# ') and len(first) > 20


def test_there_is_a_recipe_for_each_pair_of_the_paper():
    expected = {f'cifar100/{t}_{s}.yaml' for t, students in PAIRS.items() for s in students}
    assert {r for r in RECIPES if r.startswith('cifar100/')} == {*expected, FEATURES} and len(expected) == 14
    assert {'imagenet/resnet34_resnet18.yaml', 'imagenet/resnet50_mobilenetv1.yaml'} <= set(RECIPES)


@pytest.mark.parametrize('path', [r for r in RECIPES if r.startswith('cifar100/')])
def test_the_cifar_recipes_are_as_published(path):
    config = read(path)
    lr = 0.01 if config.student in ('cifar_mobilenetv2', 'cifar_shufflev2') else 0.05
    steps = [1] * 150 + [0.1] * 30 + [0.01] * 30 + [0.001] * 30
    assert rates(config) == pytest.approx([lr * s for s in steps])
    assert rates(config.of_teacher()) == pytest.approx([0.05 * s for s in steps])
    assert f'cifar100/{config.teacher}_{config.student}.yaml'.replace('cifar_', '') == path.replace('_reviewkd', '')
    group = create_optimizer(timm.create_model(config.student), config).param_groups
    assert [(g['weight_decay'], g['momentum'], g['nesterov']) for g in group] == [(5e-4, 0.9, False)]
    assert (config.batch_size, config.smoothing, config.train_crop_mode, config.crop_padding) == (64, 0, 'pad', 4)
    if path == FEATURES:
        assert (config.distill, config.feature_distill, config.task_loss_weight) == ('none', 'reviewkd', 1)
        assert (config.feature_loss_weight, config.feature_warmup_epochs) == (5, 20)
        return
    assert (config.task_loss_weight, config.distill_loss_weight, config.distill_warmup_epochs) == (1, 1, 20)
    _, criterion = choose_criterion(config.distill, config.standardize, config.distill_kwargs)
    assert (criterion.alpha, criterion.beta, criterion.temperature, criterion.alpha_temperature) == (1, 8, 4, 4)


@pytest.mark.parametrize(('path', 'beta'), [('resnet34_resnet18', 0.5), ('resnet50_mobilenetv1', 2)])
def test_the_imagenet_recipes_are_as_published(path, beta):
    config = read(f'imagenet/{path}.yaml')
    assert rates(config) == pytest.approx([0.2] * 30 + [0.02] * 30 + [0.002] * 30 + [0.0002] * 10)
    _, criterion = choose_criterion(config.distill, config.standardize, config.distill_kwargs)
    assert (criterion.alpha, criterion.beta, criterion.temperature, criterion.alpha_temperature) == (1, beta, 1, 1)
    assert (config.batch_size, config.weight_decay, config.distill_warmup_epochs) == (512, 1e-4, 1)
    assert config.teacher == f'{path.partition("_")[0]}.tv_in1k'


def test_the_patient_recipe_is_as_published():
    config = read('imagenet/patient_resnet50.yaml')
    assert (config.distill, config.distill_kwargs) == ('kd', {'temperature': 1})
    assert (config.task_loss_weight, config.distill_loss_weight, config.distill_warmup_epochs) == (0, 1, 0)
    assert (config.batch_size, config.epochs, config.mixup, config.mixup_prob, config.cutmix) == (4096, 1200, 1, 1, 0)
    assert (config.scale, config.clip_grad, config.no_aug, config.aa) == ((0.05, 1.0), 1.0, False, None)
    assert config.lr * config.weight_decay == pytest.approx(3e-4)
    assert max(rates(config)) == pytest.approx(0.03, rel=1e-3)
    updates = config.warmup_epochs * 1_281_167 / config.batch_size
    assert updates == pytest.approx(5000, rel=0.01)
    assert 'patient' in (recipes_folder() / 'imagenet' / 'patient_resnet50.yaml').read_text(encoding='utf-8')


def test_the_token_recipe_is_as_published():
    config = read('imagenet/deit_token.yaml')
    assert (config.distill, config.distill_token, config.task_loss_weight, config.distill_loss_weight) == (
        'ce_teacher', True, 0.5, 0.5,
    )  # fmt: skip
    assert config.lr == pytest.approx(5e-4 * config.batch_size / 512) and config.epochs == 300
    assert (config.weight_decay, config.warmup_epochs, config.min_lr, config.drop_path) == (0.05, 5, 1e-5, 0.1)
    assert (config.mixup, config.cutmix, config.reprob, config.smoothing) == (0.8, 1.0, 0.25, 0.1)
    other = parse_args(['--config', 'imagenet/deit_token.yaml', '--student', 'deit_base_distilled_patch16_224'])
    assert other.distill_token and other.task_loss_weight == 0.5
    soft = parse_args(['--config', 'imagenet/deit_token.yaml', '--distill', 'kd'])
    assert soft.distill_token and soft.task_loss_weight is None


def test_another_criterion_on_the_command_line_sets_the_files_options_aside():
    path = 'imagenet/resnet34_resnet18.yaml'
    same = parse_args(['--config', path, '--distill', 'rld', '--epochs', '3'])
    assert same == dataclasses.replace(Config(**load_yaml(path)), epochs=3)
    other = parse_args(['--config', path, '--distill', 'kd'])
    assert other.distill_kwargs == {} and other.distill_warmup_epochs is other.task_loss_weight is None
    assert parse_args(['--config', path, '--distill', 'dkd', '--distill-kwargs', 'beta=2']).distill_kwargs == {
        'beta': 2
    }


def test_folders_on_the_command_line_replace_a_hub_dataset_of_the_file():
    path = 'cifar100/vgg13_vgg8.yaml'
    assert parse_args(['--config', path]).input_key == 'img'
    config = parse_args(['--config', path, '--data-dir', 'D'])
    assert (config.data_dir, config.dataset, config.input_key, config.target_key) == ('D', None, None, None)
    assert parse_args(['--config', path, '--data-dir', 'D', '--dataset', 'hfds/x']).input_key == 'img'
