"""Data: sources and their errors, replay, transforms, mixing."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from timm_rld.data import (
    Loader,
    MixedTarget,
    Mixup,
    eval_transform,
    open_split,
    open_splits,
    sources,
    train_transform,
)
from timm_rld.data.replay import SAMPLE, ReplayDataset, seeded
from timm_rld.data.sampler import ReplaySampler
from timm_rld.data.transforms import DraftTransform, ErasePixels, to_tensor
from timm_rld.errors import SampleError, UserError

NORM = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))


def loader(folder, workers=0, seed=1, batch_size=8, **kwargs) -> Loader:
    source = open_split(None, 'train', flag='--train-split', data_dir=str(folder))
    transform = train_transform((3, 16, 16), **NORM, color_jitter=0.4, aa='rand-m9-mstd0.5', reprob=0.5)
    return Loader(source, transform, batch_size, training=True, seed=seed, workers=workers, **kwargs)


def epoch_of(loader: Loader, epoch: int, start: int = 0) -> list[tuple[torch.Tensor, ...]]:
    loader.set_epoch(epoch, start)
    return [tuple(x.clone() for x in batch) for batch in loader]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))


# ----------------------------------------------------------------------------------------------------------- replay


def test_the_same_epochs_come_with_and_without_workers_and_persistent_workers_hear_of_the_epoch(folder):
    plain, two = loader(folder), loader(folder, workers=2)
    first, second = epoch_of(plain, 1), epoch_of(plain, 2)
    assert same(epoch_of(two, 1), first)
    assert same(epoch_of(two, 2), second)
    assert same(epoch_of(two, 1), first)
    assert not same(first, second)


def test_an_epoch_can_be_entered_at_any_batch(folder):
    whole = epoch_of(loader(folder), 3)
    assert same(epoch_of(loader(folder), 3, start=4), whole[4:])


def test_order_and_augmentation_change_with_epoch_and_seed(folder):
    indices = lambda batches: torch.cat([b[2] for b in batches]).tolist()  # noqa: E731
    a, b, c = epoch_of(loader(folder), 1), epoch_of(loader(folder), 2), epoch_of(loader(folder, seed=2), 1)
    assert indices(a) != indices(b) != indices(c) != indices(a)
    assert sorted(indices(a)) == sorted(indices(b)) == list(range(41))
    view = lambda batches, i: torch.cat([x[0] for x in batches])[indices(batches).index(i)]  # noqa: E731
    assert not torch.equal(view(a, 5), view(b, 5)) and not torch.equal(view(a, 5), view(c, 5))


def test_a_sample_leaves_the_generators_of_the_process_as_they_were(folder):
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    batches = loader(folder)
    batches.set_epoch(1)
    next(iter(batches.loader.dataset[(1, 0)]))
    assert random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])
    batches.dataset.__getitems__([(1, 0), (1, 1)])
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[2])
    with seeded(1, 2, 3):
        a = random.random(), np.random.rand(), torch.rand(1).item()
    with seeded(1, 2, 3):
        assert a == (random.random(), np.random.rand(), torch.rand(1).item())
    with seeded(1, 3, 2):
        assert len({*a, random.random(), np.random.rand(), torch.rand(1).item()}) == 6


@pytest.mark.parametrize('length', [1, 7, 41, 64, 65])
@pytest.mark.parametrize(('world', 'batch_size'), [(1, 8), (2, 4), (4, 2)])
def test_global_batches_do_not_depend_on_the_number_of_processes(length, world, batch_size):
    def batches(world, batch_size):
        samplers = [ReplaySampler(length, batch_size, seed=3, rank=r, world=world, accum=3) for r in range(world)]
        for s in samplers:
            s.set_epoch(2)
        assert len({len(s) for s in samplers}) == 1
        out = []
        for i, parts in enumerate(zip(*samplers, strict=True)):
            steps = [s.step(i) for s in samplers]
            assert len({(st.group, st.last) for st in steps}) == 1
            counted = [k for p, st in zip(parts, steps) for k in p[: st.count]]
            assert all(st.count == len(p) or (st.count, len(p)) == (0, 1) for p, st in zip(parts, steps))
            out.append((counted, steps[0].group, steps[0].last))
        return out

    assert batches(world, batch_size) == batches(1, 8)
    every = [i for keys, _, _ in batches(world, batch_size) for _, i in keys]
    assert sorted(every) == list(range(length))


def test_groups_count_the_samples_that_they_really_have():
    sampler = ReplaySampler(41, 8, accum=4)
    assert [sampler.step(i).group for i in range(6)] == [32] * 4 + [9] * 2
    assert [sampler.step(i).last for i in range(6)] == [False] * 3 + [True, False, True]
    assert [sampler.step(i).count for i in range(6)] == [8] * 5 + [1]


def test_a_last_batch_too_small_for_batch_norm_is_left_out_and_only_that():
    assert len(ReplaySampler(41, 8, min_batch=2)) == 5
    assert len(ReplaySampler(42, 8, min_batch=2)) == 6
    assert len(ReplaySampler(43, 4, world=2, min_batch=2)) == 5
    left = ReplaySampler(41, 8, min_batch=2)
    seen = set()
    for epoch in range(1, 9):
        left.set_epoch(epoch)
        seen |= {i for keys in left for _, i in keys}
    assert seen == set(range(41))  # another one each epoch


@pytest.mark.parametrize('world', [1, 2, 3])
def test_validation_reads_each_image_once_in_order(folder, world):
    source = open_split(None, 'validation', flag='--val-split', data_dir=str(folder))
    seen = []
    for rank in range(world):
        batches = Loader(source, eval_transform((3, 16, 16), interpolation='bilinear', crop_pct=1.0), 8,
                         training=False, rank=rank, world=world)  # fmt: skip
        batches.set_epoch(0)
        part = [int(i) for _, _, index in batches for i in index]
        assert part == sorted(part)
        seen += part
    assert sorted(seen) == list(range(20))


# ------------------------------------------------------------------------------------------------- transforms, mixing


@pytest.mark.parametrize('mode', ['rrc', 'rkrc', 'rkrr', 'pad'])
@pytest.mark.parametrize('size', [(20, 14), (40, 64)])
def test_every_crop_mode_gives_uint8_views_of_the_size_asked_for(mode, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    view = train_transform((3, 32, 32), **NORM, train_crop_mode=mode, vflip=0.5)(image)
    assert view.dtype == torch.uint8 and view.shape == (3, 32, 32)


@pytest.mark.parametrize('aa', ['rand-m10-inc1', 'rand-m9-mstd0.5-inc1', 'v0', 'original', '3a'])
@pytest.mark.parametrize('mode', ['rrc', 'pad'])
def test_a_policy_may_leave_a_color_no_bits(aa, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    view, posterize = train_transform((3, 8, 8), **NORM, aa=aa, train_crop_mode=mode), None
    for step in [p for s in view.transforms for p in getattr(s, 'transforms', [s])]:
        groups = [step.ops] if hasattr(step, 'ops') else getattr(step, 'policy', [])
        for op in [op for group in groups for op in group if op.name.startswith('Posterize')]:
            posterize = op.aug_fn
    if aa == '3a':
        assert posterize is None
        return
    assert posterize(image, 8) is image and not np.asarray(posterize(image, 0)).any()
    assert posterize(image, 3) == ImageOps.posterize(image, 3)


def test_pad_crop_is_a_shift_of_the_image_with_zeros_around():
    image = np.random.default_rng(0).integers(1, 255, (32, 32, 3), dtype=np.uint8)
    transform = train_transform((3, 32, 32), **NORM, train_crop_mode='pad', hflip=0, color_jitter=0)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    shifts = {(y, x): padded[y : y + 32, x : x + 32].transpose(2, 0, 1) for y in range(9) for x in range(9)}
    seen = set()
    for i in range(30):
        with seeded(i):
            view = transform(Image.fromarray(image)).numpy()
        seen |= {k for k, v in shifts.items() if np.array_equal(v, view)}
    assert len(seen) > 15


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_our_tensor_of_an_image_is_torchvisions_but_contiguous(mode):
    from torchvision.transforms.functional import pil_to_tensor

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)).convert(mode)
    ours = to_tensor(image)
    assert torch.equal(ours, pil_to_tensor(image)) and ours.is_contiguous() and ours.dtype == torch.uint8
    ours += 1  # its memory is its own


def test_erasing_fills_with_the_mean_colour_or_noise_around_it_and_leaves_the_rest():
    pixels = torch.full((3, 64, 64), 7, dtype=torch.uint8)
    with seeded(1):
        const = ErasePixels(1.0, 'const', 1, **NORM)(pixels.clone())
    values = torch.tensor([0.5, 0.4, 0.3]).mul(255).round().to(torch.uint8)
    erased = const != pixels
    assert erased.any() and torch.equal(const[erased], values[:, None, None].expand_as(const)[erased])
    with seeded(1):
        noise = ErasePixels(1.0, 'pixel', 1, **NORM)(pixels.clone())
    filled = noise.float()[:, erased[0]]
    assert noise.dtype == torch.uint8 and filled.shape[1] > 50
    assert filled.mean(1).tolist() == pytest.approx([127.5, 102, 76.5], abs=12)
    assert filled.std(1).tolist() == pytest.approx([51, 51, 51], abs=12)
    assert torch.equal(noise[:, ~erased[0]], pixels[:, ~erased[0]])


@pytest.mark.parametrize('batch', [1, 4, 5])
def test_mixup_is_the_batch_rolled_by_one_and_replays(batch):
    pixels, target = torch.randint(0, 256, (batch, 3, 8, 8), dtype=torch.uint8), torch.arange(batch)
    mix = Mixup(mixup=0.8, seed=3)
    mixed, t = mix(pixels, target, 2, 7)
    assert isinstance(t, MixedTarget) and mixed.dtype == torch.uint8
    assert torch.equal(t.b, target.roll(1)) and 0 <= t.lam <= 1
    expected = (t.lam * pixels.double() + (1 - t.lam) * pixels.roll(1, 0).double()).round()
    assert (mixed.double() - expected).abs().max() <= 1
    again, t2 = Mixup(mixup=0.8, seed=3)(pixels, target, 2, 7)
    assert torch.equal(again, mixed) and t2.lam == t.lam
    assert mix(pixels, target, 2, 8)[1].lam != t.lam != mix(pixels, target, 3, 7)[1].lam


def test_cutmix_takes_a_box_whose_area_is_one_minus_lambda():
    pixels, target = torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.arange(4)
    pixels += torch.arange(4, dtype=torch.uint8)[:, None, None, None]
    mixed, t = Mixup(cutmix=1.0, seed=5)(pixels, target, 1, 0)
    share = (mixed == pixels).float().mean().item()
    assert share == pytest.approx(t.lam, abs=1e-6) and 0 < share < 1
    assert set(mixed[0].unique().tolist()) == {0, 3}


def test_mixing_can_end_and_can_be_off():
    pixels, target = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4)
    assert Mixup()(pixels, target, 1, 0)[1] is target
    mix = Mixup(mixup=1.0, off_epoch=3)
    assert isinstance(mix(pixels, target, 2, 0)[1], MixedTarget) and mix(pixels, target, 3, 0)[1] is target
    assert Mixup(mixup=1.0, prob=0.0)(pixels, target, 1, 0)[1] is target


# ------------------------------------------------------------------------------------------- JPEGs at reduced scale


def jpegs(root, size: tuple[int, int], n: int = 4) -> str:
    """Folders of JPEGs with detail at several scales, and one PNG."""
    from timm_rld.bench.photographs import draw_photograph

    rng = np.random.default_rng(0)
    for i in range(n):
        path = root / 'train' / 'ab'[i % 2] / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_photograph(rng, size).save(path, quality=90)
    draw_photograph(rng, size).save(root / 'train' / 'a' / '9.png')
    return str(root)


def views(root: str, transform, epoch: int = 1) -> list[torch.Tensor]:
    source = open_split(None, 'train', flag='', data_dir=root)
    return [view for view, _, _ in ReplayDataset(source, transform, 7).__getitems__([(epoch, i) for i in range(5)])]


def plain(size=32, **kwargs):
    """Training transforms without and with the setting: boxes, flips and colours are drawn from the same numbers."""
    return [train_transform((3, size, size), **NORM, **kwargs, jpeg_draft=draft) for draft in (False, True)]


EVAL = dict(interpolation='bicubic', crop_pct=0.9)


@pytest.mark.parametrize(
    'make',
    [
        lambda: plain(),
        lambda: plain(train_crop_mode='pad'),
        lambda: plain(no_aug=True),
        lambda: [eval_transform((3, 32, 32), **EVAL, jpeg_draft=d) for d in (False, True)],
        lambda: [eval_transform((3, 32, 32), **EVAL, crop_mode='squash', jpeg_draft=d) for d in (False, True)],
    ],
    ids=['rrc', 'pad', 'no_aug', 'eval', 'squash'],
)
def test_jpegs_at_reduced_scale_differ_by_less_than_a_grey_value_on_average(tmp_path, make):
    root = jpegs(tmp_path, (403, 301))  # odd: the reduced image is no whole fraction of it
    whole, draft = make()
    seen = []
    for epoch in (1, 2, 3):
        for a, b in zip(views(root, whole, epoch), views(root, draft, epoch), strict=True):
            assert a.shape == b.shape
            seen.append((a.float() - b.float()).abs())
    difference = torch.stack(seen)
    assert 0 < difference.mean() < 1 and difference.quantile(0.99) <= 5 and difference.max() <= 25


def test_jpegs_with_no_room_to_spare_and_other_files_are_decoded_as_they_are(tmp_path):
    root = jpegs(tmp_path, (403, 301))
    whole, draft = plain(160)
    assert all(map(torch.equal, views(root, whole), views(root, draft)))
    for size in ((301, 403), (403, 301), (32, 32)):  # the steps are timm's where nothing is reduced
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
        for whole, draft in (plain(), plain(train_crop_mode='pad'), plain(no_aug=True)):
            assert isinstance(draft, DraftTransform)
            with seeded(1):
                expected = whole(image)
            with seeded(1):
                assert torch.equal(draft(image), expected)


def test_reduced_jpegs_replay_and_a_broken_one_is_named_or_replaced(tmp_path):
    root = jpegs(tmp_path / 'd', (403, 301), n=8)

    def epochs(workers):
        source = open_split(None, 'train', flag='', data_dir=root)
        batches = Loader(source, plain()[1], 4, training=True, seed=3, workers=workers)
        return [epoch_of(batches, epoch) for epoch in (1, 2)]

    for a, b in zip(epochs(0), epochs(2)):
        assert same(a, b)
    broken = tmp_path / 'd' / 'train' / 'a' / '0.jpg'
    broken.write_bytes(broken.read_bytes()[:900])
    source = open_split(None, 'train', flag='', data_dir=root)
    dataset = ReplayDataset(source, plain()[1], 3)
    with pytest.raises(SampleError, match=f'{broken}. of split .train. cannot be read'):
        dataset[(1, 0)]
    dataset.bad_images = tmp_path / 'bad.txt'
    view = dataset[(1, 0)][0]
    assert torch.equal(dataset[(1, 0)][0], view) and str(broken) in dataset.bad_images.read_text()
    in_its_place = []
    for i in range(1, 9):
        with seeded(SAMPLE, 3, 1, 0):  # as the broken one would have been cut
            in_its_place.append(plain()[1](source.read(i)[0]))
    # the whole images were decoded in full here, so they come close; another cut would not
    assert min((view.float() - x.float()).abs().mean() for x in in_its_place) < 2


def test_crops_that_cannot_be_reduced_stay_timms():
    assert not any(isinstance(t, DraftTransform) for t in plain(train_crop_mode='rkrc'))
    nearest = eval_transform((3, 32, 32), interpolation='nearest', crop_pct=1.0, jpeg_draft=True)
    assert not isinstance(nearest, DraftTransform)  # takes single pixels, which a reduced image has not


# ---------------------------------------------------------------------------------------------------------- sources


def test_the_sample_has_its_images_and_classes():
    train, val = open_splits(None, 'train', 'test')
    assert (len(train), len(val), train.num_classes) == (1437, 360, 10)
    assert train.class_names == val.class_names == [str(i) for i in range(10)]
    image, target = train.read(0)
    assert image.mode == 'RGB' and image.size == (8, 8) and 0 <= target < 10


def test_parquet_with_other_column_names_is_read(parquet):
    train, val = open_splits(f'hfds/{parquet}', 'train', 'test', input_key='img', target_key='fine_label')
    assert (len(train), len(val)) == (41, 20) and train.class_names == ['apple', 'pear', 'plum']
    assert train.read(3)[0].size == (12, 12)


def test_streamed_parquet_is_read_and_replays(parquet):
    kwargs = dict(flag='--train-split', is_training=True, batch_size=4, input_key='img', target_key='fine_label',
                  num_samples=41, dataset_download=True)  # fmt: skip
    transform = train_transform((3, 16, 16), **NORM)

    def batches(epoch):
        source = open_split(f'hfids/{parquet}', 'train', **kwargs)
        stream = Loader(source, transform, 4, training=True, seed=2)
        got = epoch_of(stream, epoch)
        assert len(got) == len(stream) == 11
        return got

    first = batches(1)
    assert same(batches(1), first) and not same(batches(2), first)


def test_tars_are_found_by_split(folder, tmp_path):
    for split, name in (('train', 'train'), ('validation', 'val')):
        with tarfile.open(tmp_path / f'{name}.tar', 'w') as tar:
            tar.add(folder / split, arcname='.')
    train, val = open_splits(None, 'train', 'validation', data_dir=str(tmp_path))
    assert (len(train), len(val), train.class_names) == (41, 20, ['apple', 'pear', 'plum'])
    assert train.read(0)[0].size == (12, 12)


def test_grey_images_are_made_of_colour_ones(folder):
    assert open_split(None, 'train', flag='', data_dir=str(folder), in_chans=1).read(0)[0].mode == 'L'


def test_torchvision_datasets_are_read(tmp_path):
    import pickle

    base = tmp_path / 'cifar-10-batches-py'
    base.mkdir()
    with pytest.raises(UserError, match='--dataset-download fetches it'):
        open_split('torch/cifar10', 'train', flag='--train-split', data_dir=str(tmp_path))
    from torchvision.datasets import ImageFolder

    assert ImageFolder and pickle  # timm's torch/folder goes through the same reader
    for name in ('a', 'b'):
        root = tmp_path / 'f' / 'train' / name
        root.mkdir(parents=True)
        Image.new('L', (9, 9)).save(root / 'x.png')
    source = open_split('torch/folder', 'train', flag='--train-split', data_dir=str(tmp_path / 'f'))
    assert source.class_names == ['a', 'b'] and source.read(0)[0].mode == 'RGB'


def test_a_broken_image_is_named_and_never_replaced_by_the_next(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'd')
    broken = sorted((tmp_path / 'd' / 'train').rglob('*.png'))[4]
    broken.write_bytes(broken.read_bytes()[:60])
    source = open_split(None, 'train', flag='--train-split', data_dir=str(tmp_path / 'd'))
    with pytest.raises(SampleError, match=f'image 4 .{broken}. of split .train. cannot be read'):
        source.read(4)


def opened(dataset=None, **kwargs) -> str:
    with pytest.raises(UserError) as e:
        open_splits(dataset, kwargs.pop('train', 'train'), kwargs.pop('val', 'validation'), **kwargs)
    return str(e.value)


def test_errors_of_folders_name_the_flag_and_what_there_is(folder, tmp_path):
    assert '--data-dir /nowhere: no such folder' in opened(data_dir='/nowhere')
    message = opened(data_dir=str(folder), val='test')
    assert "--val-split 'test': no such folder" in message and '(there: train, validation)' in message
    assert 'no folder at all' in opened(data_dir=str(tmp_path))
    (tmp_path / 'train').mkdir()
    assert f'--data-dir {tmp_path}/train: found no images' in opened(data_dir=str(tmp_path))
    one = tmp_path / 'x.tar'
    tarfile.open(one, 'w').close()
    assert 'one file holds one split' in opened(data_dir=str(one))
    assert 'expected hfds/…' in opened('imagenet') and '--data-dir imagenet' in opened('imagenet')
    assert 'did you mean hfds/uoft-cs/cifar100?' in opened('uoft-cs/cifar100')
    assert 'needs --data-dir' in opened('torch/cifar10')


def test_errors_of_parquet_name_splits_and_columns(parquet, tmp_path):
    keys = dict(val='test', input_key='img', target_key='fine_label')
    assert '--val-split valid: no such split' in (m := opened(f'hfds/{parquet}', **{**keys, 'val': 'valid'}))
    assert '(there: train, test)' in m
    message = opened(f'hfds/{parquet}', **{**keys, 'input_key': 'image'})
    assert '--input-key image: no such image column' in message and '(columns: img, fine_label, text)' in message
    message = opened(f'hfds/{parquet}', **{**keys, 'target_key': 'label'})
    assert '--target-key label: no such label column' in message and 'fine_label' in message
    assert 'expected class indices' in opened(f'hfds/{parquet}', **{**keys, 'target_key': 'text'})
    assert 'no dataset in this folder' in opened(f'hfds/{tmp_path}')
    assert 'the Hub is out of reach' in opened('hfds/someone/something')
    assert '--num-classes 2' in opened(f'hfds/{parquet}', **keys, num_classes=2)


def test_classes_that_differ_between_splits_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'd')
    shutil.rmtree(tmp_path / 'd' / 'validation' / 'pear')
    assert "different classes: 'pear' only in 'train'" in opened(data_dir=str(tmp_path / 'd'))


@pytest.mark.parametrize('aa', ['augmix-m5', 'rand-m9-q3', 'nonsense'])
def test_an_augmentation_policy_that_timm_lacks_is_refused(aa):
    with pytest.raises(UserError, match=f'--aa {aa}'):
        train_transform((3, 16, 16), **NORM, aa=aa)


def test_class_maps_that_would_lose_or_move_classes_are_refused(folder, parquet, tmp_path):
    path = tmp_path / 'map.txt'
    for text, message in (
        ('apple\npear\n', "no line for the class 'plum'"),
        ('apple\npear\nplum\napple\n', 'line 4 is written twice'),
        ('apple\n\npear\nplum\n', 'line 2 is blank'),
    ):
        path.write_text(text)
        assert message in opened(data_dir=str(folder), class_map=str(path))
    path.write_text('apple\npear\n')
    keys = dict(val='test', input_key='img', target_key='fine_label', class_map=str(path))
    assert "no line for the label 'plum'" in opened(f'hfds/{parquet}', **keys)
    assert 'expected a .txt file' in opened(data_dir=str(folder), class_map='nowhere.txt')
    path.write_text('plum\npear\napple\nfig\n')
    train, val = open_splits(None, 'train', 'validation', data_dir=str(folder), class_map=str(path))
    assert train.class_names == ['plum', 'pear', 'apple', 'fig'] and len(train) == 41 and len(val) == 20


def test_class_folders_that_timm_would_merge_are_refused(tmp_path):
    for split in ('train', 'validation'):
        for name in ('a', 'b'):
            root = tmp_path / split / name / 'images'
            root.mkdir(parents=True)
            Image.new('RGB', (9, 9)).save(root / 'x.png')
    assert "would be one class, 'images'" in opened(data_dir=str(tmp_path))
    shutil.rmtree(tmp_path / 'train' / 'b')
    assert 'has 1 class; at least 2 are needed' in opened(data_dir=str(tmp_path))


def test_a_column_that_holds_no_images_is_named(parquet):
    assert 'is --input-key text the image column?' in opened(
        f'hfds/{parquet}', val='test', input_key='text', target_key='fine_label'
    )


def test_a_null_image_is_named_by_row_and_split_and_not_taken_for_a_missing_column(tmp_path):
    import datasets

    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(names=['a', 'b']))
    image = Image.new('RGB', (9, 9))
    for split, images in (('train', [None, image, image, None]), ('test', [image, image, image, None])):
        rows = datasets.Dataset.from_dict(dict(img=images, fine_label=[0, 1, 0, 1]), features=features)
        rows.to_parquet(tmp_path / f'{split}.parquet')
    keys = dict(input_key='img', target_key='fine_label')
    train, val = open_splits(f'hfds/{tmp_path}', 'train', 'test', **keys)
    assert train.read(1)[1] == 1
    for source, index in ((train, 0), (train, 3), (val, 3)):
        with pytest.raises(SampleError) as e:
            source.read(index)
        assert str(e.value) == (
            f"image {index} of split '{source.split}' cannot be read: row {index} of the column 'img' is null"
        )
    dataset = ReplayDataset(train, train_transform((3, 16, 16), **NORM), 1)
    dataset.bad_images = tmp_path / 'bad.txt'
    assert dataset[(1, 0)][0].shape == (3, 16, 16) and "'img' is null" in dataset.bad_images.read_text()
    message = opened(f'hfds/{tmp_path}', val='test', **{**keys, 'input_key': 'image'})
    assert '--input-key image: no such image column' in message and '(columns: img, fine_label)' in message


# ------------------------------------------------------------------------------------------------------- webdataset


@pytest.fixture
def shards(folder, tmp_path):
    """The pictures of `folder` in shards, four for training and two for validation, with timm's _info.json."""
    splits = {}
    for split, n in (('train', 4), ('validation', 2)):
        paths, names = sorted((folder / split).rglob('*.png')), [f'{split}-{i}.tar' for i in range(n)]
        for i, name in enumerate(names):
            with tarfile.open(tmp_path / name, 'w') as tar:
                for path in paths[i::n]:
                    label = str(sorted(p.name for p in path.parent.parent.iterdir()).index(path.parent.name)).encode()
                    tar.add(path, f'{path.stem}.png')
                    member = tarfile.TarInfo(f'{path.stem}.cls')
                    member.size = len(label)
                    tar.addfile(member, io.BytesIO(label))
        lengths = [len(paths[i::n]) for i in range(n)]
        splits[split] = dict(name=split, num_samples=len(paths), filenames=names, shard_lengths=lengths)
    (tmp_path / '_info.json').write_text(json.dumps({'splits': splits}))
    return tmp_path


