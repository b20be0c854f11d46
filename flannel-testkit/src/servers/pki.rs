//! [`Authority`]: certificates of a test's own.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};

/// An authority of certificates with its files in a folder.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    ca: PathBuf,
    folder: PathBuf,
}

impl Authority {
    /// A new one, whose files are kept in this folder; it is made if it is not there.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn new(folder: &Path, name: &str) -> io::Result<Self> {
        let mut params = CertificateParams::new(Vec::new()).map_err(io::Error::other)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let certificate = params.self_signed(&key).map_err(io::Error::other)?;
        std::fs::create_dir_all(folder)?;
        let ca = folder.join(format!("{name}-ca.crt"));
        std::fs::write(&ca, certificate.pem())?;
        Ok(Self {
            issuer: Issuer::new(params, key),
            ca,
            folder: folder.to_owned(),
        })
    }

    /// The file of its own certificate.
    pub fn ca(&self) -> &Path {
        &self.ca
    }

    /// The files of a certificate for the loopback addresses, and of its key.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn server(&self, name: &str) -> io::Result<(PathBuf, PathBuf)> {
        let names = ["127.0.0.1", "localhost", "kubernetes.default.svc"];
        let names: Vec<String> = names.map(str::to_owned).into();
        let mut params = CertificateParams::new(names).map_err(io::Error::other)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.issue(name, &params)
    }

    /// The files of a certificate by which a client is known as a user of these groups, and of its
    /// key; it is valid for this long, in whole seconds.
    ///
    /// # Errors
    /// The folder cannot be written.
    #[allow(
        clippy::disallowed_methods,
        reason = "certificates are about wall time"
    )]
    pub fn client(
        &self,
        user: &str,
        groups: &[&str],
        valid: Duration,
    ) -> io::Result<(PathBuf, PathBuf)> {
        let mut params = CertificateParams::new(Vec::new()).map_err(io::Error::other)?;
        params.distinguished_name.push(DnType::CommonName, user);
        for group in groups {
            params
                .distinguished_name
                .push(DnType::OrganizationName, *group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let now = std::time::SystemTime::now();
        // A server's clock may be a little behind.
        params.not_before = (now - Duration::from_secs(60)).into();
        params.not_after = (now + valid).into();
        self.issue(user, &params)
    }

    /// A key pair for signing tokens: the files of its private and of its public half.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn signing_key(&self, name: &str) -> io::Result<(PathBuf, PathBuf)> {
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let files = self.files(name, "key", "pub");
        std::fs::write(&files.0, key.serialize_pem())?;
        std::fs::write(&files.1, key.public_key_pem())?;
        Ok(files)
    }

    fn issue(&self, name: &str, params: &CertificateParams) -> io::Result<(PathBuf, PathBuf)> {
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(io::Error::other)?;
        let files = self.files(name, "crt", "key");
        std::fs::write(&files.0, certificate.pem())?;
        std::fs::write(&files.1, key.serialize_pem())?;
        Ok(files)
    }

    fn files(&self, name: &str, first: &str, second: &str) -> (PathBuf, PathBuf) {
        let name = name.replace([':', '/'], "-");
        (
            self.folder.join(format!("{name}.{first}")),
            self.folder.join(format!("{name}.{second}")),
        )
    }
}
