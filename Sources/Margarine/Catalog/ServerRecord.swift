// The heartbeat of one server: what lets another tell an owner that is alive from one that is gone. A matter of
// politeness only: who commits is decided by the head's compare-and-swap. A server beats at every location of its store,
// so whoever has read a head there finds its owner's heartbeat there too.

import ObjectStore
import Runtime

package struct ServerRecord: Sendable, Equatable, Codable {
    /// Random per daemon start.
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
    /// Wall clock at the heartbeat, milliseconds since 1970.
    package var timeMs: Int64
    /// How long after `timeMs` this heartbeat stands for life: its server's `owner-dead-after`. Milliseconds.
    package var freshForMs: Int64
    /// Generations that it has attached read-only, as `NAME@GENERATION`: not to be removed while this heartbeat is younger
    /// than the grace period. `readsEverything` stands for more of them than a heartbeat can name.
    package var reading: [String]

    package init(
        id: String, host: String, bootID: String, pid: Int32, pidNamespace: String, startTicks: UInt64,
        addresses: [String],
        timeMs: Int64, freshForMs: Int64 = freshMs, reading: [String] = []
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
    }

    /// How long a heartbeat stands for life where its server does not choose.
    package static let freshMs: Int64 = 30_000
    /// How often a server writes one.
    package static let intervalMs: Int64 = 10_000
    /// A heartbeat that claims more is not believed.
    static let longestFreshMs: Int64 = 86_400_000
    /// No name of a generation.
    package static let readsEverything = "*"
    /// More are not named, so that the object stays small.
    package static let maxReading = 1024
    static let format = 2
    /// Format 1 has no `reading`.
    static let oldestFormat = 1

    package static func key(_ id: String) -> String { "servers/" + id }

    enum CodingKeys: String, CodingKey {
        case id, host, bootID, pid, pidNamespace, startTicks, addresses, timeMs, freshForMs, reading
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
    }

    /// Whether the server is to be taken for alive at `nowMs`: its heartbeat is fresh (or from a clock ahead of ours), and
    /// its process is not known to be gone.
    package func isAlive(nowMs: Int64, process: ProcessProbe) -> Bool {
        nowMs - timeMs < min(max(freshForMs, 0), Self.longestFreshMs) && process(self) != .gone
    }
}

/// What can be said of the process of a heartbeat from here.
package enum ProcessState: Sendable, Equatable {
    case running
    case gone
    /// Another host, boot or pid namespace.
    case outOfSight
}

/// Looks for the process of a heartbeat. `LocalProcess.state` in production.
package typealias ProcessProbe = @Sendable (ServerRecord) -> ProcessState

extension HeadStore {
    /// Writes a server's heartbeat.
    package func beat(_ server: ServerRecord) async throws(CatalogError) {
        let bytes = ControlObject.seal(server, kind: "server", format: ServerRecord.format)
        _ = try await CatalogError.wrap { () async throws(StoreError) in
            try await bucket.put(ServerRecord.key(server.id), bytes, if: .none)
        }
    }

    /// The last heartbeat of a server; nil when it has none (it ended in order, or never was).
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
        let what = "the heartbeat of '\(id)'"
        let record = try ControlObject.open(
            ServerRecord.self, object.bytes, kind: "server", format: ServerRecord.format,
            oldest: ServerRecord.oldestFormat, what: what)
        guard record.id == id, ControlObject.times.contains(record.timeMs),
            ControlObject.times.contains(record.freshForMs)
        else { throw CatalogError(.corrupt, "\(what) contradicts itself") }
        return record
    }

    /// Removes a server's heartbeat: it ended in order.
    package func forget(server id: String) async throws(CatalogError) {
        try await CatalogError.wrap { () async throws(StoreError) in try await bucket.delete([ServerRecord.key(id)]) }
    }

    /// Whether the owner of a head is to be taken for alive; false when it has none. One whose heartbeat cannot be read
    /// is.
    package func isAlive(_ owner: Head.Owner?, process: ProcessProbe) async throws(CatalogError) -> Bool {
        guard let owner else { return false }
        do throws(CatalogError) {
            return try await server(owner.server)?.isAlive(nowMs: environment.wallMs, process: process) ?? false
        } catch {
            if error.kind == .corrupt { return true }
            throw error
        }
    }
}

extension Store {
    /// Removes a server's heartbeat from every location that answers.
    package func forget(server id: String) async {
        _ = await inParallel(locations.all, limit: 16) { location in
            _ = try? await hastyHeads(at: location).forget(server: id)
        }
    }
}
