"""From a file to pixels: every mode that Pillow reads, upright, the same through each way that images come."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from test_data import NORM, epoch_of

from timm_rld.bench.photographs import draw_photograph
from timm_rld.data import Loader, eval_transform, open_split, sources, train_transform
from timm_rld.data.images import decode, orientation
from timm_rld.data.replay import ReplayDataset
from timm_rld.errors import SampleError
from train_distill import main

ORIENTATION = 0x0112


def written(image: Image.Image, kind: str, **kwargs) -> Image.Image:
    """The image as it is read from a file."""
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return Image.open(io.BytesIO(file.getvalue()))


def grey16(dtype: str = '<u2') -> Image.Image:
    return Image.fromarray(np.array([[0, 128, 129, 32768], [257, 514, 65279, 65535]], dtype=dtype))


def with_alpha(mode: str) -> Image.Image:
    """Red in the upper half, and nothing in the lower, where black lies below."""
    image = Image.new('RGBA', (4, 4), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 2))
    return image if mode == 'RGBA' else image.convert(mode)


def palette(transparent: bool) -> Image.Image:
    image = Image.new('P', (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.paste(0, (0, 0, 4, 2))
    if transparent:
        image.info['transparency'] = 1
    return image


RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)
# An image whose upper and lower half have one colour each, and what is made of them.
HALVES = {
    'RGBA': (lambda: written(with_alpha('RGBA'), 'PNG'), RED, WHITE),
    'RGBA webp': (lambda: written(with_alpha('RGBA'), 'WEBP', lossless=True), RED, WHITE),
    'LA': (lambda: written(with_alpha('LA'), 'PNG'), (76,) * 3, WHITE),
    'palette': (lambda: written(palette(False), 'PNG'), RED, BLACK),
    'palette, one colour transparent': (lambda: written(palette(True), 'PNG'), RED, WHITE),
    'RGB, one colour transparent': (
        lambda: written(palette(False).convert('RGB'), 'PNG', transparency=BLACK), RED, WHITE),
    'gif, transparent': (lambda: written(palette(True), 'GIF', transparency=1), RED, WHITE),
    'gif, the first of two frames': (
        lambda: written(palette(False), 'GIF', save_all=True, append_images=[Image.new('P', (4, 4), 0)]), RED, BLACK),
    '1 bit': (lambda: written(Image.fromarray(np.arange(4)[:, None].repeat(4, 1) < 2), 'PNG'), WHITE, BLACK),
    'CMYK': (lambda: written(palette(False).convert('RGB').convert('CMYK'), 'TIFF'), RED, BLACK),
}  # fmt: skip


@pytest.mark.parametrize('name', HALVES)
def test_each_mode_becomes_the_colours_that_a_viewer_on_white_shows(name):
    make, upper, lower = HALVES[name]
    image = decode(make(), 'RGB')
    assert image.mode == 'RGB' and image.getpixel((1, 0)) == upper and image.getpixel((1, 3)) == lower
    grey = decode(make(), 'L')
    assert grey.mode == 'L' and grey.getpixel((1, 3)) == Image.new('RGB', (1, 1), lower).convert('L').getpixel((0, 0))


@pytest.mark.parametrize(('kind', 'dtype'), [('PNG', '<u2'), ('TIFF', '<u2'), ('TIFF', '>u2'), ('PPM', '<u2')])
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_16_bit_grey_is_scaled_to_8_and_not_cut(kind, dtype, mode):
    image = written(grey16(dtype), kind)
    assert image.mode.startswith('I')
    pixels = np.asarray(decode(image, mode))
    assert pixels.reshape(2, 4, -1)[..., 0].tolist() == [[0, 0, 1, 128], [1, 2, 254, 255]]


@pytest.mark.parametrize(('dtype', 'named'), [(np.int32, '32-bit'), (np.float32, 'floating-point')])
def test_grey_values_without_a_known_white_are_refused(dtype, named):
    image = written(Image.fromarray(np.array([[0, 1], [2, 3]], dtype=dtype)), 'TIFF')
    with pytest.raises(ValueError, match=f'{named} grey values, .* save it with 8 or 16 bits'):
        decode(image, 'RGB')


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_an_ordinary_image_is_not_copied(mode):
    image = written(Image.new(mode, (9, 5)), 'PNG')
    assert decode(image, mode) is image


# ------------------------------------------------------------------------------------------------------------- EXIF


def photograph(turn: int, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """A picture that lies in its file as a camera held that way stores it."""
    return draw_photograph(np.random.default_rng(turn), size)


def exif_of(turn: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    return exif.tobytes()


KINDS = [('JPEG', {}), ('PNG', {}), ('WEBP', dict(lossless=True)), ('TIFF', {})]
if features.check('avif'):
    KINDS.append(('AVIF', dict(quality=100)))


@pytest.mark.parametrize(('kind', 'how'), KINDS, ids=[kind for kind, _ in KINDS])
@pytest.mark.parametrize('turn', range(1, 9))
def test_images_are_turned_upright_once_and_left_as_they_are_where_asked(kind, how, turn):
    make = lambda: written(photograph(turn), kind, exif=exif_of(turn), **how)  # noqa: E731
    upright = ImageOps.exif_transpose(make()).convert('RGB')
    image = decode(make(), 'RGB')
    assert image.size == ((24, 40) if turn >= 5 else (40, 24)) and image.tobytes() == upright.tobytes()
    assert decode(image, 'RGB') is image  # a second time changes nothing
    as_stored = make()
    as_stored.load()  # which turns a TIFF
    assert decode(make(), 'RGB', exif=False).tobytes() == as_stored.convert('RGB').tobytes()


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
@pytest.mark.parametrize('exif', [b'Exif\0\0nonsense', exif_of(99), b'', exif_of(6)[:20]])
def test_an_image_whose_exif_data_are_damaged_is_taken_as_it_is_stored(exif):
    image = written(photograph(1), 'JPEG', exif=exif)
    assert orientation(image) == 1 and decode(image, 'RGB').size == (40, 24)


def test_turned_images_are_upright_in_each_kind_of_dataset(tmp_path):
    import datasets

    stored, upright = photograph(1), photograph(1).transpose(Image.Transpose.ROTATE_270)
    for split in ('train', 'validation'):
        for name in 'ab':
            (tmp_path / split / name).mkdir(parents=True)
            stored.save(tmp_path / split / name / 'x.PNG', exif=exif_of(6))
    paths = [tmp_path / 'train' / name / 'x.PNG' for name in 'ab']
    rows = [dict(bytes=path.read_bytes(), path=None) for path in paths]
    table = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b']))
    datasets.Dataset.from_dict(dict(image=rows, label=[0, 1]), features=table).to_parquet(tmp_path / 't.parquet')
    table_dir = tmp_path / 'table'
    table_dir.mkdir()
    (tmp_path / 't.parquet').rename(table_dir / 'train.parquet')
    ways = {
        'folder': open_split(None, 'train', flag='', data_dir=str(tmp_path)),
        'torch/folder': open_split('torch/folder', 'train', flag='', data_dir=str(tmp_path)),
        'hfds': open_split(f'hfds/{table_dir}', 'train', flag=''),
        'torchvision': sources.Source([(Image.open(paths[0]), 0)], 'train', 2, None, False, 'RGB'),
    }
    for name, source in ways.items():
        assert source.read(0)[0].tobytes() == upright.tobytes(), name
    as_stored = open_split(None, 'train', flag='', data_dir=str(tmp_path), no_exif=True)
    assert as_stored.read(0)[0].tobytes() == stored.tobytes()
    stream = open_split(f'hfids/{table_dir}', 'train', flag='', num_samples=2, dataset_download=True)
    center = eval_transform((3, 24, 24), interpolation='bilinear', crop_pct=1.0)
    (batch,) = epoch_of(Loader(stream, center, 2, training=False), 0)
    assert torch.equal(batch[0][0], center(upright))


@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize(
    'make',
    [
        lambda size, draft: train_transform((3, size, size), **NORM, jpeg_draft=draft),
        lambda size, draft: train_transform((3, size, size), **NORM, train_crop_mode='pad', jpeg_draft=draft),
        lambda size, draft: eval_transform((3, size, size), interpolation='bicubic', crop_pct=0.9, jpeg_draft=draft),
    ],
    ids=['rrc', 'pad', 'eval'],
)
def test_a_turned_jpeg_at_reduced_scale_is_cut_where_the_whole_one_is(tmp_path, turn, make):
    for name in 'ab':
        (tmp_path / 'train' / name).mkdir(parents=True)
        photograph(turn, (403, 301)).save(tmp_path / 'train' / name / 'x.jpg', quality=90, exif=exif_of(turn))
    for no_exif in (False, True):
        source = open_split(None, 'train', flag='', data_dir=str(tmp_path), no_exif=no_exif)
        keys = [(epoch, index) for epoch in (1, 2, 3) for index in (0, 1)]
        whole, reduced = (
            [view for view, *_ in ReplayDataset(source, make(32, draft), 7).__getitems__(keys)]
            for draft in (False, True)
        )
        difference = torch.stack([(a.float() - b.float()).abs() for a, b in zip(whole, reduced)])
        assert 0 < difference.mean() < 1 and difference.quantile(0.99) <= 5
        whole, same = (
            [view for view, *_ in ReplayDataset(source, make(200, draft), 7).__getitems__(keys[:2])]
            for draft in (False, True)
        )
        assert all(map(torch.equal, whole, same))  # nothing to reduce


def test_the_orientation_belongs_to_the_facts_of_a_run_and_of_a_cache(folder, trained_teacher, tmp_path, capsys):
    argv = ['--teacher', f'local-dir:{trained_teacher}', '--student', 'cifar_resnet8', '--data-dir', str(folder),
            '--img-size', '32', '--epochs', '1', '-b', '16', '--workers', '0', '--min-teacher-acc', '0', '--output',
            str(tmp_path), '--cpu-threads', '1', '--teacher-cache', str(tmp_path / 'cache')]  # fmt: skip
    assert main([*argv, '--experiment', 'run']) == 0
    assert main([*argv, '--experiment', 'run', '--resume', 'auto', '--no-exif']) == 1
    assert '--no-exif False, not True' in capsys.readouterr().err
    assert main([*argv, '--experiment', 'stored', '--no-exif']) == 1
    assert 'holds logits of something else: --no-exif False, not True' in capsys.readouterr().err
    facts = (tmp_path / 'run' / 'facts.json').read_text()
    assert 'rules of decoding images' in facts
    (tmp_path / 'run' / 'results.json').unlink()
    (tmp_path / 'run' / 'facts.json').write_text(facts.replace('decoding images": 2', 'decoding images": 1'))
    assert main([*argv, '--experiment', 'run', '--resume', 'auto']) == 1
    assert 'rules of decoding images 1, now 2' in capsys.readouterr().err


def test_a_stream_names_a_null_and_a_broken_image(tmp_path):
    import datasets

    file = io.BytesIO()
    photograph(1).save(file, 'PNG')
    table = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b']))
    for name, second, said in (
        ('null', None, "image 1 of the streamed split 'train', in .*: its 'image' is null"),
        ('broken', dict(bytes=b'broken', path=None), 'image 1 of .* cannot be read: it is no image'),
    ):
        rows = [dict(bytes=file.getvalue(), path=None), second]
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict(dict(image=rows, label=[0, 1]), features=table).to_parquet(
            tmp_path / name / 'train.parquet'
        )
        source = open_split(f'hfids/{tmp_path / name}', 'train', flag='', num_samples=2, dataset_download=True)
        center = eval_transform((3, 24, 24), interpolation='bilinear', crop_pct=1.0)
        with pytest.raises(SampleError, match=said):
            epoch_of(Loader(source, center, 2, training=False), 0)
