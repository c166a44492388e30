"""A progress line that tells the truth wherever the notebook is read."""

import time
from collections.abc import Callable


class Progress:
    """One line that is rewritten in place and stays truthful in JupyterLab, in the executed file and in the HTML.

    ``report = progress.part("name")`` begins the next of ``total`` parts; ``report`` goes to a recipe or to
    `lib.training.fit` as its ``progress``.

    >>> from lib.study import Progress
    >>> progress = Progress(total=2)  # in a notebook one line, rewritten in place
    {'text/plain': 'starting'}
    >>> report = progress.part("dense")
    >>> report(0.5, "epoch 5 of 10")
    >>> progress.finished, progress.total  # in the first of two parts
    (1, 2)
    """

    def __init__(self, total: int) -> None:
        from IPython.display import display

        self.total = self.expected = total
        self.finished, self.started, self.shown = 0, time.monotonic(), 0.0
        self.handle = display({"text/plain": "starting"}, raw=True, display_id=True)

    def part(self, name: str) -> Callable[[float, str], None]:
        """Begin the next part; the returned function takes the fraction of it that is done, and a message.

        A part more than there should be counts in the total from then on: nothing is ever 124 of 123.
        """
        self.finished += 1
        self.total = max(self.total, self.finished)
        self._show(0.0, name, force=True)
        return lambda done, text: self._show(done, f"{name}: {text}", force=False)

    def done(self) -> None:
        """Leave a last line that says what was done and how long it took."""
        minutes = (time.monotonic() - self.started) / 60
        counted = "" if self.finished <= self.expected else f", {self.expected} were expected"
        if self.finished < self.expected:
            counted = f", {self.expected - self.finished} in another process"
        self._write(f"{self.finished} parts done in {minutes:.1f} min{counted}")

    def _show(self, fraction: float, text: str, force: bool) -> None:
        if not force and time.monotonic() - self.shown < 0.5:  # an update costs a message to the browser
            return
        self.shown = time.monotonic()
        share = (self.finished - 1 + min(fraction, 1.0)) / self.total
        spent = time.monotonic() - self.started
        left = f", about {spent * (1 - share) / share / 60:.0f} min left" if share > 0.02 else ""
        bar = "█" * round(30 * share) + "░" * (30 - round(30 * share))
        self._write(f"{bar} {share:4.0%}  part {self.finished} of {self.total}{left}  {text}")

    def _write(self, line: str) -> None:
        if self.handle is not None:
            self.handle.update({"text/plain": line}, raw=True)
