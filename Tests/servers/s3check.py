#!/usr/bin/env python3
"""s3check.py: a strict S3 server for tests, in the standard library only.

Strict: signatures (SigV4 in the header, every header of the request that matters signed, the payload's hash true, the
clock within 15 minutes), Content-MD5, and queries and paths encoded to the letter. Conditions on PUT are atomic.
It prints one line when it listens:  ready URL admin URL

  --state DIR    also writes DIR/env (to be sourced) and DIR/pid
  --dir DIR      keeps objects in files there (and finds them again), instead of in memory
  --quirk Q      imitates stores met in the wild; may be given several times:
      ignore-none-match, ignore-match   a condition on PUT is silently ignored
      no-conditions-501                 conditions on PUT are refused
      unquoted                          If-Match with a quoted ETag never holds (Ceph 16)
      race500, conflict409              a lost condition is answered 500, or 409
      no-multi-delete, no-range         POST ?delete is refused; Range is ignored
      random-etag                       ETags are no MD5s
      chunked                           bodies come in chunks, without their length
      empty-pages                       every page of a listing is preceded by an empty one
      encoded-slashes                   listings encode `/` too

The admin port (no authentication, loopback only) takes
  POST /faults  one rule or a list      DELETE /faults  forgets them and lets go what hangs
  POST /outage  {"mode": "off|reset|503|hang"}          POST /latency {"ms": 5}
  GET /stats    what has been asked     GET /log        the last 1000 requests
A rule: {"do": D, "method": regex, "target": regex, "after": skip so many, "count": n, "probability": p} and D is one of
  status {"code","error"}   delay {"seconds"}    hang            reset             slow {"rate": bytes/s}
  truncate                  corrupt              drop-response   error-after-effect {"code","error"}
  answer {"code","body","headers"}: an answer of your own, without looking at the request
"""
import argparse, base64, binascii, bisect, datetime, hashlib, hmac, http.server, json, os, random, re, signal, socket
import ssl, struct, sys, threading, time, urllib.parse
from xml.sax.saxutils import escape

arguments = argparse.ArgumentParser()
arguments.add_argument("--port", type=int, default=0)
arguments.add_argument("--admin-port", type=int, default=0)
arguments.add_argument("--access", default="margarinetest")
arguments.add_argument("--secret", default="margarinesecret0123456789")
arguments.add_argument("--token", help="demand this session token")
arguments.add_argument("--region", default="us-east-1")
arguments.add_argument("--bucket", action="append", help="made at start (default: margarine)")
arguments.add_argument("--dir")
arguments.add_argument("--state")
arguments.add_argument("--quirk", action="append", default=[])
arguments.add_argument("--cert")
arguments.add_argument("--key")
arguments.add_argument("--until-stdin-closes", action="store_true", help="end with whoever started it")
A = arguments.parse_args()
A.bucket = A.bucket or ["margarine"]
QUIRKS = set(A.quirk)
KNOWN = {"ignore-none-match", "ignore-match", "no-conditions-501", "unquoted", "race500", "conflict409", "no-multi-delete", "no-range",
         "random-etag", "chunked", "empty-pages", "encoded-slashes"}
if QUIRKS - KNOWN: sys.exit(f"s3check.py: unknown quirk {', '.join(sorted(QUIRKS - KNOWN))}")

EMPTY = hashlib.sha256(b"").hexdigest()
UNRESERVED = re.compile(r"(?:[A-Za-z0-9._~-]|%[0-9A-F]{2})*")


class Refusal(Exception):
    """An error answer."""
    def __init__(self, status, code, message="", extra=""):
        self.status, self.code, self.message, self.extra = status, code, message or code, extra


