"""timm's private names that we use, and what for."""

from __future__ import annotations

from typing import Any

from timm.models import _features, _hub

CHECKED_VERSION = '1.0.31'  # of timm

feature_take_indices = _features.feature_take_indices  # of forward_intermediates
load_model_config_from_path = _hub.load_model_config_from_path  # of a local-dir: folder
PREFERRED_FILES = _hub._PREFERRED_FILES  # names of weight files in a local-dir: folder
hf_split = _hub.hf_split  # user/model@revision
HF_WEIGHTS_NAME = _hub.HF_WEIGHTS_NAME  # name of the weight file of a Hub repository
get_safe_alternatives = _hub._get_safe_alternatives  # its name as safetensors
get_cache_dir = _hub.get_cache_dir  # where weights from a URL are cached


def mixup_params(mixup: Any) -> tuple[float, bool]:
    """Return λ and whether to use CutMix, as timm's Mixup draws them for a batch."""
    return mixup._params_per_batch()
