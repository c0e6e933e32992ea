"""Every script: its help, its imports, what it trains, and the way from nothing to the picture."""

import ast
import json
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, training_options

import oeq_weighting
import train_ablation
import train_baseline
from models import load_model
from support.cli import InputError
from utils import METRICS

SOURCES = {
    path.stem if path.parent == ROOT else f'{path.parent.name}.{path.stem}': ast.parse(path.read_text())
    for path in sorted([*ROOT.glob('*.py'), *ROOT.glob('support/*.py'), *ROOT.glob('study/*.py')])
}
SCRIPTS = [name for name in SOURCES if '.' not in name]
MAINS = 'data_prepare data_rechunk export_onnx mtl_vis oeq_weighting train_ablation train_baseline train_mtl'.split()
# Each imports from earlier levels only, support from support only; study/ stands on top.
LEVELS = (
    ('data_rechunk', 'data_prepare'),
    ('dataloader_mtl', 'utils', 'optimizers'),
    ('models',),
    ('evaluation', 'prediction'),
    ('engine',),
    ('train_mtl', 'train_baseline', 'train_ablation', 'mtl_vis', 'export_onnx'),
    ('oeq_weighting',),
)
QUICK = ('--epochs', 1, '--limit-batches', 1)


@pytest.fixture
def run_as_script(monkeypatch):
    """Function that runs a script as `python NAME.py ARGUMENTS` does, in this process."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, arguments)])
        runpy.run_path(str(ROOT / f'{name}.py'), run_name='__main__')

    return run


@pytest.mark.parametrize('name', MAINS)
def test_help(name, run_as_script, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_as_script(name, '--help')
    printed = ' '.join(capsys.readouterr().out.split())  # without line breaks
    assert stopped.value.code == 0 and printed.startswith(f'usage: {name}.py ')
    summary = ' '.join(ast.get_docstring(SOURCES[name]).split()[:4])
    assert summary in printed
    assert ('--data' if name == 'data_rechunk' else '--out') in printed


def test_imports_print_and_write_nothing_and_load_torch_only_where_it_is_needed(tmp_path):
    code = f"""
import sys
import support.cli, support.files, support.hdf5, support.synthetic_pets, data_rechunk, data_prepare
assert 'torch' not in sys.modules
import {', '.join(name for name in SOURCES if name != 'study.__main__')}
assert 'timm' not in sys.modules
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == '' and not list(tmp_path.iterdir()), done.stderr


def imports_of(name):
    """The project's modules that a module imports, anywhere in its text."""
    found = set()
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return found


def test_imports_run_one_way():
    assert sorted(sum(LEVELS, ())) == SCRIPTS
    for name in SOURCES:
        inner = imports_of(name) & set(SOURCES)
        if name.startswith('support'):
            assert all(other.startswith('support') for other in inner), name
        else:
            level = next((number for number, names in enumerate(LEVELS) if name in names), len(LEVELS))
            allowed = set(sum(LEVELS[:level], ()))
            assert {other for other in inner if not other.startswith(('support', name.split('.')[0]))} <= allowed, name
    for name in 'support.cli', 'support.files', 'support.hdf5':
        assert not any(other.split('.')[0] in ('torch', 'torchvision') for other in imports_of(name)), name
    assert not imports_of('support.cli') & set(SOURCES)
    for name in 'mtl_vis', 'prediction', 'export_onnx':
        assert not imports_of(name) & {'engine', 'data_prepare', 'data_rechunk'}, name
    for name in 'mtl_vis', 'prediction':  # export_onnx.py --test compares the file with the model on a test split
        assert 'evaluation' not in imports_of(name)


def test_there_is_one_training_loop():
    assert [name for name, tree in SOURCES.items() if '.backward()' in ast.unparse(tree)] == ['engine']


def test_requirements_are_ranges():
    for name in 'requirements.txt', 'requirements-dev.txt', 'study/requirements.txt', 'benchmarks/requirements.txt':
        for line in (ROOT / name).read_text().splitlines():
            assert line.startswith(('-r ', '#')) or '>=' in line and '==' not in line and '@' not in line


