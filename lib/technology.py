"""Published figures of devices, converters and chips: ``data/technology/*.csv``, with a source for every row."""

import re
from functools import cache
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).resolve().parent.parent / "data" / "technology"


class TechnologyError(ValueError):
    """A technology table or a row of it that cannot be used: the message names it and what there is.

    >>> from lib.technology import table
    >>> table("devices")("prime_tio2", "t_write_ns")
    Traceback (most recent call last):
        ...
    lib.technology.TechnologyError: technology table devices: 'prime_tio2' has no t_write_ns; ...
    """


class Table:
    """Rows of published figures by name.

    Rows whose status is not ``verified`` are there but refused: nobody has seen where they come from. Asking for them
    by ``unverified=True`` is a decision that a report has to state.

    >>> from lib.technology import table
    >>> timely = table("timely")
    >>> timely("tdc", "energy_fJ")
    145.0
    >>> timely("array_256x256", "energy_fJ")
    Traceback (most recent call last):
        ...
    lib.technology.TechnologyError: technology table timely: 'array_256x256' is not verified (from memory); ...
    """

    def __init__(self, frame: pd.DataFrame, name: str, unverified: bool = False) -> None:
        self.name, self.unverified = name, unverified
        for column in ("status", "source"):
            if column not in frame or frame[column].isna().any():
                raise TechnologyError(f"technology table {name}: every row needs a {column}")
        if twice := frame.index[frame.index.duplicated()].tolist():
            raise TechnologyError(f"technology table {name}: {twice[0]!r} is there twice")
        for column, values in frame.items():
            numbers, there = pd.to_numeric(values, errors="coerce"), values.notna()
            # Most are numbers: a column of figures, all of which have to be; c0, c1, ... are coefficients, of any sign.
            if 2 * numbers.notna().sum() > there.sum():
                wrong = there & (numbers.isna() | (numbers.lt(0) & (re.fullmatch(r"c\d.*", column) is None)))
                if wrong.any():
                    said = f"{wrong.idxmax()!r} has {column} = {values[wrong.idxmax()]}"
                    raise TechnologyError(f"technology table {name}: {said}; expected a number, 0 or more")
        self.frame = frame

    def __call__(self, row: str, column: str) -> float:
        """A number of a row.

        Raises:
            TechnologyError: no such row or column, a figure that the source does not print, or an unverified row.
        """
        if row not in self.frame.index:
            raise TechnologyError(f"technology table {self.name} has no row {row!r}: {', '.join(self.frame.index)}")
        if column not in self.frame:
            raise TechnologyError(f"technology table {self.name} has no column {column!r}")
        if self.frame.loc[row, "status"] != "verified" and not self.unverified:
            where = self.frame.loc[row, "source"]
            raise TechnologyError(
                f"technology table {self.name}: {row!r} is not verified ({where}); ask for unverified"
            )
        value = self.frame.loc[row, column]
        if pd.isna(value):
            raise TechnologyError(f"technology table {self.name}: {row!r} has no {column}; its source prints none")
        try:
            return float(value)
        except ValueError:
            raise TechnologyError(f"technology table {self.name}: {row!r} has {column} = {value}, no number") from None


@cache
def table(name: str, unverified: bool = False, folder: str | Path = FOLDER) -> Table:
    """The table ``name`` that ships with the project, or lies in another folder; its first column names the rows.

    Keys of measurements know what is in ``data/technology``: a study's own tables belong there.

    Raises:
        TechnologyError: no such table, a row without source or status, a name twice, or a figure that is negative or
            no number.

    >>> from lib.technology import table
    >>> table("digital")("int8_mul", "energy_pJ"), table("digital")("fp32_mul", "energy_pJ")
    (0.2, 3.7)
    """
    path = Path(folder) / f"{name}.csv"
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.csv"))
        raise TechnologyError(f"there is no technology table {name!r} in {path.parent.name}: {', '.join(there)}")
    return Table(pd.read_csv(path, index_col=0), name, unverified)
