// The calls of a scratch file as async functions, for code that is not on the hot path.

extension ScratchFile {
    /// Writes `bytes` at `offset`; complete (in the page cache, not yet durable) when it returns.
    public func write(_ bytes: [UInt8], at offset: UInt64) async throws(ScratchError) {
        if bytes.isEmpty { return }
        let copy = Copy(bytes)
        defer { copy.bytes.deallocate() }
        let error = await withCheckedContinuation { (continuation: CheckedContinuation<ScratchError?, Never>) in
            withUnsafeTemporaryAllocation(of: UnsafeRawBufferPointer.self, capacity: 1) { vectors in
                vectors.initializeElement(at: 0, to: UnsafeRawBufferPointer(copy.bytes))
                do throws(ScratchError) {
                    if try write(UnsafeBufferPointer(vectors), at: offset, done: { continuation.resume(returning: $0) })
                    {
                        continuation.resume(returning: nil)
                    }
                } catch { continuation.resume(returning: error) }
            }
        }
        if let error { throw error }
    }

    /// Exactly `count` bytes from `offset`; an error when the file ends before.
    public func read(count: Int, at offset: UInt64) async throws(ScratchError) -> [UInt8] {
        let copy = Copy(count: count)
        defer { copy.bytes.deallocate() }
        let error = await withCheckedContinuation { (continuation: CheckedContinuation<ScratchError?, Never>) in
            read(into: copy.bytes, at: offset) { continuation.resume(returning: $0) }
        }
        if let error { throw error }
        return [UInt8](copy.bytes)
    }

    /// Returns when all that was written before is durable.
    public func sync() async throws(ScratchError) {
        let error = await withCheckedContinuation { (continuation: CheckedContinuation<ScratchError?, Never>) in
            sync { continuation.resume(returning: $0) }
        }
        if let error { throw error }
    }
}

/// Memory that stays in place while a call is under way.
private struct Copy: @unchecked Sendable {  // used by one call at a time
    let bytes: UnsafeMutableRawBufferPointer
    init(count: Int) { bytes = .allocate(byteCount: count, alignment: 64) }
    init(_ source: [UInt8]) {
        self.init(count: source.count)
        bytes.copyBytes(from: source)
    }
}