def wds(root, split='train', **kwargs):
    pytest.importorskip('webdataset')
    kwargs = dict(flag=f'--{split[:5].rstrip("i")}-split', data_dir=str(root), num_classes=3, batch_size=4) | kwargs
    return open_split('wds/fruit', split, is_training=split.startswith('train'), **kwargs)


def test_shards_are_read_by_the_name_of_a_split_or_by_a_pattern(shards):
    for split in ('validation', 'validation-{0..1}.tar|20'):
        source = wds(shards, split)
        assert (source.declared, source.shards) == (20, 2)
        batches = Loader(source, eval_transform((3, 16, 16), interpolation='bilinear', crop_pct=1.0), 8, training=False)
        targets = torch.cat([target for _, target, _ in epoch_of(batches, 0)])
        assert targets.bincount().tolist() == [7, 7, 6]
    source = wds(shards)
    assert (source.declared, source.shards) == (41, 4)
    stream = Loader(source, train_transform((3, 16, 16), **NORM), 4, training=True, workers=2)
    assert len(epoch_of(stream, 1)) == len(stream) == 12


@pytest.mark.parametrize('split', ['train', 'train-{0..3}.tar|41'])
def test_shards_that_are_not_there_are_named_before_training(shards, split):
    (shards / 'train-1.tar').unlink()
    with pytest.raises(UserError, match=f'--train-split .*: 1 of 4 shards are not in --data-dir {shards}: train-1.tar'):
        wds(shards, split, flag='--train-split')


