"""The arms of the study, which are ways to train, and one training run.

All arms see the same images in the same batches and augmentation, and train with the same recipe for the same number
of steps: only the losses differ, and what `Arm.config` says.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import engine
from models import AblatedNet, AblatedNet2, BoxNet, ClassBoxNet, ClassNet, MTLNet, SharedEncoderNet, UNet
from oeq_weighting import FIXED, weighting
from utils import WeightedLoss

EPOCHS, STEPS = 4, 120  # of every run: validations, and steps from one to the next
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # learning rates
FIRST_RATES = 2, 5  # the part of RATES that is tried first, see `results.search_rates`

# The recipe of the training scripts, in float32 and with milder augmentation for its length.
RECIPE = engine.Config(
    epochs=EPOCHS,
    steps=STEPS,
    images_of=MTLNet.tasks,
    sizes=((1 / 2, 1 / 2), (1, 3 / 4)),
    crop=(0.4, 1.0),
    zoom_out=0,
    remove_pets=0,
    poor_light=0,
    bfloat16=False,  # so that machines agree
    resume='auto',
)
IMAGENET = {
    **engine.PRETRAINED,
    'sizes': RECIPE.sizes,
    'encoder': 'tf_efficientnet_lite0',
    'encoder_weights': 'imagenet',
}


class Arm(NamedTuple):
    """A way to train."""

    text: str
    network: type[SharedEncoderNet]
    references: tuple = ()  # the arms it is compared with
    rate_of: str = 'mtl'  # the arm whose learning rate it takes
    weights: str = 'equal'  # a name of oeq_weighting.py
    config: dict = {}  # what differs from RECIPE
    first_seed: int = 0  # the seed of fold 0; that of fold k is k more
    sequential: bool = False  # the first half of the steps on class and box

    @property
    def differs_only_in_losses(self):
        return not (self.config or self.first_seed or self.sequential)


def few_masks(masks):
    """The two arms with that many masks in training."""
    only, name = f'unet-{masks}', f'mtl-{masks}'
    config = {'masks': masks}
    return {
        only: Arm(f'mask only, {masks} masks', UNet, rate_of='unet', config=config | {'images_of': UNet.tasks}),
        name: Arm(f'all tasks, {masks} masks', MTLNet, references=(only,), config=config),
    }


MAIN = {
    'unet': Arm('mask only', UNet, rate_of='unet'),
    'mtl': Arm('all tasks, equal weights', MTLNet, references=('unet', 'class', 'box')),
    'without-bbox': Arm('mask and class', AblatedNet, references=('unet', 'class', 'mtl')),
    'without-class': Arm('mask and box', AblatedNet2, references=('unet', 'box', 'mtl')),
    'class': Arm('class only', ClassNet, rate_of='class'),
    'box': Arm('box only', BoxNet, rate_of='box'),
}


def longer(name, times, *references):
    """The arm of MAIN with that many times the steps."""
    arm = MAIN[name]
    text = f'{arm.text}, {times} times the steps'
    return arm._replace(text=text, references=(name, *references), config={'epochs': times * EPOCHS})


LONGER = {
    'unet-twice': longer('unet', 2),
    'unet-long': longer('unet', 4),
    'mtl-long': longer('mtl', 4, 'unet-long', 'class-long', 'box-long'),
    'class-long': longer('class', 4),
    'box-long': longer('box', 4),
}
FEW_MASKS = {
    **few_masks(50),
    **few_masks(200),
    **few_masks(800),
    'sequential-200': Arm(
        'class and box, then 200 masks',
        UNet,
        references=('unet-200', 'mtl-200'),
        config={'masks': 200, 'images_of': UNet.tasks},
        sequential=True,
    ),
}
ENCODER_AND_SEED = {
    'unet-imagenet': Arm('mask only, ImageNet', UNet, references=('unet',), rate_of='unet-imagenet', config=IMAGENET),
    'mtl-imagenet': Arm(
        'all tasks, ImageNet', MTLNet, references=('unet-imagenet', 'mtl'), rate_of='mtl-imagenet', config=IMAGENET
    ),
    'unet-seed': Arm('mask only, second seed', UNet, references=('unet',), rate_of='unet', first_seed=5),
    'mtl-seed': Arm('all tasks, second seed', MTLNet, references=('unet-seed', 'mtl'), first_seed=5),
}
WEIGHTINGS = {
    name: Arm(f'all tasks, weights {name}', MTLNet, references=('mtl',), weights=name)
    for name in (*FIXED, 'uncertainty')
}
# (arms, number of folds), in this order
PARTS = ((MAIN, 5), (LONGER, 1), (FEW_MASKS, 3), (ENCODER_AND_SEED, 3), (WEIGHTINGS, 3))
ARMS = {name: arm for arms, _ in PARTS for name, arm in arms.items()}

METRIC = {'mask': 'dice', 'class': 'accuracy', 'box': 'box_iou'}  # of utils.METRICS, the one that a task is judged by
TITLES = {'dice': 'Dice', 'mask_iou': 'mask IoU', 'accuracy': 'accuracy', 'box_iou': 'box IoU'}
SINGLE = {'dice': 'unet', 'accuracy': 'class', 'box_iou': 'box'}  # the arm of only the task that a metric is of
# (arm, reference, metric); all other comparisons are exploratory.
CONFIRMATORY = (
    ('mtl', 'unet', 'dice'),
    ('mtl', 'class', 'accuracy'),
    ('mtl', 'box', 'box_iou'),
    ('mtl-200', 'unet-200', 'dice'),
)


class RunKey(NamedTuple):
    """A training run: an arm on a fold at a learning rate."""

    arm: str
    fold: int
    rate: float


def train_run(key, data, folder, device, **changes):
    """Train a RunKey into `folder`, or continue, with `changes` of the Config; returns the content of metrics.json."""
    arm = ARMS[key.arm]
    config = replace(
        RECIPE,
        data=str(Path(data) / f'fold{key.fold}'),
        out=str(folder),
        device=device,
        seed=arm.first_seed + key.fold,
        **{**arm.config, 'lr': key.rate, **changes},
    )
    loss = WeightedLoss.equal(arm.network.tasks) if arm.weights == 'equal' else weighting(arm.weights)
    if not arm.sequential:
        return engine.train(arm.network, loss, config)
    half, start = config.epochs // 2, folder / 'first'
    first = replace(config, out=str(start), epochs=half, images_of=RECIPE.images_of)
    first = engine.train(ClassBoxNet, WeightedLoss.equal(ClassBoxNet.tasks), first)
    second = replace(config, epochs=config.epochs - half, start=str(start / 'best.pt'))
    second = engine.train(arm.network, loss, second)
    return second | {'training_seconds': first['training_seconds'] + second['training_seconds']}
