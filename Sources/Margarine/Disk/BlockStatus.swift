// base:allocation, out of layers and manifest alone: no data is fetched to know where there is none. An answer is put
// together in one synchronous step, so all of it is of one instant; where a manifest page is missing, or the step has done its
// share of work, the answer is for a shorter range, and the client asks on from there (NBD's document allows that).

internal import BlockCache

/// Joins neighbours of equal status, up to a bound.
struct ExtentList {
    /// More than this is not told in one reply.
    static let limit = 8192
    private(set) var extents: [Extent] = []

    /// false: full.
    mutating func add(_ lengthBytes: UInt64, allocated: Bool) -> Bool {
        if let last = extents.last, last.isHole != allocated {
            extents[extents.count - 1].lengthBytes += lengthBytes
            return true
        }
        if extents.count == ExtentList.limit { return false }
        extents.append(Extent(lengthBytes: lengthBytes, isHole: !allocated, isZero: !allocated))
        return true
    }
}

struct BlockStatus {
    /// Slices and runs that one turn of a loop looks at for a disk: about a millisecond.
    static let workPerTurn = 16_384

    enum Step {
        /// At least one.
        case extents([Extent])
        /// Nothing can be said without this page.
        case needs(MissingPage)
    }

    private let end: UInt64
    private let onlyOne: Bool
    private let manifest: Manifest
    /// Newest first.
    private let layers: [Layer]
    private var list = ExtentList()
    private var position: UInt64
    private var nextUsed: BlockIndex?
    private var knowsNextUsed = false

    /// The status from the start of `range` on, not beyond its end, over a manifest and layers of the same instant. Ends when
    /// `work` is used up, and always says something of the first slice.
    static func step(
        _ range: Range<UInt64>, onlyOne: Bool, _ manifest: Manifest, _ layers: [Layer], work: inout Int
    ) -> Step {
        var status = BlockStatus(
            end: range.upperBound, onlyOne: onlyOne, manifest: manifest, layers: layers.filter { !$0.isEmpty },
            position: range.lowerBound)
        return status.run(&work)
    }

    private init(end: UInt64, onlyOne: Bool, manifest: Manifest, layers: [Layer], position: UInt64) {
        self.end = end
        self.onlyOne = onlyOne
        self.manifest = manifest
        self.layers = layers
        self.position = position
    }

    private mutating func run(_ work: inout Int) -> Step {
        while position < end, list.extents.count < 2 || !onlyOne {
            if !list.extents.isEmpty, work <= 0 { break }
            work -= 1
            var isFull = false
            if let missing = advance(&work, &isFull) {
                if list.extents.isEmpty { return .needs(missing) }
                break
            }
            if isFull { break }
        }
        return .extents(onlyOne ? Array(list.extents.prefix(1)) : list.extents)
    }

    /// Goes on by one slice, or to the next one of which there is something to say.
    private mutating func advance(_ work: inout Int, _ isFull: inout Bool) -> MissingPage? {
        let slice = UInt64(Geometry.sliceBytes)
        let perBlock = UInt64(Geometry.slicesPerBlock)
        let number = position / slice
        let block = BlockIndex(number / perBlock)
        if !knowsNextUsed || nextUsed.map({ $0 < block }) == true {
            guard case .block(let next) = manifest.nextUsedLoaded(from: block) else { return .nextUsed(from: block) }
            nextUsed = next
            knowsNextUsed = true
        }
        var entry: BlockEntry?
        if nextUsed == block {
            guard case .entry(let found) = manifest.entry(block) else { return .entry(block) }
            entry = found
        } else {
            // No stored block here: nothing but what the layers hold.
            let touched = layers.compactMap { $0.nextTouched(atOrAfter: number) }.min() ?? .max / slice
            if touched != number {
                let used = nextUsed.map { $0.value * perBlock } ?? .max / slice
                let next = min(end, min(touched, used) * slice)
                isFull = !add(next, allocated: false)
                return nil
            }
        }
        isFull = !addSlice(number, to: min(end, (number + 1) * slice), entry, &work)
        return nil
    }

    private mutating func add(_ next: UInt64, allocated: Bool) -> Bool {
        guard list.add(next - position, allocated: allocated) else { return false }
        position = next
        return true
    }

    /// Adds what is left of one slice. false: the list is full.
    private mutating func addSlice(_ number: UInt64, to end: UInt64, _ entry: BlockEntry?, _ work: inout Int) -> Bool {
        let stored = entry?.key(SliceIndex(Int(number % UInt64(Geometry.slicesPerBlock)))) != nil
        var zero = PageMask.none
        var data = PageMask.none
        for layer in layers.reversed() {
            let masks = layer.masks(of: number)
            zero = (zero & ~masks.data) | masks.zero
            data = (data & ~masks.zero) | masks.data
        }
        let allocated = stored ? data | ~zero : data
        let start = number * UInt64(Geometry.sliceBytes)
        while position < end {
            let page = Int((position - start) / UInt64(Geometry.pageBytes))
            let isAllocated = allocated.contains(page)
            let last = allocated.endOfRun(from: page)
            work -= 1
            guard add(min(end, start + UInt64(last * Geometry.pageBytes)), allocated: isAllocated) else { return false }
        }
        return true
    }
}

extension PageMask {
    /// The first page behind `page` that is not as it is; 128 if all are.
    func endOfRun(from page: Int) -> Int {
        let (low, high) = contains(page) ? (~self.low, ~self.high) : (self.low, self.high)
        if page < 64 {
            let rest = low >> UInt64(page)
            if rest != 0 { return page + rest.trailingZeroBitCount }
            return high == 0 ? 128 : 64 + high.trailingZeroBitCount
        }
        let rest = high >> UInt64(page - 64)
        return rest == 0 ? 128 : page + rest.trailingZeroBitCount
    }
}
