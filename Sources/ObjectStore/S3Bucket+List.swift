// ListObjectsV2. Pages are asked for by the last key seen, not by the server's tokens, so that `after` may be any key.

extension S3Bucket {
    public func list(prefix: String, after: String?, folders: Bool, limit: Int) async throws(StoreError) -> Listing {
        try checkListing(prefix: prefix, limit: limit)
        var page = S3Page(prefix: prefix, after: after)
        var token: String?
        // A server may give an empty page that is not the last one; then its token is all there is to go on with.
        repeat {
            var query = [
                ("list-type", "2"), ("prefix", address.prefix + prefix), ("max-keys", "\(limit)"),
                ("encoding-type", "url"),
            ]
            if folders { query.append(("delimiter", "/")) }
            if let token {
                query.append(("continuation-token", token))
            } else if let after {
                query.append(("start-after", address.prefix + after))
            }
            let response = try await send("GET", nil, query: query)
            guard response.status == 200 else { throw failure(response, "list", prefix) }
            do throws(S3Page.Malformed) {
                token = try page.add(response.body, storePrefix: address.prefix)
            } catch {
                throw StoreError(.corrupt, "\(name): a listing of '\(prefix)' is not understood: \(error.reason)")
            }
        } while page.isEmpty && token != nil
        var listing = Listing(items: page.items, folders: page.folders, next: nil)
        if token != nil {
            let lastFolder = page.folders.last.map(endOfFolder)
            switch (page.items.last?.key, lastFolder) {
            case (let key?, let folder?): listing.next = comesBefore(key, folder) ? folder : key
            case (let key?, nil): listing.next = key
            case (nil, let folder): listing.next = folder
            }
        }
        return listing
    }
}

/// A page of a listing as the server gives it, checked.
struct S3Page {
    struct Malformed: Error {
        var reason: String
    }
    let prefix: String
    let after: String?
    private(set) var items: [Listing.Item] = []
    private(set) var folders: [String] = []
    var isEmpty: Bool { items.isEmpty && folders.isEmpty }

    init(prefix: String, after: String?) {
        self.prefix = prefix
        self.after = after
    }

    /// Takes the answer in, and returns the token of the next page if there is one.
    mutating func add(_ body: [UInt8], storePrefix: String) throws(Malformed) -> String? {
        guard let result = XMLElement.parse(body), result.name == "ListBucketResult" else {
            throw Malformed(reason: "it is no ListBucketResult")
        }
        let isEncoded = result.child("EncodingType")?.text == "url"
        for element in result.children {
            switch element.name {
            case "Contents":
                guard let key = try key(element.child("Key"), isEncoded, storePrefix),
                    let length = (element.child("Size")?.text).flatMap({ UInt64($0) })
                else { throw Malformed(reason: "an entry has no key or size") }
                guard let modified = (element.child("LastModified")?.text).flatMap(millisecondsSince1970) else {
                    throw Malformed(reason: "an entry has no time")
                }
                // What is not ours may lie there (a console makes `folder/`), but has no key in our sense.
                guard isValidKey(key) else { continue }
                try check(key, follows: items.last?.key)
                items.append(Listing.Item(key: key, lengthBytes: length, modifiedMs: modified))
            case "CommonPrefixes":
                guard let folder = try key(element.child("Prefix"), isEncoded, storePrefix), folder.hasSuffix("/")
                else {
                    throw Malformed(reason: "a folder has no name")
                }
                guard isValidKey(folder.dropLast()) else { continue }
                // It may lie before `after` when some of its keys do not.
                try check(folder, follows: folders.last, mayHold: after)
                folders.append(folder)
            default: continue
            }
        }
        guard let isTruncated = result.child("IsTruncated")?.text else {
            throw Malformed(reason: "it does not say whether there is more")
        }
        if isTruncated != "true" { return nil }
        guard let token = result.child("NextContinuationToken")?.text, !token.isEmpty else {
            throw Malformed(reason: "there is more, but no way to ask for it")
        }
        return token
    }

    private func key(_ element: XMLElement?, _ isEncoded: Bool, _ storePrefix: String) throws(Malformed) -> String? {
        guard let text = element?.text, let key = isEncoded ? percentDecoded(text, plusIsSpace: true) : text else {
            return nil
        }
        guard key.utf8.starts(with: storePrefix.utf8) else {
            throw Malformed(reason: "it has keys that were not asked for")
        }
        return String(key.utf8.dropFirst(storePrefix.utf8.count))
    }

    private func check(_ key: String, follows last: String?, mayHold after: String? = nil) throws(Malformed) {
        guard key.utf8.starts(with: prefix.utf8) else { throw Malformed(reason: "it has keys that were not asked for") }
        if let last, !comesBefore(last, key) { throw Malformed(reason: "its keys are not in byte order") }
        if let bound = self.after, !comesBefore(bound, key), after?.utf8.starts(with: key.utf8) != true {
            throw Malformed(reason: "it begins before the key it was to follow")
        }
    }
}

/// A time as listings have it, `2026-01-31T23:59:58.123Z`, in milliseconds; nil when it is none.
func millisecondsSince1970(_ text: String) -> Int64? {
    let form = Array("0000-00-00T00:00:00".utf8)
    let bytes = Array(text.utf8)
    guard bytes.count > form.count, bytes.last == UInt8(ascii: "Z") else { return nil }
    for (byte, model) in zip(bytes, form)
    where model == UInt8(ascii: "0") ? !(UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte) : byte != model {
        return nil
    }
    func number(_ range: Range<Int>) -> Int64 { bytes[range].reduce(0) { $0 * 10 + Int64($1 - UInt8(ascii: "0")) } }
    var ms: Int64 = 0
    let fraction = bytes[form.count..<bytes.count - 1]
    if !fraction.isEmpty {
        let digits = fraction.dropFirst()
        guard fraction.first == UInt8(ascii: "."), !digits.isEmpty, digits.allSatisfy({ $0 >= 48 && $0 <= 57 }) else {
            return nil
        }
        ms = (Array(digits) + [48, 48, 48]).prefix(3).reduce(0) { $0 * 10 + Int64($1 - 48) }
    }
    let (year, month, day) = (number(0..<4), number(5..<7), number(8..<10))
    guard (1970...9999).contains(year), (1...12).contains(month), (1...31).contains(day) else { return nil }
    // Days from a calendar whose years begin in March.
    let y = month <= 2 ? year - 1 : year
    let era = y / 400
    let dayOfYear = (153 * (month + (month > 2 ? -3 : 9)) + 2) / 5 + day - 1
    let dayOfEra = (y - era * 400) * 365 + (y - era * 400) / 4 - (y - era * 400) / 100 + dayOfYear
    let days = era * 146_097 + dayOfEra - 719_468
    return ((days * 24 + number(11..<13)) * 60 + number(14..<16)) * 60_000 + number(17..<19) * 1000 + ms
}
