// Stores with several locations: which bucket has which number, what is found where, and what happens while one is out of
// reach.

import BlockCache
@testable import Margarine
import ObjectStore
import Runtime
import Testing

/// Buckets in memory that can go out of reach, and the store that they are.
struct LocationBed {
    let environment: any Environment
    let memory: [String: MemoryBucket]
    let faulty: [String: FaultyBucket]

    init(_ names: [String] = ["eu", "us", "ap"], environment: any Environment = SeededEnvironment()) {
        self.environment = environment
        memory = Dictionary(uniqueKeysWithValues: names.map { ($0, MemoryBucket(name: "bucket-\($0)")) })
        faulty = memory.mapValues { FaultyBucket($0, environment: environment) }
    }

    /// `name=bucket` where they differ.
    func place(_ text: String) -> StorePlace {
        let parts = text.split(separator: "=").map(String.init)
        let bucket = faulty[parts.last!]!
        return StorePlace(name: parts[0]) { () async throws(StoreError) -> any Bucket in
            // As opening a bucket does.
            _ = try await bucket.list(prefix: "", after: nil, folders: false, limit: 1)
            return bucket
        }
    }

    func open(_ places: [String], near: String? = nil) async throws -> Store {
        try await Store.open(places.map(place), near: near, environment: environment, retries: nil)
    }

    /// A store at all of them, in their order.
    func make(_ names: [String] = ["eu", "us"], near: String? = nil) async throws -> Store {
        for (i, name) in names.enumerated() where i > 0 {
            let added = try await open(Array(names[..<i])).addLocation(name, place(name))
            #expect(added.number == UInt8(i))
            #expect(added.behind.isEmpty)
        }
        return try await open(names, near: near)
    }

    func lose(_ name: String) { faulty[name]!.inject(StoreFault(.fail(.unavailable))) }
    func findAgain(_ name: String) { faulty[name]!.clearFaults() }
    func catalog(_ store: Store) -> Catalog { Catalog(store) { _ in .outOfSight } }
}

/// The error of something that must fail.
func failure(_ body: () async throws -> Void) async -> CatalogError? {
    do {
        try await body()
        return nil
    } catch { return error as? CatalogError }
}

struct LocationTests {
    // MARK: Which is which

    @Test func aNumberBelongsToItsBucketAndNotToTheOrder() async throws {
        let bed = LocationBed()
        _ = try await bed.make(["eu", "us", "ap"])
        for order in [["ap", "eu", "us"], ["us", "ap", "eu"], ["eu", "us", "ap"]] {
            for near in order {
                let store = try await bed.open(order, near: near)
                #expect(try store.location(named: "eu").number == 0)
                #expect(try store.location(named: "us").number == 1)
                #expect(try store.location(named: "ap").number == 2)
                #expect(try store.location(named: nil).name == near)
                #expect(store.locations.nearBucket.name == "bucket-\(near)")
                #expect(store.locations.buckets.map(\.name) == ["bucket-eu", "bucket-us", "bucket-ap"])
                try await store.requireAll()
            }
        }
        // One that is not configured leaves a gap that says its name.
        let store = try await bed.open(["ap", "eu"])
        #expect(store.locations.missing == [Locations.Missing(number: 1, name: "us")])
        let error = await #expect(throws: StoreError.self) {
            _ = try await store.locations.buckets[1].get("disks/x/head", range: nil)
        }
        #expect(error?.kind == .refused)
        #expect(error?.description.contains("'us'") == true)
        for key in [Store.key, LocationRegistry.key] {
            for name in ["eu", "us", "ap"] { #expect(bed.memory[name]!.contents[key] != nil) }
        }
    }

