"""What a run leaves of its networks' predictions, and the verbs that make more of them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo

from timm_rld import engine, export_model
from timm_rld.__main__ import main as tools
from timm_rld.distributed import create_accelerator
from timm_rld.errors import UserError
from timm_rld.inference.evaluate import evaluation_settings
from timm_rld.inference.model import open_model, output_of_each_class
from timm_rld.pairing import look_up
from timm_rld.run_folder import read_run
from train_distill import main

pytestmark = pytest.mark.usefixtures('forked_python')
ROOT = Path(__file__).parent.parent
CLASSES = ['apple', 'pear', 'plum']


@pytest.fixture(scope='module')
def flags(folder, trained_teacher) -> list[str]:
    return [
        '--teacher', f'local-dir:{trained_teacher}', '--student', 'test_resnet', '--data-dir', str(folder),
        '--img-size', '32', '--epochs', '3', '-b', '8', '--lr', '0.004', '--min-teacher-acc', '0', '--workers', '0',
        '--model-ema', '--model-ema-decay', '0.5',
    ]  # fmt: skip


@pytest.fixture(scope='module')
def run(flags, tmp_path_factory) -> Path:
    """A finished run, whose last epoch is not the best."""
    for rate in ('0.004', '0.02', '0.001', '0.05', '0.0003'):
        output = tmp_path_factory.mktemp('runs')
        assert main([*flags, '--lr', rate, '--output', str(output), '--experiment', 'run']) == 0
        if read_run(output / 'run').results['best_epoch'] != 3:
            return output / 'run'
    raise AssertionError('with each learning rate the last epoch is the best')


def results_of(folder: Path) -> dict:
    return json.loads((folder / 'results.json').read_text(encoding='utf-8'))


def table_of(folder: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(folder / 'predictions.parquet')
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def logits_of(folder: Path, files: list[Path]) -> torch.Tensor:
    """Logits by timm alone: its model, its transform."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model, use_test_size=True))
    with torch.no_grad():
        return model(torch.stack([transform(Image.open(f).convert('RGB')) for f in files]))


def test_a_table_of_labels_names_the_data_of_an_evaluation(run, folder, tmp_path, capsys):
    table = tmp_path / 't.csv'
    files = sorted((folder / 'validation').rglob('*.png'))
    table.write_text('file,label,split\n' + ''.join(f'{f},{f.parent.name},validation\n' for f in files))
    assert tools(['evaluate', str(run / 'student'), '--labels', str(table), '--output', str(tmp_path / 'out'),
                  '--no-speed']) == 0  # fmt: skip
    found = json.loads((tmp_path / 'out' / 'evaluation.json').read_text())
    assert found['dataset'] == str(table) and found['images'] == 20
    assert 'the sample' not in capsys.readouterr().out
    opened = open_model(str(run))
    opened.settings = dataclasses.replace(opened.settings, dataset='hfds/a/b', data_dir=None)
    assert evaluation_settings(opened, {'labels': str(table)}).dataset is None  # of the run is other data
    assert tools(['evaluate', str(run / 'student')]) == 2 and '--labels FILE' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_predictions_have_a_row_for_each_image_with_what_both_networks_say(run, folder):
    schema = pq.read_schema(run / 'predictions.parquet')
    figures = [f'{who}_{k}' for who in ('student', 'teacher') for k in ('top1', 'top1_prob', 'target_prob', 'loss')]
    assert schema.names == ['index', 'file', 'target', *figures]
    kinds = {'index': 'int64', 'file': 'string', 'target': 'int32'}
    expected = {n: kinds.get(n, 'int32' if n.endswith('top1') else 'float') for n in schema.names}
    assert {n: str(schema.field(n).type) for n in schema.names} == expected
    table = table_of(run)
    assert table['index'].tolist() == list(range(20))
    assert [CLASSES[t] for t in table['target']] == [name.partition('/')[0] for name in table['file']]
    files = [folder / 'validation' / name for name in table['file']]
    probs = logits_of(run / 'student', files).softmax(1).numpy()
    rows = np.arange(20)
    assert table['student_top1'].tolist() == probs.argmax(1).tolist()
    assert np.allclose(table['student_top1_prob'], probs.max(1), atol=1e-3)
    assert np.allclose(table['student_target_prob'], probs[rows, table['target']], atol=1e-3)
    assert np.allclose(table['student_loss'], -np.log(table['student_target_prob']), atol=1e-4)


