"""int8: static quantisation by onnxruntime, with the ranges that activations have on training images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .graph import quiet

IMAGES = 512  # to calibrate with


def quantize(file: Path, target: Path, batches: Iterable[NDArray[Any]]) -> None:
    """Write an ONNX file with weights of int8 (a scale each output channel) and activations of uint8.

    Weights have 7 bits: with 8, processors without VNNI (AVX2, AVX-512) let the sums of products overflow, and the same
    file would be less accurate there than where it was checked.

    Args:
        file: ONNX in float32.
        target: to be written.
        batches: inputs of the network to calibrate with: the range of each activation is that of all of them.

    Raises:
        Exception: of onnxruntime, with the reason.
    """
    with quiet():
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):  # type: ignore[misc]  # it has no types
            def __init__(self, name: str) -> None:
                self.inputs = ({name: batch} for batch in batches)

            def get_next(self) -> Any:
                return next(self.inputs, None)

        with tempfile.TemporaryDirectory(prefix='timm_rld-') as folder:
            prepared = Path(folder) / 'prepared.onnx'
            quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
            import onnx

            name = onnx.load(prepared, load_external_data=False).graph.input[0].name
            quantize_static(
                str(prepared), str(target), Reader(name), quant_format=QuantFormat.QDQ, per_channel=True,
                reduce_range=True, weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
            )  # fmt: skip
