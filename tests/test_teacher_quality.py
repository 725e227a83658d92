"""The study of weak teachers runs, continues, and computes what it says."""

from __future__ import annotations

import json

import pytest

from benchmarks import teacher_quality as study
from timm_rld.errors import UserError

FLAGS = ['--teacher', 'test_resnet', '--student', 'test_resnet', '--teacher-epochs', '2', '1', '--seeds', '0', '1']


@pytest.fixture
def trainings(monkeypatch):
    """What would be trained; the results follow from seed, criterion and epochs of the teacher."""
    started: list[list[str]] = []

    def run(command: list[str], folder, title: str, log) -> dict:
        flags = dict(zip(command, command[1:], strict=False))
        epochs, seed = int(flags.get('--teacher-epochs', 0)), int(flags['--seed'])
        started.append(command)
        if '--teacher' in flags and 'local-dir' not in flags['--teacher']:
            return {'teacher_top1': 0.0}
        teacher = None
        if '--teacher' in flags:
            epochs = int(flags['--teacher'].split('/teacher')[1][0])
            teacher = 20.0 * epochs + seed
        top1 = {'none': 50.0, 'kd': 40.0 + 10 * epochs, 'rld': 60.0 + 2 * epochs + seed}[flags['--distill']] + seed
        if (flags['--distill'], seed, epochs) in failing:
            raise UserError(f'{title} failed with code 1: no')
        return {'teacher_top1': teacher, 'student_top1': top1, 'student_top1_best': top1, 'agreement': 30.0,
                'versions': {'torch': '2'}}  # fmt: skip

    failing: set[tuple[str, int, int]] = set()
    monkeypatch.setattr(study, 'run_training', run)
    monkeypatch.setattr('timm_rld.runs.run_training', run)
    return started, failing


def test_each_seed_has_its_own_teachers_and_all_its_students_see_the_same_images(trainings, tmp_path, capsys):
    started, _ = trainings
    argv = [*FLAGS, '--criteria', 'kd', 'rld', '--output', str(tmp_path / 'out'), '--', '--cpu-threads', '1']
    assert study.main(argv) == 0
    of = [dict(zip(command, command[1:], strict=False)) for command in started]
    assert len(of) == 2 * (1 + 2 * (1 + 2)) and all(f['--cpu-threads'] == '1' for f in of)
    none = [f for f in of if f.get('--distill') == 'none']
    assert len(none) == 2 and not any('--teacher' in f for f in none)
    students = [f for f in of if f.get('--distill') in ('kd', 'rld')]
    assert len({f['--teacher-cache'] for f in students}) == 4 and {f['--teacher-cache-views'] for f in students} == {
        '11'
    }
    assert len({(f['--teacher'], f['--seed']) for f in students}) == 4, 'a teacher for each seed and number of epochs'
    found = json.loads((tmp_path / 'out' / 'teacher_quality.json').read_text())
    points = {(p['teacher_epochs'], p['criterion']): p for p in found['points']}
    assert points[1, 'kd']['gain'] == [0, 0] and points[2, 'kd']['gain'] == [10, 0]
    assert points[1, 'rld']['gain'][0] == 12.5 and points[1, 'kd']['rld_minus_this'][0] == 12.5
    assert points[2, 'rld']['gain_by_seed'] == {'0': 14, '1': 15}
    assert found['changes'] == [{'criterion': 'kd', 'change': [8, 0]}], 'of the lead, from 12 and 13 to 4 and 5'
    assert [t['epochs'] for t in found['teachers']] == [1, 2] and found['teachers'][0]['top1'][0] == 20.5
    text = (tmp_path / 'out' / 'teacher_quality.md').read_text()
    assert '| 1 | 20.50 ± 0.71 | `kd` | 50.50 ± 0.71 | +0.00 ± 0.00 | +12.50 ± 6.35 | 30.0 |' in text
    assert 'without distillation top-1 50.50 ± 0.71' in text and '`kd` +8.00 ± 0.00' in text
    assert capsys.readouterr().out.strip() == text.strip()
    picture = (tmp_path / 'out' / 'teacher_quality.svg').read_text()
    assert 'gain over none' in picture and '>rld</text>' in picture
    before = picture
    assert study.main(argv) == 0
    assert (tmp_path / 'out' / 'teacher_quality.svg').read_text() == before, 'the same figures, the same file'


def test_a_run_that_fails_is_left_out_and_named(trainings, tmp_path, capsys):
    _, failing = trainings
    failing.add(('kd', 1, 1))
    assert study.main([*FLAGS, '--criteria', 'kd', 'rld', '--output', str(tmp_path / 'out')]) == 1
    assert '1 runs failed' in capsys.readouterr().err
    found = json.loads((tmp_path / 'out' / 'teacher_quality.json').read_text())
    assert [f['run'] for f in found['failed']] == ['teacher1-seed1/kd']
    points = {(p['teacher_epochs'], p['criterion']): p for p in found['points']}
    assert points[1, 'kd']['seeds'] == 1 and points[1, 'kd']['gain'] == [0, None]
    failing.clear()
    failing.add(('none', 0, 0))
    assert study.main([*FLAGS, '--criteria', 'kd', '--output', str(tmp_path / 'two')]) == 1
    assert (tmp_path / 'two' / 'teacher_quality.md').exists()


def test_the_lead_in_the_table_is_that_of_the_criterion_that_it_names(trainings, tmp_path):
    argv = [*FLAGS, '--criteria', 'kd', 'rld:beta=2', 'rld:alpha=2', 'rld', '--output', str(tmp_path / 'out')]
    assert study.main(argv) == 0
    lines = (tmp_path / 'out' / 'teacher_quality.md').read_text().splitlines()
    assert '| rld minus this |' in lines[2]
    assert [line.split(' | ')[-2] for line in lines[4:] if '`rld`' in line] == ['', '']


def test_one_seed_has_no_interval(trainings, tmp_path):
    assert study.main([*FLAGS[:-2], '3', '--criteria', 'kd', 'rld', '--output', str(tmp_path / 'out')]) == 0
    assert '| 2 | 43.00 | `kd` | 63.00 | +10.00 | +7.00 | 30.0 |' in (tmp_path / 'out/teacher_quality.md').read_text()


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (['--criteria', 'none', 'kd'], '--criteria none: is what the others are compared with'),
        (['--criteria', 'kdd'], "did you mean 'kd'"),
        (['--teacher-epochs', '0'], '--teacher-epochs 0: must be at least 1'),
        (['--seeds', '1', '1'], '--seeds: 1 is there twice'),
        (['--', '--teacher', 'resnet18'], '--teacher: is chosen by this program'),
        (['--', '--distill', 'kd'], '--distill: is chosen for each run'),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(trainings, tmp_path, capsys, wrong, message):
    assert study.main([*FLAGS, '--output', str(tmp_path / 'out'), *wrong]) == 2
    assert message in capsys.readouterr().err and trainings[0] == [] and not (tmp_path / 'out').exists()
