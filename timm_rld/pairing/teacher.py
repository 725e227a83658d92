"""The teacher: a frozen network with a normalisation of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import UserError
from .features import Taps, forward_with_features, to_float32
from .fold import fold_batch_norms
from .weights import ModelInfo, weights_digest

Floats = Sequence[float]


class Normalize(nn.Module):
    """From the pixels that both networks share to what one of them takes: a resize where it needs one, then the
    normalisation.

    Args:
        mean, std: of pixels in 0..1, one value or one a channel.
        size: (H, W) that the network wants, or None to take the pixels as they are. Resizing is antialiased.
        interpolation: `bicubic` or `bilinear`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Floats,
        std: Floats,
        size: tuple[int, int] | None = None,
        interpolation: str = 'bicubic',
    ) -> None:
        super().__init__()
        self.register_buffer('mean', 255 * torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', 255 * torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.size = tuple(size) if size else None
        self.interpolation = resize_mode(interpolation)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels `[B, C, H, W]` in 0..255, uint8 or floating → normalised `[B, C, h, w]`, float32 or higher."""
        x = pixels if pixels.is_floating_point() else pixels.to(self.mean.dtype)
        if self.size and x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode=self.interpolation, antialias=True, align_corners=False)
        if x is pixels:
            return (x - self.mean) / self.std
        return x.sub_(self.mean).div_(self.std)  # in place: fresh memory costs more than arithmetic

    def inverse(self, normalized: Tensor) -> Tensor:
        """Return pixels in 0..255, floating, from normalised ones."""
        return normalized * self.std + self.mean

    def extra_repr(self) -> str:
        mean, std = ([round(v, 4) for v in (b.flatten() / 255).tolist()] for b in (self.mean, self.std))
        return f'mean={mean}, std={std}, size={self.size}'


def resize_mode(interpolation: str | None) -> str:
    """The mode of `F.interpolate` for the interpolation of a model's config: those without antialiasing become
    `bilinear`, and none becomes timm's default, `bicubic`."""
    return interpolation if interpolation in ('bicubic', 'bilinear') else 'bilinear' if interpolation else 'bicubic'


class Teacher(nn.Module):
    """A frozen network: eval mode whatever `train()` says, no gradients, inference only.

    Args:
        model: a classifier with logits `[B, T]`.
        normalize: its resize and normalisation; None for that of the model's `pretrained_cfg`.
        class_map: for each class of the dataset the teacher's output; None where they are the same.
        name: for messages.

    Attributes:
        taps: the features that :meth:`with_features` gives; None where nobody asks for any.
    """

    answers = 'logits'  # what it returns; a closed teacher gives less
    class_map: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        normalize: Normalize | None = None,
        class_map: Sequence[int] | None = None,
        name: str = 'teacher',
    ) -> None:
        super().__init__()
        self.name = name
        self.other_names = False  # its labels have none of the dataset's names
        self.folded = 0  # batch norms
        self.digest: str | None = None  # of the weights as they were loaded, once they are folded
        self.taps: Taps | None = None
        self.own_size: tuple[int, int] | None = None  # (H, W) that its weights were made for, where that is known
        self.model = model
        self.normalize = normalize if normalize is not None else create_normalize(model)
        index = None if class_map is None else torch.tensor(list(class_map), dtype=torch.int64)
        self.register_buffer('class_map', index, persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    def compile(self, **kwargs: Any) -> None:
        """Compile the network's forward pass (`torch.compile`)."""
        self._logits = torch.compile(self._logits, **kwargs)  # type: ignore[method-assign]
        self._with_features = torch.compile(self._with_features, **kwargs)  # type: ignore[method-assign]

    def optimize_for_inference(self, size: tuple[int, int, int], channels_last: bool = True) -> int:
        """Make the forward pass faster without changing what it computes: batch norms are folded into the convolutions
        before them (:func:`timm_rld.pairing.fold.fold_batch_norms`), and its weights are put into channels-last memory
        format.

        Args:
            size: (C, H, W) of the pixels.
            channels_last: the memory format.

        Returns:
            How many batch norms were folded.
        """
        if self.digest is None:
            self.digest = weights_digest(self)
        noise = torch.randint(256, (4, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        noise[2], noise[3] = 0, 255
        x = self.normalize(noise.to(self.normalize.mean.device))
        self.folded += fold_batch_norms(self.model, x, None if self.taps is None else self._outputs)
        # after the folds, which are tried in float64: there depthwise convolutions are slow in channels-last
        to_memory_format(self.model, torch.channels_last if channels_last else torch.contiguous_format)
        return self.folded

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels `[B, C, H, W]` in 0..255 → logits over the dataset's classes `[B, C]`."""
        with torch.inference_mode():
            logits = self._logits(self.normalize(pixels))
            if self.class_map is not None:
                logits = logits.index_select(1, self.class_map)
        return logits.clone()  # out of inference mode, so that autograd may save it

    def with_features(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pixels `[B, C, H, W]` in 0..255 → logits over the dataset's classes `[B, C]`, and the features of
        :attr:`taps`, of one forward pass."""
        with torch.no_grad():  # not inference mode, out of which maps would have to be copied
            logits, features = self._with_features(self.normalize(pixels))
            if self.class_map is not None:
                logits = logits.index_select(1, self.class_map)
        return logits, features

    def _with_features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        assert self.taps is not None, 'no features were asked for'
        return forward_with_features(self.model, x, self.taps, head_in_float32=True)

    def _outputs(self, model: nn.Module, x: Tensor) -> list[Tensor]:
        """All that must stay the same when batch norms are folded."""
        assert self.taps is not None, 'no features were asked for'
        logits, features = forward_with_features(model, x, self.taps)
        return [logits, *features]

    def _logits(self, x: Tensor) -> Tensor:
        """Under autocast the head still works in float32: rounded logits tie, and ties change what RLD masks."""
        model: Any = self.model
        if not torch.is_autocast_enabled(x.device.type) or not hasattr(model, 'forward_head'):
            return model(x)
        features = model.forward_features(x)  # of some networks a list
        with torch.autocast(x.device.type, enabled=False):
            return model.forward_head(tree_map(to_float32, features))


def create_normalize(
    model: nn.Module,
    *,
    mean: Floats | None = None,
    std: Floats | None = None,
    img_size: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> Normalize:
    """Return the normalisation of a timm model's config, with a resize where the model takes one size only.

    Args:
        mean, std: in place of the config's.
        img_size: resize to this size.
        image_size: (H, W) of the shared pixels, to leave out a resize that does nothing.
    """
    from timm.data import resolve_input_data_config

    args = {k: tuple(v) for k, v in (('mean', mean), ('std', std)) if v is not None}
    config = resolve_input_data_config(model, args)
    size = None
    if img_size:
        size = (img_size, img_size)
    elif has_fixed_size(model):
        size = tuple(config['input_size'][-2:])
    if size == image_size:
        size = None
    return Normalize(config['mean'], config['std'], size, config['interpolation'])


def resized_to(info: ModelInfo, img_size: int | None, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """The (H, W) that :func:`create_teacher` resizes the shared images to; None where it takes them as they are. No
    weights are loaded.

    Args:
        info: from :func:`look_up`.
        img_size: of `--teacher-img-size`.
        image_size: (H, W) of the shared images.
    """
    size = (img_size, img_size) if img_size else None
    if size is None and info.config.get('fixed_input_size'):
        from timm import create_model
        from timm.models import get_model_input_config

        with torch.device('meta'):  # some configs call a network fixed that takes any size
            config = get_model_input_config(create_model(info.name))
        size = tuple(config['input_size'][-2:]) if config['fixed_input_size'] else None
    return None if size == image_size else size


def has_fixed_size(model: nn.Module) -> bool:
    """Return whether a timm model takes images of one size only, as most vision transformers do."""
    from timm.models import get_model_input_config

    return bool(get_model_input_config(model)['fixed_input_size'])


def to_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Put a network's 4-D weights into a memory format, which those of other dimensions do not have."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model computes batch statistics, which a single sample may not have."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def least_teacher_accuracy(num_classes: int) -> float:
    """Return the top-1 below which a teacher counts as near chance: twice chance, or chance and a tenth of the rest if
    lower."""
    chance = 100 / num_classes
    return min(2 * chance, chance + 0.1 * (100 - chance))


def check_accuracy(name: str, top1: float, num_classes: int, least: float | None) -> None:
    """Raise UserError where a teacher's top-1 (percent) is below ``least``, by default
    :func:`least_teacher_accuracy`."""
    limit = least_teacher_accuracy(num_classes) if least is None else least
    if not top1 >= limit:
        near = ' (near chance): check that its classes match the dataset, or train it for more --teacher-epochs'
        raise UserError(
            f'--teacher {name}: its top-1 of {top1:.2f} is below {limit:.4g}{near if least is None else ""}\n'
            '--min-teacher-acc sets another limit (0: none)'
        )
