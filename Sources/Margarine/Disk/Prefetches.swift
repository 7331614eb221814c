// NBD_CMD_CACHE: advice, answered as soon as it is noted. A few ranges are being brought near at a time and some more are
// remembered; what comes beyond is dropped, and so is what a client asked for that has left.

internal import BlockCache
internal import Runtime

/// Owned by its disk's loop.
final class Prefetches: @unchecked Sendable {
    /// Ranges at a time.
    static let limit = 4
    /// Ranges that wait for their turn.
    static let maxWaiting = 64
    /// Of one request.
    static let maxBytes: UInt64 = 256 << 20

    private final class Wish {
        var offset: UInt64
        let end: UInt64
        let client: ObjectIdentifier
        var isWanted = true
        init(_ offset: UInt64, _ end: UInt64, _ client: ObjectIdentifier) {
            self.offset = offset
            self.end = end
            self.client = client
        }
    }
    private unowned let disk: Disk
    private var running: [Wish] = []
    private var waiting: [Wish] = []
    /// Advice that was not taken.
    private(set) var dropped: UInt64 = 0

    init(_ disk: Disk) { self.disk = disk }

    var count: Int { running.count + waiting.count }

    func add(_ request: DeviceRequest) {
        disk.context.loop.assertOwner()
        let client = ObjectIdentifier(request.client)
        let end = request.offset + min(request.lengthBytes, Prefetches.maxBytes)
        if let last = waiting.last, last.client == client, last.end == request.offset,
            end - last.offset <= Prefetches.maxBytes
        {
            waiting[waiting.count - 1] = Wish(last.offset, end, client)
            return
        }
        guard
            running.count < Prefetches.limit || waiting.count < Prefetches.maxWaiting
                || disk.context.settings.fault == .memoryNotBounded
        else {
            dropped += 1
            return
        }
        waiting.append(Wish(request.offset, end, client))
        goOn()
    }

    /// A client has left; nil: all have to.
    func drop(_ client: (any DeviceClient)?) {
        let gone = client.map { ObjectIdentifier($0) }
        waiting.removeAll { gone == nil || $0.client == gone }
        for range in running where gone == nil || range.client == gone { range.isWanted = false }
    }

    private func goOn() {
        while running.count < Prefetches.limit, !waiting.isEmpty {
            let range = waiting.removeFirst()
            running.append(range)
            nonisolated(unsafe) let next = range  // stays on this loop
            disk.context.spawn { [self, disk] in
                await bring(next, of: disk)
                running.removeAll { $0 === next }
                goOn()
            }
        }
    }

    private func bring(_ range: Wish, of disk: Disk) async {
        let block = UInt64(Geometry.blockBytes)
        let slice = UInt64(Geometry.sliceBytes)
        while range.isWanted, range.offset < range.end, disk.lost == nil {
            let index = BlockIndex(range.offset / block)
            let end = min(range.end, (index.value + 1) * block)
            switch disk.view.entry(index) {
            case .notLoaded:
                // Without the page nothing is known of the whole block.
                if (try? await disk.load(.entry(index))) == nil { range.offset = end }
            case .entry(nil): range.offset = end
            case .entry(let entry?):
                // A few slices at a time, so that one whose client has left soon stops.
                let first = Int(range.offset % block / slice)
                let last = min(first + 3, Int((end - 1) % block / slice))
                try? await disk.context.loader.prefetch(entry, (first...last).map { SliceIndex($0) })
                range.offset = index.value * block + UInt64(last + 1) * slice
            }
        }
    }
}

extension Disk {
    /// Brings a range near. Advice: it succeeds as soon as it is noted.
    func submitCache(_ request: DeviceRequest) {
        prefetches.add(request)
        finish(request, nil)
    }
}
