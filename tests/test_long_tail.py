"""Classes of very different sizes: weights of the cross-entropy, macro accuracy, what is best, and cuts for studies."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, draw
from torch import nn

from benchmarks import cuts
from timm_rld import DistillationTask, create_teacher
from timm_rld.data import Loader, class_weights, describe_classes, eval_transform, open_split
from timm_rld.distributed import create_accelerator
from timm_rld.engine import evaluate
from timm_rld.errors import UserError
from timm_rld.hub.card import card_header, card_section
from timm_rld.loss import create_distill_loss
from timm_rld.run_folder import outcome, read_run
from train_distill import main

SIZES = {'train': (24, 9, 2), 'validation': (9, 6, 3)}


@pytest.fixture(scope='session')
def tail(tmp_path_factory) -> Path:
    """Folders of images, three classes, the largest with twelve times the training images of the smallest."""
    root, rng = tmp_path_factory.mktemp('tail'), np.random.default_rng(0)
    for split, sizes in SIZES.items():
        for label, n in enumerate(sizes):
            for i in range(n):
                path = root / split / CLASSES[label] / f'{i:03}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(rng, label).save(path)
    return root


@pytest.fixture
def flags(tail, trained_teacher, tmp_path) -> list[str]:
    """Flags of a run of a second on `tail`."""
    return [
        '--teacher', f'local-dir:{trained_teacher}', '--student', 'test_resnet', '--data-dir', str(tail),
        '--img-size', '32', '--epochs', '2', '--batch-size', '8', '--workers', '0', '--lr', '0.01',
        '--min-teacher-acc', '0', '--cpu-threads', '1', '--output', str(tmp_path), '--experiment', 'run',
    ]  # fmt: skip


def split_of(root: Path, split: str = 'train'):
    return open_split(None, split, flag='', data_dir=str(root))


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / 'weights.csv').write_text(text, encoding='utf-8')
    return str(tmp_path / 'weights.csv')


# ---------------------------------------------------------------------------------------------------------- the weights


def test_weights_of_auto_are_inverse_to_the_frequency_and_have_a_mean_of_one_over_the_images(tail):
    counts = np.array(SIZES['train'])
    found = class_weights(split_of(tail), 'auto')
    assert found.tolist() == pytest.approx((counts.sum() / (3 * counts)).tolist())
    assert (found.numpy() * counts).sum() / counts.sum() == pytest.approx(1)
    assert class_weights(split_of(tail), None) is None


@pytest.mark.parametrize(
    'text', ['apple,1\npear,2\nplum,4\n', 'class,weight\nplum, 8\n\n1,4\n0,2\n', '"plum",4\npear,2\r\napple,1']
)
def test_weights_of_a_file_are_named_by_class_or_index_and_scaled_to_a_mean_of_one(tail, tmp_path, text):
    found = class_weights(split_of(tail), written(tmp_path, text))
    mean = (24 * 1 + 9 * 2 + 2 * 4) / 35
    assert found.tolist() == pytest.approx([1 / mean, 2 / mean, 4 / mean])


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('apple,1\npear,2\n', r'no line for 1 class\(es\): plum'),
        ('apple,1\npear,2\nplum,1\nkiwi,1\n', "line 4: no class 'kiwi' in 'train'"),
        ('apple,1\napple,2\n', "line 2: the class 'apple' is there twice"),
        ('apple,1\n0,2\n', "line 2: the class '0' is there twice"),
        ('apple,-1\n', 'line 1: expected a class and a weight of at least 0'),
        ('apple,nan\n', 'line 1: expected a class and a weight'),
        ('apple 1\n', 'line 1: expected a class and a weight'),
        ('apple,0\npear,0\nplum,0\n', 'have weight 0'),
    ],
)
def test_a_file_of_weights_that_is_wrong_is_refused_by_line(tail, tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        class_weights(split_of(tail), written(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tail):
    with pytest.raises(UserError, match="--class-weights balanced: cannot be read .* expected 'auto', or a CSV file"):
        class_weights(split_of(tail), 'balanced')


def test_of_a_stream_only_weights_of_a_file_can_be_had(tail, tmp_path):
    source = dataclasses.replace(split_of(tail), streamed=True)
    with pytest.raises(UserError, match='--class-weights auto: how many images each class'):
        class_weights(source, 'auto')
    assert class_weights(source, written(tmp_path, '0,1\n1,2\n2,4\n')).tolist() == [1, 2, 4]
    assert describe_classes(source) == []


def test_a_class_without_images_neither_counts_nor_is_the_smallest(tail):
    source = split_of(tail)
    source.num_classes = 4
    counts = np.array(SIZES['train'])
    assert class_weights(source, 'auto').tolist() == pytest.approx([*(counts.sum() / (3 * counts)), 1.0])


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_weights_are_those_of_the_cross_entropy_alone(trained_teacher, smoothing):
    student = timm.create_model('test_resnet', num_classes=3).eval()
    teacher = create_teacher(f'local-dir:{trained_teacher}', 3, image_size=(32, 32))
    pixels, target = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 2, 1, 2])
    weights = torch.tensor([0.5, 1.0, 3.0])
    task = DistillationTask(student, teacher, 'rld', warmup_epochs=0, smoothing=smoothing, class_weights=weights)
    found = task(pixels, target)
    ce = nn.functional.cross_entropy(found['output'], target, label_smoothing=smoothing, reduction='none')
    kd = create_distill_loss('rld')(found['output'], teacher(pixels), target)
    assert found['task_loss'].item() == pytest.approx((ce * weights[target]).mean().item(), rel=1e-5)
    assert found['kd_loss'].item() == pytest.approx(kd.item(), rel=1e-5)
    assert found['loss'].item() == pytest.approx((found['task_loss'] + kd).item(), rel=1e-5)
    # what halves of a batch give is what the whole gives, whatever classes are in them
    halves = [task(pixels[i], target[i])['task_loss'] for i in (slice(0, 2), slice(2, 4))]
    assert torch.stack(halves).mean().item() == pytest.approx(found['task_loss'].item(), rel=1e-5)
    assert not [k for k in task.state_dict() if 'task_criterion' in k]


# ------------------------------------------------------------------------------------------------------- macro accuracy


@pytest.mark.parametrize('batch_size', [1, 4, 100])
def test_macro_accuracy_is_the_mean_of_the_classes_top1(tail, batch_size):
    source = split_of(tail, 'validation')
    source.num_classes = 5  # of which two have no images
    loader = Loader(
        source, eval_transform((3, 32, 32), interpolation='bilinear', crop_pct=1.0), batch_size, training=False
    )
    order = [source.read(i)[1] for i in range(len(source))]
    right = {0: 9, 1: 3, 2: 0}  # images predicted right, by class
    left = dict(right)
    wanted = []
    for label in order:
        wanted.append(label if left[label] > 0 else (label + 1) % 3)
        left[label] -= 1
    answers = iter(wanted)

    def predict(pixels: torch.Tensor) -> torch.Tensor:
        return torch.stack([nn.functional.one_hot(torch.tensor(next(answers)), 5) for _ in pixels]).float()

    metrics, _ = evaluate(predict, loader, create_accelerator())
    assert metrics['macro'] == pytest.approx(100 * (9 / 9 + 3 / 6 + 0 / 3) / 3)
    assert metrics['top1'] == pytest.approx(100 * 12 / 18)


def test_the_best_epoch_is_that_of_the_figure_that_is_asked_for():
    figures = {'top1': (50, 70, 60), 'macro': (30, 20, 40), 'loss': (1.0, 2.0, 3.0), 'agreement': (1, 1, 1)}
    rows = [{f'eval_{k}': v[e] for k, v in figures.items()} | {'epoch': e + 1, 'images_per_second': 1.0}
            for e in range(3)]  # fmt: skip
    found = {by: outcome(rows, by) for by in ('top1', 'macro', 'loss')}
    assert {by: o['best_epoch'] for by, o in found.items()} == {'top1': 2, 'macro': 3, 'loss': 1}
    assert (found['macro']['student_top1_best'], found['macro']['student_macro_best']) == (60, 40)
    assert (found['macro']['student_macro'], found['macro']['best_by']) == (40, 'macro')


# --------------------------------------------------------------------------------------------------------------- a run


def test_a_run_says_so_weighs_and_reports_macro_accuracy_everywhere(flags, tail, tmp_path, capsys):
    argv = [*flags, '--class-weights', 'auto', '--best-by', 'macro', '--model-ema']
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.count('classes of 2 (plum) to 24 images (apple)') == 1 and '--class-weights auto' in out
    run = read_run(tmp_path / 'run')
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    macro = [float(row['eval_macro']) for row in rows]
    assert run.results['student_macro'] == pytest.approx(macro[-1], rel=1e-5)
    assert run.results['student_macro_best'] == pytest.approx(max(macro), rel=1e-5)
    assert run.results['best_epoch'] == 1 + macro.index(max(macro)) and 'eval_macro_ema' in rows[0]
    assert 0 <= run.results['teacher_macro'] <= 100
    assert f'{macro[-1]:.2f} %' in card_section(run, 'user/name', 'last', False).split('macro accuracy', 1)[1]
    assert 'Macro accuracy' in json.dumps(card_header(run, 'user/name', 'mit', 'best'), default=str)
    facts = json.loads((tmp_path / 'run' / 'facts.json').read_text(encoding='utf-8'))
    assert facts['class weights'] == pytest.approx([35 / 72, 35 / 27, 35 / 6], rel=1e-4)


def test_even_classes_are_passed_over_in_silence(folder):
    assert describe_classes(split_of(folder)) == []


def test_the_weights_reach_the_student_and_not_the_teachers_own_training(flags, tmp_path):
    found = {}
    own = ['--teacher', 'test_resnet', '--no-teacher-pretrained', '--teacher-epochs', '1', '--epochs', '1']
    for name, weights in (('plain', []), ('weighted', ['--class-weights', 'auto'])):
        assert main([*flags, *own, *weights, '--experiment', name]) == 0
        found[name] = [(tmp_path / name / part / 'model.safetensors').read_bytes() for part in ('teacher', 'student')]
    assert found['plain'][0] == found['weighted'][0] and found['plain'][1] != found['weighted'][1]


def test_a_run_is_not_resumed_with_another_file_of_weights(flags, tmp_path, capsys):
    file = written(tmp_path, 'apple,1\npear,2\nplum,4\n')
    argv = [*flags, '--output', str(tmp_path / 'out'), '--class-weights', file, '--resume', 'auto', '--epochs', '1',
            '--sched', 'constant', '--warmup-epochs', '0']  # fmt: skip
    assert main(argv) == 0
    written(tmp_path, 'apple,1\npear,2\nplum,5\n')
    assert main([*argv, '--epochs', '2']) == 1
    assert 'was started with class weights' in capsys.readouterr().err


def test_weights_that_a_criterion_would_ignore_are_refused(flags, capsys):
    assert main([*flags, '--class-weights', 'auto', '--distill', 'la']) == 2
    assert '--class-weights auto: weighs the cross-entropy, whose own weight is 0' in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- cuts for studies


def cut(parquet: Path, output: Path, *argv: str) -> list[list[int]]:
    """Run the script; return the labels of the training and the validation images of the cut."""
    assert cuts.main(['--data', str(parquet), '--output', str(output), '--target-key', 'fine_label', *argv]) == 0
    columns = dict(flag='', input_key='img', target_key='fine_label')
    return [open_split(f'hfds/{output}', split, **columns).targets.tolist() for split in ('train', 'test')]


def test_a_cut_has_the_first_classes_and_loads_as_a_dataset(parquet, tmp_path):
    train, test = cut(parquet, tmp_path / 'two', '--classes', '2')
    assert np.bincount(train).tolist() == [14, 14] and np.bincount(test).tolist() == [7, 7]
    source = open_split(f'hfds/{tmp_path / "two"}', 'train', flag='', input_key='img', target_key='fine_label')
    assert source.class_names == ['apple', 'pear'] and source.read(0)[0].size == (12, 12)


def test_a_long_tailed_cut_falls_from_class_to_class_and_leaves_validation_whole(parquet, tmp_path, capsys):
    train, test = cut(parquet, tmp_path / 'tail', '--imbalance', '4')
    assert np.bincount(train).tolist() == [14, 7, 4] and np.bincount(test).tolist() == [7, 7, 6]  # 14 · 4^(-c/2)
    assert '| train | 25 | 14, 7, 4 |' in capsys.readouterr().out
    small, _ = cut(parquet, tmp_path / 'few', '--images', '3')
    assert np.bincount(small).tolist() == [3, 3, 3]


def test_the_images_of_a_cut_are_chosen_by_seed_and_index_alone(parquet, tmp_path):
    labels = np.array([0, 1] * 20)
    few, more = (cuts.choose(labels, np.array([n, n]), seed=0) for n in (5, 9))
    assert set(few) < set(more) and list(few) == sorted(few)
    assert set(cuts.choose(labels, np.array([5, 5]), seed=1)) != set(few)


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--classes', '1'], '--classes 1: must be at least 2'),
        (['--classes', '9'], '--classes 9: '),
        (['--imbalance', '0.5'], '--imbalance 0.5: must be at least 1'),
        (['--target-key', 'label'], '--target-key label: no such column'),
    ],
)
def test_a_cut_that_cannot_be_made_is_refused(parquet, tmp_path, capsys, argv, message):
    common = ['--data', str(parquet), '--output', str(tmp_path / 'out'), '--target-key', 'fine_label']
    assert cuts.main([*common, *argv]) in (1, 2)
    assert message in capsys.readouterr().err
