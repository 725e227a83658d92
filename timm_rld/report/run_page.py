"""The report of a run: its files in, the context of `run.html` out."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

from ..config import data_named
from ..poison import describe
from .page import render
from .rules import Finding, finding
from .run import (
    Report,
    answers,
    base_facts,
    calibration,
    classes,
    curves,
    generated,
    method_of,
    seen,
    settings,
    time_spent,
    verdict,
)


def run_page(report: Report) -> str:
    """Return the page of a run; fills in ``report.files``."""
    r, results = report, report.results
    report.facts.update(base_facts(report))
    blocks: list[dict[str, Any]] = []
    for key, title, make in (
        ('verdict', 'Verdict', verdict), ('answers', 'Right and wrong', answers), ('curves', 'Curves', curves),
        ('classes', 'Classes', classes), ('calibration', 'Calibration', calibration),
        ('generated', 'Generated images', generated),
        ('images', 'What the networks saw', seen), ('time', 'Where the time went', time_spent),
        ('settings', 'Command and settings', settings),
    ):  # fmt: skip
        block = make(report)
        if not block:
            continue
        if block.get('meaning') is None and not block.get('missing'):
            block['meaning'] = _with_own_cache(finding(key, report.facts), r.run.settings.get('teacher_cache'))
        blocks.append({'key': key, 'title': title, 'missing': '', 'missing_command': '', **block})
    about = [results.get('student'), results.get('teacher') and f'from {results["teacher"]}']
    return render(
        'run.html', run=r.run.folder.name, blocks=blocks, title=' '.join(filter(None, about)),
        about=_about(report), why=r.images.why,
    )  # fmt: skip


def _with_own_cache(found: Finding, cache: str | None) -> Finding:
    """Return a finding whose command names a teacher cache of its own, where it trains again and the run had one: other
    augmentation or epochs have other logits."""
    words = shlex.split(found.command)
    if not cache or words[:2] != ['accelerate', 'launch'] or '--experiment' not in words:
        return found
    own = f'{cache}-{words[words.index("--experiment") + 1]}'
    return replace(found, command=f'{found.command} --teacher-cache {shlex.quote(own)}')


def _about(r: Report) -> str:
    settings, results = r.run.settings, r.results
    data = data_named(settings) or 'UCI handwritten digits'
    split = settings['val_split']
    if settings.get('val_fraction') is not None:
        split = f'{settings.get("train_split")} ({100 * settings["val_fraction"]:g} % of it held out)'
    poison = f'poisoned by {describe(results["poison"])}; ' if results.get('poison') else ''
    return (
        f'{poison}{method_of(results)}, {results["epochs"]} epoch(s), seed {results["seed"]}; {data}, split {split}, '
        f'{results["num_classes"]:,} classes'
    )
