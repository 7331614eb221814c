#!/usr/bin/env python3
"""Applies a stream of `margined disk send` to a raw image, by Docs/Format.md alone: an implementation of its own, for tests.

    readstream.py IMAGE <STREAM

A stream over nothing makes the image; one over a generation changes an image of that generation. Prints what the stream says
of itself. Checks everything that the document states; anything that is not as it says is an error.
"""
import ctypes
import json
import os
import struct
import sys

xxhash = ctypes.CDLL("libxxhash.so.0")
xxhash.XXH3_64bits_withSeed.restype = ctypes.c_uint64
xxhash.XXH3_64bits_withSeed.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64]
zstd = ctypes.CDLL("libzstd.so.1")
zstd.ZSTD_decompress.restype = ctypes.c_size_t
zstd.ZSTD_decompress.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]

BLOCK, SLICE = 16 << 20, 512 << 10


def checksum(data, seed=0):
    return xxhash.XXH3_64bits_withSeed(bytes(data), len(data), seed)


def need(condition, what):
    if not condition:
        raise SystemExit("readstream: " + what)


class Stream:
    def __init__(self, file):
        self.file, self.length, self.sum = file, 0, 0

    def read(self, count):
        data = self.file.read(count)
        need(len(data) == count, "cut short")
        self.length += count
        return data

    def seal(self, data):
        """Reads the checksum behind a record's bytes."""
        self.sum = checksum(data, self.sum)
        need(struct.unpack("<Q", self.read(8))[0] == self.sum, "checksum")


def description(stream):
    head = stream.read(16)
    magic, version, length = struct.unpack("<8sII", head)
    need((magic, version) == (b"MGSEND\0\0", 1) and length <= 65536, "header")
    text = stream.read(length)
    stream.seal(head + text)
    start = b'{"margarine":"stream","format":1,"checksum":"'
    need(text.startswith(start) and text[len(start):].startswith(b'%016x",' % checksum(text[len(start) + 18:])), "description")
    return json.loads(text)


def main():
    stream = Stream(sys.stdin.buffer)
    about = description(stream)
    size, blocks, stored, last = about["sizeBytes"], 0, 0, -1
    need(set(about) - {"margarine", "format", "checksum"} <= {"generation", "from", "sizeBytes", "kind", "committedAtMs"}, "members")
    with open(sys.argv[1], "r+b" if "from" in about else "wb") as image:
        image.truncate(size)
        while True:
            record = stream.read(32)
            if record[:4] == b"END\0":
                stream.seal(record)
                need(struct.unpack("<IQQQ", record[4:]) == (0, blocks, stored, stream.length), "end")
                break
            tag, length, number, block, changed, zeroed = struct.unpack("<4sIQQII", record)
            data = [i for i in range(32) if (changed & ~zeroed) >> i & 1]
            slices = stream.read(16 * len(data))
            stream.seal(record + slices)
            need(tag == b"BLCK" and number == blocks and last < block < -(-size // BLOCK), "block out of order")
            need(changed and not zeroed & ~changed, "masks")
            total = 0
            for i in range(32):
                at, out = block * BLOCK + i * SLICE, None
                if zeroed >> i & 1:
                    out = bytes(SLICE)
                elif changed >> i & 1:
                    codec, count, sum = struct.unpack_from("<IIQ", slices, 16 * data.index(i))
                    need(codec == 1 and count == SLICE or codec == 2 and 0 < count < SLICE, "codec")
                    packed = stream.read(count)
                    need(checksum(packed) == sum, "checksum of a slice")
                    total, out = total + count, packed
                    if codec == 2:
                        buffer = ctypes.create_string_buffer(SLICE)
                        need(zstd.ZSTD_decompress(buffer, SLICE, packed, count) == SLICE, "slice of another length")
                        out = buffer.raw
                if out:
                    need(not any(out[max(0, size - at):]), "bytes behind the end")
                    image.seek(at)
                    image.write(out[:max(0, size - at)])
            need(total == length, "sum of the slices")
            blocks, stored, last = blocks + 1, stored + total, block
        need(not stream.file.read(1), "bytes behind the end of the stream")
    print(json.dumps({"generation": about["generation"]["generation"], "from": about.get("from", {}).get("generation"), "blocks": blocks}))


main()
