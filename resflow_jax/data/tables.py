"""Reads a table of numbers from a .csv file, with its separator, decimal mark and encoding as the file shows them.

pyarrow, which TensorFlow Datasets needs anyway, divides the text into cells: it is maintained, and reads 100 MB in a
second. Each cell stays text until it is known to be a number. What pyarrow would forgive is refused here: text after a
closing quote, a line break in quotes, an empty line between rows.
"""

import codecs
import io
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LARGEST_INTEGER = 2**53  # up to here float64 holds every integer
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_WITH_COMMA = r"^[+-]?(\d*,\d+|\d+,)([eE][+-]?\d+)?$"
_THOUSANDS = r"^[+-]?[1-9]\d{0,2},\d{3}$"
_MARKS = {  # longer ones first: that of UTF-32 starts with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_NAMES = {"NA", "na", "N/A", "n/a", "#N/A", "#NA", "NULL", "Null", "null", "NONE", "None", "none", "NIL", "nil"}
_NO_NAMES |= {"NaT", "<NA>", "n.a.", "N.A.", "(null)"}
_NO_NAMES |= {form for word in ("missing", "unknown", "undefined") for form in (word, word.upper(), word.capitalize())}
_NO_NAMES |= {form for word in ("true", "false", "yes", "no") for form in (word, word.upper(), word.capitalize())}
_SAMPLE = 100  # lines that the separator is determined from


class Table(NamedTuple):
    """The numbers of a file.

    Attributes:
      numbers: finite float64 [N, D].
      first: number of the line of the first row, from 1.
    """

    numbers: np.ndarray
    first: int


def read_table(path: Path) -> Table:
    """Reads a file of one row of D numbers a line, in float64.

    The separator is a tab, a semicolon or a bar where one of them is in most lines; else spaces, if most lines have
    some and no comma is next to them; otherwise a comma. If it is not a comma, or numbers are in double quotes, the
    decimal mark may be a comma. The text is UTF-8, UTF-16 or UTF-32 with a byte order mark, or Windows-1252, of which
    Latin-1 is a part. The first line holds names if all of its cells surely are not values: each has a letter, does not
    start with a digit, is not a number, truth value or missing value, and differs from the others.

    Raises:
      ValueError: for text that is not such a table, rows of different lengths, cells that are not numbers, and numbers
        that float64 does not hold: infinite ones, too small ones, integers beyond 2^53. The message names the file, the
        line and the column.
    """
    text = _text(path).replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
    if not text.strip():
        raise _no_rows(path)
    separator = _separator(text, path)
    if separator == " ":
        text = "\n".join(" ".join(line.split()) for line in text.split("\n"))
    columns = _columns(text, separator, path)
    heads = [column[0].as_py() for column in columns]
    first = 1 + _are_names(heads)
    if len(columns[0]) < first:
        raise _no_rows(path)
    _check_first_line(heads, path)
    cells = _Cells.of([column.slice(first - 1) for column in columns], first, path)
    numbers = np.ascontiguousarray(_numbers(_with_points(cells)).reshape(len(columns), -1).T)
    if first == 1:
        _warn_of_counts(heads, numbers, path)
    return Table(numbers, first)


class _Cells(NamedTuple):
    """The trimmed cells of a table without its header, one column after the other.

    Attributes:
      values: strings [D * N], a chunked array of pyarrow.
      rows: N.
      first: number of the line of the first row.
      path: the file.
    """

    values: Any
    rows: int
    first: int
    path: Path

    @classmethod
    def of(cls, columns: list[Any], first: int, path: Path) -> "_Cells":
        import pyarrow as pa
        import pyarrow.compute as pc

        values = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
        return cls(pc.ascii_trim_whitespace(values), len(columns[0]), first, path)

    def matches(self, pattern: str) -> np.ndarray:
        """Whether a regular expression is found in each cell, bool [D * N]."""
        import pyarrow.compute as pc

        return pc.match_substring_regex(self.values, pattern).to_numpy()

    def first_of(self, found: np.ndarray) -> str | None:
        """The words for the first cell, line by line, of those where `found` is true; None if there is none."""
        numbers = np.flatnonzero(found)
        if not len(numbers):
            return None
        column, row = min((divmod(int(n), self.rows) for n in numbers), key=lambda pair: pair[::-1])
        cell = self.values[column * self.rows + row].as_py()
        return f"{cell!r:.40} {place(self.path, self.first + row, column)}"


def place(path: Path, line: int, column: int) -> str:
    """The words for a cell of a file; the line counts from 1, the column from 0."""
    return f"in line {line}, column {column + 1} of {path}"


def _no_rows(path: Path) -> ValueError:
    return ValueError(f"path: expected lines of numbers, found none in {path}")


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        mark = next((mark for mark in _MARKS if data.startswith(mark)), None)
        if mark is not None:
            text = data.decode(_MARKS[mark])
        else:
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                text = data.decode("cp1252")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"path: expected a .csv file, could not read {path}: {error}") from error
    if found := re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text):
        line = text.count("\n", 0, found.start()) + 1
        raise ValueError(
            f"path: expected a .csv file, could not read {path}: the character {found[0]!r} in line {line} is not "
            "text, or the encoding has no byte order mark"
        )
    return text


def _quoted(separator: str) -> str:
    """The pattern of a cell in quotes, with what is before and after it."""
    return rf'(?m)(?:^|(?<={re.escape(separator)}))"(?:[^"\n]|"")*"(?=$|{re.escape(separator)})'


