"""A model as a file for another runtime: the file is the model, and a file that is not is caught."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from timm_rld import export_model
from timm_rld.__main__ import main as tools
from timm_rld.data import eval_transform
from timm_rld.data.images import decode
from timm_rld.export import check as checks
from timm_rld.export import export as exporting
from timm_rld.export.example import example
from timm_rld.export.export import open_file
from timm_rld.export.graph import Graph, describe
from timm_rld.hub.card import card_section
from timm_rld.hub.push import write_files
from timm_rld.inference import open_model
from timm_rld.pairing import Normalize
from timm_rld.report.run.verdict import _exports
from timm_rld.run_folder import read_exports, read_run
from train_distill import main

ROOT = Path(__file__).parent.parent
CLASSES = ['apple', 'pear', 'plum']
onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module')
def run(folder, tmp_path_factory) -> Path:
    """A finished run with averaged weights."""
    output = tmp_path_factory.mktemp('runs')
    assert main([
        '--student', 'test_resnet', '--distill', 'none', '--data-dir', str(folder), '--img-size', '32', '--epochs', '3',
        '-b', '8', '--opt', 'adamw', '--lr', '0.01', '--warmup-epochs', '0', '--no-aug', '--workers', '0',
        '--model-ema', '--model-ema-decay', '0.5', '--no-speed',
        '--output', str(output), '--experiment', 'run',
    ]) == 0  # fmt: skip
    return output / 'run'


def export(model: Path | str, output: Path, *flags: str) -> int:
    return tools(['export', str(model), '--output', str(output), '--no-speed', '--workers', '0', *flags])


def side_of(file: Path) -> dict:
    return json.loads(file.with_name(f'{file.name}.json').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def pt2(run, tmp_path_factory) -> Path:
    """The run's student as pt2, with the normalisation inside."""
    file = tmp_path_factory.mktemp('exported') / 'm.pt2'
    assert export(run, file, '--with-preprocessing') == 0
    return file


@pytest.fixture(scope='module', params=['m.onnx', 'm.pt2'])
def exported(request, run, tmp_path_factory) -> Path:
    """The same in each format."""
    if request.param == 'm.pt2':
        return request.getfixturevalue('pt2')
    file = tmp_path_factory.mktemp('exported') / request.param
    assert export(run, file, '--with-preprocessing') == 0
    return file


def images(rng: np.random.Generator, count: int, folder: Path) -> list[Path]:
    """Files of pictures of many sizes and formats, each of another colour."""
    paths = []
    for i in range(count):
        size = tuple(rng.integers(20, 90, 2).tolist())
        colours = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        paths.append(folder / f'{i}.{("png", "jpg", "webp")[i % 3]}')
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(paths[-1])
    return paths


# ------------------------------------------------------------------------------------------------------------ the file


def test_the_file_gives_the_students_logits_in_batches_of_any_size_and_says_what_it_takes(exported, run):
    opened, file = open_model(str(run)), open_file(exported, exported.suffix[1:], 1)
    assert file.about['input'] == {
        'name': 'pixels', 'dtype': 'uint8', 'layout': 'BHWC', 'shape': ['batch', 32, 32, 3], 'channels': 'RGB'
    }  # fmt: skip
    assert file.about['labels'] == CLASSES and file.about['preprocessing']['normalized_in_graph'] is True
    for batch in (1, 2, 7, 64):
        pixels = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8)
        with torch.no_grad():
            expected = opened.model(opened.normalize(pixels)).numpy()
        assert np.allclose(file(pixels.permute(0, 2, 3, 1).contiguous().numpy()), expected, atol=1e-4)


def test_the_side_file_says_what_the_file_says_and_has_the_figures_of_the_check(exported, run):
    side, found = side_of(exported), side_of(exported)['check']
    about = open_file(exported, exported.suffix[1:], 1).about
    assert {key: side[key] for key in about} == about
    top1 = json.loads((run / 'results.json').read_text())['student_top1']
    assert found['passed'] and found['images'] == 20 and found['top1'] == {'torch': top1, 'file': top1}
    assert {size: f['images'] for size, f in found['batches'].items()} == {'1': 20, '7': 20, '64': 20}
    assert found['same_top1'] == 1 and 0 <= found['largest_difference'] < 1e-3 < found['deviation']
    assert found['size_mb']['file'] == pytest.approx(exported.stat().st_size / 1e6, abs=1e-3)
    assert 'latency_ms' not in found


