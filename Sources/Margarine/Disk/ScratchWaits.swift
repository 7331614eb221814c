// What a scratch disk lacks for the moment: who waits for it, for how long, and what the operator is told of it.

internal import Glibc
internal import Logging
package import Runtime
internal import Synchronization

extension ScratchError {
    /// The disk has no space left for this.
    package var isNoSpace: Bool { errno == ENOSPC || errno == EDQUOT }

    /// The process or the machine has no descriptors left.
    var isLackOfDescriptors: Bool { errno == EMFILE || errno == ENFILE }

    /// Something is used up that may come back: the same call may succeed later. (Not so a sync: see `Journal`.)
    var isLack: Bool { isNoSpace || isLackOfDescriptors || errno == ENOMEM || errno == EAGAIN || errno == ENOBUFS }

    static func corrupt(_ text: String) -> ScratchError { ScratchError(errno: EIO, description: text) }
}

/// One who tries again and again.
struct ScratchWaits {
    /// The error that is waited out.
    private(set) var trouble: Int32?
    var isWaiting = false
    private var backoffNs: UInt64 = ScratchWaits.firstNs

    private static let firstNs: UInt64 = 50_000_000
    private static let mostNs: UInt64 = 2_000_000_000

    /// Returns after how many nanoseconds to try again.
    mutating func begin(_ error: ScratchError) -> UInt64 {
        trouble = error.errno
        isWaiting = true
        defer { backoffNs = min(backoffNs * 2, ScratchWaits.mostNs) }
        return backoffNs
    }

    /// It has succeeded. Returns the error that was waited out, if there was one.
    mutating func end() -> Int32? {
        guard let trouble else { return nil }
        self = ScratchWaits()
        return trouble
    }
}

/// All that wait for the scratch disk, of all loops: the operator reads one line when a trouble begins and one when it is
/// over, however many disks it stops and however often they try.
final class ScratchTroubles: Sendable {
    private struct Trouble {
        var waiting = 0
        var isTold = false
        var toldAtNs: UInt64 = 0
        var beganAtNs: UInt64 = 0
    }
    private let all = Mutex<[Int32: Trouble]>([:])

    /// One that comes and goes is told of this often at most.
    private static let pauseNs: UInt64 = 10_000_000_000

    func begin(_ error: ScratchError, _ context: DiskContext) {
        let now = context.environment.nowNs
        let mustTell = all.withLock { all in
            var trouble = all[error.errno] ?? Trouble()
            trouble.waiting += 1
            defer { all[error.errno] = trouble }
            if trouble.waiting > 1 { return false }
            trouble.beganAtNs = now
            trouble.isTold = trouble.toldAtNs == 0 || now >= trouble.toldAtNs + ScratchTroubles.pauseNs
            if trouble.isTold { trouble.toldAtNs = max(now, 1) }
            return trouble.isTold
        }
        if mustTell {
            context.problem(
                "scratch disk: \(error); writers wait until it can be written again, and nothing acknowledged is lost")
        }
    }

    func end(_ errno: Int32, _ context: DiskContext) {
        let seconds = all.withLock { all -> UInt64? in
            guard var trouble = all[errno] else { return nil }
            trouble.waiting -= 1
            defer { all[errno] = trouble }
            guard trouble.waiting == 0, trouble.isTold else { return nil }
            return (context.environment.nowNs - min(trouble.beganAtNs, context.environment.nowNs)) / 1_000_000_000
        }
        if let seconds {
            context.log.notice("scratch disk: it can be written again after \(seconds) s (\(errnoText(errno)))")
        }
    }
}
