// The command line's entry: parse, run, and turn whatever went wrong into one line and an exit status.
//
// Status: 0 done, 1 it failed, 64 bad usage.

import ArgumentParser
import Glibc
import Margarine

// A reader that goes away (`margined disk list | head -1`) is an error of the write, not the end of the process.
signal(SIGPIPE, SIG_IGN)

await runCommand()

/// Runs the command that the arguments name.
func runCommand() async {
    do {
        var command = try Margined.parseAsRoot()
        if var command = command as? any AsyncParsableCommand {
            try await command.run()
        } else {
            try command.run()
        }
        try Output.finish()
    } catch {
        Failure.exit(with: error)
    }
    Output.finishLog()
    // Nothing is left to be written. Libraries' own clean-up at `exit` would race with threads that still run.
    _exit(0)
}
