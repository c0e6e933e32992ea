"""Checkpoint files: written whole, and read without running code that they may contain.

What last.pt holds: `engine.Run.state`. What a model file (best.pt, mtl_model.pt) holds: `models.model_content`.
"""

import io
import os
import warnings
import zipfile

import torch

from support.cli import InputError, reason
from support.files import replacing, require_file, sync, write_file

# The number rises when files that were written before can no longer be read.
MODEL_FORMAT = 'segmentation-mtl model 3'  # best.pt, mtl_model.pt
TRAINING_FORMAT = 'segmentation-mtl training 7'  # last.pt


def save_checkpoint(path, content):
    """Write a dict of tensors and plain values with the entry 'format'."""
    write_file(path, lambda file: torch.save(content, file))


def save_last(folder, content):
    """Write last.pt, and remove the metrics.json of an earlier run, so that the folder holds an unfinished one."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(folder / 'last.pt') as part:
        part.write_bytes(buffer.getvalue())
        sync(part)
        # Before the new last.pt is there: killed in between, the folder must not look like a finished run.
        (folder / 'metrics.json').unlink(missing_ok=True)


def load_checkpoint(path, expected, device='cpu'):
    """The content of a checkpoint whose 'format' is `expected`, its tensors on `device`.

    No code in the file runs, and changed weights are noticed. Raises InputError for any other file.
    """
    require_file(path, 'the training scripts make it')
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's, about files that are refused below
            content = torch.load(path, map_location=device, weights_only=True)
    except (OSError, MemoryError) as error:
        raise InputError(f'{path}: cannot be read ({reason(error)})') from None
    except Exception as error:  # torch.load raises errors of any type for damaged files
        said = 'it holds more than plain weights' if 'weights_only' in str(error) else reason(error)
        raise InputError(
            f"{path}: not a valid checkpoint ({said}); expected '{expected}', which the training scripts write"
        ) from None
    found = content.get('format') if isinstance(content, dict) else None
    if found != expected:
        what = 'another kind of PyTorch file, such as a state dict'
        if isinstance(found, str):
            what = f'a file of the format {found!r:.50}'
        raise InputError(f"{path}: {what}; expected '{expected}', which the training scripts write")
    return content


def check_archive(path):
    """Raises ValueError unless the file is an uncompressed zip archive with the right checksums.

    torch.save writes such archives, and torch.load ignores the checksums.
    """
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError('a compressed archive')
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"its part '{damaged}' is damaged")


def is_finite(state_dict):
    """Whether all tensors of a state dict are free of NaN and infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in state_dict.values())


def find_checkpoint(folder, resume):
    """The last.pt that --resume asks for, or None; raises InputError if an unfinished run would be overwritten."""
    last = folder / 'last.pt'
    if resume == 'auto' and not os.path.lexists(last):
        return None
    if not resume and last.exists() and not (folder / 'metrics.json').exists():
        raise InputError(
            f'{folder}: holds an unfinished run; --resume continues it; to start again, remove its last.pt or '
            'give another --out'
        )
    return last if resume else None
