"""Every script: its help, its imports, what it trains, and the way from nothing to the picture."""

import ast
import json
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT, training_options

import engine
import oeq_weighting
import train_ablation
import train_baseline
from utils import METRICS

SOURCES = {
    path.stem if path.parent == ROOT else f'{path.parent.name}.{path.stem}': ast.parse(path.read_text())
    for path in sorted([*ROOT.glob('*.py'), *ROOT.glob('support/*.py'), *ROOT.glob('study/*.py')])
}
MAINS = 'data_prepare data_rechunk export_onnx mtl_vis oeq_weighting train_ablation train_baseline train_mtl'.split()
# Each imports from earlier levels only, support from support only; study/ stands on top.
LEVELS = (
    ('dataloader_mtl', 'utils', 'optimizers'),
    ('models',),
    ('prediction',),
    ('mtl_vis',),
    ('evaluation',),
    ('engine', 'export_onnx'),
    ('train_mtl', 'train_baseline', 'train_ablation'),
    ('oeq_weighting', 'data_rechunk', 'data_prepare'),
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
    assert ' '.join(ast.get_docstring(SOURCES[name]).split()[:4]) in printed


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
    return found & set(SOURCES)


def test_imports_run_one_way():
    assert sorted(sum(LEVELS, ())) == [name for name in SOURCES if '.' not in name]
    for name in SOURCES:
        package, inner = name.split('.')[0], imports_of(name)
        allowed = set()
        if package != 'support':
            level = next((number for number, names in enumerate(LEVELS) if name in names), len(LEVELS))
            allowed = set(sum(LEVELS[:level], ()))
        assert {other for other in inner if not other.startswith(('support', package))} <= allowed, name


def test_requirements_are_ranges():
    for name in 'requirements.txt', 'requirements-dev.txt', 'study/requirements.txt', 'benchmarks/requirements.txt':
        for line in (ROOT / name).read_text().splitlines():
            assert line.startswith(('-r ', '#')) or '>=' in line and '==' not in line and '@' not in line


@pytest.mark.parametrize(
    'main, options, tasks, out',
    [
        (train_baseline.main, [], ('mask',), 'runs/baseline'),
        (train_ablation.main, ['--without', 'bbox'], ('mask', 'class'), 'runs/without_bbox'),
        (train_ablation.main, ['--without', 'class'], ('mask', 'box'), 'runs/without_class'),
    ],
)
def test_baseline_and_ablations_train_their_tasks(monkeypatch, main, options, tasks, out):
    calls = []
    monkeypatch.setattr(engine, 'train', lambda *call: calls.append(call))
    main(options)
    ((network, weighting, config),) = calls
    assert (network.tasks, tuple(weighting.weights), config.out) == (tasks, tasks, out)


def test_one_weighting_runs_when_asked_the_others_on_resume_and_all_are_in_the_table(
    shared_data, tmp_path, monkeypatch, capsys
):
    names = 'equal', '80-10-10', '70-15-15', '50-25-25', '25-50-25', '25-25-50', 'uncertainty'
    assert oeq_weighting.NAMES == names
    monkeypatch.setattr(oeq_weighting, 'NAMES', ('equal', '25-50-25', 'uncertainty'))  # one of each kind
    oeq_weighting.main(training_options(shared_data, tmp_path, '--only', 'equal', *QUICK))
    assert [path.name for path in tmp_path.iterdir()] == ['equal']
    assert capsys.readouterr().out.count('epoch 1/1') == 1
    oeq_weighting.main(training_options(shared_data, tmp_path, '--resume', *QUICK))
    printed, _, table = capsys.readouterr().out.partition('weighting  ')
    assert printed.count('epoch 1/1') == 2 and printed.index('---- 25-50-25') < printed.index('epoch 1/1')
    rows = {name: [float(number) for number in numbers] for name, *numbers in map(str.split, table.splitlines()[1:])}
    assert sorted(rows) == sorted(oeq_weighting.NAMES)
    for name, numbers in rows.items():
        metrics = json.loads((tmp_path / name / 'metrics.json').read_text())
        expected = [metrics['validation']['dice'], *(metrics['test'][key]['mean'] for key in METRICS)]
        assert numbers == pytest.approx(expected, abs=1e-4)


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


def test_all_scripts_run_in_order_with_default_paths(tmp_path, monkeypatch, run_as_script):
    """The README's way to mask.png, on synthetic pets, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    run_as_script('data_prepare', '--limit', 40, '--size', 64)
    run_as_script('data_rechunk')
    run_as_script('train_mtl', *QUICK, '--model', 'mtl_model.pt')
    run_as_script('mtl_vis', '--model', 'mtl_model.pt')
    assert {path.name for path in tmp_path.iterdir()} == {'datasets', 'runs', 'mtl_model.pt', 'mask.png'}
