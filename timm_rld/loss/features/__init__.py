"""Methods on features: one file a paper, one table, `create_feature_loss(name, **options)`."""

from ._base import FeatureLoss
from .at import AT, at_loss, attention
from .feature import Feature, feature_loss
from .fitnet import FitNet, choose_stage, fitnet_loss
from .pkt import PKT, neighbours, pkt_loss
from .registry import (
    FEATURES,
    FeatureMethod,
    check_features,
    create_feature_loss,
    describe_features,
    get_feature_method,
)
from .reviewkd import Fusion, ReviewKD, hcl_loss
from .rkd import RKD, angles, relative_distances, rkd_loss
from .sp import SP, similarities, sp_loss

__all__ = [
    'angles', 'AT', 'at_loss', 'attention', 'check_features', 'choose_stage', 'create_feature_loss',
    'describe_features', 'Feature', 'feature_loss', 'FeatureLoss', 'FeatureMethod', 'FEATURES', 'FitNet',
    'fitnet_loss', 'Fusion', 'get_feature_method', 'hcl_loss', 'neighbours', 'PKT', 'pkt_loss', 'relative_distances',
    'ReviewKD', 'RKD', 'rkd_loss', 'similarities', 'SP', 'sp_loss',
]  # fmt: skip
