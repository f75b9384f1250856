"""Tables of numbers as text: every number is read exactly, or the error names its file, line and column."""

import re

import numpy as np
import pytest

from resflow_jax.data.tables import read_table

RNG = np.random.default_rng(0)
ROWS = [[1.5, -2.0], [3.25, 4e-7]]
# what is written, and as what the rows are read
SAME = {
    "commas": "1.5,-2\n3.25,4e-7\n",
    "without an end": "1.5,-2\n3.25,4e-7",
    "empty lines at the end": "1.5,-2\n3.25,4e-7\n\n\n",
    "carriage returns": "1.5,-2\r3.25,4e-7\r",
    "Windows": "a,b\r\n1.5,-2\r\n3.25,4e-7\r\n",
    "names": "a,b\n1.5,-2\n3.25,4e-7",
    "names with a unit": '"mass, in kg","x ""y"""\n1.5,-2\n3.25,4e-7',
    "names of elements": "Na,Si\n1.5,-2\n3.25,4e-7",
    "names of single letters": "y,t\n1.5,-2\n3.25,4e-7",
    "quotes": '"a","b"\n"1.5","-2"\n"3.25",4e-7',
    "spaces around": " 1.5 , -2\n3.25,\t4e-7 ",
    "semicolons": "a;b\n1.5;-2\n3.25;4e-7",
    "semicolons and a comma in a name": "a;b, c\n1.5;-2\n3.25;4e-7",
    "commas and a semicolon in a name": "a;x,b\n1.5,-2\n3.25,4e-7",
    "tabs": "a\tb c\n1.5\t-2\n3.25\t4e-7",
    "bars": "1.5|-2\n3.25|4e-7",
    "spaces": " 1.5  -2\n3.25   4e-7 ",
    "decimal commas": "a;b\n1,5;-2\n3,25;4e-7",
    "decimal commas and spaces": "a b\n1,5 -2\n3,25 4e-7",
    "decimal commas after tabs": "1,5\t-2\n3,25\t4e-7",
    "decimal commas in quotes": '"1,5","-2"\n"3,25","4e-7"',
    "other forms of numbers": "+1.50,-2.\n3.25E0,.4E-06",
    "zeros before": "01.5,-0002\n3.25,4e-7",
}


@pytest.mark.parametrize("name", SAME)
def test_forms_of_one_table(tmp_path, name):
    """The separator, the decimal mark and the header follow from the file."""
    (tmp_path / "a.csv").write_bytes(SAME[name].encode())
    table = read_table(tmp_path / "a.csv")
    np.testing.assert_array_equal(table.numbers, np.asarray(ROWS), strict=True)
    assert table.first == 1 + SAME[name].lstrip('"')[0].isalpha()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252"])
def test_encodings(tmp_path, encoding):
    """Unicode with a mark or as UTF-8, and Windows-1252 with Latin-1, in which names alone differ."""
    (tmp_path / "a.csv").write_bytes("größe,b\n1.5,-2\n3.25,4e-7\n".encode(encoding))
    np.testing.assert_array_equal(read_table(tmp_path / "a.csv").numbers, ROWS)


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be"])
def test_byte_order_marks(tmp_path, mark):
    """Both byte orders have a mark; without it they are refused."""
    text = "a,b\n1.5,-2\n3.25,4e-7\n"
    (tmp_path / "a.csv").write_bytes(f"\ufeff{text}".encode(mark))
    np.testing.assert_array_equal(read_table(tmp_path / "a.csv").numbers, ROWS)
    (tmp_path / "b.csv").write_bytes(text.encode(mark))
    with pytest.raises(ValueError, match=r"could not read .*b\.csv: the character '\\x00' in line 1 is not text, or"):
        read_table(tmp_path / "b.csv")


