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
            _ = budget.wait(32, slow, granted: record.note("slow \(number)"))
        }
        #expect(record.all == ["slow 0"], "one at a time exceeds his share")
        #expect(budget.isContended)
        #expect(budget.take(1, budget.open("slow")))
        #expect(budget.take(32, budget.open("other")))
    }

    @Test func theOldestMayExceedHisShareOneAtATime() {
        let budget = RequestBudget(bytes: 100) {}
        let record = Record()
        let accounts = (0..<3).map { _ in budget.open("a") }
        _ = budget.wait(80, accounts[0], granted: record.note("a"))
        _ = budget.wait(80, accounts[1], granted: record.note("b"))
        _ = budget.wait(3, accounts[2], granted: record.note("c"))
        #expect(record.all == ["a", "c"], "that fits its share")
        budget.give(40, accounts[0])
        #expect(record.all == ["a", "c"])
        budget.give(40, accounts[0])
        #expect(record.all == ["a", "c", "b"])
        #expect(budget.availableBytes == 100 - 3 - 80)
    }

    @Test func theExceptionTakesNothingFromOthers() {
        let budget = RequestBudget(bytes: 100) {}
        let record = Record()
        let accounts = (0..<3).map { budget.open("\($0)") }
        #expect(budget.take(20, accounts[0]))
        _ = budget.wait(90, accounts[1], granted: record.note("large"))
        #expect(record.all == ["large"])
        #expect(budget.availableBytes == -10)
        #expect(budget.take(20, accounts[2]))
        _ = budget.wait(1, accounts[1], granted: record.note("more of it"))
        #expect(record.all == ["large"], "what he has counts for him")
        budget.give(90, accounts[1])
        #expect(record.all == ["large", "more of it"])
        for (account, bytes) in [(accounts[0], 20), (accounts[1], 1), (accounts[2], 20)] { budget.give(bytes, account) }
        #expect(budget.availableBytes == 100)
    }

    @Test func theExceptionIsForTheWholeOfARequest() {
        let budget = RequestBudget(bytes: 100) {}
        let record = Record()
        let (first, second) = (budget.open("a"), budget.open("b"))
        _ = budget.wait(60, later: 50, first, granted: record.note("beginning"))
        _ = budget.wait(80, second, granted: record.note("other"))
        #expect(record.all == ["beginning"])
        _ = budget.wait(50, first, granted: record.note("rest"))
        #expect(record.all == ["beginning", "rest"])
        // Not for another request as well.
        _ = budget.wait(50, first, granted: record.note("next"))
        #expect(record.all == ["beginning", "rest"])
        budget.give(110, first)
        #expect(record.all == ["beginning", "rest", "other"])
    }

    /// They were all served before one from elsewhere, and each that stalled was cut when it had held the exception for ten
    /// seconds.
    @Test func addressesTakeTurnsAtTheException() {
        let budget = RequestBudget(bytes: 100) {}
        let record = Record()
        let slow = (0..<4).map { _ in budget.open("slow") }
        for (number, account) in slow.enumerated() {
            _ = budget.wait(80, account, granted: record.note("slow \(number)"))
        }
        let other = budget.open("other")
        _ = budget.wait(80, other, granted: record.note("other"))
        budget.give(80, slow[0])
        #expect(record.all == ["slow 0", "other"])
        budget.give(80, other)
        _ = budget.wait(80, other, granted: record.note("other again"))
        budget.give(80, slow[1])
        #expect(record.all == ["slow 0", "other", "slow 1", "other again"])
        // One that has just come was not passed over yet.
        _ = budget.wait(80, budget.open("new"), granted: record.note("new"))
        budget.give(80, other)
        budget.give(80, slow[2])
        #expect(record.all == ["slow 0", "other", "slow 1", "other again", "slow 2", "new"])
    }

    /// What arrived of their requests is kept for them, and that was all the memory there was: nobody was ever served again.
    @Test func whatThoseHoldWhoWaitIsInNobodysWay() {
        let budget = RequestBudget(bytes: 100) {}
        let record = Record()
        let accounts = (0..<20).map { budget.open("\($0 % 3)") }
        for (number, account) in accounts.enumerated() {
            budget.force(10, account)
            _ = budget.wait(20, account, granted: record.note("\(number)"))
        }
        for _ in 0..<20 {
            guard let last = record.all.last.flatMap({ Int($0) }) else { break }
            budget.give(30, accounts[last])
        }
        #expect(record.all.count == 20)
        #expect(budget.availableBytes == 100)
    }

    @Test func leavingTheLineLetsTheNextOneIn() {
        let budget = RequestBudget(bytes: 100) {}
        let record = Record()
        let accounts = (0..<4).map { budget.open("\($0)") }
        budget.force(100, accounts[0])
        let first = budget.wait(90, accounts[1], granted: record.note("a"))
        let second = budget.wait(90, accounts[2], granted: record.note("b"))
        _ = budget.wait(50, accounts[3], granted: record.note("c"))
        #expect(record.all == ["a"])
        #expect(!budget.cancel(first))
        #expect(budget.cancel(second))
        budget.give(90, accounts[1])
        #expect(record.all == ["a", "c"])
        #expect(!budget.cancel(second))
    }

    @Test func contentionIsToldOnceForEachLine() {
        let count = Mutex(0)
        let budget = RequestBudget(bytes: 10) { count.withLock { $0 += 1 } }
        let accounts = (0..<4).map { budget.open("\($0)") }
        budget.force(10, accounts[0])
        _ = budget.wait(5, accounts[1], granted: {})
        #expect(count.withLock { $0 } == 0, "it does not wait")
        _ = budget.wait(5, accounts[2], granted: {})
        _ = budget.wait(5, accounts[3], granted: {})
        #expect(count.withLock { $0 } == 1)
        budget.give(10, accounts[0])
        budget.give(5, accounts[1])
        budget.give(5, accounts[2])
        budget.give(5, accounts[3])
        #expect(!budget.isContended)
        budget.force(10, accounts[0])
        _ = budget.wait(5, accounts[1], granted: {})
        _ = budget.wait(5, accounts[2], granted: {})
        #expect(count.withLock { $0 } == 2)
    }

    /// A client of the model: asks for what a request needs, holds it, gives it back.
    private final class Model: @unchecked Sendable {  // used by one thread
        let account: RequestBudget.Account
        var held = 0
        let granted = Mutex(0)
        var waitsFor = 0
        /// The rest of a payload, which it asks for when it has the beginning.
        var later = 0
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
                } else if client.held > 0, client.later == 0 {
                    budget.give(client.held, client.account)
                    client.held = 0
                    served += 1
                } else {
                    let isRest = client.held > 0
                    let bytes = isRest ? client.later : Int.random(in: 1...16, using: &random)
                    client.later = isRest || Bool.random(using: &random) ? 0 : Int.random(in: 1...16, using: &random)
                    if budget.take(bytes, client.account) {
                        client.held += bytes
                    } else {
                        client.waitsFor = bytes
                        _ = budget.wait(bytes, later: client.later, client.account) { [client] in
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
