// Listing what there is, following what is named, and holding the one against the other. All of it passes through files on
// scratch: of a thousand million objects never more than a part is in memory.
//
// An object is kept when its id is named, at whatever location: a copy of what is in use is not garbage, for somebody may be
// about to name it. Who knows that nobody is may have such copies dropped.

import BlockCache
import ObjectStore
import Runtime

extension CollectionRound {
    // MARK: Listing

    /// Lists the blocks and pages of every location; the old ones are candidates.
    func listObjects() async throws(CatalogError) {
        let begin = try await resume()
        var done = summary.blocks.scanned + summary.pages.scanned
        let kinds = ObjectKind.allCases
        for (location, bucket) in store.locations.buckets.enumerated() {
            for (number, kind) in kinds.enumerated() {
                if (location, number) < (begin.location, begin.kind) { continue }
                let isBegun = (location, number) == (begin.location, begin.kind)
                let file = candidates[kind]!
                try await bucket.forEachPage(prefix: kind.folder, after: isBegun ? begin.after : nil) {
                    (page) async throws(CatalogError) in
                    for item in page.items {
                        // What is not named like an object is not ours.
                        guard let id = ObjectID(item.key.dropFirst(kind.folder.utf8.count)) else { continue }
                        let isYoung = item.modifiedMs >= cutOffMs(location)
                        summarize(kind) {
                            $0.scanned += 1
                            $0.scannedBytes += item.lengthBytes
                            if isYoung { $0.young += 1 }
                        }
                        if !isYoung { file.add([id.high, id.low, UInt64(location) << 56 | item.lengthBytes]) }
                    }
                    try await file.spill()
                    done += UInt64(page.items.count)
                    var next = ListingPlace(location: location, kind: number, after: page.next)
                    if page.next == nil {
                        next.kind = (number + 1) % kinds.count
                        if next.kind == 0 { next.location += 1 }
                    }
                    try await saveIfDue(next)
                    try await report(.listing, done, 0)
                }
            }
        }
    }

    private func summarize(_ kind: ObjectKind, _ change: (inout CollectionSummary.Objects) -> Void) {
        switch kind {
        case .block: change(&summary.blocks)
        case .page: change(&summary.pages)
        }
    }

    // MARK: Tracing

    /// Follows every manifest of every generation that is recorded, retired or not, of disks that are there or not.
    func traceManifests() async throws(CatalogError) {
        for (location, heads) in store.headStores.enumerated() {
            if skips(location) { continue }
            let scan = RootScan(heads: heads, requests: options.requests)
            try await scan.heads.forEachName { (names) async throws(CatalogError) in
                try await addRoots(try await scan.disks(names), scan, location)
            }
        }
        let (blocks, pages) = (named[.block]!, named[.page]!)
        var done: UInt64 = 0
        try await trace.run { (place, page) async throws(CatalogError) in
            pages.add([place.ref.id.high, place.ref.id.low, UInt64(place.ref.location)])
            for object in page.namedObjects {
                blocks.add([object.id.high, object.id.low, UInt64(object.location)])
            }
            try await blocks.spill()
            try await pages.spill()
            done += 1
            try await report(.tracing, done, 0)
        }
    }

    private func addRoots(_ disks: [FoundDisk], _ scan: RootScan, _ location: Int) async throws(CatalogError) {
        var recorded: [(name: String, generation: UInt64)] = []
        for disk in disks {
            guard let head = try disk.head.get() else {
                throw CatalogError(.corrupt, "\(scan.heads.bucket.name): disk '\(disk.name)' has lost its head")
            }
            if let record = head.record { trace.add(record) }
            for number in disk.generations {
                if options.isDryRun, wouldRemove[location].contains("\(disk.name)@\(number)") { continue }
                recorded.append((disk.name, number))
            }
        }
        for start in stride(from: 0, to: recorded.count, by: 1000) {
            let part = Array(recorded[start..<min(start + 1000, recorded.count)])
            let records = try await inParallel(part, limit: options.requests) {
                (one) async throws(CatalogError) -> GenerationRecord? in
                try await scan.record(one.name, one.generation)
            }
            // Removed since it was listed: by a collector that has lost its role, and rightly.
            for record in records { if let record { trace.add(record) } }
            try await trace.spill()
            try await report(.tracing, 0, 0)
        }
    }

    // MARK: Comparing

    /// Finds the candidates that nothing names.
    func compare() async throws(CatalogError) {
        let total = candidates.values.reduce(0) { $0 + $1.count }
        var done: UInt64 = 0
        for kind in ObjectKind.allCases {
            let found = candidates[kind]!
            for partition in 0..<found.partitions {
                let words = try await found.words(of: partition)
                if words.isEmpty { continue }
                let uses = try await named[kind]!.uses(of: words, in: partition)
                for (use, start) in zip(uses, stride(from: 0, to: words.count, by: found.width)) {
                    done += 1
                    if use != .none, use != .copy || !options.dropsCopies {
                        summarize(kind) {
                            $0.kept += 1
                            if use == .copy { $0.copies += 1 }
                        }
                        continue
                    }
                    // The lowest bit that a length never has tells the kind.
                    let isPage: UInt64 = kind == .page ? 1 << 55 : 0
                    garbage.add([words[start], words[start + 1], words[start + 2] | isPage])
                    summarize(kind) {
                        $0.deleted += 1
                        $0.deletedBytes += words[start + 2] & ((1 << 55) - 1)
                    }
                }
                try await garbage.spill()
                try await report(.comparing, done, total)
            }
        }
    }

