//! [`EtcdOptions`]: how etcd is reached and used.

use std::path::PathBuf;
use std::time::Duration;

use flannel_subnet_kv::{KvOptions, Layout};

use crate::secret::Password;
use crate::tls::TlsFiles;

/// Why settings cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// There is no endpoint.
    #[error("endpoints: at least one is needed, such as http://127.0.0.1:2379")]
    NoEndpoint,
    /// An endpoint is not an address.
    #[error("endpoints: {endpoint:?}: {reason}")]
    Endpoint {
        /// The endpoint, without a password that stood in it.
        endpoint: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Certificates were given for endpoints that do not use them.
    #[error(
        "tls: files are given, but {endpoint} is not an https:// endpoint: \
         they would not be used, and everything would be readable on the way"
    )]
    TlsUnused {
        /// The first such endpoint.
        endpoint: String,
    },
    /// An `https://` endpoint without the means for it.
    #[error("tls: {endpoint} needs {what}")]
    TlsMissing {
        /// The first such endpoint.
        endpoint: String,
        /// What is missing.
        what: &'static str,
    },
    /// A duration is out of its range.
    #[error("{field}: {value:?} is not within {range}")]
    OutOfRange {
        /// The setting.
        field: &'static str,
        /// Its value.
        value: Duration,
        /// What is allowed.
        range: &'static str,
    },
    /// A user without a name.
    #[error("user: the name is empty")]
    NoUser,
}

/// How etcd is reached and used. All of it is checked by [`build`](crate::EtcdManager::new).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdOptions {
    pub(crate) endpoints: Vec<String>,
    pub(crate) user: Option<(String, Password)>,
    pub(crate) tls: Option<TlsFiles>,
    pub(crate) connect_timeout: Duration,
    pub(crate) call_timeout: Duration,
    pub(crate) keep_alive: Duration,
    pub(crate) kv: KvOptions,
}

impl EtcdOptions {
    /// The default settings for these endpoints: `http://HOST:PORT`, `https://HOST:PORT`, or
    /// `HOST:PORT`, which is `https` if TLS files are given and else `http`.
    ///
    /// # Errors
    /// [`OptionsError::NoEndpoint`] or [`OptionsError::Endpoint`].
    pub fn new<E: AsRef<str>>(
        endpoints: impl IntoIterator<Item = E>,
    ) -> Result<Self, OptionsError> {
        let endpoints: Vec<String> = endpoints
            .into_iter()
            .map(|endpoint| endpoint.as_ref().trim().trim_end_matches('/').to_owned())
            .collect();
        if endpoints.is_empty() {
            return Err(OptionsError::NoEndpoint);
        }
        for endpoint in &endpoints {
            check_endpoint(endpoint)?;
        }
        Ok(Self {
            endpoints,
            user: None,
            tls: None,
            connect_timeout: Duration::from_secs(2),
            call_timeout: Duration::from_secs(2),
            keep_alive: Duration::from_secs(5),
            kv: KvOptions::default(),
        })
    }

    /// What all keys begin with; default `/coreos.com/network`, as flannel's.
    #[must_use]
    pub fn prefix(mut self, prefix: &str) -> Self {
        self.kv.layout = Layout::new(prefix);
        self
    }

    /// The user that etcd knows us by, and the password.
    #[must_use]
    pub fn user(mut self, name: impl Into<String>, password: Password) -> Self {
        self.user = Some((name.into(), password));
        self
    }

    /// Certificates and keys for `https://` endpoints.
    #[must_use]
    pub fn tls(mut self, files: TlsFiles) -> Self {
        self.tls = Some(files);
        self
    }

    /// How long a lease lasts unless it is renewed, from 5 s to 10 years; default 24 h, as
    /// flannel's.
    #[must_use]
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.kv.ttl = ttl;
        self
    }

    /// The time that a machine of the same node id is given to answer that it lives, from 1 s to
    /// 10 min; default 15 s. Keep it well below the overlay's
    /// [`store_timeout`](flannel_core::OverlayBuilder::store_timeout), or a claim needs several calls.
    #[must_use]
    pub const fn holder_patience(mut self, patience: Duration) -> Self {
        self.kv.holder_patience = patience;
        self
    }

    /// How long one endpoint may take to accept a connection, from 100 ms to 60 s; default 2 s.
    #[must_use]
    pub const fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// How long one endpoint may take to answer before another one is asked, from 100 ms to 60 s;
    /// default 2 s.
    #[must_use]
    pub const fn call_timeout(mut self, timeout: Duration) -> Self {
        self.call_timeout = timeout;
        self
    }

    /// How often a silent connection and a silent watch are tried, from 100 ms to 60 s; default: a
    /// connection every 5 s, a watch every 2 s. A frozen server is noticed after that and
    /// [`call_timeout`](Self::call_timeout).
    #[must_use]
    pub const fn progress_every(mut self, interval: Duration) -> Self {
        self.keep_alive = interval;
        self.kv.progress_interval = interval;
        self
    }

    /// Whether to write dual-stack records beside single-stack records of Go flannel, and the other
    /// way round: Go nodes **crash** on them. Default: no; a node is refused its lease instead.
    #[must_use]
    pub const fn mixed_families(mut self, yes: bool) -> Self {
        self.kv.mixed_families = yes;
        self
    }

    /// Whether an endpoint is spoken to by TLS.
    pub(crate) fn is_tls(&self, endpoint: &str) -> bool {
        match endpoint.split_once("://") {
            Some((scheme, _)) => scheme == "https",
            None => self.tls.is_some(),
        }
    }

    /// The files whose change asks for a new connection.
    pub(crate) fn watched_files(&self) -> Vec<PathBuf> {
        let tls = self.tls.iter().flat_map(TlsFiles::paths).cloned();
        let password = self.user.iter().filter_map(|(_, password)| password.path());
        tls.chain(password.map(ToOwned::to_owned)).collect()
    }

    pub(crate) fn check(&self) -> Result<(), OptionsError> {
        for endpoint in &self.endpoints {
            let endpoint = endpoint.clone();
            if !self.is_tls(&endpoint) {
                if self.tls.is_some() {
                    return Err(OptionsError::TlsUnused { endpoint });
                }
            } else if !cfg!(feature = "tls") {
                let what = "the feature `tls` of flannel-subnet-etcd";
                return Err(OptionsError::TlsMissing { endpoint, what });
            } else if self.tls.as_ref().is_none_or(|tls| tls.ca.is_none()) {
                let what = "a CA file: without one no server can be trusted";
                return Err(OptionsError::TlsMissing { endpoint, what });
            }
        }
        if self.user.as_ref().is_some_and(|(name, _)| name.is_empty()) {
            return Err(OptionsError::NoUser);
        }
        let brief = (Duration::from_millis(100), Duration::from_secs(60));
        let years = Duration::from_secs(10 * 365 * 24 * 3600);
        for (field, value, (least, most), range) in [
            (
                "connect_timeout",
                self.connect_timeout,
                brief,
                "100 ms to 60 s",
            ),
            ("call_timeout", self.call_timeout, brief, "100 ms to 60 s"),
            ("progress_every", self.keep_alive, brief, "100 ms to 60 s"),
            (
                "ttl",
                self.kv.ttl,
                (Duration::from_secs(5), years),
                "5 s to 10 years",
            ),
            (
                "holder_patience",
                self.kv.holder_patience,
                (Duration::from_secs(1), Duration::from_secs(600)),
                "1 s to 10 min",
            ),
        ] {
            if value < least || value > most {
                return Err(OptionsError::OutOfRange {
                    field,
                    value,
                    range,
                });
            }
        }
        Ok(())
    }
}

