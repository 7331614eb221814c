import Glibc
import Testing

@testable import ObjectStore

/// The worked examples of "Signature Calculations for the Authorization Header: Transferring Payload in a Single
/// Chunk" in the Amazon S3 API reference. (The checking server is the second, independent implementation.)
@Suite struct SigV4Tests {
    let signer = SigV4(
        credentials: Credentials(
            accessKey: "AKIAIOSFODNN7EXAMPLE", secretKey: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
        region: "us-east-1")
    let host = ("host", "examplebucket.s3.amazonaws.com")
    let wallMs: Int64 = 1_369_353_600_000  // 24 May 2013, 00:00 UTC
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

    func signature(_ headers: [(String, String)]) -> String? {
        headers.first { $0.0 == "authorization" }?.1.split(separator: "=").last.map(String.init)
    }

    @Test func getWithRange() {
        let headers = signer.headers(
            method: "GET", path: "/test.txt", query: [], headers: [host, ("range", "bytes=0-9")], payloadHash: empty,
            wallMs: wallMs)
        #expect(
            headers.first { $0.0 == "authorization" }?.1
                == "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        )
    }

    @Test func putWithBody() {
        let hash = Digest.hex(Digest.sha256(Array("Welcome to Amazon S3.".utf8)))
        #expect(hash == "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072")
        let path = SigV4.percentEncoded("/test$file.text", keepSlash: true)
        let headers = signer.headers(
            method: "PUT", path: path, query: [],
            headers: [("date", "Fri, 24 May 2013 00:00:00 GMT"), host, ("x-amz-storage-class", "REDUCED_REDUNDANCY")],
            payloadHash: hash,
            wallMs: wallMs)
        #expect(signature(headers) == "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd")
    }

    @Test func queries() {
        let lifecycle = signer.headers(
            method: "GET", path: "/", query: [("lifecycle", "")], headers: [host], payloadHash: empty, wallMs: wallMs)
        #expect(signature(lifecycle) == "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543")
        let list = signer.headers(
            method: "GET", path: "/", query: [("prefix", "J"), ("max-keys", "2")], headers: [host], payloadHash: empty,
            wallMs: wallMs)
        #expect(signature(list) == "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7")
    }

    @Test func encoding() {
        #expect(SigV4.percentEncoded("aZ09-._~/ +=ü") == "aZ09-._~%2F%20%2B%3D%C3%BC")
        #expect(SigV4.canonicalQuery([("b", "2"), ("a b", ""), ("b", "1")]) == "a%20b=&b=1&b=2")
        #expect(SigV4.timestamp(951_827_696_789) == "20000229T123456Z")
        // RFC 1321 and RFC 4648.
        #expect(Digest.hex(Digest.md5(Array("message digest".utf8))) == "f96b697d7cb7938d525a2f31aaf161d0")
        for (plain, coded) in [
            ("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE="),
        ] {
            #expect(Digest.base64(Array(plain.utf8)) == coded)
        }
        #expect(Digest.base64([0xff, 0xef, 0xfe]) == "/+/+")
    }
}

@Suite struct CredentialsTests {
    let file = """
        # comment
        [default]
        aws_access_key_id = AKDEFAULT
        aws_secret_access_key=abc/+=def

        [ other ]
        AWS_ACCESS_KEY_ID=AKOTHER
        aws_secret_access_key = s
        aws_session_token = t=
        [half]
        aws_access_key_id = x
        """

