// Reads generations out of the store as a stranger would: from the objects alone, at once, beside all servers.

import BlockCache
import Logging
import ObjectStore
import Runtime

@testable import Margarine

/// A world without time: nothing waits.
private struct StillEnvironment: Environment {
    var nowNs: UInt64 { 0 }
    var wallMs: Int64 { 0 }
    func randomBits() -> UInt64 { preconditionFailure("an observer makes nothing") }
    func sleep(ns: UInt64) async { preconditionFailure("an observer waits for nothing") }
    func offload<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T { work() }
}

final class Observer: @unchecked Sendable {  // as its world
    private let loop: Loop
    private let loader: BlockLoader
    private let manifests: ManifestCache

    init(_ store: SimStore) {
        loop = Loop(name: "observer", clock: { 0 })
        let locations = Locations(store.memories)
        let environment = StillEnvironment()
        let files = BlockFiles(disk: MemoryScratch(), budgetBytes: 0, environment: environment)
        let own = loop
        loader = BlockLoader(
            locations: locations.buckets, cache: SliceCache(budgetBytes: 16 << 20), files: files,
            environment: environment, spawn: { own.run(task: $0) })
        manifests = ManifestCache(locations, budgetBytes: 4 << 20)
    }

    /// The write that each of `granules` shows in a generation; a text when it can't be read or shows what nobody wrote.
    func read(_ record: GenerationRecord, _ granules: [UInt32]) -> Result<[UInt32: UInt32], Violation> {
        wait("generation \(record.generation)") { [self] in try await look(record, granules) }
    }

    /// Every object that a generation names, as `LOCATION/KEY`.
    func objects(of record: GenerationRecord) -> Result<[String], Violation> {
        wait("objects of generation \(record.generation)") { [self] in
            var found: Set<String> = []
            var places = record.root.map { [PagePlace(ref: $0, level: record.depth - 1, index: 0)] } ?? []
            while let place = places.popLast() {
                found.insert("\(place.ref.location)/\(place.ref.id.manifestKey)")
                let page = try await manifests.page(place.ref, level: place.level, index: place.index)
                for (slot, child) in zip(page.slots.slots, page.children) {
                    places.append(PagePlace(ref: child, level: place.level - 1, index: place.index << 9 | UInt64(slot)))
                }
                for entry in page.entries {
                    if let base = entry.base { found.insert("\(base.location)/\(base.id.blockKey)") }
                    for delta in entry.deltas { found.insert("\(delta.location)/\(delta.id.blockKey)") }
                }
            }
            return found.sorted()
        }
    }

    private final class Answer<T: Sendable>: @unchecked Sendable {  // as the observer
        var result: Result<T, Violation>?
    }

    /// Runs `work` to its end, at once.
    private func wait<T: Sendable>(_ what: String, _ work: @escaping @Sendable () async throws -> T) -> Result<
        T, Violation
    > {
        let answer = Answer<T>()
        loop.run {
            do {
                answer.result = .success(try await work())
            } catch {
                answer.result = .failure(Violation(description: "\(what): \(error)"))
            }
        }
        while answer.result == nil {
            guard loop.isReady else { return .failure(Violation(description: "\(what) can't be read")) }
            loop.step()
        }
        return answer.result!
    }

    private func look(_ record: GenerationRecord, _ granules: [UInt32]) async throws -> [UInt32: UInt32] {
        let manifest = Manifest.open(record, cache: manifests)
        var seen: [UInt32: UInt32] = [:]
        seen.reserveCapacity(granules.count)
        let perSlice = UInt32(Geometry.sliceBytes / Pattern.granuleBytes)
        var i = 0
        while i < granules.count {
            let number = granules[i] / perSlice
            var end = i
            while end < granules.count, granules[end] / perSlice == number { end += 1 }
            let part = granules[i..<end]
            i = end
            let block = BlockIndex(UInt64(number) / UInt64(Geometry.slicesPerBlock))
            let slice = SliceIndex(Int(number) % Geometry.slicesPerBlock)
            guard UInt64(number) * UInt64(Geometry.sliceBytes) < record.sizeBytes,
                let entry = try await manifest.find(block), entry.key(slice) != nil
            else {
                for granule in part { seen[granule] = 0 }
                continue
            }
            let pin = try await loader.load(entry, slice)
            for granule in part {
                let bytes = pin.pointer + Int(granule % perSlice) * Pattern.granuleBytes
                guard let write = Pattern.write(bytes, granule: granule) else {
                    throw Violation(description: "granule \(granule) shows bytes that nobody wrote")
                }
                seen[granule] = write
            }
        }
        return seen
    }
}
