"""How large the content of a compressed file may be: a small file can claim, or unpack to, more than any memory.

Deflate packs at most 1032 bytes in one. Pixels and measurements pack far less, so that a file beyond the limit here is
no data set. Written without compression (`np.savez`), any array can be read.
"""

import zipfile
from typing import BinaryIO


def unpacked_limit(nbytes: int) -> int:
    """The largest number of bytes that a file of `nbytes` may unpack to: 64 for each one, and 256 MB for any file."""
    return 64 * nbytes + 2**28


def check_zip(file: BinaryIO, nbytes: int) -> None:
    """Raises ValueError if a zip archive of `nbytes` has more than `unpacked_limit` in all, or a name twice.

    The position of the file is then its start. Other files pass.
    """
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if not is_zip:
        return
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    file.seek(0)
    total, limit = sum(record.file_size for record in records), unpacked_limit(nbytes)
    if total > limit:
        raise ValueError(
            f"expected at most {limit} bytes in a compressed file of {nbytes}, got {total}; "
            "write such arrays without compression"
        )
    if len({record.filename for record in records}) != len(records):
        raise ValueError("expected every array of the archive once, got one name twice")
