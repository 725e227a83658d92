"""--distill-token: the criterion trains the distillation head, cross-entropy the main one; evaluation: their mean."""

from __future__ import annotations

import copy
import csv
import fnmatch
import inspect
import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from test_cache import no_teacher  # noqa: F401  # a fixture
from test_engine import launch
from timm.task import TokenDistillationTask
from torch import nn

from timm_rld import DistillationTask, MixedTarget, create_distill_loss
from timm_rld.__main__ import main as tools
from timm_rld.config import Config, parse_args, resolve
from timm_rld.engine.checkpoint import Checkpoints
from timm_rld.errors import UsageError, UserError
from timm_rld.loss import CRITERIA, published_defaults
from timm_rld.pairing import (
    Teacher,
    create_student,
    enable_distilled_training,
    has_distillation_head,
    in_distilled_training,
)
from timm_rld.pairing.heads import FAMILIES
from timm_rld.tune.candidates import published, sample
from train_distill import main

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'timm_token.json').read_text(encoding='utf-8'))
DEIT = 'deit_tiny_distilled_patch16_224'
SMALL = dict(embed_dim=24, depth=1, num_heads=2)
PIXELS = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 2, 1, 2])
# the smallest network of each family, and the size of its images
NETWORKS = {
    DEIT: 32, 'pit_ti_distilled_224': 32, 'levit_128s': 64, 'efficientformer_l1': 224, 'efficientformerv2_s0': 64,
    'swiftformer_xs': 32, 'repvit_m0_9': 32, 'iformer_m_distilled': 32, 'efficientvim_m1_dist': 64,
}  # fmt: skip


@pytest.fixture
def student() -> nn.Module:
    torch.manual_seed(7)
    return create_student(DEIT, 3, img_size=32, distill_token=True, **SMALL).student


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(8)
    return timm.create_model('test_resnet', num_classes=3).eval()


@pytest.fixture
def flags(folder, trained_teacher, tmp_path) -> list[str]:
    return ['--teacher', f'local-dir:{trained_teacher}', '--student', DEIT, '--model-kwargs',
            *(f'{k}={v}' for k, v in SMALL.items()), '--distill-token', '--data-dir', str(folder), '--img-size', '32',
            '--epochs', '2', '-b', '8', '--workers', '0', '--lr', '0.02', '--min-teacher-acc', '0', '--cpu-threads',
            '1', '--no-speed', '--output', str(tmp_path)]  # fmt: skip


