"""What a network in arrays costs to compute: images per second beside the plain forward, and where the time goes.

LeNet-5, 8-bit weights in 2-bit cells, 8-bit inputs bit by bit, 128 rows, on one thread. Prints tables; ratios are of
runs in turns. ``python tests/benchmarks/arrays.py [images]`` (default 2000).
"""

import statistics
import sys
import time

import torch
import torchvision
from torch.profiler import ProfilerActivity, profile

from lib import crossbar, data, faults, models, shapes, training
from lib.crossbar import Array, Mapping, Wires

KINDS = {
    "sums of columns": ("aten::bmm",),
    "converters": ("aten::clamp_", "aten::round_", "aten::div_", "aten::sub_"),
    "shift and add": ("aten::addmv_", "aten::mv", "aten::sum", "aten::mul_", "aten::mul"),
    "moving numbers": ("aten::copy_", "aten::cat", "aten::fill_", "aten::constant_pad_nd"),
}


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(count: int) -> None:
    torch.set_num_threads(1)
    images = data.load("fashion_mnist", train_size=2000, test_size=count)
    net = models.build("lenet5", images.shape, images.classes, seed=0)
    training.fit(net, images, epochs=1, lr=0.05, batch_size=32)
    designs = {
        "ISAAC, 8 bits with flips": Array(adc_bits=8, flip=True),
        "offset, 8 bits": Array(adc_bits=8),
        "two columns, 8 bits": Array(mapping=Mapping("two_column", 8, 2), adc_bits=8),
        "two columns, analog difference, 8 bits": Array(
            mapping=Mapping("two_column", 8, 2), adc_bits=8, analog_difference=True
        ),
    }
    designs |= {"two columns, 6 bits: coarse steps": Array(mapping=Mapping("two_column", 8, 2), adc_bits=6)}
    devices = dict.fromkeys(designs, ())
    for share in (0.01, 0.05):
        designs[f"ISAAC, {share:.0%} of cells stuck"] = Array(adc_bits=8, flip=True)
        devices[f"ISAAC, {share:.0%} of cells stuck"] = faults.StuckAt(share)
    nets = {n: crossbar.on_arrays(net, a, images.train.x[:64], devices=devices[n]) for n, a in designs.items()}
    evaluate = {name: (lambda n=n: training.evaluate(n, images.test)) for name, n in nets.items()}
    plain = lambda: training.evaluate(net, images.test)  # noqa: E731
    plain()
    print(f"{'LeNet-5 in arrays':40s} {'images/s':>9s} {'plain/s':>9s} {'slower by':>9s}")
    for name, run in evaluate.items():
        pairs = [(seconds(run), seconds(plain)) for _ in range(3)]
        slow, fast = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{name:40s} {count / slow:9.0f} {count / fast:9.0f} {ratio:8.1f}x")

    few = data.Split(images.test.x[:400], images.test.y[:400])
    with profile(activities=[ProfilerActivity.CPU]) as found:
        training.evaluate(nets["ISAAC, 8 bits with flips"], few)
    own = {e.key: e.self_cpu_time_total for e in found.key_averages()}
    print("\nshare of the time, ISAAC, 8 bits with flips")
    shares = {kind: sum(own.get(op, 0) for op in ops) / sum(own.values()) for kind, ops in KINDS.items()}
    for kind, share in (shares | {"all else": 1 - sum(shares.values())}).items():
        print(f"{kind:40s} {share:9.0%}")

    cells = torch.rand(1, 128, 128, dtype=torch.float64) * 1e-6
    one = min(seconds(lambda: crossbar.effective(cells, 2.12, 6.36)) for _ in range(3))
    program = seconds(lambda: crossbar.on_arrays(net, Array(), images.train.x[:64], wires=Wires(2.12, 6.36, 1e6)))
    print(f"\nwires of a 128 x 128 array, exactly      {one:9.2f} s; LeNet-5's 125 arrays {program:.0f} s, once")
    for name in ("resnet50", "vgg16"):
        with torch.device("meta"):
            large = torchvision.models.get_model(name)
        spent = min(
            seconds(lambda m=large: crossbar.tile(shapes.layer_shapes(m, (3, 224, 224)), Array())) for _ in range(3)
        )
        print(f"{name + ' at 224 x 224, counted from shapes':40s} {spent:9.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
