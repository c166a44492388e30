import pytest
import torch

from lib import models
from lib.models import build
from lib.shapes import prunable


def weights(model):
    return {n: layer.weight.numel() for n, layer in prunable(model).items()}


def test_lenet5_is_the_caffe_variant():
    # papers: conv 500 and 25,000 weights, fc 400,000 and 5,000; 580 biases
    net = build("lenet5", (1, 28, 28), 10)
    assert weights(net) == {"conv1": 500, "conv2": 25_000, "fc1": 400_000, "fc2": 5_000}
    assert sum(p.numel() for p in net.parameters()) == 431_080


def test_lenet300_has_266200_weights():
    assert sum(weights(build("lenet300", (1, 28, 28), 10)).values()) == 266_200


def test_resnet20_has_the_published_size():
    # He et al. 2016, table 6: 0.27 M parameters
    net = build("resnet20", (3, 32, 32), 10)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(0.27e6, rel=0.02)
    convs = [m for n, m in net.named_modules() if isinstance(m, torch.nn.Conv2d) and "shortcut" not in n]
    assert len(convs) + 1 == 20


@pytest.mark.parametrize("name", ["lenet5", "lenet300", "vgg", "resnet8", "resnet20", "squeezenet1_1"])
@pytest.mark.parametrize(("shape", "classes"), [((1, 28, 28), 10), ((3, 32, 32), 7)])
def test_every_model_takes_the_data_sets_shape(name, shape, classes):
    net = build(name, shape, classes).eval()
    assert net(torch.zeros(2, *shape)).shape == (2, classes)


def test_width_and_seed():
    assert build("resnet8", (1, 28, 28), 10, width=4).conv1.out_channels == 4
    a, b, c = (build("lenet300", (1, 28, 28), 10, seed=s).fc1.weight for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_building_leaves_the_global_random_state():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    build("lenet300", (1, 28, 28), 10, seed=9)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("name", ["lenet", "resnet9", "resnet2", ""])
def test_unknown_model_is_named(name):
    with pytest.raises(ValueError, match="is unknown: allowed are lenet5"):
        models.builder(name)


def test_image_too_small_for_lenet5():
    with pytest.raises(ValueError, match="16x16"):
        build("lenet5", (1, 12, 12), 10)
