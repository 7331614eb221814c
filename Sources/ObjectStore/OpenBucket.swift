// The composition of a store's stack: the transport, what counts its calls, what repeats them. Read this to see the
// order of the layers.

public import Runtime

/// Opens the store at `url`: the transport below a `CountingBucket` below a `RetryingBucket`.
///
///     let counters = StoreCounters()
///     let bucket = try await openBucket(url: "file:///srv/store", environment: environment, counters: counters)
///
/// - Parameters:
///   - check: tries out that the store holds conditions (and makes a missing directory). Commands that only read
///     pass false, and then need no right to write.
///   - settings: bounds of the connection to an S3 store.
///   - counters: where requests, bytes and errors are counted, for those who report them.
/// - Throws: `.refused` for a bad address, missing credentials, or a store that cannot do what Margarine needs;
///   `.unavailable` when it cannot be reached.
public func openBucket(
    url: String, environment: any Environment, check: Bool = true, retries: RetryPolicy = RetryPolicy(),
    transport settings: TransportSettings = TransportSettings(), counters: StoreCounters = StoreCounters()
) async throws(StoreError) -> any Bucket {
    RetryingBucket(
        try await openTransport(
            url: url, environment: environment, check: check, transport: settings, counters: counters),
        environment: environment, policy: retries, counters: counters)
}

/// The same without what repeats calls: for those who put something between.
public func openTransport(
    url: String, environment: any Environment, check: Bool = true,
    transport settings: TransportSettings = TransportSettings(), counters: StoreCounters = StoreCounters()
) async throws(StoreError) -> any Bucket {
    let transport: any Bucket
    switch try StoreURL(url) {
    case .file(let path): transport = try await DirectoryBucket.open(path: path, readOnly: !check)
    case .s3(let address):
        transport = try await S3Bucket.open(address, environment: environment, check: check, settings: settings)
    }
    return CountingBucket(transport, counters: counters, environment: environment)
}
