// Signals as messages of a loop.

import CLinux

/// Tells a loop of signals, in order of arrival, until `stop`.
public final class SignalWatcher: EventHandler, @unchecked Sendable {  // owned by its loop once watched
    private let descriptor: FileDescriptor
    private let handler: @Sendable (Int32) -> Void

    /// Keeps the signals from ending the process. Call before any thread is started: only threads started later inherit it.
    public static func block(_ signals: [Int32]) {
        let error = mg_signals_block(signals, Int32(signals.count))
        precondition(error == 0, "sigmask: \(errnoText(-error))")
    }

    /// `handler` is called on the loop with each of `signals` (blocked before) that comes. Loop only.
    public init(_ signals: [Int32], on loop: Loop, handler: @escaping @Sendable (Int32) -> Void) throws(ScratchError) {
        let fd = mg_signalfd(signals, Int32(signals.count))
        guard fd >= 0 else { throw ScratchError(-fd, "signalfd", loop.name) }
        descriptor = FileDescriptor(owning: fd)
        self.handler = handler
        try loop.watch(fd, .readable, self)
    }

    public func ready(_ events: Events) {
        while true {
            let signal = mg_signalfd_next(descriptor.raw)
            if signal == 0 { return }
            handler(signal)
        }
    }

    /// No more calls. Loop only.
    public func stop() {
        guard descriptor.raw >= 0 else { return }
        Loop.current?.unwatch(descriptor.raw)
        descriptor.close()
    }
}
