//! [`Failure`]: why a call to the API server came to nothing, and what that means for a manager.

use std::time::Duration;

use flannel_core::error_chain;
use flannel_core::manager::Error;
use serde::Deserialize;

/// Why a call came to nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The API server refused.
    Refused(Refusal),
    /// There was no whole answer.
    NoAnswer(String),
    /// The answer is not what was asked for.
    Strange(String),
    /// Our own files cannot be used.
    Setup(String),
}

/// A refusal of the API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) code: u16,
    pub(crate) reason: String,
    pub(crate) message: String,
    /// How long to wait before the next try, where it says so.
    pub(crate) retry_after: Option<Duration>,
    /// Whether it was asked for a version that it has not come to.
    pub(crate) too_new: bool,
}

/// The `Status` object of Kubernetes.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Status {
    code: u16,
    message: String,
    reason: String,
    details: Option<Details>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Details {
    retry_after_seconds: u64,
    causes: Option<Vec<Cause>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Cause {
    reason: String,
}

/// The most of a server's message that is repeated, in characters.
const MESSAGE: usize = 300;

impl Refusal {
    /// Reads the body of a refusal with this HTTP status.
    pub(crate) fn read(http: u16, body: &[u8]) -> Self {
        let status: Status = serde_json::from_slice(body).unwrap_or_default();
        let details = status.details.unwrap_or_default();
        let causes = details.causes.unwrap_or_default();
        let message = if status.message.is_empty() {
            String::from_utf8_lossy(body).trim().to_owned()
        } else {
            status.message
        };
        let wait = details.retry_after_seconds;
        Self {
            code: if status.code == 0 { http } else { status.code },
            too_new: causes
                .iter()
                .any(|cause| cause.reason == "ResourceVersionTooLarge")
                || message.contains("Too large resource version"),
            message: message.chars().take(MESSAGE).collect(),
            reason: status.reason,
            retry_after: (wait > 0).then(|| Duration::from_secs(wait)),
        }
    }
}

impl Failure {
    pub(crate) fn setup(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::Setup(error_chain(error))
    }

    pub(crate) fn silent(limit: Duration) -> Self {
        Self::NoAnswer(format!("nothing came within {limit:?}"))
    }

    pub(crate) fn dead() -> Self {
        Self::NoAnswer("the connection was bound to an address that is gone".to_owned())
    }

    /// The HTTP status of a refusal; 0 for everything else.
    pub(crate) const fn code(&self) -> u16 {
        match self {
            Self::Refused(refusal) => refusal.code,
            _ => 0,
        }
    }

    /// How long the server asks us to wait.
    pub(crate) const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(refusal) => refusal.retry_after,
            _ => None,
        }
    }

    /// Whether a version was asked for that the server has not come to.
    pub(crate) const fn is_too_new(&self) -> bool {
        matches!(self, Self::Refused(Refusal { too_new: true, .. }))
    }

    /// What it means, for one that asked for this `verb` on this `resource`.
    pub(crate) fn meaning(self, verb: &str, resource: &str) -> Error {
        match self {
            Self::Setup(reason) => Error::unavailable(reason),
            Self::NoAnswer(reason) => {
                Error::unavailable(format!("{verb} {resource}: the API server: {reason}"))
            }
            Self::Strange(reason) => {
                Error::unavailable(format!("{verb} {resource}: a strange answer: {reason}"))
            }
            Self::Refused(refusal) => refusal.meaning(verb, resource),
        }
    }
}

impl Refusal {
    fn meaning(self, verb: &str, resource: &str) -> Error {
        let Self { code, message, .. } = self;
        let reason = match code {
            401 => {
                return Error::Denied {
                    reason: format!(
                        "the API server does not know us: the token or certificate is missing, \
                         expired or void ({message})"
                    ),
                };
            }
            403 => {
                let group = "apiGroups: [\"\"]";
                return Error::Denied {
                    reason: format!(
                        "a rule is missing in our role: {group}, resources: [\"{resource}\"], \
                         verbs: [\"{verb}\"] ({message})"
                    ),
                };
            }
            409 => {
                return Error::Conflict {
                    reason: format!("{verb} {resource}: {message}"),
                };
            }
            400 | 404 | 405 | 406 | 413 | 415 | 422 => {
                return Error::Invalid {
                    reason: format!("{verb} {resource}: {message}"),
                };
            }
            429 => "the API server asks for patience",
            500..=599 => "the API server is in trouble",
            _ => "the API server refused",
        };
        Error::unavailable(format!("{verb} {resource}: {reason} ({code}: {message})"))
    }
}
