// Standard output and error. Data goes to the one, everything else to the other; both stay usable when they are closed
// pipes.

import Foundation
import Glibc
import Margarine
import Runtime
import Synchronization

/// The reader of standard output went away.
struct BrokenPipe: Error {}

enum Output {
    /// Lines for standard output that are not written yet, and why writing failed, once it has.
    private struct Pending {
        var bytes: [UInt8] = []
        var failure: Int32 = 0
    }
    private static let pending = Mutex(Pending())

    /// Takes one line for standard output: names and errors from outside can't make more of it, nor move the terminal's
    /// cursor. Written by `finish`, or when enough has come together.
    static func line(_ text: String) { raw(text.printable) }

    /// Takes text of this program alone, which may have several lines.
    static func raw(_ text: String) {
        pending.withLock { pending in
            pending.bytes += text.utf8
            pending.bytes.append(UInt8(ascii: "\n"))
            if pending.bytes.count >= 64 << 10 { flush(&pending) }
        }
    }

    /// Writes out what is pending.
    /// - Throws: `BrokenPipe`, or a `Failure` when the output cannot be written (a full disk, say).
    static func finish() throws {
        let reason = pending.withLock { pending in
            flush(&pending)
            return pending.failure
        }
        if reason == EPIPE { throw BrokenPipe() }
        if reason != 0 { throw Failure("cannot write to standard output: \(Margarine.errnoText(reason))") }
    }

    private static func flush(_ pending: inout Pending) {
        if pending.failure == 0 { pending.failure = write(pending.bytes, to: STDOUT_FILENO) }
        pending.bytes = []
    }

    /// Writes all of `bytes`; 0, or the errno.
    private static func write(_ bytes: [UInt8], to fd: Int32) -> Int32 {
        var written = 0
        while written < bytes.count {
            let count = bytes[written...].withUnsafeBytes { Glibc.write(fd, $0.baseAddress, $0.count) }
            if count < 0 {
                if errno == EINTR { continue }
                return errno
            }
            written += count
        }
        return 0
    }

    /// One JSON value, keys sorted, for people to read and programs to parse.
    static func json(_ value: some Encodable) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
        encoder.dateEncodingStrategy = .iso8601
        raw(String(decoding: try encoder.encode(value), as: UTF8.self))
    }

    static func toStandardError(_ text: String) {
        _ = write(Array(text.utf8), to: STDERR_FILENO)
    }

    /// Standard error for a daemon, which never waits for its reader.
    static let log = LineWriter(descriptor: STDERR_FILENO)
    /// Standard output for a daemon, likewise.
    static let announcements = LineWriter(descriptor: STDOUT_FILENO)
    /// How long the end of the process waits for the reader of the last words.
    private static let lastWordsMs = 1_000

    /// The last line on standard error, behind all that was logged; given up when nobody reads it.
    static func lastWords(_ line: String) {
        log.add(line)
        finishLog()
    }

    /// Writes out what was logged, as far as somebody reads it.
    static func finishLog() { log.flush(timeoutMs: lastWordsMs) }

    static var standardErrorIsTerminal: Bool { isatty(STDERR_FILENO) == 1 }
}

/// Columns of text, each as wide as its widest cell. Sizes and counts are right-aligned.
struct Table {
    private var rows: [[String]]
    private let rightAligned: Set<Int>
    init(_ header: [String], rightAligned: Set<Int> = []) {
        rows = [header]
        self.rightAligned = rightAligned
    }
    mutating func add(_ cells: [String]) {
        precondition(cells.count == rows[0].count)
        rows.append(cells)
    }
    var isEmpty: Bool { rows.count == 1 }
    var lines: [String] {
        let widths = rows[0].indices.map { column in rows.map { $0[column].count }.max() ?? 0 }
        return rows.map { row in
            var line = ""
            for (column, cell) in row.enumerated() {
                let padding = String(repeating: " ", count: widths[column] - cell.count)
                line += (column == 0 ? "" : "  ") + (rightAligned.contains(column) ? padding + cell : cell + padding)
            }
            return String(line.reversed().drop { $0 == " " }.reversed())
        }
    }
    func print() {
        for line in lines { Output.line(line) }
    }
}
