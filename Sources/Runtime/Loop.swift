public final class Loop: Sendable {}
