"""README and docs say what is true: their code runs, their commands are read by the real parsers, their flags and links
exist."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from timm_rld import bench
from timm_rld.config import FIELDS, Config, flag_of, load_yaml_text, parse_args, resolve, to_yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md', *sorted((ROOT / 'docs').rglob('*.md'))]
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```', re.DOTALL | re.MULTILINE)


def read(page: Path) -> str:
    return page.read_text(encoding='utf-8')


def blocks(language: str, pages: list[Path] = PAGES) -> list[pytest.param]:
    """The code blocks of a language, by page."""
    found = []
    for page in pages:
        codes = [code for name, code in BLOCK.findall(read(page)) if name == language]
        found += [pytest.param(code, id=f'{page.relative_to(ROOT)}-{i}') for i, code in enumerate(codes)]
    return found


# -------------------------------------------------------------------------------------------------------------- shell


def commands(code: str) -> list[list[str]]:
    """The words of each command of a shell block; variables stand for a number."""
    lines = code.replace('\\\n', ' ').splitlines()
    found = []
    for line in lines:
        line = re.sub(r'\$\w+', '1', line)
        if line.startswith('srun bash -c'):
            line = shlex.split(line)[3].removeprefix('exec ')
        words = shlex.split(line, comments=True)
        while '&&' in words:
            found.append(words[: words.index('&&')])
            words = words[words.index('&&') + 1 :]
        found.append(words)
    return [words for words in found if words]


def check_train(argv: list[str]) -> None:
    """Read the flags of train_distill.py as it does."""
    if '--resume' in argv and (run := argv[argv.index('--resume') + 1]) != 'auto':
        folder, _, checkpoint = run.partition('/checkpoints/')
        Path(folder, 'checkpoints', checkpoint).mkdir(parents=True)
        settings = resolve(Config(teacher='resnet34', student='resnet18'))
        Path(folder, 'args.yaml').write_text(to_yaml(settings), encoding='utf-8')
        if checkpoint:
            Path(run, 'checkpoint.json').touch()
    config = resolve(parse_args(argv))
    assert config.student and (config.teacher_name or config.distill == 'none')


def check_launch(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a command line of `accelerate launch`, and of the program that it starts."""
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args(argv)
    if args.module and args.training_script == 'timm_rld':
        check_tool(args.training_script_args, monkeypatch)
        return
    assert args.training_script == 'train_distill.py'
    assert args.config_file is None or (ROOT / args.config_file).is_file()
    check_train(args.training_script_args)


def check_tool(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a command line of `timm-rld` as it does, without doing what it says."""
    from timm_rld import __main__ as tools

    called = []
    verbs = (
        'list_things', 'check_data', 'compare', 'tune', 'evaluate', 'predict', 'export', 'report', 'push',
        'verify_cache',
    )  # fmt: skip
    for name in verbs:
        monkeypatch.setattr(tools, name, lambda *args, name=name: called.append((name, args)))
    for name in bench.BENCHMARKS:
        monkeypatch.setattr(bench.benchmark(name), 'run', lambda args: called.append(('bench', args)))
    tools.parse(argv)
    ((name, args),) = called
    if name in ('compare', 'tune'):
        check_train(args[0].flags)


def check_benchmark(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module(argv[0].removesuffix('.py').replace('/', '.')).add_arguments(parser)
    parser.parse_args(argv[1:])


@pytest.mark.parametrize('code', blocks('bash'))
def test_each_command_is_one_that_its_program_reads(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in commands(code):
        while re.fullmatch(r'[A-Z_]+=\S*', words[0]):  # variables of its environment
            words = words[1:]
        match words:
            case ['accelerate', 'launch', *argv]:
                check_launch(argv, monkeypatch)
            case ['python', 'train_distill.py', *argv]:
                check_train(argv)
            case ['timm-rld', *argv]:
                check_tool(argv, monkeypatch)
            case ['python', script, *argv] if script.startswith('benchmarks/'):
                check_benchmark([script, *argv])
            case ['benchmarks/gpu.sh', output, *argv]:
                check_benchmark(['benchmarks/gpu.py', '--output', output, *argv[argv[:1] == ['WHEELS'] :]])
            case ['benchmarks/gpu_evidence.sh', _, _, epochs, *argv]:
                assert epochs.isdigit() and parse_args(argv)
            case ['python', script, *_]:
                assert (ROOT / script).is_file()
            case ['pip', 'install', '-e', what]:
                assert what == '.' or set(what.strip('.[]').split(',')) <= set(extras())
            case _:
                assert words[0] in ('pytest', 'ruff', 'mypy', 'mkdocs', 'export', '.ci/run'), words


def extras() -> dict[str, list[str]]:
    tomllib = pytest.importorskip('tomllib')  # Python 3.11
    return tomllib.loads(read(ROOT / 'pyproject.toml'))['project']['optional-dependencies']


# ------------------------------------------------------------------------------------------------------------- Python


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """What the pages' code expects around it, and less of the sample, so that it takes seconds."""
    import timm

    from timm_rld import create_student, data, export_model

    monkeypatch.chdir(tmp_path)
    pair = create_student('resnet18', 10, img_size=32)
    export_model(pair.student, 'output/20261121-011500-resnet18-rld/student', data_config=pair.data_config)
    save_file(timm.create_model('resnet34', num_classes=10).state_dict(), 'teacher.safetensors')

    create_loaders = data.create_loaders

    def few_images(*args, **kwargs):
        train, val = create_loaders(*args, **kwargs)
        train.sampler.length, val.sampler.length = 128, 64
        return train, val

    monkeypatch.setattr(data, 'create_loaders', few_images)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    return {'loader': [(images, torch.arange(4))]}


# those of CONTRIBUTING.md have a file of tests of their own; what is on the Hub needs a network
RUNNABLE = [p for p in blocks('python') if 'CONTRIBUTING' not in p.id and 'hf-hub:' not in p.values[0]]


@pytest.mark.parametrize('code', RUNNABLE)
def test_each_python_snippet_runs(code, small_world):
    code = code.replace('epochs=5', 'epochs=1').replace('range(1, 11)', 'range(1, 3)')
    exec(compile(code, 'snippet', 'exec', dont_inherit=True), small_world)


@pytest.mark.parametrize('code', blocks('python'))
def test_each_python_snippet_is_python(code):
    ast.parse(code)


@pytest.mark.parametrize('code', blocks('yaml'))
def test_each_file_of_settings_is_read(code):
    assert resolve(Config(**load_yaml_text(code))).student


# --------------------------------------------------------------------------------------------------- flags, links, form


# of timm's script, Slurm, mkdocs; and the example of CONTRIBUTING.md
OTHERS = {
    '--kd-model-name', '--kd-distill-type', '--kd-token-distill-type',
    '--nodes', '--ntasks-per-node', '--gpus-per-node', '--signal', '--requeue', '--strict',
    '--label-noise',
}  # fmt: skip


@functools.cache
def known_flags() -> set[str]:
    """Every flag of a program of ours, of `accelerate launch`, and those of others that the pages name."""
    from accelerate.commands.launch import launch_command_parser

    flags = {'--config', '--help', *launch_command_parser()._option_string_actions}
    for name, row in FIELDS.items():
        flags |= {flag_of(name), flag_of(f'no_{name}')} if str(row.type).startswith('bool') else {flag_of(name)}
    sources = [ROOT / 'timm_rld' / '__main__.py', *(ROOT / 'timm_rld' / 'bench').glob('*.py')]
    sources += [*(ROOT / 'benchmarks').glob('*.py'), *(ROOT / 'examples').glob('*/*.py'), ROOT / 'tests' / 'soak.py']
    for source in sources:
        flags |= set(re.findall(r"add_argument\(\s*'(--[\w-]+)'", read(source)))
    return flags | OTHERS


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_flag_that_a_page_names_exists(page):
    named = set(re.findall(r'(?<![\w-])--[a-zA-Z][\w-]*', read(page)))
    assert not named - known_flags()


def anchors(page: Path) -> set[str]:
    text = BLOCK.sub('', read(page))
    titles = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title).strip().lower().replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_link_between_files_leads_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', BLOCK.sub('', read(page))):
        if target.startswith('https://'):
            continue
        path, _, anchor = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_lines_have_at_most_120_columns_but_for_tables(page):
    assert not [line for line in read(page).splitlines() if len(line) > 120 and not line.startswith('|')]


