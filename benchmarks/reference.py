"""The reference network of the benchmarks: the study's multi-task U-Net, rebuilt from its description.

Four contracting blocks of two convolutions and a max pooling, four expanding blocks that double the
size with a transposed convolution, a class head and a box head on the encoder's top; 3.67 million
parameters. The study trained it in float32, NCHW, batches of 32, with Adam at 1e-4, no augmentation,
and the mean of Dice loss, cross-entropy and L1; `train_reference` does that.

Two defects of the study's heads are left out, a ReLU before the sigmoid of the box and dropout that
evaluation did not switch off: they cost no time, and the comparison is of masks.
"""

import torch
import torch.nn.functional as F
from torch import nn

import utils
from models import Outputs

CHANNELS = (32, 64, 128, 256)
BATCH_SIZE = 32


def double_conv(c_in, c_out, kernel):
    """(N, c_in, H, W) -> (N, c_out, H, W)."""
    layers = []
    for channels in (c_in, c_out):
        layers += [nn.Conv2d(channels, c_out, kernel, padding=kernel // 2), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers)


def expanding(c_in, c_out):
    """(N, c_in, H, W) -> (N, c_out, 2 H, 2 W)."""
    double = nn.ConvTranspose2d(c_out, c_out, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(double_conv(c_in, c_out, 3), double)


class ReferenceNet(nn.Module):
    """(N, 3, 256, 256) -> Outputs, as the networks of models.py. The linear layers fix the size."""

    tasks = ('mask', 'class', 'box')

    def __init__(self, n_classes=2):
        super().__init__()
        kernels = (7, 3, 3, 3)
        self.contracting = nn.ModuleList(map(double_conv, (3, *CHANNELS), CHANNELS, kernels))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.expanding = nn.ModuleList(map(expanding, (256, 256, 128, 64), (128, 64, 32, 1)))
        self.label = nn.Sequential(
            nn.Conv2d(256, 32, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, n_classes),
        )
        self.bbox = nn.Sequential(
            nn.Conv2d(256, 256, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(256, 256, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 128),
            nn.ReLU(),
            nn.Linear(128, 4),
            nn.Sigmoid(),
        )

    def forward(self, x, decode=None):
        """`decode` as in models.py: the masks of the chosen images alone; the rest is not computed less."""
        features = []
        for block in self.contracting:
            x = self.pool(block(x))
            features.append(x)
        label, bbox = self.label(x), self.bbox(x)
        *skips, x = features
        x = self.expanding[0](x)
        for block, skip in zip(self.expanding[1:], reversed(skips)):
            x = block(torch.cat([x, skip], dim=1))
        return Outputs(label, x if decode is None else x[decode], bbox)


class ReferenceObjective(nn.Module):
    """A batch of MTLDataset -> the mean of Dice loss, cross-entropy and L1 over the labels it has."""

    def __init__(self, model):
        super().__init__()
        self.model, self.dice = model, utils.DiceLoss()

    def forward(self, batch):
        image, bbox, label, mask = batch
        outputs = self.model(image)
        has_label, has_box = utils.label_known(label), utils.box_known(bbox)
        losses = (
            self.dice(outputs.mask, mask),
            utils.reduce(F.cross_entropy(outputs.label[has_label], label[has_label], reduction='none'), 'mean'),
            utils.reduce((outputs.bbox[has_box] - bbox[has_box]).abs().mean(dim=1), 'mean'),
        )
        return sum(losses) / 3


def train_reference(model, batches):
    """Train on `batches`, as the study did; yields the number of images after each step."""
    objective = ReferenceObjective(model.train())
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    for batch in batches:
        loss = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield len(batch[0])