class Bucket:
    """Objects by key, in memory or in files; `lock` makes conditions atomic."""
    def __init__(self, name):
        self.lock, self.objects, self.keys, self.times = threading.Lock(), {}, [], {}
        self.path = os.path.join(A.dir, name) if A.dir else None
        if not self.path: return
        os.makedirs(self.path, exist_ok=True)
        for file in os.listdir(self.path):
            full = os.path.join(self.path, file)
            if file.endswith(".new"): os.unlink(full); continue
            with open(full, "rb") as f: head = json.loads(f.readline()); offset = f.tell()
            self.objects[head["key"]] = (head["etag"], os.path.getsize(full) - offset, (full, offset))
            self.times[head["key"]] = os.path.getmtime(full)
        self.keys = sorted(self.objects, key=lambda k: k.encode())

    def read(self, entry, first, end):
        if not self.path: return memoryview(entry[2])[first:end]
        full, offset = entry[2]
        with open(full, "rb") as f: f.seek(offset + first); return f.read(end - first)

    def prepare(self, key, etag, body):
        if not self.path: return body
        new = os.path.join(self.path, f"{random.getrandbits(64):x}.new")
        head = json.dumps({"key": key, "etag": etag}).encode() + b"\n"
        with open(new, "wb") as f: f.write(head); f.write(body)
        return new, len(head)

    def store(self, key, etag, body, prepared):
        """Under the lock."""
        if self.path:
            full = os.path.join(self.path, hashlib.sha256(key.encode()).hexdigest())
            os.rename(prepared[0], full)
            prepared = (full, prepared[1])
        if key not in self.objects: bisect.insort(self.keys, key, key=lambda k: k.encode())
        self.objects[key] = (etag, len(body), prepared)
        self.times[key] = time.time()

    def modified(self, key):
        """To the second, as some services tell it."""
        return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.times.get(key, 0)))

    def remove(self, key):
        """Under the lock."""
        entry = self.objects.pop(key, None)
        if entry is None: return
        self.times.pop(key, None)
        del self.keys[bisect.bisect_left(self.keys, key.encode(), key=lambda k: k.encode())]
        if self.path: os.unlink(entry[2][0])


class Faults:
    def __init__(self):
        self.lock, self.rules, self.outage, self.latency = threading.Lock(), [], "off", 0
        self.release = threading.Event()
        self.log, self.counts, self.connections = [], {}, 0

    def pick(self, method, target):
        with self.lock:
            if self.outage != "off":
                return {"reset": {"do": "reset"}, "hang": {"do": "hang"}, "503": {"do": "status", "code": 503, "error": "SlowDown"}}[self.outage]
            for r in self.rules:
                if not re.fullmatch(r.get("method", ".*"), method) or not re.search(r.get("target", ""), target): continue
                if r.get("after", 0) > 0: r["after"] -= 1; continue
                if r.get("count", 1) <= 0 or random.random() >= r.get("probability", 1): continue
                if "count" in r: r["count"] -= 1
                r["hits"] = r.get("hits", 0) + 1
                return dict(r)
        return None

    def note(self, *entry):
        with self.lock:
            self.log.append(entry)
            del self.log[:-1000]
            name = f"{entry[0]} {entry[2]}"
            self.counts[name] = self.counts.get(name, 0) + 1

    def let_go(self):
        with self.lock: old, self.release = self.release, threading.Event()
        old.set()


def signing_key(day):
    key = ("AWS4" + A.secret).encode()
    for part in (day, A.region, "s3", "aws4_request"): key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key


AUTHORIZATION = re.compile(r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/s3/aws4_request, ?SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})")


def check_signature(method, path, query, headers, body):
    if "authorization" not in headers: raise Refusal(403, "AccessDenied", "unsigned")
    match = AUTHORIZATION.fullmatch(headers["authorization"])
    if not match: raise Refusal(400, "AuthorizationHeaderMalformed")
    access, day, region, names, signature = match.groups()
    if access != A.access: raise Refusal(403, "InvalidAccessKeyId", "The access key does not exist.")
    if region != A.region:
        raise Refusal(400, "AuthorizationHeaderMalformed", f"the region '{region}' is wrong; expecting '{A.region}'", f"<Region>{A.region}</Region>")
    stamp = headers.get("x-amz-date", "")
    try: when = datetime.datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.timezone.utc)
    except ValueError: raise Refusal(403, "AccessDenied", "no valid x-amz-date")
    skew = abs((datetime.datetime.now(datetime.timezone.utc) - when).total_seconds())
    if skew > 900 or stamp[:8] != day: raise Refusal(403, "RequestTimeTooSkewed", "The difference between the request time and the server's time is too large.")
    if A.token and headers.get("x-amz-security-token") != A.token: raise Refusal(403, "InvalidToken")
    hashed = headers.get("x-amz-content-sha256", "")
    if not re.fullmatch("[0-9a-f]{64}", hashed): raise Refusal(400, "InvalidRequest", "x-amz-content-sha256 must be a hash")
    signed = names.split(";")
    if signed != sorted(set(signed)): raise Refusal(400, "AuthorizationHeaderMalformed", "header names not sorted")
    needed = {"host"} | {n for n in headers if n.startswith("x-amz-") or n in ("content-md5", "range", "if-match", "if-none-match")}
    if needed - set(signed) or set(signed) - set(headers): raise Refusal(403, "AccessDenied", f"signed are {names}, needed are {sorted(needed)}")
    canonical = "\n".join([method, path, query, "".join(f"{n}:{' '.join(headers[n].split())}\n" for n in signed), names, hashed])
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{day}/{region}/s3/aws4_request\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    if not hmac.compare_digest(hmac.new(signing_key(day), text.encode(), hashlib.sha256).hexdigest(), signature):
        raise Refusal(403, "SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided.")
    if hashed != (hashlib.sha256(body).hexdigest() if body else EMPTY): raise Refusal(400, "XAmzContentSHA256Mismatch")


