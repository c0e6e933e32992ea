"""Pictures and predictions from a trained model."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import mtl_vis
from dataloader_mtl import MTLDataset
from models import BoxNet, UNet, load_model, model_content
from mtl_vis import PREDICTED, TARGET, main
from prediction import predict
from support.checkpoint import save_checkpoint
from support.cli import run_script
from support.files import write_file


def run(*arguments):
    main([str(argument) for argument in arguments])


def photograph(path, size=(90, 70), mode='RGB'):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def write_model(path, network):
    save_checkpoint(path, model_content(network(), ['cat', 'dog'], ['cat', 'dog'], (64, 64)))
    return path


@pytest.fixture
def no_picture(monkeypatch):
    """For tests of the other outputs."""
    monkeypatch.setattr(mtl_vis, 'save_picture', lambda rows, path: write_file(path, lambda file: file.write(b'-')))


# ---- test images


def colours(panel):
    return {'#' + bytes(pixel).hex() for pixel in panel.flatten(1).T.tolist()}


def test_test_pets_are_drawn_with_target_and_predicted_mask(model_path, shared_data, tmp_path, monkeypatch):
    rows, original = [], mtl_vis.save_picture
    monkeypatch.setattr(mtl_vis, 'save_picture', lambda r, path: (rows.extend(r), original(r, path)))
    run('--model', model_path, '--data', shared_data, '--out', tmp_path / 'mask.png', '--count', '3')
    assert Image.open(tmp_path / 'mask.png').size == (3 * (256 + 44), 3 * (256 + 44))
    stored, _, masks = MTLDataset('test', root=shared_data).read(list(range(12)))
    for row in rows:
        titles, (pet, target, predicted) = zip(*row)
        assert titles[0].split('\n')[1].startswith('true: ') and titles[1:] == ('Target Mask', 'Predicted Mask')
        assert any(torch.equal(target[0, ::4, ::4], mask[0] * 255) for mask in masks)
        assert colours(target) == {'#000000', '#ffffff'} and colours(predicted) <= {'#000000', '#ffffff'}
        assert PREDICTED in colours(pet)
        assert max((pet[:, ::4, ::4] == image).float().mean() for image in stored) > 0.7  # all but the boxes
    assert any(TARGET in colours(row[0][1]) for row in rows)


def test_pets_with_unknown_labels_and_float_images_are_drawn(model_path):
    image, mask = torch.full((1, 3, 64, 64), 200 / 255), torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    mask[..., :20], mask[..., 20:40] = 1, 255
    dataset = SimpleNamespace(
        read=lambda indices: (image, torch.full((1, 4), torch.nan), mask),
        split=SimpleNamespace(labels=np.array([-1]), class_names=['a']),
    )
    (title, pet), (_, target), _ = mtl_vis.sample_row(load_model(model_path), dataset, 0, flip=False)
    assert '\n' not in title and colours(pet) == {'#c8c8c8', PREDICTED}
    assert target[0, 0, ::80].tolist() == [255, 128, 0, 0]


# ---- photographs


def test_photographs_give_a_line_each_and_a_picture(model_path, tmp_path, capsys):
    first = photograph(tmp_path / 'one.png', (300, 200))
    second = photograph(tmp_path / 'two.jpg', (120, 330), 'L')
    run('--model', model_path, '--out', tmp_path / 'out.png', first, second)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f'{first}: ') and 'box ' in lines[0] and '% of the picture' in lines[0]
    assert lines[2] == f'{tmp_path / "out.png"}: 2 photographs'
    # Two panels beside each other, at the photographs' own sizes, one row for each photograph.
    assert Image.open(tmp_path / 'out.png').size == (2 * (300 + 44), 200 + 330 + 2 * 44)


def test_shipped_model_is_found_from_any_folder_and_a_notebooks_backend_does_no_harm(tmp_path):
    photograph(tmp_path / 'one.png')
    backend = {'MPLBACKEND': 'module://matplotlib_inline.backend_inline'}  # which is not installed here
    command = [sys.executable, ROOT / 'mtl_vis.py', 'one.png']
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | backend, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[1] == 'mask.png: 1 photograph', done.stderr
    assert Image.open(tmp_path / 'mask.png').size == (2 * (256 + 44), 199 + 44)


@pytest.mark.usefixtures('no_picture')
def test_a_model_of_masks_only_draws_them_and_its_json_on_standard_output_has_null_for_the_rest(
    shared_data, tmp_path, capsys
):
    one, out = photograph(tmp_path / 'one.png'), tmp_path / 'out.png'
    options = '--model', write_model(tmp_path / 'best.pt', UNet), '--out', out
    run(*options, '--data', shared_data)
    run(*options, one)
    assert capsys.readouterr().out.splitlines()[-2].startswith(f'{one}: mask ')
    run(*options, '--json', '-', one)
    printed = capsys.readouterr()
    nulls = {'breed', 'probability', 'breeds', 'species', 'species_probability', 'bbox'}
    assert {key for key, value in json.loads(printed.out).items() if value is None} == nulls
    assert printed.err == f'{out}: 1 photograph\n'


@pytest.mark.usefixtures('no_picture')
def test_photographs_that_fail_are_named_and_stop_no_other(model_path, tmp_path, capsys, monkeypatch):
    missing, empty, text, loop, odd = broken = [
        tmp_path / f'{name}.png' for name in ('missing', 'empty', 'text', 'loop', 'odd')
    ]
    empty.touch(), text.write_text('no picture'), loop.symlink_to('loop.png'), photograph(odd, (33, 33))

    def predict_or_fail(model, image, **options):
        return {}['a bug'] if image.size == (33, 33) else predict(model, image, **options)

    monkeypatch.setattr(mtl_vis, 'predict', predict_or_fail)
    sound, out, json_file = photograph(tmp_path / 'sound.png'), tmp_path / 'out.png', tmp_path / 'pets.jsonl'
    for others in [], [sound]:
        with pytest.raises(SystemExit) as stopped:
            run_script(partial(run, '--model', model_path, '--out', out, '--json', json_file, *broken, *others))
        printed = capsys.readouterr()
        *errors, last = printed.err.splitlines()
        assert stopped.value.code == 1 and last == f'error: 5 of {5 + len(others)} photographs failed'
        assert [line.startswith(f'error: {path}: ') for line, path in zip(errors, broken, strict=True)] == [True] * 5
        assert out.exists() == printed.out.startswith(f'{sound}: ') == bool(others)
        assert [json.loads(line)['file'] for line in json_file.open()] == list(map(str, others))


def test_photographs_of_any_size_give_masks_cutouts_and_json_in_their_own_pixels(model_path, tmp_path):
    folder, out, exif = tmp_path / 'in', tmp_path / 'out.png', Image.Exif()
    folder.mkdir()
    exif[0x0112] = 8  # viewers show it turned
    Image.new('RGB', (300, 200), 'teal').save(folder / 'phone.jpg', exif=exif)
    Image.new('RGB', (3200, 1000), 'olive').save(folder / 'large.webp')
    Image.new('L', (10, 2000)).save(folder / 'strip.png')
    sizes, model = {'phone': (200, 300), 'large': (3200, 1000), 'strip': (10, 2000)}, load_model(model_path)
    outputs = '--save-masks', tmp_path / 'masks', '--cutouts', tmp_path / 'cutouts', '--json', tmp_path / 'pets.jsonl'
    run('--model', model_path, '--out', out, *outputs, folder)
    records = {Path(record['file']).stem: record for record in map(json.loads, (tmp_path / 'pets.jsonl').open())}
    assert {name: (record['width'], record['height']) for name, record in records.items()} == sizes
    for name, record in records.items():
        expected = predict(model, record['file'])
        assert record['breeds'][0] == {'breed': record['breed'], 'probability': record['probability']}
        assert len(record['breeds']) == 5 and record['species'] in ('cat', 'dog')
        assert record['bbox'] == list(expected.bbox) and record['mask_coverage'] == expected.mask.mean()
        mask, pet = (Image.open(tmp_path / f'{kind}s' / f'{name}_{kind}.png') for kind in ('mask', 'cutout'))
        assert (record['mask_file'], record['cutout_file']) == (mask.filename, pet.filename)
        assert (mask.mode, pet.mode, pet.size) == ('L', 'RGBA', sizes[name])
        assert np.array_equal(mask, expected.mask * 255)
    # Large ones are drawn smaller, still smaller where there are several.
    assert Image.open(out).size[0] == 2 * (640 + 44)
    run('--model', model_path, '--out', out, folder / 'large.webp')
    assert Image.open(out).size[0] == 2 * (1600 + 44)


# ---- which photographs, and where their files go


def write_tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photograph(root / name, size=(20, 16))


def test_folders_and_patterns_name_files_by_the_folders_below_them(model_path, tmp_path, capsys, monkeypatch):
    """Of two files whose names differ only in the suffix, both keep it. Not all are drawn."""
    monkeypatch.setattr(mtl_vis, 'DRAWN', 2)
    folder, out, masks = tmp_path / 'in', tmp_path / 'out.png', tmp_path / 'masks'
    write_tree(folder, 'a/pug.png', 'b/pug.JPG', 'b/pug.png', 'pug.png', '[1].png')
    (folder / 'a' / 'pug.txt').write_text('no photograph')
    options = '--model', model_path, '--out', out, '--save-masks', masks
    run(*options, folder / '[ab]' / '*')
    lines = capsys.readouterr().out.splitlines()
    files = [str(folder / name) for name in ('a/pug.png', 'b/pug.JPG', 'b/pug.png')]
    assert [line.partition(': ')[0] for line in lines] == [*files, str(out)]
    assert lines[-1].endswith(': the first 2 of 3 photographs') and Image.open(out).size[1] == 2 * (205 + 44)
    names = {'a/pug_mask.png', 'b/pug.JPG_mask.png', 'b/pug.png_mask.png'}
    assert {str(path.relative_to(masks)) for path in masks.rglob('*.png')} == names
    run(*options, folder)
    assert {str(path.relative_to(masks)) for path in masks.rglob('*.png')} == names | {'pug_mask.png', '[1]_mask.png'}
    run(*options, folder / '[1].png')  # a name that is there is no pattern


@pytest.mark.usefixtures('no_picture')
def test_a_second_run_sees_the_same_photographs(model_path, tmp_path, capsys):
    """Neither what the first wrote nor what is hidden; a folder to write to may be the one that is searched."""
    write_tree(tmp_path, 'cat.png', 'phone.jfif', '.trash/old.png', 'a/.hidden.png')
    folders = '--save-masks', tmp_path / 'masks', '--cutouts', tmp_path / 'a' / 'cutouts'
    for _ in range(2):
        run('--model', model_path, '--out', tmp_path / 'out.png', *folders, tmp_path)
        lines = capsys.readouterr().out.splitlines()
        assert [Path(line.partition(': ')[0]).name for line in lines] == ['cat.png', 'phone.jfif', 'out.png']
    write_tree(tmp_path, 'one/cat.png')
    run('--model', model_path, '--out', tmp_path / 'out.png', '--cutouts', tmp_path / 'one', tmp_path / 'one')
    assert (tmp_path / 'one' / 'cat_cutout.png').exists()


@pytest.mark.usefixtures('no_picture')
def test_what_was_found_is_kept_if_an_output_cannot_be_written(model_path, tmp_path, error_line):
    one, two = photograph(tmp_path / '1.png'), photograph(tmp_path / '2.png')
    (tmp_path / 'cutouts' / '2_cutout.png').mkdir(parents=True)
    options = '--model', model_path, '--out', tmp_path / 'out.png', '--cutouts', tmp_path / 'cutouts'
    assert '2_cutout.png: is not a file' in error_line(main, *options, '--json', tmp_path / 'a.jsonl', one, two)
    files = [json.loads(line)['file'] for line in (tmp_path / 'a.jsonl').read_text().splitlines()]
    assert files == [str(one), str(two)]


def test_what_finds_no_photograph_or_no_model_is_named(tmp_path, error_line):
    one, boxes = photograph(tmp_path / 'one.png'), write_model(tmp_path / 'boxes.pt', BoxNet)
    (tmp_path / 'empty').mkdir()
    for name in 'x*.png', 'empty':
        assert f'{name}: finds no file that ends in .jpg' in error_line(main, tmp_path / name)
    assert 'none.pt: no such file' in error_line(main, '--model', tmp_path / 'none.pt', one)
    line = error_line(main, '--model', boxes, '--cutouts', tmp_path / 'cutouts', one)
    assert 'boxes.pt: a network without masks' in line


def test_no_input_is_overwritten_and_no_file_is_written_twice(model_path, tmp_path, error_line):
    (tmp_path / 'b').mkdir()
    one, two = photograph(tmp_path / 'cat.png'), photograph(tmp_path / 'b' / 'cat.png')
    mask, dog = photograph(tmp_path / 'dog_mask.png'), photograph(tmp_path / 'dog.png')
    for arguments in (
        ['--out', one, one],
        ['--out', model_path, one],
        ['--json', tmp_path / 'out.png', one],
        ['--save-masks', tmp_path / 'masks', one, two],
        ['--save-masks', tmp_path, dog, mask],
    ):
        before = {path: path.read_bytes() for path in (one, two, mask, dog, model_path)}
        line = error_line(main, '--model', model_path, '--out', tmp_path / 'out.png', *arguments)
        assert re.search(r': would be written over (an input|that of .*\.png|another output); give other', line), line
        assert before == {path: path.read_bytes() for path in before}


def test_folder_to_write_is_no_file(tmp_path, capsys):
    one = photograph(tmp_path / 'one.png')
    with pytest.raises(SystemExit) as stopped:
        run('--cutouts', one, one)
    assert stopped.value.code == 2 and "one.png' is not a folder" in capsys.readouterr().err


@pytest.mark.filterwarnings('error:Glyph')
@pytest.mark.parametrize('name', ['$x^{ costs 5$', 'シャム猫'])
def test_title_with_dollar_or_missing_glyph_gives_no_warning(tmp_path, name):
    mtl_vis.save_picture([[(name, torch.zeros(3, 64, 64, dtype=torch.uint8))]], tmp_path / 'mask.png')
    assert Image.open(tmp_path / 'mask.png').size == (108, 108)
