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
}