    // MARK: Deleting

    /// Deletes what was found to be garbage.
    func deleteGarbage() async throws(CatalogError) {
        let total = garbage.count
        var done: UInt64 = 0
        let environment = store.environment
        let began = environment.nowNs
        let rate = options.deletesPerSecond
        let most = rate > 0 ? min(1000, rate) : 1000
        var batches: [GarbagePlace: [String]] = [:]
        for partition in 0..<garbage.partitions {
            try await garbage.forEachRun(in: partition) { (words) async throws(CatalogError) in
                for start in stride(from: 0, to: words.count, by: garbage.width) {
                    let id = ObjectID(high: words[start], low: words[start + 1])
                    let kind: ObjectKind = words[start + 2] & 1 << 55 != 0 ? .page : .block
                    let place = GarbagePlace(location: Int(words[start + 2] >> 56), kind: kind)
                    batches[place, default: []].append(kind.key(id))
                    guard let keys = batches[place], keys.count == most else { continue }
                    batches[place] = nil
                    try await delete(keys, place, &done, total)
                    // Not before its time.
                    if rate > 0 {
                        let dueNs = began + done * 1_000_000_000 / UInt64(rate)
                        if dueNs > environment.nowNs { await environment.sleep(ns: dueNs - environment.nowNs) }
                    }
                }
            }
        }
        for place in batches.keys.sorted() {
            if let keys = batches[place], !keys.isEmpty { try await delete(keys, place, &done, total) }
        }
    }

    private func delete(
        _ keys: [String], _ place: GarbagePlace, _ done: inout UInt64, _ total: UInt64
    ) async throws(CatalogError) {
        let bucket = store.locations.buckets[place.location]
        try await CatalogError.wrap { () async throws(StoreError) in try await bucket.delete(keys) }
        done += UInt64(keys.count)
        try await report(.deleting, done, total)
    }
}

/// What one request can delete together.
private struct GarbagePlace: Hashable, Comparable {
    var location: Int
    var kind: ObjectKind
    static func < (a: Self, b: Self) -> Bool {
        (a.location, a.kind.rawValue) < (b.location, b.kind.rawValue)
    }
}

/// What a listed object is to those who name its id.
private enum ObjectUse: UInt8 {
    /// Nobody names it.
    case none
    /// Named at other locations.
    case elsewhere
    /// Named at other locations, and there at one of them.
    case copy
    case here
}

extension PartitionedFile {
    /// What the listed objects in `words` are to what this file says is named: both have an id and its location, the listed
    /// ones in the first byte of the third word.
    fileprivate func uses(
        of words: ContiguousArray<UInt64>, in partition: Int
    ) async throws(CatalogError) -> [ObjectUse] {
        let count = words.count / 3
        func id(_ index: Int32) -> (UInt64, UInt64) { (words[Int(index) * 3], words[Int(index) * 3 + 1]) }
        // The same id, at several locations, stands together.
        let order = (0..<Int32(count)).sorted { id($0) < id($1) }
        var uses = Array(repeating: ObjectUse.none, count: count)
        try await forEachRun(in: partition) { run in
            for start in stride(from: 0, to: run.count, by: width) {
                let wanted = (run[start], run[start + 1])
                var low = 0
                var high = count
                while low < high {
                    let middle = (low + high) / 2
                    if id(order[middle]) < wanted { low = middle + 1 } else { high = middle }
                }
                while low < count, id(order[low]) == wanted {
                    let index = Int(order[low])
                    if words[index * 3 + 2] >> 56 == run[start + 2] {
                        uses[index] = .here
                    } else if uses[index] == .none {
                        uses[index] = .elsewhere
                    }
                    low += 1
                }
            }
        }
        var first = 0
        while first < count {
            var end = first + 1
            while end < count, id(order[end]) == id(order[first]) { end += 1 }
            let group = order[first..<end]
            if group.contains(where: { uses[Int($0)] == .here }) {
                for index in group where uses[Int(index)] == .elsewhere { uses[Int(index)] = .copy }
            }
            first = end
        }
        return uses
    }
}

extension ManifestPage {
    struct NamedObject: Hashable {
        var id: ObjectID
        var location: UInt8
    }

    /// The block objects that a leaf names, each once.
    var namedObjects: Set<NamedObject> {
        var objects: Set<NamedObject> = []
        for entry in entries {
            if let base = entry.base { objects.insert(NamedObject(id: base.id, location: base.location)) }
            for delta in entry.deltas { objects.insert(NamedObject(id: delta.id, location: delta.location)) }
        }
        return objects
    }
}
