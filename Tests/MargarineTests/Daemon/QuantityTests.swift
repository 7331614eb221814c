import Margarine
import Testing

struct QuantityTests {
    @Test(
        arguments: [
            ("0", 0), ("4096", 4096), ("1B", 1), ("512K", 524_288), ("10G", 10_737_418_240), ("10GiB", 10_737_418_240),
            ("3m", 3_145_728), ("1P", 1_125_899_906_842_624), ("15E", 17_293_822_569_102_704_640),
            ("18446744073709551615", 18_446_744_073_709_551_615),
        ] as [(String, UInt64)])
    func sizesAreRead(_ text: String, _ bytes: UInt64) throws {
        #expect(try ByteSize.parse(text) == bytes)
    }

    @Test(arguments: [
        "", "G", "-1", "1.5G", "10GB", "iB", "1iB", "10 G", "1KK", "16E", "18446744073709551616", "٣", "0x10",
    ])
    func whatIsNoSizeIsRefused(_ text: String) {
        #expect(throws: QuantityError.self) { try ByteSize.parse(text) }
    }

    @Test(
        arguments: [
            (0, "0"), (1, "1"), (1023, "1023"), (1024, "1K"), (1025, "1025"), (1536 << 20, "1536M"), (1 << 60, "1E"),
            (.max, "18446744073709551615"),
        ] as [(UInt64, String)])
    func sizesAreWrittenExactly(_ bytes: UInt64, _ text: String) throws {
        #expect(ByteSize.text(bytes) == text)
        #expect(try ByteSize.parse(text) == bytes)
    }

    @Test(
        arguments: [
            (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (10_485_760, "10 MiB"),
            (1_047_552, "1023 KiB"),
            (1_048_570, "1 MiB"), (10_490_000_000, "9.77 GiB"), (.max, "16 EiB"), (1_077_936, "1.03 MiB"),
        ] as [(UInt64, String)])
    func sizesAreReadable(_ bytes: UInt64, _ text: String) {
        #expect(ByteSize.readable(bytes) == text)
    }

    @Test(
        arguments: [
            ("0", 0), ("0s", 0), ("500ms", 500), ("60s", 60_000), ("5m", 300_000), ("2h", 7_200_000),
            ("1d", 86_400_000),
        ] as [(String, Int64)])
    func durationsAreRead(_ text: String, _ ms: Int64) throws {
        #expect(try DurationMs.parse(text) == ms)
    }

    @Test(arguments: ["", "5", "s", "-1s", "1.5s", "5 s", "5sec", "9223372036854775807d", "99999999999999999999s"])
    func whatIsNoDurationIsRefused(_ text: String) {
        #expect(throws: QuantityError.self) { try DurationMs.parse(text) }
    }

    @Test(
        arguments: [(0, "0"), (1, "1ms"), (1500, "1500ms"), (60_000, "1m"), (90_000, "90s"), (172_800_000, "2d")]
            as [(Int64, String)])
    func durationsAreWrittenExactly(_ ms: Int64, _ text: String) throws {
        #expect(DurationMs.text(ms) == text)
        #expect(try DurationMs.parse(text) == ms)
    }

    @Test(
        arguments: [
            (0, "0 ms"), (999, "999 ms"), (1000, "1 s"), (4270, "4.2 s"), (59_999, "59.9 s"), (60_000, "1 m"),
            (200_000, "3 m 20 s"),
            (3_600_000, "1 h"), (187_200_000, "2 d 4 h"),
        ] as [(Int64, String)])
    func durationsAreReadable(_ ms: Int64, _ text: String) {
        #expect(DurationMs.readable(ms) == text)
    }
}
