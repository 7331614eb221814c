// Super blocks as btrfs would write them, with a checksum of our own.

/// CRC-32C, bit by bit.
private func crc32c(_ bytes: ArraySlice<UInt8>) -> UInt32 {
    var sum = UInt32.max
    for byte in bytes {
        sum ^= UInt32(byte)
        for _ in 0..<8 { sum = sum & 1 == 1 ? sum >> 1 ^ 0x82f6_3b78 : sum >> 1 }
    }
    return ~sum
}

/// The 4,096 bytes of a super block that lies at byte `offset` of a device of `deviceBytes`.
func superBlock(
    _ generation: UInt64, at offset: UInt64 = 65536, logRoot: UInt64 = 0, deviceBytes: UInt64 = 1 << 40,
    devices: UInt64 = 1
) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: 4096)
    func put(_ value: UInt64, _ at: Int) {
        for i in 0..<8 { bytes[at + i] = UInt8(truncatingIfNeeded: value >> (8 * UInt64(i))) }
    }
    put(offset, 0x30)
    bytes.replaceSubrange(0x40..<0x48, with: Array("_BHRfS_M".utf8))
    put(generation, 0x48)
    put(logRoot, 0x60)
    put(devices, 0x88)
    put(deviceBytes, 0xd1)
    put(UInt64(crc32c(bytes[0x20...])), 0)
    return bytes
}
