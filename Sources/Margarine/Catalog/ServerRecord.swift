// The record of one server at one location: its heartbeat, and what others have to tell it. Nobody writes it but by
// compare-and-swap.
//
// Always holds (Docs/Decisions/0013): a server owns disks at a location only under a record that it has renewed there;
// whoever takes over from a dead server has first made its record say so (`fencedBy`), and whoever takes one disk from a
// live one has first noted it there (`taken`). So a renewal that was won proves the ownership of every disk that the
// record does not give away. A record is judged by whether it changes while one watches, never by its times.

package import BlockCache
package import ObjectStore
import Runtime

/// A disk that is being taken from a live server.
package struct TakenDisk: Sendable, Equatable, Codable {
    package var diskID: ObjectID
    /// The epoch that the disk's head is about to have. Whoever has it under a lower one loses it.
    package var epoch: UInt64
    package init(diskID: ObjectID, epoch: UInt64) {
        self.diskID = diskID
        self.epoch = epoch
    }

    enum CodingKeys: String, CodingKey { case diskID, epoch }

    package init(from decoder: any Decoder) throws {
        let c = try decoder.container(keyedBy: CodingKeys.self)
        diskID = try c.decodeObjectID(.diskID)
        epoch = try c.decode(UInt64.self, forKey: .epoch)
    }

    package func encode(to encoder: any Encoder) throws {
        var c = encoder.container(keyedBy: CodingKeys.self)
        try c.encode(diskID.description, forKey: .diskID)
        try c.encode(epoch, forKey: .epoch)
    }
}

