import Testing

@testable import Runtime

@Suite struct TextTests {
    @Test(
        "row 34: what a terminal obeys, or what begins another line, is escaped by scalars",
        arguments: [
            ("plain name-1_ü漢", "plain name-1_ü漢"), ("a\r\nb", "a\\u{d}\\u{a}b"), ("\u{1b}[2J", "\\u{1b}[2J"),
            ("\u{0}\u{7f}\u{85}\u{9b}", "\\u{0}\\u{7f}\\u{85}\\u{9b}"), ("\u{2028}\u{2029}", "\\u{2028}\\u{2029}"),
            ("a\u{202e}b\u{2066}\u{200f}\u{61c}", "a\\u{202e}b\\u{2066}\\u{200f}\\u{61c}"),
            // One character of two scalars, the second of which is none of them.
            ("e\u{301}", "e\u{301}"), ("\ne\u{301}", "\\u{a}e\u{301}"), ("", ""),
        ])
    func printable(_ text: String, _ expected: String) {
        #expect(text.printable.unicodeScalars.elementsEqual(expected.unicodeScalars))
    }

    @Test("a trouble is told when it begins, when its cause changes, and when it is over") func episodes() {
        var episode = Episode()
        let r1 = episode.worked(nowNs: 0)
        #expect(r1 == nil)
        let r2 = episode.failed("a", nowNs: 1_000_000_000)
        #expect(r2)
        for at in 2..<1000 {
            let isTold = episode.failed("a", nowNs: UInt64(at) * 1_000_000_000)
            #expect(!isTold)
        }
        let r3 = episode.failed("b", nowNs: 1_000_000_000_000)
        #expect(r3)
        let r4 = episode.failed("a", nowNs: 1_000_000_000_001)
        #expect(!r4)
        // What fails every other time is not over.
        let r5 = episode.worked(nowNs: 1_000_000_000_002, quietNs: 5_000_000_000)
        #expect(r5 == nil)
        let over = episode.worked(nowNs: 1_006_000_000_000, quietNs: 5_000_000_000)
        #expect(over == Episode.Over(durationMs: 1_005_000, count: 1001))
        let r6 = episode.worked(nowNs: 1_007_000_000_000)
        #expect(r6 == nil)
        // Ever new causes are no flood either.
        let told = (0..<100).count { episode.failed("\($0)", nowNs: 2_000_000_000_000) }
        #expect(told == 8)
    }

    @Test("a short trouble is not worth a line, nor is its end") func shortEpisodes() {
        var episode = Episode()
        let r7 = episode.failed("a", nowNs: 1_000, afterNs: 5_000)
        #expect(!r7)
        let r8 = episode.worked(nowNs: 2_000, quietNs: 5_000)
        #expect(r8 == nil)
        let r9 = episode.failed("a", nowNs: 4_000, afterNs: 5_000)
        #expect(!r9)
        let r10 = episode.failed("a", nowNs: 8_000, afterNs: 5_000)
        #expect(!r10)
        let r11 = episode.failed("a", nowNs: 9_000, afterNs: 5_000)
        #expect(r11)
    }
}
