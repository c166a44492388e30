"""What faults cost: a trial against a plain evaluation, drawing a chip, two processes, the search for a tolerated rate.

Prints tables; ratios are medians of interleaved runs on one thread.
"""

import os
import resource
import statistics
import tempfile
import time

import numpy as np
import torch

from lib import data, models, published, training
from lib.crossbar import Mapping
from lib.faults import StuckAt, sweep, tolerated_rate
from lib.faults.trials import _Bench

REPEATS = 7


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: dict) -> dict[str, float]:
    """Median seconds of each function, run in turns; the first round warms up."""
    rounds = [{name: seconds(f) for name, f in functions.items()} for _ in range(REPEATS + 1)][1:]
    return {name: statistics.median(r[name] for r in rounds) for name in functions}


def main() -> None:
    torch.set_num_threads(1)
    images = data.load("fashion_mnist", train_size=5000)
    net = models.build("lenet5", images.shape, images.classes, seed=0)
    training.fit(net, images, epochs=2, lr=0.05, batch_size=32)
    test = data.Split(images.test.x.contiguous(memory_format=torch.channels_last), images.test.y)

    plain = interleaved({b: (lambda b=b: training.evaluate(net, test, b)) for b in (50, 100, 200, 500, 1000)})
    best = min(plain, key=plain.get)
    print(f"plain evaluation of {len(test)} images, LeNet-5, seconds by batch size: ", end="")
    print(", ".join(f"{b}: {s:.2f}" for b, s in plain.items()))
    print(f"\n{'one trial against plain, batch ' + str(best):50} {'ms':>8} {'ratio':>7} {'chip alone, ms':>15}")
    mappings = {
        "two_column": Mapping("two_column"),
        "differential": Mapping("differential"),
        "offset": Mapping("offset"),
    }
    mappings["differential, 8 bits on 2-bit cells"] = Mapping("differential", 8, 2)
    for name, mapping in mappings.items():
        bench = _Bench(net, mapping, images.test, best)
        for rate in (1e-3, 1e-2, 1e-1):
            found = interleaved(
                {
                    "plain": lambda: training.evaluate(net, test, best),
                    "trial": lambda bench=bench, rate=rate: bench.trial(StuckAt(rate), 0),
                    "chip": lambda bench=bench, rate=rate: bench.weights(StuckAt(rate), 0),
                }
            )
            ratio, chip = found["trial"] / found["plain"], 1e3 * found["chip"]
            print(f"{f'{name}, rate {rate:g}':50} {1e3 * found['trial']:8.0f} {ratio:7.3f} {chip:15.1f}")

    shape = torch.Size((1, 2, 1000, 2000))
    draw = {r: (lambda r=r: StuckAt(r).draw(shape, Mapping(), 0, "fc")) for r in (1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.3)}
    draw["uniform"] = lambda: np.random.default_rng(0).random(shape.numel(), dtype=np.float32)
    print(f"\n{'drawing a chip of 4 million cells':44} {'ms':>8}")
    for name, value in interleaved(draw).items():
        print(f"{'one uniform number a cell' if name == 'uniform' else f'rate {name:g}':44} {1e3 * value:8.1f}")

    def timed_sweep(processes: int) -> float:
        with tempfile.TemporaryDirectory() as os.environ["CACHE_ROOT"]:
            return seconds(lambda: sweep(net, "differential", [0.01, 0.02], 20, images.test, processes=processes))

    timed_sweep(2)  # starts the workers, which stay
    timed = [[timed_sweep(p) for p in (1, 2)] for _ in range(3)]
    one, two = (statistics.median(t[i] for t in timed) for i in (0, 1))
    print(f"\nsweep of 40 trials: 1 process {one:.1f} s, 2 processes {two:.1f} s, ratio {one / two:.2f}")

    with tempfile.TemporaryDirectory() as os.environ["CACHE_ROOT"]:
        found = tolerated_rate(net, "differential", 1.0, 30, images.test, lowest=1e-4, highest=0.3, processes=2)
    grid = int(np.ceil(np.log(0.3 / 1e-4) / np.log(1.2))) + 1
    print(f"\ntolerated rate at a drop of 1 point: {found.rate:.4f} [{found.low:.4f}, {found.high:.4f}]", end="")
    print(
        f", {found.trials} trials; a grid of {grid} rates 20 % apart: {30 * grid}, {30 * grid / found.trials:.1f} times"
    )
    large()


def large() -> None:
    """The same for a network of ImageNet's size, with the most memory of this process, where its files are at hand."""
    name = "efficientnet_lite0"
    try:
        net, few = published.load(name), data.pixels("imagenet", size=50, **published.IMAGES[name])
    except (published.PublishedError, data.DataError) as error:
        print(f"\n{name} is left out: {error}")
        return
    bench = _Bench(net, Mapping("two_column"), few, 25)
    found = interleaved(
        {"plain": lambda: training.evaluate(net, few, 25), "trial": lambda: bench.trial(StuckAt(1e-3), 0)}
    )
    peak, ratio = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, found["trial"] / found["plain"]
    print(f"\n{name}, {len(few)} images: a trial {ratio:.3f} times a plain evaluation, most memory {peak:.2f} GB")


if __name__ == "__main__":
    main()
