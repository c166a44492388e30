"""What `StrideFirst` costs a training step: the step within and without, in turns, on one thread.

LeNet-5 has no layer that it changes, nor `resnet8` of width 16: their rows are the price of looking at every call.
Width 8 has one (the shortcut of 8 channels), width 4 two. Where the plain form would corrupt memory, which depends on
the instruction set, it runs in the layout that oneDNN gets right; that row then compares two layouts as well.
"""

import statistics
import time
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lib import data, models
from lib.training import StrideFirst, batches, make_optimizer

STEPS, BATCH = 120, 128
BLOCK = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
NETS = (
    ("lenet5", {}, BLOCK),
    ("resnet8", {"width": 16}, 16),
    ("resnet8", {"width": 8}, 8),
    ("resnet8", {"width": 4}, 4),
)
"""Name, options, and the fewest inputs of a 1x1 convolution with a stride."""


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, guard) -> float:
    """Milliseconds of the one thread in one step: other processes do not count."""
    started = time.thread_time()
    with guard:
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()
    return 1e3 * (time.thread_time() - started)


def main() -> None:
    torch.set_num_threads(1)
    images = data.load(train_size=BATCH * STEPS)
    print(f"{'step, batch 128, 1 thread':26} {'plain in':>14} {'plain ms':>9} {'within ms':>10} {'ratio':>7}")
    for name, options, fewest in NETS:
        layout = torch.channels_last if fewest >= BLOCK else torch.contiguous_format
        kinds = {}
        for kind, form, guard in (("plain", layout, nullcontext()), ("within", torch.channels_last, StrideFirst())):
            model = models.build(name, images.shape, images.classes, **options).to(memory_format=form)
            kinds[kind] = model, make_optimizer(model, "sgd", 1e-3, 0.9, 5e-4), form, guard
        took = {kind: [] for kind in kinds}
        for i, (x, y) in enumerate(batches(images.train, BATCH, 0, 0)):
            for kind in sorted(kinds, reverse=bool(i % 2)):
                model, optimizer, form, guard = kinds[kind]
                took[kind].append(step(model, optimizer, x.contiguous(memory_format=form), y, guard))
        plain, within = (statistics.median(took[kind][10:]) for kind in ("plain", "within"))
        ratio = statistics.median(b / a for a, b in zip(took["plain"][10:], took["within"][10:], strict=True))
        title = " ".join([name, *(f"{k} {v}" for k, v in options.items())])
        shown = str(layout).removeprefix("torch.").removesuffix("_format")
        print(f"{title:26} {shown:>14} {plain:9.2f} {within:10.2f} {ratio:7.3f}")


if __name__ == "__main__":
    main()