@pytest.mark.parametrize('who', ['student', 'teacher'])
def test_the_figures_in_results_json_are_those_of_the_predictions(run, who):
    found, table = results_of(run)['models'][who], table_of(run)
    right = table[f'{who}_top1'] == table['target']
    assert found['top1'] == pytest.approx(100 * right.mean()) == results_of(run)[f'{who}_top1']
    low, high = found['top1_interval']
    assert low <= found['top1'] <= high and high - low > 5
    by_class = [right[table['target'] == c].mean() for c in range(3)]
    assert found['macro_top1'] == pytest.approx(100 * np.mean(by_class))
    assert found['loss'] == pytest.approx(table[f'{who}_loss'].mean(), rel=1e-5)
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (table[f'{who}_top1_prob'] > low) & (table[f'{who}_top1_prob'] <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - table[f'{who}_top1_prob'][inside].mean())
    assert found['ece'] == pytest.approx(expected, abs=1e-6)


def test_the_best_temperature_is_that_of_the_students_logits(run, folder):
    table, best = table_of(run), results_of(run)['models']['student']['best_temperature']
    logits = logits_of(run / 'student', [folder / 'validation' / name for name in table['file']])
    grid = np.exp(np.linspace(np.log(0.01), np.log(100), 2001))
    target = torch.from_numpy(table['target'])
    losses = [torch.nn.functional.cross_entropy(logits / t, target).item() for t in grid]
    assert best == pytest.approx(grid[int(np.argmin(losses))], rel=0.02)


def test_size_and_speed_of_both_are_in_results_json(run, trained_teacher):
    found = results_of(run)['models']
    student = timm.create_model('test_resnet', num_classes=3)
    assert found['student']['parameters'] == sum(p.numel() for p in student.parameters())
    assert found['teacher']['parameters'] == found['student']['parameters']  # as it was before its norms were folded
    for who, folder in (('student', run / 'student'), ('teacher', trained_teacher)):
        size = (folder / 'model.safetensors').stat().st_size / 1e6
        assert found[who]['weights_mb'] == pytest.approx(size, rel=0.02)
        assert set(found[who]['latency_ms']) == {'1', '8'} and all(ms > 0 for ms in found[who]['latency_ms'].values())
        assert found[who]['latency_device'] and found[who]['multiply_adds'] == found['student']['multiply_adds'] > 1e6


@pytest.mark.parametrize(
    ('name', 'size', 'published'),
    [('resnet18', 224, 1.82e9), ('vit_tiny_patch16_224', 224, 1.26e9), ('efficientnet_b0', 224, 0.39e9)],
)
def test_multiply_adds_are_those_that_the_papers_print(name, size, published):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert engine.size_of(model, (3, size, size))['multiply_adds'] == pytest.approx(published, rel=0.02)


