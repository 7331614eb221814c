// Why a command ended badly, and how that is told.

import ArgumentParser
import Glibc
import Runtime

/// A failure in one line: what, where, what to do.
struct Failure: Error, CustomStringConvertible {
    var description: String
    init(_ description: String) { self.description = description }

    /// Ends the process with the status and message that `error` calls for.
    static func exit(with error: any Error) -> Never {
        let code = Margined.exitCode(for: error)
        if code.isSuccess {
            // Help and version were asked for: they are the output.
            Output.raw(Margined.fullMessage(for: error))
            do { try Output.finish() } catch { _exit(1) }
            _exit(0)
        }
        if error is BrokenPipe { _exit(1) }
        if error is CleanExit { _exit(code.rawValue) }
        if code == .validationFailure {
            // The parser's text ends with usage lines; the first paragraph says what is wrong.
            let full = Margined.fullMessage(for: error)
            let help = full.split(separator: "\n").last { $0.contains("--help' for more information") }
            let hint = help.flatMap { $0.split(separator: "'").dropFirst().first }.map(String.init) ?? "margined --help"
            say("\(Margined.message(for: error)); see '\(hint)'")
        } else {
            say(code == .failure ? "\(error)" : Margined.message(for: error))
        }
        _exit(code.rawValue)
    }

    /// One line on standard error.
    static func say(_ text: String) {
        let line = text.split(whereSeparator: \.isNewline).map { $0.drop(while: \.isWhitespace) }.joined(separator: " ")
        Output.lastWords("margined: \(line.printable)")
    }
}
