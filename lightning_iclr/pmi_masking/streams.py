"""Streams of numbers that a machine need not hold: in memory up to a size, in a file beyond it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def parse_size(size: int | str) -> int:
    """Return a number of bytes, of a number or of a string such as ``"2GB"`` or ``"512MiB"``.

    Raises:
        ValueError: It is neither, or not positive.

    Examples:
        >>> parse_size("1.5GB")
        1500000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower())
    number = round(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if number < 1:
        raise ValueError(f"memory_limit must be a number of bytes or a string such as '2GB', got {size!r}")
    return number


class Stream:
    """Numbers of one type that are written once, in order, and then read in chunks as often as wanted.

    Args:
        path: Where what exceeds ``in_memory`` goes; the file is made when it is needed.
        dtype: Type of the numbers.
        in_memory: Bytes that stay in memory.

    Examples:
        >>> stream = Stream(Path("unused"), np.dtype("int32"), in_memory=100)
        >>> stream.write(np.arange(5, dtype="int32"))
        >>> [chunk.tolist() for chunk in stream.read(3)]
        [[0, 1, 2], [3, 4]]
    """

    def __init__(self, path: Path, dtype: np.dtype, in_memory: int) -> None:
        self.path, self.dtype, self.in_memory = path, dtype, in_memory
        self.length = 0
        self._held: list[np.ndarray] = []
        self._in_file = False

    def write(self, numbers: np.ndarray) -> None:
        """Append numbers."""
        if not self._in_file and (self.length + len(numbers)) * self.dtype.itemsize > self.in_memory:
            self.path.unlink(missing_ok=True)
            self._in_file = True
            for held in self._held:
                append(self.path, held)
            self._held = []
        self.length += len(numbers)
        if self._in_file:
            append(self.path, numbers.astype(self.dtype, copy=False))
        elif len(numbers):
            self._held.append(numbers.astype(self.dtype, copy=True))

    def read(self, chunk: int) -> Iterator[np.ndarray]:
        """Yield the numbers again, so many at a time."""
        if not self._in_file:
            if len(self._held) > 1:
                self._held = [np.concatenate(self._held)]
            for begin in range(0, self.length, chunk):
                yield self._held[0][begin : begin + chunk]
            return
        for begin in range(0, self.length, chunk):
            yield np.fromfile(self.path, self.dtype, count=chunk, offset=begin * self.dtype.itemsize)

    def close(self) -> None:
        """Drop the numbers."""
        self._held, self.length = [], 0
        self.path.unlink(missing_ok=True)  # a killed run may have left one where this has none

    def keep(self) -> None:
        """Have the numbers in the file, whatever their size, so that they outlive the process."""
        if not self._in_file:
            self.path.unlink(missing_ok=True)
            self.path.touch()
            for held in self._held:
                append(self.path, held)
            self._held, self._in_file = [], True

    @classmethod
    def of_file(cls, path: Path, dtype: np.dtype) -> Stream:
        """Return the stream that another process has kept in a file."""
        stream = cls(path, dtype, 0)
        stream.length, stream._in_file = path.stat().st_size // dtype.itemsize, True
        return stream


def append(path: Path, numbers: np.ndarray) -> None:
    """Write an array at the end of a file.

    Raises:
        OSError: The disk is full; the error says where, and how much was wanted.
    """
    try:
        with path.open("ab") as file:
            file.write(np.ascontiguousarray(numbers).data)  # ndarray.tofile hides that its last bytes did not fit
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(
                errno.ENOSPC, f"no room for {numbers.nbytes} more bytes in spill_dir, {path.parent}; give another one"
            ) from error
        raise


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Have the error of a full disk name the folder, which libraries that write into it leave out.

    Raises:
        OSError: The disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and str(folder) not in str(error):
            raise OSError(errno.ENOSPC, f"no room in spill_dir, {folder}; give another one") from error
        raise


def collapsed(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield a stream of numbers, of which negative ones are breaks, with one break in place of each row of them.

    Examples:
        >>> [chunk.tolist() for chunk in collapsed([np.array([-1, 3, -1]), np.array([-1, 4, 5])])]
        [[3, -1], [4, 5]]
    """
    before = -1
    for chunk in chunks:
        breaks = chunk < 0
        again = breaks.copy()
        again[1:] &= breaks[:-1]
        again[:1] &= before < 0
        before = int(chunk[-1]) if len(chunk) else before
        yield chunk[~again]
