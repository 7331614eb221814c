// The third seam: time and chance. The engine asks here and nowhere else, so that a simulated run is
// a function of its seed.

/// A clock and a source of randomness.
public protocol Environment: Sendable {
    /// Monotonic time in nanoseconds; its zero means nothing.
    var nowNs: UInt64 { get }
    /// The same, and it counts the time that the machine is suspended: what a promise to others is held against. Every
    /// clock that does not stop may use `nowNs`, which is the default.
    var bootNs: UInt64 { get }
    /// Wall-clock time in milliseconds since 1970. For people and heartbeats; safety never rests on it.
    var wallMs: Int64 { get }
    /// 64 random bits, fit for object names (cryptographic in production).
    func randomBits() -> UInt64
    /// Returns after at least `ns` nanoseconds, earlier only when the task is cancelled.
    func sleep(ns: UInt64) async
    /// Runs `work` on a worker thread (compression, checksums: what takes long and touches no disk's state) and
    /// returns its result on the caller's executor.
    func offload<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T
}

extension Environment {
    public var bootNs: UInt64 { nowNs }
}
