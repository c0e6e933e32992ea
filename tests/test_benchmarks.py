"""The benchmarks: what they compare with is what it says, and they compute what they print."""

import importlib
import shutil
import sys
from pathlib import Path

import common
import h5py
import loader
import numpy as np
import pytest
import rechunk
import robustness
import torch
import train_step
import tricks
from conftest import ROOT
from reference import OriginalRun, ReferenceNet, SmpUNet

import data_prepare
import data_rechunk
from dataloader_mtl import MTLDataset, load_splits
from engine import Config, train_one_epoch
from models import UNet, load_model, model_content
from support.checkpoint import save_checkpoint
from support.cli import InputError
from utils import WeightedLoss


@pytest.fixture(scope='session')
def large_data(tmp_path_factory):
    """Pets at 256 x 256, which the original's heads need."""
    root = tmp_path_factory.mktemp('large')
    data_prepare.main(['--limit', '12', '--size', '256', '--split', '34-33-33', '--out', str(root)])
    data_rechunk.main(['--data', str(root)])
    return root


# ---- every script


@pytest.mark.parametrize('name', sorted({path.stem for path in (ROOT / 'benchmarks').glob('*.py')}))
def test_every_benchmark_has_help(name, capsys):
    module = importlib.import_module(name)
    if hasattr(module, 'main'):
        with pytest.raises(SystemExit) as stopped:
            module.main(['--help'])
        assert stopped.value.code == 0 and f'python benchmarks/{name}.py' in capsys.readouterr().out


def test_measures_take_turns():
    calls = []
    values = common.in_turns({name: lambda name=name: calls.append(name) or len(calls) for name in 'ab'}, 2)
    assert calls == ['a', 'b', 'a', 'b'] and values == {'a': [1, 3], 'b': [2, 4]}
    assert common.with_range([1, 9, 2], 1) == '2.0 (1.0-9.0)'
    assert common.median_ratio([1, 9, 4], [1, 3, 2]) == 2


def test_pets_are_drawn_where_no_data_is_given(capsys):
    with common.prepared(None, 40, size=64) as data:
        assert load_splits(data, ['mask'])['train'].dataset.split.image_size == (64, 64)
    assert not Path(data).exists() and capsys.readouterr().out == ''


# ---- what is compared with


def test_the_reference_has_the_parameters_of_the_original():
    assert sum(p.numel() for p in ReferenceNet(n_classes=2).parameters()) == 3_673_555


def test_the_original_learns_every_task_from_images_as_they_are_stored(large_data):
    torch.manual_seed(0)
    config = Config(large_data, device='cpu', batch_size=2, steps=1)
    run = OriginalRun(ReferenceNet, WeightedLoss.equal(ReferenceNet.tasks), config)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    train_one_epoch(run)
    moved = {name.split('.')[0] for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {'encoder', 'expanding', 'label', 'bbox'}
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert run.splits['train'].dataset.transform is None


def test_without_smp_a_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, 'segmentation_models_pytorch', None)
    with pytest.raises(InputError, match='missing; pip install -r benchmarks/requirements.txt'):
        SmpUNet()


# ---- train_step.py and loader.py


