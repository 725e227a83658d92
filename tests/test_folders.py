"""What lies in people's folders: which files are images of which class, what is left out, and what is said of it."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from PIL import Image, features
from test_data import NORM

from timm_rld.data import first_look, open_splits, train_transform
from timm_rld.data.folders import IMAGE_TYPES, FolderReader, TarReader, natural, note_left_out
from timm_rld.data.look import look_at
from timm_rld.data.replay import ReplayDataset
from timm_rld.data.skip_list import skip_name
from timm_rld.errors import SampleError, UserError
from train_distill import main

DOCS = Path(__file__).parent.parent / 'docs' / 'your-data.md'
rng = np.random.default_rng(3)


@pytest.fixture
def mess(folder, tmp_path) -> Path:
    """A copy of `folder`, to be made a mess of."""
    return Path(shutil.copytree(folder, tmp_path / 'mess'))


def open_and_look(root: Path, on_bad_image: str = 'error', **kwargs):
    """Both splits, and what a run says of them at its start; or None and the error."""
    notes: list[str] = []
    try:
        train, val = open_splits(kwargs.pop('dataset', None), 'train', kwargs.pop('val', 'validation'),
                                 data_dir=root and str(root), **kwargs)  # fmt: skip
        first_look(train, val, on_bad_image, notes.append)
    except UserError as e:
        return None, str(e)
    return (train, val), '\n'.join(notes)


# --------------------------------------------------------------------------- the table of docs/your-data.md, row by row


def many_formats(root: Path) -> None:
    for i, kind in enumerate(['webp', 'bmp', 'tif', 'TIFF', 'gif', 'JPG', 'Jpeg', 'PNG', 'ppm', 'jfif']):
        draw(rng, 0).save(root / 'train/apple' / f'x{i}.{kind}', {'jfif': 'JPEG'}.get(kind))
    if features.check('avif'):
        draw(rng, 0).save(root / 'train/apple/x.avif')


def unread(root: Path) -> None:
    for name in ('a.heic', 'b.HEIC', 'c.svg', 'notes.txt', 'nothing'):
        (root / 'train/apple' / name).write_bytes(b'x')


def class_of_heic(root: Path) -> None:
    for split in ('train', 'validation'):
        (root / split / 'fig').mkdir()
        for i in range(4):
            (root / split / 'fig' / f'{i}.heic').write_bytes(b'x')


def junk(root: Path) -> None:
    one = next((root / 'train/apple').iterdir())
    for split in ('train', 'validation'):
        for name in ('.ipynb_checkpoints/1-checkpoint.png', '__MACOSX/apple/._1.png', 'apple/._1.png', '.hidden/1.png',
                     'apple/@eaDir/1.png', 'apple/.DS_Store', 'Thumbs.db', 'pear/desktop.ini'):  # fmt: skip
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(one, root / split / name)


def stray(root: Path) -> None:
    shutil.copy(next((root / 'train/apple').iterdir()), root / 'train/IMG_1.png')
    (root / 'train/labels.csv').write_text('x')


def empty(root: Path) -> None:
    for split in ('train', 'validation'):
        (root / split / 'fig').mkdir()
        (root / split / 'fig/.gitkeep').touch()


def no_classes(root: Path) -> None:
    for path in list((root / 'train').rglob('*.png')):
        path.rename(root / 'train' / path.name)
    for path in (root / 'train').iterdir():
        if path.is_dir():
            path.rmdir()


def nested(root: Path) -> None:
    for split in ('train', 'validation'):
        for group, name in (('round', 'apple'), ('round', 'plum'), ('other', 'pear')):
            (root / split / group).mkdir(exist_ok=True)
            (root / split / name).rename(root / split / group / name)


def same_name(root: Path) -> None:
    for name in ('apple', 'pear'):
        (root / 'train' / name / '2024').mkdir()
        for path in (root / 'train' / name).glob('*.png'):
            path.rename(path.parent / '2024' / path.name)


def inside(root: Path) -> None:
    (root / 'train/apple/more').mkdir()
    next((root / 'train/apple').glob('*.png')).rename(root / 'train/apple/more/x.png')


def grey16(root: Path) -> None:
    Image.fromarray(np.full((9, 9), 32768, np.uint16)).save(root / 'train/apple/x.png')


def floats(root: Path) -> None:
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(root / 'train/apple/x.tif')


def transparent(root: Path) -> None:
    Image.new('RGBA', (9, 9), (0, 0, 0, 0)).save(root / 'train/apple/x.png')


def turned(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (9, 5)).save(root / 'train/apple/x.jpg', exif=exif)


def broken(root: Path, split: str = 'train') -> None:
    (root / split / 'apple/broken.png').write_text('not an image')
    (root / split / 'apple/empty.jpg').touch()
    draw(rng, 0, 200).save(root / split / 'apple/short.jpg')
    whole = (root / split / 'apple/short.jpg').read_bytes()
    (root / split / 'apple/short.jpg').write_bytes(whole[: len(whole) // 2])
    (root / split / 'apple/huge.pgm').write_bytes(b'P5 40000 40000 255\n')


def link_above(root: Path) -> None:
    os.symlink(root / 'train', root / 'train/apple/again')


ALL_BROKEN = (
    'apple/broken.png (it is no image in a format that Pillow reads)', 'apple/empty.jpg (an empty file)',
    'apple/short.jpg (OSError: image file is truncated', 'apple/huge.pgm (Image size (1600000000 pixels) exceeds limit',
)  # fmt: skip
FIX = 'list them for --skip-list FILE'
# First cell of the row: what makes the mess, images of apples in training then (None: an error), what is said of it.
ROWS: dict[str, tuple[Callable[[Path], None], int | None, tuple[str, ...]]] = {
    'images in other formats than JPEG and PNG, endings in capitals': (
        many_formats, 24 + features.check('avif'), ()),
    'HEIC, SVG, raw or other files in a class folder': (unread, 14, (
        'train: left out: 2 .heic is not read: convert it to JPEG or PNG (apple/a.heic, apple/b.HEIC)',
        '1 .svg is not read', '1 not an image (apple/notes.txt)', '1 no ending that names a format (apple/nothing)')),
    'a class folder of HEIC alone': (class_of_heic, None, (
        "no image of the class 'fig' is of a format that is read: 4 .heic; convert them",)),
    '`.ipynb_checkpoints`, `._x.jpg`, `.DS_Store`, `Thumbs.db`, `__MACOSX`, …': (junk, 14, ()),
    'an image or another file beside the class folders': (stray, 14, (
        'train: left out: 2 beside the class folders (IMG_1.png, labels.csv)',)),
    'an empty class folder': (empty, 14, (
        'train: left out: 1 an empty folder (fig)', 'validation: left out: 1 an empty folder (fig)')),
    'images, but no class folders': (no_classes, None, ('train: 41 images, but no class folders; put the images of',)),
    'class folders in folders (`fruit/apple`, `fruit/pear`)': (nested, 14, ()),
    'two class folders of one name (`apple/2024`, `pear/2024`)': (same_name, None, (
        "apple/2024 and pear/2024 would be one class, '2024'", '--dataset torch/folder')),
    'images in a class folder and in a folder in it': (inside, None, (
        'apple holds images, and so does apple/more in it: one class or two?', '--dataset torch/folder')),
    '16-bit grey': (grey16, 15, ()),
    '32-bit or floating-point grey': (floats, None, ('apple/x.tif (floating-point grey values', FIX)),
    'transparency, palettes, CMYK, 1 bit': (transparent, 15, ()),
    'photographs that lie on their side (EXIF orientation)': (turned, 15, ()),
    'broken, empty, truncated or huge images': (broken, None, (
        '--train-split train: 4 of 45 images looked at cannot be read: ', *ALL_BROKEN, FIX, '--on-bad-image skip')),
    'the same in the validation split': (lambda root: broken(root, 'validation'), None, (
        '--val-split validation: 4 of 24 images looked at cannot be read: ', *ALL_BROKEN, FIX)),
    'a link to a folder that it lies in': (link_above, 14, (
        'train: left out: 1 a link to a folder that it lies in (apple/again)',)),
}  # fmt: skip


@pytest.mark.parametrize('row', ROWS)
def test_each_row_of_the_table_of_messy_data_is_what_happens(mess, row):
    make, apples, said = ROWS[row]
    make(mess)
    splits, text = open_and_look(mess)
    assert all(part in text for part in said), text
    assert bool(splits) == (apples is not None) and bool(text) == bool(said), text
    if splits:
        assert splits[0].class_names == ['apple', 'pear', 'plum']
        targets = [splits[0].read(i)[1] for i in range(len(splits[0]))]
        assert targets.count(0) == apples


def test_the_table_of_messy_data_has_these_rows():
    table = DOCS.read_text(encoding='utf-8').partition('## Messy data')[2]
    cells = [line.split('|')[1].strip() for line in table.splitlines() if line.startswith('|')]
    assert not set(ROWS) - set(cells)
    assert 'a null in the image column of `hfds/`, `hfids/`' in cells  # test_images.py, and below


# ------------------------------------------------------------------------------------------------------------- classes


def test_the_classes_and_their_order_are_timms(tmp_path):
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    for name in ('10', '9', 'b2', 'B10', 'a', 'ä', '2b'):
        for i in (1, 10, 2):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new('L', (2, 2)).save(tmp_path / name / f'{i}.png')
    ours, theirs = FolderReader(str(tmp_path)), ReaderImageFolder(str(tmp_path))
    assert ours.class_to_idx == theirs.class_to_idx and ours.samples == theirs.samples
    for i in range(len(ours)):
        for how in (dict(), dict(absolute=True), dict(basename=True)):
            assert ours.filename(i, **how) == theirs.filename(i, **how)
    assert ours.filenames() == theirs.filenames()


def test_names_that_differ_in_capitals_alone_have_one_order(tmp_path):
    for name in ('b', 'A', 'a', 'B'):
        (tmp_path / name).mkdir()
        Image.new('L', (2, 2)).save(tmp_path / name / '1.png')
    assert list(FolderReader(str(tmp_path)).class_to_idx) == ['A', 'a', 'B', 'b']
    assert natural('x²9') == ['x²', 9, '']  # where timm's own order has no number for ²


def test_the_first_level_is_torchvisions_and_what_lies_below_belongs_to_it(mess):
    from torchvision.datasets import ImageFolder

    inside(mess)
    same_name(mess)
    ours = FolderReader(str(mess / 'train'), first_level=True)
    theirs = ImageFolder(str(mess / 'train'))
    assert ours.samples == theirs.samples and ours.class_to_idx == theirs.class_to_idx
    splits, text = open_and_look(mess, dataset='torch/folder')
    assert len(splits[0]) == 41 and not text


def test_a_class_map_that_lacks_a_class_is_not_taken_for_a_class_without_images(mess, tmp_path):
    (tmp_path / 'map.txt').write_text('apple\npear\n')
    for dataset in (None, 'torch/folder'):
        text = open_and_look(mess, dataset=dataset, class_map=str(tmp_path / 'map.txt'))[1]
        assert "--class-map: no line for the class 'plum'" in text
    (tmp_path / 'map.txt').write_text('plum\npear\napple\nfig\n')
    class_of_heic(mess)
    text = open_and_look(mess, class_map=str(tmp_path / 'map.txt'))[1]
    assert "no image of the class 'fig' is of a format that is read" in text and '--class-map' not in text


def test_a_folder_that_may_not_be_read_is_an_error_and_not_a_missing_class(mess, monkeypatch):
    scan = os.scandir

    def guarded(path):
        if str(path).endswith('pear'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scan(path)

    monkeypatch.setattr(os, 'scandir', guarded)
    with pytest.raises(UserError, match='train/pear: cannot be read .Permission denied'):
        FolderReader(str(mess / 'train'))


def test_the_note_of_what_is_left_out_counts_all_and_names_the_first():
    text = note_left_out([(f'{i}.txt', 'not an image') for i in range(9)] + [('x', 'an empty folder')])
    assert text == '9 not an image (0.txt, 1.txt, 2.txt, …); 1 an empty folder (x)' and note_left_out([]) == ''


# ---------------------------------------------------------------------------------------------------------------- tars


def tarred(root: Path, to: Path) -> Path:
    to.mkdir()
    for split in ('train', 'validation'):
        with tarfile.open(to / f'{split}.tar', 'w') as tar:
            tar.add(root / split, arcname='.')
    return to


@pytest.mark.parametrize('row', [row for row in ROWS if 'link' not in row and row != 'an empty class folder'])
def test_tars_follow_the_rules_of_folders(mess, tmp_path, row):
    make, apples, said = ROWS[row]
    make(mess)
    splits, text = open_and_look(tarred(mess, tmp_path / 'tars'))
    assert all(part in text for part in said if 'train: 41' not in part), text
    assert bool(splits) == (apples is not None) and bool(text) == bool(said), text
    if splits:
        assert [splits[0].read(i)[1] for i in range(len(splits[0]))].count(0) == apples


def test_a_tar_is_read_as_timm_does_also_of_tars_in_it(folder, tmp_path):
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    plain, inner = tmp_path / 'plain.tar', tmp_path / 'inner.tar'
    with tarfile.open(plain, 'w') as tar:
        tar.add(folder / 'train', arcname='train')
    with tarfile.open(inner, 'w') as tar:
        for name in ('pear', 'apple', 'plum'):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode='w') as child:
                for path in (folder / 'train' / name).iterdir():
                    child.add(path, arcname=path.name)
            member = tarfile.TarInfo(f'{name}.tar')
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    for path in (plain, inner):
        ours, theirs = TarReader(str(path)), ReaderImageInTar(str(path))
        assert ours.class_to_idx == theirs.class_name_to_idx and len(ours) == len(theirs) == 41
        for i in range(41):
            (a, x), (b, y) = ours[i], theirs[i]
            assert a.read() == b.read() and x == y
    assert ours.filename(0) == 'apple/000.png' and ours.filename(0, absolute=True) == f'{inner}/apple/000.png'


def test_a_tar_that_is_cut_off_or_none_is_named(folder, tmp_path):
    tars = tarred(folder, tmp_path / 'tars')
    content = (tars / 'train.tar').read_bytes()
    reader = TarReader(str(tars / 'train.tar'))
    (tars / 'train.tar').write_bytes(content[:2000])
    text = open_and_look(tars)[1]
    assert f'--data-dir {tars}/train.tar: cannot be read (damaged or cut off at byte ' in text
    with pytest.raises(OSError, match='the tar ends within it'):
        reader[40]
    (tars / 'train.tar').write_bytes(b'not a tar' * 99)
    assert f'--data-dir {tars}/train.tar: cannot be read' in open_and_look(tars)[1]


# ------------------------------------------------------------------------------------------- a look before the training


def test_bad_training_images_are_noted_where_others_take_their_place_but_never_those_of_the_validation(mess):
    broken(mess)
    splits, text = open_and_look(mess, on_bad_image='skip')
    assert splits and text.endswith('--on-bad-image skip: others take their place') and 'apple/empty.jpg' in text
    broken(mess, 'validation')
    splits, text = open_and_look(mess, on_bad_image='skip')
    assert splits is None and text.startswith('--val-split validation: 4 of 24 images looked at cannot be read')


def test_a_whole_image_with_something_after_its_end_is_not_taken_for_a_broken_one(mess):
    for name in ('x.jpg', 'y.png'):
        path = mess / 'train/apple' / name
        draw(rng, 0).save(path)
        path.write_bytes(path.read_bytes() + b'a trailer of the camera' * 9)
    assert open_and_look(mess)[1] == ''


def test_so_many_images_are_looked_at_and_evenly_spread(mess):
    (train, _), _ = open_and_look(mess)
    broken_ones = [Path(train.path(i)) for i in (0, 20, 40)]
    for path in broken_ones:
        path.write_bytes(b'')
    bad, count = look_at(train, 3)
    assert count == 3 and [name for name, _ in bad] == [str(path) for path in broken_ones]


def test_a_null_row_is_found_wherever_it_is(tmp_path, monkeypatch):
    import datasets

    table = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b']))
    images = [draw(rng, 0) for _ in range(9)]
    images[7] = None
    for split in ('train', 'validation'):
        rows = datasets.Dataset.from_dict(dict(image=images, label=[0, 1] * 4 + [0]), features=table)
        rows.to_parquet(tmp_path / f'{split}.parquet')
    monkeypatch.setattr(look_at, '__defaults__', (2,))
    splits, text = open_and_look(None, dataset=f'hfds/{tmp_path}')
    assert splits is None and "train/7 (row 7 of the column 'image' is null)" in text and FIX in text
    (tmp_path / 'skip.txt').write_text('train/7\nvalidation/7\n')
    (train, val), text = open_and_look(None, dataset=f'hfds/{tmp_path}', skip_list=str(tmp_path / 'skip.txt'))
    assert len(train) == len(val) == 8 and train.read(7)[1] == 0
    assert 'train: left out: 1 in the --skip-list (7)' in text


# ----------------------------------------------------------------------------------------------------------- skip lists


def test_a_skip_list_leaves_images_out_of_both_splits_and_the_digest_tells(mess, tmp_path):
    (train, val), _ = open_and_look(mess)
    broken(mess)
    (mess / 'validation/apple/000.png').write_bytes(b'')
    listed = tmp_path / 'skip.txt'
    names = [f'train/apple/{name}' for name in ('broken.png', './empty.jpg', 'huge.pgm')]
    names += [str(mess / 'train/apple/short.jpg'), 'validation/apple/000.png', '', 'train/apple/gone.png']
    listed.write_text('\n'.join(names))
    (kept, kept_val), text = open_and_look(mess, skip_list=str(listed))
    assert len(kept) == 41 and len(kept_val) == 19 and kept_val.class_names == val.class_names
    assert kept.digest() == train.digest() != kept_val.digest() != val.digest()
    assert 'train: left out: 4 in the --skip-list (apple/broken.png, ' in text
    assert '--skip-list: 1 of its lines name no image of either split: train/apple/gone.png' in text
    assert ('apple/000.png', 'in the --skip-list') in kept_val.left_out
    assert skip_name(kept_val, 0, str(mess)) == 'validation/apple/003.png'
    in_tars, _ = open_and_look(tarred(mess, tmp_path / 'tars'))
    assert in_tars is None
    listed.write_text('\n'.join(f'train.tar/apple/{n}' for n in ('broken.png', 'empty.jpg', 'huge.pgm', 'short.jpg')))
    with listed.open('a') as f:
        f.write('\nvalidation.tar/apple/000.png\n')
    (kept, kept_val), _ = open_and_look(tmp_path / 'tars', skip_list=str(listed))
    assert len(kept) == 41 and len(kept_val) == 19


def test_skip_lists_that_cannot_be_used_are_refused(mess, parquet, tmp_path):
    assert open_and_look(mess, skip_list='/nowhere')[1] == (
        '--skip-list /nowhere: cannot be read (No such file or directory)'
    )
    listed = tmp_path / 'skip.txt'
    listed.write_text('\n'.join(str(p) for p in (mess / 'train').rglob('*.png')))
    assert "names every image of the split 'train'" in open_and_look(mess, skip_list=str(listed))[1]
    keys = dict(input_key='img', target_key='fine_label', train_num_samples=41, val_num_samples=20)
    stream = dict(dataset=f'hfids/{parquet}', val='test', dataset_download=True, skip_list=str(listed), **keys)
    assert 'the images of a streamed dataset have no names' in open_and_look(None, **stream)[1]


def test_an_image_that_breaks_later_is_named_with_the_way_out(mess):
    (train, _), _ = open_and_look(mess)
    Path(train.path(3)).write_bytes(b'')
    with pytest.raises(SampleError, match='cannot be read: .*; a line in a --skip-list FILE leaves it out'):
        ReplayDataset(train, train_transform((3, 16, 16), **NORM), 1)[(1, 3)]


# ----------------------------------------------------------------------------------------------------- a run to its end


def test_a_folder_of_phone_pictures_trains_to_its_end_with_what_a_person_needs_to_know(mess, tiny, tmp_path, capsys):
    for make in (many_formats, unread, junk, stray, transparent, turned, broken):
        make(mess)
    (mess / 'train/apple/short.jpg').rename(mess / 'validation/apple/short.jpg')
    argv = [*tiny, '--data-dir', str(mess), '--student', 'cifar_resnet8', '--teacher', 'cifar_resnet8', '--epochs', '1']
    assert main(argv) == 1
    said = capsys.readouterr()
    assert 'train: left out: ' in said.out and 'IMG_1.png' in said.out and 'apple/a.heic' in said.out
    assert '--train-split train: 3 of 57 images looked at cannot be read' in said.err and '--skip-list' in said.err
    bad = [mess / 'train/apple' / name for name in ('broken.png', 'empty.jpg', 'huge.pgm')]
    (tmp_path / 'skip.txt').write_text('\n'.join(map(str, [*bad, mess / 'validation/apple/short.jpg'])))
    argv += ['--skip-list', str(tmp_path / 'skip.txt')]
    assert main(argv) == 0
    assert '3 in the --skip-list' in capsys.readouterr().out
    assert (tmp_path / 'run/student/model.safetensors').exists()
    (tmp_path / 'skip.txt').write_text('\n'.join(map(str, [*bad, mess / 'validation/apple/short.jpg'])) + '\n' + str(
        mess / 'train/apple/x.jpg'))  # fmt: skip
    (tmp_path / 'run/results.json').unlink()
    assert main([*argv, '--resume', 'auto']) == 1
    assert 'was started with training images 54, now 53' in capsys.readouterr().err


def test_all_formats_of_the_list_have_a_reader_in_pillow():
    known = Image.registered_extensions()
    assert all(ending in known for ending in IMAGE_TYPES if ending != '.avif' or features.check('avif'))