def test_what_cannot_be_counted_or_measured_is_left_out_and_the_run_ends_well(flags, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError('no memory')

    monkeypatch.setattr('timm_rld.engine.results.latencies', fails)
    monkeypatch.setattr('timm_rld.engine.results.teacher_skeleton', fails)
    assert main([*flags, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'x']) == 0
    said, models = capsys.readouterr().out, results_of(tmp_path / 'x')['models']
    assert 'size of the teacher is not known (no memory)' in said and 'speed (--no-speed' in said
    assert 'parameters' in models['student'] and 'parameters' not in models['teacher'] and 'ece' in models['teacher']
    assert 'latency_ms' not in models['student']


def test_predictions_and_speed_can_be_left_out(flags, tmp_path):
    flags = [*flags, '--epochs', '1', '--no-predictions', '--no-speed', '--output', str(tmp_path), '--experiment', 'x']
    assert main(flags) == 0
    assert not (tmp_path / 'x' / 'predictions.parquet').exists()
    student = results_of(tmp_path / 'x')['models']['student']
    assert 'latency_ms' not in student and student['parameters'] and student['ece'] >= 0


def test_a_run_without_a_teacher_has_the_students_columns_alone(flags, tmp_path):
    assert main([*flags[2:], '--distill', 'none', '--epochs', '1', '--output', str(tmp_path), '--experiment', 'x']) == 0
    assert list(table_of(tmp_path / 'x'))[-1] == 'student_loss' and set(results_of(tmp_path / 'x')['models']) == {
        'student'
    }


def test_with_a_cache_the_teachers_predictions_come_from_it_and_the_teacher_is_not_loaded(flags, tmp_path, capsys):
    flags = [*flags, '--epochs', '1', '--teacher-cache', str(tmp_path / 'cache'), '--output', str(tmp_path)]
    assert main([*flags, '--experiment', 'filling']) == 0
    assert main([*flags, '--experiment', 'reading']) == 0
    assert 'the teacher is not loaded' in capsys.readouterr().out
    first, second = (tmp_path / name for name in ('filling', 'reading'))
    assert (first / 'predictions.parquet').read_bytes() == (second / 'predictions.parquet').read_bytes()
    a, b = (results_of(folder)['models']['teacher'] for folder in (first, second))
    assert 'latency_ms' in a and 'latency_ms' not in b
    assert {k: v for k, v in a.items() if 'latency' not in k} == b


@pytest.mark.parametrize('teacher', [[], ['--teacher', 'local-dir:{teacher}']])
def test_a_run_with_a_cache_is_evaluated_as_any_other(run, trained_teacher, teacher, tmp_path, capsys):
    shutil.copytree(run, tmp_path / 'run')
    args = tmp_path / 'run' / 'args.yaml'
    settings = yaml.safe_load(args.read_text())
    settings |= {'teacher_cache': str(tmp_path / 'gone'), 'teacher_cache_views': 3}
    args.write_text(yaml.safe_dump(settings))
    flags = [flag.format(teacher=trained_teacher) for flag in teacher]
    assert tools(['evaluate', str(tmp_path / 'run'), *flags, '--no-speed', '--workers', '0']) == 0
    assert f'{results_of(run)["student_top1"]:.2f}' in capsys.readouterr().out and not (tmp_path / 'gone').exists()


def test_a_run_that_was_killed_after_its_last_epoch_leaves_the_same_predictions(run, flags, tmp_path):
    shutil.copytree(run, tmp_path / 'run')
    for name in ('results.json', 'predictions.parquet'):
        (tmp_path / 'run' / name).unlink()
    shutil.rmtree(tmp_path / 'run' / 'student_best')
    flags = [*flags, '--lr', str(read_run(run).settings['lr'])]
    assert main([*flags, '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']) == 0
    assert (tmp_path / 'run' / 'predictions.parquet').read_bytes() == (run / 'predictions.parquet').read_bytes()
    assert (tmp_path / 'run' / 'student_best').is_dir()


def test_the_best_epochs_student_lies_beside_the_last_ones(run):
    results = results_of(run)
    best = results['best_epoch']
    assert results['student_folders'] == {
        'student': {'weights': 'last', 'epoch': 3},
        'student_ema': {'weights': 'ema', 'epoch': 3},
        'student_best': {'weights': 'best', 'epoch': best},
    }
    checkpoint = load_file(run / 'checkpoints' / f'student-epoch{best:04}-end' / 'model.safetensors')
    exported, last = (load_file(run / name / 'model.safetensors') for name in ('student_best', 'student'))
    assert all(torch.equal(v, checkpoint[k]) for k, v in exported.items())
    assert not all(torch.equal(v, last[k]) for k, v in exported.items())
    assert f'epoch {best}, chosen as the best' in (run / 'student_best' / 'README.md').read_text()
    assert 'the last epoch (3)' in (run / 'student' / 'README.md').read_text()


def test_images_of_a_stream_are_numbered_in_order():
    recorders = {}
    for who in ('student', 'teacher'):
        recorder = recorders[who] = engine.Recorder()
        for start in (0, 2):  # a stream's index is the place in its worker's part
            recorder(torch.tensor([0, 1]), torch.tensor([start, start + 1]) % 3, torch.eye(3)[:2])
    table = engine.gather(recorders, create_accelerator(), 3, in_order=True)
    assert table['index'].tolist() == [0, 1, 2, 3] and table['target'].tolist() == [0, 1, 2, 0]


# ---------------------------------------------------------------------------------------------------------- evaluate


def evaluation(argv: list[str], output: Path) -> dict:
    assert tools(['evaluate', *argv, '--no-speed', '--output', str(output)]) == 0
    return json.loads((output / 'evaluation.json').read_text())


def test_on_a_runs_own_validation_split_evaluate_says_what_the_run_says(run, trained_teacher, tmp_path, capsys):
    found = evaluation([str(run), '--teacher', f'local-dir:{trained_teacher}'], tmp_path)
    for who, figures in results_of(run)['models'].items():
        expected = {k: v for k, v in figures.items() if 'latency' not in k}
        assert {k: found['models'][who][k] for k in expected} == expected
    assert (tmp_path / 'predictions.parquet').read_bytes() == (run / 'predictions.parquet').read_bytes()
    said = capsys.readouterr().out
    assert f'{found["models"]["student"]["top1"]:.2f} (' in said and 'lowest classes' in said


@pytest.mark.parametrize('weights', ['last', 'best', 'ema'])
def test_each_of_a_runs_weights_has_the_accuracy_of_its_epoch(run, weights, tmp_path):
    history, best = read_run(run).history, results_of(run)['best_epoch']
    key = 'eval_top1_ema' if weights == 'ema' else 'eval_top1'
    expected = history[best - 1 if weights == 'best' else -1][key]
    assert evaluation([str(run), '--weights', weights], tmp_path)['models']['student']['top1'] == pytest.approx(
        expected
    )


def test_the_files_of_an_evaluation_agree_with_its_predictions(run, tmp_path):
    evaluation([str(run)], tmp_path)
    table = table_of(tmp_path)
    matrix = np.zeros((3, 3), int)
    for t, p in zip(table['target'], table['student_top1']):
        matrix[t, p] += 1
    assert json.loads((tmp_path / 'confusion.json').read_text()) == {'classes': CLASSES, 'matrix': matrix.tolist()}
    rows = list(csv.reader((tmp_path / 'confusion.csv').open()))
    assert rows == [['class', *CLASSES], *([name, *map(str, row)] for name, row in zip(CLASSES, matrix.tolist()))]
    assert [
        list(row.values())[1:] for row in pq.read_table(tmp_path / 'confusion.parquet').to_pylist()
    ] == matrix.tolist()
    expected = [
        {'index': i, 'class': CLASSES[i], 'images': int(matrix[i].sum()), 'predicted': int(matrix[:, i].sum()),
         'correct': int(matrix[i, i]), 'accuracy': pytest.approx(100 * matrix[i, i] / matrix[i].sum())}
        for i in range(3)
    ]  # fmt: skip
    assert json.loads((tmp_path / 'per_class.json').read_text()) == expected
    assert pq.read_table(tmp_path / 'per_class.parquet').to_pylist() == expected
    first = next(csv.DictReader((tmp_path / 'per_class.csv').open()))
    assert float(first['accuracy']) == pytest.approx(100 * matrix[0, 0] / matrix[0].sum(), rel=1e-5)


def with_labels(model: Path, target: Path, labels: list[str] | None, order: list[int]) -> str:
    """A copy of a model folder whose outputs are in another order, under other names."""
    shutil.copytree(model, target)
    config = json.loads((target / 'config.json').read_text())
    for part in (config, config['pretrained_cfg']):
        part.pop('label_names', None)
    if labels is not None:
        config['label_names'] = labels
    (target / 'config.json').write_text(json.dumps(config))
    state = load_file(target / 'model.safetensors')
    for name in ('fc.weight', 'fc.bias'):
        state[name] = state[name][order].contiguous()
    save_file(state, target / 'model.safetensors', {'format': 'pt'})
    return str(target)


@pytest.mark.parametrize(
    ('labels', 'order'), [(['Plum', 'apple', 'PEAR'], [2, 0, 1]), (None, [0, 1, 2])], ids=['names', 'numbers']
)
def test_classes_are_matched_by_name_or_where_there_are_none_by_number(run, folder, labels, order, tmp_path):
    model = with_labels(run / 'student', tmp_path / 'model', labels, order)
    found = evaluation([model, '--data-dir', str(folder), '-b', '8', '-j', '0'], tmp_path / 'out')
    expected = results_of(run)['models']['student']
    assert found['models']['student']['top1'] == expected['top1']
    assert found['models']['student']['loss'] == pytest.approx(expected['loss'], rel=1e-6)
    assert np.array_equal(table_of(tmp_path / 'out')['student_top1'], table_of(run)['student_top1'])


def test_a_teacher_with_its_classes_in_another_order_is_matched_by_name(run, folder, trained_teacher, tmp_path):
    teacher = with_labels(trained_teacher, tmp_path / 'model', ['plum', 'apple', 'pear'], [2, 0, 1])
    expected = results_of(run)['models']['teacher']
    found = evaluation([str(run), '--teacher', teacher], tmp_path / 'out')
    assert found['models']['teacher']['top1'] == expected['top1']
    assert found['models']['teacher']['loss'] == pytest.approx(expected['loss'], rel=1e-5)


def test_imagenets_classes_are_matched_by_name_and_those_of_others_are_taken_in_order():
    info, names = look_up('resnet18', 'model'), ImageNetInfo().label_names()
    assert output_of_each_class(info, 'm', names, 1000) is None
    assert output_of_each_class(info, 'm', names[::-1], 1000) == list(range(999, -1, -1))
    assert output_of_each_class(info, 'm', [f'bird{i}' for i in range(1000)], 1000) is None
    with pytest.raises(UserError, match="m: its classes are those of ImageNet, in which 'bird' has no output"):
        output_of_each_class(info, 'm', ['bird', *names[:-1]], 1000)


def test_a_model_of_other_channels_is_refused(tmp_path):
    model = timm.create_model('test_resnet', num_classes=3, in_chans=4)
    config = dict(input_size=(4, 32, 32), mean=(0.5,) * 4, std=(1.0,) * 4, interpolation='bicubic', crop_pct=1.0,
                  crop_mode='center')  # fmt: skip
    folder = export_model(model, tmp_path / 'model', data_config=config)
    with pytest.raises(UserError, match='takes images of 4 channels; those of 1 and 3 can be read'):
        open_model(str(folder))


def test_a_model_is_evaluated_on_a_table_of_the_hub(run, parquet, tmp_path):
    data = ['--dataset', f'hfds/{parquet}', '--val-split', 'test', '--input-key', 'img', '--target-key', 'fine_label']
    for model in (run, run / 'student'):  # in place of the run's own data, too
        found = evaluation([str(model), *data, '--batch-size', '8'], tmp_path / model.name)
        assert found['models']['student']['top1'] == results_of(run)['models']['student']['top1']


def test_a_runs_data_may_have_been_moved(run, folder, tmp_path):
    shutil.copytree(folder / 'validation', tmp_path / 'data' / 'validation')  # without the training images
    found = evaluation([str(run), '--data-dir', str(tmp_path / 'data')], tmp_path / 'out')
    assert found['models']['student']['top1'] == results_of(run)['models']['student']['top1']


@pytest.mark.slow
def test_two_processes_evaluate_as_one(run, tmp_path):
    env = dict(os.environ, ACCELERATE_USE_CPU='true')
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--quiet', '--multi_gpu', '--num_processes', '2',
               '--main_process_port', '0', '-m', 'timm_rld', 'evaluate', str(run), '--output',
               str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('lowest classes') == 1
    one, two = table_of(run), table_of(tmp_path)
    assert np.array_equal(one['index'], two['index']) and np.array_equal(one['file'], two['file'])
    assert np.array_equal(one['student_top1'], two['student_top1'])
    found = json.loads((tmp_path / 'evaluation.json').read_text())['models']['student']
    expected = results_of(run)['models']['student']
    for key in ('top1', 'top1_interval', 'macro_top1', 'ece', 'loss', 'best_temperature'):
        assert found[key] == pytest.approx(expected[key], rel=1e-3), key


# ----------------------------------------------------------------------------------------------------------- predict


def rows_of(out: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(out)))


