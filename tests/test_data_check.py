"""`timm-rld data`: what it finds, what it says, its exit code and its page."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from PIL import Image

from timm_rld.__main__ import main
from timm_rld.config import FIELDS, flag_of
from timm_rld.data import Source, check_data, open_split, open_splits, scan
from timm_rld.data.scan import difference_hash

PAIR = ('train', 'validation')


def picture(seed: int, size: tuple[int, int] = (60, 60)) -> Image.Image:
    """A smooth image unlike those of other seeds, as photographs are."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Folders of two classes: six training images and three validation images each."""
    root = tmp_path / 'photos'
    for s, (split, n) in enumerate((('train', 6), ('validation', 3))):
        for c, name in enumerate(('cat', 'dog')):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                picture(100 * s + 10 * c + i).save(root / split / name / f'{i}.jpg', quality=90)
    return root


def check(root: Path, **kwargs):
    splits = kwargs.pop('splits', {})
    return check_data(*open_splits(None, data_dir=str(root), **splits), **{'image_size': 32, **kwargs})


# ---------------------------------------------------------------------------------------------------------- findings


def test_a_dataset_without_faults_passes_and_its_counts_are_told(photos, capsys):
    assert main(['data', str(photos), '--img-size', '32']) == 0
    out = capsys.readouterr().out
    assert 'train: 12 images, 2 classes' in out and 'validation: 6 images' in out
    assert 'width 60 to 60' in out and 'JPEG 12; RGB 12' in out
    assert re.search(r'^cat +6 +3$', out, re.MULTILINE)
    assert not [name for name in ('broken', 'identical', 'look alike', 'small', 'large', 'imbalance') if name in out]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def many(root: Path) -> None:
    for i in range(60):
        picture(500 + i).save(root / 'train' / 'cat' / f'more{i}.jpg')


