// What is left of a scratch disk in memory after a loss of power.

import Synchronization

extension MemoryScratch {
    /// The disk after a loss of power at this instant, as one of the many that it may be; this one stays as it is. A
    /// function of the random numbers. Completions held back are not delivered by it.
    public func powerCut(random: inout some RandomNumberGenerator) -> MemoryScratch {
        let (durable, changes) = state.withLock { ($0.durableNames, $0.changes) }
        var names = durable
        for change in changes.prefix(Int.random(in: 0...changes.count, using: &random)) {
            change.change.apply(to: &names)
        }
        return cut(to: names) { inode in inode.survivor(random: &random) }
    }

    /// The disk after a loss of power that kept nothing but what was synced.
    public func powerCutLosingAll() -> MemoryScratch {
        cut(to: state.withLock { $0.durableNames }) { $0.durable }
    }

    /// The disk after its process was killed: everything written is there, and what was asked of this one is not answered.
    /// What was not durable is not, as before.
    public func kill() -> MemoryScratch {
        let left = MemoryScratch(names: [:], capacityBytes: capacityBytes, deliver: deliver)
        var copies: [ObjectIdentifier: MemoryInode] = [:]
        func copy(_ inode: MemoryInode) -> MemoryInode {
            if let made = copies[ObjectIdentifier(inode)] { return made }
            let made = MemoryInode(copying: inode)
            copies[ObjectIdentifier(inode)] = made
            return made
        }
        state.withLock { state in
            let names = state.names.mapValues(copy)
            let durableNames = state.durableNames.mapValues(copy)
            let changes = state.changes.map { entry -> (number: UInt64, change: NameChange) in
                guard case .create(let path, let inode) = entry.change else { return entry }
                return (entry.number, .create(path, copy(inode)))
            }
            let nextNumber = state.nextNumber
            left.state.withLock {
                $0.names = names
                $0.durableNames = durableNames
                $0.changes = changes
                $0.nextNumber = nextNumber
            }
        }
        return left
    }

    private func cut(to names: [String: MemoryInode], _ image: (MemoryInode) -> [UInt8]) -> MemoryScratch {
        // In order of names, so that the random numbers are used in the same order every time.
        let left = state.withLock { _ in
            names.sorted { $0.key < $1.key }.map { ($0.key, MemoryInode(image($0.value))) }
        }
        return MemoryScratch(
            names: Dictionary(uniqueKeysWithValues: left), capacityBytes: capacityBytes, deliver: deliver)
    }
}

extension MemoryInode {
    static let sectorBytes = 512

    /// The bytes of this file after a loss of power.
    fileprivate func survivor(random: inout some RandomNumberGenerator) -> [UInt8] {
        let sector = MemoryInode.sectorBytes
        /// For each sector, the last write of which it keeps its part.
        var keptUpTo: [Int: Int] = [:]
        var lastTruncate = -1
        for (index, entry) in pending.enumerated() {
            switch entry.change {
            case .truncate:
                if Bool.random(using: &random) { lastTruncate = index }
            case .write(let bytes, let start):
                let sectors = start / sector...(start + bytes.count - 1) / sector
                switch UInt8.random(in: 0..<3, using: &random) {
                case 0: break
                case 1: for number in sectors { keptUpTo[number] = index }
                default: for number in sectors where Bool.random(using: &random) { keptUpTo[number] = index }
                }
            }
        }

        var image = durable
        var longest = 0
        for (index, entry) in pending.enumerated() {
            switch entry.change {
            case .truncate(let size):
                guard index <= lastTruncate else { continue }
                MemoryInode.resize(&image, to: size)
                longest = 0
            case .write(let bytes, let start):
                longest = max(longest, start + bytes.count)
                for number in start / sector...(start + bytes.count - 1) / sector where keptUpTo[number] ?? -1 >= index
                {
                    let part = max(start, number * sector)..<min(start + bytes.count, (number + 1) * sector)
                    MemoryInode.put(
                        bytes[part.lowerBound - start..<part.upperBound - start], at: part.lowerBound, in: &image)
                }
            }
        }
        // A file may have grown before its data came: the rest reads as zeroes.
        if image.count < longest, UInt8.random(in: 0..<4, using: &random) == 0 {
            MemoryInode.resize(&image, to: longest)
        }
        return image
    }
}
