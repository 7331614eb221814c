// Where the store and all other settings come from: defaults, then MARGARINE_STORE, then the file, then flags.

import ArgumentParser
import Configuration
import Foundation
import Margarine

/// `--store` and `--config`, which every command that touches a store takes.
struct StoreOptions: ParsableArguments {
    @Option(
        name: .long,
        help: ArgumentHelp(
            "The store: file:///path or s3://bucket/prefix?endpoint=URL&region=R. Default: what --config or MARGARINE_STORE say.",
            valueName: "url"))
    var store: String?

    @Option(name: .long, help: ArgumentHelp("Configuration file (TOML); see margined.toml(5).", valueName: "file"))
    var config: String?

    @Option(
        name: .long,
        help: ArgumentHelp(
            "Of a store with several locations, the one where new objects go and that is looked at first.",
            valueName: "location"))
    var near: String?

    /// Environment and file; flags come over it.
    func settings() throws -> Settings {
        var settings = Settings()
        let environment = ProcessInfo.processInfo.environment
        // systemd gives a service its own directory.
        if let directory = environment["STATE_DIRECTORY"]?.split(separator: ":").first {
            settings.scratch = String(directory)
        }
        if let config { try ConfigFile.load(config, into: &settings) }
        if settings.places.isEmpty, let url = environment["MARGARINE_STORE"], !url.isEmpty { settings.store = url }
        if let store {
            settings.store = store
            settings.locations = []
            settings.near = nil
        }
        if let near { settings.near = near }
        return settings
    }

    /// The same, for a command that needs a store.
    func settingsWithStore() throws -> Settings {
        let settings = try settings()
        try settings.checkStore()
        return settings
    }
}

extension Settings {
    /// That somebody said where the store is.
    func checkStore() throws {
        if places.isEmpty {
            throw ValidationError(
                "no store is given: use --store URL, 'store' in the --config file, or MARGARINE_STORE")
        }
        do { try validate() } catch { throw ValidationError("\(error)") }
    }
}

extension Settings {
    /// Sets a key from a flag's text.
    /// - Throws: `ValidationError` naming `flag`.
    mutating func set(_ name: String, _ text: String, flag: String) throws {
        guard let key = SettingKey.named(name) else {
            let near = SettingKey.closest(to: name, among: SettingKey.all.map(\.name))
            throw ValidationError("\(flag): unknown key '\(name)'" + (near.map { "; did you mean '\($0)'?" } ?? ""))
        }
        do {
            try key.set(.text(text), &self)
        } catch {
            throw ValidationError(flag == "--set" ? "--set: '\(name)' \(error)" : "\(flag) \(error)")
        }
    }
}
