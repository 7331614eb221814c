// What a user can choose for one disk. Kept in its head.

/// Which instants become generations.
public enum SafePointRule: String, Sendable, Codable, CaseIterable { case auto, btrfs, flush }

/// What a FLUSH reply promises.
public enum Durability: String, Sendable, Codable, CaseIterable { case memory, scratch, store }

public struct DiskOptions: Sendable, Codable, Equatable {
    public var safePoints: SafePointRule = .auto
    public var durability: Durability = .scratch
    /// How long a session that ended without DISC is kept; 0 rolls back at once. Milliseconds.
    public var resumeWindowMs: Int64 = 60_000
    public init() {}
}
