"""What kernels refuse."""


class KernelError(ValueError):
    """A layer or inputs that a kernel does not take: the message names what came and what is allowed.

    >>> from lib.kernels import SparseConv2d
    >>> SparseConv2d(torch.nn.Conv2d(1, 1, 3, padding="same"))
    Traceback (most recent call last):
        ...
    lib.kernels.errors.KernelError: padding 'same', zeros: numbers of zeros are known
    """