def test_of_many_missing_shards_the_first_are_named(tmp_path):
    names = [f'a-{i}.tar' for i in range(10)]
    reader = SimpleNamespace(root=str(tmp_path), num_samples=9, split_info=SimpleNamespace(filenames=names))
    for name in names[:2]:
        (tmp_path / name).touch()
    with pytest.raises(UserError) as e:
        sources._check_shards(reader, 'a', '--val-split')
    assert str(e.value).startswith('--val-split a: 8 of 10 shards') and str(e.value).endswith(
        'a-2.tar, a-3.tar, a-4.tar, …'
    )
    for name in names:
        (tmp_path / name).touch()
    assert sources._check_shards(reader, 'a', '--val-split') == 10
    reader.num_samples = 0
    with pytest.raises(UserError, match='not known; give --val-num-samples N'):
        sources._check_shards(reader, 'a', '--val-split')


def test_a_split_of_shards_that_is_not_described_is_an_error_with_a_way_out(shards):
    for split, message in (
        ('test', r"no such split in an _info.json of .*: 'test-{0000..0009}.tar|IMAGES'"),
        ('train-{0..3}.tar', 'how many images it holds is not known; give --train-num-samples N'),
    ):
        with pytest.raises(UserError, match=message):
            wds(shards, split, flag='--train-split')
    info = json.loads((shards / '_info.json').read_text())
    del info['splits']['train']['shard_lengths']
    (shards / '_info.json').write_text(json.dumps(info))
    with pytest.raises(UserError, match="--train-split train: the _info.json of .* lacks 'shard_lengths' for it"):
        wds(shards)


