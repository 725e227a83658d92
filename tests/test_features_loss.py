"""The methods on features: published values, numerics, and the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from timm_rld.config import parse_args
from timm_rld.errors import UsageError
from timm_rld.loss.features import FEATURES, check_features, create_feature_loss, describe_features, hcl_loss
from timm_rld.pairing import Normalize

CASES = json.loads((Path(__file__).parent / 'golden' / 'features_golden.json').read_text(encoding='utf-8'))
NAMES = list(FEATURES)
VECTORS = ('feature', 'rkd', 'pkt')


def tensor(entry: dict) -> torch.Tensor:
    return torch.tensor(entry['data'], dtype=torch.float64).reshape(entry['shape'])


def close(golden: dict):
    """Within 1e-9 of the largest value; what is 0 but for rounding is 0."""
    data = golden['data'] if isinstance(golden, dict) else golden
    largest = max(map(abs, data)) if isinstance(data, list) else abs(data)
    return pytest.approx(data, rel=0, abs=max(1e-9 * largest, 1e-15))


def inputs_of(case: dict) -> tuple[list, list, dict]:
    """Features of student and teacher from the shallowest to the deepest, and the weights of layers."""
    inputs = {name: tensor(entry) for name, entry in case['inputs'].items()}
    of = {who: [k for k in inputs if k.partition('_')[0].rstrip('0123456789') == who and '.' not in k]
          for who in ('student', 'teacher')}  # fmt: skip
    student = [inputs[k].requires_grad_() for k in of['student']]
    layers = {k: v for k, v in inputs.items() if '.' in k and not k.startswith('head.')}
    return student, [inputs[k] for k in of['teacher']], layers


def made(name: str, student: list, teacher: list, **options):
    """A method for some features, in float64."""
    shapes = dict(student_shapes=[f.shape for f in student], teacher_shapes=[f.shape for f in teacher])
    return create_feature_loss(name, **shapes, **options).double()


def published(case: dict, student: list, teacher: list, layers: dict):
    """The function of a golden case, and the gradients to compare by name."""
    method = case['method']
    if method == 'reviewkd_hcl':
        return hcl_loss, {}
    method = 'feature' if method == 'timm_feature' else method
    options = {k: v for k, v in case['options'].items() if k in FEATURES[method].options}
    criterion = made(method, student, teacher, **options)
    criterion.load_state_dict(layers)
    return criterion, dict(criterion.named_parameters())


@pytest.mark.parametrize('case', CASES, ids=lambda c: c['id'])
def test_value_and_gradient_are_the_published_programs(case):
    student, teacher, layers = inputs_of(case)
    criterion, parameters = published(case, student, teacher, layers)
    loss = found = criterion(student, teacher)
    if case['method'] == 'timm_feature':  # with its cross-entropy and weights
        head = {k: tensor(case['inputs'][f'head.{k}']).requires_grad_() for k in ('weight', 'bias')}
        task_loss = F.cross_entropy(F.linear(student[0], **head), torch.tensor(case['target']))
        assert task_loss.item() == close(case['task_loss']) and found.item() == close(case['kd_loss'])
        loss = case['task_loss_weight'] * task_loss + case['distill_loss_weight'] * found
        parameters |= {f'head.{k}': v for k, v in head.items()}
    loss.backward()
    assert loss.ndim == 0 and loss.dtype == torch.float64
    assert loss.item() == close(case['loss'])
    by_name = dict(zip((k for k in case['inputs'] if k.startswith('student')), student))
    for name, golden in case['grads'].items():
        gradient = (by_name | parameters)[name].grad
        assert gradient.flatten().tolist() == close(golden), name


@pytest.mark.parametrize('case', [c for c in CASES if c['method'] == 'timm_feature'], ids=lambda c: c['id'])
def test_the_teacher_sees_the_input_as_timms_task_shows_it(case):
    views = {who: Normalize(*(case['options'][f'{who}_{k}'] for k in ('mean', 'std'))).double()
             for who in ('student', 'teacher')}  # fmt: skip
    seen = views['teacher'](views['student'].inverse(tensor(case['inputs']['input'])))
    expected = tensor(case['inputs']['input_of_teacher'])
    assert torch.allclose(seen, expected, rtol=1e-6, atol=1e-6)


def test_every_method_has_golden_values():
    methods = {'feature' if c['method'] == 'timm_feature' else c['method'] for c in CASES}
    assert methods == {*NAMES, 'reviewkd_hcl'}


# ------------------------------------------------------------------------------------------------------------ numerics


def features(name: str, batch: int = 5, scale: float = 1.0, dtype: torch.dtype = torch.float64):
    """Features of both networks as a method takes them, those of the student with gradients."""
    shapes = [((6,), (9,))] if name in VECTORS else [((4, 6, 6), (5, 6, 6)), ((6, 3, 3), (7, 4, 4))]
    if name == 'reviewkd':
        shapes.append(((6,), (7,)))
    student = [(scale * torch.randn(batch, *s)).to(dtype).requires_grad_() for s, _ in shapes]
    return student, [(scale * torch.randn(batch, *t)).to(dtype) for _, t in shapes]


@pytest.mark.parametrize('name', NAMES)
def test_the_gradient_is_that_of_finite_differences(name):
    student, teacher = features(name)
    criterion = made(name, student, teacher)
    assert torch.autograd.gradcheck(lambda *s: criterion(s, teacher), student, fast_mode=True)
    for p in criterion.parameters():
        assert p.requires_grad


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_float32_result_and_autocast_changes_nothing(name, dtype):
    student, teacher = features(name, dtype=dtype)
    criterion = made(name, student, teacher).float()
    expected = criterion([s.detach().float() for s in student], [t.float() for t in teacher])
    with torch.autocast('cpu', torch.bfloat16):
        found = criterion(student, teacher)
    found.backward()
    assert found.dtype == torch.float32 and found.item() == expected.item()
    assert all(s.grad is None or s.grad.isfinite().all() for s in student)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('kind', ['random', 'zero', 'zero teacher', 'zero rows', 'equal rows', 'large', 'small'])
def test_loss_and_gradient_are_finite_and_of_a_sane_size(name, batch, kind):
    scale = {'large': 6e4, 'small': 1e-4}.get(kind, 1.0)  # float16 ends at 65504
    student, teacher = features(name, batch, scale, torch.float32)
    with torch.no_grad():
        for s, t in zip(student, teacher):
            if kind in ('zero', 'zero teacher'):
                (s if kind == 'zero' else t).zero_()
            elif kind == 'zero rows':
                s[0], t[-1] = 0, 0
            elif kind == 'equal rows':
                s[:] = s[:1].clone()
    criterion = made(name, student, teacher).float()
    loss = criterion(student, teacher)
    loss.backward()
    gradients = [x.grad for x in (*student, *criterion.parameters()) if x.grad is not None]
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    if kind not in ('large', 'small'):
        assert max(g.abs().max() for g in gradients) < 1e5


@pytest.mark.parametrize('name', NAMES)
def test_no_gradient_flows_into_the_teacher_and_equal_features_have_no_loss(name):
    student, teacher = features(name)
    teacher = [t.requires_grad_() for t in teacher]
    made(name, student, teacher)(student, teacher).backward()
    assert all(t.grad is None for t in teacher) and any(s.grad is not None for s in student)
    if not FEATURES[name].has_layers or name == 'feature':
        assert abs(made(name, student, student)(student, student).item()) < 1e-15


@pytest.mark.parametrize('name', ['at', 'sp'])
def test_several_pairs_are_summed(name):
    student, teacher = features(name)
    criterion = create_feature_loss(name)
    each = [criterion([s], [t]).item() for s, t in zip(student, teacher)]
    assert criterion(student, teacher).item() == pytest.approx(sum(each), rel=1e-12)


@pytest.mark.parametrize('name', ['feature', 'rkd', 'pkt'])
def test_maps_are_pooled_where_vectors_are_wanted(name):
    student, teacher = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 6, 6)
    criterion = create_feature_loss(name)
    vectors = criterion([student.mean(dim=(2, 3))], [teacher.mean(dim=(2, 3))])
    assert criterion([student], [teacher]).item() == pytest.approx(vectors.item(), rel=1e-6)


@pytest.mark.parametrize(
    ('student', 'teacher'), [((4, 4), (4, 4)), ((4, 4), (2, 2)), ((2, 2), (4, 4)), ((14, 6), (3, 6)), ((3, 4), (7, 9))]
)
def test_the_layers_of_fitnet_fit_any_two_sizes(student, teacher):
    s, t = torch.randn(2, 3, *student), torch.randn(2, 5, *teacher)
    criterion = create_feature_loss('fitnet', student_shapes=[s.shape], teacher_shapes=[t.shape])
    assert criterion([s], [t]).isfinite()
    assert sum(p.numel() for p in criterion.conv.parameters()) <= 3 * 5 * 16 + 5


def test_fitnet_takes_the_stage_that_is_named_and_without_one_the_third_or_the_last():
    maps = [torch.randn(2, 3 + i, 4, 4) for i in range(4)]
    shapes = dict(student_shapes=[m.shape for m in maps], teacher_shapes=[m.shape for m in maps])
    assert [create_feature_loss('fitnet', stage=k, **shapes).bn.weight.numel() for k in (1, 3, None)] == [3, 5, 5]
    shapes = {k: v[:2] for k, v in shapes.items()}
    assert create_feature_loss('fitnet', **shapes).bn.weight.numel() == 4


# ----------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize('name', NAMES)
def test_a_row_names_options_of_its_class_and_flags_that_there_are(name):
    row = FEATURES[name]
    student, teacher = features(name)
    assert made(name, student, teacher).name == name and name in describe_features()
    assert row.takes or row.pooled
    assert parse_args(row.imagenet.split()) if row.imagenet else True
    assert row.defaults(240) == row.defaults() and row.defaults(24)['feature_warmup_epochs'] in (0, 2)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: create_feature_loss('fitnt'), "unknown method 'fitnt' (did you mean 'fitnet'"),
        (lambda: create_feature_loss('at', q=2), "method 'at' has no option 'q'"),
        (lambda: create_feature_loss('sp', p=2), "method 'sp' has no option 'p'; it has none"),
        (lambda: create_feature_loss('at', p=1.5), 'p must be a whole number of at least 1, got 1.5'),
        (lambda: create_feature_loss('pkt', eps=0), 'eps must be a number above 0 and below 1, got 0'),
        (lambda: create_feature_loss('fitnet'), 'student_shapes'),
        (
            lambda: create_feature_loss('fitnet', stage=3, student_shapes=[[2, 1, 1, 1]], teacher_shapes=[[2, 1, 1]]),
            'stage must be a whole number from 1 to 1, the pairs of maps; got 3',
        ),
        (lambda: create_feature_loss('at')(torch.ones(2, 3), [torch.ones(2, 3)]), "a list of the student's features"),
        (lambda: create_feature_loss('at')([], []), "a list of the student's features"),
        (lambda: create_feature_loss('at')([torch.ones(2, 3)], [torch.ones(2, 3)]), 'expected maps [B, C, H, W]'),
        (lambda: create_feature_loss('sp')([torch.ones(2, 3)], [torch.ones(2, 3)] * 2), 'as many features of both'),
        (lambda: create_feature_loss('sp')([torch.ones(2, 3)], [torch.ones(1, 3)]), 'one batch, got 1 and 2'),
        (lambda: create_feature_loss('feature')([torch.ones(2, 3)], [torch.ones(2, 4)]), 'give student_shapes'),
        (lambda: create_feature_loss('sp')([torch.ones(2, 3, 4)], [torch.ones(2, 3)]), 'got float32 [2, 3, 4]'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError) as e:
        call()
    assert message in str(e.value)


def test_wrong_options_are_refused_before_anything_is_built():
    check_features('none', {})
    check_features('fitnet', {'stage': 7})
    for name, options, criterion, message in (
        ('ats', {}, 'rld', "--feature-distill ats: unknown method 'ats' (did you mean 'at'"),
        ('at', {'p': 0}, 'rld', "--feature-distill at: method 'at': p must be"),
        ('reviewkd', {'student_shapes': 1}, 'rld', '--feature-kwargs student_shapes: the run sets it'),
        ('at', {}, 'mekd', '--feature-distill at with --distill mekd: its teacher only answers'),
    ):
        with pytest.raises(UsageError) as e:
            check_features(name, options, criterion)
        assert message in str(e.value)


@pytest.mark.parametrize('name', ['at', 'rkd'])  # a step with the layers of reviewkd is compiled in test_features.py
def test_compiled_it_is_the_same(name):
    student, teacher = features(name, dtype=torch.float32)
    criterion = made(name, student, teacher).float()
    expected = criterion(student, teacher)
    compiled = torch.compile(criterion, backend='eager')
    assert compiled(student, teacher).item() == pytest.approx(expected.item(), rel=1e-6)
