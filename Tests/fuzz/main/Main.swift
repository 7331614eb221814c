// The fuzzer: MARGARINE_FUZZ_TARGET=NAME margarine-fuzz [libFuzzer's arguments]. The name comes by the environment, so that
// the processes libFuzzer starts of itself have it too. Scripts/fuzz.sh is how people call it.

import CFuzzer
import Glibc

@main
enum Main {
    /// Set once, before the first input.
    nonisolated(unsafe) private static var target = FuzzTarget.all[0]

    static func main() {
        let name = getenv("MARGARINE_FUZZ_TARGET").map { String(cString: $0) } ?? ""
        if name == "list" {
            for target in FuzzTarget.all { print(target.name, target.maxInputBytes, target.leaks ? 0 : 1) }
            return
        }
        guard let chosen = FuzzTarget.all.first(where: { $0.name == name }) else {
            print(
                "margarine-fuzz: MARGARINE_FUZZ_TARGET must be one of",
                FuzzTarget.all.map(\.name).joined(separator: " "))
            exit(64)
        }
        target = chosen
        var count = CommandLine.argc
        var arguments: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>? = CommandLine.unsafeArgv
        exit(LLVMFuzzerRunDriver(&count, &arguments) { data, size in Main.run(data, size) })
    }

    private static func run(_ data: UnsafePointer<UInt8>?, _ size: Int) -> Int32 {
        // More than the first execution's one-time costs, less than what would hurt a daemon.
        let limit = target.allocationLimitBytes(size)
        mg_fuzz_begin_counting()
        do {
            try target.run(UnsafeRawBufferPointer(start: data, count: size))
        } catch {
            fatalError("\(target.name): \(error)")
        }
        let peak = mg_fuzz_end_counting()
        if peak > limit {
            fatalError("\(target.name): \(peak) bytes allocated for an input of \(size), \(limit) are the limit")
        }
        return 0
    }
}
