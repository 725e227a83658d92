"""The program that lies beside an exported file: it needs neither timm nor this package, and for ONNX not torch."""

from __future__ import annotations

import math

from .graph import About

HEADING = '# The five most probable classes of images'
_NEEDS = {'onnx': 'onnxruntime, Pillow and NumPy', 'pt2': 'torch and Pillow'}
_IMPORT = {'onnx': 'import numpy as np, onnxruntime', 'pt2': 'import torch'}
_OPEN = {'onnx': 'onnxruntime.InferenceSession(__file__[:-3])', 'pt2': 'torch.export.load(__file__[:-3]).module()'}
_RUN = {
    'onnx': """    logits = model.run(None, {{{name!r}: x}})[0][0]
    probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()""",
    'pt2': '    with torch.inference_mode(): probs = model(x)[0].softmax(0)',
}
_TOP = {'onnx': 'np.argsort(-probs)[:5]', 'pt2': 'probs.argsort(descending=True)[:5]'}


def example(name: str, format: str, about: About) -> str:
    """Return the text of a program that prints the five most probable classes of image files.

    It decodes, resizes and crops an image as this package does, and so as timm's validation transform.

    Args:
        name: of the exported file, beside which the program will lie as NAME.py.
        format: `onnx` or `pt2`.
        about: of the file.
    """
    to, upright = about['input'], about['preprocessing']['exif']
    opened = 'ImageOps.exif_transpose(Image.open(path))' if upright else 'Image.open(path)'
    lines = [
        f'{HEADING}: python {name}.py IMAGE …  (needs {_NEEDS[format]})',
        'import json, sys',
        _IMPORT[format],
        f'from PIL import Image{", ImageOps" if upright else ""}',
        f"about, model = json.load(open(__file__[:-3] + '.json', encoding='utf-8')), {_OPEN[format]}",
        f'for path in sys.argv[1:] or sys.exit({f"usage: python {name}.py IMAGE …"!r}):',
        f'    im = {opened}',
        "    if im.mode[0] == 'I': im = im.convert('I').point(lambda v: v * (1 / 257) + 0.5).convert('L')",
        '    if im.has_transparency_data: '
        "im = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im.convert('RGBA'))",
        *_resize_and_crop(about),
        *_to_input(about, format),
        _RUN[format].format(name=to['name']),
        f"    print(path, *(f'{{about[\"labels\"][i]}} {{probs[i]:.4f}}' for i in {_TOP[format]}), sep='\\t')",
    ]
    return '\n'.join(lines) + '\n'


def _resize_and_crop(about: About) -> list[str]:
    """Lines from an upright image to pixels of the model's size: timm's crop modes."""
    of, mode = about['preprocessing'], about['input']['channels']
    (h, w), fit = of['size'], of['crop_mode']
    scale_h, scale_w = (math.floor(side / of['crop_pct']) for side in (h, w))
    method = f'Image.Resampling.{of["interpolation"].upper()}'
    if fit == 'squash':
        size = f'({scale_w}, {scale_h})'
    elif fit == 'border' or scale_h != scale_w:
        which = 'max' if fit == 'border' else 'min'
        size = f'[round(n / {which}(im.width / {scale_w}, im.height / {scale_h})) for n in im.size]'
    else:
        size = f'[int({scale_h} * n / min(im.size)) for n in im.size]'
    lines = [f'    im = im.convert({mode!r}).resize({size}, {method})']
    if fit == 'border':
        fill = tuple(round(255 * x) for x in of['mean'])
        return [
            *lines,
            f'    at = [(m - n) // 2 if n < m else -round((n - m) / 2) for n, m in zip(im.size, ({w}, {h}))]',
            f'    part, im = im, Image.new({mode!r}, ({w}, {h}), {fill if len(fill) > 1 else fill[0]})',
            '    im.paste(part, at)',
        ]
    return [
        *lines,
        f'    left, top = round((im.width - {w}) / 2), round((im.height - {h}) / 2)',
    ]


def _to_input(about: About, format: str) -> list[str]:
    """Lines from pixels to what the graph takes."""
    of, c, (h, w) = about['preprocessing'], len(about['input']['channels']), about['preprocessing']['size']
    im = 'im' if of['crop_mode'] == 'border' else f'im.crop((left, top, left + {w}, top + {h}))'
    if format == 'onnx':
        lines = [f'    x = np.asarray({im}).reshape(1, {h}, {w}, {c})']
        floats, axes = 'np.float32', 'transpose'
    else:
        lines = [f'    x = torch.frombuffer(bytearray({im}.tobytes()), dtype=torch.uint8).view(1, {h}, {w}, {c})']
        floats, axes = 'torch.tensor', 'permute'
    if not of['normalized_in_graph']:
        mean, std = (f'{floats}({of[k]})' for k in ('mean', 'std'))
        x = 'np.float32(x)' if format == 'onnx' else 'x'
        lines.append(f'    x = (({x} / 255 - {mean}) / {std}).{axes}(0, 3, 1, 2)')
    return lines
