// What a configuration file gets told.

@testable import Configuration
import Margarine
import Testing

@Suite struct ConfigFileTests {
    private func complaint(_ text: String) -> String? {
        var settings = Settings()
        do { try ConfigFile.apply(text, named: "f", to: &settings) } catch { return "\(error)" }
        return nil
    }

    /// The library underneath ended the process at these: at a reload, with all disks of the daemon.
    @Test(arguments: ["[", "[\n", "[[", "[[\n", "[{serve]", "[ =]", "[[ #", "[ [serve", "[\u{b}serve]", "\u{a0}[{"])
    func aHeaderWithoutAName(_ header: String) {
        for text in [header, header + "\nloops = 1\n", "\r\n\t" + header] {
            #expect(complaint("store = 'x'\n" + text)?.hasPrefix("f:") == true, "\(text.debugDescription)")
        }
        #expect(complaint("\n\n[{serve]\n") == "f:3: no name behind '[': a table begins with [NAME]")
    }

    @Test(arguments: [
        "[serve]", " [ serve ]", "['serve']", "[ \"serve\" ] # x", "[serve]\r\nloops = 1\r\n", "[new-disk]",
    ])
    func aHeaderWithAName(_ text: String) { #expect(complaint(text) == nil) }

    @Test(arguments: ["x = 1979-05-27Tx", "x = 1979-05-27T", "x = [1, 1979-05-27 G]", "x = 1979-05-27tz # y"])
    func aDateWithoutItsTime(_ text: String) {
        #expect(complaint("\n" + text) == "f:2: a date without its time; no key takes one")
    }

    @Test(arguments: [
        "listen = [}", "listen = ['a', }", "listen = [ # c\n } ]", "listen = [[\u{2028}]]", "listen = [\u{85}",
        "'a[' = \"]\"\nlisten = [\"\"\"x\n]\"\"\", }", "x = { y = [,} }", "listen = ['a\\', }",
    ])
    func aListWithoutAValue(_ text: String) {
        #expect(complaint("[serve]\n" + text)?.hasPrefix("f:") == true)
        #expect(complaint("store = 'x' # [,}\n[serve]\nlisten = ['a', # [\n }") == "f:4: " + Self.missing)
    }
    private static let missing =
        "a value is missing in a list: it holds values with commas between, and ends with ']'"

    @Test(arguments: [
        "listen = ['127.0.0.1:1', \"127.0.0.1:2}\",\n # }\n]", "listen = [] # [}", "scratch = '[,}'",
        "scratch = \"\"\"/a[,\n}\"\"\"", "scratch = \"\\\"[}\"",
    ])
    func aListWithAllItsValues(_ text: String) {
        #expect(complaint("[serve]\n" + text)?.contains(Self.missing) != true)
    }

    @Test func datesInTextAreText() {
        #expect(complaint("# 2024-01-01 x\n[serve] # 2024-01-01T\nscratch = '/2024-01-01 x'\n") == nil)
    }
}
