// What a client says in the handshake, judged. A value made here has passed every check that needs no knowledge of
// exports; what is wrong comes out as `.invalid`, which the server answers and then goes on with the next option.

/// The 32 bits that a client sends after the greeting.
package struct ClientFlags: Sendable, Equatable {
    package static let lengthBytes = 4
    /// nil for flags this server did not offer: "the server MUST drop the TCP connection if the client sets an unknown
    /// flag, or a flag that does not match something advertised by the server".
    package init?(_ raw: UInt32) {
        guard raw & ~0b11 == 0 else { return nil }
        noZeroes = raw & 0b10 != 0
    }
    /// After EXPORT_NAME the 124 zero bytes are left out. Whether the client set FIXED_NEWSTYLE makes no difference here:
    /// options are honoured without it too.
    package let noZeroes: Bool
}

/// The 16 bytes before an option's data.
package struct OptionHeader: Sendable, Equatable {
    package static let lengthBytes = 16
    package let code: UInt32
    package let dataBytes: UInt32

    /// Reads `lengthBytes` bytes; nil when they do not begin with the magic number: nothing that follows can be trusted.
    package init?(_ bytes: UnsafeRawPointer) {
        guard bytes.wire(0, as: UInt64.self) == NBD.Magic.option else { return nil }
        code = bytes.wire(8)
        dataBytes = bytes.wire(12)
    }
}

/// The data of NBD_OPT_INFO and NBD_OPT_GO.
package struct InfoQuery: Sendable, Equatable {
    package var exportName: String
    /// The information asked for by name; what this server does not know is ignored, as the document demands.
    package var wantsName = false
    package var wantsDescription = false
    package var wantsBlockSize = false

    package init(
        exportName: String, wantsName: Bool = false, wantsDescription: Bool = false, wantsBlockSize: Bool = false
    ) {
        self.exportName = exportName
        self.wantsName = wantsName
        self.wantsDescription = wantsDescription
        self.wantsBlockSize = wantsBlockSize
    }
}

/// The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
package struct MetaContextQuery: Sendable, Equatable {
    package var exportName: String
    package var queryCount: UInt32
    /// A query was exactly `base:allocation`.
    package var namesAllocation = false
    /// A query was `base:`, the wildcard of LIST that selects nothing in SET.
    package var namesBaseWildcard = false

    /// What LIST answers with the context: no query at all, the wildcard, or the name.
    package var listsAllocation: Bool { queryCount == 0 || namesBaseWildcard || namesAllocation }
    /// What SET selects the context by: its name alone.
    package var selectsAllocation: Bool { namesAllocation }
}

