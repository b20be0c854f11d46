//! Certificates: of the server, of ours, wrong ones, and ones that are rotated.
#![cfg(feature = "tls")]

mod common;

use std::path::{Path, PathBuf};

use common::{CONFIG, acquire, begun, request, until_answered};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use flannel_core::Manager;
use flannel_core::manager::Error;
use flannel_subnet_etcd::{EtcdManager, EtcdOptions, TlsFiles};
use flannel_testkit::servers::{Etcd, EtcdOptions as ServerOptions, TcpSwitch};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// An authority of certificates, with its files in a folder.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    ca: PathBuf,
    folder: PathBuf,
}

impl Authority {
    fn new(folder: &Path, name: &str) -> Self {
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
    fn issue(&self, name: &str) -> (PathBuf, PathBuf) {
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

/// A folder that is removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("flannel-tls-{name}-{}", std::process::id()));
        std::fs::remove_dir_all(&path).ok();
        std::fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// A server that wants certificates of its clients, with a config.
async fn server(authority: &Authority) -> Etcd {
    let (certificate, key) = authority.issue("server");
    let etcd = Etcd::with(ServerOptions {
        tls: Some((certificate, key, Some(authority.ca.clone()))),
        ..ServerOptions::default()
    });
    let etcd = etcd.expect("etcd starts");
    let (certificate, key) = authority.issue("operator");
    let read = |path: &Path| std::fs::read(path).expect("it is there");
    let tls = TlsOptions::new()
        .ca_certificate(Certificate::from_pem(read(&authority.ca)))
        .identity(Identity::from_pem(read(&certificate), read(&key)));
    let options = Some(ConnectOptions::new().with_tls(tls));
    let mut client = Client::connect([etcd.endpoint()], options)
        .await
        .expect("a client");
    client
        .put("/coreos.com/network/config", CONFIG, None)
        .await
        .expect("an answer");
    etcd
}

fn manager(endpoint: &str, ca: &Path, identity: Option<(PathBuf, PathBuf)>) -> EtcdManager {
    let files = TlsFiles {
        ca: Some(ca.to_owned()),
        identity,
        ..TlsFiles::default()
    };
    let options = EtcdOptions::new([endpoint])
        .expect("an endpoint")
        .tls(files);
    EtcdManager::new(options).expect("sound settings")
}

#[tokio::test]
async fn a_certificate_of_the_right_authority_is_wanted_both_ways() {
    let folder = Folder::new("both-ways");
    let (right, wrong) = (
        Authority::new(&folder.0, "right"),
        Authority::new(&folder.0.join("wrong"), "wrong"),
    );
    let etcd = server(&right).await;
    let good = manager(&etcd.endpoint(), &right.ca, Some(right.issue("node")));
    acquire(&good, &request("a", 1)).await;
    drop(begun(&good).await);

    // The server is not whom we trust.
    let refused = manager(&etcd.endpoint(), &wrong.ca, Some(right.issue("node-2")));
    let error = refused
        .network_config()
        .await
        .expect_err("it must not be trusted");
    let text = flannel_core::error_chain(&error);
    assert!(text.contains("not signed by the CA"), "{text}");
    // We are not whom the server trusts, or nobody.
    for identity in [Some(wrong.issue("stranger")), None] {
        let refused = manager(&etcd.endpoint(), &right.ca, identity);
        let error = refused
            .network_config()
            .await
            .expect_err("it must not be let in");
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    }
    // A file that is not there is named.
    let missing = (folder.0.join("no.crt"), folder.0.join("no.key"));
    let refused = manager(&etcd.endpoint(), &right.ca, Some(missing));
    let error = refused
        .network_config()
        .await
        .expect_err("there is no certificate");
    let text = flannel_core::error_chain(&error);
    assert!(text.contains("no.crt"), "{text}");
}

#[tokio::test]
async fn rotated_certificates_cost_nothing() {
    let folder = Folder::new("rotated");
    let old = Authority::new(&folder.0.join("old"), "old");
    let new = Authority::new(&folder.0.join("new"), "new");
    let before = server(&old).await;
    let after = server(&new).await;
    let switch = TcpSwitch::new(before.address()).await.expect("a port");

    // What the node reads: first of the old authority, then of the new one.
    let node = folder.0.join("node");
    std::fs::create_dir_all(&node).expect("a folder");
    let ours = ["ca", "crt", "key"].map(|name| node.join(name));
    let install = |authority: &Authority| {
        let (certificate, key) = authority.issue("node");
        for (from, to) in [&authority.ca, &certificate, &key].into_iter().zip(&ours) {
            std::fs::copy(from, to).expect("a copy");
        }
    };
    install(&old);
    let [ca, certificate, key] = ours.clone();
    let endpoint = format!("https://{}", switch.address());
    let manager = manager(&endpoint, &ca, Some((certificate, key)));
    acquire(&manager, &request("a", 1)).await;

    // The server is replaced by one with other certificates: it is not trusted with the old ones.
    switch.turn(Some(after.address()));
    let refused = manager.network_config().await;
    assert!(
        matches!(refused, Err(Error::Unavailable { .. })),
        "{refused:?}"
    );
    // The files are replaced under the running manager, and nothing else is done.
    install(&new);
    let wants = request("a", 1);
    until_answered(|| manager.acquire_lease(&wants)).await;
}
