import Testing

@testable import NBDProtocol

@Suite struct HandshakeTests {
    @Test func greetingIsNBDMAGICThenIHAVEOPTThenFixedNewstyleAndNoZeroes() {
        var writer = HandshakeWriter()
        writer.greeting()
        #expect(writer.bytes == ascii("NBDMAGIC") + ascii("IHAVEOPT") + hex("0003"))
    }

    @Test func clientFlagsNotOfferedAreNoFlags() {
        #expect(ClientFlags(0) != nil)
        #expect(ClientFlags(1)?.noZeroes == false)
        #expect(ClientFlags(3)?.noZeroes == true)
        #expect(ClientFlags(4) == nil)
        #expect(ClientFlags(0x8000_0001) == nil)
    }

    @Test func optionHeaderNeedsItsMagic() {
        let good = ascii("IHAVEOPT") + hex("00000007 00000010")
        let header = good.withUnsafeBytes { OptionHeader($0.baseAddress!) }
        #expect(header?.code == 7)
        #expect(header?.dataBytes == 16)
        for index in 0..<8 {
            var bad = good
            bad[index] ^= 1
            #expect(bad.withUnsafeBytes { OptionHeader($0.baseAddress!) } == nil)
        }
    }

    @Test func exportNameIsTheWholeData() {
        #expect(option(1, ascii("demo")) == .exportName("demo"))
        #expect(option(1, []) == .exportName(""))
        #expect(option(1, Array(repeating: 97, count: 4096)) == .exportName(String(repeating: "a", count: 4096)))
    }

    @Test func namesAreUTF8WithoutNULOfAtMost4096Bytes() {
        for bad in [hex("61 00 62"), hex("ff"), Array(repeating: 97, count: 4097)] {
            guard case .invalid = option(1, bad) else {
                Issue.record("took the name \(bad.prefix(8))")
                continue
            }
        }
    }

    @Test func listAndStructuredReplyCarryNoData() {
        #expect(option(3, []) == .list)
        #expect(option(8, []) == .structuredReply)
        for code in [3, 8] as [UInt32] {
            guard case .invalid = option(code, [0]) else {
                Issue.record("took data of option \(code)")
                continue
            }
        }
    }

    @Test func abortIgnoresItsData() {
        #expect(option(2, []) == .abort)
        #expect(option(2, hex("0102")) == .abort)
    }