    @Test func aBucketThatIsNotTheLocationMeantIsRefused() async throws {
        let bed = LocationBed(["eu", "us", "ap", "other", "full"])
        _ = try await bed.make()
        _ = try await bed.open(["other"])
        _ = try await bed.memory["full"]!.put("blocks/1", [1], if: .none)
        func refused(_ places: [String], near: String? = nil, _ text: String, _ line: SourceLocation = #_sourceLocation)
            async
        {
            let error = await failure { _ = try await bed.open(places, near: near) }
            #expect(error?.description.contains(text) == true, "\(error as Any)", sourceLocation: line)
        }
        await refused(["us=eu", "eu=us"], "is location 'eu' of this store, not 'us'")
        await refused(["eu", "us=eu"], "is location 'eu' of this store, not 'us'")
        await refused(["eu", "us", "ap"], "location 'ap' is none of this store (it has eu, us)")
        await refused(["eu", "us=other"], "is another store")
        await refused(["eu", "us"], near: "ap", "no location 'ap'")
        await refused(["ap", "eu"], "is no store yet: begin with one location")

        let store = try await bed.open(["eu", "us"])
        func cannotAdd(_ place: String, _ text: String, _ line: SourceLocation = #_sourceLocation) async {
            let name = String(place.split(separator: "=")[0])
            let error = await failure { _ = try await store.addLocation(name, bed.place(place)) }
            #expect(error?.description.contains(text) == true, "\(error as Any)", sourceLocation: line)
        }
        await cannotAdd("us=ap", "there is a location 'us' already")
        await cannotAdd("eu=ap", "there is a location 'eu' already")
        await cannotAdd("ap=us", "is location 'us' of this store, not 'ap'")
        await cannotAdd("ap=other", "is not empty")
        await cannotAdd("ap=full", "is not empty ('blocks/1')")
        #expect(bed.memory["ap"]!.contents.isEmpty)
        #expect(await failure { _ = try await store.addLocation("a b", bed.place("ap")) }?.kind == .invalid)
    }

    @Test func anAddingThatWasCutOffIsTakenUpAgain() async throws {
        let bed = LocationBed()
        let store = try await bed.open(["eu"])
        bed.faulty["us"]!.inject(StoreFault(.fail(.refused), verb: .put, keyContains: Store.key, count: 1))
        #expect(await failure { _ = try await store.addLocation("us", bed.place("us")) } != nil)
        // Not a store before it knows which location it is.
        #expect(bed.memory["us"]!.contents[Store.key] == nil)
        #expect(try await store.addLocation("us", bed.place("us")).number == 1)
        // Cut off before the bucket had anything: nobody can tell it from another bucket under a known name.
        bed.faulty["ap"]!.inject(StoreFault(.fail(.refused), verb: .put, count: 1))
        let both = try await bed.open(["eu", "us"])
        #expect(await failure { _ = try await both.addLocation("ap", bed.place("ap")) } != nil)
        #expect(await failure { _ = try await both.addLocation("ap", bed.place("ap")) }?.kind == .exists)
        let again = try await both.addLocation("ap", bed.place("ap"), replace: true)
        #expect(again.number == 2)
        #expect(try await bed.open(["us", "eu", "ap"]).locations.all.map(\.name) == ["eu", "us", "ap"])
    }

    @Test func aLostBucketIsReplacedUnderItsNumber() async throws {
        let bed = LocationBed()
        let store = try await bed.make()
        // Not while it answers.
        #expect(
            await failure { _ = try await store.addLocation("us", bed.place("us=ap"), replace: true) }?.kind == .exists)
        bed.lose("us")
        let rest = try await bed.open(["eu", "us"])
        #expect(try await rest.addLocation("us", bed.place("us=ap"), replace: true).number == 1)
        let after = try await bed.open(["eu", "us=ap"])
        #expect(after.locations.buckets.map(\.name) == ["bucket-eu", "bucket-ap"])
        try await after.requireAll()
    }

    @Test func addersAtTheSameTimeGetDifferentNumbers() async throws {
        let bed = LocationBed()
        let store = try await bed.open(["eu"])
        async let one = store.addLocation("us", bed.place("us"))
        async let two = store.addLocation("ap", bed.place("ap"))
        let numbers = [try await one.number, try await two.number]
        #expect(Set(numbers) == [1, 2])
        let open = try await bed.open(["eu", "us", "ap"])
        #expect(try open.location(named: "us").number == numbers[0])
        #expect(try open.location(named: "ap").number == numbers[1])
    }

    // MARK: Out of reach

