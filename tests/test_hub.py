"""The Hub probe, and models as timm folders."""

from __future__ import annotations

import copy
import json
import socket
import time

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import _registry, register_model

from timm_rld import export_model, offline
from timm_rld.hub import check_export

CONFIG = dict(
    input_size=(3, 48, 48), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation='bilinear', crop_pct=0.9,
    crop_mode='center',
)  # fmt: skip


@pytest.mark.parametrize('name', ['test_resnet.r160_in1k', 'test_vit'])
def test_an_exported_model_gives_the_same_logits_and_says_what_it_was_validated_with(name, tmp_path):
    model = timm.create_model(name, num_classes=4).eval()
    folder = export_model(model, tmp_path / 'm ü', data_config=CONFIG, label_names=['a', 'b', 'ç', 'd'])
    assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(again(x), model(x))
    config = resolve_data_config({}, model=again, use_test_size=True)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()} == CONFIG
    assert again.pretrained_cfg['label_names'] == ['a', 'b', 'ç', 'd']


def test_an_exported_config_does_not_claim_the_base_weights_as_its_own(tmp_path):
    model = timm.create_model('resnet18.a1_in1k', num_classes=4)
    assert model.pretrained_cfg['tag'] and model.pretrained_cfg['license']
    folder = export_model(model, tmp_path / 'm', data_config=CONFIG)
    config = json.loads((folder / 'config.json').read_text())
    assert not {'tag', 'origin_url', 'paper_ids', 'license', 'hf_hub_id', 'url'} & set(config['pretrained_cfg'])
    assert (
        config['pretrained_cfg']['test_input_size'] == [3, 48, 48] and config['pretrained_cfg']['test_crop_pct'] == 0.9
    )


def test_the_readme_of_a_folder_of_any_name_is_python_that_loads_it(tmp_path):
    import ast

    name = "<script>`a|b` it's\n```"
    folder = export_model(timm.create_model('test_resnet', num_classes=4), tmp_path / name, data_config=CONFIG)
    readme = (folder / 'README.md').read_text()
    code = readme.partition('```python\n')[2].rpartition('\n```')[0]
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert f'local-dir:path/to/{name}' in strings and '\n```' not in code


class Versioned(torch.nn.Linear):
    def get_extra_state(self):
        return {'version': 1}

    def set_extra_state(self, state):
        pass


@pytest.fixture
def odd_networks(monkeypatch):
    """In timm's registry: `shared_vit`, which uses weights twice; `extra_resnet`, whose state is not tensors alone;
    `random_resnet`, which is another one each time that it is built."""
    for name in ('_model_entrypoints', '_model_to_module', '_module_to_models'):
        monkeypatch.setattr(_registry, name, copy.deepcopy(getattr(_registry, name)))

    def made(base: str, name: str, pretrained: bool, **kwargs):
        model = timm.create_model(base, pretrained, **kwargs)
        model.pretrained_cfg['architecture'] = name
        return model

    @register_model
    def shared_vit(pretrained=False, **kwargs):
        model = made('test_vit', 'shared_vit', pretrained, **kwargs)
        model.blocks[1].mlp = model.blocks[0].mlp
        return model

    @register_model
    def extra_resnet(pretrained=False, **kwargs):
        model = made('test_resnet', 'extra_resnet', pretrained, **kwargs)
        model.fc.__class__ = Versioned
        return model

    @register_model
    def random_resnet(pretrained=False, **kwargs):
        model, noise = made('test_resnet', 'random_resnet', pretrained, **kwargs), torch.randn(())
        model.fc.register_forward_hook(lambda module, args, output: output + noise)
        return model


def test_a_student_that_uses_weights_twice_is_trained_and_exported(odd_networks, tiny, tmp_path):
    from train_distill import main

    argv = [*tiny, '--student', 'shared_vit', '--distill', 'none', '--model-ema']
    assert main(argv) == 0
    checkpoint = tmp_path / 'run' / 'checkpoints' / 'student-epoch0002-end'
    for name, weights in (('student', 'model'), ('student_ema', 'ema')):
        exported = timm.create_model(f'local-dir:{tmp_path / "run" / name}', pretrained=True).eval()
        assert exported.blocks[1].mlp.fc1.weight is exported.blocks[0].mlp.fc1.weight
        model = timm.create_model('shared_vit', num_classes=3).eval()
        model.load_state_dict(load_file(checkpoint / f'{weights}.safetensors'))
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(exported(x), model(x))


