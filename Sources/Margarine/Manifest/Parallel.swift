// Many calls on a store at once, within a bound. Child tasks run where their parent's executor is; the bodies touch
// nothing but what they are given.

/// Runs `body` for every item, at most `limit` at a time, and gives the results in the order of the items. The first error
/// ends it: items not begun are not begun.
func inParallel<Item: Sendable, Result: Sendable, Failure: Error>(
    _ items: [Item], limit: Int, _ body: @escaping @Sendable (Item) async throws(Failure) -> Result
) async throws(Failure) -> [Result] {
    typealias Outcome = Swift.Result<Result, Failure>
    @Sendable func run(_ item: Item) async -> Outcome {
        do throws(Failure) { return .success(try await body(item)) } catch { return .failure(error) }
    }
    // In two steps: Swift 6.3 with -O loses what stands before an `await` in some tuples.
    @Sendable func numbered(_ index: Int) async -> (Int, Outcome) {
        let outcome = await run(items[index])
        return (index, outcome)
    }
    if items.count == 1 { return [try await body(items[0])] }
    var results: [Result?] = Array(repeating: nil, count: items.count)
    let failure: Failure? = await withTaskGroup(of: (Int, Outcome).self) { group in
        var begun = 0
        var failure: Failure?
        while begun < min(limit, items.count) {
            let index = begun
            group.addTask { await numbered(index) }
            begun += 1
        }
        for await (index, outcome) in group {
            switch outcome {
            case .success(let result): results[index] = result
            case .failure(let error): failure = failure ?? error
            }
            if failure == nil, begun < items.count {
                let index = begun
                group.addTask { await numbered(index) }
                begun += 1
            }
        }
        return failure
    }
    if let failure { throw failure }
    return results.map { $0! }
}

/// Takes items from `next` until that gives nil, runs `work` on them, at most `limit` at a time, and gives the results to
/// `take` in the order of the items. No more than `limit` items and results are held at any time. The first error ends it.
func inOrder<Item: Sendable, Output: Sendable, Failure: Error>(
    limit: Int, next: () async throws(Failure) -> Item?,
    work: @escaping @Sendable (Item) async throws(Failure) -> Output,
    take: (Output) async throws(Failure) -> Void
) async throws(Failure) {
    typealias Outcome = Swift.Result<Output, Failure>
    @Sendable func numbered(_ number: Int, _ item: Item) async -> (Int, Outcome) {
        // In two steps: see above.
        let outcome: Outcome
        do throws(Failure) {
            let output = try await work(item)
            outcome = .success(output)
        } catch {
            outcome = .failure(error)
        }
        return (number, outcome)
    }
    let failure: Failure? = await withTaskGroup(of: (Int, Outcome).self) { group in
        var begun = 0
        var taken = 0
        var isAtEnd = false
        // Results that came before their turn.
        var early: [Int: Outcome] = [:]
        do throws(Failure) {
            while true {
                while !isAtEnd, begun - taken < limit {
                    guard let item = try await next() else {
                        isAtEnd = true
                        break
                    }
                    let number = begun
                    group.addTask { await numbered(number, item) }
                    begun += 1
                }
                guard let (number, outcome) = await group.next() else { return nil }
                early[number] = outcome
                while let outcome = early.removeValue(forKey: taken) {
                    taken += 1
                    let output = try outcome.get()
                    try await take(output)
                }
            }
        } catch {
            group.cancelAll()
            return error
        }
    }
    if let failure { throw failure }
}
