"""The examples of CONTRIBUTING.md do what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from timm_rld import DistillationTask, create_distill_loss
from timm_rld.config import load_yaml, parse_args, to_yaml
from timm_rld.errors import UsageError
from timm_rld.loss import CRITERIA, choose_criterion, describe_criteria
from timm_rld.loss.registry import _row

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
CODES = re.findall(r'^```python\n(.*?)^```', TEXT, re.DOTALL | re.MULTILINE)
CRITERION, ROW, SETTING, NETWORK = CODES


def run(code: str) -> SimpleNamespace:
    names: dict = {'__name__': 'example'}
    exec(compile(code, 'CONTRIBUTING.md', 'exec', dont_inherit=True), names)
    return SimpleNamespace(**names)


@pytest.fixture
def mse(monkeypatch):
    """The example's criterion, in the table."""
    row = eval(ROW, {'_row': _row, 'MSE': run(CRITERION).MSE})
    monkeypatch.setitem(CRITERIA, row.name, row)
    return row


def test_each_room_is_in_the_table_of_the_house():
    rooms = {p.stem for p in (ROOT / 'timm_rld').iterdir() if p.suffix == '.py' or (p / '__init__.py').is_file()}
    table = '\n'.join(line for line in TEXT.splitlines() if line.startswith('|'))
    assert set(re.findall(r'`(\w+)`', table)) >= rooms - {'__init__'}


def test_a_row_is_all_that_a_criterion_needs_to_be_chosen(mse):
    config = parse_args(['--distill', 'mse', '--distill-kwargs', 'scale=2'])
    row, criterion = choose_criterion(config.distill, config.standardize, config.distill_kwargs)
    assert row.options == {'scale': 2} and row.defaults(240)['distill_loss_weight'] == 1
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    torch.testing.assert_close(criterion(student, teacher), 2 * (student - teacher).square().mean())
    assert 'mse' in describe_criteria() and mse.cited in describe_criteria()
    with pytest.raises(UsageError, match="no option 'scales' .did you mean 'scale'"):
        choose_criterion('mse', False, {'scales': 2})


def test_the_new_criterion_trains(mse):
    student, teacher = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    plain = torch.nn.Identity()
    task = DistillationTask(student, None, create_distill_loss('mse'), cache=object(), normalize=plain)
    x = torch.randn(4, 3)
    result = task(x, torch.arange(4), teacher(x).detach())
    result['loss'].backward()
    assert result['kd_loss'] > 0 and student.weight.grad.abs().sum() > 0


def test_a_row_is_all_that_a_setting_needs(tmp_path, capsys):
    settings = run(SETTING).Settings
    file = tmp_path / 'settings.yaml'
    file.write_text('label_noise: 0.3\n', encoding='utf-8')
    config = parse_args(['--config', str(file)], settings=settings)
    assert config.arguments_of('open_splits')['label_noise'] == 0.3
    again = tmp_path / 'args.yaml'
    again.write_text(to_yaml(config), encoding='utf-8')
    assert settings(**load_yaml(str(again), settings=settings)) == config
    with pytest.raises(UsageError, match='--label-noise: must be at most 1, got 1.5'):
        parse_args(['--label-noise', '1.5'], settings=settings)
    with pytest.raises(SystemExit):
        parse_args(['--help'], settings=settings)
    assert 'share of random training labels' in capsys.readouterr().out


def test_a_registered_network_has_timms_interface(tmp_path):
    (tmp_path / 'cifar_plain.py').write_text(NETWORK, encoding='utf-8')
    check = """
import cifar_plain, timm, torch
x = torch.zeros(2, 3, 32, 32)
model = timm.create_model('cifar_plain4', num_classes=7)
assert model(x).shape == (2, 7)
assert model.pretrained_cfg['input_size'] == (3, 32, 32)
features = timm.create_model('cifar_plain4', features_only=True)(x)
assert [tuple(f.shape[1:]) for f in features] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
model.reset_classifier(3)
assert model(x).shape == (2, 3)
"""
    # in a process of its own: timm has one registry for all tests
    subprocess.run([sys.executable, '-c', check], check=True, cwd=tmp_path, env={'PYTHONPATH': f'{tmp_path}:{ROOT}'})
