"""Sequences of different lengths: rows of images, spoken words as log-mel frames, characters of a text."""

import operator
import wave
from math import log10
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lib.data.errors import DataError
from lib.data.folders import by_class
from lib.data.loading import _shuffled
from lib.data.named import NAMES, data_root, read_named
from lib.data.splits import Data, Split
from lib.data.task import PADDING

WINDOW, HOP, BANDS = 256, 128, 32
"""Samples of a frame and between two, 32 and 16 ms at 8 kHz, and bands of a frame."""

SEQUENCES = (*(name for name in NAMES if "cifar" not in name), "spoken_digits", "shakespeare")


def log_mel(sound: Tensor, rate: int, window: int = WINDOW, hop: int = HOP, bands: int = BANDS) -> Tensor:
    """Log-mel frames ``(T, bands)`` of a sound ``(samples,)`` between -1 and 1: how most speech front ends begin.

    Energies of a Hann window's spectrum, summed in triangles spaced evenly in mel, ``2595 log10(1 + f / 700)``.
    What is shorter than a window is filled up with silence.

    >>> from lib.data import log_mel
    >>> tone = torch.sin(torch.arange(8000) * (2 * torch.pi * 1000 / 8000))  # a second of 1 kHz
    >>> frames = log_mel(tone, rate=8000)
    >>> tuple(frames.shape), frames.argmax(1).unique().tolist()
    ((61, 32), [14])
    """
    sound = torch.nn.functional.pad(sound, (0, max(window - len(sound), 0)))
    power = torch.fft.rfft(sound.unfold(0, window, hop) * torch.hann_window(window)).abs().square()
    top = 2595 * log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2) / 2595) - 1)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    f = torch.linspace(0, rate / 2, window // 2 + 1)
    triangles = torch.minimum((f - low) / (middle - low), (high - f) / (high - middle)).clamp(min=0)
    return (power @ triangles.T + 1e-6).log()


def read_sound(path: Path) -> tuple[Tensor, int]:
    """Samples of a wav file between -1 and 1, the mean of its channels, and its rate in hertz.

    Raises:
        DataError: no wav file of whole numbers of 8, 16 or 32 bits, an empty one, or one that is cut short.
    """
    try:
        with wave.open(str(path)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw, said = file.readframes(file.getnframes()), file.getnframes() * channels * width
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"{path} cannot be read as a wav file ({error})") from None
    kinds = {1: ("u1", 128, 128), 2: ("<i2", 0, 2**15), 4: ("<i4", 0, 2**31)}
    if width not in kinds or not raw:
        raise DataError(f"{path}: {8 * width} bits, {len(raw)} bytes; sounds of 8, 16 or 32 bits are read")
    if len(raw) != said:
        raise DataError(f"{path} is cut short: {len(raw)} of {said} bytes of samples")
    kind, zero, scale = kinds[width]
    numbers = (np.frombuffer(raw, kind).astype(np.float32) - zero) / scale
    return torch.from_numpy(numbers.reshape(-1, channels).mean(1)), rate


def sequences(
    name: str = "fashion_mnist",
    root: str | Path | None = None,
    *,
    train_size: int = 0,
    test_size: int = 0,
    validation_size: int = 300,
    longest: int = 0,
    hop: int = HOP,
) -> Data:
    """Sequences of different lengths, ``x`` ``(N, T, C)``, ``T`` the longest's; what follows a sequence is NaN.

    - Rows of ``fashion_mnist`` (the shipped default) or ``mnist``: an image from the first row that shows anything to
      the last, a row a frame, and what it shows.
    - ``spoken_digits``: `log_mel` frames of recordings, ``speech/fsdd/<digit>_<speaker>_<index>.wav`` in the data root
      as in the Free Spoken Digit Dataset, whose test recordings are those of index 0 to 4. Or the path of a folder with
      ``train/<class>/*.wav`` and ``test/<class>/*.wav``, the same classes, all of one rate.
    - ``shakespeare``: ``text/tinyshakespeare.txt`` in the data root; or the path of another ``.txt``. A line is a
      sequence, a frame a character as one-hot numbers, and what is learned is the next character at every place, the
      line's end among them: ``y`` ``(N, T)``, `PADDING` after the end. The last tenth of the lines is for the test.

    As in `load`, sequences are shuffled in a fixed order, the validation split comes out of the training sequences, and
    frames (of rows and sounds) are normalized with the mean and deviation of each number over those of training.

    Args:
        longest: refuse sequences of more frames; 0: take all. hop: samples between two frames of a sound; 0: `HOP`.

    Raises:
        DataError: a name that is unknown, data that are missing or damaged, or a sequence that is too long.

    >>> from lib.data import sequences
    >>> rows = sequences(train_size=100, test_size=50)
    >>> tuple(rows.train.x.shape), rows.classes, bool(rows.train.x[:, 0].isnan().any())
    ((100, 28, 28), 10, False)
    """
    sizes = {
        "train_size": train_size,
        "test_size": test_size,
        "validation_size": validation_size,
        "longest": longest,
        "hop": hop,
    }
    for key, size in sizes.items():
        if not hasattr(size, "__index__") or operator.index(size) < 0:
            raise DataError(f"{key} = {size!r}: allowed are whole numbers from 0")
    train, test, classes, scaled = _read(name, root, hop or HOP)
    order, tested = _shuffled(len(train)).tolist(), _shuffled(len(test)).tolist()
    held_out = min(validation_size, len(train) // 5)
    parts = {"train_size": order[held_out:], "validation_size": order[:held_out], "test_size": tested}
    for key in ("train_size", "test_size"):
        if sizes[key] > len(parts[key]):
            raise DataError(f"{key} = {sizes[key]}: {name} has {len(parts[key])} such sequences")
        parts[key] = parts[key][: sizes[key] or None]
    chosen = [[train[i] for i in parts["train_size"]], [train[i] for i in parts["validation_size"]]]
    chosen.append([test[i] for i in parts["test_size"]])
    frames = max(len(x) for split in chosen for x, _ in split)
    if longest and frames > longest:
        raise DataError(f"longest = {longest}: {name} has a sequence of {frames} frames")
    mean, std = 0.0, 1.0
    if scaled:
        every = torch.cat([x for x, _ in chosen[0]]).double()
        mean, std = every.mean(0).float(), every.std(0).float()
        std[std == 0] = 1.0
    splits = [_padded(split, chosen[0][0], frames, mean, std) for split in chosen]
    return Data(Path(name).stem, *splits, classes)


def _padded(examples: list[tuple[Tensor, Tensor]], like: tuple[Tensor, Tensor], frames: int, mean, std) -> Split:
    x = torch.full((len(examples), frames, like[0].shape[1]), torch.nan)
    each = like[1].ndim  # a label for every frame
    y = torch.full((len(examples), frames)[: 1 + each], PADDING)
    for i, (sequence, label) in enumerate(examples):
        x[i, : len(sequence)] = (sequence.float() - mean) / std
        y[(i, slice(len(sequence)))[: 1 + each]] = label
    return Split(x, y)


def _read(name: str, root: str | Path | None, hop: int) -> tuple[list, list, int, bool]:
    """Training and test examples ``(frames (T, C), label)``, the number of classes, and whether to normalize."""
    path = Path(name).expanduser()
    if name in SEQUENCES[:2]:
        x, y, x_test, y_test = read_named(name, data_root(root))
        return _rows(x, y), _rows(x_test, y_test), int(y.max()) + 1, True
    if name == "spoken_digits":
        folder = data_root(root) / "speech" / "fsdd"
        files = [(p, p.stem[0], p.stem.rpartition("_")[2]) for p in sorted(folder.glob("[0-9]_*_*.wav"))]
        if not files:
            raise DataError(
                f"spoken_digits: {folder} has no <digit>_<speaker>_<index>.wav; put the recordings of the Free Spoken "
                "Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset) there"
            )
        if odd := [p.name for p, _, index in files if not index.isdecimal()]:
            raise DataError(f"spoken_digits: {folder / odd[0]} is no <digit>_<speaker>_<index>.wav")
        test = [(p, int(digit)) for p, digit, index in files if int(index) < 5]
        return *_sounds([(p, int(d)) for p, d, i in files if int(i) >= 5], test, hop), 10, True
    if name == "shakespeare" or path.suffix == ".txt":
        return _lines(data_root(root) / "text" / "tinyshakespeare.txt" if name == "shakespeare" else path)
    if (path / "train").is_dir() and (path / "test").is_dir():
        classes, files = by_class(path, (".wav",), "sounds")
        found = ([(p, k) for k, c in enumerate(classes) for p in files[part, c]] for part in ("train", "test"))
        return *_sounds(*found, hop), len(classes), True
    raise DataError(
        f"sequences {name!r} are unknown: allowed are {', '.join(SEQUENCES)}, the path of a .txt file, "
        "or of a folder with train/<class>/*.wav and test/<class>/*.wav"
    )


def _rows(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows of images ``(N, 1, H, W)`` without the empty ones above and below; an empty image keeps its first."""
    shown = images[:, 0].flatten(2).any(2)
    first = shown.int().argmax(1).tolist()
    last = (shown.shape[1] - shown.flip(1).int().argmax(1)).tolist()
    rows = images[:, 0]
    return [
        (rows[i, a : b if shown[i].any() else 1], y)
        for i, (a, b, y) in enumerate(zip(first, last, labels, strict=True))
    ]


def _sounds(
    train: list[tuple[Path, int]], test: list[tuple[Path, int]], hop: int
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Frames and labels of both parts, whose sounds have one rate."""
    sounds = [(path, *read_sound(path), label) for path, label in (*train, *test)]
    for path, _, rate, _ in sounds:
        if rate != sounds[0][2]:
            raise DataError(
                f"{path} has {rate} samples a second, {sounds[0][0]} has {sounds[0][2]}: one rate is allowed"
            )
    frames = [(log_mel(sound, rate, hop=hop), torch.tensor(label)) for _, sound, rate, label in sounds]
    return frames[: len(train)], frames[len(train) :]


def _lines(path: Path) -> tuple[list, list, int, bool]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a text ({error}); put one there") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 10:
        raise DataError(f"{path} has {len(lines)} lines: at least 10 are needed")
    letters = sorted({"\n", *"".join(lines)})
    place = {letter: i for i, letter in enumerate(letters)}
    coded = [torch.tensor([place[c] for c in line + "\n"]) for line in lines]
    examples = [(one_hot(c[:-1], len(letters)), c[1:]) for c in coded]
    cut = len(examples) - len(examples) // 10
    return examples[:cut], examples[cut:], len(letters), False
