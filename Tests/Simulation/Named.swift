// What the store names, object by object, kept by a stranger who sees every put and delete: nothing that is named may be
// missing, and in the end nothing else may be left.

import BlockCache
import ObjectStore
import Runtime

@testable import Margarine

final class Named: @unchecked Sendable {  // as its world
    private let observer: Observer
    /// What each head and record names, by location and key.
    private var roots: [String: PageRef] = [:]
    /// How many heads and records name an object.
    private var counts: [String: Int] = [:]
    /// Blocks and pages that are there.
    private var present: Set<String> = []
    /// What lies under a root, itself included. Roots never change.
    private var under: [ObjectID: [String]] = [:]

    init(_ observer: Observer) { self.observer = observer }

    private static func isObject(_ key: String) -> Bool { key.hasPrefix("blocks/") || key.hasPrefix("manifests/") }

    /// Something was stored. A text when it names what is not there.
    func put(_ location: Int, _ key: String, _ record: GenerationRecord?) -> Violation? {
        let place = "\(location)/\(key)"
        if Named.isObject(key) {
            present.insert(place)
            return nil
        }
        let old = roots[place]
        roots[place] = record?.root
        var missing: Violation?
        if let record, record.root != nil, record.root != old {
            switch objects(of: record) {
            case .failure(let violation): missing = violation
            case .success(let objects):
                for object in objects {
                    counts[object, default: 0] += 1
                    if !present.contains(object), missing == nil {
                        missing = Violation(description: "\(place) names \(object), which is not there")
                    }
                }
            }
        }
        if old != record?.root { drop(old) }
        return missing
    }

    /// Somebody reads a generation: until `release` it counts as named, as long as `isHeld`.
    func hold(_ who: String, _ record: GenerationRecord, isHeld: @escaping () -> Bool) -> Violation? {
        holds[who] = isHeld
        return put(0, who, record)
    }
    func release(_ who: String) {
        holds[who] = nil
        drop(roots.removeValue(forKey: "0/\(who)"))
    }
    private var holds: [String: () -> Bool] = [:]

    private func drop(_ root: PageRef?) {
        guard let root else { return }
        for object in under[root.id]! {
            counts[object]! -= 1
            if counts[object] == 0 { counts[object] = nil }
        }
    }

    /// Something was deleted. A text when it is still named.
    func deleted(_ location: Int, _ key: String) -> Violation? {
        let place = "\(location)/\(key)"
        if Named.isObject(key) {
            present.remove(place)
            if counts[place] == nil { return nil }
            for who in holds.filter({ !$0.value() }).keys.sorted() { release(who) }
            if counts[place] == nil { return nil }
            let who = roots.filter { under[$0.value.id]!.contains(place) }.map(\.key).sorted()
            return Violation(description: "\(place) was deleted, and \(who.joined(separator: ", ")) name it")
        }
        drop(roots.removeValue(forKey: place))
        return nil
    }

    private func objects(of record: GenerationRecord) -> Result<[String], Violation> {
        if let known = under[record.root!.id] { return .success(known) }
        let found = observer.objects(of: record)
        if case .success(let objects) = found { under[record.root!.id] = objects }
        return found
    }

    /// What is there and not named, sorted. A copy of what is named at another location is no garbage.
    var garbage: [String] {
        func key(_ place: String) -> Substring { place[place.firstIndex(of: "/")!...] }
        let named = Set(counts.keys.map(key))
        return present.filter { !named.contains(key($0)) }.sorted()
    }
    var objectCount: Int { present.count }
}
