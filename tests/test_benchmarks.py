"""The benchmarks: what they compare with is what it says, and they compute what they print."""

import csv
import importlib
import json
import shutil
import sys
from types import SimpleNamespace

import common
import curves
import h5py
import loader
import numpy as np
import pytest
import rechunk
import steps
import time_to_dice
import torch
import train_step
from conftest import ROOT
from reference import ReferenceNet, SmpUNet, StudyDataset, StudyRun, import_smp, write_study_files
from torch import nn

from dataloader_mtl import MTLDataset, RandomCropFlip, Sample, load_splits
from models import UNet
from support.cli import InputError

HELPERS = {'common', 'curves', 'reference', 'steps'}
CPU = torch.device('cpu')
PETS = SimpleNamespace(class_names=['cat', 'dog'], class_species=['cat', 'dog'], image_size=(256, 256))


def draw_batch(count=2):
    """Images of 256 x 256; the last has no label."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, 3, 256, 256, generator=generator)
    bbox = torch.tensor([0.1, 0.2, 0.5, 0.6]).repeat(count, 1)
    mask = (image[:, :1] > 0).float()
    bbox[-1], mask[-1] = torch.nan, torch.nan
    return Sample(image, bbox, torch.tensor([1] * (count - 1) + [-1]), mask)


# ---- every script


@pytest.mark.parametrize('name', sorted({path.stem for path in (ROOT / 'benchmarks').glob('*.py')} - HELPERS))
def test_every_benchmark_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main(['--help'])
    assert stopped.value.code == 0 and 'The ratio:' in capsys.readouterr().out


def test_the_last_line_is_the_ratio_alone(tmp_path, capsys):
    common.finish(12.345, {'ours': 2}, tmp_path / 'measured.json')
    common.finish(None, {}, None)
    assert capsys.readouterr().out == 'ratio 12.3\nratio none\n'
    assert json.loads((tmp_path / 'measured.json').read_text())['ratio'] == 12.345


def test_code_in_another_process_finds_the_scripts():
    seconds, memory = common.in_python('import common, utils\nprint(0.5, common.peak_megabytes())').split()
    assert float(seconds) == 0.5 and float(memory) > 1


def test_measures_take_turns():
    calls = []
    values = common.in_turns({name: lambda name=name: calls.append(name) or len(calls) for name in 'ab'}, 2)
    assert calls == ['a', 'b', 'a', 'b'] and values == {'a': [1, 3], 'b': [2, 4]}
    assert common.with_range([1, 9, 2], 1) == '2.0 (1.0-9.0)'


# ---- what is compared with


def test_the_reference_has_the_parameters_of_the_study():
    assert sum(p.numel() for p in ReferenceNet(n_classes=2).parameters()) == 3_673_555


def test_the_reference_learns_from_whatever_labels_there_are():
    torch.manual_seed(0)
    run = StudyRun(ReferenceNet(), PETS, CPU)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    steps.take_step(run, draw_batch())
    moved = {name.split('.')[0] for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {'encoder', 'expanding', 'label', 'bbox'}
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_the_reference_with_the_mask_alone_takes_the_sizes_of_the_recipe():
    outputs = ReferenceNet(tasks=('mask',))(torch.zeros(2, 3, 64, 96), decode=torch.tensor([False, True]))
    assert outputs.mask.shape == (1, 1, 64, 96) and outputs.label is None and outputs.bbox is None


def test_smp_predicts_the_mask_alone():
    pytest.importorskip('segmentation_models_pytorch')
    outputs = SmpUNet()(torch.zeros(2, 3, 64, 96))
    assert outputs.mask.shape == (2, 1, 64, 96) and outputs.label is None and outputs.bbox is None


def test_without_smp_a_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, 'segmentation_models_pytorch', None)
    with pytest.raises(InputError, match='missing; pip install -r benchmarks/requirements.txt'):
        import_smp()


def test_the_way_of_the_study_reads_the_same_samples(shared_data, tmp_path):
    dataset = MTLDataset('train', root=shared_data)
    write_study_files(dataset.folder, [3, 5], tmp_path)
    image, _, _, mask = StudyDataset(tmp_path, 2)[1]
    torch.testing.assert_close(image, dataset[5].image)
    assert torch.equal(mask, dataset[5].mask)


# ---- train_step.py


def test_layout_and_precision_change_nothing_but_the_rounding():
    totals, batch = {}, draw_batch()
    names = list(train_step.WATERFALL)[:-1]  # the last is another network
    for name in names:
        line = train_step.WATERFALL[name]
        run = steps.make_run(line, PETS)
        weight = run.model.encoder[1][0].weight
        assert weight.is_contiguous(memory_format=steps.memory_format(line)), name
        image = batch.image.contiguous(memory_format=steps.memory_format(line))
        with torch.no_grad():
            totals[name] = run.objective(batch._replace(image=image))[0].item()
    first, *exact, rounded = (totals[name] for name in names)
    assert exact == pytest.approx([first] * len(exact), rel=1e-4) and rounded == pytest.approx(first, rel=0.03)


def test_a_batch_keeps_the_share_of_masks(shared_data):
    part = load_splits(shared_data, ['mask'])['train']
    batch = steps.make_batch(steps.OURS, part, (128, 64), 8, 0.25)
    assert batch.image.shape == (8, 3, 128, 64) and batch.image.is_contiguous(memory_format=torch.channels_last)
    assert (~batch.mask.isnan()).flatten(1).any(dim=1).tolist() == [True] * 2 + [False] * 6


def test_flops_of_convolutions(monkeypatch):
    layers = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ConvTranspose2d(8, 2, 2, 2))
    monkeypatch.setattr(steps, 'take_step', lambda run, batch: run(batch).sum().backward())
    forward = 2 * 100 * (4 * 8 + 8 * 9 + 8 * 2 * 4)
    # The first layer needs no gradient of the image.
    assert steps.convolution_flops(layers, torch.randn(1, 4, 10, 10)) == 3 * forward - 2 * 100 * 4 * 8


def test_the_waterfall_compares_rounds_and_weights_sizes():
    first, *_, last = train_step.WATERFALL
    slow, fast = (train_step.Case(name, (64, 64), 1.0) for name in (first, last))
    lines = {'reference': {slow: 1}, 'ours': {fast: 1}, 'both': {slow: 1, fast: 3}}
    seconds = {slow: [4.0, 8.0, 4.0], fast: [1.0, 1.0, 1.0]}
    rows, results = train_step.make_rows(lines, seconds, {slow: 8e9, fast: 4e9}, [4e9, 8e9], batch_size=4)
    of_peak = '50%' if train_step.WATERFALL[last].bfloat16 else '100%'
    assert [row[1:] for row in rows] == [
        ['1.0 (0.5-1.0)', '', '1.00', '2.0', '50%'],
        ['4.0 (4.0-4.0)', '4.00', '4.00', '1.0', of_peak],
        ['2.3 (1.5-2.3)', '0.57', '2.29', '1.2', '71%'],
    ]
    assert results['ours']['to_reference'] == 4


# ---- loader.py


def test_the_kernels_read_what_the_dataset_reads(shared_data):
    dataset = MTLDataset('train', root=shared_data)
    kernels = loader.Kernels(dataset, [4, 2])
    (batch,) = kernels.batches
    assert batch.shape == (2, 3, *loader.SIZE) and len(kernels.mask_windows) == 2
    with h5py.File(dataset.folder / 'images.h5') as file:
        np.testing.assert_array_equal(kernels.images, file['images'][()][[4, 2]])


@pytest.mark.parametrize('transform', [RandomCropFlip(*loader.SIZE), loader.V2])
def test_both_augmentations_give_batches_of_the_same_shape(shared_data, transform):
    dataset = MTLDataset('train', root=shared_data)
    (batch,) = loader.augmented_loader(dataset, [1, 2, 3], transform)
    assert batch.image.shape == (3, 3, *loader.SIZE) and batch.mask.shape == (3, 1, *loader.SIZE)


def test_the_chosen_samples_are_rechunked(shared_data, tmp_path):
    old = MTLDataset('train', root=shared_data)
    new = loader.write_split(old.folder, [3, 5], tmp_path, checksums=True)
    assert len(new) == 2 and torch.equal(new[1].image, old[5].image)
    loader.memmap_copies(kernels := loader.Kernels(new, [1, 0]), tmp_path)()
    np.testing.assert_array_equal(kernels.images[0], loader.Kernels(old, [5]).images[0])


# ---- rechunk.py


def test_rechunking_is_measured_with_and_without_h5repack(tmp_path):
    (tmp_path / 'train').mkdir()
    source, block = tmp_path / 'source.h5', np.arange(2 * 64 * 64 * 3, dtype=np.uint8).reshape(2, 64, 64, 3)
    rechunk.write_source(source, block, 4, {'chunks': (2, 32, 32, 3)})
    assert list(rechunk.measure(source, tmp_path / 'train', 1, with_repack=False)) == [rechunk.OURS]
    if shutil.which('h5repack') and shutil.which('h5diff') and shutil.which('sync'):
        seconds = rechunk.measure(source, tmp_path / 'train', 1, with_repack=True)
        assert seconds[rechunk.COMPARED] > seconds[rechunk.REPACK]
        with h5py.File(tmp_path / 'train' / 'target.h5') as file:
            assert file['images'].chunks == (1, 64, 64, 3)


# ---- time_to_dice.py


def time_to_dice_options(data, out, *more):
    short = {'--minutes': 0.01, '--points': 2, '--seeds': 1, '--workers': 0, '--out': out, '--data': data}
    return [str(each) for option in short.items() for each in option] + ['--only', 'masks', *more]


def test_a_finished_run_is_skipped_and_the_table_says_not_reached(shared_data, tmp_path, capsys, monkeypatch):
    options = time_to_dice_options(shared_data, tmp_path)
    time_to_dice.main(options)
    first = (tmp_path / 'curves.csv').read_bytes()
    with open(tmp_path / 'curves.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert {row['contender'] for row in rows} == {'masks'} and all(0 <= float(row['dice']) <= 1 for row in rows)
    printed = capsys.readouterr().out
    assert 'not reached' in printed and 'a mask of all ones' in printed and printed.endswith('ratio none\n')
    trained = []
    monkeypatch.setattr(time_to_dice, 'train_curve', lambda *run: trained.append(run[2]) or [(0.5, 16, 0.9)])
    time_to_dice.main(options)
    assert not trained and (tmp_path / 'curves.csv').read_bytes() == first
    time_to_dice.main([*options, '--seeds', '2'])
    assert trained == [1] and (tmp_path / 'curves.csv').read_bytes().startswith(first)
    assert (tmp_path / 'time_to_dice.png').stat().st_size and 'median' in capsys.readouterr().out


def test_the_first_seed_of_all_comes_first_and_the_reference_has_three_rates():
    args = SimpleNamespace(seeds=2, seeds_of_others=1, seed=5, only=['reference', 'masks'], rates=[0.1, 0.2, 0.3])
    assert list(time_to_dice.planned(args)) == [
        ('reference', 0.1, 5),
        ('reference', 0.2, 5),
        ('reference', 0.3, 5),
        ('masks', 0.003, 5),
        ('masks', 0.003, 6),
    ]


def test_the_steps_of_a_run_are_shared_as_in_the_recipe():
    ours = time_to_dice.size_steps(time_to_dice.CONTENDERS['masks'], 100, (256, 256))
    assert ours == {(96, 96): 30, (128, 128): 35, (192, 192): 35}
    imagenet = time_to_dice.size_steps(time_to_dice.CONTENDERS['masks-imagenet'], 100, (256, 256))
    assert imagenet == {(192, 192): 100}
    assert time_to_dice.size_steps(time_to_dice.CONTENDERS['study'], 100, (256, 256)) == {(256, 256): 100}


def test_ours_trains_as_train_baseline_does(full_networks):
    contender = time_to_dice.CONTENDERS['masks']
    run = time_to_dice.make_run(contender, 0.003, PETS, 100)
    assert isinstance(run.model, UNet) and contender.batch_size == 32
    assert {group['muon'] for group in run.optimizer.param_groups} == {True, False}


def test_ours_with_the_imagenet_encoder_trains_as_the_recipe_says():
    run = time_to_dice.make_run(time_to_dice.CONTENDERS['masks-imagenet'], 0.003, PETS, 100)
    assert not run.model.encoder.features.conv_stem.weight.requires_grad
    groups = run.optimizer.param_groups
    assert [group['max_lr'] for group in groups] == pytest.approx([0.0006, 0.0006, 0.003, 0.003])
    assert not any(group['muon'] for group in groups)


def test_times_are_medians_over_the_seeds_of_the_best_rate(tmp_path):
    def points(*dice):
        return [(minute, 16 * minute, value) for minute, value in enumerate(dice, 1)]

    for key, curve in {
        ('masks', 0.003, 0): points(0.7, 0.8, 0.9),
        ('masks', 0.003, 1): points(0.7, 0.7, 0.86),
        ('masks', 0.003, 2): points(0.8, 0.85, 0.7),
        ('masks', 0.1, 0): points(0.84, 0.2, 0.2),
    }.items():
        curves.add_run(tmp_path / 'curves.csv', key, 3.0, curve)
    runs = curves.read_runs(tmp_path / 'curves.csv', 3.0)
    assert len(runs) == 4 and not curves.read_runs(tmp_path / 'curves.csv', 4.0)
    assert curves.best_rates(runs) == {'masks': 0.003}
    assert curves.cells(curves.median_times(runs, 'masks')) == ['2.0', '3.0', 'not reached']
    assert curves.cells(curves.median_times(runs, 'smp')) == ['not reached'] * 3
    *_, last, median = curves.make_rows(runs, {'masks': 'ours'})
    assert last[:3] == ['ours', '0.1', '0'] and median[0] == '  median' and median[3:6] == ['2.0', '3.0', 'not reached']
