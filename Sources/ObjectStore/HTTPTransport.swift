// HTTP by libcurl's multi interface on one thread of its own: connections are kept and reused, many transfers run at
// once up to a bound, the others wait in the order they came.
//
// Always holds:
// - Every libcurl handle is touched by that thread only. Others hand over transfers through the mailbox.
// - Every transfer ends, at the latest when its time is up.
// - A request that must not be sent twice is not: libcurl silently repeats one whose kept connection turned out
//   dead; for those it may not rewind the body, so that it fails instead.

import CCurl
import CLibraries
import Runtime
import Synchronization

/// Bounds of the connection to one store.
public struct TransportSettings: Sendable, Equatable {
    /// Requests at once, each on a connection; more wait.
    public var connections = 32
    public var connectTimeoutMs = 5_000
    /// A transfer that moves nothing for so long is given up.
    public var stallTimeoutSeconds = 30
    /// What one request may last in all, without the wait for a connection, and without its bytes ...
    public var totalTimeoutMs = 60_000
    /// ... for which it has the time that they take at this speed.
    public var slowestBytesPerSecond = 64 << 10
    /// A longer body is refused before it fills the memory.
    public var maxBodyBytes = 64 << 20

    public init() {}
}

/// Where and how to connect.
struct HTTPServer: Sendable {
    /// Scheme and authority.
    var root: String
    var certificateFile: String?
    /// Variables like http_proxy are not for servers on this machine.
    var ignoresProxies: Bool
}

struct HTTPRequest: Sendable {
    var method: String
    /// Encoded, with the query.
    var target: String
    var headers: [(String, String)]
    var body: [UInt8] = []
    /// Sent once or not at all.
    var sendsOnce = false
    /// What the answer's body is likely to measure, to make room at once.
    var expectedBytes = 0
}

struct HTTPResponse: Sendable {
    var status = 0
    /// Names in lower case; of several the last.
    var headers: [String: String] = [:]
    var body: [UInt8] = []
}

/// Why there is no answer.
struct TransportError: Error, Sendable {
    /// Whether the whole request may have reached the server.
    var isMaybeDone: Bool
    /// Whether trying again is pointless until somebody mends something: a certificate that is not trusted, say.
    var isPermanent: Bool
    /// Nobody wants the answer any more.
    var isCancelled = false
    var isTooLong = false
    var text: String

    static func cancelled(isMaybeDone: Bool = false) -> TransportError {
        TransportError(isMaybeDone: isMaybeDone, isPermanent: true, isCancelled: true, text: "cancelled")
    }
}

/// A client of one server.
final class HTTPTransport: Sendable {
    private let worker: CurlWorker

    /// nil without memory for it.
    init?(server: HTTPServer, settings: TransportSettings) {
        mg_curl_global
        guard let worker = CurlWorker(server: server, settings: settings) else { return nil }
        self.worker = worker
    }

    deinit { worker.stop() }

    func perform(_ request: HTTPRequest) async -> Result<HTTPResponse, TransportError> {
        let transfer = Transfer(request)
        return await withTaskCancellationHandler {
            await withUnsafeContinuation { continuation in
                transfer.continuation = continuation
                worker.submit(transfer)
            }
        } onCancel: {
            worker.cancel(transfer)
        }
    }
}

/// libcurl wants this once before anything else.
private let mg_curl_global: Void = { curl_global_init(Int(CURL_GLOBAL_ALL)) }()

/// The thread and its handles.
private final class CurlWorker: @unchecked Sendable {
    private struct Mailbox {
        var arrived: [Transfer] = []
        var cancelled: [Transfer] = []
        var isStopping = false
        var isRunning = false
    }
    private let mailbox = Mutex(Mailbox())
    private let server: HTTPServer
    private let settings: TransportSettings
    /// Made with the worker; other threads only wake it up, which libcurl allows.
    private let multi: UnsafeMutableRawPointer
    // Owned by the thread.
    private var waiting: [Transfer] = []
    private var waitingHead = 0
    private var running: [UnsafeMutableRawPointer: Transfer] = [:]
    private var spareHandles: [UnsafeMutableRawPointer] = []

    init?(server: HTTPServer, settings: TransportSettings) {
        guard let multi = curl_multi_init() else { return nil }
        self.server = server
        self.settings = settings
        self.multi = multi
        _ = mg_curl_multi_set_long(multi, Int32(CURLMOPT_MAXCONNECTS.rawValue), settings.connections)
    }

    deinit {
        for handle in spareHandles { curl_easy_cleanup(handle) }
        curl_multi_cleanup(multi)
    }

