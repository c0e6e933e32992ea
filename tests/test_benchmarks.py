"""The benchmarks: the reference network is the study's, and every script explains itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / 'benchmarks'
sys.path.insert(0, str(BENCHMARKS))

import common
from reference import ReferenceNet, train_reference


def test_the_reference_has_the_parameters_of_the_study():
    assert sum(p.numel() for p in ReferenceNet(n_classes=2).parameters()) == 3_673_555


def test_the_reference_learns_from_whatever_labels_there_are():
    torch.manual_seed(0)
    model = ReferenceNet()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask, bbox = torch.ones(2, 1, 256, 256), torch.tensor([[0.1, 0.2, 0.5, 0.6], [torch.nan] * 4])
    mask[1] = torch.nan
    batch = torch.randn(2, 3, 256, 256), bbox, torch.tensor([1, -1]), mask
    assert list(train_reference(model, [batch])) == [2]
    moved = {name.split('.')[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {'contracting', 'expanding', 'label', 'bbox'}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', sorted(path.name for path in BENCHMARKS.glob('*.py')
                                        if path.stem not in ('common', 'reference')))
def test_every_benchmark_has_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [name, '--help'])
    module = __import__(name.removesuffix('.py'))
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0 and 'The ratio:' in capsys.readouterr().out


def test_the_last_line_is_the_ratio_alone(tmp_path, capsys):
    common.finish(12.345, {'ours': 2}, tmp_path / 'figures.json')
    assert capsys.readouterr().out == 'ratio 12.3\n'
    assert json.loads((tmp_path / 'figures.json').read_text())['ratio'] == 12.345


def short_form(name, *options):
    """What a benchmark prints that runs for some seconds only."""
    done = subprocess.run([sys.executable, BENCHMARKS / f'{name}.py', *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_few_mutants_of_each_format_end_with_a_result_or_one_line():
    printed = short_form('mutants', '--count', '36', '--seed', '1')
    assert printed.splitlines()[-2].startswith('36 mutants, seed 1: 0 did not end well'), printed
    assert printed.endswith('ratio 1\n')


def test_a_few_kills_of_each_script_lose_nothing():
    printed = short_form('kills', '--count', '3', '--seed', '1')
    assert printed.splitlines()[-2] == '3 kills, seed 1: 0 losses', printed
