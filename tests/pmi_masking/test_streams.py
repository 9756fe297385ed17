"""Streams: the same numbers from memory and from a file, and what happens when the disk is full."""

import errno

import numpy as np
import pytest

from lightning_iclr.pmi_masking.streams import Stream, append, naming, parse_size
from tests.pmi_masking.toys import largest_file

INT32 = np.dtype(np.int32)
PARTS = [np.arange(7, dtype=np.int32), np.empty(0, np.int32), np.array([-1, 5], np.int32), np.arange(100, 140)]
ALL = np.concatenate(PARTS)


@pytest.mark.parametrize(
    ("text", "size"),
    [(7, 7), ("8", 8), ("2GB", 2 * 10**9), (" 1.5 mb ", 1_500_000), ("3GiB", 3 * 2**30), ("1kib", 1024)],
)
def test_sizes_are_read_in_decimal_and_binary_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("size", [0, -1, "0", "-1GB", "GB", "2 elephants", "", "1e9", "0.1"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="memory_limit must be a number of bytes or a string such as '2GB'"):
        parse_size(size)


@pytest.mark.parametrize("chunk", [1, 2, 7, 48, 49, 1000])
@pytest.mark.parametrize("in_memory", [0, 40, 10**6])
def test_a_stream_gives_back_its_numbers_from_memory_and_from_a_file(tmp_path, in_memory, chunk):
    stream = Stream(tmp_path / "numbers", INT32, in_memory)
    for part in PARTS:
        stream.write(part)
    assert (tmp_path / "numbers").exists() == (in_memory < ALL.nbytes)
    for _ in range(2):
        chunks = list(stream.read(chunk))
        assert {len(each) for each in chunks[:-1]} <= {chunk}
        assert all(each.dtype == INT32 for each in chunks)
        np.testing.assert_array_equal(np.concatenate(chunks), ALL)
    stream.close()
    assert not (tmp_path / "numbers").exists()


@pytest.mark.parametrize("in_memory", [0, 10**6])
def test_a_stream_that_is_kept_can_be_read_by_another_process(tmp_path, in_memory):
    (tmp_path / "numbers").write_bytes(b"what a killed run has left")
    stream = Stream(tmp_path / "numbers", INT32, in_memory)
    for part in PARTS:
        stream.write(part)
    stream.keep()
    other = Stream.of_file(tmp_path / "numbers", INT32)
    assert other.length == stream.length == len(ALL)
    np.testing.assert_array_equal(np.concatenate(list(other.read(10))), ALL)
    stream.write(PARTS[0])
    np.testing.assert_array_equal(np.concatenate(list(stream.read(1000))), np.concatenate([ALL, PARTS[0]]))


def test_a_stream_does_not_change_with_the_array_that_was_written(tmp_path):
    numbers = np.arange(5, dtype=np.int32)
    stream = Stream(tmp_path / "numbers", INT32, 10**6)
    stream.write(numbers)
    numbers[:] = 0
    assert next(stream.read(5)).tolist() == [0, 1, 2, 3, 4]


def test_an_empty_stream_yields_nothing(tmp_path):
    assert list(Stream(tmp_path / "numbers", INT32, 0).read(5)) == []


def test_a_full_disk_is_reported_with_its_folder_and_the_bytes_wanted(tmp_path):
    with (
        largest_file(1000),
        pytest.raises(OSError, match=f"no room for 4000 more bytes in spill_dir, {tmp_path}") as error,
    ):
        append(tmp_path / "numbers", np.zeros(1000, np.int32))
    assert error.value.errno == errno.ENOSPC


def test_other_errors_of_files_are_passed_on(tmp_path):
    with pytest.raises(FileNotFoundError):
        append(tmp_path / "missing" / "numbers", np.zeros(1))
    with pytest.raises(PermissionError), naming(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_the_error_of_a_library_that_does_not_name_the_folder_is_made_to(tmp_path):
    with pytest.raises(OSError, match=f"no room in spill_dir, {tmp_path}; give another one"), naming(tmp_path):
        raise OSError(errno.ENOSPC, "Error writing bytes to file")
