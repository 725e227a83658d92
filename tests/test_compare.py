"""timm-rld compare: what it runs, what it goes on with, and the arithmetic of its table."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from timm_rld.__main__ import main
from timm_rld.compare import compare, markdown, summarize
from timm_rld.config import Config, parse_args
from timm_rld.errors import Stopped, UserError
from timm_rld.runs import claim, parse_variant, reference_of

pytestmark = pytest.mark.usefixtures('forked_python')


def rows(**top1: list[float]) -> list[dict]:
    return [
        dict(criterion=name, seed=seed, top1=value, top1_best=value + 1, macro=value - 1.0, teacher_top1=80.0,
             agreement=50.0, images_per_second=100.0, run='')
        for name, values in top1.items() for seed, value in enumerate(values)
    ]  # fmt: skip


def test_means_deviations_gains_and_paired_intervals():
    none, kd, rld = summarize(rows(none=[60, 62, 64], kd=[61, 63, 66], rld=[63, 66, 66]))
    assert (none['top1'], none['top1_std'], none['top1_best'], none['gain_over_none']) == (62, 2, 63, None)
    assert kd['gain_over_none'] == pytest.approx(4 / 3)
    assert kd['rld_minus_this'] == pytest.approx(5 / 3)
    deviation = math.sqrt(((2 - 5 / 3) ** 2 + (3 - 5 / 3) ** 2 + (0 - 5 / 3) ** 2) / 2)
    assert kd['interval'] == pytest.approx(4.303 * deviation / math.sqrt(3))
    assert rld['rld_minus_this'] is None and rld['gain_over_none'] == pytest.approx(3)
    assert rld['gain_interval'] == pytest.approx(4.303 / math.sqrt(3)), 'gains of 3, 4 and 2'
    assert none['gain_interval'] is None


def test_gains_have_intervals_but_for_one_seed_which_says_so():
    found = dict(teacher='a', student='b', epochs=2, seeds=[0], runs=rows(none=[60], rld=[62]))
    text = markdown({**found, 'criteria': summarize(found['runs'])})
    assert '±' not in text and 'One seed' in text
    found = dict(teacher='a', student='b', epochs=2, seeds=[0, 1], runs=rows(none=[60, 60], rld=[61, 63]))
    assert '| +2.00 ± 12.71 |' in markdown({**found, 'criteria': summarize(found['runs'])})
    assert '| none | 60.00 | 61.00 | 59.00 |  | +2.00 |' in text


@pytest.fixture(scope='module')
def compared(folder, tmp_path_factory):
    """A comparison of two criteria, complete; the flags that made it."""
    output = tmp_path_factory.mktemp('compare') / 'out'
    argv = [
        'compare', '--criteria', 'none', 'rld:beta=2,distill_warmup_epochs=1', '--seeds', '0', '--output', str(output),
        '--teacher', 'test_resnet', '--student', 'test_resnet', '--data-dir', str(folder), '--img-size', '32',
        '--no-teacher-pretrained', '--teacher-epochs', '1', '--epochs', '1', '-b', '8', '--workers', '0',
        '--lr', '0.01', '--min-teacher-acc', '0', '--teacher-cache', str(output.parent / 'cache'),
    ]  # fmt: skip
    assert main(argv) == 0
    return output, argv


@pytest.mark.slow
def test_the_teacher_is_fitted_once_and_each_run_has_its_criterion(compared):
    output, _ = compared
    found = json.loads((output / 'compare.json').read_text())
    assert [r['criterion'] for r in found['runs']] == ['none', 'rld:beta=2,distill_warmup_epochs=1']
    assert len({r['teacher_top1'] for r in found['runs']}) == 1
    results = json.loads((output / found['runs'][1]['run'] / 'results.json').read_text())
    assert results['distill'] == 'rld' and results['distill_options']['beta'] == 2
    assert not list(output.glob('*seed*/teacher')) and (output / 'teacher' / 'teacher').is_dir()
    assert (output / 'compare.md').read_text().count('\n| ') == 4
    assert [p.name for p in (output.parent / 'cache').iterdir()] == ['seed-0'], 'seeds see other images'
    assert len((output / 'compare.csv').read_text().splitlines()) == 3


@pytest.mark.slow
def test_the_same_call_goes_on_with_what_is_missing_and_more_criteria_can_be_added(compared, capsys):
    output, argv = compared
    (output / 'none-seed0' / 'results.json').unlink()  # as if it had been killed
    before = (output / 'teacher' / 'results.json').stat().st_mtime_ns
    argv = [*argv[:2], 'kd', *argv[2:]]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert 'the teacher: already there' in out and 'seed 0: already there' in out
    assert '[2/3] none seed 0: top-1' in out and '[1/3] kd seed 0: top-1' in out
    assert (output / 'teacher' / 'results.json').stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ('extra', 'code', 'message'),
    [
        (['--lr', '0.02'], 1, 'holds a comparison with --lr 0.01, not 0.02'),
        (['--seed', '3'], 2, '--seed: is chosen for each run'),
        (['--lrr', '3'], 2, "unknown flag --lrr (did you mean '--lr'?)"),
        (['--criteria', 'kd', 'kd'], 2, '--criteria: kd is there twice'),
        (['--criteria', 'kdd'], 2, "unknown criterion 'kdd'"),
        (['--criteria', 'kd:beta=1'], 2, "criterion 'kd' has no option 'beta'"),
        (['--criteria', 'kd:standardize=on'], 2, 'standardize must be true or false, got on'),
        (['--criteria', 'rld:beta=abc'], 2, '--criteria rld:beta=abc: '),
        (['--seeds', '-1'], 2, '--seed: must be at least 0'),
        (['--criteria', 'kd:beta'], 2, 'expected name=value after the colon'),
        (
            ['--criteria', 'kd', 'mekd:task_loss_weight=1'],
            2,
            '--criteria mekd:task_loss_weight=1: --task-loss-weight 1 w',
        ),
    ],
)
def test_a_wrong_comparison_says_so_before_any_run(compared, capsys, extra, code, message):
    assert main([*compared[1], *extra]) == code
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_message_and_log(compared, capsys, tmp_path):
    argv = [*compared[1], '--output', str(tmp_path / 'out'), '--data-dir', str(tmp_path / 'nowhere')]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert 'the teacher failed with code 1' in error and 'no such folder' in error and 'teacher.log' in error


@pytest.mark.slow
def test_a_run_that_fails_does_not_keep_the_others_from_running(compared, capsys):
    output, argv = compared
    before = (output / 'none-seed0' / 'results.json').stat().st_mtime_ns
    for _ in range(2):  # the same call repeats what failed
        assert main([*argv, '--criteria', 'kd:task_loss_weight=3e38', 'none', 'kd']) == 1
        said, error = capsys.readouterr()
        assert '[1/3] kd:task_loss_weight=3e38 seed 0 failed with code 1: the loss is inf' in said
        assert 'none seed 0: already there' in said and '[3/3] kd seed 0' in said
        assert '| kd:task_loss_weight=3e38 | failed |' in said and said.count('\n| kd | ') == 1
        assert 'not in these figures: kd:task_loss_weight=3e38 seed 0.' in said
        assert error.startswith('timm-rld: error: 1 of 3 runs failed; the same command repeats them')
        assert 'seed 0 failed with code 1: the loss is inf in epoch 1 of the student' in error and '.log)' in error
    assert (output / 'none-seed0' / 'results.json').stat().st_mtime_ns == before
    found = json.loads((output / 'compare.json').read_text())
    assert [(f['criterion'], f['seed']) for f in found['failed']] == [('kd:task_loss_weight=3e38', 0)]
    assert len((output / 'compare.csv').read_text().splitlines()) == 3


@pytest.mark.parametrize('how', ['some', 'all', 'stopped'])
def test_tables_are_made_of_the_runs_that_there_are(folder, tmp_path, monkeypatch, how):
    started = []

    def run(command: list[str], where: Path, title: str, say) -> dict:
        started.append(title)
        if how == 'stopped':
            raise Stopped('stopped by SIGTERM', 143)
        name, seed = title.split()[0], int(title.split()[2])
        if how == 'all' or name == 'dkd' or (name, seed) in (('rld', 1), ('none', 0)):
            raise UserError(f'{title} failed with code 1: no')
        top1 = {'none': 50.0, 'kd': 60.0, 'rld': 70.0}[name] + seed * seed
        return dict(student_top1=top1, student_top1_best=top1, teacher_top1=80.0, agreement=None,
                    train_images_per_second=9.0, versions={})  # fmt: skip

    monkeypatch.setattr('timm_rld.compare.run_training', run)
    flags = ['--teacher', 'test_resnet', '--student', 'test_resnet', '--data-dir', str(folder), '--epochs', '1']
    if how == 'stopped':
        with pytest.raises(Stopped):
            compare(['none', 'kd'], [0, 1], flags, tmp_path / 'out', log=lambda _: None)
        assert len(started) == 1
        return
    found = compare(['none', 'kd', 'dkd', 'rld'], [0, 1, 2], flags, tmp_path / 'out', log=lambda _: None)
    assert len(started) == 12 and len(found['failed']) == (12 if how == 'all' else 5)
    assert json.loads((tmp_path / 'out' / 'compare.json').read_text()) == found
    none, kd, dkd, rld = found['criteria']
    assert dkd['seeds'] == 0 and dkd['top1'] is None
    table = (tmp_path / 'out' / 'compare.md').read_text()
    assert table.count('| failed |') == (4 if how == 'all' else 1)
    if how == 'some':
        assert (none['seeds'], kd['seeds'], rld['seeds']) == (2, 3, 2)
        assert kd['gain_over_none'] == 10, 'of seeds 1 and 2'
        assert rld['gain_over_none'] == 20, 'of seed 2'
        assert kd['rld_minus_this'] == 10, 'of seeds 0 and 2'
        assert '| kd | 61.67 ' in table and '| rld (2 of 3 seeds) | 72.00 ' in table
        assert 'Failed, and so not in these figures: none seed 0, dkd seed 0, ' in table


def test_the_reference_is_rld_or_its_first_variant():
    assert reference_of(['none', 'rld:beta=2', 'rld', 'kd']) == 'rld'
    assert reference_of(['kd', 'rld+at', 'rld:beta=2']) == 'rld+at'
    assert reference_of(['none', 'kd']) is None
    two = rows(**{'rld:beta=2': [61, 62], 'rld': [65, 66], 'none': [60, 60]})
    found = dict(teacher='a', student='b', epochs=2, seeds=[0, 1], runs=two, criteria=summarize(two))
    assert found['criteria'][0]['rld_minus_this'] == 4 and '| rld minus this |' in markdown(found)
    two = rows(kd=[61, 62], none=[60, 60])
    table = markdown({**found, 'runs': two, 'criteria': summarize(two)})
    assert 'minus this' not in table and len({line.count('|') for line in table.splitlines() if '|' in line}) == 1


def test_with_standardized_logits_of_a_file_none_is_still_none():
    variant = parse_variant('none')
    config = parse_args(['--standardize', *variant.flags])
    assert not config.standardize and config.distill == 'none'
    assert '--no-standardize' not in parse_variant('rld').flags


def test_a_launcher_that_is_no_program_is_refused_before_anything_is_written(tmp_path, capsys):
    argv = ['compare', '--criteria', 'none', '--seeds', '0', '--teacher', 'test_resnet', '--student', 'test_resnet',
            '--output', str(tmp_path / 'out'), '--launcher']  # fmt: skip
    for launcher, said in (('acelerate launch', 'there is no program acelerate'), ("a 'b", 'No closing quotation')):
        assert main([*argv, launcher]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_a_folder_in_which_a_comparison_goes_on_is_refused_to_another(tmp_path):
    code = (
        'import os, sys, time; from pathlib import Path; from timm_rld.config import Config; '
        'from timm_rld.runs import claim; '
        "claim(Path(sys.argv[1]), Config(), 'a comparison'); print(os.getpid(), flush=True); time.sleep(99)"
    )
    other = subprocess.Popen([sys.executable, '-c', code, str(tmp_path / 'out')], stdout=subprocess.PIPE, text=True)
    pid = int(other.stdout.readline())
    try:
        with pytest.raises(UserError, match=f'out: in use by process {pid} on'):
            claim(tmp_path / 'out', Config(), 'a comparison')
    finally:
        os.kill(pid, signal.SIGKILL)
        other.wait()
    claim(tmp_path / 'out', Config(), 'a comparison')


def test_a_variant_is_its_flags():
    assert parse_variant('mlkd:temperatures=[2,3]').flags[-1] == 'temperatures=[2,3]'
    assert parse_variant('kd:standardize=true,temperature=3,task_loss_weight=0.5').flags == (
        '--distill', 'kd', '--standardize', '--task-loss-weight', '0.5', '--distill-kwargs', 'temperature=3',
    )  # fmt: skip
