"""What training computes: multiply-accumulates of every layer, forward and backward, at the density that was live.

`metered` counts for any recipe, this project's or a user's own: it watches the forward passes of the network that is
trained, and asks nothing of the recipe. `lib.costs.training_energy` puts a price on the counts.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pandas as pd
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lib.constraint import Mask
from lib.shapes import all_layers, dense_macs, source, uses
from lib.training.loop import Progress, TrainingError

Product = Literal["forward", "input_gradient", "weight_gradient", "weight_sign"]
COLUMNS = ["layer", "product", "bits_a", "bits_b", "macs"]


class Meter:
    """Counts of one network while it is trained; `metered` opens and closes it.

    A forward pass in training mode costs ``N * positions * weights * density`` multiply-accumulates, its backward pass
    as much for the gradient of the inputs (none for a layer whose inputs need no gradient, such as the first) and as
    much for that of the weights (none if they are frozen), where a gradient comes to the output. ``density`` is that of
    the layer's mask at that moment, 1 without one: what is zero but held by no mask is computed like all else. A weight
    that is frozen at a value has no gradient (`lib.recipes.partial_hardening`). Operands count as 32 bits wide. Passes
    in evaluation mode, norms, activations and the optimizer are not counted.

    >>> from lib.training.spent import Meter
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> with Meter(net) as meter:
    ...     net(torch.ones(10, 4)).sum().backward()
    >>> meter.frame()[["layer", "product", "macs"]].values.tolist()[:3]
    [['0', 'forward', 120.0], ['0', 'weight_gradient', 120.0], ['1', 'forward', 60.0]]
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {id(layer): name for name, layer in model.named_modules()}
        self.counts: Counter[tuple[str, str, int, int]] = Counter()
        all_layers(model, "what training computes")
        self.uses = uses(model)
        self.before = {name: getattr(source(layers[0]), "grad", None) for name, layers in self.uses.items()}
        found = ((name, layer) for name, layers in self.uses.items() for layer in layers)
        self.handles = [layer.register_forward_hook(self._watch(name)) for name, layer in found]

    def __enter__(self) -> "Meter":
        _open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        for handle in self.handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """What goes to other processes with a copy of the network, whose hooks know the meter: not the network."""
        return self.__dict__ | {"uses": {}, "before": {}}

    def _watch(self, name: str) -> Callable:
        def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # a closure: copies share it
            if layer.training and self in _open and not getattr(layer, "charges_itself", False):
                there, moving = (dense_macs(layer, output) * density for density in _densities(layer))
                self.add(name, "forward", there)
                products = {"input_gradient": there} if inputs[0].requires_grad else {}
                products |= {"weight_gradient": moving} if _trained(layer) else {}

                def back(_: Tensor) -> None:
                    for product, spent in products.items():
                        self.add(name, product, spent)

                if output.requires_grad:  # where a checkpoint makes it again, no gradient comes to the second
                    for product in products:
                        self.add(name, product, 0.0)  # its place in the frame, layer by layer
                    output.register_hook(back)

        return count

    def add(self, layer: str, product: Product, macs: float, bits: tuple[int, int] = (32, 32)) -> None:
        """Count ``macs`` of operands of so many bits."""
        self.counts[layer, product, *bits] += macs

    def frame(self) -> pd.DataFrame:
        """One row per layer, product and widths of its operands: ``layer, product, bits_a, bits_b, macs``.

        Raises:
            TrainingError: a layer has a new gradient, but no pass in training mode has called it: somebody multiplies
                by its weight directly, or trains in evaluation mode.
        """
        met = {name for name, *_ in self.counts}
        for name, layers in self.uses.items():
            gradient = getattr(source(layers[0]), "grad", None)
            if name not in met and gradient is not None and gradient is not self.before[name]:
                raise TrainingError(
                    f"{name} was trained, but never called in training mode, so that nothing is counted"
                )
        return pd.DataFrame([(*key, float(n)) for key, n in self.counts.items() if n], columns=COLUMNS)


