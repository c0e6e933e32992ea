"""The benchmarks: the reference network is the study's, and every script explains itself."""

import importlib
import json

import common
import pytest
import torch
from conftest import ROOT
from reference import ReferenceNet, train_reference

from dataloader_mtl import Sample


def test_the_reference_has_the_parameters_of_the_study():
    assert sum(p.numel() for p in ReferenceNet(n_classes=2).parameters()) == 3_673_555


def test_the_reference_learns_from_whatever_labels_there_are():
    torch.manual_seed(0)
    model = ReferenceNet()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask, bbox = torch.ones(2, 1, 256, 256), torch.tensor([[0.1, 0.2, 0.5, 0.6], [torch.nan] * 4])
    mask[1] = torch.nan
    batch = Sample(torch.randn(2, 3, 256, 256), bbox, torch.tensor([1, -1]), mask)
    assert list(train_reference(model, [batch])) == [2]
    moved = {name.split('.')[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {'contracting', 'expanding', 'label', 'bbox'}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    'name',
    sorted({path.stem for path in (ROOT / 'benchmarks').glob('*.py')} - {common.__name__, ReferenceNet.__module__}),
)
def test_every_benchmark_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main(['--help'])
    assert stopped.value.code == 0 and 'The ratio:' in capsys.readouterr().out


def test_the_last_line_is_the_ratio_alone(tmp_path, capsys):
    common.finish(12.345, {'ours': 2}, tmp_path / 'measured.json')
    assert capsys.readouterr().out == 'ratio 12.3\n'
    assert json.loads((tmp_path / 'measured.json').read_text())['ratio'] == 12.345


def test_code_in_another_process_finds_the_scripts():
    seconds, memory = common.in_python('import common, utils\nprint(0.5, common.peak_megabytes())').split()
    assert float(seconds) == 0.5 and float(memory) > 1
