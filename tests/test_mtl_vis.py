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
from support.cli import InputError, run_script
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
def test_a_model_of_masks_only_draws_them_and_its_json_has_null_for_the_rest(shared_data, tmp_path, capsys):
    options = '--model', write_model(tmp_path / 'best.pt', UNet), '--out', tmp_path / 'out.png'
    run(*options, '--data', shared_data)
    one = photograph(tmp_path / 'one.png')
    run(*options, one)
    assert capsys.readouterr().out.splitlines()[-2].startswith(f'{one}: mask ')
    run(*options, '--json', '-', one)
    record = json.loads(capsys.readouterr().out)
    nulls = {'breed', 'probability', 'breeds', 'species', 'species_probability', 'bbox'}
    assert {key for key, value in record.items() if value is None} == nulls


@pytest.mark.usefixtures('no_picture')
def test_photographs_that_cannot_be_read_are_named_and_stop_no_other(model_path, tmp_path, capsys):
    missing, empty, text, loop = broken = [tmp_path / f'{name}.jpg' for name in ('missing', 'empty', 'text', 'loop')]
    empty.touch(), text.write_text('no picture'), loop.symlink_to('loop.jpg')
    sound, out, json_file = photograph(tmp_path / 'sound.png'), tmp_path / 'out.png', tmp_path / 'pets.jsonl'
    for others, written in [[], False], [[sound], True]:
        with pytest.raises(SystemExit) as stopped:
            run_script(partial(run, '--model', model_path, '--out', out, '--json', json_file, *broken, *others))
        printed = capsys.readouterr()
        *errors, last = printed.err.splitlines()
        assert stopped.value.code == 1
        assert [line.startswith(f'error: {path}: ') for line, path in zip(errors, broken, strict=True)] == [True] * 4
        assert last == f'error: 4 of {4 + len(others)} photographs failed'
        assert out.exists() == printed.out.startswith(f'{sound}: ') == written
        assert [json.loads(line)['file'] for line in json_file.open()] == list(map(str, others))


def write_kinds(folder):
    """A photograph of each kind that people have; {name: (width, height) as viewers show it}."""
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new('RGB', (300, 200), 'teal').save(folder / 'phone.jpg', exif=exif)
    Image.new('RGBA', (60, 40), (255, 0, 0, 128)).save(folder / 'alpha.png')
    Image.fromarray(np.full((50, 70), 40_000, np.uint16)).save(folder / 'deep.png')
    Image.new('RGB', (3200, 1000), 'olive').save(folder / 'large.webp')
    Image.new('L', (10, 2000)).save(folder / 'strip.png')
    return {'phone': (200, 300), 'alpha': (60, 40), 'deep': (70, 50), 'large': (3200, 1000), 'strip': (10, 2000)}


def test_photographs_of_all_kinds_give_masks_cutouts_and_json_in_their_own_pixels(model_path, tmp_path):
    (tmp_path / 'in').mkdir()
    sizes, model = write_kinds(tmp_path / 'in'), load_model(model_path)
    outputs = '--save-masks', tmp_path / 'masks', '--cutouts', tmp_path / 'cutouts', '--json', tmp_path / 'pets.jsonl'
    run('--model', model_path, '--out', tmp_path / 'out.png', *outputs, tmp_path / 'in')
    records = [json.loads(line) for line in (tmp_path / 'pets.jsonl').read_text().splitlines()]
    assert len(records) == len(sizes)
    for record in records:
        name, expected = Path(record['file']).stem, predict(model, record['file'])
        assert (record['width'], record['height']) == sizes[name]
        assert record['breeds'][0] == {'breed': record['breed'], 'probability': record['probability']}
        assert len(record['breeds']) == 5 and record['species'] in ('cat', 'dog')
        assert record['bbox'] == list(expected.bbox) and record['mask_coverage'] == expected.mask.mean()
        mask, pet = (Image.open(tmp_path / f'{kind}s' / f'{name}_{kind}.png') for kind in ('mask', 'cutout'))
        assert mask.size == pet.size == sizes[name] and (mask.mode, pet.mode) == ('L', 'RGBA')
        assert np.array_equal(mask, expected.mask * 255)
        assert (record['mask_file'], record['cutout_file']) == (mask.filename, pet.filename)
    # Large ones are drawn smaller, still smaller where there are several.
    assert Image.open(tmp_path / 'out.png').size[0] == 2 * (640 + 44)
    large = max(sizes, key=lambda name: max(sizes[name]))
    run('--model', model_path, '--out', tmp_path / 'out.png', *(tmp_path / 'in').glob(f'{large}.*'))
    assert Image.open(tmp_path / 'out.png').size[0] == 2 * (1600 + 44)


