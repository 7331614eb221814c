// Why a call on the catalog failed, for people and for the few callers that act on the kind.

package import ObjectStore

/// What went wrong with a disk's head, a record, or a whole operation on a disk.
package struct CatalogError: Error, Sendable, CustomStringConvertible {
    package enum Kind: Sendable, Equatable {
        /// No disk, or no generation, of this name.
        case notFound
        /// A disk of this name is there already.
        case exists
        /// A name, size or option that cannot be.
        case invalid
        /// A server has the disk; force, or its end, is needed.
        case owned
        /// Another writer changed the disk at the same time, again and again.
        case conflict
        /// It took so long that what it stored may be deleted by a collection: it was given up.
        case tooSlow
        /// Stored control data is damaged, or of a version that this Margarine does not know.
        case corrupt
        /// The store failed; `.unclear` means that the change may have taken effect.
        case store(StoreError.Kind)
        /// A local file failed.
        case file
    }
    package var kind: Kind
    /// What was wrong, where, and what to do: for people, in one line.
    package var description: String
    package init(_ kind: Kind, _ description: String) {
        self.kind = kind
        self.description = description
    }
    package init(_ error: StoreError) {
        kind = error.kind == .corrupt ? .corrupt : .store(error.kind)
        description = error.description
    }

    /// Runs a call on a bucket, its errors told as this room's.
    package static func wrap<T>(_ body: () async throws(StoreError) -> T) async throws(CatalogError) -> T {
        do throws(StoreError) { return try await body() } catch { throw CatalogError(error) }
    }
}