def test_layout_and_precision_change_nothing_but_the_rounding(large_data):
    plain, channels_last, _, bfloat16, _ = train_step.WATERFALL.values()  # allocator and network are left out
    config = Config(large_data, device='cpu', batch_size=1)
    weight = train_step.make_run(channels_last, config).model.encoder[1][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    first, *others = (train_step.make_step(line, (256, 256), config)() for line in (plain, channels_last, bfloat16))
    assert others == [pytest.approx(first, rel=1e-4), pytest.approx(first, rel=0.03)]


def test_the_waterfall_compares_rounds_and_weights_sizes():
    first, *_, last = train_step.WATERFALL
    one, two = (64, 64), (128, 128)
    sizes = {first: {one: 1}, last: {one: 1, two: 3}, 'ours, only the mask': {one: 1}}
    seconds = {
        (first, one): [4.0, 8.0, 4.0],
        (last, one): [1.0, 1.0, 1.0],
        (last, two): [2.0, 4.0, 2.0],
        ('ours, only the mask', one): [1.0, 1.0, 1.0],
    }
    rows, speeds = train_step.make_rows(sizes, seconds, batch_size=7)
    assert [row[1:] for row in rows] == [
        ['1.8 (0.9-1.8)', '', '1.00'],
        ['4.0 (2.2-4.0)', '2.29', '2.29'],
        ['7.0 (7.0-7.0)', '', '4.00'],
    ]
    assert speeds[first] == [1.75, 0.875, 1.75]


@pytest.mark.parametrize(
    'name, muon, rates',
    [('ours, only the mask', True, {0.01}), ('ours, only the mask, ImageNet encoder', False, {0.003, 0.0006})],
)
def test_ours_trains_as_the_scripts_do(shared_data, full_networks, name, muon, rates):
    run = train_step.make_run(train_step.LINES[name], Config(shared_data, device='cpu'))
    assert isinstance(run.model, UNet) and any(group['muon'] for group in run.optimizer.param_groups) == muon
    assert {round(group['max_lr'], 6) for group in run.optimizer.param_groups} == rates


def test_augmentation_one_by_one_gives_batches_as_ours_does(shared_data):
    (batch,) = loader.make_batches(shared_data, loader.one_by_one, count=32)
    assert batch.image.shape == (32, 3, *loader.SIZE) and batch.image.dtype == torch.float32
    assert batch.mask.shape == (32, 1, *loader.SIZE) and set(batch.mask.unique().tolist()) == {0, 1}
    known = ~batch.bbox.isnan().any(dim=1)
    assert known.sum() > 16 and (batch.bbox[known] >= 0).all() and (batch.bbox[known] <= 1).all()


# ---- rechunk.py


@pytest.mark.skipif(not shutil.which('h5repack'), reason="h5repack is in Debian's hdf5-tools")
def test_h5repack_ends_with_one_image_a_chunk_as_ours_does(tmp_path):
    block = np.arange(2 * 64 * 64 * 3).astype(np.uint8).reshape(2, 64, 64, 3)
    rechunk.write_source(tmp_path / 'source.h5', block, 4, {'chunks': (2, 32, 32, 3)})
    assert rechunk.seconds(rechunk.repack, tmp_path / 'source.h5', tmp_path / 'train') > 0
    with h5py.File(tmp_path / 'train' / 'target.h5') as file:
        assert file['images'].chunks == (1, 64, 64, 3) and (file['images'][:2] == block).all()


# ---- tricks.py


def test_as_many_steps_as_fit(monkeypatch):
    monkeypatch.setattr(tricks, 'make_run', lambda line, config: config)
    monkeypatch.setattr(tricks, 'train_epoch', lambda config: 0.5 * config.steps)
    assert tricks.steps_that_fit(None, Config(epochs=40), seconds=600) == 600 / 0.5 / 40


def test_differences_to_the_whole_recipe_share_their_spread():
    values = {tricks.WHOLE: (0.5, 0.6), 'AdamW for all': (0.6, 0.7), 'no poor light': (0.5, 0.7)}
    rows = [
        {'variant': name, 'seed': seed, 'steps': steps, **dict.fromkeys(tricks.METRICS, value)}
        for (name, pair), steps in zip(values.items(), (10, 5, 10))
        for seed, value in enumerate(pair)
    ]
    whole, adamw, light = tricks.table_rows(rows)
    assert whole[:4] == [tricks.WHOLE, '2', '1.00', '0.550']
    # What is left: 1/60 and -1/60 of the first two, -1/30 and 1/30 of the third; 4.303 (2 x 0.00333 / 2 / 2)^0.5.
    assert adamw[:4] == ['AdamW for all', '2', '0.50', '+0.100 ± 0.176'] and light[3] == '+0.050 ± 0.176'
    assert tricks.table_rows(rows[::2])[1][3] == '+0.100 ± nan'  # one seed


@pytest.mark.slow
def test_variants_take_the_steps_that_were_measured_and_finished_runs_stay(shared_data, tmp_path, capsys):
    options = ['--data', str(shared_data), '--minutes', '0.001', '--out', str(tmp_path)]
    options += ['--only', tricks.WHOLE, 'no poor light', '--seeds']
    (tmp_path / 'scratch-steps.csv').write_text(f'variant,steps\n{tricks.WHOLE},1\n')
    tricks.main([*options, '1'])
    rows = tricks.read_rows(tmp_path / 'scratch.csv')
    assert {(row['variant'], row['seed']) for row in rows} == {(tricks.WHOLE, 0), ('no poor light', 0)}
    assert len(tricks.read_rows(tmp_path / 'scratch-steps.csv')) == 2 and rows[0]['steps'] == 1
    capsys.readouterr()
    tricks.main([*options, '1'])
    assert tricks.read_rows(tmp_path / 'scratch.csv') == rows and 'no poor light' in capsys.readouterr().out


# ---- robustness.py


def test_four_images_are_in_one_and_each_comes_first_once():
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 8) * 51
    masks = (images[:, :1] > 60).to(torch.uint8)
    new, boxes, new_masks = robustness.four_in_one(images, torch.full((4, 4), 4.0), masks)
    assert new.shape == images.shape and torch.equal(boxes, torch.full((4, 4), 2.0))
    for row in range(4):
        quarters = [new[row, 0, y, x].item() for y in (1, 6) for x in (1, 6)]
        assert quarters == pytest.approx([(row - back) % 4 * 0.2 for back in range(4)])
    assert torch.equal(new_masks, (new[:, :1] > 0.3).to(torch.uint8))


def test_robustness_is_that_of_the_split_and_of_changed_copies(shared_data, model_path, tmp_path, capsys):
    model, path = load_model(model_path), tmp_path / 'model.pt'
    with torch.no_grad():  # a network that has learned nothing marks every pixel, or none
        model.decoder.logits.bias -= model(MTLDataset('val', root=shared_data)[[0]].image).mask.median()
    save_checkpoint(path, model_content(model, model.class_names, model.class_species, model.image_size))
    found = robustness.robustness(load_model(path), shared_data, 'val')
    assert {name for name, _ in found} == robustness.COPIES.keys()
    assert found['four in one', True].keys() == {'Dice'} and found['small', True].keys() == set(robustness.COLUMNS)
    dice = [np.mean(columns['Dice']) for (_, zoom), columns in found.items() if not zoom]
    assert len(set(dice)) == len(dice)
    robustness.main(['--data', str(shared_data), '--model', str(path)])
    *rows, ratio = capsys.readouterr().out.splitlines()[3:]
    assert [float(row.partition('  ')[2].split()[0]) for row in rows[::2]] == pytest.approx(dice, abs=0.0006)
    assert ratio.startswith('ratio ')
