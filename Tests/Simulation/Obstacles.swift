// What is in the way of single calls between one machine and the store, while all others go through: one kind of key, or one
// disk's, hangs, is refused, or is slow.

import ObjectStore
import Runtime

@testable import Margarine

/// What an object is, by its key.
enum KeyKind: CaseIterable {
    case head, record, page, block, server

    init?(_ key: String) {
        if key.hasPrefix("disks/") {
            self = key.contains("/generations/") ? .record : .head
        } else if key.hasPrefix("manifests/") {
            self = .page
        } else if key.hasPrefix("blocks/") {
            self = .block
        } else if key.hasPrefix("servers/") {
            self = .server
        } else {
            return nil
        }
    }
}

struct Obstacle {
    enum Effect {
        /// Nothing comes back before the obstacle has gone: the call itself waits, or its answer.
        case hang(inFront: Bool)
        /// 403.
        case refuse
        /// 503.
        case unavailable
        /// No answer in the time that a caller has: what was sent has taken effect, or not.
        case timeOut
        /// It takes up to so long, each way.
        case slow(UInt64)
    }

    /// nil: every key.
    var kind: KeyKind?
    /// Only what is this disk's; nil: of any.
    var disk: String?
    /// nil: reads and writes.
    var writes: Bool?
    var effect: Effect
    var untilNs: UInt64

    func meets(_ key: String, isWrite: Bool, nowNs: UInt64) -> Bool {
        if nowNs >= untilNs || (writes ?? isWrite) != isWrite { return false }
        if let kind, KeyKind(key) != kind { return false }
        return disk.map { key.hasPrefix("disks/\($0)/") || !key.hasPrefix("disks/") } ?? true
    }

    /// Of any kind, for up to `longestNs`.
    static func random(_ world: World, disk: String, longestNs: UInt64 = 40_000_000_000) -> Obstacle {
        let effects: [Effect] = [
            .hang(inFront: true), .hang(inFront: false), .refuse, .unavailable, .timeOut, .slow(100_000_000),
            .slow(4_000_000_000),
        ]
        let kind: KeyKind? = world.chance.one(in: 8) ? nil : KeyKind.allCases.randomElement(using: &world.chance)!
        return Obstacle(
            kind: kind, disk: world.chance.one(in: 2) ? disk : nil,
            writes: [nil, true, false].randomElement(using: &world.chance)!,
            effect: effects.randomElement(using: &world.chance)!,
            untilNs: world.nowNs + (world.chance.ns(10_000_000...longestNs) >> UInt64(world.chance.below(8))))
    }
}

/// Those of one machine, whatever server runs there.
final class Obstacles: @unchecked Sendable {  // as its world
    private let world: World
    private var all: [Obstacle] = []

    init(_ world: World) { self.world = world }

    func add(_ obstacle: Obstacle) {
        all.removeAll { $0.untilNs <= world.nowNs }
        all.append(obstacle)
        world.note("in the way: \(obstacle)")
    }

    func removeAll() { all = [] }

    func first(_ key: String, isWrite: Bool) -> Obstacle? {
        all.first { $0.meets(key, isWrite: isWrite, nowNs: world.nowNs) }
    }

    /// Waits until the obstacle has gone; it may be taken out of the way before its time.
    func wait(_ obstacle: Obstacle) async {
        while !all.isEmpty, world.nowNs < obstacle.untilNs {
            await world.sleep(min(obstacle.untilNs - world.nowNs, 1_000_000_000))
        }
    }
}
