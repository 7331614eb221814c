import Synchronization
import Testing

@testable import Margarine

@Suite struct RequestBudgetTests {
    /// Who was granted, in order.
    final class Record: Sendable {
        private let names = Mutex<[String]>([])
        func note(_ name: String) -> @Sendable () -> Void {
            { self.names.withLock { $0.append(name) } }
        }
        var all: [String] { names.withLock { $0 } }
    }

    @Test func aConnectionTakesHalfOfWhatItsGroupMayTakeAndAGroupHalfOfWhatIsFree() {
        let budget = RequestBudget(bytes: 128) {}
        let one = budget.open("a")
        #expect(!budget.take(33, one))
        #expect(budget.take(32, one))
        #expect(!budget.take(1, one))
        let two = budget.open("a")
        #expect(!budget.take(17, two))
        #expect(budget.take(16, two))
        let other = budget.open("b")
        #expect(budget.take(20, other))
        for (account, bytes) in [(one, 32), (two, 16), (other, 20)] { budget.give(bytes, account) }
        #expect(budget.availableBytes == 128)
        #expect(budget.take(32, two))
    }

    /// With the line of before, the seventeenth and everybody behind it waited for the others' clients.
    @Test("row 31: whoever takes all he can get leaves something for the next, of his own address and of others")
    func greedyClientsWaitForThemselves() {
        let budget = RequestBudget(bytes: 512) {}
        let record = Record()
        for number in 0..<20 {
            let slow = budget.open("slow")
            while budget.take(32, slow) {}
            _ = budget.wait(32, slow, finishing: false, granted: record.note("slow \(number)"))
        }
        #expect(record.all == ["slow 0"], "one at a time exceeds his share")
        #expect(budget.isContended)
        #expect(budget.take(1, budget.open("slow")))
        #expect(budget.take(32, budget.open("other")))
    }

    @Test("row 31: half-sent writes wait for themselves")
    func halfSentWritesWaitForThemselves() {
        let budget = RequestBudget(bytes: 512) {}
        let record = Record()
        for number in 0..<20 {
            let slow = budget.open("slow")
            #expect(budget.take(1, slow))
            _ = budget.wait(31, slow, finishing: true, granted: record.note("\(number)"))
        }
        #expect(record.all.count < 10)
        #expect(budget.take(1, budget.open("slow")))
        #expect(budget.take(32, budget.open("other")))
    }

    @Test func theOldestMayExceedHisShareOneAtATime() {
        let budget = RequestBudget(bytes: 100) {}
        let record = Record()
        let accounts = (0..<3).map { _ in budget.open("a") }
        _ = budget.wait(80, accounts[0], finishing: false, granted: record.note("a"))
        _ = budget.wait(80, accounts[1], finishing: false, granted: record.note("b"))
        _ = budget.wait(3, accounts[2], finishing: false, granted: record.note("c"))
        #expect(record.all == ["a", "c"], "that fits its share")
        budget.give(40, accounts[0])
        #expect(record.all == ["a", "c"])
        budget.give(40, accounts[0])
        #expect(record.all == ["a", "c", "b"])
        #expect(budget.availableBytes == 100 - 3 - 80)
    }

    @Test func whatTheOldestWaitsForIsNotTakenByThoseWhoHoldSomething() {
        let budget = RequestBudget(bytes: 1000) {}
        let record = Record()
        let holder = budget.open("a")
        #expect(budget.take(100, holder))
        _ = budget.wait(950, budget.open("b"), finishing: false, granted: record.note("large"))
        #expect(!budget.take(1, holder))
        #expect(budget.take(1, budget.open("a")), "who holds nothing is served")
        budget.give(100, holder)
        #expect(record.all == ["large"])
    }

    @Test func ofPayloadsUnderWayOneMayOverdraw() {
        let budget = RequestBudget(bytes: 100) {}
        let record = Record()
        let accounts = (0..<3).map { budget.open("\($0)") }
        budget.force(100, accounts[0])
        _ = budget.wait(10, accounts[0], finishing: false, granted: record.note("new"))
        _ = budget.wait(70, accounts[1], finishing: true, granted: record.note("one"))
        _ = budget.wait(70, accounts[2], finishing: true, granted: record.note("two"))
        #expect(record.all == ["one"])
        #expect(budget.availableBytes == -70)
        // The first one's payload is done.
        budget.give(70, accounts[1])
        #expect(record.all == ["one", "two"])
        budget.give(70, accounts[2])
        budget.give(100, accounts[0])
        #expect(record.all == ["one", "two", "new"])
        #expect(budget.availableBytes == 90)
    }

