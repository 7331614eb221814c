// A manifest page as bytes (Docs/Format.md, "Manifest page"). Pages are not compressed: what fills them are random ids,
// and those that several entries share (the deltas of one commit) are written once, in a table.
//
// Always holds: `decode` takes exactly what `encode` gives, bit by bit, and nothing else.

import BlockCache
import CLibraries
import ObjectStore

extension ManifestPage {
    /// "MGPAGE" and two zero bytes, read as a little-endian number.
    private static let magic: UInt64 = 0x0000_4547_4150_474D
    private static let version: UInt32 = 1
    private static let headerBytes = 48
    private static let checksumBytes = 8
    private static let childBytes = 40
    /// More than the longest page: a leaf of 512 entries with a base and eight deltas, no two of one object.
    static let maxBytes = 256 << 10

    // MARK: Encoding

    func encoded() -> [UInt8] {
        var out = PageWriter(capacity: level == 0 ? 64 + entries.count * 64 : 64 + children.count * Self.childBytes)
        var table = ObjectTable()
        if level == 0 { for entry in entries { table.add(entry) } }
        out.put(Self.magic)
        out.put(Self.version)
        out.put(UInt32(0))  // the length, set at the end
        out.put(id)
        out.put(index)
        out.put(UInt8(level))
        out.put(UInt8(0))  // how the rest is packed: not at all
        out.put(UInt16(slots.count))
        out.put(UInt32(table.objects.count))
        precondition(out.bytes.count == Self.headerBytes)
        if level == 0 {
            for object in table.objects {
                out.put(object.id)
                out.put(object.location)
            }
            for (slot, entry) in zip(slots.slots, entries) { out.put(entry, slot: slot, table) }
        } else {
            for (slot, child) in zip(slots.slots, children) {
                out.put(UInt16(slot))
                out.put(child.location)
                out.put(UInt8(0))
                out.put(child.lengthBytes)
                out.put(child.id)
                out.put(child.usedBlocks)
                out.put(child.storedBytes)
            }
        }
        out.setLength(out.bytes.count + Self.checksumBytes)
        out.put(Self.checksum(out.bytes[...]))
        precondition(out.bytes.count <= Self.maxBytes)
        return out.bytes
    }

    static func checksum(_ bytes: ArraySlice<UInt8>) -> UInt64 {
        bytes.withUnsafeBytes { mg_xxh3($0.baseAddress, $0.count, 0) }
    }

    // MARK: Decoding

    /// Reads and checks the page of this id.
    static func decode(_ bytes: [UInt8], id: ObjectID) throws(StoreError) -> ManifestPage {
        func bad(_ what: String) -> StoreError { StoreError(.corrupt, "manifest page \(id) \(what)") }
        guard bytes.count >= headerBytes + checksumBytes, bytes.count <= maxBytes else {
            throw bad("has \(bytes.count) bytes")
        }
        var input = PageReader(bytes)
        guard input.u64() == magic else { throw bad("is no manifest page (wrong magic)") }
        let version = input.u32()
        guard version == Self.version else {
            throw bad("has format version \(version), this Margarine reads version \(Self.version): use a later one")
        }
        guard Int(input.u32()) == bytes.count else { throw bad("is cut short or has bytes behind its end") }
        var tail = PageReader(bytes, from: bytes.count - checksumBytes)
        guard tail.u64() == checksum(bytes.dropLast(checksumBytes)) else { throw bad("fails its checksum") }
        guard input.id() == id else { throw bad("holds another page") }
        let index = input.u64()
        let level = Int(input.u8())
        guard level < ManifestShape.maxDepth, index < 1 << (45 - ManifestShape.slotBits * UInt64(level + 1)) else {
            throw bad("has no place in a manifest (page \(index) of level \(level))")
        }
        guard input.u8() == 0 else { throw bad("is packed in a way not known") }
        let count = Int(input.u16())
        let objects = Int(input.u32())
        guard count >= 1, count <= ManifestShape.slots else { throw bad("has \(count) slots in use") }
        let end = bytes.count - checksumBytes
        var slots: [Int] = []
        slots.reserveCapacity(count)
        if level == 0 {
            guard let entries = decodeEntries(&input, count: count, objects: objects, slots: &slots, end: end) else {
                throw bad("holds entries that cannot be")
            }
            return ManifestPage(leaf: id, index: index, slots: slots, entries: entries)
        }
        guard objects == 0, let children = decodeChildren(&input, level: level, count: count, slots: &slots, end: end)
        else {
            throw bad("holds references that cannot be")
        }
        return ManifestPage(inner: id, level: level, index: index, slots: slots, children: children)
    }

