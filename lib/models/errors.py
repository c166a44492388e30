"""What builders refuse."""


class ModelError(ValueError):
    """A network that is unknown, or that cannot be built or converted: the message says what can.

    >>> from lib.models import build
    >>> build("alexnet", (1, 28, 28), 10)
    Traceback (most recent call last):
        ...
    lib.models.errors.ModelError: alexnet takes no images of 28x28: the smallest square ones are 63x63
    """
