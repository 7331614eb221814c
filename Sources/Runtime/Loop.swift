// A thread that waits for descriptors, timers, disk completions and messages, and runs what they call for.
//
// Always holds:
// - Everything marked "loop only" is touched by the loop's own thread, so none of it has a lock; other threads reach the
//   loop through `post` and `enqueue` alone.
// - A turn is: descriptors, disk completions, messages, timers, the end-of-turn work, one submit to the ring. Each step
//   handles what was there when the step began, then the next turn polls without waiting while anything is left: no
//   source starves another.
// - Messages run in the order in which they were posted. Only a loop about to sleep is woken, by one write.
// - An idle loop sleeps in the kernel without a timeout.

import CLinux
import Glibc
import Synchronization

/// What a descriptor is ready for.
public struct Events: OptionSet, Sendable {
    public let rawValue: UInt32
    public init(rawValue: UInt32) { self.rawValue = rawValue }
    public static let readable = Events(rawValue: UInt32(MG_EPOLL_READABLE))
    public static let writable = Events(rawValue: UInt32(MG_EPOLL_WRITABLE))
    /// The peer closed its side (told only to those who watch for it), or the connection is broken (always told).
    public static let hangup = Events(rawValue: UInt32(MG_EPOLL_HANGUP))
}

/// What a loop calls when a watched descriptor is ready.
public protocol EventHandler: AnyObject {
    /// Called on the loop, again each turn while the condition lasts (level-triggered). May be called once more than
    /// there is something to do: treat `wouldBlock` as normal.
    func ready(_ events: Events)
}

/// One thread with its descriptors, timers and mailbox; also the executor of the tasks that belong to it.
public final class Loop: TaskExecutor, @unchecked Sendable {  // owned by its thread, but for `mailbox` and the atomics
    public let name: String

    // Shared with all threads.
    private let mailbox = Mutex<[Message]>([])
    private let hasMail = Atomic<Bool>(false)
    private let isSleeping = Atomic<Bool>(false)
    private let isStopping = Atomic<Bool>(false)
    private let lifecycle = Mutex<Lifecycle>(.new)
    private let epoll: Int32
    private let wakeup: Int32

    // Loop only.
    private(set) var watches: [Watch] = []
    private var received: [Message] = []
    /// How many of `received` were run by `step`.
    private var stepped = 0
    private var endWork: [() -> Void] = []
    private var endWorkRunning: [() -> Void] = []
    private var timers = TimerHeap()
    private let ready = UnsafeMutablePointer<mg_event>.allocate(capacity: Loop.eventsPerTurn)
    private var receiveBufferStorage: UnsafeMutableRawBufferPointer?
    private var watchGeneration: UInt32 = 0
    /// Disk requests of this loop.
    let disk: DiskQueue
    /// Where the time comes from in a loop without a thread; nil: the system's monotonic clock.
    let clock: (@Sendable () -> UInt64)?
    /// What a loop without a thread watches, in the order in which it began to.
    var polls: [pollfd] = []
    /// What it knows of them.
    var pollState = PollState.none
    /// Only for loops without a thread: asked before each step of a task. true: the step was taken away, and comes back to
    /// this loop when `comeBack` is called; others may overtake it meanwhile.
    public var takesAway: ((_ comeBack: @escaping @Sendable () -> Void) -> Bool)?

    private static let eventsPerTurn = 128
    private static let stackBytes = 256 << 10
    private static let keptMessages = 4096
    private static let wakeupData = UInt64.max
    private static let diskData = UInt64.max - 1

    /// Makes the loop and its kernel objects; starts nothing. Fails where the process has no descriptor left.
    public convenience init(name: String) throws(ScratchError) {
        try self.init(name: name, ring: true)
    }

    /// With `ring` false, disk requests go to threads even where io_uring works.
    init(name: String, ring: Bool) throws(ScratchError) {
        self.name = name
        clock = nil
        let epoll = mg_epoll_create()
        guard epoll >= 0 else { throw ScratchError(-epoll, "epoll_create", name) }
        let wakeup = mg_eventfd()
        guard wakeup >= 0 else {
            close(epoll)
            throw ScratchError(-wakeup, "eventfd", name)
        }
        self.epoll = epoll
        self.wakeup = wakeup
        disk = DiskQueue(ring: ring)
        disk.loop = self
        var error = mg_epoll_control(
            epoll, MG_EPOLL_ADD, wakeup, UInt32(MG_EPOLL_READABLE) | UInt32(MG_EPOLL_EDGE), Loop.wakeupData)
        if error == 0, let fd = disk.ringDescriptor {
            error = mg_epoll_control(epoll, MG_EPOLL_ADD, fd, UInt32(MG_EPOLL_READABLE), Loop.diskData)
        }
        guard error == 0 else { throw ScratchError(-error, "epoll_ctl", name) }
    }

