// Forks of several disks as they are at one instant: the members of a btrfs over several devices, of an LVM volume group, of
// an md array.

import BlockCache
internal import ObjectStore
internal import Runtime

extension Catalog {
    /// Forks several disks as of one instant. Those that a server has are cut by it; the others, which nobody writes, are
    /// taken as they are. Either all forks are there afterwards or none.
    ///
    /// - Parameter cut: asks the server that has these disks for their generations at one instant.
    package func forkSet(
        _ sources: [String], as names: [String], readOnly: Bool = false, location: UInt8? = nil,
        cut: @Sendable ([String]) async throws -> [String: UInt64]
    ) async throws(CatalogError) -> [DiskInfo] {
        guard sources.count == names.count, Set(sources).count == sources.count, Set(names).count == names.count else {
            throw CatalogError(.invalid, "a set needs as many new names as disks, each once")
        }
        var idle: [String: Head] = [:]
        var owned: [Head] = []
        for source in sources {
            let head = try await load(source).head
            if head.owner == nil { idle[source] = head } else { owned.append(head) }
        }
        if let first = owned.first, let other = owned.first(where: { $0.owner?.server != first.owner?.server }) {
            throw CatalogError(
                .owned,
                "disk '\(first.name)' is attached at \(first.owner!.host) and '\(other.name)' at \(other.owner!.host): servers have no instant in common; attach both at one, or detach them"
            )
        }
        var generations = idle.mapValues(\.generation)
        if !owned.isEmpty {
            do {
                generations.merge(try await cut(owned.map(\.name))) { $1 }
            } catch {
                throw CatalogError(
                    .owned,
                    "the disks are attached at \(owned[0].owner!.host), which has to hold them for a moment: \(error). Run this on that machine, with the --config of its daemon, or detach the disks"
                )
            }
        }
        // Nobody may have taken one meanwhile: its generation and the others' would be of different instants.
        for (source, head) in idle {
            let now = try await load(source).head
            guard now.epoch == head.epoch, now.generation == head.generation else {
                throw CatalogError(.conflict, "disk '\(source)' was attached meanwhile; try again")
            }
        }
        return try await makeSet(sources, generations, as: names, readOnly: readOnly, location: location)
    }

    private func makeSet(
        _ sources: [String], _ generations: [String: UInt64], as names: [String], readOnly: Bool, location: UInt8?
    ) async throws(CatalogError) -> [DiskInfo] {
        var made: [DiskInfo] = []
        do throws(CatalogError) {
            for (source, name) in zip(sources, names) {
                guard let generation = generations[source] else {
                    throw CatalogError(.conflict, "the server did not say which generation of '\(source)' it is")
                }
                made.append(
                    try await fork(
                        source, generation: generation, as: name, readOnly: readOnly,
                        location: location, mayNeedLog: true))
            }
            return made
        } catch {
            for fork in made { try? await delete(fork.name) }
            throw error
        }
    }
}