package struct ServerRecord: Sendable, Equatable, Codable {
    /// Kept in the scratch directory: whoever has the directory is this server.
    package var id: String
    package var host: String
    /// The kernel's boot id; empty where unknown.
    package var bootID: String
    package var pid: Int32
    /// Which pid namespace `pid` counts in; empty where unknown.
    package var pidNamespace: String
    /// When the process started, in clock ticks after boot: tells it from a later one of the same pid.
    package var startTicks: UInt64
    /// Where it serves, for people.
    package var addresses: [String]
    /// Wall clock of the server when it wrote this, milliseconds since 1970. For people: nothing is decided by it.
    package var timeMs: Int64
    /// Others take the server for dead when they have seen its record unchanged for so long by their own monotonic clock: its
    /// `owner-dead-after`. Milliseconds.
    package var freshForMs: Int64
    /// Generations that it has attached read-only, as `NAME@GENERATION`: not to be removed while this object is younger
    /// than the grace period. `readsEverything` stands for more of them than a record can name.
    package var reading: [String]
    /// Random, another for each start of the process and after each fencing. Empty in formats 1 and 2, whose servers write
    /// without a condition.
    package var incarnation: String
    /// Random in every renewal.
    package internal(set) var nonce: ObjectID
    /// Who declared this incarnation dead: it has lost every disk of this location. nil: nobody.
    package var fencedBy: String?
    /// Disks that were taken from it since its last renewal, at most `maxTaken`.
    package var taken: [TakenDisk]

    package init(
        id: String, host: String, bootID: String, pid: Int32, pidNamespace: String, startTicks: UInt64,
        addresses: [String],
        timeMs: Int64, freshForMs: Int64 = freshMs, reading: [String] = [], incarnation: String = ""
    ) {
        self.id = id
        self.host = host
        self.bootID = bootID
        self.pid = pid
        self.pidNamespace = pidNamespace
        self.startTicks = startTicks
        self.addresses = addresses
        self.timeMs = timeMs
        self.freshForMs = freshForMs
        self.reading = reading.count > Self.maxReading ? [Self.readsEverything] : reading
        self.incarnation = incarnation
        nonce = ObjectID(high: 0, low: 0)
        taken = []
    }

    /// How long a record stands for life where its server does not choose.
    package static let freshMs: Int64 = 30_000
    /// A record that claims more is not believed.
    static let longestFreshMs: Int64 = 86_400_000
    /// No name of a generation.
    package static let readsEverything = "*"
    /// More are not named, so that the object stays small.
    package static let maxReading = 1024
    /// Whoever takes one disk more fences the server instead.
    static let maxTaken = 512
    static let format = 3
    /// Format 1 has no `reading`; formats 1 and 2 have no `incarnation`, `nonce`, `fencedBy` and `taken`.
    static let oldestFormat = 1

    package static func key(_ id: String) -> String { "servers/" + id }

    enum CodingKeys: String, CodingKey {
        case id, host, bootID, pid, pidNamespace, startTicks, addresses, timeMs, freshForMs, reading, incarnation,
            nonce, fencedBy, taken
    }

    package init(from decoder: any Decoder) throws {
        let c = try decoder.container(keyedBy: CodingKeys.self)
        id = try c.decode(String.self, forKey: .id)
        host = try c.decode(String.self, forKey: .host)
        bootID = try c.decode(String.self, forKey: .bootID)
        pid = try c.decode(Int32.self, forKey: .pid)
        pidNamespace = try c.decode(String.self, forKey: .pidNamespace)
        startTicks = try c.decode(UInt64.self, forKey: .startTicks)
        addresses = try c.decode([String].self, forKey: .addresses)
        timeMs = try c.decode(Int64.self, forKey: .timeMs)
        freshForMs = try c.decode(Int64.self, forKey: .freshForMs)
        reading = try c.decodeIfPresent([String].self, forKey: .reading) ?? []
        incarnation = try c.decodeIfPresent(String.self, forKey: .incarnation) ?? ""
        nonce = c.contains(.nonce) ? try c.decodeObjectID(.nonce) : ObjectID(high: 0, low: 0)
        fencedBy = try c.decodeIfPresent(String.self, forKey: .fencedBy)
        taken = try c.decodeIfPresent([TakenDisk].self, forKey: .taken) ?? []
    }

    package func encode(to encoder: any Encoder) throws {
        var c = encoder.container(keyedBy: CodingKeys.self)
        try c.encode(id, forKey: .id)
        try c.encode(host, forKey: .host)
        try c.encode(bootID, forKey: .bootID)
        try c.encode(pid, forKey: .pid)
        try c.encode(pidNamespace, forKey: .pidNamespace)
        try c.encode(startTicks, forKey: .startTicks)
        try c.encode(addresses, forKey: .addresses)
        try c.encode(timeMs, forKey: .timeMs)
        try c.encode(freshForMs, forKey: .freshForMs)
        try c.encode(reading, forKey: .reading)
        try c.encode(incarnation, forKey: .incarnation)
        try c.encode(nonce.description, forKey: .nonce)
        try c.encodeIfPresent(fencedBy, forKey: .fencedBy)
        try c.encode(taken, forKey: .taken)
    }

    /// How long the record must be seen unchanged before its server counts as dead. Milliseconds.
    package var deadAfterMs: Int64 { min(max(freshForMs, 0), Self.longestFreshMs) }
    /// Its server renews it by compare-and-swap, and so learns what is written into it.
    package var isRenewedBySwap: Bool { !incarnation.isEmpty }

    /// What the record looks like to people at `nowMs` of their wall clock. Nothing may be decided by it.
    package func looksAlive(nowMs: Int64, process: ProcessProbe) -> Bool {
        fencedBy == nil && nowMs - timeMs < deadAfterMs && process(self) != .gone
    }
}

/// What can be said of the process of a record from here.
package enum ProcessState: Sendable, Equatable {
    case running
    case gone
    /// Another host, boot or pid namespace.
    case outOfSight
}

/// Looks for the process of a record. `LocalProcess.state` in production.
package typealias ProcessProbe = @Sendable (ServerRecord) -> ProcessState

/// A server's record as it is stored.
package struct StoredServer: Sendable {
    /// nil: it can't be read; of a later version, perhaps.
    package var record: ServerRecord?
    package var etag: ETag
}

