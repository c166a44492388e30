"""Sentences to be classified, as bags of words: questions by what they ask for, film reviews by what they say of it."""

import operator
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from lib.data.errors import DataError
from lib.data.loading import _shuffled
from lib.data.named import data_root
from lib.data.splits import Data, Split

TEXTS = {"trec": ("TREC.train", "TREC.test"), "sst2": ("stsa.binary.train", "stsa.binary.test")}
"""Files of sentences by name, a line each: the label, a space, the words with spaces between them."""


def texts(
    name: str = "trec",
    root: str | Path | None = None,
    *,
    words: int = 2000,
    train_size: int = 0,
    test_size: int = 0,
    validation_size: int = 500,
) -> Data:
    """Sentences as bags of words, ``x`` ``(N, words)``: how often each occurs, scaled to length 1; ``y`` is the class.

    A linear layer on such an ``x`` sums rows of its weight: it is an embedding bag. Words are the most frequent of the
    training sentences, validation included, in lower case; others are left out. As in `load`, sentences are shuffled in
    a fixed order, and the validation split comes out of the training sentences.

    Args:
        name: ``trec``, questions of 6 classes by what they ask for (Li and Roth, COLING 2002; ``DESC:manner`` counts as
            ``DESC``), or ``sst2``, sentences of film reviews, good or bad (Socher et al., EMNLP 2013): files
            ``text/TREC.{train,test}`` and ``text/stsa.binary.{train,test}`` in the data root.

    Raises:
        DataError: a name that is unknown, a file that is missing or damaged, or sizes that do not fit.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from lib.data import texts
    >>> (place := Path((root := TemporaryDirectory()).name, "text")).mkdir()
    >>> (place / "TREC.train").write_text("HUM:ind Who is who ?\\n" * 5 + "LOC:city Where is it ?\\n" * 5) > 0
    True
    >>> (place / "TREC.test").write_text("HUM:ind Who is it ?") > 0
    True
    >>> questions = texts("trec", root.name, words=3, validation_size=2)  # "?", "is" and "who" are most frequent
    >>> questions.shape, len(questions.train), questions.test.y.tolist(), questions.test.x.square().sum().round().item()
    ((3,), 8, [0], 1.0)
    >>> texts("imdb")
    Traceback (most recent call last):
        ...
    lib.data.errors.DataError: texts 'imdb' are unknown: allowed are trec, sst2
    """
    if name not in TEXTS:
        raise DataError(f"texts {name!r} are unknown: allowed are {', '.join(TEXTS)}")
    sizes = {"train_size": train_size, "test_size": test_size, "validation_size": validation_size, "words": words}
    for key, size in sizes.items():
        if not hasattr(size, "__index__") or operator.index(size) < (key == "words"):
            raise DataError(f"{key} = {size!r}: allowed are whole numbers from {int(key == 'words')}")
    train, test = (_sentences(data_root(root) / "text" / file) for file in TEXTS[name])
    counts = Counter(word for _, sentence in train for word in sentence)
    known = sorted(counts, key=lambda word: (-counts[word], word))[:words]
    place, classes = {word: i for i, word in enumerate(known)}, sorted({label for label, _ in train})
    if odd := {label for label, _ in test} - {*classes}:
        raise DataError(f"{name}: class {min(odd)} is in the test sentences only")
    order, tested = _shuffled(len(train)).tolist(), _shuffled(len(test)).tolist()
    held = min(validation_size, len(train) // 5)
    chosen = {"train_size": order[held:], "validation_size": order[:held], "test_size": tested}
    for key in ("train_size", "test_size"):
        if sizes[key] > len(chosen[key]):
            raise DataError(f"{key} = {sizes[key]}: {name} has {len(chosen[key])} such sentences")
        chosen[key] = chosen[key][: sizes[key] or None]
    parts = [[source[i] for i in chosen[key]] for key, source in zip(chosen, (train, train, test), strict=True)]
    return Data(name, *(_bags(part, place, classes) for part in parts), len(classes))


def _sentences(path: Path) -> list[tuple[str, list[str]]]:
    try:
        lines = path.read_text("latin-1").split("\n")  # not splitlines: bytes of UTF-8 would end lines
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); data/README.md says where to get it") from None
    found = [line.split(" ", 1) for line in lines if line.strip()]
    if not found or any(len(parts) < 2 for parts in found):
        raise DataError(f"{path}: every line is to be a label, a space and a sentence")
    return [(label.split(":")[0], sentence.lower().split()) for label, sentence in found]


def _bags(sentences: list[tuple[str, list[str]]], place: dict[str, int], classes: list[str]) -> Split:
    x: Tensor = torch.zeros(len(sentences), len(place))
    for row, (_, sentence) in zip(x, sentences, strict=True):
        for word in sentence:
            if word in place:
                row[place[word]] += 1
    return Split(x / x.norm(dim=1, keepdim=True).clamp_min(1), torch.tensor([classes.index(c) for c, _ in sentences]))
