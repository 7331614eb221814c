// One request on its way: what libcurl's callbacks read from and write to.

import CCurl
import CLibraries
import Glibc

/// Owned by the curl thread from its submission until it completes.
final class Transfer: @unchecked Sendable {
    private let request: HTTPRequest
    /// Set before the submission.
    var continuation: UnsafeContinuation<Result<HTTPResponse, TransportError>, Never>?
    var isCancelled = false

    private var response = HTTPResponse()
    private var sentBytes = 0
    private var maxBodyBytes = 0
    private var isTooLong = false
    private static let maxErrorBytes = 65_536
    private var headerList: UnsafeMutablePointer<curl_slist>?
    private var errorText = UnsafeMutablePointer<CChar>.allocate(capacity: Int(CURL_ERROR_SIZE))

    init(_ request: HTTPRequest) {
        self.request = request
        errorText.pointee = 0
    }

    deinit { errorText.deallocate() }

    func complete(_ result: Result<HTTPResponse, TransportError>) {
        continuation?.resume(returning: result)
        continuation = nil
    }

    /// Sets a fresh handle up for this request; false without memory for it. `release` undoes what it keeps.
    func prepare(_ handle: UnsafeMutableRawPointer, _ server: HTTPServer, _ settings: TransportSettings) -> Bool {
        maxBodyBytes = settings.maxBodyBytes
        var curl = CurlOptions(handle)
        curl.set(CURLOPT_URL, server.root + request.target)
        curl.set(CURLOPT_PROTOCOLS_STR, "http,https")
        curl.set(CURLOPT_PATH_AS_IS, 1)
        curl.set(CURLOPT_HTTP_VERSION, Int(CURL_HTTP_VERSION_1_1))
        curl.set(CURLOPT_NOSIGNAL, 1)
        curl.set(CURLOPT_TCP_KEEPALIVE, 1)
        curl.set(CURLOPT_CONNECTTIMEOUT_MS, settings.connectTimeoutMs)
        let bytes = request.body.count + request.expectedBytes
        curl.set(CURLOPT_TIMEOUT_MS, settings.totalTimeoutMs + bytes / max(1, settings.slowestBytesPerSecond / 1000))
        curl.set(CURLOPT_LOW_SPEED_LIMIT, 1)
        curl.set(CURLOPT_LOW_SPEED_TIME, settings.stallTimeoutSeconds)
        curl.set(CURLOPT_USERAGENT, "margarine")
        if server.ignoresProxies { curl.set(CURLOPT_PROXY, "") }
        if let file = server.certificateFile {
            curl.set(CURLOPT_CAINFO, file)
            curl.set(CURLOPT_CAPATH, nil)
        }
        curl.set(CURLOPT_ERRORBUFFER, errorText)

        // libcurl would wait for "100 Continue" before a body, and name a type of its own for it.
        for line in request.headers.map({ "\($0): \($1)" }) + ["Expect:", "Accept:"] {
            guard let longer = curl_slist_append(headerList, line) else { return false }
            headerList = longer
        }
        curl.set(CURLOPT_HTTPHEADER, headerList)

        let context = Unmanaged.passUnretained(self).toOpaque()
        if request.method == "HEAD" {
            curl.set(CURLOPT_NOBODY, 1)
        } else if !request.body.isEmpty || request.method == "PUT" {
            curl.set(CURLOPT_UPLOAD, 1)
            _ = mg_curl_set_size(handle, Int32(CURLOPT_INFILESIZE_LARGE.rawValue), Int64(request.body.count))
            curl.set(CURLOPT_READFUNCTION, Transfer.readBody)
            curl.set(CURLOPT_READDATA, context)
            _ = mg_curl_set_seek(handle, Transfer.seekBody)
            curl.set(CURLOPT_SEEKDATA, context)
            if request.body.count > 65_536 { curl.set(CURLOPT_UPLOAD_BUFFERSIZE, 512 << 10) }
        }
        curl.set(CURLOPT_CUSTOMREQUEST, request.method)
        curl.set(CURLOPT_WRITEFUNCTION, Transfer.writeBody)
        curl.set(CURLOPT_WRITEDATA, context)
        curl.set(CURLOPT_HEADERFUNCTION, Transfer.writeHeader)
        curl.set(CURLOPT_HEADERDATA, context)
        if request.expectedBytes > 65_536 { curl.set(CURLOPT_BUFFERSIZE, 512 << 10) }
        return curl.hasMemory
    }

    func release() {
        curl_slist_free_all(headerList)
        headerList = nil
    }

    /// Whether the server may have all of the request.
    func isMaybeDone(_ handle: UnsafeMutableRawPointer) -> Bool {
        mg_curl_get_long(handle, Int32(CURLINFO_REQUEST_SIZE.rawValue)) > 0 && sentBytes == request.body.count
    }