def test_without_webdataset_it_is_said_what_to_install(tmp_path, monkeypatch):
    from timm.data.readers import reader_wds

    monkeypatch.setattr(reader_wds, 'wds', None)
    assert opened('wds/fruit', data_dir=str(tmp_path)) == (
        "--dataset wds/fruit: needs webdataset: pip install 'timm-rld[wds]'"
    )


def test_more_readers_than_shards_are_refused_where_one_would_have_no_images(shards):
    transform = train_transform((3, 16, 16), **NORM)
    with pytest.raises(UserError, match=r"--workers 3: split 'train-.*' has 2 shard\(s\) for 3 readers"):
        Loader(wds(shards, 'train-{0..1}.tar|20'), transform, 4, training=True, workers=3)
    with pytest.raises(UserError, match=r'2 shard\(s\) for 4 readers \(4 process\(es\)\)'):
        Loader(wds(shards, 'validation'), transform, 4, training=False, world=4)
    Loader(wds(shards, 'validation'), transform, 4, training=False, workers=3)  # one has nothing to do


def test_an_epoch_of_a_stream_that_ends_early_is_an_error(shards):
    tarfile.open(shards / 'train-1.tar', 'w').close()
    source = wds(shards, 'train-{0..1}.tar|20')
    stream = Loader(source, train_transform((3, 16, 16), **NORM), 4, training=True, workers=2)
    with pytest.raises(SampleError, match='--train-split train.*: ended after 3 of 6 batches'):
        epoch_of(stream, 1)


def test_an_empty_name_of_a_dataset_is_refused():
    with pytest.raises(UserError, match="--dataset '': needs --data-dir"):
        open_split('', 'train', flag='--train-split')
