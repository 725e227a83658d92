"""What the CIFAR networks share: timm's interface around a stem, a few stages and a classifier."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs
from torch import Tensor, nn

from .._timm import feature_take_indices


class CifarNet(nn.Module):
    """A classifier of 32×32 images with timm's interface, whose parameters keep their published names.

    Pooling is global, so that any image size from 8×8 on will do; the published programs pool a fixed window, which at
    32×32 is the same.

    A subclass builds its layers, then calls :meth:`_finish`; it writes :meth:`stem`, and :meth:`run_stage` and
    :meth:`end` where there is more to do than to call the modules.

    Attributes:
        stages: for each stage the names of its modules. Features are those after the stem and after each stage.
        stem_name: of the module whose output the first features are.
        classifier_name: of the last linear layer.
    """

    stages: tuple[tuple[str, ...], ...] = (('layer1',), ('layer2',), ('layer3',))
    stem_name = 'conv1'
    classifier_name = 'fc'
    # for group_matcher: parameters of the stem, of stages and of their blocks, and what comes after
    stem_pattern = r'^(?:conv1|bn1)'
    block_pattern = (r'^layer(\d+)', r'^layer(\d+)\.(\d+)')
    end_pattern = r'^(?:conv2|bn2)'

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False

    def _finish(self, channels: list[int], reductions: list[int], num_features: int, global_pool: str) -> None:
        """Make the classifier, and describe the features: channels and reduction of the stem and each stage."""
        modules = [self.stem_name, *(names[-1] for names in self.stages)]
        self.feature_info = [
            dict(num_chs=c, reduction=r, module=m, stem=not i)
            for i, (c, r, m) in enumerate(zip(channels, reductions, modules, strict=True))
        ]
        self.num_features = num_features
        self._make_classifier(num_classes=self.num_classes, global_pool=global_pool)

    def _make_classifier(self, num_classes: int, global_pool: str) -> None:
        self.global_pool, classifier = create_classifier(self.num_features, num_classes, global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.num_classes = num_classes
        parent, _, name = self.classifier_name.rpartition('.')
        if parent and not hasattr(self, parent):
            setattr(self, parent, nn.Sequential())
        setattr(self.get_submodule(parent), name, classifier)

    # ------------------------------------------------------------------------------------------------------- forward

    def stem(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` → the first features."""
        raise NotImplementedError

    def run_stage(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        """Features through one stage's modules."""
        for name in names:
            stage = self.get_submodule(name)
            if self.grad_checkpointing and self.training:
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
        return x

    def end(self, x: Tensor) -> Tensor:
        """What comes between the last stage and the pooling."""
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` → features before pooling `[B, num_features, h, w]`."""
        x = self.stem(x)
        for names in self.stages:
            x = self.run_stage(names, x)
        return self.end(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features → logits `[B, num_classes]`, or the pooled features."""
        x = self.global_pool(x)
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after the stem and after each stage; arguments and result as in timm's own models."""
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take, last = feature_take_indices(len(self.stages) + 1, indices)
        x = self.stem(x)
        found = [x] if 0 in take else []
        for i, names in enumerate(self.stages[: last if stop_early else None], 1):
            x = self.run_stage(names, x)
            if i in take:
                found.append(x)
        return found if intermediates_only else (self.end(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what :meth:`forward_intermediates` does not need for some features. Returns their indices."""
        take, last = feature_take_indices(len(self.stages) + 1, indices)
        for names in self.stages[last:]:
            for name in names:
                parent, _, child = name.rpartition('.')
                setattr(self.get_submodule(parent), child, nn.Sequential())
        if prune_head:
            self.reset_classifier(0)
        return take

    # ------------------------------------------------------------------------------------------- timm's other methods

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh head in place; 0 classes: none."""
        like = next(self.parameters())
        self._make_classifier(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)
        self.to(like.device, like.dtype)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers in order of depth, for layer-wise learning rates."""
        blocks = self.block_pattern
        after = (self.end_pattern, (99999,))
        return dict(stem=self.stem_pattern, blocks=blocks[0] if coarse else [(blocks[1], None), after])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute a stage's activations in the backward pass."""
        self.grad_checkpointing = enable


def init_weights(module: nn.Module, linear_std: float | None = None) -> None:
    """Convolutions from N(0, 2 / (kernel² · output channels)), norms 1 and 0, as most of the published programs do.

    Args:
        linear_std: deviation of the linear layers, whose bias then starts at 0; None leaves them torch's own.
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear) and linear_std is not None:
            nn.init.normal_(m.weight, std=linear_std)
            nn.init.zeros_(m.bias)


def conv(in_chs: int, out_chs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution with the padding that keeps the size (at stride 1)."""
    return nn.Conv2d(in_chs, out_chs, kernel, stride, kernel // 2, groups=groups, bias=bias)


def cifar_cfgs(first_conv: str, classifier: str, *names: str) -> Any:
    """timm's pretrained_cfg of each name: 100 classes, 32×32, the normalisation of CIFAR-100, no published weights."""
    cfg = dict(
        url='',
        num_classes=100,
        input_size=(3, 32, 32),
        pool_size=None,
        crop_pct=1.0,
        interpolation='bilinear',
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        first_conv=first_conv,
        classifier=classifier,
    )
    return generate_default_cfgs({f'{name}.untrained': dict(cfg) for name in names})


Net = TypeVar('Net', bound=CifarNet)


def build(
    cls: type[Net],
    name: str,
    pretrained: bool,
    args: dict[str, Any],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Net:
    """Return what timm's builder makes, with all features for `features_only`, and moved where asked for, as timm's own
    models are."""
    kwargs = {**args, **kwargs}
    features = dict(out_indices=tuple(range(len(cls.stages) + 1)), feature_cls='getter')
    return build_model_with_cfg(cls, name, pretrained, feature_cfg=features, **kwargs).to(device=device, dtype=dtype)
