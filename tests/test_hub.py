"""The Hub probe, and models as timm folders."""

from __future__ import annotations

import json
import socket
import time

import pytest
import timm
import torch
from timm.data import resolve_data_config

from timm_rld import export_model, hub

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


def test_an_export_that_fails_leaves_what_was_there(tmp_path):
    model = timm.create_model('test_resnet', num_classes=4)
    folder = export_model(model, tmp_path / 'm', data_config=CONFIG)
    before = (folder / 'model.safetensors').read_bytes()
    model.fc.weight.data.zero_()
    with pytest.raises(ValueError, match='input channels'):
        export_model(model, folder, data_config=dict(CONFIG, input_size=(1, 48, 48)))
    assert (folder / 'model.safetensors').read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_hub_that_does_not_answer_costs_at_most_three_seconds(monkeypatch):
    from huggingface_hub import constants

    silent = socket.create_server(('127.0.0.1', 0))
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{silent.getsockname()[1]}')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    hub.hub_in_reach.cache_clear()
    started = time.perf_counter()
    assert not hub.hub_in_reach() and constants.HF_HUB_OFFLINE
    assert time.perf_counter() - started < 4
    silent.close()
    hub.hub_in_reach.cache_clear()


def test_any_answer_of_the_hub_counts_as_in_reach(monkeypatch):
    import http.server
    import threading

    from huggingface_hub import constants

    server = http.server.HTTPServer(('127.0.0.1', 0), http.server.BaseHTTPRequestHandler)  # answers 501
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    hub.hub_in_reach.cache_clear()
    assert hub.hub_in_reach() and not constants.HF_HUB_OFFLINE
    server.shutdown()
    hub.hub_in_reach.cache_clear()
