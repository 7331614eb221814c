// Sessions that may never go on and have no room in the head any more: one small object each, so that "for ever" does not depend
// on how many there are. Written before the head that leaves the name out; named after the disk's id, so that a later disk
// of the same name has nothing to do with it.

internal import BlockCache
internal import CLibraries
internal import ObjectStore

/// The object that says that a session of a disk is lost.
struct LostSession: Codable, Equatable {
    var diskID: ObjectID
    var session: String
    static let format = 1

    static func folder(disk name: String) -> String { "disks/\(name)/lost/" }

    /// Names are long, and may be told apart by case alone: the key has their hash.
    static func key(disk name: String, _ id: ObjectID, session: String) -> String {
        let bytes = Array(session.utf8)
        let sum = String(mg_xxh3(bytes, bytes.count, id.low), radix: 16)
        return "\(folder(disk: name))\(id).\(String(repeating: "0", count: 16 - sum.count))\(sum)"
    }

    enum CodingKeys: String, CodingKey { case diskID, session }

    init(diskID: ObjectID, session: String) {
        self.diskID = diskID
        self.session = session
    }

    init(from decoder: any Decoder) throws {
        let c = try decoder.container(keyedBy: CodingKeys.self)
        diskID = try c.decodeObjectID(.diskID)
        session = try c.decode(String.self, forKey: .session)
    }

    func encode(to encoder: any Encoder) throws {
        var c = encoder.container(keyedBy: CodingKeys.self)
        try c.encode(diskID.description, forKey: .diskID)
        try c.encode(session, forKey: .session)
    }
}

extension HeadStore {
    /// Stores what a head has no room for.
    func remember(_ sessions: ArraySlice<String>, of head: Head) async throws(CatalogError) {
        for session in sessions {
            let bytes = ControlObject.seal(
                LostSession(diskID: head.diskID, session: session), kind: "lost-session", format: LostSession.format)
            try await CatalogError.wrap { () async throws(StoreError) in
                _ = try await bucket.put(
                    LostSession.key(disk: head.name, head.diskID, session: session), bytes, if: .none)
            }
        }
    }

    /// Whether the session is lost, though the head does not name it any more. Two names of one hash are both refused.
    package func isForgotten(_ session: String, of head: Head) async throws(CatalogError) -> Bool {
        if !head.hasForgotten { return false }
        do throws(StoreError) {
            _ = try await bucket.get(LostSession.key(disk: head.name, head.diskID, session: session), range: nil)
            return true
        } catch {
            if error.kind == .notFound { return false }
            throw CatalogError(error)
        }
    }

    /// Removes those of a disk that was deleted, and of no other one that has had its name.
    func forgetLostSessions(of name: String, _ diskID: ObjectID) async throws(CatalogError) {
        try await bucket.forEachPage(prefix: "\(LostSession.folder(disk: name))\(diskID).") {
            (page) async throws(CatalogError) in
            let keys = page.items.map(\.key)
            if keys.isEmpty { return }
            try await CatalogError.wrap { () async throws(StoreError) in try await bucket.delete(keys) }
        }
    }
}