    /// Found by the simulator: he had the one exception and could not have the other, and nobody else's end helped him.
    @Test func whoExceedsHisShareMayOverdrawToFinish() {
        let budget = RequestBudget(bytes: 100) {}
        let record = Record()
        let (large, other) = (budget.open("a"), budget.open("b"))
        _ = budget.wait(80, large, finishing: false, granted: record.note("begins"))
        _ = budget.wait(80, other, finishing: false, granted: record.note("other"))
        _ = budget.wait(50, large, finishing: true, granted: record.note("ends"))
        #expect(record.all == ["begins", "ends"])
        budget.give(130, large)
        #expect(record.all == ["begins", "ends", "other"])
        budget.give(80, other)
        #expect(budget.availableBytes == 100)
    }

    @Test func leavingTheLineLetsTheNextOneIn() {
        let budget = RequestBudget(bytes: 100) {}
        let record = Record()
        let accounts = (0..<3).map { budget.open("\($0)") }
        budget.force(50, accounts[0])
        let first = budget.wait(90, accounts[1], finishing: false, granted: record.note("a"))
        _ = budget.wait(50, accounts[2], finishing: false, granted: record.note("b"))
        #expect(budget.cancel(first))
        #expect(record.all == ["b"])
        #expect(!budget.cancel(first))
    }

    @Test func contentionIsToldOnceForEachLine() {
        let count = Mutex(0)
        let budget = RequestBudget(bytes: 10) { count.withLock { $0 += 1 } }
        let accounts = (0..<3).map { budget.open("\($0)") }
        budget.force(10, accounts[0])
        _ = budget.wait(5, accounts[1], finishing: false, granted: {})
        _ = budget.wait(5, accounts[2], finishing: false, granted: {})
        #expect(count.withLock { $0 } == 1)
        budget.give(10, accounts[0])
        budget.give(5, accounts[1])
        budget.give(5, accounts[2])
        #expect(!budget.isContended)
        budget.force(10, accounts[0])
        _ = budget.wait(5, accounts[1], finishing: false, granted: {})
        #expect(count.withLock { $0 } == 2)
    }

    /// A client of the model: asks for what a request needs, holds it, gives it back.
    private final class Model: @unchecked Sendable {  // used by one thread
        let account: RequestBudget.Account
        var held = 0
        /// A payload that is being received: bytes still to be granted.
        var rest = 0
        let granted = Mutex(0)
        var waitsFor = 0
        init(_ account: RequestBudget.Account) { self.account = account }
    }

    /// Whatever they ask for and in whatever order they finish: somebody can always go on, and in the end all is there again.
    @Test func whoeverHoldsMemoryFinishesAndEverybodyIsServed() {
        for seed in 0..<200 {
            var random = SeededRandom(UInt64(seed))
            let budget = RequestBudget(bytes: 64) {}
            let clients = (0..<8).map { Model(budget.open("\($0 % 3)")) }
            var served = 0
            var turns = 0
            while served < 200 {
                turns += 1
                guard turns < 100_000 else {
                    Issue.record("seed \(seed): nobody goes on, \(served) served")
                    break
                }
                let client = clients[Int.random(in: 0..<8, using: &random)]
                if client.waitsFor > 0 {
                    guard client.granted.withLock({ $0 }) > 0 else { continue }
                    client.granted.withLock { $0 = 0 }
                    client.held += client.waitsFor
                    client.waitsFor = 0
                    client.rest = 0
                } else if client.rest > 0 {
                    let step = min(4, client.rest)
                    if budget.take(step, client.account) {
                        client.held += step
                        client.rest -= step
                    } else {
                        client.waitsFor = client.rest
                        _ = budget.wait(client.rest, client.account, finishing: true) { [client] in
                            client.granted.withLock { $0 = 1 }
                        }
                    }
                } else if client.held > 0 {
                    budget.give(client.held, client.account)
                    client.held = 0
                    served += 1
                } else {
                    let bytes = Int.random(in: 1...32, using: &random)
                    let first = Bool.random(using: &random) ? bytes : 1
                    if budget.take(first, client.account) {
                        client.held = first
                        client.rest = bytes - first
                    } else {
                        client.waitsFor = first
                        _ = budget.wait(first, client.account, finishing: false) { [client] in
                            client.granted.withLock { $0 = 1 }
                        }
                    }
                }
                #expect(budget.availableBytes >= -32)
            }
            if turns >= 100_000 { break }
        }
    }
}