/// One option with its data.
package enum ClientOption: Sendable, Equatable {
    case exportName(String)
    case abort
    case list
    case info(InfoQuery)
    case go(InfoQuery)
    case structuredReply
    case listMetaContext(MetaContextQuery)
    case setMetaContext(MetaContextQuery)
    /// Unknown here, or not offered (STARTTLS): NBD_REP_ERR_UNSUP.
    case unsupported
    /// Known, and malformed: NBD_REP_ERR_INVALID with this message.
    case invalid(String)

    /// Judges the `data` of the option `code`.
    package init(code: UInt32, data: UnsafeRawBufferPointer) {
        var reader = OptionReader(data)
        switch code {
        case NBD.OptionCode.exportName:
            if let name = reader.string(data.count) { self = .exportName(name) } else { self = .invalid(Self.badName) }
        case NBD.OptionCode.abort:
            self = .abort  // "a server SHOULD ignore any data sent by the client"
        case NBD.OptionCode.list:
            self = data.isEmpty ? .list : .invalid("NBD_OPT_LIST carries no data")
        case NBD.OptionCode.structuredReply:
            self = data.isEmpty ? .structuredReply : .invalid("NBD_OPT_STRUCTURED_REPLY carries no data")
        case NBD.OptionCode.info, NBD.OptionCode.go:
            switch Self.infoQuery(&reader) {
            case .success(let query): self = code == NBD.OptionCode.go ? .go(query) : .info(query)
            case .failure(let fault): self = .invalid(fault.description)
            }
        case NBD.OptionCode.listMetaContext, NBD.OptionCode.setMetaContext:
            switch Self.metaContextQuery(&reader) {
            case .success(let query):
                self = code == NBD.OptionCode.setMetaContext ? .setMetaContext(query) : .listMetaContext(query)
            case .failure(let fault): self = .invalid(fault.description)
            }
        default:
            self = .unsupported
        }
    }

    private struct Fault: Error { var description: String }
    private static let badName = "the export name must be UTF-8 without NUL, of at most 4096 bytes"
    private static let badLength = "the lengths inside the option do not add up to the length of its data"

    private static func infoQuery(_ reader: inout OptionReader) -> Result<InfoQuery, Fault> {
        guard let nameBytes = reader.integer(UInt32.self), reader.left >= Int(nameBytes) else {
            return .failure(Fault(description: badLength))
        }
        guard let name = reader.string(Int(nameBytes)) else { return .failure(Fault(description: badName)) }
        guard let count = reader.integer(UInt16.self), reader.left == 2 * Int(count) else {
            return .failure(Fault(description: badLength))
        }
        var query = InfoQuery(exportName: name)
        while let code = reader.integer(UInt16.self) {
            switch code {
            case NBD.InfoCode.name: query.wantsName = true
            case NBD.InfoCode.description: query.wantsDescription = true
            case NBD.InfoCode.blockSize: query.wantsBlockSize = true
            default: break
            }
        }
        return .success(query)
    }

    private static func metaContextQuery(_ reader: inout OptionReader) -> Result<MetaContextQuery, Fault> {
        guard let nameBytes = reader.integer(UInt32.self), reader.left >= Int(nameBytes) else {
            return .failure(Fault(description: badLength))
        }
        guard let name = reader.string(Int(nameBytes)) else { return .failure(Fault(description: badName)) }
        guard let count = reader.integer(UInt32.self) else { return .failure(Fault(description: badLength)) }
        var query = MetaContextQuery(exportName: name, queryCount: count)
        // Bounded by the data: each query takes four bytes at least.
        for _ in 0..<count {
            guard let bytes = reader.integer(UInt32.self), reader.left >= Int(bytes) else {
                return .failure(Fault(description: badLength))
            }
            guard let text = reader.string(Int(bytes)) else {
                return .failure(Fault(description: "a query must be UTF-8 without NUL, of at most 4096 bytes"))
            }
            if text == NBD.allocationContext { query.namesAllocation = true }
            if text == "base:" { query.namesBaseWildcard = true }
        }
        guard reader.left == 0 else { return .failure(Fault(description: badLength)) }
        return .success(query)
    }
}

/// Reads an option's data from front to back.
private struct OptionReader {
    private var rest: UnsafeRawBufferPointer
    init(_ bytes: UnsafeRawBufferPointer) { rest = bytes }

    var left: Int { rest.count }

    mutating func integer<T: FixedWidthInteger & BitwiseCopyable>(_ type: T.Type) -> T? {
        let size = MemoryLayout<T>.size
        guard rest.count >= size, let base = rest.baseAddress else { return nil }
        let value = base.wire(0, as: T.self)
        rest = UnsafeRawBufferPointer(rebasing: rest[size...])
        return value
    }

    /// A protocol string of `count` bytes (which are there); nil when it is none.
    mutating func string(_ count: Int) -> String? {
        precondition(count <= rest.count)
        guard count <= NBD.maximumStringBytes else { return nil }
        let bytes = UnsafeRawBufferPointer(rebasing: rest[..<count])
        rest = UnsafeRawBufferPointer(rebasing: rest[count...])
        guard !bytes.contains(0) else { return nil }
        return String(validating: bytes, as: UTF8.self)
    }
}