def _separator(text: str, path: Path) -> str:
    """The separator of cells; a comma for a table of one column."""
    lines = [re.sub(r'"(?:[^"\n]|"")*"', '""', line) for line in text.split("\n", _SAMPLE)[:_SAMPLE] if line]
    marks = [mark for mark in "\t;|" if 2 * sum(mark in line for line in lines) > len(lines)]
    if len(marks) > 1:
        raise ValueError(f"path: expected cells separated by one character, got {marks} in most lines of {path}")
    if marks:
        return marks[0]
    has_spaces = 2 * sum(len(line.split()) > 1 for line in lines) > len(lines)
    separates = any(re.search(r"(^|\s),|,(\s|$)", line) for line in lines)  # a comma that is not a decimal mark
    return " " if has_spaces and not separates else ","


def _columns(text: str, separator: str, path: Path) -> list[Any]:
    """The cells of each column, as arrays of strings."""
    import pyarrow as pa
    from pyarrow import csv

    bare = re.sub(_quoted(separator), "", text) if '"' in text else text
    if '"' in bare:
        line = bare.count("\n", 0, bare.index('"')) + 1
        raise ValueError(f"path: expected a .csv file, could not read {path}: quotes in line {line} are unbalanced")
    width = bare.partition("\n")[0].count(separator) + 1
    data, wrong = f"{text}\n".encode(), []
    try:
        table = csv.read_csv(
            io.BytesIO(data),
            csv.ReadOptions(
                use_threads=False, autogenerate_column_names=True, block_size=min(len(data) + 1, 2**31 - 1)
            ),
            csv.ParseOptions(
                delimiter=separator,
                ignore_empty_lines=False,
                invalid_row_handler=lambda row: wrong.append(row) or "error",
            ),
            csv.ConvertOptions(
                column_types={f"f{n}": pa.string() for n in range(width)}, null_values=[], strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        if wrong:
            raise ValueError(
                f"path: expected {wrong[0].expected_columns} numbers in line {wrong[0].number} of {path}, got "
                f"{wrong[0].actual_columns}"
            ) from error
        raise ValueError(f"path: expected a .csv file, could not read {path}: {error}") from error
    return [table[f"f{n}"] for n in range(width)]


def _warn_of_counts(heads: list[str], numbers: np.ndarray, path: Path) -> None:
    """Warns of a first line 0,1,2,... or 1,2,3,... above numbers with fractions: perhaps a header of pandas."""
    counts = [[str(first + n) for n in range(len(heads))] for first in (0, 1)]
    if len(heads) > 1 and [head.strip() for head in heads] in counts and (numbers[1:] % 1 != 0).any():
        warnings.warn(
            f"{path}: the first line, {heads[0]},{heads[1]}..., counts the columns, and was taken as numbers; if it is "
            "a header, as pandas writes one for columns without names, delete this line or name the columns",
            stacklevel=3,
        )


def _are_names(cells: list[str]) -> bool:
    """Whether the cells of a line are surely the names of columns: all names, all different, and not only T and F."""
    cells = [cell.strip() for cell in cells]
    letters = set("".join(cells).upper())
    is_truth = len(cells) > 1 and set(map(len, cells)) == {1} and (letters <= set("TF") or letters <= set("YN"))
    return all(map(_is_name, cells)) and len(set(cells)) == len(cells) and not is_truth


def _is_name(cell: str) -> bool:
    """Whether a cell is surely the name of a column, not a value."""
    cell = cell.strip()
    try:
        float(cell)  # also nan, inf, 1_000 and digits of other scripts
    except ValueError:
        starts_like_a_number = re.match(r"[+-]?[.,]?\d", cell)
        return any(map(str.isalpha, cell)) and not starts_like_a_number and cell not in _NO_NAMES
    return False


def _check_first_line(heads: list[str], path: Path) -> None:
    """Raises ValueError for a first line of names and of cells that are neither sure names nor numbers."""
    others = [(n, head) for n, head in enumerate(heads) if not _is_name(head)]
    if len(others) < len(heads):
        for n, head in others:
            if not re.match(_NUMBER, head.strip().replace(",", "."), re.ASCII):
                raise ValueError(
                    f"path: expected a number, or names in the whole line, got {head!r:.40} {place(path, 1, n)}"
                )


def _with_points(cells: _Cells) -> _Cells:
    """The cells with points instead of decimal commas.

    Raises:
      ValueError: for numbers with points mixed with numbers with commas, and where commas may separate thousands.
    """
    import pyarrow.compute as pc

    found = cells.matches(_WITH_COMMA)
    if not found.any():
        return cells
    where = cells.first_of(found)
    if not (cells.matches(",") & ~cells.matches(_THOUSANDS)).any():
        raise ValueError(
            f"path: expected numbers without separators of thousands, got {where}, which may be a decimal comma or not"
        )
    if (other := cells.first_of(cells.matches(r"\."))) is not None:
        raise ValueError(f"path: expected one decimal mark, got {where} and {other}")
    return cells._replace(values=pc.replace_substring(cells.values, ",", "."))


def _numbers(cells: _Cells) -> np.ndarray:
    """The cells as float64 [D * N]."""
    import pyarrow as pa

    def check(wrong: np.ndarray, expected: str) -> None:
        if (where := cells.first_of(wrong)) is not None:
            raise ValueError(f"path: expected {expected}, got {where}")

    check(~cells.matches(_NUMBER), "a number")
    values = cells.values.cast(pa.float64()).to_numpy()
    check(~np.isfinite(values), "finite numbers within float64")
    check((values == 0) & cells.matches("^[^eE]*[1-9]"), "numbers within float64")
    if (is_large := np.abs(values) >= LARGEST_INTEGER).any():
        check(is_large & cells.matches(r"^[+-]?\d+$"), "integers below 2^53 in size")
    return values
