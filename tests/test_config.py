"""Settings: YAML ⇄ Config ⇄ command line, strictly."""

from __future__ import annotations

import dataclasses
import inspect
import sys

import pytest
import yaml

from timm_rld.config import (
    FIELDS,
    Config,
    flag_of,
    load_yaml,
    marked,
    parse_args,
    resolve,
    setting,
    to_yaml,
    warmup_epochs,
)
from timm_rld.errors import UsageError

PAIR = ['--teacher', 'resnet34', '--student', 'resnet18']


def error(argv: list[str]) -> str:
    with pytest.raises(UsageError) as e:
        resolve(parse_args(argv))
    assert e.value.exit_code == 2
    return str(e.value)


def written(tmp_path, text: str) -> str:
    path = tmp_path / 'c.yaml'
    path.write_text(text, encoding='utf-8')
    return str(path)


def test_settings_survive_yaml_unchanged(tmp_path):
    config = resolve(
        parse_args([*PAIR, '--distill-kwargs', 'alpha=1', 'beta=0.5', '--mean', '.5', '.4', '.3', '--lr', '1e-3'])
    )
    again = Config(**load_yaml(written(tmp_path, to_yaml(config))))
    assert again == config
    assert resolve(again) == config


def test_the_command_line_wins_over_the_file(tmp_path):
    path = written(tmp_path, 'teacher: resnet34\nstudent: resnet18\nepochs: 7\nlr: 1e-3\ndecay_milestones: [3, 5]\n')
    config = parse_args(['--config', path, '--epochs', '2'])
    assert (config.epochs, config.lr, config.teacher, config.decay_milestones) == (2, 1e-3, 'resnet34', (3, 5))


def test_every_field_has_help_and_a_flag_that_sets_it():
    for name, f in FIELDS.items():
        assert f.metadata['help'], name
        meta, default = f.metadata, f.default
        kind = str(f.type)
        if meta['choices']:
            values = [next(c for c in meta['choices'] if c != str(default))]
        elif 'bool' in kind:
            values = []
        elif 'dict' in kind:
            values = ['a=1']
        elif 'float' in kind or 'Floats' in kind:
            values = ['0.25'] * (meta['lengths'] or (1,))[0]
        elif 'int' in kind:
            values = ['3' if default == 2 else '2']
        else:
            values = [{'resume': 'auto', 'checkpoint_interval': '7'}.get(name, 'x')]
        config = parse_args([flag_of(name), *values])
        assert getattr(config, name) != default, name


def test_recipes_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_args(['--config', 'quickstart']).student == 'resnet18'
    assert parse_args(['--config', 'configs/quickstart.yaml']).student == 'resnet18'


def test_stages_may_be_numbers_in_yaml(tmp_path):
    (tmp_path / 'r.yaml').write_text('feature_stages: [2, 3]\n')
    assert load_yaml(str(tmp_path / 'r.yaml')) == {'feature_stages': ('2', '3')}


def test_without_a_dataset_the_samples_settings_apply_and_elsewhere_timms():
    assert resolve(parse_args([*PAIR, '--epochs', '2'])).distill_warmup_epochs == 2
    sample = resolve(parse_args(PAIR))
    assert (sample.img_size, sample.train_crop_mode, sample.hflip, sample.teacher_pretrained) == (32, 'pad', 0, False)
    assert sample.teacher_epochs > 0 and sample.val_split == 'test'
    other = resolve(parse_args([*PAIR, '--data-dir', 'd']))
    assert (other.batch_size, other.epochs, other.hflip, other.smoothing, other.color_jitter) == (
        128,
        300,
        0.5,
        0.1,
        0.4,
    )
    assert (other.teacher_epochs, other.teacher_pretrained, other.img_size) == (0, True, None)


def test_on_the_sample_named_weights_of_ones_own_are_used_not_fitted_over():
    assert resolve(parse_args(['--student', 'a', '--teacher', 'local-dir:t'])).teacher_epochs == 0
    assert resolve(parse_args([*PAIR, '--teacher-checkpoint', 'f'])).teacher_epochs == 0
    assert resolve(parse_args([*PAIR, '--teacher-epochs', '0'])).teacher_epochs == 0


def test_learning_rate_scales_with_the_global_batch_as_in_timm():
    argv = [*PAIR, '--data-dir', 'd', '-b', '64', '--grad-accum-steps', '2']
    assert resolve(parse_args(argv), num_processes=4).lr == pytest.approx(0.1 * 512 / 256)
    assert resolve(parse_args([*argv, '--opt', 'adamw']), 2).lr == pytest.approx(7e-4)
    assert resolve(parse_args([*argv, '--lr', '0.3']), 4).lr == 0.3


