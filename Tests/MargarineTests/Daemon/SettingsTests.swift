import Margarine
import Testing

struct SettingsTests {
    @Test func namesAreUniqueAndTheirTablesAreKnown() {
        #expect(Set(SettingKey.all.map(\.name)).count == SettingKey.all.count)
        for key in SettingKey.all { #expect(key.table.isEmpty || SettingKey.tables.contains(key.table), "\(key.name)") }
    }

    @Test func defaultsAreWithinTheirBounds() throws {
        let defaults = Settings()
        try defaults.validate()
        for key in SettingKey.all where !key.text(defaults).isEmpty {
            var copy = Settings()
            try key.set(.text(key.text(defaults)), &copy)
            #expect(copy == defaults, "\(key.name)")
        }
    }

    @Test(arguments: [
        ("memory-cache", "16M", "16777215"), ("memory-cache", "1P", "1125899906842625"),
        ("commit-interval", "10ms", "9ms"),
        ("uploads", "256", "257"), ("uploads", "0", "-1"), ("memory-cache", "0", "1"), ("journal", "64M", "0"),
        ("resume-window", "0", "8d"), ("loops", "0", "-1"),
        ("takeover", "force", "Force"), ("log-level", "trace", "verbose"), ("listen", "[::1]:0", "::1:0"),
        ("listen", "127.0.0.1:65535", "127.0.0.1:65536"), ("durability", "store", ""), ("read-timeout", "1s", "1"),
        ("locations", "eu=s3://b?region=x,us=file:///b", "eu=s3://b,eu=s3://c"),
        ("locations", "a=file:///b", "a,file:///b"),
        ("near", "eu", ""),
    ])
    func bothSidesOfEachLimit(_ name: String, _ good: String, _ bad: String) throws {
        let key = try #require(SettingKey.named(name))
        var settings = Settings()
        try key.set(.text(good), &settings)
        let set = settings
        #expect(throws: SettingError.self) { try key.set(.text(bad), &settings) }
        #expect(settings == set, "a refused value changes nothing")
    }

    @Test func theKindOfValueMustFit() throws {
        var settings = Settings()
        #expect(throws: SettingError.self) { try SettingKey.named("scratch")?.set(.number(1), &settings) }
        #expect(throws: SettingError.self) { try SettingKey.named("commit-interval")?.set(.number(5), &settings) }
        #expect(throws: SettingError.self) { try SettingKey.named("uploads")?.set(.list(["1"]), &settings) }
        #expect(throws: SettingError.self) { try SettingKey.named("listen")?.set(.list(["localhost"]), &settings) }
        try SettingKey.named("memory-cache")?.set(.number(64 << 20), &settings)
        try SettingKey.named("resume-window")?.set(.number(0), &settings)
        #expect(settings.memoryCacheBytes == 64 << 20)
        #expect(settings.newDisk.resumeWindowMs == 0)
    }

    @Test func valuesMustFitEachOther() {
        var settings = Settings()
        settings.journalPerDiskBytes = settings.journalBytes + 1
        #expect(throws: SettingError.self) { try settings.validate() }
        settings = Settings()
        settings.ownerDeadAfterMs = 3 * settings.heartbeatIntervalMs - 1
        #expect(throws: SettingError.self) { try settings.validate() }
        settings.ownerDeadAfterMs += 1
        #expect(throws: Never.self) { try settings.validate() }
        settings.scratch = "/" + String(repeating: "x", count: 107 - "//control.sock".utf8.count)
        #expect(throws: Never.self) { try settings.validate() }
        settings.scratch += "x"
        #expect(throws: SettingError.self) { try settings.validate() }
    }

    @Test func aReloadTakesOverWhatItMay() {
        var running = Settings()
        running.store = "file:///a"
        var wanted = running
        wanted.store = "file:///b"
        wanted.loops = 3
        wanted.logLevel = .trace
        wanted.commitIntervalMs = 1000
        wanted.memoryCacheBytes = 1 << 30
        wanted.uploads = 7
        #expect(
            Set(wanted.differences(from: running).map(\.name)) == [
                "store", "loops", "commit-interval", "log-level", "memory-cache", "uploads",
            ])
        let next = wanted.keepingFixed(of: running)
        #expect(next.store == "file:///a" && next.loops == 0)
        #expect(next.memoryCacheBytes == Settings().memoryCacheBytes)
        #expect(next.commitIntervalMs == 1000 && next.logLevel == .trace && next.uploads == 7)
    }

    @Test func namesThatAreNearAreSuggested() {
        let names = SettingKey.all.map(\.name)
        #expect(SettingKey.closest(to: "comit-interval", among: names) == "commit-interval")
        #expect(SettingKey.closest(to: "memory_cache", among: names) == "memory-cache")
        #expect(SettingKey.closest(to: "xyzzy", among: names) == nil)
    }

    @Test(arguments: [("127.0.0.1:10809", "127.0.0.1", 10809), ("[::1]:0", "::1", 0), ("host:1", "host", 1)])
    func addressesAreRead(_ text: String, _ host: String, _ port: Int) {
        let address = ListenAddress(text)
        #expect(address == ListenAddress(host: host, port: UInt16(port)))
        #expect(address?.description == text)
    }

    @Test(arguments: ["", ":", ":1", "a", "a:", "a:x", "a:65536", "a:-1", "::1:1", "[a]:1", "[::1:1", "a b:1", "a/b:1"])
    func whatIsNoAddressIsRefused(_ text: String) {
        #expect(ListenAddress(text) == nil)
    }

    @Test func loopsFollowTheCores() {
        var settings = Settings()
        #expect(settings.loopCount(cores: 1) == 8)
        #expect(settings.loopCount(cores: 16) == 32)
        settings.loops = 1
        #expect(settings.loopCount(cores: 16) == 1)
    }
}
