// One table of everything that can be set: name, where it stands in the file, bounds, and whether SIGHUP changes it.
// The TOML reader, `serve --set` and the manual page's test all go by it, so that no two of them can disagree.

/// A value as the configuration gives it, before it is held against its key.
public enum SettingValue: Sendable, Equatable {
    case text(String)
    case number(Int64)
    case list([String])
}

/// Why a value does not fit its key.
public struct SettingError: Error, Equatable, CustomStringConvertible {
    public let description: String
    init(_ description: String) { self.description = description }
}

/// One key of the configuration.
public struct SettingKey: Sendable {
    /// The table of the file it stands in; empty for the top.
    public let table: String
    /// kebab-case; unique over all tables.
    public let name: String
    /// What the value looks like, for people: `size, 16M to 1P`.
    public let form: String
    /// SIGHUP takes it over; all others need a restart.
    public let isReloadable: Bool
    /// Checks a value and puts it in.
    public let set: @Sendable (SettingValue, inout Settings) throws(SettingError) -> Void
    /// The value as text, as `--set` would take it.
    public let text: @Sendable (Settings) -> String
}

extension SettingKey {
    /// Every key, in the order of the manual page.
    public static let all: [SettingKey] = [
        .optionalText("store", table: "", form: "URL, file:///path or s3://bucket/prefix", \.store),
        .locations("locations", \.locations),
        .optionalText("near", table: "", form: "name of one of the locations", \.near),

        .path("scratch", \.scratch),
        .addresses("listen", \.listen),
        .paths("unix", \.unix),
        .optionalText("control", table: "serve", form: "path", \.control),
        .choice("takeover", table: "serve", \.takeover),
        .duration("read-timeout", 1000...3_600_000, reload: true, \.readTimeoutMs),
        .duration("handshake-timeout", 100...600_000, reload: false, \.handshakeTimeoutMs),
        .duration("drain-timeout", 0...86_400_000, reload: true, \.drainTimeoutMs),
        .count("max-connections", 1...100_000, reload: false, \.maxConnections),
        .choice("session-addresses", table: "serve", reload: true, \.sessionAddresses),
        .count("loops", 0...256, reload: false, \.loops),
        .count("workers", 0...256, reload: false, \.workers),
        .choice("log-level", table: "serve", reload: true, \.logLevel),

        .size("memory-cache", 16 << 20...1 << 50, orNone: true, reload: false, \.memoryCacheBytes),
        .size("dirty-memory", 40 << 20...1 << 50, orNone: true, reload: false, \.dirtyMemoryBytes),
        .size("scratch-cache", 64 << 20...1 << 60, reload: false, \.scratchCacheBytes),
        .size("journal", 64 << 20...1 << 60, reload: false, \.journalBytes),
        .size("journal-per-disk", 64 << 20...1 << 60, reload: true, \.journalPerDiskBytes),

        .duration("commit-interval", table: "commit", 10...86_400_000, reload: true, \.commitIntervalMs),
        .count("uploads", table: "commit", 0...256, reload: true, \.uploads),
        .duration("heartbeat-interval", table: "commit", 100...3_600_000, reload: true, \.heartbeatIntervalMs),
        .duration("owner-dead-after", table: "commit", 1000...86_400_000, reload: true, \.ownerDeadAfterMs),

        .duration(
            "collection-interval", table: "collection", 0...366 * 86_400_000, reload: true, \.collectionIntervalMs),
        .duration("collection-grace", table: "collection", 0...366 * 86_400_000, reload: true, \.collectionGraceMs),
        .count("collection-rate", table: "collection", 0...1_000_000, reload: true, \.collectionRate),

        .choice("safe-points", table: "new-disk", \.newDisk.safePoints),
        .choice("durability", table: "new-disk", \.newDisk.durability),
        .duration(
            "resume-window", table: "new-disk", 0...DiskOptions.maxResumeWindowMs, reload: false,
            \.newDisk.resumeWindowMs),
        .count(
            "history-density", table: "new-disk", 0...DiskOptions.maxHistoryDensity, reload: false,
            \.newDisk.historyDensity),
    ]

    /// The tables of the file.
    public static let tables = ["serve", "limits", "commit", "collection", "new-disk"]

    /// The key of this name, or nil.
    public static func named(_ name: String) -> SettingKey? { all.first { $0.name == name } }

    /// The known name most like `name`, if one is like enough to be meant.
    public static func closest(to name: String, among names: [String]) -> String? {
        let scored = names.map { (name: $0, distance: editDistance($0, name)) }
        guard let best = scored.min(by: { $0.distance < $1.distance }) else { return nil }
        return best.distance <= max(2, name.count / 3) ? best.name : nil
    }
}

