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
    /// How dense history is; see `History`. 0: nothing but the newest generation is kept.
    public var historyDensity = DiskOptions.defaultHistoryDensity
    public init() {}

    public static let defaultHistoryDensity = 2
    public static let maxHistoryDensity = 16

    public init(from decoder: any Decoder) throws {
        let c = try decoder.container(keyedBy: CodingKeys.self)
        safePoints = try c.decode(SafePointRule.self, forKey: .safePoints)
        durability = try c.decode(Durability.self, forKey: .durability)
        resumeWindowMs = try c.decode(Int64.self, forKey: .resumeWindowMs)
        // Absent in heads of format 1.
        historyDensity =
            try c.decodeIfPresent(Int.self, forKey: .historyDensity) ?? DiskOptions.defaultHistoryDensity
    }
}
