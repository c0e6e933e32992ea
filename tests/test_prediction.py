"""What a model finds in one image and in many."""

import io

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.ops import box_iou

import prediction
from dataloader_mtl import MTLDataset
from models import FlipAveraged, Outputs
from prediction import cutout, load_model, predict
from support.cli import InputError


@pytest.fixture
def model(model_path):
    return load_model(model_path)


def pixels(height=70, width=90, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same(one, two):
    assert one._replace(mask=None, mask_probability=None) == two._replace(mask=None, mask_probability=None)
    assert np.array_equal(one.mask_probability, two.mask_probability)


def assert_close(one, two):
    """Equal but for the rounding that the size of a batch changes."""
    assert one.breed == two.breed and one.bbox == pytest.approx(two.bbox, abs=1e-3)
    assert one.mask_probability == pytest.approx(two.mask_probability, abs=1e-5)


@pytest.mark.parametrize('name, least_iou', [('mtl_model.pt', 0.75), ('mtl_model_scratch.pt', 0.5)])
def test_shipped_model_finds_a_real_cat(name, least_iou, full_networks):
    """In Stefan van der Walt's photograph of Chelsea (CC0), 451 x 300. All numbers are what the eye sees.

    A box counts as found from an IoU of 0.5 (PASCAL VOC); the better model is held to more.
    """
    from skimage.data import chelsea

    found = predict(load_model(ROOT / name), chelsea())
    assert found.species == 'cat' and found.species_probability > 0.5
    assert box_iou(torch.tensor([found.bbox]), torch.tensor([[30.0, 0, 390, 290]])).item() > least_iou
    assert 0.7 < found.mask.mean() < 0.9
    eyes_and_nose, around = [(170, 115), (318, 137), (263, 245)], [(8, 60), (440, 220), (435, 15)]
    assert all(found.mask[y, x] for x, y in eyes_and_nose) and not any(found.mask[y, x] for x, y in around)


def test_prediction_fits_the_image(model):
    for size in (90, 70), (10, 2000), (1, 1):
        found = predict(model, Image.new('RGB', size, 'white'))
        assert found.breed in model.class_names and 0 < found.probability <= 1
        assert found.mask.shape == size[::-1] and found.mask_probability.dtype == np.float32
        assert np.array_equal(found.mask, found.mask_probability > 0.5)
        xmin, ymin, xmax, ymax = found.bbox
        assert 0 <= xmin <= xmax <= size[0] and 0 <= ymin <= ymax <= size[1]


def test_all_kinds_of_images_give_the_same_prediction(model, tmp_path):
    array = pixels()
    Image.fromarray(array).save(tmp_path / 'one.png')
    data = (tmp_path / 'one.png').read_bytes()
    files = tmp_path / 'one.png', str(tmp_path / 'one.png'), data, io.BytesIO(data)
    for image in *files, Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1):
        assert_same(predict(model, image), predict(model, array))
    assert_same(predict(model, array[:, ::-1]), predict(model, array[:, ::-1].copy()))  # strides below zero
    grey = array[..., 0]
    assert_same(predict(model, grey), predict(model, np.repeat(grey[..., None], 3, axis=2)))


def test_exif_rotation_is_applied_to_paths_and_pil_images(model, tmp_path):
    array, exif = pixels(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(array).save(tmp_path / 'phone.png', exif=exif)
    expected = predict(model, np.rot90(array, -1))
    for image in tmp_path / 'phone.png', Image.open(tmp_path / 'phone.png'):
        assert_same(predict(model, image), expected)
        assert cutout(image, expected).size == (70, 90)


def test_many_images_of_any_size_are_predicted_in_batches_in_order(model):
    images = tuple(pixels(60 + 10 * number, 80, seed=number) for number in range(5))
    expected, batches = [predict(model, image) for image in images], []
    model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    found = predict(model, images, batch_size=2)
    assert type(found) is list and batches == [2, 2, 1]
    for one, two in zip(found, expected, strict=True):
        assert_close(one, two)
    assert predict(model, []) == []


def test_iterator_is_read_one_batch_at_a_time(model):
    read = []
    found = predict(model, (read.append(number) or pixels(seed=number) for number in range(5)), batch_size=2)
    assert read == []
    next(found)
    assert read == [0, 1]
    next(found), next(found)
    assert read == [0, 1, 2, 3] and len(list(found)) == 2


def test_anything_else_is_a_value_error_that_says_what_was_expected(model):
    for image, message in (
        (None, 'found NoneType'),
        ({'cat.jpg': 1}, 'found dict'),
        (np.zeros((4, 4, 3)), r'found ndarray \(4, 4, 3\) of float64'),
        (np.zeros((4, 4, 4), np.uint8), r'found ndarray \(4, 4, 4\) of uint8'),
        (np.zeros((0, 4, 3), np.uint8), r'found ndarray \(0, 4, 3\) of uint8'),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r'found Tensor \(4, 4, 3\) of torch.uint8'),
        (torch.zeros(3, 4, 4), r'found Tensor \(3, 4, 4\) of torch.float32'),
        (Image.new('RGB', (0, 4)), 'found Image of 0 x 4 pixels'),
        ([pixels(), None], 'found NoneType'),
    ):
        with pytest.raises(ValueError, match=f'expected a path, the bytes of a file, .* a uint8 array .*; {message}'):
            predict(model, image)