_open: deque[Meter] = deque()  # not a list: which meters are open is no part of what code does (`lib.keys.code`)


@contextmanager
def uncounted() -> Iterator[None]:
    """What runs inside is no training: looks at copies of the network, for a log.

    >>> from lib.training.spent import Meter, uncounted
    >>> net = torch.nn.Linear(4, 3)
    >>> with Meter(net) as meter, uncounted():
    ...     y = net(torch.ones(10, 4))
    >>> len(meter.frame())
    0
    """
    paused = [_open.pop() for _ in range(len(_open))]
    try:
        yield
    finally:
        _open.extend(reversed(paused))


def is_counting() -> bool:
    """Whether a meter is open in this process; work in others is counted there, and added by `charge_all`.

    >>> from lib.training.spent import Meter, is_counting
    >>> with Meter(torch.nn.Linear(4, 3)):
    ...     is_counting()
    True
    """
    return bool(_open)


def _trained(layer: nn.Module) -> bool:
    """Whether a gradient of the weights is computed, or of what they are made of."""
    made_of = source(layer)
    return not isinstance(made_of, Tensor) or made_of.requires_grad


def _densities(layer: nn.Module) -> tuple[float, float]:
    """The share of weights that a mask leaves, and of those that move, where it holds some at a value of their own."""
    for link in layer.parametrizations["weight"] if is_parametrized(layer, "weight") else ():
        if isinstance(link, Mask):
            return tuple(float(m.count_nonzero()) / m.numel() for m in (link.mask, getattr(link, "free", link.mask)))
    return 1.0, 1.0


def charge(layer: nn.Module, product: Product, macs: float, bits: tuple[int, int] = (32, 32)) -> None:
    """Add to every open meter that watches this very layer what no forward pass shows; nothing where there is none.

    For layers that count all of their products (``charges_itself = True``), and for products beside the usual ones.

    >>> from lib.training.spent import Meter, charge
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> with Meter(net) as meter:
    ...     charge(net[0], "weight_sign", 12.0, bits=(4, 16))
    >>> meter.frame().values.tolist()
    [['0', 'weight_sign', 4, 16, 12.0]]
    """
    for meter in _open:
        if id(layer) in meter.layers:
            meter.add(meter.layers[id(layer)], product, macs, bits)


def charge_all(spent: pd.DataFrame) -> None:
    """Add what another process counted to every open meter.

    >>> import pandas as pd
    >>> from lib.training.spent import COLUMNS, Meter, charge_all
    >>> with Meter(torch.nn.Linear(1, 1)) as meter:
    ...     charge_all(pd.DataFrame([("fc", "forward", 32, 32, 5.0)], columns=COLUMNS))
    >>> float(meter.frame()["macs"].sum())
    5.0
    """
    for meter in _open:
        for row in spent.itertuples(index=False):
            meter.add(row.layer, row.product, row.macs, (row.bits_a, row.bits_b))


def metered(
    model: nn.Module, recipe: Callable[..., Any], *args: Any, progress: Progress | None = None, **kwargs: Any
) -> tuple[Any, pd.DataFrame]:
    """``recipe(model, *args, **kwargs)``, and what its training computed: ``cached(metered, model, recipe, ...)``.

    Returns:
        What the recipe returned, and `Meter.frame`: one row per layer, product and widths of its operands.

    >>> from lib import data, models
    >>> from lib.training import fit, metered
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> net = models.build("lenet300", images.shape, images.classes)
    >>> log, spent = metered(net, fit, images, epochs=2, lr=0.05)
    >>> total = spent.groupby("product")["macs"].sum() / 400  # an image's share
    >>> total.tolist()  # 266,200 weights; the first layer's inputs need no gradient
    [266200.0, 31000.0, 266200.0]
    """
    with Meter(model) as meter:
        value = recipe(model, *args, progress=progress, **kwargs)
    return value, meter.frame()
