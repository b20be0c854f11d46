//! What an error of the client library means.

use std::error::Error as _;

use etcd_client::Error;
use flannel_core::Revision;
use flannel_subnet_kv::{LeaseId, StoreError};

/// What is to be done about a failed call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The store has answered, and this is its answer.
    Answer(StoreError),
    /// The call was certainly not done: it can be made again, elsewhere.
    NotDone(String),
    /// Nobody knows whether the call was done.
    Unknown(String),
    /// The connection is no longer known to the store: it has to be made anew.
    Stranger(String),
    /// The connection is bound to an address that the host has no more: nobody knows whether the call
    /// was done.
    Dead,
}

// gRPC's status codes.
const INVALID_ARGUMENT: i32 = 3;
const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;
const RESOURCE_EXHAUSTED: i32 = 8;
const FAILED_PRECONDITION: i32 = 9;
const OUT_OF_RANGE: i32 = 11;
const UNIMPLEMENTED: i32 = 12;
const UNAVAILABLE: i32 = 14;
const UNAUTHENTICATED: i32 = 16;

/// Sorts an error of a call in which `lease` was named.
pub(crate) fn fault(error: &Error, lease: LeaseId) -> Fault {
    match error {
        Error::GRpcStatus(status) => {
            let text = with_causes(status.message().to_owned(), status.source());
            of_status(status.code() as i32, &text, lease)
        }
        Error::InvalidArgs(text) | Error::EndpointError(text) => {
            Fault::Answer(StoreError::Refused {
                reason: text.clone(),
            })
        }
        Error::InvalidUri(error) => Fault::Answer(StoreError::Refused {
            reason: error.to_string(),
        }),
        Error::TransportError(error) => {
            Fault::NotDone(explained(&with_causes(error.to_string(), error.source())))
        }
        Error::LeaseKeepAliveError(_) => Fault::Answer(StoreError::LeaseNotFound { lease }),
        error => Fault::Unknown(error.to_string()),
    }
}

/// A text with the causes behind it, those that say something new.
fn with_causes(mut text: String, mut source: Option<&(dyn std::error::Error + 'static)>) -> String {
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

/// Sorts a status by its code, and where etcd uses one code for much, by its text.
fn of_status(code: i32, text: &str, lease: LeaseId) -> Fault {
    let has = |part: &str| text.contains(part);
    let refused = || {
        Fault::Answer(StoreError::Refused {
            reason: text.to_owned(),
        })
    };
    let denied = || {
        Fault::Answer(StoreError::Denied {
            reason: text.to_owned(),
        })
    };
    match code {
        _ if has("invalid auth token") || has("revision in header is old") => {
            Fault::Stranger(text.to_owned())
        }
        PERMISSION_DENIED | UNAUTHENTICATED => denied(),
        INVALID_ARGUMENT | FAILED_PRECONDITION
            if has("authentication") || has("user name") || has("auth") =>
        {
            denied()
        }
        NOT_FOUND if has("lease") => Fault::Answer(StoreError::LeaseNotFound { lease }),
        OUT_OF_RANGE if has("compacted") => Fault::Answer(StoreError::Compacted {
            revision: Revision(0),
        }),
        // All of a cluster's members say the same.
        RESOURCE_EXHAUSTED if has("space") => Fault::Answer(StoreError::unavailable(format!(
            "{text}: etcd takes no more writes until it is compacted, defragmented and its alarm \
             disarmed"
        ))),
        RESOURCE_EXHAUSTED => Fault::NotDone(text.to_owned()),
        INVALID_ARGUMENT | FAILED_PRECONDITION | OUT_OF_RANGE | UNIMPLEMENTED | NOT_FOUND => {
            refused()
        }
        UNAVAILABLE
            if has("no leader")
                || has("connect error")
                || has("dns error")
                || has("certificate") =>
        {
            Fault::NotDone(explained(text))
        }
        _ => Fault::Unknown(text.to_owned()),
    }
}

/// The library's words, with the fix where they hide it.
fn explained(text: &str) -> String {
    if text.contains("UnknownIssuer") {
        return format!("{text}: the server's certificate is not signed by the CA that was given");
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: LeaseId = LeaseId(7);

    #[test]
    fn the_texts_of_etcd_are_told_apart() {
        let of = |code, text| of_status(code, text, LEASE);
        let lost = StoreError::LeaseNotFound { lease: LEASE };
        assert_eq!(
            of(NOT_FOUND, "etcdserver: requested lease not found"),
            Fault::Answer(lost)
        );
        assert!(matches!(
            of(UNAUTHENTICATED, "etcdserver: invalid auth token"),
            Fault::Stranger(_)
        ));
        for (code, text) in [
            (PERMISSION_DENIED, "etcdserver: permission denied"),
            (INVALID_ARGUMENT, "etcdserver: user name is empty"),
            (
                INVALID_ARGUMENT,
                "etcdserver: authentication failed, invalid user ID or password",
            ),
        ] {
            let Fault::Answer(StoreError::Denied { reason }) = of(code, text) else {
                panic!("{text}");
            };
            assert_eq!(reason, text);
        }
        assert!(matches!(
            of(RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded"),
            Fault::Answer(StoreError::Unavailable { reason }) if reason.contains("defragmented")
        ));
        assert!(matches!(
            of(
                UNAVAILABLE,
                "error trying to connect: tcp connect error: refused"
            ),
            Fault::NotDone(_)
        ));
        assert!(matches!(
            of(UNAVAILABLE, "etcdserver: request timed out"),
            Fault::Unknown(_)
        ));
        assert!(matches!(of(1, "Timeout expired"), Fault::Unknown(_)));
        assert!(matches!(
            of(
                INVALID_ARGUMENT,
                "etcdserver: too many operations in txn request"
            ),
            Fault::Answer(StoreError::Refused { .. })
        ));
    }

    #[test]
    fn a_wrong_ca_is_explained() {
        let text = "transport error: invalid peer certificate: UnknownIssuer";
        let Fault::NotDone(text) = of_status(UNAVAILABLE, text, LEASE) else {
            panic!("it was not done");
        };
        assert!(text.contains("not signed by the CA"), "{text}");
    }
}
