import Glibc
import Testing

/// Runs a shell command to its end. Returns 0 if it went well, else how it ended, as `waitpid` says it.
///
/// Not with Foundation's `Process`: that reads behind the end of its list of descriptors where there are over a thousand.
func shell(_ command: String) throws -> Int32 {
    let words = ["sh", "-c", command]
    var argv: [UnsafeMutablePointer<CChar>?] = words.map { strdup($0) } + [nil]
    defer { for word in argv { free(word) } }
    var child = pid_t()
    let error = posix_spawn(&child, "/bin/sh", nil, nil, &argv, environ)
    try #require(error == 0, "sh can't be started: errno \(error)")
    var status: Int32 = 0
    while waitpid(child, &status, 0) < 0 { try #require(errno == EINTR) }
    return status
}
