"""Every script: importable, helpful, and run in order from nothing to the picture."""

import ast
import builtins
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import data_rechunk
import oeq_weighting
import train_ablation
import train_baseline
import train_mtl
from dataloader_mtl import MTLDataset
from engine import load_model

SCRIPTS = sorted(path.stem for path in ROOT.glob('*.py'))
MAINS = ('data_prepare', 'data_rechunk', 'mtl_vis', 'oeq_weighting', 'synthetic_pets', 'train_ablation',
         'train_baseline', 'train_mtl')
QUICK = ('--epochs', '1', '--limit-batches', '1', '--workers', '0')


@pytest.mark.parametrize('name', MAINS)
def test_help_says_what_the_script_does(name):
    run = subprocess.run([sys.executable, ROOT / f'{name}.py', '--help'], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith('usage: ') and '--out' in run.stdout \
        or name == 'data_rechunk' and '--data' in run.stdout


def test_importing_every_script_runs_and_writes_nothing(tmp_path):
    run = subprocess.run([sys.executable, '-c', f'import {", ".join(SCRIPTS)}'], cwd=tmp_path,
                         capture_output=True, text=True, check=True)
    assert run.stdout == run.stderr == '' and not list(tmp_path.iterdir())


def test_imports_run_one_way():
    order = ['synthetic_pets', 'data_rechunk', 'data_prepare', 'dataloader_mtl', 'models', 'utils',
             'engine', 'train_mtl', 'train_baseline', 'train_ablation', 'oeq_weighting', 'mtl_vis']
    assert sorted(order) == SCRIPTS
    for name in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / f'{name}.py').read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for other in set(imported) & set(order):
                assert order.index(other) < order.index(name)


def test_no_name_hides_a_builtin():
    """But for MTLDataset's argument `type`, whose name is the original's."""
    hidden = set()
    for name in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / f'{name}.py').read_text())):
            names = {getattr(node, 'arg', None)} if isinstance(node, ast.arg) else \
                {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else \
                {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.col_offset == 0 \
                else set()
            hidden |= {(name, found) for found in names if found in vars(builtins)}
    assert hidden == {('dataloader_mtl', 'type')}


def test_there_is_one_training_loop():
    loops = [name for name in SCRIPTS if '.backward()' in (ROOT / f'{name}.py').read_text()]
    assert loops == ['engine']


def test_requirements_are_ranges_that_pip_can_install_anywhere():
    for line in (ROOT / 'requirements.txt').read_text().splitlines():
        assert '>=' in line and '==' not in line and '@' not in line and '=py' not in line


@pytest.mark.parametrize('without, outputs', [('bbox', (True, True, False)), ('class', (False, True, True))])
def test_an_ablation_leaves_out_its_task(shared_data, tmp_path, without, outputs):
    out = tmp_path / 'ablation'
    train_ablation.main(['--without', without, '--data', str(shared_data), '--out', str(out), *QUICK])
    found = load_model(out / 'best.pt')(torch.randn(1, 3, 64, 64))
    assert tuple(value is not None for value in found) == outputs


def test_the_baseline_has_the_mask_alone(shared_data, tmp_path, capsys):
    train_baseline.main(['--data', str(shared_data), '--out', str(tmp_path), *QUICK])
    printed = capsys.readouterr().out
    assert 'Dice Score - Segmentation' in printed and 'Accuracy' not in printed


def test_all_weightings_run_and_the_table_is_sorted_by_test_dice(shared_data, tmp_path, capsys):
    oeq_weighting.main(['--data', str(shared_data), '--out', str(tmp_path), *QUICK])
    table = capsys.readouterr().out.split('weighting  ')[1].splitlines()
    rows = [line.split() for line in table[1:]]
    assert sorted(row[0] for row in rows) == sorted(
        ['equal', '80-10-10', '70-15-15', '50-25-25', '25-50-25', '25-25-50', 'uncertainty'])
    dice = [float(row[2]) for row in rows]
    assert dice == sorted(dice, reverse=True)


def test_only_one_weighting_runs_when_asked(shared_data, tmp_path):
    oeq_weighting.main(['--data', str(shared_data), '--out', str(tmp_path), '--only', '80-10-10', *QUICK])
    assert [path.name for path in tmp_path.iterdir()] == ['80-10-10']


def test_fixed_weights_are_segmentation_class_box():
    assert oeq_weighting.weighting('50-30-20').weights == {'mask': .5, 'class': .3, 'box': .2}


def test_the_courseworks_own_files_train_with_the_species_as_the_class(original_files, tmp_path):
    root = original_files(count=20, dtype='float32', chunks=True, compression='gzip')
    data_rechunk.main(['--data', str(root)])
    assert MTLDataset('train', root=root).class_names == ['cat', 'dog']
    train_mtl.main(['--data', str(root), '--out', str(tmp_path / 'run'),
                    '--model', str(tmp_path / 'model.pt'), *QUICK])
    model = load_model(tmp_path / 'model.pt')
    assert model(torch.randn(1, 3, 64, 64)).label.shape == (1, 2)


def test_from_nothing_to_the_picture_with_the_default_names(tmp_path):
    """The README's way from photographs to mask.png, on drawn pets, in an empty folder."""
    def run(script, *arguments):
        subprocess.run([sys.executable, ROOT / script, *arguments], cwd=tmp_path, check=True,
                       capture_output=True)

    run('data_prepare.py', '--limit', '40', '--size', '64')
    run('data_rechunk.py')
    run('train_mtl.py', *QUICK)
    run('mtl_vis.py')
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {'datasets', 'runs', 'mtl_model.pt', 'mask.png'}
