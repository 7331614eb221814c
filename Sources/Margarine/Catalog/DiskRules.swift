// Which sizes and names a disk can have, checked in one place.

/// Sizes of disks in bytes.
package enum DiskSize {
    package static let minBytes = ManifestShape.sectorBytes
    /// 16 EiB less one block.
    package static let maxBytes = ManifestShape.maxSizeBytes

    /// A whole number of 512-byte sectors, at least one, at most `maxBytes`.
    package static func isValid(_ bytes: UInt64) -> Bool {
        bytes >= minBytes && bytes <= maxBytes && bytes % ManifestShape.sectorBytes == 0
    }

    /// Reads a size as people write it (see `ByteSize`); `16E`, one more than 64 bits hold, means the largest there is.
    package static func parse(_ text: String) throws(CatalogError) -> UInt64 {
        if ["16E", "16EIB"].contains(text.uppercased()) { return maxBytes }
        let bytes: UInt64
        do throws(QuantityError) {
            bytes = try ByteSize.parse(text)
        } catch {
            throw CatalogError(.invalid, error.description)
        }
        try check(bytes)
        return bytes
    }

    package static func check(_ bytes: UInt64) throws(CatalogError) {
        guard isValid(bytes) else {
            throw CatalogError(
                .invalid,
                "a disk of \(bytes) bytes cannot be: sizes are multiples of 512, from 512 to \(maxBytes) (16E)")
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