def test_the_readme_has_at_most_1000_words_beside_its_code():
    assert len(BLOCK.sub('', read(ROOT / 'README.md')).split()) <= 1000


# ----------------------------------------------------------------------------------------------------------- the site


def nav_files(entries: list) -> set[str]:
    found = set()
    for entry in entries:
        for value in entry.values():
            found |= nav_files(value) if isinstance(value, list) else {value}
    return found


def test_the_site_shows_each_page():
    nav = yaml.safe_load(read(ROOT / 'mkdocs.yml'))['nav']
    docs = ROOT / 'docs'
    assert nav_files(nav) == {p.relative_to(docs).as_posix() for p in docs.rglob('*.md')}


def test_the_site_lists_each_setting_with_its_default():
    table = runpy.run_path(str(ROOT / 'docs' / 'settings_table.py'))['settings_table']()
    rows = {line.split('`')[1]: line for line in table.splitlines() if line.startswith('| `')}
    assert set(rows) == {flag_of(name) for name in FIELDS}
    assert '| `--batch-size`, `-b` |  | images per process' in rows['--batch-size']
    assert rows['--model-ema'].startswith('| `--model-ema`, `--no-model-ema` | no |')
    assert '| 90 180 270 |' in rows['--decay-milestones']


@pytest.mark.parametrize('page', sorted((ROOT / 'docs' / 'reference').glob('*.md')), ids=lambda p: p.name)
def test_the_reference_lists_what_there_is(page):
    for path, options in re.findall(r'^::: ([\w.]+)\n((?: .*\n|\n)*)', read(page), re.MULTILINE):
        members = (yaml.safe_load(options) or {}).get('options', {}).get('members')
        if members is None:
            room, _, name = path.rpartition('.')
            assert hasattr(importlib.import_module(room), name)
        for name in members or ():
            assert hasattr(importlib.import_module(path), name)
            # where a module has this name too, the site would remove it
            assert not (ROOT / path.replace('.', '/') / f'{name}.py').exists(), f'name it as {path}.{name}.{name}'


# ---------------------------------------------------------------------------------------------------------- workflows


def workflow_steps(name: str) -> str:
    jobs = yaml.safe_load(read(ROOT / '.github' / 'workflows' / name))['jobs']
    return '\n'.join(step.get('run', '') for job in jobs.values() for step in job['steps'])


def test_workflows_run_what_is_there():
    assert '.ci/run' in workflow_steps('test.yml').split()
    nightly = workflow_steps('nightly.yml')
    scripts = set(re.findall(r'tests/\w+\.py', nightly))
    assert scripts == {'tests/soak.py', 'tests/two_hosts.py'} and all((ROOT / s).is_file() for s in scripts)
