//! An error with its causes in one line.

/// The text of an error and of everything that caused it, in one line: `what: why: why`.
///
/// The errors of the SDK do not repeat their source in their own text.
pub fn error_chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