    @Test func startTLSAndUnknownOptionsAreUnsupported() {
        for code in [0, 4, 5, 11, 12, 0xffff_ffff] as [UInt32] { #expect(option(code, [1, 2, 3]) == .unsupported) }
    }

    @Test func goAndInfoNameTheExportAndWhatIsAsked() {
        let data = hex("00000004") + ascii("demo") + hex("0004 0001 0002 0003 7777")
        let query = InfoQuery(exportName: "demo", wantsName: true, wantsDescription: true, wantsBlockSize: true)
        #expect(option(7, data) == .go(query))
        #expect(option(6, data) == .info(query))
        #expect(option(7, hex("00000000 0000")) == .go(InfoQuery(exportName: "")))
        #expect(option(7, hex("00000000 0001 0000")) == .go(InfoQuery(exportName: "")))
    }

    @Test func goWithLengthsThatDoNotAddUpIsInvalid() {
        let right = hex("00000004") + ascii("demo") + hex("0001 0003")
        var wrong: [[UInt8]] = (0..<right.count).map { Array(right[..<$0]) }
        wrong.append(right + [0])
        wrong.append(hex("ffffffff") + ascii("demo") + hex("0000"))
        wrong.append(hex("00000005") + ascii("demo") + hex("0000"))
        wrong.append(hex("00000004") + ascii("demo") + hex("0002 0003"))
        for data in wrong {
            guard case .invalid = option(7, data) else {
                Issue.record("took \(data)")
                continue
            }
        }
    }

    @Test func metaContextQueries() {
        func data(_ queries: [String]) -> [UInt8] {
            var bytes = hex("00000001") + ascii("x")
            bytes.appendWire(UInt32(queries.count))
            for query in queries {
                bytes.appendWire(UInt32(query.utf8.count))
                bytes += ascii(query)
            }
            return bytes
        }
        func set(_ queries: [String]) -> MetaContextQuery? {
            guard case .setMetaContext(let query) = option(10, data(queries)) else { return nil }
            return query
        }
        func list(_ queries: [String]) -> MetaContextQuery? {
            guard case .listMetaContext(let query) = option(9, data(queries)) else { return nil }
            return query
        }
        #expect(set(["base:allocation"])?.selectsAllocation == true)
        #expect(set(["x-other:a", "base:allocation", "base:allocation"])?.selectsAllocation == true)
        #expect(set([])?.selectsAllocation == false)
        #expect(set(["base:"])?.selectsAllocation == false)
        #expect(set(["base:allocatio"])?.selectsAllocation == false)
        #expect(set(["qemu:dirty-bitmap:x", "nocolon", ""])?.selectsAllocation == false)
        #expect(list([])?.listsAllocation == true)
        #expect(list(["base:"])?.listsAllocation == true)
        #expect(list(["base:allocation"])?.listsAllocation == true)
        #expect(list(["base:else", "x-a:"])?.listsAllocation == false)
        #expect(set(["base:allocation"])?.exportName == "x")
    }

    @Test func metaContextWithLengthsThatDoNotAddUpIsInvalid() {
        let right = hex("00000001") + ascii("x") + hex("00000001 0000000f") + ascii("base:allocation")
        #expect(option(10, right) != .unsupported)
        var wrong: [[UInt8]] = (0..<right.count).map { Array(right[..<$0]) }
        wrong.append(right + [0])
        wrong.append(hex("00000001") + ascii("x") + hex("ffffffff"))
        wrong.append(hex("00000001") + ascii("x") + hex("00000001 ffffffff") + ascii("base:"))
        wrong.append(hex("80000000") + ascii("x") + hex("00000000"))
        for data in wrong {
            for code in [9, 10] as [UInt32] {
                guard case .invalid = option(code, data) else {
                    Issue.record("took \(data)")
                    continue
                }
            }
        }
    }

    @Test func exportNameReplyHas124ZeroesUnlessAgreedOtherwise() {
        var writer = HandshakeWriter()
        writer.exportName(sizeBytes: 0x1_0000_0000, flags: [.hasFlags, .readOnly], noZeroes: true)
        #expect(writer.bytes == hex("0000000100000000 0003"))
        writer = HandshakeWriter()
        writer.exportName(sizeBytes: 512, flags: .hasFlags, noZeroes: false)
        #expect(writer.bytes == hex("0000000000000200 0001") + Array(repeating: 0, count: 124))
    }

    @Test func optionReplies() {
        let magic = "0003e889045565a9"
        var writer = HandshakeWriter()
        writer.ack(8)
        #expect(writer.bytes == hex(magic + "00000008 00000001 00000000"))

        writer = HandshakeWriter()
        writer.error(7, .errorUnknown, "no")
        #expect(writer.bytes == hex(magic + "00000007 80000006 00000002") + ascii("no"))

        writer = HandshakeWriter()
        writer.server(name: "demo", description: "a disk")
        #expect(writer.bytes == hex(magic + "00000003 00000002 0000000e 00000004") + ascii("demoa disk"))

        writer = HandshakeWriter()
        writer.infoExport(7, sizeBytes: 0x0102_0304_0506_0708, flags: [.hasFlags, .canMultiConn])
        #expect(writer.bytes == hex(magic + "00000007 00000003 0000000c 0000 0102030405060708 0101"))

        writer = HandshakeWriter()
        writer.infoBlockSize(6)
        #expect(writer.bytes == hex(magic + "00000006 00000003 0000000e 0003 00000001 00001000 02000000"))

        writer = HandshakeWriter()
        writer.infoName(6, "d")
        writer.infoDescription(6, "e")
        #expect(
            writer.bytes
                == hex(magic + "00000006 00000003 00000003 0001 64" + magic + "00000006 00000003 00000003 0002 65"))

        writer = HandshakeWriter()
        writer.allocationContext(10)
        #expect(writer.bytes == hex(magic + "0000000a 00000004 00000013 00000001") + ascii("base:allocation"))
        writer = HandshakeWriter()
        writer.allocationContext(9)
        #expect(writer.bytes == hex(magic + "00000009 00000004 00000013 00000000") + ascii("base:allocation"))
    }

    @Test func messagesAreCutAt4096BytesBetweenCharacters() {
        var writer = HandshakeWriter()
        writer.error(7, .errorPolicy, String(repeating: "é", count: 3000) + "\0")
        #expect(writer.bytes.count == 20 + 4096)
        #expect(String(validating: writer.bytes[20...], as: UTF8.self) == String(repeating: "é", count: 2048))
    }

    @Test func transmissionFlags() {
        typealias Flags = NBD.TransmissionFlags
        // HAS_FLAGS 0, FLUSH 2, FUA 3, TRIM 5, WRITE_ZEROES 6, DF 7, MULTI_CONN 8, CACHE 10, FAST_ZERO 11.
        #expect(Flags.offered(isReadOnly: false, structuredReplies: false).rawValue == 0b1101_0110_1101)
        #expect(Flags.offered(isReadOnly: false, structuredReplies: true).rawValue == 0b1101_1110_1101)
        #expect(Flags.offered(isReadOnly: true, structuredReplies: true).rawValue == 0b0101_1000_1111)
    }
}