@pytest.mark.usefixtures('no_picture')
def test_json_on_standard_output_is_alone_there(model_path, tmp_path, capsys):
    one, two = photograph(tmp_path / '1.png'), photograph(tmp_path / '2.png')
    run('--model', model_path, '--out', tmp_path / 'out.png', '--json', '-', one, two)
    printed = capsys.readouterr()
    assert [json.loads(line)['file'] for line in printed.out.splitlines()] == [str(one), str(two)]
    assert printed.err == f'{tmp_path / "out.png"}: 2 photographs\n'


# ---- which photographs, and where their files go


def test_folder_shows_the_first_12_and_keeps_its_folders_apart(model_path, tmp_path, capsys):
    folder = tmp_path / 'in'
    for part in 'a', 'b':
        (folder / part).mkdir(parents=True)
        for number in range(7):
            photograph(folder / part / f'{number}.JPG', (8, 6))
    (folder / 'notes.txt').write_text('no photograph')
    run('--model', model_path, '--out', tmp_path / 'out.png', '--cutouts', tmp_path / 'cutouts', folder)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15 and lines[-1] == f'{tmp_path / "out.png"}: the first 12 of 14 photographs'
    assert len(list((tmp_path / 'cutouts' / 'b').glob('*_cutout.png'))) == 7
    assert Image.open(tmp_path / 'out.png').size[1] == 12 * (192 + 44)


@pytest.mark.usefixtures('no_picture')
def test_patterns_name_files_by_the_folders_below_them(model_path, tmp_path, capsys):
    for name in 'b/pug.png', 'a/pug.png', 'a/pug.txt', 'pug.png':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photograph(tmp_path / name, size=(20, 16)) if name.endswith('png') else (tmp_path / name).write_text('no')
    out = '--model', model_path, '--out', tmp_path / 'out.png', '--save-masks', tmp_path / 'masks'
    run(*out, tmp_path / '[ab]' / '*')
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(': ')[0] for line in lines[:-1]] == [str(tmp_path / each / 'pug.png') for each in 'ab']
    masks = sorted(str(path.relative_to(tmp_path / 'masks')) for path in (tmp_path / 'masks').rglob('*.png'))
    assert masks == ['a/pug_mask.png', 'b/pug_mask.png']
    photograph(tmp_path / '[1].png')  # a name that is there is no pattern
    run(*out, tmp_path / '[1].png')


@pytest.mark.usefixtures('no_picture')
def test_a_second_run_sees_the_same_photographs(model_path, tmp_path, capsys):
    """Neither what the first wrote nor what is hidden; a folder to write to may be the one that is searched."""
    for name in 'cat.png', 'phone.jfif', '.trash/old.png', 'a/.hidden.png':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photograph(tmp_path / name, size=(20, 16))
    folders = '--save-masks', tmp_path / 'masks', '--cutouts', tmp_path / 'a' / 'cutouts'
    for _ in range(2):
        run('--model', model_path, '--out', tmp_path / 'out.png', *folders, tmp_path)
        lines = capsys.readouterr().out.splitlines()
        assert [Path(line.partition(': ')[0]).name for line in lines] == ['cat.png', 'phone.jfif', 'out.png']
    (tmp_path / 'one').mkdir()
    photograph(tmp_path / 'one' / 'cat.png')
    run('--model', model_path, '--out', tmp_path / 'out.png', '--cutouts', tmp_path / 'one', tmp_path / 'one')
    assert (tmp_path / 'one' / 'cat_cutout.png').exists()