def test_default_warmup_never_eats_a_short_run():
    assert [warmup_epochs(Config(epochs=e)) for e in (1, 3, 10, 100, 300)] == [0, 0, 1, 5, 5]
    assert warmup_epochs(Config(warmup_epochs=3, epochs=300)) == 3


def test_accumulation_steps_of_accelerate_launch_are_heard(monkeypatch):
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '4')
    assert resolve(parse_args(PAIR)).grad_accum_steps == 4
    assert resolve(parse_args([*PAIR, '--grad-accum-steps', '2'])).grad_accum_steps == 2


@pytest.mark.parametrize(('cores', 'local', 'workers'), [(16, '', 15), (16, '4', 3), (2, '2', 1), (1, 'x', 1)])
def test_auto_workers_are_the_process_share_of_the_cores_but_one(monkeypatch, tmp_path, cores, local, workers):
    monkeypatch.setattr(sys.modules['timm_rld.config.resolve'], 'cores', lambda: cores)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', local)
    for argv in (['--workers', 'auto'], ['-j', 'auto'], ['--config', written(tmp_path, 'workers: auto\n')]):
        config = resolve(parse_args([*PAIR, *argv]))
        assert config.workers == workers and yaml.safe_load(to_yaml(config))['workers'] == workers
    assert resolve(parse_args(PAIR)).workers == min(4, cores)
    assert [resolve(parse_args([*PAIR, '--workers', w])).workers for w in ('0', '7')] == [0, 7]


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--epoch', '3'], "unknown flag --epoch (did you mean '--epochs'?)"),
        (['--epochs'], '--epochs: expected one argument'),
        (['resnet18'], "unexpected 'resnet18'"),
        (['--epochs', '-1'], '--epochs: must be at least 0, got -1'),
        (['--epochs', '0', '--teacher-epochs', '0'], '--epochs 0: trains the teacher alone'),
        (['--epochs', '2.5'], "--epochs: expected a whole number, got '2.5'"),
        (['--batch-size', '-1'], '--batch-size: must be greater than 0, got -1'),
        (['--lr', '0'], '--lr: must be greater than 0, got 0'),
        (['--lr', 'nan'], '--lr: must be a finite number, got nan'),
        (['--lr', 'inf'], '--lr: must be a finite number, got inf'),
        (['--workers', '-1'], '--workers: must be at least 0, got -1'),
        (['--workers', 'all'], "--workers: expected a whole number, got 'all'; or 'auto'"),
        (['--smoothing', '1'], '--smoothing: must be at most 0.99, got 1'),
        (['--seed', '5000000000'], '--seed: must be at most'),
        (['--cutmix-minmax', '0.5', '0.5'], '--cutmix-minmax 0.5 0.5: the first value must be below the second'),
        (
            ['--train-crop-mode', 'rrc', '--scale', '1', '0.1'],
            '--scale 1 0.1: the first value must be below the second',
        ),
        (['--scale', '0.5', '1'], '--scale 0.5 1: --train-crop-mode pad cuts images at their own scale'),
        (['--epochs', '2', '--cooldown-epochs', '2'], '--cooldown-epochs 2: must be below --epochs 2'),
        (['--sched', 'cosin'], "--sched: 'cosin' is not one of cosine, "),
        (['--in-chans', '2'], "--in-chans: '2' is not one of 1, 3"),
        (['--scale', '0.5'], '--scale: expected 2 values, got 1'),
        (['--mean', '0.5', '0.5'], '--mean: expected 1 or 3 values'),
        (['--distill-kwargs', 'alpha'], "--distill-kwargs: expected name=value, got 'alpha'"),
        (['--epochs', '3', '--warmup-epochs', '3'], '--warmup-epochs 3: must be below --epochs 3'),
        (['--train-split', 'foo'], '--train-split foo: needs a --dataset or --data-dir'),
        (['--config', '/nowhere.yaml'], '--config /nowhere.yaml: cannot be read'),
    ],
)
def test_a_wrong_command_line_is_named_with_the_way_out(argv, message):
    assert message in error([*PAIR, *argv])


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('epoch: 3', "unknown key 'epoch' (did you mean 'epochs'?)"),
        ('- a\n- b', 'expected a mapping of settings (name: value), the file is a list'),
        ('', 'expected a mapping of settings (name: value), the file is empty'),
        ('epochs: three', "epochs: expected a whole number, got 'three'"),
        ('workers: true', "workers: expected a whole number, got True; or 'auto'"),
        ('workers: [auto]', "workers: expected a whole number, got ['auto']; or 'auto'"),
        ('epochs: true', 'epochs: expected a whole number, got True'),
        ('teacher: 3', 'teacher: expected a text, got 3'),
        ('no_aug: 1', 'no_aug: expected true or false, got 1'),
        ('model_kwargs: {1: 2}', 'model_kwargs: expected names as keys, got 1'),
        ('distill_kwargs: [1]', 'distill_kwargs: expected a mapping, got [1]'),
        ('seed: null', 'seed: a value is needed'),
        ('epochs: 1\nepochs: 2', 'key written twice: epochs'),
        ('a: [', 'not valid YAML'),
        ('a: !!python/object/apply:os.system ["false"]', 'not valid YAML'),
    ],
)
def test_a_wrong_file_is_named_with_the_key(tmp_path, text, message):
    assert message in error(['--config', written(tmp_path, text)])


