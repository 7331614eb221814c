// Cutting several disks at one instant, each on its own loop: all are held, then all are cut, then all go on.

internal import Runtime

extension DiskManager {
    /// Longest wait of a cut for its turn, and with that for its generations: less than who asked for it waits
    /// (`ControlClient`).
    private static let turnNs: UInt64 = 14_000_000_000
    private static let cutNs: UInt64 = 28_000_000_000

    /// The generations of these disks that are as of one instant. On a store where one commit follows the other the cut comes
    /// next.
    package func cut(_ names: [String], withinNs: UInt64 = cutNs) async throws(CutError) -> [String: UInt64] {
        let members = try await open(names)
        let environment = members[0].context.environment
        let deadlineNs = environment.nowNs + withinNs
        let turnEndNs = environment.nowNs + min(Self.turnNs, withinNs / 2)
        var wishes: [CutWish] = []
        var tickets = await tryCut(members, deadlineNs)
        while tickets == nil, environment.nowNs < turnEndNs {
            if wishes.isEmpty {
                for member in members {
                    wishes.append(await member.context.run { member.disk.wishCut(forNs: withinNs) })
                }
            }
            await environment.sleep(ns: 5_000_000 + UInt64.random(in: 0..<20_000_000))
            tickets = await tryCut(members, deadlineNs)
        }
        let obstacle = tickets == nil ? await obstacle(members) : nil
        for (member, wish) in zip(members, wishes) { await member.context.run { member.disk.endWish(wish) } }
        guard let tickets else {
            throw CutError(description: "the disks could not be held at one instant: \(obstacle!); try again")
        }
        var generations: [String: UInt64] = [:]
        for (member, ticket) in zip(members, tickets) {
            generations[member.disk.name] = try await member.context.run { await ticket.wait() }.get()
        }
        return generations
    }

    /// What kept a cut from having its turn, for people.
    private func obstacle(_ members: [Member]) async -> String {
        for member in members {
            if let what = await member.context.run({ member.disk.cutObstacle }) {
                return "disk '\(member.disk.name)' \(what)"
            }
        }
        return "they are too busy"
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
    private func tryCut(_ members: [Member], _ deadlineNs: UInt64) async -> [CutTicket]? {
        var held: [(member: Member, hold: DiskHold)] = []
        var tickets: [CutTicket] = []
        for member in members {
            guard let hold = await member.context.run({ member.disk.beginHold() }) else { break }
            held.append((member, hold))
        }
        // Between these two nothing is written to any of them.
        if held.count == members.count {
            for (member, hold) in held {
                let now = member.context.environment.nowNs
                let restNs = max(deadlineNs, now + 1_000_000_000) - now
                guard let ticket = await member.context.run({ member.disk.cut(under: hold, withinNs: restNs) }) else {
                    break
                }
                tickets.append(ticket)
            }
        }
        for (member, hold) in held { await member.context.run { member.disk.endHold(hold) } }
        return tickets.count == members.count ? tickets : nil
    }
}
