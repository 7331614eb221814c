// What is said of forks before they are mounted, of file systems that their own tools made.

import Foundation
@testable import Margarine
import Testing

@Suite struct MountNoteTests {
    /// The first bytes of a file system that a shell command makes in `$f` (and `$g`).
    private func made(_ command: String) throws -> [UInt8] {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent("note-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(at: folder) }
        let (f, g) = (folder.appendingPathComponent("f").path, folder.appendingPathComponent("g").path)
        let status = try shell(
            "PATH=$PATH:/sbin:/usr/sbin; f=\(f); g=\(g); truncate -s 128M $f $g && (\(command)) >/dev/null 2>&1")
        try #require(status == 0, "e2fsprogs and btrfs-progs are needed")
        let handle = try #require(FileHandle(forReadingAtPath: f))
        return [UInt8](try #require(try handle.read(upToCount: DiskContents.lengthBytes)))
    }

    private func kinds(_ bytes: [UInt8], readOnly: Bool) -> [String] {
        DiskContents(bytes).notes(readOnly: readOnly, offset: 0).map { "\($0.kind) \($0.mountOptions ?? "-")" }
    }

    @Test("row 19: an ext4 that needs its journal is told, a clean one is not")
    func ext4() throws {
        let clean = try made("mkfs.ext4 -q $f")
        let dirty = try made("mkfs.ext4 -q $f && debugfs -w -R 'feature needs_recovery' $f")
        #expect(kinds(clean, readOnly: true) == [])
        #expect(kinds(dirty, readOnly: true) == ["ext4 ro,noload"])
        #expect(kinds(dirty, readOnly: false) == [])
    }

    @Test("row 19: an xfs is told, whose log can't be seen cheaply")
    func xfs() {
        let bytes = Array("XFSB".utf8) + [UInt8](repeating: 0, count: DiskContents.lengthBytes - 4)
        #expect(kinds(bytes, readOnly: true) == ["xfs ro,norecovery"])
        #expect(kinds(bytes, readOnly: false) == [])
    }

    @Test("row 19: a btrfs that ends with a log is told")
    func btrfsLog() {
        func kinds(logRoot: UInt64, readOnly: Bool) -> [String] {
            let start = [UInt8](repeating: 0, count: 65536)
            return self.kinds(start + superBlock(7, logRoot: logRoot), readOnly: readOnly)
        }
        #expect(kinds(logRoot: 1 << 20, readOnly: true) == ["btrfs ro,rescue=nologreplay"])
        #expect(kinds(logRoot: 1 << 20, readOnly: false) == [])
        #expect(kinds(logRoot: 0, readOnly: true) == [])
    }

    @Test("row 20: members of several disks are told, others are not")
    func members() throws {
        #expect(kinds(try made("mkfs.btrfs -q $f"), readOnly: false) == [])
        #expect(kinds(try made("mkfs.btrfs -q $f $g"), readOnly: false) == ["btrfs -"])
        var bytes = [UInt8](repeating: 0, count: DiskContents.lengthBytes)
        bytes.replaceSubrange(512..<520, with: Array("LABELONE".utf8))
        bytes.replaceSubrange(536..<544, with: Array("LVM2 001".utf8))
        #expect(kinds(bytes, readOnly: false) == ["lvm -"])
        bytes = [UInt8](repeating: 0, count: DiskContents.lengthBytes)
        bytes.replaceSubrange(4096..<4104, with: [0xfc, 0x4e, 0x2b, 0xa9, 1, 0, 0, 0])
        #expect(kinds(bytes, readOnly: false) == [])
        bytes[4096 + 92] = 1
        #expect(kinds(bytes, readOnly: false) == [])
        bytes[4096 + 92] = 2
        #expect(kinds(bytes, readOnly: false) == ["md -"])
    }

    /// The first sectors of a disk with partitions that begin at these sectors (UEFI specification, 5.2 and 5.3).
    private func partitionTable(_ kind: String, _ sectors: [UInt32]) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 65536)
        func put(_ value: UInt32, _ at: Int) {
            for i in 0..<4 { bytes[at + i] = UInt8(value >> (8 * UInt32(i)) & 255) }
        }
        bytes[510] = 0x55
        bytes[511] = 0xaa
        if kind == "mbr" {
            for (i, sector) in sectors.enumerated() {
                bytes[446 + 16 * i + 4] = 0x83
                put(sector, 446 + 16 * i + 8)
            }
            return bytes
        }
        bytes[446 + 4] = 0xee
        put(1, 446 + 8)
        bytes.replaceSubrange(512..<520, with: Array("EFI PART".utf8))
        put(2, 512 + 72)
        put(128, 512 + 80)
        put(128, 512 + 84)
        for (i, sector) in sectors.enumerated() {
            bytes[1024 + 128 * i] = 0xaf
            put(sector, 1024 + 128 * i + 32)
        }
        return bytes
    }

    @Test("row 19: partitions are looked into", arguments: ["gpt", "mbr"])
    func partitions(_ kind: String) async throws {
        let ext4 = try made("mkfs.ext4 -q $f && debugfs -w -R 'feature needs_recovery' $f")
        let bytes = partitionTable(kind, [2048, 34816])
        #expect(DiskContents(bytes).partitions(sizeBytes: 128 << 20) == [1 << 20, 17 << 20])
        #expect(DiskContents(bytes).partitions(sizeBytes: 2 << 20) == [1 << 20])
        #expect(DiskContents(Array(bytes.prefix(700))).partitions(sizeBytes: 128 << 20).count <= 2)
        let bed = try DiskBed()
        try await bed.create(size: 128 << 20)
        let client = try await bed.attach()
        try await client.write(bytes, at: 0)
        try await client.write(ext4, at: 17 << 20)
        await client.leave(clean: true)
        try await bed.waitForGeneration(1)
        let catalog = Catalog(try await Store.open(bucket: bed.store, environment: bed.environment)) { _ in .outOfSight
        }
        _ = try await catalog.fork("d", as: "look", readOnly: true)
        _ = try await catalog.fork("d", as: "work")
        let notes = try await catalog.mountNotes("look")
        #expect(notes.map(\.kind) == ["ext4"] && notes.map(\.offset) == [17 << 20])
        #expect(try await catalog.mountNotes("work") == [])
    }
}
