// The control socket's `cut`: generations of several disks as of one instant.

extension Daemon {
    /// - Parameter names: of disks that are attached here, with commas between them.
    public func cut(_ names: String) async -> ControlAnswer {
        let names = names.split(separator: ",").map(String.init)
        guard !names.isEmpty, names.count <= 64, Set(names).count == names.count else {
            return ControlAnswer(error: "cut takes the names of 1 to 64 disks")
        }
        guard let disks else { return ControlAnswer(error: "the daemon is not ready yet") }
        do throws(CutError) {
            return ControlAnswer(generations: try await disks.cut(names))
        } catch {
            return ControlAnswer(error: error.description)
        }
    }
}