extension Settings {
    /// Checks what no single key can: values that must fit each other.
    public func validate() throws(SettingError) {
        guard journalPerDiskBytes <= journalBytes else {
            throw SettingError(
                "journal-per-disk (\(ByteSize.text(journalPerDiskBytes))) must not exceed journal "
                    + "(\(ByteSize.text(journalBytes)))")
        }
        guard ownerDeadAfterMs >= 3 * heartbeatIntervalMs else {
            throw SettingError(
                "owner-dead-after (\(DurationMs.text(ownerDeadAfterMs))) must be at least three times heartbeat-interval "
                    + "(\(DurationMs.text(heartbeatIntervalMs)))")
        }
        guard store == nil || locations.isEmpty else {
            throw SettingError(
                "store and locations exclude each other: a store with several locations has locations alone")
        }
        if let near, !locations.contains(where: { $0.name == near }) {
            throw SettingError(
                locations.isEmpty
                    ? "near = \"\(near)\" needs locations"
                    : "near (\(near)) is none of the locations: "
                        + locations.map(\.name).joined(separator: ", "))
        }
        guard collectionGraceMs == 0 || collectionGraceMs >= Self.shortestGraceMs else {
            throw SettingError(
                "collection-grace must be at least \(DurationMs.text(Self.shortestGraceMs)), or 0 for what the store has"
            )
        }
        for path in unix + [controlPath] where path.utf8.count > 107 {
            throw SettingError("the socket path '\(path)' is longer than 107 bytes: choose a shorter one")
        }
    }

    /// The keys whose values differ from those of `other`.
    public func differences(from other: Settings) -> [SettingKey] {
        SettingKey.all.filter { $0.text(self) != $0.text(other) }
    }

    /// These settings with everything that needs a restart taken from `running`.
    public func keepingFixed(of running: Settings) -> Settings {
        var kept = running
        for key in SettingKey.all where key.isReloadable {
            // A value that was once accepted is accepted again.
            try? key.set(.text(key.text(self)), &kept)
        }
        return kept
    }
}

// MARK: - Kinds of keys

extension SettingKey {
    private static func make(
        _ name: String, _ table: String, _ form: String, _ reload: Bool,
        set: @escaping @Sendable (SettingValue, inout Settings) throws(SettingError) -> Void,
        text: @escaping @Sendable (Settings) -> String
    ) -> SettingKey {
        SettingKey(table: table, name: name, form: form, isReloadable: reload, set: set, text: text)
    }

    private static func needText(_ value: SettingValue, _ form: String) throws(SettingError) -> String {
        guard case .text(let text) = value else { throw SettingError("needs a string: \(form)") }
        return text
    }

    private static func read<T>(_ text: String, _ parse: (String) throws(QuantityError) -> T) throws(SettingError) -> T
    {
        do { return try parse(text) } catch { throw SettingError(error.description) }
    }

    private static func optionalText(
        _ name: String, table: String, form: String, _ at: any WritableKeyPath<Settings, String?> & Sendable
    ) -> SettingKey {
        make(name, table, form, false) { value, settings throws(SettingError) in
            let text = try needText(value, form)
            if text.isEmpty || text.contains(where: \.isNewline) { throw SettingError("needs a value: \(form)") }
            settings[keyPath: at] = text
        } text: {
            $0[keyPath: at] ?? ""
        }
    }

    private static func path(_ name: String, _ at: any WritableKeyPath<Settings, String> & Sendable) -> SettingKey {
        make(name, "serve", "path", false) { value, settings throws(SettingError) in
            let text = try needText(value, "path")
            if text.isEmpty || text.contains(where: \.isNewline) { throw SettingError("needs a path") }
            settings[keyPath: at] = text
        } text: {
            $0[keyPath: at]
        }
    }

    private static func strings(_ value: SettingValue, _ form: String) throws(SettingError) -> [String] {
        switch value {
        case .text(let text): text.split(separator: ",").map(String.init)
        case .list(let list): list
        case .number: throw SettingError("needs \(form)")
        }
    }

    private static func addresses(
        _ name: String, _ at: any WritableKeyPath<Settings, [ListenAddress]> & Sendable
    ) -> SettingKey {
        let form = "list of \"HOST:PORT\""
        return make(name, "serve", form, false) { value, settings throws(SettingError) in
            var addresses: [ListenAddress] = []
            for text in try strings(value, form) {
                guard let address = ListenAddress(text) else {
                    throw SettingError("'\(text)' is no address: write HOST:PORT, as in 127.0.0.1:10809 or [::1]:10809")
                }
                addresses.append(address)
            }
            settings[keyPath: at] = addresses
        } text: {
            $0[keyPath: at].map(\.description).joined(separator: ",")
        }
    }

    private static func locations(
        _ name: String, _ at: any WritableKeyPath<Settings, [LocationSetting]> & Sendable
    ) -> SettingKey {
        let form = "list of \"NAME=URL\""
        return make(name, "", form, false) { value, settings throws(SettingError) in
            var locations: [LocationSetting] = []
            for text in try strings(value, form) {
                guard let location = LocationSetting(text) else {
                    throw SettingError(
                        "'\(text)' is no location: write NAME=URL, as in eu=s3://bucket?region=eu-central-1")
                }
                if locations.contains(where: { $0.name == location.name }) {
                    throw SettingError("has two locations of the name '\(location.name)'")
                }
                locations.append(location)
            }
            if locations.count > 256 { throw SettingError("has more than 256 locations") }
            settings[keyPath: at] = locations
        } text: {
            $0[keyPath: at].map(\.description).joined(separator: ",")
        }
    }

