// What a disk may hold: an independent account of every write, from which follows what a read, a generation or a disk after
// a loss may show. It knows nothing of layers, journals or manifests.
//
// The disk is seen as granules of 256 bytes. Each write puts bytes into a granule that tell which write it was, so a
// granule read back names the write that it shows (or zeroes, or garbage, which is always wrong).

/// The bytes that a write puts into a granule, and back.
enum Pattern {
    static let granuleBytes = 256

    static func fill(_ target: UnsafeMutableRawPointer, write: UInt32, granule: UInt32) {
        let first = UInt64(write) << 32 | UInt64(granule)
        for i in 0..<granuleBytes / 8 {
            target.storeBytes(of: word(first, i), toByteOffset: i * 8, as: UInt64.self)
        }
    }

    private static func word(_ first: UInt64, _ i: Int) -> UInt64 {
        i == 0 ? first : (first &+ UInt64(i)) &* 0x9e37_79b9_7f4a_7c15
    }

    /// The write that a granule shows: 0 for zeroes; nil: no write put these bytes here.
    static func write(_ bytes: UnsafeRawPointer, granule: UInt32) -> UInt32? {
        if granule == SuperBlockPattern.granules.lowerBound, let write = SuperBlockPattern.write(bytes) { return write }
        let first = bytes.loadUnaligned(as: UInt64.self)
        if first != 0, UInt32(truncatingIfNeeded: first) != granule { return nil }
        for i in 1..<granuleBytes / 8 {
            let expected = first == 0 ? 0 : word(first, i)
            if bytes.loadUnaligned(fromByteOffset: i * 8, as: UInt64.self) != expected { return nil }
        }
        return UInt32(first >> 32)
    }
}

/// Instants, as a sorted list of ranges that do not touch.
struct Instants {
    var ranges: [ClosedRange<UInt64>]

    static let none = Instants(ranges: [])
    init(ranges: [ClosedRange<UInt64>]) { self.ranges = ranges }
    init(_ range: ClosedRange<UInt64>) { ranges = [range] }

    /// Of ranges in any order.
    init(union all: [ClosedRange<UInt64>]) {
        ranges = []
        for range in all.sorted(by: { $0.lowerBound < $1.lowerBound }) {
            if let last = ranges.last, range.lowerBound <= last.upperBound {
                ranges[ranges.count - 1] = last.lowerBound...max(last.upperBound, range.upperBound)
            } else {
                ranges.append(range)
            }
        }
    }

    var isEmpty: Bool { ranges.isEmpty }
    var first: UInt64? { ranges.first?.lowerBound }

    func intersection(_ other: Instants) -> Instants {
        var result: [ClosedRange<UInt64>] = []
        var i = 0
        var j = 0
        while i < ranges.count, j < other.ranges.count {
            let low = max(ranges[i].lowerBound, other.ranges[j].lowerBound)
            let high = min(ranges[i].upperBound, other.ranges[j].upperBound)
            if low <= high { result.append(low...high) }
            if ranges[i].upperBound < other.ranges[j].upperBound { i += 1 } else { j += 1 }
        }
        return Instants(ranges: result)
    }
}

final class Model {
    /// A write, trim or zeroing; or what was seen at an instant, which nothing older can undo.
    private struct Write {
        var start: UInt64
        /// When it was acknowledged, or could no longer land; .max: it may still.
        var end: UInt64 = .max
        var isZero: Bool
        /// It was never acknowledged: it may have happened, or not.
        var isUncertain = false
    }

    /// By the number that its bytes carry; 0 is the empty disk.
    private var writes = [Write(start: 0, end: 0, isZero: true)]
    /// What each granule has seen, by start: numbers of writes, and of sightings, where `shows` names the write seen.
    private struct Entry {
        var start: UInt64
        /// nil: that of the write.
        var end: UInt64?
        var write: UInt32
        var isUncertain = false
    }
    private var history: [UInt32: [Entry]] = [:]
    private var sortedGranules: [UInt32]?
    /// Nobody asks about instants before it any more.
    private var forgottenTo: UInt64 = 0
    /// When those began to look who have not seen yet.
    private var looks: [UInt64] = []
    /// As the client knows it.
    var sizeBytes: UInt64

    /// Instants at which the disk was consistent, by the rule of the run.
    private var safePoints: [(start: UInt64, end: UInt64)] = [(0, 0)]
    /// Those before this place ended before `forgottenTo`.
    private var firstSafePoint = 0