    func submit(_ transfer: Transfer) {
        let starts = mailbox.withLock { mailbox in
            mailbox.arrived.append(transfer)
            defer { mailbox.isRunning = true }
            return !mailbox.isRunning
        }
        if !starts {
            curl_multi_wakeup(multi)
        } else if !startDetachedThread(name: CurlWorker.threadName, stackBytes: 1 << 20, { self.serve() }) {
            failAll("the system has no thread for HTTP; raise the limit of threads (pids, ulimit -u)")
        }
    }

    static let threadName = "mg-curl"

    /// Nothing was sent of what waits; the next that comes tries to start the thread again.
    private func failAll(_ why: String) {
        let transfers = mailbox.withLock { mailbox in
            mailbox.isRunning = false
            defer { mailbox.arrived = [] }
            return mailbox.arrived
        }
        for transfer in transfers {
            transfer.complete(.failure(TransportError(isMaybeDone: false, isPermanent: false, text: why)))
        }
    }

    func cancel(_ transfer: Transfer) {
        mailbox.withLock { $0.cancelled.append(transfer) }
        curl_multi_wakeup(multi)
    }

    /// Ends the thread. Nothing should be running any more, for whoever waits keeps the transport.
    func stop() {
        mailbox.withLock { $0.isStopping = true }
        curl_multi_wakeup(multi)
    }

    private func serve() {
        while true {
            let (arrived, cancelled, isStopping) = mailbox.withLock { mailbox in
                defer {
                    mailbox.arrived.removeAll(keepingCapacity: true)
                    mailbox.cancelled.removeAll()
                }
                return (mailbox.arrived, mailbox.cancelled, mailbox.isStopping)
            }
            waiting += arrived
            if isStopping {
                for transfer in [Transfer](running.values) + waiting[waitingHead...] { abort(transfer) }
                return
            }
            for transfer in cancelled { abort(transfer) }
            startWaiting()
            var count: Int32 = 0
            curl_multi_perform(multi, &count)
            var anyDone = false
            var code: Int32 = 0
            while let handle = mg_curl_next_done(multi, &code) {
                finish(handle, code)
                anyDone = true
            }
            if anyDone, waitingHead < waiting.count { continue }
            curl_multi_poll(multi, nil, 0, 60_000, nil)  // Its own timers and `wakeup` end it earlier.
        }
    }

    private func startWaiting() {
        while running.count < settings.connections, waitingHead < waiting.count {
            let transfer = waiting[waitingHead]
            waitingHead += 1
            if transfer.isCancelled {
                transfer.complete(.failure(.cancelled()))
            } else {
                start(transfer)
            }
        }
        if waitingHead == waiting.count || waitingHead > 1024 {
            waiting.removeFirst(waitingHead)
            waitingHead = 0
        }
    }

    private func start(_ transfer: Transfer) {
        guard let handle = spareHandles.popLast() ?? curl_easy_init() else {
            transfer.complete(.failure(TransportError(isMaybeDone: false, isPermanent: false, text: "out of memory")))
            return
        }
        guard transfer.prepare(handle, server, settings) else {
            transfer.release()
            curl_easy_cleanup(handle)
            transfer.complete(.failure(TransportError(isMaybeDone: false, isPermanent: false, text: "out of memory")))
            return
        }
        running[handle] = transfer
        let code = curl_multi_add_handle(multi, handle)
        if code != CURLM_OK {
            running[handle] = nil
            transfer.release()
            curl_easy_cleanup(handle)
            let text = String(cString: curl_multi_strerror(code))
            transfer.complete(.failure(TransportError(isMaybeDone: false, isPermanent: false, text: text)))
        }
    }

    private func finish(_ handle: UnsafeMutableRawPointer, _ code: Int32) {
        guard let transfer = running.removeValue(forKey: handle) else { return }
        curl_multi_remove_handle(multi, handle)
        let result = transfer.result(handle, CURLcode(UInt32(code)))
        transfer.release()
        curl_easy_reset(handle)
        if spareHandles.count < settings.connections { spareHandles.append(handle) } else { curl_easy_cleanup(handle) }
        transfer.complete(result)
    }

    private func abort(_ transfer: Transfer) {
        transfer.isCancelled = true
        guard let (handle, _) = running.first(where: { $0.value === transfer }) else {
            // One that has not arrived yet ends when its turn comes.
            if waiting[waitingHead...].contains(where: { $0 === transfer }) {
                transfer.complete(.failure(.cancelled()))
            }
            return
        }
        running[handle] = nil
        let isMaybeDone = transfer.isMaybeDone(handle)
        curl_multi_remove_handle(multi, handle)
        transfer.release()
        curl_easy_cleanup(handle)
        transfer.complete(.failure(.cancelled(isMaybeDone: isMaybeDone)))
    }
}
