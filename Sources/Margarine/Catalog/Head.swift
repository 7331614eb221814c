// The one small mutable object of a disk: which generation is current, who owns the disk, what its owner promised.
// Whoever swaps it decides; nothing else in the store is ever replaced.
//
// Always holds: epoch and generation only grow, also over a tombstone; `record` is the current generation, whole.

package import BlockCache

package struct Head: Sendable, Equatable, Codable {
    /// The server that has the disk.
    package struct Owner: Sendable, Equatable, Codable {
        /// Its id, as in `servers/<id>`.
        package var server: String
        /// For people.
        package var host: String
        /// Wall clock, milliseconds since 1970.
        package var sinceMs: Int64
        package init(server: String, host: String, sinceMs: Int64) {
            self.server = server
            self.host = host
            self.sinceMs = sinceMs
        }
    }

    /// Tells this disk from others that had, have or will have its name.
    package var diskID: ObjectID
    package var name: String
    package var sizeBytes: UInt64
    package var options: DiskOptions
    /// Number of the current generation. A disk without one (`record` nil) counts on from what its name had before: 0
    /// for a name that is new.
    package var generation: UInt64
    /// The fencing number: every attachment, release and take-over raises it.
    package var epoch: UInt64
    package var owner: Owner?
    /// The named session that is attached or whose end is not known; nil if there is none or it ended cleanly.
    package var session: String?
    /// Named sessions whose acknowledged writes went lost, or after which another client was served: refused for ever.
    /// Newest last. A stored head has at most `maxLostSessions`; `HeadStore.swap` moves older ones to objects of their own.
    package private(set) var lostSessions: [String]
    /// Some lost sessions are in objects of their own (`LostSession`).
    package private(set) var hasForgotten: Bool
    package var createdAtMs: Int64
    /// A tombstone: the disk was deleted, and its name is free.
    package var deleted: Bool
    /// The current generation; nil: the disk is empty, all zeroes.
    package private(set) var record: GenerationRecord?
    /// Generations that history keeps whatever its rule says, ascending; from the start the first one of the disk. At most
    /// `maxPinned`.
    package private(set) var pinned: [UInt64]
    /// Nobody writes this disk: it is attached read-only, without an owner.
    package var isReadOnly: Bool
    /// Somebody waits for what is safe now to be committed; the owner takes it away once that is done.
    package var commitWanted: ObjectID?
    /// Random in every write, so that a write can be told from one with the same content.
    package internal(set) var nonce: ObjectID

    package static let maxLostSessions = 64
    /// Longest name of a session in bytes.
    package static let maxSessionBytes = 128
    /// Most pinned generations.
    package static let maxPinned = 1024
    static let format = 3
    /// Format 1 has no `pinned`, `readOnly`, `commitWanted` and `historyDensity`; format 2 has no `forgotSessions`.
    static let oldestFormat = 1

    /// The head of a disk that has never been written.
    package init(diskID: ObjectID, name: String, sizeBytes: UInt64, options: DiskOptions, createdAtMs: Int64) {
        self.diskID = diskID
        self.name = name
        self.sizeBytes = sizeBytes
        self.options = options
        self.createdAtMs = createdAtMs
        generation = 0
        epoch = 0
        lostSessions = []
        hasForgotten = false
        deleted = false
        pinned = []
        isReadOnly = false
        nonce = ObjectID(high: 0, low: 0)
    }

    // What people and the committer ask of the current generation. Never inlined: Swift 6.3 with -O fails on it.
    @inline(never) package var usedBlocks: UInt64 { record?.usedBlocks ?? 0 }
    @inline(never) package var storedBytes: UInt64 { record?.storedBytes ?? 0 }
    @inline(never) package var origin: GenerationRecord.Origin? { record?.origin }
    /// nil before the first commit.
    @inline(never) package var committedAtMs: Int64? { record?.committedAtMs }
    /// The journal record number that the current generation contains, of the journal of epoch `record.epoch`.
    @inline(never) package var journalSequence: UInt64 { record?.journalSequence ?? 0 }

    /// Makes `record` the current generation; it must follow the present one.
    package mutating func advance(to record: GenerationRecord) {
        precondition(record.diskID == diskID && record.generation > generation && record.epoch == epoch)
        precondition(record.sizeBytes <= sizeBytes, "a generation larger than its disk")
        generation = record.generation
        self.record = record
    }

    /// Keeps a generation whatever the rule of history says, or no longer. Pinning one too many changes nothing.
    package mutating func pin(_ number: UInt64) {
        if pinned.contains(number) || pinned.count >= Self.maxPinned { return }
        pinned.append(number)
        pinned.sort()
    }
    package mutating func unpin(_ number: UInt64) { pinned.removeAll { $0 == number } }

    /// Notes that the session may never go on.
    package mutating func lose(session: String) {
        lostSessions.removeAll { $0 == session }
        lostSessions.append(session)
    }

    /// Lost sessions that have no room in the head, oldest first.
    var surplusSessions: ArraySlice<String> { lostSessions.dropLast(Self.maxLostSessions) }

    /// Its surplus is in objects of its own.
    mutating func forgetSurplus() {
        if surplusSessions.isEmpty { return }
        lostSessions.removeFirst(surplusSessions.count)
        hasForgotten = true
    }

    /// The session has the disk after all, and has lost nothing.
    package mutating func regain(session: String) { lostSessions.removeAll { $0 == session } }

    /// Takes the disk from whoever has it: no swap of theirs wins any more, and their session's writes are lost.
    package mutating func dispossess() {
        epoch += 1
        owner = nil
        if let session { lose(session: session) }
        session = nil
    }

    /// Makes the head a tombstone.
    package mutating func bury() {
        dispossess()
        deleted = true
        record = nil
        lostSessions = []
        hasForgotten = false
        pinned = []
        commitWanted = nil
        isReadOnly = false
    }

    /// The manifest of the current generation, at the size that the disk has now. No I/O.
    package func manifest(cache: ManifestCache) -> Manifest {
        guard let record else { return .empty(sizeBytes: sizeBytes, cache: cache) }
        return .open(record, sizeBytes: sizeBytes, cache: cache)
    }

    package static func key(disk name: String) -> String { "disks/\(name)/head" }

    /// Format 3 only where it says more than format 2: the versions before this one read the others.
    func encoded() -> [UInt8] { ControlObject.seal(self, kind: "head", format: hasForgotten ? Self.format : 2) }

    /// Reads and checks the head stored for `name`.
    static func decode(_ bytes: [UInt8], name: String) throws(CatalogError) -> Head {
        let what = "the head of disk '\(name)'"
        let head = try ControlObject.open(
            Self.self, bytes, kind: "head", format: format, oldest: oldestFormat, what: what)
        let saysFormat3 = bytes.starts(with: Array("{\"margarine\":\"head\",\"format\":3".utf8))
        guard saysFormat3 == head.hasForgotten, head.name == name, DiskSize.isStorable(head.sizeBytes),
            head.generation < ControlObject.countLimit,
            head.epoch < ControlObject.countLimit, ControlObject.times.contains(head.createdAtMs),
            ControlObject.times.contains(head.owner?.sinceMs ?? 0),
            (0...DiskOptions.maxResumeWindowMs).contains(head.options.resumeWindowMs),
            head.lostSessions.count <= maxLostSessions, head.generation == head.record?.generation ?? head.generation,
            head.record?.diskID ?? head.diskID == head.diskID, head.record?.epoch ?? 0 <= head.epoch,
            head.record?.sizeBytes ?? 0 <= head.sizeBytes,
            (0...DiskOptions.maxHistoryDensity).contains(head.options.historyDensity),
            head.pinned.count <= maxPinned, zip(head.pinned, head.pinned.dropFirst()).allSatisfy(<)
        else { throw CatalogError(.corrupt, "\(what) contradicts itself") }
        try head.record?.check(what: what)
        return head
    }

    enum CodingKeys: String, CodingKey {
        case diskID, name, sizeBytes, options, generation, epoch, owner, session, lostSessions, createdAtMs, deleted,
            record, nonce, pinned, readOnly, commitWanted, forgotSessions
    }

    package init(from decoder: any Decoder) throws {
        let c = try decoder.container(keyedBy: CodingKeys.self)
        diskID = try c.decodeObjectID(.diskID)
        name = try c.decode(String.self, forKey: .name)
        sizeBytes = try c.decode(UInt64.self, forKey: .sizeBytes)
        options = try c.decode(DiskOptions.self, forKey: .options)
        generation = try c.decode(UInt64.self, forKey: .generation)
        epoch = try c.decode(UInt64.self, forKey: .epoch)
        owner = try c.decodeIfPresent(Owner.self, forKey: .owner)
        session = try c.decodeIfPresent(String.self, forKey: .session)
        lostSessions = try c.decode([String].self, forKey: .lostSessions)
        hasForgotten = try c.decodeIfPresent(Bool.self, forKey: .forgotSessions) ?? false
        createdAtMs = try c.decode(Int64.self, forKey: .createdAtMs)
        deleted = try c.decode(Bool.self, forKey: .deleted)
        record = try c.decodeIfPresent(GenerationRecord.self, forKey: .record)
        nonce = try c.decodeObjectID(.nonce)
        pinned = try c.decodeIfPresent([UInt64].self, forKey: .pinned) ?? []
        isReadOnly = try c.decodeIfPresent(Bool.self, forKey: .readOnly) ?? false
        commitWanted = c.contains(.commitWanted) ? try c.decodeObjectID(.commitWanted) : nil
    }

    package func encode(to encoder: any Encoder) throws {
        var c = encoder.container(keyedBy: CodingKeys.self)
        try c.encode(diskID.description, forKey: .diskID)
        try c.encode(name, forKey: .name)
        try c.encode(sizeBytes, forKey: .sizeBytes)
        try c.encode(options, forKey: .options)
        try c.encode(generation, forKey: .generation)
        try c.encode(epoch, forKey: .epoch)
        try c.encodeIfPresent(owner, forKey: .owner)
        try c.encodeIfPresent(session, forKey: .session)
        try c.encode(lostSessions, forKey: .lostSessions)
        if hasForgotten { try c.encode(true, forKey: .forgotSessions) }
        try c.encode(createdAtMs, forKey: .createdAtMs)
        try c.encode(deleted, forKey: .deleted)
        try c.encodeIfPresent(record, forKey: .record)
        try c.encode(nonce.description, forKey: .nonce)
        try c.encode(pinned, forKey: .pinned)
        try c.encode(isReadOnly, forKey: .readOnly)
        try c.encodeIfPresent(commitWanted?.description, forKey: .commitWanted)
    }
}
