"""What a device does: milliseconds of a training step, images and trials a second, and whether training twice is equal.

On CUDA when there is one, else on the CPU. Ends with 1 when two trainings of the same seed differ in a bit.
"""

import os
import sys
import tempfile
import time
from dataclasses import replace

import torch

from lib import data, models, training
from lib.faults import sweep

NETS = (("lenet5", {}), ("vgg", {"width": 8}), ("resnet8", {"width": 4}))
LARGE = (("vgg", {"width": 64}), ("resnet20", {"width": 16}), ("resnet20", {"width": 64}))  # not on a CPU
BATCH = 128
STEPS, CHIPS, TESTED = (60, 20, 10_000) if torch.cuda.is_available() else (5, 3, 500)


def seconds(function) -> float:
    """Wall time, with all that the device still has to do."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> int:
    torch.set_num_threads(1)
    place = training.device()
    images = data.load(train_size=STEPS * BATCH, test_size=TESTED).to(place)
    few = replace(images, test=data.Split(images.test.x[:500], images.test.y[:500]))
    shown = torch.cuda.get_device_name() if place.type == "cuda" else "the CPU, one thread: there is no CUDA here"
    print(f"device: {shown}; batches of {BATCH}, images {tuple(images.shape)}, trials of {len(few.test)} images")
    print(f"{'network':22} {'ms a step':>10} {'images/s':>10} {'trials/s':>10}   two trainings of one epoch")
    differ = 0
    for name, options in NETS + (LARGE if place.type == "cuda" else ()):
        nets = [models.build(name, images.shape, images.classes, seed=1, **options).to(place) for _ in range(2)]
        took = [seconds(lambda net=net: training.fit(net, images, epochs=1, lr=0.01, batch_size=BATCH)) for net in nets]
        pairs = list(zip(*(net.state_dict().values() for net in nets), strict=True))
        apart = sum(not torch.equal(a, b) for a, b in pairs)
        differ += apart > 0
        evaluated = seconds(lambda net=nets[0]: training.evaluate(net, images.test))
        tried = seconds(lambda net=nets[0]: sweep(net, "two_column", [0.01], CHIPS, few.test))
        largest = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
        said = f"{apart} of {len(pairs)} tensors differ, by {largest:.1e}" if apart else "equal, bit for bit"
        rates = f"{1e3 * took[1] / STEPS:10.2f} {len(images.test) / evaluated:10.0f} {CHIPS / tried:10.2f}"
        print(f"{' '.join([name, *(f'{k} {v}' for k, v in options.items())]):22} {rates}   {said}", flush=True)
    return int(differ > 0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["CACHE_ROOT"] = cache
        status = main()
    sys.exit(status)
