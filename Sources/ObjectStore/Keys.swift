// What a key may look like. Every bucket holds its callers to this, so that what works on one store works on all:
// a key is a path on a directory store and a URL on S3, and reads the same in both.

/// Longest key in bytes: S3 allows 1,024 with the store's prefix.
let maxKeyLengthBytes = 768
/// Longest component of a key in bytes: file systems allow 255.
let maxComponentLengthBytes = 255
/// Most keys in one page of a listing.
let maxListingLimit = 1000

/// Whether `key` is made of one or more non-empty components of `[A-Za-z0-9._-]`, none of which begins with a dot.
func isValidKey(_ key: some StringProtocol) -> Bool {
    var componentLength = 0
    var total = 0
    for byte in key.utf8 {
        total += 1
        switch byte {
        case UInt8(ascii: "/"):
            if componentLength == 0 { return false }
            componentLength = 0
        case UInt8(ascii: "."):
            if componentLength == 0 { return false }
            componentLength += 1
        case UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "a")...UInt8(ascii: "z"),
            UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "_"), UInt8(ascii: "-"):
            componentLength += 1
        default: return false
        }
        if componentLength > maxComponentLengthBytes || total > maxKeyLengthBytes { return false }
    }
    return componentLength > 0
}

func checkKey(_ key: String) throws(StoreError) {
    guard isValidKey(key) else { throw StoreError(.refused, "'\(key)' cannot be a key of an object") }
}

func checkListing(prefix: String, limit: Int) throws(StoreError) {
    guard limit >= 1, limit <= maxListingLimit else {
        throw StoreError(.refused, "a page of a listing holds 1 to \(maxListingLimit) keys, not \(limit)")
    }
    // The beginning of a key, cut anywhere.
    guard prefix.isEmpty || isValidKey(prefix + "x") else {
        throw StoreError(.refused, "'\(prefix)' cannot be the beginning of a key")
    }
}

/// Whether `a` comes before `b` in byte order, which is the order of listings.
func comesBefore(_ a: String, _ b: String) -> Bool {
    a.utf8.lexicographicallyPrecedes(b.utf8)
}

/// Where the next page begins after a folder: behind every key in it.
func endOfFolder(_ folder: String) -> String { folder + "\u{10FFFF}" }

extension Range<UInt64> {
    /// The part of the range that lies in an object of `length` bytes.
    func within(_ length: UInt64) -> Range<UInt64> { clamped(to: 0..<length) }
}
