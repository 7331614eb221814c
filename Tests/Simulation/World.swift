// One simulated world: time, chance, and the order in which everything happens. One thread runs it; the loops of all
// servers and clients have none of their own. A run is a function of its seed.

import Runtime

/// A small generator of good quality (xoshiro256**).
struct Chance: RandomNumberGenerator {
    private var s: (UInt64, UInt64, UInt64, UInt64)

    init(seed: UInt64) {
        var x = seed
        func next() -> UInt64 {
            x &+= 0x9e37_79b9_7f4a_7c15
            var z = x
            z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
            z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
            return z ^ (z >> 31)
        }
        s = (next(), next(), next(), next())
    }

    mutating func next() -> UInt64 {
        func rotated(_ x: UInt64, _ k: UInt64) -> UInt64 { x << k | x >> (64 - k) }
        let result = rotated(s.1 &* 5, 7) &* 9
        let t = s.1 << 17
        s.2 ^= s.0
        s.3 ^= s.1
        s.1 ^= s.2
        s.0 ^= s.3
        s.2 ^= t
        s.3 = rotated(s.3, 45)
        return result
    }

    mutating func below(_ bound: Int) -> Int { Int.random(in: 0..<bound, using: &self) }
    /// True once in `n`.
    mutating func one(in n: Int) -> Bool { below(n) == 0 }
    mutating func ns(_ range: ClosedRange<UInt64>) -> UInt64 { UInt64.random(in: range, using: &self) }
}

/// In some worlds whatever a server waits for takes longer now and then: each step of a task after an `await`, each timer and
/// sleep, each worker and each call on a scratch disk. Then others come between which mostly do not.
struct Widening {
    /// One in so many.
    var oneIn: Int
    var mostNs: UInt64

    /// None in half of the worlds.
    static func random(_ chance: inout Chance) -> Widening? {
        guard chance.one(in: 2) else { return nil }
        return Widening(
            oneIn: [4, 16, 64, 256].randomElement(using: &chance)!,
            mostNs: [3_000_000, 200_000_000, 3_000_000_000].randomElement(using: &chance)!)
    }
}

/// What a rule of the model found broken.
struct Violation: Error, Codable, CustomStringConvertible {
    var description: String
}

final class World: @unchecked Sendable {  // one thread runs it
    private struct Event {
        var atNs: UInt64
        var number: UInt64
        var work: () -> Void
    }

    let seed: UInt64
    var chance: Chance
    /// World time in nanoseconds. Servers have clocks of their own.
    private(set) var nowNs: UInt64 = 1_000_000_000
    /// Counts what happens, for the model: an order of instants finer than time.
    private(set) var tick: UInt64 = 1
    private(set) var steps: UInt64 = 0
    /// Of everything that happened, in order.
    private(set) var hash: UInt64 = 0xcbf2_9ce4_8422_2325
    private(set) var violation: Violation?
    var isTracing = false
    private(set) lazy var network = SimNetwork(self)
    /// How often something takes longer than it mostly does: see `delay`.
    var widening: Widening?

    private var events: [Event] = []
    private var eventCount: UInt64 = 0
    /// The loops that have something to do: of one step.
    private var ready: [Loop] = []
    private var clocks: [Clock] = []
    /// What is left of a dead machine may still ask them for the time.
    private var stopped: [Clock] = []

    /// The loops that share one clock: those of one machine.
    final class Clock: @unchecked Sendable {  // as its world
        unowned let world: World
        let name: String
        /// Parts in a thousand by which this clock runs faster than the world.
        let rate: UInt64
        let startNs: UInt64
        let baseNs: UInt64
        var loops: [Loop] = []
        /// Its loops take no step, while time goes on: as after SIGSTOP.
        var isStopped = false
        /// How long it has been suspended, but for the suspension at hand.
        private var suspendedNs: UInt64 = 0
        private var suspendedSinceNs: UInt64?

        fileprivate init(world: World, name: String, rate: UInt64, baseNs: UInt64) {
            self.world = world
            self.name = name
            self.rate = rate
            self.baseNs = baseNs
            startNs = world.nowNs
        }

        /// As CLOCK_MONOTONIC: it stands while the machine is suspended.
        var nowNs: UInt64 { baseNs + ((suspendedSinceNs ?? world.nowNs) - suspendedNs - startNs) * rate / 1000 }
        /// As CLOCK_BOOTTIME: it goes on.
        var bootNs: UInt64 { baseNs + (world.nowNs - startNs) * rate / 1000 }
        /// The world's time at which this clock shows `ns`.
        func worldNs(_ ns: UInt64) -> UInt64 {
            suspendedNs + startNs + (ns <= baseNs ? 0 : (ns - baseNs) * 1000 / rate + 1)
        }

