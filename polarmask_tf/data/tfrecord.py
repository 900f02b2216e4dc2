"""Files of records: each a length, the bytes and a checksum of either. No TensorFlow.

Source of the format: tensorflow/core/lib/io/record_writer.h (framing), RFC 3720 appendix B.4 (CRC-32C).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import google_crc32c

from polarmask_tf.errors import InputError, counted
from polarmask_tf.files import io_error_text

_MOST_BYTES = 2**31  # of a record: no protobuf message is larger


class DamagedShard(InputError):
    """A shard has no further record that can be read; the message says how many could be."""


def write_record(file, data: bytes) -> None:
    """Appends one TFRecord to a binary file."""
    length = struct.pack("<Q", len(data))
    file.write(length + struct.pack("<I", _masked(google_crc32c.value(length))))
    file.write(data)
    file.write(struct.pack("<I", _masked(google_crc32c.value(data))))


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_shard(path) -> Iterator[bytes]:
    """Yields the records of one shard, whose checksums are compared.

    Raises DamagedShard where no further record can be had: "PATH: damaged or cut short after N records (reason)".
    """
    count = 0
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while header := file.read(12):
                length = int.from_bytes(header[:8], "little")
                if len(header) == 12 and not _is_whole(header[:8], header[8:]):
                    raise ValueError("the checksum of a length is wrong")
                if len(header) < 12 or file.tell() + length + 4 > size:
                    raise ValueError("it ends within a record")
                if length > _MOST_BYTES:
                    raise ValueError(f"a record of {length:,} bytes")
                data, checksum = file.read(length), file.read(4)
                if not _is_whole(data, checksum):
                    raise ValueError("the checksum of a record is wrong")
                yield data
                count += 1
    except ValueError as error:
        raise DamagedShard(f"{path}: damaged or cut short after {counted(count, 'record')} ({error})") from None
    except (OSError, MemoryError) as error:
        reason = "not enough memory" if isinstance(error, MemoryError) else io_error_text(error)
        raise DamagedShard(f"{path}: cannot be read after {counted(count, 'record')} ({reason})") from None


def count_records(path) -> int:
    """How many records a shard holds up to its first damaged length: 12 bytes are read of each. OSError if it cannot be."""
    count = end = 0
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while len(header := os.pread(file.fileno(), 12, end)) == 12:
            end += 16 + int.from_bytes(header[:8], "little")
            if end > size or not _is_whole(header[:8], header[8:]):
                break
            count += 1
    return count


def _is_whole(data: bytes, checksum: bytes) -> bool:
    return _masked(google_crc32c.value(data)) == int.from_bytes(checksum, "little")
