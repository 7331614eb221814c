import Testing

@testable import NBDProtocol

@Suite struct TransmissionTests {
    static let size: UInt64 = 1 << 40
    let rules = RequestRules(sizeBytes: size, isReadOnly: false, structuredReplies: true, allocationContext: true)
    let simple = RequestRules(sizeBytes: size, isReadOnly: false, structuredReplies: false, allocationContext: false)
    let readOnly = RequestRules(sizeBytes: size, isReadOnly: true, structuredReplies: true, allocationContext: true)

    func request(_ type: UInt16, flags: UInt16 = 0, offset: UInt64 = 0, length: UInt32 = 4096) -> RequestHeader {
        RequestHeader(flags: flags, type: type, cookie: 1, offset: offset, lengthBytes: length)
    }

    @Test func requestHeaderLayout() {
        let bytes = hex("25609513 0001 0006 1122334455667788 0000010000000200 00001000")
        let header = bytes.withUnsafeBytes { RequestHeader($0.baseAddress!) }
        #expect(
            header
                == RequestHeader(
                    flags: 1, type: 6, cookie: 0x1122_3344_5566_7788, offset: 0x100_0000_0200, lengthBytes: 4096))
        #expect(bytes.count == RequestHeader.lengthBytes)
        for index in 0..<4 {
            var bad = bytes
            bad[index] ^= 0x80
            #expect(bad.withUnsafeBytes { RequestHeader($0.baseAddress!) } == nil)
        }
    }

    @Test func onlyWritesHaveAPayload() {
        #expect(request(1, length: 77).payloadBytes == 77)
        for type in [0, 2, 3, 4, 5, 6, 7, 8, 9, 0xffff] as [UInt16] {
            #expect(request(type, length: 77).payloadBytes == 0)
        }
    }

    @Test func unknownCommandsAreEINVAL() {
        for type in [8, 9, 100, 0xffff] as [UInt16] { #expect(rules.judge(request(type)) == .refuse(.invalid)) }
    }

    @Test func rangesPastTheEnd() {
        let past: [(UInt64, UInt32)] = [
            (Self.size, 1), (Self.size - 1, 2), (Self.size + 1, 0), (UInt64.max, 1), (UInt64.max - 100, 4096),
        ]
        for (offset, length) in past {
            #expect(rules.judge(request(0, offset: offset, length: length)) == .refuse(.invalid))
            #expect(rules.judge(request(4, offset: offset, length: length)) == .refuse(.invalid))
            #expect(rules.judge(request(5, offset: offset, length: length)) == .refuse(.invalid))
            #expect(rules.judge(request(7, offset: offset, length: length)) == .refuse(.invalid))
            #expect(rules.judge(request(1, offset: offset, length: length)) == .refuse(.noSpace))
            #expect(rules.judge(request(6, offset: offset, length: length)) == .refuse(.noSpace))
        }
        for type in [0, 1, 4, 5, 6, 7] as [UInt16] {
            let command = NBD.Command(rawValue: type)!
            #expect(rules.judge(request(type, offset: Self.size - 1, length: 1)) == .accept(command))
        }
    }

    @Test func payloadLimit() {
        let limit = UInt32(32 << 20)
        #expect(rules.judge(request(0, length: limit)) == .accept(.read))
        #expect(rules.judge(request(0, length: limit + 1)) == .refuse(.overflow))
        #expect(simple.judge(request(0, length: limit + 1)) == .refuse(.invalid))
        #expect(rules.judge(request(1, length: limit)) == .accept(.write))
        #expect(rules.judge(request(1, length: limit + 1)) == .refuse(.invalid))
        for type in [4, 5, 6, 7] as [UInt16] {
            #expect(rules.judge(request(type, length: .max)) == .accept(NBD.Command(rawValue: type)!))
        }
    }

    @Test func readOnlyExportsRefuseWhatWrites() {
        for type in [1, 4, 6] as [UInt16] {
            #expect(readOnly.judge(request(type)) == .refuse(.permission))
            #expect(readOnly.judge(request(type, offset: Self.size)) == .refuse(.permission))
        }
        for type in [0, 5, 7] as [UInt16] {
            #expect(readOnly.judge(request(type)) == .accept(NBD.Command(rawValue: type)!))
        }
        #expect(readOnly.judge(request(3, length: 0)) == .accept(.flush))
    }

    @Test func fuaGoesWithEveryCommand() {
        for type in 0...7 as ClosedRange<UInt16> {
            let length: UInt32 = type == 3 ? 0 : 512
            #expect(rules.judge(request(type, flags: 1, length: length)) == .accept(NBD.Command(rawValue: type)!))
        }
    }

    @Test func otherFlagsGoWithTheirCommandOnly() {
        // Bits 1 NO_HOLE and 4 FAST_ZERO: WRITE_ZEROES. 2 DF: READ. 3 REQ_ONE: BLOCK_STATUS. 5 and up: none here.
        let owner: [UInt16: UInt16] = [1: 6, 4: 6, 2: 0, 3: 7]
        for bit in 1...15 as ClosedRange<UInt16> {
            for type in [0, 1, 3, 4, 5, 6, 7] as [UInt16] {
                let verdict = rules.judge(request(type, flags: 1 << bit, length: type == 3 ? 0 : 512))
                if owner[bit] == type {
                    #expect(verdict == .accept(NBD.Command(rawValue: type)!))
                } else {
                    #expect(verdict == .refuse(.invalid))
                }
            }
        }
    }

    @Test func dontFragmentNeedsStructuredReplies() {
        #expect(simple.judge(request(0, flags: 4)) == .refuse(.invalid))
    }

    @Test func blockStatusNeedsAContextAndALength() {
        #expect(simple.judge(request(7)) == .refuse(.invalid))
        #expect(rules.judge(request(7, length: 0)) == .refuse(.invalid))
    }

    @Test func flushHasNoRange() {
        #expect(rules.judge(request(3, length: 0)) == .accept(.flush))
        #expect(rules.judge(request(3, length: 1)) == .refuse(.invalid))
        #expect(rules.judge(request(3, offset: 1, length: 0)) == .refuse(.invalid))
    }

    @Test func accessesOfNoBytesSucceedWithinTheExport() {
        for type in [0, 1, 4, 5, 6] as [UInt16] {
            let command = NBD.Command(rawValue: type)!
            #expect(rules.judge(request(type, length: 0)) == .nothingToDo(command))
            #expect(rules.judge(request(type, offset: Self.size, length: 0)) == .nothingToDo(command))
        }
    }

    @Test func disconnectIsTakenWhateverItCarries() {
        #expect(rules.judge(request(2, length: 0)) == .accept(.disconnect))
        #expect(rules.judge(request(2, flags: 0x8000, offset: 5, length: 9)) == .accept(.disconnect))
    }

    @Test func simpleReply() {
        #expect(
            stored(Reply.simpleBytes) { Reply.simple($0, cookie: 0x0102_0304_0506_0708, error: 0) }
                == hex("67446698 00000000 0102030405060708"))
        #expect(
            stored(Reply.simpleBytes) { Reply.simple($0, cookie: 9, error: NBD.ErrorCode.shutdown.rawValue) }
                == hex("67446698 0000006c 0000000000000009"))
    }

    @Test func structuredReplies() {
        #expect(
            stored(Reply.chunkBytes) { Reply.none($0, cookie: 7) }
                == hex("668e33ef 0001 0000 0000000000000007 00000000"))
        #expect(
            stored(Reply.dataBytes) { Reply.data($0, cookie: 7, offset: 0x1000, lengthBytes: 512, isLast: false) }
                == hex("668e33ef 0000 0001 0000000000000007 00000208 0000000000001000"))
        #expect(
            stored(Reply.holeBytes) { Reply.hole($0, cookie: 7, offset: 0x1000, lengthBytes: 512, isLast: true) }
                == hex("668e33ef 0001 0002 0000000000000007 0000000c 0000000000001000 00000200"))
        #expect(
            stored(Reply.errorBytes("gone")) { Reply.error($0, cookie: 7, code: .io, message: "gone") }
                == hex("668e33ef 0001 8001 0000000000000007 0000000a 00000005 0004") + ascii("gone"))
    }

    @Test func blockStatusReply() {
        let bytes = stored(Reply.statusBytes + 2 * Reply.descriptorBytes) {
            Reply.status($0, cookie: 7, descriptors: 2)
            Reply.descriptor($0 + Reply.statusBytes, lengthBytes: 4096, isHole: true, isZero: true)
            Reply.descriptor($0 + Reply.statusBytes + 8, lengthBytes: 8192, isHole: false, isZero: false)
        }
        #expect(
            bytes == hex("668e33ef 0001 0005 0000000000000007 00000014 00000001 00001000 00000003 00002000 00000000"))
    }

    @Test func errorNumbers() {
        let values: [(NBD.ErrorCode, UInt32)] = [
            (.permission, 1), (.io, 5), (.noMemory, 12), (.invalid, 22), (.noSpace, 28), (.overflow, 75),
            (.notSupported, 95), (.shutdown, 108),
        ]
        for (code, value) in values { #expect(code.rawValue == value) }
    }
}
