// Reading one object straight from where the manifest says, saying what is wrong with it, and putting a valid copy in its
// place where there is one: at another location, or among the block files of a daemon.
//
// Always holds: nothing is put that was not verified whole, every checksum of it and against all that names it.

import BlockCache
import ObjectStore
import Runtime

struct Repair: Sendable {
    let store: Store
    /// The scratch disk of a daemon.
    let copies: (any ScratchDisk)?
    let isOn: Bool

    struct Outcome: Sendable {
        var problem: CheckProblem?
        /// Of a page: what it says, read or repaired.
        var page: ManifestPage?
        var readBytes: UInt64 = 0
    }

    /// What is there, and not what other locations have in its place.
    private func bucket(_ location: UInt8) -> (any Bucket)? { store.locations[location]?.alone }

    private func read(_ key: String, at location: UInt8) async throws(ObjectTrouble) -> [UInt8] {
        guard let bucket = bucket(location) else {
            throw ObjectTrouble(.unreachable, "location \(location) is not configured")
        }
        do throws(StoreError) {
            return try await bucket.get(key, range: nil).bytes
        } catch {
            switch error.kind {
            case .notFound: throw ObjectTrouble(.missing, "is missing")
            case .corrupt: throw ObjectTrouble(.corrupt, error.description)
            default: throw ObjectTrouble(.unreachable, error.description)
            }
        }
    }

    // MARK: Pages

    func page(_ place: PagePlace) async -> Outcome {
        var outcome = Outcome()
        var trouble: ObjectTrouble
        do throws(ObjectTrouble) {
            outcome.page = try await readPage(place)
            return outcome
        } catch {
            trouble = error
        }
        // Damaged under way, perhaps, or looked at an instant too early.
        do throws(ObjectTrouble) {
            outcome.page = try await readPage(place)
            return outcome
        } catch {
            trouble = error
        }
        let key = place.ref.id.manifestKey
        var problem = trouble.problem(location: place.ref.location, key: key)
        if isOn {
            for location in others(than: place.ref.location) {
                var there = place
                there.ref.location = location
                guard let bytes = try? await read(key, at: location),
                    let page = try? Self.decode(bytes, there), await put(key, bytes, at: place.ref.location)
                else { continue }
                outcome.page = page
                problem.isRepaired = true
                problem.text += "; put back from location \(location)"
                break
            }
        }
        outcome.problem = problem
        return outcome
    }

    func readPage(_ place: PagePlace) async throws(ObjectTrouble) -> ManifestPage {
        try Self.decode(try await read(place.ref.id.manifestKey, at: place.ref.location), place)
    }

    private static func decode(_ bytes: [UInt8], _ place: PagePlace) throws(ObjectTrouble) -> ManifestPage {
        if let own = ManifestPage.ownID(bytes), own != place.ref.id {
            throw ObjectTrouble(.swapped, "holds manifest page \(own)")
        }
        if bytes.count < Int(place.ref.lengthBytes) {
            throw ObjectTrouble(.truncated, "has \(bytes.count) bytes, not \(place.ref.lengthBytes)")
        }
        do throws(StoreError) {
            let page = try ManifestPage.decode(bytes, id: place.ref.id)
            try page.check(place.ref, level: place.level, index: place.index)
            guard bytes.count == Int(place.ref.lengthBytes) else {
                throw StoreError(
                    .corrupt, "manifest page \(place.ref.id) has \(bytes.count) bytes, not \(place.ref.lengthBytes)")
            }
            return page
        } catch {
            throw ObjectTrouble(.corrupt, error.description)
        }
    }

    // MARK: Blocks

    /// Reads a block object whole and holds it against `parts`.
    func block(_ id: ObjectID, at location: UInt8, _ parts: [NamedPart]) async -> Outcome {
        var outcome = Outcome()
        var trouble: ObjectTrouble
        do throws(ObjectTrouble) {
            outcome.readBytes = UInt64(try await readBlock(id, at: location, parts).count)
            return outcome
        } catch {
            trouble = error
        }
        do throws(ObjectTrouble) {
            outcome.readBytes = UInt64(try await readBlock(id, at: location, parts).count)
            return outcome
        } catch {
            trouble = error
        }
        var problem = trouble.problem(location: location, key: id.blockKey)
        if isOn, let (bytes, source) = await validCopy(of: id, at: location, parts) {
            outcome.readBytes = UInt64(bytes.count)
            if await put(id.blockKey, bytes, at: location) {
                problem.isRepaired = true
                problem.text += "; put back from \(source)"
            }
        }
        outcome.problem = problem
        return outcome
    }

    private func readBlock(
        _ id: ObjectID, at location: UInt8, _ parts: [NamedPart]
    ) async throws(ObjectTrouble) -> [UInt8] {
        let bytes = try await read(id.blockKey, at: location)
        if let fault = await store.environment.offload({ checkObject(bytes, id: id, parts: parts) }) {
            throw ObjectTrouble(fault)
        }
        return bytes
    }

    private func validCopy(
        of id: ObjectID, at location: UInt8, _ parts: [NamedPart]
    ) async -> (bytes: [UInt8], source: String)? {
        for other in others(than: location) {
            if let bytes = try? await readBlock(id, at: other, parts) { return (bytes, "location \(other)") }
        }
        guard let copies, let file = try? copies.open("blocks/\(id)", create: false),
            file.sizeBytes <= UInt64(Self.maxObjectBytes),
            let bytes = try? await file.read(count: Int(file.sizeBytes), at: 0)
        else { return nil }
        let fault = await store.environment.offload { checkObject(bytes, id: id, parts: parts) }
        return fault == nil ? (bytes, "the scratch directory") : nil
    }

    /// Longer than any block object.
    private static let maxObjectBytes = 64 << 20

    // MARK: Putting back

    private func others(than location: UInt8) -> [UInt8] {
        store.locations.nearFirst.map(\.number).filter { $0 != location }
    }

    private func put(_ key: String, _ bytes: [UInt8], at location: UInt8) async -> Bool {
        guard let bucket = bucket(location) else { return false }
        do throws(StoreError) {
            _ = try await bucket.put(key, bytes, if: .none)
            return try await bucket.get(key, range: nil).bytes == bytes
        } catch {
            return false
        }
    }
}

/// Why an object can't be had.
struct ObjectTrouble: Error {
    var kind: CheckProblem.Kind
    var text: String
    init(_ kind: CheckProblem.Kind, _ text: String) {
        self.kind = kind
        self.text = text
    }
    init(_ fault: ObjectFault) {
        switch fault.kind {
        case .corrupt: kind = .corrupt
        case .truncated: kind = .truncated
        case .swapped: kind = .swapped
        }
        text = fault.text
    }

    func problem(location: UInt8, key: String) -> CheckProblem {
        CheckProblem(kind, location: Int(location), key: key, text)
    }
}
