"""To the Hub and back, against a Hub on loopback: the real client, real files, and faults."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from loopback_hub import TOKEN, LoopbackHub
from PIL import Image

from timm_rld.__main__ import main as tools
from timm_rld.errors import UserError
from timm_rld.hub import card as cards
from timm_rld.hub import push
from timm_rld.hub.card import BEGIN, END, merge_card, public_command, public_settings
from timm_rld.run_folder import read_run
from train_distill import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that the client of this process speaks to, with a token, and no waiting between tries."""
    from huggingface_hub import constants

    hub = LoopbackHub()
    monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', hub.url + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.setattr(push, 'hub_in_reach', lambda: True)
    monkeypatch.setattr(push, 'RETRY_SECONDS', (0, 0, 0, 0))
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda _: None)
    yield hub
    hub.close()


@pytest.fixture(scope='module')
def run(folder, trained_teacher, tmp_path_factory) -> Path:
    """A finished run with averaged weights, its paths with private parts."""
    output = tmp_path_factory.mktemp('secret-home')
    assert main([
        '--teacher', f'local-dir:{trained_teacher}', '--student', 'test_resnet', '--data-dir', str(folder),
        '--img-size', '32', '--epochs', '3', '-b', '8', '--lr', '0.02', '--min-teacher-acc', '0', '--workers', '0',
        '--model-ema', '--output', str(output), '--experiment', 'run',
    ]) == 0  # fmt: skip
    return output / 'run'


def in_fresh_process(code: str, hub: LoopbackHub, home: Path) -> subprocess.CompletedProcess:
    env = dict(os.environ, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET='1', HF_HUB_OFFLINE='0', HF_HOME=str(home))
    return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, cwd=home)