    init(sizeBytes: UInt64) { self.sizeBytes = sizeBytes }

    /// Of a disk that begins at `tick` as a generation of another one, which shows `seen`. Its writes have numbers of their
    /// own: what leaks from the one to the other is told apart.
    init(forkOf other: Model, sizeBytes: UInt64, seen: [UInt32: UInt32], at tick: UInt64, firstNumber: Int) {
        self.sizeBytes = sizeBytes
        writes = other.writes
        history = other.history
        // Nothing of the other one's lands here any more.
        for number in writes.indices where writes[number].end == .max {
            writes[number].isUncertain = true
            writes[number].end = tick - 1
        }
        while writes.count < firstNumber { writes.append(Write(start: 0, end: 0, isZero: true)) }
        goneBack(to: seen, at: tick)
    }

    /// How many numbers are used up.
    var numbers: Int { writes.count }

    /// The disk is at `tick` as a generation of it, whatever came after that.
    func goneBack(to seen: [UInt32: UInt32], at tick: UInt64) {
        for granule in history.keys {
            history[granule]!.append(Entry(start: tick, end: tick, write: seen[granule] ?? 0))
        }
        addSafePoint(at: tick)
    }

    /// Granules that any write has touched, ascending.
    var touched: [UInt32] {
        if sortedGranules?.count != history.count { sortedGranules = history.keys.sorted() }
        return sortedGranules!
    }
    /// Those of a range, in no order.
    func touched(in range: Range<UInt32>) -> [UInt32] {
        range.count < history.count ? range.filter { history[$0] != nil } : history.keys.filter(range.contains)
    }

    // MARK: What happens

    /// A write over whole granules begins. Gives its number.
    func begin(_ granules: Range<UInt32>, isZero: Bool, at tick: UInt64) -> UInt32 {
        writes.append(Write(start: tick, isZero: isZero))
        let number = UInt32(writes.count - 1)
        for granule in granules { history[granule, default: []].append(Entry(start: tick, end: nil, write: number)) }
        return number
    }

    func acknowledge(_ number: UInt32, at tick: UInt64) { writes[Int(number)].end = tick }

    /// Its connection broke before it was acknowledged: from `settled` on it has happened or never will.
    func abandon(_ number: UInt32) { writes[Int(number)].isUncertain = true }
    func settle(_ number: UInt32, at tick: UInt64) { writes[Int(number)].end = tick }

    /// A safe point begins to be asked for. Gives its place, for `safePointDone`.
    func beginSafePoint(at tick: UInt64) -> Int {
        safePoints.append((tick, .max))
        return safePoints.count - 1
    }
    func endSafePoint(_ place: Int, at tick: UInt64) { safePoints[place].end = tick }
    /// It was never answered, and can't be taken up after `tick` any more.
    func settleSafePoint(_ place: Int, at tick: UInt64) {
        if safePoints[place].end == .max { safePoints[place].end = tick }
    }
    /// The disk as it is at `tick` is what a safe point left of it.
    func addSafePoint(at tick: UInt64) { safePoints.append((tick, tick)) }

    /// The whole disk was seen at `tick`: each granule shows this write, and nothing that ended before shows again.
    func observe(_ seen: [UInt32: UInt32], at tick: UInt64) {
        for (granule, write) in seen {
            let place = history.index(forKey: granule)!
            let entries = history.values[place]
            // What is all that the granule may show anyway says nothing new.
            if entries.count == 1, isCertain(entries[0]), end(entries[0]) < tick, shows(entries[0], write) { continue }
            // One that was never acknowledged may still be lost again.
            let isUncertain = entries.contains { shows($0, write) && !isCertain($0) }
            history.values[place].append(Entry(start: tick, end: tick, write: write, isUncertain: isUncertain))
        }
    }

    /// Somebody looks at the disk, and will ask what may be seen from `tick` on: nothing of that is forgotten before `endLook`.
    func beginLook(at tick: UInt64) { looks.append(tick) }
    func endLook(at tick: UInt64) { looks.remove(at: looks.firstIndex(of: tick)!) }

