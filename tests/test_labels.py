"""Labels from a table: what is read, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from conftest import draw

from timm_rld.data import open_split, open_splits
from timm_rld.errors import UserError
from train_distill import main

NAMES = [f'pictures/{i:02}.png' for i in range(12)]
LABELS = ['ant', 'bee', 'cat'] * 4
SPLITS = ['train'] * 9 + ['val'] * 3


@pytest.fixture
def pictures(tmp_path):
    """Twelve images in one folder."""
    (tmp_path / 'pictures').mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate(NAMES):
        draw(rng, i % 3).save(tmp_path / name)
    return tmp_path


def write(folder, columns, delimiter=',', encoding='utf-8', name='labels.csv', head='', quote=''):
    lines = [delimiter.join(columns)]
    lines += [delimiter.join(f'{quote}{x}{quote}' for x in row) for row in zip(*columns.values())]
    (folder / name).write_text(head + '\n'.join(lines) + '\n', encoding=encoding)
    return str(folder / name)


def write_parquet(folder, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), folder / 'labels.parquet')
    return str(folder / 'labels.parquet')


def open_both(labels, **kwargs):
    lines = []
    return (*open_splits(None, labels=labels, log=lines.append, **kwargs), '\n'.join(lines))


def refused(labels, **kwargs) -> str:
    with pytest.raises(UserError) as e:
        open_splits(None, labels=labels, **kwargs)
    assert str(e.value).count('\n') == 0
    return str(e.value)


# ------------------------------------------------------------------------------------------------------- what is read

FORMS = {
    'comma': {}, 'semicolon': dict(delimiter=';'), 'tab': dict(delimiter='\t'), 'bar': dict(delimiter='|'),
    'after a comma a space': dict(delimiter=', '), 'in quotation marks': dict(quote='"'),
    'a byte order mark': dict(encoding='utf-8-sig'), 'UTF-16, as of Excel': dict(encoding='utf-16', delimiter='\t'),
    'sep=; as of Excel': dict(delimiter=';', head='sep=;\n'), '.tsv': dict(delimiter='\t', name='labels.tsv'),
}  # fmt: skip


@pytest.mark.parametrize('form', FORMS)
def test_a_csv_file_is_read_in_the_forms_that_programs_write(pictures, form):
    labels = write(pictures, {'path': NAMES, 'label': LABELS, 'split': SPLITS}, **FORMS[form])
    train, val, said = open_both(labels)
    assert (len(train), len(val), train.class_names) == (9, 3, ['ant', 'bee', 'cat'])
    assert (train.split, val.split) == ('train', 'val') and 'Validation split: val' in said
    assert train.read(4)[1] == 1 and train.key(4) == NAMES[4] and train.path(4) == pictures / NAMES[4]
    assert train.read(4)[0].size == (12, 12) and train.targets.tolist() == [0, 1, 2] * 3


def test_a_parquet_file_is_read(pictures):
    labels = write_parquet(pictures, {'index': list(range(12)), 'file_name': NAMES, 'class': LABELS, 'split': SPLITS})
    train, val, _ = open_both(labels)
    assert (len(train), len(val), train.class_names) == (9, 3, ['ant', 'bee', 'cat'])
    labels = write_parquet(pictures, {'file_name': NAMES, 'label': [float(i % 3) for i in range(11)] + [None]})
    train, val, said = open_both(labels, val_fraction=0.5, drop_unlabeled=True)
    assert len(train) + len(val) == 11 and train.num_classes == 3 and train.class_names is None
    assert '--drop-unlabeled: 1 image of train without a label left out, 11 are left' in said


@pytest.mark.parametrize(
    'columns', [('file', 'class'), ('Filename', 'Category'), ('image path', 'target'), ('img', 'y')]
)
def test_columns_are_found_by_usual_names_or_named(pictures, columns):
    labels = write(pictures, {'id': range(12), columns[0]: NAMES, columns[1]: LABELS})
    keys = {} if columns[1] != 'y' else dict(target_key='y')
    train, val, _ = open_both(labels, val_fraction=0.25, **keys)
    assert (len(train), len(val), train.class_names) == (9, 3, ['ant', 'bee', 'cat'])


@pytest.mark.parametrize(
    ('labels', 'kwargs', 'classes', 'names'),
    [
        (['2', '0', '1'], {}, [2, 0, 1], None),
        (['2.0', '0.0', '1.0'], {}, [2, 0, 1], None),
        (['c10', 'c9', 'c1'], {}, [2, 1, 0], ['c1', 'c9', 'c10']),
        (['010', '009', '9'], {}, [2, 0, 1], None),
        (['cat', 'ant', 'bee'], dict(class_map='bee ant cat dog'), [2, 1, 0], ['bee', 'ant', 'cat', 'dog']),
        (['2', '0', '1'], dict(class_map='bee ant cat dog'), [2, 0, 1], ['bee', 'ant', 'cat', 'dog']),
        (['7', '5', '6'], dict(class_map='5 6 7'), [2, 0, 1], ['5', '6', '7']),
        (['2', '0', '1'], dict(num_classes=5), [2, 0, 1], None),
    ],
)  # fmt: skip
def test_labels_are_numbers_or_text_in_natural_order_or_of_a_class_map(pictures, labels, kwargs, classes, names):
    kwargs = dict(kwargs)
    if 'class_map' in kwargs:
        (pictures / 'map.txt').write_text('\n'.join(kwargs['class_map'].split()))
        kwargs['class_map'] = str(pictures / 'map.txt')
    train, _, said = open_both(write(pictures, {'path': NAMES, 'label': labels * 4}), val_fraction=0.25, **kwargs)
    whole = open_split(None, 'train', flag='', labels=str(pictures / 'labels.csv'), **kwargs)
    if labels[0] != '010':
        assert whole.targets.tolist() == classes * 4 and whole.class_names == names
    else:  # names, not numbers: 009 and 9 are two
        assert whole.class_names is not None and whole.num_classes == 3
    assert ('no training image' in said) == (train.num_classes > 3)


def test_paths_are_relative_to_the_file_or_to_data_dir_or_absolute(pictures, tmp_path):
    (tmp_path / 'tables').mkdir()
    labels = write(tmp_path / 'tables', {'path': NAMES, 'label': LABELS})
    assert len(open_both(labels, val_fraction=0.25, data_dir=str(pictures))[0]) == 9
    backslashes = [f'.\\{name}'.replace('/', '\\') for name in NAMES]
    labels = write(tmp_path / 'tables', {'path': backslashes, 'label': LABELS})
    train, _, _ = open_both(labels, val_fraction=0.25, data_dir=str(pictures))
    assert train.key(0).startswith('pictures/')
    labels = write(tmp_path / 'tables', {'path': [str(pictures / name) for name in NAMES], 'label': LABELS})
    assert len(open_both(labels, val_fraction=0.25)[0]) == 9


def test_a_file_twice_with_one_label_counts_once_and_splits_that_share_a_file_are_said(pictures):
    labels = write(pictures, {'path': [*NAMES, *NAMES[:3]], 'label': [*LABELS, *LABELS[:3]]})
    train, val, said = open_both(labels, val_fraction=0.25)
    assert len(train) + len(val) == 12 and '3 rows that repeat a file' in said
    labels = write(pictures, {'path': [*NAMES, *NAMES[:3]], 'label': [*LABELS, *LABELS[:3]],
                              'split': ['train'] * 12 + ['val'] * 3})  # fmt: skip
    assert '3 of 3 validation images are training images too' in open_both(labels)[-1]


@pytest.mark.parametrize('spelling', ['train val', 'Train Validation', 'training dev', 'TRAIN TEST'])
def test_the_column_split_is_read_in_the_names_of_folders(pictures, spelling):
    first, second = spelling.split()
    columns = {'path': NAMES, 'label': LABELS, 'Split': [first] * 9 + [second] * 3}
    train, val, _ = open_both(write(pictures, columns))
    assert (train.split, val.split, len(train), len(val)) == (first, second, 9, 3)
    train, val, _ = open_both(write(pictures, columns), val_fraction=0.34)
    assert (len(train), len(val)) == (6, 3) and not {*val.keys()} & {*NAMES[9:]}  # the other split is not opened


def test_empty_labels_are_counted_and_left_out_where_asked_for(pictures):
    labels = write(pictures, {'path': NAMES, 'label': ['', *LABELS[1:]]})
    assert '1 of 12 images have no label' in refused(labels, val_fraction=0.3)
    train, val, _ = open_both(labels, val_fraction=0.3, drop_unlabeled=True)
    assert len(train) + len(val) == 11
    labels = write(
        pictures, {'path': NAMES, 'label': ['0', '1', '-1', 'NaN', '0', '1', 'None', '1', '0', '1', '0', '']}
    )
    assert '4 of 12 images have no label' in refused(labels, val_fraction=0.3)
    train, val, _ = open_both(labels, val_fraction=0.3, drop_unlabeled=True)
    assert len(train) + len(val) == 8 and train.num_classes == 2
    labels = write(pictures, {'path': NAMES, 'label': ['None', 'NA', 'x'] * 4})  # names
    assert open_both(labels, val_fraction=0.3)[0].num_classes == 3


# ----------------------------------------------------------------------------------------------------- what is refused

REFUSED = [
    ('a.png,ant\nb.png,bee\n', "no header: the first line is 'a.png,ant'; put path,label before it"),
    ('path\na.png\n', "one column only, 'path'"),
    ('path,name\na.png,ant\n', 'which column holds the labels? Name one with --target-key (columns: path, name)'),
    ('path,label,class\na,b,c\n', 'several columns may hold the labels? Name one with --target-key'),
    ('path,file,label\na,b,c\n', 'several columns may hold the paths? Name one with --input-key'),
    ('path,label,label\na,b,c\n', "the column 'label' is there twice"),
    ('', 'is empty'),
    ('path,label\n', 'holds no rows'),
    ('path,label\n\n', 'holds no rows'),
    ('path,label\na.png,ant,x\n', 'line 2 has 3 fields, the header 2'),
    ('path,label\npictures/00.png,"ant\n', 'is a quotation mark open?'),
    ('path,label\n,ant\n', "line 2 has no path in column 'path'"),
    ('path,label\nx/1.png,ant\n\ny/2.png,bee\n', "2 of 2 files are not in"),
    ('path,label\npictures/00,ant\npictures/01,bee\n', 'there is 00.png: do the paths lack their ending?'),
    ('path,label\npictures/00.png,ant\n\npictures/00.png,bee\n',
     "1 file has two labels: pictures/00.png is 'ant' in line 2 and 'bee' in line 4"),
    ('path,label\npictures/00.png,-2\npictures/01.png,0\n', "label -2 in column 'label'"),
    ('path,label,split\npictures/00.png,ant,train\npictures/01.png,bee,\n',
     "1 row has no split: 'pictures/01.png' (line 3)"),
    ('path,label,split\npictures/00.png,ant,fold1\npictures/01.png,bee,fold2\n', 'no row of split train (there: fold1'),
    ('path,label,split\npictures/00.png,ant,train\npictures/01.png,bee,train\n', 'no validation split (there: train)'),
    ('path,label\npictures/00.png,ant\npictures/01.png,bee\n', "no column 'split', so no validation split"),
    ('path,label\npictures/00.png,ant\npictures/01.png,ant\n', 'has 1 class; at least 2 are needed'),
]  # fmt: skip


@pytest.mark.parametrize(('text', 'message'), REFUSED)
def test_a_table_that_cannot_be_trusted_is_refused_in_a_line(pictures, text, message):
    (pictures / 'labels.csv').write_text(text)
    said = refused(str(pictures / 'labels.csv'))
    assert message in said and f'--labels {pictures}/labels.csv' in said


def test_files_that_are_no_tables_are_refused(pictures):
    assert 'no such file' in refused(str(pictures / 'nowhere.csv'))
    assert 'expected a .csv, .tsv or .parquet file' in refused(str(pictures / NAMES[0]))
    (pictures / 'x.csv').write_bytes((pictures / NAMES[0]).read_bytes())
    assert 'is not UTF-8' in refused(str(pictures / 'x.csv'))
    (pictures / 'x.csv').write_text('path,label\na\0b,c\n')
    assert 'holds bytes that are not text' in refused(str(pictures / 'x.csv'))
    (pictures / 'x.csv').write_text('path,label\na.png,rosé\n', encoding='latin-1')
    assert 'line 2 is not UTF-8; save it as "CSV UTF-8"' in refused(str(pictures / 'x.csv'))
    (pictures / 'x.parquet').write_text('path,label\n')
    assert 'cannot be read as Parquet' in refused(str(pictures / 'x.parquet'))
    labels = write_parquet(pictures, {'image': [{'bytes': b'x'}], 'label': [0]})
    assert '--dataset hfds/FOLDER' in refused(labels)
    labels = write(pictures, {'path': NAMES, 'label': LABELS})
    assert '--input-key img: no such column in --labels' in refused(labels, input_key='img')
    assert '--data-dir /nowhere: no such folder' in refused(labels, data_dir='/nowhere')
    assert '--val-split test: --labels' in refused(labels, val_split='test')
    (pictures / 'map.txt').write_text('ant\nbee\n')
    assert "no line for the label 'cat'" in refused(labels, class_map=str(pictures / 'map.txt'), val_fraction=0.1)
    with pytest.raises(UserError, match='--labels with --dataset hfds/x: name one of the two'):
        open_split('hfds/x', 'train', flag='', labels=labels)


# ------------------------------------------------------------------------------------------------------------ in a run


def run_of(tmp_path, *flags) -> list[str]:
    return [
        '--student', 'test_resnet', '--distill', 'none', '--img-size', '32', '--epochs', '1', '--batch-size', '4',
        '--workers', '0', '--lr', '0.01', '--output', str(tmp_path / 'out'), '--experiment', 'run', *flags,
    ]  # fmt: skip


def test_a_run_on_a_table_replays_and_notices_another_label(pictures, capsys):
    labels, out = write(pictures, {'path': NAMES, 'label': LABELS}), pictures / 'out'
    flags = run_of(pictures, '--labels', labels, '--val-fraction', '0.25')
    assert main(flags) == 0
    assert len((out / 'run/validation.txt').read_text().split()) == 3
    args = yaml.safe_load((out / 'run/args.yaml').read_text())
    assert (args['labels'], args['train_split'], args['val_split'], args['data_dir']) == (labels, 'train', None, None)
    assert main(['--config', str(out / 'run/args.yaml'), '--experiment', 'again']) == 0
    for file in ('facts.json', 'student/model.safetensors'):
        assert (out / 'run' / file).read_bytes() == (out / 'again' / file).read_bytes()
    write(pictures, {'path': NAMES, 'label': [*LABELS[:-1], 'ant']})
    capsys.readouterr()
    assert main([*flags, '--resume', 'auto']) == 1
    assert 'was started with files and labels (a digest)' in capsys.readouterr().err