def test_prediction_agrees_with_evaluation(model, shared_data):
    dataset = MTLDataset('test', root=shared_data)
    for flip, network in (False, model), (True, FlipAveraged(model)):
        found = predict(model, dataset.read([4])[0][0], flip=flip)
        with torch.inference_mode():
            outputs = network(dataset[[4]].image)
        probability, number = outputs.label[0].softmax(dim=0).max(dim=0)
        assert found.breed == model.class_names[number]
        assert found.probability == pytest.approx(probability.item(), abs=1e-5)
        assert found.mask_probability == pytest.approx(outputs.mask[0, 0].sigmoid().numpy(), abs=1e-5)
        assert found.bbox == pytest.approx((outputs.bbox[0] * 64).tolist(), abs=1e-3)


def test_likeliest_breeds_and_species(model):
    label = torch.arange(8.0) / 2
    model.class_species = ['cat', 'dog', 'cat', 'cat', 'cat', 'cat', 'dog', None]
    found = prediction.make_prediction(model, prediction.look(Outputs(label, None, None), (5, 4)))
    shares = label.double().softmax(dim=0).tolist()
    expected = [(model.class_names[index], shares[index]) for index in (7, 6, 5, 4, 3)]
    assert found.breeds == expected and (found.breed, found.probability) == expected[0]
    assert found.species == 'dog' and 0.5 < found.species_probability < 1
    model.class_species = [None] * 8
    assert prediction.make_prediction(model, prediction.look(Outputs(label, None, None), (5, 4)))[3:5] == (None, None)


@pytest.fixture
def red_finder(model):
    """A model that takes red for pet, its share for a probability, and the middle of the picture for the box."""

    def forward(x):
        red = x[:, :1] > x[:, 1:2] + 1
        share = red.float().mean(dim=(1, 2, 3)).clamp(1e-6, 1 - 1e-6)
        box = torch.tensor([0.4, 0.4, 0.6, 0.6]).expand(len(x), 4)
        return Outputs(torch.stack([1 - share, share], dim=1).log(), red * 20.0 - 10, box)

    model.class_names, model.class_species, model.forward = ['none', 'red'], ['cat', 'dog'], forward
    return model


def with_red(left, right):
    array = np.zeros((300, 400, 3), np.uint8)
    array[120:180, left:right, 0] = 255
    return array


def test_small_pet_is_looked_at_again_from_closer(red_finder):
    array = with_red(100, 200)  # the part around it: 50 to 250 and 90 to 210
    once, found = predict(red_finder, array, zoom=False), predict(red_finder, array)
    shares = [dict(each.breeds)['red'] for each in (once, found)]
    assert shares == pytest.approx([1 / 20, (1 / 20 + 1 / 4) / 2], abs=0.02)  # the mean of both looks
    assert once.bbox == pytest.approx((160, 120, 240, 180), abs=0.01)
    assert found.bbox == pytest.approx((130, 138, 170, 162), abs=6)  # that of the second look
    truth = array[..., 0] > 0
    assert (found.mask != truth).mean() < (once.mask != truth).mean() < 0.02
    assert np.array_equal(found.mask_probability[:80], once.mask_probability[:80])  # outside of the part
    for each in predict(red_finder, [with_red(20, 380), array, array])[1:]:
        assert np.array_equal(each.mask, found.mask) and each.bbox == found.bbox


def test_pet_that_is_not_small_is_looked_at_once(red_finder):
    looks, forward = [], red_finder.forward
    red_finder.forward = lambda x: looks.append(len(x)) or forward(x)
    for (left, right), count in {(0, 100): 2, (100, 390): 2, (20, 380): 1, (100, 100): 1}.items():
        looks.clear()
        predict(red_finder, with_red(left, right))
        assert len(looks) == count, (left, right)


def test_cutout_keeps_the_pixels_and_is_as_opaque_as_the_mask_is_sure(model):
    array = pixels(2, 4)
    share = np.array([[0, 0.25, 0.5, 0.625], [0.75, 1, 0.2, 0.9]], np.float32)
    expected = predict(model, array)
    found = np.asarray(cutout(array, expected._replace(mask_probability=share)))
    assert np.array_equal(found[..., :3], array)
    assert found[..., 3].tolist() == [[0, 0, 128, 191], [255, 255, 0, 255]]
    for probability in share.T, None:
        with pytest.raises(ValueError, match=r'does not belong to an image of \(2, 4\)'):
            cutout(array, expected._replace(mask_probability=probability))


def test_cutout_stays_transparent_where_the_photograph_is_and_keeps_no_profile(model):
    clear = Image.new('LA', (2, 1), (90, 255))
    clear.putpixel((0, 0), (90, 0))
    clear.info['icc_profile'] = b'of grey'
    found = cutout(clear, predict(model, clear)._replace(mask_probability=np.ones((1, 2), np.float32)))
    assert np.asarray(found)[..., 3].tolist() == [[0, 255]] and 'icc_profile' not in found.info


def test_numbers_that_are_not_finite_raise_input_error(model):
    for weights in model.state_dict().values():
        if weights.is_floating_point():
            weights.fill_(1e30)
    with pytest.raises(InputError, match='the outputs of the model are not finite'):
        predict(model, pixels())


def test_device_moves_the_model(model):
    with pytest.raises(RuntimeError):  # the meta device holds no numbers
        predict(model, pixels(), device='meta')
