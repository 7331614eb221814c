// Which sizes and names a disk can have, checked in one place.

internal import BlockCache

/// Sizes of disks in bytes.
package enum DiskSize {
    package static let minBytes = ManifestShape.sectorBytes
    /// 8 EiB less one block. NBD's lengths have 64 bits, but its clients (the kernel, qemu, libnbd) keep them in signed
    /// numbers and fail on more.
    package static let maxBytes: UInt64 = 1 << 63 - UInt64(Geometry.blockBytes)
    package static let maxReason =
        "the largest disk has \(maxBytes) bytes (8 EiB less 16 MiB), because NBD clients keep lengths in signed 64-bit numbers"

    /// Whether a stored head or record may say so: a whole number of 512-byte sectors, at least one, that the format holds.
    package static func isStorable(_ bytes: UInt64) -> Bool {
        bytes >= minBytes && bytes <= ManifestShape.maxSizeBytes && bytes % ManifestShape.sectorBytes == 0
    }

    /// Throws unless a disk can be made, or attached, with so many bytes.
    package static func check(_ bytes: UInt64) throws(CatalogError) {
        if bytes > maxBytes {
            throw CatalogError(.invalid, "a disk of \(bytes) bytes is too large: \(maxReason)")
        }
        guard isStorable(bytes) else {
            throw CatalogError(
                .invalid,
                "a disk of \(bytes) bytes is not possible: sizes are multiples of 512, from 512 to \(maxBytes)")
        }
    }
}

/// Names of disks, sessions and servers, which become parts of keys and of export names.
package enum DiskName {
    package static let maxBytes = 128

    /// `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
    package static func isValid(_ name: String) -> Bool {
        let bytes = Array(name.utf8)
        guard let first = bytes.first, bytes.count <= maxBytes else { return false }
        func isWord(_ b: UInt8) -> Bool { (48...57).contains(b) || (65...90).contains(b) || (97...122).contains(b) }
        return isWord(first) && bytes.allSatisfy { isWord($0) || $0 == 0x2e || $0 == 0x5f || $0 == 0x2d }
    }

    package static func check(_ name: String) throws(CatalogError) {
        guard isValid(name) else {
            throw CatalogError(
                .invalid,
                "'\(name.prefix(64))' cannot be the name of a disk: 1 to 128 of A-Z a-z 0-9 . _ -, beginning with a letter or digit"
            )
        }
    }
}