def test_keys_of_the_file_are_checked_before_required_flags(tmp_path):
    assert "unknown key 'studnt' (did you mean 'student'?)" in error(
        ['--config', written(tmp_path, 'studnt: resnet18')]
    )


def test_written_yaml_holds_every_field_in_plain_types():
    data = yaml.safe_load(to_yaml(resolve(parse_args(PAIR))))
    assert list(data) == [*(f.name for f in dataclasses.fields(Config)), 'derived_from', 'derived']


def test_one_epoch_on_the_sample_needs_no_word_about_warmup():
    for argv in (['--epochs', '1'], ['--teacher-epochs', '1'], ['--distill', 'none', '--epochs', '1']):
        assert resolve(parse_args([*PAIR, *argv])).warmup_epochs == 0
    assert resolve(parse_args(PAIR)).warmup_epochs == 1


def test_values_of_options_are_read_alike_in_both_places(tmp_path):
    argv = ['--distill-kwargs', 'a=false', 'b=1e-3', 'c=null', 'd=x', 'e=[1,2]']
    path = written(tmp_path, 'distill_kwargs: {a: false, b: 1e-3, c: null, d: x, e: [1, 2]}\nmixed_precision: no\n')
    want = {'a': False, 'b': 1e-3, 'c': None, 'd': 'x', 'e': [1, 2]}
    assert parse_args(argv).distill_kwargs == want
    config = parse_args(['--config', path])
    assert config.distill_kwargs == want and config.mixed_precision == 'no'


# ---------------------------------------------------------------------------------------------------------- the table


@dataclasses.dataclass
class WithSharpness(Config):
    """The table with a row more."""

    sharpness: float = setting(
        0.0, 'augmentation', 'sharpen images', ge=0, used_by='create_loaders:amount', logits=True
    )


def test_a_setting_that_is_added_to_the_table_arrives_everywhere(tmp_path, capsys):
    config = parse_args(['--sharpness', '2'], settings=WithSharpness)
    assert config.sharpness == 2
    assert config.arguments_of('create_loaders')['amount'] == 2  # in the function that takes it
    assert config.of_logits()['--sharpness'] == 2  # in the key of the teacher cache
    assert 'sharpness' not in marked('resumable', settings=WithSharpness)  # a run is not resumed with another value
    path = written(tmp_path, to_yaml(config))  # in args.yaml, and from there
    assert parse_args(['--config', path], settings=WithSharpness) == config
    with pytest.raises(UsageError, match='--sharpness: must be at least 0, got -1'):
        parse_args(['--sharpness', '-1'], settings=WithSharpness)
    with pytest.raises(SystemExit):
        parse_args(['--help'], settings=WithSharpness)
    assert '--sharpness X' in capsys.readouterr().out


def functions() -> dict[str, object]:
    """The functions that take settings as arguments, by name."""
    from timm_rld import cache, data, distributed, hub, loss, pairing, poison, resume, task
    from timm_rld.engine import generated

    found = {}
    for room in (generated, cache, data, distributed, hub, loss, pairing, poison, resume, task):
        found.update(vars(room))
    return found


@pytest.mark.parametrize('name', list(FIELDS))
def test_the_functions_that_a_row_names_take_the_setting(name):
    for function, argument in FIELDS[name].metadata['used_by'].items():
        parameters = inspect.signature(functions()[function]).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert takes_any or (argument or name) in parameters, function


def test_paths_are_made_absolute_and_names_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'd').mkdir()
    config = Config(data_dir='d', dataset='hfds/d', teacher='local-dir:d', student='resnet18').with_absolute_paths()
    assert (config.data_dir, config.student) == (str(tmp_path / 'd'), 'resnet18')
    assert (config.dataset, config.teacher) == (f'hfds/{tmp_path}/d', f'local-dir:{tmp_path}/d')
    assert Config(dataset='hfds/uoft-cs/cifar100').with_absolute_paths().dataset == 'hfds/uoft-cs/cifar100'
