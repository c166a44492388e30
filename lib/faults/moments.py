"""What stuck-at faults do to a weight on average, in closed form."""

from torch import Tensor

from lib.crossbar import Mapping
from lib.faults.stuck import StuckAt


def moments(weight: Tensor, mapping: Mapping, faults: StuckAt) -> tuple[Tensor, Tensor]:
    """Mean error and mean squared error of mapped weights over chips.

    A cell at level ``g`` that fails with probabilities ``p_off``, ``p_on`` errs by ``m = -p_off g + p_on (v - g)`` on
    average and by ``q = p_off g^2 + p_on (v - g)^2`` in the square, ``v`` the level of a stuck-on cell. A weight adds
    its cells with coefficients ``c``, so it errs by ``sum c m`` and ``sum c^2 (q - m^2) + (sum c m)^2``, its cells
    failing independently. For a pair of continuous cells that is ``q_a + q_b - 2 m_a m_b``.

    Args:
        weight: weights in shares of their layer's range, in [-1, 1], any shape.
        faults: its ``where`` counts for nothing when the cells of a weight never fail together; with ``rows`` and
            ``clusters`` they do, and the formula does not hold.

    Returns:
        Both in shares of the range and of its square, of the weight's shape; rounding to ``weight_bits`` is not in it.

    >>> from lib.crossbar import Mapping
    >>> from lib.faults import StuckAt, moments
    >>> mean, square = moments(torch.tensor([1.0, 0.0]), Mapping("two_column"), StuckAt.of(on=0.0, off=0.1))
    >>> [round(m, 4) for m in mean.tolist()], [round(s, 4) for s in square.tolist()]  # one weight in ten is lost
    ([-0.1, 0.0], [0.1, 0.0])
    """
    on, off = faults.probabilities
    level = (mapping.encode(weight, 1.0) - mapping.g_min) / (1 - mapping.g_min)
    stuck_on = (faults.stuck_on_value - mapping.g_min) / (1 - mapping.g_min)
    mean = -off * level + on * (stuck_on - level)
    square = off * level.square() + on * (stuck_on - level).square()
    c = mapping.coefficients(weight).reshape(mapping.slices, mapping.columns, *[1] * weight.ndim)
    bias = (c * mean).sum((0, 1))
    return bias, (c.square() * (square - mean.square())).sum((0, 1)) + bias.square()