/// How a swap of a server's record ended.
package enum ServerSwap: Sendable {
    case won(ETag)
    /// Another one is there (nil: none); ours will never be.
    case lost(StoredServer?)
}

extension HeadStore {
    /// The record of a server with its tag; nil by the store's own word that there is none: it ended in order, or never
    /// was.
    package func storedServer(_ id: String) async throws(CatalogError) -> StoredServer? {
        guard DiskName.isValid(id) else { return nil }
        do throws(StoreError) {
            return Self.stored(try await bucket.get(ServerRecord.key(id), range: nil), id)
        } catch {
            if error.kind == .notFound { return nil }
            throw CatalogError(error)
        }
    }

    private static func stored(_ object: StoredObject, _ id: String) -> StoredServer {
        StoredServer(record: try? decode(object.bytes, id), etag: object.etag)
    }

    private static func decode(_ bytes: [UInt8], _ id: String) throws(CatalogError) -> ServerRecord {
        let what = "the record of server '\(id)'"
        let record = try ControlObject.open(
            ServerRecord.self, bytes, kind: "server", format: ServerRecord.format,
            oldest: ServerRecord.oldestFormat, what: what)
        guard record.id == id, ControlObject.times.contains(record.timeMs),
            ControlObject.times.contains(record.freshForMs), record.taken.count <= ServerRecord.maxTaken,
            record.taken.allSatisfy({ $0.epoch < ControlObject.countLimit })
        else { throw CatalogError(.corrupt, "\(what) contradicts itself") }
        return record
    }

    /// Replaces the record that has the tag `expecting` (nil: there is none). Unclear answers are settled by reading back.
    ///
    /// - Parameter isRenewal: with a fresh nonce. false: a note, which says nothing of whether the server lives; of two who
    ///   note the same both may win.
    package func swap(
        _ server: ServerRecord, expecting: ETag?, isRenewal: Bool = true
    ) async throws(CatalogError) -> ServerSwap {
        var server = server
        if isRenewal { server.nonce = environment.objectID() }
        let bytes = ControlObject.seal(server, kind: "server", format: ServerRecord.format)
        let condition: PutCondition = expecting.map { .matches($0) } ?? .absent
        let outcome = try await CatalogError.wrap { () async throws(StoreError) in
            try await bucket.swap(ServerRecord.key(server.id), bytes, if: condition)
        }
        switch outcome {
        case .won(let etag): return .won(etag)
        case .lost(nil): return .lost(nil)
        case .lost(let object?): return .lost(Self.stored(object, server.id))
        }
    }

    /// The record of a server; nil when it has none.
    ///
    /// - Throws: `.corrupt` for one that cannot be read: of a later version, perhaps, and very much alive.
    package func server(_ id: String) async throws(CatalogError) -> ServerRecord? {
        guard DiskName.isValid(id) else { return nil }
        let object: StoredObject
        do throws(StoreError) {
            object = try await bucket.get(ServerRecord.key(id), range: nil)
        } catch {
            if error.kind == .notFound { return nil }
            throw CatalogError(error)
        }
        return try Self.decode(object.bytes, id)
    }

    /// Removes a server's record: it ended in order, and gave all its disks back.
    package func forget(server id: String) async throws(CatalogError) {
        try await CatalogError.wrap { () async throws(StoreError) in try await bucket.delete([ServerRecord.key(id)]) }
    }

    /// Whether the owner of a head looks alive, for people; false when it has none. One whose record cannot be read does.
    package func looksAlive(_ owner: Head.Owner?, process: ProcessProbe) async throws(CatalogError) -> Bool {
        guard let owner, let found = try await storedServer(owner.server) else { return false }
        return found.record?.looksAlive(nowMs: environment.wallMs, process: process) ?? true
    }
}

extension Store {
    /// Removes a server's record from every location that answers.
    package func forget(server id: String) async {
        _ = await inParallel(locations.all, limit: 16) { location in
            _ = try? await hastyHeads(at: location).forget(server: id)
        }
    }
}