        /// The machine goes to sleep, and wakes up.
        func suspend() {
            isStopped = true
            suspendedSinceNs = suspendedSinceNs ?? world.nowNs
        }
        func goOn() {
            isStopped = false
            if let since = suspendedSinceNs { suspendedNs += world.nowNs - since }
            suspendedSinceNs = nil
        }

        /// With `isWidened`, the steps of its tasks are held back as the world's `widening` says: so is whatever follows an
        /// `await`.
        func makeLoop(_ name: String, isWidened: Bool = false) -> Loop {
            let loop = Loop(name: name, clock: { [unowned self] in nowNs })
            loops.append(loop)
            if isWidened, world.widening != nil {
                loop.takesAway = { [unowned world] comeBack in
                    let ns = world.delay()
                    if ns == 0 { return false }
                    world.after(ns, comeBack)
                    return true
                }
            }
            return loop
        }
    }

    init(seed: UInt64) {
        self.seed = seed
        chance = Chance(seed: seed)
    }

    func makeClock(_ name: String, rate: UInt64 = 1000) -> Clock {
        let clock = Clock(world: self, name: name, rate: rate, baseNs: chance.ns(1...1 << 40))
        clocks.append(clock)
        return clock
    }

    /// The machine takes no step any more.
    func stop(_ clock: Clock) {
        clocks.removeAll { $0 === clock }
        stopped.append(clock)
    }

    // MARK: What happens

    func nextTick() -> UInt64 {
        tick += 1
        return tick
    }

    /// Makes `text` part of the run's trace.
    func note(_ text: @autoclosure () -> String) {
        let line = text()
        for byte in line.utf8 { mix(UInt64(byte)) }
        if isTracing { print("\(nowNs / 1000) us, step \(steps): \(line)") }
    }

    private func mix(_ value: UInt64) { hash = (hash ^ value) &* 0x100_0000_01b3 }

    /// The first one ends the run.
    func violate(_ text: String) {
        if violation == nil { violation = Violation(description: text) }
        note("VIOLATION: \(text)")
    }

    /// How much longer than usual something takes: mostly 0, else of any order of magnitude.
    func delay() -> UInt64 {
        guard let widening, chance.one(in: widening.oneIn) else { return 0 }
        return chance.ns(1...widening.mostNs) >> UInt64(chance.below(16))
    }

    // MARK: Order

    /// Runs `work` after `ns` nanoseconds of world time.
    func after(_ ns: UInt64, _ work: @escaping () -> Void) {
        eventCount += 1
        push(Event(atNs: nowNs + ns, number: eventCount, work: work))
    }

    func sleep(_ ns: UInt64) async {
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            after(ns) { continuation.resume() }
        }
    }

    /// One step of one loop, one event, or the passing of time. false: nothing will ever happen again.
    func step() -> Bool {
        ready.removeAll(keepingCapacity: true)
        for clock in clocks where !clock.isStopped {
            for loop in clock.loops where loop.isReady { ready.append(loop) }
        }
        let isDue = events.first.map { $0.atNs <= nowNs } ?? false
        if ready.isEmpty, !isDue { return passTime() }
        steps += 1
        let choice = chance.below(ready.count + (isDue ? 1 : 0))
        mix(UInt64(choice))
        if choice == ready.count {
            pop().work()
        } else {
            ready[choice].step(timersFirst: chance.one(in: 4), messagesFirst: chance.one(in: 2))
        }
        return true
    }

    private func passTime() -> Bool {
        if network.exchange() { return true }
        var next = events.first?.atNs ?? .max
        for clock in clocks where !clock.isStopped {
            for loop in clock.loops {
                if let deadline = loop.nextDeadlineNs { next = min(next, clock.worldNs(deadline)) }
            }
        }
        if next == .max { return false }
        nowNs = max(nowNs + 1, next)
        mix(nowNs)
        return true
    }

    // A binary heap, soonest first.

    private func isBefore(_ a: Int, _ b: Int) -> Bool {
        (events[a].atNs, events[a].number) < (events[b].atNs, events[b].number)
    }

    private func push(_ event: Event) {
        events.append(event)
        var i = events.count - 1
        while i > 0, isBefore(i, (i - 1) / 2) {
            events.swapAt(i, (i - 1) / 2)
            i = (i - 1) / 2
        }
    }

    private func pop() -> Event {
        events.swapAt(0, events.count - 1)
        let event = events.removeLast()
        var i = 0
        while true {
            var least = i
            for child in [2 * i + 1, 2 * i + 2] where child < events.count && isBefore(child, least) { least = child }
            if least == i { return event }
            events.swapAt(i, least)
            i = least
        }
    }
}
