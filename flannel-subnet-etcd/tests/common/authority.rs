//! Certificates for tests.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// An authority of certificates, with its files in a folder. Files are replaced when they are issued
/// again.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) ca: PathBuf,
    folder: PathBuf,
}

impl Authority {
    pub(crate) fn new(folder: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        std::fs::create_dir_all(folder).expect("a folder");
        let ca = folder.join(format!("{name}.pem"));
        std::fs::write(&ca, certificate.pem()).expect("written");
        Self {
            issuer: Issuer::new(params, key),
            ca,
            folder: folder.to_owned(),
        }
    }

    /// Files of a certificate for 127.0.0.1 and its key.
    pub(crate) fn issue(&self, name: &str) -> (PathBuf, PathBuf) {
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let mut params = CertificateParams::new(names).expect("sound names");
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let files = (
            self.folder.join(format!("{name}.crt")),
            self.folder.join(format!("{name}.key")),
        );
        std::fs::write(&files.0, certificate.pem()).expect("written");
        std::fs::write(&files.1, key.serialize_pem()).expect("written");
        files
    }
}
