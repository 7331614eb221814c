// SHA-256, MD5 and HMAC of libcrypto, and how their results are written.

import CCrypto

enum Digest {
    static func sha256(_ bytes: [UInt8]) -> [UInt8] { digest(bytes, EVP_sha256(), 32) }
    static func md5(_ bytes: [UInt8]) -> [UInt8] { digest(bytes, EVP_md5(), 16) }

    static func hmacSHA256(key: [UInt8], _ text: String) -> [UInt8] {
        let message = Array(text.utf8)
        return [UInt8](unsafeUninitializedCapacity: 32) { output, count in
            var length: UInt32 = 0
            let done = HMAC(EVP_sha256(), key, Int32(key.count), message, message.count, output.baseAddress!, &length)
            precondition(done != nil && length == 32, "libcrypto has no HMAC-SHA256")
            count = 32
        }
    }

    private static func digest(_ bytes: [UInt8], _ kind: OpaquePointer?, _ length: Int) -> [UInt8] {
        [UInt8](unsafeUninitializedCapacity: length) { output, count in
            var written: UInt32 = 0
            let done = bytes.withUnsafeBytes {
                EVP_Digest($0.baseAddress, $0.count, output.baseAddress!, &written, kind, nil)
            }
            precondition(done == 1 && Int(written) == length, "libcrypto lacks a digest")
            count = length
        }
    }

    static func hex(_ bytes: [UInt8]) -> String {
        let digits = Array("0123456789abcdef".utf8)
        return String(unsafeUninitializedCapacity: bytes.count * 2) { output in
            for (index, byte) in bytes.enumerated() {
                output[2 * index] = digits[Int(byte >> 4)]
                output[2 * index + 1] = digits[Int(byte & 15)]
            }
            return bytes.count * 2
        }
    }

    static func base64(_ bytes: [UInt8]) -> String {
        let digits = Array("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".utf8)
        var text: [UInt8] = []
        for start in stride(from: 0, to: bytes.count, by: 3) {
            let rest = bytes[start..<min(start + 3, bytes.count)]
            let word = rest.enumerated().reduce(UInt32(0)) { $0 | UInt32($1.element) << UInt32(16 - 8 * $1.offset) }
            for index in 0..<4 {
                text.append(index <= rest.count ? digits[Int(word >> UInt32(18 - 6 * index)) & 63] : UInt8(ascii: "="))
            }
        }
        return String(decoding: text, as: UTF8.self)
    }
}