@pytest.mark.parametrize('without, outputs', [('bbox', (True, True, False)), ('class', (False, True, True))])
def test_ablation_leaves_out_its_task(shared_data, tmp_path, without, outputs):
    train_ablation.main(['--without', without, *training_options(shared_data, tmp_path, *QUICK)])
    found = load_model(tmp_path / 'best.pt')(torch.randn(1, 3, 64, 64))
    assert tuple(value is not None for value in found) == outputs


def test_baseline_has_only_the_mask(shared_data, tmp_path, capsys):
    train_baseline.main(training_options(shared_data, tmp_path, *QUICK))
    printed = capsys.readouterr().out
    assert 'Dice Score - Segmentation' in printed and 'Accuracy' not in printed


def test_weightings_run_and_are_in_the_table(shared_data, tmp_path, capsys, monkeypatch):
    names = 'equal', '80-10-10', '70-15-15', '50-25-25', '25-50-25', '25-25-50', 'uncertainty'
    assert oeq_weighting.NAMES == names
    names = 'equal', '25-50-25', 'uncertainty'  # one of each kind
    monkeypatch.setattr(oeq_weighting, 'NAMES', names)
    oeq_weighting.main(training_options(shared_data, tmp_path, *QUICK))
    rows = [line.split() for line in capsys.readouterr().out.split('weighting  ')[1].splitlines()[1:]]
    assert sorted(row[0] for row in rows) == sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    for name, *numbers in rows:
        metrics = json.loads((tmp_path / name / 'metrics.json').read_text())
        expected = [metrics['validation']['dice'], *(metrics['test'][key]['mean'] for key in METRICS)]
        assert [float(number) for number in numbers] == pytest.approx(expected, abs=1e-4)


def test_weightings_are_ranked_by_validation_dice_whatever_the_test_says(capsys):
    rows = {
        'without masks': {'validation': {}, 'test': {}},
        'second': {'validation': {'dice': 0.8}, 'test': {'dice': {'mean': 0.7}}},
        'first': {'validation': {'dice': 0.9}, 'test': {'dice': {'mean': 0.1}, 'accuracy': {'mean': 0.2}}},
    }
    oeq_weighting.print_table(rows)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line[:14].strip() for line in lines] == ['first', 'second', 'without masks']
    assert lines[0].split()[1:] == ['0.9000', '0.1000', 'nan', '0.2000', 'nan']


@pytest.mark.parametrize('also', [(), ('metrics.json',)], ids=['unfinished', 'finished'])
def test_folder_of_weightings_is_not_trained_over(shared_data, tmp_path, also):
    """Stopped and resumed, it would hold runs of other options."""
    (tmp_path / 'uncertainty').mkdir()
    for name in 'last.pt', *also:
        (tmp_path / 'uncertainty' / name).touch()
    with pytest.raises(InputError, match='uncertainty: holds a run; --resume'):
        oeq_weighting.main(training_options(shared_data, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ['uncertainty']


def test_one_weighting_runs_when_asked_and_the_others_on_resume(shared_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(oeq_weighting, 'NAMES', ('equal', 'uncertainty'))
    oeq_weighting.main(training_options(shared_data, tmp_path, '--only', 'equal', *QUICK))
    first = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['equal']
    oeq_weighting.main(training_options(shared_data, tmp_path, '--resume', *QUICK))
    second = capsys.readouterr().out
    assert first.count('epoch 1/1') == second.count('epoch 1/1') == 1  # equal is only tested again
    assert second.index('---- uncertainty') < second.index('epoch 1/1')


def test_all_scripts_run_in_order_with_default_paths(tmp_path, monkeypatch, run_as_script):
    """The README's way to mask.png, on synthetic pets, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    run_as_script('data_prepare', '--limit', 40, '--size', 64)
    run_as_script('data_rechunk')
    run_as_script('train_mtl', *QUICK, '--model', 'mtl_model.pt')
    run_as_script('mtl_vis', '--model', 'mtl_model.pt')
    assert {path.name for path in tmp_path.iterdir()} == {'datasets', 'runs', 'mtl_model.pt', 'mask.png'}