def test_no_path_of_this_machine_is_in_what_may_be_given_away(exported, run, folder):
    for file in exported.parent.iterdir():
        data = file.read_bytes()
        for private in (str(ROOT), str(run.parent), str(folder), torch.__path__[0], timm.__path__[0]):
            assert private.encode() not in data, file.name


def test_the_batch_has_its_name_in_the_graph(exported):
    if exported.suffix == '.onnx':
        graph = onnx.load(exported).graph
        for value in (graph.input[0], graph.output[0]):
            assert value.type.tensor_type.shape.dim[0].dim_param == 'batch'
        assert [graph.input[0].name, graph.output[0].name] == ['pixels', 'logits']


def test_without_preprocessing_the_averaged_student_takes_what_timms_transform_gives(run, folder, tmp_path):
    assert export(run, tmp_path / 'm.pt2', '--weights', 'ema') == 0
    file = open_file(tmp_path / 'm.pt2', 'pt2', 1)
    model = timm.create_model(f'local-dir:{run / "student_ema"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model, use_test_size=True))
    paths = sorted((folder / 'validation').rglob('*.png'))[:7]
    x = torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])
    with torch.no_grad():
        assert np.allclose(file(x.numpy()), model(x).numpy(), atol=1e-4)
    assert file.about['input']['layout'] == 'BCHW' and side_of(tmp_path / 'm.pt2')['weights'] == 'ema'


def test_a_runs_exports_go_to_the_hub_and_its_report_as_long_as_they_are_of_its_student(run, pt2, tmp_path):
    for suffix in ('', '.json', '.py'):
        shutil.copy(f'{pt2}{suffix}', f'{run}/student.pt2{suffix}')
    files = read_run(run)
    (found,) = read_exports(run)
    assert [p.name for p in found.beside] == ['student.pt2', 'student.pt2.json', 'student.pt2.py']
    write_files(files, run / 'student' / 'model.safetensors', tmp_path, 'me/x', 'mit', 'last', None)
    assert {p.name for p in found.beside} < {p.name for p in tmp_path.iterdir()}
    assert '| `student.pt2` | last | fp32 |' in (tmp_path / 'README.md').read_text()
    table = _exports(types.SimpleNamespace(run=files))
    assert table.rows[0][:3] == ['student.pt2', 'last', 'fp32'] and table.rows[0][5] == '100.00 %'
    side = side_of(found.file)
    assert side['epochs'] == 3
    beside = found.file.with_name('student.pt2.json')
    beside.write_text(json.dumps(side | {'epochs': 2}))
    assert read_exports(run) == []  # the run has been continued since
    beside.write_text(json.dumps(side))
    assert len(read_exports(run)) == 1
    with found.file.open('ab') as f:  # it is no longer what was checked
        f.write(b'x')
    assert read_exports(run) == [] and _exports(types.SimpleNamespace(run=files)) is None
    assert '## Exports' not in card_section(files, 'me/x', 'last', False)


@pytest.mark.slow
def test_an_export_lies_in_the_run_under_the_name_of_its_weights_and_the_report_shows_it(run):
    pytest.importorskip('jinja2')
    assert tools(['export', str(run), '--format', 'pt2', '--weights', 'best', '--workers', '0']) == 0
    assert (run / 'student_best.pt2.py').is_file()
    found = side_of(run / 'student_best.pt2')['check']
    assert all(set(found['latency_ms'][who]) == {'1', '64'} for who in ('torch', 'file')) and found['latency_device']
    assert tools(['report', str(run)]) == 0
    assert 'student_best.pt2' in (run / 'report.html').read_text()


# ---------------------------------------------------------------------------------------------------------- the example

