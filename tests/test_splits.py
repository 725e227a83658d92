"""Which images are trained on, and which are validated on."""

from __future__ import annotations

import numpy as np
import pytest

from timm_rld.data import open_split, stratified_holdout
from timm_rld.errors import UserError


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
