"""What is exported: a network as one graph whose batch is of any size, and what one must know to use it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..pairing import Normalize

PIXELS, IMAGES, LOGITS = 'pixels', 'images', 'logits'
About = dict[str, Any]


class OpenFile(Protocol):
    """An exported file in its own runtime.

    Attributes:
        about: what the file says of itself (:func:`describe`).
        runtime: name and version of what runs it.
    """

    about: About
    runtime: str

    def __call__(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """Return logits `[B, K]` of an input as ``about['input']`` describes it."""
        ...


class Graph(nn.Module):
    """A network as it is exported: float32 images `[B, C, H, W]`, normalised, or with the normalisation inside uint8
    pixels `[B, H, W, C]` → logits `[B, K]`.

    Args:
        model: a timm network; it is put into eval mode.
        normalize: its normalisation, for a graph that takes pixels.
    """

    def __init__(self, model: nn.Module, normalize: Normalize | None = None) -> None:
        super().__init__()
        self.model, self.normalize = model, normalize
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.normalize is not None:
            x = self.normalize(x.permute(0, 3, 1, 2))
        return self.model(x)

    def example(self, input_size: Sequence[int], batch: int = 2) -> Tensor:
        """Return an input of this size (C, H, W)."""
        c, h, w = input_size
        if self.normalize is None:
            return torch.zeros(batch, c, h, w)
        return torch.zeros(batch, h, w, c, dtype=torch.uint8)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notices of exporters and quantisers, which would stand between ours."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


def trace(graph: Graph, input_size: Sequence[int]) -> torch.export.ExportedProgram:
    """Return a graph as a program of torch's operators, for batches of any size.

    It is traced with two images: of 0 and 1 torch would make constants.

    Args:
        input_size: (C, H, W).

    Raises:
        Exception: of torch, with the reason, where the network cannot be traced.
    """
    batch = torch.export.Dim('batch')
    with quiet(), torch.no_grad():
        return torch.export.export(graph, (graph.example(input_size),), dynamic_shapes=({0: batch},), strict=False)


def describe(
    data_config: dict[str, Any], labels: Sequence[str], *, architecture: str, in_graph: bool, precision: str, exif: bool
) -> About:
    """Return what stands in an exported file and beside it: `architecture`, `precision`, `input`, `output`,
    `preprocessing` (from an image file to the input) and `labels`.

    Args:
        data_config: input_size, mean, std, interpolation, crop_pct, crop_mode.
        labels: name of each output.
        architecture: timm's name of the network.
        in_graph: whether the graph takes pixels and normalises them.
        precision: `fp32` or `int8`.
        exif: whether images are turned upright by their EXIF orientation.
    """
    c, h, w = data_config['input_size']
    pixels = {'name': PIXELS, 'dtype': 'uint8', 'layout': 'BHWC', 'shape': ['batch', h, w, c]}
    images = {'name': IMAGES, 'dtype': 'float32', 'layout': 'BCHW', 'shape': ['batch', c, h, w]}
    return {
        'architecture': architecture,
        'precision': precision,
        'input': {**(pixels if in_graph else images), 'channels': 'RGB' if c == 3 else 'L'},
        'output': {'name': LOGITS, 'dtype': 'float32', 'shape': ['batch', len(labels)]},
        'preprocessing': {
            'normalized_in_graph': in_graph,
            'mean': [float(x) for x in data_config['mean']],
            'std': [float(x) for x in data_config['std']],
            'size': [h, w],
            'interpolation': data_config['interpolation'],
            'crop_pct': data_config['crop_pct'],
            'crop_mode': data_config['crop_mode'] or 'center',
            'exif': exif,
        },
        'labels': [str(label) for label in labels],
    }


def prepare(pixels: NDArray[np.uint8], about: About) -> NDArray[Any]:
    """Return what a file takes of images, by what it says of itself.

    Args:
        pixels: `[B, C, H, W]`.
        about: of the file.
    """
    to, preprocessing = about['input'], about['preprocessing']
    if not preprocessing['normalized_in_graph']:
        mean, std = (np.float32(preprocessing[k]).reshape(-1, 1, 1) for k in ('mean', 'std'))
        pixels = (pixels.astype(np.float32) / 255 - mean) / std
    order = ['BCHW'.index(axis) for axis in to['layout']]
    return np.ascontiguousarray(pixels.transpose(order), dtype=to['dtype'])


def reason(error: BaseException) -> str:
    """Return why an exporter failed, as a line: the first of the error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip(' -\t') for line in str(error).splitlines()]
    text = next((line for line in lines if any(map(str.isalnum, line))), '')
    return f'{type(error).__name__}: {text}'[:240].rstrip(': ')
