"""The house's rules: imports go down, imports are cheap, files that ship are there."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from timm_rld.loss import CRITERIA, FEATURES

ROOT = Path(__file__).parent.parent
# What each room may import from. The recipe may import from all.
FLOORS = {
    # 1
    'errors': set(),
    'files': set(),
    'metrics': set(),
    'offline': set(),
    '_timm': set(),
    'seeds': set(),
    # 2
    'config': {'errors', 'files'},
    'distributed': {'errors', 'files'},
    'models': {'_timm'},
    'loss': {'errors'},
    'data': {'errors', 'files', 'offline', 'seeds', '_timm'},
    'pairing': {'errors', 'files', 'offline', '_timm'},
    'run_folder': {'errors', 'files'},
    'poison': {'errors', 'seeds'},
    # 3
    'task': {'errors', 'seeds', 'data', 'pairing', 'loss', 'poison'},
    'mekd_task': {'data', 'loss', 'task'},
    'cache': {'errors', 'files', 'distributed', 'data', 'pairing'},
    'hub': {'errors', 'offline', 'config', 'run_folder', 'poison'},
    'resume': {'errors', 'files', 'config', 'distributed', 'data', 'run_folder'},
    'runs': {'errors', 'files', 'metrics', 'config', 'loss'},
    'poison_study': {'errors', 'metrics', 'config', 'poison', 'runs'},
    # 4
    'engine': {
        'errors',
        'files',
        'metrics',
        'seeds',
        'config',
        'distributed',
        'models',
        'data',
        'pairing',
        'loss',
        'poison',
        'run_folder',
        'task',
        'cache',
        'hub',
    },
    # 5
    'tune': {'errors', 'files', 'config', 'data', 'engine', 'loss', 'runs'},
    'compare': {'errors', 'files', 'config', 'engine', 'runs', 'poison_study'},
    'inference': {
        'errors',
        'files',
        'metrics',
        'config',
        'distributed',
        'data',
        'pairing',
        'run_folder',
        'hub',
        'engine',
    },
    'report': {
        'errors',
        'files',
        'metrics',
        'config',
        'loss',
        'data',
        'run_folder',
        'cache',
        'poison',
        'poison_study',
        'runs',
    },
    # 6
    'bench': {
        'errors',
        'config',
        'distributed',
        'models',
        'data',
        'pairing',
        'loss',
        'task',
        'mekd_task',
        'cache',
        'engine',
    },
    'export': {
        'errors',
        'files',
        'config',
        'distributed',
        'data',
        'pairing',
        'run_folder',
        'hub',
        'engine',
        'inference',
    },
    # 7
    '__main__': {
        'export',
        'errors',
        'files',
        'data',
        'config',
        'loss',
        'models',
        'run_folder',
        'cache',
        'hub',
        'compare',
        'tune',
        'bench',
        'inference',
        'report',
    },  # fmt: skip
    # it loads each public name's room when the name is first used
    '__init__': {'models'},
}


def modules() -> list[Path]:
    return sorted((ROOT / 'timm_rld').rglob('*.py'))


def imports_of(path: Path) -> set[str]:
    """Rooms of timm_rld that a module imports, wherever in it."""
    package = path.relative_to(ROOT).parts[:-1]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = [*base, *(node.module or '').split('.')] if node.module else list(base)
            if full[:1] == ['timm_rld']:
                names = [full[1]] if len(full) > 1 else [alias.name for alias in node.names]
                rooms |= set(names)
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split('.')[1] for a in node.names if a.name.startswith('timm_rld.')}
    return rooms - {'__version__'}  # of the package itself


@pytest.mark.parametrize('path', modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path):
    room = path.relative_to(ROOT / 'timm_rld').parts[0].removesuffix('.py')
    assert imports_of(path) - {room} <= FLOORS[room]


def test_every_folder_of_code_is_in_the_wheel():
    tomllib = pytest.importorskip('tomllib')  # Python 3.11
    listed = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']['packages']
    folders = {'.'.join(p.parent.relative_to(ROOT).parts) for p in (ROOT / 'timm_rld').rglob('__init__.py')}
    assert folders <= set(listed)


def test_every_room_has_a_floor():
    assert {p.relative_to(ROOT / 'timm_rld').parts[0].removesuffix('.py') for p in modules()} <= set(FLOORS)


def height(room: str) -> int:
    return 1 + max(map(height, FLOORS[room]), default=0)


def test_the_house_has_at_most_seven_floors():
    assert max(map(height, FLOORS)) <= 7


def functions() -> list[tuple[str, int, int]]:
    """Name, lines and arguments of each function of the package and the recipe."""
    found = []
    for path in [*modules(), ROOT / 'train_distill.py']:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.FunctionDef):
                arguments = len(node.args.args) + len(node.args.kwonlyargs)
                name = f'{path.relative_to(ROOT)}:{node.name}'
                found.append((name, node.end_lineno - node.lineno + 1, arguments))
    return found


def test_a_function_can_be_read_in_one_sitting():
    assert not [f for f in functions() if f[1] > (100 if f[0] == 'train_distill.py:run' else 80)]


def test_a_function_of_the_training_rooms_can_be_called_without_looking():
    rooms = ('timm_rld/engine/', 'timm_rld/pairing/', 'timm_rld/cache/')
    assert not [f for f in functions() if f[2] > 12 and f[0].startswith(rooms)]


def timed(code: str) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
    return time.perf_counter() - started, done.stdout


@pytest.mark.parametrize('names', ['', 'create_distill_loss, create_pair, DistillationTask'])
def test_importing_the_package_loads_timm_and_nothing_else_that_is_heavy(names):
    what = f'from timm_rld import {names}' if names else 'import timm_rld'
    heavy = "print(*[m for m in ('datasets', 'accelerate', 'matplotlib', 'timm') if m in sys.modules])"
    assert timed(f'import sys; {what}; {heavy}')[1].split() == ['timm']


def started_with(*words: str, path: Path = ROOT) -> tuple[str, set[str]]:
    """What a Python program prints, and the names of all that it imports."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(path), str(ROOT)]))
    done = subprocess.run([sys.executable, '-X', 'importtime', *words], capture_output=True, text=True, check=True,
                          cwd=path, env=env)  # fmt: skip
    return done.stdout, {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}


