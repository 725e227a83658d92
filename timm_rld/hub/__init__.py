"""The Hugging Face Hub: a model as a plain timm folder, its card, and pushing them."""

from .push import BackgroundPush, check_hub, find_weights, push_run
from .timm_folder import check_export, export_model

__all__ = ['BackgroundPush', 'check_export', 'check_hub', 'export_model', 'find_weights', 'push_run']
