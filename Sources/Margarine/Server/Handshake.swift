// A connection before it has an export: fixed newstyle negotiation, on the loop that accepted it.
//
// Always holds:
// - Never more is read from the socket than the message at hand takes, so nothing is left over when the connection moves
//   to its device's loop, and bytes that arrive while an export is asked for wait in the socket.
// - One answer at a time: the next option is read when the last answer has left.
// - Whatever an option's header says is read over, byte for byte, before the next option is looked at.
// - What a client asked for is called off when it goes away; what was granted meanwhile lapses, because nobody holds it.
// - It holds `chunkBytes` of a long answer at most.

import Logging
import NBDProtocol
import Runtime

/// Owned by the loop that accepted the connection.
final class Handshake: EventHandler, @unchecked Sendable {
    private enum Step {
        /// Nothing was said yet.
        case begun
        case clientFlags
        case optionHeader
        case optionData(OptionHeader)
        /// An option too long to look at: its data are read over, then refused.
        case skipping(OptionHeader, left: Int)
        /// An export is asked for; nothing is read.
        case asking
        /// The last answer is on its way; then the socket is closed.
        case closing
        /// The socket belongs to a `Connection`.
        case moved
        case closed
    }

    let socket: FileDescriptor
    let client: ClientIdentity
    let log: Logger
    private let server: ServerContext
    private let loop: Loop

    private var step = Step.begun {
        didSet {
            if isWaitingForClient != isCounted {
                isCounted = isWaitingForClient
                server.waits(isCounted, client.group)
            }
        }
    }
    private var isCounted = false
    private var input: [UInt8] = []
    private var output = HandshakeWriter()
    private var sent = 0
    private var isWatched = false
    private var watched: Events = []
    private var timer: LoopTimer?
    private var optionCount = 0
    /// The question under way.
    private var question: Task<Void, Never>?
    /// What of the answer to LIST is not in `output` yet, and whether its end is.
    private var listed: ArraySlice<ExportInfo> = []
    private var isListing = false

    private static let chunkBytes = 64 << 10
    /// Pieces of a long option count as messages.
    private static let messagesPerTurn = 16

    private var noZeroes = false
    private var structuredReplies = false
    /// The export for which base:allocation is selected.
    private var contextExport: String?

    init(socket: FileDescriptor, client: ClientIdentity, server: ServerContext, loop: Loop, log: Logger) {
        self.socket = socket
        self.client = client
        self.server = server
        self.loop = loop
        self.log = log
    }

    /// Greets the client. On the loop.
    func start() {
        step = .clientFlags
        output.greeting()
        setTimer()
        proceed()
    }

    /// Ends it, for the reason given, if the client has not got an export yet.
    func close(_ reason: String) {
        switch step {
        case .closed, .moved: return
        default: break
        }
        log.debug("handshake ended", metadata: ["client": "\(client.address)", "reason": "\(reason)"])
        step = .closed
        question?.cancel()
        question = nil
        listed = []
        timer?.cancel()
        timer = nil
        unwatch()
        socket.close()
        server.ended(self)
    }

    /// Whether it waits for the client, and so may be closed to make room.
    var isWaitingForClient: Bool {
        switch step {
        case .begun, .asking, .moved, .closed: false
        default: true
        }
    }

    private var isAsking: Bool { if case .asking = step { true } else { false } }

    private func setTimer() {
        timer = loop.after(ns: server.limits.handshakeTimeoutMs * 1_000_000) { [weak self] in
            guard let self else { return }
            switch step {
            // Not the client's time: it begins anew. Bounded by the number of options.
            case .asking, .moved: setTimer()
            case .closed: break
            default: close("no export chosen in time")
            }
        }
    }

    /// The server's turn is over, and what it took was not the client's time.
    private func restartTimer() {
        timer?.cancel()
        setTimer()
    }

    // MARK: Input and output

    func ready(_ events: Events) {
        loop.assertOwner()
        if isAsking {
            // Only told now that the client has hung up. Perhaps it has said all it has to say, and still listens.
            if watched.contains(.hangup), Sockets.arrivedBytes(socket.raw) > 0 {
                watched = []
                loop.rewatch(socket.raw, [])
            } else {
                close("the client went away")
            }
            return
        }
        proceed()
    }

