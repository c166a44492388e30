"""What data sets refuse."""


class DataError(ValueError):
    """A data set is unknown, missing or damaged; the message says what was looked for, where, and what to do.

    >>> from lib.data import load
    >>> load(train_size=-1)
    Traceback (most recent call last):
        ...
    lib.data.errors.DataError: train_size = -1: allowed are 0 (all) and positive numbers of images
    """