    @Test func aStoreOpensWithoutItsFarLocation() async throws {
        let bed = LocationBed()
        let catalog = bed.catalog(try await bed.make())
        _ = try await catalog.create("near", sizeBytes: 1 << 30)
        _ = try await catalog.create("far", sizeBytes: 1 << 30, location: 1)
        bed.lose("us")
        let alone = bed.catalog(try await bed.open(["us", "eu"], near: "eu"))
        #expect(alone.store.locations[1]?.trouble() != nil)
        #expect(try await alone.show("near").location == "eu")
        for name in ["far", "nowhere"] {
            let error = await failure { _ = try await alone.show(name) }
            #expect(error?.kind == .store(.unavailable))
            #expect(error?.description.contains("location 'us'") == true, "\(error as Any)")
        }
        let listed = try await alone.list()
        #expect(listed.disks.map(\.name) == ["near"])
        #expect(listed.failures.count == 1)
        #expect(listed.failures[0].description.contains("location 'us'"))
        #expect(await failure { _ = try await alone.names() } != nil)
        #expect(await failure { try await alone.store.requireAll() }?.description.contains("location 'us'") == true)
        // Disks can be made meanwhile.
        _ = try await alone.create("new", sizeBytes: 1 << 20)

        bed.findAgain("us")
        (bed.environment as! SeededEnvironment).wallMs += 10_000
        #expect(try await alone.show("far").location == "us")
        #expect(alone.store.locations[1]?.trouble() == nil)
        #expect(try await alone.list().disks.map { "\($0.name) \($0.location)" } == ["far us", "near eu", "new eu"])
        #expect(try await alone.names() == ["far", "near", "new"])
        try await alone.store.requireAll()
        // The near one is needed.
        bed.lose("eu")
        #expect(await failure { _ = try await bed.open(["us", "eu"], near: "eu") } != nil)
        #expect(try await bed.catalog(try await bed.open(["us", "eu"])).show("far").location == "us")
    }

    @Test func anotherBucketThatComesInTheFarOnesPlaceIsNotUsed() async throws {
        let bed = LocationBed(["eu", "us", "other"])
        _ = try await bed.make()
        let other = try await bed.open(["other"])
        _ = try await bed.catalog(other).create("trap", sizeBytes: 1 << 20)
        bed.lose("other")
        // Away when the store is opened, and somebody else's when it comes.
        let catalog = bed.catalog(try await bed.open(["eu", "us=other"]))
        bed.findAgain("other")
        (bed.environment as! SeededEnvironment).wallMs += 10_000
        let error = await failure { _ = try await catalog.show("trap") }
        #expect(error?.description.contains("is another store") == true, "\(error as Any)")
    }

    // MARK: What is where

    @Test func aDiskIsFoundWhereverItsHeadIs() async throws {
        let bed = LocationBed()
        let eu = bed.catalog(try await bed.make(["eu", "us", "ap"], near: "eu"))
        let us = bed.catalog(try await bed.open(["eu", "us", "ap"], near: "us"))
        #expect(try await eu.create("a", sizeBytes: 1 << 30).location == "eu")
        #expect(try await us.create("b", sizeBytes: 1 << 30).location == "us")
        #expect(try await us.create("c", sizeBytes: 1 << 30, location: 2).location == "ap")
        for catalog in [eu, us] {
            for (name, location) in [("a", 0), ("b", 1), ("c", 2)] {
                let found = try #require(try await catalog.store.find(name))
                #expect(found.heads.location == UInt8(location))
                #expect(await failure { _ = try await catalog.create(name, sizeBytes: 1 << 20) }?.kind == .exists)
            }
            #expect(try await catalog.store.find("d") == nil)
        }
        #expect(bed.memory["us"]!.contents.keys.filter { $0.hasPrefix("disks/") } == ["disks/b/head"])
        // A name that is free again may be used at another location; what it was there counts on.
        try await eu.delete("b")
        #expect(try await eu.create("b", sizeBytes: 1 << 20).location == "eu")
        #expect(try await us.show("b").location == "eu")
        try await us.delete("b")
        #expect(await failure { _ = try await us.show("b") }?.kind == .notFound)
        #expect(try await us.create("b", sizeBytes: 1 << 20).epoch > 0)
    }

