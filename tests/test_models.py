"""The CIFAR networks: published figures and names, timm's interface, and the published training step by step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

import timm_rld  # noqa: F401  (registers the networks)
from timm_rld import DistillationTask, Teacher, create_distill_loss, create_student, create_teacher
from timm_rld.config import Config, resolve
from timm_rld.engine import create_optimizer
from timm_rld.errors import UserError
from timm_rld.pairing import audit, load_weights

GOLDEN = Path(__file__).parent / 'golden'
NETWORKS = json.loads((GOLDEN / 'cifar_networks.json').read_text())
STEPS = json.loads((GOLDEN / 'training_steps.json').read_text())
NAMES = timm.list_models('cifar_*')
SMALL = ['cifar_resnet8', 'cifar_wrn_16_1', 'cifar_vgg8', 'cifar_mobilenetv2', 'cifar_shufflev1', 'cifar_shufflev2']


def noise(n: int, h: int) -> Tensor:
    """The reference's reproducible noise in -1..1, float64."""
    w = (((torch.arange(n, dtype=torch.float64) + 1) * 12.9898 + h * 78.233).sin() * 43758.5453).frac()
    return 2 * (w - w.floor()) - 1


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """The reference's rule for weights, from their names and sizes alone."""
    for name, value in model.state_dict().items():
        w = noise(value.numel(), sum(map(ord, name)) % 97).reshape(value.shape)
        if name.endswith('num_batches_tracked'):
            value.zero_()
        elif name.endswith('running_var'):
            value.copy_(1 + 0.1 * w.abs())
        elif name.endswith('running_mean'):
            value.copy_(0.05 * w)
        elif value.ndim == 1:
            value.copy_(1 + 0.1 * w if name.endswith('weight') else 0.05 * w)
        else:
            value.copy_(w * (6 / value[0].numel()) ** 0.5)
    return model


IMAGES = noise(2 * 3 * 32 * 32, 0).reshape(2, 3, 32, 32)


def test_there_is_a_network_for_each_of_the_reference():
    assert {f'cifar_{name.lower()}' for name in NETWORKS} == set(NAMES)


@pytest.mark.parametrize('published', NETWORKS)
def test_names_sizes_and_logits_are_the_published_ones(published):
    reference = NETWORKS[published]
    model = fill(timm.create_model(f'cifar_{published.lower()}', num_classes=100).double().eval())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == reference['state_dict']
    assert sum(p.numel() for p in model.parameters()) == reference['parameters']
    expected = torch.tensor(reference['logits'], dtype=torch.float64)
    with torch.no_grad():
        assert (model(IMAGES) - expected).abs().max() <= 1e-8 * expected.abs().max()


@pytest.mark.parametrize('name', NAMES)
def test_a_network_has_timms_interface(name):
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    cfg = model.pretrained_cfg
    x = torch.randn(2, 1, 32, 32)
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()
    assert model.get_submodule(cfg['first_conv']).in_channels == 1
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape[1] == model.num_features and pooled.shape == (2, model.head_hidden_size)
    logits = model(x)
    assert logits.shape == (2, 7) and torch.equal(model.forward_head(features), logits)
    end, found = model.forward_intermediates(x)
    assert torch.equal(end, features)
    for feature, info in zip(found, model.feature_info, strict=True):
        assert feature.shape == (2, info['num_chs'], 32 // info['reduction'], 32 // info['reduction'])
        model.get_submodule(info['module'])
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0, 'max')
    assert torch.equal(model(x), features.amax((2, 3)))


