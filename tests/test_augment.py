import pytest
import torch

from lib import models
from lib.training import CropAndFlip, Hook, TrainingError, crop_and_flip, evaluate, fit


def test_every_image_is_moved_on_its_own():
    x = torch.rand(64, 2, 5, 5)
    y = crop_and_flip(x, 1, torch.Generator().manual_seed(0))
    framed, seen = torch.nn.functional.pad(x, [1] * 4), set()
    for i in range(64):
        found = [
            (top, left, mirrored)
            for top in range(3)
            for left in range(3)
            for mirrored in (False, True)
            if torch.equal(y[i].flip(2) if mirrored else y[i], framed[i, :, top : top + 5, left : left + 5])
        ]
        assert len(found) == 1
        seen |= {*found}
    assert len(seen) > 12  # of 18


def test_what_is_no_image_is_refused():
    with pytest.raises(TrainingError, match=r"x is \(5, 8, 3\); images are"):
        crop_and_flip(torch.zeros(5, 8, 3), 1, torch.Generator())


def test_only_steps_of_training_see_moved_images(images):
    class Between(Hook):
        def after_epoch(self, model, epoch):
            model.eval()
            self.score = evaluate(model, images.test)

    net = models.build("lenet300", images.shape, images.classes)
    between = Between()
    fit(net, images, epochs=1, lr=0.05, hooks=(CropAndFlip(border=2), between))
    assert not net._forward_pre_hooks
    assert evaluate(net, images.test) == between.score
