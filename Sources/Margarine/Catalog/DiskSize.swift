// Sizes and names of disks as people give them, checked in one place.

/// Sizes of disks in bytes.
package enum DiskSize {
    package static let minBytes = ManifestShape.sectorBytes
    /// 16 EiB less one block.
    package static let maxBytes = ManifestShape.maxSizeBytes

    /// A whole number of 512-byte sectors, at least one, at most `maxBytes`.
    package static func isValid(_ bytes: UInt64) -> Bool {
        bytes >= minBytes && bytes <= maxBytes && bytes % ManifestShape.sectorBytes == 0
    }

    /// Reads `10G`, `512M`, `1.5T`, `4096`, `16E` (units of 1024; an `i` and `B` behind the letter are allowed). `16E`
    /// means the largest disk there is, `maxBytes`.
    package static func parse(_ text: String) throws(CatalogError) -> UInt64 {
        let units = "KMGTPE"
        var number = Substring(text)
        var shift: UInt64 = 0
        if number.uppercased().hasSuffix("B") { number.removeLast() }
        if number.hasSuffix("i") { number.removeLast() }
        if let last = number.last, let place = Array(units).firstIndex(of: Character(last.uppercased())) {
            shift = 10 * UInt64(place + 1)
            number.removeLast()
        }
        let parts = number.split(separator: ".", maxSplits: 1, omittingEmptySubsequences: false)
        let isNumber = parts.allSatisfy { !$0.isEmpty && $0.utf8.allSatisfy { $0 >= 48 && $0 <= 57 } }
        guard isNumber, let whole = parts.first.flatMap({ UInt64($0) }), parts.count == 1 || (shift > 0 && parts[1].count <= 6)
        else { throw CatalogError(.invalid, "'\(text)' is no size; write one like 10G, 512M or 4096") }
        // 16E itself is one more than 64 bits hold.
        if shift == 60, whole == 16, parts.count == 1 { return maxBytes }
        var bytes = whole.multipliedReportingOverflow(by: 1 << shift)
        if parts.count == 2 {
            var denominator: UInt64 = 1
            for _ in parts[1].utf8 { denominator *= 10 }
            let unit = UInt64(1) << shift
            let product = UInt64(parts[1])!.multipliedFullWidth(by: unit)
            let fraction = denominator.dividingFullWidth(product).quotient
            let sum = bytes.partialValue.addingReportingOverflow(fraction / 512 * 512)
            bytes = (sum.partialValue, bytes.overflow || sum.overflow)
        }
        guard !bytes.overflow, isValid(bytes.partialValue) else {
            throw CatalogError(
                .invalid, "a disk of '\(text)' cannot be: sizes are multiples of 512 bytes, from 512 to \(maxBytes) (16E)")
        }
        return bytes.partialValue
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
                "'\(name.prefix(64))' cannot be the name of a disk: 1 to 128 of A-Z a-z 0-9 . _ -, beginning with a letter or digit")
        }
    }
}
