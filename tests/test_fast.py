"""What makes a step fast changes nothing of what it computes."""

from __future__ import annotations

import copy
import csv
import functools

import pytest
import timm
import torch
from accelerate import Accelerator
from test_engine import make_loader
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import timm_rld  # noqa: F401  (registers the CIFAR networks)
from timm_rld import DistillationTask, create_distill_loss
from timm_rld.config import Config, resolve
from timm_rld.engine import create_optimizer, fit
from timm_rld.loss import CRITERIA
from timm_rld.pairing import Normalize, Teacher, to_memory_format, weights_digest
from timm_rld.pairing.fold import fold_batch_norms

# name, size of its images, and how many of its batch norms may be folded
NETWORKS = [
    ('resnet34', 64, 36), ('cifar_resnet20', 32, 21), ('mobilenetv3_small_100', 64, 34), ('efficientnet_b0', 64, 49),
    ('densenet121', 64, 59), ('repvgg_a0', 64, 44), ('cifar_wrn_16_2', 32, 7), ('test_vit', 32, 0),
]  # fmt: skip


def trained(name: str, classes: int = 10) -> nn.Module:
    """A network whose batch norms have seen something."""
    model = timm.create_model(name, num_classes=classes).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize(('name', 'size', 'count'), NETWORKS)
def test_a_fast_teacher_says_the_same(name, size, count):
    teacher = Teacher(trained(name))
    pixels = torch.randint(256, (4, 3, size, size), dtype=torch.uint8)
    before, digest = teacher(pixels), weights_digest(teacher)
    assert teacher.optimize_for_inference((3, size, size)) == count
    after = teacher(pixels)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert weights_digest(teacher) == digest, 'the digest stands for the weights as they were loaded'
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.optimize_for_inference((3, size, size)) == count  # again: nothing is left to fold


@pytest.mark.parametrize(('name', 'size', 'count'), NETWORKS[:2])
def test_shared_batch_norms_are_folded_like_others(name, size, count):
    from timm.layers import convert_sync_batchnorm

    model = convert_sync_batchnorm(trained(name))
    assert any('Sync' in type(m).__name__ for m in model.modules())
    assert Teacher(model.eval()).optimize_for_inference((3, size, size)) == count


class Reused(nn.Module):
    """A convolution whose output also goes another way, so that the batch norm cannot be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return (self.norm(x) + x).mean((2, 3))


class Twice(nn.Module):
    """A batch norm that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.norm(self.conv(x))).mean((2, 3))


class Standardized(nn.Conv2d):
    """A convolution that makes its weight anew."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


def standardized() -> nn.Module:
    return nn.Sequential(Standardized(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize('make', [Reused, Twice, standardized])
def test_what_cannot_be_folded_is_left_as_it_is(make):
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    state, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(2, 3, 8, 8)
    before = model(x)
    assert fold_batch_norms(model, x) == 0
    assert torch.equal(model(x), before)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {k: v.tolist() for k, v in state.items()}


class Nosy(nn.Module):
    """A network that looks into its own modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3))[:, : self.norm.num_features]


def test_a_network_that_looks_into_its_modules_is_left_as_it_is():
    model, x = Nosy().eval(), torch.randn(2, 3, 8, 8)
    before = model(x)
    assert fold_batch_norms(model, x) == 0
    assert torch.equal(model(x), before)


