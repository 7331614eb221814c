import ArgumentParser
import Margarine

/// `margined disk`: everything about disks that works on the store itself.
struct Disk: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Make, change, copy and remove disks.",
        discussion: """
            Works on the store itself, safely beside running daemons and without any.

            Examples:
              margined disk create work --size 10G --store file:///srv/disks
              margined disk list --store file:///srv/disks
            """,
        subcommands: [])
}