    @Test func profiles() {
        #expect(
            Credentials.parse(file, profile: "default") == Credentials(accessKey: "AKDEFAULT", secretKey: "abc/+=def"))
        #expect(
            Credentials.parse(file, profile: "other")
                == Credentials(accessKey: "AKOTHER", secretKey: "s", sessionToken: "t="))
        #expect(Credentials.parse(file, profile: "half") == nil)
        #expect(Credentials.parse(file, profile: "none") == nil)
    }

    @Test func wherePeopleKeepThem() async throws {
        try await withTemporaryDirectory { path in
            let (fd, bytes) = (creat(path + "/keys", 0o600), Array(file.utf8))
            #expect(write(fd, bytes, bytes.count) == bytes.count)
            close(fd)
            func find(_ variables: [String: String]) throws -> Credentials { try Credentials.find { variables[$0] } }
            let given = try find(["AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_SESSION_TOKEN": "c"])
            #expect(given == Credentials(accessKey: "a", secretKey: "b", sessionToken: "c"))
            #expect(try find(["AWS_SHARED_CREDENTIALS_FILE": path + "/keys"]).accessKey == "AKDEFAULT")
            #expect(
                try find(["AWS_SHARED_CREDENTIALS_FILE": path + "/keys", "AWS_PROFILE": "other"]).accessKey == "AKOTHER"
            )
            for variables in [
                [:], ["AWS_ACCESS_KEY_ID": "a"], ["AWS_SECRET_ACCESS_KEY": "b"], ["HOME": path],
                ["AWS_SHARED_CREDENTIALS_FILE": path + "/keys", "AWS_PROFILE": "half"],
                ["AWS_ACCESS_KEY_ID": "a\nb", "AWS_SECRET_ACCESS_KEY": "b"],
            ] {
                #expect { try find(variables) } throws: { ($0 as? StoreError)?.kind == .refused }
            }
        }
    }
}

@Suite struct XMLTests {
    func parse(_ text: String) -> XMLElement? { XMLElement.parse(Array(text.utf8)) }

    @Test func wellFormed() {
        let root = parse(
            "\u{feff}<?xml version=\"1.0\"?>\n<!-- a > b --><a:List xmlns:a='x>y' b=\"c\"><Key>a&amp;&lt;&gt;&quot;&apos;&#65;&#x1F600;</Key><Empty/><E2 x=\"/\"></E2><![CDATA[<x>&amp;]]><?pi ?></a:List>\n"
        )
        #expect(root?.name == "List" && root?.text == "<x>&amp;" && root?.children.count == 3)
        #expect(root?.child("Key")?.text == "a&<>\"'A😀")
        #expect(root?.child("E2")?.text == "")
    }

    @Test(arguments: [
        "", " ", "text", "<a>", "<a></b>", "<a></a><b/>", "<a/>x", "<a>&b;</a>", "<a>&#0;</a>", "<a>&#xD800;</a>",
        "<a>&amp</a>", "<a", "<a x='>", "<a><!-- </a>",
        "<!DOCTYPE a [<!ENTITY x \"y\">]><a>&x;</a>", "<a><b></a></b>", "<a><![CDATA[x</a>", "<?xml", "<a b<c>",
        "<>x</>", "<:/>", "<a:></a:>", "<a#b/>", "<a<b/></a>",
    ])
    func malformed(_ text: String) { #expect(parse(text) == nil) }

    @Test func depthAndBytesAreBounded() {
        #expect(parse(String(repeating: "<a>", count: 16) + String(repeating: "</a>", count: 16)) != nil)
        #expect(parse(String(repeating: "<a>", count: 17) + String(repeating: "</a>", count: 17)) == nil)
        #expect(XMLElement.parse(Array("<a>".utf8) + [0xff] + Array("</a>".utf8)) == nil)
    }

    /// Any mutilation of a good answer is read or refused, never a crash.
    @Test func mutilatedAnswers() {
        let good = Array(
            "<?xml version=\"1.0\"?><L x='1'><C><Key>a&amp;b</Key><Size>1</Size></C><!-- c --><T>false</T></L>".utf8)
        let seed = UInt64.random(in: 0 ... .max)
        var state = seed
        for _ in 0..<20_000 {
            var bytes = good
            for _ in 0..<(1 + splitMix(&state) % 3) where bytes.count > 1 {
                let at = Int(splitMix(&state) % UInt64(bytes.count))
                switch splitMix(&state) % 3 {
                case 0: bytes[at] = UInt8(truncatingIfNeeded: splitMix(&state))
                case 1: bytes.remove(at: at)
                default: bytes.removeLast(bytes.count - max(1, at))
                }
            }
            _ = XMLElement.parse(bytes)
        }
        #expect(XMLElement.parse(good)?.child("C")?.child("Key")?.text == "a&b", "seed \(seed)")
    }
}