class Block(nn.Sequential):
    """A convolution, its batch norm and a nonlinearity. With a batch norm that has seen nothing a wrong fold changes
    little: 5e-6 of what passes through it."""

    def __init__(self, channels: int = 8, nonlinearity: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.append(nonlinearity())


class Shortcut(Block):
    """The way round the batch norm begins at the convolution's output."""

    def forward(self, x):
        x = self[0](x)
        return self[2](self[1](x)) + x


class OwnWeight(Block):
    """It reads the weight of its convolution once more."""

    def forward(self, x):
        return super().forward(x) + self[0].weight.abs().mean()


class Inspecting(Block):
    """It asks its batch norm for its channels."""

    def forward(self, x):
        return super().forward(x)[:, : self[1].num_features]


def chain(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


@pytest.mark.parametrize('wrong', [Shortcut, OwnWeight, Inspecting])
@pytest.mark.parametrize('seen', [False, True])
def test_one_batch_norm_that_cannot_be_folded_does_not_keep_the_others_from_it(wrong, seen):
    model, x = chain(Block(), Block(), wrong(), Block(), Block(), Block()), torch.randn(4, 3, 8, 8)
    for module in model.modules() if seen else ():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    before, conv = model(x), model[3][0]
    assert fold_batch_norms(model, x) == 5
    assert model[3][0] is conv and isinstance(model[3][1], nn.BatchNorm2d) and conv.bias is None
    assert [type(model[i][1]) for i in (1, 2, 4, 5, 6)] == [nn.Identity] * 5
    assert (model(x) - before).abs().max() <= 1e-6 * before.abs().max()


def test_where_float32_itself_is_far_off_folding_may_be_as_far():
    model, x = chain(*(Block(8, nn.Tanh) for _ in range(25))), torch.randn(4, 3, 6, 6)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.03)  # differences grow from layer to layer
    with torch.no_grad():
        before, truth = model(x), copy.deepcopy(model).double()(x.double())
        assert fold_batch_norms(model, x) == 25
        errors = [(logits - truth).abs().max() / truth.abs().max() for logits in (before, model(x))]
    assert min(errors) > 1e-5, 'the network is one on which a fixed limit would fail'
    assert max(errors) < 10 * min(errors)


def test_the_search_for_wrong_folds_ends():
    class Counted(nn.Sequential):
        passes = 0

        def forward(self, x):
            Counted.passes += 1
            return super().forward(x)

    model, x = Counted(chain(*(OwnWeight() for _ in range(25)))).eval(), torch.randn(4, 3, 6, 6)
    before = model(x)
    fold_batch_norms(model, x)
    assert Counted.passes <= 40
    assert (model(x) - before).abs().max() <= 1e-6 * before.abs().max()


def test_weights_of_five_dimensions_have_no_channels_last():
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv2d(1, 2, 3))
    to_memory_format(model, torch.channels_last)
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last) and model[0].weight.is_contiguous()


@pytest.mark.parametrize('opt', ['sgd', 'momentum', 'adam', 'adamw'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_the_fused_optimizer_does_what_the_plain_one_does(opt, memory_format):
    found = []
    for kwargs in ({}, {'foreach': False}):
        torch.manual_seed(0)
        model = timm.create_model('test_resnet', num_classes=3).to(memory_format=memory_format)
        optimizer = create_optimizer(model, Config(opt=opt, lr=0.05, weight_decay=1e-3, opt_kwargs=kwargs))
        assert optimizer.param_groups[0].get('fused') is (None if kwargs else True)
        model(torch.randn(4, 3, 32, 32)).sum().backward()  # gives gradients their layout
        for _ in range(3):
            for p in model.parameters():
                p.grad.normal_()
            optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ['rld', 'ctkd'])
def test_compiled_with_its_criterion_a_step_has_the_same_loss_and_gradients(name):
    view = Normalize((0.5,) * 3, (0.25,) * 3)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(48, 6)) for _ in range(2)]
    task = DistillationTask(networks[0], Teacher(networks[1], view), name, normalize=view)
    task.train()
    pixels, target = torch.randint(256, (8, 3, 4, 4), dtype=torch.uint8), torch.randint(6, (8,))
    figures = []
    for compiled in (False, True):
        if compiled:
            task.compile(backend='aot_eager')
        for epoch in (1, 2, 3):
            task.set_epoch(epoch)
            networks[0].zero_grad()
            result = task(pixels, target)
            result['loss'].backward()
        figures.append([result['loss'].detach(), networks[0][1].weight.grad.clone()])
        assert {k for k in result if k not in ('output', 'loss')} >= {'task_loss', 'kd_loss'}
    for a, b in zip(*figures):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', ['rld', 'kd', 'dkd'])