def both(student: nn.Module, pixels: torch.Tensor = PIXELS) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of the two heads."""
    return student.train()(DistillationTask(student, None, None).normalize(pixels))


def rows_of(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / 'summary.csv').open()))


# ------------------------------------------------------------------------------------------------------------- students


def test_the_families_named_are_those_of_timm():
    patterns = {entry.partition(' ')[0] for entry in FAMILIES}
    modules = {m.split('.')[-1]: sys.modules[m] for m in list(sys.modules) if m.startswith('timm.models.')}
    having = {n for n, m in modules.items() if 'def set_distilled_training' in inspect.getsource(m)}
    found = {pattern: fnmatch.filter(timm.list_models(), pattern) for pattern in patterns}
    assert all(found.values())
    homes = {timm.models.model_entrypoint(name).__module__.split('.')[-1] for names in found.values() for name in names}
    assert homes == having
    assert {next(p for p in patterns if fnmatch.fnmatch(n, p)) for n in NETWORKS} == patterns


@pytest.mark.parametrize('name', [DEIT, 'levit_128s', 'repvit_m0_9',
                                  *(pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS
                                    if n not in (DEIT, 'levit_128s', 'repvit_m0_9'))])  # fmt: skip
def test_a_network_of_each_family_trains_both_heads_and_gives_their_mean_from_its_folder(name, tmp_path):
    from timm_rld import export_model

    size = NETWORKS[name]
    pair = create_student(name, 3, img_size=size)
    model = pair.student
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    assert has_distillation_head(model, (3, size, size)) and model.training and not in_distilled_training(model)
    assert all(torch.equal(v.nan_to_num(), buffers[k].nan_to_num()) for k, v in model.named_buffers())
    enable_distilled_training(model, (3, size, size), name)
    x = torch.rand(2, 3, size, size)
    main_head, distilled = pair.student.train()(x)
    ((main_head.square().sum()) + distilled.square().sum()).backward()
    assert main_head.shape == distilled.shape == (2, 3)
    assert all(p.grad is not None for n, p in pair.student.named_parameters() if 'head' in n)
    folder = export_model(pair.student, tmp_path / 'student', data_config=pair.data_config)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    mean = model(x)
    for module in model.modules():
        if hasattr(module, 'distilled_training'):
            module.training = module.distilled_training = True
    a, b = model(x)
    assert torch.allclose(mean, (a + b) / 2, atol=1e-6) and not torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(mean, pair.student.eval()(x), atol=1e-5)


@pytest.mark.parametrize(('name', 'kwargs'), [('test_resnet', {}), ('pit_ti_224', {}), ('efficientvim_m1', {}),
                                              ('repvit_m0_9', dict(distillation=False))])  # fmt: skip
def test_a_student_without_a_distillation_head_is_refused_and_families_that_have_one_are_named(name, kwargs):
    with pytest.raises(UserError, match=rf'--distill-token: --student {name} has no distillation head.*deit_.*levit_'):
        create_student(name, 3, img_size=64, distill_token=True, **kwargs)


def test_the_command_line_refuses_it_before_anything_is_trained(folder, tiny, capsys):
    assert main([*tiny, '--distill-token']) == 1
    said = capsys.readouterr()
    assert '--distill-token: --student test_resnet has no distillation head' in said.err
    assert '--no-distill-token' in said.err and 'training the teacher' not in said.out


# ----------------------------------------------------------------------------------------------------------------- step


class Heads(nn.Module):
    """Two given outputs in training, their mean else."""

    def __init__(self, main_head: torch.Tensor, distilled: torch.Tensor) -> None:
        super().__init__()
        self.main, self.distilled = nn.Parameter(main_head), nn.Parameter(distilled)
        self.distilled_training = True

    def forward(self, x):
        return (self.main, self.distilled) if self.training else (self.main + self.distilled) / 2


@pytest.mark.parametrize('case', GOLDEN, ids=lambda c: c['id'])
def test_loss_gradients_and_evaluation_are_the_reference_values(case):
    inputs = {k: torch.tensor(v['data'], dtype=torch.float64).view(v['shape']) for k, v in case['inputs'].items()}
    options = case['options']
    criterion = create_distill_loss(
        *(['kd'] if options['distill_type'] == 'soft' else ['ce_teacher']),
        **({'temperature': options['temperature']} if 'temperature' in options else {}),
    )
    student = Heads(inputs['main'], inputs['distilled'])
    task = DistillationTask(
        student, nn.Identity(), criterion, task_loss_weight=case['task_loss_weight'],
        distill_loss_weight=case['distill_loss_weight'], warmup_epochs=0,
    )  # fmt: skip
    target = torch.tensor(case['target'])
    out = task.train()(torch.zeros(4, 3, 8, 8, dtype=torch.float64), target, inputs['teacher'])
    out['loss'].backward()
    for key in ('loss', 'task_loss', 'kd_loss'):
        assert out[key].item() == pytest.approx(case[key], rel=1e-9), key
    for key, parameter in (('main', student.main), ('distilled', student.distilled)):
        expected = torch.tensor(case['grads'][key]['data'], dtype=torch.float64).view_as(parameter)
        assert torch.allclose(parameter.grad, expected, rtol=1e-9, atol=1e-12), key
    expected = torch.tensor(case['eval_output']['data'], dtype=torch.float64).view(4, 7)
    assert torch.allclose(task.eval().get_eval_model()(None), expected, rtol=1e-12)
    right = [100 * (inputs[k].argmax(1) == target).double().mean().item() for k in ('main', 'distilled')]
    assert [out['main_top1'].item(), out['distill_top1'].item()] == pytest.approx(right)


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_a_step_is_that_of_timms_own_task(kind, student, teacher):
    theirs = copy.deepcopy(student)
    task = TokenDistillationTask(theirs, copy.deepcopy(teacher), nn.CrossEntropyLoss(label_smoothing=0.1),
                                 distill_type=kind, temperature=3.0, task_loss_weight=0.3, verbose=False)  # fmt: skip
    criterion = create_distill_loss('kd', temperature=3.0) if kind == 'soft' else create_distill_loss('ce_teacher')
    ours = DistillationTask(student, teacher, criterion, task_loss_weight=0.3, distill_loss_weight=0.7,
                            warmup_epochs=0, smoothing=0.1)  # fmt: skip
    x = ours.normalize(PIXELS)
    expected, out = task.train()(x, TARGET), ours.train()(x, TARGET)
    expected['loss'].backward()
    out['loss'].backward()
    for key, other in (('loss', 'loss'), ('task_loss', 'task_loss'), ('kd_loss', 'distill_loss')):
        assert out[key].item() == pytest.approx(expected[other].item(), rel=1e-6), key
    assert torch.equal(out['output'], expected['output'])
    largest = max(p.grad.abs().max() for p in theirs.parameters())
    for (name, p), q in zip(student.named_parameters(), theirs.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-6 * largest), name


@pytest.mark.parametrize('name', [n for n, row in CRITERIA.items() if row.plain])
def test_each_criterion_goes_to_the_distillation_head_alone(name, student, teacher):
    task = DistillationTask(student, teacher, name, warmup_epochs=0).train()
    out = task(PIXELS, TARGET)
    out['loss'].backward()
    gradients = [head.weight.grad.clone() for head in (student.head, student.head_dist)]
    student.zero_grad()
    main_head, distilled = both(student)
    row = CRITERIA[name]
    ce = nn.functional.cross_entropy(main_head, TARGET)
    kd = create_distill_loss(name)(distilled, Teacher(teacher)(PIXELS), TARGET)
    assert out['task_loss'].item() == pytest.approx(ce.item(), rel=1e-5)
    assert out['kd_loss'].item() == pytest.approx(kd.item(), rel=1e-5)
    weight = row.task_weight or 1  # where 0 is published, the main head would learn nothing
    assert out['loss'].item() == pytest.approx(weight * ce.item() + row.distill_weight * kd.item(), rel=1e-5)
    ((weight * ce) + row.distill_weight * kd).backward()
    for head, gradient in zip((student.head, student.head_dist), gradients):
        assert torch.allclose(head.weight.grad, gradient, rtol=1e-4, atol=1e-6) and gradient.abs().max() > 0
    assert published_defaults(name, False, 240, True)['task_loss_weight'] == weight == task.task_loss_weight


def test_a_mixed_target_weighs_each_heads_loss_and_accuracy(student, teacher):
    task = DistillationTask(student, teacher, 'rld').train()
    a, b = task(PIXELS, TARGET), task(PIXELS, TARGET.roll(1))
    out = task(PIXELS, MixedTarget(TARGET, TARGET.roll(1), 0.3))
    for key in ('loss', 'task_loss', 'kd_loss', 'main_top1', 'distill_top1'):
        assert out[key].item() == pytest.approx(0.3 * a[key].item() + 0.7 * b[key].item(), rel=1e-5), key


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_both_losses_are_computed_in_float32(dtype):
    given = [torch.randn(4, 7).to(dtype) for _ in range(2)]
    out = DistillationTask(Heads(*given), nn.Identity(), 'kd').train()(PIXELS, TARGET, torch.randn(4, 7, dtype=dtype))
    assert out['output'].dtype == dtype and out['loss'].dtype == out['task_loss'].dtype == torch.float32
    assert out['task_loss'].item() == pytest.approx(nn.functional.cross_entropy(given[0].float(), TARGET).item())


def test_without_a_criterion_cross_entropy_trains_the_mean_of_both_heads(student):
    out = DistillationTask(student, None, None).train()(PIXELS, TARGET)
    main_head, distilled = both(student)
    expected = nn.functional.cross_entropy((main_head + distilled) / 2, TARGET)
    assert out['loss'].item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(out) == {'loss', 'output', 'task_loss'}


@pytest.mark.parametrize('wrap', ['compile', 'ema', 'ddp', 'all'])
def test_both_heads_survive_compilation_averaging_and_ddp(wrap, student, teacher):
    plain = DistillationTask(copy.deepcopy(student), copy.deepcopy(teacher), 'kd').train()
    plain(PIXELS, TARGET)['loss'].backward()
    task = DistillationTask(student, teacher, 'kd')
    if wrap in ('ema', 'all'):
        task.setup_ema(decay=0.0)
    if wrap in ('compile', 'all'):
        task.compile(backend='eager')
    try:
        if wrap in ('ddp', 'all'):
            torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
            task.prepare_distributed()
        out = task.train()(PIXELS, TARGET)
        out['loss'].backward()
        task.update_ema(step=1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert {'main_top1', 'distill_top1'} <= set(out)
    for p, q in zip(student.parameters(), plain.trainable_module.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    x = task.normalize(PIXELS)
    main_head, distilled = both(student)
    task.eval()
    for ema in (False, True) if wrap in ('ema', 'all') else (False,):
        assert torch.allclose(task.get_eval_model(ema=ema)(x), (main_head + distilled) / 2, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(('flag', 'head'), [('task', 'main'), ('distill', 'distillation')])
def test_a_head_that_would_learn_nothing_is_refused(flag, head):
    with pytest.raises(UsageError, match=f'--{flag}-loss-weight 0 with --distill-token: the {head} head'):
        resolve(parse_args(['--data-dir', 'd', '--distill-token', f'--{flag}-loss-weight', '0']))
    resolve(parse_args(['--data-dir', 'd', '--distill-token', '--distill', 'none', f'--{flag}-loss-weight', '0']))


@pytest.mark.parametrize('name', ['la', 'pld', 'kd'])
def test_the_main_heads_weight_is_1_where_0_is_published(name):
    given = parse_args(['--data-dir', 'd', '--distill', name, '--distill-token'])
    assert resolve(given, published=published_defaults).task_loss_weight == (CRITERIA[name].task_weight or 1)
    assert resolve(given.changed(distill_token=False), published=published_defaults).task_loss_weight == (
        CRITERIA[name].task_weight
    )


@pytest.mark.parametrize('settings', [dict(distill_token=True), dict(class_weights='auto')])
def test_a_search_does_not_try_what_a_run_refuses(settings):
    config = resolve(Config(data_dir='d', epochs=10, **settings))
    tried = [dict(c.values)['task_loss_weight'] for c in sample(published('la', config), 9, 0, (), config)]
    assert set(tried) == {0.3, 1.0}


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_run_its_figures_evaluation_predictions_report_and_card(flags, folder, tmp_path, capsys):
    assert main([*flags, '--model-ema', '--model-ema-decay', '0.5', '--mixup', '0.2', '--experiment', 'run']) == 0
    run = tmp_path / 'run'
    for row in rows_of(run):
        assert all(0 <= float(row[f'train_{head}_top1']) <= 100 for head in ('main', 'distill'))
    model = timm.create_model(f'local-dir:{run / "student"}', pretrained=True)
    assert type(model).__name__ == 'VisionTransformerDistilled' and (run / 'student_ema').is_dir()
    top1 = json.loads((run / 'results.json').read_text())['student_top1']
    assert tools(['evaluate', str(run), '--output', str(tmp_path / 'again'), '--no-speed']) == 0
    assert json.loads((tmp_path / 'again' / 'evaluation.json').read_text())['models']['student']['top1'] == top1
    capsys.readouterr()
    assert tools(['predict', str(run), str(folder / 'validation')]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == 20
    assert tools(['report', str(run)]) == 0
    assert 'Distillation head, top-1 in training' in (run / 'report.html').read_text(encoding='utf-8')
    from timm_rld.hub.card import card_section
    from timm_rld.run_folder import read_run

    assert 'the criterion trained the distillation head' in card_section(read_run(run), 'me/model', 'last', False)


def test_without_distillation_the_switch_has_no_effect_and_the_run_says_so(flags, tmp_path, capsys):
    assert main([*flags, '--distill', 'none', '--experiment', 'with']) == 0
    assert '--distill-token: without a criterion (--distill none) the labels train the mean' in capsys.readouterr().out
    assert main([*flags, '--distill', 'none', '--no-distill-token', '--experiment', 'without']) == 0
    one, two = ((tmp_path / run / 'student' / 'model.safetensors').read_bytes() for run in ('with', 'without'))
    assert one == two


@pytest.mark.parametrize('precision', ['bf16'])
def test_it_trains_in_mixed_precision(precision, flags, tmp_path):
    argv = [*flags, '--distill', 'ce_teacher', '--mixed-precision', precision, '--grad-accum-steps', '2']
    assert main([*argv, '--epochs', '1', '--experiment', 'run']) == 0
    (row,) = rows_of(tmp_path / 'run')
    assert 0 < float(row['train_kd_loss']) < 10 and 0 < float(row['train_task_loss']) < 10


def test_with_a_teacher_cache_the_student_is_the_same_and_no_teacher_is_needed(flags, tmp_path, no_teacher):  # noqa: F811
    cached = [*flags, '--teacher-cache', str(tmp_path / 'cache'), '--experiment']
    assert main([*cached, 'filled']) == 0
    no_teacher()
    assert main([*cached, 'read']) == 0
    one, two = ((tmp_path / run / 'student' / 'model.safetensors').read_bytes() for run in ('filled', 'read'))
    assert one == two and 'train_distill_top1' in rows_of(tmp_path / 'read')[0]


def test_a_run_is_resumed_to_the_same_student(flags, tmp_path):
    flags = [*flags, '--model-ema', '--grad-accum-steps', '2', '--checkpoint-interval', '1', '--drop', '0.2',
             '--checkpoint-hist', '100']  # fmt: skip
    assert main([*flags, '--experiment', 'whole']) == 0
    names = Checkpoints(tmp_path / 'whole' / 'checkpoints').names()
    assert 'batch' in names[1]
    shutil.copytree(tmp_path / 'whole', tmp_path / 'again')
    (tmp_path / 'again' / 'results.json').unlink()
    assert main(['--resume', str(tmp_path / 'again' / 'checkpoints' / names[1])]) == 0
    for part in ('student', 'student_ema'):
        one, two = ((tmp_path / run / part / 'model.safetensors').read_bytes() for run in ('whole', 'again'))
        assert one == two
    other = [x for x in flags if x != '--distill-token']
    (tmp_path / 'again' / 'results.json').unlink()
    assert main([*other, '--experiment', 'again', '--resume', 'auto']) == 1


@pytest.mark.slow
def test_two_processes_train_as_one(flags, tmp_path):
    flags = [*flags, '--grad-accum-steps', '2', '--lr', '0.05']
    rows = []
    for processes, batch_size in ((1, '8'), (2, '4')):
        done = launch([*flags, '--batch-size', batch_size, '--experiment', str(processes)], processes)
        assert done.returncode == 0, done.stderr
        rows.append(rows_of(tmp_path / str(processes)))
    for one, two in zip(*rows, strict=True):
        for key in (k for k in one if k != 'epoch' and 'second' not in k):
            assert float(two[key]) == pytest.approx(float(one[key]), rel=2e-4, abs=1e-6), key