    /// Whose page the bytes are, if they are a whole one.
    static func ownID(_ bytes: [UInt8]) -> ObjectID? {
        guard bytes.count >= headerBytes + checksumBytes, bytes.count <= maxBytes else { return nil }
        var input = PageReader(bytes)
        guard input.u64() == magic, input.u32() == Self.version, Int(input.u32()) == bytes.count else { return nil }
        var tail = PageReader(bytes, from: bytes.count - checksumBytes)
        return tail.u64() == checksum(bytes.dropLast(checksumBytes)) ? input.id() : nil
    }

    private static func decodeChildren(
        _ input: inout PageReader, level: Int, count: Int, slots: inout [Int], end: Int
    ) -> ContiguousArray<PageRef>? {
        guard end - input.position == count * childBytes else { return nil }
        var children: ContiguousArray<PageRef> = []
        children.reserveCapacity(count)
        var stored: UInt64 = 0
        for _ in 0..<count {
            let slot = Int(input.u16())
            let location = input.u8()
            let reserved = input.u8()
            let length = input.u32()
            let child = PageRef(
                id: input.id(), location: location, lengthBytes: length, usedBlocks: input.u64(),
                storedBytes: input.u64())
            let sum = stored.addingReportingOverflow(child.storedBytes)
            guard slot < ManifestShape.slots, slot > slots.last ?? -1, reserved == 0, length <= UInt32(maxBytes),
                child.usedBlocks >= 1, child.usedBlocks <= ManifestShape.blocksUnder(level: level - 1), !sum.overflow
            else { return nil }
            stored = sum.partialValue
            slots.append(slot)
            children.append(child)
        }
        return children
    }

    private static func decodeEntries(
        _ input: inout PageReader, count: Int, objects: Int, slots: inout [Int], end: Int
    ) -> ContiguousArray<BlockEntry>? {
        guard objects >= 1, objects <= count * (1 + BlockEntry.maxDeltas), input.has(objects * 17, before: end) else {
            return nil
        }
        var table = ObjectTable()
        for _ in 0..<objects {
            let id = input.id()
            guard table.add(id, input.u8()) else { return nil }
        }
        // The table is in the order of first use, and all of it is used.
        var used = 0
        func object(_ number: UInt16) -> ObjectTable.Object? {
            guard Int(number) <= used, Int(number) < objects else { return nil }
            used = max(used, Int(number) + 1)
            return table.objects[Int(number)]
        }
        var entries: ContiguousArray<BlockEntry> = []
        entries.reserveCapacity(count)
        for _ in 0..<count {
            guard input.has(3, before: end) else { return nil }
            let slot = Int(input.u16())
            let flags = input.u8()
            let deltaCount = Int(flags & 0x7f)
            guard slot < ManifestShape.slots, slot > slots.last ?? -1, deltaCount <= BlockEntry.maxDeltas,
                input.has((flags & 0x80 != 0 ? 10 : 0) + deltaCount * 18, before: end)
            else { return nil }
            var entry = BlockEntry(base: nil, deltas: [])
            if flags & 0x80 != 0 {
                guard let named = object(input.u16()) else { return nil }
                entry.base = BaseRef(
                    id: named.id, location: named.location, lengthBytes: input.u32(), nonzeroSlices: input.u32())
            }
            entry.deltas.reserveCapacity(deltaCount)
            for _ in 0..<deltaCount {
                guard let named = object(input.u16()) else { return nil }
                entry.deltas.append(
                    DeltaRef(
                        id: named.id, location: named.location, offsetBytes: input.u32(), lengthBytes: input.u32(),
                        touchedSlices: input.u32(), zeroedSlices: input.u32()))
            }
            guard entry.isSound else { return nil }
            slots.append(slot)
            entries.append(entry)
        }
        guard used == objects, input.position == end else { return nil }
        return entries
    }
}

