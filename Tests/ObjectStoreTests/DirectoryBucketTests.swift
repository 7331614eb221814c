import Glibc
import ObjectStore
import Testing

@Suite struct DirectoryBucketTests {
    @Test func keepsTheContract() async throws {
        try await withTemporaryDirectory { path in
            let bucket = try await DirectoryBucket.open(path: path)
            try await BucketContract(bucket).runAll()
        }
    }

    @Test func equalBytesAlwaysGetAnotherTag() async throws {
        try await withTemporaryDirectory { path in
            let bucket = try await DirectoryBucket.open(path: path)
            var tags: Set<ETag> = []
            for _ in 0..<300 { #expect(tags.insert(try await bucket.put("a", [1], if: .none)).inserted) }
            // As if the clock had gone back by a day since the present file was put.
            var tomorrow = timespec()
            clock_gettime(CLOCK_REALTIME, &tomorrow)
            tomorrow.tv_sec += 86_400
            #expect(utimensat(AT_FDCWD, path + "/a", [tomorrow, tomorrow], 0) == 0)
            for _ in 0..<10 { #expect(tags.insert(try await bucket.put("a", [1], if: .none)).inserted) }
            var status = stat()
            #expect(stat(path + "/a", &status) == 0 && status.st_mtim.tv_sec >= tomorrow.tv_sec)
        }
    }

    /// Two instances share nothing in memory: what keeps them apart is on the disk, as between processes.
    @Test func instancesOnOneDirectorySwapExactly() async throws {
        try await withTemporaryDirectory { path in
            let instances = [
                try await DirectoryBucket.open(path: path), try await DirectoryBucket.open(path: path + "/"),
                try await DirectoryBucket.open(path: path),
            ]
            _ = try await instances[0].put("deep/er/counter", [0, 0], if: .absent)
            let won = try await withThrowingTaskGroup(of: Int.self) { group in
                for instance in instances {
                    for writer in 0..<4 {
                        group.addTask {
                            try await Self.count(instance, "deep/er/counter", writer: UInt8(writer), times: 25)
                        }
                    }
                }
                return try await group.reduce(0, +)
            }
            let bytes = try await instances[1].get("deep/er/counter", range: nil).bytes
            #expect(Int(bytes[0]) << 8 | Int(bytes[1]) == won)
            #expect(won >= 25)
        }
    }

    /// Adds one to the number under `key` so many times, and says how often that was won.
    static func count(_ bucket: any Bucket, _ key: String, writer: UInt8, times: Int) async throws -> Int {
        var won = 0
        for _ in 0..<times {
            let current = try await bucket.get(key, range: nil)
            let next = (Int(current.bytes[0]) << 8 | Int(current.bytes[1])) + 1
            let bytes = [UInt8(next >> 8), UInt8(next & 255), writer] + randomBytes(8)
            if case .won = try await bucket.swap(key, bytes, if: .matches(current.etag)) { won += 1 }
        }
        return won
    }

    /// Another process is in the middle of changing something: whoever else would change it waits.
    @Test func locksOfOtherProcessesAreHeld() async throws {
        try await withTemporaryDirectory { path in
            let bucket = try await DirectoryBucket.open(path: path)
            let tag = try await bucket.put("head", [1], if: .absent)
            let script = """
                import fcntl, os, time
                held = [open(os.environ["LOCKS"] + "/" + str(n), "a") for n in range(64)]
                for f in held: fcntl.flock(f, fcntl.LOCK_EX)
                open(os.environ["LOCKS"] + "/../held", "w").close()
                while os.path.exists(os.environ["LOCKS"]):
                    if os.path.exists(os.environ["LOCKS"] + "/../release"): break
                    time.sleep(0.01)
                """
            try #require(system("LOCKS='\(path)/.locks' python3 -c '\(script)' &") == 0)
            for _ in 0..<500 where access(path + "/held", F_OK) != 0 { try await Task.sleep(nanoseconds: 10_000_000) }
            // The best of some: what else the machine does is not the lock's.
            var best = Duration.seconds(100)
            for _ in 0..<5 {
                let started = ContinuousClock.now
                #expect(try await bucket.get("head", range: nil).bytes == [1])
                best = min(best, ContinuousClock.now - started)
            }
            #expect(best < .seconds(patience), "reading needs no lock")
            let changed = Task { try await bucket.put("head", [2], if: .matches(tag)) }
            try await Task.sleep(nanoseconds: 300_000_000)
            #expect(try await bucket.get("head", range: nil).bytes == [1])
            close(open(path + "/release", O_CREAT | O_WRONLY, 0o600))
            _ = try await changed.value
            #expect(try await bucket.get("head", range: nil).bytes == [2])
        }
    }

    @Test func puttingIntoFoldersThatAreBeingEmptied() async throws {
        try await withTemporaryDirectory { path in
            let one = try await DirectoryBucket.open(path: path)
            let other = try await DirectoryBucket.open(path: path)
            try await withThrowingTaskGroup(of: Void.self) { group in
                for (number, bucket) in [one, other].enumerated() {
                    group.addTask {
                        for _ in 0..<100 {
                            let key = "x/y/z\(number)"
                            _ = try await bucket.put(key, [UInt8(number)], if: .absent)
                            #expect(try await bucket.get(key, range: nil).bytes == [UInt8(number)])
                            try await bucket.delete([key])
                        }
                    }
                }
                try await group.waitForAll()
            }
            #expect(access(path + "/x", F_OK) != 0)
        }
    }

    @Test func leftoversAreIgnoredAndCleanedWhenOld() async throws {
        try await withTemporaryDirectory { path in
            var bucket = try await DirectoryBucket.open(path: path)
            _ = try await bucket.put("a", [1], if: .none)
            let old = path + "/.tmp/1-old"
            let new = path + "/.tmp/1-new"
            for file in [old, new] { close(creat(file, 0o600)) }
            let longAgo = timespec(tv_sec: 1_600_000_000, tv_nsec: 0)
            #expect(utimensat(AT_FDCWD, old, [longAgo, longAgo], 0) == 0)
            bucket = try await DirectoryBucket.open(path: path)
            #expect(try await allKeys(bucket) == ["a"])
            #expect(access(old, F_OK) != 0 && access(new, F_OK) == 0)
        }
    }

    @Test func putsLeaveNothingBehind() async throws {
        try await withTemporaryDirectory { path in
            let bucket = try await DirectoryBucket.open(path: path)
            _ = try await bucket.put("a", [1], if: .absent)
            _ = await kind { _ = try await bucket.put("a", [1], if: .absent) }
            _ = await kind { _ = try await bucket.put("a", [1], if: .matches(ETag("x"))) }
            _ = await kind { _ = try await bucket.put("a/b", [1], if: .none) }
            let directory = try #require(opendir(path + "/.tmp"))
            var count = 0
            while readdir(directory) != nil { count += 1 }
            closedir(directory)
            #expect(count == 2)  // "." and ".."
        }
    }

    @Test func errorsSayWhatAndWhere() async throws {
        try await withTemporaryDirectory { path in
            let missing = await errorText { _ = try await DirectoryBucket.open(path: path + "/no/such") }
            #expect(missing.contains("\(path)/no/such") && missing.contains("No such file"))
            #expect(await kind { _ = try await DirectoryBucket.open(path: path + "/no", readOnly: true) } == .denied)
            #expect(await kind { _ = try await DirectoryBucket.open(path: "relative") } == .refused)
            close(creat(path + "/file", 0o600))
            #expect(
                await errorText { _ = try await DirectoryBucket.open(path: path + "/file") }.contains("not a directory")
            )

            let bucket = try await DirectoryBucket.open(path: path + "/made")
            _ = try await bucket.put("a/b", [1], if: .none)
            // A directory cannot hold both `a` and `a/b`.
            #expect(await kind { _ = try await bucket.put("a", [1], if: .none) } == .refused)
            #expect(await kind { _ = try await bucket.put("a/b/c", [1], if: .none) } == .refused)
            #expect(await kind { _ = try await bucket.get("a", range: nil) } == .notFound)
        }
    }

    @Test func fullFileSystemIsUnavailableAndLeavesTheOldObject() async throws {
        // A file size limit gives the same path through the code as a full disk, and needs no mount.
        try await withTemporaryDirectory { path in
            let bucket = try await DirectoryBucket.open(path: path)
            _ = try await bucket.put("a", [1, 2], if: .none)
            // /dev/full cannot be a directory: take a tmpfs of 64 KiB where mounting is allowed.
            guard geteuid() == 0, mkdir(path + "/small", 0o700) == 0,
                mount("tmpfs", path + "/small", "tmpfs", 0, "size=64k") == 0
            else { return }
            defer { umount2(path + "/small", 2) }
            let small = try await DirectoryBucket.open(path: path + "/small")
            _ = try await small.put("a", [1, 2], if: .none)
            let text = await errorText { _ = try await small.put("a", randomBytes(200_000), if: .none) }
            #expect(text.contains("No space left"))
            #expect(await kind { _ = try await small.put("b", randomBytes(200_000), if: .absent) } == .unavailable)
            #expect(try await small.get("a", range: nil).bytes == [1, 2])
            #expect(try await allKeys(small) == ["a"])
            _ = try await small.put("c", randomBytes(20_000), if: .absent)
        }
    }

    @Test func largeFoldersAreListedWhole() async throws {
        try await withTemporaryDirectory { path in
            let bucket = try await DirectoryBucket.open(path: path)
            mkdir(path + "/blocks", 0o700)
            let count = 70_000
            var expected: [String] = []
            for number in 0..<count {
                let name = String(UInt64(number) &* 0x9e37_79b9_7f4a_7c15, radix: 36)
                close(creat("\(path)/blocks/\(name)", 0o600))
                expected.append("blocks/\(name)")
            }
            expected.sort()
            try await Task.sleep(nanoseconds: 1_100_000_000)  // Younger folders are read anew for each page.
            let started = ContinuousClock.now
            var keys: [String] = []
            var after: String?
            repeat {
                let page = try await bucket.list(prefix: "blocks/", after: after, folders: false, limit: 1000)
                keys += page.items.map { $0.key }
                after = page.next
                if keys.count == 10_000 {
                    // Names that are made while pages are read are seen, not skipped, when they lie ahead.
                    close(creat("\(path)/blocks/zzzzzzzzzzzzzzzz", 0o600))
                }
            } while after != nil
            #expect(keys == expected + ["blocks/zzzzzzzzzzzzzzzz"])
            print("listed \(count) names in \(ContinuousClock.now - started)")
        }
    }
}
