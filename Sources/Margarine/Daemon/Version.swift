/// The version of the program. Stored formats carry numbers of their own.
public enum Version {
    public static let text = "0.1.0"
}