extension BlockEntry {
    /// What must hold for an entry of a manifest.
    var isSound: Bool {
        if let base, base.lengthBytes == 0 || base.nonzeroSlices == 0 { return false }
        return nonzeroSlices != 0 && deltas.count <= Self.maxDeltas
            && deltas.allSatisfy {
                $0.offsetBytes > 0 && $0.lengthBytes > 0 && $0.touchedSlices != 0
                    && $0.zeroedSlices & ~$0.touchedSlices == 0
            }
    }
}

/// The objects that the entries of a leaf name, each once, in the order of first use.
private struct ObjectTable {
    struct Object: Hashable {
        var id: ObjectID
        var location: UInt8
    }
    private(set) var objects: [Object] = []
    private var numbers: [Object: UInt16] = [:]

    /// false: it was there already.
    @discardableResult mutating func add(_ id: ObjectID, _ location: UInt8) -> Bool {
        let object = Object(id: id, location: location)
        if numbers[object] != nil { return false }
        numbers[object] = UInt16(objects.count)
        objects.append(object)
        return true
    }

    mutating func add(_ entry: BlockEntry) {
        if let base = entry.base { add(base.id, base.location) }
        for delta in entry.deltas { add(delta.id, delta.location) }
    }

    func number(_ id: ObjectID, _ location: UInt8) -> UInt16 { numbers[Object(id: id, location: location)]! }
}

/// Appends little-endian integers.
private struct PageWriter {
    private(set) var bytes: [UInt8] = []

    init(capacity: Int) { bytes.reserveCapacity(capacity) }

    mutating func put<T: FixedWidthInteger>(_ value: T) {
        withUnsafeBytes(of: value.littleEndian) { bytes.append(contentsOf: $0) }
    }
    mutating func put(_ id: ObjectID) {
        put(id.high)
        put(id.low)
    }
    mutating func put(_ entry: BlockEntry, slot: Int, _ table: ObjectTable) {
        put(UInt16(slot))
        put(UInt8(entry.base == nil ? 0 : 0x80) | UInt8(entry.deltas.count))
        if let base = entry.base {
            put(table.number(base.id, base.location))
            put(base.lengthBytes)
            put(base.nonzeroSlices)
        }
        for delta in entry.deltas {
            put(table.number(delta.id, delta.location))
            put(delta.offsetBytes)
            put(delta.lengthBytes)
            put(delta.touchedSlices)
            put(delta.zeroedSlices)
        }
    }
    mutating func setLength(_ length: Int) {
        withUnsafeBytes(of: UInt32(length).littleEndian) { bytes.replaceSubrange(12..<16, with: $0) }
    }
}

/// Takes little-endian integers off the front. The caller has checked that they are there.
private struct PageReader {
    private let bytes: [UInt8]
    private(set) var position: Int

    init(_ bytes: [UInt8], from position: Int = 0) {
        self.bytes = bytes
        self.position = position
    }

    func has(_ count: Int, before end: Int) -> Bool { end - position >= count }

    private mutating func take<T: FixedWidthInteger>(_: T.Type) -> T {
        defer { position += MemoryLayout<T>.size }
        precondition(bytes.count - position >= MemoryLayout<T>.size)
        return T(littleEndian: bytes.withUnsafeBytes { $0.loadUnaligned(fromByteOffset: position, as: T.self) })
    }
    mutating func u8() -> UInt8 { take(UInt8.self) }
    mutating func u16() -> UInt16 { take(UInt16.self) }
    mutating func u32() -> UInt32 { take(UInt32.self) }
    mutating func u64() -> UInt64 { take(UInt64.self) }
    mutating func id() -> ObjectID { ObjectID(high: u64(), low: u64()) }
}
