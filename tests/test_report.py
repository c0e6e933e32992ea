"""What a run reports: lines, log.csv, curves.png, metrics.json."""

import csv
import json

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from support.report import draw_curves, epoch_line, print_test, write_csv, write_metrics, write_scores

PRINTED = {'dice': 'Dice Score', 'accuracy': 'Accuracy'}
FIRST = {'epoch': 1, 'train_loss_mask': 0.75, 'val_dice': 0.5, 'val_loss_mask': 0.8}
SECOND = {**FIRST, 'epoch': 2, 'train_loss_class': 2.0, 'val_dice': 0.625, 'val_accuracy': 0.25}


def test_epoch_line_has_losses_metrics_and_speed():
    line = epoch_line({**SECOND, 'images_per_second': 123.5, 'total_seconds': 6.7}, 30)
    assert line == (
        'epoch 2/30: training loss mask 0.750 class 2.000; validation dice 0.6250 accuracy 0.2500; 123.5 images/s, 7 s'
    )


def test_test_metrics_are_printed_by_their_names(capsys):
    values = {'mean': 0.25, 'interval': [0.2, 0.3], 'flip_mean': 0.26, 'flip_interval': [0.21, 0.31]}
    print_test('Test', {'accuracy': values | {'constant': 0.125, 'images': 8}}, PRINTED)
    print_test('Test', {}, PRINTED)
    assert capsys.readouterr().out == (
        "Test, [95 % interval over the images]; flips: outputs averaged with the mirror image's\n"
        '  Accuracy: 0.2500 [0.200, 0.300]; flips 0.2600 [0.210, 0.310]; a constant prediction 0.1250; 8 images\n'
        'Test: no sample has a label\n'
    )


def test_log_has_a_row_for_each_epoch_and_empty_cells(tmp_path):
    write_csv([FIRST, SECOND], tmp_path / 'log.csv')
    with open(tmp_path / 'log.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*FIRST, 'train_loss_class', 'val_accuracy']
    assert [row['val_dice'] for row in rows] == ['0.5', '0.625']
    assert [row['val_accuracy'] for row in rows] == ['', '0.25']


def test_scores_have_a_row_for_each_image_and_empty_cells(tmp_path):
    scores = {'dice': np.array([0.5, np.nan]), 'accuracy': np.array([1.0, 0.0])}
    write_scores(scores, ['pug_1', 'pug, 2'], ['pug', ''], tmp_path / 'scores.csv')
    with open(tmp_path / 'scores.csv', newline='') as file:
        assert list(csv.reader(file)) == [
            ['image', 'class', 'dice', 'accuracy'],
            ['pug_1', 'pug', '0.5', '1'],
            ['pug, 2', '', '', '0'],
        ]


def test_curves_show_losses_and_metrics(tmp_path, monkeypatch):
    labels, plot = [], Axes.plot
    monkeypatch.setattr(Axes, 'plot', lambda *args, **kw: (labels.append(kw['label']), plot(*args, **kw))[1])
    draw_curves([FIRST, SECOND], PRINTED, tmp_path / 'curves.png')
    assert sorted(labels) == ['Accuracy', 'Dice Score', 'class, train', 'mask, train', 'mask, val']
    assert Image.open(tmp_path / 'curves.png').size == (1200, 480)


def test_curves_of_a_history_without_labels_are_drawn(tmp_path):
    draw_curves([{'epoch': 1, 'lr': 0.1}], PRINTED, tmp_path / 'curves.png')
    assert Image.open(tmp_path / 'curves.png').size == (1200, 480)


def test_metrics_file_has_the_versions_and_the_machine(tmp_path):
    written = write_metrics({'test': {'dice': 0.5}}, tmp_path / 'metrics.json')
    assert json.loads((tmp_path / 'metrics.json').read_text()) == written
    assert written['test'] == {'dice': 0.5} and written['machine']['threads'] == 1
    assert {'python', 'torch', 'h5py', 'numpy'} <= set(written['versions'])
