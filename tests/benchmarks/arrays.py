"""What a network in arrays costs to compute, in times of its plain forward: CPU seconds of runs in turns, one thread.

LeNet-5, 8-bit weights in 2-bit cells, 8-bit inputs bit by bit, 128 rows; where its time goes by layer; what memory it
takes; a ResNet-20; wires. Prints tables. ``python tests/benchmarks/arrays.py [images]`` (default 1000).
"""

import contextlib
import statistics
import sys
import time

import psutil
import torch
import torchvision

from lib import crossbar, data, faults, models, shapes, training
from lib.crossbar import Array, Mapping, Wires
from lib.crossbar.inference import in_arrays

PAIR = Mapping("two_column", 8, 2)
DESIGNS = {
    "steps of one: ISAAC with flips, 8 bits": (Array(adc_bits=8, flip=True), {}),
    "  1 % of the cells stuck": (Array(adc_bits=8, flip=True), {"devices": faults.StuckAt(0.01)}),
    "  5 % of the cells stuck": (Array(adc_bits=8, flip=True), {"devices": faults.StuckAt(0.05)}),
    "  offset without flips, 8 bits": (Array(adc_bits=8), {}),
    "  two columns, 8 bits": (Array(mapping=PAIR, adc_bits=8), {}),
    "  analog differences, 8 bits": (Array(mapping=PAIR, adc_bits=8, analog_difference=True), {}),
    "coarse steps: offset, 6 bits": (Array(adc_bits=6), {}),
    "  offset with flips, 5 bits": (Array(adc_bits=5, flip=True), {}),
    "  two columns, 6 bits": (Array(mapping=PAIR, adc_bits=6), {}),
    "  analog differences, 5 bits": (Array(mapping=PAIR, adc_bits=5, analog_difference=True), {}),
    "not whole: variation of 10 %": (Array(adc_bits=8, flip=True), {"devices": faults.Variation(0.1)}),
    "  wires": (Array(adc_bits=8), {"wires": Wires(2.12, 6.36, 1e6, model="line")}),
    "  on/off ratio of 10, no dummy": (
        Array(mapping=Mapping("offset", 8, 2, on_off=10.0), dummy=False, adc_bits=8),
        {},
    ),
    "three copies of each weight": (Array(mapping=Mapping("offset", 8, 2, copies=3), adc_bits=8), {}),
}


def seconds(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def run(net, x, batch: int) -> None:
    with torch.no_grad():
        for part in x.split(batch):
            net(part)


def trained():
    images = data.load("fashion_mnist", train_size=2000, test_size=1000)
    net = models.build("lenet5", images.shape, images.classes, seed=0)
    training.fit(net, images, epochs=1, lr=0.05, batch_size=32)
    return net.eval(), images


def ratio(net, plain, x, batch: int, most: int, repeats: int = 5) -> str:
    """Images a second in arrays and plain, and the median of ratios."""
    pairs = [
        (seconds(lambda: run(net, x[:most], batch)) / len(x[:most]), seconds(lambda: run(plain, x, batch)) / len(x))
        for _ in range(repeats)
    ]
    slow, fast = (1 / statistics.median(side) for side in zip(*pairs, strict=True))
    return f"{slow:9.0f} {fast:9.0f} {statistics.median(a / b for a, b in pairs):7.1f}x"


def layers(placed, x) -> dict[str, float]:
    """CPU seconds of every layer in arrays."""
    spent = dict.fromkeys(in_arrays(placed), 0.0)

    def timed(name: str, user):
        def forward(x):
            start = time.process_time()
            y = user(x)
            spent[name] += time.process_time() - start
            return y

        return forward

    users = {name: user for name, (user, *_) in in_arrays(placed).items()}
    for name, user in users.items():
        user.layer.forward = timed(name, user)
    run(placed, x, len(x))
    for user in users.values():
        user.layer.forward = user
    return spent


def main(count: int) -> None:
    torch.set_num_threads(1)
    net, images = trained()
    x = images.test.x[:count]
    run(net, x, 100)
    print(f"{'LeNet-5 in arrays, batches of 100':42s} {'images/s':>9s} {'plain':>9s} {'slower':>8s}   share of layers")
    for name, (array, options) in DESIGNS.items():
        placed = crossbar.on_arrays(net, array, images.train.x[:64], **options)
        run(placed, x[:100], 100)  # compiles
        spent = layers(placed, x[:100])
        shares = ", ".join(f"{n} {s / sum(spent.values()):.0%}" for n, s in spent.items())
        print(f"{name:42s} {ratio(placed, net, x, 100, 400)}   {shares}", flush=True)

    wires_and_counts(net, images)

    print("\npeak memory of a process of its own, LeNet-5, a batch of 200; what the libraries alone take is in it")
    for name in ("libraries", "plain", *DESIGNS):
        print(f"{name:42s} {peak(name):9.0f} MB", flush=True)

    print()
    kinds = [name for name in DESIGNS if name[0] != " "]
    for name, shape, batch, some in (("resnet8", (1, 28, 28), 1000, kinds[:1]), ("resnet20", (3, 32, 32), 20, kinds)):
        large, x = models.build(name, shape, 10, seed=0).eval(), torch.rand(batch, *shape)
        for kind in some:
            array, options = DESIGNS[kind]
            placed = crossbar.on_arrays(large, array, x[:20], **options)
            run(placed, x[:20], 20)
            print(f"{name + ', ' + kind:50s} {ratio(placed, large, x, batch, batch, 3)}", flush=True)


def peak(name: str) -> float:
    """The most memory that a process of its own holds, looked at every 5 ms, in MB."""
    process, most = psutil.Popen([sys.executable, __file__, name]), 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            most = max(most, process.memory_info().rss)
        time.sleep(0.005)
    assert process.returncode == 0
    return most / 2**20


def large_batch(name: str) -> None:
    if name == "libraries":
        return
    torch.set_num_threads(1)
    net, x = models.build("lenet5", (1, 28, 28), 10, seed=0).eval(), torch.rand(200, 1, 28, 28)
    if name != "plain":
        array, options = DESIGNS[name]
        net = crossbar.on_arrays(net, array, x[:64], **options)
    run(net, x, 200)


def wires_and_counts(net, images) -> None:
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
    given = sys.argv[1] if len(sys.argv) > 1 else "1000"
    main(int(given)) if given.isdigit() else large_batch(given)
