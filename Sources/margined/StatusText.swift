// The status report for people.

import Margarine

struct StatusText {
    private let report: StatusReport
    init(_ report: StatusReport) { self.report = report }

    func print() {
        printDaemon()
        printCollection()
        printSessions()
        printDisks()
    }

    private func printDaemon() {
        let daemon = report.daemon
        let store = report.store
        func field(_ name: String, _ value: String) {
            Output.line(name + String(repeating: " ", count: 9 - name.count) + value)
        }
        field(
            "daemon",
            "margined \(daemon.version), pid \(daemon.pid), up \(DurationMs.readable(daemon.uptimeMs))"
                + (daemon.isDraining ? ", draining" : ""))
        field("serves", daemon.addresses.isEmpty ? "nothing yet" : daemon.addresses.joined(separator: " "))
        var text =
            "\(store.name): \(store.requests) requests, read \(ByteSize.readable(store.readBytes)), "
            + "written \(ByteSize.readable(store.writtenBytes)), \(store.retries) retries, \(store.errors) errors"
        if let error = store.lastError {
            text += "; the last" + (store.lastErrorAgeMs.map { " \(DurationMs.readable($0)) ago" } ?? "") + ": \(error)"
        }
        field("store", text)
        for location in store.locations ?? [] {
            let state = location.trouble.map { ", out of reach: \($0)" } ?? ""
            field("", "location \(location.name)\(location.isNear ? " (near)" : "") at \(location.url)\(state)")
        }
        field(
            "memory",
            "\(ByteSize.readable(daemon.residentBytes)) resident; dirty "
                + share(daemon.dirtyMemoryBytes, daemon.dirtyMemoryLimitBytes) + "; cache " + cache(report.memoryCache))
        field(
            "scratch",
            "\(daemon.scratch): journal " + share(daemon.journalBytes, daemon.journalLimitBytes) + "; cache "
                + cache(report.scratchCache))
    }

    private func printCollection() {
        guard let collection = report.collection else { return }
        var parts: [String] = []
        if let phase = collection.phase {
            parts.append(
                "\(phase.rawValue), \(collection.done)" + (collection.total == 0 ? "" : " of \(collection.total)"))
        }
        if let last = collection.last, let age = collection.lastAgeMs {
            parts.append(
                "last \(DurationMs.readable(age)) ago: \(last.deleted) objects deleted, "
                    + "\(ByteSize.readable(last.deletedBytes))")
        } else {
            parts.append("never yet")
        }
        parts.append(
            collection.intervalMs == 0 ? "not by this daemon" : "every \(DurationMs.readable(collection.intervalMs))")
        parts.append("grace \(DurationMs.readable(collection.graceMs))")
        if let error = collection.lastError { parts.append("failed: \(error)") }
        Output.line("gc       " + parts.joined(separator: "; "))
    }

    private func printSessions() {
        Output.line("")
        guard !report.sessions.isEmpty else { return Output.line("no sessions") }
        var table = Table(
            ["SESSION", "EXPORT", "NAME", "CONNECTIONS", "AGE", "REQUESTS", "READ", "WRITTEN"],
            rightAligned: [3, 4, 5, 6, 7])
        for session in report.sessions {
            let connections =
                session.connections > 0
                ? "\(session.connections)"
                : "none" + (session.resumableForMs.map { ", kept \(DurationMs.readable($0))" } ?? "")
            table.add([
                session.address, session.export, session.session ?? "-", connections,
                DurationMs.readable(session.ageMs),
                "\(session.requests)", ByteSize.readable(session.readBytes), ByteSize.readable(session.writtenBytes),
            ])
        }
        table.print()
    }

    private func printDisks() {
        Output.line("")
        guard !report.disks.isEmpty else { return Output.line("no disks in use") }
        var table = Table(
            ["DISK", "SIZE", "GENERATION", "COMMITTED", "DIRTY", "SAFE POINT", "COMMIT", "JOURNAL", "HITS", "ERRORS"],
            rightAligned: [1, 2, 3, 4, 5, 6, 7, 8, 9])
        for disk in report.disks {
            let lookups = disk.cacheHits &+ disk.cacheMisses
            table.add([
                disk.name, ByteSize.readable(disk.sizeBytes), "\(disk.committedGeneration)", age(disk.committedAgeMs),
                ByteSize.readable(disk.dirtyBytes), age(disk.safePointAgeMs),
                disk.committingForMs.map { "for \(DurationMs.readable($0))" } ?? "-",
                ByteSize.readable(disk.journalBytes),
                lookups == 0 ? "-" : "\(Int(100 * Double(disk.cacheHits) / Double(lookups)))%", "\(disk.storeErrors)",
            ])
        }
        table.print()
        for disk in report.disks {
            if disk.waitingWriters > 0 {
                Output.line("\(disk.name): \(disk.waitingWriters) requests wait for room in the journal")
            }
            if let error = disk.lastError { Output.line("\(disk.name): \(error)") }
        }
    }

    private func share(_ used: UInt64, _ limit: UInt64) -> String {
        limit == 0 ? ByteSize.readable(used) : "\(ByteSize.readable(used)) of \(ByteSize.readable(limit))"
    }

    private func cache(_ cache: CacheStatus) -> String {
        share(cache.usedBytes, cache.limitBytes) + (cache.hitPercent.map { ", \(Int($0))% hits" } ?? "")
    }

    private func age(_ ms: Int64?) -> String { ms.map { DurationMs.readable($0) + " ago" } ?? "-" }
}
