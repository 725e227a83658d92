"""The benchmarks run, and say what is wrong."""

from __future__ import annotations

import torch

from timm_rld.__main__ import main


def test_the_loss_benchmark_prints_a_row_for_each_criterion_and_shape(capsys):
    argv = ['bench', 'loss', '--no-compile', '--repeats', '1', '--shapes', '4x5', '--criteria', 'rld', 'dkd']
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert [f'| {n} |' in out for n in ('cross-entropy', 'kd', 'rld', 'dkd', 'la')] == [True] * 4 + [False]
    for wrong, message in ((['--shapes', '4'], 'BATCHxCLASSES'), (['--criteria', 'rdl'], "did you mean 'rld'")):
        assert main([*argv, *wrong]) != 0
        assert message in capsys.readouterr().err


def test_the_data_benchmark_prints_our_loader_beside_timms_and_what_limits(folder, capsys):
    argv = ['bench', 'data', '--img-size', '16', '--batch-size', '4', '--batches', '2', '--repeats', '1']
    argv += ['--workers', '0']
    assert main([*argv, '--photo', '40x30']) == 0
    out = capsys.readouterr().out
    assert 'No --data-dir: 8 synthetic JPEGs of 40×30.' in out and 'Where the time of a worker goes: decode' in out
    for loader in ('timm, prefetcher', 'timm, no prefetcher', 'timm_rld', 'timm_rld --jpeg-draft'):
        assert f'| {loader} |' in out
    assert main([*argv, '--data-dir', str(folder), '--batches', '20']) == 0  # more than the 41 images there are
    assert 'synthetic' not in capsys.readouterr().out
    for wrong, message in (
        (['--photo', '40'], 'WIDTHxHEIGHT'),
        (['--workers', '-1'], '--workers -1: must be at least 0'),
        (['--data-dir', '/nowhere'], '--data-dir /nowhere: no such folder'),
    ):
        assert main([*argv, *wrong]) != 0
        assert message in capsys.readouterr().err


def test_the_benchmark_of_loaders_measures_normalised_batches_of_the_same_size(folder):
    from timm_rld.bench.data import NORM, _Images, _ours, _timms
    from timm_rld.data import Loader, eval_transform, open_split

    images = _Images(open_split(None, 'train', flag='', data_dir=str(folder)).dataset, 8)
    theirs = [x for use in (True, False) for x in _timms(images, (3, 16, 16), 4, 0, use)()]
    assert [x.shape for x in theirs] == [(4, 3, 16, 16)] * 4 and all(x.is_floating_point() for x in theirs)
    source = open_split(None, 'train', flag='', data_dir=str(folder))
    loader = Loader(source, eval_transform((3, 12, 12), interpolation='bilinear', crop_pct=1.0), 4, training=False)
    pixels = next(iter(_ours(loader)()))
    raw = next(iter(loader))[0].double() / 255
    mean, std = (torch.tensor(NORM[k]).view(-1, 1, 1) for k in ('mean', 'std'))
    assert torch.allclose(pixels.double(), (raw - mean) / std, atol=1e-5)


def test_the_step_benchmark_sets_the_loop_beside_its_parts(capsys):
    argv = ['bench', 'step', '--teacher', 'test_resnet', '--student', 'test_vit', '--img-size', '32', '--batch-size',
            '4', '--rounds', '1', '--steps', '2', '--num-classes', '10', '20', '--no-loader']  # fmt: skip
    assert main(argv) == 0
    out = capsys.readouterr().out
    for part in ('(S) |', '| rld alone |', '(T) |', '| online step |', '| cached step |'):
        assert out.count(part) == 2, part
    assert 'online / (S + T): ' in out and 'cached / S: ' in out and 'teacher ' in out
    assert '10 classes' in out and '20 classes' in out
    for wrong in (['--rounds', '0'], ['--num-classes', '0'], ['--student', 'resnet81'], ['--distill', 'rdl']):
        assert main([*argv, *wrong]) != 0
        assert wrong[0] in capsys.readouterr().err


def test_the_cache_benchmark_prints_a_row_for_each_length(capsys):
    argv = ['bench', 'cache', '--rows', '50', '300', '--num-classes', '7', '--batch-size', '16']
    assert main(argv) == 0
    assert [f'| {n} |' in capsys.readouterr().out for n in (50,)] == [True]
    for wrong, message in ((['--rows', '3'], 'at least a batch'), (['--num-classes', '0'], 'at least 1')):
        assert main([*argv, *wrong]) == 2
        assert message in capsys.readouterr().err
