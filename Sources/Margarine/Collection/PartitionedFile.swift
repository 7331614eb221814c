// Very many small records on scratch, sorted into partitions by the first bits of an object's id, so that all that is said of
// one id comes together in memory, a partition at a time.
//
// The file is a row of chunks of 4 KiB, 64-bit words in the machine's order:
//
//     word 0   XXH3-64 of the words behind it, plus the file's salt, plus the chunk's number
//     word 1   partition << 32 | how many words of records follow
//     word 2   records, then zeroes
//
// Always holds: memory is bounded by the number of partitions times a chunk, plus 4 bytes for each chunk on scratch; a record
// that was added is read exactly once from its partition, as it was added or not at all: what a scratch disk changed is an
// error, for a name that is overlooked would be an object that is deleted.

import BlockCache
import CLibraries
import Runtime

/// Records of a fixed number of 64-bit words. The first word decides the partition. Used by one task at a time.
final class PartitionedFile: @unchecked Sendable {
    static let chunkBytes = 4 << 10
    private static let headerWords = 2

    /// What another process needs to go on with the file; see `save`.
    struct Saved: Codable {
        var chunks: UInt32
        var count: UInt64
    }

    let width: Int
    private let shift: UInt64
    /// Words of records in a full chunk.
    private let chunkWords: Int
    private let scratch: any ScratchDisk
    private let path: String
    private let salt: UInt64
    private var file: (any ScratchFile)?
    private var chunksWritten: UInt32 = 0
    /// The words of each partition that are not on scratch yet, less than a chunk.
    private var buffers: [ContiguousArray<UInt64>]
    /// The numbers of the chunks of each partition.
    private var chunks: [ContiguousArray<UInt32>]
    /// Chunks that wait to be written.
    private var full: [(partition: Int, words: ContiguousArray<UInt64>)] = []
    /// Records added.
    private(set) var count: UInt64 = 0

    /// - Parameters:
    ///   - partitionBits: 2^this partitions, at least 1 bit.
    ///   - salt: tells the file from one that had its name before. Random.
    init(_ scratch: any ScratchDisk, path: String, partitionBits: Int, width: Int, salt: UInt64) {
        precondition(partitionBits >= 1 && partitionBits <= 16 && width >= 1)
        self.scratch = scratch
        self.path = path
        self.width = width
        self.salt = salt
        shift = UInt64(64 - partitionBits)
        chunkWords = (Self.chunkBytes / 8 - Self.headerWords) / width * width
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
            bytes.reserveCapacity(full.count * Self.chunkBytes)
            var number = chunksWritten
            for chunk in full {
                bytes += sealed(chunk.words, of: chunk.partition, number)
                chunks[chunk.partition].append(number)
                number += 1
            }
            full = []
            let at = UInt64(chunksWritten) * UInt64(Self.chunkBytes)
            chunksWritten = number
            try await file.write(bytes, at: at)
        }
    }

    /// Calls `body` with the records of a partition, some at a time, `width` words each.
    func forEachRun(
        in partition: Int, _ body: (ContiguousArray<UInt64>) async throws(CatalogError) -> Void
    ) async throws(CatalogError) {
        try await spill()
        for number in chunks[partition] {
            let chunk = try await read(number)
            guard chunk.partition == partition else { throw damaged(number) }
            try await body(chunk.words)
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

    /// Forgets everything.
    func remove() {
        file = nil
        try? scratch.remove(path)
        chunksWritten = 0
        count = 0
        for partition in buffers.indices {
            buffers[partition] = []
            chunks[partition] = []
        }
        full = []
    }

    // MARK: Going on later

    /// Makes everything that was added durable; `restore` goes on from there, in this process or another one.
    func save() async throws(CatalogError) -> Saved {
        for partition in buffers.indices where !buffers[partition].isEmpty {
            full.append((partition, buffers[partition]))
            buffers[partition] = []
            if full.count >= 256 { try await spill() }
        }
        try await spill()
        try await wrap { () async throws(ScratchError) in try await openFile().sync() }
        return Saved(chunks: chunksWritten, count: count)
    }

    /// Takes over what a file of the same path, width, number of partitions and salt has saved. Must be the first call.
    func restore(_ saved: Saved) async throws(CatalogError) {
        precondition(file == nil && count == 0)
        file = try await wrap { () async throws(ScratchError) in try scratch.open(path, create: false) }
        chunksWritten = saved.chunks
        for number in 0..<saved.chunks {
            let chunk = try await read(number)
            chunks[chunk.partition].append(number)
            count += UInt64(chunk.words.count / width)
        }
        guard count == saved.count else { throw damaged(saved.chunks) }
    }

    // MARK: Chunks

    private func sealed(_ words: ContiguousArray<UInt64>, of partition: Int, _ number: UInt32) -> [UInt8] {
        var chunk = [UInt64](repeating: 0, count: Self.chunkBytes / 8)
        chunk[1] = UInt64(partition) << 32 | UInt64(words.count)
        chunk.replaceSubrange(Self.headerWords..<Self.headerWords + words.count, with: words)
        chunk[0] = checksum(chunk, number)
        return chunk.withUnsafeBytes { Array($0) }
    }

    private func checksum(_ chunk: [UInt64], _ number: UInt32) -> UInt64 {
        let sum = chunk.withUnsafeBytes { mg_xxh3($0.baseAddress! + 8, $0.count - 8, 0) }
        return sum &+ salt &+ UInt64(number)
    }

    private func read(_ number: UInt32) async throws(CatalogError) -> (partition: Int, words: ContiguousArray<UInt64>) {
        let bytes = try await wrap { () async throws(ScratchError) in
            try await openFile().read(count: Self.chunkBytes, at: UInt64(number) * UInt64(Self.chunkBytes))
        }
        let chunk = bytes.withUnsafeBytes { Array($0.bindMemory(to: UInt64.self)) }
        let count = Int(chunk[1] & 0xffff_ffff)
        let partition = Int(chunk[1] >> 32)
        guard chunk[0] == checksum(chunk, number), partition < partitions, count <= chunkWords, count % width == 0
        else { throw damaged(number) }
        return (partition, ContiguousArray(chunk[Self.headerWords..<Self.headerWords + count]))
    }

    private func damaged(_ number: UInt32) -> CatalogError {
        CatalogError(
            .file, "the scratch disk has changed '\(path)', at \(UInt64(number) * UInt64(Self.chunkBytes)) bytes")
    }

    private func openFile() throws(ScratchError) -> any ScratchFile {
        if let file { return file }
        // What a round that was cut off left.
        try scratch.remove(path)
        let made = try scratch.open(path, create: true)
        file = made
        return made
    }

    private func wrap<T>(_ body: () async throws(ScratchError) -> T) async throws(CatalogError) -> T {
        do throws(ScratchError) { return try await body() } catch { throw CatalogError(.file, error.description) }
    }
}
