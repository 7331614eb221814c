// The configuration file: TOML, read by TOMLKit and held against the table of keys. Every complaint names file and line.

import Foundation
package import Margarine
import TOMLKit

/// What is wrong with a configuration file, in one line.
package struct ConfigError: Error, CustomStringConvertible {
    package let description: String
    init(_ description: String) { self.description = description }
}

package enum ConfigFile {
    /// Puts everything the file sets into `settings`.
    /// - Throws: `ConfigError` for the first thing in it that is wrong, as `FILE:LINE: what`.
    package static func load(_ path: String, into settings: inout Settings) throws {
        let text: String
        do {
            let handle = try FileHandle(forReadingFrom: URL(fileURLWithPath: path))
            let bytes = try handle.read(upToCount: limitBytes + 1) ?? Data()
            guard bytes.count <= limitBytes else {
                throw ConfigError("\(path): larger than \(limitBytes) bytes: no configuration")
            }
            guard let decoded = String(bytes: bytes, encoding: .utf8) else {
                throw ConfigError("\(path): not UTF-8: save it as plain text")
            }
            text = decoded
        } catch let failure as ConfigError {
            throw failure
        } catch {
            throw ConfigError("cannot read the configuration '\(path)': \(reason(error))")
        }
        try apply(text, named: path, to: &settings)
    }

    /// As `load`, from text.
    package static func apply(_ text: String, named path: String, to settings: inout Settings) throws {
        try checkHeaders(text, named: path)
        if let line = TOMLArrays.strayEnd(text) {
            throw ConfigError(
                "\(path):\(line): a value is missing in a list: it holds values with commas between, and ends with ']'")
        }
        let root: TOMLTable
        do {
            root = try TOMLTable(string: text)
        } catch let error as TOMLParseError {
            throw ConfigError("\(path):\(error.source.begin.line): \(error.description)")
        }
        let lines = TOMLLines(text)
        var complaints: [(line: Int, text: String)] = []
        func complain(_ keyPath: [String], _ what: String) {
            complaints.append((lines.line(of: keyPath), what))
        }
        func take(_ table: TOMLTable, _ tableName: String) {
            let place = tableName.isEmpty ? "at the top" : "in [\(tableName)]"
            for (name, value) in entries(table) {
                let keyPath = tableName.isEmpty ? [name] : [tableName, name]
                guard let key = SettingKey.all.first(where: { $0.table == tableName && $0.name == name }) else {
                    complain(keyPath, unknown(name, place, tableName))
                    continue
                }
                guard let given = settingValue(value) else {
                    complain(keyPath, "'\(name)' \(place) takes a \(key.form); this is of type \(value.type)")
                    continue
                }
                do { try key.set(given, &settings) } catch { complain(keyPath, "'\(name)' \(place) \(error)") }
            }
        }
        let top = TOMLTable()
        for (name, value) in entries(root) {
            guard SettingKey.tables.contains(name) else {
                if let table = value.table {
                    if SettingKey.all.contains(where: { $0.table.isEmpty && $0.name == name }) {
                        complain([name], "'\(name)' takes a value; this is a table")
                    } else {
                        let near = SettingKey.closest(to: name, among: SettingKey.tables)
                        complain([name], "unknown table [\(name)]" + (near.map { "; did you mean [\($0)]?" } ?? ""))
                    }
                    _ = table
                } else {
                    top[name] = value
                }
                continue
            }
            guard let table = value.table else {
                complain([name], "'\(name)' is a table, [\(name)]; this is of type \(value.type)")
                continue
            }
            take(table, name)
        }
        take(top, "")
        if let first = complaints.min(by: { $0.line < $1.line }) {
            throw ConfigError("\(path):\(first.line): \(first.text)")
        }
        do { try settings.validate() } catch { throw ConfigError("\(path): \(error)") }
    }

    private static let limitBytes = 1 << 20

    /// toml++ 3.4, which TOMLKit stands on, ends the process at a table's header that begins with anything but a key. No
    /// value of ours has a line that begins like that, so it does not matter whether it is a header at all.
    private static func checkHeaders(_ text: String, named path: String) throws {
        func isSpace(_ scalar: Unicode.Scalar) -> Bool { scalar.properties.isWhitespace || scalar == "\u{feff}" }
        for (index, line) in text.unicodeScalars.split(separator: "\n", omittingEmptySubsequences: false).enumerated() {
            if hasHalfATime(line) {
                throw ConfigError("\(path):\(index + 1): a date without its time; no key takes one")
            }
            var rest = line.drop(while: isSpace)
            guard rest.first == "[" else { continue }
            rest = rest.dropFirst().drop { $0 == " " || $0 == "\t" }
            if rest.first == "[" { rest = rest.dropFirst().drop { $0 == " " || $0 == "\t" } }
            guard let first = rest.first, first.isASCII,
                first.properties.isAlphabetic || "0123456789_-\"']".unicodeScalars.contains(first)
            else { throw ConfigError("\(path):\(index + 1): no name behind '[': a table begins with [NAME]") }
        }
    }

    /// It also ends the process at `1979-05-27T` without a digit behind it. Quoted text and comments may have that.
    private static func hasHalfATime(_ line: Substring.UnicodeScalarView) -> Bool {
        var quote: Unicode.Scalar?
        var isEscaped = false
        // How much of `-00-00T` came.
        var matched = 0
        for scalar in line {
            let isDigit = scalar >= "0" && scalar <= "9"
            if matched == 7 {
                if !isDigit { return true }
                matched = 0
            }
            if let open = quote {
                if !isEscaped, scalar == open { quote = nil }
                isEscaped = !isEscaped && open == "\"" && scalar == "\\"
                continue
            }
            if scalar == "#" { return false }
            if scalar == "\"" || scalar == "'" { quote = scalar }
            switch matched {
            case 1, 2, 4, 5: matched = isDigit ? matched + 1 : scalar == "-" ? 1 : 0
            case 3: matched = scalar == "-" ? 4 : 0
            case 6: matched = scalar == "T" || scalar == "t" || scalar == " " ? 7 : scalar == "-" ? 1 : 0
            default: matched = scalar == "-" ? 1 : 0
            }
        }
        return matched == 7
    }

    private static func entries(_ table: TOMLTable) -> [(String, TOMLValue)] {
        table.keys.compactMap { key in table[key].map { (key, $0.tomlValue) } }
    }

    private static func settingValue(_ value: TOMLValue) -> SettingValue? {
        switch value.type {
        case .string: value.string.map(SettingValue.text)
        case .int: value.int.map { .number(Int64($0)) }
        case .array:
            value.array.flatMap { array in
                let strings = array.map { $0.tomlValue.string }
                return strings.contains(nil) ? nil : .list(strings.compactMap(\.self))
            }
        default: nil
        }
    }

    private static func unknown(_ name: String, _ place: String, _ table: String) -> String {
        let text = "unknown key '\(name)' \(place)"
        if let key = SettingKey.named(name) {
            return text + "; it belongs " + (key.table.isEmpty ? "at the top" : "in [\(key.table)]")
        }
        let here = SettingKey.all.filter { $0.table == table }.map(\.name)
        guard let near = SettingKey.closest(to: name, among: here) else {
            return text + "; known are " + here.joined(separator: ", ")
        }
        return text + "; did you mean '\(near)'?"
    }

    /// Foundation's errors as the kernel puts them.
    private static func reason(_ error: any Error) -> String {
        let underlying = (error as NSError).userInfo[NSUnderlyingErrorKey] as? NSError ?? error as NSError
        if underlying.domain == NSPOSIXErrorDomain { return errnoText(Int32(underlying.code)) }
        return error.localizedDescription
    }
}
