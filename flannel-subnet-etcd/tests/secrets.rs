//! No password in a log line, whatever goes right or wrong and however much is logged.

mod common;

use std::io;
use std::sync::{Arc, Mutex};

use common::{CONFIG, acquire, begun, manager, options, request, server, until_answered};
use flannel_core::Manager;
use flannel_core::manager::Error;
use flannel_subnet_etcd::Password;
use flannel_testkit::servers::EtcdVersion;
use tracing::level_filters::LevelFilter;
use tracing::subscriber::set_default;

/// What is logged, of every crate, as text.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic inside").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// On one thread, whose log it is.
#[tokio::test]
async fn no_password_is_ever_logged() {
    if !EtcdVersion::InPath.require("no_password_is_ever_logged") {
        return;
    }
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    let logging = set_default(subscriber);

    let (etcd, mut client) = server(EtcdVersion::InPath, CONFIG).await;
    let answer = "an answer";
    for (name, password) in [("root", "rootpw"), ("node", "first-pa55word")] {
        client.user_add(name, password, None).await.expect(answer);
    }
    client.role_add("root").await.expect(answer);
    for name in ["root", "node"] {
        client.user_grant_role(name, "root").await.expect(answer);
    }
    client.auth_enable().await.expect(answer);

    let file = etcd.folder().join("password");
    std::fs::write(&file, "first-pa55word\n").expect("written");
    let ours = options(etcd.endpoint()).user("node", Password::file(&file));
    let node = manager(ours);
    let lease = acquire(&node, &request("a", 1)).await;
    drop(begun(&node).await);
    // Refused, and not understood.
    for wrong in ["wrong-pa55word", "wrong\npa55word\u{1}"] {
        let stranger = options(etcd.endpoint()).user("node", Password::text(wrong));
        let refused = manager(stranger).acquire_lease(&request("b", 2)).await;
        assert!(refused.is_err(), "{refused:?}");
    }
    // Changed under way, first in the file.
    std::fs::write(&file, "other-pa55word\n").expect("written");
    node.renew_lease(&lease).await.expect("by what it has");
    let root = etcd_client::ConnectOptions::new().with_user("root", "rootpw");
    let root = etcd_client::Client::connect([etcd.endpoint()], Some(root)).await;
    let mut root = root.expect("root may");
    let changed = root.user_change_password("node", "other-pa55word").await;
    changed.expect(answer);
    until_answered(|| node.renew_lease(&lease)).await;
    // Gone.
    std::fs::remove_file(&file).expect("it is there");
    let fresh = options(etcd.endpoint()).user("node", Password::file(&file));
    let fresh = manager(fresh).network_config().await;
    assert!(matches!(fresh, Err(Error::Unavailable { .. })), "{fresh:?}");

    drop(logging);
    let text = String::from_utf8_lossy(&log.0.lock().expect("no panic inside")).into_owned();
    assert!(text.contains("h2"), "the libraries log, too");
    for part in ["pa55word", "rootpw"] {
        let line = text.lines().find(|line| line.contains(part));
        assert_eq!(line, None);
    }
}
