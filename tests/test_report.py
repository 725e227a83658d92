"""The report of a run and of a comparison: its numbers, its sentences, its pictures, and what it makes of odd input."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from benchmarks.report import plant_predictions, plant_run
from timm_rld import metrics
from timm_rld.__main__ import data_settings, main
from timm_rld.config import flag_of, parse_args
from timm_rld.data import open_splits
from timm_rld.report import Cell, Picture, Table, figures, plots, render, thumbnail, write_report
from timm_rld.report.images import first_images, open_images
from timm_rld.report.rules import RULES, finding
from timm_rld.run_folder import read_run

BLOCKS = ('verdict', 'answers', 'curves', 'classes', 'calibration', 'images', 'time', 'settings')
PICTURE = 'src="data:image/png'
EVIL = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "it's `a` & $b$ {{ 7 * 7 }}"]


class Elements(HTMLParser):
    """The elements of a page, and whether each was closed."""

    VOID = ('meta', 'link', 'img', 'input', 'br', 'hr')

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f'{tag} is closed where {self.open} are open'


def labels(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Classes and file names of the validation split of `folder`."""
    paths = sorted((folder / 'validation').rglob('*.png'))
    names = sorted({p.parent.name for p in paths})
    return np.array([names.index(p.parent.name) for p in paths]), [str(p) for p in paths]


@pytest.fixture
def planted(folder, tmp_path):
    """A run on `folder`, with a teacher."""
    target, files = labels(folder)
    columns = plant_predictions(target, 3, files, {'student': 0.6, 'teacher': 0.8})
    return plant_run(tmp_path / 'run', ['apple', 'pear', 'plum'], columns, data_dir=str(folder), batch_size=8)


def page_of(run: Path, **kwargs: object) -> str:
    return write_report(run, log=lambda _: None, **kwargs)[0].read_text(encoding='utf-8')


def block(html: str, key: str) -> str:
    (found,) = re.findall(rf'<section id="{key}">.*?</section>', html, flags=re.DOTALL)
    return found


# ------------------------------------------------------------------------------------------------------------ the page


def test_a_report_has_every_block_and_each_ends_with_a_sentence_and_a_command(planted):
    html = page_of(planted)
    Elements(html)
    for key in BLOCKS:
        meaning = block(html, key).rpartition('<aside class="meaning')[2]
        assert meaning.count('<p>') == meaning.count('<pre class="command">') == 1, key
    assert html.count(PICTURE) > 40
    assert (planted / 'report-suspects.csv').exists() and (planted / 'report-classes.csv').exists()


def test_a_report_asks_no_host_for_anything_and_lets_no_other_script_run(planted):
    html = page_of(planted)
    for tag, attributes in Elements(html).found:
        for name in ('src', 'href', 'xlink:href', 'srcset', 'action', 'poster', 'data'):
            assert (attributes.get(name) or '#').startswith(('#', 'data:')), (tag, attributes)
        assert not [name for name in attributes if name.startswith('on')]
    assert not re.findall(r'url\((?!#)[^)]*\)|@import|@font-face|https?://', html)
    policy = next(a['content'] for tag, a in Elements(html).found if 'http-equiv' in a)
    assert html.count('<script') == 1 and "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_the_same_files_give_the_same_report(planted):
    assert page_of(planted) == page_of(planted)


def test_ids_of_a_page_are_its_own(planted):
    ids = [attributes['id'] for _, attributes in Elements(page_of(planted)).found if 'id' in attributes]
    assert len(ids) == len(set(ids))