    /// Sends what there is to send, then reads and handles message after message until the socket has no more, an export is
    /// asked for, or others should have their turn.
    private func proceed() {
        for left in (0...Self.messagesPerTurn).reversed() {
            guard flush() else { break }
            switch step {
            case .begun, .asking, .moved, .closed: break
            case .closing: close("done")
            // The last answer of the turn leaves with it.
            default: if left > 0, receiveMessage() { continue }
            }
            break
        }
        watch()
    }

    private func watch() {
        let wanted: Events
        switch step {
        case .begun, .moved, .closed: return
        case .asking: wanted = .hangup
        default: wanted = sent < output.bytes.count ? .writable : .readable
        }
        if isWatched {
            if wanted != watched { loop.rewatch(socket.raw, wanted) }
        } else {
            do { try loop.watch(socket.raw, wanted, self) } catch {
                close("\(error)")
                return
            }
            isWatched = true
        }
        watched = wanted
    }

    private func unwatch() {
        guard isWatched else { return }
        isWatched = false
        loop.unwatch(socket.raw)
    }

    /// True when all has been sent.
    private func flush() -> Bool {
        while sent < output.bytes.count || continueList() {
            let result = output.bytes.withUnsafeBytes {
                Sockets.send(socket.raw, UnsafeRawBufferPointer(rebasing: $0[sent...]))
            }
            switch result {
            case .bytes(let count): sent += count
            case .wouldBlock: return false
            case .closed, .failed:
                close("the client went away")
                return false
            }
        }
        output = HandshakeWriter()
        sent = 0
        return true
    }

    /// The next piece of the answer to LIST. False: there is none.
    private func continueList() -> Bool {
        guard isListing else { return false }
        output = HandshakeWriter()
        sent = 0
        while output.bytes.count < Self.chunkBytes, let export = listed.popFirst() {
            output.server(name: export.name, description: export.description)
        }
        if listed.isEmpty {
            isListing = false
            listed = []
            output.ack(NBD.OptionCode.list)
        }
        return true
    }

    /// Reads towards the message at hand, and handles it once complete. False: the socket has no more for now.
    private func receiveMessage() -> Bool {
        let wanted: Int
        switch step {
        case .clientFlags: wanted = ClientFlags.lengthBytes
        case .optionHeader: wanted = OptionHeader.lengthBytes
        case .optionData(let header): wanted = Int(header.dataBytes)
        case .skipping(_, let left): wanted = left
        case .begun, .asking, .closing, .moved, .closed: return false
        }
        if case .skipping = step { return skip(wanted) }
        while input.count < wanted {
            let room = UnsafeMutableRawBufferPointer(rebasing: loop.receiveBuffer[..<(wanted - input.count)])
            switch Sockets.receive(socket.raw, into: room) {
            case .bytes(let count): input.append(contentsOf: room[..<count])
            case .wouldBlock: return false
            case .closed, .failed:
                close("the client went away")
                return false
            }
        }
        let message = input
        input = []
        message.withUnsafeBytes { handle($0) }
        return true
    }

    private func skip(_ left: Int) -> Bool {
        guard case .skipping(let header, _) = step else { return false }
        var left = left
        if left > 0 {
            let room = loop.receiveBuffer
            switch Sockets.receive(
                socket.raw, into: UnsafeMutableRawBufferPointer(rebasing: room[..<min(left, room.count)]))
            {
            case .bytes(let count): left -= count
            case .wouldBlock: return false
            case .closed, .failed:
                close("the client went away")
                return false
            }
        }
        step = .skipping(header, left: left)
        if left == 0 {
            step = .optionHeader
            // What it would have been is not known; an unknown option stays one.
            if ClientOption(code: header.code, data: UnsafeRawBufferPointer(start: nil, count: 0)) == .unsupported {
                output.error(header.code, .errorUnsupported, "unknown option")
            } else {
                output.error(header.code, .errorTooBig, "more than \(server.limits.optionBytes) bytes of option data")
            }
        }
        return true
    }

    // MARK: Messages

    private func handle(_ bytes: UnsafeRawBufferPointer) {
        switch step {
        case .clientFlags:
            guard let flags = ClientFlags(bytes.baseAddress!.wire(0)) else {
                close("unknown client flags")
                return
            }
            noZeroes = flags.noZeroes
            step = .optionHeader
        case .optionHeader:
            guard let header = OptionHeader(bytes.baseAddress!) else {
                close("an option without IHAVEOPT")
                return
            }
            begin(header)
        case .optionData(let header):
            handle(header.code, ClientOption(code: header.code, data: bytes))
        case .begun, .skipping, .asking, .closing, .moved, .closed:
            preconditionFailure("no message is read now")
        }
    }

