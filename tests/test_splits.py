"""Which images are trained on, and which are validated on."""

from __future__ import annotations

import os
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import draw

from timm_rld import runs
from timm_rld.__main__ import main as tools
from timm_rld.config import parse_args, resolve, to_yaml
from timm_rld.data import Source, open_split, open_splits, stratified_holdout
from timm_rld.data.overlap import overlap
from timm_rld.errors import UsageError, UserError
from train_distill import main


def train_of(**kwargs):
    return open_split(kwargs.pop('dataset', None), 'train', flag='--train-split', **kwargs)


# ------------------------------------------------------------------------------------------------------ a part held out


@pytest.mark.parametrize('fraction', [0.01, 0.1, 0.25, 0.5, 0.99])
def test_the_share_of_each_class_is_held_out_at_least_one_image_and_never_all(fraction):
    targets = [0] * 40 + [1] * 2 + [2] * 15
    keys = [f'{i}.png' for i in range(len(targets))]
    kept, held = stratified_holdout(targets, keys, fraction, seed=1)
    assert sorted([*kept, *held]) == list(range(len(targets)))
    counts = np.bincount(np.asarray(targets)[held], minlength=3)
    assert counts.tolist() == [min(n - 1, max(1, round(fraction * n))) for n in (40, 2, 15)]
    assert kept.tolist() == sorted(kept) and held.tolist() == sorted(held)


def test_adding_images_moves_few_others_and_another_seed_many():
    keys = [f'class/{i:04}.png' for i in range(1000)]
    held = {keys[i] for i in stratified_holdout([0] * 1000, keys, 0.2, seed=7)[1]}
    more = sorted([*keys, *(f'class/new{i}.png' for i in range(50))])
    again = {more[i] for i in stratified_holdout([0] * 1050, more, 0.2, seed=7)[1]}
    assert len(held - again) <= 25 and len(held & again) >= 175
    other = {keys[i] for i in stratified_holdout([0] * 1000, keys, 0.2, seed=8)[1]}
    assert len(held & other) < 80


def test_what_is_held_out_does_not_depend_on_the_order_of_the_files():
    keys = [f'{i}.png' for i in range(60)]
    held = {keys[i] for i in stratified_holdout([0] * 60, keys, 0.25, seed=3)[1]}
    turned = keys[::-1]
    assert {turned[i] for i in stratified_holdout([0] * 60, turned, 0.25, seed=3)[1]} == held


def test_a_class_of_one_image_cannot_be_divided():
    with pytest.raises(UserError, match='class 1: has one image alone'):
        stratified_holdout([0, 0, 1], ['a', 'b', 'c'], 0.1, seed=0)


# --------------------------------------------------------------------------------------------------- a part of a source


@pytest.mark.parametrize('kind', ['folder', 'parquet'])
def test_a_part_of_a_split_reads_names_and_digests_its_own_images(kind, folder, parquet):
    if kind == 'folder':
        whole = train_of(data_dir=str(folder))
    else:
        whole = train_of(dataset=f'hfds/{parquet}', input_key='img', target_key='fine_label')
    indices = [30, 3, 7]
    part = whole.subset(indices)
    assert len(part) == 3 and part.class_names == whole.class_names
    for i, j in enumerate(indices):
        (image, target), (there, label) = part.read(i), whole.read(j)
        assert image.tobytes() == there.tobytes() and target == label == part.targets[i] == whole.targets[j]
        assert part.key(i) == whole.key(j) and part.path(i) == whole.path(j)
    assert part.subset([2, 1]).key(0) == whole.key(7) and part.subset([2, 1]).targets[1] == whole.targets[3]
    digests = {s.digest() for s in (whole, part, whole.subset([30, 3, 8]), whole.subset([30, 3]))}
    assert len(digests) == 4 and part.digest() == whole.subset(indices).digest()
    assert part.sample_digest() != whole.sample_digest()


def test_an_image_of_a_folder_has_a_path_and_its_key_is_the_path_below_the_split(folder):
    source = train_of(data_dir=str(folder))
    assert source.path(0) == folder / 'train/apple/000.png' and source.key(0) == 'apple/000.png'


def test_the_classes_are_known_without_reading_an_image(folder, parquet):
    source = train_of(data_dir=str(folder))
    assert source.targets.tolist() == [source.read(i)[1] for i in range(len(source))]
    source = train_of(dataset=f'hfds/{parquet}', input_key='img', target_key='fine_label')
    assert source.targets.tolist() == [source.read(i)[1] for i in range(len(source))]


