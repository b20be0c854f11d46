//! Certificates: of the server, of ours, wrong ones, and ones that are rotated.
#![cfg(feature = "tls")]

#[path = "common/authority.rs"]
mod authority;
mod common;

use std::path::{Path, PathBuf};

use authority::Authority;
use common::{CONFIG, acquire, begun, request, until, until_answered};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use flannel_core::manager::Error;
use flannel_core::{Event, Manager};
use flannel_subnet_etcd::{EtcdManager, EtcdOptions, TlsFiles};
use flannel_testkit::servers::{Etcd, EtcdOptions as ServerOptions, EtcdVersion, TcpSwitch};

common::on_each_etcd! {
    a_certificate_of_the_right_authority_is_wanted_both_ways
    rotated_certificates_cost_nothing
    certificates_that_are_replaced_file_by_file_cost_nothing
}

/// A folder that is removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(version: EtcdVersion, name: &str) -> Self {
        let id = std::process::id();
        let path = std::env::temp_dir().join(format!("flannel-tls-{name}-{version:?}-{id}"));
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
async fn server(version: EtcdVersion, authority: &Authority) -> Etcd {
    let (certificate, key) = authority.issue("server");
    let etcd = Etcd::with(ServerOptions {
        version,
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

async fn a_certificate_of_the_right_authority_is_wanted_both_ways(version: EtcdVersion) {
    let folder = Folder::new(version, "both-ways");
    let (right, wrong) = (
        Authority::new(&folder.0, "right"),
        Authority::new(&folder.0.join("wrong"), "wrong"),
    );
    let etcd = server(version, &right).await;
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

async fn rotated_certificates_cost_nothing(version: EtcdVersion) {
    let folder = Folder::new(version, "rotated");
    let old = Authority::new(&folder.0.join("old"), "old");
    let new = Authority::new(&folder.0.join("new"), "new");
    let before = server(version, &old).await;
    let after = server(version, &new).await;
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

/// Nobody replaces a certificate and its key in one moment. Until both are there, what is there works.
async fn certificates_that_are_replaced_file_by_file_cost_nothing(version: EtcdVersion) {
    let folder = Folder::new(version, "file-by-file");
    let authority = Authority::new(&folder.0, "right");
    let etcd = server(version, &authority).await;
    let switch = TcpSwitch::new(etcd.address()).await.expect("a port");
    let (certificate, key) = authority.issue("node");
    let (fresh_certificate, fresh_key) = authority.issue("fresh");
    let identity = Some((certificate.clone(), key.clone()));
    let endpoint = format!("https://{}", switch.address());
    let manager = manager(&endpoint, &authority.ca, identity);
    let lease = acquire(&manager, &request("a", 1)).await;
    let mut watch = begun(&manager).await;
    let before = switch.accepted();
    let goes_on = async || {
        for _ in 0..5 {
            let renewed = manager.renew_lease(&lease).await;
            renewed.expect("no call is lost");
        }
    };
    // Half of it is written; all of it; then the key.
    std::fs::write(&certificate, "-----BEGIN CERTIF").expect("written");
    goes_on().await;
    std::fs::copy(&fresh_certificate, &certificate).expect("a copy");
    goes_on().await;
    assert_eq!(switch.accepted(), before, "it cannot be used yet");
    std::fs::copy(&fresh_key, &key).expect("a copy");
    goes_on().await;
    assert_eq!(switch.accepted(), before + 1, "it is used from now on");
    // The watch has noticed nothing.
    let mut changed = lease.clone();
    changed.attrs = request("a", 2).attrs;
    manager.renew_lease(&changed).await.expect("it is ours");
    until(&mut watch, |item| match item.expect("the watch goes on") {
        Event::Put(lease) => (lease.attrs == changed.attrs).then_some(()),
        Event::Snapshot(_) => panic!("the watch began anew"),
        _ => None,
    })
    .await;
}
