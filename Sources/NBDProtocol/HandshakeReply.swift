// What a server says in the handshake. Appended to a byte array: none of it is on the path of a request.

/// Writes handshake messages.
package struct HandshakeWriter: Sendable {
    package var bytes: [UInt8] = []
    package init() {}

    /// NBDMAGIC, IHAVEOPT, and the handshake flags FIXED_NEWSTYLE and NO_ZEROES.
    package mutating func greeting() {
        bytes.appendWire(NBD.Magic.greeting)
        bytes.appendWire(NBD.Magic.option)
        bytes.appendWire(UInt16(0b11))
    }

    /// The answer to NBD_OPT_EXPORT_NAME, the only one without a reply header.
    package mutating func exportName(sizeBytes: UInt64, flags: NBD.TransmissionFlags, noZeroes: Bool) {
        bytes.appendWire(sizeBytes)
        bytes.appendWire(flags.rawValue)
        if !noZeroes { bytes.append(contentsOf: repeatElement(0, count: 124)) }
    }

    package mutating func ack(_ option: UInt32) { header(option, .ack, dataBytes: 0) }

    /// An error reply with its message for people.
    package mutating func error(_ option: UInt32, _ code: NBD.ReplyCode, _ message: String) {
        let text = Self.clipped(message)
        header(option, code, dataBytes: text.count)
        bytes.append(contentsOf: text)
    }

    /// What `server` takes.
    package static func serverBytes(name: String, description: String) -> Int {
        20 + 4 + clipped(name).count + clipped(description).count
    }

    /// NBD_REP_SERVER: one export of NBD_OPT_LIST.
    package mutating func server(name: String, description: String) {
        let name = Self.clipped(name)
        let text = Self.clipped(description)
        header(NBD.OptionCode.list, .server, dataBytes: 4 + name.count + text.count)
        bytes.appendWire(UInt32(name.count))
        bytes.append(contentsOf: name)
        bytes.append(contentsOf: text)
    }

    /// NBD_INFO_EXPORT, which INFO and GO always answer.
    package mutating func infoExport(_ option: UInt32, sizeBytes: UInt64, flags: NBD.TransmissionFlags) {
        header(option, .info, dataBytes: 12)
        bytes.appendWire(NBD.InfoCode.export)
        bytes.appendWire(sizeBytes)
        bytes.appendWire(flags.rawValue)
    }

    package mutating func infoName(_ option: UInt32, _ name: String) {
        infoText(option, NBD.InfoCode.name, name)
    }

    package mutating func infoDescription(_ option: UInt32, _ text: String) {
        infoText(option, NBD.InfoCode.description, text)
    }

    package mutating func infoBlockSize(_ option: UInt32) {
        header(option, .info, dataBytes: 14)
        bytes.appendWire(NBD.InfoCode.blockSize)
        bytes.appendWire(NBD.minimumBlockBytes)
        bytes.appendWire(NBD.preferredBlockBytes)
        bytes.appendWire(NBD.maximumPayloadBytes)
    }

    /// NBD_REP_META_CONTEXT for `base:allocation`. In answer to LIST the number "SHOULD be set to zero".
    package mutating func allocationContext(_ option: UInt32) {
        let name = Array(NBD.allocationContext.utf8)
        header(option, .metaContext, dataBytes: 4 + name.count)
        bytes.appendWire(option == NBD.OptionCode.setMetaContext ? NBD.allocationContextID : 0)
        bytes.append(contentsOf: name)
    }

    private mutating func infoText(_ option: UInt32, _ code: UInt16, _ text: String) {
        let text = Self.clipped(text)
        header(option, .info, dataBytes: 2 + text.count)
        bytes.appendWire(code)
        bytes.append(contentsOf: text)
    }

    private mutating func header(_ option: UInt32, _ reply: NBD.ReplyCode, dataBytes: Int) {
        bytes.appendWire(NBD.Magic.optionReply)
        bytes.appendWire(option)
        bytes.appendWire(reply.rawValue)
        bytes.appendWire(UInt32(dataBytes))
    }

    /// A string as the protocol allows it: no NUL, at most 4096 bytes, cut between characters.
    private static func clipped(_ text: String) -> [UInt8] {
        var bytes: [UInt8] = []
        for character in text {
            if bytes.count + character.utf8.count > NBD.maximumStringBytes { break }
            bytes.append(contentsOf: character.utf8.lazy.filter { $0 != 0 })
        }
        return bytes
    }
}