def test_numbers_are_exact(tmp_path):
    """Every float64 is read as it was written, in tables of many blocks of text; a wrong last line has its number."""
    rows = RNG.normal(size=(30_000, 5)) * 10.0 ** RNG.integers(-300, 300, (30_000, 5))
    text = "\n".join(",".join(map(repr, row)) for row in rows.tolist())
    (tmp_path / "a.csv").write_text(text)
    np.testing.assert_array_equal(read_table(tmp_path / "a.csv").numbers, rows)
    (tmp_path / "b.csv").write_text(f"{text}\n1,2,3\n")
    with pytest.raises(ValueError, match=r"path: expected 5 numbers in line 30001 of .*b\.csv, got 3"):
        read_table(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text(f"{text}\n1,2,3,4,oops\n")
    with pytest.raises(ValueError, match=r"expected a number, got 'oops' in line 30001, column 5 of .*c\.csv"):
        read_table(tmp_path / "c.csv")


def number(cell, line, column, expected="a number"):
    return re.escape(f"path: expected {expected}, got {cell!r} in line {line}, column {column + 1} of ") + ".*a[.]csv"


NO_NUMBERS = ["", "NA", "?", "-", "TRUE", "false", "yes", "nan", "inf", "-inf", "1_000", "١٢", "0x10", "1e", "$5", "5%"]
NO_NUMBERS += ["1 000", "1'000", "12h", "2020-01-01", "1d5", "1+2j", "None", "null", "#N/A", "--1", "1e5.5", "(1)", "½"]


@pytest.mark.parametrize("cell", NO_NUMBERS)
@pytest.mark.parametrize("row", [0, 1, 4])
def test_cells_that_are_no_numbers(tmp_path, cell, row):
    """They are no header in the first row, alone or all of them, and are named in any."""
    lines = [f"{n},{2 * n}" for n in range(6)]
    for alone in (True, False):
        lines[row] = f"7,{cell}" if alone else f"{cell},{cell}"
        (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-8")
        with pytest.raises(ValueError, match=number(cell, row + 1, int(alone))):
            read_table(tmp_path / "a.csv")


BAD = {
    "": "path: expected lines of numbers, found none in .*a[.]csv",
    "\n \n": "expected lines of numbers, found none",
    "x,y\n": "expected lines of numbers, found none",
    ",a,b\n0,1,2": number("", 1, 0, "a number, or names in the whole line"),
    "x,2nd\n1,2": number("2nd", 1, 1, "a number, or names in the whole line"),
    "a,NA\n1,2": number("NA", 1, 1, "a number, or names in the whole line"),
    "x,1.\n1,2": number("x", 1, 0),
    "sep=;\n1;2": number("", 1, 1, "a number, or names in the whole line"),
    "# a b\n1 2": "expected 3 numbers in line 2 of .*, got 2",
    "T,F\n1,2": number("T", 1, 0),
    "n,Y\n1,2": number("n", 1, 0),
    "unknown,unknown\n1,2": number("unknown", 1, 0),
    "x,x\n1,2": number("x", 1, 0),
    "x,y\nm,kg\n1,2": number("m", 2, 0),
    "1,2\n\n3,4": number("", 2, 0),
    "\n1,2\n3,4": "expected 1 numbers in line 2 of .*, got 2",
    "1,2,\n3,4,": number("", 1, 2),
    "1;2;3\n3;4\n1;2;3": "expected 3 numbers in line 2 of .*, got 2",
    "1 2\n3\n4 5": "expected 2 numbers in line 2 of .*, got 1",
    "1,2\n3": "expected 2 numbers in line 2 of .*, got 1",
    "1;2|3\n1;2|3": r"expected cells separated by one character, got \[';', '\|'\] in most lines of .*a[.]csv",
    '1,2\n"3"4,5': "could not read .*a[.]csv: quotes in line 2 are unbalanced",
    '1,2\n3,4"': "quotes in line 2 are unbalanced",
    '"a\nb",c\n1,2': "quotes in line 1 are unbalanced",
    '1,2\n"3,4\n5,6"': "quotes in line 2 are unbalanced",
    "1,2\n3,4\x1a": r"could not read .*a[.]csv: the character '\\x1a' in line 2 is not text",
    "1,5;2\n3;4.5": r"decimal mark, got '1,5' in line 1, column 1 of .* and '4\.5' in line 2, column 2 of .*a[.]csv",
    "1.234,5;2": number("1.234,5", 1, 0),
    '"1,234","5"': "without separators of thousands, got '1,234' in line 1, column 1 of .*a[.]csv",
    "1;2\n3;1,500": "without separators of thousands, got '1,500' in line 2, column 2 of .*a[.]csv",
    '"1,234,567",1': number("1,234,567", 1, 0),
    "9007199254740993,1": number("9007199254740993", 1, 0, "integers below 2^53 in size"),
    "1,-9007199254740992": number("-9007199254740992", 1, 1, "integers below 2^53 in size"),
    "1,99999999999999999999999": number("99999999999999999999999", 1, 1, "integers below 2^53 in size"),
    "x,y\n1e400,1": number("1e400", 2, 0, "finite numbers within float64"),
    "1,1e-400": number("1e-400", 1, 1, "numbers within float64"),
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_table_is_named(tmp_path, text):
    """The error names the file and the place in it."""
    (tmp_path / "a.csv").write_bytes(text.encode())
    with pytest.raises(ValueError, match=BAD[text]):
        read_table(tmp_path / "a.csv")


def test_zeros_are_numbers(tmp_path):
    """Zero in any form is not an underflow; integers up to 2^53 are held."""
    (tmp_path / "a.csv").write_text("0e-999,-0.000\n9007199254740991,1e300")
    np.testing.assert_array_equal(read_table(tmp_path / "a.csv").numbers, [[0, 0], [2**53 - 1, 1e300]])


@pytest.mark.parametrize("header", ["0,1", "1,2"])
def test_a_header_of_numbers(tmp_path, header):
    """pandas writes one for columns without names. It is a row like others, and a warning says so."""
    (tmp_path / "a.csv").write_text(f"{header}\n0.5,0.25\n3,4")
    with pytest.warns(UserWarning, match=rf"a.csv: the first line, {header}..., counts the columns, and was taken as"):
        numbers = read_table(tmp_path / "a.csv").numbers
    assert numbers.shape == (3, 2)


@pytest.mark.parametrize("text", ["0,1\n2,3\n4,5", "0.0,1.0\n0.5,2", "2,1\n0.5,2", "0\n0.5"])
def test_rows_that_are_no_header(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    assert len(read_table(tmp_path / "a.csv").numbers) == text.count("\n") + 1
