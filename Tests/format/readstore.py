#!/usr/bin/env python3
"""Reads a disk out of a directory store by Docs/Format.md alone: an implementation of its own, for tests.

    readstore.py STORE DISK[@GENERATION] IMAGE

Writes a sparse raw image and prints what the generation says of itself. Checks every magic, version, length, id and
checksum on the way; anything that is not as the document says is an error.
"""
import ctypes
import json
import os
import struct
import sys

xxhash = ctypes.CDLL("libxxhash.so.0")
xxhash.XXH3_64bits.restype = ctypes.c_uint64
xxhash.XXH3_64bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
zstd = ctypes.CDLL("libzstd.so.1")
zstd.ZSTD_decompress.restype = ctypes.c_size_t
zstd.ZSTD_decompress.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]

BLOCK, SLICE, PAGE = 16 << 20, 512 << 10, 4096


def checksum(data):
    return xxhash.XXH3_64bits(bytes(data), len(data))


def need(condition, what):
    if not condition:
        raise SystemExit("readstore: " + what)


def unzstd(data, length):
    out = ctypes.create_string_buffer(length)
    need(zstd.ZSTD_decompress(out, length, data, len(data)) == length, "a zstd frame of another length")
    return out.raw


def unpack(codec, data, length):
    need(codec in (1, 2), "unknown codec")
    return data if codec == 1 else unzstd(data, length)


