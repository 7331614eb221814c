import Synchronization
import Testing

@testable import Margarine

@Suite struct RequestBudgetTests {
    /// Who was granted, in order; `!` after an overdraft.
    final class Record: Sendable {
        private let names = Mutex<[String]>([])
        func note(_ name: String) -> @Sendable (Bool) -> Void {
            { isOverdraft in self.names.withLock { $0.append(isOverdraft ? name + "!" : name) } }
        }
        var all: [String] { names.withLock { $0 } }
    }

    @Test func takesOnlyWhatIsThere() {
        let budget = RequestBudget(bytes: 100) {}
        #expect(budget.take(60))
        #expect(!budget.take(41))
        #expect(budget.take(40))
        budget.give(100)
        #expect(budget.availableBytes == 100)
    }

    @Test func thoseWhoWaitAreServedInOrder() {
        let budget = RequestBudget(bytes: 100) {}
        let record = Record()
        #expect(budget.take(100))
        _ = budget.wait(80, finishing: false, granted: record.note("a"))
        _ = budget.wait(10, finishing: false, granted: record.note("b"))
        budget.give(50)
        #expect(record.all == [], "b is small enough, but a came first")
        budget.give(30)
        #expect(record.all == ["a"])
        budget.give(20)
        #expect(record.all == ["a", "b"])
        #expect(budget.availableBytes == 10)
    }

    @Test func nobodyOvertakesTheLine() {
        let budget = RequestBudget(bytes: 100) {}
        #expect(budget.take(90))
        _ = budget.wait(50, finishing: false, granted: { _ in })
        #expect(budget.isContended)
        #expect(!budget.take(5))
        budget.give(90)
        #expect(!budget.isContended)
        #expect(budget.take(5))
    }

    @Test func payloadsUnderWayComeFirstAndOneMayOverdraw() {
        let budget = RequestBudget(bytes: 100) {}
        let record = Record()
        #expect(budget.take(100))
        _ = budget.wait(10, finishing: false, granted: record.note("new"))
        _ = budget.wait(70, finishing: true, granted: record.note("one"))
        _ = budget.wait(70, finishing: true, granted: record.note("two"))
        #expect(record.all == ["one!"])
        #expect(budget.availableBytes == -70)
        // The first one's payload is done; its memory comes back with what it held before.
        budget.give(100, endsOverdraft: true)
        #expect(record.all == ["one!", "two!"])
        #expect(budget.availableBytes == -40)
        budget.give(70, endsOverdraft: true)
        #expect(record.all == ["one!", "two!", "new"])
        #expect(budget.availableBytes == 20)
    }

    @Test func leavingTheLineLetsTheNextOneIn() {
        let budget = RequestBudget(bytes: 100) {}
        let record = Record()
        #expect(budget.take(50))
        let first = budget.wait(90, finishing: false, granted: record.note("a"))
        _ = budget.wait(50, finishing: false, granted: record.note("b"))
        #expect(budget.cancel(first))
        #expect(record.all == ["b"])
        #expect(!budget.cancel(first))
    }

    @Test func contentionIsToldOnceForEachLine() {
        let count = Mutex(0)
        let budget = RequestBudget(bytes: 10) { count.withLock { $0 += 1 } }
        #expect(budget.take(10))
        _ = budget.wait(5, finishing: false, granted: { _ in })
        _ = budget.wait(5, finishing: false, granted: { _ in })
        #expect(count.withLock { $0 } == 1)
        budget.give(10)
        budget.give(10)
        #expect(budget.take(10))
        _ = budget.wait(5, finishing: false, granted: { _ in })
        #expect(count.withLock { $0 } == 2)
    }
}
