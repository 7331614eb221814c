// What an answer that is an error means to the caller, and what to tell people about it.

import Glibc
import Runtime

extension S3Bucket {
    /// The error code in the body of an answer.
    func errorCode(_ response: HTTPResponse) -> String? { errorElement(response)?.child("Code")?.text }

    private func errorElement(_ response: HTTPResponse) -> XMLElement? {
        guard response.body.count <= 65_536, let root = XMLElement.parse(response.body), root.name == "Error" else {
            return nil
        }
        return root
    }

    /// The error of a request that was answered with an error.
    func failure(_ response: HTTPResponse, _ verb: String, _ key: String) -> StoreError {
        let error = errorElement(response)
        let code = error?.child("Code")?.text ?? ""
        let status = response.status
        let kind: StoreError.Kind
        switch (status, code) {
        case (_, "NoSuchBucket"): kind = .denied
        case (404, _): kind = ["get", "look at"].contains(verb) ? .notFound : .denied
        // The bytes that arrived were not those that were sent, and were not kept.
        case (400, "BadDigest"), (400, "InvalidDigest"), (400, "XAmzContentSHA256Mismatch"),
            (400, "XAmzContentChecksumMismatch"),
            (400, "IncompleteBody"):
            kind = .corrupt
        case (400, "RequestTimeout"), (408, _), (409, _), (429, _), (500, _), (502...504, _), (509, _), (599, _):
            kind = .unavailable
        case (0, _): kind = .unavailable  // No status line that could be read.
        // Whatever the reason, it says nothing of the object.
        default: kind = .denied
        }
        var text = "\(name): cannot \(verb) '\(key)': "
        if kind == .notFound {
            text = "\(name): there is no object '\(key)'"
        } else {
            text += "HTTP \(status)"
            if !code.isEmpty { text += " \(oneLine(code))" }
            if let message = error?.child("Message")?.text, !message.isEmpty { text += " (\(oneLine(message)))" }
            if let advice = advice(status, code, error, response) { text += "; \(advice)" }
        }
        return StoreError(kind, text, cause: oneLine(code.isEmpty ? "HTTP \(status)" : code))
    }

    private func advice(_ status: Int, _ code: String, _ error: XMLElement?, _ response: HTTPResponse) -> String? {
        switch (status, code) {
        case (_, "RequestTimeTooSkewed"), (_, "RequestExpired"):
            let here = SigV4.timestamp(environment.wallMs)
            return
                "the clocks differ: here it is \(here), there \(oneLine(response.headers["date"] ?? "?")); set this machine's clock"
        case (_, "SignatureDoesNotMatch"): return "the secret key is wrong, or something on the way changes requests"
        case (_, "InvalidAccessKeyId"):
            return "the store does not know this access key; check AWS_ACCESS_KEY_ID or AWS_PROFILE"
        case (_, "ExpiredToken"), (_, "InvalidToken"):
            return "the session token is no longer valid; put new keys into the credentials file, which is read again"
        case (_, "NoSuchBucket"): return "make the bucket first, or correct its name"
        case (_, "AuthorizationHeaderMalformed"), (_, "PermanentRedirect"), (_, "IllegalLocationConstraintException"),
            (301, _), (307, _):
            let region = error?.child("Region")?.text ?? response.headers["x-amz-bucket-region"]
            return "the region or endpoint is wrong; give region=\(oneLine(region ?? "R")) in the store's URL"
        case (_, "AccessDenied"), (403, _):
            return "these keys have no right to this; they need to get, put, list and delete here"
        case (501, _), (405, _): return "this store lacks what Margarine needs"
        default: return nil
        }
    }

    /// The error of a request that got no answer and may be repeated.
    func failure(_ error: TransportError, _ verb: String, _ key: String) -> StoreError {
        StoreError(
            error.isTooLong ? .corrupt : error.isCancelled ? .refused : error.isPermanent ? .denied : .unavailable,
            "\(name): cannot \(verb) '\(key)': \(oneLine(error.text))", cause: oneLine(error.text))
    }
}

/// Foreign text fit for a message: printable, on one line, not long.
func oneLine(_ text: String) -> String {
    let line = String(text.prefix(300).map { $0.isNewline ? " " : $0 }).printable
    return text.count > 300 ? line + "…" : line
}

func isReadable(_ path: String) -> Bool { access(path, R_OK) == 0 }