def test_fast_and_plain_a_step_has_the_same_loss_and_gradients(name):
    teacher, student = Teacher(trained('cifar_resnet20')), timm.create_model('cifar_resnet8', num_classes=10)
    task = DistillationTask(student, teacher, name).train()
    pixels, target = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (16,))
    figures = []
    for fast in (False, True):
        if fast:
            teacher.optimize_for_inference((3, 32, 32))
            student.to(memory_format=torch.channels_last)
            pixels = pixels.to(memory_format=torch.channels_last)
        student.zero_grad()
        result = task(pixels, target)
        result['loss'].backward()
        gradient = torch.cat([p.grad.flatten() for p in student.parameters()])
        figures.append((result['output'].detach(), result['loss'].detach(), gradient))
    for plain, fast in zip(*figures):
        assert (fast - plain).norm() <= 1e-5 * plain.norm()


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device: numbers read from tensors, and shapes that depend on values."""

    SYNCS = ('aten._local_scalar_dense', 'aten.nonzero', 'aten.masked_select', 'aten.is_nonzero', 'aten.equal')

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).rpartition('.')[0] in self.SYNCS:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


class Watched:
    """A loader that lets a counter see whole steps, from the second on (the first looks at its batch more closely)."""

    def __init__(self, loader, counter=None) -> None:
        self.loader, self.counter = loader, counter

    def __getattr__(self, attribute):
        return getattr(self.loader, attribute)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        for i, batch in enumerate(self.loader):
            if i == 1:
                self.counter.__enter__()
            yield batch
        self.counter.__exit__(None, None, None)


def train(watch, name: str, folder, tmp_path, accelerator: Accelerator, **kwargs) -> None:
    """An epoch on a loader that is watched."""
    loaders = [make_loader(folder, split, 8, training=split == 'train', **kwargs) for split in ('train', 'validation')]
    student, teacher = (timm.create_model(n, num_classes=3) for n in ('test_vit', 'test_resnet'))
    config = resolve(Config(
        teacher='a', student='b', distill=name, data_dir='.', epochs=1, teacher_epochs=0, lr=0.01, img_size=32,
        clip_grad=1.0, mixup=0.2, model_ema=True,
    ))  # fmt: skip
    criterion = None if name == 'none' else create_distill_loss(name)
    task = DistillationTask(student, Teacher(teacher), criterion)
    fit(task, watch(loaders[0]), loaders[1], accelerator, config, log_file=tmp_path / 'log.csv')


@pytest.mark.parametrize('name', [n for n, row in CRITERIA.items() if not row.generated])
def test_no_step_waits_for_the_device(name, folder, tmp_path):
    counter = Reads()
    train(functools.partial(Watched, counter=counter), name, folder, tmp_path, Accelerator(cpu=True))
    assert counter.found == []
    with counter:
        torch.ones(()).item()
    assert counter.found, 'what the test looks for would be seen'


@pytest.mark.gpu
@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_on_a_gpu_no_step_waits_for_it(precision, folder, tmp_path):
    class Strict(Watched):
        def __iter__(self):
            try:
                for i, batch in enumerate(self.loader):
                    if i == 2:
                        torch.cuda.set_sync_debug_mode('error')
                    yield batch
            finally:
                torch.cuda.set_sync_debug_mode('default')

    train(Strict, 'rld', folder, tmp_path, Accelerator(mixed_precision=precision), pin_memory=True)


def test_a_log_says_where_the_time_of_each_epoch_goes(folder, trained_teacher, tmp_path):
    from train_distill import main

    argv = ['--teacher', f'local-dir:{trained_teacher}', '--student', 'test_vit', '--data-dir', str(folder), '-b', '8',
            '--img-size', '32', '--epochs', '2', '--workers', '0', '--min-teacher-acc', '0', '--output', str(tmp_path),
            '--experiment', 'run']  # fmt: skip
    assert main(argv) == 0
    for row in csv.DictReader((tmp_path / 'run' / 'summary.csv').open()):
        seconds = [float(row[f'seconds_{part}']) for part in ('data', 'teacher', 'student', 'other')]
        assert min(seconds) > 0
        assert 41 / sum(seconds) == pytest.approx(float(row['images_per_second']), rel=1e-4)
