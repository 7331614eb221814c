// Very many small records on scratch, sorted into partitions by the first bits of an object's id, so that all that is said of
// one id comes together in memory, a partition at a time.
//
// Always holds: memory is bounded by the number of partitions times a chunk, plus 8 bytes for each chunk on scratch; a record
// that was added is read exactly once from its partition.

import BlockCache
import Runtime

/// Records of a fixed number of 64-bit words. The first word decides the partition. Used by one task at a time.
final class PartitionedFile: @unchecked Sendable {
    static let chunkBytes = 4 << 10

    let width: Int
    private let shift: UInt64
    private let chunkWords: Int
    private let scratch: any ScratchDisk
    private let path: String
    private var file: (any ScratchFile)?
    private var endBytes: UInt64 = 0
    /// The words of each partition that are not on scratch yet, less than a chunk.
    private var buffers: [ContiguousArray<UInt64>]
    /// Where the chunks of each partition lie, in chunks.
    private var chunks: [ContiguousArray<UInt32>]
    /// Whole chunks that wait to be written.
    private var full: [(partition: Int, words: ContiguousArray<UInt64>)] = []
    /// Records added.
    private(set) var count: UInt64 = 0

    /// - Parameter partitionBits: 2^this partitions, at least 1 bit.
    init(_ scratch: any ScratchDisk, path: String, partitionBits: Int, width: Int) {
        precondition(partitionBits >= 1 && partitionBits <= 16 && width >= 1)
        self.scratch = scratch
        self.path = path
        self.width = width
        shift = UInt64(64 - partitionBits)
        chunkWords = Self.chunkBytes / 8 / width * width
        buffers = Array(repeating: [], count: 1 << partitionBits)
        chunks = Array(repeating: [], count: 1 << partitionBits)
    }

    var partitions: Int { buffers.count }

    /// Adds a record of `width` words. `spill` is to be called every thousand records or so.
    func add(_ words: UInt64...) { add(words) }

    func add(_ words: [UInt64]) {
        precondition(words.count == width)
        let partition = Int(words[0] >> shift)
        // All at once: growing bit by bit leaves holes in the heap.
        if buffers[partition].isEmpty { buffers[partition].reserveCapacity(chunkWords) }
        buffers[partition].append(contentsOf: words)
        count += 1
        if buffers[partition].count == chunkWords {
            full.append((partition, buffers[partition]))
            buffers[partition] = []
        }
    }

    /// Writes what has become whole chunks.
    func spill() async throws(CatalogError) {
        if full.isEmpty { return }
        try await wrap { () async throws(ScratchError) in
            let file = try openFile()
            var bytes: [UInt8] = []
            bytes.reserveCapacity(full.count * chunkWords * 8)
            for chunk in full {
                chunk.words.withUnsafeBytes { bytes.append(contentsOf: $0) }
                chunks[chunk.partition].append(UInt32(endBytes / UInt64(chunkWords * 8)))
                endBytes += UInt64(chunkWords * 8)
            }
            full = []
            try await file.write(bytes, at: endBytes - UInt64(bytes.count))
        }
    }

    /// Calls `body` with the records of a partition, some at a time, `width` words each.
    func forEachRun(
        in partition: Int, _ body: (ContiguousArray<UInt64>) async throws(CatalogError) -> Void
    ) async throws(CatalogError) {
        try await spill()
        for number in chunks[partition] {
            let bytes = try await read(number)
            try await body(bytes.withUnsafeBytes { ContiguousArray($0.bindMemory(to: UInt64.self)) })
        }
        if !buffers[partition].isEmpty { try await body(buffers[partition]) }
    }

    /// All words of a partition.
    func words(of partition: Int) async throws(CatalogError) -> ContiguousArray<UInt64> {
        var all: ContiguousArray<UInt64> = []
        all.reserveCapacity(chunks[partition].count * chunkWords + buffers[partition].count)
        try await forEachRun(in: partition) { all.append(contentsOf: $0) }
        return all
    }

    private func read(_ number: UInt32) async throws(CatalogError) -> [UInt8] {
        let at = UInt64(number) * UInt64(chunkWords * 8)
        return try await wrap { () async throws(ScratchError) in
            try await openFile().read(count: chunkWords * 8, at: at)
        }
    }

    private func openFile() throws(ScratchError) -> any ScratchFile {
        if let file { return file }
        // What a round that was cut off left.
        try scratch.remove(path)
        let made = try scratch.open(path, create: true)
        file = made
        return made
    }

    /// Forgets everything.
    func remove() {
        file = nil
        try? scratch.remove(path)
        for partition in buffers.indices {
            buffers[partition] = []
            chunks[partition] = []
        }
        full = []
    }

    private func wrap<T>(_ body: () async throws(ScratchError) -> T) async throws(CatalogError) -> T {
        do throws(ScratchError) { return try await body() } catch { throw CatalogError(.file, error.description) }
    }
}
