"""The default learning rate: where users of timm start with an optimizer, scaled to the batch."""

from __future__ import annotations

from dataclasses import dataclass

LARGEST_BATCH = 8192  # up to here the scaling rules were found to hold (Goyal et al. 2017; You et al. 2020)


@dataclass(frozen=True)
class Family:
    """Optimizers that take learning rates of one size.

    Attributes:
        names: parts of their names in timm; the first family with a part in the name is the one.
        lr_base: learning rate at a batch of 256.
        lr_base_scale: how the rate grows with the batch: `linear` or `sqrt`.
    """

    names: tuple[str, ...]
    lr_base: float
    lr_base_scale: str


SGD = Family(('sgd', 'nesterov', 'momentum'), 0.1, 'linear')  # timm's train.py; Goyal et al. 2017
# all others: Adam's kin, and what is scaled to its steps, as timm's Muon is. 0.001 at 512, 0.0014 at 1024
ADAM = Family((), 7e-4, 'sqrt')
FAMILIES = (
    SGD,
    Family(('lamb',), 1.8e-3, 'sqrt'),  # 0.005 at 2048: "ResNet strikes back", A2
    Family(('lion',), 7e-5, 'sqrt'),  # a tenth of AdamW's, as its authors say
    Family(('rmsprop',), 0.016, 'linear'),  # timm's recipes of EfficientNet and MobileNet
    Family(('lars', 'larc'), 0.3, 'linear'),  # SimCLR
    Family(('adagrad',), 1e-2, 'sqrt'),  # from here on torch's and timm's own defaults
    Family(('adadelta',), 1.0, 'sqrt'),
    ADAM,
)


def family_of(opt: str) -> Family:
    """Return the family of an optimizer's name in timm: `csgdw` → that of `sgd`."""
    return next((f for f in FAMILIES if any(part in opt.lower() for part in f.names)), ADAM)


def scaled_rate(lr_base: float, batch: int, lr_base_size: int, lr_base_scale: str) -> float:
    """Return lr_base · (batch / lr_base_size), or the root of this ratio with `sqrt`."""
    ratio = batch / lr_base_size
    return lr_base * (ratio**0.5 if lr_base_scale == 'sqrt' else ratio)
