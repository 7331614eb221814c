// What one round of collection did, as people, scripts and the store's state object see it.

/// What a round is at.
public enum CollectionPhase: String, Sendable, Codable, CaseIterable {
    /// Removing records of generations that have been retired long enough, retiring others.
    case history
    /// Listing blocks and manifest pages.
    case listing
    /// Following every manifest.
    case tracing
    /// Holding what was listed against what is named.
    case comparing
    case deleting
}

/// How far a round has come: in what the phase counts (disks, objects, pages, objects, objects).
public struct CollectionProgress: Sendable, Equatable {
    public var phase: CollectionPhase
    public var done: UInt64
    /// 0: not known.
    public var total: UInt64
}

/// What a round found and did. Of a dry run: what it would have done.
public struct CollectionSummary: Sendable, Codable, Equatable {
    /// Objects of one kind.
    public struct Objects: Sendable, Codable, Equatable {
        public var scanned: UInt64 = 0
        public var scannedBytes: UInt64 = 0
        /// In use: their ids are named by a generation.
        public var kept: UInt64 = 0
        /// Of those, copies that nothing names at their location, of objects that are named and there at another.
        public var copies: UInt64 = 0
        /// Younger than the grace period: not looked at more closely.
        public var young: UInt64 = 0
        /// Named by none, and old: deleted.
        public var deleted: UInt64 = 0
        public var deletedBytes: UInt64 = 0
        public init() {}
    }

    /// Generation records.
    public struct Generations: Sendable, Codable, Equatable {
        /// Kept by history, the current ones included.
        public var kept: UInt64 = 0
        /// Put into a retirement in this round.
        public var retired: UInt64 = 0
        /// Retired earlier, and not long enough ago.
        public var waiting: UInt64 = 0
        /// Retired long enough, and read by a server: left.
        public var held: UInt64 = 0
        /// Removed in this round.
        public var removed: UInt64 = 0
        public init() {}
    }

    public var isDryRun = false
    /// By the store's clock, milliseconds since 1970.
    public var startedAtMs: Int64 = 0
    /// What counted as old in this round.
    public var graceMs: Int64 = 0
    public var locations = 0
    public var disks: UInt64 = 0
    public var generations = Generations()
    /// Unreferenced block objects are the deleted ones of these.
    public var blocks = Objects()
    /// Manifest pages.
    public var pages = Objects()
    /// How long it took, in all and by phase.
    public var durationMs: Int64 = 0
    public var phaseMs: [String: Int64] = [:]
    public init() {}

    public var deleted: UInt64 { blocks.deleted + pages.deleted }
    public var deletedBytes: UInt64 { blocks.deletedBytes + pages.deletedBytes }
}
