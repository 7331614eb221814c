// Cutting several disks at one instant, each on its own loop: all are held, then all are cut, then all go on.

internal import Runtime

extension DiskManager {
    /// How often a cut is tried: commits under way and safe points of the disks get in between.
    private static let maxTries = 200

    /// The generations of these disks that are as of one instant.
    package func cut(_ names: [String]) async throws(CutError) -> [String: UInt64] {
        let members = try await open(names)
        for number in 0..<Self.maxTries {
            if number > 0 {
                await members[0].context.environment.sleep(ns: 5_000_000 + UInt64.random(in: 0..<20_000_000))
            }
            guard let tickets = await tryCut(members) else { continue }
            var generations: [String: UInt64] = [:]
            for (member, ticket) in zip(members, tickets) {
                generations[member.disk.name] = try await member.context.run { await ticket.wait() }.get()
            }
            return generations
        }
        throw CutError(
            description:
                "the disks could not be held at one instant: they are too busy, or the store does not say whether they are still this server's; try again"
        )
    }

    private struct Member: Sendable {
        var context: DiskContext
        var disk: Disk
    }

    private func open(_ names: [String]) async throws(CutError) -> [Member] {
        var members: [Member] = []
        for name in names {
            guard let (context, disk) = await present(name), await context.run({ disk.lost == nil }) else {
                throw CutError(description: "disk '\(name)' is not attached at this server")
            }
            members.append(Member(context: context, disk: disk))
        }
        return members
    }

    /// nil: one of them could not be held, or not long enough.
    private func tryCut(_ members: [Member]) async -> [CutTicket]? {
        var held: [(member: Member, hold: DiskHold)] = []
        var tickets: [CutTicket] = []
        for member in members {
            guard let hold = await member.context.run({ member.disk.beginHold() }) else { break }
            held.append((member, hold))
        }
        // Between these two nothing is written to any of them.
        if held.count == members.count {
            for (member, hold) in held {
                guard let ticket = await member.context.run({ member.disk.cut(under: hold) }) else { break }
                tickets.append(ticket)
            }
        }
        for (member, hold) in held { await member.context.run { member.disk.endHold(hold) } }
        return tickets.count == members.count ? tickets : nil
    }
}
