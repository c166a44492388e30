import pytest
import torch

from lib import models
from lib.models import ModelError, build
from lib.shapes import prunable
from lib.study import MeasurementError, Store
from lib.study.parameters import outside


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


THIN = """
from torch import nn

def thin(shape, classes, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], width), nn.ReLU(), nn.Linear(width, classes))
"""


def test_a_network_of_ones_own_file(tmp_path):
    (file := tmp_path / "nets_of_ones_own.py").write_text(THIN)
    name = f"{file}:thin"
    first, same = (build(name, (1, 8, 8), 3, seed=1) for _ in range(2))
    assert first(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert torch.equal(first[1].weight, same[1].weight)
    assert build(name, (1, 8, 8), 3, width=7)[1].out_features == 7
    before = outside("01_lottery_ticket_vs_finetuning", {"model": name, "dataset": "mnist"})
    file.write_text(THIN.replace("width=4", "width=5"))  # who edits it gets what it says now, and no older number
    assert build(name, (1, 8, 8), 3)[1].out_features == 5
    after = outside("01_lottery_ticket_vs_finetuning", {"model": name, "dataset": "mnist"})
    assert before.keys() == after.keys() == {name}
    assert before != after
    file.write_text(THIN.replace("def thin", "def thick"))
    with pytest.raises(ModelError, match="there is no function 'thin'"):
        build(name, (1, 8, 8), 3)


def test_what_changes_while_it_is_measured_is_not_kept(tmp_path):
    (file := tmp_path / "edited_meanwhile.py").write_text(THIN)
    name = f"{file}:thin"

    def wide(seed):
        if seed:
            file.write_text(THIN.replace("width=4", "width=6"))
        return {"width": build(name, (1, 8, 8), 3)[1].out_features}

    store = Store("s", outside=lambda: outside("01_lottery_ticket_vs_finetuning", {"model": name}))
    with pytest.raises(MeasurementError, match=r"edited_meanwhile\.py:thin changed while wide was measured"):
        store.measure(wide, [{"seed": 0}, {"seed": 1}])
    assert store.measure(wide, [{"seed": 1}])["width"].tolist() == [6]
    file.write_text(THIN)
    assert store.measure(wide, [{"seed": 0}])["width"].tolist() == [4]


@pytest.mark.parametrize(
    ("file", "function", "text", "message"),
    [
        ("none_of_ones_own", "thin", None, "cannot be read"),
        ("ill_of_ones_own", "thin", "1 / 0", "ZeroDivisionError"),
        ("torch", "thin", THIN, "'torch' is no name for a module, or that of another; rename the file"),
        ("colorsys", "thin", THIN, "rename the file"),
        ("nets.v2", "thin", THIN, "rename the file"),
        ("quits", "thin", "raise SystemExit(2)", "SystemExit"),
        ("narrow_of_ones_own", "thin", "def thin(shape): pass", "is called with shape, classes: too many"),
        ("lacking_of_ones_own", "thick", THIN, "there is no function 'thick'"),
        ("no_network_of_ones_own", "thin", "thin = lambda shape, classes: 1", "built a int, no torch.nn.Module"),
    ],
)
def test_a_file_that_cannot_be_a_network_is_named(tmp_path, file, function, text, message):
    if text:
        (tmp_path / f"{file}.py").write_text(text)
    with pytest.raises(ModelError, match=message):
        build(f"{tmp_path / file}.py:{function}", (1, 8, 8), 3)


@pytest.mark.parametrize("name", ["lenet", "resnet9", "resnet2", ""])
def test_unknown_model_is_named(name):
    with pytest.raises(ModelError, match="is unknown: allowed are lenet5"):
        models.builder(name)


@pytest.mark.parametrize(
    ("name", "size", "needs"),
    [
        *(("lenet5", 12, 16), ("vgg", 7, 8), ("alexnet", 28, 63), ("densenet121", 28, 29), ("convnext_tiny", 28, 32)),
        *(("vit_b_32", 28, 32), ("maxvit_t", 200, 221)),  # their size is a part of them
    ],
)
def test_images_that_are_too_small_are_told_the_size_that_is_needed(name, size, needs):
    torch.set_num_threads(1)
    message = f"{name} takes no images of {size}x{size}: the smallest square ones are {needs}x{needs}$"
    with pytest.raises(ModelError, match=message):
        build(name, (1, size, size), 10)
    with torch.no_grad():
        assert build(name, (1, needs, needs), 3).eval()(torch.zeros(1, 1, needs, needs)).shape == (1, 3)


def test_both_sides_of_an_image_have_to_do():
    for shape in ((1, 8, 8), (1, 8, 28), (1, 28, 8)):  # two negative sides make a positive size
        with pytest.raises(ModelError, match=f"lenet5 takes no images of {shape[1]}x{shape[2]}"):
            build("lenet5", shape, 10)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_off(name):
    net = build(name, (1, 75, 75), 5).train()
    assert net(torch.zeros(2, 1, 75, 75)).shape == (2, 5)


def test_the_first_convolution_is_fitted_and_all_else_of_it_kept(monkeypatch):
    import torchvision

    first = torch.nn.Conv2d(3, 8, 3, stride=2, padding=2, dilation=2, bias=False, padding_mode="reflect")
    monkeypatch.setattr(torchvision.models, "get_model", lambda *a, **o: torch.nn.Sequential(first))
    (conv,) = build("resnet18", (2, 9, 9), 10)
    assert conv.weight.shape == (8, 2, 3, 3)
    kept = ("stride", "padding", "dilation", "groups", "padding_mode", "bias")
    assert all(getattr(conv, key) == getattr(first, key) for key in kept)
