// What file systems a generation holds, as far as forks have to know: which need their journal before they can be mounted, and
// which are a part only of something that spans several disks. Read from the first bytes of the disk and of its partitions;
// nothing here is trusted further than to word a note.

internal import BlockCache

/// Something to know of a fork before it is mounted.
public struct MountNote: Sendable, Codable, Equatable {
    /// `ext4`, `xfs`, `btrfs`, `lvm` or `md`.
    public var kind: String
    /// Where it begins, in bytes: 0, or where its partition does.
    public var offset: UInt64
    public var text: String
    /// What to give `mount -o`; null where the note is of something else.
    public var mountOptions: String?

    /// It says that other disks belong to this one.
    public var isOfSeveralDisks: Bool { mountOptions == nil }

    public func encode(to encoder: any Encoder) throws {
        var c = encoder.container(keyedBy: CodingKeys.self)
        try c.encode(kind, forKey: .kind)
        try c.encode(offset, forKey: .offset)
        try c.encode(text, forKey: .text)
        try c.encode(mountOptions, forKey: .mountOptions)
    }
}

/// The first bytes of a disk or partition.
struct DiskContents {
    /// How many bytes of a disk or partition tell: up to the end of a btrfs super block.
    static let lengthBytes = Int(SuperBlock.offset) + SuperBlock.lengthBytes
    static let maxPartitions = 16

    private let bytes: [UInt8]

    init(_ bytes: [UInt8]) { self.bytes = bytes }

    private func number(_ at: Int, _ count: Int) -> UInt64 {
        guard at + count <= bytes.count else { return 0 }
        return (0..<count).reduce(0) { $0 | UInt64(bytes[at + $1]) << (8 * UInt64($1)) }
    }

    private func has(_ text: String, at: Int) -> Bool {
        at + text.utf8.count <= bytes.count && bytes[at..<at + text.utf8.count].elementsEqual(text.utf8)
    }

    // MARK: File systems

    /// - Parameters:
    ///   - readOnly: nobody can write the fork, so no journal can be replayed.
    ///   - offset: where these bytes begin on the disk.
    func notes(readOnly: Bool, offset: UInt64) -> [MountNote] {
        var notes: [MountNote] = []
        func note(_ kind: String, _ text: String, _ options: String? = nil) {
            notes.append(MountNote(kind: kind, offset: offset, text: text, mountOptions: options))
        }
        if readOnly, isDirtyExt4 {
            note(
                "ext4",
                "this ext4 was mounted at that instant, and its journal can't be replayed on a read-only disk: mount it with -o ro,noload (what only the journal holds is not seen then), or fork without --read-only",
                "ro,noload")
        }
        if readOnly, has("XFSB", at: 0) {
            note(
                "xfs",
                "if this xfs was mounted at that instant, its log can't be replayed on a read-only disk: mount it with -o ro,norecovery (what only the log holds is not seen then), or fork without --read-only",
                "ro,norecovery")
        }
        if let btrfs = superBlock {
            if readOnly, btrfs.logRoot != 0 {
                note(
                    "btrfs",
                    "this btrfs ends with a log, which can't be replayed on a read-only disk: mount it with -o ro,rescue=nologreplay (what was only fsynced is not seen then), or fork without --read-only",
                    "ro,rescue=nologreplay")
            }
            if btrfs.deviceCount > 1 {
                note("btrfs", DiskContents.part("this btrfs has \(btrfs.deviceCount) devices"))
            }
        }
        if (0..<4).contains(where: { has("LABELONE", at: $0 * 512) && has("LVM2 001", at: $0 * 512 + 24) }) {
            note("lvm", DiskContents.part("this is a physical volume of LVM, whose group may have more"))
        }
        if let devices = raidDevices, devices > 1 {
            note("md", DiskContents.part("this md array has \(devices) devices"))
        }
        return notes
    }

    private static func part(_ what: String) -> String {
        "\(what): fork all of them as they are at one instant, with `margined disk fork A B … --into X Y …`"
    }

    /// An ext3 or ext4 whose journal is to be replayed (s_magic, and EXT4_FEATURE_INCOMPAT_RECOVER of s_feature_incompat).
    private var isDirtyExt4: Bool { number(1024 + 56, 2) == 0xef53 && number(1024 + 96, 4) & 4 != 0 }

    private var superBlock: SuperBlock? {
        let at = Int(SuperBlock.offset)
        guard bytes.count >= at + SuperBlock.lengthBytes else { return nil }
        return bytes.withUnsafeBytes { SuperBlock($0.baseAddress! + at) }
    }

    /// Of md's metadata 1.1 or 1.2 (kernel: struct mdp_superblock_1).
    private var raidDevices: UInt64? {
        for at in [0, 4096] where number(at, 4) == 0xa92b_4efc && number(at + 4, 4) == 1 { return number(at + 92, 4) }
        return nil
    }

    // MARK: Partitions

    /// Where partitions begin, in bytes; of a GPT, else of an MBR. At most `maxPartitions`, all below `sizeBytes`.
    func partitions(sizeBytes: UInt64) -> [UInt64] {
        var starts: [UInt64] = []
        func add(_ sector: UInt64) {
            let (start, overflow) = sector.multipliedReportingOverflow(by: 512)
            if sector > 0, !overflow, start < sizeBytes, starts.count < DiskContents.maxPartitions {
                starts.append(start)
            }
        }
        if has("EFI PART", at: 512) {
            let table = number(512 + 72, 8)
            let entryBytes = number(512 + 84, 4)
            guard table >= 2, table < 128, entryBytes >= 128, entryBytes <= 4096 else { return [] }
            for i in 0..<min(128, number(512 + 80, 4)) {
                let at = Int(table * 512 + i * entryBytes)
                if number(at, 8) != 0 || number(at + 8, 8) != 0 { add(number(at + 32, 8)) }
            }
        } else if number(510, 2) == 0xaa55 {
            for at in stride(from: 446, to: 510, by: 16) where number(at + 4, 1) != 0 { add(number(at + 8, 4)) }
        }
        return starts
    }
}
