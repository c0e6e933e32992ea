"""Metrics of a network on a split, over flips, and of a constant prediction."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import Subset
from torchvision.ops import box_iou

import evaluation
from dataloader_mtl import MTLDataset, Sample, load_splits
from evaluation import bootstrap_interval, fit_temperature
from models import FlipAveraged, MTLNet, Outputs, UNet
from utils import METRICS, PIXELS, POOLED

CPU = torch.device('cpu')


class Oracle(torch.nn.Module):
    """Predicts `predict(*sample)` for each image or its mirror image, whichever batch the image comes in."""

    def __init__(self, dataset, predict):
        super().__init__()
        self.samples = [dataset[i] for i in range(len(dataset))]
        self.predict = predict

    def find(self, image):
        for sample in self.samples:
            if torch.equal(sample.image, image):
                return sample
            if torch.equal(sample.image.flip(-1), image):
                return mirrored(*sample)

    def forward(self, images):
        found = [self.find(image) for image in images]
        return Outputs(*(torch.stack(parts) for parts in zip(*(self.predict(*sample) for sample in found))))


def mirrored(image, bbox, label, mask):
    xmin, ymin, xmax, ymax = bbox
    return Sample(image.flip(-1), torch.stack([1 - xmax, ymin, 1 - xmin, ymax]), label, mask.flip(-1))


def perfect(image, bbox, label, mask):
    return torch.eye(8)[label], (mask - 0.5) * 20, bbox


def imperfect(image, bbox, label, mask):
    """A guess from the image."""
    box = torch.tensor([0.2, 0.1, 0.7, 0.6]) + image.mean() / 20
    return torch.eye(8)[int(image.std() * 100) % 8], image.mean(dim=0, keepdim=True), box


def test_perfect_prediction_scores_exactly_one(shared_data):
    dataset = MTLDataset('test', root=shared_data)
    metrics = evaluation.evaluate(Oracle(dataset, perfect), dataset, CPU, batch_size=5)
    assert {name: metrics[name] for name in METRICS} == dict.fromkeys(METRICS, 1)


def test_metrics_do_not_depend_on_the_batch_size(shared_data):
    """Also with labels missing, so that batches hold different numbers of them."""
    dataset = MTLDataset('train', root=shared_data)
    dataset.split.bboxes[::3] = math.nan
    dataset.split.labels[1::4] = -1
    model = Oracle(dataset, imperfect)
    first, other = (evaluation.evaluate(model, dataset, CPU, batch_size=size) for size in (1, 7))
    assert 0 < first['dice'] < 1 and 0 < first['box_iou'] < 1
    assert {name: other[name] for name in METRICS} == {name: first[name] for name in METRICS}
    assert other == pytest.approx(first, rel=1e-6)


def test_evaluation_is_in_evaluation_mode_and_restores_the_mode(shared_data):
    part = Subset(MTLDataset('test', root=shared_data), range(6))
    model = MTLNet(n_classes=8).train()
    first = evaluation.evaluate(model, part, CPU)
    assert model.training
    assert first == evaluation.evaluate(model, part, CPU)
    evaluation.evaluate(FlipAveraged(model.eval()), part, CPU)
    assert not any(module.training for module in model.modules())


@pytest.fixture
def tested(data):
    """A model that guesses, its splits with some labels missing, and the samples of the test."""
    splits = load_splits(data, MTLNet.tasks)
    train, test = splits['train'].dataset.split, splits['test'].dataset.split
    train.labels[:12], train.labels[12:32] = 5, -1
    train.bboxes[:], train.bboxes[30:33] = (8, 4, 40, 20), (16, 4, 48, 20)
    train.bboxes[33:] = math.nan
    test.labels[:] = [5, 5, 5, 1, 2, 3, 5, -1, 4, 0, -1, -1]
    model = Oracle(splits['test'].dataset, imperfect)
    model.class_names = test.class_names
    return model, splits, Sample(*map(torch.stack, zip(*model.samples)))


def test_test_metrics_are_of_the_images_with_a_label(tested):
    model, splits, samples = tested
    means, pooled, plain = evaluation.run_test(model, splits, CPU)
    scores, _ = evaluation.score(model, splits['test'], CPU, batch_size=5)
    assert all(np.array_equal(plain[name], scores[name], equal_nan=True) for name in METRICS)
    images = {'dice': 12, 'mask_iou': 12, 'accuracy': 9, 'box_iou': 12}
    assert {name: values['images'] for name, values in means.items()} == images
    assert np.isnan(plain['accuracy']).tolist() == [label < 0 for label in samples.label]
    for name, values in means.items():
        known = plain[name][~np.isnan(plain[name])]
        assert values['mean'] == pytest.approx(known.mean(), rel=1e-9)
        assert values['interval'] == bootstrap_interval([known])
        assert values['flip_interval'][0] <= values['flip_mean'] <= values['flip_interval'][1]
    assert pooled.keys() == POOLED.keys() and pooled['species_accuracy']['images'] == 9
    iou, counts = POOLED['pooled_iou'].function, [plain[name] for name in PIXELS]
    assert pooled['pooled_iou']['mean'] == iou(*counts)
    assert pooled['pooled_iou']['interval'] == bootstrap_interval(counts, iou)
    assert evaluation.most_confused(plain, model.class_names, 1)[0]['images'] >= 1


def test_test_metrics_of_a_constant_prediction_and_over_flips(tested):
    """The constant prediction: the commonest class, the mean box, pet everywhere."""
    model, splits, samples = tested
    means, pooled, _ = evaluation.run_test(model, splits, CPU)
    area = samples.mask.mean(dim=(1, 2, 3), dtype=torch.float64)
    box = torch.tensor([[8 + 8 * 3 / 33, 4, 40 + 8 * 3 / 33, 20]]) / 64
    expected = {
        'dice': float((2 * area / (1 + area)).mean()),
        'mask_iou': float(area.mean()),
        'accuracy': 4 / 9,
        'box_iou': float(box_iou(box, samples.bbox).mean()),
    }
    assert {name: values['constant'] for name, values in means.items()} == pytest.approx(expected, rel=1e-5)
    assert pooled['pooled_iou']['constant'] == pytest.approx(float(area.mean()))
    assert pooled['macro_f1']['constant'] == pytest.approx((8 / 13) / 6)
    # Of `imperfect`, mirroring the image mirrors the mask, and not the box.
    assert means['dice']['flip_mean'] == pytest.approx(means['dice']['mean'], rel=1e-6)
    shift = samples.image.mean(dim=(1, 2, 3)) / 20
    edges = torch.full_like(shift, 0.25), 0.1 + shift, torch.full_like(shift, 0.75), 0.6 + shift
    expected = box_iou(torch.stack(edges, dim=1), samples.bbox).diagonal().mean()
    assert means['box_iou']['flip_mean'] == pytest.approx(float(expected), rel=1e-5)
    assert abs(means['box_iou']['flip_mean'] - means['box_iou']['mean']) > 1e-4


def test_tasks_without_labels_have_no_test_metrics(data):
    splits = load_splits(data, UNet.tasks)
    train, test = splits['train'].dataset.split, splits['test'].dataset.split
    test.labels[:] = -1
    test.bboxes[:] = train.bboxes[:] = math.nan
    model = MTLNet(n_classes=8)
    model.class_names = test.class_names
    means, pooled, _ = evaluation.run_test(model, splits, CPU)
    assert means.keys() == {'dice', 'mask_iou'} and pooled.keys() == {'pooled_dice', 'pooled_iou'}
    assert evaluation.calibrate(model, splits['test'], CPU) is None


def test_calibration_divides_the_logits_and_changes_no_prediction(shared_data, monkeypatch):
    part = Subset(MTLDataset('test', root=shared_data), range(8))
    model = MTLNet(n_classes=8)
    with torch.no_grad():
        model.class_head.logits.weight.mul_(50)
    before, _ = evaluation.score(model, part, CPU)
    assert evaluation.calibrate(model, part, CPU) is None  # too few
    monkeypatch.setattr(evaluation, 'FEWEST_LABELS', 8)
    temperature = evaluation.calibrate(model, part, CPU)
    after, _ = evaluation.score(model, part, CPU)
    assert temperature != 1 and after['logits'] == pytest.approx(before['logits'] / temperature, rel=1e-4)
    assert np.array_equal(after['predicted'], before['predicted'])
    assert evaluation.calibrate(UNet(), part, CPU) is None


def test_interval_is_that_of_the_resampled_means():
    """Of n values, k of them 1: binomial; the 2.5th and 97.5th percent of 40 draws at 0.1 are 1 and 8."""
    assert bootstrap_interval([np.repeat([1.0, 0.0], [4, 36])]) == [1 / 40, 8 / 40]
    assert bootstrap_interval([np.array([0.25])]) == [0.25, 0.25]


def test_interval_is_seeded_and_of_the_same_samples_in_all_columns():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval([values]) == bootstrap_interval([values]) != bootstrap_interval([values], seed=1)
    assert bootstrap_interval([values, 1 - values], lambda a, b: (a + b).mean(axis=-1)) == pytest.approx([1, 1])


def test_temperature_is_that_of_the_highest_likelihood():
    """Logits of a calibrated two-class prediction, made twice as sure as they are right."""
    logits = np.array([[np.log(3), 0]] * 4) * 2
    assert fit_temperature(logits, np.array([0, 0, 0, 1])) == pytest.approx(2, rel=0.01)
    assert fit_temperature(logits, np.zeros(4)) == pytest.approx(0.1)