BLOCKED = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('name', ['m.onnx', pytest.param('m.pt2', marks=pytest.mark.slow)])
def test_the_example_has_timms_top_5_for_50_images_where_there_is_neither_timm_nor_torch(name, tmp_path):
    torch.manual_seed(3)
    labels = [f'class {i}' for i in range(12)]
    model = timm.create_model('test_resnet', num_classes=12).eval()
    with torch.no_grad():  # random weights say almost the same of all images
        logits = model(torch.randn(64, 3, 32, 32) + 2 * torch.randn(64, 3, 1, 1))
        model.fc.weight.mul_(2 / logits.std(0).mean())
        model.fc.bias.copy_(-2 * logits.mean(0) / logits.std(0).mean())
    config = dict(
        input_size=(3, 32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), interpolation='bicubic', crop_pct=0.9,
        crop_mode='center',
    )  # fmt: skip
    export_model(model, tmp_path / 'model', data_config=config, label_names=labels)
    in_graph = ['--with-preprocessing'] * name.endswith('2')
    assert export(tmp_path / 'model', tmp_path / name, '--no-check', *in_graph) == 0
    program = tmp_path / f'{name}.py'
    assert len([line for line in program.read_text().splitlines() if line[0] != '#']) <= 15
    paths = images(np.random.default_rng(0), 50, tmp_path)
    blocked = ['timm', 'timm_rld', *(['torch', 'torchvision'] if name == 'm.onnx' else [])]
    command = [sys.executable, '-c', BLOCKED.format(blocked=blocked), str(program), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': ''})
    assert done.returncode == 0, done.stderr
    transform = timm.data.create_transform(**timm.data.resolve_data_config(config, model=model))
    rows, said = done.stdout.splitlines(), set()
    assert len(rows) == 50
    for path, row in zip(paths, rows):
        with torch.no_grad():
            probs = model(transform(Image.open(path).convert('RGB'))[None]).softmax(1)[0]
        top = probs.topk(5)
        shown = [f'{labels[i]} {p:.4f}' for i, p in zip(top.indices.tolist(), top.values.tolist())]
        file, *found = row.split('\t')
        assert file == str(path)
        assert [x.rpartition(' ')[0] for x in found] == [x.rpartition(' ')[0] for x in shown]
        assert all(abs(float(a.split()[-1]) - float(b.split()[-1])) < 2e-4 for a, b in zip(found, shown))
        said.add(found[0].rpartition(' ')[0])
    assert len(said) > 1


def odd_images(folder: Path) -> list[Path]:
    """Files that are easily read wrongly: turned by EXIF, transparent, of 16 bits, grey, with a palette."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (45, 70, 4), dtype=np.uint8)
    colour, exif = Image.fromarray(pixels[..., :3].copy()), Image.Exif()
    exif[0x0112] = 6
    palette = colour.quantize(16)
    files = {
        'turned.jpg': (colour, {'exif': exif}),
        'transparent.png': (Image.fromarray(pixels), {}),
        'deep.png': (Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256)), {}),
        'grey.png': (colour.convert('L'), {}),
        'palette.png': (palette, {'transparency': 3}),
        'cmyk.jpg': (colour.convert('CMYK'), {}),
        'small.png': (colour.resize((11, 13)), {}),
    }
    for name, (image, how) in files.items():
        image.save(folder / name, **how)
    return [folder / name for name in files]


def pixels_of_example(about: dict, path: Path, program: Path, monkeypatch) -> np.ndarray:
    """What the example beside a file gives to onnxruntime."""
    seen = []

    class Session:
        def __init__(self, _):
            pass

        def run(self, _, inputs):
            seen.extend(inputs.values())
            return [np.zeros((1, 3), np.float32)]

    program.write_text(example(program.stem, 'onnx', about), encoding='utf-8')
    program.with_suffix('.json').write_text(json.dumps(about), encoding='utf-8')
    monkeypatch.setitem(sys.modules, 'onnxruntime', types.SimpleNamespace(InferenceSession=Session))
    monkeypatch.setattr(sys, 'argv', [str(program), str(path)])
    runpy.run_path(str(program), run_name='__main__')
    return seen[0]


@pytest.mark.parametrize('channels', [3, 1])
@pytest.mark.parametrize(
    ('size', 'interpolation', 'crop_pct', 'crop_mode'),
    [
        ((32, 32), 'bicubic', 0.875, 'center'), ((33, 33), 'bilinear', 1.0, None), ((24, 40), 'bicubic', 0.9, 'center'),
        ((32, 24), 'nearest', 0.9, 'squash'), ((32, 32), 'bicubic', 0.95, 'border'),
        ((31, 40), 'lanczos', 1.0, 'border'),
    ],
)  # fmt: skip
def test_the_example_reads_resizes_and_crops_as_the_evaluation_does(
    size, interpolation, crop_pct, crop_mode, channels, tmp_path, monkeypatch
):
    config = dict(
        input_size=(channels, *size), mean=(0.4, 0.5, 0.6)[:channels], std=(0.2,) * channels, crop_pct=crop_pct,
        interpolation=interpolation, crop_mode=crop_mode,
    )  # fmt: skip
    how = {k: config[k] for k in ('interpolation', 'crop_pct', 'crop_mode', 'mean')}
    transform, mode = eval_transform(config['input_size'], **how), 'RGB' if channels == 3 else 'L'
    for exif in (True, False):
        about = describe(config, CLASSES, architecture='', in_graph=True, precision='fp32', exif=exif)
        for path in odd_images(tmp_path):
            with Image.open(path) as image:
                expected = transform(decode(image, mode, exif)).permute(1, 2, 0).numpy()
            found = pixels_of_example(about, path, tmp_path / 'm.onnx.py', monkeypatch)
            assert np.array_equal(found[0], expected), path.name


# ------------------------------------------------------------------------------------------------------- planted faults


class OtherMean(Graph):
    def __init__(self, model, normalize=None):
        super().__init__(model, normalize and Normalize((0.485, 0.456, 0.43), (0.229, 0.224, 0.225)))


class Bgr(Graph):
    def forward(self, x):
        return super().forward(x.flip(-1))


class Turned(Graph):
    def forward(self, x):
        return super().forward(x.transpose(1, 2))


class Coarse(Graph):  # a normalisation that hardly changes a class
    def forward(self, x):
        return super().forward(torch.div(x, 16, rounding_mode='floor') * 16)


def labels_moved(*args, **kwargs):
    about = describe(*args, **kwargs)
    return {**about, 'labels': [*about['labels'][1:], about['labels'][0]]}


def other_labels(*args, **kwargs):
    return {**describe(*args, **kwargs), 'labels': ['apple', 'pear', 'quince']}


def says_another_mean(*args, **kwargs):
    about = describe(*args, **kwargs)
    return {**about, 'preprocessing': {**about['preprocessing'], 'mean': [0.0, 0.0, 0.0]}}


def says_pixels_unnormalised(*args, **kwargs):
    about = describe(*args, **kwargs)
    return {**about, 'preprocessing': {**about['preprocessing'], 'normalized_in_graph': False}}


def frozen(graph, input_size):
    return torch.export.export(graph, (graph.example(input_size, 64),))


FAULTS = [
    ('Graph', OtherMean, ['--with-preprocessing'], 'deviation|the same class'),
    ('Graph', Bgr, ['--with-preprocessing'], 'the same class'),
    ('Graph', Turned, ['--with-preprocessing'], 'deviation|the same class'),
    ('Graph', Coarse, ['--with-preprocessing'], 'deviation|the same class'),
    ('describe', labels_moved, [], 'the same class as torch for 0.00%'),
    ('describe', says_another_mean, [], 'deviation|the same class'),
    ('describe', says_pixels_unnormalised, ['--with-preprocessing'], 'deviation|the same class'),
    ('trace', frozen, [], 'its runtime refuses batches of 1 and 7 and 64 '),
]


def refused(run: Path, file: Path, flags: list[str], text: str, capsys) -> None:
    """An export that the check refuses: what is said, and what is left."""
    assert export(run, file, *flags) == 1
    said = capsys.readouterr().err
    assert re.search(text, said) and f'{file.name}.failed' in said and '--min-agreement' in said, said
    assert sorted(p.name for p in file.parent.iterdir()) == [f'{file.name}.failed', f'{file.name}.failed.json']
    found = side_of(file.with_name(f'{file.name}.failed'))['check']
    assert not found['passed'] and found['faults']


@pytest.fixture
def eager(monkeypatch):
    """An export in no time: what would be traced and written runs as it is."""
    files = {}

    class File:
        runtime = 'torch'

        def __init__(self, plan, about):
            self.graph = exporting.Graph(plan.opened.model, plan.opened.normalize if plan.in_graph else None)
            self.about = json.loads(json.dumps(about))

        @torch.inference_mode()
        def __call__(self, x):
            return self.graph(torch.from_numpy(x)).numpy()

    def write(plan, about, part):
        files[part] = File(plan, about)
        part.touch()

    monkeypatch.setattr(exporting, '_write', write)
    monkeypatch.setattr(exporting, 'open_file', lambda part, *_: files[part])


def test_what_is_exported_right_passes_without_tracing_too(run, eager, tmp_path):
    for flags in ([], ['--with-preprocessing']):
        assert export(run, tmp_path / f'm{len(flags)}.pt2', *flags) == 0


@pytest.mark.parametrize(('what', 'fault', 'flags', 'text'), [f for f in FAULTS if f[0] != 'trace'])
def test_what_is_not_the_model_is_caught_and_kept_apart(
    run, eager, what, fault, flags, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(exporting, what, fault)
    refused(run, tmp_path / 'm.onnx', flags, text, capsys)


@pytest.mark.parametrize(
    ('what', 'fault', 'flags', 'text', 'format'),
    [
        pytest.param(*row, format, marks=[pytest.mark.slow] * (format == 'onnx' or row[1] is not frozen))
        for row in FAULTS if row[1] in {Bgr, labels_moved, frozen}
        for format in ('pt2', 'onnx')
    ],
)  # fmt: skip
def test_a_file_that_is_not_the_model_is_caught_and_kept_apart(
    run, what, fault, flags, text, format, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(exporting, what, fault)
    refused(run, tmp_path / f'm.{format}', flags, text, capsys)


def test_labels_that_are_not_the_models_are_caught(run, eager, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting, 'describe', other_labels)
    refused(run, tmp_path / 'm.pt2', [], 'other labels than the model', capsys)


def test_a_file_that_its_runtime_cannot_open_is_kept_apart(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting, '_write', lambda plan, about, part: part.write_bytes(b'no graph'))
    refused(run, tmp_path / 'm.onnx', [], r'its own runtime cannot open it \(InvalidProtobuf', capsys)


def test_min_agreement_and_no_check_let_a_file_pass_that_differs(run, eager, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, 'Graph', Bgr)
    flags = ['--with-preprocessing', '--format', 'pt2']
    assert export(run, tmp_path / 'a.pt2', *flags, '--min-agreement', '0') == 0
    assert side_of(tmp_path / 'a.pt2')['check']['min_agreement'] == 0
    assert export(run, tmp_path / 'b.pt2', *flags, '--no-check') == 0
    assert side_of(tmp_path / 'b.pt2')['check'] is None


def figures(same: float = 1.0, difference: float | None = 1e-5, torch_top1: float = 90.0, top1: float = 90.0) -> dict:
    return {'top1': {'torch': torch_top1, 'file': top1}, 'same_top1': same, 'largest_difference': difference,
            'deviation': 1.0, 'batches': {'1': {}, '7': {}, '64': {}}}  # fmt: skip


@pytest.mark.parametrize(
    ('found', 'precision', 'least', 'passes'),
    [
        (figures(), 'fp32', None, True), (figures(same=0.9991), 'fp32', None, True),
        (figures(same=0.9989), 'fp32', None, False), (figures(same=0.9989), 'fp32', 0.99, True),
        (figures(difference=0.011), 'fp32', None, False), (figures(difference=0.011), 'fp32', 0.999, True),
        (figures(difference=None), 'fp32', 0.0, False),
        (figures(difference=0.5, same=0.9, top1=89.01), 'int8', None, True),
        (figures(same=0.9, top1=88.99), 'int8', None, False), (figures(same=0.9, top1=88.99), 'int8', 0.9, True),
        (figures(same=0.9, top1=91.0), 'int8', 0.91, False), (figures(top1=95.0), 'int8', None, True),
    ],
)  # fmt: skip
def test_the_limits_are_those_of_the_docs(found, precision, least, passes):
    assert (checks.faults(found, precision, least) == []) is passes


def test_labels_are_matched_by_name_and_of_equal_ones_the_one_at_its_place_is_meant():
    assert checks.output_order(['b', 'a', 'c'], ['a', 'b', 'c']) == [1, 0, 2]
    assert checks.output_order(['crane', 'x', 'crane'], ['crane', 'x', 'crane']) == [0, 1, 2]
    assert checks.output_order(['a', 'b'], ['a', 'c']) is None


# ---------------------------------------------------------------------------------------------------------------- int8


def test_int8_is_calibrated_on_training_images_and_its_accuracy_is_printed_beside_the_models(
    run, folder, tmp_path, monkeypatch, capsys
):
    seen, quantize = [], exporting.quantize

    def spy(file, target, batches):
        batches = list(batches)
        seen.append(np.concatenate(batches))
        quantize(file, target, iter(batches))

    monkeypatch.setattr(exporting, 'quantize', spy)
    monkeypatch.setattr(exporting, 'IMAGES', 30)
    flags = ['--precision', 'int8', '--with-preprocessing', '--min-agreement', '0.5']
    assert export(run, tmp_path / 'm.onnx', *flags) == 0
    config = open_model(str(run)).data_config
    transform = eval_transform(**{k: config[k] for k in ('input_size', 'interpolation', 'crop_pct', 'crop_mode')})
    files = [decode(Image.open(path), 'RGB') for path in (folder / 'train').rglob('*.png')]
    training = {transform(image).permute(1, 2, 0).contiguous().numpy().tobytes() for image in files}
    assert len(seen[0]) == 30 and {image.tobytes() for image in seen[0]} <= training
    assert len({image.tobytes() for image in seen[0]}) == 30
    said, found = capsys.readouterr().out, side_of(tmp_path / 'm.onnx')['check']
    assert re.search(rf'top-1, % +{found["top1"]["torch"]:.2f} +{found["top1"]["file"]:.2f}', said)
    model = onnx.load(tmp_path / 'm.onnx')
    weights = [w for w in model.graph.initializer if w.data_type == onnx.TensorProto.INT8 and len(w.dims) == 4]
    scales = {w.name: w for w in model.graph.initializer}
    assert weights and any(
        tuple(scales[name].dims) == (w.dims[0],) for w in weights for name in scales if name == f'{w.name[:-10]}_scale'
    )
    assert {p.key for p in model.metadata_props} >= {'labels', 'preprocessing', 'input'}


# ----------------------------------------------------------------------------------------------------- other networks


def model_folder(tmp_path: Path, name: str, in_chans: int = 3, **kwargs) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, in_chans=in_chans, **kwargs).eval()
    config = timm.data.resolve_data_config({}, model=model)
    config['mean'], config['std'] = config['mean'][:in_chans], config['std'][:in_chans]
    if name == 'cifar_resnet8':
        config['input_size'] = (in_chans, 32, 32)
    return export_model(model, tmp_path / 'model', data_config=config, label_names=CLASSES)


@pytest.mark.parametrize(
    ('name', 'format', 'kwargs'),
    [
        pytest.param('test_vit', 'onnx', {'img_size': 32}, marks=pytest.mark.slow, id='fixed size, onnx'),
        pytest.param('test_vit', 'pt2', {'img_size': 32}, marks=pytest.mark.slow, id='fixed size'),
        pytest.param('cifar_resnet8', 'onnx', {'in_chans': 1}, marks=pytest.mark.slow, id='one channel, onnx'),
        pytest.param('cifar_resnet8', 'pt2', {'in_chans': 1}, id='one channel'),
    ],
)
def test_networks_of_a_fixed_size_and_of_one_channel_are_exported(name, format, kwargs, folder, tmp_path):
    model = model_folder(tmp_path, name, **kwargs)
    file = tmp_path / f'm.{format}'
    flags = ['--with-preprocessing', '--data-dir', str(folder)]
    assert export(model, file, *flags) == 0
    side = side_of(file)
    assert side['check']['passed'] and side['input']['channels'] == ('L' if 'in_chans' in kwargs else 'RGB')
    if 'in_chans' in kwargs and format == 'onnx':
        image = next((folder / 'validation').rglob('*.png'))
        done = subprocess.run([sys.executable, f'{file}.py', str(image)], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith(str(image)), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('name', ['cifar_shufflev2', 'test_efficientnet', 'test_convnext', 'test_mambaout'])
def test_the_benchmark_exports_a_family(name):
    from benchmarks import export as benchmark

    row = {}
    benchmark.examine(name, row.update)
    assert benchmark.passes(row), row
    text = benchmark.table([{'family': name, 'architecture': name, 'parameters': 1, 'note': '', **row}])
    assert text.startswith('1 architectures: onnx 1, pt2 1.') and f'| {name} | {name} | 0.0 |' in text


# ----------------------------------------------------------------------------------------------------------- bad input


class Depends(Graph):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x.flatten(1)[:, :3]


@pytest.mark.parametrize(
    ('flags', 'code', 'text'),
    [
        (['{model}'], 2, '--data-dir D or --dataset NAME, or --no-check'),
        (['{model}', '--precision', 'int8', '--no-check'], 2, 'int8 is calibrated on training images'),
        (['{model}', '--data-dir', '/nowhere'], 1, '--no-check exports without a check'),
        (['{run}', '--format', 'pt2', '--precision', 'int8'], 2, '--precision int8: is made by onnxruntime'),
        (['{run}', '--min-agreement', '2'], 2, '--min-agreement 2: is a share, from 0 to 1'),
        (['{run}', '--min-agreement', '0.9', '--no-check'], 2, '--no-check compares nothing'),
        (['{run}', '--format', 'pt2', '--output', 'm.onnx'], 2, '--output m.onnx: is the name of another --format'),
        (['{run}', '--output', 'm.pb'], 2, '--output m.pb: must end in .onnx'),
        (['{run}', '--output', 'config', '--format', 'pt2'], 2, '--output config: must end in .pt2'),
        (['{run}', '--output', '{there}'], 1, 'is there already; delete it, or name another file'),
        (['{run}', '--output', '{there}/m.onnx'], 1, 'there is no folder'),
        (['{run}', '--weights', 'none'], 2, "--weights: invalid choice: 'none'"),
        (['{run}/nothing'], 1, 'no such folder'),
    ],
)
def test_what_is_wrong_is_said_in_a_line_before_any_work(run, flags, code, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting, '_write', None)
    (tmp_path / 'there.onnx').touch()
    places = {'model': run / 'student', 'run': run, 'there': tmp_path / 'there.onnx'}
    monkeypatch.chdir(tmp_path)
    assert tools(['export', *(flag.format(**places) for flag in flags)]) == code
    said = capsys.readouterr().err
    assert text in said and said.startswith('timm-rld: error: ') and said.count('\n') <= 2
    assert [p.name for p in tmp_path.iterdir()] == ['there.onnx']


@pytest.mark.parametrize(('name', 'beside'), [('m.pt2', 'm.pt2.json'), ('m.pt2', 'm.pt2.py')])
def test_a_file_beside_the_output_that_is_no_export_is_never_overwritten(run, name, beside, tmp_path, capsys):
    (tmp_path / beside).write_text('{"top1": 90}')
    assert export(run, tmp_path / name, '--no-check') == 1
    assert f'{beside} would be written beside it, and is there already' in capsys.readouterr().err
    assert (tmp_path / beside).read_text() == '{"top1": 90}' and len(list(tmp_path.iterdir())) == 1


def test_what_an_earlier_export_left_beside_a_file_that_was_deleted_is_replaced(run, pt2, tmp_path):
    for name in ('m.pt2.json', 'm.pt2.py'):
        shutil.copy(pt2.with_name(name), tmp_path / name)
    assert export(run, tmp_path / 'm.pt2', '--no-check') == 0
    assert side_of(tmp_path / 'm.pt2')['check'] is None


def test_a_model_folder_that_is_the_working_folder_gives_the_export_its_name(run, tmp_path, monkeypatch):
    shutil.copytree(run / 'student', tmp_path / 'fruit')
    monkeypatch.chdir(tmp_path / 'fruit')
    assert tools(['export', '.', '--format', 'pt2', '--no-check']) == 0
    assert (tmp_path / 'fruit' / 'fruit.pt2').is_file()


def test_a_model_that_cannot_be_exported_gives_the_exporters_reason_in_a_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting, 'Graph', Depends)
    assert export(run, tmp_path / 'm.onnx') == 1
    said = capsys.readouterr().err
    assert 'run cannot be exported: ' in said and 'data-dependent' in said and said.count('\n') == 1, said
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_named_with_the_pip_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('timm_rld.export.onnx.importlib.util.find_spec', lambda name: None)
    assert export(run, tmp_path / 'm.onnx') == 1
    said = capsys.readouterr().err
    assert "pip install 'timm-rld[export]'" in said and 'onnxruntime' in said and '--format pt2' in said


def test_several_processes_are_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert export(run, tmp_path / 'm.pt2') == 2
    assert 'works in one process' in capsys.readouterr().err


def test_logits_that_are_not_finite_are_no_ground_for_a_comparison(folder, eager, tmp_path, capsys):
    model = model_folder(tmp_path, 'test_resnet')
    state = load_file(model / 'model.safetensors')
    state['fc.bias'].fill_(float('nan'))
    save_file(state, model / 'model.safetensors', {'format': 'pt'})
    assert export(model, tmp_path / 'm.pt2', '--data-dir', str(folder)) == 1
    assert 'its logits are not finite' in capsys.readouterr().err
