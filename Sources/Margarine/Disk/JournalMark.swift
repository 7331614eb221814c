// The mark of an attachment, `journal/<disk>/attached`: since which start of the machine the journal was written, and how
// much of it is known to be synced. It is written at each attach and after each sync, and never synced itself: what it says
// stays true, and one that a loss of power took away or tore says that there was one. That the disk was attached at all is
// known from `journal/<disk>/owned`, an empty file that is durable before the head names this server.
//
//   a slot, 96 bytes, at 0 and at 512; the valid one with the larger count counts
//    0  magic "MRGNJMK1"              40  XXH3 of the kernel's boot id
//    8  disk id, high and low         48  sequence number up to which records are synced
//   24  count                         56  1: a sync has failed since the attach; else 0
//   32  epoch                         64  zero;  88  XXH3 of bytes 0..<88

internal import BlockCache
internal import CLibraries
internal import Runtime

struct JournalMark: Equatable {
    var count: UInt64 = 0
    var epoch: UInt64
    var boot: UInt64
    var synced: UInt64
    var hasSyncFailed = false

    static let magic: UInt64 = 0x314b_4d4a_4e47_524d  // "MRGNJMK1", little-endian
    static let slotBytes = 96
    /// A sector each: a torn write leaves one of them whole.
    static let slotStride = 512
    static let fileBytes = slotStride + slotBytes

    static let name = "attached"
    static func path(_ folder: String) -> String { folder + "/" + name }

    static func bootSum(_ bootID: String) -> UInt64 {
        let bytes = Array(bootID.utf8)
        return mg_xxh3(bytes, bytes.count, 0)
    }

    /// Where the slot of this count lies.
    var offset: Int { count % 2 == 0 ? 0 : JournalMark.slotStride }

    func put(_ out: UnsafeMutableRawPointer, of disk: ObjectID) {
        let words = [
            JournalMark.magic, disk.high, disk.low, count, epoch, boot, synced, hasSyncFailed ? 1 : 0, 0, 0, 0,
        ]
        for (i, w) in words.enumerated() { out.storeBytes(of: w.littleEndian, toByteOffset: i * 8, as: UInt64.self) }
        out.storeBytes(of: mg_xxh3(out, 88, 0).littleEndian, toByteOffset: 88, as: UInt64.self)
    }

    /// The slot at `p`, if it is one of this disk.
    static func slot(_ p: UnsafeRawPointer, of disk: ObjectID) -> JournalMark? {
        func word(_ i: Int) -> UInt64 { UInt64(littleEndian: p.loadUnaligned(fromByteOffset: i * 8, as: UInt64.self)) }
        guard word(11) == mg_xxh3(p, 88, 0), word(0) == magic, word(1) == disk.high, word(2) == disk.low,
            word(3) < UInt64.max, word(6) < ControlObject.countLimit, word(7) <= 1
        else { return nil }
        return JournalMark(count: word(3), epoch: word(4), boot: word(5), synced: word(6), hasSyncFailed: word(7) == 1)
    }

    /// What is found of a mark.
    enum Found: Equatable {
        case none
        /// Of a version that left it empty.
        case old
        case unreadable
        case mark(JournalMark)
    }

    static func find(in folder: String, of disk: ObjectID, _ scratch: any ScratchDisk) async throws(ScratchError)
        -> Found
    {
        let file: any ScratchFile
        do { file = try scratch.open(path(folder), create: false) } catch {
            if error.errno == 2 /* ENOENT */ { return .none }
            throw error
        }
        let size = Int(min(file.sizeBytes, UInt64(fileBytes)))
        if size == 0 { return .old }
        let bytes = try await file.read(count: size, at: 0)
        let slots = bytes.withUnsafeBytes { p in
            [0, slotStride].compactMap { $0 + slotBytes <= size ? slot(p.baseAddress! + $0, of: disk) : nil }
        }
        return slots.max { $0.count < $1.count }.map { .mark($0) } ?? .unreadable
    }
}

/// What is known of a journal before it is read.
struct JournalPast {
    var trust: JournalTrust
    /// Everything acknowledged is there: sessions may go on.
    var survives: Bool
    /// Records up to here had been synced.
    var synced: UInt64 = 0
    /// What was read may be in the page cache only, though a later sync would succeed.
    var mustRewrite = false

    /// Judges the journal in `folder`, which this server has owned since it was written.
    static func find(in folder: String, of disk: ObjectID, bootID: String, _ scratch: any ScratchDisk)
        async throws(ScratchError) -> JournalPast
    {
        switch try await JournalMark.find(in: folder, of: disk, scratch) {
        case .mark(let mark):
            let isSameBoot = mark.boot == JournalMark.bootSum(bootID)
            return JournalPast(
                trust: isSameBoot ? .kept : .lost, survives: isSameBoot, synced: mark.synced,
                mustRewrite: isSameBoot && mark.hasSyncFailed)
        case .unreadable:
            return JournalPast(trust: .lost, survives: false)
        case .none, .old:
            // Earlier versions noted the boot for all disks in one file. A folder with nothing at all has lost the mark of
            // its attachment, at whatever start.
            let names = try scratch.list(folder)
            let isOfEarlierVersion = !names.isEmpty && !names.contains(Journal.ownedName)
            return JournalPast(
                trust: .lost, survives: isOfEarlierVersion ? try await notedBoot(scratch) == bootID : false)
        }
    }

    private static func notedBoot(_ scratch: any ScratchDisk) async throws(ScratchError) -> String? {
        guard try scratch.list("").contains("boot-id") else { return nil }
        let file = try scratch.open("boot-id", create: false)
        let bytes = try await file.read(count: Int(min(file.sizeBytes, 256)), at: 0)
        return String(decoding: bytes.prefix { $0 != 10 }, as: UTF8.self)
    }
}
