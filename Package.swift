// swift-tools-version: 6.2
import Foundation
import PackageDescription

/// Scripts/fuzz.sh builds the fuzzer instead of the tests, with everything of this package instrumented for it.
let isFuzzing = ProcessInfo.processInfo.environment["MARGARINE_FUZZ"] != nil
let fuzzed: [String] = isFuzzing ? ["-sanitize=fuzzer"] : []

/// What every Swift target is compiled with: Swift 6 mode, explicit existentials, narrow imports,
/// and no warning left standing.
let plain: [SwiftSetting] = [
    .swiftLanguageMode(.v6),
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("InternalImportsByDefault"),
    .enableUpcomingFeature("MemberImportVisibility"),
    .treatAllWarnings(as: .error),
]
/// Release builds don't look for overlapping accesses at run time (Docs/Decisions/0016-exclusivity.md). The sanitizers' builds and
/// the fuzzer's do: Scripts/sanitize.sh and Scripts/fuzz.sh say so behind this, and the last word counts.
let unchecked: SwiftSetting = .unsafeFlags(["-enforce-exclusivity=unchecked"], .when(configuration: .release))
/// ... and what is fuzzed. The fuzzer itself is not, or it would look for new ways through itself.
let strict = plain + [unchecked] + (isFuzzing ? [.unsafeFlags(fuzzed)] : [])

func system(_ name: String, pkgConfig: String, apt: String) -> Target {
    .systemLibrary(name: name, pkgConfig: pkgConfig, providers: [.apt([apt])])
}

/// What the fuzz targets feed, and the tests that replay their corpus.
let decoders: [Target.Dependency] = [
    "Margarine", "Configuration", "BlockCache", "ObjectStore", "NBDProtocol", "Runtime", "CLinux", "CLibraries",
    .product(name: "Logging", package: "swift-log"),
]

let tests: [Target] = [
    .testTarget(name: "RuntimeTests", dependencies: ["Runtime"], swiftSettings: strict),
    .testTarget(name: "NBDProtocolTests", dependencies: ["NBDProtocol"], swiftSettings: strict),
    .testTarget(name: "ObjectStoreTests", dependencies: ["ObjectStore", "Runtime"], swiftSettings: strict),
    .testTarget(
        name: "BlockCacheTests", dependencies: ["BlockCache", "ObjectStore", "Runtime"], swiftSettings: strict),
    .testTarget(
        name: "MargarineTests", dependencies: ["Margarine", "BlockCache", "ObjectStore", "NBDProtocol", "Runtime"],
        swiftSettings: strict),
    .testTarget(
        name: "FuzzTests", dependencies: decoders, path: "Tests/fuzz",
        exclude: ["corpus", "dictionaries", "main", "runtime"],
        sources: ["targets", "tests"], swiftSettings: strict),
]

let fuzzer: [Target] = [
    .target(name: "CFuzzer", path: "Tests/fuzz/runtime"),
    .executableTarget(
        name: "margarine-fuzz", dependencies: decoders + ["CFuzzer"], path: "Tests/fuzz",
        exclude: ["corpus", "dictionaries", "tests", "runtime"], sources: ["targets", "main"], swiftSettings: plain,
        linkerSettings: [.unsafeFlags(fuzzed + ["-use-ld=lld"])]),
]

let package = Package(
    name: "margarine",
    products: [
        .executable(name: "margined", targets: ["margined"]),
        .library(name: "Margarine", targets: ["Margarine"]),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.2"),
        .package(url: "https://github.com/LebJe/TOMLKit", from: "0.6.0"),
    ],
    targets: [
        // C: Debian's libraries as they are, and one target for what Swift cannot import.
        system("CURing", pkgConfig: "liburing", apt: "liburing-dev"),
        system("CCurl", pkgConfig: "libcurl", apt: "libcurl4-openssl-dev"),
        system("CCrypto", pkgConfig: "libcrypto", apt: "libssl-dev"),
        system("CZstd", pkgConfig: "libzstd", apt: "libzstd-dev"),
        system("CXXHash", pkgConfig: "libxxhash", apt: "libxxhash-dev"),
        system("CB2", pkgConfig: "libb2", apt: "libb2-dev"),
        .target(name: "CLinux", dependencies: ["CURing"]),
        .target(name: "CLibraries", dependencies: ["CCurl", "CXXHash"]),

        // The rooms, each knowing only those above it.
        .target(name: "Runtime", dependencies: ["CLinux"], swiftSettings: strict),
        .target(name: "NBDProtocol", swiftSettings: strict),
        .target(
            name: "ObjectStore", dependencies: ["Runtime", "CLinux", "CLibraries", "CCurl", "CCrypto"],
            swiftSettings: strict),
        .target(
            name: "BlockCache", dependencies: ["Runtime", "ObjectStore", "CLibraries", "CZstd", "CXXHash", "CLinux"],
            swiftSettings: strict),
        .target(
            name: "Margarine",
            dependencies: [
                "Runtime", "NBDProtocol", "ObjectStore", "BlockCache", "CLinux", "CLibraries", "CXXHash", "CCrypto",
                "CB2",
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: strict),
        .target(
            name: "Configuration",
            dependencies: ["Margarine", .product(name: "TOMLKit", package: "TOMLKit")],
            swiftSettings: strict),
        .executableTarget(
            name: "margined",
            dependencies: [
                "Margarine", "Configuration", "Runtime", "ObjectStore", "BlockCache",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: strict),

        // Serves memory over NBD: the server under the protocol's tests and for its figures. No part of the product.
        .executableTarget(
            name: "nbdbench-server",
            dependencies: ["Margarine", "Runtime", .product(name: "Logging", package: "swift-log")],
            path: "Tests/nbd/server", swiftSettings: strict),

        // The whole engine on simulated seams, against a model of what a disk may hold. No part of the product.
        .executableTarget(
            name: "simulate",
            dependencies: [
                "Margarine", "BlockCache", "ObjectStore", "Runtime", "CLinux",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Logging", package: "swift-log"),
            ],
            path: "Tests/Simulation", exclude: ["corpus.txt", "elsewhere.sh"], swiftSettings: strict),
    ] + (isFuzzing ? fuzzer : tests)
)
