"""A trained model as a file of its own, for onnxruntime or torch alone, and a check that the file is the model.

graph.py is what is exported, onnx.py and pt2.py write and open the two formats, quantize.py makes int8 of ONNX,
check.py holds a file against the model, example.py is the program beside it, and export.py puts them together.
"""

from .check import compare, faults
from .export import FORMATS, PRECISIONS, export_file
from .graph import Graph, OpenFile, trace

__all__ = ['compare', 'export_file', 'faults', 'FORMATS', 'Graph', 'OpenFile', 'PRECISIONS', 'trace']
