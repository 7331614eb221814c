// simulate: runs of the engine in simulated worlds.

import ArgumentParser
import Foundation
import Glibc

@testable import Margarine

@main struct Simulate: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "simulate",
        abstract:
            "Runs the whole engine in simulated worlds, each a function of its seed, against an independent model.",
        discussion: "Ends with status 1 at the first violation, and prints the command that repeats it.")

    @Option(help: "The first seed; the time of day where none is given.") var seed: UInt64?
    @Option(help: "How many runs.") var runs: Int?
    @Option(help: "For how many seconds, where no number of runs is given.") var seconds = 60.0
    @Option(help: "Operations of each client in a run.") var operations = 700
    @Option(help: "Break this rule: \(Fault.allCases.map(\.rawValue).joined(separator: ", ")).") var fault: String?
    @Option(
        help:
            "Leave out these kinds of trouble, with commas between: \(Trouble.allCases.map(\.rawValue).joined(separator: ", "))."
    )
    var without = ""
    @Flag(help: "Go on after a violation, and count each kind of it in the end.") var goOn = false
    @Flag(help: "Print the rules that --fault breaks.") var listFaults = false
    @Flag(help: "Print what happens.") var trace = false
    @Flag(help: "Print one line for each run.") var verbose = false
    @Flag(help: "Each seed twice: both must go the same way.") var twice = false

    func validate() throws {
        if let fault, Fault(rawValue: fault) == nil { throw ValidationError("no rule '\(fault)' to break") }
        for kind in without.split(separator: ",") where Trouble(rawValue: String(kind)) == nil {
            throw ValidationError("no trouble '\(kind)'")
        }
    }

    private var excluded: Set<Trouble> {
        Set(without.split(separator: ",").compactMap { Trouble(rawValue: String($0)) })
    }

    func run() throws {
        // Order within sets and dictionaries is chance too, and must be the seed's.
        guard getenv("SWIFT_DETERMINISTIC_HASHING") != nil else {
            setenv("SWIFT_DETERMINISTIC_HASHING", "1", 1)
            // Memory stays with a run: to give it back and to take it again costs a tenth of its time.
            setenv("MALLOC_MMAP_THRESHOLD_", "33554432", 0)
            setenv("MALLOC_TRIM_THRESHOLD_", "1073741824", 0)
            setenv("MALLOC_TOP_PAD_", "8388608", 0)
            if fault != nil { setenv("SWIFT_BACKTRACE", "enable=no", 1) }
            var arguments = CommandLine.arguments.map { strdup($0) } + [nil]
            execv("/proc/self/exe", &arguments)
            throw ExitCode.failure
        }
        if listFaults { return Fault.allCases.forEach { print($0.rawValue) } }
        if fault != nil, runs != 1 { return try search() }
        let first = seed ?? UInt64(Date().timeIntervalSince1970 * 1000)
        let began = Date()
        var total = RunReport(seed: first)
        var count = 0
        var violations: [String: Int] = [:]
        while runs.map({ count < $0 }) ?? (Date().timeIntervalSince(began) < seconds) {
            let seed = first + UInt64(count)
            let report = runs == 1 ? simulate(seed) : try apart(seed)
            if twice {
                let again = try apart(seed)
                guard again.hash == report.hash else {
                    print("seed \(seed): two runs differ: \(report.hash) and \(again.hash)")
                    throw ExitCode.failure
                }
            }
            count += 1
            if verbose || runs == 1 {
                print(
                    "seed \(seed): \(report.operations) operations, \(report.steps) steps, \(report.virtualMs) ms, \(report.generations) generations, \(report.attachments) attachments, \(report.rollBacks) roll-backs, \(report.forks) forks, \(report.collections) collections of \(report.collected) objects, \(report.copied) copied, hash \(String(report.hash, radix: 16))"
                )
            }
            total.operations += report.operations
            total.steps += report.steps
            total.virtualMs += report.virtualMs
            total.generations += report.generations
            total.attachments += report.attachments
            total.rollBacks += report.rollBacks
            total.collections += report.collections
            total.collected += report.collected
            total.forks += report.forks
            total.copied += report.copied
            total.hash = (total.hash ^ report.hash) &* 0x100_0000_01b3
            for (what, times) in report.faults { total.faults[what, default: 0] += times }
            if goOn, let violation = report.violation {
                print("VIOLATION: seed \(seed), after \(Int(Date().timeIntervalSince(began))) s: \(violation)")
                violations[Simulate.kind(violation), default: 0] += 1
                continue
            }
            if let violation = report.violation {
                print("VIOLATION: seed \(seed), step \(report.steps), run \(count): \(violation)")
                print(
                    "replay: Scripts/simulate.sh --runs 1 --trace --seed \(seed) --operations \(operations)"
                        + (fault.map { " --fault \($0)" } ?? "") + (without.isEmpty ? "" : " --without \(without)"))
                throw ExitCode.failure
            }
        }
        for (kind, times) in violations.sorted(by: { $0.value > $1.value }) { print("  \(times) times: \(kind)") }
        if !violations.isEmpty { throw ExitCode.failure }
        print(
            "seeds \(first) to \(first + UInt64(count) - 1): \(total.operations) operations in \(count) runs, no violation; \(total.steps) steps, \(total.virtualMs / 1000) s of simulated time in \(Int(Date().timeIntervalSince(began))) s, \(total.generations) generations, \(total.attachments) attachments, \(total.rollBacks) roll-backs, \(total.forks) forks, \(total.collections) collections of \(total.collected) objects, \(total.copied) copied; hash \(String(total.hash, radix: 16))"
        )
        for (what, times) in total.faults.sorted(by: { $0.key < $1.key }) { print("  \(what): \(times)") }
    }

    /// What kind of violation it is: without its numbers and names.
    private static func kind(_ violation: Violation) -> String {
        let words = violation.description.prefix(120).split(separator: " ")
        return words.map { $0.contains(where: \.isNumber) ? "…" : String($0) }.joined(separator: " ")
    }

    /// Runs with a broken rule until that is seen.
    private func search() throws {
        let first = seed ?? UInt64(Date().timeIntervalSince1970 * 1000)
        let began = Date()
        var steps: UInt64 = 0
        var count: UInt64 = 0
        while runs.map({ count < $0 }) ?? (Date().timeIntervalSince(began) < seconds) {
            let report = try apart(first + count)
            count += 1
            steps += report.steps
            if let violation = report.violation {
                print("VIOLATION: seed \(report.seed), step \(report.steps), run \(count): \(violation)")
                print("FOUND: steps \(steps) runs \(count)")
                throw ExitCode.failure
            }
        }
        print("not found in \(count) runs, \(steps) steps")
    }

    /// A run in a process of its own: it may end itself, and what it leaves behind (tasks that wait for a dead server) goes
    /// with it.
    private func apart(_ seed: UInt64) throws -> RunReport {
        var ends: [Int32] = [0, 0]
        fflush(nil)
        guard pipe(&ends) == 0 else { throw ExitCode.failure }
        let child = fork()
        if child == 0 {
            // One that does not end is told of like one that fails.
            alarm(3000)
            var limit = rlimit(rlim_cur: 300, rlim_max: 310)
            setrlimit(__rlimit_resource_t(RLIMIT_CPU.rawValue), &limit)
            if fault != nil { for number in [SIGILL, SIGTRAP, SIGABRT, SIGSEGV] { signal(number, SIG_DFL) } }
            let bytes = [UInt8]((try? JSONEncoder().encode(simulate(seed))) ?? Data())
            var sent = 0
            while sent < bytes.count {
                let count = bytes[sent...].withUnsafeBytes { write(ends[1], $0.baseAddress, $0.count) }
                if count <= 0 { break }
                sent += count
            }
            fflush(nil)
            _exit(0)
        }
        close(ends[1])
        guard child > 0 else { throw ExitCode.failure }
        var bytes = [UInt8]()
        var part = [UInt8](repeating: 0, count: 1 << 16)
        while true {
            let count = Glibc.read(ends[0], &part, part.count)
            if count <= 0 { break }
            bytes += part[..<count]
        }
        close(ends[0])
        waitpid(child, nil, 0)
        if let report = try? JSONDecoder().decode(RunReport.self, from: Data(bytes)) { return report }
        var report = RunReport(seed: seed)
        report.violation = Violation(description: "the engine ended itself, or did not end in 300 s of a processor")
        return report
    }

    private func simulate(_ seed: UInt64) -> RunReport {
        Run(
            seed: seed, operations: operations, fault: fault.flatMap { Fault(rawValue: $0) }, trace: trace,
            without: excluded
        ).report()
    }
}
