// The second half of a check: what is named against what is there, and who names what is not.

import BlockCache
import ObjectStore
import Runtime

/// A block object, and everything that is said of it.
private struct CheckedObject: Sendable {
    var id: ObjectID
    var location: UInt8
    var parts: [NamedPart]
}

extension CheckRun {
    /// Lists what there is. After the manifests were read: whatever they name was there before.
    func listObjects() async throws(CatalogError) {
        var done: UInt64 = 0
        for (location, bucket) in store.locations.buckets.enumerated() {
            for kind in ObjectKind.allCases {
                if blind.contains(location) { continue }
                let file = found[kind]!
                do throws(CatalogError) {
                    try await bucket.forEachPage(prefix: kind.folder) { (page) async throws(CatalogError) in
                        for item in page.items {
                            guard let id = ObjectID(item.key.dropFirst(kind.folder.utf8.count)) else { continue }
                            file.add([
                                id.high, id.low, UInt64(location) << 56 | item.lengthBytes,
                                UInt64(max(0, item.modifiedMs)),
                            ])
                        }
                        try await file.spill()
                        done += UInt64(page.items.count)
                        progress(.listing, done, 0)
                    }
                } catch {
                    guard case .store = error.kind else { throw error }
                    blind.insert(location)
                    add(CheckProblem(.unreachable, location: location, key: kind.folder, error.description))
                }
            }
        }
    }

    // MARK: Blocks

    func checkBlocks() async throws(CatalogError) {
        let grace = await graceMs()
        for partition in 0..<parts.partitions {
            var named: [ObjectID: [UInt8: Set<NamedPart>]] = [:]
            try await parts.forEachRun(in: partition) { words in
                for start in stride(from: 0, to: words.count, by: NamedPart.width) {
                    let part = NamedPart(words[start..<start + NamedPart.width])
                    named[part.id, default: [:]][part.location, default: []].insert(part)
                }
            }
            var lengths: [ObjectID: [UInt8: UInt64]] = [:]
            try await found[.block]!.forEachRun(in: partition) { words in
                for start in stride(from: 0, to: words.count, by: 4) {
                    let item = FoundItem(words, start)
                    if named[item.id] != nil {
                        lengths[item.id, default: [:]][UInt8(item.location)] = item.lengthBytes
                    } else {
                        noteOrphan(item, .block, graceMs: grace)
                    }
                }
            }
            var objects: [CheckedObject] = []
            for id in named.keys.sorted(by: { ($0.high, $0.low) < ($1.high, $1.low) }) {
                for location in named[id]!.keys.sorted() {
                    report.blocks += 1
                    let parts = Array(named[id]![location]!)
                    // A doubtful length is worth a look; so is everything, if asked for.
                    if !options.readsData, let length = lengths[id]?[location],
                        parts.allSatisfy({ $0.isBase ? length == $0.neededBytes : length >= $0.neededBytes })
                    {
                        continue
                    }
                    objects.append(CheckedObject(id: id, location: location, parts: parts))
                }
            }
            try await look(at: objects)
        }
    }

    /// Reads objects whole, and repairs what is wrong with them if that is asked for.
    private func look(at objects: [CheckedObject]) async throws(CatalogError) {
        let repair = repair
        for start in stride(from: 0, to: objects.count, by: 4 * options.dataRequests) {
            let some = Array(objects[start..<min(start + 4 * options.dataRequests, objects.count)])
            let outcomes = await inParallel(some, limit: options.dataRequests) { (object) async -> Repair.Outcome in
                await repair.block(object.id, at: object.location, object.parts)
            }
            for (object, outcome) in zip(some, outcomes) {
                report.readBytes += outcome.readBytes
                if let problem = outcome.problem { add(problem, of: object.id) }
            }
            progress(.blocks, report.blocks, 0)
        }
    }

    // MARK: Orphans

    func findOrphanedPages() async throws(CatalogError) {
        let grace = await graceMs()
        for partition in 0..<trace.partitions {
            var named: Set<ObjectID> = []
            for level in 0..<ManifestShape.maxDepth {
                for place in try await trace.places(level, partition) { named.insert(place.ref.id) }
            }
            try await found[.page]!.forEachRun(in: partition) { words in
                for start in stride(from: 0, to: words.count, by: 4) {
                    let item = FoundItem(words, start)
                    if !named.contains(item.id) { noteOrphan(item, .page, graceMs: grace) }
                }
            }
        }
    }

