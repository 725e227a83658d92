"""timm-rld tune: what it tries, what it costs, what it never reads, and what it says in the end."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

import train_distill
from timm_rld.__main__ import main
from timm_rld.config import Config, load_yaml, parse_args, resolve, to_yaml
from timm_rld.data import open_splits
from timm_rld.errors import Stopped, UsageError, UserError
from timm_rld.loss import CRITERIA, choose_criterion, get_criterion, published_defaults
from timm_rld.runs import wait_until_free
from timm_rld.tune import markdown, tune
from timm_rld.tune.candidates import SHARED, Candidate, choose, defaults, knobs_of, learning_rate, sample, shorter
from timm_rld.tune.plan import Clock, Rung, parse_budget, plan
from timm_rld.tune.report import summarize

pytestmark = pytest.mark.usefixtures('forked_python')
WHOLE = Config(teacher='resnet34', student='resnet18', data_dir='.', epochs=100)


# ----------------------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize('name', [name for name, row in CRITERIA.items() if row.cls])
def test_each_knob_of_the_table_is_one_that_the_trainer_accepts_over_its_whole_range(name):
    row = CRITERIA[name]
    assert any('weight' in k.name or k.name in ('alpha', 'beta', 'lambda1', 'w1') for k in row.knobs), (
        'a weight at least'
    )
    for standardize in (False, *([] if row.not_standardized else [True])):
        base = get_criterion(name, standardize)
        published = {**base.defaults(240), **base.options}
        for knob in row.knobs:
            ends = knob.choices or [published[knob.name] * factor for factor in knob.factors]
            assert ends, 'a range or choices'
            if knob.factors:
                assert knob.factors[0] <= 1 <= knob.factors[1] and published[knob.name] > 0, (
                    'around the published value'
                )
            for value in ends:
                values = {'standardize': standardize, knob.name: value}
                config = resolve(parse_args(Candidate(name, tuple(values.items()), 'sampled').flags(10)))
                choose_criterion(config.distill, config.standardize, config.distill_kwargs)
                assert config.distill == name


@pytest.mark.parametrize('name', [name for name, row in CRITERIA.items() if row.cls])
def test_the_docs_list_each_knob_with_its_range(name):
    page = (Path(__file__).parent.parent / 'docs' / 'tune.md').read_text(encoding='utf-8')
    (line,) = (x for x in page.splitlines() if x.startswith(f'| `{name}` |'))
    row = CRITERIA[name]
    published = {**row.defaults(240), **row.options}
    shown = []
    for knob in row.knobs:
        text = f'`{knob.name}`'
        if knob.factors:
            text += ' {:g} to {:g}'.format(*(published[knob.name] * factor for factor in knob.factors))
        elif knob.name == 'distill_warmup_epochs':
            text += ' ' + ' or '.join(str(Fraction(c).limit_denominator(99)) for c in knob.choices) + ' of the run'
        elif knob.name != 'standardize':
            text += ' ' + ' or '.join(f'{c:g}' for c in knob.choices)
        shown.append(text)
    assert line == f'| `{name}` | {", ".join(shown)} |'


def test_none_and_each_published_setting_are_always_tried_and_sampling_repeats_itself():
    always = defaults(['rld', 'kd', 'dkd'], WHOLE)
    chosen = choose(always, 16, 42, [], WHOLE)
    texts = [c.text(100) for c in chosen]
    assert texts[:4] == ['none', 'rld', 'kd', 'dkd'] and len(set(texts)) == 16
    assert 'rld:beta=0.5,temperature=1,distill_warmup_epochs=0' in texts, 'as published for ImageNet'
    assert {c.criterion for c in chosen if c.origin == 'sampled'} == {'rld', 'kd', 'dkd'}
    assert chosen == choose(always, 16, 42, [], WHOLE) != choose(always, 16, 43, [], WHOLE)


def test_a_sample_has_one_candidate_in_each_part_of_a_range():
    (rld,) = defaults(['rld'], WHOLE)[1:]
    betas = sorted(dict(c.values)['beta'] for c in sample(rld, 5, 0, [], WHOLE))
    edges = [8 / 16 * 32 ** (i / 5) for i in range(6)]
    assert all(low * 0.9 < beta < high * 1.1 for beta, low, high in zip(betas, edges, edges[1:]))


def test_standardised_candidates_are_searched_around_the_values_for_standardised_logits():
    (kd,) = defaults(['kd'], WHOLE)[1:]
    for candidate in sample(kd, 40, 0, [], WHOLE):
        values = dict(candidate.values)
        centre = (2, 8.1) if values.get('standardize') else (4, 0.9)
        assert 0.24 * centre[0] < values['temperature'] < 2.1 * centre[0]
        assert 0.09 * centre[1] < values['distill_loss_weight'] < 3.1 * centre[1]


def test_what_follows_a_colon_stays_fixed_and_a_ramp_keeps_its_share_of_shorter_runs():
    default = defaults(['rld:beta=2,distill_warmup_epochs=20'], WHOLE)[1]
    assert 'beta' not in [k.name for k in knobs_of(default, [])]
    for candidate in sample(default, 6, 0, [], WHOLE):
        assert dict(candidate.values)['beta'] == 2 and candidate.settings(10)['distill_warmup_epochs'] == 2
    assert default.text(100) == 'rld:beta=2,distill_warmup_epochs=20'


def test_what_a_file_of_settings_says_of_a_criterion_is_its_default_and_not_that_of_others():
    config = Config(teacher='a', student='b', data_dir='.', epochs=100, distill='rld', distill_warmup_epochs=1,
                    distill_kwargs={'beta': 0.5, 'temperature': 1})  # fmt: skip
    texts = [c.text(100) for c in defaults(['rld', 'kd'], config)]
    assert texts == ['none', 'rld:beta=0.5,temperature=1,distill_warmup_epochs=1', 'kd']


def test_what_a_run_derived_in_its_args_yaml_is_searched_as_if_it_were_not_there(tmp_path):
    run = resolve(WHOLE.changed(distill='rld'), published=published_defaults)
    (tmp_path / 'args.yaml').write_text(to_yaml(run))
    again = parse_args(['--config', str(tmp_path / 'args.yaml')])
    assert again.distill_loss_weight == 1 and again.origin.derived
    assert [c.text(100) for c in defaults(['rld', 'kd'], again)] == ['none', 'rld', 'kd']
    assert choose(defaults(['rld'], again), 9, 42, ['lr'], again) == choose(
        defaults(['rld'], WHOLE), 9, 42, ['lr'], WHOLE
    )


def test_options_of_a_generator_after_the_colon_are_kept():
    text = 'mekd:generator_epochs=7,generator_kwargs=[info_weight=0.1,batch_size=16]'
    found = defaults([text], WHOLE)[1]
    given = parse_args(found.flags(100))
    assert (given.generator_epochs, given.generator_kwargs) == (7, {'info_weight': 0.1, 'batch_size': 16})


def test_the_learning_rate_is_searched_on_request_for_none_too():
    config = resolve(WHOLE)
    assert learning_rate(WHOLE) == ('lr_base', config.lr_base)
    given = Config(teacher='a', student='b', data_dir='.', epochs=100, lr=0.2)
    assert learning_rate(given) == ('lr', 0.2)
    chosen = choose(defaults(['kd'], given), 10, 42, list(SHARED), given)
    rates = [dict(c.values)['lr'] for c in chosen if c.criterion == 'none' and c.values]
    assert len(rates) >= 3 and all(0.05 <= rate <= 0.8 for rate in rates)
    assert parse_args(chosen[-1].flags(100)).lr == dict(chosen[-1].values)['lr']


def test_a_shorter_run_shortens_what_counts_epochs():
    config = parse_args(['--epochs', '100', '--warmup-epochs', '10', '--cooldown-epochs', '4', '--teacher-cache', 'x',
                         '--teacher-cache-views', '20', '--mixup-off-epoch', '80', '--data-dir', '.'])  # fmt: skip
    short = resolve(parse_args(['--teacher', 'a', '--student', 'b', '--teacher-cache', 'x', *shorter(config, 12)]))
    assert (short.epochs, short.warmup_epochs, short.cooldown_epochs, short.mixup_off_epoch) == (12, 1, 0, 10)
    assert short.teacher_cache_views == 12 and short.decay_milestones == (11, 22, 32)
    early = parse_args(['--epochs', '100', '--mixup-off-epoch', '4', '--data-dir', '.'])
    assert parse_args(shorter(early, 12)).mixup_off_epoch == 1, '0 would be never'
    pair = ['--teacher', 'a', '--student', 'b']
    whole = resolve(parse_args(pair))
    ramps = [resolve(parse_args([*pair, *shorter(whole, n)])).distill_warmup_epochs for n in (1, 3, 6, 11)]
    assert whole.distill_warmup_epochs == 3 and ramps == [1, 1, 2, 3], "the sample's ramp"


# ----------------------------------------------------------------------------------------------------------- the budget


@pytest.mark.parametrize(
    ('budget', 'epochs', 'rungs'),
    [
        (6, 300, [(38, 15), (75, 8), (150, 4)]),
        (6, 20, [(2, 20), (5, 8), (10, 4)]),
        (6, 4, [(1, 12), (2, 6)]),
        (6, 2, [(1, 6), (2, 3)]),
        (2, 100, [(25, 4), (50, 2)]),
    ],
)
def test_each_rung_costs_the_same_and_all_no_more_than_the_budget(budget, epochs, rungs):
    found = plan(budget, epochs, least=4)
    assert found == [Rung(*r) for r in rungs]
    assert sum(r.epochs * r.candidates for r in found) <= budget * epochs


def test_a_budget_too_small_for_two_rungs_names_the_smallest_that_works():
    with pytest.raises(UsageError, match=r'--budget 1x: too small for two rungs, .*; the smallest that works is 2x'):
        plan(1, 100, 4)
    plan(2, 100, 4)
    with pytest.raises(UsageError, match='--epochs 1: has no shorter schedule'):
        plan(6, 1, 4)
    for text in ('6', 'x', '0x', '-1x', 'nanx', 'infx'):
        with pytest.raises(UsageError, match='expected a number of whole runs, e.g. 6x'):
            parse_budget(text)


def test_the_estimate_of_a_run_adds_start_epochs_and_the_teacher_where_it_is_asked(tmp_path):
    clock = Clock()
    for name, teacher in (('online', 3.0), ('cached', 0.5)):
        (tmp_path / name).mkdir()
        rows = [f'{e},1.0,{teacher},2.0,0' for e in (1, 2)]
        head = 'epoch,seconds_data,seconds_teacher,seconds_student,seconds_other'
        (tmp_path / name / 'summary.csv').write_text('\n'.join([head, *rows]))
        clock.add(tmp_path / name, 2 * (3 + teacher) + 10)
    assert clock.seconds(4, asks=False) == pytest.approx(10 + 4 * 3)
    assert clock.seconds(4, asks=True, scale=2) == pytest.approx(10 + 4 * 2 * 6)


# ------------------------------------------------------------------------------------------- the share that is held out


def open_folder(root: Path, **kwargs):
    settings = Config(data_dir=str(root), train_split='train', val_split='validation', tune_holdout=0.1)
    return open_splits(
        **{**settings.arguments_of('open_splits'), 'batch_size': 8, 'validation_batch_size': 8, **kwargs}
    )


def test_the_share_is_of_each_class_and_is_left_out_of_training_but_for_the_teacher(folder, tmp_path):
    shutil.copytree(folder / 'train', tmp_path / 'train')  # there is no validation split to open
    kept, held = open_folder(tmp_path)
    keys = [{s.key(i) for i in range(len(s))} for s in (kept, held)]
    assert len(kept) + len(held) == 41 and not keys[0] & keys[1] and sorted(set(held.targets)) == [0, 1, 2]
    whole, same = open_folder(tmp_path, train_on_holdout=True)
    assert len(whole) == 41 and same.digest() == held.digest()


def test_the_share_is_of_what_val_fraction_leaves_whatever_the_seed(folder, tmp_path):
    shutil.copytree(folder / 'train', tmp_path / 'train')
    _, validation = open_folder(tmp_path, tune_holdout=None, val_fraction=0.1, val_seed=7, seed=0, val_split=None)
    parts = open_folder(tmp_path, val_fraction=0.1, val_seed=7, seed=42, val_split=None)
    whole, _ = open_folder(tmp_path, val_fraction=0.1, val_seed=7, seed=42, val_split=None, train_on_holdout=True)
    seen = {source.key(i) for source in (*parts, whole) for i in range(len(source))}
    assert len(seen) + len(validation) == 41 and not seen & set(validation.keys())


def test_a_class_too_small_to_hold_out_from_is_named_with_what_would_do(folder, tmp_path):
    shutil.copytree(folder / 'train', tmp_path / 'train')
    for path in sorted((tmp_path / 'train' / 'pear').iterdir())[9:]:
        path.unlink()
    with pytest.raises(UserError, match=r"--tune-holdout 0.1: class 'pear' has 9 training image.*at least 10 in each"):
        open_folder(tmp_path)


# -------------------------------------------------------------------------------------------------- a search, simulated


class Trainer:
    """In the place of a training: writes its results, and counts."""

    def __init__(self, top1=lambda config: 50.0, stop_at: int = 0) -> None:
        self.top1, self.stop_at, self.started = top1, stop_at, []

    def __call__(self, command: list[str], folder: Path, title: str, log) -> dict:
        done = folder / 'results.json'
        if done.exists():
            log(f'{title}: already there')
            return json.loads(done.read_text())
        self.started.append(str(folder))
        if len(self.started) == self.stop_at:
            raise Stopped('stopped by SIGTERM; the same command continues', 143)
        config = parse_args(command[command.index('train_distill') + 1 :])
        resolve(config)
        folder.mkdir(parents=True)
        if (top1 := self.top1(config)) is None:
            raise UserError(f'{title} failed with code 1: the loss is nan')
        results = dict(student_top1=top1, teacher_top1=90.0, versions={'timm': '1'})
        done.write_text(json.dumps(results))
        log(f'{title}: top-1 {top1:.2f} (0:01)')
        return results


def better_with_a_low_temperature(config: Config) -> float:
    gain = {'none': 0.0, 'kd': 10 - config.distill_kwargs.get('temperature', 4.0)}[config.distill]
    return 50 + gain + config.epochs / 10 + 0.01 * config.seed


@pytest.fixture
def search(folder, tmp_path, monkeypatch):
    """Returns a function that searches with a :class:`Trainer`; the data have no validation split."""
    shutil.copytree(folder / 'train', tmp_path / 'data' / 'train')

    def run(trainer: Trainer, *flags: str, criteria=('kd',), seeds=(0, 1, 2), **kwargs) -> tuple[dict, list[str]]:
        said: list[str] = []
        monkeypatch.setattr('timm_rld.tune.search.run_training', trainer)
        common = ['--teacher', 'test_resnet', '--student', 'test_resnet', '--data-dir', str(tmp_path / 'data'),
                  '--epochs', '8', *flags]  # fmt: skip
        return tune(criteria, seeds, common, tmp_path / 'out', log=said.append, **kwargs), said

    run.output = tmp_path / 'out'
    return run


def test_the_best_candidate_wins_and_is_run_again_with_fresh_seeds_beside_default_and_none(search):
    trainer = Trainer(better_with_a_low_temperature)
    found, said = search(trainer)
    winner = found['texts']['winner']
    assert winner.startswith('kd:') and found['rungs'][-1]['rows'][0]['candidate'] == winner
    assert {(r['role'], r['seed']) for r in found['runs']} == {
        (role, seed) for role in ('none', 'default', 'winner') for seed in (0, 1, 2)
    }
    assert found['seed'] not in (0, 1, 2)
    assert [len(t['rows']) for t in found['rungs']] == [16, 8, 4]
    assert all('none' in [r['criterion'] for r in t['rows']] for t in found['rungs']), 'none is in each rung'
    over = {(d['of'], d['over']): d for d in found['differences']}
    assert over['default', 'none']['mean'] == pytest.approx(6) and over['default', 'none']['interval'] is not None
    assert found['verdict'].startswith('Tuning was worth it: the winner is +')
    best = load_yaml(str(search.output / 'best.yaml'))
    assert best['distill'] == 'kd' and best['distill_kwargs']['temperature'] < 2 and best['epochs'] == 8
    text = (search.output / 'tune.md').read_text()
    assert text == markdown(found) and text.count('\n| ') == 1 + 1 + 3 + 1 + 1 + 3 + 1 + 1 + 16
    assert any(line.startswith('rung 2 of 3: 8 candidates, 2 epoch(s) each') for line in said)


@pytest.mark.parametrize('stop_at', [1, 7, 21, 30, 34])
def test_interrupted_anywhere_the_same_call_goes_on_without_repeating_what_is_complete(search, stop_at):
    trainer = Trainer(better_with_a_low_temperature, stop_at)
    with pytest.raises(Stopped):
        search(trainer)
    found, _ = search(trainer)
    assert len(trainer.started) == len(set(trainer.started)) + 1 == 16 + 8 + 4 + 9 + 1
    table = (search.output / 'tune.md').read_bytes()
    shutil.rmtree(search.output)
    again, _ = search(Trainer(better_with_a_low_temperature))
    assert again == found and (search.output / 'tune.md').read_bytes() == table


def test_where_distilling_does_not_help_it_says_so(search):
    found, _ = search(Trainer(lambda c: 60.0 if c.distill == 'none' else 50.0))
    assert found['texts']['winner'] == 'none' and found['verdict'].startswith('Do not distil: ')
    assert load_yaml(str(search.output / 'best.yaml'))['distill'] == 'none'
    assert {r['role'] for r in found['runs']} == {'none', 'default'}, 'the same settings are not run twice'


def test_of_equal_candidates_the_published_one_wins(search):
    found, _ = search(Trainer(lambda c: 50.0 + (c.distill == 'kd')))
    assert found['texts']['winner'] == 'kd' and 'the default won the search' in found['verdict']


def test_a_candidate_that_diverges_loses_and_is_listed_with_its_reason(search):
    diverges = Trainer(lambda c: None if c.task_loss_weight == 0.5 else 50.0)
    found, said = search(diverges)
    (row,) = [r for r in found['rungs'][0]['rows'] if r['reason']]
    assert row['origin'] == 'ImageNet' and not row['promoted'] and row is found['rungs'][0]['rows'][-1]
    text = (search.output / 'tune.md').read_text()
    assert '| failed |' in text and f'- `{row["candidate"]}` (1 epochs): ' in text and 'the loss is nan' in text


def test_a_candidate_may_fail_in_a_later_rung_too(search):
    def top1(config: Config) -> float | None:
        first = config.distill == 'kd' and config.task_loss_weight == 0.5
        return None if first and config.epochs == 2 else 60.0 if first else 50.0

    found, _ = search(Trainer(top1))
    assert [r['origin'] for r in found['rungs'][1]['rows'] if r['reason']] == ['ImageNet']
    assert len(found['rungs'][2]['rows']) == 4 and found['texts']['winner'] == 'none'


@pytest.mark.parametrize('fails', ['none', 'kd'])
def test_where_training_itself_fails_the_search_stops_and_the_same_call_repeats_it(search, fails):
    with pytest.raises(UserError, match='candidates failed.*the loss is nan'):
        search(Trainer(lambda c: None if c.distill == fails else 50.0))
    for folder in search.output.glob('rung-1/*'):
        if folder.is_dir() and not (folder / 'results.json').exists():
            folder.rmdir()
    assert len(search(Trainer())[0]['rungs']) == 3


def test_final_runs_that_fail_are_listed_and_repeated_by_the_same_call(search):
    found, _ = search(Trainer(lambda c: None if c.seed == 1 else better_with_a_low_temperature(c)))
    assert [f['seed'] for f in found['failed']] == [1, 1, 1]
    assert 'Failed, and so not in these figures: ' in (search.output / 'tune.md').read_text()
    for failed in found['failed']:
        (search.output / failed['run']).rmdir()
    trainer = Trainer(better_with_a_low_temperature)
    assert not search(trainer)[0]['failed'] and len(trainer.started) == 3


def test_candidates_share_a_seed_and_a_cache_which_mixup_cannot_have(search):
    commands: list[list[str]] = []

    class Recorder(Trainer):
        def __call__(self, command, folder, title, log):
            commands.append(command)
            return super().__call__(command, folder, title, log)

    search(Recorder())
    configs = [parse_args(c[c.index('train_distill') + 1 :]) for c in commands]
    candidates = [c for c in configs if c.tune_holdout]
    assert len(candidates) == 28 and len({(c.seed, c.teacher_cache) for c in candidates}) == 1
    assert {c.teacher_cache for c in configs if not c.tune_holdout} == {None}
    shutil.rmtree(search.output)
    commands.clear()
    _, said = search(Recorder(), '--mixup', '0.2')
    assert all('--teacher-cache' not in c for c in commands)
    assert any('are not cached (--mixup)' in line for line in said)


@pytest.mark.parametrize(
    ('flags', 'kwargs', 'message'),
    [
        (['--lr', '0.3'], {}, 'holds a search with --lr None, not 0.3'),
        ([], {'budget': '4x'}, 'holds a search with --budget 6x, not 4x'),
        ([], {'criteria': ['kd', 'rld']}, r"holds a search with --criteria \['kd'\], not \['kd', 'rld'\]"),
        ([], {'holdout': 0.2}, 'holds a search with --tune-holdout 0.1, not 0.2'),
    ],
)
def test_a_folder_of_another_search_is_refused_by_what_differs(search, flags, kwargs, message):
    with pytest.raises(Stopped):
        search(Trainer(stop_at=2))
    with pytest.raises(UserError, match=message):
        search(Trainer(), *flags, **kwargs)


def test_all_runs_hold_the_same_validation_images_out(search):
    configs: list[Config] = []
    search(Trainer(lambda c: configs.append(c) or 50.0), '--val-fraction', '0.1')
    assert {(c.val_fraction, c.val_seed) for c in configs} == {(0.1, 42)} and len({c.seed for c in configs}) == 4


def test_a_folder_of_a_comparison_is_refused(search):
    search.output.mkdir()
    (search.output / 'compare.json').write_text('{}')
    with pytest.raises(UserError, match='is not empty; name another folder'):
        search(Trainer())


PAIR = ['--teacher', 'test_resnet', '--student', 'test_resnet', '--epochs', '8']


@pytest.mark.parametrize(
    ('argv', 'code', 'message'),
    [
        (['--student', 'test_resnet'], 2, '--teacher and --student are needed'),
        ([*PAIR, '--budget', '0.5x'], 2, '--budget 0.5x: too small for two rungs'),
        ([*PAIR, '--epochs', '1'], 2, '--epochs 1: has no shorter schedule'),
        ([*PAIR, '--epochs', '0', '--teacher-epochs', '1'], 2, '--epochs 0: trains the teacher alone'),
        ([*PAIR, '--tune', 'lrr'], 2, "--tune lrr: unknown name (did you mean 'lr'?) (known: lr)"),
        ([*PAIR, '--tune', 'beta'], 2, '--tune beta: unknown name; those of the criteria are searched anyway'),
        ([*PAIR, '--criteria', 'kdd'], 2, "unknown criterion 'kdd'"),
        ([*PAIR, '--criteria', 'kd', 'kd:temperature=2'], 2, '--criteria: kd is there twice'),
        ([*PAIR, '--criteria', 'kd:beta=2'], 2, "criterion 'kd' has no option 'beta'"),
        ([*PAIR, '--distill-kwargs', 'beta=2'], 2, '--distill-kwargs: is searched; '),
        ([*PAIR, '--criteria', 'la', '--class-weights', 'auto'], 2, '--criteria la: --class-weights'),
        ([*PAIR, '--criteria', 'mekd', '--teacher-cache', 'x'], 2, '--criteria mekd: --teacher-cache'),
        ([*PAIR, '--criteria', 'kd', 'lr', '--black-box', 'soft'], 2, '--criteria lr: with --black-box soft'),
        ([*PAIR, '--seed', '3'], 2, '--seed: is chosen for each run'),
        ([*PAIR, '--tune-holdout', '0.7'], 2, '--tune-holdout: must be at most 0.5, got 0.7'),
        ([*PAIR, '--push-to-hub'], 2, '--push-to-hub: tune makes many students'),
        ([*PAIR, '--dataset', 'hfids/x', '--train-num-samples', '9'], 1, ''),
    ],
)
def test_wrong_usage_is_a_line_or_two_before_any_run(argv, code, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('timm_rld.tune.search.run_training', None)
    assert main(['tune', *argv, '--output', str(tmp_path / 'out')]) == code
    error = capsys.readouterr().err
    assert message in error and error.count('\n') <= 2 and 'Traceback' not in error
    assert not (tmp_path / 'out').exists()


def test_streamed_data_are_refused(folder, tmp_path):
    pytest.importorskip('webdataset')
    from timm_rld.data import Source
    from timm_rld.data.tune_holdout import hold_out_to_tune

    source = Source(None, 'train', 3, None, True, 'RGB')
    with pytest.raises(UserError, match=r"--tune-holdout 0.1: split 'train' is read as a stream"):
        hold_out_to_tune(source, 0.1, 0)


@pytest.mark.parametrize(
    ('winner', 'said'),
    [
        ([70, 71, 72], 'Tuning was worth it: the winner is +10.00 ± 0.00 points over the default.'),
        ([61, 60, 62], 'Whether tuning was worth it is not shown'),
        ([50, 51, 52], 'Tuning was not worth it: the winner is -10.00 ± 0.00 points over the default'),
    ],
)
def test_the_sentence_follows_from_the_interval(winner, said):
    texts = {'none': 'none', 'default': 'kd', 'winner': 'kd:temperature=2'}
    runs = [
        dict(role=role, seed=seed, top1=top1)
        for role, values in (('none', [55, 56, 57]), ('default', [60, 61, 62]), ('winner', winner))
        for seed, top1 in enumerate(values)
    ]
    found = summarize({'texts': texts, 'roles': {t: r for r, t in texts.items()}, 'runs': runs})
    assert found['verdict'].startswith(said)
    assert ('Do not distil: the winner is -5.00' in found['verdict']) == (winner[0] == 50)
    one = summarize({'texts': texts, 'roles': {t: r for r, t in texts.items()}, 'runs': runs[::3]})
    assert one['verdict'].startswith('One seed: ')


@pytest.mark.slow
def test_a_run_that_outlived_its_search_is_waited_for(tmp_path):
    code = ('import os, sys, time; from pathlib import Path; from timm_rld.files import lock; '
            'lock(Path(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(1)')  # fmt: skip
    run = subprocess.Popen([sys.executable, '-c', code, str(tmp_path / '.lock')], stdout=subprocess.PIPE, text=True)
    pid = int(run.stdout.readline())
    said: list[str] = []
    wait_until_free(tmp_path, 'a run', said.append, seconds=0.05)
    assert run.wait() == 0 and len(said) == 1
    assert said[0].startswith(f'a run: still running (process {pid} on ')


# --------------------------------------------------------------------------------------------------- a search, for real


def argv_of(data: Path, output: Path) -> list[str]:
    return [
        'tune', '--teacher', 'test_resnet', '--student', 'test_resnet', '--data-dir', str(data), '--img-size', '32',
        '--no-teacher-pretrained', '--teacher-epochs', '1', '--epochs', '2', '-b', '8', '--workers', '0',
        '--lr', '0.01', '--min-teacher-acc', '0', '--criteria', 'kd', '--budget', '4x', '--seeds', '0',
        '--output', str(output),
    ]  # fmt: skip


@pytest.mark.slow
def test_validation_images_are_not_read_before_the_last_stage_and_one_cache_serves_all(
    folder, tmp_path, monkeypatch, capsys
):
    data, stages = tmp_path / 'data', []
    shutil.copytree(folder / 'train', data / 'train')

    def run(command: list[str], where: Path, title: str, log) -> dict:
        """A training in this process; the validation split appears with the first final run."""
        if where.parent.name == 'final' and not (data / 'validation').exists():
            shutil.copytree(folder / 'validation', data / 'validation')
        argv = [*command[command.index('train_distill') + 1 :], '--output', str(where.parent)]
        stages.append(where.parent.name)
        assert train_distill.main([*argv, '--experiment', where.name]) == 0, title
        log(title)
        return json.loads((where / 'results.json').read_text())

    monkeypatch.setattr('timm_rld.tune.search.run_training', run)
    monkeypatch.setattr('timm_rld.runs.run_training', run)
    output = tmp_path / 'out'
    assert main(argv_of(data, output)) == 0
    assert stages[0] == 'out' and stages[1:7] == ['rung-1'] * 4 + ['rung-2'] * 2 and set(stages[7:]) == {'final'}
    said = capsys.readouterr().out
    assert said.count('the teacher is not loaded') == 2, 'of the two candidates of kd after the first in rung 1'
    assert sorted(p.name for p in (output / 'cache').glob('epoch-*')) == [f'epoch-000{n}.safetensors' for n in (1, 2)]
    assert 'top-1' in said and 'on train, the share held out' in said and not list(output.glob('rung-*/*/checkpoints'))
    best = load_yaml(str(output / 'best.yaml'))
    assert best['teacher'] == f'local-dir:{output / "teacher" / "teacher"}' and best['teacher_epochs'] == 0


# In the place of a training: holds the lock of its folder as one does, and takes a while.
STAND_IN = """
import fcntl, json, os, sys, time, zlib
given = sys.argv[3:]
folder = os.path.join(*(given[given.index(flag) + 1] for flag in ('--output', '--experiment')))
os.makedirs(folder, exist_ok=True)
lock = open(folder + '/.lock', 'a')
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
with open(folder + '/starts', 'a') as f:
    f.write('x')
