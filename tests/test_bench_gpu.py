"""What is to run on a GPU runs: on a CPU, in tiny sizes; a part that fails or hangs costs no other."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_packages
from benchmarks import timm_script as beside_timm
from timm_rld.bench.measure import Profiled, idle_share
from timm_rld.compare import _check
from timm_rld.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ('intervals', 'idle'),
    [
        ([(0, 10)], 0),
        ([(5, 6), (0, 1)], 4 / 6),
        ([(0, 4), (1, 2), (3, 6), (8, 10)], 0.2),
        ([(0, 4), (4, 8), (2, 2)], 0),
        ([], math.nan),
        ([(3, 3)], math.nan),
    ],
)
def test_idle_is_what_no_piece_of_work_covers_from_the_first_to_the_last(intervals, idle):
    assert idle_share(intervals) == pytest.approx(idle, nan_ok=True)


def test_a_pause_between_two_operators_is_seen_as_idle():
    x = torch.randn(64, 64)
    shares = []
    for pause in (0.0, 0.2):
        with Profiled('cpu') as profiled:
            x @ x
            time.sleep(pause)
            x @ x
        shares.append(profiled.idle)
    assert 0 <= shares[0] < shares[1] and shares[1] > 0.3


@pytest.fixture
def smoke(tmp_path, monkeypatch):
    """The arguments of a trial, and a function to call a part with, in this process; it returns its figures."""
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    args = argparse.Namespace(output=tmp_path, device='cpu', smoke=True, timm_train=Path(__file__), tell=None)

    def call(part: str) -> dict[str, gpu.Row]:
        file = tmp_path / 'told.jsonl'
        with file.open('w') as f:
            gpu.PARTS[part].function(args, lambda *a, **kw: gpu._tell(f, *a, **kw))
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return {row['what']: row for row in rows}

    with torch._dynamo.config.patch(disable=True):  # the compiler takes minutes
        yield call


def test_the_step_tells_its_ratios_and_how_long_the_device_is_idle(smoke, capsys):
    rows = smoke('step')
    assert {rows[what]['target'] for what in ('online / (S + T)', 'cached / S')} == {'<= 1.03'}
    assert 0 <= rows['idle share of the device, online']['value'] < 100
    assert rows['online step']['value'] > 0 and 'idle share of the device in the online loop' in capsys.readouterr().out


def test_the_criteria_and_the_loaders_are_told(smoke):
    rows = smoke('loss')
    assert [row['target'] for row in rows.values() if row['what'].startswith('rld / kd')] == ['<= 1.5'] * 2
    assert rows['kd / kd, [4, 5] eager']['value'] == 1 and 'kd / kd, [4, 5] compiled' in rows
    assert smoke('loader')['loader: timm_rld']['value'] > 0


def test_a_run_of_each_precision_is_told(smoke):
    rows = smoke('bf16')
    assert rows['bf16: exit code']['value'] == 0 and 0 <= rows['bf16: top-1 of student, sample']['value'] <= 100
    assert smoke('fp16')['fp16']['note'] == 'needs a GPU'


@pytest.mark.slow
def test_a_killed_run_and_its_twin_are_told(smoke):
    rows = smoke('resume')
    assert rows['killed in the second epoch: exit code after resuming']['note'].startswith('from student-epoch0001')
    assert rows['epochs in its log']['value'] == 2
    assert rows['largest difference of a weight to a run in one go']['value'] == 0, 'on a CPU'


def test_timms_script_and_ours_are_told_with_their_targets(smoke, monkeypatch):
    commands = []

    def measure(name, command, *_, **__):
        commands.append(command)
        return beside_timm.Measured(1.0 if 'train_distill' in command else 2.0, 2**20)

    import timm_script  # as gpu.py finds it

    monkeypatch.setattr(timm_script, 'measure', measure)
    rows = smoke('timm')
    assert [row['target'] for what, row in rows.items() if what.endswith(", ×timm's")] == [
        None,
        None,
        '>= 1.3',
        '>= 1.6',
    ]
    assert rows["train_distill.py --distill rld, ×timm's"]['value'] == 2
    assert any('--teacher-cache' in command for command in commands)


def test_pytest_is_run_and_its_ends_are_counted(tmp_path):
    file, told = tmp_path / 'test_some.py', {}
    file.write_text(
        'import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n'
    )
    gpu.run_pytest([str(file)], lambda what, value, **kw: told.update({what: (value, kw.get('note'))}))
    assert (told['tests passed'][0], told['tests skipped'][0], told['tests failed'][0]) == (1, 1, 1)
    assert told['tests failed'][1].endswith('test_some.py::test_b')
    with pytest.raises(UserError, match='pytest ended with code [45]'):
        gpu.run_pytest([str(tmp_path / 'nowhere.py')], lambda *_, **__: None)


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """A function that runs gpu.py with other parts: text of programs that find the file to tell to in `told`."""

    def call(programs: dict[str, str], *flags: str) -> dict:
        monkeypatch.setattr(gpu, 'PARTS', {name: gpu.Part(60, gpu.loss) for name in programs})
        monkeypatch.setattr(gpu, 'LEAST_SECONDS', 0.5)

        def command(name: str, args: argparse.Namespace, told: Path) -> list[str]:
            return [sys.executable, '-c', f'told = open({str(told)!r}, "a")\n' + textwrap.dedent(programs[name])]

        monkeypatch.setattr(gpu, 'command_of', command)
        assert gpu.main(['--output', str(tmp_path), '--smoke', '--parts', *programs, *flags]) == 0
        return json.loads((tmp_path / 'gpu.json').read_text())

    return call


def line(what: str, value: float, target: str | None = None) -> str:
    row = {'what': what, 'value': value, 'unit': '', 'target': target, 'note': ''}
    return f'print({json.dumps(json.dumps(row))}, file=told, flush=True)\n'


def test_a_part_that_fails_or_hangs_keeps_its_figures_and_costs_no_other(parts, tmp_path, capsys):
    hangs = line('b', 2, '<= 1') + 'import time; time.sleep(600)'
    found = parts({'fails': line('a', 1, '>= 1') + "raise SystemExit('no such thing')", 'hangs': hangs,
                   'ends': line('c', 3)}, '--limit', '1.5')  # fmt: skip
    ended = {name: part['ended'] for name, part in found['parts'].items()}
    assert ended['fails'].startswith('failed with code 1') and ended['fails'].endswith(': no such thing')
    assert ended['hangs'] == 'stopped at its limit of 2 s' and ended['ends'].startswith('done in ')
    verdicts = {row['what']: row['verdict'] for part in found['parts'].values() for row in part['rows']}
    assert verdicts == {'a': 'pass', 'b': 'miss', 'c': ''}
    text = (tmp_path / 'gpu.md').read_text()
    assert '1 of 2 targets passed.' in text and '| b | 2 |  | <= 1 | miss |  |' in text
    assert 'its figures mean nothing' in text and 'no such thing' in (tmp_path / 'gpu.log').read_text()
    assert text.strip() in capsys.readouterr().out


def test_what_no_time_is_left_for_is_left_out(parts):
    found = parts({'first': 'import time; time.sleep(600)', 'second': line('a', 1)}, '--seconds', '1')
    assert found['parts']['first']['ended'].startswith('stopped at its limit')
    assert found['parts']['second']['ended'] == 'left out: no time was left'


def test_without_a_gpu_or_with_an_unknown_part_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    assert gpu.main(['--output', str(tmp_path / 'out')]) == 1
    assert '--smoke tries everything on a CPU' in capsys.readouterr().err
    assert gpu.main(['--output', str(tmp_path / 'out'), '--parts', 'stp']) == 2
    assert '--parts stp: one of tests, step' in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_what_a_student_needs_of_the_loader_follows_from_the_two_rates(tmp_path):
    report = gpu.Report(
        tmp_path, {'device': 'it', 'cores': 4, 'cudnn': None, 'versions': {}, 'command': '', 'smoke': False}
    )
    row = {'unit': 'images/s', 'target': None, 'note': ''}
    report.add('loader', {**row, 'what': 'loader: timm_rld', 'value': 1000.0})
    report.add('step', {**row, 'what': 'cached step', 'value': 2500.0})
    assert report.derived() == [
        'The cached step takes 2500 images/s, 4 cores give 1000: it needs 2.50 times as many, about 10 cores a GPU.'
    ]


def test_targets_that_have_no_figure_are_missed():
    assert gpu.verdict({'value': None, 'target': '<= 3'}) == 'miss'
    assert [gpu.verdict({'value': v, 'target': t}) for v, t in ((3, '<= 3'), (3, '>= 3.1'), (9, None))] == [
        'pass', 'miss', '',
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the two scripts


@pytest.fixture
def fake_python(tmp_path):
    """A program in the place of Python's that notes its arguments, a line a call, and makes what a comparison makes."""
    program = tmp_path / 'python'
    program.write_text(
        textwrap.dedent(f"""\
        #!{sys.executable}
        import json, os, sys, time
        with open({str(tmp_path / 'calls.jsonl')!r}, 'a') as f:
            f.write(json.dumps([sys.argv[1:], os.environ['PYTHONPATH']]) + '\\n')
        if '--wheels' in sys.argv:
            print(os.environ.get('FAKE_WHEELS', ''), end='')
        if 'compare' in sys.argv:
            if 'FAKE_SLEEP' in os.environ:
                import signal
                def told(*_):
                    with open({str(tmp_path / 'told')!r}, 'a') as f:
                        f.write('x')
                    sys.exit(143)
                signal.signal(signal.SIGTERM, told)
                open({str(tmp_path / 'started')!r}, 'w').close()
                time.sleep(60)
            output = sys.argv[sys.argv.index('--output') + 1]
            os.makedirs(output, exist_ok=True)
            os.mkdir(output + '/.lock')
            open(output + '/settings.yaml', 'w').close()
            seeds = sys.argv[sys.argv.index('--seeds') + 1:sys.argv.index('--criteria')]
            for name in ('teacher', *(f'none-seed{{seed}}' for seed in seeds)):
                os.makedirs(output + '/' + name, exist_ok=True)
                open(output + f'/{{name}}/results.json', 'w').close()
            time.sleep(0.3)
            os.rmdir(output + '/.lock')
        sys.exit(int(os.environ.get('FAKE_CODE', 0)) if 'gpu_packages.py' in sys.argv[1] else 0)
    """)
    )
    program.chmod(0o755)

    def call(script: str, *argv: str, code: int = 0, **env: str) -> list[list]:
        (tmp_path / 'calls.jsonl').unlink(missing_ok=True)
        env = {**os.environ, 'PYTHON': str(program), **env}
        done = subprocess.run([str(ROOT / 'benchmarks' / script), *argv], env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        calls = tmp_path / 'calls.jsonl'
        return [json.loads(text) for text in calls.read_text().splitlines()] if calls.exists() else []

    return call


def test_the_script_looks_for_packages_installs_wheels_and_passes_flags_on(fake_python, tmp_path):
    (packages, _), (started, path) = fake_python('gpu.sh', 'out', '--smoke', '--parts', 'loss')
    assert packages == [str(ROOT / 'benchmarks/gpu_packages.py')] and path.split(':')[0] == str(ROOT)
    assert started == [str(ROOT / 'benchmarks/gpu.py'), '--output', 'out', '--smoke', '--parts', 'loss']
    calls = fake_python('gpu.sh', 'out', 'wheels', '--smoke', FAKE_WHEELS='wheels/a.whl\nwheels/b.whl')
    pip, last = next(c[0] for c in calls if 'pip' in c[0]), calls[-1]
    assert pip[-2:] == ['wheels/a.whl', 'wheels/b.whl'] and '--no-index' in pip
    assert last[1].split(':')[-1] == pip[pip.index('--target') + 1] and last[0][-1] == '--smoke'
    assert len(fake_python('gpu.sh', 'out', code=1, FAKE_CODE='1')) == 1, 'nothing runs where something is missing'
    assert fake_python('gpu.sh', code=1) == []


def test_the_comparison_trains_the_teacher_first_then_the_seeds_side_by_side(fake_python, tmp_path):
    calls = fake_python('gpu_evidence.sh', 'DATA', str(tmp_path / 'out'), '60', '--workers', '2')
    seeds = []
    for argv, _ in calls:
        assert argv[:3] == ['-m', 'timm_rld', 'compare']
        at, to = argv.index('--seeds'), argv.index('--criteria')
        seeds.append([int(n) for n in argv[at + 1 : to]])
        criteria, flags = argv[to + 1 :], argv[argv.index('--config') : at]
        config = _check(criteria, seeds[-1], flags)  # flags that a comparison takes
        assert config.decay_milestones == (39, 46, 54) and config.workers == 2 and config.teacher_cache
        assert (config.epochs, config.teacher_epochs, config.mixed_precision) == (60, 60, 'bf16')
    assert seeds[0] == [0] and sorted(seeds[1:4]) == [[0], [1], [2]] and seeds[4] == [0, 1, 2]
    assert calls[0][0][-1] == 'none' and calls[-1][0][-5:] == ['none', 'kd', 'dkd', 'rld', 'rld:standardize=true']
    runs = tmp_path / 'out' / 'runs'
    assert all((runs / f'none-seed{n}').is_symlink() and (runs / f'none-seed{n}/results.json').exists() for n in (1, 2))
    again = fake_python('gpu_evidence.sh', 'DATA', str(tmp_path / 'out'), SEEDS='4', CRITERIA='kd rld')
    assert [argv[argv.index('--seeds') + 1 :] for argv, _ in again] == [['4', '--criteria', 'kd', 'rld']] * 2
    assert fake_python('gpu_evidence.sh', 'DATA', str(tmp_path / 'out'), '6x', code=2) == []


def test_a_signal_to_the_comparison_reaches_its_runs_before_it_ends(fake_python, tmp_path):
    env = {**os.environ, 'PYTHON': str(tmp_path / 'python'), 'FAKE_SLEEP': '1'}
    script = subprocess.Popen([str(ROOT / 'benchmarks/gpu_evidence.sh'), 'DATA', str(tmp_path / 'out')], env=env)
    deadline = time.monotonic() + 60
    while not (tmp_path / 'started').exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    script.terminate()
    assert script.wait(60) == 143
    assert (tmp_path / 'told').read_text() == 'x'


@pytest.mark.slow
def test_the_script_runs_on_a_cpu(tmp_path):
    command = [str(ROOT / 'benchmarks/gpu.sh'), str(tmp_path / 'out'), '--smoke', '--parts', 'loss', 'timm']
    command += ['--limit', '300']  # of a busy machine
    done = subprocess.run(command, env={**os.environ, 'PYTHON': sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'out' / 'gpu.json').read_text())
    assert found['parts']['loss']['ended'].startswith('done') and len(found['parts']['loss']['rows']) == 10
    assert found['parts']['timm']['ended'] == 'left out: no --timm-train'
    assert done.stdout.strip() == (tmp_path / 'out' / 'gpu.md').read_text().strip()


# ------------------------------------------------------------------------------------------------------ its packages


class Distribution:
    def __init__(self, version: str, requires: list[str] | None = None) -> None:
        self.version, self.requires = version, requires


def test_missing_packages_are_those_that_are_not_there_or_too_old(monkeypatch, tmp_path, capsys):
    there = {
        'torch': Distribution('2.11.0+cu130', ['nosuch-of-torch']), 'timm': Distribution('1.0.19'),
        'datasets': Distribution('5.2.0', ['dill>=0.3.0,<0.5', 'httpx<1.0', 'tensorflow; extra == "tensorflow"',
                                          'tomli; python_version < "3.10"']),
        'httpx': Distribution('0.28'),
    }  # fmt: skip

    def distribution(name: str) -> Distribution:
        if name not in there:
            raise metadata.PackageNotFoundError
        return there[name]

    monkeypatch.setattr(gpu_packages.metadata, 'distribution', distribution)
    wanted = ['torch>=2.6', 'timm>=1.0.31,<1.1', 'datasets>=3.0', 'PyYAML']
    monkeypatch.setattr(gpu_packages, 'needed', lambda: list(wanted))
    assert gpu_packages.missing() == {'pyyaml': 'PyYAML', 'dill': 'dill>=0.3.0,<0.5', 'timm': 'timm>=1.0.31,<1.1'}
    for name in ('dill-0.4-py3-none-any.whl', 'httpx-0.28-py3-none-any.whl', 'timm-1.0.31-py3-none-any.whl',
                 'other-1-py3-none-any.whl'):  # fmt: skip
        (tmp_path / name).touch()
    assert [file.name.partition('-')[0] for file in gpu_packages.of_wheels(tmp_path)] == ['dill', 'other', 'timm']
    monkeypatch.setattr(sys, 'argv', ['gpu_packages.py'])
    assert gpu_packages.main() == 1
    said = capsys.readouterr().err
    command = shlex.split(said.splitlines()[2])
    assert command[:4] == ['python3', '-m', 'pip', 'download'] and 'dill>=0.3.0,<0.5' in command
    assert 'nosuch-of-torch' not in said, 'torch came with what it needs'
    there |= {name: Distribution('9') for name in ('timm', 'dill', 'pyyaml')}
    assert gpu_packages.main() == 0


def test_its_requirements_are_the_packages(monkeypatch):
    names = {gpu_packages.parse(text)[0] for text in gpu_packages.needed()}
    assert {'torch', 'timm', 'accelerate', 'datasets', 'huggingface-hub', 'pytest'} <= names
