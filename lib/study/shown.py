"""What a cell shows, for who reads it, and beside it what it says, as data that a report is made of."""

from typing import Any

from IPython.display import HTML

SAID = "application/vnd.workbook+json"
"""The type of that data among the outputs of a notebook; JupyterLab does not know it and shows the HTML."""


class Shown(HTML):
    """HTML, to be a cell's last value, with what it says: ``answer``, ``provenance``, ``figure`` with its ``svg``.

    >>> from lib.study.shown import Shown
    >>> Shown("<p>It costs 0.2 points.</p>", answer="It costs 0.2 points.")._repr_mimebundle_()
    {'text/html': '<p>It costs...</p>', 'application/vnd.workbook+json': {'answer': 'It costs 0.2 points.'}}
    """

    def __init__(self, page: str, **said: Any) -> None:
        super().__init__(page)
        self.said = said

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:  # IPython's own protocol for several forms of an output
        return {"text/html": self.data, SAID: self.said}
