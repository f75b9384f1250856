"""A user's own vectors: every kind of file gives the same vectors; errors name values that are not finite numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.data.splits import SPLITS
from resflow_jax.data.vectors import VectorSplits, load_vectors

VECTORS = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def write_csv(path, rows, header=None, end="\n"):
    lines = [",".join(map(repr, row)) for row in np.asarray(rows).tolist()]
    path.write_text("\n".join([*([header] if header else []), *lines]) + end)


WRITERS = {
    "vectors.npy": lambda path: np.save(path, VECTORS),
    "double.npy": lambda path: np.save(path, VECTORS.astype(">f8")),
    "vectors.npz": lambda path: np.savez(path, whatever=VECTORS),
    "vectors.csv": lambda path: write_csv(path, VECTORS),
    "header.CSV": lambda path: write_csv(path, VECTORS, '"a","b, in m",c', end="\n\n\n"),
    "windows.csv": lambda path: path.write_bytes(
        b"\xef\xbb\xbfx,y,z\r\n" + b"\r\n".join(b"%r, %r, %r" % tuple(row) for row in VECTORS.tolist())
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_without_splits(tmp_path, name):
    """A tenth is the test split, a twentieth of the rest validates, in the order of the file; always the same."""
    WRITERS[name](tmp_path / name)
    data = load_vectors(str(tmp_path / name))
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [35, 1, 4] and data.dim == 3
    dtype = np.dtype(np.float32 if name.startswith("vectors.np") else np.float64)
    assert all(part.dtype == dtype and part.dtype.isnative for part in parts)
    assert sorted(map(bytes, np.concatenate(parts))) == sorted(map(bytes, VECTORS.astype(dtype)))
    rows = [np.flatnonzero((row == VECTORS).all(1)).item() for row in data.train]
    assert rows == sorted(rows)
    again = load_vectors(tmp_path / name)
    np.testing.assert_array_equal(again.test, data.test)


def test_splits_of_npz(tmp_path):
    """Splits of a file are kept; a missing validation split is taken from the training vectors."""
    np.savez(tmp_path / "all.npz", train=VECTORS[:30], validation=VECTORS[30:35], test=VECTORS[35:])
    data = load_vectors(tmp_path / "all.npz")
    for name, rows in zip(SPLITS, np.split(VECTORS, [30, 35]), strict=True):
        np.testing.assert_array_equal(getattr(data, name), rows)
    np.savez(tmp_path / "two.npz", train=VECTORS[:30], test=VECTORS[30:])
    data = load_vectors(tmp_path / "two.npz")
    assert (len(data.train), len(data.validation)) == (29, 1)
    np.testing.assert_array_equal(data.test, VECTORS[30:])


def test_integers_become_floats(tmp_path):
    """One array is loaded, and a table of one column without names."""
    np.save(tmp_path / "a.npy", np.arange(6)[:, None])
    (tmp_path / "a.csv").write_text("0\n1\n2\n3\n4\n5")
    for name in ("a.npy", "a.csv"):
        data = load_vectors(tmp_path / name)
        assert data.train.dtype == np.float64 and data.dim == 1
        assert sorted(np.concatenate([data.train, data.validation, data.test]).ravel()) == [0, 1, 2, 3, 4, 5]


def with_value(value, row=3, column=1, dtype=np.float64):
    array = VECTORS.astype(dtype)
    array[row, column] = value
    return array


def text(content):
    return lambda path: path.write_text(content)


def saved(array):
    return lambda path: np.save(path, array)


def damaged_npz(path):
    np.savez_compressed(path, VECTORS)
    data = bytearray(path.read_bytes())
    data[200:260] = bytes(60)
    path.write_bytes(data)


def two_dims(path):
    np.savez(path, train=VECTORS, test=VECTORS[:, :2])


BAD = {
    "suffix.txt": (text("1,2\n"), "path: expected a .npy, .npz or .csv file of vectors, got .*suffix.txt"),
    "folder.npy": (lambda path: path.mkdir(), "path: expected a .npy, .npz or .csv file of vectors, got .*folder.npy"),
    "text.npy": (text("hello"), "path: expected a .npy file of arrays, could not read .*text.npy"),
    "empty.npy": (text(""), "path: expected a .npy file of arrays, could not read .*empty.npy"),
    "header.npy": (
        lambda path: path.write_bytes(b"\x93NUMPY\1\0\6\0{'a':\n"),
        "path: expected a .npy file of arrays, could not read .*header.npy",
    ),
    "pickled.npy": (saved(np.asarray([[1, "a"]], object)), "could not read .*pickled.npy: Object arrays cannot be"),
    "damaged.npz": (damaged_npz, "path: expected a .npz file of arrays, could not read .*damaged.npz"),
    "none.npz": (np.savez, "path: expected one array, or arrays named .*, got none in .*none.npz"),
    "names.npz": (lambda path: np.savez(path, a=VECTORS, b=VECTORS), "named train, test and validation, got a, b in"),
    "dims.npz": (two_dims, "test: expected vectors of 3 numbers, got 2"),
    "nan.npz": (
        lambda path: np.savez(path, train=VECTORS, test=with_value(np.nan)),
        r"path: expected finite numbers that float64 holds, got nan at \[3, 1\] of test of .*nan.npz",
    ),
    "line.npy": (saved(VECTORS[0]), r"expected floats or integers \[N, D\] .* got float32 \(3,\) in .*line.npy"),
    "three.npy": (saved(VECTORS[None]), r"expected floats or integers \[N, D\] .* got float32 \(1, 40, 3\) in"),
    "rows.npy": (saved(VECTORS[:0]), r"expected floats or integers \[N, D\] .* got float32 \(0, 3\) in"),
    "columns.npy": (saved(VECTORS[:, :0]), r"expected floats or integers \[N, D\] .* got float32 \(40, 0\) in"),
    "words.npy": (saved(np.asarray([["a", "b"]])), r"expected floats or integers \[N, D\] .* got <U1 \(1, 2\) in"),
    "bool.npy": (saved(VECTORS > 0), r"expected floats or integers \[N, D\] .* got bool \(40, 3\) in"),
    "complex.npy": (saved(VECTORS * 1j), r"expected floats or integers \[N, D\] .* got complex64 \(40, 3\) in"),
    "inf.npy": (
        saved(with_value(-np.inf)),
        r"expected finite numbers that float64 holds, got -inf at \[3, 1\] of .*inf",
    ),
    "long.npy": (
        saved(with_value(1 + np.finfo(np.longdouble).eps, dtype=np.longdouble)),
        r"expected finite numbers that float64 holds, got 1\.0.* at \[3, 1\] of .*long.npy",
    ),
    "large.npy": (
        saved(with_value(-(2**53) - 1, dtype=np.int64)),
        r"numbers that float64 holds, got -9007199254740993 at \[3, 1\] of .*large.npy",
    ),
    "unsigned.npy": (
        saved(np.full((4, 2), 2**64 - 1, np.uint64)),
        r"numbers that float64 holds, got 18446744073709551615 at \[0, 0\] of .*unsigned.npy",
    ),
    "struct.npy": (saved(np.zeros(4, [("a", "f4"), ("b", "f4")])), r"expected floats or integers \[N, D\] .* in .*str"),
    "bfloat16.npy": (
        saved(jnp.zeros((4, 2), jnp.bfloat16)),
        r"expected floats or integers \[N, D\] .* got \|V2 \(4, 2\)",
    ),
    "one.npy": (saved(VECTORS[:1]), "path: expected at least 2 vectors in .*one.npy to make a test split from, got 1"),
    "two.csv": (
        text("1\n2\n"),
        "path: expected at least 2 vectors in .*two.csv to make a validation split",
    ),
    "empty.csv": (text(""), "path: expected lines of numbers, found none in .*empty.csv"),
    "names.csv": (text("x,y\n\n"), "path: expected lines of numbers, found none in .*names.csv"),
    "binary.csv": (
        lambda path: path.write_bytes(VECTORS.tobytes()),
        "path: expected a .csv file, could not read .*binary.csv",
    ),
    "quote.csv": (text('1,2\n"3,4\n'), "path: expected a .csv file, could not read .*quote.csv: quotes in line 2"),
    "word.csv": (text("x,y\n1,2\n3,four\n"), "path: expected a number, got 'four' in line 3, column 2 of .*word.csv"),
    "mixed.csv": (text("1,y\n1,2\n"), "path: expected a number, got 'y' in line 1, column 2 of .*mixed.csv"),
    "headers.csv": (text("x,y\nm,m\n1,2\n"), "path: expected a number, got 'm' in line 2, column 1 of"),
    "missing.csv": (text("x,y\n1,2\n3,\n"), "path: expected a number, got '' in line 3, column 2 of .*missing.csv"),
    "gap.csv": (text("1\n\n2\n"), "path: expected a number, got '' in line 2, column 1 of .*gap.csv"),
    "semicolon.csv": (text("x;y\n1;2\n1;2,3;4\n"), "path: expected 2 numbers in line 3 of .*semicolon.csv, got 3"),
    "ragged.csv": (text("1,2\n3,4,5\n"), "path: expected 2 numbers in line 2 of .*ragged.csv, got 3"),
    "narrow.csv": (text("x,y,z\n3,4\n"), "path: expected 3 numbers in line 2 of .*narrow.csv, got 2"),
    "nan.csv": (text("x,y\n1,2\n3,nan\n"), "expected a number, got 'nan' in line 3, column 2 of .*nan.csv"),
    "large.csv": (text("1,2\n-1e309,4\n"), r"within float64, got '-1e309' in line 2, column 1 of .*large.csv"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_a_set_of_vectors_is_named(tmp_path, name):
    """The error says what was expected, which file came, and where in it what is wrong."""
    write_bad, message = BAD[name]
    write_bad(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_vectors(tmp_path / name)


def test_a_missing_file(tmp_path):
    """The error says where nothing was found."""
    with pytest.raises(FileNotFoundError, match=r"path: expected a file of vectors, found nothing at .*none\.csv"):
        load_vectors(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (VECTORS.tolist(), r"test: expected a float32 or float64 array \[N, D\] with N > 0 and D > 0, got list"),
        (VECTORS.astype(np.float16), "test: expected a float32 or float64 array .*, got dtype float16"),
        (VECTORS[0], r"test: expected a float32 or float64 array .*, got shape \(3,\)"),
        (VECTORS[:0], r"test: expected a float32 or float64 array .*, got shape \(0, 3\)"),
        (VECTORS[:, :0], r"test: expected a float32 or float64 array .*, got shape \(40, 0\)"),
        (with_value(np.inf, dtype=np.float32), r"test: expected finite numbers, got inf at \[3, 1\]"),
        (VECTORS[:, :2], "test: expected vectors of 3 numbers, got 2"),
    ],
)
def test_bad_vectors_are_named(array, message):
    """What is not a set of finite vectors of one length is refused at the boundary."""
    with pytest.raises(ValueError, match=message):
        VectorSplits(VECTORS, VECTORS, array)


@pytest.mark.parametrize("kind", ["csv", "npy"])
def test_vectors_that_are_repeated(tmp_path, kind):
    """They are kept, with a warning that names two of them."""
    rows = np.concatenate([VECTORS[:20], VECTORS[[3]], VECTORS[20:], VECTORS[[3, 7]]])
    if kind == "csv":
        write_csv(tmp_path / "a.csv", rows, "x,y,z")
        message = r"3 of the 43 vectors in .*a\.csv repeat an earlier one, first line 22 that of line 5:"
    else:
        np.save(tmp_path / "a.npy", rows)
        message = r"3 of the 43 vectors in .*a\.npy repeat an earlier one, first row 20 that of row 3:"
    with pytest.warns(UserWarning, match=message):
        data = load_vectors(tmp_path / f"a.{kind}")
    assert sum(map(len, (data.train, data.validation, data.test))) == 43


@pytest.mark.parametrize("dtype", ["<f2", ">f2", ">f4", ">f8", "u1", ">i2", "<i4", ">i8", "<u8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_are_those_of_the_array(tmp_path, dtype, order):
    """Byte order, order of axes and dtype do not change a number."""
    numbers = np.asarray(120 + 40 * VECTORS).astype(dtype)
    np.save(tmp_path / "a.npy", np.asarray(numbers, order=order))
    data = load_vectors(tmp_path / "a.npy")
    expected = numbers.astype(np.float32 if "f" in dtype and "8" not in dtype else np.float64)
    assert data.train.dtype == expected.dtype and data.train.flags.c_contiguous
    found = np.concatenate([data.train, data.validation, data.test])
    np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(expected, axis=0))
