"""End to end: `main([...])`, what a run leaves, and what it says when something is wrong."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from train_distill import main

pytestmark = pytest.mark.usefixtures('forked_python')
ROOT = Path(__file__).parent.parent


def weights(run: Path, name: str = 'student') -> dict[str, torch.Tensor]:
    return load_file(run / name / 'model.safetensors')


def equal(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_what_it_promises(tiny, tmp_path, folder, capsys):
    assert main(tiny) == 0
    run = tmp_path / 'run'
    results = json.loads((run / 'results.json').read_text())
    assert {p.name for p in run.iterdir()} == {
        '.lock', 'args.yaml', 'checkpoints', 'facts.json', 'predictions.parquet', 'results.json', 'student',
        'summary.csv', 'teacher', 'teacher.csv', 'teacher.sha256',
    } | ({'student_best'} if results['best_epoch'] < 2 else set())  # fmt: skip
    assert {'teacher', 'student', 'distill', 'distill_options', 'num_classes', 'epochs', 'teacher_top1', 'student_top1',
            'student_top1_best', 'best_epoch', 'agreement', 'train_images_per_second', 'seed', 'versions',
            'command'} <= set(results)  # fmt: skip
    assert results['distill_options'] == {'alpha': 1.0, 'beta': 8.0, 'temperature': 4.0, 'alpha_temperature': None}
    assert results['num_classes'] == 3 and results['command'].startswith('train_distill.py --teacher test_resnet')
    rows = list(csv.DictReader((run / 'summary.csv').open()))
    assert list(rows[0])[:10] == [
        'epoch', 'train_loss', 'train_task_loss', 'train_kd_loss', 'eval_loss', 'eval_top1', 'eval_top5',
        'eval_macro', 'lr', 'images_per_second',
    ]  # fmt: skip
    assert [r['epoch'] for r in rows] == ['1', '2'] and 'train_teacher_wrong' in rows[0]
    assert float(rows[-1]['eval_top1']) == pytest.approx(results['student_top1'], rel=1e-5)
    best = max(float(r['eval_top1']) for r in rows)
    assert results['student_top1_best'] == pytest.approx(best, rel=1e-5)
    out = capsys.readouterr().out.strip().splitlines()
    assert out[-1] == (
        f'{run}: teacher top-1 {results["teacher_top1"]:.2f}, student top-1 {results["student_top1"]:.2f}'
    )
    args = yaml.safe_load((run / 'args.yaml').read_text())
    assert args['img_size'] == 32 and args['task_loss_weight'] == 1.0 and args['distill_warmup_epochs'] == 1


def test_the_students_folder_gives_the_accuracy_that_the_run_reports(tiny, tmp_path, folder):
    assert main(tiny) == 0
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    for name, key in (('student', 'student_top1'), ('teacher', 'teacher_top1')):
        model = timm.create_model(f'local-dir:{tmp_path / "run" / name}', pretrained=True).eval()
        config = timm.data.resolve_data_config({}, model=model, use_test_size=True)
        assert config['input_size'] == (3, 32, 32)
        dataset = timm.data.create_dataset('', root=str(folder / 'validation'))
        dataset.transform = timm.data.create_transform(**config)
        images, targets = zip(*dataset)
        with torch.no_grad():
            right = model(torch.stack(images)).argmax(1) == torch.tensor(targets)
        assert 100 * right.float().mean().item() == pytest.approx(results[key], abs=1e-4)
        assert model.pretrained_cfg['label_names'] == ['apple', 'pear', 'plum']


def test_the_same_run_comes_out_of_its_args_yaml_whatever_the_number_of_workers(tiny, tmp_path, monkeypatch):
    extra = ['--mixup', '0.2', '--cutmix', '1.0', '--reprob', '0.3', '--aa', 'rand-m9', '--model-ema',
             '--model-ema-decay', '0.5', '--grad-accum-steps', '3', '--drop-path', '0.2']  # fmt: skip
    vit = [*tiny, '--student', 'test_vit', *extra]
    assert main(vit) == 0
    again = ['--config', str(tmp_path / 'run' / 'args.yaml'), '--experiment', 'again', '--workers', '2']
    fresh(monkeypatch)
    assert main(again) == 0
    for name in ('student', 'student_ema', 'teacher'):
        assert equal(weights(tmp_path / 'run', name), weights(tmp_path / 'again', name)), name
    assert not equal(weights(tmp_path / 'run'), weights(tmp_path / 'run', 'student_ema'))
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    assert 'eval_top1_ema' in rows[0] and math.isfinite(float(rows[-1]['train_loss']))


def fresh(monkeypatch) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.mark.parametrize(
    'flags',
    [
        [
            '--distill',
            'kd',
            '--standardize',
            '--distill-kwargs',
            'temperature=2',
            '--drop',
            '0.2',
            '--model-kwargs',
            'drop_rate=0.1',
        ],
        ['--mixed-precision', 'bf16', '--clip-grad', '1', '--clip-mode', 'agc'],
        ['--train-crop-mode', 'pad', '--channels-last', '--opt', 'adamw', '--sched', 'multistep', '--sched-on-updates'],
        ['--in-chans', '1', '--no-aug', '--validation-batch-size', '7'],
        ['--teacher-epochs', '0', '--distill', 'none'],
    ],
    ids=lambda f: ' '.join(f[:2]),
)
def test_runs_of_many_kinds_end_well(tiny, tmp_path, flags):
    if 'none' in flags:
        tiny = [*tiny[2:], '--teacher-pretrained']  # a student alone
    assert main([*tiny, *flags]) == 0
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert 0 <= results['student_top1'] <= 100
    assert (results['teacher_top1'] is None) == ('none' in flags)


def test_a_teacher_of_other_size_normalisation_and_classes_is_taken(tiny, tmp_path, folder, capsys):
    from timm_rld import export_model

    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', depth=1, num_classes=4)
    config = dict(input_size=(3, 224, 224), mean=(0.25,) * 3, std=(0.5,) * 3, interpolation='bicubic', crop_pct=1.0,
                  crop_mode='center')  # fmt: skip
    export_model(model, tmp_path / 't', data_config=config, label_names=['plum', 'kiwi', 'pear', 'apple'])
    argv = [
        *tiny,
        '--teacher',
        f'local-dir:{tmp_path / "t"}',
        '--teacher-pretrained',
        '--teacher-epochs',
        '0',
        '--epochs',
        '1',
    ]
    assert main([*argv, '--teacher-class-map', 'auto']) == 0
    out = capsys.readouterr().out
    assert 'the teacher sees the 32×32 images resized to 224×224' in out and "3 of the teacher's 4 outputs" in out
    assert 'normalisation (mean): teacher 0.25 0.25 0.25' in out


def test_a_teachers_checkpoint_serves_in_place_of_a_fit(tiny, tmp_path):
    torch.manual_seed(3)
    save_file(timm.create_model('test_resnet', num_classes=3).state_dict(), tmp_path / 't.safetensors')
    argv = [*tiny, '--teacher-epochs', '0', '--epochs', '1', '--teacher-checkpoint', str(tmp_path / 't.safetensors')]
    assert main(argv) == 0
    assert not (tmp_path / 'run' / 'teacher').exists()


def test_trackers_get_each_epoch(tiny, tmp_path):
    pytest.importorskip('tensorboard')
    assert main([*tiny, '--report-to', 'tensorboard']) == 0
    assert list((tmp_path / 'run').rglob('events.out.tfevents*'))


def test_the_sample_is_used_and_named_where_no_dataset_is(tmp_path, capsys):
    argv = ['--teacher', 'test_resnet', '--student', 'test_resnet', '--epochs', '1', '--teacher-epochs', '1',
            '--warmup-epochs', '0', '--min-teacher-acc', '0', '--output', str(tmp_path),
            '--experiment', 's']  # fmt: skip
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith('No --dataset or --data-dir: using the sample') and out.count('UCI handwritten digits') == 1
    results = json.loads((tmp_path / 's' / 'results.json').read_text())
    assert results['num_classes'] == 10


def test_a_search_holds_out_of_the_sample_too(tmp_path):
    argv = ['--student', 'test_resnet', '--distill', 'none', '--epochs', '1', '--warmup-epochs', '0', '--tune-holdout',
            '0.2', '--output', str(tmp_path), '--experiment', 's']  # fmt: skip
    assert main(argv) == 0
    settings = yaml.safe_load((tmp_path / 's' / 'args.yaml').read_text())
    assert (settings['train_split'], settings['val_split'], settings['tune_holdout']) == ('train', 'test', 0.2)
    images = pq.read_metadata(tmp_path / 's' / 'predictions.parquet').num_rows
    assert 280 < images < 300, 'a fifth of the 1,437 training images'


def test_the_file_as_a_program_exits_with_the_codes_it_promises(tmp_path):
    for argv, code in ((['--help'], 0), (['--epoch', '1'], 2)):
        done = subprocess.run([sys.executable, 'train_distill.py', *argv], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and 'Traceback' not in done.stderr


WRONG = [
    (['--student', 'resnt18'], 1, "--student resnt18: unknown model (did you mean 'resnet18'"),
    (['--teacher', 'resnt34'], 1, "--teacher resnt34: unknown model (did you mean 'resnet34'"),
    (['--distill', 'rdl'], 2, "--distill rdl: unknown criterion 'rdl' (did you mean 'rld'"),
    (['--distill-kwargs', 'gamma=1'], 2, "criterion 'rld' has no option 'gamma'"),
    (['--distill-kwargs', 'temperature=0'], 2, 'temperature must be a positive number'),
    (['--distill', 'none', '--standardize'], 2, "'none' is not combined with standardize: it distils nothing"),
    (['--distill', 'lr', '--standardize'], 2, "'lr' is not combined with standardize: it compares raw logits"),
    (['--distill', 'none', '--distill-kwargs', 'alpha=1'], 2, "'none' distils nothing"),
    (['--opt', 'sdg'], 2, "--opt sdg: unknown optimizer (did you mean 'sgd'"),
    (['--data-dir', '/nowhere'], 1, '--data-dir /nowhere: no such folder'),
    (['--val-split', 'test'], 1, "--val-split 'test': no such folder in --data-dir"),
    (['--epochs', '-1'], 2, '--epochs: must be at least 0'),
    (
        ['--teacher-epochs', '0', '--teacher', 'resnet34', '--teacher-pretrained'],
        1,
        'its head has 1000 classes, the dataset 3',
    ),
    (['--teacher', 'resnet34', '--teacher-pretrained'], 1, 'published weights cannot be reached'),
    (['--student', 'resnet18', '--student-pretrained'], 1, 'published weights cannot be reached'),
    (['--teacher-epochs', '0', '--teacher-checkpoint', '/nowhere'], 1, '--teacher-checkpoint /nowhere: no such file'),
    (['--mixed-precision', 'fp17'], 2, "--mixed-precision: 'fp17' is not one of no, fp16, bf16"),
    (['--output', '/proc/nothing'], 1, '--output: /proc/nothing/run cannot be written'),
    (['--report-to', 'tensorbord'], 2, '--report-to tensorbord: unknown tracker'),
    (['--aa', 'augmix-m3'], 1, '--aa augmix-m3'),
    (['--model-kwargs', 'depht=3'], 1, "'depht'"),
    (['--mixed-precision', 'fp16'], 1, '--mixed-precision fp16: has no effect on a CPU'),
    (['--model-kwargs', 'num_classes=4'], 1, '--model-kwargs num_classes: the run sets it'),
    (['--opt', 'adamw', '--opt-betas', '0.9'], 1, '--opt adamw: '),
    (['--batch-size', '1'], 1, '--batch-size 1: batch norm cannot train on single images'),
    (['--train-split', ''], 1, "--train-split '': no such folder"),
    (['--dataset', 'torch/folder', '--val-split', 'bar'], 1, "--val-split 'bar': no such folder"),
    (['--student', 'inception_v3'], 1, '--student inception_v3: cannot take images of 3×32×32'),
]


@pytest.mark.parametrize(('flags', 'code', 'message'), WRONG, ids=[' '.join(w[0]) for w in WRONG])
def test_bad_input_is_one_or_two_lines_and_leaves_nothing(tiny, tmp_path, capsys, flags, code, message):
    if '--teacher-pretrained' in flags:
        tiny = [f for f in tiny if f != '--no-teacher-pretrained']
    assert main([*tiny, *flags]) == code
    err = capsys.readouterr().err.strip().splitlines()
    shown = [line for line in err if not line.startswith('[process')]
    assert message in err[0] and err[0].startswith('train_distill.py: error: ') and len(shown) <= 2, err
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tiny, capsys):
    assert main([*tiny, '--data-dir', '/nowhere', '--debug']) == 1
    assert 'Traceback' in capsys.readouterr().err


def test_missing_models_are_asked_for(capsys):
    assert main(['--student', 'resnet18']) == 2
    assert '--teacher and --student are needed' in capsys.readouterr().err
    assert main([]) == 2
    assert '--teacher and --student are needed' in capsys.readouterr().err


def test_a_run_folder_in_use_is_refused_untouched(tiny, tmp_path, capsys):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'mine.txt').write_text('x')
    assert main(tiny) == 1
    assert 'is not empty; name another --experiment' in capsys.readouterr().err
    assert [p.name for p in (tmp_path / 'run').iterdir()] == ['mine.txt']


def test_a_teacher_near_chance_stops_the_run_before_the_student(tiny, tmp_path, capsys):
    assert main([*tiny, '--min-teacher-acc', '100', '--lr', '1e-9']) == 1
    err = capsys.readouterr().err
    assert '--teacher test_resnet: its top-1 of ' in err and 'is below 100' in err
    assert not (tmp_path / 'run' / 'summary.csv').exists()


def test_a_broken_image_stops_the_run_by_name_with_workers_too(tiny, tmp_path, folder, capsys):
    import shutil

    shutil.copytree(folder, tmp_path / 'd')
    broken = sorted((tmp_path / 'd' / 'train').rglob('*.png'))[4]
    broken.write_bytes(b'no image')
    for workers in ('0', '1'):
        assert main([*tiny, '--data-dir', str(tmp_path / 'd'), '--workers', workers, '--experiment', workers]) == 1
        err = capsys.readouterr().err.strip().splitlines()
        assert len(err) == 2 and '1 of 41 images looked at cannot be read' in err[0] and str(broken) in err[0]
        fresh(None)


def test_a_diverging_run_stops_with_a_hint(tiny, capsys):
    assert main([*tiny, '--lr', '1e12', '--teacher-epochs', '3']) == 1
    assert 'the loss is ' in (err := capsys.readouterr().err) and 'try a lower --lr' in err


def test_a_teacher_that_is_refused_leaves_no_run_folder(tiny, tmp_path, trained_teacher, capsys):
    argv = [*tiny, '--teacher', f'local-dir:{trained_teacher}', '--teacher-pretrained', '--teacher-epochs', '0']
    assert main([*argv, '--min-teacher-acc', '100']) == 1
    assert 'is below 100' in capsys.readouterr().err and not (tmp_path / 'run').exists()


def test_a_student_that_diverges_in_its_last_step_is_not_exported(tiny, tmp_path, capsys):
    argv = [*tiny, '--distill', 'none', '--teacher-epochs', '0', '--epochs', '1', '--lr', '1e30', '--batch-size', '41']
    assert main([*argv[2:], '--teacher-pretrained']) == 1
    assert 'the validation loss of the student is nan' in capsys.readouterr().err
    assert not (tmp_path / 'run' / 'student').exists()


def test_args_yaml_holds_the_precision_that_the_launcher_chose(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    assert main(tiny) == 0
    assert yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())['mixed_precision'] == 'bf16'


def test_labels_of_another_dataset_are_noticed(tiny, tmp_path, trained_teacher, folder, capsys):
    import shutil

    for split in ('train', 'validation'):
        for i, name in enumerate(('apple', 'pear', 'plum')):
            shutil.copytree(folder / split / name, tmp_path / 'd' / split / f'n{i}')
    argv = [*tiny, '--teacher', f'local-dir:{trained_teacher}', '--teacher-pretrained', '--teacher-epochs', '0']
    assert main([*argv, '--data-dir', str(tmp_path / 'd')]) == 0
    assert "none of the teacher's label names is one of the dataset's" in capsys.readouterr().out


def test_a_run_of_no_epochs_fits_the_teacher_alone(tiny, tmp_path):
    assert main([*tiny, '--epochs', '0', '--teacher-lr', '0.003']) == 0
    run = tmp_path / 'run'
    assert (run / 'teacher' / 'config.json').exists() and not (run / 'student').exists()
    results = json.loads((run / 'results.json').read_text())
    assert results['teacher_top1'] > 0 and 'student_top1' not in results
    assert ',0.003,' in (run / 'teacher.csv').read_text()