def test_predict_says_of_the_validation_images_what_the_run_said(run, folder, capsys):
    table = table_of(run)
    assert tools(['predict', str(run), str(folder / 'validation'), '--top-k', '2']) == 0
    rows = rows_of(capsys.readouterr().out)
    assert list(rows[0]) == ['file', 'class_1', 'prob_1', 'class_2', 'prob_2']
    assert [r['file'] for r in rows] == [str(folder / 'validation' / name) for name in table['file']]
    assert [r['class_1'] for r in rows] == [CLASSES[i] for i in table['student_top1']]
    assert np.allclose([float(r['prob_1']) for r in rows], table['student_top1_prob'], atol=1e-5)


@pytest.mark.parametrize('no_exif', [False, True])
def test_predict_turns_images_upright_where_the_run_did(run, tmp_path, capsys, no_exif):
    copy, upright, turned = tmp_path / 'run', tmp_path / 'upright.png', tmp_path / 'turned.png'
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns('checkpoints'))
    settings = yaml.safe_load((copy / 'args.yaml').read_text())
    (copy / 'args.yaml').write_text(yaml.safe_dump({**settings, 'no_exif': no_exif}))
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = (250, 40, 10)
    pixels[:, :8] = (0, 60, 200)
    Image.fromarray(pixels).save(upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(np.rot90(pixels)).save(turned, exif=exif)
    assert tools(['predict', str(copy), str(upright), str(turned)]) == 0
    one, other = rows_of(capsys.readouterr().out)
    assert (one['prob_1'] == other['prob_1']) == (not no_exif)


@pytest.mark.parametrize('workers', ['0', '2'])
def test_the_rows_are_in_the_order_of_the_arguments_whatever_the_batches(run, folder, workers, capsys):
    images = sorted((folder / 'train').rglob('*.png'))
    given = [images[5], images[0], folder / 'train' / 'pear', images[5]]
    expected = [images[5], images[0], *sorted((folder / 'train' / 'pear').iterdir()), images[5]]
    assert tools(['predict', str(run), *map(str, given), '-b', '3', '-j', workers]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [r['file'] for r in rows] == list(map(str, expected)) and rows[0] == rows[-1]
    assert len(rows[0]) == 1 + 2 * 3  # no more classes than there are


@pytest.mark.parametrize('format', ['csv', 'json', 'parquet'])
def test_each_format_holds_the_same(run, folder, format, tmp_path):
    file = tmp_path / f'found.{format}'
    assert tools(['predict', str(run), str(folder / 'validation' / 'plum'), '--top-k', '1', '--output', str(file)]) == 0
    if format == 'json':
        rows = [{'file': r['file'], 'class_1': r['predictions'][0]['class'], 'prob_1': r['predictions'][0]['prob']}
                for r in json.loads(file.read_text())]  # fmt: skip
    else:
        rows = pq.read_table(file).to_pylist() if format == 'parquet' else rows_of(file.read_text())
    expected = logits_of(run / 'student', sorted((folder / 'validation' / 'plum').iterdir())).softmax(1)
    assert [r['class_1'] for r in rows] == [CLASSES[i] for i in expected.argmax(1)]
    assert [float(r['prob_1']) for r in rows] == pytest.approx(expected.max(1).values.tolist(), abs=1e-3)


@pytest.mark.parametrize('workers', ['0', '1'])
def test_broken_images_are_named_and_skipped_and_the_exit_code_is_1(run, folder, workers, tmp_path, capsys):
    whole = next((folder / 'train' / 'apple').iterdir())
    names = ['a.png', 'b.png', 'c.png', 'd.png']
    for name in names:
        shutil.copy(whole, tmp_path / name)
    (tmp_path / 'b.png').write_bytes(whole.read_bytes()[:60])
    (tmp_path / 'd.png').write_text('no image')
    assert tools(['predict', str(run), str(tmp_path), '-b', '2', '-j', workers]) == 1
    out, err = capsys.readouterr()
    assert [Path(r['file']).name for r in rows_of(out)] == ['a.png', 'c.png']
    assert f'{tmp_path / "b.png"}: cannot be read: ' in err and f'{tmp_path / "d.png"}: cannot be read: ' in err
    assert err.splitlines()[-1] == 'timm-rld: error: 2 of 4 images could not be read; the others are written'


def test_names_of_classes_are_quoted_where_a_format_needs_it(run, folder, tmp_path, capsys):
    strange = ['a,"b"', '<script>', 'ü\nx']
    model = with_labels(run / 'student', tmp_path / 'model', strange, [0, 1, 2])
    assert tools(['predict', model, str(next((folder / 'train' / 'pear').iterdir()))]) == 0
    (row,) = rows_of(capsys.readouterr().out)
    assert {row['class_1'], row['class_2'], row['class_3']} == set(strange)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def places(run, folder, trained_teacher, tmp_path) -> dict[str, str]:
    """Words of the commands below."""
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'unfinished').mkdir()
    shutil.copy(run / 'args.yaml', tmp_path / 'unfinished')
    (tmp_path / 'file').write_text('x')
    shutil.copytree(folder / 'validation', tmp_path / 'other' / 'validation')
    (tmp_path / 'other' / 'validation' / 'plum').rename(tmp_path / 'other' / 'validation' / 'kiwi')
    two = with_labels(trained_teacher, tmp_path / 'unnamed', None, [0, 1, 2])
    shutil.copytree(folder / 'validation' / 'pear', tmp_path / 'two' / 'validation' / 'pear')
    shutil.copytree(folder / 'validation' / 'plum', tmp_path / 'two' / 'validation' / 'plum')
    no_ema = tmp_path / 'no_ema'
    shutil.copytree(run, no_ema)
    shutil.rmtree(no_ema / 'student_ema')
    return {'RUN': str(run), 'MODEL': str(trained_teacher), 'DATA': str(folder), 'T': str(tmp_path), 'UNNAMED': two}


@pytest.mark.parametrize(
    ('command', 'code', 'text'),
    [
        ('evaluate T/empty --data-dir DATA', 1, 'neither the folder of a run (args.yaml) nor of a model (config.json)'),
        ('evaluate T/unfinished', 1, 'not the folder of a finished run (results.json)'),
        ('evaluate T/nothing --data-dir DATA', 1, 'T/nothing: no such folder'),
        ('evaluate resnet19 --data-dir DATA', 1, 'did you mean'),
        ('evaluate test_resnet_x --data-dir DATA', 1, 'unknown model'),
        ('evaluate cifar_resnet8 --data-dir DATA', 1, 'no weights are published'),
        ('evaluate MODEL', 2, 'give --data-dir D, --dataset NAME or --labels FILE'),
        ('evaluate MODEL --data-dir T/nowhere', 1, '--data-dir T/nowhere: no such folder'),
        ('evaluate MODEL --data-dir T/other', 1, "only in the dataset: 'kiwi'; only in the model: 'plum'"),
        ('evaluate RUN --data-dir T/other', 1, "only in the dataset: 'kiwi'; only in the model: 'plum'"),
        ('evaluate UNNAMED --data-dir T/two', 1, 'it has 3 classes, the dataset 2'),
        ('evaluate MODEL --data-dir DATA --weights best', 2, 'is no run folder'),
        ('evaluate T/no_ema --weights ema', 1, '--weights ema: the run had no --model-ema'),
        ('evaluate RUN --output T/file', 1, '--output T/file cannot be written (File exists)'),
        ('evaluate RUN --workers -1', 2, '--workers: must be at least 0'),
        ('evaluate RUN --batch-size 0', 2, '--batch-size 0: must be at least 1'),
        ('evaluate RUN --lr 1', 2, 'unrecognized arguments: --lr'),
        ('evaluate RUN --teacher T/empty', 1, '--teacher T/empty: neither the folder of a run'),
        ('evaluate RUN --teacher T/no_ema', 1, 'models are in T/no_ema/student, T/no_ema/student_best'),
        ('predict RUN T/empty', 1, 'no images in this folder'),
        ('predict RUN T/nothing.png', 1, 'no such file or folder'),
        ('predict RUN DATA --output T/x.txt', 2, '--output T/x.txt: of which --format is it'),
        ('predict RUN DATA --output T/no/x.csv', 1, 'there is no folder T/no'),
        ('predict RUN DATA --output T/empty --format csv', 1, '--output T/empty: is a folder'),
        ('predict RUN DATA --format parquet', 2, 'give --output FILE'),
        ('predict RUN DATA --top-k 0', 2, '--top-k 0: must be at least 1'),
        ('predict T/unfinished DATA', 1, 'not the folder of a finished run'),
    ],
)
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_left_half_written(places, command, code, text, capsys):
    def filled(words: str) -> str:
        for name, value in places.items():
            words = words.replace(f'{name}/', f'{value}/').replace(name, value) if name != 'T' else words
        return words.replace('T/', f'{places["T"]}/')

    before = {p: p.stat().st_mtime_ns for p in Path(places['T']).rglob('*')}
    assert tools([filled(word) for word in command.split()]) == code
    out, err = capsys.readouterr()
    assert (
        text.replace('T/', f'{places["T"]}/') in err and len(err.strip().splitlines()) <= 2 and 'Traceback' not in err
    )
    assert {p: p.stat().st_mtime_ns for p in Path(places['T']).rglob('*')} == before
    assert all(line.startswith('Validation split: ') for line in out.splitlines())


def test_images_of_a_folder_are_of_all_types_that_a_training_reads(tmp_path):
    from timm_rld.inference.predict import find_images

    for name in ('a.webp', 'b.GIF', 'c.tif', 'd.txt', '.e.png', '__MACOSX/f.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [Path(file).name for file in find_images([str(tmp_path)])] == ['a.webp', 'b.GIF', 'c.tif']


def test_a_link_to_the_folder_that_it_lies_in_gives_no_image_twice(tmp_path):
    from timm_rld.inference.predict import find_images

    (tmp_path / 'a' / 'b').mkdir(parents=True)
    (tmp_path / 'a' / 'x.png').touch()
    (tmp_path / 'a' / 'b' / 'up').symlink_to('..')
    (tmp_path / 'c').symlink_to('a')  # another way to the same images is asked for
    found = [str(Path(file).relative_to(tmp_path)) for file in find_images([str(tmp_path)])]
    assert found == ['a/x.png', 'c/x.png']


def test_parquet_has_its_columns_where_no_image_could_be_read(run, tmp_path, capsys):
    (tmp_path / 'broken.png').write_bytes(b'x')
    output = tmp_path / 'found.parquet'
    assert tools(['predict', str(run), str(tmp_path / 'broken.png'), '--top-k', '1', '--output', str(output)]) == 1
    assert pq.read_table(output).column_names == ['file', 'class_1', 'prob_1']


def test_a_run_that_was_validated_on_a_share_of_the_training_split_is_evaluated_on_it(run, tmp_path):
    settings = yaml.safe_load((run / 'args.yaml').read_text())
    shutil.copytree(run, tmp_path / 'run')
    (tmp_path / 'run' / 'args.yaml').write_text(yaml.safe_dump({**settings, 'tune_holdout': 0.25, 'val_split': None}))
    own = evaluation([str(tmp_path / 'run')], tmp_path / 'a')
    assert (own['val_split'], own['images']) == ('train, the share held out', 11)
    assert evaluation([str(tmp_path / 'run'), '--val-split', 'validation'], tmp_path / 'b')['images'] == 20


def test_predict_refuses_several_processes(run, folder, monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert tools(['predict', str(run), str(folder)]) == 2
    assert 'works in one process' in capsys.readouterr().err


def test_the_card_shows_size_and_speed_beside_the_teachers(run):
    from timm_rld.hub.card import card_section, size_and_speed

    results = results_of(run)
    results['models']['student']['latency_device'] = '<script>alert(1)</script>'
    text = '\n'.join(size_and_speed(results))
    parameters = [f'{results["models"][who]["parameters"] / 1e6:.2f} M' for who in ('student', 'teacher')]
    assert f'| parameters | {parameters[0]} | {parameters[1]} |' in text
    assert '| a batch of 8 | ' in text and '&lt;script&gt;' in text and '<script>' not in text
    assert '| parameters | ' in card_section(read_run(run), 'me/x', 'last', False)
    assert size_and_speed({'student_top1': 1.0}) == []  # of an earlier version
    for model in results['models'].values():
        del model['latency_ms'], model['latency_device']
    assert 'a batch of' not in '\n'.join(size_and_speed(results))
