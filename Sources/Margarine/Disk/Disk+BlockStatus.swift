// base:allocation, and NBD_CMD_CACHE. Answered from layers and manifest alone: no data is fetched to know where there is
// none.

internal import BlockCache
internal import ObjectStore
internal import Runtime

/// Joins neighbours of equal status, up to a bound.
struct ExtentList {
    /// More than this is not told in one reply; the client asks on from there.
    static let limit = 8192
    private(set) var extents: [Extent] = []

    /// false: full.
    mutating func add(_ lengthBytes: UInt64, allocated: Bool) -> Bool {
        if let last = extents.last, last.isHole != allocated {
            extents[extents.count - 1].lengthBytes += lengthBytes
            return true
        }
        if extents.count == ExtentList.limit { return false }
        extents.append(Extent(lengthBytes: lengthBytes, isHole: !allocated, isZero: !allocated))
        return true
    }
}

extension Disk {
    func submitBlockStatus(_ request: DeviceRequest) {
        nonisolated(unsafe) let request = request  // stays on this loop
        context.spawn { [self] in
            do {
                request.extents = try await extents(
                    request.offset..<request.offset + request.lengthBytes, onlyOne: request.onlyOneExtent)
                finish(request, nil)
            } catch {
                context.problem("disk \(name): block status at \(request.offset) failed: \(error)")
                finish(request, .io)
            }
        }
    }

    /// Runs of equal status from the start of `range`, not beyond its end.
    private func extents(_ range: Range<UInt64>, onlyOne: Bool) async throws(StoreError) -> [Extent] {
        let slice = UInt64(Geometry.sliceBytes)
        let perBlock = UInt64(Geometry.slicesPerBlock)
        var touched = active.touchedSlices + (waiting?.touchedSlices ?? []) + (committing?.touchedSlices ?? [])
        touched.sort()
        var list = ExtentList()
        var position = range.lowerBound
        var nextUsed: BlockIndex?
        var knowsNextUsed = false
        while position < range.upperBound, list.extents.count < 2 || !onlyOne {
            let number = position / slice
            let block = BlockIndex(number / perBlock)
            if !knowsNextUsed || nextUsed.map({ $0 < block }) == true {
                nextUsed = try await manifest.nextUsed(from: block)
                knowsNextUsed = true
            }
            if nextUsed != block {
                // No stored block here: nothing but what the layers hold.
                let nextTouched = touched.first(atOrAfter: number)
                if nextTouched != number {
                    let blockStart = nextUsed.map { $0.value * perBlock } ?? .max / slice
                    let end = min(range.upperBound, min(nextTouched ?? .max / slice, blockStart) * slice)
                    if !list.add(end - position, allocated: false) { break }
                    position = end
                    continue
                }
            }
            var entry: BlockEntry?
            if nextUsed == block { entry = try await manifest.find(block) }
            let end = min(range.upperBound, (number + 1) * slice)
            if !addSlice(number, position..<end, entry, &list) { break }
            position = end
        }
        return onlyOne ? Array(list.extents.prefix(1)) : list.extents
    }

    /// Adds the part `range` of one slice. false: the list is full.
    private func addSlice(_ number: UInt64, _ range: Range<UInt64>, _ entry: BlockEntry?, _ list: inout ExtentList)
        -> Bool
    {
        let index = SliceIndex(Int(number % UInt64(Geometry.slicesPerBlock)))
        let stored = entry?.key(index) != nil
        var zero = PageMask.none
        var data = PageMask.none
        for layer in [committing, waiting, active] {
            guard let masks = layer?.masks(of: number) else { continue }
            zero = (zero & ~masks.data) | masks.zero
            data = (data & ~masks.zero) | masks.data
        }
        if (data | zero).isEmpty { return list.add(range.upperBound - range.lowerBound, allocated: stored) }
        let start = number * UInt64(Geometry.sliceBytes)
        var position = range.lowerBound
        while position < range.upperBound {
            let page = Int((position - start) / UInt64(Geometry.pageBytes))
            let end = min(range.upperBound, start + UInt64((page + 1) * Geometry.pageBytes))
            let allocated = data.contains(page) || (!zero.contains(page) && stored)
            if !list.add(end - position, allocated: allocated) { return false }
            position = end
        }
        return true
    }

    // MARK: Cache

    /// Brings a range near. Advice: it succeeds as soon as it has begun.
    func submitCache(_ request: DeviceRequest) {
        let range = request.offset..<request.offset + min(request.lengthBytes, 256 << 20)
        let generation = manifest
        context.spawn { [self] in
            var offset = range.lowerBound
            while offset < range.upperBound, lost == nil {
                let block = offset / UInt64(Geometry.blockBytes)
                let end = min(range.upperBound, (block + 1) * UInt64(Geometry.blockBytes))
                guard let entry = try? await generation.find(BlockIndex(block)) else { offset = end; continue }
                let first = Int(offset % UInt64(Geometry.blockBytes)) / Geometry.sliceBytes
                let last = Int((end - 1) % UInt64(Geometry.blockBytes)) / Geometry.sliceBytes
                try? await context.loader.prefetch(entry, (first...last).map { SliceIndex($0) })
                offset = end
            }
        }
        finish(request, nil)
    }
}

extension [UInt64] {
    /// In a sorted array, the first element that is not below `value`.
    func first(atOrAfter value: UInt64) -> UInt64? {
        var low = 0
        var high = count
        while low < high {
            let mid = (low + high) / 2
            if self[mid] >= value { high = mid } else { low = mid + 1 }
        }
        return low < count ? self[low] : nil
    }
}