    /// A loop without a thread, for simulation: its maker runs it with `step`, always from one thread, and it has the
    /// time from `clock`, in nanoseconds. Descriptors are looked at when `descriptorsMayBeReady` says so.
    public init(name: String, clock: @escaping @Sendable () -> UInt64) {
        self.name = name
        self.clock = clock
        epoll = -1
        wakeup = -1
        disk = DiskQueue(ring: false)
        disk.loop = self
    }

    deinit {
        if epoll >= 0 { close(epoll) }
        if wakeup >= 0 { close(wakeup) }
        ready.deallocate()
        receiveBufferStorage?.deallocate()
    }

    /// Whether disk requests go through io_uring; if not, `ringRefusal` says why and they go to a few threads.
    public var usesRing: Bool { disk.ringDescriptor != nil }
    /// Why there is no io_uring and what to do, in one line for people.
    public var ringRefusal: String? { disk.ringRefusal }

    // MARK: Thread

    private enum Lifecycle {
        case new
        case running(thread: UInt)
        case stopped
    }

    /// Starts the thread, if this loop is to have one. Once per loop.
    public func start() {
        if clock != nil { return }
        lifecycle.withLock { state in
            guard case .new = state else { preconditionFailure("loop \(name) was started before") }
            var thread: UInt = 0
            let error = mg_thread_start(
                { argument in
                    let loop = Unmanaged<Loop>.fromOpaque(argument!).takeRetainedValue()
                    mg_thread_set_loop(argument)
                    loop.turnUntilStopped()
                    mg_thread_set_loop(nil)
                    return nil
                }, Unmanaged.passRetained(self).toOpaque(), Loop.stackBytes, name, &thread)
            precondition(error == 0, "no thread for loop \(name): \(errnoText(-error))")
            state = .running(thread: thread)
        }
    }

    /// Ends the loop: disk requests under way and messages already posted still run, timers and descriptors are dropped.
    /// Returns when the thread has ended; on the loop itself at once, and the thread ends after the turn. Messages posted
    /// later never run, so end the loop's tasks first.
    public func stop() {
        let thread: UInt? = lifecycle.withLock { state in
            guard case .running(let thread) = state else { return nil }
            state = .stopped
            return thread
        }
        guard let thread else { return }
        isStopping.store(true, ordering: .sequentiallyConsistent)
        if isCurrent {
            _ = mg_thread_detach(thread)
        } else {
            mg_eventfd_signal(wakeup)
            _ = mg_thread_join(thread)
        }
    }

    /// The loop whose thread this is; nil on any other thread.
    public static var current: Loop? {
        guard let pointer = mg_thread_loop() else { return nil }
        return Unmanaged<Loop>.fromOpaque(pointer).takeUnretainedValue()
    }

    /// Whether the caller runs on this loop's thread.
    public var isCurrent: Bool { mg_thread_loop() == Unmanaged.passUnretained(self).toOpaque() }

    private func checkOwner() {
        precondition(isCurrent, "loop-only call from another thread")
    }

    // MARK: Messages

    private enum Message {
        case work(@Sendable () -> Void)
        case job(UnownedJob)
    }

    /// Runs `work` on the loop, after all that was posted before. From any thread.
    public func post(_ work: @escaping @Sendable () -> Void) {
        send(.work(work))
    }

    public func enqueue(_ job: consuming ExecutorJob) {
        send(.job(UnownedJob(job)))
    }

    /// Starts a task that runs on this loop whenever it runs.
    public func run(task: @escaping @Sendable () async -> Void) {
        Task(executorPreference: self) { await task() }
    }

    private func send(_ message: Message) {
        mailbox.withLock { messages in
            messages.append(message)
            hasMail.store(true, ordering: .sequentiallyConsistent)
        }
        // Pairs with `wait`: either the loop sees the mail before it sleeps, or we see that it sleeps.
        if isSleeping.load(ordering: .sequentiallyConsistent),
            isSleeping.exchange(false, ordering: .sequentiallyConsistent)
        {
            mg_eventfd_signal(wakeup)
        }
    }

    private func runMessages() {
        guard hasMail.load(ordering: .acquiring) else { return }
        mailbox.withLock { messages in
            swap(&messages, &received)
            hasMail.store(false, ordering: .relaxed)
        }
        for index in received.indices { run(received[index]) }
        received.removeAll(keepingCapacity: received.capacity <= Loop.keptMessages)
    }