def encode(text): return urllib.parse.quote(text, safe="-_.~")


def split_query(query):
    """The parameters of a query, which must be encoded and sorted exactly as it is signed."""
    if not query: return {}
    pairs = []
    for part in query.split("&"):
        name, equals, value = part.partition("=")
        if not equals or not UNRESERVED.fullmatch(name) or not UNRESERVED.fullmatch(value): raise Refusal(400, "InvalidURI", f"query {query!r} is not strictly encoded")
        pairs.append((name, value))
    if pairs != sorted(pairs) or len({n for n, _ in pairs}) != len(pairs): raise Refusal(400, "InvalidURI", f"query {query!r} is not sorted")
    return {urllib.parse.unquote(n): urllib.parse.unquote(v) for n, v in pairs}


class Service(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    disable_nagle_algorithm = True
    timeout = 600

    def setup(self):
        super().setup()
        with faults.lock: faults.connections += 1

    def log_message(self, *_): pass

    def hang_up(self, reset=True):
        if reset: self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        # With the last reference gone the reset goes out; a TLS socket is cut below TLS.
        try: self.connection.shutdown(socket.SHUT_RDWR) if not reset else None
        except OSError: pass
        self.connection.close() if not reset else os.close(self.connection.detach())

    def parse_request(self):
        self.begun = time.monotonic()
        return super().parse_request()

    def send(self, status, headers, body=b"", fault=None):
        do = fault["do"] if fault else None
        length = len(body)
        if do == "drop-response": return self.hang_up()
        if do == "corrupt" and length:
            body = bytearray(body); body[random.randrange(length)] ^= 1 << random.randrange(8)
        lines = [f"HTTP/1.1 {status} {self.responses.get(status, ('Answer',))[0]}", f"Date: {self.date_time_string()}", f"x-amz-request-id: {random.getrandbits(64):016X}"]
        chunked = "chunked" in QUIRKS and length and self.command == "GET"
        if chunked: lines.append("Transfer-Encoding: chunked")
        elif status != 204 and "Content-Length" not in headers: lines.append(f"Content-Length: {length}")
        lines += [f"{n}: {v}" for n, v in headers.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode()
        if self.command == "HEAD" or status == 204: body = b""
        if do == "truncate" and body: body = body[: len(body) // 2]
        if chunked: body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), bytes(body))
        if do == "slow":
            self.connection.sendall(head)
            step = max(1, int(fault.get("rate", 1000) / 10))
            for at in range(0, len(body), step):
                self.connection.sendall(body[at:at + step]); time.sleep(0.1)
        elif len(body) < 65536: self.connection.sendall(head + bytes(body))
        else: self.connection.sendall(head); self.connection.sendall(body)
        if do == "truncate": self.hang_up(reset=False)

    def refuse(self, r, fault=None):
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{escape(r.code)}</Code><Message>{escape(r.message)}</Message>{r.extra}</Error>'.encode()
        self.send(r.status, {"Content-Type": "application/xml"}, body, fault)

    def serve(self):
        try: self.serve_or_fail()
        except (ConnectionError, TimeoutError, ssl.SSLError, OSError): self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = serve

    def serve_or_fail(self):
        headers = {n.lower(): v for n, v in self.headers.items()}
        fault = faults.pick(self.command, self.path)
        do = fault["do"] if fault else None
        if do == "reset":
            faults.note(self.command, self.path, "reset")
            return self.hang_up()
        length = int(headers.get("content-length", 0))
        body = self.rfile.read(length) if length else b""
        if len(body) != length: self.close_connection = True; return
        if faults.latency: time.sleep(faults.latency / 1000)
        if do == "delay": time.sleep(fault.get("seconds", 1))
        if do == "hang":
            faults.note(self.command, self.path, "hang")
            faults.release.wait(600)
            return self.hang_up()
        if do == "answer":
            faults.note(self.command, self.path, "answer")
            return self.send(fault.get("code", 200), fault.get("headers", {}), fault.get("body", "").encode())
        try:
            if do == "status": raise Refusal(fault.get("code", 503), fault.get("error", "SlowDown"), "injected")
            status, answer, data = self.answer(headers, body)
            if do == "error-after-effect": raise Refusal(fault.get("code", 500), fault.get("error", "InternalError"), "injected after the effect")
        except Refusal as r:
            faults.note(self.command, self.path, r.status, headers.get("if-match") or headers.get("if-none-match"))
            return self.refuse(r)
        faults.note(self.command, self.path, status, headers.get("if-match") or headers.get("if-none-match"))
        self.send(status, answer, data, fault)

    def answer(self, headers, body):
        raw, _, query = self.path.partition("?")
        if not all(UNRESERVED.fullmatch(p) for p in raw.split("/")): raise Refusal(400, "InvalidURI", f"path {raw!r} is not strictly encoded")
        if "transfer-encoding" in headers: raise Refusal(411, "MissingContentLength")
        check_signature(self.command, raw, query, headers, body)
        if "content-md5" in headers:
            try: given = base64.b64decode(headers["content-md5"], validate=True)
            except binascii.Error: raise Refusal(400, "InvalidDigest")
            if given != hashlib.md5(body).digest(): raise Refusal(400, "BadDigest", "The Content-MD5 you specified did not match what we received.")
        q = split_query(query)
        name, _, key = urllib.parse.unquote(raw[1:]).partition("/")
        bucket = buckets.get(name)
        if bucket is None: raise Refusal(404, "NoSuchBucket", "The specified bucket does not exist")
        if not key:
            if self.command == "GET" and q.get("list-type") == "2": return self.list(bucket, q)
            if self.command == "POST" and q == {"delete": ""}: return self.delete_many(bucket, headers, body)
            raise Refusal(501, "NotImplemented", f"{self.command} on a bucket with {q}")
        if q: raise Refusal(501, "NotImplemented", f"parameters {q}")
        if len(key.encode()) > 1024: raise Refusal(400, "KeyTooLongError")
        if self.command in ("GET", "HEAD"): return self.get(bucket, key, headers)
        if self.command == "PUT": return self.put(bucket, key, headers, body)
        if self.command == "DELETE":
            with bucket.lock: bucket.remove(key)
            return 204, {}, b""
        raise Refusal(405, "MethodNotAllowed")

    def get(self, bucket, key, headers):
        with bucket.lock:
            entry = bucket.objects.get(key)
            if entry is None: raise Refusal(404, "NoSuchKey", "The specified key does not exist.")
            etag, length, _ = entry
            first, end, status = 0, length, 200
            answer = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
            if "range" in headers and "no-range" not in QUIRKS:
                match = re.fullmatch(r"bytes=(\d+)-(\d+)", headers["range"])
                if not match or int(match[1]) > int(match[2]): raise Refusal(400, "InvalidArgument", "range")
                first, end, status = int(match[1]), min(int(match[2]) + 1, length), 206
                if first >= length: raise Refusal(416, "InvalidRange", "The requested range is not satisfiable")
                answer["Content-Range"] = f"bytes {first}-{end - 1}/{length}"
            if self.command == "HEAD": return status, answer | {"Content-Length": end - first}, b""
            return status, answer, bucket.read(entry, first, end)

    def put(self, bucket, key, headers, body):
        if "content-length" not in headers: raise Refusal(411, "MissingContentLength")
        absent, match = headers.get("if-none-match"), headers.get("if-match")
        if (absent or match) and "no-conditions-501" in QUIRKS: raise Refusal(501, "NotImplemented", "A header you provided implies functionality that is not implemented")
        if absent not in (None, "*"): raise Refusal(501, "NotImplemented", "If-None-Match takes *")
        if "ignore-none-match" in QUIRKS: absent = None
        if "ignore-match" in QUIRKS: match = None
        etag = f"{random.getrandbits(128):032x}" if "random-etag" in QUIRKS else hashlib.md5(body).hexdigest()
        prepared = bucket.prepare(key, etag, body)
        with bucket.lock:
            entry = bucket.objects.get(key)
            lost = None
            if absent and entry: lost = Refusal(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
            if match:
                present = entry and (entry[0] if "unquoted" in QUIRKS else f'"{entry[0]}"')
                if entry is None: lost = Refusal(404, "NoSuchKey", "The specified key does not exist.")
                elif match != present: lost = Refusal(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
            if lost is None: bucket.store(key, etag, body, prepared)
        if lost:
            if bucket.path: os.unlink(prepared[0])
            if "race500" in QUIRKS and match: lost = Refusal(500, "UnknownError")
            if "conflict409" in QUIRKS: lost = Refusal(409, "ConditionalRequestConflict")
            raise lost
        return 200, {"ETag": f'"{etag}"'}, b""

    def list(self, bucket, q):
        extra = set(q) - {"list-type", "prefix", "delimiter", "max-keys", "start-after", "continuation-token", "encoding-type"}
        if extra: raise Refusal(400, "InvalidArgument", f"unknown {extra}")
        prefix, delimiter, limit = q.get("prefix", ""), q.get("delimiter", ""), int(q.get("max-keys", 1000))
        if not 0 <= limit <= 1000: limit = 1000
        after = q.get("start-after", "")
        gap = "empty-pages" in QUIRKS
        if "continuation-token" in q:
            kind, after = base64.urlsafe_b64decode(q["continuation-token"]).decode().split(":", 1)
            gap = gap and kind == "page"
        items, folders, more, last = [], [], False, after
        if gap:
            more, next_token = True, "gap:" + after
        else:
            with bucket.lock:
                start = bisect.bisect_left(bucket.keys, max(prefix.encode(), after.encode()), key=lambda k: k.encode())
                for key in bucket.keys[start:]:
                    if not key.startswith(prefix): break
                    if after and key.encode() <= after.encode(): continue
                    rest = key[len(prefix):]
                    if delimiter and delimiter in rest:
                        folder = prefix + rest[: rest.index(delimiter) + 1]
                        if folders and folders[-1] == folder: continue
                        if after.startswith(folder) and "continuation-token" in q: continue
                        if len(items) + len(folders) >= limit: more = True; break
                        folders.append(folder); last = folder
                        continue
                    if len(items) + len(folders) >= limit: more = True; break
                    items.append((key, bucket.objects[key])); last = key
            next_token = "page:" + last
        coded = q.get("encoding-type") == "url"
        safe = "-_.*" if "encoded-slashes" in QUIRKS else "-_.*/"
        show = (lambda k: urllib.parse.quote_plus(k, safe=safe)) if coded else escape
        x = ['<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">',
             f"<Name>b</Name><Prefix>{show(prefix)}</Prefix><KeyCount>{len(items) + len(folders)}</KeyCount><MaxKeys>{limit}</MaxKeys>"]
        if coded: x.append("<EncodingType>url</EncodingType>")
        if delimiter: x.append(f"<Delimiter>{escape(delimiter)}</Delimiter>")
        x.append(f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>")
        if more: x.append(f"<NextContinuationToken>{base64.urlsafe_b64encode(next_token.encode()).decode()}</NextContinuationToken>")
        for key, (etag, length, _) in items:
            x.append(f'<Contents><Key>{show(key)}</Key><LastModified>{bucket.modified(key)}</LastModified><ETag>&quot;{etag}&quot;</ETag><Size>{length}</Size><StorageClass>STANDARD</StorageClass></Contents>')
        for folder in folders: x.append(f"<CommonPrefixes><Prefix>{show(folder)}</Prefix></CommonPrefixes>")
        x.append("</ListBucketResult>")
        return 200, {"Content-Type": "application/xml"}, "".join(x).encode()

    def delete_many(self, bucket, headers, body):
        if "no-multi-delete" in QUIRKS: raise Refusal(501, "NotImplemented")
        if "content-md5" not in headers: raise Refusal(400, "InvalidRequest", "Missing required header for this request: Content-MD5")
        import xml.etree.ElementTree as ET
        try: root = ET.fromstring(body)
        except ET.ParseError: raise Refusal(400, "MalformedXML")
        space = "{http://s3.amazonaws.com/doc/2006-03-01/}"
        keys = [o.findtext(space + "Key") for o in root.iter(space + "Object")]
        if root.tag != space + "Delete" or not 1 <= len(keys) <= 1000 or None in keys: raise Refusal(400, "MalformedXML")
        done = []
        with bucket.lock:
            for key in keys:
                fault = faults.pick("DELETE-ONE", "/" + key)
                if fault: done.append(f"<Error><Key>{escape(key)}</Key><Code>{fault.get('error', 'InternalError')}</Code><Message>injected</Message></Error>"); continue
                bucket.remove(key)
                if root.findtext(space + "Quiet") != "true": done.append(f"<Deleted><Key>{escape(key)}</Key></Deleted>")
        return 200, {"Content-Type": "application/xml"}, f'<?xml version="1.0" encoding="UTF-8"?>\n<DeleteResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{"".join(done)}</DeleteResult>'.encode()


class Admin(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass

    def serve(self):
        length = int(self.headers.get("content-length", 0))
        given = json.loads(self.rfile.read(length) or b"null") if length else None
        with faults.lock:
            if self.path == "/faults" and self.command == "POST":
                faults.rules += given if isinstance(given, list) else [given]
            elif self.path == "/faults" and self.command == "DELETE": faults.rules.clear()
            elif self.path == "/outage" and self.command == "POST": faults.outage = given["mode"]
            elif self.path == "/latency" and self.command == "POST": faults.latency = given["ms"]
            if self.path == "/log": out = list(faults.log)
            elif self.path == "/stats":
                out = {"connections": faults.connections, "requests": sum(faults.counts.values()), "counts": faults.counts,
                       "objects": {n: len(b.objects) for n, b in buckets.items()}}
            else: out = {"rules": faults.rules, "outage": faults.outage, "latency": faults.latency}
        if self.command == "DELETE" or self.path == "/outage": faults.let_go()
        data = json.dumps(out).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = serve


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    context = None

    def finish_request(self, request, address):
        # In the connection's own thread: a slow handshake holds nobody up.
        if self.context:
            try: request = self.context.wrap_socket(request, server_side=True)
            except (OSError, ssl.SSLError): return
        super().finish_request(request, address)

    def shutdown_request(self, request):
        try: super().shutdown_request(request)
        except OSError: pass

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, OSError, ValueError)): super().handle_error(request, address)


faults = Faults()
buckets = {name: Bucket(name) for name in A.bucket}
main = Server(("127.0.0.1", A.port), Service)
if A.cert:
    main.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    main.context.load_cert_chain(A.cert, A.key)
admin = Server(("127.0.0.1", A.admin_port), Admin)
scheme, host = ("https", "localhost") if A.cert else ("http", "127.0.0.1")
url, admin_url = f"{scheme}://{host}:{main.server_address[1]}", f"http://127.0.0.1:{admin.server_address[1]}"
if A.state:
    os.makedirs(A.state, exist_ok=True)
    with open(os.path.join(A.state, "pid"), "w") as f: f.write(f"{os.getpid()}\n")
    with open(os.path.join(A.state, "env.new"), "w") as f:
        f.write(f"S3_ENDPOINT={url}\nS3_ADMIN={admin_url}\nS3_BUCKET={A.bucket[0]}\nAWS_ACCESS_KEY_ID={A.access}\nAWS_SECRET_ACCESS_KEY={A.secret}\nAWS_REGION={A.region}\n")
        f.write(f"STORE_URL='s3://{A.bucket[0]}/store?endpoint={url}&region={A.region}'\n")
    os.rename(os.path.join(A.state, "env.new"), os.path.join(A.state, "env"))
for server in (main, admin): threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
end = threading.Event()
for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, lambda *_: end.set())
if A.until_stdin_closes: threading.Thread(target=lambda: (sys.stdin.buffer.read(), end.set()), daemon=True).start()
print(f"ready {url} admin {admin_url}", flush=True)
end.wait()
