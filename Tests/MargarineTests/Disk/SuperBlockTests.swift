// Super blocks as mkfs.btrfs writes them, of every checksum kind, and the safe points that follow from them.

import Foundation
@testable import Margarine
import Testing

@Suite struct SuperBlockTests {
    /// The first 128 KiB of a file system made by mkfs.btrfs.
    private func image(_ checksum: String) throws -> [UInt8] {
        let path = FileManager.default.temporaryDirectory.appendingPathComponent("sb-\(UUID().uuidString)").path
        defer { try? FileManager.default.removeItem(atPath: path) }
        let status = try shell("truncate -s 128M \(path) && mkfs.btrfs -q --csum \(checksum) \(path) >/dev/null 2>&1")
        try #require(status == 0, "mkfs.btrfs (btrfs-progs) is needed")
        let handle = try #require(FileHandle(forReadingAtPath: path))
        return [UInt8](try #require(try handle.read(upToCount: 128 << 10)))
    }

    @Test(arguments: ["crc32c", "xxhash", "sha256", "blake2"])
    func everyChecksumKindIsKnown(_ kind: String) throws {
        let bytes = try image(kind)
        let found = bytes.withUnsafeBytes { SuperBlock($0.baseAddress! + 65536) }
        #expect(found != nil)
        #expect((found?.generation ?? 0) > 0)
        for at in [0, 31, 0x20, 0x30, 0x40, 0x48, 0xc4, 4095] {
            var damaged = Array(bytes[65536..<65536 + 4096])
            damaged[at] ^= 4
            // Bytes of the checksum field beyond a short checksum mean nothing.
            if at == 31, kind == "crc32c" || kind == "xxhash" { continue }
            #expect(damaged.withUnsafeBytes { SuperBlock($0.baseAddress!) } == nil, "byte \(at) flipped")
        }
    }

    @Test func aSuperBlockAfterAFlushIsASafePointAndOtherFlushesAreNot() async throws {
        let super1 = Array(try image("crc32c")[65536..<65536 + 4096])
        let bed = try DiskBed()
        try await bed.create {
            $0.safePoints = .btrfs; $0.resumeWindowMs = 0
        }
        var client = try await bed.attach("d?session=1")
        try await client.write(pattern(4096, 1), at: 1 << 20)
        try await client.flush()
        try await client.write(super1, at: 65536)
        try await bed.waitForGeneration(1)
        // This flush makes no safe point.
        try await client.write(pattern(4096, 2), at: 1 << 20)
        try await client.flush()
        await client.leave(clean: false)
        client = try await bed.attach("d?session=2")
        #expect(try await client.read(4096, at: 1 << 20) == pattern(4096, 1))
        // After a flush, the same super block again is one (it is how a log commit looks).
        try await client.write(pattern(4096, 3), at: 1 << 20)
        try await client.flush()
        try await client.write(super1, at: 65536)
        try await client.write(pattern(4096, 4), at: 1 << 20)
        await client.leave(clean: false)
        client = try await bed.attach("d?session=3")
        #expect(try await client.read(4096, at: 1 << 20) == pattern(4096, 3))
    }
}
