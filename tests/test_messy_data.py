"""Odd names, labels and lists: what a person is told, and that the way out that is named leads out."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import draw

from timm_rld.__main__ import main
from timm_rld.data import open_splits
from timm_rld.errors import SampleError, UserError

rng = np.random.default_rng(0)


@pytest.fixture
def folders(tmp_path):
    for split in ('train', 'validation'):
        for label, name in enumerate('ab'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                draw(rng, label).save(tmp_path / split / name / f'{i}.png')
    return tmp_path


def hub(path, labels, val=None):
    """A dataset of `hfds/` with whole numbers as labels."""
    import datasets

    path.mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))
    for split, column in (('train', labels), ('test', val)):
        if column is not None:
            rows = dict(image=[draw(rng, 0) for _ in column], label=column)
            datasets.Dataset.from_dict(rows, features=features).to_parquet(path / f'{split}.parquet')
    return f'hfds/{path}'


def refused(*args, **kwargs) -> str:
    with pytest.raises(UserError) as e:
        open_splits(*args, **kwargs)
    return str(e.value)


def test_a_list_that_the_check_wrote_leaves_out_names_with_line_breaks(folders, capsys):
    for name in ('a\nb.jpg', 'c\rd.jpg', 'e\u2028f.jpg', 'g\x85h.jpg'):
        (folders / 'train/a' / name).write_bytes(b'no image')
    listed = folders / 'skip.txt'
    assert main(['data', str(folders), '--write-skip-list', str(listed)]) == 1
    assert main(['data', str(folders), '--skip-list', str(listed)]) == 0
    assert 'train: 6 images' in capsys.readouterr().out


def test_a_skip_list_with_a_byte_order_mark_is_read(folders):
    (folders / 'skip.txt').write_text('\ufefftrain/a/0.png\r\n', encoding='utf-8')
    train, _ = open_splits(None, data_dir=str(folders), skip_list=str(folders / 'skip.txt'))
    assert len(train) == 5


def test_an_error_stays_in_its_line_whatever_the_name_of_the_file(folders):
    (folders / 'train/a/a\nb.jpg').write_bytes(b'')
    train, _ = open_splits(None, data_dir=str(folders))
    with pytest.raises(SampleError) as e:
        train.read(train.keys().index('a/a\nb.jpg'))
    assert '\n' not in str(e.value) and r'a\nb.jpg' in str(e.value) and str(e.value).endswith('an empty file')


def test_numbers_as_labels_are_classes_by_a_class_map_of_their_digits(tmp_path):
    data = hub(tmp_path / 'data', [100, 900, 0] * 4)
    (tmp_path / 'map.txt').write_text('0\n100\n900\n')
    train, _ = open_splits(data, class_map=str(tmp_path / 'map.txt'), val_fraction=0.2)
    assert train.class_names == ['0', '100', '900'] and sorted(set(train.targets.tolist())) == [0, 1, 2]
    assert [train.read(i)[1] for i in range(len(train))] == train.targets.tolist()


def test_identifiers_in_the_place_of_class_indices_are_refused(tmp_path):
    text = refused(hub(tmp_path / 'data', [10**12, 0] * 4), val_fraction=0.2)
    assert 'label 1000000000000 found' in text and '--class-map FILE' in text


def test_classes_that_the_validation_split_lacks_are_said(tmp_path):
    said: list[str] = []
    data = hub(tmp_path / 'data', [i // 10 for i in range(40)])
    open_splits(data, 'train[:80%]', 'train[80%:]', log=said.append)
    assert '3 of 4 classes have no image in --val-split train[80%:]' in said[-1] and '--val-fraction' in said[-1]


@pytest.mark.parametrize(('content', 'message'), [(b'\xff\xfea', 'not UTF-8'), (b'\xef\xbb\xbfa\nb', 'byte order')])
def test_a_class_map_in_another_encoding_is_refused_by_name(folders, content, message):
    (folders / 'map.txt').write_bytes(content)
    assert message in refused(None, data_dir=str(folders), class_map=str(folders / 'map.txt'))


def test_images_without_class_folders_are_counted_and_a_table_of_labels_is_offered(folders):
    text = refused(None, data_dir=str(folders / 'train/a'), val_fraction=0.2)
    assert '3 images, but no class folders' in text and '--labels FILE' in text
