//! [`KubeOptions`]: how the API server is reached and used.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::access::Access;
use crate::prefix::AnnotationPrefix;

/// Why settings cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// The API server's address is none.
    #[error("server: {url:?}: {reason}")]
    Server {
        /// The address.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The prefix of the annotations is none.
    #[error("annotation_prefix: {prefix:?}: {rule}")]
    Prefix {
        /// The prefix, cut to 64 characters.
        prefix: String,
        /// The rule.
        rule: &'static str,
    },
    /// The name of a ConfigMap, of its namespace or of its key is none.
    #[error("config: {field} {value:?}: {rule}")]
    Config {
        /// Which name.
        field: &'static str,
        /// The name, cut to 64 characters.
        value: String,
        /// The rule.
        rule: &'static str,
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
}

/// Where the network config is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigSource {
    /// In a file, such as the one that flannel's DaemonSet mounts at
    /// `/etc/kube-flannel/net-conf.json`. Looked at every two seconds.
    File(PathBuf),
    /// In a ConfigMap, which is read every minute. It takes the right to `get` it.
    ConfigMap {
        /// The namespace, such as `kube-flannel`.
        namespace: String,
        /// The ConfigMap, such as `kube-flannel-cfg`.
        name: String,
        /// The key, such as `net-conf.json`.
        key: String,
    },
    /// This text, for good.
    Text(String),
}

impl ConfigSource {
    /// A file.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self::File(path.into())
    }

    /// A key of a ConfigMap.
    pub fn config_map(namespace: &str, name: &str, key: &str) -> Self {
        Self::ConfigMap {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            key: key.to_owned(),
        }
    }

    /// How often it is looked at; `None` if it never changes.
    pub(crate) const fn interval(&self) -> Option<Duration> {
        match self {
            Self::File(_) => Some(Duration::from_secs(2)),
            Self::ConfigMap { .. } => Some(Duration::from_secs(60)),
            Self::Text(_) => None,
        }
    }

    fn check(&self) -> Result<(), OptionsError> {
        let Self::ConfigMap {
            namespace,
            name,
            key,
        } = self
        else {
            return Ok(());
        };
        // They become part of a path.
        for (field, value) in [("namespace", namespace), ("name", name), ("key", key)] {
            let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
            if value.is_empty() || value.len() > 253 || !value.bytes().all(allowed) {
                return Err(OptionsError::Config {
                    field,
                    value: value.chars().take(64).collect(),
                    rule: "must have 1 to 253 characters out of letters, digits and -._",
                });
            }
        }
        Ok(())
    }
}

impl fmt::Display for ConfigSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::ConfigMap {
                namespace,
                name,
                key,
            } => write!(f, "{key} of the ConfigMap {namespace}/{name}"),
            Self::Text(_) => f.write_str("the text that was given"),
        }
    }
}

/// How the API server is reached and used. All of it is checked by
/// [`KubeManager::new`](crate::KubeManager::new).
#[derive(Debug, Clone)]
pub struct KubeOptions {
    pub(crate) access: Access,
    pub(crate) config: ConfigSource,
    pub(crate) prefix: AnnotationPrefix,
    pub(crate) network_condition: bool,
    pub(crate) connect_timeout: Duration,
    pub(crate) call_timeout: Duration,
    pub(crate) probe_every: Duration,
    pub(crate) silence: Duration,
    pub(crate) config_every: Option<Duration>,
}

impl KubeOptions {
    /// The default settings for a way to the API server and a place of the network config.
    pub const fn new(access: Access, config: ConfigSource, prefix: AnnotationPrefix) -> Self {
        Self {
            access,
            config,
            prefix,
            network_condition: true,
            connect_timeout: Duration::from_secs(5),
            call_timeout: Duration::from_secs(5),
            probe_every: Duration::from_secs(10),
            silence: Duration::from_secs(240),
            config_every: None,
        }
    }

    /// Whether to set the Node's condition `NetworkUnavailable` to `False` with the lease, to keep
    /// it so, and to set it to `True` when the lease is given up. Default: yes, as flannel's
    /// `--set-node-network-unavailable`.
    #[must_use]
    pub const fn network_condition(mut self, yes: bool) -> Self {
        self.network_condition = yes;
        self
    }

    /// How long the API server may take to accept a connection, from 100 ms to 60 s; default 5 s.
    #[must_use]
    pub const fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// How long the API server may take to answer, from 100 ms to 60 s; default 5 s. A list, which
    /// may be long, may take this long for each piece.
    #[must_use]
    pub const fn call_timeout(mut self, timeout: Duration) -> Self {
        self.call_timeout = timeout;
        self
    }

    /// After how long a silence of the watch the API server is asked for its version, only to see
    /// whether it answers, from 100 ms to 10 min; default 10 s. A frozen server is noticed after
    /// that and [`call_timeout`](Self::call_timeout).
    #[must_use]
    pub const fn probe_every(mut self, interval: Duration) -> Self {
        self.probe_every = interval;
        self
    }

    /// After how long a silence of the watch itself everything is read anew, from 1 s to 1 h;
    /// default 4 min. A server bookmarks its watches every minute or so.
    #[must_use]
    pub const fn silence(mut self, limit: Duration) -> Self {
        self.silence = limit;
        self
    }

    /// How often the network config is looked at, from 100 ms to 1 h; default: a file every 2 s, a
    /// ConfigMap every 60 s.
    #[must_use]
    pub const fn config_every(mut self, interval: Duration) -> Self {
        self.config_every = Some(interval);
        self
    }

    /// How often the config is to be looked at; `None` for never.
    pub(crate) fn config_interval(&self) -> Option<Duration> {
        let usual = self.config.interval()?;
        Some(self.config_every.unwrap_or(usual))
    }

    pub(crate) fn check(&self) -> Result<(), OptionsError> {
        self.access.check()?;
        self.config.check()?;
        let millis = Duration::from_millis;
        let brief = (millis(100), millis(60_000), "100 ms to 60 s");
        for (field, value, (least, most, range)) in [
            ("connect_timeout", self.connect_timeout, brief),
            ("call_timeout", self.call_timeout, brief),
            (
                "probe_every",
                self.probe_every,
                (millis(100), millis(600_000), "100 ms to 10 min"),
            ),
            (
                "silence",
                self.silence,
                (millis(1000), millis(3_600_000), "1 s to 1 h"),
            ),
            (
                "config_every",
                self.config_every.unwrap_or(millis(1000)),
                (millis(100), millis(3_600_000), "100 ms to 1 h"),
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
