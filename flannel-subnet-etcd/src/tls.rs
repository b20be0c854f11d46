//! Files of certificates and keys, read again when they change.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The files for `https://` endpoints, in PEM.
///
/// They are looked at before each call; when one has changed, the next call goes over a new
/// connection made with what is in them then.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TlsFiles {
    /// The certificates of the authorities that may have signed the servers' certificates. Without
    /// it no server is trusted.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key, where the servers want one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name in the servers' certificates, where it is not the host of the endpoint.
    pub server_name: Option<String>,
}

/// What tells one state of a file from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stamp(Vec<Option<(u64, Option<SystemTime>)>>);

impl Stamp {
    /// The state of files as it is now; one that cannot be looked at has none.
    pub(crate) async fn of(paths: &[PathBuf]) -> Self {
        let mut states = Vec::with_capacity(paths.len());
        for path in paths {
            let path = path.clone();
            let state = move || {
                let data = std::fs::metadata(path).ok()?;
                Some((data.len(), data.modified().ok()))
            };
            states.push(tokio::task::spawn_blocking(state).await.unwrap_or(None));
        }
        Self(states)
    }
}

/// Reads a file, or says which one cannot be read and why.
pub(crate) async fn read(what: &str, path: &Path) -> Result<Vec<u8>, String> {
    let owned = path.to_owned();
    let read = tokio::task::spawn_blocking(move || std::fs::read(owned)).await;
    match read {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => Err(format!("{what} {} cannot be read: {error}", path.display())),
        Err(error) => Err(format!("{what} {} cannot be read: {error}", path.display())),
    }
}

impl TlsFiles {
    /// All files.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        let identity = self.identity.iter();
        let identity = identity.flat_map(|(certificate, key)| [certificate, key]);
        self.ca.iter().chain(identity)
    }

    /// What is in the files, for the client library.
    #[cfg(feature = "tls")]
    pub(crate) async fn load(&self) -> Result<etcd_client::TlsOptions, String> {
        use etcd_client::{Certificate, Identity, TlsOptions};
        let mut options = TlsOptions::new();
        if let Some(path) = &self.ca {
            let pem = read("the CA file", path).await?;
            options = options.ca_certificate(Certificate::from_pem(pem));
        }
        if let Some((certificate, key)) = &self.identity {
            let certificate = read("the certificate file", certificate).await?;
            let key = read("the key file", key).await?;
            options = options.identity(Identity::from_pem(certificate, key));
        }
        if let Some(name) = &self.server_name {
            options = options.domain_name(name.clone());
        }
        Ok(options)
    }
}
