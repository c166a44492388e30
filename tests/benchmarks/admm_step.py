"""What an ADMM training step costs beside a dense one, and beside the penalty taken through autograd.

LeNet-5 on Fashion-MNIST, one thread. The three kinds of step take turns, so that the machine's drift hits all alike.
"""

import time

import torch
from torch.nn.functional import cross_entropy

from lib import data, models
from lib.pruning import Unstructured, uniform_plan
from lib.recipes.admm import _Pull
from lib.training import batches, make_optimizer

ROUNDS, BATCH = 240, 128


def main() -> None:
    torch.set_num_threads(1)
    images = data.load(train_size=BATCH * ROUNDS // 4)
    net = models.build("lenet5", images.shape, images.classes)
    plan = uniform_plan(net, Unstructured(0.9), keep_dense=("conv1",))
    pull = _Pull(net, plan, images, 1, 1e-3, 1.3, 0.1, False)
    optimizer = make_optimizer(net, "sgd", 1e-3, 0.9, 5e-4)

    def step(x, y, kind: str) -> float:
        started = time.perf_counter()
        loss = cross_entropy(net(x), y)
        if kind == "ADMM through autograd":
            loss = loss + sum(0.5e-3 * (pull.parameters[n] - pull.pairs[0].target[n]).square().sum() for n in plan)
        optimizer.zero_grad()
        loss.backward()
        if kind == "ADMM":
            pull.after_backward(net, 0)
        optimizer.step()
        return time.perf_counter() - started

    kinds = ("dense", "ADMM", "ADMM through autograd")
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for epoch in range(4):
        for i, (x, y) in enumerate(batches(images.train, BATCH, 0, epoch)):
            order = kinds[i % 3 :] + kinds[: i % 3]
            for kind in order:
                seconds[kind].append(step(x, y, kind))
    medians = {kind: sorted(s)[len(s) // 2] for kind, s in seconds.items()}
    print(f"{'step (LeNet-5, batch 128, 1 thread)':40} {'median ms':>10} {'ratio':>7}")
    for kind in kinds:
        print(f"{kind:40} {1e3 * medians[kind]:10.2f} {medians[kind] / medians['dense']:7.3f}")


if __name__ == "__main__":
    main()