    @Test func anOwnersHeartbeatIsLookedForBesideItsHead() async throws {
        let bed = LocationBed()
        let store = try await bed.make()
        let catalog = bed.catalog(store)
        _ = try await catalog.create("d", sizeBytes: 1 << 30, location: 1)
        var found = try #require(try await store.find("d"))
        found.head.owner = Head.Owner(server: "s", host: "h", sinceMs: 0)
        guard case .won = try await found.heads.swap(found.head, expecting: found.etag) else {
            _ = Issue.record("lost")
            return
        }
        let record = ServerRecord(
            id: "s", host: "h", bootID: "", pid: 1, pidNamespace: "", startTicks: 0, addresses: [],
            timeMs: bed.environment.wallMs)
        try await store.heads(at: 0).beat(record)
        #expect(try await catalog.show("d").owner?.alive == false)
        try await store.heads(at: 1).beat(record)
        #expect(try await catalog.show("d").owner?.alive == true)
        #expect(try await catalog.list().disks[0].owner?.alive == true)
        await store.forget(server: "s")
        #expect(try await catalog.show("d").owner?.alive == false)
        #expect(try await store.heads(at: 0).server("s") == nil)
    }

    @Test func blocksAndPagesAreReadFromACopyAndNothingElseIs() async throws {
        let bed = LocationBed()
        let store = try await bed.make()
        for key in ["blocks/a", "manifests/a", "disks/a/head"] {
            _ = try await bed.memory["us"]!.put(key, Array(key.utf8), if: .none)
        }
        let eu = store.locations.buckets[0]
        for _ in 0..<2 {
            #expect(try await eu.get("blocks/a", range: 1..<3).bytes == Array("lo".utf8))
            #expect(try await eu.get("manifests/a", range: nil).bytes == Array("manifests/a".utf8))
            await #expect(throws: StoreError.self) { try await eu.get("disks/a/head", range: nil) }
            await #expect(throws: StoreError.self) { try await store.locations[0]!.alone.get("blocks/a", range: nil) }
            bed.lose("eu")
        }
        // Nobody has it, and one can't be asked.
        let error = await #expect(throws: StoreError.self) { try await eu.get("blocks/b", range: nil) }
        #expect(error?.kind == .unavailable)
        #expect(error?.description.contains("location 'eu'") == true)
        bed.findAgain("eu")
        bed.lose("us")
        let gone = await #expect(throws: StoreError.self) { try await eu.get("blocks/b", range: nil) }
        #expect(gone?.kind == .notFound)
        #expect(gone?.description.contains("location 'us'") == true)
    }

    // MARK: All or nothing

    @Test func whoNeedsAllLocationsHearsOfOneThatWasAdded() async throws {
        let bed = LocationBed()
        let single = try await bed.open(["eu"])
        try await single.requireAll()
        let both = try await bed.make(["eu", "us"])
        #expect(await failure { try await single.requireAll() }?.description.contains("'us' was added") == true)
        #expect(try await both.addLocation("ap", bed.place("ap")).behind.isEmpty)
        #expect(await failure { try await both.requireAll() }?.description.contains("'ap' was added") == true)
        let error = await failure { try await (try await bed.open(["eu", "us"])).requireAll() }
        #expect(error?.description.contains("'ap' of this store is not configured") == true)
        try await (try await bed.open(["eu", "us", "ap"])).requireAll()
    }

    @Test func collectionNeedsEveryLocationAndLowersTheGraceEverywhereFirst() async throws {
        let bed = LocationBed()
        let store = try await bed.make()
        _ = try await bed.catalog(store).create("d", sizeBytes: 1 << 20)
        let us = try await bed.open(["eu", "us"], near: "us")
        var options = CollectionOptions()
        options.graceMs = 60_000
        bed.lose("us")
        #expect(
            await failure { _ = try await Collector(store: store, scratch: MemoryScratch(), options: options).run() }
                != nil)
        bed.findAgain("us")
        #expect(try await store.grace() == CollectionState.defaultGraceMs)
        (bed.environment as! SeededEnvironment).wallMs += 1_000_000
        _ = try await Collector(store: store, scratch: MemoryScratch(), options: options).run()
        #expect(try await store.grace() == 60_000)
        // With eu away, us knows.
        bed.lose("eu")
        #expect(try await us.grace() == 60_000)
        bed.findAgain("eu")
        options.graceMs = 3_600_000
        (bed.environment as! SeededEnvironment).wallMs += 1_000_000
        _ = try await Collector(store: us, scratch: MemoryScratch(), options: options).run()
        #expect(try await us.grace() == 3_600_000)
        // A new location hears of it.
        _ = try await store.addLocation("ap", bed.place("ap"))
        #expect(try await (try await bed.open(["ap", "us", "eu"])).grace() == 3_600_000)
    }
}
