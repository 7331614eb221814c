// How much memory this process may use: the least of what the machine has and what its cgroups allow, as the kernel says
// under /proc and /sys. Whatever can't be read is no limit.

internal import Glibc

/// A limit of memory, and who sets it.
package struct MemoryLimit: Sendable, Equatable {
    package var bytes: UInt64
    /// For people: `cgroup /system.slice/margined.service`, `this machine`.
    package var source: String
    package init(bytes: UInt64, source: String) {
        self.bytes = bytes
        self.source = source
    }

    /// - Parameter root: stands for `/`, for tests.
    package static func find(root: String = "") -> MemoryLimit {
        let groups = CgroupFiles(root: root)
        var least = MemoryLimit(bytes: machineBytes(root), source: "this machine")
        for folder in groups.folders {
            for name in folder.names {
                guard let text = readText("\(folder.path)/\(name)"), let bytes = UInt64(text), bytes < least.bytes
                else {
                    continue
                }
                least = MemoryLimit(bytes: bytes, source: "cgroup \(folder.group)")
            }
        }
        return least
    }

    private static func machineBytes(_ root: String) -> UInt64 {
        let line = readText("\(root)/proc/meminfo", whole: true)?.split(separator: "\n").first {
            $0.hasPrefix("MemTotal:")
        }
        let kibibytes = line?.split(separator: " ").dropFirst().first.flatMap { UInt64($0) }
        return kibibytes.flatMap { $0 <= UInt64.max >> 10 ? $0 << 10 : nil } ?? .max
    }
}

/// The folders in which the limits of this process's cgroups and of those above them are, in both versions of cgroups.
private struct CgroupFiles {
    struct Folder {
        var path: String
        /// As the kernel names the group.
        var group: String
        var names: [String]
    }
    private(set) var folders: [Folder] = []

    init(root: String) {
        guard let groups = readText("\(root)/proc/self/cgroup", whole: true),
            let mounts = readText("\(root)/proc/self/mountinfo", whole: true)
        else { return }
        for line in groups.split(separator: "\n") {
            // `4:memory:/path` in version 1, `0::/path` in version 2.
            let parts = line.split(separator: ":", maxSplits: 2, omittingEmptySubsequences: false)
            guard parts.count == 3 else { continue }
            let isUnified = parts[0] == "0" && parts[1].isEmpty
            guard isUnified || parts[1].split(separator: ",").contains("memory") else { continue }
            let names = isUnified ? ["memory.max", "memory.high"] : ["memory.limit_in_bytes"]
            for mount in CgroupFiles.mounts(mounts, isUnified: isUnified) {
                addAll(from: String(parts[2]), root + mount.point, mount.root, names)
            }
        }
    }

    /// The group and all above it, as far as they can be seen here.
    private mutating func addAll(from group: String, _ point: String, _ mountRoot: String, _ names: [String]) {
        // In a container the mount may begin below the root of the hierarchy, or the path be of another's view.
        var rest = group[...]
        if mountRoot != "/", group == mountRoot || group.hasPrefix(mountRoot + "/") {
            rest = rest.dropFirst(mountRoot.count)
        } else if mountRoot != "/" {
            rest = ""
        }
        while rest.hasSuffix("/") { rest.removeLast() }
        while true {
            folders.append(Folder(path: point + rest, group: rest.isEmpty ? "/" : String(rest), names: names))
            guard let slash = rest.lastIndex(of: "/") else { return }
            rest = rest[..<slash]
        }
    }

    /// Where cgroups of memory are mounted, and from which group on.
    private static func mounts(_ text: String, isUnified: Bool) -> [(root: String, point: String)] {
        text.split(separator: "\n").compactMap { line in
            // `36 35 98:0 /root /point options [more] - type source options`
            let halves = line.split(separator: " - ", maxSplits: 1)
            guard halves.count == 2 else { return nil }
            let mount = halves[0].split(separator: " ")
            let kind = halves[1].split(separator: " ")
            guard mount.count >= 5, let type = kind.first else { return nil }
            let isOurs =
                isUnified
                ? type == "cgroup2" : type == "cgroup" && kind.last?.split(separator: ",").contains("memory") == true
            return isOurs ? (String(mount[3]), String(mount[4])) : nil
        }
    }
}

/// The text of a small file, up to its first line's end or `whole`; nil when it can't be read.
private func readText(_ path: String, whole: Bool = false) -> String? {
    let file = open(path, O_RDONLY | O_CLOEXEC)
    guard file >= 0 else { return nil }
    defer { close(file) }
    var bytes: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 16 << 10)
    while bytes.count < 1 << 20 {
        let count = read(file, &buffer, buffer.count)
        if count <= 0 { break }
        bytes += buffer[..<count]
    }
    return String(decoding: whole ? bytes[...] : bytes.prefix { $0 != 10 }, as: UTF8.self)
}
