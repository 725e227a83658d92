"""The benchmarks run, and say what is wrong."""

from __future__ import annotations

from timm_rld.__main__ import main


def test_the_loss_benchmark_prints_a_row_for_each_criterion_and_shape(capsys):
    argv = ['bench', 'loss', '--no-compile', '--repeats', '1', '--shapes', '4x5', '--criteria', 'rld', 'dkd']
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert [f'| {n} |' in out for n in ('cross-entropy', 'kd', 'rld', 'dkd', 'la')] == [True] * 4 + [False]
    for wrong, message in ((['--shapes', '4'], 'BATCHxCLASSES'), (['--criteria', 'rdl'], "did you mean 'rld'")):
        assert main([*argv, *wrong]) != 0
        assert message in capsys.readouterr().err