    /// Nobody else will ask about instants before `floor`: lets go of what shows at none from there on.
    func forget(before floor: UInt64) {
        let floor = min(floor, looks.min() ?? .max)
        guard floor > forgottenTo else { return }
        forgottenTo = floor
        while firstSafePoint < safePoints.count, safePoints[firstSafePoint].end < floor { firstSafePoint += 1 }
        for place in history.values.indices where history.values[place].count > 1 {
            let entries = history.values[place]
            // What ended before another one began that is there for sure, and has ended too, does not come back.
            let newest = entries.lazy.filter { self.isCertain($0) && self.end($0) < floor }.map(\.start).max() ?? 0
            if entries.contains(where: { end($0) < newest }) {
                history.values[place].removeAll { end($0) < newest }
            }
        }
    }

    // MARK: What is allowed

    private func end(_ entry: Entry) -> UInt64 { entry.end ?? writes[Int(entry.write)].end }
    private func isCertain(_ entry: Entry) -> Bool {
        entry.end == nil ? !writes[Int(entry.write)].isUncertain : !entry.isUncertain
    }
    private func shows(_ entry: Entry, _ value: UInt32) -> Bool {
        entry.write == value || (value == 0 && (entry.write == 0 || writes[Int(entry.write)].isZero))
    }
    private static let initial = Entry(start: 0, end: 0, write: 0)

    /// Whether a read that began at `start` and ended at `end` may show `value` in a granule.
    func mayShow(_ value: UInt32, _ granule: UInt32, from start: UInt64, to end: UInt64) -> Bool {
        let entries = history[granule] ?? []
        // Whatever ended before this was overwritten before the read began.
        var floor: UInt64 = 0
        for entry in entries where isCertain(entry) && self.end(entry) < start { floor = max(floor, entry.start) }
        if floor == 0, value == 0 { return true }
        return entries.contains { shows($0, value) && $0.start <= end && self.end($0) >= floor }
    }

    /// The instants at which a granule showed `value`, up to `last`.
    private func instants(_ value: UInt32, _ granule: UInt32, upTo last: UInt64) -> Instants {
        let entries = history[granule] ?? []
        var ranges: [ClosedRange<UInt64>] = []
        func add(_ entry: Entry) {
            guard shows(entry, value), entry.start <= last else { return }
            var until = last
            let ended = end(entry)
            for other in entries where other.start > ended && isCertain(other) {
                let end = end(other)
                if end <= until { until = end - 1 }
            }
            if entry.start <= until { ranges.append(entry.start...until) }
        }
        add(Model.initial)
        for entry in entries { add(entry) }
        return Instants(union: ranges)
    }

    /// A granule shows nothing but `value` from `floor` on.
    private func isSteady(_ value: UInt32, _ granule: UInt32, since floor: UInt64) -> Bool {
        guard let entries = history[granule] else { return value == 0 }
        return entries.count == 1 && entries[0].start <= floor && shows(entries[0], value)
    }

    /// The instants from `floor` to `last` at which the disk as a whole may have been as `seen`.
    func instants(of seen: [UInt32: UInt32], from floor: UInt64, upTo last: UInt64) -> (Instants, culprit: UInt32?) {
        precondition(floor >= forgottenTo, "instants that are forgotten")
        guard floor <= last else { return (.none, nil) }
        var all = Instants(floor...last)
        for (granule, value) in seen where !isSteady(value, granule, since: floor) {
            all = all.intersection(instants(value, granule, upTo: last))
            if all.isEmpty { return (.none, culprit(seen, from: floor, upTo: last)) }
        }
        return (all, nil)
    }

    /// The first granule, in order, that none of the instants of those before it allows.
    private func culprit(_ seen: [UInt32: UInt32], from floor: UInt64, upTo last: UInt64) -> UInt32? {
        var all = Instants(floor...last)
        for (granule, value) in seen.sorted(by: { $0.key < $1.key }) {
            all = all.intersection(instants(value, granule, upTo: last))
            if all.isEmpty { return granule }
        }
        return nil
    }

    /// The instants at which a safe point may lie, up to `last`.
    func safeInstants(upTo last: UInt64) -> Instants {
        Instants(union: safePoints[firstSafePoint...].filter { $0.start <= last }.map { $0.start...min($0.end, last) })
    }

    /// For people: what a granule may show.
    func describe(_ granule: UInt32) -> String {
        (history[granule] ?? []).suffix(12).map {
            "\($0.write)\(writes[Int($0.write)].isZero ? "z" : "")@\($0.start)-\(end($0) == .max ? "" : String(end($0)))\(isCertain($0) ? "" : "?")"
        }.joined(separator: " ")
    }
}