    private static func paths(_ name: String, _ at: any WritableKeyPath<Settings, [String]> & Sendable) -> SettingKey {
        let form = "list of paths"
        return make(name, "serve", form, false) { value, settings throws(SettingError) in
            let paths = try strings(value, form)
            if paths.contains(where: { $0.isEmpty || $0.contains(where: \.isNewline) }) {
                throw SettingError("has an empty path")
            }
            settings[keyPath: at] = paths
        } text: {
            $0[keyPath: at].joined(separator: ",")
        }
    }

    private static func choice<T: RawRepresentable & CaseIterable & Sendable>(
        _ name: String, table: String, reload: Bool = false, _ at: any WritableKeyPath<Settings, T> & Sendable
    ) -> SettingKey where T.RawValue == String {
        let form = "one of " + T.allCases.map { "\"\($0.rawValue)\"" }.joined(separator: ", ")
        return make(name, table, form, reload) { value, settings throws(SettingError) in
            let text = try needText(value, form)
            guard let choice = T(rawValue: text) else { throw SettingError("cannot be '\(text)': it is \(form)") }
            settings[keyPath: at] = choice
        } text: {
            $0[keyPath: at].rawValue
        }
    }

    /// - Parameter orNone: 0 is a value too: margined chooses.
    private static func size(
        _ name: String, _ bounds: ClosedRange<UInt64>, orNone: Bool = false, reload: Bool,
        _ at: any WritableKeyPath<Settings, UInt64> & Sendable
    ) -> SettingKey {
        let range = "\(ByteSize.text(bounds.lowerBound)) to \(ByteSize.text(bounds.upperBound))"
        let form = "size, \(orNone ? "0 or " : "")\(range)"
        return make(name, "limits", form, reload) { value, settings throws(SettingError) in
            let bytes: UInt64
            switch value {
            case .text(let text):
                bytes = try read(text, ByteSize.parse)
            case .number(let number) where number >= 0: bytes = UInt64(number)
            default: throw SettingError("needs a \(form), as in \"512M\"")
            }
            guard bounds.contains(bytes) || orNone && bytes == 0 else {
                throw SettingError("is out of bounds: it is a \(form)")
            }
            settings[keyPath: at] = bytes
        } text: {
            ByteSize.text($0[keyPath: at])
        }
    }

    private static func duration(
        _ name: String, table: String = "serve", _ boundsMs: ClosedRange<Int64>, reload: Bool,
        _ at: any WritableKeyPath<Settings, Int64> & Sendable
    ) -> SettingKey {
        let form = "duration, \(DurationMs.text(boundsMs.lowerBound)) to \(DurationMs.text(boundsMs.upperBound))"
        return make(name, table, form, reload) { value, settings throws(SettingError) in
            let ms: Int64
            switch value {
            case .text(let text):
                ms = try read(text, DurationMs.parse)
            case .number(0): ms = 0
            default: throw SettingError("needs a \(form), with its unit, as in \"5s\"")
            }
            guard boundsMs.contains(ms) else { throw SettingError("is out of bounds: it is a \(form)") }
            settings[keyPath: at] = ms
        } text: {
            DurationMs.text($0[keyPath: at])
        }
    }

    private static func count(
        _ name: String, table: String = "serve", _ bounds: ClosedRange<Int>, reload: Bool,
        _ at: any WritableKeyPath<Settings, Int> & Sendable
    ) -> SettingKey {
        let form = "number, \(bounds.lowerBound) to \(bounds.upperBound)"
        return make(name, table, form, reload) { value, settings throws(SettingError) in
            let number: Int?
            switch value {
            case .text(let text): number = Int(text)
            case .number(let value): number = Int(value)
            case .list: number = nil
            }
            guard let number else { throw SettingError("needs a \(form)") }
            guard bounds.contains(number) else { throw SettingError("is out of bounds: it is a \(form)") }
            settings[keyPath: at] = number
        } text: {
            String($0[keyPath: at])
        }
    }
}

/// Levenshtein's distance, for "did you mean".
private func editDistance(_ a: String, _ b: String) -> Int {
    let a = Array(a.utf8)
    let b = Array(b.utf8.prefix(128))
    var row = Array(0...b.count)
    for (i, left) in a.enumerated() {
        var diagonal = row[0]
        row[0] = i + 1
        for (j, right) in b.enumerated() {
            let cost = min(diagonal + (left == right ? 0 : 1), row[j] + 1, row[j + 1] + 1)
            diagonal = row[j + 1]
            row[j + 1] = cost
        }
    }
    return row[b.count]
}
