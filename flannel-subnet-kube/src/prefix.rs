//! [`AnnotationPrefix`]: how flannel's annotations are called.

use std::fmt;
use std::sync::Arc;

use flannel_core::Family;

use crate::options::OptionsError;

/// What the names of flannel's annotations begin with.
///
/// `flannel.alpha.coreos.com` unless set otherwise, as flannel's `--kube-annotation-prefix`: a
/// dotted name of lower-case letters, digits, `_` and `-`, then optionally `/` and the beginning of
/// the annotations' own names. `example.org` makes `example.org/backend-type`, `example.org/net`
/// makes `example.org/net-backend-type`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AnnotationPrefix(Arc<str>);

impl AnnotationPrefix {
    /// A prefix.
    ///
    /// # Errors
    /// [`OptionsError::Prefix`] if it is none.
    pub fn new(prefix: &str) -> Result<Self, OptionsError> {
        let refuse = |rule| {
            Err(OptionsError::Prefix {
                prefix: prefix.chars().take(64).collect(),
                rule,
            })
        };
        let (domain, name) = prefix.split_once('/').unwrap_or((prefix, ""));
        let is_word = |word: &str| {
            let allowed =
                |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-');
            !word.is_empty() && word.bytes().all(allowed)
        };
        if name.contains('/') {
            return refuse("it must have one / at most");
        }
        if !domain.contains('.') || !domain.split('.').all(is_word) {
            return refuse(
                "it must begin with a dotted name of lower-case letters, digits, _ and -, such as \
                 flannel.alpha.coreos.com",
            );
        }
        if !name.is_empty() && !is_word(name) {
            return refuse("after the / it may have only lower-case letters, digits, _ and -");
        }
        if prefix.len() > 200 {
            return refuse("it must have 200 characters at most");
        }
        let dash = if name.is_empty() || name.ends_with('-') {
            ""
        } else {
            "-"
        };
        Ok(Self(format!("{domain}/{name}{dash}").into()))
    }

    /// The name of an annotation.
    pub fn key(&self, annotation: Annotation) -> String {
        format!("{}{}", self.0, annotation.name())
    }

    /// Which of flannel's annotations has this name.
    pub fn annotation(&self, key: &str) -> Option<Annotation> {
        let name = key.strip_prefix(&*self.0)?;
        Annotation::ALL.into_iter().find(|one| one.name() == name)
    }
}

impl Default for AnnotationPrefix {
    fn default() -> Self {
        Self("flannel.alpha.coreos.com/".into())
    }
}

impl fmt::Display for AnnotationPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for AnnotationPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AnnotationPrefix({})", self.0)
    }
}

/// One of flannel's annotations of a Node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Annotation {
    /// `kube-subnet-manager`: `true` makes the Node a record.
    Managed,
    /// `backend-type`.
    BackendType,
    /// `backend-data`, `backend-v6-data`: JSON text.
    BackendData(Family),
    /// `public-ip`, `public-ipv6`.
    PublicIp(Family),
    /// `public-ip-overwrite`, `public-ipv6-overwrite`: an operator's, published instead of the
    /// node's own address.
    Overwrite(Family),
    /// `node-public-ip`, `node-public-ipv6`: an operator's, read at start by the program on the
    /// node ([`KubeManager::node_settings`](crate::KubeManager::node_settings)).
    NodePublicIp(Family),
}

impl Annotation {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Managed,
        Self::BackendType,
        Self::BackendData(Family::V4),
        Self::BackendData(Family::V6),
        Self::PublicIp(Family::V4),
        Self::PublicIp(Family::V6),
        Self::Overwrite(Family::V4),
        Self::Overwrite(Family::V6),
        Self::NodePublicIp(Family::V4),
        Self::NodePublicIp(Family::V6),
    ];

    /// Those that a node writes itself; the others are an operator's.
    pub const WRITTEN: [Self; 6] = [
        Self::Managed,
        Self::BackendType,
        Self::BackendData(Family::V4),
        Self::BackendData(Family::V6),
        Self::PublicIp(Family::V4),
        Self::PublicIp(Family::V6),
    ];

    /// The name without the prefix.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Managed => "kube-subnet-manager",
            Self::BackendType => "backend-type",
            Self::BackendData(Family::V4) => "backend-data",
            Self::BackendData(Family::V6) => "backend-v6-data",
            Self::PublicIp(Family::V4) => "public-ip",
            Self::PublicIp(Family::V6) => "public-ipv6",
            Self::Overwrite(Family::V4) => "public-ip-overwrite",
            Self::Overwrite(Family::V6) => "public-ipv6-overwrite",
            Self::NodePublicIp(Family::V4) => "node-public-ip",
            Self::NodePublicIp(Family::V6) => "node-public-ipv6",
        }
    }
}