def test_a_report_goes_where_it_is_told_with_its_tables_beside_it(planted, tmp_path, capsys):
    page = tmp_path / 'out' / 'mine.html'
    page.parent.mkdir()
    assert main(['report', str(planted), '--output', str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    assert sorted(p.name for p in page.parent.iterdir()) == ['mine-classes.csv', 'mine-suspects.csv', 'mine.html']
    assert 'mine-suspects.csv' in page.read_text() and not (planted / 'report.html').exists()


def test_many_classes_give_a_table_of_pairs_and_a_csv_in_place_of_the_matrix(folder, tmp_path):
    rng = np.random.default_rng(0)
    target = np.arange(800) % 40
    columns = plant_predictions(target, 40, [''] * 800, {'student': 0.6, 'teacher': 0.8})
    run = plant_run(tmp_path / 'run', [f'k{i}' for i in rng.permutation(40)], columns, data_dir=str(folder))
    html = page_of(run)
    assert 'confusion matrix' not in html and 'report-confusions.csv' in block(html, 'classes')
    rows = list(csv.DictReader((run / 'report-confusions.csv').open()))
    wrong = columns['student_top1'] != target
    assert sum(int(row['images']) for row in rows) == wrong.sum()
    assert [int(row['images']) for row in rows] == sorted((int(row['images']) for row in rows), reverse=True)


# ------------------------------------------------------------------------------------------------------ untrusted text


def test_names_of_classes_files_and_datasets_are_text_and_never_markup(folder, tmp_path):
    root = tmp_path / 'data <script>'
    for split in ('train', 'validation'):
        for name, other in zip(EVIL, sorted(p.name for p in (folder / split).iterdir())):
            shutil.copytree(folder / split / other, root / split / name.replace('/', '∕'))
    names = sorted(name.replace('/', '∕') for name in EVIL)
    target = np.arange(20) % 3
    columns = plant_predictions(
        target, 3, [f'a<script>"{i}\'.png' for i in range(20)], {'student': 0.5, 'teacher': 0.5}
    )
    run = plant_run(tmp_path / '<b>run', names, columns, data_dir=str(root), batch_size=8)
    html = page_of(run)
    elements = Elements(html).found
    assert [tag for tag, _ in elements].count('script') == 1
    assert not [1 for tag, a in elements if tag in ('b', 'iframe', 'object') or 'onerror' in a or a.get('src') == 'x']
    assert '&lt;script&gt;' in html and '{{ 7 * 7 }}' in html and html.count('alert(1)') > 3
    assert all('"' not in str(value) for _, a in elements for k, value in a.items() if k == 'class')


def test_the_card_of_a_run_shows_names_as_text(planted):
    from timm_rld.hub.card import card_header, card_section, merge_card

    settings = json.loads(json.dumps(read_run(planted).settings))
    run = read_run(planted)
    for name in EVIL:
        settings.update(dataset=None, data_dir=name, val_split=name, teacher=name)
        run = type(run)(run.folder, settings, {**run.results, 'agreement': None}, run.history, run.config)
        text = merge_card(None, card_header(run, 'me/it', 'mit', 'last'), card_section(run, 'me/it', 'last', False))
        outside = re.sub(r'```.*?```|`[^`\n]*`|``.*?``', '', text, flags=re.DOTALL)
        assert '<script' not in outside and '<img' not in outside


def test_a_csv_holds_no_formula(planted):
    from timm_rld.report.page import as_csv

    assert as_csv(['a'], [['=cmd()'], ['@x'], ['-2+cmd'], ['-3'], [4]]).split() == [
        'a', "'=cmd()", "'@x", "'-2+cmd", '-3', '4'
    ]  # fmt: skip


def test_a_page_of_another_verb_can_be_made_of_the_same_parts(tmp_path):
    from PIL import Image

    from timm_rld.report import page

    template = page.TEMPLATES / 'run.html'
    assert template.exists()
    picture = Picture(thumbnail(Image.new('RGB', (300, 200))), ['<i>', ('student', '"')], 'a"b')
    assert picture.source.startswith('data:image/png') and thumbnail(Image.new('L', (99, 80)), 90).startswith(
        'data:image/jpeg'
    )
    found = dict(seeds=[0], criteria=[], epochs=1, failed=[], flags='--teacher <b>')
    html = render('compare.html', found=found, title='<b>', folder='"', table=Table(['a', 'n#'], [['<', Cell('1', 1)]]),
                  top1=None, differences=None, runs=Table(['x']), seeds='0', attacks=None,
                  meaning=dict(sentence='<s>', command='', tone=''))  # fmt: skip
    assert '<td>&lt;</td>' in html and '&lt;s&gt;' in html and '<b>' not in html and 'data-value="1"' in html


# ------------------------------------------------------------------------------------------------------------ numbers


def predictions(student, teacher=None, target=None):
    """Predictions from lists of (class, its probability, that of the target)."""
    target = np.array(target)

    def answers(rows):
        top1, prob, of_target = (np.array(x) for x in zip(*rows))
        return figures.Answers(top1, prob, of_target, -np.log(of_target), top1 == target)

    return figures.Predictions(np.arange(len(target)), [''] * len(target), target, answers(student),
                               None if teacher is None else answers(teacher))  # fmt: skip


def test_quadrants_hold_each_image_once_the_most_confident_first():
    rows = [(0, 0.6, 0.6), (0, 0.9, 0.9), (1, 0.7, 0.1), (0, 0.5, 0.5), (2, 0.8, 0.1)]
    teacher = [(0, 0.8, 0.8), (0, 0.9, 0.9), (0, 0.9, 0.9), (1, 0.6, 0.3), (2, 0.9, 0.05)]
    cells = figures.quadrants(predictions(rows, teacher, [0] * 5))
    assert {k: v.tolist() for k, v in cells.items()} == {'both': [1, 0], 'teacher': [2], 'student': [3], 'neither': [4]}


def test_suspects_are_images_on_which_both_are_sure_of_the_same_other_class():
    student = [(1, 0.9, 0.05), (1, 0.9, 0.001), (1, 0.4, 0.2), (1, 0.9, 0.05), (0, 0.9, 0.9)]
    teacher = [(1, 0.9, 0.05), (1, 0.9, 0.001), (1, 0.9, 0.05), (2, 0.9, 0.05), (1, 0.9, 0.05)]
    assert figures.suspects(predictions(student, teacher, [0] * 5)).tolist() == [1, 0]
    assert figures.suspects(predictions(student, None, [0] * 5)).tolist() == [1, 0, 3]


def test_confused_pairs_are_counted_as_a_loop_counts_them():
    rng = np.random.default_rng(0)
    target, said = rng.integers(0, 5, 300), rng.integers(0, 7, 300)
    counted: dict[tuple[int, int], int] = {}
    for a, b in zip(target.tolist(), said.tolist()):
        if a != b:
            counted[a, b] = counted.get((a, b), 0) + 1
    found = figures.confused_pairs(target, said)
    assert {(a, b): n for a, b, n in found} == counted
    assert [n for *_, n in found] == sorted(counted.values(), reverse=True)
    assert figures.confused_pairs(target, target) == []


def test_a_late_rise_compares_the_last_epochs_with_those_before():
    assert figures.late_rise([0, 1, 2, 3, 4, 5, 6, 7, 8, 20], 0.1) == 12
    assert figures.late_rise([1.0] * 7 + [2.0, 4.0], 0.2) == 2.0
    assert figures.late_rise([1, 2, 3], 0.2) is None
    assert figures.late_rise([float('nan')] * 9, 0.2) is None


def test_an_interval_over_seeds_is_students():
    mean, half = metrics.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)
    assert metrics.mean_interval([1.0]) == (1.0, None)
    for degrees, t in ((9, 2.262), (11, 2.201), (19, 2.093), (29, 2.045), (31, 2.040), (60, 2.0003)):
        values = list(np.linspace(0, 1, degrees + 1))
        expected = t * np.std(values, ddof=1) / (degrees + 1) ** 0.5
        assert metrics.mean_interval(values)[1] == pytest.approx(expected, rel=0.001)


def test_the_table_of_classes_says_what_the_predictions_say(planted):
    page_of(planted)
    rows = list(csv.DictReader((planted / 'report-classes.csv').open()))
    p = figures.read_predictions(planted / 'predictions.parquet')
    for c, row in enumerate(rows):
        mine = p.target == c
        assert float(row['student']) == pytest.approx(100 * (p.student.top1[mine] == c).mean(), abs=0.05)
        assert float(row['teacher']) == pytest.approx(100 * (p.teacher.top1[mine] == c).mean(), abs=0.05)
        assert int(row['validation images']) == mine.sum()
    assert [int(row['training images']) for row in rows] == [14, 14, 13]


# ----------------------------------------------------------------------------------------------------------- sentences

BASE = dict(
    run='RUN', name='run', train='TRAIN', train_none='NONE', report_baseline='B', compare='C', compare_kd='CK',
    compare_dkd='CD', twice_epochs=20, teacher_family='*resnet*', student_family='*resnet*', again='A',
    with_augmentation='WA', check_data='D', bench='BENCH', half_weight='--distill-loss-weight 0.5',
    gentler='--crop-padding 2', larger=64,
    better_teacher='BT', train_clean='CLEAN', distill='rld', epochs=10, chance=10.0, teacher_low=80.0, median_count=100,
    student_top1=90.0, teacher_top1=92.0, best_epoch=7, suspects_file='S', images=1000, no_aug=False, behind=2.0,
)  # fmt: skip
OF_ANSWERS = dict(suspects=2, suspects_share=0.2, wrong=100, only_teacher=30, only_student=10, neither=60)
OF_LABELS = dict(teacher_best_temperature=1.0, temperature=4.0, options_with_temperature='temperature=6',
                 new_temperature=6.0, student_ece=2.0, student_bias=1.0, smoothing=0.1)  # fmt: skip
DAMAGE = dict(most_criterion='kd', most_loss=80.0, most_attack='pcfdla', most_fraction=1.0, least_criterion='rld',
              least_loss=1.0, least_attack='zero', least_fraction=1.0)  # fmt: skip
GAIN = dict(gain=1.0, gain_low=0.2, gain_high=1.8)
CASES = {
    ('verdict', 'teacher at chance'): dict(teacher_low=8.0),
    ('verdict', 'poisoned'): dict(poison='fdla on 30 % of the training images (431)'),
    ('verdict', 'few images'): dict(images=20),
    ('curves', 'few epochs'): dict(epochs=2),
    ('classes', 'few images'): dict(median_count=2),
    ('calibration', 'few images'): dict(images=20),
    ('calibration', 'teacher says nothing'): dict(teacher_best_temperature=100.0),
    ('verdict', 'gain'): GAIN,
    ('verdict', 'loss'): dict(gain=-1.0, gain_low=-1.8, gain_high=-0.2),
    ('verdict', 'chance'): dict(gain=0.3, gain_low=-0.2, gain_high=0.8),
    ('verdict', 'ahead'): dict(ahead=2.0, ahead_low=0.5, ahead_high=3.5, behind_low=-3.5, behind_high=-0.5),
    ('verdict', 'as good'): dict(behind_low=-0.5, behind_high=4.5, ahead=-2.0, ahead_low=-4.5, ahead_high=0.5),
    ('verdict', 'behind'): dict(behind_low=0.5, behind_high=3.5),
    ('verdict', 'unmeasured'): {},
    ('verdict', 'alone'): dict(train_none=None),
    ('answers', 'labels'): {**OF_ANSWERS, 'suspects': 16},
    ('answers', 'teacher knows more'): {**OF_ANSWERS, 'only_teacher': 80},
    ('answers', 'student corrects'): {**OF_ANSWERS, 'only_student': 20},
    ('answers', 'alike'): OF_ANSWERS,
    ('answers', 'alone'): dict(wrong=100),
    ('curves', 'past its best'): dict(best_lead=1.5, top1_rise=0.0),
    ('curves', 'rising'): dict(best_lead=0.0, top1_rise=1.0),
    ('curves', 'gap'): dict(best_lead=0.0, top1_rise=0.5, loss_gap=0.4),
    ('curves', 'capacity'): dict(top1_rise=0.5, loss_gap=0.2, agreement=80.0, agreement_rise=0.1),
    ('curves', 'settled'): dict(top1_rise=0.5, loss_gap=0.2, agreement=90.0, agreement_rise=0.1),
    ('classes', 'rare'): dict(worst_class='x', worst_top1=50.0, worst_train=3, median_train=10, worst_train_share=0.3),
    ('classes', 'pair'): dict(pair_share=25.0, pair_true='x', pair_said='y'),
    ('classes', 'behind'): dict(pair_share=15.0, worst_gap=-12.0, worst_gap_class='x'),
    ('classes', 'even'): dict(pair_share=15.0, worst_gap=-9.0, worst_gap_class='x'),
    ('calibration', 'teacher too sure'): {**OF_LABELS, 'teacher_best_temperature': 1.6},
    ('calibration', 'teacher too doubtful'): {**OF_LABELS, 'teacher_best_temperature': 0.6},
    ('calibration', 'student too doubtful'): {**OF_LABELS, 'student_ece': 6.0, 'student_bias': -5.0},
    ('calibration', 'student off'): {**OF_LABELS, 'student_ece': 6.0},
    ('calibration', 'fine'): {**OF_LABELS, 'use': 'U'},
    ('calibration', 'fine, no folder'): OF_LABELS,
    ('generated', 'collapsed'): dict(another_generator='G', collapsed='The generator has collapsed.'),
    ('generated', 'far apart'): dict(collapsed='', generated_agreement=70.0, more_steps=100),
    ('generated', 'real images differ'): dict(another_generator='G', generated_agreement=95.0, ahead=-12.0),
    ('generated', 'fine'): dict(another_generator='G', generated_agreement=95.0, generated_classes=10, ahead=-2.0),
    ('images', 'normalisation'): dict(worst_mean=1.4, worst_std=1.0, data_mean='0.1', data_std='0.2'),
    ('images', 'too strong'): dict(worst_mean=0.4, worst_std=1.0, teacher_wrong_seen=60.0),
    ('images', 'plain'): dict(worst_mean=0.4, worst_std=1.0, no_aug=True),
    ('images', 'fine'): dict(worst_mean=0.4, worst_std=1.0, teacher_wrong_seen=40.0),
    ('time', 'data'): dict(share_data=25.0, share_teacher=30.0, share_student=40.0, can_cache=True),
    ('time', 'teacher'): dict(share_data=15.0, share_teacher=30.0, share_student=50.0, can_cache=True),
    ('time', 'student'): dict(share_data=15.0, share_teacher=30.0, share_student=50.0, can_cache=False),
    ('time', 'unknown'): {},
    ('settings', 'again'): {},
    ('comparison', 'one seed'): dict(seeds=1, more_seeds='M', push='P'),
    ('comparison', 'better'): dict(seeds=3, gain=1.0, gain_half=0.5, reference='rld', second='kd', push='P'),
    ('comparison', 'worse'): dict(seeds=3, gain=-1.0, gain_half=0.5, reference='rld', second='kd', push='P'),
    ('comparison', 'chance'): dict(seeds=3, gain=0.3, gain_half=0.5, reference='rld', second='kd', more_seeds='M'),
    ('comparison', 'incomplete'): dict(seeds=3, more_seeds='M'),
    ('attacks', 'damage'): dict(**DAMAGE, more_seeds='M'),
    ('attacks', 'harmless'): dict(**{**DAMAGE, 'most_loss': 0.5}, more_seeds='M'),
    ('attacks', 'no clean runs'): dict(more_seeds='M'),
}  # fmt: skip


def test_every_rule_has_a_planted_case():
    assert {(rule.block, rule.name) for rule in RULES} == set(CASES)
    assert {rule.block for rule in RULES} == {*BLOCKS, 'generated', 'comparison', 'attacks'}


@pytest.mark.parametrize('case', CASES, ids=' '.join)
def test_a_rule_speaks_where_its_condition_holds(case):
    found = finding(case[0], {**BASE, **CASES[case]})
    assert found.name == case[1] and found.sentence.endswith(('.', ')')) and found.command
    assert not re.search(r'[{}]|None|nan', found.sentence + found.command)


@pytest.mark.parametrize('rule', [r for r in RULES if r.threshold is not None], ids=lambda r: f'{r.block} {r.name}')
def test_a_threshold_is_where_the_sentence_changes(rule):
    facts = {**BASE, **CASES[rule.block, rule.name]}
    assert rule.when(facts, rule.threshold)
    assert not (rule.when(facts, 1e9) and rule.when(facts, -1e9))


def test_a_command_is_broken_between_flags_and_can_be_copied_whole(planted):
    (shown,) = re.findall(r'<pre class="command">(.*?)</pre>', block(page_of(planted), 'settings'))
    assert re.sub('<[^>]+>', '', shown) == (
        f'accelerate launch train_distill.py --config {planted}/args.yaml --experiment run-again'
    )


def test_the_commands_of_a_report_can_be_run(planted):
    (planted / 'teacher').mkdir()
    (planted / 'teacher' / 'config.json').write_text('{}')
    from timm_rld.report.run import Report, base_facts

    run = read_run(planted)
    facts = base_facts(Report(run, open_images(run), None, None, [], planted / 'report.html'))
    facts.update(options_with_temperature='temperature=6', new_temperature=6.0, data_mean='0.1 0.2 0.3',
                 data_std='0.1 0.2 0.3', more_steps=1000)  # fmt: skip
    checked = set()
    for rule in RULES:
        if rule.block in ('comparison', 'attacks'):
            continue
        words = shlex.split(rule.command.format(**facts))
        if words[:3] == ['accelerate', 'launch', 'train_distill.py']:
            config = parse_args(words[3:])
            if '--experiment' in words and rule.name not in ('plain', 'again'):
                assert config.experiment != 'run' and config.teacher == f'local-dir:{planted / "teacher"}', rule.name
        checked.add(words[0])
    assert {'accelerate', 'timm-rld', 'head'} <= checked


def facts_of(run: Path) -> dict:
    from timm_rld.report.run import Report, base_facts, time_spent

    report = Report(read_run(run), None, None, None, [], run / 'report.html')
    report.facts.update(base_facts(report))
    time_spent(report)
    return report.facts


def test_no_command_of_a_report_pushes(folder, tmp_path):
    run = plant_run(tmp_path / 'run', ['a', 'b', 'c'], None, data_dir=str(folder), push_to_hub=True,
                    hub_model_id='me/released')  # fmt: skip
    facts, trainings = facts_of(run), 0
    for command in filter(None, map(str, facts.values())):
        words = shlex.split(command) if command.startswith('accelerate launch') else []
        trainings += bool(words)
        assert not words or not parse_args(words[3:]).push_to_hub, command
        assert not command.startswith('timm-rld compare') or '--no-push-to-hub' in command
    assert trainings > 5


def test_the_look_at_the_data_is_at_those_of_the_run(tmp_path):
    settings = dict(dataset='hfds/a/b', data_dir=None, input_key='img', target_key='fine_label', drop_unlabeled=True,
                    val_fraction=0.1, seed=3, val_split=None, train_split='train')  # fmt: skip
    words = shlex.split(facts_of(plant_run(tmp_path / 'run', ['a', 'b'], None, **settings))['check_data'])
    assert words[:3] == ['timm-rld', 'data', 'hfds/a/b']
    for flags in ('--input-key img', '--target-key fine_label', '--drop-unlabeled', '--val-fraction 0.1', '--seed 3'):
        assert flags in ' '.join(words)
    assert {w for w in words if w.startswith('--')} <= set(map(flag_of, data_settings()))


@pytest.mark.parametrize(
    'settings',
    [
        {}, dict(feature_distill='at'), dict(distill='none', feature_distill='at'), dict(on_bad_image='skip'),
        dict(dataset='wds/x'), dict(teacher_answers='a.parquet', teacher=None), dict(mixup=0.2),
        dict(teacher_cache='c'),
    ],
    ids=str,
)  # fmt: skip
def test_a_cache_is_advised_where_it_would_spare_the_teacher(folder, tmp_path, settings):
    run = plant_run(tmp_path / 'run', ['a', 'b', 'c'], None, **{'data_dir': str(folder), **settings})
    assert facts_of(run)['can_cache'] == (settings == {})


def test_less_weight_is_that_of_what_the_run_distils_by(folder, tmp_path):
    for name, settings, flag in (
        ('logits', {'distill_loss_weight': 4.0}, '--distill-loss-weight 2'),
        ('features', {'distill': 'none', 'feature_distill': 'at', 'feature_loss_weight': 500.0},
         '--feature-loss-weight 250'),
    ):  # fmt: skip
        run = plant_run(tmp_path / name, ['a', 'b', 'c'], None, data_dir=str(folder), **settings)
        assert facts_of(run)['half_weight'] == flag


def test_another_generator_is_trained_where_the_runs_own_was(folder, tmp_path):
    generator = tmp_path / 'first'
    (generator / 'generator').mkdir(parents=True)
    (generator / 'args.yaml').write_text('distill: mekd\n')
    run = plant_run(tmp_path / 'run', ['a', 'b', 'c'], None, data_dir=str(folder), distill='mekd',
                    generator=str(generator / 'generator'))  # fmt: skip
    command = facts_of(run)['another_generator']
    assert f'--config {generator / "args.yaml"}' in command and '--no-push-to-hub' in command
    shutil.rmtree(generator)
    facts = facts_of(run)
    assert facts['another_generator'] == facts['another_seed']


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize('flags', [{}, {'mixup': 0.8}, {'batch_size': 64}, {'batch_size': 64, 'cutmix': 1.0}])
def test_the_mosaic_shows_the_very_pixels_of_epoch_1(planted, folder, tmp_path, flags):
    import torch

    from timm_rld.data import MixedTarget, Mixup, create_loaders

    run = read_run(plant_run(tmp_path / 'other', ['a', 'b', 'c'], None, data_dir=str(folder),
                             **{'batch_size': 8, 'seed': 7, **flags}))  # fmt: skip
    images = open_images(run)
    found = first_images(run, images, count=20)
    config = images.config
    train, val = open_splits(**config.arguments_of('open_splits'))
    data = json.loads((run.folder / 'student' / 'config.json').read_text())['pretrained_cfg']
    loader, _ = create_loaders(train, val, data, **{**config.arguments_of('create_loaders'), 'workers': 0})
    loader.set_epoch(1)
    mixup, seen = Mixup(**config.arguments_of('Mixup')), []
    for number, (pixels, target, _) in enumerate(loader):
        pixels, mixed = mixup(pixels, target, 1, number)
        other, lam = (mixed.b, mixed.lam) if isinstance(mixed, MixedTarget) else (target, 1.0)
        seen += [(p, *rest, lam) for p, *rest in zip(pixels, target.tolist(), other.tolist())]
    places = [next(i for i, s in enumerate(seen) if torch.equal(s[0], p)) for p in found.pixels]
    assert len(found.target) == 20 and places == sorted(set(places)) and max(places) <= 20
    assert [(y, z, lam) for _, y, z, lam in (seen[i] for i in places)] == list(
        zip(found.target, found.other, found.lam)
    )


def test_the_statistics_of_the_mosaic_are_those_of_its_pixels(planted):
    found = first_images(read_run(planted), open_images(read_run(planted)))
    mean, std = found.statistics()
    pixels = found.pixels.numpy() / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)))


