// Before a further connection of a session is served, all writes, trims and zeroes that the others had sent take effect or
// never will: their client may have given them up, and send the same requests again on the new one. Reads need not be finished.
//
// Always holds: who makes progress is waited for; a connection is closed only after `silenceNs` without a byte in either
// direction, and a client that went away while it waited to be served holds nobody up.

internal import Runtime

extension Disk {
    /// A connection that holds up another one of its session, and for so long neither sends nor takes a byte, is closed
    /// (Docs/Durability.md).
    static let silenceNs: UInt64 = 10_000_000_000
    private static let settleStepNs: UInt64 = 10_000_000

    /// A connection that may have sent something that has not taken effect.
    private struct Unsettled {
        let client: any DeviceClient
        var movedBytes: UInt64
        var sinceNs: UInt64
    }

    /// Returns when what the `others` had sent by now is settled, or `joiner` is gone.
    func settle(_ others: [any DeviceClient], for joiner: any DeviceClient) async {
        var unsettled = others.map { Unsettled(client: $0, movedBytes: $0.movedBytes, sinceNs: nowNs) }
        var isFirst = true
        while true {
            // Who is settled once is: what he sends later came after the new connection.
            unsettled = unsettled.filter { other in
                guard isConnected(other.client) else { return false }
                let isIdle = other.client.absorb(isFirst: isFirst)
                return isConnected(other.client) && (!isIdle || hasPendingWrite(of: other.client))
            }
            isFirst = false
            if unsettled.isEmpty || !isConnected(joiner) { return }
            for index in unsettled.indices { closeIfSilent(&unsettled[index]) }
            await context.environment.sleep(ns: Disk.settleStepNs)
        }
    }

    private func closeIfSilent(_ other: inout Unsettled) {
        if other.client.movedBytes != other.movedBytes {
            other.movedBytes = other.client.movedBytes
            other.sinceNs = nowNs
        } else if nowNs - other.sinceNs >= Disk.silenceNs {
            leave(other.client, clean: false)
            other.client.disconnect(
                reason:
                    "it held an unfinished request for \(Disk.silenceNs / 1_000_000_000) s without a byte of progress while another connection of its session began"
            )
        }
    }
}
