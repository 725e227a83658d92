"""The teacher cache: right logits for each image, nothing else, whatever happens to the folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors
import timm
import torch
from fork_server import kill_until_done
from PIL import Image

from timm_rld import export_model
from timm_rld.__main__ import main as tools
from timm_rld.cache import DTYPES, Rows, rounded
from timm_rld.config import parse_args, resolve
from timm_rld.data.sampler import ReplaySampler
from timm_rld.errors import UsageError, UserError
from timm_rld.loss import CRITERIA, create_distill_loss
from train_distill import main

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def argv(folder, trained_teacher, tmp_path):
    """A small run of a teacher with weights, that uses a cache in `tmp_path`."""
    return ['--teacher', f'local-dir:{trained_teacher}', '--student', 'test_vit', '--data-dir', str(folder),
            '--img-size', '32', '--epochs', '4', '--lr', '0.005', '-b', '8', '--workers', '0', '--min-teacher-acc', '0',
            '--output', str(tmp_path), '--cpu-threads', '1']  # fmt: skip


def cached(argv: list[str], tmp_path: Path, name: str, *more: str) -> list[str]:
    return [*argv, '--experiment', name, '--teacher-cache', str(tmp_path / 'cache'), *more]


def student(tmp_path: Path, name: str) -> bytes:
    return (tmp_path / name / 'student' / 'model.safetensors').read_bytes()


@pytest.fixture
def no_teacher(monkeypatch):
    """From now on no teacher may be built."""
    import timm_rld.pairing

    def forbidden(*args, **kwargs):
        raise AssertionError('a teacher was built')

    return lambda: monkeypatch.setattr(timm_rld.pairing, 'create_teacher', forbidden)


# ------------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('scale', [1e-6, 1.0, 30.0])
def test_rounding_keeps_each_class_on_its_side_of_the_true_one(dtype, scale):
    logits = scale * torch.randn(64, 50)
    target = torch.randint(50, (64,))
    own = logits.gather(1, target[:, None])
    # near-ties: a hair above and below, closer than the dtype can tell; and exact ones
    for column, step in ((1, 1e-6), (2, -1e-6), (3, 1e-4), (4, -1e-4), (5, 0.0)):
        moved = torch.where(target == column, logits[:, column], (own * (1 + step)).squeeze(1))
        logits[:, column] = moved
    own = logits.gather(1, target[:, None])
    assert (logits.to(dtype) == own.to(dtype)).sum() > (logits == own).sum()  # plain rounding would lose some
    kept = rounded(logits, target, dtype).float()
    assert torch.equal((kept - kept.gather(1, target[:, None])).sign(), (logits - own).sign())
    assert torch.equal(kept.gather(1, target[:, None]), own.to(dtype).float())
    ulp = torch.maximum(logits.abs() * torch.finfo(dtype).eps, torch.tensor(2.0**-24 if dtype == HALVES[0] else 1e-38))
    assert ((kept - logits).abs() <= 1.5 * ulp).all()


@pytest.mark.parametrize('dtype', HALVES)
def test_rounding_around_zero_and_at_signs(dtype):
    tiny = 1e-9 if dtype == torch.float16 else 1e-45
    logits = torch.tensor([[0.0, tiny, -tiny, -0.0, 1.0, -1.0]])
    for true in range(6):
        kept = rounded(logits, torch.tensor([true]), dtype).float()
        assert torch.equal((kept - kept[0, true]).sign(), (logits - logits[0, true]).sign())


def test_float32_is_not_rounded():
    logits = torch.randn(4, 5)
    assert torch.equal(rounded(logits, torch.zeros(4, dtype=torch.int64), torch.float32), logits)


@pytest.mark.parametrize('name', [n for n, row in CRITERIA.items() if row.plain])
def test_losses_of_float16_logits_are_those_of_the_teacher(name):
    student_logits, teacher_logits = 3 * torch.randn(64, 100), 5 * torch.randn(64, 100)
    target = torch.randint(100, (64,))
    criterion = create_distill_loss(name)
    online = criterion(student_logits, teacher_logits, target)
    kept = criterion(student_logits, rounded(teacher_logits, target, torch.float16).float(), target)
    assert kept.item() == pytest.approx(online.item(), rel=2e-3)


def test_float16_masks_in_rld_what_the_teacher_would():
    teacher_logits = torch.randn(256, 100).mul(8).round().div(8)  # many exact ties
    teacher_logits += 1e-5 * torch.randn(256, 100).round()  # and many that float16 cannot tell
    target = torch.randint(100, (256,))
    criterion = create_distill_loss('rld')
    figures = []
    for logits in (
        teacher_logits,
        rounded(teacher_logits, target, torch.float16).float(),
        teacher_logits.half().float(),
    ):
        criterion(torch.zeros(256, 100), logits, target)
        figures.append(criterion.diagnostics['masked_classes'].item())
    assert figures[0] == figures[1] != figures[2]


# ---------------------------------------------------------------------------------------------------------------- files


def test_rows_come_back_as_they_were_written_and_the_file_is_a_safetensors_file(tmp_path):
    for dtype in DTYPES.values():
        path = tmp_path / f'{str(dtype)[6:]}.safetensors'
        rows = Rows.create(path, 7, 5, dtype)
        values = torch.randn(3, 5).to(dtype)
        where = np.array([6, 0, 3])
        assert rows.read(where) is None and not rows.filled().any()
        rows.write(where, values)
        assert torch.equal(rows.read(where), values)
        assert torch.equal(Rows(path).read(where[::-1].copy()), values.flip(0))
        assert rows.read(np.array([0, 1])) is None
        assert rows.filled().tolist() == [True, False, False, True, False, False, True]
        with safetensors.safe_open(path, 'pt') as f:
            assert torch.equal(f.get_tensor('logits')[where], values)


def test_a_row_that_was_torn_is_not_there(tmp_path):
    rows = Rows.create(tmp_path / 'x', 4, 6, torch.float16)
    rows.write(np.array([1, 2]), torch.randn(2, 6).half())
    with (tmp_path / 'x').open('r+b') as f:
        f.seek(rows.start + rows.row_bytes + 3)
        f.write(b'\xaa')
    assert rows.read(np.array([1])) is None and rows.read(np.array([2])) is not None


@pytest.mark.parametrize('damage', ['cut', 'empty', 'other', 'json', 'longer'])
def test_a_file_that_is_damaged_is_named(tmp_path, damage):
    path = tmp_path / 'epoch-0001.safetensors'
    Rows.create(path, 10, 4, torch.float16)
    whole = path.read_bytes()
    path.write_bytes({'cut': whole[:-5], 'empty': b'', 'other': b'\xff' * 64, 'json': whole[:8] + b'[1]' + whole[11:],
                      'longer': whole + b'x'}[damage])  # fmt: skip
    with pytest.raises(UserError, match='epoch-0001.safetensors: .*delete it'):
        Rows(path)


@pytest.mark.parametrize('length', [0, 1500, 4000])  # nothing is left; some rows; all but a row
def test_a_file_that_is_cut_off_while_it_is_open_is_an_error_and_no_signal(tmp_path, length):
    rows = Rows.create(tmp_path / 'epoch-0001.safetensors', 100, 20, torch.float16)
    values = torch.randn(100, 20).half()
    rows.write(np.arange(99), values[:99])
    other = Rows(rows.path)
    assert other.filled().sum() == 99
    os.truncate(rows.path, length)
    for use in (
        lambda: rows.read(np.arange(99)),
        lambda: other.read(np.array([98])),
        lambda: rows.write(np.array([99]), values[99:]),
        lambda: other.write(np.array([0]), values[:1]),
        other.damaged,
        *([other.filled] if not length else []),
    ):
        with pytest.raises(UserError, match=f'epoch-0001.safetensors: is cut off or damaged .{length:,} bytes.*delete'):
            use()
    assert rows.path.stat().st_size == length, 'made long again'


def test_rows_that_another_process_has_written_since_are_seen(tmp_path):
    rows = Rows.create(tmp_path / 'x', 10, 4, torch.float16)
    other, values = Rows(tmp_path / 'x'), torch.randn(10, 4).half()
    assert not other.filled().any() and other.read(np.arange(10)) is None
    rows.write(np.arange(10), values)
    assert torch.equal(other.read(np.arange(10)), values)
    other.write(np.arange(10), values + 1)  # rows that are there stay
    assert torch.equal(rows.read(np.arange(10)), values) and not other.damaged()


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e6])
def test_logits_that_do_not_fit_are_refused(tmp_path, value):
    logits = torch.tensor([[1.0, value]])
    with pytest.raises(UserError, match='--teacher-cache-dtype float32'):
        Rows.create(tmp_path / 'x', 1, 2, torch.float16).write(
            np.array([0]), rounded(logits, torch.tensor([0]), torch.float16)
        )


# ----------------------------------------------------------------------------------------------------------- whole runs


def test_with_float32_and_a_view_an_epoch_a_run_is_the_online_run_bit_for_bit(argv, tmp_path, no_teacher, capsys):
    assert main([*argv, '--experiment', 'online']) == 0
    more = ('--teacher-cache-dtype', 'float32', '--teacher-cache-views', '4')
    assert main(cached(argv, tmp_path, 'filling', *more)) == 0
    assert 'as many augmentation epochs as epochs (4)' in capsys.readouterr().out
    no_teacher()
    assert main(cached(argv, tmp_path, 'reading', *more)) == 0
    assert 'the teacher is not loaded' in capsys.readouterr().out
    assert student(tmp_path, 'online') == student(tmp_path, 'filling') == student(tmp_path, 'reading')
    results = [json.loads((tmp_path / n / 'results.json').read_text()) for n in ('online', 'filling', 'reading')]
    for key in ('teacher_top1', 'teacher_sha256', 'agreement', 'student_top1'):
        assert results[0][key] == results[1][key] == results[2][key] is not None, key


@pytest.mark.parametrize('workers', ['0', '2'])
def test_what_the_folder_held_before_does_not_change_a_run(argv, tmp_path, workers):
    more = ('--teacher-cache-views', '2', '--workers', workers)
    assert main(cached(argv, tmp_path, 'first', *more)) == 0
    assert main(cached(argv, tmp_path, 'second', *more)) == 0
    for view in (tmp_path / 'cache').glob('epoch-*'):  # some rows gone, some torn
        rows = Rows(view)
        with view.open('r+b') as f:
            for index in (0, 7, 8, 30):
                f.seek(rows.crc_start + 4 * index)
                f.write(bytes(4))
            f.seek(rows.start + 20 * rows.row_bytes)
            f.write(b'\x11\x22')
    next((tmp_path / 'cache').glob('validation-*')).unlink()
    assert main(cached(argv, tmp_path, 'third', *more)) == 0
    assert student(tmp_path, 'first') == student(tmp_path, 'second') == student(tmp_path, 'third')


def test_another_student_and_criterion_use_the_same_cache(argv, tmp_path, no_teacher):
    more = ('--teacher-cache-views', '1', '--crop-pct', '1', '--interpolation', 'bicubic')
    assert main(cached(argv, tmp_path, 'first', *more)) == 0
    no_teacher()
    other = ('--student', 'test_resnet', '--distill', 'dkd', '-b', '5')
    assert main(cached(argv, tmp_path, 'other', *more, *other)) == 0


def test_for_a_student_with_other_preprocessing_the_teacher_is_judged_anew(argv, tmp_path, capsys):
    more = ('--teacher-cache-views', '1', '--epochs', '1')
    assert main(cached(argv, tmp_path, 'first', *more, '--crop-pct', '1')) == 0
    assert main(cached(argv, tmp_path, 'second', *more, '--crop-pct', '0.7')) == 0
    assert '1 of 1 cached' in capsys.readouterr().out
    assert main([*argv, '--experiment', 'online', '--epochs', '1', '--crop-pct', '0.7']) == 0
    found = [json.loads((tmp_path / name / 'results.json').read_text()) for name in ('second', 'online')]
    assert found[0]['teacher_top1'] == found[1]['teacher_top1']
    for name, crop in (('third', '1'), ('fourth', '0.7')):  # both are kept
        assert main(cached(argv, tmp_path, name, *more, '--crop-pct', crop)) == 0
        assert 'the teacher is not loaded' in capsys.readouterr().out


def test_more_views_can_be_added(argv, tmp_path, capsys):
    assert main(cached(argv, tmp_path, 'first', '--teacher-cache-views', '1')) == 0
    assert main(cached(argv, tmp_path, 'second', '--teacher-cache-views', '3')) == 0
    assert '1 of 3 cached' in capsys.readouterr().out
    assert len(list((tmp_path / 'cache').glob('epoch-*'))) == 3


def test_images_of_a_batch_that_is_left_out_are_asked_about_too(argv, tmp_path):
    # 41 images in batches of 8, and batch norm cannot take the one that is left
    assert main(cached(argv, tmp_path, 'run', '--student', 'test_resnet', '--teacher-cache-views', '2')) == 0
    for view in (tmp_path / 'cache').glob('epoch-*'):
        assert Rows(view).filled()[:41].all()


def test_epochs_of_one_view_see_the_same_images_in_another_order():
    sampler = ReplaySampler(20, 6, seed=3)
    orders = []
    for epoch in (1, 3):
        sampler.set_epoch(epoch, augmentation_epoch=1)
        orders.append([key for batch in sampler for key in batch])
    assert sorted(orders[0]) == sorted(orders[1]) == [(1, i) for i in range(20)]
    assert orders[0] != orders[1]


def test_a_fitted_teacher_has_a_cache_too(folder, tmp_path, capsys):
    argv = ['--teacher', 'test_resnet', '--student', 'test_vit', '--data-dir', str(folder), '--img-size', '32',
            '--teacher-epochs', '1', '--no-teacher-pretrained', '--epochs', '2', '--lr', '0.005', '-b', '8',
            '--workers', '0', '--min-teacher-acc', '0', '--output', str(tmp_path)]  # fmt: skip
    for name in ('first', 'second'):
        assert main(cached(argv, tmp_path, name, '--teacher-cache-views', '1')) == 0
    hint = f'--teacher local-dir:{tmp_path / "second" / "teacher"} --teacher-epochs 0 would save training it'
    assert hint in capsys.readouterr().out
    assert student(tmp_path, 'first') == student(tmp_path, 'second')
    ready = [
        '--teacher',
        f'local-dir:{tmp_path / "first" / "teacher"}',
        '--teacher-epochs',
        '0',
        '--teacher-pretrained',
    ]
    argv = [a for a in argv if a != '--no-teacher-pretrained'] + ready
    assert main(cached(argv, tmp_path, 'third', '--teacher-cache-views', '1')) == 0
    assert 'the teacher is not loaded' in capsys.readouterr().out
    assert tools(['cache', 'verify', str(tmp_path / 'cache'), '--rows', '20']) == 0


def test_two_processes_fill_a_cache_that_one_reads(argv, tmp_path, fork_server, no_teacher):
    more = ('--teacher-cache-views', '2', '--teacher-cache-dtype', 'float32', '-b', '4')
    fork_server.run(cached(argv, tmp_path, 'two', *more), tmp_path / 'log', processes=2)
    for view in (tmp_path / 'cache').glob('epoch-*'):
        assert Rows(view).filled()[:41].all()
    no_teacher()
    assert main(cached(argv, tmp_path, 'one', *more, '-b', '8')) == 0
    a, b = (safetensors.torch.load(student(tmp_path, name)) for name in ('two', 'one'))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_run_with_a_cache_that_is_killed_goes_on_bit_for_bit(argv, tmp_path, fork_server, processes):
    more = ('--teacher-cache-views', '2', '--checkpoint-interval', '2', '--resume', 'auto')
    fork_server.run(cached(argv, tmp_path, 'whole', *more), tmp_path / 'log', processes)
    shutil.rmtree(tmp_path / 'cache')
    rng = random.Random(processes)
    kill_until_done(fork_server, cached(argv, tmp_path, 'killed', *more), tmp_path / 'log', rng, 2.0, 4, processes)
    assert student(tmp_path, 'whole') == student(tmp_path, 'killed')
    assert tools(['cache', 'verify', str(tmp_path / 'cache')]) == 0


def test_distilling_nothing_sees_the_same_views(argv, tmp_path):
    assert main(cached(argv, tmp_path, 'none', '--distill', 'none', '--teacher-cache-views', '2')) == 0
    assert not (tmp_path / 'cache').exists()


# --------------------------------------------------------------------------------------------------------------- errors

CHANGES = {
    '--seed': ('--seed', '7'),
    '--scale': ('--scale', '0.5', '1'),
    '--hflip': ('--hflip', '0'),
    '--train-crop-mode': ('--train-crop-mode', 'pad'),
    '--reprob': ('--reprob', '0.2'),
    '--no-aug': ('--no-aug',),
    'image size': ('--img-size', '48'),
    '--teacher-img-size': ('--teacher-img-size', '48'),
    '--teacher-mean': ('--teacher-mean', '0.5', '0.5', '0.5'),
    '--teacher-cache-dtype': ('--teacher-cache-dtype', 'float32'),
    '--mixed-precision': ('--mixed-precision', 'bf16'),
    'split': ('--train-split', 'validation'),
    '--color-jitter': ('--color-jitter', '0.1'),
}


@pytest.fixture(scope='module')
def filled(folder, trained_teacher, tmp_path_factory):
    """A run with a cache, and its flags."""
    root = tmp_path_factory.mktemp('filled')
    flags = ['--teacher', f'local-dir:{trained_teacher}', '--student', 'test_vit', '--data-dir', str(folder),
             '--img-size', '32', '--epochs', '1', '-b', '32', '--workers', '0', '--min-teacher-acc', '0',
             '--output', str(root), '--teacher-cache', str(root / 'cache')]  # fmt: skip
    assert main([*flags, '--experiment', 'run']) == 0
    return root, flags


@pytest.mark.parametrize('fact', list(CHANGES))
def test_a_cache_of_something_else_is_refused_by_name(filled, fact, capsys):
    root, flags = filled
    assert main([*flags, '--experiment', 'other', *CHANGES[fact]]) == 1
    error = capsys.readouterr().err
    assert f'--teacher-cache {root / "cache"}: holds logits of something else: ' in error and f'{fact} ' in error
    assert ', not ' in error and 'name another folder' in error
    assert not (root / 'other').exists()


def test_a_teachers_folder_and_its_file_of_weights_share_a_cache(folder, tmp_path, capsys):
    argv = ['--student', 'cifar_resnet8', '--data-dir', str(folder), '--img-size', '32', '--epochs', '1', '-b', '32',
            '--workers', '0', '--min-teacher-acc', '0', '--output', str(tmp_path)]  # fmt: skip
    fitted = ['--teacher', 'test_vit', '--no-teacher-pretrained', '--teacher-epochs', '1']
    assert main([*argv, *fitted, '--experiment', 'fitted']) == 0
    teacher = tmp_path / 'fitted' / 'teacher'
    assert main(cached([*argv, '--teacher', f'local-dir:{teacher}'], tmp_path, 'folder')) == 0
    file = ['--teacher', 'test_vit', '--teacher-checkpoint', str(teacher / 'model.safetensors')]
    assert main(cached([*argv, *file], tmp_path, 'file')) == 0
    assert 'the teacher is not loaded' in capsys.readouterr().out


def test_a_teacher_that_resizes_otherwise_is_refused_a_cache(folder, tmp_path, capsys):
    argv = ['--student', 'cifar_resnet8', '--data-dir', str(folder), '--img-size', '32', '--epochs', '1', '-b', '32',
            '--workers', '0', '--min-teacher-acc', '0', '--output', str(tmp_path)]  # fmt: skip
    model = timm.create_model('vit_tiny_patch16_224', depth=1, num_classes=3)  # takes images of one size only
    config = timm.data.resolve_data_config(model=model)
    teacher = export_model(model, tmp_path / 't', data_config=config)
    argv += ['--teacher', f'local-dir:{teacher}']
    assert main(cached(argv, tmp_path, 'first')) == 0
    config = json.loads((teacher / 'config.json').read_text())
    assert config['pretrained_cfg']['interpolation'] == 'bicubic'
    config['pretrained_cfg']['interpolation'] = 'bilinear'
    (teacher / 'config.json').write_text(json.dumps(config))
    assert main(cached(argv, tmp_path, 'second')) == 1
    assert "interpolation of the teacher's resize bicubic, not bilinear" in capsys.readouterr().err


def test_a_cache_of_other_weights_is_refused(filled, trained_teacher, tmp_path, capsys):
    root, flags = filled
    other = shutil.copytree(trained_teacher, tmp_path / trained_teacher.name)
    state = safetensors.torch.load_file(other / 'model.safetensors')
    state['fc.bias' if 'fc.bias' in state else sorted(state)[0]] += 1
    safetensors.torch.save_file(state, other / 'model.safetensors')
    assert main([*flags, '--experiment', 'weights', '--teacher', f'local-dir:{other}']) == 1
    assert 'weights of the teacher sha256' in capsys.readouterr().err


def test_a_cache_of_other_images_is_refused(filled, folder, tmp_path, capsys):
    _, flags = filled
    data = shutil.copytree(folder, tmp_path / 'data')
    next((data / 'train' / 'pear').iterdir()).unlink()
    assert main([*flags, '--experiment', 'images', '--data-dir', str(data)]) == 1
    assert 'images 41, not 40' in capsys.readouterr().err


def test_a_cache_of_other_pictures_under_the_same_names_is_refused(filled, folder, tmp_path, capsys):
    _, flags = filled
    data = shutil.copytree(folder, tmp_path / 'data')
    for path in (data / 'train').rglob('*.png'):
        Image.open(path).rotate(90).save(path)
    assert main([*flags, '--experiment', 'pictures', '--data-dir', str(data)]) == 1
    assert 'a sample of images (a digest)' in capsys.readouterr().err


@pytest.mark.parametrize('change', ['mean', 'model_args'])
def test_a_teacher_with_another_config_is_another_teacher(filled, trained_teacher, tmp_path, change, capsys):
    _, flags = filled
    other = shutil.copytree(trained_teacher, tmp_path / 'teacher')
    config = json.loads((other / 'config.json').read_text())
    if change == 'mean':
        config['pretrained_cfg']['mean'] = [0.1, 0.2, 0.3]
    else:
        config['model_args'] = {'act_layer': 'silu'}
    (other / 'config.json').write_text(json.dumps(config))
    assert main([*flags, '--experiment', 'config', '--teacher', f'local-dir:{other}']) == 1
    assert ('--teacher-mean' if change == 'mean' else 'arguments of the teacher') in capsys.readouterr().err


def test_a_run_that_failed_before_it_wrote_a_row_does_not_bind_the_next(argv, tmp_path):
    wrong = ['--min-teacher-acc', '100', '--teacher-mean', '0.1', '0.2', '0.3']
    assert main(cached(argv, tmp_path, 'run', *wrong)) == 1
    assert (tmp_path / 'cache' / 'cache.json').exists()
    assert main(cached(argv, tmp_path, 'run')) == 0


def test_settings_that_do_not_matter_do_not_bind(filled, no_teacher):
    _, flags = filled
    no_teacher()
    assert main([*flags, '--experiment', 'free', '--remode', 'const', '--crop-padding', '2', '-b', '7']) == 0


def test_a_row_that_is_there_stays(tmp_path):
    rows = Rows.create(tmp_path / 'x', 3, 4, torch.float16)
    first, second = torch.randn(2, 4).half(), torch.randn(2, 4).half()
    rows.write(np.array([0, 1]), first)
    rows.write(np.array([1, 2]), second)
    assert torch.equal(rows.read(np.array([0, 1, 2])), torch.cat([first, second[1:]]))


def test_data_and_teacher_may_be_moved(filled, folder, trained_teacher, tmp_path, no_teacher):
    _, flags = filled
    data, teacher = shutil.copytree(folder, tmp_path / 'data'), tmp_path / 'renamed'
    shutil.copytree(trained_teacher, teacher)
    no_teacher()
    assert main([*flags, '--experiment', 'moved', '--data-dir', str(data), '--teacher', f'local-dir:{teacher}']) == 0


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        (['--teacher-cache', 'c', '--teacher-cache-views', '0'], '--teacher-cache-views: must be at least 1'),
        (['--teacher-cache', 'c', '--teacher-cache-views', '5'], '--teacher-cache-views 5: more than the epochs (4)'),
        (['--teacher-cache-views', '2'], '--teacher-cache-views 2: needs --teacher-cache DIR'),
        (['--teacher-cache-dtype', 'float32'], '--teacher-cache-dtype float32: needs --teacher-cache DIR'),
        (['--teacher-cache', 'c', '--teacher-cache-dtype', 'int8'], '--teacher-cache-dtype'),
        (['--teacher-cache', ' '], '--teacher-cache: expected a folder'),
        (['--teacher-cache', 'c', '--on-bad-image', 'skip'], '--on-bad-image skip with --teacher-cache: '),
        (['--teacher-cache', 'c', '--mixup', '0.2'], '--mixup with --teacher-cache: '),
        (['--teacher-cache', 'c', '--cutmix', '1'], '--cutmix with --teacher-cache: '),
        (['--teacher-cache', 'c', '--cutmix-minmax', '0.2', '0.8'], '--cutmix-minmax with --teacher-cache: '),
    ],
)
def test_settings_that_do_not_go_with_a_cache(flags, says):
    common = ['--teacher', 'test_resnet', '--student', 'test_vit', '--data-dir', 'x', '--epochs', '4']
    with pytest.raises(UsageError) as e:
        resolve(parse_args([*common, *flags]))
    assert says in str(e.value)


@pytest.mark.parametrize(('epochs', 'views'), [(1, 1), (7, 7), (10, 10), (300, 10)])
def test_ten_views_unless_there_are_fewer_epochs(epochs, views):
    flags = ['--teacher', 'a', '--student', 'b', '--data-dir', 'x', '--teacher-cache', 'c', '--epochs', str(epochs)]
    assert resolve(parse_args(flags)).teacher_cache_views == views


def test_a_disk_without_room_is_an_error_before_work(argv, tmp_path, monkeypatch, capsys):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(10**6, 10**6, 100))
    assert main(cached(argv, tmp_path, 'run')) == 1
    error = capsys.readouterr().err
    assert 'the disk has 100 B left; give fewer --teacher-cache-views' in error
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('kind', ['file', 'in a file', 'not empty', 'damaged', 'other format'])
def test_a_folder_that_is_no_cache_is_refused(argv, tmp_path, kind, capsys):
    cache = tmp_path / 'cache'
    if kind == 'file':
        cache.write_text('x')
    elif kind == 'in a file':
        (tmp_path / 'x').write_text('x')
        argv = [*argv, '--teacher-cache', str(tmp_path / 'x' / 'cache')]
    else:
        cache.mkdir()
        name = 'photo.png' if kind == 'not empty' else 'cache.json'
        body = dict.fromkeys(('arguments', 'depends_on', 'data_config', 'validation'), {})
        text = json.dumps({'facts': {'format': 0}, **body})
        (cache / name).write_text('{"facts"' if kind == 'damaged' else text)
        (cache / 'epoch-0001.safetensors').touch()
    assert main([*cached([], tmp_path, 'run'), *argv]) == 1
    error = capsys.readouterr().err
    says = {'not empty': 'is not empty and not a cache', 'damaged': 'cache.json: is damaged',
            'other format': 'format 0, not 2'}.get(kind, 'cannot be written')  # fmt: skip
    assert says in error and 'Traceback' not in error


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, 'geteuid') else True, reason='root may write anywhere')
def test_a_folder_that_may_not_be_written_is_an_error(argv, tmp_path, capsys):
    (tmp_path / 'cache').mkdir(mode=0o555)
    assert main(cached(argv, tmp_path, 'run')) == 1
    assert 'cannot be written' in capsys.readouterr().err


def test_a_half_written_view_is_an_error_that_says_what_to_do(filled, tmp_path, capsys):
    root, flags = filled
    copy = shutil.copytree(root / 'cache', tmp_path / 'cache')
    with (copy / 'epoch-0001.safetensors').open('r+b') as f:
        f.truncate(500)
    assert main([*flags, '--experiment', 'half', '--teacher-cache', str(copy)]) == 1
    assert 'epoch-0001.safetensors: is cut off or damaged (500 bytes' in capsys.readouterr().err


@pytest.mark.parametrize('views', ['1', '400'])  # complete, so that it is read; being filled
def test_a_view_that_is_cut_off_while_a_run_uses_it_is_an_error_and_no_signal(filled, fork_server, tmp_path, views):
    root, flags = filled
    copy = shutil.copytree(root / 'cache', tmp_path / 'cache')
    flags = [*flags, '--epochs', '400', '--output', str(tmp_path), '--teacher-cache-views', views]
    training = fork_server.start([*flags, '--teacher-cache', str(copy)], tmp_path / 'log')
    deadline = time.monotonic() + 60
    while 'student epoch 1/' not in training.output():
        assert time.monotonic() < deadline, training.output()
        time.sleep(0.02)
    while 'error' not in training.output() and time.monotonic() < deadline:
        for view in copy.glob('epoch-*'):
            os.truncate(view, 500)
    assert training.wait() == [1], training.output()
    assert 'safetensors: is cut off or damaged (500 bytes, ' in training.output()
    assert 'delete it to have it computed again' in training.output()


def test_a_damaged_row_of_a_complete_cache_is_an_error_that_says_what_to_do(filled, tmp_path, capsys):
    root, flags = filled
    copy = shutil.copytree(root / 'cache', tmp_path / 'cache')
    rows = Rows(copy / 'epoch-0001.safetensors')
    with rows.path.open('r+b') as f:
        f.seek(rows.start)
        f.write(b'\x00\x01\x02')
    assert main([*flags, '--experiment', 'damaged', '--teacher-cache', str(copy)]) == 1
    assert 'a row is missing or damaged, and the teacher was not loaded' in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- verify


def test_verify_finds_rows_that_are_not_what_the_teacher_says(filled, tmp_path, capsys):
    root, _ = filled
    assert tools(['cache', 'verify', str(root / 'cache')]) == 0
    assert '41 rows, all whole; 41 recomputed: they differ by at most' in capsys.readouterr().out
    copy = shutil.copytree(root / 'cache', tmp_path / 'cache')
    rows = Rows(copy / 'epoch-0001.safetensors')
    where = np.array([11])
    other = rows.read(where) + 0.5
    with rows.path.open('r+b') as f:
        f.seek(rows.crc_start + 4 * 11)
        f.write(bytes(4))
    rows.write(where, other)
    assert tools(['cache', 'verify', str(copy)]) == 1
    assert '1 row(s) are not the logits of the teacher: epoch 1, image 11' in capsys.readouterr().err
    with rows.path.open('r+b') as f:
        f.seek(rows.start + 30 * rows.row_bytes)
        f.write(b'\x07')
    assert tools(['cache', 'verify', str(copy), '--rows', '1']) == 1
    assert 'epoch 1, image 30 (damaged)' in capsys.readouterr().err


def test_verify_names_what_is_wrong(filled, tmp_path, folder, trained_teacher, capsys):
    root, _ = filled
    data = shutil.copytree(folder, tmp_path / 'data')
    next((data / 'train' / 'pear').iterdir()).unlink()
    weights = trained_teacher / 'model.safetensors'
    for argv, says in (
        ([str(tmp_path / 'no')], 'not a teacher cache'),
        ([str(root / 'cache'), '--rows', '0'], '--rows 0: must be at least 1'),
        ([str(root / 'cache'), '--data-dir', str(data)], 'images 41, not 40'),
        ([str(root / 'cache'), '--teacher-checkpoint', str(tmp_path / 'no')], 'no such file'),
    ):
        assert tools(['cache', 'verify', *argv]) != 0
        assert says in capsys.readouterr().err
    assert tools(['cache', 'verify', str(root / 'cache'), '--teacher-checkpoint', str(weights), '--rows', '3']) == 0