@pytest.mark.usefixtures('no_picture')
def test_whatever_goes_wrong_in_one_photograph_is_its_line(model_path, tmp_path, capsys, monkeypatch):
    one, two, predict_it = photograph(tmp_path / '1.png'), photograph(tmp_path / '2.png'), mtl_vis.predict
    results = iter([lambda *_, **__: {}['key'], predict_it])
    monkeypatch.setattr(mtl_vis, 'predict', lambda *args, **options: next(results)(*args, **options))
    with pytest.raises(InputError, match='1 of 2 photographs failed'):
        run('--model', model_path, '--out', tmp_path / 'out.png', '--json', tmp_path / 'a.jsonl', one, two)
    assert capsys.readouterr().err.startswith(f'error: {one}: ')
    assert json.loads((tmp_path / 'a.jsonl').read_text())['file'] == str(two)


@pytest.mark.usefixtures('no_picture')
def test_what_was_found_is_kept_if_an_output_cannot_be_written(model_path, tmp_path, error_line):
    one, two = photograph(tmp_path / '1.png'), photograph(tmp_path / '2.png')
    (tmp_path / 'cutouts' / '2_cutout.png').mkdir(parents=True)
    options = '--model', model_path, '--out', tmp_path / 'out.png', '--cutouts', tmp_path / 'cutouts'
    assert '2_cutout.png: is not a file' in error_line(main, *options, '--json', tmp_path / 'a.jsonl', one, two)
    files = [json.loads(line)['file'] for line in (tmp_path / 'a.jsonl').read_text().splitlines()]
    assert files == [str(one), str(two)]


@pytest.mark.usefixtures('no_picture')
def test_same_names_keep_their_suffix(model_path, tmp_path):
    for name in 'cat.png', 'cat.jpg', 'dog.png':
        photograph(tmp_path / name, size=(20, 16))
    options = '--model', model_path, '--out', tmp_path / 'mask.png', '--cutouts', tmp_path / 'cutouts'
    run(*options, tmp_path)
    names = sorted(path.name for path in (tmp_path / 'cutouts').iterdir())
    assert names == ['cat.jpg_cutout.png', 'cat.png_cutout.png', 'dog_cutout.png']


def test_patterns_and_folders_without_photographs_are_named(tmp_path, error_line):
    (tmp_path / 'empty').mkdir()
    for name in 'x*.png', 'empty':
        line = error_line(main, tmp_path / name)
        assert f'{name}: finds no file that ends in .jpg' in line


def test_a_missing_model_and_one_without_masks_are_named(tmp_path, error_line):
    one, boxes = photograph(tmp_path / 'one.png'), write_model(tmp_path / 'boxes.pt', BoxNet)
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


def test_folders_to_write_are_no_files(tmp_path, capsys):
    one = photograph(tmp_path / 'one.png')
    for option in '--save-masks', '--cutouts':
        with pytest.raises(SystemExit) as stopped:
            run(option, one, one)
        assert stopped.value.code == 2 and "one.png' is not a folder" in capsys.readouterr().err


@pytest.mark.filterwarnings('error:Glyph')
@pytest.mark.parametrize('name', ['$x^{ costs 5$', 'シャム猫'])
def test_title_with_dollar_or_missing_glyph_gives_no_warning(tmp_path, name):
    mtl_vis.save_picture([[(name, torch.zeros(3, 64, 64, dtype=torch.uint8))]], tmp_path / 'mask.png')
    assert Image.open(tmp_path / 'mask.png').size == (108, 108)