# what is done to the folder; the finding; whether it hurts; what its items say
FAULTS = {
    'a file that ends early': (lambda r: cut(r / 'train/cat/1.jpg'), 'broken', True, 'train/cat/1.jpg: '),
    'an empty file': (lambda r: (r / 'train/cat/1.jpg').write_bytes(b''), 'broken', True, 'train/cat/1.jpg: '),
    'text for an image': (lambda r: (r / 'validation/dog/0.jpg').write_text('x'),
        'broken', True, 'validation/dog/0.jpg: '),
    'one file in both splits': (lambda r: shutil.copy(r / 'train/cat/1.jpg', r / 'validation/cat/z.jpg'),
        'identical', True, 'validation/cat/z.jpg = train/cat/1.jpg'),
    'one file in two classes': (lambda r: shutil.copy(r / 'train/cat/1.jpg', r / 'train/dog/z.jpg'),
        'two classes', True, 'train/cat/1.jpg (cat) = train/dog/z.jpg (dog)'),
    'one file in two classes of two splits': (lambda r: shutil.copy(r / 'train/cat/1.jpg', r / 'validation/dog/z.jpg'),
        'two classes', True, 'train/cat/1.jpg (cat) = validation/dog/z.jpg (dog)'),
    'one file twice in a class': (lambda r: shutil.copy(r / 'train/cat/1.jpg', r / 'train/cat/z.jpg'),
        'repeated', False, 'train/cat/1.jpg = train/cat/z.jpg'),
    'the same image at another size': (lambda r: Image.open(r / 'train/cat/1.jpg').resize((45, 45)).save(
        r / 'validation/cat/z.png'), 'look alike', False, 'train/cat/1.jpg (cat) = validation/cat/z.png (cat)'),
    'a stray file': (lambda r: (r / 'train/cat/notes.txt').write_text('x'), 'left out', False, 'train/cat/notes.txt: '),
    'many more of a class': (many, 'imbalance', False, 'dog: 6 images'),
    'a tiny image': (lambda r: picture(7, (8, 30)).save(r / 'train/cat/z.png'),
        'small', False, 'train/cat/z.png: 8×30'),
    'a huge image': (lambda r: picture(7, (300, 260)).save(r / 'train/cat/z.jpg'), 'large', False, '300×260'),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_each_fault_is_found_named_and_decides_the_exit_code(fault, photos, capsys):
    plant, name, hurts, item = FAULTS[fault]
    plant(photos)
    found = check(photos).get(name)
    assert found is not None and found.hurts == hurts and any(item in x for x in found.items), found
    assert main(['data', str(photos), '--img-size', '32']) == (1 if hurts else 0)
    said = capsys.readouterr()
    assert f'\n{name}{"" if hurts else " (note)"}: ' in said.out and item in said.out
    assert bool(re.search(f'error: fix before training: .*{name}', said.err)) == hurts


def test_a_class_map_may_name_a_class_without_training_images(photos, tmp_path, capsys):
    (tmp_path / 'names.txt').write_text('cat\ndog\nemu\n')
    assert main(['data', str(photos), '--class-map', str(tmp_path / 'names.txt')]) == 1
    assert 'no training images: 1 class without a training image that can be read\n  emu\n' in capsys.readouterr().out


def test_a_class_whose_training_images_are_all_broken_has_none(photos):
    for path in (photos / 'train' / 'dog').iterdir():
        path.write_bytes(b'')
    found = check(photos).get('no training images')
    assert found.hurts and found.items == ['dog'] and 'though with 3 validation images' in found.text


def test_a_class_without_validation_images_is_a_note(photos, tmp_path, capsys):
    (tmp_path / 'names.txt').write_text('cat\ndog\n')
    shutil.rmtree(photos / 'validation' / 'dog')
    assert main(['data', str(photos), '--class-map', str(tmp_path / 'names.txt')]) == 0
    assert 'no validation images (note)' in capsys.readouterr().out


def test_flat_images_of_different_things_do_not_look_alike(photos):
    for i, path in enumerate(sorted(photos.rglob('*.jpg'))):
        Image.new('RGB', (60, 60), (10 * i, 255 - 10 * i, 128)).save(path)
    assert check(photos).get('look alike') is None
    assert difference_hash(Image.new('L', (60, 60), 9)) == 0 != difference_hash(picture(0))


def test_all_images_of_a_split_may_be_training_images(photos):
    shutil.rmtree(photos / 'validation')
    (photos / 'validation').symlink_to(photos / 'train')
    found = check(photos).get('identical')
    assert len(found) == 12 and found.text.startswith('all 12 validation images')


def test_the_terminal_names_ten_of_a_finding_and_counts_the_others(photos, capsys):
    for i in range(13):
        (photos / 'train' / 'cat' / f'bad{i:02}.jpg').write_bytes(b'')
    main(['data', str(photos)])
    out = capsys.readouterr().out
    assert 'broken: 13 images' in out and out.count('train/cat/bad') == 10 and '  and 3 more\n' in out


def test_a_name_that_would_move_the_cursor_is_escaped(photos, capsys):
    (photos / 'train' / 'cat' / 'a\x1b[2J.jpg').write_bytes(b'')
    main(['data', str(photos)])
    out = capsys.readouterr().out
    assert '\x1b' not in out and 'train/cat/a\\x1b[2J.jpg' in out


def test_findings_do_not_depend_on_the_threads(photos):
    faults = ('the same image at another size', 'one file in both splits', 'one file in two classes', 'a stray file')
    for name in faults:
        FAULTS[name][0](photos)
    cut(photos / 'validation' / 'dog' / '0.jpg')
    found = check(photos, threads=1).findings
    assert len(found) >= 5 and found == check(photos, threads=5).findings


def test_a_jpeg_at_a_lower_scale_is_as_broken_as_at_full_scale(photos, monkeypatch):
    data, path = io.BytesIO(), photos / 'train' / 'cat' / '0.jpg'
    picture(3, (640, 480)).save(data, 'JPEG', quality=90, progressive=True)
    whole = data.getvalue()
    for keep in [*range(100, len(whole), len(whole) // 25), len(whole) - 3, len(whole) - 2, len(whole)]:
        path.write_bytes(whole[:keep])
        train = open_split(None, 'train', flag='--train-split', data_dir=str(photos))
        try:
            train.read(0)
            reads = True
        except ValueError:
            reads = False
        monkeypatch.setattr(scan, '_CHUNK', 1)
        assert scan.read_all(train, 1, False)[0]['readable'][0] == reads, keep


# ------------------------------------------------------------------------------------------------------------ outputs


def test_the_list_of_broken_images_is_one_that_a_training_takes(photos, tmp_path, capsys):
    from train_distill import main as train

    cut(photos / 'train' / 'cat' / '1.jpg')
    (photos / 'validation' / 'dog' / '0.jpg').write_bytes(b'')
    skip = tmp_path / 'skip.txt'
    assert main(['data', str(photos), '--img-size', '32', '--write-skip-list', str(skip)]) == 1
    assert f'{skip}: 2 images to leave out' in capsys.readouterr().out
    assert main(['data', str(photos), '--img-size', '32', '--skip-list', str(skip)]) == 0
    argv = [
        '--teacher', 'cifar_resnet8', '--student', 'cifar_resnet8', '--data-dir', str(photos), '--img-size', '32',
        '--teacher-epochs', '1', '--epochs', '1', '--batch-size', '4', '--workers', '0', '--min-teacher-acc', '0',
        '--output', str(tmp_path), '--experiment', 'run',
    ]  # fmt: skip
    assert train(argv) == 1
    assert train([*argv, '--skip-list', str(skip)]) == 0


@pytest.mark.parametrize('held_out', [False, True], ids=['its own split', 'held out'])
def test_a_null_row_of_a_table_is_named_and_can_be_skipped(held_out, tmp_path, capsys):
    import datasets

    files = []
    for i in range(24):
        data = io.BytesIO()
        picture(i // 2 * 2 if i == 23 else i).save(data, 'PNG')
        files.append({'bytes': data.getvalue(), 'path': None})
    files[5] = None
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b']))
    table = datasets.Dataset.from_dict({'image': files, 'label': [i % 2 for i in range(24)]}, features=features)
    (tmp_path / 'data').mkdir()
    table.to_parquet(tmp_path / 'data' / 'train.parquet')
    table.select(range(23, 24)).to_parquet(tmp_path / 'data' / 'test.parquet')
    skip = str(tmp_path / 'skip.txt')
    argv = ['data', f'hfds/{tmp_path}/data', '--img-size', '32', *(['--val-fraction', '0.3'] if held_out else [])]
    assert main([*argv, '--write-skip-list', skip]) == 1
    out = capsys.readouterr().out
    assert re.search(r"\[5\]: row 5 of the column 'image' is null", out)
    assert Path(skip).read_text(encoding='utf-8') == 'train/5\n'
    assert re.search(r'two classes: 1 image', out)  # row 23 is row 22
    main([*argv, '--skip-list', skip])
    assert 'broken' not in capsys.readouterr().out


def test_labels_of_a_table_and_a_part_that_is_held_out_are_checked_too(photos, tmp_path):
    rows = [f'train/{name}/{i}.jpg,{name}' for name in ('cat', 'dog') for i in range(6)]
    (tmp_path / 'labels.csv').write_text('\n'.join(['path,label', *rows]))
    cut(photos / 'train' / 'cat' / '1.jpg')
    shutil.copy(photos / 'train/cat/2.jpg', photos / 'train/dog/3.jpg')
    findings = check(photos, splits=dict(labels=str(tmp_path / 'labels.csv'), val_fraction=0.3))
    assert [len(s) for s in findings.splits] == [8, 4] and findings.class_names == ['cat', 'dog']
    assert [f.name for f in findings.hurting if f.name != 'identical'] == ['broken', 'two classes']
    assert findings.broken == [str(photos / 'train' / 'cat' / '1.jpg')]


def test_a_tar_is_checked_as_its_folders_are(photos, tmp_path):
    cut(photos / 'train' / 'cat' / '1.jpg')
    shutil.copy(photos / 'train/cat/2.jpg', photos / 'validation/cat/z.jpg')
    (tmp_path / 'tars').mkdir()
    for split in PAIR:
        with tarfile.open(tmp_path / 'tars' / f'{split}.tar', 'w') as tar:
            tar.add(photos / split, '.')
    folders, tars = check(photos), check(tmp_path / 'tars')
    assert [(f.name, len(f)) for f in folders.findings] == [(f.name, len(f)) for f in tars.findings]
    assert tars.get('broken').items[0].startswith('train/cat/1.jpg: ')
    (tmp_path / 'skip.txt').write_text(tars.broken[0])
    assert check(tmp_path / 'tars', splits=dict(skip_list=str(tmp_path / 'skip.txt'))).get('broken') is None


class InMemory(list):
    """A dataset in torchvision's form."""

    targets = [0, 1, 0, 1]


def test_a_dataset_of_torchvision_is_compared_by_its_pixels():
    train = InMemory((picture(i % 3), i % 2) for i in range(4))  # 0 and 3 are equal
    source = Source(train, 'train', 2, ['a', 'b'], False, 'RGB')
    findings = check_data(source, image_size=32)
    assert findings.get('two classes').items == ['train[0] (a) = train[3] (b)']


@pytest.fixture
def shards(photos, tmp_path) -> Path:
    """The photographs in a shard for each split, one less than the validation split declares."""
    pytest.importorskip('webdataset')
    splits = {}
    for split in PAIR:
        paths = sorted((photos / split).rglob('*.jpg'))
        with tarfile.open(tmp_path / f'{split}-0.tar', 'w') as tar:
            for i, path in enumerate(paths):
                for name, data in ((f'{i}.jpg', path.read_bytes()), (f'{i}.cls', b'%d' % (path.parent.name == 'dog'))):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        count = len(paths) + (split == 'validation')
        splits[split] = dict(name=split, num_samples=count, filenames=[f'{split}-0.tar'], shard_lengths=[count])
    (tmp_path / '_info.json').write_text(json.dumps({'splits': splits}))
    return tmp_path


def test_a_stream_is_read_once_in_its_order(photos, shards, capsys):
    argv = ['data', 'wds/pets', '--data-dir', str(shards), '--num-classes', '2', '--img-size', '32']
    page = shards / 'page.html'
    assert main([*argv, '--report', str(page)]) == 1
    out = capsys.readouterr().out
    assert 'train: 12 images' in out and 'missing: ' in out and 'validation: 6 of 7' in out
    assert 'data:image/jpeg' not in page.read_text()


# ----------------------------------------------------------------------------------------------------------- the page


def test_the_page_escapes_names_and_asks_no_host(tmp_path):
    rng = np.random.default_rng(0)
    script = '<script>alert(1)<'
    for split in PAIR:
        for name in (script, 'b&"x"'):
            for i in range(3):
                path = tmp_path / 'd' / split / name / f'<img src=x onerror=alert({i})>.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(rng, i).save(path)
    (tmp_path / 'd' / 'train' / script / '<script>bad.png').write_bytes(b'')
    page = tmp_path / 'page.html'
    assert main(['data', str(tmp_path / 'd'), '--report', str(page)]) == 1
    html = page.read_text()
    assert '&lt;script&gt;alert(1)&lt;' in html and '&lt;script&gt;bad.png' in html
    assert '<script>alert' not in html and '<script>bad' not in html and '<img src=x' not in html
    assert 'default-src &#39;none&#39;' in html and not re.search(r'https?://|url\(|@import', html)
    assert set(re.findall(r'src="(data:image/jpeg;base64,|[^"]*)', html)) == {'data:image/jpeg;base64,'}
    assert html.count('<img ') == 2  # a mosaic of each class


def test_the_page_of_a_thousand_classes_stays_below_5_mb(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / 'd' / 'train'
    for c in range(1000):
        (root / f'class with a long name {c}').mkdir(parents=True)
        for i in range(2):  # noise: nothing is larger as a JPEG
            pixels = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            pixels.save(root / f'class with a long name {c}' / f'{i}.bmp')
    page = tmp_path / 'page.html'
    assert main(['data', str(tmp_path / 'd'), '--val-fraction', '0.5', '--report', str(page)]) == 0
    assert page.read_text().count('<img ') == 1000 and page.stat().st_size < 5e6


def test_without_jinja2_the_page_is_refused_before_the_work(photos, tmp_path, monkeypatch, capsys):
    from timm_rld.report import page

    page._environment.cache_clear()
    monkeypatch.setitem(__import__('sys').modules, 'jinja2', None)
    assert main(['data', str(photos), '--report', str(tmp_path / 'page.html')]) == 1
    said = capsys.readouterr()
    assert "pip install 'timm-rld[report]'" in said.err and 'train:' not in said.out
    monkeypatch.undo()


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ('argv', 'code', 'message'),
    [
        (['{tmp}/none'], 1, '--data-dir {tmp}/none: no such folder'),
        (['{tmp}/empty'], 1, '--data-dir {tmp}/empty'),
        (['{photos}', '--report', '{tmp}/none/page.html'], 1, 'there is no folder {tmp}/none'),
        (['{photos}', '--report', '{tmp}/empty'], 1, '--report {tmp}/empty: is a folder; name a file in it'),
        (['{photos}', '--write-skip-list', '{tmp}/none/x'], 1, 'there is no folder {tmp}/none'),
        (['{photos}', '--data-dir', '{photos}'], 2, '--data-dir {photos}: the folder is named already'),
        (['{photos}', '--img-size', '0'], 2, '--img-size: must be greater than 0'),
        (['{photos}', '--teacher', 'resnet18'], 2, 'unrecognized arguments: --teacher resnet18'),
        (['{photos}', '--val-split', 'other'], 1, "--val-split 'other': no such folder"),
        (['wds/x'], 1, '--dataset wds/x: needs --data-dir'),
        ([], 2, 'DIR_OR_DATASET'),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(argv, code, message, photos, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    names = dict(tmp=tmp_path, photos=photos)
    assert main(['data', *(word.format(**names) for word in argv)]) == code
    said = capsys.readouterr().err
    assert message.format(**names) in said and said.count('\n') <= 2


def test_a_dataset_without_labels_is_refused_in_a_line(tmp_path, capsys):
    for i in range(3):
        picture(i).save(tmp_path / f'{i}.jpg')
    assert main(['data', str(tmp_path)]) == 1
    assert capsys.readouterr().err.count('\n') <= 2


def test_every_setting_of_the_data_is_a_flag_of_the_check(photos, capsys):
    with pytest.raises(SystemExit):
        main(['data', '--help'])
    shown = capsys.readouterr().out
    of_data = [name for name, f in FIELDS.items() if {'open_splits', 'check_data'} & f.metadata['used_by'].keys()]
    assert {'val_split', 'class_map', 'img_size', 'labels', 'val_fraction', 'skip_list'} <= set(of_data)
    for name in of_data:
        assert bool(re.search(rf'^  {flag_of(name)}[ ,\n]', shown, re.MULTILINE)) == (name != 'dataset'), name
