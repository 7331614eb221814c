// The configuration file: any text is settings, or a complaint that names its line.

@testable import Configuration
import Margarine

extension FuzzTarget {
    // TOMLKit 0.6 never frees a table: some kilobytes for each file read, once at start and at each SIGHUP.
    static let config = FuzzTarget(name: "config", maxInputBytes: 1024, allocationBaseBytes: 1 << 20, leaks: true) {
        input in
        guard let text = String(validating: input, as: UTF8.self) else { return }
        var settings = Settings()
        do {
            try ConfigFile.apply(text, named: "f", to: &settings)
        } catch let error as ConfigError {
            try complaint(error.description, lines: text.utf8.count { $0 == 10 } + 1)
            return
        }
        try settings.validate()
        // What was accepted is written as `--set` takes it, and means the same there.
        var again = Settings()
        for key in SettingKey.all where key.text(settings) != key.text(again) {
            // A path with a comma can only be written in the file.
            if key.name == "unix", settings.unix.contains(where: { $0.contains(",") }) { continue }
            do { try key.set(.text(key.text(settings)), &again) } catch {
                throw Finding("\(key.name): '\(key.text(settings))' was accepted and is not: \(error)")
            }
            try require(key.text(again) == key.text(settings), "\(key.name): another value for '\(key.text(settings))'")
        }
    }

    private static func complaint(_ text: String, lines: Int) throws {
        guard text.hasPrefix("f:") else { throw Finding("a complaint without a place: \(text)") }
        // What no single line is to blame for has none.
        guard let line = Int(text.dropFirst(2).prefix { $0 != ":" }) else { return }
        try require((1...max(lines, 1)).contains(line), "a complaint about line \(line) of \(lines): \(text)")
    }
}
