// What the fuzzer and the tests of its corpus have in common: for each decoder of foreign bytes one function that takes any
// bytes and finds out whether what must hold of them holds.
//
// Always holds: a target depends on its input alone, so that a finding can be replayed; it keeps nothing between inputs.

/// Something that must not be, with the words for it.
struct Finding: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

/// One decoder under test.
struct FuzzTarget: Sendable {
    /// Also the name of its folder of the corpus.
    let name: String
    /// Longer inputs are not tried.
    let maxInputBytes: Int
    /// What one input may have allocated at a time: this, and so many times its length.
    var allocationBaseBytes = 256 << 10
    var allocationFactor = 64
    /// A library under it does not free what it allocates: leaks are not looked for.
    var leaks = false
    /// Throws what was found; a refusal of the input is no finding, and stays inside.
    let run: @Sendable (UnsafeRawBufferPointer) throws -> Void

    func allocationLimitBytes(_ inputBytes: Int) -> Int { allocationBaseBytes + allocationFactor * inputBytes }

    static let all: [FuzzTarget] = [
        .handshake, .requests, .journal, .base, .delta, .page, .head, .record, .stream, .config, .xml,
    ]
}

/// Finds `what` unless `condition` holds.
@inline(__always)
func require(_ condition: Bool, _ what: @autoclosure () -> String) throws(Finding) {
    if !condition { throw Finding(what()) }
}
