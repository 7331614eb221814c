// Large mappings that a process reserves at start and that become memory only as they are touched.

import Glibc

package enum AddressSpace {
    /// Whether a mapping of `bytes` can be had: where it can't (ulimit -v, overcommit off), that is an error of the start and
    /// not its end.
    /// - Throws: with what to do.
    package static func check(_ bytes: UInt64, for what: String) throws(ScratchError) {
        let length = Int(clamping: bytes)
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        guard let mapped = mmap(nil, length, PROT_READ | PROT_WRITE, flags, -1, 0), mapped != MAP_FAILED else {
            throw ScratchError(
                errno: errno,
                description: "no address space for \(what): \(errnoText(errno)); make it smaller, or raise ulimit -v")
        }
        munmap(mapped, length)
    }
}