    private func begin(_ header: OptionHeader) {
        optionCount += 1
        let length = Int(header.dataBytes)
        if optionCount > server.limits.options {
            close("more than \(server.limits.options) options")
        } else if length == 0 {
            // At once: it is not a message of its own, for which the socket would have to become readable.
            handle(header.code, ClientOption(code: header.code, data: UnsafeRawBufferPointer(start: nil, count: 0)))
        } else if length <= server.limits.optionBytes {
            step = .optionData(header)
        } else if length <= server.limits.skippedOptionBytes, header.code != NBD.OptionCode.exportName {
            step = .skipping(header, left: length)
        } else {
            close("an option of \(length) bytes")
        }
    }

    private func handle(_ code: UInt32, _ option: ClientOption) {
        step = .optionHeader
        if server.isDraining, option != .abort {
            if case .exportName = option {
                close("draining")
            } else {
                output.error(code, .errorShutdown, "the server is shutting down")
            }
            return
        }
        switch option {
        case .unsupported:
            output.error(code, .errorUnsupported, "unknown option")
        case .invalid(let why):
            // EXPORT_NAME has no error reply: "it MUST terminate the session".
            if code == NBD.OptionCode.exportName { close(why) } else { output.error(code, .errorInvalid, why) }
        case .abort:
            output.ack(code)
            step = .closing
        case .structuredReply:
            structuredReplies = true
            output.ack(code)
        case .list:
            ask { (provider) async throws(AttachError) in
                try await provider.list()
            } then: { this, result in
                this.answerList(result)
            }
        case .info(let query):
            ask { (provider) async throws(AttachError) in
                try await provider.describe(query.exportName)
            } then: { this, result in
                this.answerInfo(query, result)
            }
        case .listMetaContext(let query):
            ask { (provider) async throws(AttachError) in
                try await provider.describe(query.exportName)
            } then: { this, result in
                this.answerContexts(code, query, result)
            }
        case .setMetaContext(let query):
            // "Issuing this command replaces all previously-set metadata contexts (including when this command fails)".
            contextExport = nil
            guard structuredReplies else {
                output.error(code, .errorInvalid, "negotiate NBD_OPT_STRUCTURED_REPLY first")
                return
            }
            ask { (provider) async throws(AttachError) in
                try await provider.describe(query.exportName)
            } then: { this, result in
                this.answerContexts(code, query, result)
            }
        case .exportName(let name):
            attach(code, InfoQuery(exportName: name))
        case .go(let query):
            attach(code, query)
        }
    }

    /// Asks the provider, and answers on this loop; input waits meanwhile.
    private func ask<T: Sendable>(
        _ question: @escaping @Sendable (any ExportProvider) async throws(AttachError) -> T,
        then answer: @escaping @Sendable (Handshake, Result<T, AttachError>) -> Void
    ) {
        step = .asking
        let provider = server.provider
        // The accepting loop does nothing for it: what the store takes its time for is another's work.
        self.question = Task(executorPreference: server.asking) { [self] in
            let result: Result<T, AttachError>
            do throws(AttachError) { result = .success(try await question(provider)) } catch {
                result = .failure(error)
            }
            loop.post { [self] in
                guard isAsking else { return }
                self.question = nil
                step = .optionHeader
                restartTimer()
                answer(self, result)
                proceed()
            }
        }
    }

    private func answerList(_ result: Result<[ExportInfo], AttachError>) {
        let code = NBD.OptionCode.list
        switch result {
        case .failure(let error):
            output.error(code, error.kind.wire, error.description)
        case .success(let exports):
            let bytes = exports.reduce(0) {
                $0 + HandshakeWriter.serverBytes(name: $1.name, description: $1.description)
            }
            if bytes > server.limits.listReplyBytes {
                output.error(code, .errorTooBig, "too many exports to list")
                return
            }
            listed = exports[...]
            isListing = true
        }
    }

    private func answerInfo(_ query: InfoQuery, _ result: Result<ExportInfo, AttachError>) {
        let code = NBD.OptionCode.info
        switch result {
        case .failure(let error): output.error(code, error.kind.wire, error.description)
        case .success(let export): writeInfo(&output, code, query, export)
        }
    }