def test_a_pushed_student_loads_anywhere_with_the_same_logits_and_preprocessing(hub, run, tmp_path, capsys):
    import timm

    assert tools(['push', str(run), '--hub-model-id', 'me/student', '--hub-private-repo']) == 0
    assert 'pushed to' in capsys.readouterr().out
    files = hub.files('me/student')
    assert set(files) == {'README.md', 'args.yaml', 'config.json', 'curve.png', 'model.safetensors', 'results.json',
                          'summary.csv'}  # fmt: skip
    assert hub.private['me/student'] and hub.commits['me/student'][-1][0].startswith('last weights, epoch 3, top-1 ')
    assert Image.open(io.BytesIO(files['curve.png'])).width > 300
    local = timm.create_model(f'local-dir:{run / "student"}', pretrained=True).eval()
    x = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    card = files['README.md'].decode()
    lines = card.partition('```python\n')[2].partition('```')[0]
    assert len(lines.strip().splitlines()) == 6
    Image.new('RGB', (40, 40), (10, 200, 30)).save(tmp_path / 'image.png')
    code = (
        lines + 'import torch\nx = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)\n'
        'config = timm.data.resolve_data_config({}, model=model)\n'
        'print(model(x)[0].tolist(), probabilities.sum().item(), config["mean"], model.pretrained_cfg["label_names"])'
    )
    done = in_fresh_process(code, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert str(local(x)[0].tolist()) in done.stdout
    assert "['apple', 'pear', 'plum']" in done.stdout
    assert str(list(local.pretrained_cfg['mean'])) in done.stdout


def test_the_card_says_what_a_user_wants_to_know_and_nothing_private_is_pushed(hub, run, folder):
    push.push_run(run, 'me/student', log=lambda _: None)
    files = hub.files('me/student')
    card = files['README.md'].decode()
    header = yaml.safe_load(card.split('---\n')[1])
    results = json.loads((run / 'results.json').read_text())
    assert header['library_name'] == 'timm' and header['pipeline_tag'] == 'image-classification'
    assert {'distillation', 'rld'} <= set(header['tags']) and header['license'] == 'apache-2.0'
    (index,) = header['model-index']
    metric = index['results'][0]['metrics'][0]
    assert metric['value'] == pytest.approx(results['student_top1'] / 100, abs=1e-6)
    for text in (
        'rld', 'SHA-256 of its weights', 'top-1 of the teacher', 'sun2025rld', 'timm.create_model', 'curve.png',
        'Not measured', 'train_distill.py --teacher', 'cross-entropy 1',
    ):  # fmt: skip
        assert text in card, text
    everything = b''.join(data for name, data in files.items() if name != 'model.safetensors')
    for secret in (TOKEN, str(run.parent), str(folder), str(folder.parent)):
        assert secret.encode() not in everything
    assert yaml.safe_load(files['args.yaml'])['data_dir'] == folder.name


@pytest.mark.parametrize(
    ('name', 'text', 'code'),
    [
        ('<script>alert(1)', '&lt;script&gt;alert(1)', '`<script>alert(1)`'),
        ('a|b', r'a\|b', '`a|b`'),
        ('a`b', r'a\`b', '`` a`b ``'),
        ('``', r'\`\`', '``` `` ```'),
        ('[a](b) __c__ &amp;', r'\[a\](b) \_\_c\_\_ &amp;amp;', '`[a](b) __c__ &amp;`'),
        ('a\n# b\n```', r'a # b \`\`\`', '```` a # b ``` ````'),
    ],
)
def test_names_show_in_the_card_as_they_are_whatever_html_or_markdown_they_hold(run, tmp_path, name, text, code):
    import dataclasses

    finished = read_run(run)
    settings = {**finished.settings, 'data_dir': str(tmp_path / name), 'val_split': name, 'teacher': name}
    results = {**finished.results, 'command': shlex.join(['train_distill.py', '--val-split', name])}
    strange = dataclasses.replace(finished, settings=settings, results=results)
    section = cards.card_section(strange, 'me/student', 'last', False)
    assert f'On the split {code} of {text}, each image' in section
    assert f'learned from {code} by `rld` distillation on {text}, with timm_rld.' in section
    assert f'- Teacher: {code}' in section
    before, _, command = section.partition('bash\n')
    fence = before.rpartition('\n')[2]
    assert command.startswith(f'{shlex.join(shlex.split(results["command"]))}\n{fence}\n')
    assert fence not in name and len(fence) >= 3
    card = merge_card(None, cards.card_header(strange, 'me/student', 'apache-2.0', 'last'), section)
    header = card.split('\n---\n')[0]
    assert '<' not in header
    dataset = yaml.safe_load(header.removeprefix('---\n'))['model-index'][0]['results'][0]['dataset']
    assert dataset['name'] == name and dataset['split'] == name


@pytest.mark.parametrize(('weights', 'file'), [('ema', 'student_ema'), ('last', 'student')])
def test_the_weights_that_were_asked_for_are_pushed(hub, run, weights, file):
    push.push_run(run, 'me/student', hub_weights=weights, log=lambda _: None)
    assert hub.files('me/student')['model.safetensors'] == (run / file / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('exported', [True, False], ids=['from their folder', 'of an earlier version'])
def test_the_best_weights_are_those_of_the_best_epoch(hub, run, tmp_path, exported):
    import shutil

    from safetensors.torch import load

    copy = tmp_path / 'run'
    shutil.copytree(run, copy)
    results = json.loads((copy / 'results.json').read_text())
    best = next(p for p in (copy / 'checkpoints').iterdir() if 'epoch0003' not in p.name)
    assert results['best_epoch'] == int(best.name[13:17])
    if not exported:
        del results['student_folders']['student_best']
        shutil.rmtree(copy / 'student_best')
    (copy / 'results.json').write_text(json.dumps(results))
    push.push_run(copy, 'me/student', hub_weights='best', log=lambda _: None)
    pushed = load(hub.files('me/student')['model.safetensors'])
    expected = load((best / 'model.safetensors').read_bytes())
    assert all(torch.equal(v, expected[k]) for k, v in pushed.items())
    shutil.rmtree(copy / ('student_best' if exported else 'checkpoints'))
    with pytest.raises(UserError, match='--hub-weights best: .* is gone; --hub-weights last is there'):
        push.push_run(copy, 'me/student', hub_weights='best')


def test_several_pushes_are_a_commit_each_and_keep_what_a_person_wrote(hub, run):
    push.push_run(run, 'me/student', log=lambda _: None)
    card = hub.files('me/student')['README.md'].decode()
    mine = card.replace('license: apache-2.0', 'license: mit').replace(END, END + '\n\nAnd a word of mine.')
    hub.commits['me/student'].append(('by hand', {**hub.files('me/student'), 'README.md': mine.encode()}))
    push.push_run(run, 'me/student', hub_weights='ema', log=lambda _: None)
    again = hub.files('me/student')['README.md'].decode()
    assert [m.split(',')[0] for m, _ in hub.commits['me/student']] == [
        'initial commit', 'last weights', 'by hand', 'ema weights'
    ]  # fmt: skip
    assert again.count(BEGIN) == again.count(END) == 1 and 'license: mit' in again
    assert again.endswith('And a word of mine.\n') and 'the moving average of the weights' in again
    card = merge_card('Only text of mine.', {'model-index': [], 'tags': []}, f'{BEGIN}\nnew\n{END}')
    assert card.count('Only text of mine.') == 1


SECTION = f'{BEGIN}\nFRESH\n{END}'
HEADER = {'library_name': 'timm', 'license': 'apache-2.0', 'tags': ['timm'], 'model-index': [1]}


@pytest.mark.parametrize(
    'mine',
    [
        f'{BEGIN}\nx\nPRECIOUS',  # the closing mark was lost
        f'{END}\nPRECIOUS\n{BEGIN}',
        f'```\n{BEGIN}\n```\nPRECIOUS\n{BEGIN}\nold\n{END}\n',
        'PRECIOUS',
    ],
)
def test_what_a_person_wrote_around_the_marks_is_never_deleted(mine):
    card = mine
    for _ in range(3):
        card = merge_card(card, HEADER, SECTION)
        assert 'PRECIOUS' in card and card.count('FRESH') == 1 and 'old' not in card


def test_the_header_of_a_person_is_filled_in_and_its_figures_renewed():
    card = merge_card('\ufeff---\r\nlicense: mit\r\ntags: [mine]\r\nmodel-index: [0]\r\n---\r\nText', HEADER, SECTION)
    header = yaml.safe_load(card.split('---\n')[1])
    assert header == {'library_name': 'timm', 'license': 'mit', 'tags': ['mine', 'timm'], 'model-index': [1]}
    with pytest.raises(UserError, match='not valid YAML; fix or delete README.md'):
        merge_card('---\na: [\n---\n', HEADER, SECTION)


def test_a_license_that_is_asked_for_takes_the_place_of_the_cards(hub, run):
    push.push_run(run, 'me/student', log=lambda _: None)
    for license, expected in (('cc-by-nc-4.0', 'cc-by-nc-4.0'), (None, 'cc-by-nc-4.0'), ('mit', 'mit')):
        push.push_run(run, 'me/student', hub_license=license, log=lambda _: None)
        header = yaml.safe_load(hub.files('me/student')['README.md'].decode().split('---\n')[1])
        assert header['license'] == expected and 'license_name' not in header
    other = {**HEADER, 'license': 'other', 'license_name': 'mine'}
    card = merge_card('---\nlicense: other\nlicense_name: dinov3\nlicense_link: x\n---\n', other, SECTION, True)
    header = yaml.safe_load(card.split('---\n')[1])
    assert (header['license_name'], header.get('license_link')) == ('mine', None)


@pytest.mark.parametrize(
    ('name', 'license', 'header', 'said'),
    [
        ('timm/resnet18.a1_in1k', 'apache-2.0', ('apache-2.0', None, 'timm/resnet18.a1_in1k'), 'apache-2.0'),
        ('timm/atto.fcmae', 'cc-by-nc-4.0', ('cc-by-nc-4.0', None, 'timm/atto.fcmae'), 'cc-by-nc-4.0'),
        ('timm/vit.dinov3', 'dinov3-license', ('other', 'dinov3-license', 'timm/vit.dinov3'), 'dinov3-license'),
        ('mine', None, ('unknown', None, None), 'not known here'),
    ],
)
def test_a_student_that_started_from_weights_names_them_and_has_their_license(run, name, license, header, said):
    import dataclasses

    finished = read_run(run)
    assert finished.results['student_weights'] is None
    results = {**finished.results, 'student_weights': {'name': name, 'license': license}, 'teacher': 'hf-hub:a/b'}
    started = dataclasses.replace(finished, results=results)
    found = cards.card_header(started, 'me/student', None, 'last')
    assert (found['license'], found.get('license_name'), found.get('base_model')) == header
    assert cards.card_header(started, 'me/student', 'mit', 'last')['license'] == 'mit'
    section = cards.card_section(started, 'me/student', 'last', False)
    assert f'started from the weights `{name}` (their license: {said})' in section
    assert 'started from' not in cards.card_section(finished, 'me/student', 'last', False)


def test_where_published_weights_come_from():
    import timm

    from timm_rld.pairing import weights_origin

    model = timm.create_model('test_resnet', num_classes=3)
    of_timm = {'name': 'timm/test_resnet.r160_in1k', 'license': 'apache-2.0'}
    assert weights_origin(model, 'test_resnet') == of_timm
    assert weights_origin(model, 'hf-hub:me/it@main')['name'] == 'me/it'
    assert weights_origin(model, 'local-dir:/home/me/it')['name'] == 'it'


def test_the_card_of_a_push_while_training_goes_on_says_how_far_it_was(run):
    import dataclasses

    finished = read_run(run)
    before = dataclasses.replace(finished, history=finished.history[:2])
    section = cards.card_section(before, 'me/student', 'last', False)
    for said in ('are those of epoch 2 of 3, pushed while', '| top-1, epoch 2 |', '- 2 of 3 epochs, seed'):
        assert said in section
    section = cards.card_section(finished, 'me/student', 'last', False)
    for said in ('are those of the last epoch.', '| top-1, last epoch |', '- 3 epochs, seed'):
        assert said in section


def test_a_new_repository_is_private_where_its_owner_has_them_so(hub, run):
    push.push_run(run, 'lab/student', log=lambda _: None)
    assert hub.asked_for['lab/student'] is None
    push.push_run(run, 'lab/other', hub_private_repo=True, log=lambda _: None)
    assert hub.private['lab/other']


def test_a_run_of_a_search_is_not_pushed(run, tmp_path, capsys):
    import shutil

    shutil.copytree(run, copy := tmp_path / 'candidate')
    settings = yaml.safe_load((copy / 'args.yaml').read_text())
    (copy / 'args.yaml').write_text(yaml.safe_dump({**settings, 'tune_holdout': 0.1, 'val_split': None}))
    assert tools(['push', str(copy), '--hub-model-id', 'me/x']) == 1
    assert 'a run of a search, with --tune-holdout' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('faults', 'message'),
    [
        ({'whoami': [401]}, 'push: the token is not valid'),
        ({'repos/create': [403]}, '--hub-model-id me/student: the token may not write there'),
        ({'auth-check': [403]}, '--hub-model-id me/student: the token may not write there'),
        ({'/upload/': [403] * 99}, 'push: the token may not write there'),
        ({'validate-yaml': [400]}, '--hub-license apache-2.0: the Hub answered 400'),
        ({'/commit/': [503] * 9}, 'push: the Hub answered 503'),
        ({'/commit/': ['reset'] * 9}, 'push: the connection failed'),
    ],
)
def test_a_fault_that_lasts_is_one_clear_line_and_names_the_way_out(hub, run, faults, message):
    hub.faults = faults
    with pytest.raises(UserError) as e:
        push.push_run(run, 'me/student', hub_license='apache-2.0', log=lambda _: None)
    assert str(e.value).startswith(message) and TOKEN not in str(e.value)
    if 'commit' in str(faults):
        again = f'again: timm-rld push {run} --hub-model-id me/student --hub-weights last --hub-license apache-2.0'
        assert again in str(e.value)


@pytest.mark.parametrize(
    'faults',
    [
        {'/commit/': [503, 503]},
        {'/commit/': [429]},
        {'/commit/': ['reset']},
        {'/upload/': ['reset']},
        {'preupload': [503]},
        {'resolve/main/README': [503]},
        {'whoami': [503, 'reset']},
    ],
)
def test_a_fault_that_passes_is_tried_again(hub, run, faults):
    hub.faults = {k: list(v) for k, v in faults.items()}
    push.push_run(run, 'me/student', log=lambda _: None)
    assert hub.faults == {k: [] for k in faults}
    assert hub.files('me/student')['model.safetensors'] == (run / 'student' / 'model.safetensors').read_bytes()


def test_what_is_wrong_is_said_before_training(hub, folder, trained_teacher, tmp_path, monkeypatch, capsys):
    argv = ['--teacher', f'local-dir:{trained_teacher}', '--student', 'test_resnet', '--data-dir', str(folder),
            '--img-size', '32', '--epochs', '1', '-b', '8', '--min-teacher-acc', '0', '--workers', '0', '--output',
            str(tmp_path), '--experiment', 'run', '--push-to-hub', '--hub-model-id']  # fmt: skip
    for repo, message in (
        ('other/student', 'the token of me may not write to other; it may to me, lab'),
        ('club/student', 'the token of me may not write to club'),
        ('me/a b', 'not a name of a repository'),
    ):
        assert main([*argv, repo]) == 1
        assert message in capsys.readouterr().err
    hub.role = 'read'
    assert main([*argv, 'me/student']) == 1
    assert 'the token of me may only read' in capsys.readouterr().err
    hub.role = 'write'
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setattr('huggingface_hub.get_token', lambda: None)
    assert main([*argv, 'me/student']) == 1
    assert 'no token; set HF_TOKEN' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_a_run_pushes_at_its_end_and_a_failure_then_loses_nothing(hub, folder, trained_teacher, tmp_path, capsys):
    argv = ['--teacher', f'local-dir:{trained_teacher}', '--student', 'test_resnet', '--data-dir', str(folder),
            '--img-size', '32', '--epochs', '1', '-b', '8', '--min-teacher-acc', '0', '--workers', '0', '--output',
            str(tmp_path), '--push-to-hub', '--hub-model-id', 'lab/student', '--experiment']  # fmt: skip
    assert main([*argv, 'good']) == 0
    assert 'model.safetensors' in hub.files('lab/student')
    hub.faults = {'/commit/': [500] * 9}
    assert main([*argv, 'bad']) == 1
    error = capsys.readouterr().err
    assert f'The run is complete in {tmp_path / "bad"}' in error and 'timm-rld push' in error
    hub.faults = {}
    assert tools(['push', str(tmp_path / 'bad'), '--hub-model-id', 'lab/student']) == 0
    assert TOKEN not in ''.join(p.read_text(errors='replace') for p in tmp_path.rglob('*') if p.is_file())


@pytest.mark.parametrize(('strategy', 'most'), [('every_save', 4), ('best', 4)])
def test_pushes_while_training_goes_on_are_a_commit_each(
    hub, folder, trained_teacher, tmp_path, capsys, strategy, most
):
    argv = ['--teacher', f'local-dir:{trained_teacher}', '--student', 'test_resnet', '--data-dir', str(folder),
            '--img-size', '32', '--epochs', '3', '-b', '8', '--min-teacher-acc', '0', '--workers', '0', '--output',
            str(tmp_path), '--experiment', 'run', '--push-to-hub', '--hub-model-id', 'me/student',
            '--hub-strategy', strategy]  # fmt: skip
    hub.faults = {'/commit/': [400]}  # the first of them fails, and training goes on
    assert main(argv) == 0
    messages = [message for message, _ in hub.commits['me/student']][1:]
    assert 1 <= len(messages) <= most and messages[-1].startswith('last weights, epoch 3')
    assert 'was not pushed (push: the Hub answered 400' in capsys.readouterr().out
    assert hub.files('me/student')['README.md'].decode().count(BEGIN) == 1
    assert (
        hub.files('me/student')['model.safetensors']
        == (tmp_path / 'run' / 'student' / 'model.safetensors').read_bytes()
    )


def test_pushes_while_training_goes_on_leave_no_folder_behind_and_no_warning(tmp_path):
    (tmp_path / 'args.yaml').write_text('epochs: 1')
    code = f"""
from pathlib import Path
from timm_rld.hub import BackgroundPush
settings = dict(hub_strategy='best', hub_model_id='me/x', hub_license='mit', hub_weights='last')
def export(student, folder):
    assert folder.parent.is_dir()
    print(folder.parent)
    return folder
push = BackgroundPush(Path({str(tmp_path)!r}), {{}}, None, export, print, **settings)
"""
    command = [sys.executable, '-W', 'error::ResourceWarning', '-c', code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, '') and not Path(done.stdout.strip()).exists()


def test_a_cifar_network_asks_for_timm_rld_first(hub, folder, tmp_path):
    assert main([
        '--teacher', 'test_resnet', '--student', 'cifar_resnet8', '--data-dir', str(folder), '--distill', 'none',
        '--no-teacher-pretrained', '--teacher-epochs', '1', '--min-teacher-acc', '0', '--epochs', '1', '-b', '8',
        '--workers', '0', '--output', str(tmp_path), '--experiment', 'run',
    ]) == 0  # fmt: skip
    push.push_run(tmp_path / 'run', 'me/cifar', log=lambda _: None)
    lines = hub.files('me/cifar')['README.md'].decode().partition('```python\n')[2].partition('```')[0]
    assert lines.startswith('import timm_rld')
    Image.new('RGB', (40, 40)).save(tmp_path / 'image.png')
    env_code = f'import sys; sys.path.insert(0, {str(ROOT)!r})\n'
    assert in_fresh_process(env_code + lines, hub, tmp_path).returncode == 0
    without = in_fresh_process(lines.partition('\n')[2], hub, tmp_path)
    assert without.returncode and 'Unknown model (cifar_resnet8)' in without.stderr


def test_local_paths_are_cut_and_names_are_not(tmp_path):
    assert public_command(f'train_distill.py --data-dir {tmp_path}/a --teacher local-dir:/home/x/t --student resnet18 '
                          '--dataset hfds//data/secret/d --config=/etc/c.yaml --teacher-checkpoint w/x.pth') == (
        'train_distill.py --data-dir a --teacher local-dir:t --student resnet18 --dataset hfds/d --config=c.yaml '
        '--teacher-checkpoint x.pth'
    )  # fmt: skip
    hidden = {'model_kwargs': {'f': '/home/x/w.pt', 'g': ['{file: /home/x/w.pt}']}, 'experiment': 'sub/x/e',
              'output': 'D:\\\\x\\\\o', 'student': 'local-dir:x/t', 'dataset': 'hfds/x/y/d'}  # fmt: skip
    assert public_settings(hidden) == {'model_kwargs': {'f': 'w.pt', 'g': ['{file: w.pt}']}, 'experiment': 'e',
                                       'output': 'o', 'student': 'local-dir:t', 'dataset': 'hfds/d'}  # fmt: skip
    kept = {'teacher': 'hf-hub:user/model', 'dataset': 'hfds/uoft-cs/cifar100', 'aa': 'rand-m9', 'lr': 0.1,
            'url': 'https://host/a/b'}  # fmt: skip
    assert public_settings(kept) == kept


def test_a_folder_that_is_no_finished_run_is_named(tmp_path, capsys):
    assert tools(['push', str(tmp_path)]) == 1
    assert f'{tmp_path}: not the folder of a finished run (args.yaml)' in capsys.readouterr().err


def test_without_matplotlib_the_card_has_no_picture(hub, run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert cards.curve_png(read_run(run).history) is None
    push.push_run(run, 'me/student', log=lambda _: None)
    assert 'curve.png' not in hub.files('me/student')
    assert 'curve.png' not in hub.files('me/student')['README.md'].decode()