# ------------------------------------------------------------------------------------------------------- val-fraction


def grow(root, counts, size=12, seed=0):
    """Class folders with images, all different."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            draw(rng, len(name), size).save(root / name / f'{i:03}.png')
    return root


def open_both(dataset=None, train=None, val=None, **kwargs):
    """The two splits, and the lines that were printed."""
    lines = []
    return (*open_splits(dataset, train, val, log=lines.append, **kwargs), '\n'.join(lines))


def refused(dataset=None, train=None, val=None, **kwargs) -> str:
    with pytest.raises(UserError) as e:
        open_splits(dataset, train, val, **kwargs)
    return str(e.value)


@pytest.mark.parametrize('where', ['.', 'train', 'Train', 'TRAIN', 'training'])
def test_one_folder_is_enough(tmp_path, where):
    grow(tmp_path / where, {'ant': 10, 'bee': 20})
    if where != '.':
        grow(tmp_path / 'validation', {'ant': 3, 'bee': 3})  # not opened
    train, val, said = open_both(data_dir=str(tmp_path), val_fraction=0.2)
    assert np.bincount(val.targets).tolist() == [2, 4] and np.bincount(train.targets).tolist() == [8, 16]
    assert not {*train.keys()} & {*val.keys()} and train.split == where
    assert '24 images to train on, 6 of the same split held out' in said
    assert [len(s) for s in open_splits(None, where, data_dir=str(tmp_path), val_fraction=0.2)] == [24, 6]


def test_a_class_named_train_is_a_class(tmp_path):
    grow(tmp_path, {'bus': 6, 'train': 6})
    train, val, _ = open_both(data_dir=str(tmp_path), val_fraction=0.5)
    assert train.class_names == ['bus', 'train'] and len(train) == len(val) == 6


@pytest.mark.parametrize('kind', ['hfds', 'tar', 'torch/folder', 'sample'])
def test_a_part_of_any_dataset_that_can_be_counted_is_held_out(kind, tmp_path, folder, parquet):
    if kind == 'hfds':
        source = dict(dataset=f'hfds/{parquet}', input_key='img', target_key='fine_label')
    elif kind == 'tar':
        with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
            tar.add(folder / 'train', arcname='.')
        source = dict(data_dir=str(tmp_path))
    else:
        source = dict(dataset=kind, data_dir=str(folder)) if '/' in kind else {}
    train, val, _ = open_both(**source, val_fraction=0.25)
    whole = len(train) + len(val)
    assert whole == (1437 if kind == 'sample' else 41) and abs(len(val) - whole / 4) <= 3
    assert {val.read(i)[1] for i in range(len(val))} == set(train.targets.tolist())
    assert not {*train.keys()} & {*val.keys()}
    pixels = {train.read(i)[0].tobytes() for i in range(len(train))}
    assert kind == 'sample' or not pixels & {val.read(i)[0].tobytes() for i in range(len(val))}


def test_what_val_fraction_cannot_do_is_said(tmp_path, folder, parquet):
    grow(tmp_path, {'ant': 10, 'bee': 1})
    assert "class 'bee' has one image alone" in refused(data_dir=str(tmp_path), val_fraction=0.2)
    message = refused(data_dir=str(folder), val='validation', val_fraction=0.2)
    assert '--val-fraction 0.2 with --val-split validation' in message and 'remove one of the two' in message
    keys = dict(input_key='img', target_key='fine_label', train_num_samples=41, dataset_download=True)
    assert 'cannot be divided' in refused(f'hfids/{parquet}', val_fraction=0.2, **keys)


def run_of(tmp_path, data, name='run', *flags) -> list[str]:
    return [
        '--student', 'test_resnet', '--distill', 'none', '--data-dir', str(data),
        '--img-size', '32', '--epochs', '1', '--batch-size', '8', '--workers', '0', '--lr', '0.01',
        '--output', str(tmp_path / 'out'), '--experiment', name,
        *flags,
    ]  # fmt: skip


def test_a_run_writes_what_it_held_out_and_its_args_yaml_gives_it_again(tmp_path, capsys):
    data, out = grow(tmp_path / 'data', {'ant': 10, 'bee': 20}), tmp_path / 'out'
    assert main(run_of(tmp_path, data, 'run', '--val-fraction', '0.2')) == 0
    assert '6 of the same split held out' in capsys.readouterr().out
    names = (out / 'run/validation.txt').read_text().splitlines()
    assert len(names) == 6 and all((data / name).is_file() for name in names)
    args = yaml.safe_load((out / 'run/args.yaml').read_text())
    assert (args['train_split'], args['val_split'], args['val_fraction'], args['val_seed']) == ('.', None, 0.2, 42)
    assert main(['--config', str(out / 'run/args.yaml'), '--experiment', 'again']) == 0
    for file in ('validation.txt', 'facts.json', 'student/model.safetensors'):
        assert (out / 'run' / file).read_bytes() == (out / 'again' / file).read_bytes()
    # another part, or another file, is another run
    again = run_of(tmp_path, data, 'run', '--val-fraction', '0.2', '--resume', 'auto')
    assert main([*again, '--val-seed', '1']) == 1
    assert '--val-seed 42, not 1' in capsys.readouterr().err
    grow(data, {'bee': 21}, seed=1)
    assert main(again) == 1
    assert 'was started with training images 24' in capsys.readouterr().err


def test_a_teacher_cache_of_a_part_is_computed_again_from_the_same_part(tmp_path, trained_teacher, capsys):
    data, cache = grow(tmp_path / 'data', {'apple': 6, 'pear': 9, 'plum': 6}), tmp_path / 'cache'
    flags = run_of(tmp_path, data, 'run', '--val-fraction', '0.3', '--teacher', f'local-dir:{trained_teacher}')
    flags += ['--teacher-cache', str(cache), '--distill', 'kd', '--min-teacher-acc', '0']
    assert main(flags) == 0
    assert tools(['cache', 'verify', str(cache)]) == 0
    assert '14 rows, all whole; 14 recomputed' in capsys.readouterr().out
    (data / 'pear/new.png').write_bytes((data / 'plum/000.png').read_bytes())
    assert tools(['cache', 'verify', str(cache)]) == 1
    assert 'data or teacher are not those that it was filled from' in capsys.readouterr().err


def test_the_split_that_was_taken_is_in_args_yaml_and_printed(tmp_path, capsys):
    data = tmp_path / 'data'
    grow(data / 'Train', {'ant': 9, 'bee': 9}), grow(data / 'dev', {'ant': 2, 'bee': 2}, seed=1)
    assert main(run_of(tmp_path, data)) == 0
    said = capsys.readouterr().out
    assert 'Training split: Train' in said and 'Validation split: dev' in said
    args = yaml.safe_load((tmp_path / 'out/run/args.yaml').read_text())
    assert (args['train_split'], args['val_split']) == ('Train', 'dev')


def test_the_part_held_out_is_chosen_over_the_split_that_a_file_names(tmp_path):
    file = tmp_path / 'c.yaml'
    file.write_text('teacher: test_resnet\nstudent: test_resnet\ndata_dir: D\nval_split: test\n')
    config = resolve(parse_args(['--config', str(file), '--val-fraction', '0.1', '--seed', '7']))
    assert config.val_split is None and config.val_seed == 7
    with pytest.raises(UsageError, match='--val-fraction 0.1 with --val-split val'):
        resolve(parse_args(['--config', str(file), '--val-fraction', '0.1', '--val-split', 'val']))
    with pytest.raises(UsageError, match='--val-seed 1: needs --val-fraction'):
        resolve(parse_args(['--config', str(file), '--val-seed', '1']))


def test_all_runs_of_a_comparison_hold_the_same_images_out(tmp_path):
    flags = ['--teacher', 'a', '--student', 'b', '--val-fraction', '0.1']
    assert runs.same_held_out(parse_args(flags)) == ['--val-seed', '42']
    assert runs.same_held_out(parse_args([*flags, '--val-seed', '3'])) == []
    file = tmp_path / 'args.yaml'  # of a run, whose teacher has not seen these images
    file.write_text(to_yaml(resolve(parse_args([*flags, '--seed', '5']))))
    assert runs.same_held_out(parse_args(['--config', str(file)])) == ['--val-seed', '5']
    assert runs.same_held_out(parse_args(flags[:4])) == []


# ----------------------------------------------------------------------------------------------- which split is taken


@pytest.mark.parametrize(
    ('there', 'taken'),
    [
        (['validation', 'test'], 'validation'), (['val', 'dev', 'test'], 'val'), (['valid', 'test'], 'valid'),
        (['Val'], 'Val'), (['dev', 'test'], 'dev'), (['test'], 'test'), (['TEST', 'extra'], 'TEST'),
    ],
)  # fmt: skip
def test_validation_splits_are_tried_in_order_where_none_is_named(tmp_path, there, taken):
    for i, name in enumerate(['train', *there]):
        grow(tmp_path / name, {'ant': 2, 'bee': 2}, seed=i)
    train, val, said = open_both(data_dir=str(tmp_path))
    assert (train.split, val.split) == ('train', taken) and f'Validation split: {taken} (--val-split' in said


def test_the_splits_of_a_table_of_hfds_are_found_by_their_names(parquet):
    keys = dict(input_key='img', target_key='fine_label')
    train, val, said = open_both(f'hfds/{parquet}', **keys)
    assert (train.split, val.split, len(val)) == ('train', 'test', 20) and 'Validation split: test' in said
    keys |= dict(train_num_samples=41, val_num_samples=20, dataset_download=True)
    train, val, _ = open_both(f'hfids/{parquet}', **keys)
    assert (train.split, val.split) == ('train', 'test')


def test_tars_are_found_by_the_same_names(folder, tmp_path):
    for split, name in (('train', 'Train'), ('validation', 'dev')):
        with tarfile.open(tmp_path / f'{name}.tar', 'w') as tar:
            tar.add(folder / split, arcname='.')
    train, val, _ = open_both(data_dir=str(tmp_path))
    assert (train.split, val.split, len(train), len(val)) == ('Train', 'dev', 41, 20)


def test_a_dataset_without_a_validation_split_is_offered_a_part_of_the_training_images(tmp_path, parquet):
    grow(tmp_path / 'd/train', {'ant': 2, 'bee': 2}), grow(tmp_path / 'd/extra', {'ant': 2, 'bee': 2})
    message = refused(data_dir=str(tmp_path / 'd'))
    assert 'no validation split (there: extra, train)' in message and '--val-fraction 0.1' in message
    assert "--val-split 'val': no such folder" in refused(data_dir=str(tmp_path / 'd'), val='val')
    grow(tmp_path / 'e', {'ant': 2, 'bee': 2})
    message = refused(data_dir=str(tmp_path / 'e'))
    assert 'no folder train (there: ant, bee)' in message and '--val-fraction 0.1' in message
    shutil.copytree(tmp_path / 'd/extra', tmp_path / 'f/val')
    assert 'name the training split with --train-split' in refused(data_dir=str(tmp_path / 'f'), val_fraction=0.1)
    (tmp_path / 'g').mkdir()
    shutil.copy(parquet / 'train.parquet', tmp_path / 'g')
    message = refused(f'hfds/{tmp_path}/g', input_key='img', target_key='fine_label')
    assert 'no validation split (there: train)' in message and '--val-fraction 0.1' in message


def test_a_split_of_torchvision_that_is_not_there_is_not_the_test_images(tmp_path):
    raw = tmp_path / 'MNIST/raw'
    raw.mkdir(parents=True)
    for name, count in (('train', 30), ('t10k', 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.random.default_rng(count).integers(0, 255, (count, 28, 28), dtype=np.uint8)
        for kind, data in (('images-idx3', pixels), ('labels-idx1', labels)):
            head = bytes([0, 0, 8, data.ndim]) + b''.join(n.to_bytes(4, 'big') for n in data.shape)
            (raw / f'{name}-{kind}-ubyte').write_bytes(head + data.tobytes())
    train, val, _ = open_both('torch/mnist', data_dir=str(tmp_path))
    assert (len(train), len(val)) == (30, 20)
    train, val, _ = open_both('torch/mnist', data_dir=str(tmp_path), val_fraction=0.3)
    assert (len(train), len(val)) == (20, 10) and sorted(val.read(i)[1] for i in range(10)) == list(range(10))
    assert '--train-split trian: no such split' in refused('torch/mnist', train='trian', data_dir=str(tmp_path))


# ------------------------------------------------------------------------------------------ splits against each other


def rows(path, labels, kind='int64', images=None):
    """A Parquet file with an image and a label a row; None for a null."""
    import datasets

    rng = np.random.default_rng(len(labels))
    feature = datasets.ClassLabel(names=kind) if isinstance(kind, list) else datasets.Value(kind)
    columns = dict(image=images or [draw(rng, i) for i in range(len(labels))], label=labels)
    features = datasets.Features(image=datasets.Image(), label=feature)
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return f'hfds/{path.parent}'


def test_an_ordered_dataset_cut_in_two_is_refused(tmp_path):
    data = rows(tmp_path / 'train.parquet', sorted([0, 1, 2, 3, 4] * 8))
    message = refused(data, 'train[:80%]', 'train[80%:]')
    assert 'class 4 of it (8 of 8 images) has no image in --train-split train[:80%]' in message
    assert '--val-fraction 0.2' in message
    train, val, _ = open_both(data, val_fraction=0.2)
    assert np.bincount(train.targets).tolist() == [6] * 5 and np.bincount(val.targets).tolist() == [2] * 5


def test_a_class_of_the_validation_folder_alone_is_refused_under_a_class_map_too(tmp_path):
    (tmp_path / 'map.txt').write_text('ant\nbee\ncat\n')
    grow(tmp_path / 'train', {'ant': 2, 'bee': 2}), grow(tmp_path / 'val', {'ant': 2, 'cat': 2}, seed=1)
    message = refused(data_dir=str(tmp_path), class_map=str(tmp_path / 'map.txt'))
    assert "class 'cat' of it (2 of 4 images) has no image in --train-split train" in message


@pytest.mark.parametrize(
    ('labels', 'note'),
    [
        (
            range(1, 11),
            'Note: 1 of 11 classes has no training image: class 0; labels are class indices',
        ),
        (range(0, 901, 100), 'Note: 891 of 901 classes have no training image: classes 1, 2, 3, 4, 5, … (891 in all)'),
    ],
)
def test_labels_that_leave_classes_without_images_are_said(tmp_path, labels, note):
    for split in ('train', 'test'):
        data = rows(tmp_path / f'{split}.parquet', [*labels] * 2)
    train, _, said = open_both(data)
    assert note in said and train.num_classes == max(labels) + 1


def test_a_class_map_that_names_a_class_without_images_is_said(tmp_path):
    (tmp_path / 'map.txt').write_text('ant\nbee\nfig\n')
    grow(tmp_path / 'train', {'ant': 2, 'bee': 2}), grow(tmp_path / 'val', {'ant': 2, 'bee': 2}, seed=1)
    train, _, said = open_both(data_dir=str(tmp_path), class_map=str(tmp_path / 'map.txt'))
    assert "Note: 1 of 3 classes has no training image: class 'fig'" in said and train.num_classes == 3


def copied(root, how):
    grow(root / 'train', {'ant': 5, 'bee': 5})
    if how == 'symlink':
        (root / 'val').symlink_to(root / 'train')
    elif how == 'files':
        shutil.copytree(root / 'train', root / 'val')
    else:
        grow(root / 'val', {'ant': 3, 'bee': 2}, seed=1, size=13)
        shutil.copy(root / 'train/ant/002.png', root / 'val/ant/002.png')
        (root / 'val/bee/001.png').unlink()
        os.link(root / 'train/bee/001.png', root / 'val/bee/001.png')


@pytest.mark.parametrize(('how', 'count'), [('symlink', '10 of 10'), ('files', '10 of 10'), ('two of them', '2 of 5')])
def test_validation_images_that_are_training_images_are_counted(tmp_path, how, count):
    copied(tmp_path, how)
    *_, said = open_both(data_dir=str(tmp_path))
    assert f'Warning: --val-split val and --train-split train: {count} validation images are training images' in said
    assert 'train/' in said.split('is /')[1]


def test_the_same_split_and_slices_that_overlap_are_counted(tmp_path, folder):
    *_, said = open_both(train='train', val='train', data_dir=str(folder))
    assert '41 of 41 validation images are training images too' in said
    data = rows(tmp_path / 'train.parquet', [0, 1] * 20)
    *_, said = open_both(data, 'train[:80%]', 'train[70%:]')
    assert '4 of 12 validation images are training images too, rows of the same split' in said
    *_, said = open_both(data, 'train', 'train[80%:]')
    assert '8 of 8' in said
    assert 'Warning' not in open_both(data, 'train[:80%]', 'train[80%:]')[-1]


def test_other_images_of_the_same_names_and_sizes_are_no_reason_to_warn(tmp_path):
    for i, split in enumerate(('train', 'val')):
        rng = np.random.default_rng(i)
        for name in ('ant', 'bee'):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(5):
                draw(rng, 0).save(tmp_path / split / name / f'{k}.bmp')  # bitmaps of one size
    files = [str(p) for p in sorted((tmp_path / 'train').rglob('*.bmp'))]
    targets = [0] * 5 + [1] * 5
    train = of_files(files, targets, tmp_path)
    val = of_files([f.replace('train', 'val') for f in files], targets, tmp_path)
    assert overlap(train, val) == '' and '10 of 10' in overlap(train, train)


def of_files(files, targets, root):
    reader = SimpleNamespace(samples=list(zip(files, targets)), root=str(root))
    return Source(SimpleNamespace(reader=reader, __len__=lambda: len(files)), 'x', 2, None, False, 'RGB',
                  part=np.arange(len(files)))  # fmt: skip


def test_a_large_split_is_looked_at_in_a_sample_first(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_rld.data.overlap.LOOKED_AT', 4)
    copied(tmp_path, 'files')
    assert '10 of 10' in open_both(data_dir=str(tmp_path))[-1]
    looked = []
    monkeypatch.setattr('timm_rld.data.overlap._stat', lambda p: looked.append(p))
    open_both(data_dir=str(tmp_path))
    assert len(looked) == 4


# -------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ('labels', 'kind', 'left', 'classes'),
    [
        ([0.0, 1.0, 2.0] * 4, 'float64', 12, 3),
        ([0, 1, None, 2, -1, 1] * 2, 'int64', 8, 3),
        ([0.0, 1.0, None, float('nan'), -1.0, 2.0], 'float32', 3, 3),
        ([0, 1, -1, 1], ['ant', 'bee'], 3, 2),
        ([True, False, True, False], 'bool', 4, 2),
    ],
    ids=['floats', 'null and -1', 'nan', 'a class label', 'bool'],
)
def test_labels_that_are_whole_numbers_are_cast_and_those_that_are_missing_left_out(
    tmp_path, labels, kind, left, classes
):
    for split in ('train', 'test'):
        data = rows(tmp_path / f'{split}.parquet', labels, kind)
    missing = len(labels) - left
    if missing:
        message = refused(data)
        assert f'--train-split train: {missing} of {len(labels)} images have no label' in message
        assert '--drop-unlabeled leaves them out' in message
    train, val, said = open_both(data, drop_unlabeled=True)
    assert len(train) == len(val) == left and train.num_classes == classes
    assert said.count('--drop-unlabeled:') == (2 if missing else 0)
    read = [train.read(i)[1] for i in range(left)]
    assert read == train.targets.tolist() == [int(x) for x in labels if x is not None and x == x and x >= 0]
    train, val, _ = open_both(data, drop_unlabeled=True, val_fraction=0.3) if left > 4 else (train, val, '')
    assert all(x.targets.min() >= 0 for x in (train, val))


@pytest.mark.parametrize(
    ('labels', 'kind', 'message'),
    [
        ([0.0, 1.5], 'float64', 'expected class indices, found 1.5'),
        ([0, -2], 'int64', 'label -2 found'),
        ([None, -1], 'int64', 'no image has a label'),
        (['ant', 'bee'], 'string', "expected class indices, found 'ant'"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, kind, message):
    assert message in refused(rows(tmp_path / 'train.parquet', labels, kind), drop_unlabeled=True)


def test_a_class_map_and_missing_labels_go_together(tmp_path):
    (tmp_path / 'map.txt').write_text('bee\nant\n')
    for split in ('train', 'test'):
        data = rows(tmp_path / 'd' / f'{split}.parquet', ['ant', None, 'bee', 'ant'], 'string')
    assert '1 of 4 images have no label' in refused(data, class_map=str(tmp_path / 'map.txt'))
    train, _, _ = open_both(data, class_map=str(tmp_path / 'map.txt'), drop_unlabeled=True)
    assert train.targets.tolist() == [1, 0, 1] == [train.read(i)[1] for i in range(3)]


def test_a_stream_cannot_leave_images_out(parquet):
    keys = dict(input_key='img', target_key='fine_label', train_num_samples=41, dataset_download=True)
    assert '--drop-unlabeled: hfids/' in refused(f'hfids/{parquet}', drop_unlabeled=True, **keys)
