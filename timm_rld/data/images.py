"""From an opened image to the pixels that a run sees: upright, in one mode of 8 bits a channel."""

from __future__ import annotations

import numpy as np
from PIL import Image, UnidentifiedImageError

# A run's facts and a cache's name them, so that neither continues with other pixels than it was started with.
DECODING_RULES = 2
_ORIENTATION = 0x0112
_TAGS = {'exif', 'xmp', 'Raw profile type exif', 'XML:com.adobe.xmp'}
_T = Image.Transpose
# EXIF orientation → what makes the image upright, whether that swaps width and height, and whether what is left
# (above) then was at the right (below) or, where they are swapped, at the far end of the other side.
_TURNS = {
    2: (_T.FLIP_LEFT_RIGHT, False, True, False),
    3: (_T.ROTATE_180, False, True, True),
    4: (_T.FLIP_TOP_BOTTOM, False, False, True),
    5: (_T.TRANSPOSE, True, False, False),
    6: (_T.ROTATE_270, True, True, False),
    7: (_T.TRANSVERSE, True, True, True),
    8: (_T.ROTATE_90, True, False, True),
}


def decode(image: Image.Image, mode: str, exif: bool = True) -> Image.Image:
    """The image decoded, in the mode `RGB` or `L`, turned upright. What is upright and in this mode is not copied.

    - Transparent pixels are laid on white.
    - 16-bit grey is scaled: 65535 becomes 255.
    - Of an animation the first frame is taken. Palettes, CMYK, 1-bit and grey images are converted as Pillow does.

    Args:
        exif: whether to apply the EXIF orientation. Pillow itself applies that of TIFF, without being asked.

    Raises:
        ValueError: for 32-bit and floating-point grey values: what black and white are is not known.
    """
    image.load()
    turn = orientation(image) if exif else 1
    if image.mode != mode or 'transparency' in image.info:
        image = _in_mode(image, mode)
    if turn != 1:
        image = image.transpose(_TURNS[turn][0])
        image.info = {}  # it is upright now: a second call has nothing to turn
    return image


def reason(error: Exception) -> str:
    """Why an image cannot be read, in words."""
    if isinstance(error, UnidentifiedImageError):
        return 'it is no image in a format that Pillow reads'
    if isinstance(error, Image.DecompressionBombError):
        return f'{str(error).partition(",")[0]}; make it smaller'
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # its text names the file, too
    return str(error) if type(error) is ValueError else f'{type(error).__name__}: {error}'


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 also where it is missing or damaged. Only that of a JPEG is known before
    the image is loaded."""
    if not _TAGS & image.info.keys():
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return int(value) if value in _TURNS else 1


def upright_size(size: tuple[int, int], turn: int) -> tuple[int, int]:
    """(width, height) of an image of this size once it is turned by :func:`decode`."""
    return size[::-1] if turn != 1 and _TURNS[turn][1] else size


def flips(turn: int) -> tuple[bool, bool]:
    """Whether turning upright counts x, and y, from the other end of the side that they lay along."""
    return _TURNS[turn][2:] if turn != 1 else (False, False)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    # Pillow knows what 16 bits are in PNG and PNM, also where it gives them as 32
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values * 255 + 32895) >> 16).astype(np.uint8))  # v / 257, rounded
    elif image.mode in ('I', 'F'):
        kind = 'floating-point' if image.mode == 'F' else '32-bit'
        raise ValueError(f'{kind} grey values, of which it is not known what is white; save it with 8 or 16 bits')
    elif image.has_transparency_data:
        colours = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), colours)
    return image if image.mode == mode else image.convert(mode)
