// The exports of the test server, each with one peculiarity.

import Margarine
import Runtime

final class MemoryAdmission: Sendable {
    let isLapsed: Bool
    init(isLapsed: Bool = false) { self.isLapsed = isLapsed }
}

/// Names to devices. The empty name is `mem`.
final class MemoryExports: ExportProvider {
    private struct Export: Sendable {
        var info: ExportInfo
        var device: MemoryDevice
        var loop: Loop
        var isLapsed = false
        var attachNs: UInt64 = 0
    }

    private let exports: [Export]
    private let environment: SystemEnvironment

    init(sizeBytes: UInt64, loops: [Loop], environment: SystemEnvironment) {
        self.environment = environment
        var made: [Export] = []
        func add(
            _ name: String, _ description: String, size: UInt64 = sizeBytes, memory: UInt64? = nil,
            readOnly: Bool = false,
            lapsed: Bool = false, attachNs: UInt64 = 0, _ behaviour: Behaviour = Behaviour()
        ) {
            let loop = loops[made.count % loops.count]
            let device = MemoryDevice(
                sizeBytes: size, memoryBytes: memory, isReadOnly: readOnly, loop: loop, behaviour: behaviour)
            let info = ExportInfo(name: name, sizeBytes: size, isReadOnly: readOnly, description: description)
            made.append(Export(info: info, device: device, loop: loop, isLapsed: lapsed, attachNs: attachNs))
        }
        add("mem", "answers at once")
        add("ro", "read-only", readOnly: true)
        add("journal", "acknowledges writes 1 ms late", Behaviour(journalNs: 1_000_000))
        add("lazy", "answers everything later", Behaviour(answersInline: false))
        let half = sizeBytes / 2
        add("slow", "300 ms for what begins in its second half", Behaviour(slowFrom: half))
        add("stuck", "never answers what begins in the middle", Behaviour(stuckAt: half))
        add("broken", "EIO for what begins in the middle", Behaviour(failsAt: half))
        add("kicks", "ends the connection of who writes to the middle", Behaviour(disconnectsAt: half))
        add("huge", "as large as it gets, mostly zeroes", size: UInt64.max & ~0xfff, memory: 16 << 20)
        add("odd", "not a multiple of anything", size: (1 << 20) + 1)
        add("lapsed", "refuses who joins", lapsed: true)
        add("hostile", "disconnects who joins", Behaviour(disconnectsJoiners: true))
        add("late", "takes 200 ms to attach", attachNs: 200_000_000)
        exports = made
    }

    private func find(_ name: String) throws(AttachError) -> Export {
        let wanted = name.isEmpty ? "mem" : name
        guard let export = exports.first(where: { $0.info.name == wanted }) else {
            throw AttachError(.unknown, "no export \(wanted)")
        }
        return export
    }

    func list() async throws(AttachError) -> [ExportInfo] { exports.map(\.info) }

    func describe(_ exportName: String) async throws(AttachError) -> ExportInfo { try find(exportName).info }

    func attach(_ exportName: String, client: ClientIdentity) async throws(AttachError) -> AttachedDevice {
        let export = try find(exportName)
        if export.attachNs > 0 { await environment.sleep(ns: export.attachNs) }
        return AttachedDevice(
            device: export.device, loop: export.loop, admission: MemoryAdmission(isLapsed: export.isLapsed))
    }
}
