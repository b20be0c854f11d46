//! [`Password`]: a secret that no log shows.

use std::fmt;
use std::path::{Path, PathBuf};

/// A password, or the file that it is in.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(Source);

#[derive(Clone, PartialEq, Eq)]
enum Source {
    Text(String),
    File(PathBuf),
}

impl Password {
    /// A password. It is shown nowhere.
    pub fn text(password: impl Into<String>) -> Self {
        Self(Source::Text(password.into()))
    }

    /// The password that is in a file, without the line's end. The file is read for each new
    /// connection, so that a password that is changed needs no restart.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self(Source::File(path.into()))
    }

    pub(crate) fn path(&self) -> Option<&Path> {
        match &self.0 {
            Source::Text(_) => None,
            Source::File(path) => Some(path),
        }
    }

    /// The password itself, or why it cannot be read.
    pub(crate) async fn read(&self) -> Result<String, String> {
        match &self.0 {
            Source::Text(text) => Ok(text.clone()),
            Source::File(path) => {
                let bytes = crate::tls::read("the password file", path).await?;
                let text = String::from_utf8(bytes)
                    .map_err(|_| format!("the password file {} is no text", path.display()))?;
                Ok(text.trim_end_matches(['\r', '\n']).to_owned())
            }
        }
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Source::Text(_) => f.write_str("Password(…)"),
            Source::File(path) => write!(f, "Password(in {})", path.display()),
        }
    }
}
