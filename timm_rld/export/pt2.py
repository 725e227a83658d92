"""torch's own format: a program of `torch.export`, for torch alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from .graph import About

_ABOUT = 'about.json'


def write_pt2(program: ExportedProgram, file: Path, about: About) -> None:
    """Write a traced network as one file, with what one must know to use it, and without paths of this machine."""
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, 'graph', None), 'nodes', ()):
            node.meta.pop('stack_trace', None)
    with file.open('wb') as f:
        torch.export.save(program, f, extra_files={_ABOUT: json.dumps(about, ensure_ascii=False)})


class Pt2File:
    """A file of `torch.export.save` in torch, on the CPU, with torch's threads."""

    def __init__(self, file: Path) -> None:
        extra = {_ABOUT: ''}
        with file.open('rb') as f:
            self.program = torch.export.load(f, extra_files=extra).module()
        self.about: About = json.loads(extra[_ABOUT])
        self.runtime = f'torch {torch.__version__.partition("+")[0]}'

    @torch.inference_mode()
    def __call__(self, x: NDArray[Any]) -> NDArray[np.float32]:
        return self.program(torch.from_numpy(x)).numpy()