time.sleep(0.5)
chosen = ' '.join(given[given.index('--distill') : given.index('--output')]) if '--distill' in given else ''
top1 = zlib.crc32(chosen.partition(' --teacher-cache ')[0].encode()) % 10000 / 100
with open(folder + '/part', 'w') as f:
    json.dump(dict(student_top1=top1, teacher_top1=90.0, versions={}), f)
os.rename(folder + '/part', folder + '/results.json')
"""


@pytest.mark.slow
def test_killed_twice_the_same_command_ends_with_the_same_table(folder, tmp_path):
    (tmp_path / 'stand_in.py').write_text(STAND_IN)

    def start(output: Path) -> subprocess.Popen:
        argv = [*argv_of(folder, output), '--launcher', f'{sys.executable} {tmp_path / "stand_in.py"}']
        log = (tmp_path / f'{output.name}.log').open('ab')
        return subprocess.Popen([sys.executable, '-m', 'timm_rld', *argv], stdout=log, stderr=log)

    assert start(tmp_path / 'whole').wait() == 0, (tmp_path / 'whole.log').read_text()
    killed = tmp_path / 'killed'
    for number, wait_for in ((signal.SIGKILL, 'rung-1/02-kd/starts'), (signal.SIGTERM, 'rung-2/01-none/starts')):
        process, deadline = start(killed), time.monotonic() + 120
        while not (killed / wait_for).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait() == (-9 if number == signal.SIGKILL else 143)
    assert start(killed).wait() == 0, (tmp_path / 'killed.log').read_text()
    tables = [(tmp_path / name / 'tune.md').read_text() for name in ('whole', 'killed')]
    assert tables[0] == tables[1]
    starts = {str(f.parent.relative_to(killed)): len(f.read_text()) for f in killed.rglob('starts')}
    assert len(starts) > 8 and {name for name, n in starts.items() if n > 1} <= {'rung-2/01-none'}
