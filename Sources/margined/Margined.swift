import ArgumentParser
import Margarine

/// The root command.
struct Margined: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "margined",
        abstract: "Disks in an object store, served over NBD.",
        discussion: """
            A disk lives in an object store (a directory, or a bucket of an S3 service). 'margined serve' serves the disks \
            of one store; 'margined disk' makes, changes, copies and removes them, beside a running daemon or without one; \
            'margined gc' deletes what no generation needs any more; 'margined check' looks whether all is there and whole; \
            'margined location' adds and shows the locations of a store that has several; 'margined status' shows what a \
            running daemon is doing.

            Exit status: 0 done, 1 it failed, 64 bad usage. Errors are one line on standard error.

            Example, everything on one machine:
              margined disk create work --size 10G --store file:///var/lib/disks
              margined serve --store file:///var/lib/disks --scratch /var/lib/margined
              nbd-client -N work 127.0.0.1 10809 /dev/nbd0
            """,
        version: Version.text,
        subcommands: [Serve.self, Disk.self, Collect.self, Check.self, LocationCommand.self, Status.self])
}
