"""Fixtures: no network, fresh Accelerate state, and small datasets that are made on the spot."""

from __future__ import annotations

import os
import sys

os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['OMP_NUM_THREADS'] = '2'
os.environ.setdefault('GOMP_SPINCOUNT', '3000')  # as train_distill.py: threads that wait leave the cores to others

from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

CLASSES = ('apple', 'pear', 'plum')


def pytest_runtest_setup(item):
    if item.get_closest_marker('gpu') and not torch.cuda.is_available():
        pytest.skip('needs a GPU')


@pytest.fixture(autouse=True)
def fresh_state():
    """Each test may start Accelerate anew, and leaves no seed behind."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    torch.manual_seed(0)


def draw(rng: np.random.Generator, label: int, size: int = 12) -> Image.Image:
    """An image that a small network can learn: noise, brighter in the channel of its class."""
    pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
    pixels[..., label % 3] += 100
    return Image.fromarray(pixels)


@pytest.fixture(scope='session')
def folder(tmp_path_factory) -> Path:
    """Folders of images, three classes: 41 for training (so that the last batch is odd), 20 for validation."""
    root = tmp_path_factory.mktemp('folder')
    rng = np.random.default_rng(0)
    for split, n in (('train', 41), ('validation', 20)):
        for i in range(n):
            path = root / split / CLASSES[i % 3] / f'{i:03}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(rng, i % 3).save(path)
    return root


@pytest.fixture(scope='session')
def parquet(tmp_path_factory, folder):
    """The pictures of `folder` as a datasets folder of Parquet files, with columns img and fine_label."""
    import datasets

    root = tmp_path_factory.mktemp('parquet')
    features = datasets.Features(
        img=datasets.Image(),
        fine_label=datasets.ClassLabel(names=['apple', 'pear', 'plum']),
        text=datasets.Value('string'),
    )
    for split in ('train', 'test'):
        paths = sorted((folder / ('validation' if split == 'test' else split)).rglob('*.png'))
        datasets.Dataset.from_dict(
            dict(img=[str(p) for p in paths], fine_label=[p.parent.name for p in paths], text=['x'] * len(paths)),
            features=features,
        ).to_parquet(root / f'{split}.parquet')
    return root


@pytest.fixture(scope='session')
def trained_teacher(tmp_path_factory, folder) -> Path:
    """A timm model folder whose head fits `folder`, labelled, with a normalisation of its own."""
    import timm

    from timm_rld import export_model

    torch.manual_seed(1)
    model = timm.create_model('test_resnet', num_classes=3)
    config = dict(
        input_size=(3, 32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), interpolation='bicubic', crop_pct=1.0,
        crop_mode='center',
    )  # fmt: skip
    return export_model(model, tmp_path_factory.mktemp('teacher') / 'teacher', data_config=config, label_names=CLASSES)


@pytest.fixture(scope='session')
def fork_server():
    """Where training processes come from that may be killed."""
    from fork_server import ForkServer

    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope='module')
def forked_python(fork_server):
    """Have what is started with `sys.executable` come from the fork server (not with a GPU, which no fork can use)."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(sys, 'executable', str(fork_server.python))
        yield


@pytest.fixture
def tiny(folder, tmp_path) -> list[str]:
    """Flags of a run of seconds on `folder`."""
    return [
        '--teacher', 'test_resnet', '--student', 'test_resnet', '--data-dir', str(folder), '--img-size', '32',
        '--no-teacher-pretrained', '--teacher-epochs', '1', '--epochs', '2', '--batch-size', '8', '--workers', '0',
        '--lr', '0.01', '--min-teacher-acc', '0', '--output', str(tmp_path), '--experiment', 'run',
    ]  # fmt: skip