fn check_endpoint(endpoint: &str) -> Result<(), OptionsError> {
    let refuse = |endpoint: &str, reason| {
        Err(OptionsError::Endpoint {
            endpoint: endpoint.to_owned(),
            reason,
        })
    };
    let (scheme, rest) = endpoint.split_once("://").unwrap_or(("http", endpoint));
    if rest.contains('@') {
        // Whatever stands before it may be a password.
        return refuse(
            "…",
            "a user and password do not belong in it; set them as user",
        );
    }
    if !matches!(scheme, "http" | "https") {
        return refuse(endpoint, "the scheme must be http or https");
    }
    if rest.contains(['/', '?', '#', ' ']) {
        return refuse(endpoint, "it must be a host and a port, without a path");
    }
    let host = match rest.rsplit_once(':') {
        Some((host, port)) if port.parse::<u16>().is_ok_and(|port| port > 0) => host,
        _ => return refuse(endpoint, "it must end with a port, such as :2379"),
    };
    let is_v6 = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let is_host = match is_v6 {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && !host.contains([':', '[', ']']),
    };
    if is_host {
        Ok(())
    } else {
        refuse(
            endpoint,
            "the host is missing, or an IPv6 address without [ ]",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(endpoints: &[&str]) -> Result<EtcdOptions, OptionsError> {
        EtcdOptions::new(endpoints).and_then(|options| options.check().map(|()| options))
    }

    #[test]
    fn good_endpoints_are_taken() {
        for good in [
            "http://127.0.0.1:2379",
            "127.0.0.1:2379",
            "http://[::1]:2379/",
            "etcd-1:2379",
        ] {
            assert!(options(&[good]).is_ok(), "{good}");
        }
    }

    #[test]
    fn bad_endpoints_are_refused_with_the_reason() {
        assert_eq!(options(&[]), Err(OptionsError::NoEndpoint));
        for (bad, part) in [
            ("http://127.0.0.1", "port"),
            ("http://:2379", "host"),
            ("http://::1:2379", "[ ]"),
            ("ftp://a:2379", "scheme"),
            ("http://a:2379/v2", "path"),
            ("http://a:0", "port"),
        ] {
            let error = options(&[bad]).expect_err(bad).to_string();
            assert!(error.contains(part) && error.contains(bad), "{error}");
        }
    }

    #[test]
    fn no_password_is_shown() {
        let error = options(&["http://root:hunter2@a:2379"]).expect_err("refused");
        assert!(!error.to_string().contains("hunter2"), "{error}");
        let options = options(&["a:1"])
            .expect("good")
            .user("root", Password::text("hunter2"));
        assert!(!format!("{options:?}").contains("hunter2"));
    }

    #[test]
    fn certificates_that_would_not_be_used_are_refused() {
        let tls = || TlsFiles {
            ca: Some("ca.pem".into()),
            ..TlsFiles::default()
        };
        let plain = options(&["http://a:2379"]).expect("good").tls(tls());
        assert!(matches!(plain.check(), Err(OptionsError::TlsUnused { .. })));
        let bare = EtcdOptions::new(["a:2379"]).expect("good").tls(tls());
        assert!(bare.is_tls("a:2379"));
        let without = EtcdOptions::new(["https://a:2379"]).expect("good");
        assert!(matches!(
            without.check(),
            Err(OptionsError::TlsMissing { .. })
        ));
    }

    #[test]
    fn times_have_their_ranges() {
        let ttl = options(&["a:1"]).expect("good").ttl(Duration::from_secs(1));
        let error = ttl.check().expect_err("too short").to_string();
        assert!(error.contains("ttl") && error.contains("5 s"), "{error}");
    }
}
