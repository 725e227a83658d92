"""ONNX: written by torch's exporter, opened by onnxruntime."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.export import ExportedProgram

from ..errors import UserError
from .graph import IMAGES, LOGITS, PIXELS, About, quiet


def require() -> None:
    """Raise UserError where a package is missing, before any work."""
    missing = [p for p in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(p) is None]
    if missing:
        raise UserError(f"--format onnx: needs {', '.join(missing)}: pip install 'timm-rld[export]'; or --format pt2")


def write_onnx(program: ExportedProgram, file: Path, in_graph: bool) -> None:
    """Write a traced network as one ONNX file, with weights, and without paths of this machine.

    Args:
        program: of :func:`timm_rld.export.trace`.
        file: to be written.
        in_graph: whether it takes pixels.

    Raises:
        Exception: of torch, with the reason, where it has no ONNX for an operator; of ONNX, for more than 2 GB.
    """
    import onnx
    import torch

    with quiet():
        exported = torch.onnx.export(
            program, (), dynamo=True, input_names=[PIXELS if in_graph else IMAGES], output_names=[LOGITS],
            external_data=False, verbose=False,
        )  # fmt: skip
        assert exported is not None
        model = exported.model_proto
    given = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # torch's own name for the batch
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param == given:
                dim.dim_param = 'batch'
    for part in (*model.graph.node, *(node for f in model.functions for node in f.node)):
        del part.metadata_props[:]  # lines of source code, with the paths of this machine
        part.doc_string = ''
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
    onnx.save(model, file)


def label_onnx(file: Path, about: About) -> None:
    """Write into an ONNX file what one must know to use it: a key of its metadata each, as JSON."""
    import onnx

    model = onnx.load(file)
    onnx.helper.set_model_props(model, {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()})
    onnx.save(model, file)


class OnnxFile:
    """An ONNX file in onnxruntime, on the CPU.

    Args:
        file: its path.
        threads: that it computes with.
    """

    def __init__(self, file: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
        self.session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
        known = self.session.get_modelmeta().custom_metadata_map
        self.about: About = {key: json.loads(value) for key, value in known.items() if value[:1] in ('{', '[', '"')}
        self.runtime = f'onnxruntime {onnxruntime.__version__}'
        self.name = self.session.get_inputs()[0].name

    def __call__(self, x: NDArray[Any]) -> NDArray[np.float32]:
        return self.session.run(None, {self.name: x})[0]