    /// What INFO and GO answer alike, the final ACK included.
    private func writeInfo(_ writer: inout HandshakeWriter, _ code: UInt32, _ query: InfoQuery, _ export: ExportInfo) {
        writer.infoExport(
            code, sizeBytes: export.sizeBytes,
            flags: .offered(isReadOnly: export.isReadOnly, structuredReplies: structuredReplies))
        if query.wantsName { writer.infoName(code, export.name) }
        if query.wantsDescription { writer.infoDescription(code, export.description) }
        if query.wantsBlockSize { writer.infoBlockSize(code) }
        writer.ack(code)
    }

    private func answerContexts(_ code: UInt32, _ query: MetaContextQuery, _ result: Result<ExportInfo, AttachError>) {
        if case .failure(let error) = result {
            output.error(code, error.kind.wire, error.description)
            return
        }
        let isSet = code == NBD.OptionCode.setMetaContext
        if isSet ? query.selectsAllocation : query.listsAllocation { output.allocationContext(code) }
        if isSet, query.selectsAllocation { contextExport = query.exportName }
        output.ack(code)
    }

    // MARK: Attaching

    /// EXPORT_NAME and GO: asks for the device, then moves to its loop.
    private func attach(_ code: UInt32, _ query: InfoQuery) {
        let client = client
        let wantsText = query.wantsName || query.wantsDescription
        ask { (provider: any ExportProvider) async throws(AttachError) -> (ExportInfo?, AttachedDevice) in
            let export = wantsText ? try await provider.describe(query.exportName) : nil
            let attached = try await provider.attach(query.exportName, client: client)
            return (export, attached)
        } then: { this, result in
            switch result {
            case .failure(let error): this.refuse(code, error)
            case .success(let (export, attached)): this.move(code, query, export, attached)
            }
        }
    }

    private func refuse(_ code: UInt32, _ error: AttachError) {
        log.notice(
            "export refused", metadata: ["client": "\(client.address)", "reason": "\(error.description)"])
        if code == NBD.OptionCode.exportName {
            close(error.description)
        } else {
            output.error(code, error.kind.wire, error.description)
        }
    }

    /// Hands the socket to a connection on the device's loop. Nothing of the client is in this object's hands.
    private func move(_ code: UInt32, _ query: InfoQuery, _ export: ExportInfo?, _ attached: AttachedDevice) {
        precondition(input.isEmpty && output.bytes.isEmpty)
        step = .moved
        unwatch()
        attached.loop.post { [self] in join(code, query, export, attached) }
    }

    /// On the device's loop.
    private func join(_ code: UInt32, _ query: InfoQuery, _ export: ExportInfo?, _ attached: AttachedDevice) {
        let device = attached.device
        let rules = RequestRules(
            sizeBytes: device.sizeBytes, isReadOnly: device.isReadOnly, structuredReplies: structuredReplies,
            allocationContext: contextExport == query.exportName)
        var writer = HandshakeWriter()
        if code == NBD.OptionCode.exportName {
            writer.exportName(
                sizeBytes: rules.sizeBytes,
                flags: .offered(isReadOnly: rules.isReadOnly, structuredReplies: structuredReplies), noZeroes: noZeroes)
        } else {
            let description = ExportInfo(
                name: export?.name ?? query.exportName, sizeBytes: rules.sizeBytes, isReadOnly: rules.isReadOnly,
                description: export?.description ?? "")
            writeInfo(&writer, code, query, description)
        }
        let reply = writer.bytes
        let connection = Connection(
            socket: socket, share: server.share(of: attached.loop), device: device, rules: rules, client: client,
            exportName: query.exportName, log: log, ended: { [server, client] in server.connectionEnded(client) })
        if server.isDraining { connection.drain() }
        connection.attend()
        device.join(connection, admission: attached.admission) { [self] error in
            if let error, connection.abandon() {
                loop.post { self.comeBack(code, error) }
                return
            }
            if error == nil { connection.start(reply: reply) }
            loop.post { self.isOver() }
        }
    }

    /// The device did not take the connection: the client may choose another export.
    private func comeBack(_ code: UInt32, _ error: AttachError) {
        guard case .moved = step else { return }
        step = .optionHeader
        restartTimer()
        // Those that are left when the daemon ends were closed meanwhile.
        if server.isDraining { return close("draining") }
        refuse(code, error)
        proceed()
    }

    /// The socket is the connection's, or closed by it.
    private func isOver() {
        step = .closed
        timer?.cancel()
        timer = nil
        server.moved(self)
    }
}
