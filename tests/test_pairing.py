"""Teacher and student: what may differ, and what is refused."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import ImageNetInfo

from timm_rld import Teacher, create_pair, create_student, create_teacher, export_model
from timm_rld.errors import UserError
from timm_rld.pairing import (
    Normalize,
    audit,
    check_accuracy,
    create_normalize,
    least_teacher_accuracy,
    load_weights,
    look_up,
    match_classes,
)

CLASSES = ['apple', 'pear', 'plum']
PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)


def refused(*args, **kwargs) -> str:
    with pytest.raises(UserError) as e:
        create_teacher(*args, **kwargs)
    return str(e.value)


@pytest.fixture
def weights(tmp_path):
    """A file of weights of `test_resnet` with 3 classes, and the model."""
    model = timm.create_model('test_resnet', num_classes=3).eval()
    save_file(model.state_dict(), tmp_path / 'w.safetensors')
    return tmp_path / 'w.safetensors', model


# ------------------------------------------------------------------------------------------------------------- views


VIT = 'vit_tiny_patch16_224'  # takes images of one size only


def network(name: str) -> torch.nn.Module:
    return timm.create_model(name, num_classes=5, **(dict(depth=1) if name == VIT else {})).eval()


@pytest.mark.parametrize('name', ['test_resnet', VIT])
@pytest.mark.parametrize('norm', [((0.5,) * 3, (0.5,) * 3), ((0.1, 0.2, 0.3), (0.9, 0.8, 0.7))])
def test_a_teacher_of_other_normalisation_and_size_gives_the_logits_it_gives_alone(name, norm):
    mean, std = norm
    model = network(name)
    teacher = Teacher(model, create_normalize(model, mean=mean, std=std, image_size=(32, 32)))
    x = PIXELS.float() / 255
    if name == VIT:
        assert teacher.normalize.size == (224, 224)
        x = F.interpolate(x, (224, 224), mode='bicubic', antialias=True)
    alone = model((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    assert torch.allclose(teacher(PIXELS), alone, rtol=1e-4, atol=1e-5)


def test_a_fixed_size_teacher_that_sees_its_own_size_is_not_resized():
    assert create_normalize(network(VIT), image_size=(224, 224)).size is None
    assert create_normalize(timm.create_model('test_resnet'), image_size=(32, 32)).size is None
    assert create_normalize(timm.create_model('test_resnet'), img_size=64, image_size=(32, 32)).size == (64, 64)


@pytest.mark.parametrize('name', [VIT, 'test_vit'])
def test_the_folder_of_a_resized_teacher_gives_the_logits_of_that_teacher(name, tmp_path):
    # the student's validation images are resized bilinearly, those of the teacher's network bicubically
    pair = create_pair(name, 'cifar_resnet8', 7, train_teacher=True, teacher_pretrained=False, img_size=64)
    assert pair.teacher.normalize.interpolation != pair.data_config['interpolation']
    export_model(pair.teacher.model, tmp_path / 't', data_config=pair.teacher_data_config)
    again = create_pair(f'local-dir:{tmp_path / "t"}', 'cifar_resnet8', 7, img_size=64).teacher
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert again.normalize.size == pair.teacher.normalize.size
    assert torch.equal(again(pixels), pair.teacher(pixels))


def test_the_folder_of_a_teacher_that_is_not_resized_has_the_preprocessing_of_its_images():
    pair = create_pair('test_resnet', 'cifar_resnet8', 7, train_teacher=True, teacher_pretrained=False, img_size=32)
    assert pair.teacher.normalize.size is None
    assert pair.teacher_data_config['interpolation'] == pair.data_config['interpolation']


def test_a_normalisation_and_its_inverse_agree():
    normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert torch.allclose(normalize.inverse(normalize(PIXELS)), PIXELS.float(), atol=1e-3)


def test_a_teacher_stays_frozen_in_eval_mode_whatever_is_called(trained_teacher):
    teacher = create_teacher(f'local-dir:{trained_teacher}', 3)
    teacher.train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    logits = teacher(PIXELS)
    assert not logits.requires_grad and not logits.is_inference()


def test_under_autocast_the_teachers_head_works_in_float32(trained_teacher):
    teacher = create_teacher(f'local-dir:{trained_teacher}', 3)
    with torch.autocast('cpu', torch.bfloat16):
        logits = teacher(PIXELS)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    assert torch.allclose(logits, teacher(PIXELS), atol=0.1)


@pytest.mark.parametrize('name', ['crossvit_tiny_240', 'efficientvim_m1'])
def test_the_head_of_a_teacher_whose_features_are_a_list_works_in_float32_too(name):
    teacher = Teacher(timm.create_model(name, num_classes=5))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # heads may begin at zero
        with torch.autocast('cpu', torch.bfloat16):
            logits, features = teacher(PIXELS), teacher.model.forward_features(teacher.normalize(PIXELS))
        assert isinstance(features, list) and len(features) > 1
        expected = teacher.model.forward_head([f.float() for f in features])
    assert logits.dtype == torch.float32 and torch.equal(logits, expected)
    assert not torch.equal(logits, logits.bfloat16().float())


# ---------------------------------------------------------------------------------------------------- weights and heads


def test_a_model_folder_keeps_its_own_normalisation(trained_teacher):
    teacher = create_teacher(f'local-dir:{trained_teacher}', 3)
    assert (teacher.normalize.mean.flatten() / 255).tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert (teacher.normalize.std.flatten() / 255).tolist() == pytest.approx([0.2, 0.25, 0.3])


@pytest.mark.parametrize('form', ['safetensors', 'bare', 'state_dict', 'model', 'module.', 'of timm train.py'])
def test_checkpoints_are_read_in_each_form(weights, tmp_path, form):
    path, model = weights
    state = model.state_dict()
    if form != 'safetensors':
        path = tmp_path / 'w.pth'
        if form == 'module.':
            state = {f'module.{k}': v for k, v in state.items()}
        elif form in ('state_dict', 'model'):
            state = {form: state}
        elif form == 'of timm train.py':
            state = dict(epoch=3, arch='test_resnet', state_dict=state, args=argparse.Namespace(lr=1), optimizer={})
        torch.save(state, path)
    teacher = create_teacher('test_resnet', 3, checkpoint=str(path))
    assert torch.equal(teacher(PIXELS), Teacher(model)(PIXELS))


def test_a_head_that_timm_would_reinitialise_is_refused_with_the_three_ways_out():
    message = refused('resnet34', 10)
    assert 'its head has 1000 classes, the dataset 10' in message
    for way in ('--teacher-epochs', '--teacher-checkpoint', '--teacher-class-map'):
        assert way in message
    assert len(message.splitlines()) <= 2


def test_a_checkpoints_head_is_refused_too(weights):
    assert 'its head has 3 classes, the dataset 4' in refused('test_resnet', 4, checkpoint=str(weights[0]))


def test_published_weights_out_of_reach_are_an_error_at_once_that_offers_from_scratch():
    for kwargs in (dict(num_classes=1000), dict(num_classes=7, to_train=True)):
        message = refused('resnet34', **kwargs)
        assert 'published weights cannot be reached (no network)' in message and '--no-teacher-pretrained' in message
    assert create_teacher('resnet10t', 7, to_train=True, pretrained=False).model.num_classes == 7


def test_a_network_without_published_weights_is_fitted_from_scratch_and_otherwise_refused():
    name = next(n for n in timm.list_models('resnet*') if not timm.models.get_pretrained_cfg(n).has_weights)
    assert create_teacher(name, 7, to_train=True).model.num_classes == 7
    assert 'no weights are published for it' in refused(name, 1000)
    assert '--no-teacher-pretrained leaves it random' in refused('resnet34', 1000, pretrained=False)


def test_files_that_are_no_weights_are_refused_and_not_executed(tmp_path, trained_teacher):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / 'pwned'), 'w'))

    for name, write, message in (
        ('a.pth', lambda p: torch.save({'model': Evil()}, p), 'not a file of weights alone'),
        ('b.pth', lambda p: p.write_bytes(pickle.dumps(Evil())), 'not'),
        ('c.safetensors', lambda p: p.write_text('hello'), 'not a checkpoint'),
        ('d.pth', lambda p: torch.save([1, 2], p), 'not a checkpoint'),
        ('e.pth', lambda p: torch.save({'epoch': 3}, p), 'not a checkpoint'),
    ):
        write(tmp_path / name)
        with pytest.raises(UserError, match=f'--teacher-checkpoint .*{name}.*{message}'):
            load_weights(str(tmp_path / name), '--teacher-checkpoint')
    teacher = tmp_path / 'teacher'
    shutil.copytree(trained_teacher, teacher)
    (teacher / 'model.safetensors').unlink()
    (tmp_path / 'a.pth').rename(teacher / 'pytorch_model.bin')
    message = refused(f'local-dir:{teacher}', 3)
    assert 'its weights cannot be loaded (they hold more than tensors and plain values)' in message
    assert not (tmp_path / 'pwned').exists()
    assert 'no such file' in refused('resnet34', 3, checkpoint='/nowhere.pth')


def test_weights_of_another_network_are_refused_by_key(tmp_path):
    torch.save(timm.create_model('test_vit', num_classes=3).state_dict(), tmp_path / 'v.pth')
    message = refused('test_resnet', 3, checkpoint=str(tmp_path / 'v.pth'))
    assert 'weights of another network' in message and 'missing: ' in message and 'left over: cls_token' in message


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('resnt34', "unknown model (did you mean 'resnet34'"),
        ('resnet34.tv_in2k', "no such weights (did you mean 'resnet34.tv_in1k'"),
        ('timm/resnet34', "'hf-hub:timm/resnet34'"),
        ('local-dir:/nowhere', 'no config.json in this folder'),
        ('hf-hub:someone/something', 'the Hub is out of reach'),
    ],
)
def test_unknown_models_are_named_with_the_nearest(name, message):
    with pytest.raises(UserError) as e:
        look_up(name, '--teacher')
    assert f'--teacher {name}' in str(e.value) and message in str(e.value)


def test_channels_that_differ_are_refused(trained_teacher):
    message = refused(f'local-dir:{trained_teacher}', 3, in_chans=1)
    assert 'take images of 3 channels, this run has 1' in message and '--in-chans 3' in message


def test_a_size_that_a_network_cannot_take_is_said_before_anything_else():
    with pytest.raises(
        UserError, match='--student inception_v3: cannot take images of 3×32×32 .* try another --img-size'
    ):
        create_student('inception_v3', 3, img_size=32)


def test_arguments_that_a_student_does_not_take_are_named():
    with pytest.raises(UserError, match="--student test_resnet: .*'depht'"):
        create_student('test_resnet', 3, depht=3)


# ----------------------------------------------------------------------------------------------------------- class maps


def test_classes_are_matched_by_label_name_in_any_order(trained_teacher):
    name = f'local-dir:{trained_teacher}'
    alone = create_teacher(name, 3)(PIXELS)
    teacher = create_teacher(name, 2, class_names=['Plum', 'apple'], class_map='auto')
    assert torch.equal(teacher(PIXELS), alone[:, [2, 0]])


def test_imagenet_classes_are_matched_by_synset_lemma_and_synonym():
    card = look_up('resnet34', '--teacher')
    assert match_classes(['n01440764', 'goldfish, Carassius auratus', 'lesser panda', 'pop bottle'], card) == [
        0, 1, 387, 737,
    ]  # fmt: skip
    with pytest.raises(UserError, match="no counterpart in resnet34 for 1 of 2 classes: 'unicorn'"):
        match_classes(['goldfish', 'unicorn'], card)
    with pytest.raises(UserError, match="more than one counterpart in resnet34 for 1 of 1 classes: 'crane'"):
        match_classes(['crane'], card)


@pytest.mark.parametrize('data', [[2, 0], {'b': 0, 'a': 2}, {'0': 2, '1': 0}])
def test_classes_are_matched_by_a_file_of_indices(trained_teacher, tmp_path, data):
    (tmp_path / 'm.json').write_text(json.dumps(data))
    name, path = f'local-dir:{trained_teacher}', str(tmp_path / 'm.json')
    teacher = create_teacher(name, 2, class_names=['a', 'b'], class_map=path)
    assert torch.equal(teacher(PIXELS), create_teacher(name, 3)(PIXELS)[:, [2, 0]])


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        ('[0]', '1 entries for 2 classes'),
        ('[0, 3]', 'index 3 is not among the 3 outputs'),
        ('[0, 0]', 'output 0 of'),
        ('["x", "y"]', 'expected a JSON list or mapping of whole numbers'),
        ('{"a": 0}', "no counterpart for class 'b'"),
        ('{"a": 0, "bb": 1}', "'bb' is no class of the dataset (did you mean 'b'?)"),
        ('{', 'not valid JSON'),
        (None, "cannot be read (No such file or directory); expected 'auto' or a JSON file"),
    ],
)
def test_a_wrong_class_map_is_named(trained_teacher, tmp_path, data, message):
    if data:
        (tmp_path / 'm.json').write_text(data)
    got = refused(f'local-dir:{trained_teacher}', 2, class_names=['a', 'b'], class_map=str(tmp_path / 'm.json'))
    assert '--teacher-class-map' in got and message in got


def test_the_same_classes_in_another_order_are_noticed(trained_teacher):
    name = f'local-dir:{trained_teacher}'
    message = refused(name, 3, class_names=CLASSES[::-1])
    assert "2 of the 3 classes of the dataset in another order ('plum', class 0, is its output 2)" in message
    assert message.endswith('give --teacher-class-map auto')
    assert 'in another order' in refused(name, 3, class_names=['Pear', 'apple', 'plum'])
    assert create_teacher(name, 3, class_names=CLASSES).class_map is None
    assert create_teacher(name, 3, class_names=CLASSES[::-1], class_map='auto').class_map.tolist() == [2, 1, 0]


def test_the_order_of_imagenets_classes_is_known_of_a_teacher_that_does_not_list_them():
    names = ImageNetInfo().label_names()
    assert "1000 of the 1000 classes of the dataset in another order ('n15075141'" in refused(
        'resnet18', 1000, class_names=names[::-1]
    )
    swapped = [names[1], names[0], *names[2:]]
    assert '2 of the 1000 classes of the dataset in another order' in refused('resnet18', 1000, class_names=swapped)


def test_classes_of_which_only_some_coincide_elsewhere_are_noticed_and_a_file_maps_them(trained_teacher, tmp_path):
    name, ours = f'local-dir:{trained_teacher}', ['pear', 'fig', 'plum']
    message = refused(name, 3, class_names=ours)
    assert "1 of the 3 classes of the dataset in another order ('pear', class 0, is its output 1)" in message
    assert 'no counterpart in' in message and "for 1 of 3 classes: 'fig'. A JSON FILE maps them by hand" in message
    (tmp_path / 'm.json').write_text('[1, 0, 2]')
    mapped = create_teacher(name, 3, class_names=ours, class_map=str(tmp_path / 'm.json'))
    assert mapped.class_map.tolist() == [1, 0, 2]
    assert create_teacher(name, 3, class_names=['apple', 'fig', 'plum']).class_map is None  # in their places


def test_a_teacher_that_is_fitted_or_has_a_file_of_weights_need_not_have_the_order_of_its_published_names(
    trained_teacher, weights
):
    name = f'local-dir:{trained_teacher}'
    assert create_teacher(name, 3, class_names=CLASSES[::-1], to_train=True).class_map is None
    assert create_teacher(name, 4, class_names=['pear', 'a', 'b', 'c'], to_train=True).class_map is None
    assert create_teacher(name, 3, class_names=CLASSES[::-1], checkpoint=str(weights[0])).class_map is None


def test_flags_that_contradict_a_fit_are_refused(weights):
    assert 'remove it' in refused('test_resnet', 3, to_train=True, pretrained=False, class_map='auto')
    assert 'choose one of the two' in refused('test_resnet', 3, to_train=True, checkpoint=str(weights[0]))


# ---------------------------------------------------------------------------------------------------------------- audit


def test_the_audit_says_where_the_two_differ(trained_teacher):
    pair = create_pair(
        f'local-dir:{trained_teacher}', 'test_vit', 2, class_names=['pear', 'plum'], teacher_class_map='auto'
    )
    lines = '\n'.join(audit(pair))
    assert 'normalisation (mean): teacher 0.4 0.5 0.6, student' in lines and "2 of the teacher's 3 outputs" in lines
    same = create_student('test_resnet', 3, img_size=32)
    same.teacher = Teacher(same.student, same.normalize)
    assert audit(same) == []


@pytest.mark.parametrize(('classes', 'limit'), [(2, 55), (10, 19), (100, 2), (1000, 0.2)])
def test_near_chance_depends_on_the_number_of_classes(classes, limit):
    assert least_teacher_accuracy(classes) == pytest.approx(limit)
    with pytest.raises(UserError, match='near chance'):
        check_accuracy('t', limit - 0.01, classes, None)
    check_accuracy('t', limit, classes, None)
    check_accuracy('t', 0.0, classes, 0)
    with pytest.raises(UserError, match='below 90\n--min-teacher-acc'):
        check_accuracy('t', 89.0, classes, 90)


@pytest.mark.parametrize('name', ['teacher_bogus', 'student_mean', 'pretrained', 'teacher_in_chans', 'fit_teacher'])
def test_an_argument_that_a_pair_does_not_have_is_refused(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        create_pair(None, 'cifar_resnet8', 3, **{name: 1})