    private func run(_ message: Message) {
        switch message {
        case .work(let work): work()
        case .job(let job): job.runSynchronously(on: asUnownedTaskExecutor())
        }
    }

    // MARK: Descriptors

    struct Watch {
        var handler: (any EventHandler)?
        var generation: UInt32 = 0
    }

    /// Calls `handler` whenever `fd` is ready for any of `events`, until `unwatch`; holds it till then. Loop only.
    public func watch(_ fd: Int32, _ events: Events, _ handler: any EventHandler) throws(ScratchError) {
        checkOwner()
        precondition(fd >= 0)
        let index = Int(fd)
        while watches.count <= index { watches.append(Watch()) }
        precondition(watches[index].handler == nil, "descriptor \(fd) is watched already")
        watchGeneration &+= 1
        let error = control(MG_EPOLL_ADD, fd, events, Loop.data(fd: fd, generation: watchGeneration))
        guard error == 0 else { throw ScratchError(-error, "epoll_ctl", "\(name), descriptor \(fd)") }
        watches[index] = Watch(handler: handler, generation: watchGeneration)
    }

    /// Changes what a watched descriptor is watched for. With none, only a broken connection is told. Loop only.
    public func rewatch(_ fd: Int32, _ events: Events) {
        checkOwner()
        let watch = watches[Int(fd)]
        precondition(watch.handler != nil, "descriptor \(fd) is not watched")
        let error = control(MG_EPOLL_MODIFY, fd, events, Loop.data(fd: fd, generation: watch.generation))
        precondition(error == 0, "epoll_ctl: \(errnoText(-error)): was descriptor \(fd) closed before unwatch?")
    }

    /// Forgets a descriptor; its handler is not called any more. Before the descriptor is closed. Loop only.
    public func unwatch(_ fd: Int32) {
        checkOwner()
        guard Int(fd) < watches.count, watches[Int(fd)].handler != nil else { return }
        watches[Int(fd)].handler = nil
        let error = control(MG_EPOLL_DELETE, fd, [], 0)
        precondition(error == 0, "epoll_ctl: \(errnoText(-error)): was descriptor \(fd) closed before unwatch?")
    }

    private func control(_ operation: Int32, _ fd: Int32, _ events: Events, _ data: UInt64) -> Int32 {
        if clock != nil { return controlPolls(operation, fd, events) }
        return mg_epoll_control(epoll, operation, fd, events.rawValue, data)
    }

    static func data(fd: Int32, generation: UInt32) -> UInt64 {
        UInt64(generation) << 31 | UInt64(UInt32(fd))
    }

    func dispatch(_ event: mg_event) {
        if event.data >= Loop.diskData {  // the wake-up is edge-triggered and needs no read; the ring is reaped next
            return
        }
        let index = Int(event.data & 0x7fff_ffff)
        // An earlier event of this turn may have ended this watch, and begun another one of the same number.
        guard watches[index].generation == UInt32(truncatingIfNeeded: event.data >> 31),
            let handler = watches[index].handler
        else { return }
        var bits = event.events
        if bits & Events.hangup.rawValue != 0 { bits |= Events.hangup.rawValue }
        handler.ready(Events(rawValue: bits))
    }

    // MARK: Timers

    /// Runs `work` on the loop, `ns` nanoseconds from now or later. Loop only.
    @discardableResult
    public func after(ns: UInt64, _ work: @escaping @Sendable () -> Void) -> LoopTimer {
        checkOwner()
        let (deadline, overflow) = nowNs.addingReportingOverflow(ns)
        let timer = LoopTimer(loop: self, deadlineNs: overflow ? .max : deadline, work: work)
        timers.insert(timer)
        return timer
    }

    func cancel(_ timer: LoopTimer) {
        checkOwner()
        timers.remove(timer)
    }

    /// Runs `work` at the end of this turn, once, before the loop submits to the disk and sleeps. Work added by
    /// end-of-turn work runs at the end of the next turn, which follows at once. Loop only.
    public func atEndOfTurn(_ work: @escaping () -> Void) {
        checkOwner()
        endWork.append(work)
    }

    /// 256 KiB for whoever receives at the moment: its bytes are gone when the handler returns. Loop only.
    public var receiveBuffer: UnsafeMutableRawBufferPointer {
        checkOwner()
        if let storage = receiveBufferStorage { return storage }
        let storage = UnsafeMutableRawBufferPointer.allocate(byteCount: 256 << 10, alignment: 4096)
        receiveBufferStorage = storage
        return storage
    }

    private var nowNs: UInt64 { clock.map { $0() } ?? mg_monotonic_ns() }

    // MARK: Without a thread (`Loop+Driven`)

