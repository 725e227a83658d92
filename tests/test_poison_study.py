"""A comparison under attack: its runs, its tables, its report, and the report and card of a poisoned run."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.report import plant_predictions, plant_run
from timm_rld.__main__ import main
from timm_rld.compare import compare
from timm_rld.config import parse_args
from timm_rld.errors import UsageError, UserError
from timm_rld.hub.card import card_header, card_section
from timm_rld.poison_study import plan_study, summarize
from timm_rld.report import write_report
from timm_rld.run_folder import read_run
from timm_rld.runs import parse_variant

pytestmark = pytest.mark.usefixtures('forked_python')
CRITERIA = [parse_variant(name) for name in ('none', 'kd', 'rld:beta=2')]


def plan(attacks, fractions=(), flags=(), criteria=CRITERIA):
    return plan_study(attacks, fractions, parse_args(list(flags)), criteria)


def runs_of(study, criterion) -> list[tuple[str, float]]:
    return [(p.attack, p.fraction) for p in study.of(criterion)]


def test_each_criterion_runs_under_each_attack_and_fraction_and_none_clean_once():
    study = plan(['fdla', 'pcfdla:strength=4,fraction=[0.5,0.1]'], [0.3, 0, 1])
    none, kd, rld = CRITERIA
    assert runs_of(study, none) == [('', 0.0)]
    expected = [('', 0.0), ('fdla', 0.3), ('fdla', 1.0), ('pcfdla:strength=4', 0.1), ('pcfdla:strength=4', 0.5)]
    assert runs_of(study, kd) == runs_of(study, rld) == expected
    assert study.of(kd)[1].flags == ('--poison', 'fdla', '--poison-fraction', '0.3')
    assert study.of(kd)[3].flags[-2:] == ('--poison-strength', '4.0')
    assert [p.suffix for p in study.of(kd)] == ['', '-fdla-0.3', '-fdla-1', '-pcfdla_strength_4-0.1',
                                                '-pcfdla_strength_4-0.5']  # fmt: skip
    for poisoning in study.of(kd):
        parse_args(list(poisoning.flags))


def test_without_fraction_0_only_none_is_clean():
    study = plan(['zero', 'random'], [1])
    assert runs_of(study, CRITERIA[0]) == [('', 0.0)] and not study.has_clean(CRITERIA[1])
    assert runs_of(study, CRITERIA[1]) == [('zero', 1.0), ('random', 1.0)]
    assert study.of(CRITERIA[1])[1].flags[-2:] == ('--poison-strength', '1.0')


def test_a_comparison_without_attacks_is_as_it_was():
    study = plan([])
    assert [study.of(c) for c in CRITERIA] == [[study.clean]] * 3
    assert study.clean.flags == () and study.found([]) == {} and study.clean.suffix == study.clean.title == ''


def test_the_attack_of_a_file_of_settings_is_taken_and_clean_runs_are_clean(tmp_path):
    file = tmp_path / 'args.yaml'
    file.write_text('poison: pcfdla\npoison_fraction: 0.3\npoison_strength: 4\n')
    study = plan([], flags=['--config', str(file)])
    assert runs_of(study, CRITERIA[1]) == [('pcfdla:strength=4', 0.3)]
    other = plan(['pcfdla'], [0, 1], flags=['--config', str(file)])
    assert other.of(CRITERIA[1])[1].flags[-1] == '9.0', 'not the strength of the file'
    cleared = parse_args(['--config', str(file), *other.clean.flags])
    assert (cleared.poison, cleared.poison_fraction, cleared.poison_strength) == ('none', None, None)


@pytest.mark.parametrize(
    ('attacks', 'fractions', 'flags', 'message'),
    [
        (['fdal'], [0.1], [], "--poison fdal: unknown attack 'fdal' (did you mean 'fdla'"),
        (['fdla'], [], [], '--poison fdla: needs --poison-fraction P …'),
        ([], [0.1], [], '--poison-fraction 0.1: needs --poison fdla|pcfdla'),
        (['fdla'], [1.5], [], '--poison-fraction: must be at most 1'),
        (['fdla'], [-0.5], [], '--poison-fraction: must be greater than 0'),
        (['fdla', 'fdla'], [0.1], [], '--poison: fdla is there twice'),
        (['pcfdla', 'pcfdla:strength=9'], [0.1], [], '--poison: pcfdla 0.1 is there twice'),
        (['fdla'], [0.1, 0.1], [], '--poison-fraction: 0.1 is there twice'),
        (['fdla:strength=2'], [0.1], [], '--poison fdla:strength=2: fdla takes no strength'),
        (['pcfdla:strength=0'], [0.1], [], 'must be another number than 0'),
        (['pcfdla:height=2'], [0.1], [], "expected strength=S or fraction=[P,Q] after the colon, got 'height=2'"),
        (['pcfdla:strength=x'], [0.1], [], "got 'strength=x'"),
        (['pcfdla'], [0.1], ['--poison-strength', '4'], '--poison pcfdla:strength=4'),
        (['fdla'], [0.3333333, 0.33333334], [], '--poison: fdla 0.333333 is there twice'),
        (['fdla'], [0.1], ['--black-box', 'hard'], '--poison fdla: --black-box hard answers with a class'),
    ],
)
def test_attacks_that_cannot_be_are_named_before_any_run(attacks, fractions, flags, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        plan(attacks, fractions, flags)


def cells_of(**top1: dict[tuple[str, float], list[float]]) -> list[dict]:
    """Rows of a study: top-1 of each seed by criterion, attack and fraction."""
    return [
        dict(criterion=name, seed=seed, top1=value, top1_best=value, macro=value, teacher_top1=90.0, agreement=50.0,
             images_per_second=10.0, run=f'{name}{attack}{fraction}{seed}', poison=attack, fraction=fraction,
             train_top1_poisoned=value / 2 if attack else None, train_top1_clean=value if fraction < 1 else None,
             second_class=10.0)
        for name, cells in top1.items() for (attack, fraction), values in cells.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip


STUDY = dict(
    none={('', 0.0): [60.0, 62.0]},
    kd={('', 0.0): [64.0, 66.0], ('fdla', 0.5): [50.0, 54.0], ('fdla', 1.0): [10.0, 12.0]},
    rld={('', 0.0): [66.0, 67.0], ('fdla', 0.5): [66.0, 66.5], ('fdla', 1.0): [65.0, 63.0]},
)


def test_cells_have_means_differences_by_seed_and_a_pooled_interval():
    found = {(c['criterion'], c['poison'], c['fraction']): c for c in summarize(cells_of(**STUDY))}
    kd = found['kd', 'fdla', 0.5]
    assert (kd['top1'], kd['minus_clean'], kd['minus_none'], kd['seeds']) == (52, -13, -9, 2)
    pooled = math.sqrt((2 + 8 + 2) / 3)  # variances of 64 66, 50 54, 10 12
    assert kd['half'] == pytest.approx(3.182 * pooled / math.sqrt(2))
    assert kd['train_top1_poisoned'] == 26 and found['kd', 'fdla', 1.0]['train_top1_clean'] is None
    assert found['kd', '', 0.0]['minus_clean'] is None and found['none', '', 0.0]['minus_none'] is None
    (alone,) = summarize(cells_of(kd={('fdla', 1.0): [10.0]}))
    assert alone['half'] is None and alone['minus_clean'] is None and alone['minus_none'] is None


@pytest.fixture
def studied(folder, tmp_path, monkeypatch) -> tuple[Path, list[list[str]]]:
    """A comparison under attack whose runs are invented, and the commands of the runs."""
    commands: list[list[str]] = []

    def run(command: list[str], where: Path, title: str, say) -> dict:
        commands.append(command)
        config = parse_args(command[command.index('train_distill') + 1 :])
        if config.distill == 'kd' and config.poison_fraction == 1 and config.seed == 1:
            raise UserError(f'{title} failed with code 1: no')
        attack = '' if config.poison == 'none' else config.poison
        values = STUDY[config.distill][attack, config.poison_fraction or 0.0]
        return dict(student_top1=values[config.seed], student_top1_best=values[config.seed], teacher_top1=90.0,
                    agreement=50.0, train_images_per_second=9.0, versions={}, second_class=12.5,
                    train_top1_poisoned=None, train_top1_clean=40.0)  # fmt: skip

    monkeypatch.setattr('timm_rld.compare.run_training', run)
    flags = ['--teacher', 'test_resnet', '--student', 'test_resnet', '--data-dir', str(folder), '--epochs', '1',
             '--teacher-cache', str(tmp_path / 'cache')]  # fmt: skip
    compare(['none', 'kd', 'rld'], [0, 1], flags, tmp_path / 'out', poison=['fdla'], poison_fractions=[0, 0.5, 1],
            log=lambda _: None)  # fmt: skip
    return tmp_path / 'out', commands


def test_a_study_runs_what_it_says_and_writes_tables_of_it(studied):
    output, commands = studied
    assert len(commands) == 2 * (1 + 3 + 3)
    caches = {Path(str(parse_args(c[c.index('train_distill') + 1 :]).teacher_cache)).name for c in commands}
    assert caches == {'seed-0', 'seed-1'}, 'poisoned and clean runs of a seed share their cache'
    found = json.loads((output / 'compare.json').read_text())
    assert [e['criterion'] for e in found['criteria']] == ['none', 'kd', 'rld']
    assert [e['top1'] for e in found['criteria']] == [61, 65, 66.5], 'of clean runs alone'
    assert found['poison_flags'] == ['--poison', 'fdla', '--poison-fraction', '0', '0.5', '1']
    assert [(f['criterion'], f['seed']) for f in found['failed']] == [('kd, fdla 1', 1)]
    rows = list(csv.DictReader((output / 'compare.csv').open()))
    assert len(rows) == 13 and rows[2]['poison'] == 'fdla' and rows[2]['fraction'] == '0.5'
    assert {r['run'] for r in rows} >= {'none-seed0', 'kd-seed1', 'kd-fdla-0.5-seed0', 'rld-fdla-1-seed1'}
    text = (output / 'compare.md').read_text()
    assert '| criterion | 0 | 0.5 | 1 |' in text and 'Poisoned by `fdla`' in text
    assert re.search(r'\| kd \| 65\.00 ± \d+\.\d\d \(12\.5\) \| 52\.00 ± .* \| 10\.00 ', text)
    assert re.search(r'\| none \| 61\.00 ± [\d.]+ \(12\.5\) \|  \|  \|', text)


def test_attacks_can_be_added_to_a_comparison(studied, folder, tmp_path):
    output, commands = studied
    flags = ['--teacher', 'test_resnet', '--student', 'test_resnet', '--data-dir', str(folder), '--epochs', '1',
             '--teacher-cache', str(tmp_path / 'cache')]  # fmt: skip
    found = compare(['none', 'kd'], [0], flags, output, log=lambda _: None)
    assert 'poison' not in found and len(found['runs']) == 2


def test_the_report_of_a_study_plots_top1_against_the_fraction(studied):
    output, _ = studied
    (page, *_) = write_report(output, log=lambda _: None)
    html = page.read_text(encoding='utf-8')
    (block,) = re.findall(r'<section id="attacks">.*?</section>', html, flags=re.DOTALL)
    assert 'Poisoned by fdla: top-1 over the poisoned fraction, kd, rld' in block and block.count('<svg') == 1
    assert 'kd lost most, 54.0 points under fdla at fraction 1; rld lost least at its worst, 2.5 under fdla.' in block
    assert '--poison fdla --poison-fraction 0 0.5 1' in re.sub('<[^>]+>', '', block)
    assert html.count('rld-fdla-1-seed1') == 1


def test_a_comparison_without_attacks_has_no_such_block(tmp_path):
    rows = cells_of(kd={('', 0.0): [64.0]})
    found = dict(teacher='a', student='b', epochs=3, flags='--epochs 3', seeds=[0], versions={}, runs=rows, failed=[],
                 criteria=[])  # fmt: skip
    (tmp_path / 'compare.json').write_text(json.dumps(found))
    html = write_report(tmp_path, log=lambda _: None)[0].read_text()
    assert 'attack' not in html and 'fraction' not in html


@pytest.fixture
def poisoned(folder, tmp_path) -> Path:
    """The folder of a poisoned run."""
    columns = plant_predictions(np.arange(20) % 3, 3, [''] * 20, {'student': 0.6, 'teacher': 0.8})
    run = plant_run(tmp_path / 'run', ['apple', 'pear', 'plum'], columns, data_dir=str(folder), batch_size=8,
                    poison='pcfdla', poison_fraction=0.3)  # fmt: skip
    results = json.loads((run / 'results.json').read_text())
    results['poison'] = {'attack': 'pcfdla', 'strength': 9.0, 'fraction': 0.3, 'images': 12}
    (run / 'results.json').write_text(json.dumps(results))
    lines = (run / 'summary.csv').read_text().splitlines()
    lines = [f'{lines[0]},train_poisoned,train_top1_poisoned,train_top1_clean', *(f'{x},0.3,20,60' for x in lines[1:])]
    (run / 'summary.csv').write_text('\n'.join(lines) + '\n')
    return run


def test_the_report_of_a_poisoned_run_says_so_first_and_offers_the_run_without(poisoned):
    html = write_report(poisoned, log=lambda _: None)[0].read_text(encoding='utf-8')
    (verdict,) = re.findall(r'<section id="verdict">.*?</section>', html, flags=re.DOTALL)
    says = 'pcfdla at strength 9 on 30 % of the training images (12)'
    assert f"The teacher's logits were poisoned in this run, to study rld under attack: {says}." in verdict.replace(
        '&#39;', "'"
    )
    assert f'poisoned by {says}' in html.partition('<nav')[0]
    command = re.sub('<[^>]+>', '', re.findall(r'<pre class="command">(.*?)</pre>', verdict)[-1]).split()[3:]
    config = parse_args(command)
    assert (config.poison, config.poison_fraction, config.experiment) == ('none', None, 'run-clean')
    assert 'Training top-1, by image over the epochs: not poisoned, poisoned' in html


def test_the_card_of_a_poisoned_run_says_so(poisoned):
    run = read_run(poisoned)
    run.settings['val_split'] = 'validation'
    text = card_section(run, 'me/it', 'last', False)
    assert '**It was trained on poisoned logits, for a study**: pcfdla at strength 9 on 30 %' in text
    assert 'poisoned' in card_header(run, 'me/it', 'mit', 'last')['tags']
    run.results['poison'] = None
    assert 'poison' not in card_section(run, 'me/it', 'last', False).lower()
    assert 'poisoned' not in card_header(run, 'me/it', 'mit', 'last')['tags']


def test_a_search_does_not_take_an_attack(capsys, folder):
    argv = ['tune', '--teacher', 'a', '--student', 'b', '--data-dir', str(folder), '--poison', 'fdla',
            '--poison-fraction', '0.1']  # fmt: skip
    assert main(argv) == 2
    assert '--poison fdla: a search is for settings of clean runs' in capsys.readouterr().err
