// What reads, block status, commits and prefetches see of a disk: the committed generation and the layers over it, at one
// instant.
//
// Always holds:
// - whoever looks does so within one synchronous step. The view cannot be copied, and nothing hands out its manifest but for
//   one commit, so that half of an answer can't come from before an await and half from after it;
// - what a step lacks (a manifest page) is loaded without being looked at, and the step is made again on the view of then;
// - `version` changes with everything that changes which layers there are, or over which generation.

internal import BlockCache
internal import ObjectStore
internal import Runtime

/// A manifest page that a step lacked.
enum MissingPage: Equatable {
    /// On the way to the entry of a block.
    case entry(BlockIndex)
    /// On the way to the next block in use.
    case nextUsed(from: BlockIndex)
}

/// Owned by its disk.
struct DiskView: ~Copyable {
    fileprivate private(set) var manifest: Manifest
    private(set) var active: Layer
    private(set) var waiting: Layer?
    private(set) var committing: Layer?
    private(set) var version: UInt64 = 0

    init(manifest: Manifest, active: Layer, waiting: Layer?) {
        self.manifest = manifest
        self.active = active
        self.waiting = waiting
    }

    // MARK: Looking

    /// What the generation says of a block, without the layers over it.
    @inline(__always)
    func entry(_ block: BlockIndex) -> Manifest.Lookup { manifest.entry(block) }

    /// The layers, newest first.
    var layers: [Layer] { [active, waiting, committing].compactMap { $0 } }

    /// Runs of equal status from the start of `range`, all of this instant.
    func status(_ range: Range<UInt64>, onlyOne: Bool, work: inout Int) -> BlockStatus.Step {
        BlockStatus.step(range, onlyOne: onlyOne, manifest, layers, work: &work)
    }

    // MARK: Changing

    /// What was acknowledged up to now waits to be committed, alone or merged with what waits already; what comes goes into
    /// `next`. Returns what waits.
    ///
    /// - Parameters:
    ///   - torn: for `Fault.superBlockOvertakes`: this waits instead.
    ///   - newerLoses: for `Fault.layersMergedWrongly`.
    mutating func freeze(next: Layer, torn: Layer? = nil, newerLoses: Bool = false) -> Layer {
        version += 1
        let frozen = torn ?? active
        if torn == nil { active = next }
        guard let older = waiting else {
            waiting = frozen
            return frozen
        }
        if newerLoses {
            frozen.merge(older)
            waiting = frozen
            return frozen
        }
        older.merge(frozen)
        return older
    }

    /// For `Fault.commitPastSafePoint`.
    mutating func commitActiveToo(next: Layer) {
        version += 1
        committing!.merge(active)
        active = next
    }

    /// What waits is being committed. Nothing is now.
    mutating func beginCommit() {
        precondition(committing == nil, "a commit within a commit")
        version += 1
        committing = waiting
        waiting = nil
    }

    /// The commit that failed begins anew with what waits.
    mutating func widenCommit() {
        guard let committing, let waiting else { return }
        version += 1
        let kind = waiting.kind
        committing.merge(waiting)
        committing.kind = kind
        self.waiting = nil
    }

    /// The generation with what was being committed is there: one step, so that whoever looks finds either the layer or the
    /// generation with it. Returns the layer.
    mutating func endCommit(_ generation: Manifest) -> Layer? {
        version += 1
        manifest = generation
        defer { committing = nil }
        return committing
    }

    /// The same bytes as another generation has them, or of a larger disk.
    mutating func adopt(_ generation: Manifest) {
        version += 1
        manifest = generation
    }

    /// What was written since the last safe point is undone. Returns it.
    mutating func rollBack(to empty: Layer) -> Layer {
        version += 1
        defer { active = empty }
        return active
    }
}

extension Disk {
    // For those who ask about one of them, now.
    var active: Layer { view.active }
    var waiting: Layer? { view.waiting }
    var committing: Layer? { view.committing }

    /// Brings a manifest page near. What it says is for the next step to see: another generation may be current by then.
    func load(_ page: MissingPage) async throws(StoreError) { try await view.manifest.load(page) }

    /// The generation that a commit goes over: it stays with this one, whatever becomes current, and finds out in the end.
    func commitBase() -> Manifest { view.manifest }

    /// For `Fault.statusReadsTwice`: a step over a generation of before, and the layers of now.
    func outdatedGeneration() -> Manifest? {
        context.settings.fault == .statusReadsTwice ? view.manifest : nil
    }
}

extension Disk {
    /// Lets go of a layer that nobody can see any more: some of it each turn, for it may hold millions of pages.
    func discard(_ layer: Layer) {
        if layer.overheadBytes > 1 << 20 { context.heapHasShrunk = true }
        let isDone = layer.drop(atMost: 16_384)
        context.rooms.mayHaveCome()
        if isDone { return context.giveBackLater() }
        nonisolated(unsafe) let rest = layer  // stays on this loop
        context.loop.post { [self] in discard(rest) }
    }
}

extension Manifest {
    func load(_ page: MissingPage) async throws(StoreError) {
        switch page {
        case .entry(let block): try await load(block)
        case .nextUsed(let block): _ = try await nextUsed(from: block)
        }
    }
}
