// What each part of a daemon may hold in memory, from the memory that there is. `Docs/Operations.md` has the same figures.
//
// Always holds: what nobody configured comes, all parts together, to at most about seven eighths of the memory from
// 256 MiB on; more than 4 GiB change nothing.

/// Bounds that nobody configures.
package struct MemoryBudgets: Sendable, Equatable {
    /// Requests and replies of all connections together.
    package var requestBytes: UInt64
    /// Manifest pages of all loops together.
    package var manifestBytes: UInt64
    /// Free buffers that one loop keeps.
    package var pooledBytesPerLoop: UInt64

    /// The program itself, threads, and the heap for everything small.
    static let programBytes: UInt64 = 48 << 20
    /// What one block takes while it is committed.
    static let bytesPerUpload: UInt64 = 32 << 20
    private static let mostBytes: UInt64 = 512 << 20

    package init(_ limit: MemoryLimit) {
        requestBytes = Self.eighth(limit, least: 64 << 20)
        manifestBytes = min(max(limit.bytes / 64, 4 << 20), 64 << 20)
        pooledBytesPerLoop = min(max(limit.bytes / 256, 1 << 20), 16 << 20)
    }

    /// An eighth of the memory, at most 512 MiB.
    static func eighth(_ limit: MemoryLimit, least: UInt64) -> UInt64 {
        min(max((limit.bytes / 8) & ~((1 << 20) - 1), least), mostBytes)
    }
}

extension Settings {
    /// These settings with every size that is left to the machine (0) worked out for `limit`.
    package func fitted(to limit: MemoryLimit) -> Settings {
        var fitted = self
        if memoryCacheBytes == 0 { fitted.memoryCacheBytes = MemoryBudgets.eighth(limit, least: 16 << 20) }
        if dirtyMemoryBytes == 0 {
            fitted.dirtyMemoryBytes = MemoryBudgets.eighth(limit, least: Settings.dirtyBytesPerLoop)
        }
        if uploads == 0 {
            fitted.uploads = Int(min(max(limit.bytes / 8 / MemoryBudgets.bytesPerUpload, 1), 4))
        }
        return fitted
    }

    /// What settings that were fitted may take of `limit` when everything is in use and one disk commits.
    package func memoryInUseBytes(_ limit: MemoryLimit) -> UInt64 {
        let budgets = MemoryBudgets(limit)
        return [
            memoryCacheBytes, dirtyMemoryBytes, budgets.requestBytes, budgets.manifestBytes,
            UInt64(uploads) * MemoryBudgets.bytesPerUpload, MemoryBudgets.programBytes,
        ].reduce(0) { sum, part in sum.addingReportingOverflow(part).overflow ? .max : sum + part }
    }

    /// Why these settings, once fitted, are too much for `limit`, and what to do; nil: they are not.
    package func memoryWarning(_ limit: MemoryLimit) -> String? {
        let needed = memoryInUseBytes(limit)
        guard needed > limit.bytes else { return nil }
        return "memory-cache (\(ByteSize.text(memoryCacheBytes))), dirty-memory (\(ByteSize.text(dirtyMemoryBytes))), "
            + "uploads (\(uploads)) and what clients and the program need come to \(ByteSize.readable(needed)), but "
            + "\(limit.source) allows \(ByteSize.readable(limit.bytes)): the kernel may end margined; "
            + "lower them, leave them to margined (0), or raise the limit"
    }
}
