"""`--distill mekd`: a generator is trained, then a student on what it makes; a share of the images; what is refused."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fork_server import kill_until_done
from PIL import Image
from test_resume import wait_for
from torch import nn

from timm_rld import Generator, Teacher, create_distill_loss
from timm_rld.config import parse_args, resolve
from timm_rld.data import Loader, NoiseLoader, eval_transform, open_splits
from timm_rld.distributed import create_accelerator
from timm_rld.engine import check_settings
from timm_rld.engine.checkpoint import Checkpoints
from timm_rld.engine.generated import read_generator, write_generator
from timm_rld.engine.generator_training import read_images, train_generator
from timm_rld.engine.mekd_settings import GeneratorSettings, generator_settings
from timm_rld.errors import UserError
from timm_rld.loss import choose_criterion, discriminator_loss, published_defaults
from timm_rld.mekd_task import MEKDTask
from timm_rld.metrics import collapse
from timm_rld.models import Discriminator
from train_distill import main

SMALL = ['--generator-kwargs', 'batch_size=8']


def flags_of(folder: Path, teacher: Path, output: Path) -> list[str]:
    """Flags of a run of seconds: 21 images of three classes, two epochs of each phase."""
    return [
        '--teacher', f'local-dir:{teacher}', '--student', 'test_vit', '--data-dir', str(folder),
        '--img-size', '32', '--batch-size', '8', '--lr', '0.01', '--min-teacher-acc', '0', '--cpu-threads', '1',
        '--workers', '0', '--no-speed', '--distill', 'mekd', '--epochs', '2', '--steps-per-epoch', '3',
        '--train-fraction', '0.5', '--generator-epochs', '2', *SMALL, '--output', str(output),
    ]  # fmt: skip


@pytest.fixture
def flags(folder, trained_teacher, tmp_path) -> list[str]:
    return flags_of(folder, trained_teacher, tmp_path)


def rows_of(file: Path) -> list[dict[str, str]]:
    """A CSV without what a clock says."""
    return [{k: v for k, v in row.items() if 'second' not in k} for row in csv.DictReader(file.open(encoding='utf-8'))]


def digests(run: Path) -> list[str]:
    files = (run / part / 'model.safetensors' for part in ('generator', 'student'))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


# ------------------------------------------------------------------------------------------------ a share of the images


@pytest.mark.parametrize('fraction', [0.1, 0.5, 0.51, 1.0])
def test_a_share_has_the_rounded_number_of_images_and_smaller_ones_are_in_it(folder, fraction):
    def share(f, seed=1):
        train, val = open_splits(None, data_dir=str(folder), train_fraction=f, seed=seed)
        assert len(val) == 20 and train.whole is not None and len(train.whole) == 41
        return set(train.keys())

    assert len(share(fraction)) == int(fraction * 41 + 0.5)
    assert share(0.1) <= share(fraction) == share(fraction)
    assert fraction == 1 or share(fraction) != share(fraction, seed=2)


def test_a_share_is_of_what_is_left_by_held_out_images_and_skipped_ones(folder, tmp_path):
    train, val = open_splits(None, data_dir=str(folder), val_fraction=0.2, train_fraction=0.5)
    assert len(train) == int((41 - len(val)) * 0.5 + 0.5) and not set(train.keys()) & set(val.keys())
    listed = tmp_path / 'skip.txt'
    listed.write_text('train/apple/000.png\n')
    train, _ = open_splits(None, data_dir=str(folder), train_fraction=1.0, skip_list=str(listed))
    assert len(train) == 40
    train, held = open_splits(None, data_dir=str(folder), tune_holdout=0.2, train_fraction=0.25)
    assert not set(train.keys()) & set(held.keys()) and len(train) == int((41 - len(held)) * 0.25 + 0.5)


def test_the_teacher_has_all_images_and_the_student_its_share(folder):
    train, _ = open_splits(None, data_dir=str(folder), train_fraction=0.5)
    view = eval_transform((3, 8, 8), interpolation='bilinear', crop_pct=1.0)
    loader = Loader(train, view, 8, training=True, seed=3)
    assert len(loader.of_the_whole().source) == 41 and len(loader.source) == 21
    assert loader.of_the_whole().sampler.batch_size == 8
    whole = Loader(train.whole, view, 8, training=True)
    assert whole.of_the_whole() is whole


def test_a_share_of_nothing_or_of_a_stream_is_refused(folder, parquet):
    with pytest.raises(UserError, match='--train-fraction 0.001: no image of 41 images would be left'):
        open_splits(None, data_dir=str(folder), train_fraction=0.001)
    with pytest.raises(UserError, match='--train-fraction 0.5: a streamed dataset cannot be divided'):
        open_splits(
            f'hfids/{parquet}', 'train', 'test', train_fraction=0.5, input_key='img', target_key='fine_label',
            num_classes=3, train_num_samples=41, val_num_samples=20,
        )  # fmt: skip


def test_any_run_trains_on_a_share_and_is_not_resumed_on_another(flags, tmp_path, capsys):
    at = flags.index('--distill')
    argv = [*flags[:at], '--distill', 'none', '--epochs', '1', '--output', str(tmp_path), '--experiment', 'run']
    assert main([*argv, '--train-fraction', '0.5']) == 0
    assert '--train-fraction 0.5: 21 images of 41' in capsys.readouterr().out
    facts = json.loads((tmp_path / 'run' / 'facts.json').read_text())
    assert facts['training images'] == 21
    (tmp_path / 'run' / 'results.json').unlink()
    assert main([*argv, '--train-fraction', '0.6', '--resume', 'auto']) == 1
    assert '--train-fraction 0.5, not 0.6' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize('accum', [1, 2])
def test_noise_follows_from_seed_epoch_and_step_and_is_cut_by_process(accum):
    one = NoiseLoader(5, 8, 3, seed=1, accum=accum)
    parts = [NoiseLoader(5, 4, 3, seed=1, rank=r, world=2, accum=accum) for r in range(2)]
    for loader in (one, *parts):
        loader.set_epoch(2)
    batches = list(one)
    assert len(batches) == len(one) == 3 * accum and one.updates_per_epoch == 3
    for (z, target, indices), a, b in zip(batches, *parts, strict=True):
        assert torch.equal(z, torch.cat([a[0], b[0]])) and torch.equal(indices, torch.cat([a[2], b[2]]))
        assert z.shape == (8, 5, 1, 1) and (target == -1).all()
    one.set_epoch(2, 2)
    assert torch.equal(next(iter(one))[0], batches[2][0])
    one.set_epoch(3)
    assert not torch.equal(next(iter(one))[0], batches[0][0])
    for loader in (one, *parts):
        steps = [loader.step(i) for i in range(2)]
        assert all(s.group == 8 * accum for s in steps) and [s.last for s in steps] == [accum == 1, True]
    assert torch.stack([z for z, _, _ in NoiseLoader(50, 64, 8)]).std().item() == pytest.approx(1, abs=0.02)


# ---------------------------------------------------------------------------------------------------------- the task


class Fixed(nn.Module):
    """A teacher that answers, as a closed one does."""

    def __init__(self, answers: str) -> None:
        super().__init__()
        self.answers = answers
        self.weight = nn.Parameter(torch.randn(5, 3))

    def forward(self, pixels):
        rows = pixels.mean((2, 3)) @ self.weight.T / 400
        if self.answers == 'soft':
            return rows.log_softmax(1)
        return rows if self.answers == 'logits' else torch.eye(5)[rows.argmax(1)]


@pytest.mark.parametrize('answers', ['logits', 'soft', 'hard'])
def test_a_step_has_the_gradient_of_the_loss_on_generated_images(answers):
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 5))
    criterion = create_distill_loss('mekd', generator=Generator(5, 16))
    criterion.use(criterion.generator, answers, (24, 24))
    teacher = Fixed(answers)
    from timm_rld.pairing import Normalize

    normalize = Normalize((0.5,), (0.5,))
    task = MEKDTask(student, Teacher(nn.Linear(1, 1), normalize), criterion, normalize=normalize).train()
    task.teacher = teacher
    z = torch.randn(6, 5, 1, 1)
    rows, _ = task.ask_teacher(z)
    out = task(z, torch.full((6,), -1), rows)
    assert set(out) == {'loss', 'output', 'kd_loss', 'image_loss', 'kl_loss', 'agreement', 'teacher_confidence'}
    out['loss'].backward()
    pixels = criterion.pixels(z.flatten(1))
    assert pixels.shape == (6, 3, 24, 24) and pixels.min() >= 0 and pixels.max() <= 255
    assert torch.equal(rows, teacher(pixels)) and not task.mekd.generator.training
    logits = student(normalize(pixels)).detach().requires_grad_()
    expected = criterion(logits, rows.detach())
    expected.backward()
    assert out['loss'].item() == pytest.approx(expected.item())
    assert student[1].bias.grad.tolist() == pytest.approx(logits.grad.sum(0).tolist(), rel=1e-4, abs=1e-7)
    assert all(p.grad is None for p in criterion.parameters()) and teacher.weight.grad is None
    assert (out['teacher_confidence'] == 1) == (answers == 'hard')


# -------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope='module')
def whole(folder, trained_teacher, fork_server, tmp_path_factory) -> tuple[Path, list[str], str]:
    """A finished run, its flags, and what it printed."""
    output = tmp_path_factory.mktemp('mekd')
    argv = flags_of(folder, trained_teacher, output)
    training = fork_server.run([*argv, '--experiment', 'whole'], output / 'log')
    return output / 'whole', argv, training.output()


def test_a_run_leaves_a_generator_its_figures_and_pictures(whole):
    run, _, said = whole
    assert '--train-fraction 0.5: 21 images of 41' in said
    assert 'on 21 images of 32×32, whose labels are not read' in said and 'generator epoch 2/2' in said
    assert 'classes occur, entropy' in said
    config = json.loads((run / 'generator' / 'config.json').read_text())
    assert (config['num_classes'], config['img_size'], config['in_chans']) == (3, 32, 3)
    rows = list(csv.DictReader((run / 'generator.csv').open(encoding='utf-8')))
    assert len(rows) == 2 and {'d_loss', 'g_loss', 'd_real', 'd_fake', 'entropy', 'teacher_confidence'} <= set(rows[0])
    student = list(csv.DictReader((run / 'summary.csv').open(encoding='utf-8')))
    assert len(student) == 2 and not student[0]['train_task_loss']
    assert {'train_image_loss', 'train_kl_loss', 'train_agreement', 'train_teacher_confidence'} <= set(student[0])
    found = json.loads((run / 'results.json').read_text())['models']['generator']
    assert sum(found['counts']) == found['images'] == 128 and found['answers'] == 'logits'
    assert 0 <= found['agreement'] <= 100 and len(found['shown']) == 40 and len(found['shown'][0]) == 4
    assert found['d_real'] == pytest.approx(float(rows[-1]['d_real']), rel=1e-4)
    with Image.open(run / 'generated.png') as picture:
        assert picture.size == (10 * 32, 4 * 32)


def test_the_report_shows_generated_images_and_none_of_the_dataset_that_the_student_never_saw(whole):
    pytest.importorskip('jinja2')
    from timm_rld.report import write_report

    html = write_report(whole[0], log=lambda _: None)[0].read_text(encoding='utf-8')
    block = html[html.index('id="generated"') : html.index('id="time"')]
    assert block.count('data:image/png') == 40 and 'classes that occur' in block and 'Losses of phase 1' in block
    assert 'discriminator: real / generated' in block and 'id="images"' not in html


def test_the_benchmark_of_a_step_knows_both_phases(capsys):
    from timm_rld.__main__ import main as tools

    argv = ['bench', 'step', '--distill', 'mekd', '--teacher', 'test_resnet', '--student', 'test_resnet']
    argv += ['--img-size', '32', '--batch-size', '2', '--num-classes', '5', '--rounds', '1', '--steps', '1']
    assert tools(argv) == 0
    out = capsys.readouterr().out
    parts = ('phase 1: discriminator', 'phase 1: generator, two passes', 'phase 1: step', 'phase 2: teacher (T)')
    assert all(f'| {part} |' in out for part in parts) and 'phase 2 / (G + T + S)' in out
    assert tools(['bench', 'loss', '--criteria', 'mekd']) == 2
    assert 'timm-rld bench step --distill mekd' in capsys.readouterr().err


@pytest.mark.slow
def test_without_labels_the_run_is_the_same(fork_server, whole, folder, tmp_path):
    """Neither phase reads a label: with all training images in one class both networks come out the same."""
    run, argv, _ = whole
    images = tmp_path / 'images'
    shutil.copytree(folder / 'validation', images / 'validation')
    names = sorted(p.relative_to(folder / 'train') for p in (folder / 'train').rglob('*.png'))
    for i, name in enumerate(names):  # in the same order, under labels that say nothing
        place = images / 'train' / ('apple' if i < 39 else 'pear' if i < 40 else 'plum') / f'{i:03}.png'
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / 'train' / name, place)
    argv = [str(images) if x == str(folder) else x for x in argv]
    argv[argv.index('--output') + 1] = str(tmp_path)
    fork_server.run([*argv, '--experiment', 'run'], tmp_path / 'log')
    assert digests(tmp_path / 'run') == digests(run)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_run_that_is_stopped_in_both_phases_ends_as_the_one_that_was_not(fork_server, whole, tmp_path, processes):
    _, argv, _ = whole
    argv = [*argv, '--output', str(tmp_path), '--generator-epochs', '5', '--epochs', '5', '--steps-per-epoch', '2',
            '--batch-size', str(8 // processes), '--log-interval', '1']  # fmt: skip
    fork_server.run([*argv, '--experiment', 'whole'], tmp_path / 'whole.log', processes)
    argv = [*argv, '--experiment', 'stopped', '--resume', 'auto']
    for phase, before in (('generator', ''), ('student', 'generator')):
        training = fork_server.start(argv, tmp_path / f'{phase}.log', processes)
        wait_for(lambda v=training, p=phase: f'{p} epoch 1/' in v.output())
        training.signal(signal.SIGTERM)
        assert training.wait() == [143] * processes, training.output()
        assert 'stopped by SIGTERM in epoch' in training.output() and f'of the {phase}' in training.output()
        assert f'{before}: resuming in epoch' in training.output() or not before
    again = fork_server.run(argv, tmp_path / 'again.log', processes)
    assert 'student: resuming in epoch' in again.output() and 'generator epoch' not in again.output()
    assert digests(tmp_path / 'stopped') == digests(tmp_path / 'whole')
    for file in ('generator.csv', 'summary.csv'):
        assert rows_of(tmp_path / 'stopped' / file) == rows_of(tmp_path / 'whole' / file)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_the_one_that_was_not(fork_server, whole, tmp_path):
    run, argv, _ = whole
    argv = [
        *argv,
        '--output',
        str(tmp_path),
        '--checkpoint-interval',
        '1',
        '--experiment',
        'killed',
        '--resume',
        'auto',
    ]
    assert kill_until_done(fork_server, argv, tmp_path / 'log', random.Random(5), 4.0, 3) >= 1
    assert digests(tmp_path / 'killed') == digests(run)
    for file in ('generator.csv', 'summary.csv'):
        assert rows_of(tmp_path / 'killed' / file) == rows_of(run / file)


@pytest.mark.slow
def test_two_processes_train_both_networks_as_one(fork_server, whole, tmp_path):
    run, argv, _ = whole
    argv = [*argv, '--output', str(tmp_path), '--experiment', 'two', '--batch-size', '4', '--lr', '0.01']
    fork_server.run(argv, tmp_path / 'log', 2)
    for file, rel in (('generator.csv', 1e-5), ('summary.csv', 2e-4)):
        for one, two in zip(rows_of(run / file), rows_of(tmp_path / 'two' / file), strict=True):
            for key, value in one.items():
                assert float(two[key] or 0) == pytest.approx(float(value or 0), rel=rel, abs=1e-6), key
    one, two = (read_generator(str(r), 3, 3).state_dict() for r in (run, tmp_path / 'two'))
    for key, value in one.items():
        assert torch.allclose(value, two[key], rtol=1e-4, atol=1e-6), key


def test_a_generator_is_used_again_by_its_run_its_folder_or_its_file(whole, tmp_path, capsys):
    run, argv, _ = whole
    for form in ('', 'generator', 'generator/model.safetensors'):
        found = read_generator(str(run / form), 3, 3)
        assert (found.num_classes, found.img_size, found.in_chans) == (3, 32, 3)
    at = argv.index('--generator-epochs')
    argv = [*argv[:at], '--output', str(tmp_path), '--experiment', 'run', '--generator', str(run)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert 'generator epoch' not in out and not (tmp_path / 'run' / 'generator.csv').exists()
    assert digests(tmp_path / 'run') == digests(run)


def test_a_generator_for_other_classes_or_channels_or_no_generator_at_all_is_refused(trained_teacher, tmp_path):
    write_generator(Generator(4, 16, 1), tmp_path / 'g', {})
    with pytest.raises(UserError, match='of 4 classes, the dataset has 3'):
        read_generator(str(tmp_path / 'g'), 3, 1)
    with pytest.raises(UserError, match=r'have 1 channel\(s\), this run has 3'):
        read_generator(str(tmp_path / 'g'), 4, 3)
    with pytest.raises(UserError, match='not the weights of a generator of MEKD; name a run of --distill mekd'):
        read_generator(str(trained_teacher), 3, 3)
    with pytest.raises(UserError, match='--generator /nowhere: no such file'):
        read_generator('/nowhere', 3, 3)
    (tmp_path / 'run' / 'generator').mkdir(parents=True)
    with pytest.raises(UserError, match='holds no generator .*has its run finished phase 1'):
        read_generator(str(tmp_path / 'run'), 3, 3)


def test_a_generator_that_was_damaged_is_named(whole, tmp_path, capsys):
    run, argv, _ = whole
    shutil.copytree(run, tmp_path / 'run')
    (tmp_path / 'run' / 'results.json').unlink()
    (tmp_path / 'run' / 'generator' / 'model.safetensors').write_bytes(b'x')
    assert main(['--resume', str(tmp_path / 'run')]) == 1
    assert f'is damaged or gone; delete {tmp_path}/run/generator to make it again' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ closed teachers


@pytest.mark.parametrize('answers', ['soft', 'hard'])
def test_a_closed_teacher_is_asked_about_generated_images_and_each_of_them_counts(flags, tmp_path, answers):
    assert main([*flags, '--black-box', answers, '--experiment', 'run']) == 0
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    phase_1 = 2 * 21 if answers == 'soft' else 0  # a class alone says nothing of how sure the teacher is
    assert results['queries'] == 20 + phase_1 + 128 + 2 * 3 * 8
    assert results['models']['generator']['answers'] == answers
    assert results['models']['generator']['teacher_confidence'] == 1 or answers == 'soft'


def test_a_budget_ends_either_phase_with_a_checkpoint_and_a_larger_one_goes_on(flags, tmp_path, capsys):
    flags = [*flags, '--black-box', 'soft', '--epochs', '1', '--experiment']
    assert main([*flags, 'whole']) == 0
    argv = [*flags, 'run', '--resume', 'auto', '--max-queries']
    for budget, said in ((30, 'of the generator'), (150, 'looking at the generator'), (242, 'of the student')):
        assert main([*argv, str(budget)]) == 1
        err = capsys.readouterr().err
        assert '--max-queries' in err and said in err and 'continues' in err
    assert main([*argv, '1000']) == 0
    assert digests(tmp_path / 'run') == digests(tmp_path / 'whole')
    queries = [json.loads((tmp_path / r / 'results.json').read_text())['queries'] for r in ('run', 'whole')]
    assert queries[0] == queries[1] + 3 * 20  # the validation images again in each process


def test_noise_that_is_asked_about_ahead_becomes_images_where_the_generator_is():
    """It comes from the loader, on the CPU; the generator may be on a GPU."""
    criterion = create_distill_loss('mekd')
    task = MEKDTask(nn.Linear(1, 1), Fixed('soft'), criterion, normalize=nn.Identity())
    criterion.use(Generator(5, 32, 3).to('meta'), 'soft')
    assert task.images(torch.randn(2, 5, 1, 1)).device.type == 'meta'


def test_a_function_is_asked_about_generated_images_ahead_of_their_step(flags, tmp_path, monkeypatch):
    monkeypatch.setenv('ASKED', str(tmp_path / 'asked'))
    at = flags.index('--teacher')
    flags = [*flags[:at], *flags[at + 2 :], '--teacher-query', 'closed_teachers:ask', '--experiment']
    for name, workers in (('one', '0'), ('ahead', '2')):
        assert main([*flags, name, '--query-workers', workers]) == 0
    assert digests(tmp_path / 'one') == digests(tmp_path / 'ahead')
    results = json.loads((tmp_path / 'one' / 'results.json').read_text())
    assert results['queries'] == 16 + 20 + 2 * 21 + 128 + 2 * 3 * 8


# ------------------------------------------------------------------------------------------------------------ phase 1


@pytest.mark.parametrize('info', ['paper', 'coded'])
@pytest.mark.parametrize('answers', ['logits', 'hard'])
def test_phase_1_asks_the_teacher_only_where_its_answer_matters(info, answers, tmp_path):
    accelerator = create_accelerator()
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    teacher, asked = Fixed(answers), []

    def ask(pixels):
        asked.append(pixels)
        return teacher(pixels)

    settings = GeneratorSettings(epochs=2, batch_size=8, info=info)
    generator, history = train_generator(
        images, ask, answers, settings, accelerator, num_classes=5, image_size=(24, 24), seed=0, folder=tmp_path
    )
    assert not generator.training and len(history) == 2 and 'information_loss' in history[0]
    if answers == 'hard' and info == 'paper':
        assert not asked and 'entropy' not in history[0]
    else:
        assert [len(p) for p in asked] == [8, 8, 4] * 2 and asked[0].shape[1:] == (3, 24, 24)
        assert all(p.min() >= 0 and p.max() <= 255 for p in asked) and 0 <= history[0]['entropy'] <= 1


def test_a_teacher_that_falls_silent_in_phase_1_leaves_a_checkpoint_from_which_the_same_generator_comes(tmp_path):
    accelerator, teacher = create_accelerator(), Fixed('logits')
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    calls = iter(range(99))

    def ask(pixels):
        if next(calls) == 4:
            raise UserError('the teacher does not answer')
        return teacher(pixels)

    def train(of, folder):
        (folder / 'checkpoints').mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(folder / 'checkpoints', 2, print)
        checkpoints.prepare('auto' if any((folder / 'checkpoints').iterdir()) else None, accelerator)
        return train_generator(
            images, of, 'logits', GeneratorSettings(epochs=3, batch_size=8), accelerator, num_classes=5,
            image_size=(24, 24), seed=0, folder=folder, checkpoints=checkpoints,
        )[0].state_dict()  # fmt: skip

    whole = train(teacher, tmp_path / 'whole')
    with pytest.raises(UserError, match=r'the teacher does not answer; .* --resume .* continues'):
        train(ask, tmp_path / 'run')
    found = train(ask, tmp_path / 'run')
    assert next(calls) == 10, 'the answers of nine steps, one of them asked for twice'
    assert all(torch.equal(found[k], whole[k]) for k in whole)


def test_a_generator_whose_losses_are_not_finite_is_an_error_that_names_the_flag(tmp_path):
    settings = GeneratorSettings(epochs=3, batch_size=8, lr=1e30)
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    with pytest.raises(UserError, match='losses of the generator in epoch 1 are .*nan.*--generator-kwargs lr'):
        train_generator(
            images, Fixed('logits'), 'logits', settings, create_accelerator(), num_classes=5, image_size=(24, 24),
            seed=0, folder=tmp_path,
        )  # fmt: skip
    assert not (tmp_path / 'generator.csv').exists()


def test_phase_1_reads_each_image_as_the_student_sees_it(folder):
    train, _ = open_splits(None, data_dir=str(folder), train_fraction=0.5)
    view = dict(interpolation='bilinear', crop_pct=1.0, crop_mode='center')
    images = read_images(train, 16, 3, view, 0, None)
    assert images.shape == (21, 3, 16, 16) and images.dtype == torch.uint8
    with Image.open(train.path(4)) as image:
        same = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(images[4].numpy(), same)


def test_a_discriminator_learns_at_32_pixels_and_cannot_at_16():
    """At 16 its last batch norm is over single pixels of the batch, so that the mean score is the same of any batch."""
    for size, learns in ((32, True), (16, False)):
        torch.manual_seed(0)
        real, fake = (0.6 * torch.randn(16, 3, size, size)).clamp(-1, 1), 0.1 * torch.randn(16, 3, size, size)
        discriminator = Discriminator(size).train()
        optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3, (0.5, 0.999))
        for _ in range(30):
            loss = discriminator_loss(discriminator(real), discriminator(fake))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert (loss.item() < 0.5) == learns and (learns or loss.item() == pytest.approx(2 * np.log(2), abs=1e-3))


@pytest.mark.parametrize(
    ('counts', 'said'),
    [
        ([10] * 10, ''),
        ([100] * 100, ''),
        ([0] + [30] * 9, r"1 of 10 classes never occur \('a'\)"),
        ([1000, 1, 1, 1, 1, 1, 1, 1, 1, 1], 'their entropy is 0.0'),
        ([1] * 600 + [0] * 400, ''),  # of so few images that many are missing by chance
    ],
)
def test_a_collapse_is_said_with_what_to_try(counts, said):
    import re

    found = collapse(counts, list('abcdefghij') if len(counts) == 10 else None)
    assert bool(found) == bool(said)
    if said:
        assert re.search(said, found) and '--generator-kwargs info_weight' in found


# ------------------------------------------------------------------------------------------------------------- refused


def test_a_generator_that_is_given_sets_aside_how_a_recipe_trains_one():
    config = parse_args(['--config', 'configs/blackbox/sample_mekd.yaml', '--generator', 'x'])
    assert (config.generator, config.generator_epochs, config.generator_kwargs) == ('x', None, {})


@pytest.mark.parametrize(
    ('extra', 'message'),
    [
        (['--task-loss-weight', '0.5'], '--task-loss-weight 0.5 with --distill mekd: the student sees generated'),
        (['--mixup', '0.2'], '--mixup with --distill mekd'),
        (['--cutmix-minmax', '0.2', '0.5'], '--cutmix-minmax with --distill mekd'),
        (['--reprob', '0.2'], '--reprob with --distill mekd: no image of the dataset is augmented'),
        (['--hflip', '0'], '--hflip with --distill mekd: no image'),
        (['--teacher-cache', 'c'], '--teacher-cache with --distill mekd: generated images never come again'),
        (['--teacher-answers', 'x.csv'], 'there is one teacher'),
        (['--class-weights', 'auto'], '--class-weights with --distill mekd'),
        (
            ['--generator-kwargs', 'size=3'],
            "unknown 'size' (did you mean 'img_size'?); it has: batch_size, lr, info_weight",
        ),
        (['--generator-kwargs', 'lr=0'], '--generator-kwargs lr=0: must be a number above 0'),
        (['--generator-kwargs', 'info=both'], '--generator-kwargs info=both: must be paper or coded'),
        (['--generator-kwargs', 'batch_size=1'], 'batch_size=1: must be a whole number of at least 2'),
        (['--generator-kwargs', 'img_size=16'], 'img_size=16: at that size the discriminator ends in a batch norm of'),
        (['--generator-kwargs', 'img_size=30'], 'img_size=30: the generator makes images of a multiple of 16'),
        (['--generator', 'x'], '--generator-epochs with --generator x: which is trained already'),
        (['--standardize'], "criterion 'mekd' is not combined with standardize"),
        (['--distill-kwargs', 'norm=l3'], 'norm must be l1 or l2'),
        (['--steps-per-epoch', '0'], '--steps-per-epoch: must be at least 1'),
        (['--train-fraction', '1.5'], '--train-fraction: must be at most 1'),
        (['--distill', 'kd'], '--generator-epochs 2: belongs to --distill mekd, not kd'),
    ],
)
def test_what_makes_no_sense_on_generated_images_is_refused_before_anything_is_read(flags, capsys, extra, message):
    assert main([*flags, *extra]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('extra', 'message'),
    [
        (['--generator-kwargs', 'batch_size=64'], '21 training image(s) are fewer than a batch of the generator; give'),
        (['--train-fraction', '0.1'], '4 training image(s) are fewer than a batch'),
        (
            ['--train-fraction', '0.03'],
            '1 training image(s) are fewer than a batch of the generator; give a larger --train-fraction\n',
        ),
        (['--generator-kwargs', 'img_size=1264', 'batch_size=8'], 'the linear layer of the generator would have'),
    ],
)
def test_data_that_do_not_do_for_the_generator_are_refused_before_anything_is_trained(flags, capsys, extra, message):
    assert main([*flags, *extra]) == 1
    assert message in capsys.readouterr().err


def test_a_stream_is_refused(flags, parquet, capsys):
    at = flags.index('--data-dir')
    argv = [*flags[:at], '--dataset', f'hfids/{parquet}', '--input-key', 'img', '--target-key', 'fine_label',
            '--val-split', 'test', '--train-num-samples', '41', '--val-num-samples', '20', '--num-classes', '3',
            *flags[at + 2 :]]  # fmt: skip
    at = argv.index('--train-fraction')
    assert main([*argv[:at], *argv[at + 2 :]]) == 1
    assert (
        'is read as a stream, and the generator is trained on images that are kept in memory' in capsys.readouterr().err
    )


def test_augmentation_of_a_file_or_for_a_teacher_that_is_trained_here_is_fine(flags, tmp_path):
    file = tmp_path / 'recipe.yaml'
    file.write_text('hflip: 0.2\nmixup: 0\n')
    check_settings(resolve(parse_args([*flags, '--config', str(file)])))
    check_settings(resolve(parse_args([*flags, '--hflip', '0.2', '--teacher-epochs', '1'])))


def test_the_published_numbers_of_steps_and_epochs_are_the_defaults_of_mekd_alone():
    pair = ['--teacher', 'resnet34', '--student', 'resnet18', '--data-dir', '.']
    config = resolve(parse_args([*pair, '--distill', 'mekd']), published=published_defaults)
    assert (config.steps_per_epoch, config.generator_epochs, config.task_loss_weight) == (500, 200, 0)
    assert generator_settings(None, {}) == GeneratorSettings(200, 64, 2e-4, 0.5, 'paper', 32)
    check_settings(config)
    config = resolve(parse_args([*pair, '--distill', 'kd']), published=published_defaults)
    assert config.steps_per_epoch is config.generator_epochs is None
    assert choose_criterion('mekd', False, {'norm': 'l2'})[1].norm == 'l2'
    assert choose_criterion('mekd', False, {})[0].generated and not choose_criterion('kd', False, {})[0].generated


def test_checkpoints_of_the_phases_come_in_their_order(tmp_path):
    for name in ('student-epoch0001-batch000002', 'generator-epoch0003-end', 'teacher-epoch0009-end',
                 'generator-epoch0003-batch000001'):  # fmt: skip
        (tmp_path / name).mkdir()
    phases = [name.partition('-')[0] for name in Checkpoints(tmp_path).names()]
    assert phases == ['teacher', 'generator', 'generator', 'student']
