// Descriptors of a loop without a thread: asked for with poll, and only when something may have changed, so that a loop
// whose clients are silent makes no system call.
//
// Always holds: those that are ready are served in the order in which they were first watched, all in one step; what
// decides is what was done to the sockets, never how long that took.

import CLinux
import Glibc

extension Loop {
    /// What a loop without a thread knows of its descriptors.
    enum PollState {
        /// None is ready.
        case none
        /// Something may have changed.
        case unknown
        case ready
    }

    /// Somebody outside did something to the other end of a watched descriptor. Only for loops without a thread.
    public func descriptorsMayBeReady() {
        if !polls.isEmpty { pollState = .unknown }
    }

    /// What the epoll instance does for a loop with a thread.
    func controlPolls(_ operation: Int32, _ fd: Int32, _ events: Events) -> Int32 {
        let place = polls.firstIndex { $0.fd == fd }
        let bits = Int16(truncatingIfNeeded: events.rawValue)
        switch (operation, place) {
        case (MG_EPOLL_ADD, nil): polls.append(pollfd(fd: fd, events: bits, revents: 0))
        case (MG_EPOLL_MODIFY, let place?): polls[place].events = bits
        case (MG_EPOLL_DELETE, let place?): polls.remove(at: place)
        default: return -(place == nil ? ENOENT : EEXIST)
        }
        pollState = polls.isEmpty ? .none : .unknown
        return 0
    }

    func haveReadyDescriptors() -> Bool {
        if pollState == .unknown { pollState = poll() > 0 ? .ready : .none }
        return pollState == .ready
    }

    private func poll() -> Int32 {
        let count = polls.withUnsafeMutableBufferPointer { Glibc.poll($0.baseAddress, nfds_t($0.count), 0) }
        precondition(count >= 0 || errno == EINTR, "poll: \(errnoText(errno))")
        return count
    }

    /// False: none was ready.
    func dispatchReadyDescriptors() -> Bool {
        guard poll() > 0 else {
            pollState = .none
            return false
        }
        let events = polls.compactMap { poll -> mg_event? in
            if poll.revents == 0 { return nil }
            precondition(poll.revents & Int16(POLLNVAL) == 0, "descriptor \(poll.fd) was closed before unwatch")
            let data = Loop.data(fd: poll.fd, generation: watches[Int(poll.fd)].generation)
            return mg_event(data: data, events: UInt32(UInt16(bitPattern: poll.revents)))
        }
        pollState = .unknown
        for event in events { dispatch(event) }
        return true
    }
}
