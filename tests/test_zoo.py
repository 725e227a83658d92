"""The sweep over timm's architectures runs, and what does not pass is a row of its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / 'benchmarks' / 'zoo.py'


@pytest.fixture
def zoo():
    from benchmarks import zoo as module

    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_an_architecture_goes_through_all_checks_and_is_not_run_again(zoo, tmp_path, capsys):
    argv = ['--output', str(tmp_path), '--modules', 'starnet', 'selecsls', '--max-parameters', '20']
    # in a process of its own: this one may have threads, which do not live on in a forked one
    done = subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, (tmp_path / 'results.jsonl').read_text().splitlines())
    assert [row[k] for k in ('architecture', 'step', 'export', 'fold', 'bf16')] == ['starnet_s050', *['ok'] * 4]
    assert (row['size'], row['folded'], row['batch_norms'], row['note']) == (32, 17, 18, '')
    text = (tmp_path / 'zoo.md').read_text()
    assert text.startswith('1 architectures: student step 1, export, reload 1, fold 1, bf16 1; all of these 1.\n')
    assert 'at most 20 M parameters: selecsls.' in text and '| starnet | starnet_s050 |' in text
    before = (tmp_path / 'results.jsonl').read_text()
    assert zoo.main(argv) == 0
    assert 'starnet_s050: ok' not in capsys.readouterr().out
    assert (tmp_path / 'results.jsonl').read_text() == before and (tmp_path / 'zoo.md').read_text() == text
    assert zoo.main([*argv, '--modules', 'strnet']) == 2
    assert "--modules strnet: no module of timm (did you mean 'starnet'" in capsys.readouterr().err


def fails(name, tell):
    tell({'stage': 'export'})
    tell({'step': 'ok', 'export': 'FAILED', 'note': 'no | such'})


def dies(name, tell):
    tell({'stage': 'bf16'})
    os._exit(3)


def hangs(name, tell):
    tell({'stage': 'fold'})
    time.sleep(60)


def test_what_fails_dies_or_hangs_is_a_row_and_comes_first(zoo, monkeypatch):
    good = dict.fromkeys(zoo.CHECKS, 'ok')
    rows = [{'module': 'a', 'architecture': 'a', 'parameters': 1, 'seconds': 1, 'note': '', **good}]
    for examine in (fails, dies, hangs):
        rows.append(zoo.watch(examine, 'x', {'module': examine.__name__, 'parameters': 1}, 1.0))
    assert [r['note'] for r in rows[1:]] == [
        'no | such', 'died in: bf16 (exit code 3)', 'stopped after 1 s in: fold'
    ]  # fmt: skip
    lines = zoo.table(rows, [], 60).splitlines()
    assert lines[0] == '4 architectures: student step 2, export, reload 1, fold 1, bf16 1; all of these 1.'
    assert [line.split(' | ')[0] for line in lines[4:]] == ['| dies', '| fails', '| hangs', '| a']
    assert 'no / such' in lines[5]
