"""A trained model at work: evaluated on a dataset, or asked about files."""

from .evaluate import evaluate_model
from .model import OpenModel, open_model
from .predict import predict_files

__all__ = ['evaluate_model', 'open_model', 'OpenModel', 'predict_files']
