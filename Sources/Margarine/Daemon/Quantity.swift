// Sizes and durations as people write and read them: `10G`, `512K`, `60s`, `500ms`, `0`.
//
// Always holds: `parse(text(x)) == x` for every value whose text is exact; nothing is rounded while reading.

/// Why a size or duration could not be read; says what would be right.
public struct QuantityError: Error, Equatable, CustomStringConvertible {
    public let description: String
    /// Well written, but larger than 64 bits hold.
    public var isTooLarge = false
}

/// Sizes in bytes. The suffixes K, M, G, T, P and E are powers of 1024, with or without `iB` behind them.
public enum ByteSize {
    private static let letters: [Character] = ["K", "M", "G", "T", "P", "E"]

    /// Reads a size: digits with an optional suffix, for example `4096`, `512K`, `10G`, `10GiB`.
    /// - Throws: what is wrong with `text`, naming it.
    public static func parse(_ text: String) throws(QuantityError) -> UInt64 {
        func wrong(_ why: String) -> QuantityError {
            QuantityError(description: "'\(text)' is no size: \(why)")
        }
        let digits = text.prefix { $0.isASCII && $0.isNumber }
        guard !digits.isEmpty else { throw wrong("write digits and a suffix out of K, M, G, T, P, E, as in 10G") }
        var suffix = text.dropFirst(digits.count)
        if suffix.hasSuffix("iB") {
            suffix = suffix.dropLast(2)
            if suffix.isEmpty { throw wrong("'iB' needs a letter before it, as in 10GiB") }
        }
        var power = 0
        if suffix == "B" || suffix.isEmpty {
            power = 0
        } else if suffix.count == 1, let letter = suffix.uppercased().first, let index = letters.firstIndex(of: letter)
        {
            power = index + 1
        } else {
            throw wrong("the suffix may be K, M, G, T, P or E (powers of 1024), as in 10G")
        }
        let (bytes, overflow) = (UInt64(digits) ?? .max).multipliedReportingOverflow(by: 1 << UInt64(10 * power))
        guard UInt64(digits) != nil, !overflow else {
            throw QuantityError(description: "'\(text)' is no size: it does not fit 64 bits", isTooLarge: true)
        }
        return bytes
    }

    /// The shortest exact text: `10G`, `1536M`, `4097`.
    public static func text(_ bytes: UInt64) -> String {
        var value = bytes
        var power = 0
        while value != 0, value % 1024 == 0, power < letters.count {
            value /= 1024
            power += 1
        }
        return power == 0 ? "\(value)" : "\(value)\(letters[power - 1])"
    }

    /// Three digits for people, rounded: `9.77 GiB`, `512 B`.
    public static func readable(_ bytes: UInt64) -> String {
        if bytes < 1024 { return "\(bytes) B" }
        var value = Double(bytes)
        var power = 0
        while value >= 1023.5, power < letters.count {
            value /= 1024
            power += 1
        }
        return "\(significant(value)) \(letters[power - 1])iB"
    }

    /// A number below 1024 with up to three digits that count.
    static func significant(_ value: Double) -> String {
        let places = value < 9.995 ? 100.0 : value < 99.95 ? 10.0 : 1.0
        let scaled = Int64((value * places).rounded())
        let whole = scaled / Int64(places)
        var fraction = String(scaled % Int64(places))
        if places == 1 || scaled % Int64(places) == 0 { return "\(whole)" }
        fraction = String(repeating: "0", count: (places == 100 ? 2 : 1) - fraction.count) + fraction
        while fraction.hasSuffix("0") { fraction.removeLast() }
        return "\(whole).\(fraction)"
    }
}

/// Durations in milliseconds. The suffixes are ms, s, m, h and d; only `0` needs none.
public enum DurationMs {
    private static let units: [(name: String, ms: Int64)] = [
        ("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1),
    ]

    /// Reads a duration: digits and a suffix, for example `60s`, `500ms`, `0`.
    /// - Throws: what is wrong with `text`, naming it.
    public static func parse(_ text: String) throws(QuantityError) -> Int64 {
        func wrong(_ why: String) -> QuantityError {
            QuantityError(description: "'\(text)' is no duration: \(why)")
        }
        let digits = text.prefix { $0.isASCII && $0.isNumber }
        guard !digits.isEmpty else { throw wrong("write digits and a unit out of ms, s, m, h, d, as in 60s") }
        guard let count = Int64(digits) else { throw wrong("it is too long") }
        let suffix = text.dropFirst(digits.count)
        if suffix.isEmpty && count == 0 { return 0 }
        guard let unit = units.first(where: { $0.name == suffix }) else {
            throw wrong("its unit must be ms, s, m, h or d, as in 60s")
        }
        let (ms, overflow) = count.multipliedReportingOverflow(by: unit.ms)
        if overflow { throw wrong("it is too long") }
        return ms
    }

    /// The shortest exact text: `60s` is `1m`, 1500 is `1500ms`, 0 is `0`.
    public static func text(_ ms: Int64) -> String {
        if ms == 0 { return "0" }
        for unit in units where ms % unit.ms == 0 { return "\(ms / unit.ms)\(unit.name)" }
        return "\(ms)ms"
    }

    /// For people, rounded to the unit that matters: `350 ms`, `4.2 s`, `3 m 20 s`, `2 d 4 h`.
    public static func readable(_ ms: Int64) -> String {
        if ms < 1000 { return "\(ms) ms" }
        if ms < 60_000 { return "\(ByteSize.significant(Double(ms / 100) / 10)) s" }
        func pair(_ big: Int64, _ a: String, _ small: Int64, _ b: String) -> String {
            let rest = ms % big / small
            return rest == 0 ? "\(ms / big) \(a)" : "\(ms / big) \(a) \(rest) \(b)"
        }
        if ms < 3_600_000 { return pair(60_000, "m", 1000, "s") }
        if ms < 86_400_000 { return pair(3_600_000, "h", 60_000, "m") }
        return pair(86_400_000, "d", 3_600_000, "h")
    }
}
