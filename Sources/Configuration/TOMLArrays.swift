// toml++ 3.4, which TOMLKit stands on, ends the process where a value of an array is due and `}` stands there, or one of the line
// breaks that only Unicode knows. This finds such a place first. Up to there the text is whatever that parser takes, so it need be
// followed no further than strings, comments and brackets.

enum TOMLArrays {
    /// The line of the first such place. nil: there is none.
    static func strayEnd(_ text: String) -> Int? {
        var scanner = Scanner(scalars: Array(text.unicodeScalars))
        return scanner.strayEnd()
    }

    private struct Scanner {
        let scalars: [Unicode.Scalar]
        var at = 0
        var line = 1
        /// Behind the `=` of this statement.
        var isInValue = false
        var brackets: [Unicode.Scalar] = []
        /// In an array, a value or its end is due.
        var isDue = false

        mutating func strayEnd() -> Int? {
            while at < scalars.count {
                let scalar = scalars[at]
                switch scalar {
                case "\"", "'":
                    skipString(scalar)
                    isDue = false
                    continue
                case "#":
                    skipLine()
                    continue
                case "\n":
                    line += 1
                    if brackets.isEmpty { isInValue = false }
                case " ", "\t", "\r": break
                case "=":
                    isInValue = true
                    isDue = false
                case "[":
                    // A table's header.
                    if !isInValue {
                        skipLine()
                        continue
                    }
                    brackets.append(scalar)
                    isDue = true
                case "{":
                    brackets.append(scalar)
                    isDue = false
                case ",": isDue = brackets.last == "["
                case "]", "}", "\u{85}", "\u{2028}", "\u{2029}":
                    if isDue, scalar != "]" { return line }
                    if scalar == "]" || scalar == "}" { _ = brackets.popLast() }
                    isDue = false
                default: isDue = false
                }
                at += 1
            }
            return nil
        }

        private mutating func skipLine() {
            while at < scalars.count, scalars[at] != "\n" { at += 1 }
        }

        /// A string of any of TOML's four kinds; one of a single line ends with that.
        private mutating func skipString(_ quote: Unicode.Scalar) {
            let isTriple = scalars[at...].prefix(3).elementsEqual([quote, quote, quote])
            at += isTriple ? 3 : 1
            while at < scalars.count {
                let scalar = scalars[at]
                if scalar == "\n" {
                    if !isTriple { return }
                    line += 1
                }
                if scalar == "\\", quote == "\"" {
                    at += 1
                    if at < scalars.count, scalars[at] == "\n" { line += 1 }
                    at += 1
                } else if scalar == quote, !isTriple {
                    at += 1
                    return
                } else if scalar == quote, scalars[at...].prefix(3).elementsEqual([quote, quote, quote]) {
                    at += 3
                    // It may end with one or two quotes of its own.
                    while at < scalars.count, scalars[at] == quote { at += 1 }
                    return
                } else {
                    at += 1
                }
            }
        }
    }
}