    private func graceMs() async -> Int64 {
        let state = try? await store.collection()
        return state?.effectiveGraceMs(nowMs: store.environment.wallMs) ?? CollectionState.defaultGraceMs
    }

    /// What nobody names may be about to be named, or be named by what could not be read.
    private func noteOrphan(_ item: FoundItem, _ kind: ObjectKind, graceMs: Int64) {
        if options.disk != nil || isPartial { return }
        if store.environment.wallMs - item.modifiedMs <= graceMs { return }
        report.orphanedBytes += item.lengthBytes
        add(
            CheckProblem(
                .orphaned, location: item.location, key: kind.key(item.id),
                "nothing names it (\(item.lengthBytes) bytes): the next collection deletes it"))
    }

    // MARK: Owners

    /// Finds out which generations need what is bad: from the leaves up, and then through all heads and records again.
    func findOwners() async throws(CatalogError) {
        if bad.isEmpty { return }
        // For each page that leads to something bad, what that is.
        var leads: [ObjectID: Set<Int>] = [:]
        let repair = repair
        for level in 0..<ManifestShape.maxDepth {
            for partition in 0..<trace.partitions {
                let places = try await trace.places(level, partition)
                for start in stride(from: 0, to: places.count, by: 4 * options.requests) {
                    let some = Array(places[start..<min(start + 4 * options.requests, places.count)])
                    let pages = await inParallel(some, limit: options.requests) { (place) async -> ManifestPage? in
                        try? await repair.readPage(place)
                    }
                    for (place, page) in zip(some, pages) {
                        var reached: Set<Int> = []
                        if let own = bad[place.ref.id] { reached.insert(own) }
                        for child in page?.children ?? [] { reached.formUnion(leads[child.id] ?? []) }
                        if let page, level == 0 {
                            for object in page.namedObjects {
                                if let number = bad[object.id] { reached.insert(number) }
                            }
                        }
                        if !reached.isEmpty { leads[place.ref.id] = reached }
                    }
                    progress(.owners, UInt64(level), 0)
                }
            }
        }
        var isWhole = !hidesRoots && blind.isEmpty
        for (location, heads) in store.headStores.enumerated() where !blind.contains(location) {
            let scan = RootScan(heads: heads, requests: options.requests)
            do throws(CatalogError) {
                if let name = options.disk {
                    try await noteOwners([name], scan, leads)
                } else {
                    try await scan.heads.forEachName { (names) async throws(CatalogError) in
                        try await noteOwners(names, scan, leads)
                    }
                }
            } catch {
                // Said already, or out of reach since: then the problems stand without their owners.
                if error.kind == .file { throw error }
                isWhole = false
            }
        }
        // Collected meanwhile, with the generation that named it.
        if isWhole { report.drop(bad.values.filter { report.problems[$0].generations.isEmpty }) }
    }

    private func noteOwners(
        _ names: [String], _ scan: RootScan, _ leads: [ObjectID: Set<Int>]
    ) async throws(CatalogError) {
        for disk in try await scan.disks(names) {
            let head = (try? disk.head.get()) ?? nil
            for number in disk.generations where number != head?.generation {
                // One that can't be read is a problem of its own.
                let record = (try? await scan.record(disk.name, number)) ?? nil
                note("\(disk.name)@\(number)", record, leads)
            }
            if let record = head?.record {
                note("\(disk.name)@\(record.generation) (head)", record, leads)
                if let root = record.root, let number = bad[root.id] {
                    report.problems[number].text += ": the head of disk '\(disk.name)' points nowhere"
                }
            }
        }
    }

    private func note(_ owner: String, _ record: GenerationRecord?, _ leads: [ObjectID: Set<Int>]) {
        guard let root = record?.root else { return }
        for number in leads[root.id] ?? [] where report.problems[number].generations.count < CheckProblem.maxOwners {
            report.problems[number].generations.append(owner)
        }
    }
}

/// One listed object.
private struct FoundItem {
    var id: ObjectID
    var location: Int
    var lengthBytes: UInt64
    var modifiedMs: Int64
    init(_ words: ContiguousArray<UInt64>, _ start: Int) {
        id = ObjectID(high: words[start], low: words[start + 1])
        location = Int(words[start + 2] >> 56)
        lengthBytes = words[start + 2] & ((1 << 55) - 1)
        modifiedMs = Int64(words[start + 3])
    }
}
