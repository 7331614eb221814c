// What `margined check` finds.

/// Something that is not as it must be.
public struct CheckProblem: Sendable, Codable, Equatable {
    public enum Kind: String, Sendable, Codable, CaseIterable {
        /// A generation needs it and it is not there.
        case missing
        /// Its bytes are not those that were stored.
        case corrupt
        /// Its end is not there.
        case truncated
        /// It is another object, and whole.
        case swapped
        /// It could not be looked at.
        case unreachable
        /// Nothing needs it, and it is older than the grace period: left for collection. Not wrong.
        case orphaned
    }
    public var kind: Kind
    /// Number of the location it is at.
    public var location: Int
    /// Of the object; of a whole location empty.
    public var key: String
    /// What is wrong, for people, in one line.
    public var text: String
    /// Who needs it: `NAME@GENERATION`, the current one of a disk with ` (head)` behind it. At most `maxOwners`.
    public var generations: [String]
    /// A valid copy was put in its place.
    public var isRepaired: Bool

    /// More generations are not named.
    public static let maxOwners = 64

    init(_ kind: Kind, location: Int, key: String, _ text: String) {
        self.kind = kind
        self.location = location
        self.key = key
        self.text = text
        generations = []
        isRepaired = false
    }

    /// Whether something is wrong and still is.
    public var isWrong: Bool { kind != .orphaned && !isRepaired }
}

public struct CheckReport: Sendable, Codable, Equatable {
    /// At most `maxListed`; what is wrong stands before what is orphaned.
    public var problems: [CheckProblem] = []
    /// All of them, by kind, those that are not listed too.
    public var counts: [String: UInt64] = [:]
    public var repaired: UInt64 = 0
    public var disks: UInt64 = 0
    public var generations: UInt64 = 0
    public var pages: UInt64 = 0
    /// Block objects that generations name.
    public var blocks: UInt64 = 0
    /// Read and verified, bytes of pages not counted.
    public var readBytes: UInt64 = 0
    public var orphanedBytes: UInt64 = 0
    public var durationMs: Int64 = 0

    public static let maxListed = 10_000

    /// Problems that are left.
    public var wrong: UInt64 {
        counts.reduce(0) { $1.key == CheckProblem.Kind.orphaned.rawValue ? $0 : $0 + $1.value } - repaired
    }

    /// Takes back problems that turned out to be none, by their places.
    mutating func drop(_ places: [Int]) {
        for place in places.sorted(by: >) {
            let problem = problems.remove(at: place)
            counts[problem.kind.rawValue]! -= 1
            if counts[problem.kind.rawValue] == 0 { counts[problem.kind.rawValue] = nil }
        }
    }

    mutating func add(_ problem: CheckProblem) {
        counts[problem.kind.rawValue, default: 0] += 1
        if problem.isRepaired { repaired += 1 }
        // Orphans leave room for what is wrong.
        let most = problem.kind == .orphaned ? Self.maxListed / 2 : Self.maxListed
        if problems.count < most { problems.append(problem) }
    }
}

/// What a check is at.
public enum CheckPhase: String, Sendable {
    case manifests
    case listing
    case blocks
    case owners
}