    func result(_ handle: UnsafeMutableRawPointer, _ code: CURLcode) -> Result<HTTPResponse, TransportError> {
        // An answer that came before the request was sent whole is an answer (a store that is busy, or refuses).
        if code == CURLE_OK || code == CURLE_SEND_ERROR && response.status >= 400 { return .success(response) }
        var text = String(cString: errorText)
        if text.isEmpty { text = String(cString: curl_easy_strerror(code)) }
        let permanent: [CURLcode] = [
            CURLE_PEER_FAILED_VERIFICATION, CURLE_SSL_CACERT_BADFILE, CURLE_URL_MALFORMAT, CURLE_UNSUPPORTED_PROTOCOL,
            CURLE_SSL_ISSUER_ERROR, CURLE_BAD_FUNCTION_ARGUMENT,
        ]
        return .failure(
            TransportError(
                isMaybeDone: isMaybeDone(handle), isPermanent: permanent.contains(code), isTooLong: isTooLong,
                text: isTooLong ? "the answer is longer than \(maxBodyBytes) bytes" : text))
    }

    // MARK: Callbacks

    private static func of(_ context: UnsafeMutableRawPointer?) -> Transfer {
        Unmanaged<Transfer>.fromOpaque(context!).takeUnretainedValue()
    }

    private static let readBody: mg_curl_data = { buffer, size, count, context in
        let transfer = of(context)
        let step = min(size * count, transfer.request.body.count - transfer.sentBytes)
        if step == 0 { return 0 }
        transfer.request.body.withUnsafeBytes { _ = memcpy(buffer!, $0.baseAddress! + transfer.sentBytes, step) }
        transfer.sentBytes += step
        return step
    }

    private static let seekBody: mg_curl_seek = { context, offset, origin in
        let transfer = of(context)
        guard origin == SEEK_SET, offset >= 0, offset <= transfer.request.body.count, !transfer.request.sendsOnce else {
            return CURL_SEEKFUNC_FAIL
        }
        transfer.sentBytes = offset
        return CURL_SEEKFUNC_OK
    }

    private static let writeBody: mg_curl_data = { buffer, size, count, context in
        let transfer = of(context)
        let step = size * count
        if transfer.response.status >= 300 {
            // An error: the beginning says what it is, and there is no need of more.
            let room = max(0, Transfer.maxErrorBytes - transfer.response.body.count)
            transfer.response.body.append(contentsOf: UnsafeRawBufferPointer(start: buffer, count: min(step, room)))
            return step
        }
        if transfer.response.body.isEmpty { transfer.makeRoom() }
        guard step <= transfer.maxBodyBytes - transfer.response.body.count else {
            transfer.isTooLong = true
            return 0
        }
        transfer.response.body.append(contentsOf: UnsafeRawBufferPointer(start: buffer, count: step))
        return step
    }

    private func makeRoom() {
        if let length = response.headers["content-length"].flatMap({ Int($0) }), length > 0 {
            response.body.reserveCapacity(min(length, maxBodyBytes))
        }
    }

    private static let writeHeader: mg_curl_data = { buffer, size, count, context in
        let transfer = of(context)
        let bytes = UnsafeRawBufferPointer(start: buffer, count: size * count)
        transfer.take(header: String(decoding: bytes, as: UTF8.self))
        return size * count
    }

    private func take(header: String) {
        if header.hasPrefix("HTTP/") {
            // Also behind "100 Continue": the last status counts, with its own headers.
            response.status = header.split(separator: " ").dropFirst().first.flatMap { Int($0) } ?? 0
            response.headers = [:]
        } else if let colon = header.utf8.firstIndex(of: UInt8(ascii: ":")), response.headers.count < 100 {
            var value = header[header.index(after: colon)...]
            while let last = value.last, last.isWhitespace { value.removeLast() }
            while let first = value.first, first.isWhitespace { value.removeFirst() }
            response.headers[header[..<colon].lowercased()] = String(value)
        }
    }
}

/// The variadic setter, by kind of value.
private struct CurlOptions {
    let handle: UnsafeMutableRawPointer
    /// libcurl copies texts.
    private(set) var hasMemory = true
    init(_ handle: UnsafeMutableRawPointer) { self.handle = handle }

    mutating func set(_ option: CURLoption, _ value: Int) {
        check(mg_curl_set_long(handle, Int32(option.rawValue), value))
    }
    mutating func set(_ option: CURLoption, _ value: String) {
        check(mg_curl_set_text(handle, Int32(option.rawValue), value))
    }
    mutating func set(_ option: CURLoption, _ value: UnsafeMutableRawPointer?) {
        check(mg_curl_set_pointer(handle, Int32(option.rawValue), value))
    }
    mutating func set(_ option: CURLoption, _ value: @escaping mg_curl_data) {
        check(mg_curl_set_data(handle, Int32(option.rawValue), value))
    }
    private mutating func check(_ code: Int32) {
        if code == CURLE_OUT_OF_MEMORY.rawValue {
            hasMemory = false
        } else {
            precondition(code == CURLE_OK.rawValue, "libcurl lacks an option: \(code)")
        }
    }
}
