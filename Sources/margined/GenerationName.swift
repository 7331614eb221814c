import ArgumentParser
import Margarine

/// `NAME` or `NAME@GENERATION`, as the commands take it.
struct GenerationName {
    var disk: String
    /// nil: the current one.
    var generation: UInt64?

    /// - Throws: `ValidationError` that says what is wrong.
    init(_ text: String) throws {
        disk = text
        if let at = text.lastIndex(of: "@") {
            disk = String(text[..<at])
            generation = try GenerationName.number(
                String(text[text.index(after: at)...]), in: "NAME@NUMBER, as in work@17")
        }
        try DiskNameArgument(argument: disk)?.check()
    }

    /// A generation's number.
    static func number(_ text: String, in form: String = "a number, as in 17") throws -> UInt64 {
        // One way to write each, as in the names of exports.
        guard text.first != "0", text.allSatisfy({ $0.isASCII && $0.isNumber }), let number = UInt64(text) else {
            throw ValidationError("'\(text)' is no generation: write \(form)")
        }
        return number
    }
}

/// A disk and one of its generations, as two arguments.
struct GenerationArguments: ParsableArguments {
    @Argument(help: "The disk.") var name: DiskNameArgument
    @Argument(help: "The generation's number.") private var generation: String

    func validate() throws {
        try name.check()
        _ = try GenerationName.number(generation)
    }

    var number: UInt64 { get throws { try GenerationName.number(generation) } }
}
