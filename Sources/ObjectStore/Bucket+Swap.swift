// The one way to replace a small mutable object (a head): a compare-and-swap whose unclear answers are settled by
// reading back. Between an unclear answer and the read, the write may still be on its way: it is lost for sure only
// once the object under the key is one that its condition does not allow, and until then it is sent again.

/// How a `swap` ended.
public enum SwapOutcome: Sendable {
    /// The bytes are stored under this tag.
    case won(ETag)
    /// Another object is there, or none; ours will never be.
    case lost(StoredObject?)
}

extension Bucket {
    /// Replaces the object under `key` by `bytes` if `condition` holds, and says who is there when it does not.
    ///
    /// `bytes` must hold a nonce: the same bytes found under the key are taken for ours. When they took effect and
    /// were replaced by another writer before this could see it, the outcome is `.lost` with that writer's object.
    ///
    /// - Throws: `.unclear` only when reading back fails, or when the answers stay unclear; every other kind means
    ///   that nothing was written.
    public func swap(_ key: String, _ bytes: [UInt8], if condition: PutCondition) async throws(StoreError)
        -> SwapOutcome
    {
        precondition(condition != .none, "a swap without a condition is a put")
        var sentBefore = false
        var lastError = StoreError(.unclear, "\(name): '\(key)' was not tried")
        for _ in 0..<5 {
            do throws(StoreError) {
                return .won(try await put(key, bytes, if: condition))
            } catch {
                lastError = error
                switch error.kind {
                case .unclear: sentBefore = true
                case .conditionFailed: break
                default:
                    // Nothing was written by this attempt, but one before it may be on its way.
                    if !sentBefore { throw error }
                }
            }
            switch try await standing(of: bytes, under: key, condition, after: lastError) {
            case .settled(let outcome): return outcome
            // A conflict that was none (S3 answers 409 to concurrent writers), or a write that got lost: again.
            case .conditionStillHolds: continue
            }
        }
        throw StoreError(.unclear, "\(name): the swap of '\(key)' stays unclear: \(lastError.description)")
    }

    private func standing(
        of bytes: [UInt8], under key: String, _ condition: PutCondition, after error: StoreError
    ) async throws(StoreError) -> Standing {
        do throws(StoreError) {
            let current = try await get(key, range: nil)
            if current.bytes == bytes { return .settled(.won(current.etag)) }
            if case .matches(current.etag) = condition { return .conditionStillHolds }
            return .settled(.lost(current))
        } catch {
            if error.kind == .notFound {
                return condition == .absent ? .conditionStillHolds : .settled(.lost(nil))
            }
            throw StoreError(
                .unclear, "\(name): whether '\(key)' was swapped cannot be read back: \(error.description)")
        }
    }
}

/// What reading back shows about a conditional put.
private enum Standing {
    case settled(SwapOutcome)
    case conditionStillHolds
}