def test_coat_is_exported_and_stays_as_it_was(tmp_path):
    model = timm.create_model('coat_tiny', num_classes=3, img_size=32).to(memory_format=torch.channels_last).eval()
    config = dict(CONFIG, input_size=(3, 32, 32))
    again = timm.create_model(f'local-dir:{export_model(model, tmp_path / "m", data_config=config)}', pretrained=True)
    assert model.cpe1.proj.weight is model.serial_blocks1[0].cpe.proj.weight
    assert model.patch_embed1.proj.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.state_dict()['cpe1.proj.weight'].data_ptr() == model.cpe1.proj.weight.data_ptr()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(x), model.to(memory_format=torch.contiguous_format)(x))


@pytest.mark.parametrize(
    ('name', 'why'), [('extra_resnet', 'Key `fc._extra_state` is invalid'), ('random_resnet', 'it is another network')]
)
def test_a_network_that_cannot_be_exported_is_refused_before_training(name, why, odd_networks, tiny, tmp_path, capsys):
    from train_distill import main

    for flag in ('--student', '--teacher'):
        assert main([*tiny, flag, name]) == 1
        err = capsys.readouterr().err
        assert f'error: {flag}: {name} cannot be exported and loaded again as a timm folder ({why}' in err
        assert err.count('\n') == 1 and not list(tmp_path.iterdir())


def test_the_trial_of_an_export_changes_nothing():
    model, state = timm.create_model('test_resnet', num_classes=4).train(), torch.get_rng_state()
    check_export(model, '--student', CONFIG)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_an_export_that_fails_leaves_what_was_there(tmp_path):
    model = timm.create_model('test_resnet', num_classes=4)
    folder = export_model(model, tmp_path / 'm', data_config=CONFIG)
    before = (folder / 'model.safetensors').read_bytes()
    model.fc.weight.data.zero_()
    with pytest.raises(ValueError, match='input channels'):
        export_model(model, folder, data_config=dict(CONFIG, input_size=(1, 48, 48)))
    assert (folder / 'model.safetensors').read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_hub_that_does_not_answer_costs_seconds_and_not_a_minute(monkeypatch):
    from huggingface_hub import constants

    silent = socket.create_server(('127.0.0.1', 0))
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{silent.getsockname()[1]}')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    offline.hub_in_reach.cache_clear()
    started = time.perf_counter()
    assert not offline.hub_in_reach() and constants.HF_HUB_OFFLINE
    assert time.perf_counter() - started < 20  # of the 45 that huggingface_hub takes; a busy machine needs some itself
    silent.close()
    offline.hub_in_reach.cache_clear()


def test_a_hub_whose_certificate_the_system_does_not_know_is_in_reach(monkeypatch):
    import ssl
    import urllib.error

    from huggingface_hub import constants

    def refused(*_, **__):
        raise urllib.error.URLError(ssl.SSLCertVerificationError(1, 'unable to get local issuer certificate'))

    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr('urllib.request.urlopen', refused)
    offline.hub_in_reach.cache_clear()
    assert offline.hub_in_reach() and not constants.HF_HUB_OFFLINE  # its client brings certificates of its own
    offline.hub_in_reach.cache_clear()


def test_any_answer_of_the_hub_counts_as_in_reach(monkeypatch):
    import http.server
    import threading

    from huggingface_hub import constants

    server = http.server.HTTPServer(('127.0.0.1', 0), http.server.BaseHTTPRequestHandler)  # answers 501
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    offline.hub_in_reach.cache_clear()
    assert offline.hub_in_reach() and not constants.HF_HUB_OFFLINE
    server.shutdown()
    server.server_close()
    offline.hub_in_reach.cache_clear()
