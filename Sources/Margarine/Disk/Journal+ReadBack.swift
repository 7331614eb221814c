// Reading dirty pages back from the journal, which memory has forgotten.

internal import BlockCache
internal import Runtime

extension Journal {
    /// Pages one behind the other in a segment, which stays readable as long as this value lives, released or not.
    struct Piece: Sendable {
        let segment: Segment
        let offset: UInt32
        /// Of each page.
        var sums: [UInt32]

        /// Where page `index` of the piece is.
        func location(_ index: Int) -> JournalLocation {
            JournalLocation(segment: segment.number, offset: offset + UInt32(index * Geometry.pageBytes))
        }
    }

    /// Groups slots whose pages lie one behind the other; order is kept. Take hold of what is to be read before anything is
    /// awaited: a commit may release segments meanwhile.
    func pieces(of slots: [UInt32]) -> [Piece] {
        var pieces: [Piece] = []
        for slot in slots {
            let s = pages[slot]
            if let last = pieces.last, last.location(last.sums.count) == s.location {
                pieces[pieces.count - 1].sums.append(s.sum)
            } else {
                guard let segment = segments[s.location.segment] else {
                    preconditionFailure("a page in segment \(s.location.segment) of \(folder), which was released")
                }
                pieces.append(Piece(segment: segment, offset: s.location.offset, sums: [s.sum]))
            }
        }
        return pieces
    }

    /// Reads pages back, verified.
    func read(_ piece: Piece) async throws(ScratchError) -> [UInt8] {
        let bytes = try await piece.segment.file.read(
            count: piece.sums.count * Geometry.pageBytes, at: UInt64(piece.offset))
        let bad = bytes.withUnsafeBytes { p in
            piece.sums.indices.first {
                JournalFormat.pageSum(p.baseAddress! + $0 * Geometry.pageBytes) != piece.sums[$0]
            }
        }
        if let bad {
            throw ScratchError.corrupt(
                "\(piece.segment.path): the page at \(Int(piece.offset) + bad * Geometry.pageBytes) is not what was written there"
            )
        }
        return bytes
    }
}