def test_a_verb_that_needs_no_network_loads_neither_torch_nor_timm(tmp_path):
    script = tmp_path / 'timm-rld'  # as pip makes it
    script.write_text('import sys\nfrom timm_rld.__main__ import cli\nsys.exit(cli())\n')
    for program in (['-m', 'timm_rld'], [str(script)]):
        said, imported = started_with(*program, 'list', 'recipes')
        assert 'quickstart.yaml' in said and 'timm_rld.config' in imported and not {'torch', 'timm'} & imported


def test_the_networks_are_registered_wherever_else_the_package_is_imported(tmp_path):
    assert started_with('-m', 'timm_rld', 'list', 'models', 'cifar_resnet8')[0].split()[0] == 'cifar_resnet8'
    package = tmp_path / 'other'
    package.mkdir()
    (package / '__init__.py').write_text('import timm_rld\n')
    (package / '__main__.py').write_text("import timm\nprint(timm.is_model('cifar_resnet8'))\n")
    assert started_with('-m', 'other', path=tmp_path)[0].split() == ['True']


def test_help_imports_nothing_beyond_timm_and_the_package():
    _, of_timm = started_with('-c', 'import timm')
    said, imported = started_with('train_distill.py', '--help', path=ROOT)
    assert {name.partition('.')[0] for name in imported - of_timm} == {'timm_rld'}
    assert '--teacher-class-map' in said and 'rld' in said


def test_public_names_are_there():
    import timm_rld

    for name in timm_rld.__all__:
        assert getattr(timm_rld, name) is not None
    with pytest.raises(AttributeError):
        timm_rld.nothing  # noqa: B018


