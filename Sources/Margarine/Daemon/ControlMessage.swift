// What goes over the control socket: one JSON object a line, a request and its answer in turn.

/// `{"command":"status"}`, with arguments where a command takes any.
public struct ControlRequest: Codable, Sendable, Equatable {
    public var command: String
    public var arguments: [String: String]?
    public init(command: String, arguments: [String: String]? = nil) {
        self.command = command
        self.arguments = arguments
    }

    /// Longest request line in bytes.
    static let limitBytes = 64 << 10
}

/// The answer: either `error`, or what the command gives.
public struct ControlAnswer: Codable, Sendable, Equatable {
    public var error: String?
    public var status: StatusReport?
    /// Of `cut`, by the name of the disk.
    public var generations: [String: UInt64]?
    public init(error: String) { self.error = error }
    public init(status: StatusReport) { self.status = status }
    init(generations: [String: UInt64]) { self.generations = generations }
    /// Done, and there is nothing to say.
    public init() {}

    /// Longest answer line that a client takes, in bytes.
    static let limitBytes = 64 << 20
}
