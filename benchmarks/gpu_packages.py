"""Which packages does this machine lack for benchmarks/gpu.sh? Standard library alone, since it runs before they are
there.

python benchmarks/gpu_packages.py                  # names what is missing, with the command that fetches it
python benchmarks/gpu_packages.py --wheels DIR     # prints the files of DIR that are to be installed
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / 'pyproject.toml'
# with what the tests import where they run on a GPU; torch itself must be there, made for the GPU
EXTRAS = ('pytest', 'jinja2', 'matplotlib')
PLATFORMS = '--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64'


def parse(requirement: str) -> tuple[str, tuple[int, ...], str] | None:
    """Return name, least version and the text to ask pip for, of a requirement; None for one of an extra."""
    text, _, marker = requirement.partition(';')
    if 'extra' in marker or not _holds(marker):
        return None
    name = re.match(r'[\w.-]+', text.strip())
    assert name is not None, requirement
    least = re.search(r'>=\s*([\d.]+)', text)
    asked = re.sub(r'\[.*?\]|[()\s]', '', text)
    return _normal(name[0]), version(least[1]) if least else (), asked


def _holds(marker: str) -> bool:
    """Whether a marker holds here, as far as it is about Python's version or the system; else it is taken to hold."""
    for name, sign, value in re.findall(r"""([\w.]+)\s*(<=|>=|==|!=|<|>)\s*["']([^"']+)["']""", marker):
        here: object = {'sys_platform': sys.platform, 'platform_system': 'Linux', 'os_name': 'posix'}.get(name)
        there: object = value
        if name in ('python_version', 'python_full_version'):
            here, there = version('.'.join(map(str, sys.version_info[:2]))), version(value)[:2]
        if here is None:
            continue
        holds = {
            '<': lambda a, b: a < b, '<=': lambda a, b: a <= b, '>': lambda a, b: a > b, '>=': lambda a, b: a >= b,
            '==': lambda a, b: a == b, '!=': lambda a, b: a != b,
        }[sign](here, there)  # fmt: skip
        if not holds and ' or ' not in marker:
            return False
    return True


def version(text: str) -> tuple[int, ...]:
    """`2.11.0+cu130` → (2, 11, 0)."""
    return tuple(int(n) for n in re.findall(r'\d+', text.partition('+')[0])[:3])


def _normal(name: str) -> str:
    return re.sub(r'[-_.]+', '-', name).lower()


def needed() -> list[str]:
    """The requirements in pyproject.toml, and those of the tests."""
    text = PYPROJECT.read_text(encoding='utf-8')
    listed = re.search(r'^dependencies = \[(.*?)^\]', text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    return [*re.findall(r'"([^"]+)"', listed[1]), *EXTRAS]


def missing() -> dict[str, str]:
    """Return what is not there, or too old, by name: what to ask pip for. The requirements of what is there are looked
    at too, but for torch's: it was installed with them."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    wanted = needed()
    while wanted:
        parsed = parse(wanted.pop())
        if parsed is None:
            continue
        name, least, asked = parsed
        try:
            there = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found.setdefault(name, asked)
            continue
        if version(there.version) < least:
            found[name] = asked
        if name not in seen and not name.startswith(('torch', 'nvidia')):
            seen.add(name)
            wanted += there.requires or []
    return found


def of_wheels(folder: Path) -> list[Path]:
    """Return the wheels of packages that are not there, or are there in another version that is too old."""
    lacking = missing()
    found = []
    for file in sorted(folder.glob('*.whl')):
        name = _normal(file.name.partition('-')[0])
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found.append(file)  # what it is needed by may be a wheel itself
            continue
        if name in lacking:
            found.append(file)
    return found


def main() -> int:
    """Returns the exit code: 1 where something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--wheels', type=Path, metavar='DIR')
    args = parser.parse_args()
    if args.wheels is not None:
        if not args.wheels.is_dir():
            print(f'{args.wheels}: no such folder', file=sys.stderr)
            return 1
        print(*of_wheels(args.wheels), sep='\n', end='')
        return 0
    lacking = missing()
    if lacking:
        asked = ' '.join(f"'{text}'" for text in lacking.values())
        print(
            f'missing: {", ".join(lacking)}\nwhere there is a network:\n  python3 -m pip download --no-deps '
            f'--only-binary=:all: --python-version {sys.version_info[0]}.{sys.version_info[1]} {PLATFORMS} '
            f'-d WHEELS {asked}\nand then: benchmarks/gpu.sh OUTPUT WHEELS', file=sys.stderr,
        )  # fmt: skip
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
