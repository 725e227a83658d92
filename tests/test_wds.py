"""Shards of webdataset for real: written, read, trained on and resumed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image
from test_data import NORM, epoch_of

from timm_rld.data import Loader, eval_transform, open_split, train_transform
from timm_rld.errors import SampleError, UserError
from train_distill import main

webdataset = pytest.importorskip('webdataset')


def encoded(image: Image.Image, kind: str, **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


@pytest.fixture
def shards(tmp_path) -> Path:
    """Shards as webdataset writes them, four for training and two for validation, of images in several formats."""
    rng, root = np.random.default_rng(0), tmp_path / 'shards'
    root.mkdir()
    kinds = [('png', 'PNG'), ('jpg', 'JPEG'), ('webp', 'WEBP'), ('gif', 'GIF'), ('tiff', 'TIFF')]
    splits = {}
    for split, n, count in (('train', 4, 40), ('validation', 2, 20)):
        with webdataset.ShardWriter(str(root / f'{split}-%d.tar'), maxcount=count // n, verbose=0) as writer:
            for i in range(count):
                ending, kind = kinds[i % 5]
                writer.write({'__key__': f'{i:04}', ending: encoded(draw(rng, i % 3), kind), 'cls': i % 3})
        names = [f'{split}-{i}.tar' for i in range(n)]
        splits[split] = dict(name=split, num_samples=count, filenames=names, shard_lengths=[count // n] * n)
    (root / '_info.json').write_text(json.dumps({'splits': splits}))
    return root


@pytest.fixture
def argv(shards, tmp_path) -> list[str]:
    """A run of two epochs on the shards."""
    return ['--student', 'cifar_resnet8', '--distill', 'none', '--dataset', 'wds/fruit', '--data-dir', str(shards),
            '--num-classes', '3', '--img-size', '16', '--epochs', '2', '-b', '5', '--lr', '0.01', '--sched', 'constant',
            '--warmup-epochs', '0', '--cpu-threads', '1', '--output', str(tmp_path)]  # fmt: skip


def student(run: Path) -> bytes:
    return (run / 'student' / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('workers', ['0', '2'])
def test_shards_are_trained_on_and_a_run_on_them_repeats_and_resumes_to_the_same_bits(argv, tmp_path, workers):
    argv = [*argv, '--workers', workers]
    assert main([*argv, '--experiment', 'whole']) == 0
    assert main([*argv, '--experiment', 'parts', '--epochs', '1']) == 0
    (tmp_path / 'parts' / 'results.json').unlink()
    assert main([*argv, '--experiment', 'parts', '--resume', 'auto']) == 0
    assert student(tmp_path / 'parts') == student(tmp_path / 'whole')
    results = json.loads((tmp_path / 'whole' / 'results.json').read_text())
    assert results['num_classes'] == 3
    other = '2' if workers == '0' else '0'
    (tmp_path / 'whole' / 'results.json').unlink()
    assert main([*argv, '--experiment', 'whole', '--resume', 'auto', '--workers', other]) == 1  # other readers


@pytest.mark.slow
def test_two_processes_train_on_shards(fork_server, argv, tmp_path):
    argv = [*argv, '--workers', '1', '--epochs', '1', '--experiment', 'two']
    said = fork_server.run(argv, tmp_path / 'log', processes=2).output()
    assert 'student epoch 1/1' in said and student(tmp_path / 'two')
    assert len((tmp_path / 'two' / 'summary.csv').read_text().splitlines()) == 2


def test_images_of_shards_come_in_all_formats_upright_and_scaled(tmp_path):
    upright = draw(np.random.default_rng(0), 0, 24).crop((0, 0, 16, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    grey = Image.fromarray(np.full((24, 16), 32896, np.uint16))
    with webdataset.TarWriter(str(tmp_path / 'a.tar')) as writer:
        writer.write({'__key__': '0', 'png': encoded(stored, 'PNG', exif=exif), 'cls': 0})
        writer.write({'__key__': '1', 'webp': encoded(stored, 'WEBP', lossless=True, exif=exif.tobytes()), 'cls': 1})
        writer.write({'__key__': '2', 'TIFF': encoded(grey, 'TIFF'), 'cls': 1})
        writer.write({'__key__': '3', 'bmp': encoded(upright, 'BMP'), 'cls': 1})
    center = eval_transform((3, 16, 16), interpolation='bilinear', crop_pct=1.0)
    for no_exif, first in ((False, upright), (True, stored)):
        source = open_split('wds/x', 'a.tar|4', flag='--val-split', data_dir=str(tmp_path), num_classes=2,
                            no_exif=no_exif)  # fmt: skip
        ((pixels, target, _),) = epoch_of(Loader(source, center, 4, training=False), 0)
        assert target.tolist() == [0, 1, 1, 1]
        assert torch.equal(pixels[0], center(first)) and torch.equal(pixels[1], center(first))
        assert (pixels[2] == 128).all() and torch.equal(pixels[3], center(upright))


def test_a_broken_or_missing_image_in_a_shard_of_the_validation_is_missed_and_never_made_up_for(argv, shards, capsys):
    with webdataset.TarWriter(str(shards / 'validation-1.tar')) as writer:
        rng = np.random.default_rng(0)
        for i in range(10):
            image = {3: {'png': b'broken'}, 4: {}}.get(i, {'png': encoded(draw(rng, 0), 'PNG')})
            writer.write({'__key__': str(i), **image, 'cls': 0})
    assert main([*argv, '--workers', '0']) == 1
    assert '--val-split validation: 18 images were read, it declares 20' in capsys.readouterr().err


def test_images_of_a_stream_cannot_be_listed_and_grey_without_a_scale_is_named(tmp_path):
    image = Image.fromarray(np.full((9, 9), 0.5, np.float32))
    with webdataset.TarWriter(str(tmp_path / 'a.tar')) as writer:
        writer.write({'__key__': '0', 'tiff': encoded(image, 'TIFF'), 'cls': 0})
    where = dict(flag='--train-split', data_dir=str(tmp_path), num_classes=2)
    source = open_split('wds/x', 'a.tar|1', **where, is_training=True)
    stream = Loader(source, train_transform((3, 16, 16), **NORM), 1, training=True)
    with pytest.raises(SampleError, match="image 0 of the streamed split 'a.tar.1', .* floating-point grey values"):
        epoch_of(stream, 1)
    with pytest.raises(UserError, match='--skip-list x: the images of a streamed dataset have no names'):
        open_split('wds/x', 'a.tar|1', **where, skip_list='x')