class Store:
    def __init__(self, path):
        self.path = path
        store = self.control("store.json", "store")
        need(store["blockBytes"] == BLOCK and len(store["storeID"]) == 32, "store.json")

    def read(self, key):
        with open(os.path.join(self.path, key), "rb") as f:
            return f.read()

    def control(self, key, kind):
        data = self.read(key)
        start = b'{"margarine":"%s","format":%d,"checksum":"' % (kind.encode(), 1 if kind == "store" else 2)
        need(data.startswith(start), key + " does not begin as it should")
        behind = data[len(start) + 18 :]
        need(data[len(start) :].startswith(b'%016x",' % checksum(behind)), key + " fails its checksum")
        return json.loads(data)

    def generation(self, disk, number):
        head = self.control(f"disks/{disk}/head", "head")
        need(head["name"] == disk and not head["deleted"], "no such disk")
        record = head.get("record")
        size = head["sizeBytes"]
        if number is not None and (record is None or record["generation"] != number):
            record = self.control(f"disks/{disk}/generations/{number:020d}", "generation")
            need(record["generation"] == number and record["diskID"] == head["diskID"], "another record")
        if number is not None:
            size = record["sizeBytes"]
        return record, size

    def page(self, ref, level, index):
        """Entries of all leaves under a page: (block, entry)."""
        data = self.read("manifests/" + ref["id"])
        need(len(data) == ref["lengthBytes"], "page of another length")
        magic, version, length, high, low, at, lv, packing, count, objects = struct.unpack_from("<8sIIQQQBBHI", data)
        need((magic, version, length) == (b"MGPAGE\0\0", 1, len(data)), "page header")
        need(checksum(data[:-8]) == struct.unpack("<Q", data[-8:])[0], "page fails its checksum")
        need(f"{high:016x}{low:016x}" == ref["id"] and (at, lv, packing) == (index, level, 0), "another page")
        used = stored = 0
        position = 48
        if level == 0:
            table = []
            for _ in range(objects):
                high, low, location = struct.unpack_from("<QQB", data, position)
                table.append((f"{high:016x}{low:016x}", location))
                position += 17
            for _ in range(count):
                slot, flags = struct.unpack_from("<HB", data, position)
                position += 3
                base, deltas = None, []
                if flags & 0x80:
                    number, length, mask = struct.unpack_from("<HII", data, position)
                    base = (table[number][0], length, mask)
                    stored += length
                    position += 10
                for _ in range(flags & 0x7F):
                    number, offset, length, touched, zeroed = struct.unpack_from("<HIIII", data, position)
                    deltas.append((table[number][0], offset, length, touched, zeroed))
                    stored += length
                    position += 18
                used += 1
                yield index * 512 + slot, base, deltas
        else:
            for _ in range(count):
                slot, location, zero, length, high, low, blocks, size = struct.unpack_from("<HBBIQQQQ", data, position)
                need(zero == 0, "reserved byte")
                position += 40
                used += blocks
                stored += size
                child = {"id": f"{high:016x}{low:016x}", "lengthBytes": length, "usedBlocks": blocks, "storedBytes": size}
                yield from self.page(child, level - 1, index * 512 + slot)
        need(position == len(data) - 8, "page with bytes left over")
        need((used, stored) == (ref["usedBlocks"], ref["storedBytes"]), "sums of a page")

    def base(self, ref):
        id, length, mask = ref
        data = self.read("blocks/" + id)
        magic, version, header, high, low, size, count, total = struct.unpack_from("<8sIIQQIIQ", data)
        need((magic, version, header, size, count) == (b"MGBASE\0\0", 1, 824, SLICE, 32), "base header")
        need(total == length == len(data) and f"{high:016x}{low:016x}" == id, "another base")
        need(checksum(data[:816]) == struct.unpack_from("<Q", data, 816)[0], "base header fails its checksum")
        block, seen, end = bytearray(BLOCK), 0, 824
        for i in range(32):
            codec, offset, stored, zero, sum = struct.unpack_from("<IIIIQ", data, 48 + 24 * i)
            if codec == 0:
                need((offset, stored, sum) == (0, 0, 0), "slice of zeroes")
                continue
            need(offset == end and zero == 0, "slice out of place")
            end += stored
            seen |= 1 << i
            part = data[offset:end]
            need(checksum(part) == sum, "slice fails its checksum")
            block[i * SLICE : (i + 1) * SLICE] = unpack(codec, part, SLICE)
        need(seen == mask and end == total, "base disagrees with its manifest")
        return block

    def apply(self, block, number, ref):
        id, offset, length, touched, zeroed = ref
        whole = self.read("blocks/" + id)
        need(whole[:8] == b"MGDELT\0\0" and struct.unpack_from("<I", whole, 8)[0] == 1, "delta index")
        segments = struct.unpack_from("<I", whole, 12)[0]
        need(struct.unpack_from("<Q", whole, 32)[0] == len(whole), "delta object of another length")
        need(checksum(whole[: 40 + 16 * segments]) == struct.unpack_from("<Q", whole, 40 + 16 * segments)[0], "delta index checksum")
        index = [struct.unpack_from("<QII", whole, 40 + 16 * i) for i in range(segments)]
        need((number, offset, length) in index, "segment not in the index")
        data = whole[offset : offset + length]
        magic, version, patches, high, low, at, own, size = struct.unpack_from("<8sIIQQQII", data)
        need((magic, version, at, own, size) == (b"MGSEGM\0\0", 1, number, offset, length), "segment header")
        need(f"{high:016x}{low:016x}" == id, "segment of another object")
        end = 48 + 56 * patches
        need(checksum(data[:end]) == struct.unpack_from("<Q", data, end)[0], "segment fails its checksum")
        end += 8
        seen = full = 0
        for i in range(patches):
            slice, codec, d0, d1, z0, z1, start, stored, sum = struct.unpack_from("<IIQQQQIIQ", data, 48 + 56 * i)
            pages, zeroes = d0 | d1 << 64, z0 | z1 << 64
            need(pages & zeroes == 0 and pages | zeroes != 0, "masks")
            seen |= 1 << slice
            full |= (zeroes == (1 << 128) - 1) << slice
            run, at = b"", 0
            if pages:
                need(start == end, "patch out of place")
                end += stored
                need(checksum(data[start:end]) == sum, "patch fails its checksum")
                run = unpack(codec, data[start:end], PAGE * bin(pages).count("1"))
            else:
                need((codec, start, stored, sum) == (0, 0, 0, 0), "patch without data")
            for page in range(128):
                where = slice * SLICE + page * PAGE
                if pages >> page & 1:
                    block[where : where + PAGE] = run[at : at + PAGE]
                    at += PAGE
                elif zeroes >> page & 1:
                    block[where : where + PAGE] = bytes(PAGE)
        need(end == length and (seen, full) == (touched, zeroed), "segment disagrees with its manifest")


def main():
    path, name, image = sys.argv[1:]
    disk, _, number = name.partition("@")
    store = Store(path)
    record, size = store.generation(disk, int(number) if number else None)
    blocks = 0
    with open(image, "wb") as out:
        out.truncate(size)
        if record and "root" in record:
            root = record["root"]
            depth = next(d for d in range(1, 6) if 512**d * BLOCK >= record["sizeBytes"])
            need(depth == record["depth"], "depth")
            for index, base, deltas in store.page(root, depth - 1, 0):
                block = store.base(base) if base else bytearray(BLOCK)
                for delta in deltas:
                    store.apply(block, index, delta)
                out.seek(index * BLOCK)
                out.write(block[: max(0, size - index * BLOCK)])
                blocks += 1
            need(blocks == record["usedBlocks"] == root["usedBlocks"], "used blocks")
    print(json.dumps({"size": size, "blocks": blocks, "generation": record["generation"] if record else 0}))


main()