@pytest.mark.parametrize('path', sorted((ROOT / 'configs' / 'accelerate').glob('*.yaml')), ids=lambda p: p.name)
def test_launch_configs_are_what_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= config.num_machines >= 1
    assert set(yaml.safe_load(path.read_text())) <= set(vars(config)) | {'use_cpu'}


def test_the_recipe_stays_readable():
    assert len((ROOT / 'train_distill.py').read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    'argv',
    [['list', 'criteria'], ['list', 'features'], ['list', 'recipes'], ['list', 'models', 'resnet34'],
     ['list', 'models', 'wide_res*']],
)  # fmt: skip
def test_the_tools_list_what_there_is(argv, capsys):
    from timm_rld.__main__ import main

    assert main(argv) == 0
    out = capsys.readouterr().out
    assert {'criteria': 'rld', 'features': 'fitnet', 'recipes': 'quickstart.yaml', 'models': 'resnet'}[argv[1]] in out


@pytest.mark.parametrize('argv', [['lst'], ['list', 'recipe']])
def test_a_wrong_verb_exits_with_2_and_a_line(argv, capsys):
    from timm_rld.__main__ import main

    assert main(argv) == 2
    assert capsys.readouterr().err.startswith('timm-rld: error: ')


def test_the_tools_show_their_version(capsys):
    from timm_rld import __version__
    from timm_rld.__main__ import main

    with pytest.raises(SystemExit):
        main(['--version'])
    assert capsys.readouterr().out == f'timm-rld {__version__}\n'


def test_the_tools_alone_show_their_help(capsys):
    from timm_rld.__main__ import main

    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ('compare', 'tune', 'push', 'bench', 'list'))


@pytest.mark.parametrize('name', list(CRITERIA))
def test_the_docs_list_each_criterion_as_its_row_has_it(name):
    row = CRITERIA[name]
    page = (ROOT / 'docs' / 'criteria.md').read_text(encoding='utf-8')
    (line,) = (x for x in page.splitlines() if x.startswith(f'| `{name}` | {row.summary}'))
    assert f'| {row.task_weight:g}, {row.distill_weight:g}' in line and row.paper in line
    assert f'ramp {row.warmup_epochs}' in line or not row.warmup_epochs
    assert all(f'{k}={str(v).replace(" ", "")}' in line for k, v in row.options.items())
    assert f'`{row.imagenet}`' in page or not row.imagenet


@pytest.mark.parametrize('name', list(FEATURES))
def test_the_docs_list_each_method_on_features_as_its_row_has_it(name):
    row = FEATURES[name]
    page = (ROOT / 'docs' / 'features.md').read_text(encoding='utf-8')
    (line,) = (x for x in page.splitlines() if x.startswith(f'| `{name}` | {row.summary}'))
    assert f'| {row.weight:g}' in line and row.paper in line
    assert f'ramp {row.warmup_epochs}' in line or not row.warmup_epochs
    assert all(f'{k}={v}' in line for k, v in row.options.items())
    assert f'`{row.imagenet}`' in page or not row.imagenet


def test_timms_private_names_are_in_one_file_for_the_version_that_they_were_checked_with():
    import timm

    from timm_rld import _timm

    private = []
    for path in [*modules(), ROOT / 'train_distill.py']:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('timm.'):
                parts = [*node.module.split('.'), *(alias.name for alias in node.names)]
                if any(part.startswith('_') for part in parts):
                    private.append(path.name)
    assert set(private) <= {'_timm.py'}
    minor = timm.__version__.split('.')[:2]
    assert minor == _timm.CHECKED_VERSION.split('.')[:2], 'check the names in _timm.py with this version of timm'
    assert f'"timm>={_timm.CHECKED_VERSION},<' in (ROOT / 'pyproject.toml').read_text(encoding='utf-8')


def test_importing_the_package_leaves_the_threads_of_the_host_alone():
    code = 'import os; before = dict(os.environ); import timm_rld; assert dict(os.environ) == before'
    timed(code)
