// Making the journal survive a loss of power: one fdatasync serves all flushes that wait.

internal import BlockCache
internal import Runtime

extension Journal {
    /// Calls `done` once everything queued so far survives power loss.
    func sync(_ done: @escaping (ScratchError?) -> Void) {
        context.loop.assertOwner()
        if let failure { return done(failure) }
        if lastSequence <= syncedSequence || context.settings.fault == .journalSyncSkipped { return done(nil) }
        syncWaiters.append((lastSequence, done))
        pump()
    }

    func pump() {
        guard !isSyncing, failure == nil, let first = syncWaiters.first, first.sequence <= appendedSequence else {
            return
        }
        isSyncing = true
        let target = appendedSequence
        let unsynced = segments.values.filter { !$0.isSynced }
        for segment in unsynced { segment.isSynced = true }
        let directory = directoryIsSynced ? nil : folder
        directoryIsSynced = true
        context.spawn { [self] in
            do throws(ScratchError) {
                for segment in unsynced { try await segment.file.sync() }
            } catch {
                // Not even one that a lack of something explains can be tried again: the kernel forgets what it could not write.
                marker.syncFailed()
                isSyncing = false
                return fail(error)
            }
            await syncFolder(directory, target)
        }
    }

    private func syncFolder(_ directory: String?, _ target: UInt64) async {
        var waits = ScratchWaits()
        while let directory, failure == nil {
            do throws(ScratchError) {
                try await scratch.syncDirectory(directory)
                break
            } catch {
                guard error.isLackOfDescriptors else {
                    isSyncing = false
                    return fail(error)
                }
                if waits.trouble == nil { context.journals.troubles.begin(error, context) }
                await context.environment.sleep(ns: waits.begin(error))
            }
        }
        if let trouble = waits.end() { context.journals.troubles.end(trouble, context) }
        isSyncing = false
        if failure == nil { synced(upTo: target) }
    }

    private func synced(upTo target: UInt64) {
        if target > syncedSequence {
            syncedSequence = target
            marker.synced(upTo: target)
        }
        var ready: [(ScratchError?) -> Void] = []
        syncWaiters.removeAll { waiter in
            if waiter.sequence <= syncedSequence { ready.append(waiter.done) }
            return waiter.sequence <= syncedSequence
        }
        for done in ready { done(nil) }
        pump()
    }
}