def test_predictions_are_read_in_the_order_of_their_index(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = plant_predictions(np.arange(9) % 3, 3, [f'{i}.png' for i in range(9)], {'student': 0.5})
    table = pa.table(columns)
    pq.write_table(table.take(np.random.default_rng(0).permutation(9)), tmp_path / 'p.parquet')
    found = figures.read_predictions(tmp_path / 'p.parquet')
    assert found.index.tolist() == list(range(9)) and found.file[4] == '4.png' and found.teacher is None
    assert found.student.loss.tolist() == columns['student_loss'].tolist()


def test_the_mosaic_shows_what_a_cached_teacher_said(planted, folder, tmp_path):
    import torch

    from timm_rld.cache import DTYPES, Rows

    cache = tmp_path / 'cache'
    cache.mkdir()
    run = plant_run(tmp_path / 'cached', ['a', 'b', 'c'], None, data_dir=str(folder), batch_size=8,
                    teacher_cache=str(cache))  # fmt: skip
    rows = Rows.create(cache / 'epoch-0001.safetensors', 41, 3, DTYPES['float16'])
    rows.write(np.arange(41), torch.tensor([[0.0, 1.0, 0.5]]).repeat(41, 1).half())
    found = first_images(read_run(run), open_images(read_run(run)))
    assert found.teacher == [1] * len(found.target)
    assert 'class="by teacher">pear<' in block(page_of(run), 'images')


def test_a_report_without_the_data_stands_without_pictures_and_says_so(planted, folder, tmp_path, capsys):
    moved = tmp_path / 'moved'
    shutil.copytree(folder, moved)
    settings = (planted / 'args.yaml').read_text().replace(str(folder), str(tmp_path / 'gone'))
    (planted / 'args.yaml').write_text(settings)
    html = page_of(planted)
    assert 'No pictures: --data-dir' in html and PICTURE not in html
    for key in BLOCKS:
        assert block(html, key)
    assert '--data-dir DIR' in block(html, 'images') and 'report-suspects.csv' in html
    assert page_of(planted, data_dir=str(moved)).count(PICTURE) > 40


def test_pictures_of_other_data_are_not_shown(planted, folder, tmp_path):
    facts = json.loads((planted / 'facts.json').read_text())
    (planted / 'facts.json').write_text(json.dumps({**facts, 'files and labels (a digest)': '123 456'}))
    assert 'other files or labels' in page_of(planted)


def test_an_image_that_cannot_be_read_is_left_out_alone(planted, folder, tmp_path):
    broken = tmp_path / 'broken'
    shutil.copytree(folder, broken)
    for path in sorted((broken / 'validation').rglob('*.png'))[:5]:
        path.write_bytes(b'no image')
    html = page_of(planted, data_dir=str(broken))
    assert 'class="nothing"' in html and html.count(PICTURE) > 30


# ------------------------------------------------------------------------------------------------------ odd input, runs


def test_a_run_without_predictions_has_the_other_blocks_and_says_how_to_get_them(planted):
    (planted / 'predictions.parquet').unlink()
    results = json.loads((planted / 'results.json').read_text())
    (planted / 'results.json').write_text(json.dumps({k: v for k, v in results.items() if k != 'models'}))
    html = page_of(planted)
    for key in ('answers', 'classes', 'calibration'):
        shown = re.sub('<[^>]+>', '', block(html, key))
        assert f'timm-rld evaluate {planted} --teacher cifar_resnet20 --output {planted}' in shown
    for key in ('verdict', 'curves', 'images', 'time', 'settings'):
        assert '<aside class="meaning' in block(html, key)


def test_a_run_without_a_teacher_has_every_block(folder, tmp_path):
    target, files = labels(folder)
    columns = plant_predictions(target, 3, files, {'student': 0.6})
    run = plant_run(tmp_path / 'run', ['apple', 'pear', 'plum'], columns, data_dir=str(folder), teacher=None,
                    distill='none', models=False)  # fmt: skip
    html = page_of(run)
    assert all(block(html, key) for key in BLOCKS) and 'has no teacher' in html


def test_a_baseline_is_held_against_the_run_on_the_same_images(planted, folder, tmp_path):
    target, files = labels(folder)
    target, files = np.tile(target, 20), files * 20
    names = ['apple', 'pear', 'plum']
    runs = {}
    for name, share in (('good', 0.9), ('bad', 0.4), ('same', 0.9)):
        columns = plant_predictions(target, 3, files, {'student': share}, seed=name == 'same')
        runs[name] = plant_run(tmp_path / name, names, columns, data_dir=str(folder), distill='none')
    a, b = (figures.read_predictions(runs[k] / 'predictions.parquet').student.right for k in ('good', 'bad'))
    html = block(page_of(runs['good'], baseline=runs['bad']), 'verdict')
    assert 'gained' in html and f'{100 * (a.mean() - b.mean()):+.2f}' in html
    assert 'cost' in block(page_of(runs['bad'], baseline=runs['good']), 'verdict')
    assert 'may be chance' in block(page_of(runs['good'], baseline=runs['same']), 'verdict')


def plant_comparison(root: Path, top1: dict[str, list[float]]) -> Path:
    """A comparison of criteria: top-1 of each seed."""
    from timm_rld.compare import summarize

    rows = [
        dict(criterion=name, seed=seed, top1=value, top1_best=value, macro=57.12, teacher_top1=80.0, agreement=70.0,
             images_per_second=100.0, run=f'{name}-seed{seed}')
        for name, values in top1.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    seeds = list(range(max(map(len, top1.values()))))
    failed = [dict(criterion='kd', seed=9, reason='<script>', run='x')]
    found = dict(teacher='a', student='<b>', epochs=3, flags='--epochs 3', seeds=seeds, versions={}, runs=rows,
                 failed=failed, criteria=summarize(rows))  # fmt: skip
    root.mkdir()
    (root / 'compare.json').write_text(json.dumps(found))
    return root


def test_a_comparison_has_its_table_its_seeds_and_its_differences(tmp_path):
    root = plant_comparison(
        tmp_path / 'c', {'none': [60.0, 61.0, 60.5], 'rld': [63.0, 64.2, 63.4], 'kd': [62.0, 63.0, 62.6]}
    )
    html = page_of(root)
    Elements(html)
    assert 'macro accuracy' in html and '57.12' in html
    assert 'better than kd' in block(html, 'results') and '+3.03' in html and html.count('<svg') == 2
    assert '<script>' not in html.replace("<script>'use strict'", '') and '&lt;b&gt;' in html
    assert '+1.00, +1.20, +0.80' in block(html, 'differences')


@pytest.mark.parametrize(
    ('top1', 'says'),
    [({'none': [60.0], 'rld': [63.0]}, 'one seed'), ({'none': [60.0, 63.0], 'rld': [63.0, 61.0]}, 'may be chance'),
     ({'none': [70.0, 70.1], 'rld': [63.0, 63.0]}, 'worse here'), ({'rld': []}, 'Too few runs'), ({}, 'Too few runs')],
)  # fmt: skip
def test_a_comparison_of_few_runs_says_what_it_cannot_say(tmp_path, top1, says):
    root = plant_comparison(tmp_path / 'c', top1 or {'kd': []})
    if not top1:
        found = json.loads((root / 'compare.json').read_text())
        (root / 'compare.json').write_text(json.dumps({**found, 'seeds': [0, 1]}))
    html = page_of(root)
    assert says.lower() in html.lower() or 'one seed' in html.lower()


def test_the_run_of_a_comparison_is_held_against_its_none(planted, folder, tmp_path):
    root = plant_comparison(tmp_path / 'c', {'none': [60.0, 60.0], 'rld': [63.0, 63.0]})
    target, files = labels(folder)
    for name, share in (('none-seed1', 0.5), ('rld-seed1', 0.8)):
        columns = plant_predictions(target, 3, files, {'student': share})
        distill = name.partition('-')[0]
        plant_run(root / name, ['apple', 'pear', 'plum'], columns, data_dir=str(folder), distill=distill)
    assert 'student − without distillation' in page_of(root / 'rld-seed1')
    assert 'student − without distillation' not in page_of(root / 'none-seed1')
    (root / 'none-seed1' / 'results.json').unlink()  # nobody has named it
    assert 'student − without distillation' not in page_of(root / 'rld-seed1')


def test_a_final_run_of_a_search_is_held_against_its_none_and_the_search_names_its_runs(folder, tmp_path, capsys):
    target, files = labels(folder)
    for name, distill in (('none-seed1', 'none'), ('winner-seed1', 'kd')):
        columns = plant_predictions(target, 3, files, {'student': 0.7})
        plant_run(tmp_path / 'final' / name, ['apple', 'pear', 'plum'], columns, data_dir=str(folder), distill=distill)
    for name in ('search.json', 'tune.json'):
        (tmp_path / name).write_text('{}')
    assert 'student − without distillation' in page_of(tmp_path / 'final' / 'winner-seed1')
    assert 'student − without distillation' not in page_of(tmp_path / 'final' / 'none-seed1')
    assert main(['report', str(tmp_path)]) == 1
    assert 'is a search, whose tables are in tune.md' in capsys.readouterr().err


def test_the_best_epochs_lead_is_that_of_the_epoch_that_was_chosen(planted):
    results = json.loads((planted / 'results.json').read_text())
    (planted / 'results.json').write_text(json.dumps({**results, 'best_epoch': 3}))  # by the loss, say
    assert 'points better than the last one' not in block(page_of(planted), 'curves')


def test_a_command_that_trains_again_has_a_folder_and_a_teacher_cache_of_its_own(folder, tmp_path):
    run = plant_run(tmp_path / 'run', list('abc'), None, data_dir=str(folder), teacher_cache=str(tmp_path / 'cache'))
    html = page_of(run)
    for key, name in (('verdict', 'run-none'), ('settings', 'run-again')):
        command = re.sub('<[^>]+>', '', re.findall(r'<pre class="command">(.*?)</pre>', block(html, key))[-1])
        config = parse_args(shlex.split(command)[3:])
        assert (config.experiment, config.teacher_cache) == (name, str(tmp_path / f'cache-{name}'))


def test_what_is_offered_after_a_run_without_a_teacher_needs_none(folder, tmp_path):
    from timm_rld.report.run import Report, base_facts

    run = read_run(plant_run(tmp_path / 'run', ['a', 'b', 'c'], None, data_dir=str(folder), teacher=None,
                             distill='none', models=False))  # fmt: skip
    command = base_facts(Report(run, open_images(run), None, None, [], tmp_path / 'elsewhere' / 'page.html'))
    config = parse_args(shlex.split(command['compare'])[3:])
    assert (config.teacher, config.distill, config.seed, config.experiment) == (None, 'none', 43, 'run-seed43')
    assert command['suspects_file'] == str(tmp_path / 'elsewhere' / 'page-suspects.csv')
    assert command['use'] == f'timm-rld predict {run.folder} {folder}'


@pytest.mark.parametrize(
    ('argv', 'says'),
    [
        (['EMPTY'], 'not the folder of a finished run'),
        (['NOWHERE'], 'no such folder'),
        (['RUN', '--baseline', 'EMPTY'], 'not the folder of a finished run'),
        (['RUN', '--baseline', 'OTHER'], 'has 5 classes'),
        (['RUN', '--output', 'EMPTY'], 'is a folder'),
        (['RUN', '--baseline', 'SAME'], 'was trained with --distill rld; name a run with --distill none'),
        (['RUN', '--baseline', 'ELSEWHERE'], 'was evaluated on other images'),
        (['RUN', '--output', 'NOWHERE/x.html'], 'cannot be written'),
        (['DAMAGED'], 'not a file of predictions'),
        (['COMPARISON', '--baseline', 'RUN'], 'is a comparison'),
    ],
)
def test_what_cannot_be_reported_is_said_in_a_line_and_nothing_is_left(planted, tmp_path, capsys, argv, says):
    (tmp_path / 'EMPTY').mkdir()
    plant_run(tmp_path / 'OTHER', list('abcde'), None, distill='none')
    shutil.copytree(planted, tmp_path / 'DAMAGED')
    (tmp_path / 'DAMAGED' / 'predictions.parquet').write_bytes(b'x')
    shutil.copytree(planted, tmp_path / 'SAME')
    columns = plant_predictions(np.arange(20) % 2, 3, [''] * 20, {'student': 0.6})
    plant_run(tmp_path / 'ELSEWHERE', list('abc'), columns, distill='none')
    plant_comparison(tmp_path / 'COMPARISON', {'none': [1.0], 'rld': [2.0]})
    planted.rename(tmp_path / 'RUN')
    before = sorted(str(p) for p in tmp_path.rglob('*'))
    assert main(['report', *(a if a.startswith('--') else str(tmp_path / a) for a in argv)]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count('\n') <= 2 and 'Traceback' not in error
    assert sorted(str(p) for p in tmp_path.rglob('*')) == before


@pytest.mark.parametrize('package', ['jinja2', 'matplotlib'])
def test_a_missing_package_is_named_with_the_command_that_installs_it(planted, monkeypatch, capsys, package):
    from timm_rld.report import page

    monkeypatch.setitem(sys.modules, package, None)
    page._environment.cache_clear()
    assert main(['report', str(planted)]) == 1
    page._environment.cache_clear()
    assert f"needs the package {package}; pip install 'timm-rld[report]'" in capsys.readouterr().err


def test_a_plot_takes_its_colours_from_the_page_and_shows_any_name():
    name = '<b>$x_1$ "quoted" 犬'
    svg = str(plots.matrix('t', np.array([[3, 1], [0, 2]]), [name, 'b']))
    assert 'var(--student)' in svg and 'var(--teacher)' in svg and '&lt;b&gt;$x_1$' in svg and '犬' in svg
    assert not re.findall(r'#0101\d\d', svg) and 'http' not in svg and '<b>' not in svg
