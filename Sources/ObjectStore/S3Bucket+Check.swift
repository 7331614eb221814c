// Proof, at open, that the store holds the two conditions that all safety rests on, and which form of a tag it takes.
// Stores are known that ignore them (and so let two writers win), that refuse them, and that take a tag only without
// its quotes. Tried on a scratch key; the result holds for the life of the process.

import Runtime
import Synchronization

/// What the check found, by bucket.
private let foundWays = Mutex<[String: S3Bucket.Ways]>([:])

extension S3Bucket {
    /// The form of tags this store takes; makes the check when that is not known yet.
    ///
    /// - Throws: `.refused` for a store that Margarine cannot use.
    func tagForm() async throws(StoreError) -> TagForm {
        if let form = ways.withLock({ $0.tagForm }) { return form }
        let place = "\(address.endpoint?.authority ?? "amazonaws")/\(address.bucket)"
        if let known = foundWays.withLock({ $0[place] }), let form = known.tagForm {
            learn(known)
            return form
        }
        var attempt = 0
        while true {
            do throws(StoreError) {
                let found = try await checkConditions()
                learn(found)
                foundWays.withLock { $0[place] = found }
                return found.tagForm!
            } catch {
                attempt += 1
                guard [.unavailable, .unclear, .corrupt].contains(error.kind), attempt < 6, !Task.isCancelled else {
                    throw StoreError(
                        error.kind == .unclear || error.kind == .conditionFailed ? .unavailable : error.kind,
                        error.description)
                }
                await environment.sleep(ns: UInt64(50_000_000) << attempt)
            }
        }
    }

    private func learn(_ found: Ways) {
        ways.withLock {
            $0.tagForm = found.tagForm
            $0.tagsAreMD5 = found.tagsAreMD5
        }
    }

    private func checkConditions() async throws(StoreError) -> Ways {
        var found = Ways()
        let key = "probe/\(String(environment.randomBits(), radix: 16))"
        var step: UInt8 = 0
        func body() -> [UInt8] {
            step += 1
            return Array("Margarine tries this store out: \(step)".utf8)
        }
        let first = body()
        let created: ETag
        do throws(StoreError) {
            created = try await put(key, first, header: ("if-none-match", "*"))
        } catch {
            // A refusal for another reason (keys, bucket) speaks for itself.
            throw error.kind == .conditionFailed ? unusable("refuses If-None-Match for a key that is not there") : error
        }
        do throws(StoreError) {
            found.tagsAreMD5 = created.value.lowercased() == Digest.hex(Digest.md5(first))
            try await mustFail(key, body(), ("if-none-match", "*"), first, "ignores If-None-Match")
            var current = first
            var tag = created
            // A stale tag must fail in either form; the right one holds in the form that the store takes.
            let stale = ETag(String(repeating: "0", count: 31) + "1")
            var unclear: StoreError?
            for form in [TagForm.quoted, .bare] where found.tagForm == nil {
                try await mustFail(key, body(), ("if-match", form.header(stale)), current, "ignores If-Match")
                let next = body()
                do throws(StoreError) {
                    tag = try await put(key, next, header: ("if-match", form.header(tag)))
                    found.tagForm = form
                    current = next
                } catch {
                    guard error.kind == .conditionFailed || error.kind == .unclear else { throw error }
                    if error.kind == .unclear { unclear = error }
                    // An answer that was wrong or lost: what is there now says what was done.
                    let object = try await get(key, range: nil)
                    if object.bytes == next {
                        found.tagForm = form
                        current = next
                        tag = object.etag
                    }
                }
            }
            if found.tagForm == nil, let unclear { throw unclear }
            guard found.tagForm != nil else {
                throw unusable("does not hold If-Match, neither with a quoted nor a bare ETag")
            }
            let object = try await get(key, range: nil)
            guard object.bytes == current, object.etag == tag else {
                throw unusable("gave other bytes or another ETag than it had taken")
            }
        } catch {
            try? await delete([key])
            throw error
        }
        try await delete([key])
        return found
    }

    /// Puts with a condition that does not hold; the store must not do it, whatever it answers.
    private func mustFail(
        _ key: String, _ bytes: [UInt8], _ header: (String, String), _ present: [UInt8], _ offence: String
    ) async throws(StoreError) {
        do throws(StoreError) {
            _ = try await put(key, bytes, header: header)
        } catch {
            switch error.kind {
            case .conditionFailed: return
            case .unclear:  // Ceph answers 500 to some of these.
                guard try await get(key, range: nil).bytes == present else { throw unusable(offence) }
                return
            default: throw error
            }
        }
        throw unusable(offence)
    }

    private func unusable(_ offence: String) -> StoreError {
        StoreError(
            .refused, "\(name): this store \(offence), so two servers could own one disk; Margarine cannot use it")
    }
}