@pytest.mark.parametrize('name', SMALL)
def test_features_only_gives_the_chosen_stages_and_drops_the_rest(name):
    whole = timm.create_model(name)
    features = timm.create_model(name, features_only=True, out_indices=(0, 2)).eval()
    assert len(list(features.parameters())) < len(list(whole.parameters()))
    a, b = features(torch.randn(1, 3, 32, 32))
    assert [a.shape[1], b.shape[1]] == features.feature_info.channels()
    assert [32 // a.shape[-1], 32 // b.shape[-1]] == features.feature_info.reduction()
    assert len(timm.create_model(name, features_only=True)(torch.randn(2, 3, 32, 32))) == len(whole.feature_info)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('size', [64, 33, 224])
def test_a_network_takes_other_sizes(name, size):
    with torch.no_grad():
        assert timm.create_model(name).eval()(torch.zeros(1, 3, size, size)).shape == (1, 100)


@pytest.mark.parametrize('name', SMALL)
def test_gradients_with_recomputed_activations_are_the_same(name):
    from timm.optim import param_groups_layer_decay

    model = timm.create_model(name).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append(next(model.parameters()).grad.clone())
    assert torch.allclose(*found)
    scales = {g['lr_scale'] for g in param_groups_layer_decay(model, layer_decay=0.5)}
    assert len(scales) >= 4 and max(scales) == 1


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_a_published_file_loads_as_it_is(tmp_path, prefix):
    original = fill(timm.create_model('cifar_resnet8'))
    file = tmp_path / 'ckpt_epoch_240.pth'
    state = {prefix + k: v for k, v in original.state_dict().items()}
    torch.save({'epoch': 240, 'model': state, 'accuracy': 72.5}, file)
    direct = timm.create_model('cifar_resnet8', num_classes=100, checkpoint_path=str(file))
    teacher = create_teacher('cifar_resnet8', 100, checkpoint=str(file), image_size=(32, 32))
    for model in (direct, teacher.model):
        for (name, a), b in zip(model.state_dict().items(), original.state_dict().values()):
            assert torch.equal(a, b), name


def test_a_file_of_another_network_names_the_keys_that_differ(tmp_path):
    file = tmp_path / 'resnet14.pth'
    torch.save({'model': timm.create_model('cifar_resnet14').state_dict()}, file)
    with pytest.raises(UserError) as e:
        create_teacher('cifar_resnet8', 100, checkpoint=str(file), image_size=(32, 32))
    assert 'for --teacher cifar_resnet8: weights of another network (36 left over: layer1.1.conv1.weight, ' in str(
        e.value
    )
    assert str(e.value).count(',') == 5  # the first five, and that there are more


def test_training_options_beside_the_weights_do_no_harm_and_code_is_refused(tmp_path):
    import argparse

    import numpy as np

    file = tmp_path / 'last.pth'
    state = timm.create_model('cifar_resnet8').state_dict()
    torch.save({'opt': argparse.Namespace(lr=0.1), 'model': state, 'best_acc': np.float64(70.0)}, file)
    assert set(load_weights(str(file), '--teacher-checkpoint')) == set(state)
    torch.save({'model': state, 'run': subprocess.Popen}, file)
    with pytest.raises(UserError, match='not a file of weights alone'):
        load_weights(str(file), '--teacher-checkpoint')


def test_a_teacher_of_another_scale_is_said(tmp_path):
    pair = create_student('resnet18', 100, img_size=224)
    file = tmp_path / 'teacher.pth'
    torch.save(timm.create_model('cifar_resnet8').state_dict(), file)
    pair.teacher = create_teacher('cifar_resnet8', 100, checkpoint=str(file))
    assert any('trained at 32×32' in line and '--teacher-img-size 32' in line for line in audit(pair))
    pair = create_student('cifar_resnet8', 100)
    pair.teacher = create_teacher('cifar_resnet8', 100, checkpoint=str(file), image_size=(32, 32))
    assert audit(pair) == []


def test_an_exported_network_loads_after_importing_timm_rld_and_not_before(tmp_path):
    pair = create_student('cifar_resnet8', 10)
    folder = timm_rld.export_model(pair.student, tmp_path / 'student', data_config=pair.data_config)
    assert 'import timm_rld' in (folder / 'README.md').read_text()
    code = f'import timm; timm.create_model("local-dir:{folder}", pretrained=True)'
    for first, works in (('import timm_rld; ', True), ('', False)):
        done = subprocess.run([sys.executable, '-c', first + code], capture_output=True, text=True)
        assert (done.returncode == 0) == works, done.stderr
        assert works or 'Unknown model (cifar_resnet8)' in done.stderr


def test_twenty_steps_give_what_the_published_program_gives():
    teacher = fill(timm.create_model('cifar_' + STEPS['teacher'], num_classes=100).double())
    student = fill(timm.create_model('cifar_' + STEPS['student'], num_classes=100).double())
    criterion = create_distill_loss('rld', **{k: STEPS[k] for k in ('alpha', 'beta', 'temperature')})
    task = DistillationTask(student, Teacher(teacher), criterion, warmup_epochs=STEPS['warmup_epochs']).train()
    task.double()
    for normalize in (task.teacher.normalize, task.normalize):  # the reference feeds both networks one tensor
        normalize.mean.zero_(), normalize.std.fill_(1)
    optimizer = create_optimizer(
        student,
        resolve(
            Config(
                data_dir='d',
                opt='momentum',
                weight_decay_all=True,
                **{k: STEPS[k] for k in ('lr', 'momentum', 'weight_decay')},
            )
        ),
    )
    for k, reference in enumerate(STEPS['steps']):
        task.set_epoch(reference['epoch'])
        images = noise(8 * 3 * 32 * 32, 1 + k).reshape(8, 3, 32, 32)
        result = task(images, torch.tensor([(7 * i + 13 * k) % 100 for i in range(8)]))
        assert result['task_loss'].item() == pytest.approx(reference['loss_ce'], rel=1e-7)
        assert result['kd_loss'].item() * task.ramp == pytest.approx(reference['loss_kd'], rel=1e-7)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
    norms = {k: v.double().norm().item() for k, v in student.state_dict().items() if k in STEPS['final_norms']}
    assert norms == pytest.approx(STEPS['final_norms'], rel=1e-7)
    with torch.no_grad():
        logits = student.eval()(IMAGES)
    expected = torch.tensor(STEPS['final_logits'], dtype=torch.float64)
    assert (logits - expected).abs().max() <= 1e-7 * expected.abs().max()


def test_networks_are_made_where_and_as_timms_own_are():
    model = timm.create_model('cifar_resnet8', device='meta', dtype=torch.bfloat16, num_classes=7)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}
    assert timm.task.DistillationTeacher(timm.create_model('cifar_vgg8', device=torch.device('cpu'))).model is not None
