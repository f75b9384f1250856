"""Numbers of a PyTorch checkpoint. A storage is a row of numbers, and a tensor is a strided part of a storage.

Element k of a tensor is at offset + sum_i k_i stride_i of its storage, 0 <= k_i < size_i. As strides are not negative,
the last of these positions is at k_i = size_i - 1; it is compared with the length of the storage before an array is
made. Files name tensors before their numbers, so arrays are made empty, and `Storage.fill` fills them all at once.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}
"""The dtype of each of torch's typed storages. Numbers of other dtypes lie in untyped storages."""

_EXTENSIONS = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
DTYPES = {name: np.dtype(name) for name in (*STORAGES.values(), "uint16", "uint32", "uint64") if name != "bfloat16"}
DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTENSIONS}
"""NumPy's dtype for each of torch's dtypes, by the name of the latter."""

_EXPANDED = 2**24  # most elements of a tensor that is larger than its storage, by a stride of 0


class Refused(ValueError):
    """The file contains something that is not allowed, or lacks something. The message does not name the file."""


def brief(value: Any) -> str:
    """A value for a message: scalars themselves, and the type of anything else, which a file may nest without end."""
    is_scalar = isinstance(value, str | bytes | int | float | np.generic | np.dtype | None)
    return f"{value!r:.80}" if is_scalar else f"a {type(value).__name__}"


@dataclass(eq=False)
class Storage:
    """A row of numbers.

    Attributes:
      dtype: dtype of the numbers; None if each tensor has its own.
      nbytes: length in bytes.
      tensors: the parts that were asked for.
    """

    dtype: np.dtype | None
    nbytes: int
    tensors: dict[tuple, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def length(self) -> int:
        """Number of elements; number of bytes if the dtype is None."""
        return self.nbytes // (1 if self.dtype is None else self.dtype.itemsize)

    def tensor(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Returns an array that owns its elements, which `fill` sets. The same part is always the same array."""
        for name, numbers in {"offset": (offset,), "sizes": size, "strides": stride}.items():
            if type(numbers) is not tuple or any(type(n) is not int or n < 0 for n in numbers):
                got = ", ".join(map(brief, numbers)) if type(numbers) is tuple else brief(numbers)
                raise Refused(f"expected {name} of a tensor that are integers of at least 0, got {got:.80}")
        if len(size) != len(stride):
            raise Refused(f"expected as many strides as sizes of a tensor, got {len(stride)} and {len(size)}")
        length = self.nbytes // dtype.itemsize
        end = 0 if 0 in size else 1 + offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if end > length:
            raise Refused(f"expected a tensor within the {length} elements of its storage, got one that ends at {end}")
        if math.prod(size) > max(length, _EXPANDED):
            raise Refused(f"expected a tensor no larger than its storage of {length} elements, got sizes {size!r:.80}")
        stride = tuple(step if n > 1 else 0 for n, step in zip(size, stride, strict=True))
        part = (offset, size, stride, dtype)
        if part not in self.tensors:
            self.tensors[part] = np.empty(size, dtype)
        return self.tensors[part]

    def fill(self, data: bytes) -> None:
        """Copies the bytes of the storage, little-endian, into all its tensors."""
        if len(data) != self.nbytes:
            raise Refused(f"expected {self.nbytes} bytes of a storage, got {len(data)}")
        if not self.tensors:
            raise Refused("expected tensors, got a storage that is not part of a tensor")
        for (offset, size, stride, dtype), array in self.tensors.items():
            if array.size:
                row_dtype = np.dtype(np.uint8) if dtype.kind == "b" else dtype
                start, steps = offset * dtype.itemsize, [step * dtype.itemsize for step in stride]
                array[...] = np.ndarray(size, row_dtype, data, start, steps)