    /// Whether `step` has something to do now.
    public var isReady: Bool {
        !received.isEmpty || !endWork.isEmpty || hasMail.load(ordering: .relaxed)
            || (timers.nextDeadlineNs.map { $0 <= nowNs } ?? false)
            || (pollState != .none && haveReadyDescriptors())
    }

    /// When the next timer is due, on this loop's clock.
    public var nextDeadlineNs: UInt64? { timers.nextDeadlineNs }

    /// One of three: ready descriptors, the oldest message, the timer that is due first; in this order, but for what the
    /// caller puts before. Then the work at the end of the turn. Only for loops without a thread.
    public func step(timersFirst: Bool = false, messagesFirst: Bool = false) {
        precondition(clock != nil, "loop \(name) has a thread")
        let previous = mg_thread_loop()
        mg_thread_set_loop(Unmanaged.passUnretained(self).toOpaque())
        defer { mg_thread_set_loop(previous) }
        if timersFirst, let work = timers.takeDue(now: nowNs) {
            work()
        } else if messagesFirst, let message = nextMessage() {
            runUnlessTaken(message)
        } else if pollState != .none, dispatchReadyDescriptors() {
        } else if let message = nextMessage() {
            runUnlessTaken(message)
        } else if let work = timers.takeDue(now: nowNs) {
            work()
        }
        if !endWork.isEmpty { runEndWork() }
    }

    private func runUnlessTaken(_ message: Message) {
        if let takesAway, case .job(let job) = message,
            takesAway({ [self] in post { job.runSynchronously(on: self.asUnownedTaskExecutor()) } })
        {
            return
        }
        run(message)
    }

    private func nextMessage() -> Message? {
        if stepped == received.count {
            received.removeAll(keepingCapacity: true)
            stepped = 0
            mailbox.withLock { messages in
                swap(&messages, &received)
                hasMail.store(false, ordering: .relaxed)
            }
        }
        guard stepped < received.count else { return nil }
        stepped += 1
        let message = received[stepped - 1]
        if stepped == received.count {
            received.removeAll(keepingCapacity: true)
            stepped = 0
        }
        return message
    }

    // MARK: Turns

    private func turnUntilStopped() {
        while true {
            if isStopping.load(ordering: .relaxed), !hasMail.load(ordering: .acquiring), endWork.isEmpty, disk.isIdle {
                break
            }
            turn()
        }
        // What handlers and timers release may call back, so let go of it outside the property's own access.
        var watches: [Watch] = []
        swap(&watches, &self.watches)
        var timers = TimerHeap()
        swap(&timers, &self.timers)
        disk.close()
    }

    /// One turn, on the thread that `mg_thread_loop` says is this one. Internal for tests that are the loop themselves.
    func turn() {
        let count = wait()
        for index in 0..<count { dispatch(ready[index]) }
        disk.reap()
        runMessages()
        runDueTimers()
        if !endWork.isEmpty { runEndWork() }
        disk.submit()
    }

    private func runDueTimers() {
        guard !timers.isEmpty, !isStopping.load(ordering: .relaxed) else { return }
        let now = nowNs  // read once, so that a timer made by a timer waits for the next turn
        while let work = timers.takeDue(now: now) { work() }
    }

    private func runEndWork() {
        swap(&endWork, &endWorkRunning)
        for work in endWorkRunning { work() }
        endWorkRunning.removeAll(keepingCapacity: endWorkRunning.capacity <= Loop.keptMessages)
    }

    /// Polls; waits only when nothing is left to do.
    private func wait() -> Int {
        var timeoutNs: Int64 = -1
        if !endWork.isEmpty || hasMail.load(ordering: .relaxed) {
            timeoutNs = 0
        } else if let deadline = timers.nextDeadlineNs {
            let now = nowNs
            timeoutNs = deadline <= now ? 0 : Int64(clamping: deadline - now)
        }
        if disk.mustRetrySubmit { timeoutNs = timeoutNs < 0 ? 1_000_000 : min(timeoutNs, 1_000_000) }
        if timeoutNs != 0 {
            isSleeping.store(true, ordering: .sequentiallyConsistent)
            if hasMail.load(ordering: .sequentiallyConsistent)
                || (isStopping.load(ordering: .sequentiallyConsistent) && disk.isIdle)
            {
                timeoutNs = 0
            }
        }
        let count = mg_epoll_wait(epoll, ready, Int32(Loop.eventsPerTurn), timeoutNs)
        isSleeping.store(false, ordering: .relaxed)
        precondition(count >= 0, "epoll_wait: \(errnoText(Int32(-count)))")
        return Int(count)
    }
}
